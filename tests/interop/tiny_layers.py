"""Small random models whose layers differ from each other, built layer by layer on `TinyModel`."""

from tiny_models import N_EMBD, N_EXPERT, N_EXPERT_USED, N_FF, N_FF_EXP, N_HEAD, N_VOCAB, TinyModel


class LayeredModel(TinyModel):
    """A model of which every layer is written by its own calls. Arrays by layer count NextN blocks too."""

    def array(self, key, values):
        self.keys[f"{self.arch}.{key}"] = ("array", list(values))

    def attention_at(self, il, n_head=N_HEAD, n_head_kv=None, head=None, head_v=None, gate=1, fused=False, bias=False,
                     values=True, keys=True):
        """Projections of one layer; `gate` 2 doubles the query rows by the gate of every head."""
        n_head_kv, head = n_head_kv or self.n_head_kv, head or self.head
        head_v = head_v or head
        rows = {"q": gate * n_head * head}
        if keys:
            rows["k"] = n_head_kv * head
            if values:
                rows["v"] = n_head_kv * head_v
        if fused:
            rows = {"qkv": sum(rows.values())}
        for part, n in rows.items():
            self.matrix(f"blk.{il}.attn_{part}.weight", N_EMBD, n, gain=1.5)
            if bias:
                self.vector(f"blk.{il}.attn_{part}.bias", n)
        self.matrix(f"blk.{il}.attn_output.weight", n_head * head_v, N_EMBD)

    def head_norms_at(self, il, n_q=None, n_k=None):
        self.norm(f"blk.{il}.attn_q_norm.weight", n_q or self.head)
        if n_k != 0:
            self.norm(f"blk.{il}.attn_k_norm.weight", n_k or n_q or self.head)

    def norms_at(self, il, *names, n=N_EMBD):
        for name in names:
            self.norm(f"blk.{il}.{name}.weight", n)

    def dense_at(self, il, n_ff=N_FF, fused=False, suffix=""):
        if not fused:
            self.matrix(f"blk.{il}.ffn_gate{suffix}.weight", N_EMBD, n_ff)
        self.matrix(f"blk.{il}.ffn_up{suffix}.weight", N_EMBD, n_ff * (2 if fused else 1))
        self.matrix(f"blk.{il}.ffn_down{suffix}.weight", n_ff, N_EMBD)

    def experts_at(self, il, n_ff=N_FF_EXP, fused=False, selection_bias=False, shared=None, shared_gate=False):
        self.matrix(f"blk.{il}.ffn_gate_inp.weight", N_EMBD, N_EXPERT, gain=2)
        if selection_bias:
            self.vector(f"blk.{il}.exp_probs_b.bias", N_EXPERT, scale=0.5)
        if fused:
            self.matrix(f"blk.{il}.ffn_gate_up_exps.weight", N_EMBD, 2 * n_ff, N_EXPERT)
        else:
            self.matrix(f"blk.{il}.ffn_gate_exps.weight", N_EMBD, n_ff, N_EXPERT)
            self.matrix(f"blk.{il}.ffn_up_exps.weight", N_EMBD, n_ff, N_EXPERT)
        self.matrix(f"blk.{il}.ffn_down_exps.weight", n_ff, N_EMBD, N_EXPERT)
        if shared:
            if shared_gate:
                self.vector(f"blk.{il}.ffn_gate_inp_shexp.weight", N_EMBD)
            self.dense_at(il, shared, suffix="_shexp")

    def expert_keys(self, n_ff=N_FF_EXP, shared=None, count=None, function=None, norm=None, scale=None, lead=None,
                    groups=None):
        self.u32("expert_count", N_EXPERT)
        self.u32("expert_used_count", N_EXPERT_USED)
        for key, value in (
            ("expert_feed_forward_length", n_ff),
            ("expert_shared_feed_forward_length", shared),
            ("expert_shared_count", count),
            ("expert_gating_func", function),
            ("leading_dense_block_count", lead),
            ("expert_group_count", groups and groups[0]),
            ("expert_group_used_count", groups and groups[1]),
        ):
            if value is not None:
                self.u32(key, value)
        if norm is not None:
            self.bool("expert_weights_norm", norm)
        if scale is not None:
            self.f32("expert_weights_scale", scale)

    def next_token_at(self, il, own_head=False):
        """What a NextN block has beside the tensors of a layer."""
        self.matrix(f"blk.{il}.nextn.eh_proj.weight", 2 * N_EMBD, N_EMBD)
        self.norm(f"blk.{il}.nextn.enorm.weight")
        self.norm(f"blk.{il}.nextn.hnorm.weight")
        self.norm(f"blk.{il}.nextn.shared_head_norm.weight")
        if own_head:
            self.matrix(f"blk.{il}.nextn.embed_tokens.weight", N_EMBD, N_VOCAB)
            self.matrix(f"blk.{il}.nextn.shared_head_head.weight", N_EMBD, N_VOCAB)

    def window(self, n, pattern=None):
        self.u32("attention.sliding_window", n)
        if isinstance(pattern, int):
            self.u32("attention.sliding_window_pattern", pattern)
        elif pattern is not None:
            self.array("attention.sliding_window_pattern", pattern)

    def yarn(self, factor=4.0, original=64):
        self.string("rope.scaling.type", "yarn")
        self.f32("rope.scaling.factor", factor)
        self.u32("rope.scaling.original_context_length", original)
