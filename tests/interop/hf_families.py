"""Small random folders of families that the numpy forward pass does not compute, for comparison with the reference converter.

Each family has a configuration as transformers writes it for its class, in as many variants as its options need.
"""

import json

import hf_models
import numpy as np
import quantized_weights
from hf_models import (
    GPT4O, LLAMA3, N_EMBD, N_EXPERT, N_EXPERT_USED, N_FF, N_FF_EXP, N_FF_SHEXP, N_HEAD, N_HEAD_KV, QWEN2, QWEN_CONFIG,
    QWEN_TOKENS, HfModel, byte_level, split, write_byte_level, write_sentencepiece,
)

HEAD = N_EMBD // N_HEAD
EXPERTS = {"num_experts_per_tok": N_EXPERT_USED, "moe_intermediate_size": N_FF_EXP}


def qwen_tokenizer(model, regex=QWEN2):
    return model.tokenizer(write_byte_level, [split(regex), byte_level()], QWEN_TOKENS, QWEN_CONFIG)


def pieces_tokenizer(model, added=(), **config):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **config}
    return model.tokenizer(write_sentencepiece, config, added)


class Blocks:
    """Adds tensors to a model, block by block."""

    def __init__(self, model, prefix="model.layers."):
        self.model, self.prefix = model, prefix

    def name(self, il, name):
        return f"{self.prefix}{il}.{name}"

    def matrix(self, il, name, rows, columns=N_EMBD, bias=False):
        self.model.matrix(self.name(il, name), rows, columns)
        if bias:
            self.model.bias(self.name(il, name), rows)

    def vector(self, il, name, n=N_EMBD, center=1.0):
        """A tensor of values whose name is complete."""
        shape = n if isinstance(n, tuple) else (n,)
        values = center + 0.3 * self.model.rng.normal(size=shape)
        self.model.tensors[self.name(il, name)] = values.astype(np.float32)

    def norms(self, il, names, n=N_EMBD, center=1.0):
        for name in names:
            self.model.norm(self.name(il, name), n, center)

    def attention(self, il, heads=N_HEAD, kv=N_HEAD_KV, head=HEAD, value=None, bias=False, at="self_attn.", q_rows=None):
        value = value or head
        self.matrix(il, f"{at}q_proj", q_rows or heads * head, bias=bias)
        self.matrix(il, f"{at}k_proj", kv * head, bias=bias)
        self.matrix(il, f"{at}v_proj", kv * value, bias=bias)
        self.matrix(il, f"{at}o_proj", N_EMBD, heads * value)

    def mlp(self, il, at="mlp.", width=N_FF):
        self.matrix(il, f"{at}gate_proj", width)
        self.matrix(il, f"{at}up_proj", width)
        self.matrix(il, f"{at}down_proj", N_EMBD, width)

    def experts(self, il, at="mlp.experts.", names=("gate_proj", "up_proj", "down_proj"), width=N_FF_EXP):
        for expert in range(N_EXPERT):
            self.matrix(il, f"{at}{expert}.{names[0]}", width)
            self.matrix(il, f"{at}{expert}.{names[1]}", width)
            self.matrix(il, f"{at}{expert}.{names[2]}", N_EMBD, width)

    def stacked(self, il, fused, down, width=N_FF_EXP, transposed=False):
        """All experts in one tensor, under complete names."""
        gate_up, columns = (N_EXPERT, 2 * width, N_EMBD), (N_EXPERT, N_EMBD, width)
        if transposed:
            gate_up, columns = (N_EXPERT, N_EMBD, 2 * width), (N_EXPERT, width, N_EMBD)
        self.vector(il, fused, gate_up, 0.0)
        self.vector(il, down, columns, 0.0)


NORMS = ("input_layernorm", "post_attention_layernorm")
GRANITE = {"attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}


def granitemoe(shared=None):
    kind = "granitemoeshared" if shared else "granitemoe"
    model = HfModel(
        kind, kind, ["GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"], "gpt-2", rope_theta=1e4,
        num_local_experts=N_EXPERT, num_experts_per_tok=N_EXPERT_USED, **GRANITE,
    )
    model.config["intermediate_size"] = N_FF_EXP
    if shared:
        model.config["shared_intermediate_size"] = shared
    model.tokenizer(write_byte_level, [byte_level(True)], [("<|end_of_text|>", True)], {"eos_token": "<|end_of_text|>"})
    blocks = Blocks(model.body(tied=True))
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il)
        blocks.matrix(il, "block_sparse_moe.router.layer", N_EXPERT)
        blocks.stacked(il, "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
        if shared:
            blocks.matrix(il, "shared_mlp.input_linear", 2 * shared)
            blocks.matrix(il, "shared_mlp.output_linear", N_EMBD, shared)
    return model


def dots1(shared=2):
    model = HfModel(
        "dots1", "dots1", ["Dots1ForCausalLM"], "qwen2", rope_theta=1e7, n_routed_experts=N_EXPERT, n_shared_experts=shared,
        first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5, sliding_window=None,
        scoring_func="noaux_tc" if shared is None else "sigmoid", **EXPERTS,
    )
    qwen_tokenizer(model)
    blocks = Blocks(model.body())
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il)
        blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), HEAD)
        if il == 0:
            blocks.mlp(il)
            continue
        blocks.matrix(il, "mlp.gate", N_EXPERT)
        blocks.vector(il, "mlp.gate.e_score_correction_bias", N_EXPERT, 0.0)
        blocks.experts(il)
        blocks.mlp(il, "mlp.shared_experts.", shared * N_FF_EXP)
    return model


