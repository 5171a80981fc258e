"""Small random models of architectures that vary a transformer's norms, windows, gates, heads and experts."""

import numpy as np
from tiny_layers import LayeredModel
from tiny_models import N_EMBD, N_FF, N_FF_EXP, N_FF_SHEXP, N_HEAD

WINDOW = 24


def glm4(rotary=None, next_token=0, bias=False, tied=False, sections=False):
    model = LayeredModel("glm4", n_layer=3 + next_token, head=32).body(tied=tied)
    if rotary:
        model.u32("rope.dimension_count", rotary)
    if sections:
        model.array("rope.dimension_sections", [4, 2, 2, 0])
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        model.attention_at(il, bias=bias)
        model.dense_at(il, fused=True)
        if il >= model.n_layer - next_token:
            model.next_token_at(il)
    return model


def glm4moe(qk_norm=False, next_token=1, bias=True, shared=1, function=None, norm=True, scale=None, sections=False):
    model = LayeredModel("glm4moe", n_layer=3 + next_token, head=32).body()
    model.expert_keys(count=shared, function=function, norm=norm, scale=scale, lead=1)
    model.u32("rope.dimension_count", 16)
    if sections:
        model.array("rope.dimension_sections", [4, 2, 2, 0])
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "post_attention_norm")
        model.attention_at(il, bias=bias)
        if qk_norm:
            model.head_norms_at(il)
        if il == 0:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=True, shared=shared * N_FF_EXP)
        if il >= model.n_layer - next_token:
            model.next_token_at(il, own_head=True)
    return model


def exaone4(n_layer=3, window=None, tied=True, factors=False):
    """Layers have windows where the trunk has 64 of them; narrow networks keep that model small."""
    model = LayeredModel("exaone4", n_layer=n_layer, n_ff=32).body(tied=tied)
    model.f32("rope.freq_base", 1e6)
    if window:
        model.window(window)
    if factors:
        model.tensors["rope_freqs.weight"] = np.linspace(1, 8, model.head // 2, dtype=np.float32)
    for il in range(n_layer):
        model.norms_at(il, "post_attention_norm", "post_ffw_norm")
        model.attention_at(il)
        model.head_norms_at(il)
        model.dense_at(il, 32)
    return model


def exaone_moe(
    next_token=0, shared=None, function=2, norm=True, scale=None, pattern=None, selection_bias=True, factors=False
):
    model = LayeredModel("exaone-moe", n_layer=5 + next_token, head=32).body()
    model.expert_keys(shared=shared, count=1, function=function, norm=norm, scale=scale, lead=1)
    model.window(WINDOW, pattern)
    if factors:
        model.tensors["rope_freqs.weight"] = np.linspace(1, 8, model.head // 2, dtype=np.float32)
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il)
        model.head_norms_at(il)
        if il == 0 or il >= model.n_layer - next_token:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=selection_bias, shared=shared or N_FF_EXP)
        if il >= model.n_layer - next_token:
            model.next_token_at(il)
    return model


def hunyuan_dense(tied=True, alpha=None, bias=False):
    model = LayeredModel("hunyuan-dense", n_layer=3, head=32).body(tied=tied)
    if alpha:
        model.f32("rope.scaling.alpha", alpha)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, bias=bias)
        model.head_norms_at(il)
        model.dense_at(il)
    return model


def hunyuan_moe(shared=None, tied=True, bias=False):
    model = LayeredModel("hunyuan-moe", n_layer=3, head=32).body(tied=tied)
    model.expert_keys(n_ff=N_FF, shared=shared)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, bias=bias)
        model.head_norms_at(il)
        model.experts_at(il, N_FF, shared=shared or N_FF)
    return model


def olmo2(window=None, pattern=None, yarn=False, n_head_kv=N_HEAD, base=None):
    model = LayeredModel("olmo2", n_layer=5, n_head_kv=n_head_kv).body()
    if window:
        model.window(window, pattern)
    if yarn:
        model.yarn()
    if base:
        model.f32("rope.freq_base_swa", base)
    for il in range(model.n_layer):
        model.norms_at(il, "post_attention_norm", "post_ffw_norm")
        model.attention_at(il)
        model.head_norms_at(il, N_HEAD * model.head, n_head_kv * model.head)
        model.dense_at(il)
    return model


def mistral3(temperature=0.1, yarn=True, tied=False, log_multiplier=None, experts=False, bias=False):
    """The original context is small, so that the temperature of attention rises within the test's sequences."""
    model = LayeredModel("mistral3", n_layer=3, head=32).body(tied=tied)
    if yarn:
        model.yarn()
        model.f32("rope.scaling.yarn_beta_fast", 2.0)
        model.f32("rope.scaling.yarn_beta_slow", 0.5)
    if temperature:
        model.f32("attention.temperature_scale", temperature)
    if log_multiplier:
        model.f32("rope.scaling.yarn_log_multiplier", log_multiplier)
    if experts:
        model.expert_keys(n_ff=N_FF)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, bias=bias)
        if bias:
            model.vector(f"blk.{il}.attn_output.bias", N_EMBD)
        if experts:
            model.experts_at(il, N_FF)
        else:
            model.dense_at(il)
    return model


