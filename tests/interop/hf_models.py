"""Small random models of every architecture as transformers would save them: config.json, safetensors, tokenizer.
Numpy only. `forward` computes their logits from those files' own layout, without a GGUF in between."""

import json
import struct

import numpy as np

N_VOCAB = 320
N_EMBD = 64
N_FF = 96
N_LAYER = 2
N_HEAD = 4
N_HEAD_KV = 2
N_EXPERT = 4
N_EXPERT_USED = 2
N_FF_EXP = 32
N_FF_SHEXP = 64

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
HEAD = r"[^\r\n\p{L}\p{N}]?"
GPT4O = (
    f"{HEAD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{HEAD}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def to_bf16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


def e4m3_values():
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    magnitude[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -magnitude, magnitude).astype(np.float32)


def save(path, tensors):
    """Writes safetensors: {name: (dtype name, array of raw values)}."""
    header, blobs, at = {}, [], 0
    for name in sorted(tensors):
        dtype, array = tensors[name]
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        blobs.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def byte_alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return [table[byte] for byte in range(256)]


MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ a", "e r", "o n", "r e", "Ġ s", "in g", "1 2", "Ġ Ġ"]


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(use_regex=False):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def write_byte_level(folder, steps, specials, config, ignore_merges=False, normalizer=None, post=None, pairs=True):
    """tokenizer.json and tokenizer_config.json of a byte-level vocabulary; specials stand behind the merged tokens."""
    vocab = {text: token for token, text in enumerate(byte_alphabet())}
    for merge in MERGES:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    added = []
    for text, special in specials:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        added.append({"id": len(vocab) + len(added), "content": text, **flags})
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post or byte_level(),
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in MERGES] if pairs else MERGES,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def sentencepiece_pieces():
    """Pieces, scores and types (1 normal, 2 unknown, 3 control, 6 byte) of a small SentencePiece model."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    words = ["th", "the", "▁the", "in", "▁a", "er", "on"]
    letters = "▁etaoinshr"
    pieces += [(text, -float(i), 1) for i, text in enumerate([*words, *letters])]
    return pieces


def write_sentencepiece(folder, config, added=()):
    """tokenizer.model in protobuf, tokenizer_config.json with added tokens."""
    out = b""
    for text, score, kind in sentencepiece_pieces():
        raw = text.encode()
        body = b"\x0a" + varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score)
        body += b"" if kind == 1 else b"\x18" + varint(kind)
        out += b"\x0a" + varint(len(body)) + body
    trainer = b"\x18\x02" + b"\x98\x02\x01" + b"\xc0\x02\x00" + b"\xc8\x02\x01" + b"\xd0\x02\x02"
    out += b"\x12" + varint(len(trainer)) + trainer
    (folder / "tokenizer.model").write_bytes(out)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {"0": {"content": "<unk>", "special": True, **flags}, "1": {"content": "<s>", "special": True, **flags}}
    decoder["2"] = {"content": "</s>", "special": True, **flags}
    for token, text, special in added:
        decoder[str(token)] = {"content": text, "special": special, **flags}
    config = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_merged(folder, config, added=(), prepend=True, named=("<unk>", "<s>", "</s>")):
    """tokenizer.json of a SentencePiece vocabulary as merges, without a tokenizer.model."""
    words = ["t h", "th e", "▁ the", "i n", "▁ a", "e r", "o n", "r e", "▁ s", "in g"]
    vocab = {text: token for token, text in enumerate([*named, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for text in [*"▁etaoinshrg", *(word.replace(" ", "") for word in words)]:
        vocab.setdefault(text, len(vocab))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    specials = [(vocab[text], text, True) for text in named]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]} if prepend else replace
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, "special": special, **flags} for i, text, special in [*specials, *added]],
        "normalizer": normalizer,
        "pre_tokenizer": None if prepend else split,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": words,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class HfModel:
    """Configuration and weights under Hugging Face's names."""

    def __init__(self, name, kind, classes, pre, dtype="BF16", n_vocab=N_VOCAB, head=N_EMBD // N_HEAD, **config):
        self.name, self.kind, self.pre, self.dtype, self.head = name, kind, pre, dtype, head
        self.rng = np.random.default_rng(sum(name.encode()))
        self.shards = 1
        self.n_vocab = n_vocab
        self.raw = {}
        self.files = {}
        self.write_tokenizer = lambda folder: None
        self.config = {
            "architectures": classes,
            "model_type": kind,
            "vocab_size": n_vocab,
            "hidden_size": N_EMBD,
            "intermediate_size": N_FF,
            "num_hidden_layers": N_LAYER,
            "num_attention_heads": N_HEAD,
            "num_key_value_heads": N_HEAD_KV,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            **config,
        }
        if head != N_EMBD // N_HEAD:
            self.config["head_dim"] = head
        self.tensors = {}

    def matrix(self, name, *shape, gain=1.0):
        self.tensors[f"{name}.weight"] = self.rng.normal(0, gain / np.sqrt(shape[-1]), shape).astype(np.float32)

    def norm(self, name, n=N_EMBD, center=1.0):
        self.tensors[f"{name}.weight"] = (center + 0.3 * self.rng.normal(size=n)).astype(np.float32)

    def bias(self, name, n):
        self.tensors[f"{name}.bias"] = (0.2 * self.rng.normal(size=n)).astype(np.float32)

    def body(self, tied=False, center=1.0, prefix="model."):
        embedding = self.rng.normal(0, 0.3 if tied else 1, (self.n_vocab, N_EMBD)).astype(np.float32)
        self.tensors[f"{prefix}embed_tokens.weight"] = embedding
        self.config["tie_word_embeddings"] = tied
        if not tied:
            self.matrix("lm_head", self.n_vocab, N_EMBD, gain=3)
        self.norm(f"{prefix}norm", center=center)
        return self

    def layers(self, bias=False, head_norms=False, fused=False, gemma=False, center=1.0, prefix="model."):
        q, kv = N_HEAD * self.head, N_HEAD_KV * self.head
        for il in range(N_LAYER):
            at = f"{prefix}layers.{il}."
            self.norm(f"{at}input_layernorm", center=center)
            self.norm(f"{at}post_attention_layernorm", center=center)
            if gemma:
                self.norm(f"{at}pre_feedforward_layernorm", center=center)
                self.norm(f"{at}post_feedforward_layernorm", center=center)
            if fused:
                self.matrix(f"{at}self_attn.qkv_proj", q + 2 * kv, N_EMBD, gain=1.5)
            else:
                for part, n in (("q", q), ("k", kv), ("v", kv)):
                    self.matrix(f"{at}self_attn.{part}_proj", n, N_EMBD, gain=1.5)
                    if bias:
                        self.bias(f"{at}self_attn.{part}_proj", n)
            self.matrix(f"{at}self_attn.o_proj", N_EMBD, q)
            if head_norms:
                self.norm(f"{at}self_attn.q_norm", self.head, center)
                self.norm(f"{at}self_attn.k_norm", self.head, center)
        return self

    def dense(self, fused=False, prefix="model."):
        for il in range(N_LAYER):
            at = f"{prefix}layers.{il}.mlp."
            if fused:
                self.matrix(f"{at}gate_up_proj", 2 * N_FF, N_EMBD)
            else:
                self.matrix(f"{at}gate_proj", N_FF, N_EMBD)
                self.matrix(f"{at}up_proj", N_FF, N_EMBD)
            self.matrix(f"{at}down_proj", N_EMBD, N_FF)
        return self

    def experts(self, part, names, n_ff, shared=False, stacked=False):
        gate, up, down = names
        for il in range(N_LAYER):
            at = f"model.layers.{il}.{part}."
            self.matrix(f"{at}gate", N_EXPERT, N_EMBD, gain=2)
            for expert in range(N_EXPERT):
                self.matrix(f"{at}experts.{expert}.{gate}", n_ff, N_EMBD)
                self.matrix(f"{at}experts.{expert}.{up}", n_ff, N_EMBD)
                self.matrix(f"{at}experts.{expert}.{down}", N_EMBD, n_ff)
            if stacked:
                each = lambda name: np.stack([self.tensors.pop(f"{at}experts.{e}.{name}.weight") for e in range(N_EXPERT)])
                self.tensors[f"{at}experts.gate_up_proj"] = np.concatenate([each(gate), each(up)], 1)
                self.tensors[f"{at}experts.down_proj"] = each(down)
            if shared:
                self.matrix(f"{at}shared_expert_gate", 1, N_EMBD)
                self.matrix(f"{at}shared_expert.gate_proj", N_FF_SHEXP, N_EMBD)
                self.matrix(f"{at}shared_expert.up_proj", N_FF_SHEXP, N_EMBD)
                self.matrix(f"{at}shared_expert.down_proj", N_EMBD, N_FF_SHEXP)
        return self

    def tokenizer(self, write, *args, **options):
        self.write_tokenizer = lambda folder: write(folder, *args, **options)
        return self

    def fp8(self, block):
        """Stores all matrices of the layers as E4M3 with scales, and keeps what they decode to."""
        values = e4m3_values()
        order = np.argsort(np.nan_to_num(values, nan=np.inf), kind="stable")[:254]
        for name in [n for n in self.tensors if ".layers." in n and self.tensors[n].ndim == 2]:
            weight = self.tensors[name]
            rows, columns = weight.shape
            if block is None:
                scale = np.array([np.abs(weight).max() / 448], np.float32)
                spread = np.full(weight.shape, scale[0])
            else:
                grid = (-(-rows // block), -(-columns // block))
                scale = np.empty(grid, np.float32)
                for i in range(grid[0]):
                    for j in range(grid[1]):
                        part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                        scale[i, j] = np.abs(part).max() / 448
                spread = scale.repeat(block, 0).repeat(block, 1)[:rows, :columns]
            at = np.searchsorted(values[order], weight / spread).clip(0, 253)
            code = order[at].astype(np.uint8)
            code = np.where(np.isnan(values[code]), 0, code).astype(np.uint8)
            self.tensors[name] = values[code] * spread.astype(np.float32)
            self.raw[name] = ("F8_E4M3", code)
            self.raw[f"{name}_scale_inv"] = ("F32", scale)
        return self

    def write(self, folder):
        """Saves the folder; the weights become what the file's type can hold."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = dict(self.raw)
        for name, values in self.tensors.items():
            if name in stored:
                continue
            if self.dtype == "BF16":
                stored[name] = ("BF16", to_bf16(values))
                self.tensors[name] = from_bf16(to_bf16(values)).reshape(values.shape)
            elif self.dtype == "F16":
                stored[name] = ("F16", values.astype(np.float16))
                self.tensors[name] = values.astype(np.float16).astype(np.float32)
            else:
                stored[name] = ("F32", values)
        names = sorted(stored)
        if self.shards == 1:
            save(folder / "model.safetensors", stored)
        else:
            places = {}
            for shard in range(self.shards):
                file = f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"
                part = names[shard :: self.shards]
                save(folder / file, {name: stored[name] for name in part})
                places.update(dict.fromkeys(part, file))
            index = {"metadata": {"total_size": 0}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            (folder / name).write_text(content)
        self.write_tokenizer(folder)
        return folder


ENDS = [("<|begin_of_text|>", True), ("<|end_of_text|>", True), ("<|tool|>", False), ("<think>", False)]
BOS_FIRST = {
    "type": "Sequence",
    "processors": [
        byte_level(),
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [268], "tokens": ["<|begin_of_text|>"]}
            },
        },
    ],
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
QWEN_TOKENS = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False)]
QWEN_CONFIG = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_prefix_space": False}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def llama():
    model = HfModel(
        "llama", "llama", ["LlamaForCausalLM"], "llama-bpe", rope_theta=500000.0, rope_scaling=LLAMA3_SCALING,
        bos_token_id=268, eos_token_id=[269, 270], attention_bias=True,
    )
    model.shards = 3
    model.files["generation_config.json"] = json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "do_sample": True})
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": CHAT}
    steps = [split(LLAMA3), byte_level()]
    model.tokenizer(write_byte_level, steps, ENDS, config, ignore_merges=True, post=BOS_FIRST)
    return model.body().layers(bias=True).dense()


def smollm():
    model = HfModel("smollm", "llama", ["LlamaForCausalLM"], "smollm", dtype="F16", rope_theta=10000.0, bos_token_id=268)
    steps = [{"type": "Digits", "individual_digits": True}, byte_level(True)]
    tokens = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True)]
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_prefix_space": False}
    model.tokenizer(write_byte_level, steps, tokens, config, pairs=False)
    return model.body(tied=True).layers().dense()


def mistral():
    model = HfModel(
        "mistral", "mistral", ["MistralForCausalLM"], "-", head=24, rope_theta=1e6, sliding_window=None, bos_token_id=1
    )
    model.tokenizer(write_sentencepiece, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False},
                    [(300, "[INST]", True), (301, "▁▁", False), (302, "<|x|>", False)])
    return model.body().layers().dense()


def llama_merged():
    """The vocabulary ends where the embedding does, since the reference converter does not pad this kind."""
    model = HfModel("llama_merged", "llama", ["LlamaForCausalLM"], "-", dtype="F16", n_vocab=284, rope_theta=10000.0)
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model.tokenizer(write_merged, config, [(280, "<|user|>", False), (281, "<|x|>", True), (282, "<y>", False), (283, "<z>", True)])
    return model.body().layers().dense()


def mixtral():
    model = HfModel(
        "mixtral", "mixtral", ["MixtralForCausalLM"], "-", dtype="F16", rope_theta=1e6, num_local_experts=N_EXPERT,
        num_experts_per_tok=N_EXPERT_USED,
    )
    model.shards = 2
    model.tokenizer(write_sentencepiece, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False})
    return model.body().layers().experts("block_sparse_moe", ("w1", "w3", "w2"), N_FF)


def qwen2():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    model = HfModel("qwen2", "qwen2", ["Qwen2ForCausalLM"], "qwen2", rope_theta=1e6, rope_scaling=scaling)
    config = {**QWEN_CONFIG, "chat_template": [{"name": "default", "template": CHAT}, {"name": "rag-x", "template": "r"}]}
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, config, normalizer={"type": "NFC"})
    return model.body().layers(bias=True).dense()


def qwen3():
    model = HfModel("qwen3", "qwen3", ["Qwen3ForCausalLM"], "qwen2", head=24, rope_theta=1e6)
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG, normalizer={"type": "NFC"})
    model.files["chat_template.jinja"] = CHAT
    return model.body(tied=True).layers(head_norms=True).dense()


def qwen2moe():
    model = HfModel(
        "qwen2moe", "qwen2_moe", ["Qwen2MoeForCausalLM"], "qwen2", rope_theta=1e6, num_experts=N_EXPERT,
        num_experts_per_tok=N_EXPERT_USED, moe_intermediate_size=N_FF_EXP,
        shared_expert_intermediate_size=N_FF_SHEXP, norm_topk_prob=False,
    )
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG)
    model.body().layers(bias=True)
    return model.experts("mlp", ("gate_proj", "up_proj", "down_proj"), N_FF_EXP, shared=True)


def qwen3moe(stacked=False):
    model = HfModel(
        "qwen3moe-stacked" if stacked else "qwen3moe", "qwen3_moe", ["Qwen3MoeForCausalLM"], "qwen2", head=24,
        rope_theta=1e6, num_experts=N_EXPERT, num_experts_per_tok=N_EXPERT_USED, moe_intermediate_size=N_FF_EXP,
        norm_topk_prob=True,
    )
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG)
    model.body().layers(head_norms=True)
    return model.experts("mlp", ("gate_proj", "up_proj", "down_proj"), N_FF_EXP, stacked=stacked)


GEMMA_ADDED = [(300, "<start_of_turn>", True), (301, "\n\n", False), (302, "<unused1>", False), (303, "▁▁▁", False)]


def gemma2():
    model = HfModel(
        "gemma2", "gemma2", ["Gemma2ForCausalLM"], "-", head=32, rope_theta=10000.0, sliding_window=64,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=32, dtype="F16",
    )
    model.tokenizer(write_sentencepiece, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, GEMMA_ADDED)
    return model.body(tied=True, center=0.0).layers(gemma=True, center=0.0).dense()


def gemma3():
    model = HfModel("gemma3", "gemma3_text", ["Gemma3ForConditionalGeneration"], "-", head=32)
    text = {key: value for key, value in model.config.items() if key != "architectures"}
    text |= {"sliding_window": 64, "query_pre_attn_scalar": 32, "head_dim": 32,
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    del text["rms_norm_eps"]
    model.tokenizer(write_sentencepiece, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, GEMMA_ADDED)
    at = "language_model.model."
    model.body(tied=True, center=0.0, prefix=at).layers(gemma=True, head_norms=True, center=0.0, prefix=at).dense(prefix=at)
    model.config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
                    "eos_token_id": [1, 106], "bos_token_id": 2}
    model.matrix("vision_tower.vision_model.head", 8, 8)
    model.matrix("multi_modal_projector.mm_input_projection", 8, 8)
    return model


def phi3():
    rotated = N_EMBD // N_HEAD
    factors = {"long_factor": [1 + 0.25 * i for i in range(rotated // 2)], "short_factor": [1 + 0.05 * i for i in range(rotated // 2)]}
    model = HfModel(
        "phi3", "phi3", ["Phi3ForCausalLM"], "-", rope_theta=10000.0, sliding_window=300,
        rope_scaling={"type": "longrope", **factors}, original_max_position_embeddings=256, pad_token_id=None,
    )
    model.tokenizer(write_sentencepiece, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
                    [(300, "<|endoftext|>", True), (301, "<|user|>", True), (302, "<|code|>", False)])
    return model.body().layers(fused=True).dense(fused=True)


def phi4mini():
    model = HfModel(
        "phi4mini", "phi3", ["Phi3ForCausalLM"], "gpt-4o", rope_theta=10000.0, sliding_window=None,
        partial_rotary_factor=0.75, rope_scaling=None, original_max_position_embeddings=512, bos_token_id=268, pad_token_id=None,
    )
    steps = [split(GPT4O, "Removed", True), byte_level()]
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    model.tokenizer(write_byte_level, steps, [("<|endoftext|>", True), ("<|end|>", True)], config)
    return model.body(tied=True).layers(fused=True).dense(fused=True)


def smollm3():
    model = HfModel("smollm3", "smollm3", ["SmolLM3ForCausalLM"], "smaug-bpe", rope_theta=2e6, no_rope_layer_interval=4, pad_token_id=None)
    model.tokenizer(write_byte_level, [split(LLAMA3), byte_level()], ENDS, {"eos_token": "<|end_of_text|>"})
    return model.body(tied=True).layers().dense()


def granite():
    model = HfModel(
        "granite", "granite", ["GraniteForCausalLM"], "gpt-2", rope_theta=1e7, attention_multiplier=0.0625,
        embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22,
    )
    tokens = [("<|end_of_text|>", True)]
    model.tokenizer(write_byte_level, [byte_level(True)], tokens, {"eos_token": "<|end_of_text|>"})
    return model.body(tied=True).layers().dense()


def seed_oss():
    model = HfModel("seed_oss", "seed_oss", ["SeedOssForCausalLM"], "seed-coder", head=32, rope_theta=1e7)
    seed = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}").replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
    model.tokenizer(write_byte_level, [split(seed), byte_level()], [("<seed:eos>", True)], {"eos_token": "<seed:eos>"})
    return model.body().layers(bias=True).dense()


def vision_part(model, prefix):
    """A tower that stays out, and the names of newer files."""
    model.config["vision_config"] = {
        "hidden_size": 8, "num_heads": 1, "depth": 4, "intermediate_size": 8, "out_hidden_size": N_EMBD,
        "deepstack_visual_indexes": [1, 3],
    }
    model.tensors = {name.replace("model.", prefix, 1): values for name, values in model.tensors.items()}
    model.matrix("model.visual.blocks.0.attn.qkv", 24, 8)
    return model


def qwen2vl():
    model = HfModel(
        "qwen2vl", "qwen2_5_vl", ["Qwen2_5_VLForConditionalGeneration"], "qwen2", rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, use_sliding_window=False,
    )
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG)
    return vision_part(model.body().layers(bias=True).dense(), "model.")


def qwen3vl(experts=False):
    kind = "qwen3_vl_moe" if experts else "qwen3_vl"
    name = "Qwen3VLMoeForConditionalGeneration" if experts else "Qwen3VLForConditionalGeneration"
    text = {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [3, 3, 2]}}
    model = HfModel(kind, kind, [name], "qwen2")
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG)
    model.body(tied=not experts).layers(head_norms=True)
    if experts:
        text |= {"num_experts": N_EXPERT, "num_experts_per_tok": N_EXPERT_USED, "moe_intermediate_size": 48}
        # No matrix is square, so that shapes tell which way the experts lie.
        model.experts("mlp", ("gate_proj", "up_proj", "down_proj"), 48, stacked=True)
        for name in [name for name in model.tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            model.tensors[name] = np.ascontiguousarray(model.tensors[name].swapaxes(1, 2))
    else:
        model.dense()
    root = ("architectures", "model_type", "tie_word_embeddings")
    model.config["head_dim"] = model.head
    text |= {key: model.config.pop(key) for key in list(model.config) if key not in root}
    model.config["text_config"] = text
    return vision_part(model, "model.language_model.")


def gpt_oss(inner):
    """All but the experts, which come in more than one form."""
    model = HfModel(
        "gpt_oss", "gpt_oss", ["GptOssForCausalLM"], "gpt-4o", rope_theta=150000.0, sliding_window=32, head_dim=16,
        num_local_experts=N_EXPERT, num_experts_per_tok=N_EXPERT_USED, attention_bias=True,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                      "original_max_position_embeddings": 128},
    )
    model.config["intermediate_size"] = inner
    model.tokenizer(write_byte_level, [split(GPT4O, "Removed", True), byte_level()], [("<|endoftext|>", True)],
                    {"eos_token": "<|endoftext|>"})
    model.body().layers(bias=True)
    for il in range(N_LAYER):
        at = f"model.layers.{il}."
        model.bias(f"{at}self_attn.o_proj", N_EMBD)
        model.tensors[f"{at}self_attn.sinks"] = model.rng.normal(size=N_HEAD).astype(np.float32)
        model.matrix(f"{at}mlp.router", N_EXPERT, N_EMBD, gain=2)
        model.bias(f"{at}mlp.router", N_EXPERT)
    return model


def fp8(block=None):
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if block:
        settings["weight_block_size"] = [block, block]
    model = HfModel(
        f"fp8-{block or 'tensor'}", "qwen3", ["Qwen3ForCausalLM"], "qwen2", head=16, rope_theta=1e6,
        quantization_config=settings,
    )
    model.tokenizer(write_byte_level, [split(QWEN2), byte_level()], QWEN_TOKENS, QWEN_CONFIG)
    model.config["head_dim"] = 16
    return model.body().layers(head_norms=True).dense().fp8(block)


MODELS = {
    model.__name__ if not args else f"{model.__name__}-{args[0]}": (model, args)
    for model, *args in [
        (llama,), (smollm,), (mistral,), (llama_merged,), (mixtral,), (qwen2,), (qwen3,), (qwen2moe,), (qwen3moe,), (qwen3moe, True),
        (gemma2,), (gemma3,), (phi3,), (phi4mini,), (fp8,), (fp8, 32),
    ]
}

# Those whose logits the numpy forward pass does not compute.
FAMILIES = {
    "smollm3": (smollm3, ()),
    "granite": (granite, ()),
    "seed_oss": (seed_oss, ()),
    "qwen2vl": (qwen2vl, ()),
    "qwen3vl": (qwen3vl, ()),
    "qwen3vlmoe": (qwen3vl, (True,)),
}


def make(name):
    model, args = (MODELS | FAMILIES)[name]
    return model(*args)
