#!/usr/bin/env python3
"""Writes the files in fuzz/seeds: one small sound input for each thing that a fuzz target can meet.

Inputs that once broke a reader stand beside them as `found-*` and are left alone. Run:  python3 scripts/fuzz_seeds.py
"""
import json
import pathlib
import struct

SEEDS = pathlib.Path(__file__).resolve().parent.parent / "fuzz" / "seeds"

# Metadata types of GGUF: name, id, struct's letter.
KINDS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "?"), "str": (8, None), "array": (9, None), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}
# Tensor types: id, elements of a block, bytes of a block.
F32, F16, Q4_0, Q8_0, Q4_K, IQ4_XS = (0, 1, 4), (1, 1, 2), (2, 32, 18), (8, 32, 34), (12, 256, 144), (23, 256, 136)


def save(target, name, data):
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


class Gguf:
    """A GGUF file in either byte order."""

    def __init__(self, order="<", version=3, alignment=32):
        self.order, self.version, self.alignment = order, version, alignment
        self.pairs, self.infos, self.data = [], [], b""

    def pack(self, letters, *values):
        return struct.pack(self.order + letters, *values)

    def string(self, text):
        return self.pack("Q", len(text.encode())) + text.encode()

    def payload(self, kind, value):
        if kind == "str":
            return self.string(value)
        if kind == "array":
            of, items = value
            return self.pack("IQ", KINDS[of][0], len(items)) + b"".join(self.payload(of, item) for item in items)
        return self.pack(KINDS[kind][1], value)

    def set(self, key, kind, value):
        self.pairs.append(self.string(key) + self.pack("I", KINDS[kind][0]) + self.payload(kind, value))
        return self

    def tensor(self, name, shape, kind, data=None):
        number, elements, size = kind
        total = 1
        for dim in shape:
            total *= dim
        size = total // elements * size
        info = self.string(name) + self.pack("I", len(shape)) + b"".join(self.pack("Q", dim) for dim in shape)
        self.infos.append(info + self.pack("IQ", number, len(self.data)))
        self.data += data if data is not None else bytes(i * 37 % 60 for i in range(size))
        self.data += bytes(-len(self.data) % self.alignment)
        return self

    def floats(self, name, shape, values):
        return self.tensor(name, shape, F32, self.pack(f"{len(values)}f", *values))

    def build(self):
        out = b"GGUF" + self.pack("IQQ", self.version, len(self.infos), len(self.pairs))
        out += b"".join(self.pairs) + b"".join(self.infos)
        return out + bytes(-len(out) % self.alignment) + self.data


def gguf_reader():
    def every_kind(file):
        file.set("general.architecture", "str", "llama")
        values = {"bool": True, "str": "text", "f32": 0.5, "f64": -0.25, "array": ("u8", [1, 2])}
        for kind in KINDS:
            file.set(f"one.{kind}", kind, values.get(kind, 7))
            file.set(f"many.{kind}", "array", (kind, [values.get(kind, 7)] * 3))
            file.set(f"none.{kind}", "array", (kind, []))
        return file.set("deep", "array", ("array", [("array", [("str", ["a", "", "b"])]), ("array", [])]))

    def tensors(file):
        file.floats("norm", [8], [0.5] * 8).tensor("half", [4, 3], F16).tensor("q4", [64, 2], Q4_0)
        return file.tensor("q8", [32], Q8_0).tensor("q4k", [256], Q4_K).tensor("iq4", [256], IQ4_XS)

    save("gguf_reader", "empty.gguf", Gguf().build())
    save("gguf_reader", "metadata.gguf", every_kind(Gguf()).build())
    save("gguf_reader", "tensors.gguf", tensors(Gguf()).build())
    save("gguf_reader", "big-endian.gguf", every_kind(Gguf(">")).floats("norm", [4], [1.0, -1.0, 0.0, 2.0]).build())
    old = tensors(Gguf(version=2, alignment=64).set("general.alignment", "u32", 64))
    save("gguf_reader", "version-2-aligned.gguf", old.build())
    shapes = Gguf().floats("rank4", [2, 1, 3, 1], [0.0] * 6).floats("scalar", [], [3.0]).floats("none", [4, 0], [])
    save("gguf_reader", "shapes.gguf", shapes.build())
    for count, name in (1, "only-shard"), (2, "first-of-two"):
        split = Gguf().set("split.no", "u16", 0).set("split.count", "u16", count)
        split.set("split.tensors.count", "i32", count).floats("a", [4], [1.0] * 4)
        save("gguf_reader", f"{name}.gguf", split.build())