def ernie(fused=False):
    model = HfModel(
        "ernie", "ernie4_5", ["Ernie4_5_ForCausalLM" if fused else "Ernie4_5ForCausalLM"], "-", head=24, rope_theta=5e5,
    )
    pieces_tokenizer(model, [(300, "<mask:1>", True), (301, "<|x|>", False)], add_prefix_space=False)
    model.body(tied=True)
    blocks = Blocks(model, "ernie.layers." if fused else "model.layers.")
    if fused:
        model.tensors = {name.replace("model.", "ernie."): values for name, values in model.tensors.items()}
    for il in range(2):
        blocks.norms(il, NORMS)
        if fused:
            blocks.matrix(il, "self_attn.qkv_proj", (N_HEAD + 2 * N_HEAD_KV) * 24)
            blocks.matrix(il, "self_attn.o_proj", N_EMBD, N_HEAD * 24)
            blocks.matrix(il, "mlp.up_gate_proj", 2 * N_FF)
            blocks.matrix(il, "mlp.down_proj", N_EMBD, N_FF)
        else:
            blocks.attention(il, head=24)
            blocks.mlp(il)
    return model


def ernie_moe(interval=1):
    model = HfModel(
        "ernie_moe", "ernie4_5_moe", ["Ernie4_5_MoeForCausalLM"], "-", rope_theta=5e5, moe_num_experts=N_EXPERT,
        moe_k=N_EXPERT_USED, moe_layer_interval=interval, moe_layer_start_index=1, moe_intermediate_size=24,
        moe_num_shared_experts=0 if interval > 1 else 2, num_hidden_layers=4,
    )
    pieces_tokenizer(model)
    blocks = Blocks(model.body(tied=interval > 1))
    for il in range(4):
        blocks.norms(il, NORMS)
        blocks.attention(il)
        if il == 0 or (il + 1) % interval:
            blocks.mlp(il)
            continue
        blocks.matrix(il, "mlp.gate", N_EXPERT)
        blocks.experts(il, width=24)
        if interval == 1:
            blocks.vector(il, "mlp.moe_statics.e_score_correction_bias", (1, N_EXPERT), 0.0)
            blocks.mlp(il, "mlp.shared_experts.", 48)
    if interval == 1:
        model.matrix("model.mtp_linear_proj.0", N_EMBD, 2 * N_EMBD)
        model.matrix("model.mtp_block.0.self_attn.q_proj", N_EMBD, N_EMBD)
    return model


def olmoe():
    model = HfModel(
        "olmoe", "olmoe", ["OlmoeForCausalLM"], "dbrx", rope_theta=1e4, num_experts=N_EXPERT,
        num_experts_per_tok=N_EXPERT_USED, norm_topk_prob=False,
    )
    model.config["intermediate_size"] = N_FF_EXP
    qwen_tokenizer(model, LLAMA3)
    blocks = Blocks(model.body())
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il)
        blocks.norms(il, ("self_attn.q_norm",), N_EMBD)
        blocks.norms(il, ("self_attn.k_norm",), N_HEAD_KV * HEAD)
        blocks.matrix(il, "mlp.gate", N_EXPERT)
        blocks.experts(il)
    return model


def minimax_m2():
    model = HfModel(
        "minimax_m2", "minimax_m2", ["MiniMaxM2ForCausalLM"], "minimax-m2", head=32, rope_theta=5e6, rotary_dim=16,
        num_local_experts=N_EXPERT, num_experts_per_tok=N_EXPERT_USED, scoring_func="sigmoid", use_qk_norm=True,
        tie_word_embeddings=False, partial_rotary_factor=0.5,
    )
    model.config["intermediate_size"] = N_FF_EXP
    tokens = [("]~!b[", True), ("]~b]", True), ("[e~[", True), ("<think>", False)]
    config = {"bos_token": "]~!b[", "eos_token": "[e~["}
    model.tokenizer(write_byte_level, [split(GPT4O, "Removed", True), byte_level()], tokens, config)
    blocks = Blocks(model.body())
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il, head=32)
        blocks.norms(il, ("self_attn.q_norm",), N_HEAD * 32)
        blocks.norms(il, ("self_attn.k_norm",), N_HEAD_KV * 32)
        blocks.matrix(il, "block_sparse_moe.gate", N_EXPERT)
        blocks.vector(il, "block_sparse_moe.e_score_correction_bias", N_EXPERT, 0.0)
        blocks.experts(il, "block_sparse_moe.experts.", ("w1", "w3", "w2"))
    return model


def internlm2():
    """The vocabulary ends where the pieces do, since the reference converter does not pad this kind."""
    model = HfModel(
        "internlm2", "internlm2", ["InternLM2ForCausalLM"], "-", rope_theta=1e6, dtype="F16", n_vocab=276, eos_token_id=2,
    )
    pieces_tokenizer(model, [(270, "<|im_start|>", True), (271, "<|im_end|>", True), (272, "[UNUSED_TOKEN_1]", False)])
    model.body()
    names = {"model.embed_tokens.weight": "model.tok_embeddings.weight", "lm_head.weight": "output.weight"}
    model.tensors = {names.get(name, name): values for name, values in model.tensors.items()}
    blocks = Blocks(model)
    for il in range(2):
        blocks.norms(il, ("attention_norm", "ffn_norm"))
        blocks.matrix(il, "attention.wqkv", (N_HEAD + 2 * N_HEAD_KV) * HEAD)
        blocks.matrix(il, "attention.wo", N_EMBD)
        blocks.matrix(il, "feed_forward.w1", N_FF)
        blocks.matrix(il, "feed_forward.w3", N_FF)
        blocks.matrix(il, "feed_forward.w2", N_EMBD, N_FF)
    return model


LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "full_attention_interval": 4,
}
HYBRID_TYPES = ["linear_attention"] * 3 + ["full_attention"]


def delta_net(blocks, il, linear, grouped=False):
    """Qwen3.5's projections, or Qwen3-Next's grouped ones."""
    keys = linear["linear_num_key_heads"] * linear["linear_key_head_dim"]
    values, heads = linear["linear_num_value_heads"] * linear["linear_value_head_dim"], linear["linear_num_value_heads"]
    at = "linear_attn."
    if grouped:
        blocks.matrix(il, f"{at}in_proj_qkvz", 2 * keys + 2 * values)
        blocks.matrix(il, f"{at}in_proj_ba", 2 * heads)
    else:
        blocks.matrix(il, f"{at}in_proj_qkv", 2 * keys + values)
        blocks.matrix(il, f"{at}in_proj_z", values)
        blocks.matrix(il, f"{at}in_proj_b", heads)
        blocks.matrix(il, f"{at}in_proj_a", heads)
    blocks.vector(il, f"{at}conv1d.weight", (2 * keys + values, 1, linear["linear_conv_kernel_dim"]), 0.0)
    blocks.vector(il, f"{at}A_log", heads, 0.5)
    blocks.vector(il, f"{at}dt_bias", heads, 0.0)
    blocks.norms(il, (f"{at}norm",), linear["linear_value_head_dim"])
    blocks.matrix(il, f"{at}out_proj", N_EMBD, values)


def gated_attention(blocks, il, head=24):
    blocks.norms(il, NORMS, center=0.0)
    blocks.attention(il, head=head, q_rows=2 * N_HEAD * head)
    blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), head, center=0.0)