def minicpm(scales=None, tied=True, long=None, bias=False):
    """Without scales the model has those of the first MiniCPM; `long` is the original context of its two factors."""
    model = LayeredModel("minicpm", n_layer=3, head=32).body(tied=tied)
    for key, value in zip(("embedding_scale", "residual_scale", "logit_scale"), scales or ()):
        model.f32(key, value)
    if long:
        model.string("rope.scaling.type", "longrope")
        model.u32("rope.scaling.original_context_length", long)
        model.tensors["rope_factors_long.weight"] = np.linspace(1, 6, 16, dtype=np.float32)
        model.tensors["rope_factors_short.weight"] = np.linspace(1, 1.5, 16, dtype=np.float32)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, bias=bias)
        model.dense_at(il)
        if bias:
            model.vector(f"blk.{il}.attn_output.bias", N_EMBD)
            for part, n in (("gate", N_FF), ("up", N_FF), ("down", N_EMBD)):
                model.vector(f"blk.{il}.ffn_{part}.bias", n)
    return model


def bailingmoe2(
    next_token=0, groups=(3, 2), function=2, norm=True, scale=2.5, shared=None, count=1, selection_bias=True
):
    # Query rows are as many as the width of the model: the file's one matrix has no other form.
    model = LayeredModel("bailingmoe2", n_layer=3 + next_token).body()
    model.expert_keys(shared=shared, count=count, function=function, norm=norm, scale=scale, lead=1, groups=groups)
    model.u32("rope.dimension_count", 8)
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, fused=True)
        model.head_norms_at(il)
        if il == 0:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=selection_bias, shared=(shared or N_FF_EXP) * count)
        if il >= model.n_layer - next_token:
            model.next_token_at(il)
            model.norms_at(il, "layer_output_norm")
    return model


def afmoe(count=1, function=None, norm=True, scale=2.8, pattern=None, base=None, tied=False, lead=2):
    model = LayeredModel("afmoe", n_layer=5, head=32).body(tied=tied)
    if not tied:
        model.tensors["token_embd.weight"] /= 8
    model.expert_keys(count=count, function=function, norm=norm, scale=scale, lead=lead)
    model.window(WINDOW, pattern)
    if base:
        model.f32("rope.freq_base_swa", base)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        model.attention_at(il)
        model.head_norms_at(il)
        model.matrix(f"blk.{il}.attn_gate.weight", N_EMBD, N_HEAD * 32, gain=2)
        if il < lead:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=True, shared=count * N_FF_EXP)
    return model


def step35(next_token=0, gates=True, clamps=True, factors=True, qk_norm=True, function=None, norm=True, scale=1.5):
    """Layers with windows have more heads than those without, and turn the whole head instead of one half."""
    pattern = [il % 3 != 2 for il in range(5)] + [True] * next_token
    heads = [6 if windowed else 4 for windowed in pattern]
    model = LayeredModel("step35", n_layer=len(pattern), head=32).body()
    model.array("attention.head_count", heads)
    model.array("attention.head_count_kv", [2 for _ in heads])
    model.expert_keys(shared=N_FF_SHEXP, function=function, norm=norm, scale=scale)
    model.window(WINDOW, pattern)
    model.f32("rope.freq_base", 5e6)
    model.f32("rope.freq_base_swa", 3e4)
    if clamps:
        # 0 stands for no clamp.
        model.array("swiglu_clamp_exp", [0.0, 0.0, 0.8, 0.0, 0.5] + [0.0] * next_token)
        model.array("swiglu_clamp_shexp", [0.0, 0.7, 0.0, 0.0, 0.4] + [0.0] * next_token)
    if factors:
        model.tensors["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype=np.float32)
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il, n_head in enumerate(heads):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, n_head=n_head)
        if qk_norm:
            model.head_norms_at(il)
        if gates:
            model.matrix(f"blk.{il}.attn_gate.weight", N_EMBD, n_head, gain=2)
        if il == 0 or il >= len(heads) - next_token:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=True, shared=N_FF_SHEXP)
        if il >= len(heads) - next_token:
            model.next_token_at(il)
    return model