def imatrix():
    def entry(name, calls, values):
        return struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)

    entries = [entry("blk.0.attn_q.weight", 3, [1.0, 2.0, 0.5, 0.0]), entry("blk.0.ffn_down.weight", 3, [0.25] * 6)]
    body = struct.pack("<i", 2) + b"".join(entries)
    save("imatrix_dat", "bare.dat", body)
    save("imatrix_dat", "with-trailer.dat", body + struct.pack("<ii", 3, 8) + b"text.txt")
    odd = [entry("no-calls", 0, [1.0]), entry("zero", 1, [0.0]), entry("great", 2**31 - 1, [3e38, 1e-45])]
    save("imatrix_dat", "odd.dat", struct.pack("<i", 3) + b"".join(odd))

    def file():
        texts = Gguf().set("general.type", "str", "imatrix").set("imatrix.datasets", "array", ("str", ["text.txt"]))
        return texts.set("imatrix.chunk_count", "u32", 3).set("imatrix.chunk_size", "u32", 512)

    plain = file().floats("blk.0.attn_q.weight.in_sum2", [4], [1.0, 2.0, 0.5, 0.0])
    plain.floats("blk.0.attn_q.weight.counts", [1], [1536.0])
    save("imatrix_gguf", "plain.gguf", plain.build())
    experts = file().floats("blk.0.ffn_up_exps.weight.in_sum2", [4, 3], [1.0] * 4 + [0.0] * 4 + [2.0] * 4)
    experts.floats("blk.0.ffn_up_exps.weight.counts", [1, 3], [512.0, 0.0, 1024.0])
    experts.floats("blk.0.attn_k.weight.in_sum2", [2], [0.5, 0.5]).floats("blk.0.attn_k.weight.counts", [1], [1.5])
    save("imatrix_gguf", "experts.gguf", experts.floats("other", [2], [1.0, 2.0]).build())


def tokenizer():
    def save_one(name, model, pre, flags, role_id, tokens, merges, text):
        # The byte gives the model by its rest and the id of the special tokens by its upper half.
        byte = next(byte for byte in range(16 * role_id, 16 * role_id + 16) if byte % 9 == model)
        fields = [*tokens, "", *merges, "", text]
        body = b"\xff".join(field if isinstance(field, bytes) else field.encode() for field in fields)
        save("tokenizer", name, bytes([byte, pre, flags]) + body)

    letters = list("abcdehlorst")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    spiece = ["<unk>", "<s>", *byte_tokens, "▁", *letters, "he", "▁he", "ll", "llo", "▁hello", "st"]
    bytewise = ["<|end|>", "Ġ", "Ċ", *letters, "he", "Ġhe", "ll", "llo", "Ġhello", "1", "2", "12"]
    merges = ["h e", "Ġ he", "l l", "ll o", "Ġhe llo", "1 2"]
    pieces = ["[UNK]", "[CLS]", "▁hello", "▁the", *letters, "lo", "est", "▁"]
    every_role = 2 | 8 | 16 | 32 | 64
    save_one("sentencepiece", 0, 0, 1 | 2 | 8 | 16 | 32, 0, spiece, [], "hello best  ä\n")
    for pre, name in enumerate(["one", "two", "three", "four", "five", "six"]):
        save_one(f"byte-pairs-{name}", 1, 7 * pre, every_role, 0, bytewise, merges, "hello 12, it's\r\n\n  best <|end|>é")
    save_one("word-pieces", 2, 0, every_role, 1, pieces, [], "Hello, the bést 漢字")
    save_one("unigram", 3, 0, every_role | 4, 0, pieces, [], " hello  the best")
    save_one("unigram-with-map", 3, 0, every_role | 128, 0, pieces, [], struct.pack("<III", 8, 0x100, 0x200) + b"x\0y\0")
    save_one("rwkv", 4, 0, 2 | 8, 0, ["<s>", "a", "ab", "abc", "'\\x00\\xe4'", '"it\\\'s"', "b", "c"], [], "abcab\0")
    save_one("plamo", 5, 0, 1 | 2 | 8 | 32, 0, ["<unk>", *byte_tokens, *letters, "he", "hel", "hello"], [], "hello best ö")
    save_one("gemma", 6, 0, every_role, 0, spiece, ["h e", "l l"], "hello best\n\n")
    save_one("words", 7, 0, every_role, 0, ["<unk>", "hello", "best"], [], "hello  best\tother")
    save_one("dna", 8, 0, every_role, 0, ["<unk>", "<dna>", "</dna>", "<oov>", *bytewise, "ACGTAC"], merges, "<dna>ACGTACNN</dna> hello")


