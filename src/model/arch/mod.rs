//! The architectures that the forward pass knows, composed of parts.
//!
//! A layer is a mixer (attention, or a gated delta net) and a feed-forward network (dense, experts, or both) around norms and
//! residual connections. A row says which parts an architecture has and in what form; where forms differ between layers, the
//! metadata and the layer's number decide (`hparams`). Facts follow llama.cpp b10605 (`src/models/*.cpp`,
//! `llama_model_rope_type`).

mod table;

pub(crate) use table::ARCHITECTURES;

/// Which pairs of head values a rotary embedding turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopePairs {
    /// Values `2i` and `2i + 1` (`LLAMA_ROPE_TYPE_NORM`).
    Adjacent,
    /// Values `i` and `i + n_rot / 2` (`LLAMA_ROPE_TYPE_NEOX`).
    Halves,
}

/// How the pairs of a head are dealt to positions in time, height and width. In text these are one; pairs that go to none of
/// them are not rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sections {
    /// There is one position.
    None,
    /// `rope.dimension_sections`, one after the other.
    Consecutive,
    /// As `Consecutive` where the file has the key, and then with pairs of [`RopePairs::Halves`]; else one position.
    IfGiven,
    /// The same numbers, in turns.
    Interleaved,
}

/// Layers without a rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeFree {
    /// There are none.
    None,
    /// Every so many layers, the last of them.
    Every(usize),
    /// In a model with windows those that see everything.
    SeeingAll,
}

/// `rope_freqs.weight` and, for long-rope models, `rope_factors_*.weight` divide the rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RopeFactors {
    /// They are not read.
    None,
    /// Of every layer.
    All,
    /// Of layers that see everything.
    SeeingAll,
}

/// The rotary embedding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rope {
    /// Pairs of values that turn together.
    pub pairs: RopePairs,
    /// Positions of more than one kind.
    pub sections: Sections,
    /// Layers without it.
    pub free: RopeFree,
    /// Divisors of the frequencies.
    pub factors: RopeFactors,
    /// Layers that see everything rotate half of what `rope.dimension_count` says.
    pub half_where_seeing_all: bool,
    /// YaRN's constants stand in the file.
    pub yarn_keys: bool,
    /// `rope.scaling.alpha` raises the base, by the size of a head.
    pub base_by_alpha: bool,
}

/// Where the size of windows stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowSize {
    /// `attention.sliding_window`; without the key no layer has a window.
    Optional,
    /// `attention.sliding_window`, which must be there.
    Required,
    /// `attention.sliding_window`, or this.
    Or(u64),
    /// This, whatever the key says.
    Fixed(u64),
}

/// The rotary embedding of windowed layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum WindowedRope {
    /// That of the other layers.
    Same,
    /// `rope.freq_base_swa`, or the model's base; scaled like other layers.
    OwnBase,
    /// `rope.freq_base_swa`, or this; positions are not scaled.
    Unscaled(f32),
    /// The model's base, without scaling of any kind.
    Plain,
}

/// Layers that see only a window of the last tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sliding {
    /// Where its size stands.
    pub size: WindowSize,
    /// Of so many layers all but the last have a window; without it `attention.sliding_window_pattern` must be there.
    pub period: Option<u64>,
    /// Windows begin at multiples of their size instead of moving with the token.
    pub chunked: bool,
    /// Models with another number of layers have none.
    pub only_with_layers: Option<usize>,
    /// Rotary embedding of these layers.
    pub rope: WindowedRope,
}

/// What queries and keys are normed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// They are not normed.
    None,
    /// Each head, before the rotary embedding.
    Head,
    /// As `Head`, in layers that have the weights.
    HeadIfThere,
    /// Each head, after the rotary embedding.
    HeadAfterRope,
    /// All heads together, before the rotary embedding.
    Whole,
    /// Each head, after the rotary embedding, without weights, in layers that rotate; not in models of 128 experts.
    Unweighted,
}

