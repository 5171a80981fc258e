//! The architectures that can be converted: one row for each class, with everything in which its folders differ.
//!
//! A row stands on the row of the forward pass's table, which says what is computed; here stands how a folder says it.
//! Its columns are lists of parts: groups of tensors with the blocks that have them, steps that derive sizes from the
//! configuration, keys. A new class is a row, and at most one part that no other has.
//!
//! Facts follow llama.cpp b10605 (`conversion/*.py`, `gguf-py/gguf/tensor_mapping.py`) and transformers 4.57.6.

mod defaults;
mod names;
mod parts;
mod rows;

use serde_json::Value;

use super::hparams::Key;
use super::sizes::Layout;
use crate::model::Architecture;

pub(super) use rows::ROWS;

/// Which dimensions a tensor has, in the order of safetensors (rows first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dim {
    /// `hidden_size`.
    Width,
    /// Two of them.
    DoubleWidth,
    /// `vocab_size`.
    Vocabulary,
    /// Number of query heads.
    Heads,
    /// Rows of all query heads.
    Queries,
    /// Queries with a gate for each.
    DoubleQueries,
    /// Rows of all key heads.
    Keys,
    /// Rows of all value heads.
    Values,
    /// What all heads give.
    Outputs,
    /// Queries, keys and values.
    Fused,
    /// `head_dim`.
    Head,
    /// `intermediate_size`.
    FeedForward,
    /// Gate and up rows in one matrix.
    GateUp,
    /// Number of experts.
    Experts,
    /// Width of the shared experts together.
    SharedWidth,
    /// Rows of the delta net's keys, or of its queries.
    LinearKeys,
    /// Rows of the delta net's values.
    LinearValues,
    /// Its queries, keys and values.
    LinearFused,
    /// Number of its value heads.
    LinearHeads,
    /// Twice that.
    DoubleLinearHeads,
    /// Size of a value head.
    LinearHead,
    /// Length of the convolution before it.
    Kernel,
    /// What each layer gets of a token besides the embedding.
    PerLayer,
    /// That of all layers.
    AllPerLayer,
    /// Tokens that have it.
    PerLayerVocabulary,
    /// 1.
    One,
}

/// Where rows or columns move to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// They stay.
    Kept,
    /// Rows of a head move from rotating halves to rotating neighbours, which GGUF's llama expects.
    Neighbours,
    /// The delta net's value heads, which stand by their key head, move so that those of all key heads take turns; the
    /// last segment of a cut, or all rows.
    Turns,
    /// The same for the columns of a matrix.
    TurnsOfColumns,
}

/// What becomes of the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    Keep,
    /// Norms are stored minus one.
    AddOne,
    /// The logarithm of a decay becomes minus the decay.
    MinusExp,
}

/// A tensor of which only some rows are wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// What its rows are, one segment after the other.
    pub stack: &'static [Dim],
    /// The first segment wanted.
    pub from: usize,
    /// Behind the last segment wanted.
    pub to: usize,
    /// How often all segments follow each other, each with its part of the rows.
    pub groups: Groups,
}

/// Groups of rows in a tensor that holds several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Groups {
    /// One.
    One,
    /// One for each key head.
    KeyHeads,
    /// One for each of the delta net's key heads.
    LinearKeyHeads,
}

/// A tensor of each layer, or of the ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Role {
    /// Name after `model.layers.N.` (`model.` at the ends), without `stored`.
    pub source: &'static str,
    /// How the source's name ends, mostly `.weight`.
    pub stored: &'static str,
    /// Name after `blk.N.`, without `written`.
    pub target: &'static str,
    /// How the target's name ends, mostly `.weight`.
    pub written: &'static str,
    /// Shape of the weight; of a cut one, what is left.
    pub shape: &'static [Dim],
    /// Rows of the source, if not all are wanted or they are of several kinds.
    pub cut: Option<Cut>,
    pub order: Order,
    pub change: Change,
    /// A bias of as many values as the weight has rows may stand beside it.
    pub bias: bool,
    /// It may be absent.
    pub optional: bool,
    /// Dimensions of 1 are dropped.
    pub squeezed: bool,
    /// Codes with scales are refused: publishers of this tensor lay them out by device.
    pub plain: bool,
}