def convert():
    def safetensors(header, data=b""):
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def tensor(dtype, shape, start, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    save("convert_safetensors", "empty.safetensors", safetensors({}))
    one = {"__metadata__": {"format": "pt"}, "model.norm.weight": tensor("F32", [2], 0, 8)}
    save("convert_safetensors", "one.safetensors", safetensors(one, bytes(8)))
    kinds = ["F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL"]
    header, at = {}, 0
    for kind, size in zip(kinds, [4, 2, 2, 1, 8, 1, 1]):
        header[f"layers.0.{kind}"] = tensor(kind, [2, 3], at, at + 6 * size)
        at += 6 * size
    header["nothing"] = tensor("F32", [0, 4], at, at)
    header["number"] = tensor("F32", [], at, at + 4)
    save("convert_safetensors", "kinds.safetensors", safetensors(header, bytes(range(at + 4))))

    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def tokenizer_json(name, steps, model, **more):
        steps = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
        whole = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": steps, "model": model, **more}
        save("convert_tokenizer_json", name, json.dumps(whole, ensure_ascii=False))

    def cut(regex):
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    def byte_level(use_regex):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}

    vocab = {"a": 0, "b": 1, "ab": 2, "Ġ": 3}
    pairs = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "ignore_merges": True, "byte_fallback": False}
    joined = {"type": "BPE", "vocab": vocab, "merges": ["a b"], "unk_token": "a", "continuing_subword_prefix": ""}
    tokenizer_json("gpt-2.json", [byte_level(True)], joined, decoder={"type": "ByteLevel"})
    tokenizer_json("llama-3.json", [cut(llama3), byte_level(False)], pairs)
    marks = [{"id": 4, "content": "<fim_prefix>", "special": True, "normalized": False}]
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer_json("digits.json", [digits, byte_level(True)], joined, added_tokens=marks, normalizer={"type": "NFC"})
    tokenizer_json("unknown.json", [cut(gpt2 + "|x"), byte_level(False)], pairs, post_processor={"type": "ByteLevel"})
    punctuation = {"type": "Punctuation", "behavior": "Contiguous"}
    tokenizer_json("falcon.json", [punctuation, byte_level(True), digits, cut("[0-9][0-9][0-9]")], joined)
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.5]]}
    tokenizer_json("unigram.json", [{"type": "Metaspace", "replacement": "▁"}], unigram)


