"""Small random models of every architecture, written with gguf-py: weights are F32, so that no rounding of
activations stands between two programs that compute them."""

import numpy as np
from gguf import GGUFWriter
from gguf.quants import quantize

N_VOCAB = 320
N_EMBD = 64
N_FF = 96
N_LAYER = 3
N_HEAD = 4
N_HEAD_KV = 2
N_EXPERT = 6
N_EXPERT_USED = 2
N_FF_EXP = 64
N_FF_SHEXP = 80
CONTEXT = 512


class TinyModel:
    """Collects metadata and tensors, then writes them."""

    def __init__(self, arch, seed=1, n_layer=N_LAYER, head=N_EMBD // N_HEAD, n_ff=N_FF, n_head_kv=N_HEAD_KV):
        self.arch, self.n_layer, self.head, self.n_head_kv = arch, n_layer, head, n_head_kv
        self.rng = np.random.default_rng(seed)
        self.keys = {}
        self.tensors = {}
        self.u32("block_count", n_layer)
        self.u32("context_length", CONTEXT)
        self.u32("embedding_length", N_EMBD)
        self.u32("feed_forward_length", n_ff)
        self.u32("attention.head_count", N_HEAD)
        self.u32("attention.head_count_kv", n_head_kv)
        self.f32("attention.layer_norm_rms_epsilon", 1e-5)
        if head != N_EMBD // N_HEAD:
            self.u32("attention.key_length", head)
            self.u32("attention.value_length", head)

    def u32(self, key, value):
        self.keys[f"{self.arch}.{key}"] = ("uint32", value)

    def f32(self, key, value):
        self.keys[f"{self.arch}.{key}"] = ("float32", value)

    def bool(self, key, value):
        self.keys[f"{self.arch}.{key}"] = ("bool", value)

    def string(self, key, value):
        self.keys[f"{self.arch}.{key}"] = ("string", value)

    def matrix(self, name, n_in, n_out, count=None, gain=1.0):
        shape = (n_out, n_in) if count is None else (count, n_out, n_in)
        self.tensors[name] = self.rng.normal(0, gain / np.sqrt(n_in), shape).astype(np.float32)

    def norm(self, name, n=N_EMBD):
        self.tensors[name] = (1 + 0.3 * self.rng.normal(size=n)).astype(np.float32)

    def vector(self, name, shape, scale=0.2):
        self.tensors[name] = (scale * self.rng.normal(size=shape)).astype(np.float32)

    def body(self, tied=False):
        self.tensors["token_embd.weight"] = self.rng.normal(0, 1, (N_VOCAB, N_EMBD)).astype(np.float32)
        if tied:
            self.tensors["token_embd.weight"] *= 0.3
        else:
            self.matrix("output.weight", N_EMBD, N_VOCAB, gain=3)
        self.norm("output_norm.weight")
        return self

    def attention(self, bias=False, qk_norm=False, fused=False, output_bias=False, whole_norm=False):
        n_q, n_kv = N_HEAD * self.head, self.n_head_kv * self.head
        for il in range(self.n_layer):
            self.norm(f"blk.{il}.attn_norm.weight")
            if fused:
                self.matrix(f"blk.{il}.attn_qkv.weight", N_EMBD, n_q + 2 * n_kv, gain=1.5)
            else:
                for part, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                    self.matrix(f"blk.{il}.attn_{part}.weight", N_EMBD, n, gain=1.5)
                    if bias:
                        self.vector(f"blk.{il}.attn_{part}.bias", n)
            self.matrix(f"blk.{il}.attn_output.weight", n_q, N_EMBD)
            if output_bias:
                self.vector(f"blk.{il}.attn_output.bias", N_EMBD)
            if qk_norm or whole_norm:
                self.norm(f"blk.{il}.attn_q_norm.weight", n_q if whole_norm else self.head)
                self.norm(f"blk.{il}.attn_k_norm.weight", n_kv if whole_norm else self.head)
        return self

    def dense(self, n_ff=N_FF, fused=False):
        for il in range(self.n_layer):
            self.norm(f"blk.{il}.ffn_norm.weight")
            if not fused:
                self.matrix(f"blk.{il}.ffn_gate.weight", N_EMBD, n_ff)
            self.matrix(f"blk.{il}.ffn_up.weight", N_EMBD, n_ff * (2 if fused else 1))
            self.matrix(f"blk.{il}.ffn_down.weight", n_ff, N_EMBD)
        return self

    def experts(self, n_ff, norm="ffn_norm", bias=False, shared=None, shared_gate=True, selection_bias=False, dense=()):
        self.u32("expert_count", N_EXPERT)
        self.u32("expert_used_count", N_EXPERT_USED)
        for il in range(self.n_layer):
            self.norm(f"blk.{il}.{norm}.weight")
            if il in dense:
                for part, shape in (("gate", (N_EMBD, N_FF)), ("up", (N_EMBD, N_FF)), ("down", (N_FF, N_EMBD))):
                    self.matrix(f"blk.{il}.ffn_{part}.weight", *shape)
                continue
            if selection_bias:
                self.vector(f"blk.{il}.exp_probs_b.bias", N_EXPERT, scale=0.5)
            self.matrix(f"blk.{il}.ffn_gate_inp.weight", N_EMBD, N_EXPERT, gain=2)
            self.matrix(f"blk.{il}.ffn_gate_exps.weight", N_EMBD, n_ff, N_EXPERT)
            self.matrix(f"blk.{il}.ffn_up_exps.weight", N_EMBD, n_ff, N_EXPERT)
            self.matrix(f"blk.{il}.ffn_down_exps.weight", n_ff, N_EMBD, N_EXPERT)
            if bias:
                self.vector(f"blk.{il}.ffn_gate_inp.bias", N_EXPERT)
                self.vector(f"blk.{il}.ffn_gate_exps.bias", (N_EXPERT, n_ff))
                self.vector(f"blk.{il}.ffn_up_exps.bias", (N_EXPERT, n_ff))
                self.vector(f"blk.{il}.ffn_down_exps.bias", (N_EXPERT, N_EMBD))
            if shared:
                if shared_gate:
                    self.vector(f"blk.{il}.ffn_gate_inp_shexp.weight", N_EMBD)
                self.matrix(f"blk.{il}.ffn_gate_shexp.weight", N_EMBD, shared)
                self.matrix(f"blk.{il}.ffn_up_shexp.weight", N_EMBD, shared)
                self.matrix(f"blk.{il}.ffn_down_shexp.weight", shared, N_EMBD)
        return self

    def post_norms(self):
        for il in range(self.n_layer):
            self.norm(f"blk.{il}.post_attention_norm.weight")
            self.norm(f"blk.{il}.post_ffw_norm.weight")
        return self

    def write(self, path, matrix_type=None, only=""):
        """Writes the model; `matrix_type` is a type that gguf-py can quantize to, for all matrices of the layers
        with `only` in their names."""
        writer = GGUFWriter(path, self.arch)
        for key, (kind, value) in self.keys.items():
            getattr(writer, f"add_{kind}")(key, value)
        vocabulary(writer)
        for name, data in self.tensors.items():
            is_matrix = name.startswith("blk.") and name.endswith("weight") and data.ndim > 1
            if matrix_type is not None and is_matrix and only in name:
                writer.add_tensor(name, quantize(data, matrix_type), raw_dtype=matrix_type)
            else:
                writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)