/// Which blocks have a group of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Those that predict further tokens.
    NextN,
    /// Delta nets.
    Recurrent,
    /// Those with attention.
    Attention,
    /// A dense feed-forward network.
    Dense,
    /// Experts.
    Experts,
    /// Shared experts.
    Shared,
    /// Keys of their own.
    OwnKeys,
    /// Values of their own.
    OwnValues,
    /// Keys and values of an earlier block.
    SharedKeys,
    /// Those that get a part of their own from each token.
    PerLayer,
    /// `config.json` sets this flag, or has something other than 0 there.
    Flag(&'static str),
    /// The folder holds this tensor.
    Stored(&'static str),
    /// It does not.
    NotStored(&'static str),
}

/// Tensors that come together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    /// All must hold.
    pub when: &'static [When],
    pub roles: &'static [Role],
}

/// How expert matrices are named.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertNames {
    /// Before the expert's number; empty where they always stand in one tensor.
    pub prefix: &'static str,
    /// Suffixes of gate, up and down.
    pub gate_up_down: [&'static str; 3],
    /// All experts of gate and up, and of down, in one tensor each; newer files have these.
    pub stacked: [&'static str; 2],
    /// All experts of gate, up and down in three tensors, as MLX has them.
    pub switched: &'static str,
    /// Configuration fields of the width of one expert; the first that is there counts.
    pub width: &'static str,
    /// gpt-oss: always in one tensor, with biases, rows of gate and up in turns.
    pub interleaved: bool,
    /// Stacked tensors have inputs as rows where they are not quantized.
    pub transposed: bool,
    /// Gate and up stay in one tensor.
    pub kept_fused: bool,
}

/// How the vocabulary is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VocabularyKind {
    /// tokenizer.model, else tokenizer.json of SentencePiece form, else byte-level.
    Llama,
    /// tokenizer.model, else byte-level.
    SentencePieceOrByteLevel,
    /// tokenizer.model.
    SentencePiece,
    /// tokenizer.model with InternLM2's rules.
    InternLm2,
    /// Byte-level.
    ByteLevel,
    /// SentencePiece without the space before a text.
    Gemma {
        /// Ids of infill tokens, which no file names.
        infill: &'static [(&'static str, u32)],
    },
    /// Byte-level, with ends of texts and turns from other fields than usual.
    Hunyuan,
    /// Gemma 4's merges over characters, with scores of 0 beside them.
    Gemma4,
    /// Phi-3's: SentencePiece with its own rules of token types, or byte-level for Phi-4.
    Phi3,
}

/// A token that a class knows by its text.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoleToken {
    /// Such as `eos`.
    pub role: &'static str,
    pub token: &'static str,
    /// It counts before what the files say, where it is there; otherwise it counts where they say nothing.
    pub replaces: bool,
}

/// Settings of `config.json` that GGUF has no key for. What llama.cpp computes stands in the table of the forward pass;
/// a model that was trained otherwise is converted with a warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    /// `query_pre_attn_scalar`, which scales attention scores.
    QueryScalar,
    /// `use_sliding_window`.
    SlidingWindow,
    /// `no_rope_layers`, or `no_rope_layer_interval`: layers without rotary embedding.
    RopeLayers,
    /// `norm_topk_prob`: the weights of the chosen experts are scaled to sum to one.
    NormalizedExperts,
    /// `layer_types`: every so many layers see everything, the others have a window.
    FullEvery(u64),
    /// A field that llama.cpp takes to have this value, written as JSON.
    Fixed(&'static str, &'static str),
}

/// How names of a folder become those of transformers' plain text model: the name and the number of layers.
pub(super) type PlainName = fn(String, u64) -> String;

