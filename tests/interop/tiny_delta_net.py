"""Small random models with gated delta nets between layers of full attention: qwen35, qwen35moe, qwen3next."""

import numpy as np
from tiny_layers import LayeredModel
from tiny_models import N_EMBD, N_FF_EXP, N_FF_SHEXP

HEAD = 32
STATE = 16
SECTIONS = [4, 2, 2, 0]


class DeltaModel(LayeredModel):
    """`full` are the layers with attention; the others hold a delta net with `keys` and `values` heads of STATE."""

    def __init__(self, arch, n_layer, full, keys=2, values=4, kernel=4, next_token=0, tied=False):
        super().__init__(arch, n_layer=n_layer + next_token, head=HEAD)
        self.full, self.n_keys, self.n_values, self.trunk = full, keys, values, n_layer
        self.f32("rope.freq_base", 1e6)
        # A quarter of the head turns, as in the published models.
        self.u32("rope.dimension_count", 16)
        self.u32("ssm.conv_kernel", kernel)
        self.u32("ssm.state_size", STATE)
        self.u32("ssm.group_count", keys)
        self.u32("ssm.time_step_rank", values)
        self.u32("ssm.inner_size", values * STATE)
        self.kernel = kernel
        if next_token:
            self.u32("nextn_predict_layers", next_token)
        self.body(tied=tied)

    def decay_at(self, il):
        """The convolution, the decay and the output of a delta net. `ssm_a` is -exp(A_log)."""
        channels = (2 * self.n_keys + self.n_values) * STATE
        kernel = self.rng.normal(0, 1 / np.sqrt(self.kernel), (channels, self.kernel))
        self.tensors[f"blk.{il}.ssm_conv1d.weight"] = kernel.astype(np.float32)
        self.vector(f"blk.{il}.ssm_dt.bias", self.n_values, scale=1)
        self.tensors[f"blk.{il}.ssm_a"] = -np.exp(self.rng.uniform(-3, 0.5, self.n_values)).astype(np.float32)
        self.norm(f"blk.{il}.ssm_norm.weight", STATE)
        self.matrix(f"blk.{il}.ssm_out.weight", self.n_values * STATE, N_EMBD)

    def delta_at(self, il):
        n_k, n_v = self.n_keys * STATE, self.n_values * STATE
        self.matrix(f"blk.{il}.attn_qkv.weight", N_EMBD, 2 * n_k + n_v)
        self.matrix(f"blk.{il}.attn_gate.weight", N_EMBD, n_v)
        if self.arch == "qwen3next":
            self.matrix(f"blk.{il}.ssm_ba.weight", N_EMBD, 2 * self.n_values)
        else:
            self.matrix(f"blk.{il}.ssm_beta.weight", N_EMBD, self.n_values)
            self.matrix(f"blk.{il}.ssm_alpha.weight", N_EMBD, self.n_values)
        self.decay_at(il)

    def old_delta_at(self, il):
        """As the first converters wrote qwen3next: query, key, value and gate in one matrix, by key head."""
        self.matrix(f"blk.{il}.ssm_in.weight", N_EMBD, 2 * (self.n_keys + self.n_values) * STATE)
        self.matrix(f"blk.{il}.ssm_ba.weight", N_EMBD, 2 * self.n_values)
        self.decay_at(il)

    def layers(self, feed_forward, delta=delta_at):
        for il in range(self.n_layer):
            self.norms_at(il, "attn_norm", "post_attention_norm")
            if il in self.full or il >= self.trunk:
                self.attention_at(il, gate=2)
                self.head_norms_at(il)
            else:
                delta(self, il)
            feed_forward(il)
            if il >= self.trunk:
                self.next_token_at(il)
        return self


def qwen35():
    model = DeltaModel("qwen35", n_layer=4, full=(3,), tied=True)
    model.array("rope.dimension_sections", SECTIONS)
    return model.layers(model.dense_at)


def qwen35_with_next_token():
    """As many value heads as key heads, an interval that does not divide the layers, and a NextN block."""
    model = DeltaModel("qwen35", n_layer=5, full=(1, 3), keys=3, values=3, next_token=1)
    model.array("rope.dimension_sections", SECTIONS)
    model.u32("full_attention_interval", 2)
    return model.layers(model.dense_at)


def qwen35_listed():
    """Layers with delta nets by a list, of which the first has attention; three value heads a key head."""
    model = DeltaModel("qwen35", n_layer=4, full=(0, 2), keys=2, values=6, kernel=3)
    model.array("rope.dimension_sections", SECTIONS)
    model.array("attention.recurrent_layers", [False, True, False, True])
    return model.layers(model.dense_at)


def qwen35moe(fused=False, next_token=0, values=4, n_layer=4, listed=False):
    model = DeltaModel("qwen35moe", n_layer=n_layer, full=(3,), values=values, next_token=next_token)
    model.array("rope.dimension_sections", SECTIONS)
    model.expert_keys(shared=N_FF_SHEXP)
    if listed:
        model.array("attention.recurrent_layers", [il < n_layer and il != 3 for il in range(n_layer + next_token)])
    return model.layers(lambda il: model.experts_at(il, fused=fused, shared=N_FF_SHEXP, shared_gate=True))


def qwen3next(old=False, values=4, next_token=0, n_layer=4, interval=4, tied=False):
    full = [il for il in range(n_layer) if (il + 1) % interval == 0]
    model = DeltaModel("qwen3next", n_layer=n_layer, full=full, values=values, next_token=next_token, tied=tied)
    model.expert_keys(n_ff=N_FF_EXP, shared=N_FF_SHEXP)
    if interval != 4:
        model.u32("full_attention_interval", interval)
    delta = DeltaModel.old_delta_at if old else DeltaModel.delta_at
    return model.layers(lambda il: model.experts_at(il, shared=N_FF_SHEXP, shared_gate=True), delta)


MODELS = {
    "qwen35": qwen35,
    "qwen35-next-token": qwen35_with_next_token,
    "qwen35-listed": qwen35_listed,
    "qwen35moe": qwen35moe,
    "qwen35moe-fused": lambda: qwen35moe(fused=True, next_token=1, values=2, n_layer=5, listed=True),
    "qwen3next": qwen3next,
    "qwen3next-next-token": lambda: qwen3next(values=2, next_token=1, n_layer=5, interval=2, tied=True),
    "qwen3next-ssm-in": lambda: qwen3next(old=True, values=6),
}