/// A gate on what attention gives, before its output matrix: the sigmoid of a product with the layer's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttentionGate {
    /// There is none.
    None,
    /// For each value, from `attn_gate`.
    Values,
    /// For each head, from `attn_gate`, in layers that have it.
    Heads,
    /// For each value; `attn_q` has its rows behind those of each head's query.
    WithinQueries,
}

/// Queries grow with the logarithm of their position: `1 + scale * ln(floor((position + offset) / length) + 1)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Temperature {
    /// They do not.
    None,
    /// Scale `attention.temperature_scale` where it is there, length the context before scaling, offset 0.
    ByKey,
    /// These, in layers that do not rotate.
    RopeFree {
        /// Factor of the logarithm.
        scale: f32,
        /// Positions of one temperature.
        length: f32,
        /// Added to positions.
        offset: f32,
    },
}

/// Scale of the attention scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScoreScale {
    /// `1 / sqrt(head size)`.
    HeadSize,
    /// As `HeadSize`, but `1 / sqrt(n_embd / n_head)` for the model with this many layers.
    HeadSizeExceptAt(usize),
    /// 1.
    One,
}

impl ScoreScale {
    /// True if scores of a model with `n_layer` layers are scaled by `n_embd / n_head` instead of the head size.
    pub(crate) fn is_by_embedding(self, n_layer: usize) -> bool {
        self == ScoreScale::HeadSizeExceptAt(n_layer)
    }
}

/// Attention, grouped by heads, with optional biases and optionally fused `attn_qkv`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Values are normed by head, without weights.
    pub values_normed: bool,
    /// `attn_v` may be absent; keys, before norm and rotary embedding, are the values then.
    pub values_may_be_keys: bool,
    /// Keys and values may differ in size; what its output matrix gives is multiplied by
    /// `attention.value_scale`.
    pub own_value_size: bool,
    /// The last layers may use keys and values of an earlier one (`attention.shared_kv_layers`).
    pub shares_keys: bool,
    /// Heads of windowed layers may have a size of their own (`attention.key_length_swa`).
    pub own_windowed_size: bool,
    /// Gate on its output.
    pub gate: AttentionGate,
    /// Growth of queries with their position.
    pub temperature: Temperature,
    /// Scale of scores.
    pub score_scale: ScoreScale,
    /// Default of `attn_logit_softcapping`; `None` when scores are never capped.
    pub score_cap: Option<f32>,
    /// Heads have a learned sink logit (`attn_sinks`).
    pub sinks: Sinks,
    /// Layers with a window.
    pub sliding: Option<Sliding>,
}

/// Which layers have sink logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sinks {
    /// None.
    None,
    /// All.
    All,
    /// Those that have the tensor.
    IfThere,
}

/// A gated delta net in place of attention, in most layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeltaNet {
    /// Which key head a value head belongs to.
    pub heads: ValueHeads,
    /// Decay and step of the recurrence stand in one matrix, `ssm_ba`, key head by key head.
    pub fused_gates: bool,
}

/// Which key head a value head of a delta net uses, of `k` key heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ValueHeads {
    /// Head `h` uses `h mod k`.
    Tiled,
    /// Neighbours share one.
    Grouped,
}

/// Norms of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norms {
    /// Before attention and before the feed-forward network.
    pub before: bool,
    /// After both (`post_attention_norm`, `post_ffw_norm`), before the residual connection.
    pub after: bool,
    /// Name of that before the feed-forward network.
    pub feed_forward: &'static str,
}

/// How the gate enters the product of the feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu(gate) * up`, tanh form.
    Gelu,
    /// gpt-oss: `g * sigmoid(1.702 g) * (u + 1)` with clamped `g` and `u`.
    SwigluOai,
}