def checkpoints():
    def save_parts(name, choice, parts):
        """Parts by name: dtype, shape, bytes."""
        header, data = {}, b""
        for part, (dtype, shape, content) in parts.items():
            header[part] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        text = json.dumps(header).encode()
        save("convert_checkpoint", name, bytes([choice]) + struct.pack("<Q", len(text)) + text + data)

    pattern = bytes(range(1, 256))
    half, one = b"\x00\x3f", b"\x80\x3f"  # 0.5 and 1 in bfloat16
    floats = struct.pack("<4f", 0.5, 2.0, 1.0, 0.25)
    x = "x.weight"
    plain = {"x.norm.weight": ("F32", [2], bytes(8))}
    save_parts("fp8-blocks", 1, {x: ("F8_E4M3", [4, 4], pattern[:16]), x + "_scale_inv": ("F32", [2, 2], floats)} | plain)
    save_parts("fp8-rows", 1, {x: ("F8_E4M3", [4, 4], pattern[:16]), x + "_scale": ("F32", [4, 1], floats)})
    save_parts("fp8-one", 0, {x: ("F8_E4M3", [4, 4], pattern[:16]), x + "_scale": ("F32", [], floats[:4])})
    save_parts("fp8-bare", 0, {x: ("F8_E4M3", [4, 4], pattern[:16])})
    save_parts("fp8-powers", 3, {x: ("F8_E4M3", [2, 64], pattern[:128]), x + "_scale": ("U8", [2, 2], b"\x78\x7f\x00\x80")})
    save_parts("int8", 3, {x: ("I8", [2, 32], pattern[:64]), x + "_scale": ("BF16", [2, 1], half + one)})
    shape = {x + "_shape": ("I64", [2], struct.pack("<2q", 2, 64))}
    packed4 = {x + "_packed": ("I32", [2, 8], pattern[:64]), x + "_scale": ("BF16", [2, 2], half + one + one + half)} | shape
    save_parts("int4", 2, packed4)
    save_parts("int4-zeros", 2, packed4 | {x + "_zero_point": ("I32", [1, 2], b"\x38\x00\x00\x00\x88\x00\x00\x00")})
    save_parts("int4-zeros-bytes", 2, packed4 | {x + "_zero_point": ("I8", [2, 2], b"\x00\xff\x07\xf8")})
    save_parts("int4-order", 2, packed4 | {x + "_g_idx": ("I32", [64], struct.pack("<64i", *([0, 1] * 32)))})
    packed8 = {x + "_packed": ("I32", [2, 16], pattern[:128]), x + "_scale": ("F16", [2, 1], b"\x00\x3c\x00\x38")} | shape
    save_parts("packed8", 3, packed8)
    codes = ("U8", [2, 32], pattern[:64])
    blocks = ("F8_E4M3", [2, 4], b"\x38\xb8\x01\x7e\x40\x38\x39\x00")
    modelopt = {x: codes, x + "_scale": blocks, x + "_scale_2": ("F32", [], floats[:4]), "x.input_scale": ("F32", [], floats[:4])}
    save_parts("nvfp4-modelopt", 4, modelopt)
    compressed = {x + "_packed": codes, x + "_scale": blocks, x + "_global_scale": ("F32", [1], floats[4:8])}
    save_parts("nvfp4-compressed", 3, compressed)
    powers = b"\x7f\x00\xfe\x80"
    save_parts("mxfp4", 3, {x + "_packed": codes, x + "_scale": ("U8", [2, 2], powers)})
    save_parts("gpt-oss", 5, {"e_blocks": ("U8", [1, 2, 2, 16], pattern[:64]), "e_scales": ("U8", [1, 2, 2], powers)})


def tokenizer_pairs():
    def varint(number):
        low = number & 127
        return bytes([low]) if number < 128 else bytes([low | 128]) + varint(number >> 7)

    def field(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    def model(pieces):
        one = lambda text, kind: field(1, text.encode()) + b"\x15" + struct.pack("<f", -1) + b"\x18" + varint(kind)
        return b"".join(field(1, one(text, kind)) for text, kind in pieces)

    def save_folder(name, pieces, tokenizer, config):
        texts = [model(pieces) if pieces else b"", json.dumps(tokenizer).encode() if tokenizer else b""]
        data = b"".join(struct.pack("<H", len(text)) + text for text in texts)
        save("convert_tokenizer_pair", name, data + (json.dumps(config).encode() if config else b""))

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x0A>", 6), ("<user>", 4), ("\u2581a", 1), ("b", 1)]
    added = [{"id": i, "content": pieces[i][0], "special": True, "normalized": False} for i in (0, 1, 2, 4)]
    added.append({"id": 7, "content": "<tool>", "special": False, "normalized": False})
    step = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokenizer = {
        "added_tokens": added, "normalizer": step, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True,
                  "vocab": {text: id for id, (text, _) in enumerate(pieces)}, "merges": [["\u2581", "a"]]},
    }
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    decoder = {str(token["id"]): {"content": token["content"], "special": not token["special"]} for token in added}
    save_folder("both", pieces, tokenizer, config)
    save_folder("three", pieces, tokenizer, config | {"added_tokens_decoder": decoder})
    save_folder("model", pieces, None, config | {"added_tokens_decoder": decoder})
    save_folder("json", None, tokenizer, config)
    other = tokenizer | {"added_tokens": [{"id": 5, "content": "<other>", "special": True}, {"id": 999, "content": "x"}]}
    save_folder("contradiction", pieces, other, config | {"extra_special_tokens": ["<more>"]})
    data = struct.pack("<H", 7) + b"IQ== 0\n" + struct.pack("<H", 2) + b"{}"
    save("convert_tokenizer_pair", "tiktoken", data)


if __name__ == "__main__":
    for write in (gguf_reader, imatrix, tokenizer, convert, checkpoints, tokenizer_pairs):
        write()