def vocabulary(writer):
    """SentencePiece with byte fallback and N_VOCAB entries."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    while len(tokens) < N_VOCAB:
        tokens.append(f"w{len(tokens)}")
        kinds.append(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(N_VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def llama(**options):
    return TinyModel("llama", **options).body().attention().dense()


def llama_tied_with_biases():
    model = TinyModel("llama", head=32).body(tied=True).attention(bias=True, output_bias=True).dense()
    for il in range(model.n_layer):
        model.vector(f"blk.{il}.ffn_gate.bias", N_FF)
        model.vector(f"blk.{il}.ffn_up.bias", N_FF)
        model.vector(f"blk.{il}.ffn_down.bias", N_EMBD)
    return model


def llama3_rope_factors():
    model = llama()
    model.f32("rope.freq_base", 500000.0)
    model.tensors["rope_freqs.weight"] = np.linspace(1, 8, model.head // 2, dtype=np.float32)
    return model


def llama_linear_rope():
    model = llama()
    model.string("rope.scaling.type", "linear")
    model.f32("rope.scaling.factor", 4.0)
    return model


def llama_yarn():
    model = llama(head=32)
    model.string("rope.scaling.type", "yarn")
    model.f32("rope.scaling.factor", 4.0)
    model.u32("rope.scaling.original_context_length", 64)
    return model


def mixtral():
    return TinyModel("llama").body().attention().experts(N_FF)


def qwen2():
    model = TinyModel("qwen2").body().attention(bias=True).dense()
    model.f32("rope.freq_base", 1e6)
    return model


def qwen2moe():
    model = TinyModel("qwen2moe").body().attention(bias=True).experts(N_FF_EXP, shared=N_FF_SHEXP)
    model.u32("expert_feed_forward_length", N_FF_EXP)
    model.u32("expert_shared_feed_forward_length", N_FF_SHEXP)
    return model


def qwen3():
    return TinyModel("qwen3", head=32).body(tied=True).attention(qk_norm=True).dense()


def qwen3moe():
    model = TinyModel("qwen3moe", head=32).body().attention(qk_norm=True).experts(N_FF_EXP)
    model.u32("expert_feed_forward_length", N_FF_EXP)
    return model


def gemma():
    return TinyModel("gemma", head=32).body(tied=True).attention().dense()


def gemma2():
    model = TinyModel("gemma2", n_layer=4, head=32).body(tied=True).attention().dense().post_norms()
    model.u32("attention.sliding_window", 24)
    model.f32("attn_logit_softcapping", 5.0)
    model.f32("final_logit_softcapping", 8.0)
    return model


def gemma3():
    model = TinyModel("gemma3", n_layer=7, head=32).body(tied=True).attention(qk_norm=True).dense().post_norms()
    model.u32("attention.sliding_window", 24)
    model.f32("rope.freq_base", 1e6)
    model.string("rope.scaling.type", "linear")
    model.f32("rope.scaling.factor", 8.0)
    return model


def phi3_longrope(original):
    model = TinyModel("phi3").body().attention(fused=True).dense(fused=True)
    model.u32("rope.scaling.original_context_length", original)
    model.f32("rope.scaling.attn_factor", 1.19)
    model.u32("rope.dimension_count", 12)
    model.tensors["rope_factors_long.weight"] = np.linspace(1, 6, 6, dtype=np.float32)
    model.tensors["rope_factors_short.weight"] = np.linspace(1, 1.5, 6, dtype=np.float32)
    return model


def gpt_oss(n_layer=4):
    model = TinyModel("gpt-oss", n_layer=n_layer, head=32).body().attention(bias=True, output_bias=True)
    model.experts(N_FF_EXP, norm="post_attention_norm", bias=True)
    model.u32("expert_feed_forward_length", N_FF_EXP)
    model.u32("attention.sliding_window", 24)
    model.u32("rope.scaling.original_context_length", 64)
    model.string("rope.scaling.type", "yarn")
    model.f32("rope.scaling.factor", 4.0)
    for il in range(model.n_layer):
        model.vector(f"blk.{il}.attn_sinks.weight", N_HEAD, scale=1.0)
    return model


def sections(model):
    model.keys[f"{model.arch}.rope.dimension_sections"] = ("array", [4, 2, 2, 0])
    return model


def qwen2vl():
    return sections(TinyModel("qwen2vl").body().attention(bias=True).dense())


def qwen3vl():
    return sections(TinyModel("qwen3vl", head=16).body(tied=True).attention(qk_norm=True).dense())


def qwen3vlmoe():
    model = sections(TinyModel("qwen3vlmoe", head=16).body().attention(qk_norm=True).experts(N_FF_EXP))
    model.u32("expert_feed_forward_length", N_FF_EXP)
    return model


def smollm3():
    return TinyModel("smollm3", n_layer=5).body(tied=True).attention().dense()


def granite(rotates=True):
    model = TinyModel("granite").body().attention(output_bias=True).dense()
    for key, value in (("embedding_scale", 6.0), ("residual_scale", 0.4), ("attention.scale", 0.1), ("logit_scale", 2.0)):
        model.f32(key, value)
    if not rotates:
        model.bool("rope.scaling.finetuned", False)
    return model


def granitemoe(shared=None):
    model = TinyModel("granitemoe").body().attention().experts(N_FF, shared=shared, shared_gate=False)
    for key, value in (("embedding_scale", 6.0), ("residual_scale", 0.4), ("attention.scale", 0.1), ("logit_scale", 2.0)):
        model.f32(key, value)
    if shared:
        model.u32("expert_shared_feed_forward_length", shared)
    return model


def dots1(function=2, norm=True, groups=None):
    model = TinyModel("dots1", head=32, n_head_kv=N_HEAD).body().attention(qk_norm=True)
    model.experts(N_FF_EXP, shared=2 * N_FF_EXP, shared_gate=False, selection_bias=True, dense=(0,))
    model.u32("leading_dense_block_count", 1)
    model.u32("expert_feed_forward_length", N_FF_EXP)
    model.u32("expert_shared_count", 2)
    model.u32("expert_gating_func", function)
    model.bool("expert_weights_norm", norm)
    model.f32("expert_weights_scale", 1.7)
    if groups:
        model.u32("expert_group_count", groups[0])
        model.u32("expert_group_used_count", groups[1])
    return model


def ernie4_5_moe():
    model = TinyModel("ernie4_5-moe").body(tied=True).attention()
    model.experts(N_FF_EXP, shared=N_FF_SHEXP, shared_gate=False, selection_bias=True, dense=(0,))
    model.u32("leading_dense_block_count", 1)
    model.u32("interleave_moe_layer_step", 1)
    model.u32("expert_feed_forward_length", N_FF_EXP)
    model.u32("expert_shared_feed_forward_length", N_FF_SHEXP)
    return model


def olmoe():
    return TinyModel("olmoe", n_head_kv=N_HEAD).body().attention(whole_norm=True).experts(N_FF)


def minimax_m2():
    model = TinyModel("minimax-m2", head=32).body().attention(whole_norm=True).experts(N_FF, selection_bias=True)
    model.u32("expert_feed_forward_length", N_FF)
    model.u32("expert_gating_func", 2)
    model.u32("rope.dimension_count", 16)
    return model


def seed_oss():
    model = TinyModel("seed_oss", head=32).body().attention(bias=True).dense()
    for il in range(model.n_layer):
        model.tensors[f"blk.{il}.post_attention_norm.weight"] = model.tensors.pop(f"blk.{il}.ffn_norm.weight")
    return model


def internlm2():
    return TinyModel("internlm2").body().attention().dense()


def ernie4_5():
    return TinyModel("ernie4_5").body(tied=True).attention().dense()


def both_ways(model):
    model.bool("attention.causal", False)
    return model


MODELS = {
    "llama": llama,
    "llama-tied-with-biases": llama_tied_with_biases,
    "llama3-rope-factors": llama3_rope_factors,
    "llama-linear-rope": llama_linear_rope,
    "llama-yarn": llama_yarn,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2moe": qwen2moe,
    "qwen3": qwen3,
    "qwen3moe": qwen3moe,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": lambda: phi3_longrope(CONTEXT),
    "phi3-beyond-original-context": lambda: phi3_longrope(64),
    "gpt-oss": gpt_oss,
}
MODELS |= {
    "qwen2vl": qwen2vl,
    "qwen3vl": qwen3vl,
    "qwen3vlmoe": qwen3vlmoe,
    "smollm3": smollm3,
    "granite": granite,
    "granite-without-rope": lambda: granite(rotates=False),
    "granitemoe": granitemoe,
    "granitemoe-shared": lambda: granitemoe(N_FF_SHEXP),
    "dots1": dots1,
    "dots1-softmax": lambda: dots1(function=1, norm=False),
    "dots1-groups": lambda: dots1(groups=(3, 2)),
    "ernie4_5-moe": ernie4_5_moe,
    "olmoe": olmoe,
    "minimax-m2": minimax_m2,
    "seed_oss": seed_oss,
    "internlm2": internlm2,
    "ernie4_5": ernie4_5,
}

# Attention that is not causal. Windows limit what lies before a position, and nothing behind it.
BOTH_WAYS = {
    "llama-both-ways": lambda: both_ways(llama()),
    "gemma3-both-ways": lambda: both_ways(gemma3()),
}