/// How expert weights follow from the router's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gating {
    /// Softmax over all experts, the chosen ones taken as they are.
    Softmax,
    /// Softmax over all experts, the chosen ones scaled to sum to one.
    SoftmaxNormalized,
    /// Softmax over the chosen experts' logits only.
    SoftmaxOfChosen,
    /// Sigmoid of each logit, the chosen ones taken as they are.
    Sigmoid,
    /// Sigmoid of each logit, the chosen ones scaled to sum to one.
    SigmoidNormalized,
    /// Square root of the softplus of each logit, the chosen ones taken as they are.
    SqrtSoftplus,
    /// Square root of the softplus of each logit, the chosen ones scaled to sum to one.
    SqrtSoftplusNormalized,
}

impl Gating {
    /// True if the weights of the chosen experts are scaled to sum to one.
    pub(crate) fn is_normalized(self) -> bool {
        matches!(self, Gating::SoftmaxNormalized | Gating::SigmoidNormalized | Gating::SqrtSoftplusNormalized)
    }

    /// The same function with the other rule for the sum.
    pub(crate) fn with_sum(self, normalized: bool) -> Gating {
        use Gating::*;
        match (self, normalized) {
            (Softmax | SoftmaxNormalized, false) => Softmax,
            (Softmax | SoftmaxNormalized, true) => SoftmaxNormalized,
            (Sigmoid | SigmoidNormalized, false) => Sigmoid,
            (Sigmoid | SigmoidNormalized, true) => SigmoidNormalized,
            (SqrtSoftplus | SqrtSoftplusNormalized, false) => SqrtSoftplus,
            (SqrtSoftplus | SqrtSoftplusNormalized, true) => SqrtSoftplusNormalized,
            (SoftmaxOfChosen, _) => SoftmaxOfChosen,
        }
    }
}

/// Whether the model has experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mixture {
    /// Never.
    None,
    /// When `expert_count` is above zero.
    Optional(Gating),
    /// Always.
    Always(Gating),
}

impl Mixture {
    /// How expert weights follow from the router's outputs; `None` without experts.
    pub(crate) fn gating(self) -> Option<Gating> {
        match self {
            Mixture::None => None,
            Mixture::Optional(gating) | Mixture::Always(gating) => Some(gating),
        }
    }
}

/// What of the routing of experts stands in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutingKeys {
    /// `expert_gating_func`.
    pub function: bool,
    /// `expert_weights_norm`.
    pub norm: bool,
    /// `expert_weights_scale`.
    pub scale: bool,
}

/// Experts that see every token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SharedExpert {
    /// There are none.
    None,
    /// One of width `expert_shared_feed_forward_length`, or as wide as dense layers, with a sigmoid gate of its own.
    Gated,
    /// One of width `expert_shared_feed_forward_length`, where the file has that.
    Wide,
    /// As `Gated`, without the gate.
    AsDense,
    /// One of width `expert_shared_feed_forward_length`, or as wide as an expert.
    AsExpert,
    /// `expert_shared_count` of the width of experts, as one network of their common width.
    Counted,
    /// As `Counted`, of width `expert_shared_feed_forward_length` each where the file has that.
    CountedWide,
}

/// Layers of a mixture that have no experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DenseLayers {
    /// There are none.
    None,
    /// The first, and all but every so many: `leading_dense_block_count`, `interleave_moe_layer_step`.
    ByKeys,
    /// Those without `ffn_gate_inp`.
    WithoutRouter,
}

/// The feed-forward network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FeedForward {
    /// Gate function.
    pub activation: Activation,
    /// `ffn_up` holds gate and up rows in one matrix, gate first.
    pub fused_gate_up: bool,
    /// Whether there are experts.
    pub mixture: Mixture,
    /// `ffn_gate_up_exps` may hold gate and up rows of the experts, gate first.
    pub fused_experts: bool,
    /// Experts that see every token.
    pub shared: SharedExpert,
    /// What the file says of the routing.
    pub routing_keys: RoutingKeys,
    /// `exp_probs_b` may be added to the scores for the choice of experts.
    pub selection_bias: bool,
    /// An expert's weight multiplies its input instead of its output.
    pub weighs_inputs: bool,
    /// Layers without experts.
    pub dense_layers: DenseLayers,
    /// Layers with experts have a dense network beside them, with norms of its own, and the router sees the residual stream.
    pub beside_dense: bool,
    /// Experts have a width of their own, `expert_feed_forward_length`; otherwise they are as wide as dense layers.
    pub own_expert_width: bool,
    /// `swiglu_clamp_exp` and `swiglu_clamp_shexp` limit gate and up of a layer.
    pub clamped: bool,
}