/// One architecture, or a class of it whose folders differ from the others'.
#[derive(Debug)]
pub(super) struct Row {
    /// What the forward pass knows of it; `general.architecture` above all.
    pub arch: &'static Architecture,
    /// Class names in `architectures`.
    pub classes: &'static [&'static str],
    /// Fields of `config.json` that go by other names: the usual name, and theirs.
    pub aliases: &'static [(&'static str, &'static str)],
    /// What transformers fills in.
    pub defaults: fn() -> Vec<(&'static str, Value)>,
    /// transformers derives `head_dim` where it is missing.
    pub derives_head_dim: bool,
    /// What follows from the configuration for the sizes of blocks.
    pub layout: &'static [Layout],
    /// Names of tensors.
    pub names: PlainName,
    /// Beginnings of names of tensors that llama.cpp has no place for, of blocks that predict further tokens.
    pub left_out: &'static [&'static str],
    /// Tensors besides embedding, last norm and output matrix that belong to no layer.
    pub ends: &'static [Group],
    /// Tensors of a layer, besides experts.
    pub layer: &'static [Group],
    /// Experts, if any.
    pub experts: Option<ExpertNames>,
    /// Norms are stored minus one.
    pub shifted_norms: bool,
    /// Embedding and output matrix may have rows behind the vocabulary, which the reference cuts off.
    pub spare_rows: bool,
    pub vocabulary: VocabularyKind,
    /// Tokens with a role that no file gives them.
    pub special: &'static [RoleToken],
    /// Hyperparameters.
    pub keys: &'static [Key],
    /// How many pairs rotate by each position, where the configuration does not say.
    pub default_sections: &'static [f32],
    /// Settings that its configurations have.
    pub settings: &'static [Setting],
    /// llama.cpp applies the second-level scales of NVFP4 in its feed-forward network as well as in attention.
    pub feed_forward_scales: bool,
}

impl Row {
    /// The class has models without experts, too.
    pub(super) fn may_be_dense(&self) -> bool {
        self.roles().any(|role| role.target == "ffn_up")
    }

    /// The row of a class name.
    pub(super) fn by_class(class: &str) -> Option<&'static Row> {
        ROWS.iter().find(|row| row.classes.contains(&class))
    }

    /// All tensors that a layer can have besides experts.
    pub(super) fn roles(&self) -> impl Iterator<Item = &'static Role> {
        self.layer.iter().flat_map(|group| group.roles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AttentionGate, DenseLayers, QkNorm, SharedExpert, Sinks};

    #[test]
    fn a_class_has_one_row() {
        let mut classes: Vec<&str> = ROWS.iter().flat_map(|row| row.classes).copied().collect();
        let count = classes.len();
        classes.sort_unstable();
        classes.dedup();
        assert_eq!(classes.len(), count);
    }

    /// Both tables say which tensors a layer has: this one where they come from, the other what they are for.
    #[test]
    fn tensors_are_those_of_the_forward_pass() {
        for row in ROWS {
            let Row { arch, classes, .. } = row;
            let has = |target: &str| row.roles().any(|role| role.target == target);
            for norm in ["attn_q_norm", "attn_k_norm"] {
                let weighted = !matches!(arch.attention.qk_norm, QkNorm::None | QkNorm::Unweighted);
                assert_eq!(has(norm), weighted, "{classes:?} {norm}");
            }
            for norm in ["post_attention_norm", "post_ffw_norm"] {
                assert_eq!(has(norm), arch.norms.after || arch.norms.feed_forward == norm, "{classes:?} {norm}");
            }
            assert_eq!(has("attn_norm"), arch.norms.before, "{classes:?}");
            assert!(!arch.norms.before || has(arch.norms.feed_forward), "{classes:?}");
            let feed_forward = arch.feed_forward;
            let dense = row.experts.is_none();
            let some_dense = feed_forward.dense_layers != DenseLayers::None || feed_forward.beside_dense;
            assert_eq!(has("ffn_up"), dense || some_dense, "{classes:?}");
            assert_eq!(has("ffn_gate"), (dense || some_dense) && !feed_forward.fused_gate_up, "{classes:?}");
            assert_eq!(has("ffn_gate_inp"), !dense, "{classes:?}");
            assert_eq!(has("ffn_gate_inp_shexp"), feed_forward.shared == SharedExpert::Gated, "{classes:?}");
            let shared = !dense && feed_forward.shared != SharedExpert::None;
            assert_eq!(has("ffn_up_shexp"), shared, "{classes:?}");
            assert_eq!(has("exp_probs_b"), !dense && feed_forward.selection_bias, "{classes:?}");
            assert_eq!(has("attn_sinks"), arch.attention.sinks != Sinks::None, "{classes:?}");
            let gate = matches!(arch.attention.gate, AttentionGate::Values | AttentionGate::Heads);
            assert_eq!(has("attn_gate"), gate || arch.delta_net.is_some(), "{classes:?}");
            assert_eq!(has("ssm_out"), arch.delta_net.is_some(), "{classes:?}");
            assert!(arch.next_tokens || !has("nextn.eh_proj"), "{classes:?}");
            assert_eq!(has("inp_gate"), arch.layer_inputs, "{classes:?}");
            assert!(dense || feed_forward.mixture.gating().is_some(), "{classes:?}");
        }
    }
}