def mimo2(fused=False, sinks=True, value_scale=None, next_token=0, rotary=12, selection_bias=True):
    """Keys of 24 and values of 16; layers with windows have more heads of keys and values. `sinks` is for windows."""
    pattern = [il % 3 != 0 for il in range(4)] + [True] * next_token
    model = LayeredModel("mimo2", n_layer=len(pattern), head=24).body()
    model.u32("attention.value_length", 16)
    heads_kv = [2 if windowed else 1 for windowed in pattern]
    model.array("attention.head_count_kv", heads_kv)
    model.array("attention.head_count", [N_HEAD for _ in pattern])
    model.expert_keys()
    model.window(WINDOW, pattern)
    model.u32("rope.dimension_count", rotary)
    model.f32("rope.freq_base", 5e6)
    model.f32("rope.freq_base_swa", 3e4)
    if value_scale:
        model.f32("attention.value_scale", value_scale)
    if next_token:
        model.u32("nextn_predict_layers", next_token)
    for il, windowed in enumerate(pattern):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, n_head_kv=heads_kv[il], head_v=16, fused=fused)
        if sinks and windowed:
            model.vector(f"blk.{il}.attn_sinks.weight", N_HEAD, scale=1.0)
        if il == 0 or il >= len(pattern) - next_token:
            model.dense_at(il)
        else:
            model.experts_at(il, selection_bias=selection_bias)
        if il >= len(pattern) - next_token:
            model.next_token_at(il)
    return model


def llama4(step=1, used=1, factors=False, tied=False, bias=False):
    """Layers 4, 8, ... do not turn."""
    model = LayeredModel("llama4", n_layer=5, head=32).body(tied=tied)
    model.expert_keys(n_ff=N_FF_EXP)
    model.u32("expert_used_count", used)
    model.u32("interleave_moe_layer_step", step)
    if factors:
        model.tensors["rope_freqs.weight"] = np.linspace(1, 8, model.head // 2, dtype=np.float32)
    for il in range(model.n_layer):
        model.norms_at(il, "attn_norm", "ffn_norm")
        model.attention_at(il, bias=bias)
        if (il + 1) % step == 0:
            model.experts_at(il, N_FF_EXP, shared=N_FF_EXP)
        else:
            model.dense_at(il)
    return model


MODELS = {
    "glm4": lambda: glm4(rotary=16, bias=True),
    "glm4-next-token": lambda: glm4(next_token=1, tied=True),
    "glm4-sections": lambda: glm4(rotary=16, sections=True),
    "glm4moe": glm4moe,
    "glm4moe-qk-norm": lambda: glm4moe(
        qk_norm=True, next_token=0, bias=False, shared=2, function=1, norm=False, scale=1.7
    ),
    "glm4moe-sections": lambda: glm4moe(sections=True, function=2, scale=1.7),
    "exaone4": exaone4,
    "exaone4-factors": lambda: exaone4(tied=False, factors=True),
    "exaone4-windows": lambda: exaone4(n_layer=64, window=WINDOW, tied=False),
    "exaone-moe": exaone_moe,
    "exaone-moe-next-token": lambda: exaone_moe(next_token=1, shared=N_FF_SHEXP, scale=1.7, pattern=2),
    "exaone-moe-softmax": lambda: exaone_moe(function=1, norm=False, selection_bias=False, factors=True),
    "hunyuan-dense": hunyuan_dense,
    "hunyuan-dense-alpha": lambda: hunyuan_dense(tied=False, alpha=100.0, bias=True),
    "hunyuan-moe": hunyuan_moe,
    "hunyuan-moe-shared": lambda: hunyuan_moe(shared=N_FF_SHEXP, tied=False, bias=True),
    "olmo2": olmo2,
    "olmo2-windows": lambda: olmo2(window=WINDOW, yarn=True, n_head_kv=2),
    "olmo2-pattern": lambda: olmo2(window=WINDOW, pattern=2, base=5e5),
    "olmo2-yarn": lambda: olmo2(yarn=True, n_head_kv=2),
    "mistral3": mistral3,
    "mistral3-plain": lambda: mistral3(temperature=None, yarn=False, tied=True, bias=True),
    "mistral3-log-multiplier": lambda: mistral3(log_multiplier=1.0),
    "mistral3-experts": lambda: mistral3(experts=True),
    "minicpm": minicpm,
    "minicpm-scales": lambda: minicpm(scales=(4.0, 0.5, 0.7), tied=False, bias=True),
    "minicpm-long": lambda: minicpm(scales=(6.0, 0.25, 2.0), long=64),
    "minicpm-short": lambda: minicpm(long=512),
    "bailingmoe2": bailingmoe2,
    "bailingmoe2-next-token": lambda: bailingmoe2(next_token=1, shared=N_FF_SHEXP, count=2),
    "bailingmoe2-softmax": lambda: bailingmoe2(groups=None, function=1, norm=False, scale=None, selection_bias=False),
    "afmoe": afmoe,
    "afmoe-shared": lambda: afmoe(count=2, tied=True, norm=False, scale=1.0, function=2),
    "afmoe-pattern": lambda: afmoe(pattern=2, base=5e5, function=1, lead=0),
    "step35": step35,
    "step35-next-token": lambda: step35(
        next_token=2, gates=False, clamps=False, factors=False, qk_norm=False, function=1
    ),
    "mimo2": mimo2,
    "mimo2-next-token": lambda: mimo2(
        fused=True, sinks=False, value_scale=0.6, next_token=1, rotary=24, selection_bias=False
    ),
    "llama4": llama4,
    "llama4-step": lambda: llama4(step=2, factors=True, bias=True),
    "llama4-two-experts": lambda: llama4(used=2, tied=True),
}