/// Factors of embeddings, scores, what a layer adds to the residual stream, and logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Multipliers {
    /// There are none.
    None,
    /// Embeddings times `sqrt(n_embd)`.
    RootOfWidth,
    /// By the file's keys; logits are divided.
    ByKeys,
    /// As `ByKeys`, with MiniCPM's where keys are absent.
    MiniCpm,
}

/// Where the output matrix comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutputMatrix {
    /// `output.weight`, or the embedding when absent.
    OwnOrTied,
    /// Always `output.weight`.
    Own,
    /// Always the embedding.
    Tied,
}

/// One architecture: `general.architecture` and everything in which it differs from the others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Architecture {
    /// Value of `general.architecture`; also the prefix of its metadata keys.
    pub name: &'static str,
    /// Models it covers, for people.
    pub covers: &'static str,
    /// Rotary embedding.
    pub rope: Rope,
    /// Norms of a layer.
    pub norms: Norms,
    /// Attention.
    pub attention: Attention,
    /// What most layers have instead of attention.
    pub delta_net: Option<DeltaNet>,
    /// Feed-forward network.
    pub feed_forward: FeedForward,
    /// Inputs of each layer beside the residual stream (`embedding_length_per_layer_input`), and a factor of each layer's
    /// output (`layer_output_scale`).
    pub layer_inputs: bool,
    /// Blocks that predict further tokens may stand behind the layers (`nextn_predict_layers`); a pass leaves them out.
    pub next_tokens: bool,
    /// Factors.
    pub multipliers: Multipliers,
    /// Default of `final_logit_softcapping`; 0 means uncapped unless the metadata asks for it.
    pub logit_cap: Option<f32>,
    /// `output.weight` may be absent; `token_embd.weight` then serves twice.
    pub output: OutputMatrix,
}

impl Architecture {
    /// The row of `name`.
    pub(super) fn by_name(name: &str) -> Option<&'static Architecture> {
        ARCHITECTURES.iter().find(|row| row.name == name)
    }

    /// Heads are rotated by positions of more than one kind.
    pub(crate) fn has_sections(&self) -> bool {
        matches!(self.rope.sections, Sections::Consecutive | Sections::Interleaved)
    }

    /// The row of `name`, for tables that are built on this one; a name that is not here does not compile there.
    pub(crate) const fn named(name: &str) -> &'static Architecture {
        let mut rows = ARCHITECTURES;
        while let [row, rest @ ..] = rows {
            if same(row.name.as_bytes(), name.as_bytes()) {
                return row;
            }
            rows = rest;
        }
        panic!("no such architecture")
    }
}

/// `==`, which constants cannot use.
const fn same(mut a: &[u8], mut b: &[u8]) -> bool {
    while let ([first, rest_a @ ..], [other, rest_b @ ..]) = (a, b) {
        if *first != *other {
            return false;
        }
        (a, b) = (rest_a, rest_b);
    }
    a.is_empty() && b.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_a_row_agree() {
        for row in ARCHITECTURES {
            assert_eq!(Architecture::named(row.name).name, row.name);
            assert_eq!(Architecture::by_name(row.name).map(|found| found.name), Some(row.name));
        }
    }

    #[test]
    fn gating_keeps_its_function_with_either_sum() {
        for gating in [Gating::Softmax, Gating::Sigmoid, Gating::SqrtSoftplus] {
            assert!(gating.with_sum(true).is_normalized());
            assert_eq!(gating.with_sum(true).with_sum(false), gating);
        }
    }
}