def qwen_moe(blocks, il, stacked):
    blocks.matrix(il, "mlp.gate", N_EXPERT)
    if stacked:
        blocks.stacked(il, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    else:
        blocks.experts(il)
    blocks.mlp(il, "mlp.shared_expert.", N_FF_SHEXP)
    blocks.matrix(il, "mlp.shared_expert_gate", 1)


def qwen_hybrid(kind, cls, experts=False, mtp=1, grouped=False, multimodal=False, dtype="BF16", tied=False, plain_rope=False, **heads):
    """Three delta nets and a layer of attention, with the blocks of further tokens under `mtp`."""
    linear = LINEAR | heads
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    if not plain_rope:
        rope |= {"mrope_interleaved": True, "mrope_section": [2, 1, 0]}
    name = f"{cls}-{mtp}-{multimodal}-{dtype}"
    model = HfModel(name, kind, [cls], "qwen35", head=24, num_hidden_layers=4, layer_types=HYBRID_TYPES,
                    dtype=dtype, rope_parameters=rope, **linear)
    if grouped:
        del model.config["rope_parameters"]
        model.config |= {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    if experts:
        model.config |= EXPERTS | {"num_experts": N_EXPERT, "shared_expert_intermediate_size": N_FF_SHEXP}
    if mtp and not grouped:
        model.config["mtp_num_hidden_layers"] = mtp
    regex = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    qwen_tokenizer(model, QWEN2 if grouped else regex)
    if grouped:
        model.pre = "qwen2"
    blocks = Blocks(model.body(tied=tied, center=0.0))
    for il in range(4):
        if il < 3:
            blocks.norms(il, NORMS, center=0.0)
            delta_net(blocks, il, linear, grouped)
        else:
            gated_attention(blocks, il)
        if experts:
            qwen_moe(blocks, il, stacked=not grouped)
        else:
            blocks.mlp(il)
    blocks = Blocks(model, "mtp.layers.")
    for il in range(mtp):
        gated_attention(blocks, il)
        if experts:
            qwen_moe(blocks, il, stacked=False)
        else:
            blocks.mlp(il)
    if mtp:
        model.matrix("mtp.fc", N_EMBD, 2 * N_EMBD)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            model.norm(f"mtp.{norm}", center=0.0)
    else:
        model.reference_args = ["--no-mtp"]
    if multimodal:
        root = {"architectures": [cls], "model_type": kind, "tie_word_embeddings": tied}
        model.config = root | {"text_config": {k: v for k, v in model.config.items() if k not in ("architectures", "model_type")}}
        model = hf_models.vision_part(model, "model.language_model.")
    return model


def qwen35(multimodal=False):
    if multimodal:
        return qwen_hybrid("qwen3_5", "Qwen3_5ForConditionalGeneration", multimodal=True, dtype="F16", tied=True)
    return qwen_hybrid("qwen3_5_text", "Qwen3_5ForCausalLM", mtp=0, plain_rope=True, linear_value_head_dim=24)


def qwen35_fp8():
    """Rows and columns of codes move with their scales."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    model = qwen_hybrid("qwen3_5_text", "Qwen3_5ForCausalLM", tied=True)
    model.config["quantization_config"] = settings
    return model.fp8(32)


def qwen35_nvfp4():
    """Codes that are kept move with their scales, columns in whole blocks."""
    model = qwen_hybrid("qwen3_5_text", "Qwen3_5ForCausalLM", tied=True, linear_key_head_dim=64, linear_value_head_dim=64)
    model.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    coded = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "o_proj", "up_proj", "fc")
    for name in [name for name in model.tensors if name.split(".")[-2] in coded]:
        parts, model.tensors[name] = quantized_weights.nvfp4(model.tensors[name], True)
        if model.tensors[name].shape[1] % 64:
            continue
        model.raw |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    return model


def qwen35moe(mtp=1):
    if mtp:
        return qwen_hybrid("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", experts=True)
    return qwen_hybrid("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", True, 0, multimodal=True, dtype="F32", linear_num_value_heads=2)


def qwen3next():
    return qwen_hybrid("qwen3_next", "Qwen3NextForCausalLM", experts=True, grouped=True)


GLM_TOKENS = [("<|endoftext|>", True), ("[gMASK]", True), ("<|user|>", True), ("<|observation|>", True), ("<think>", False)]


def glm_tokenizer(model):
    steps = [split(LLAMA3), byte_level()]
    return model.tokenizer(write_byte_level, steps, GLM_TOKENS, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})


def glm4():
    model = HfModel("glm4", "glm4", ["Glm4ForCausalLM"], "glm4", head=32, rope_theta=1e4, partial_rotary_factor=0.5, pad_token_id=None)
    glm_tokenizer(model)
    blocks = Blocks(model.body())
    for il in range(2):
        blocks.norms(il, (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"))
        blocks.attention(il, head=32, bias=True)
        blocks.matrix(il, "mlp.gate_up_proj", 2 * N_FF)
        blocks.matrix(il, "mlp.down_proj", N_EMBD, N_FF)
    return model


def glm4moe(norms=True, nextn=1):
    model = HfModel(
        f"glm4moe-{norms}", "glm4_moe", ["Glm4MoeForCausalLM"], "glm4", head=32, rope_theta=1e6, partial_rotary_factor=0.5,
        n_routed_experts=N_EXPERT, n_shared_experts=1, first_k_dense_replace=1, num_nextn_predict_layers=nextn,
        routed_scaling_factor=2.5, use_qk_norm=norms, num_hidden_layers=3, eos_token_id=[268, 270], attention_bias=not norms,
        **EXPERTS,
    )
    glm_tokenizer(model)
    blocks = Blocks(model.body())
    for il in range(3 + nextn):
        blocks.norms(il, NORMS)
        blocks.attention(il, head=32, bias=not norms)
        if norms:
            blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), 32)
        if il == 0:
            blocks.mlp(il)
            continue
        blocks.matrix(il, "mlp.gate", N_EXPERT)
        blocks.vector(il, "mlp.gate.e_score_correction_bias", N_EXPERT, 0.0)
        blocks.experts(il)
        blocks.mlp(il, "mlp.shared_experts.", N_FF_EXP)
        if il == 3:
            nextn_tensors(blocks, il)
    return model


def nextn_tensors(blocks, il, head="shared_head.head", norm="shared_head.norm", embedding=True, center=1.0):
    n_vocab = blocks.model.n_vocab
    blocks.matrix(il, "eh_proj", N_EMBD, 2 * N_EMBD)
    blocks.norms(il, ("enorm", "hnorm"), center=center)
    if norm:
        blocks.norms(il, (norm,), center=center)
    if embedding:
        blocks.matrix(il, "embed_tokens", n_vocab)
    if head:
        blocks.matrix(il, head, n_vocab)


def olmo(version):
    kind = f"olmo{version}"
    model = HfModel(kind, kind, [f"Olmo{version}ForCausalLM"], "dbrx", rope_theta=5e5, num_hidden_layers=4)
    if version == 3:
        model.config |= {"sliding_window": 128, "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "attention_factor": 1.2,
            "beta_fast": 32.0, "beta_slow": 1.0,
        }}
    qwen_tokenizer(model, LLAMA3)
    blocks = Blocks(model.body())
    for il in range(4):
        blocks.norms(il, ("post_attention_layernorm", "post_feedforward_layernorm"))
        blocks.attention(il)
        blocks.norms(il, ("self_attn.q_norm",), N_EMBD)
        blocks.norms(il, ("self_attn.k_norm",), N_HEAD_KV * HEAD)
        blocks.mlp(il)
    return model


def bailingmoe2(nextn=1):
    model = HfModel(
        "bailingmoe2", "bailing_moe", ["BailingMoeV2ForCausalLM"], "bailingmoe", head=32, rope_theta=6e5,
        partial_rotary_factor=0.5, num_experts=N_EXPERT, num_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, score_function="sigmoid", num_nextn_predict_layers=nextn,
        moe_shared_expert_intermediate_size=N_FF_SHEXP, use_qkv_bias=not nextn, tie_word_embeddings=False, **EXPERTS,
    )
    qwen_tokenizer(model, hf_models.CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
    model.body()
    model.tensors = {name.replace("embed_tokens", "word_embeddings"): values for name, values in model.tensors.items()}
    blocks = Blocks(model)
    for il in range(2 + nextn):
        blocks.norms(il, NORMS)
        blocks.matrix(il, "attention.query_key_value", (N_HEAD + 2 * N_HEAD_KV) * 32, bias=not nextn)
        blocks.matrix(il, "attention.dense", N_EMBD, N_HEAD * 32)
        blocks.norms(il, ("attention.query_layernorm", "attention.key_layernorm"), 32)
        if il == 0:
            blocks.mlp(il)
            continue
        blocks.matrix(il, "mlp.gate", N_EXPERT)
        blocks.vector(il, "mlp.gate.expert_bias", N_EXPERT, 0.0)
        blocks.experts(il)
        blocks.mlp(il, "mlp.shared_experts.", N_FF_SHEXP)
        if il == 2:
            nextn_tensors(blocks, il, head=None, norm=None, embedding=False)
            blocks.norms(il, ("final_layernorm",))
    return model


def exaone4(window=True):
    model = HfModel(
        "exaone4", "exaone4", ["Exaone4ForCausalLM"], "exaone4", rope_theta=1e6, num_hidden_layers=4, head_dim=HEAD,
        sliding_window=64 if window else None, sliding_window_pattern="LLLG" if window else None,
        rope_scaling={**hf_models.LLAMA3_SCALING, "factor": 16.0},
        layer_types=["sliding_attention" if window else "full_attention"] * 3 + ["full_attention"],
    )
    model.tokenizer(write_byte_level, [byte_level(True)], [("[|endofturn|]", True), ("[BOS]", True)],
                    {"eos_token": "[|endofturn|]", "bos_token": "[BOS]"})
    blocks = Blocks(model.body(tied=not window))
    for il in range(4):
        blocks.norms(il, ("post_attention_layernorm", "post_feedforward_layernorm"))
        blocks.attention(il)
        blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), HEAD)
        blocks.mlp(il)
    return model


def exaone_moe(nextn=1):
    model = HfModel(
        "exaone_moe", "exaone_moe", ["ExaoneMoEForCausalLM" if nextn else "ExaoneMoeForCausalLM"], "exaone-moe", rope_theta=1e6,
        num_hidden_layers=4, head_dim=HEAD, sliding_window=64, sliding_window_pattern="LLLG", num_experts=N_EXPERT,
        num_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, n_group=1, topk_group=1,
        scoring_func="sigmoid", tie_word_embeddings=False, layer_types=["sliding_attention"] * 3 + ["full_attention"], **EXPERTS,
    )
    model.config |= {"num_nextn_predict_layers": 1, "first_k_dense_replace": 1} if nextn else {"first_last_k_dense_replace": 1}
    regex = hf_models.CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    qwen_tokenizer(model, regex)
    model.body()
    for blocks, count in ((Blocks(model), 4), (Blocks(model, "mtp.layers."), nextn)):
        for il in range(count):
            blocks.norms(il, NORMS)
            blocks.attention(il)
            blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), HEAD)
            if il == 0:
                blocks.mlp(il)
                continue
            blocks.matrix(il, "mlp.gate", N_EXPERT)
            bias = "mlp.gate.e_score_correction_bias" if nextn else "mlp.e_score_correction_bias"
            blocks.vector(il, bias, N_EXPERT, 0.0)
            blocks.experts(il)
            blocks.mlp(il, "mlp.shared_experts.", N_FF_EXP)
    if nextn:
        model.matrix("mtp.fc", N_EMBD, 2 * N_EMBD)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            model.norm(f"mtp.{norm}")
    return model


HUNYUAN = {"max_position_embeddings": 32768, "rope_theta": 10000.0}
HUNYUAN_REGEX = [
    split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
    split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"),
    byte_level(),
]


def hunyuan_dense(dynamic=True):
    kind = "hunyuan_v1_dense" if dynamic else "hunyuan"
    model = HfModel("hunyuan_dense", kind, ["HunYuanDenseV1ForCausalLM"], "hunyuan-dense", head=32, **HUNYUAN)
    tokens = [("<｜hy_begin▁of▁sentence｜>", True), ("<｜hy_end|>", True), ("<｜hy_Assistant｜>", True)]
    model.tokenizer(write_byte_level, HUNYUAN_REGEX, tokens, {"bos_token": tokens[0][0], "eos_token": tokens[1][0]})
    if dynamic:
        model.config["rope_scaling"] = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
        model.files["generation_config.json"] = json.dumps({"eos_token_id": [269, 270], "top_k": 20})
    model.config["eod_token_id"] = 270
    blocks = Blocks(model.body(tied=dynamic))
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il, head=32)
        blocks.norms(il, ("self_attn.query_layernorm", "self_attn.key_layernorm"), 32)
        blocks.mlp(il)
    return model


def hunyuan_moe():
    """The reference converter's vocabulary of this class needs code of the publisher; that of tokenizer.json is compared."""
    model = HfModel("hunyuan_moe", "hunyuan_v1_moe", ["HunYuanMoEV1ForCausalLM"], "hunyuan", num_experts=N_EXPERT,
                    moe_topk=[N_EXPERT_USED] * 2, moe_intermediate_size=[N_FF] * 2, num_shared_expert=[1] * 2, **HUNYUAN)
    qwen_tokenizer(model)
    model.pre = "qwen2"
    model.config["head_dim"] = HEAD
    blocks = Blocks(model.body())
    for il in range(2):
        blocks.norms(il, NORMS)
        blocks.attention(il)
        blocks.norms(il, ("self_attn.query_layernorm", "self_attn.key_layernorm"), HEAD)
        blocks.matrix(il, "mlp.gate.wg", N_EXPERT)
        blocks.experts(il, width=N_FF)
        blocks.mlp(il, "mlp.shared_mlp.", N_FF)
    return model


def mistral3(ministral=False):
    cls = "Ministral3ForCausalLM" if ministral else "Mistral3ForConditionalGeneration"
    model = HfModel("mistral3", "ministral3" if ministral else "mistral3", [cls], "tekken", head=24)
    regex = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
             r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    model.tokenizer(write_byte_level, [split(regex), byte_level()], [("<s>", True), ("</s>", True), ("[INST]", True)],
                    {"bos_token": "<s>", "eos_token": "</s>"})
    model.body().layers().dense()
    if ministral:
        model.config["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        }
        return model
    text = {key: value for key, value in model.config.items() if key != "architectures"} | {"model_type": "mistral", "rope_theta": 1e9}
    model.config = {"architectures": [cls], "model_type": "mistral3", "text_config": text, "vision_config": {"model_type": "pixtral"}}
    model.tensors = {f"language_model.{name}": values for name, values in model.tensors.items()}
    model.matrix("vision_tower.transformer.layers.0.attention.q_proj", 8, 8)
    model.matrix("multi_modal_projector.linear_1", 8, 8)
    return model


def minicpm(long=True):
    model = HfModel("minicpm", "minicpm", ["MiniCPMForCausalLM"], "-", rope_theta=1e4, scale_emb=12, scale_depth=1.4,
                    dim_model_base=256)
    if long:
        factors = [1 + 0.25 * i for i in range(HEAD // 2)]
        model.config["rope_scaling"] = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors[::-1],
                                        "original_max_position_embeddings": 256}
    pieces_tokenizer(model)
    return model.body(tied=long).layers().dense()


def afmoe():
    model = HfModel(
        "afmoe", "afmoe", ["AfmoeForCausalLM"], "llama-bpe", head=24, rope_theta=1e4, num_experts=N_EXPERT,
        num_shared_experts=1, num_dense_layers=1, route_norm=True, route_scale=2.826, sliding_window=64, score_func="sigmoid",
        global_attn_every_n_layers=4, n_group=1, topk_group=1, num_hidden_layers=4, tie_word_embeddings=False, mup_enabled=True,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], **EXPERTS,
    )
    model.tokenizer(write_byte_level, [split(LLAMA3), byte_level()], QWEN_TOKENS, QWEN_CONFIG, ignore_merges=True)
    blocks = Blocks(model.body())
    for il in range(4):
        blocks.norms(il, (*NORMS, "pre_mlp_layernorm", "post_mlp_layernorm"))
        blocks.attention(il, head=24)
        blocks.matrix(il, "self_attn.gate_proj", N_HEAD * 24)
        blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), 24)
        if il == 0:
            blocks.mlp(il)
            continue
        blocks.matrix(il, "mlp.router.gate", N_EXPERT)
        blocks.vector(il, "mlp.expert_bias", N_EXPERT, 0.0)
        blocks.experts(il)
        blocks.mlp(il, "mlp.shared_experts.", N_FF_EXP)
    return model


def step35(nextn=1):
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = HfModel(
        "step35", "step3p5", ["Step3p5ForCausalLM"], "deepseek-v3", head=24, num_hidden_layers=3, num_attention_groups=N_HEAD_KV,
        layer_types=types[:3 + nextn], partial_rotary_factors=[0.5, 1.0, 1.0, 0.5][:3 + nextn], sliding_window=64,
        attention_other_setting={"num_attention_heads": 6, "num_attention_groups": 3}, rope_theta=[5e6, 1e4, 1e4, 5e6],
        moe_num_experts=N_EXPERT, moe_top_k=N_EXPERT_USED, moe_intermediate_size=N_FF_EXP, share_expert_dim=N_FF_SHEXP,
        moe_layers_enum="1,2", moe_router_scaling_factor=3.0, norm_expert_weight=True, moe_router_activation="sigmoid",
        num_nextn_predict_layers=nextn, tie_word_embeddings=False, swiglu_limits=[None, 7.0, 0.0],
        swiglu_limits_shared=[0.0, 0.0, 16.0], rope_scaling={**hf_models.LLAMA3_SCALING, "factor": 2.0},
    )
    del model.config["num_key_value_heads"]
    model.config["head_dim"] = 24
    model.tokenizer(write_byte_level, HUNYUAN_REGEX, [("<s>", True), ("</s>", True)], {"bos_token": "<s>", "eos_token": "</s>"})
    blocks = Blocks(model.body(center=0.0))
    for il in range(3 + nextn):
        window = types[il] == "sliding_attention"
        heads, kv = (6, 3) if window else (N_HEAD, N_HEAD_KV)
        blocks.norms(il, NORMS, center=0.0)
        blocks.attention(il, heads, kv, 24)
        blocks.norms(il, ("self_attn.q_norm", "self_attn.k_norm"), 24, center=0.0)
        blocks.matrix(il, "self_attn.g_proj", heads)
        if il in (1, 2):
            blocks.matrix(il, "moe.gate", N_EXPERT)
            blocks.vector(il, "moe.router_bias", N_EXPERT, 0.0)
            for part in ("gate_proj", "up_proj"):
                blocks.vector(il, f"moe.{part}.weight", (N_EXPERT, N_FF_EXP, N_EMBD), 0.0)
            blocks.vector(il, "moe.down_proj.weight", (N_EXPERT, N_EMBD, N_FF_EXP), 0.0)
            blocks.mlp(il, "share_expert.", N_FF_SHEXP)
        else:
            blocks.mlp(il)
        if il == 3:
            nextn_tensors(blocks, il, "transformer.shared_head.output", "transformer.shared_head.norm", False, 0.0)
    return model


def mimo2(fused=False):
    model = HfModel(
        "mimo2", "mimo_v2", ["MiMoV2ForCausalLM" if fused else "MiMoV2FlashForCausalLM"], "qwen2", head=24, num_hidden_layers=3,
        swa_num_key_value_heads=4, num_attention_heads=N_HEAD, swa_num_attention_heads=N_HEAD, swa_head_dim=24, v_head_dim=16,
        swa_v_head_dim=16, hybrid_layer_pattern=[0, 1, 1], moe_layer_freq=[0, 1, 1], sliding_window=128, rope_theta=5e6,
        swa_rope_theta=1e4, partial_rotary_factor=0.334, n_routed_experts=N_EXPERT, scoring_func="sigmoid", n_group=1, topk_group=1,
        topk_method="noaux_tc", norm_topk_prob=True, layernorm_epsilon=1e-6, tie_word_embeddings=False,
        attention_value_scale=None if fused else 0.707, **EXPERTS,
    )
    del model.config["rms_norm_eps"]
    qwen_tokenizer(model)
    model.body()
    for blocks, count in ((Blocks(model), 3), (Blocks(model, "model.mtp.layers."), 3)):
        for il in range(count):
            mtp = "mtp" in blocks.prefix
            window = mtp or il > 0
            kv = 4 if window else N_HEAD_KV
            blocks.norms(il, ("input_layernorm", "pre_mlp_layernorm" if mtp else "post_attention_layernorm"))
            if fused:
                blocks.matrix(il, "self_attn.qkv_proj", (N_HEAD + kv) * 24 + kv * 16)
                blocks.matrix(il, "self_attn.o_proj", N_EMBD, N_HEAD * 16)
            else:
                blocks.attention(il, kv=kv, head=24, value=16)
            if window:
                blocks.vector(il, "self_attn.attention_sink_bias", N_HEAD, 0.0)
            if mtp or il == 0:
                blocks.mlp(il)
            else:
                blocks.matrix(il, "mlp.gate", N_EXPERT)
                blocks.vector(il, "mlp.gate.e_score_correction_bias", N_EXPERT, 0.0)
                blocks.experts(il)
            if mtp:
                nextn_tensors(blocks, il, None, None, False)
                blocks.norms(il, ("final_layernorm",))
    return model


def llama4(interleave=1):
    cls = "Llama4ForCausalLM" if interleave == 1 else "Llama4ForConditionalGeneration"
    model = HfModel(
        "llama4", "llama4_text", [cls], "llama4", head=32, rope_theta=5e5, num_hidden_layers=4, num_local_experts=N_EXPERT,
        num_experts_per_tok=1, interleave_moe_layer_step=interleave, intermediate_size_mlp=N_FF, use_qk_norm=True,
        rope_scaling={**hf_models.LLAMA3_SCALING, "factor": 16.0},
    )
    model.config["intermediate_size"] = N_FF_EXP
    model.config["head_dim"] = 32
    tokens = [("<|begin_of_text|>", True), ("<|eot|>", True), ("<|header_start|>", True)]
    model.tokenizer(write_byte_level, [split(GPT4O, "Removed", True), byte_level()], tokens,
                    {"bos_token": tokens[0][0], "eos_token": tokens[1][0]})
    prefix = "model." if interleave == 1 else "language_model.model."
    model.body(prefix=prefix)
    blocks = Blocks(model, f"{prefix}layers.")
    for il in range(4):
        blocks.norms(il, NORMS)
        blocks.attention(il, head=32)
        if (il + 1) % interleave:
            blocks.mlp(il, "feed_forward.")
            continue
        blocks.matrix(il, "feed_forward.router", N_EXPERT)
        blocks.mlp(il, "feed_forward.shared_expert.", N_FF_EXP)
        blocks.stacked(il, "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True)
    if interleave > 1:
        text = {key: value for key, value in model.config.items() if key != "architectures"}
        model.config = {"architectures": [cls], "model_type": "llama4", "text_config": text, "vision_config": {"model_type": "llama4_vision_model"}}
        model.tensors["language_model.lm_head.weight"] = model.tensors.pop("lm_head.weight")
        model.matrix("vision_model.model.layers.0.self_attn.q_proj", 8, 8)
        model.matrix("multi_modal_projector.linear_1", 8, 8)
    return model


GEMMA4_ROPE = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA4_NAMED = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


def gemma4(form="dense"):
    """Dense; `small`, with inputs for each layer and shared keys; `moe`, with experts beside the dense network.

    The vocabulary ends where the embedding does, since the reference converter does not pad this kind.
    """
    small, moe = form == "small", form == "moe"
    layers = 4
    types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    if small:
        types = ["sliding_attention", "full_attention"] * 2
    model = HfModel(
        f"gemma4-{form}", "gemma4_text", ["Gemma4ForCausalLM" if moe else "Gemma4ForConditionalGeneration"], "-", n_vocab=286,
        head=16, num_hidden_layers=layers, layer_types=types, global_head_dim=32, sliding_window=64, rope_parameters=GEMMA4_ROPE,
        final_logit_softcapping=30.0, num_kv_shared_layers=2 if small else 0, hidden_size_per_layer_input=8 if small else 0,
        vocab_size_per_layer_input=286, use_double_wide_mlp=small, attention_k_eq_v=not small, enable_moe_block=moe,
        num_global_key_value_heads=None if small else 1, num_experts=N_EXPERT if moe else None,
        top_k_experts=N_EXPERT_USED if moe else None, moe_intermediate_size=N_FF_EXP if moe else None, head_dim=16,
    )
    added = [(282, "<|turn>", True), (283, "<|channel>", True), (284, "<|x|>", False), (285, "<turn|>", False)]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
              "pad_token": "<pad>", "mask_token": "<mask>"}
    model.tokenizer(hf_models.write_merged, config, added, False, GEMMA4_NAMED)
    prefix = "model." if moe else "model.language_model."
    model.body(tied=True, prefix=prefix)
    blocks = Blocks(model, f"{prefix}layers.")
    for il in range(layers):
        full = types[il] == "full_attention"
        shared = small and il >= 2
        head, kv = (32, 2 if small else 1) if full else (16, N_HEAD_KV)
        blocks.norms(il, (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"))
        blocks.vector(il, "layer_scalar", 1)
        blocks.matrix(il, "self_attn.q_proj", N_HEAD * head)
        blocks.matrix(il, "self_attn.o_proj", N_EMBD, N_HEAD * head)
        blocks.norms(il, ("self_attn.q_norm",), head)
        # One of the layers that share keys has some of its own all the same.
        if not shared or il == 2:
            blocks.matrix(il, "self_attn.k_proj", kv * head)
            blocks.norms(il, ("self_attn.k_norm",), head)
            if small or not full:
                blocks.matrix(il, "self_attn.v_proj", kv * head)
        blocks.mlp(il, width=2 * N_FF if shared else N_FF)
        if small:
            blocks.matrix(il, "per_layer_input_gate", 8)
            blocks.matrix(il, "per_layer_projection", N_EMBD, 8)
            blocks.norms(il, ("post_per_layer_input_norm",))
        if moe:
            blocks.norms(il, ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"))
            blocks.matrix(il, "router.proj", N_EXPERT)
            blocks.vector(il, "router.scale")
            blocks.vector(il, "router.per_expert_scale", N_EXPERT)
            blocks.stacked(il, "experts.gate_up_proj", "experts.down_proj")
    if small:
        model.matrix(f"{prefix}embed_tokens_per_layer", model.n_vocab, 8 * layers)
        model.matrix(f"{prefix}per_layer_model_projection", 8 * layers, N_EMBD)
        model.norm(f"{prefix}per_layer_projection_norm", 8)
    if not moe:
        text = {key: value for key, value in model.config.items() if key != "architectures"}
        model.config = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text,
                        "vision_config": {"model_type": "gemma4_vision"}, "tie_word_embeddings": True}
        model.matrix("model.vision_tower.patch_embedder.input_proj", 8, 8)
        model.matrix("model.embed_vision.embedding_projection", 8, 8)
    return model


FAMILIES = {
    "granitemoe": (granitemoe, ()),
    "granitemoeshared": (granitemoe, (N_FF_SHEXP,)),
    "dots1": (dots1, ()),
    "ernie": (ernie, ()),
    "ernie-fused": (ernie, (True,)),
    "ernie_moe": (ernie_moe, ()),
    "ernie_moe-interval": (ernie_moe, (2,)),
    "olmoe": (olmoe, ()),
    "minimax_m2": (minimax_m2, ()),
    "internlm2": (internlm2, ()),
    "qwen35": (qwen35, ()),
    "qwen35-multimodal": (qwen35, (True,)),
    "qwen35-fp8": (qwen35_fp8, ()),
    "qwen35-nvfp4": (qwen35_nvfp4, ()),
    "qwen35moe": (qwen35moe, ()),
    "qwen35moe-multimodal": (qwen35moe, (0,)),
    "qwen3next": (qwen3next, ()),
    "gemma4": (gemma4, ()),
    "gemma4-small": (gemma4, ("small",)),
    "gemma4-moe": (gemma4, ("moe",)),
    "glm4": (glm4, ()),
    "glm4moe": (glm4moe, ()),
    "glm4moe-bias": (glm4moe, (False, 0)),
    "olmo2": (olmo, (2,)),
    "olmo3": (olmo, (3,)),
    "bailingmoe2": (bailingmoe2, ()),
    "bailingmoe2-bias": (bailingmoe2, (0,)),
    "exaone4": (exaone4, ()),
    "exaone4-full": (exaone4, (False,)),
    "exaone_moe": (exaone_moe, ()),
    "exaone_moe-trunk": (exaone_moe, (0,)),
    "hunyuan_dense": (hunyuan_dense, ()),
    "hunyuan_dense-plain": (hunyuan_dense, (False,)),
    "hunyuan_moe": (hunyuan_moe, ()),
    "mistral3": (mistral3, ()),
    "ministral3": (mistral3, (True,)),
    "minicpm": (minicpm, ()),
    "minicpm-plain": (minicpm, (False,)),
    "afmoe": (afmoe, ()),
    "step35": (step35, ()),
    "step35-trunk": (step35, (0,)),
    "mimo2": (mimo2, ()),
    "mimo2-fused": (mimo2, (True,)),
    "llama4": (llama4, ()),
    "llama4-interleaved": (llama4, (2,)),
}

# Those whose blocks of further tokens the reference converter can leave out.
DROPPED = ("qwen35-multimodal", "qwen35moe", "qwen3next", "glm4moe", "step35")


def make(name):
    if name not in FAMILIES:
        return hf_models.make(name)
    model, args = FAMILIES[name]
    return model(*args)
