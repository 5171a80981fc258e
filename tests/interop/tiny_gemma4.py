"""Small random models of gemma4: dense, with inputs by layer, and with experts beside the dense network."""

import numpy as np
from tiny_layers import LayeredModel
from tiny_models import N_EMBD, N_EXPERT, N_EXPERT_USED, N_FF, N_VOCAB

HEAD = 32
HEAD_WINDOW = 16
N_INPUT = 12
WINDOW = 24


class Gemma4(LayeredModel):
    """`pattern` is a letter a layer: w for a window, f for full attention. The last `shared` layers have no keys and
    values of their own."""

    def __init__(self, pattern, shared=0, n_input=0, kv_full=2, values_full=True, cap=None, tied=True, rotary=HEAD):
        super().__init__("gemma4", n_layer=len(pattern), head=HEAD)
        self.pattern, self.first_shared = pattern, len(pattern) - shared
        self.kv_full, self.values_full, self.n_input = kv_full, values_full, n_input
        self.u32("attention.key_length_swa", HEAD_WINDOW)
        self.u32("attention.value_length_swa", HEAD_WINDOW)
        self.u32("rope.dimension_count", rotary)
        self.u32("rope.dimension_count_swa", HEAD_WINDOW)
        self.f32("rope.freq_base", 1e6)
        self.f32("rope.freq_base_swa", 1e4)
        self.window(WINDOW, [letter == "w" for letter in pattern])
        self.u32("attention.shared_kv_layers", shared)
        self.u32("embedding_length_per_layer_input", n_input)
        if kv_full != self.n_head_kv:
            self.array("attention.head_count_kv", [2 if letter == "w" else kv_full for letter in pattern])
        if cap:
            self.f32("final_logit_softcapping", cap)
        self.body(tied=tied)
        # Pairs of a high factor do not turn.
        self.tensors["rope_freqs.weight"] = np.array([1] * 6 + [1e30] * (HEAD // 2 - 6), dtype=np.float32)
        if n_input:
            n_all = n_input * len(pattern)
            self.tensors["per_layer_token_embd.weight"] = self.rng.normal(0, 1, (N_VOCAB, n_all)).astype(np.float32)
            self.matrix("per_layer_model_proj.weight", N_EMBD, n_all)
            self.norm("per_layer_proj_norm.weight", n_input)

    def attention_layer(self, il):
        full, own = self.pattern[il] == "f", il < self.first_shared
        head = HEAD if full else HEAD_WINDOW
        n_head_kv = self.kv_full if full else 2
        self.norms_at(il, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        self.attention_at(il, head=head, n_head_kv=n_head_kv, keys=own, values=self.values_full or not full)
        self.head_norms_at(il, head, None if own else 0)
        # Scores are not scaled otherwise; without this the models amplify each other's roundings.
        self.tensors[f"blk.{il}.attn_q_norm.weight"] /= np.float32(np.sqrt(head))

    def inputs_at(self, il):
        self.matrix(f"blk.{il}.inp_gate.weight", N_EMBD, self.n_input)
        self.matrix(f"blk.{il}.proj.weight", self.n_input, N_EMBD)
        self.norms_at(il, "post_norm")
        # A sum of few terms: where one of them falls to the other side of a step of ggml's GELU, it shows.
        self.tensors[f"blk.{il}.post_norm.weight"] /= 4

    def output_scale_at(self, il):
        self.tensors[f"blk.{il}.layer_output_scale.weight"] = np.array([0.5 + 0.2 * il], dtype=np.float32)

    def experts_beside_at(self, il, fused, scaled):
        self.norms_at(il, "post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2")
        self.experts_at(il, fused=fused)
        # The router divides its input by the root of the width.
        self.tensors[f"blk.{il}.ffn_gate_inp.scale"] = (8 + self.rng.normal(size=N_EMBD)).astype(np.float32)
        if scaled:
            self.tensors[f"blk.{il}.ffn_down_exps.scale"] = self.rng.uniform(0.5, 2, N_EXPERT).astype(np.float32)


def gemma4():
    """As 31B: values of layers with full attention are their keys, with fewer heads; logits have a cap."""
    model = Gemma4("wwwwwf", kv_full=1, values_full=False, cap=8.0)
    for il in range(model.n_layer):
        model.attention_layer(il)
        model.dense_at(il)
        model.output_scale_at(il)
    return model


def gemma4_with_values():
    """Full layers with values of their own, an own output, no scale of layers, and a part of the head that turns."""
    model = Gemma4("wfwf", tied=False, rotary=20)
    model.tensors["rope_freqs.weight"] = np.linspace(1, 4, HEAD // 2, dtype=np.float32)
    for il in range(model.n_layer):
        model.attention_layer(il)
        model.dense_at(il)
    return model


def gemma4_inputs(shared=3, wide=True):
    """As E2B: inputs by layer, keys and values shared by the last layers, whose dense networks are twice as wide."""
    model = Gemma4("wwfwfwwf" if shared else "wwfwf", shared=shared, n_input=N_INPUT, cap=8.0)
    widths = [2 * N_FF if wide and il >= model.first_shared else N_FF for il in range(model.n_layer)]
    if wide:
        model.array("feed_forward_length", widths)
    for il, width in enumerate(widths):
        model.attention_layer(il)
        model.dense_at(il, width)
        model.inputs_at(il)
        model.output_scale_at(il)
    return model


def gemma4_experts(fused, scaled, dense=(), used=N_EXPERT_USED):
    """As 26B-A4B; layers in `dense` have no experts."""
    model = Gemma4("wwf" * 2, kv_full=1, values_full=False, cap=8.0)
    model.expert_keys()
    model.u32("expert_used_count", used)
    for il in range(model.n_layer):
        model.attention_layer(il)
        model.dense_at(il)
        if il not in dense:
            model.experts_beside_at(il, fused, scaled)
        model.output_scale_at(il)
    return model


MODELS = {
    "gemma4": gemma4,
    "gemma4-values": gemma4_with_values,
    "gemma4-inputs": gemma4_inputs,
    "gemma4-inputs-unshared": lambda: gemma4_inputs(shared=0, wide=False),
    "gemma4-experts": lambda: gemma4_experts(fused=True, scaled=True, used=N_EXPERT),
    "gemma4-experts-apart": lambda: gemma4_experts(fused=False, scaled=False, dense=(1,), used=N_EXPERT),
    # One layer chooses, so that a choice that roundings tip has no say in other tokens.
    "gemma4-experts-chosen": lambda: gemma4_experts(fused=True, scaled=True, dense=range(5)),
}
