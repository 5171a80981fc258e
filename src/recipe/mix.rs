//! The mixes: which role gets another type than the target's base type, and where.
//!
//! Each role has a table; the first row whose targets and conditions all hold decides, and a tensor for which no row
//! holds gets the base type. The tables state what llama.cpp b10605 does (`llama_tensor_get_type_impl`).
//!
//! Wherever a rule speaks of a layer, `i` is the layer's number and `n` the count of layers; fractions of `n` are
//! rounded down. Value tensors are counted as they come, whatever their block; feed-forward tensors as they come in
//! dense models and by block number in models with experts.

use std::fmt;

use super::facts::ModelFacts;
use super::roles::Role;
use super::target::Target::{self, *};
use super::{Options, RecipeError};
use crate::gguf::TensorType;

/// A condition of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// The architecture is Falcon (or is not).
    Falcon(bool),
    /// Four or more query heads share a key-value head, so that key and value tensors are small.
    GroupedBy4,
    /// The model has exactly eight experts.
    EightExperts,
    /// The model has four experts or more.
    FourExperts,
    /// Importance data is at hand (or is not).
    Imatrix(bool),
    /// The base type's block does not divide the row.
    OddRow,
    /// Several matrices in one tensor, as a rule one for each expert.
    Stacked,
    /// The architecture is not BailingMoe3, whose latent attention has stacks that are not of experts.
    NotBailingMoe3,
    /// The tensor belongs to a feed-forward block.
    FeedForward,
    /// i < this many.
    First(i64),
    /// i < n / this.
    FirstPart(i64),
    /// n/8 ≤ i < 7n/8.
    Middle,
    /// The first and last eighth of the layers and every third between.
    MoreBits,
}

use When::*;

/// One row of a table.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Targets that the row is for; none means all.
    targets: &'static [Target],
    /// All of these must hold.
    when: &'static [When],
    /// The type to use, `None` for the base type.
    ty: Option<TensorType>,
}

macro_rules! rules {
    ($([$($target:ident),*] if [$($when:expr),*] => $ty:ident;)*) => {
        &[$(Rule { targets: &[$($target),*], when: &[$($when),*], ty: rules!(@type $ty) },)*]
    };
    (@type BASE) => { None };
    (@type $ty:ident) => { Some(TensorType::$ty) };
}

/// `output.weight`, and the token embedding of models without one.
const OUTPUT: &[Rule] = rules! {
    [MXFP4_MOE] if [] => Q8_0;
    [] if [Falcon(true)] => Q8_0;
    [] if [OddRow] => Q8_0;
    [IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, IQ3_XXS] if [] => Q5_K;
    [Q8_0] if [] => Q8_0;
    [] if [] => Q6_K;
};

/// The token embedding beside an `output.weight`.
const TOKEN_EMBD: &[Rule] = rules! {
    [IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS] if [] => Q2_K;
    [IQ2_S, IQ2_M, IQ3_XXS] if [] => IQ3_S;
    [TQ1_0, TQ2_0, Q2_0] if [] => Q4_K;
};

/// Everything else under MXFP4_MOE: expert stacks in four bits, the rest in eight.
const MXFP4_EXPERTS: &[Rule] = rules! {
    [] if [Stacked, NotBailingMoe3] => MXFP4;
    [] if [Stacked, FeedForward] => MXFP4;
    [] if [] => Q8_0;
};

/// Targets of about one and two bits, which have tables of their own for the next four roles.
const LOW_BIT: &[Target] = &[IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M];

const LOW_BIT_VALUE: &[Rule] = rules! {
    [] if [GroupedBy4] => Q4_K;
    [] if [FourExperts] => Q4_K;
    [IQ2_S, IQ2_M] if [] => IQ3_S;
    [] if [] => Q2_K;
};

const LOW_BIT_KEY: &[Rule] = rules! {
    [] if [EightExperts] => Q4_K;
};

const LOW_BIT_FFN_DOWN: &[Rule] = rules! {
    [IQ2_S, IQ2_M] if [FirstPart(8)] => IQ3_S;
    [] if [FirstPart(8)] => Q2_K;
};

const LOW_BIT_ATTN_OUTPUT: &[Rule] = rules! {
    [] if [EightExperts] => Q5_K;
    [IQ1_S, IQ1_M] if [] => IQ2_XXS;
    [IQ2_S, IQ2_M] if [] => IQ3_S;
};

/// Attention values, alone or fused with queries and keys, or up-projected from a latent.
const VALUE: &[Rule] = rules! {
    // With eight experts these tensors are so small beside the rest that eight bits cost next to nothing.
    [] if [EightExperts] => Q8_0;
    [Q2_K, Q2_K_S, IQ3_XXS, IQ3_XS, IQ3_S] if [GroupedBy4] => Q4_K;
    [Q2_K] if [] => Q3_K;
    [IQ3_XXS] if [Imatrix(false)] => IQ3_S;
    [IQ3_M] if [] => Q4_K;
    [Q3_K_M] if [First(2)] => Q5_K;
    [Q3_K_M] if [] => Q4_K;
    [Q3_K_L] if [] => Q5_K;
    [IQ4_NL, IQ4_XS] if [GroupedBy4] => Q5_K;
    [Q4_K_M, Q5_K_M] if [MoreBits] => Q6_K;
    [Q4_K_S] if [First(4)] => Q5_K;
};

const KEY: &[Rule] = rules! {
    [] if [EightExperts] => Q8_0;
    [IQ3_XS] if [] => IQ3_XXS;
    [IQ3_XXS] if [] => IQ2_S;
};

const QUERY: &[Rule] = rules! {
    [IQ3_XS] if [] => IQ3_XXS;
    [IQ3_XXS] if [] => IQ2_S;
};

const ATTN_OUTPUT: &[Rule] = rules! {
    [Q3_K_L] if [Falcon(true)] => Q4_K;
    [] if [Falcon(true)] => BASE;
    [Q2_K, IQ3_XXS, IQ3_XS, IQ3_S, IQ3_M, Q3_K_S, Q3_K_M, Q4_K_S, Q4_K_M, IQ4_NL, IQ4_XS] if [EightExperts] => Q5_K;
    [] if [EightExperts] => BASE;
    [Q2_K] if [] => Q3_K;
    [IQ3_XXS] if [] => IQ3_S;
    [Q3_K_M, IQ3_M] if [] => Q4_K;
    [Q3_K_L] if [] => Q5_K;
};

const FFN_DOWN: &[Rule] = rules! {
    [Q2_K] if [] => Q3_K;
    [Q2_K_S] if [FirstPart(8)] => Q4_K;
    [IQ3_XXS] if [Imatrix(false), FirstPart(8)] => Q4_K;
    [IQ3_XXS] if [Imatrix(false)] => Q3_K;
    [IQ3_M] if [FirstPart(8)] => Q4_K;
    [IQ3_M] if [EightExperts, MoreBits] => Q4_K;
    [Q3_K_M] if [FirstPart(16)] => Q5_K;
    [Q3_K_M] if [Falcon(false)] => Q4_K;
    [Q3_K_M] if [MoreBits] => Q4_K;
    [Q3_K_L] if [Falcon(true)] => Q4_K;
    [Q3_K_L] if [] => Q5_K;
    [Q4_K_S] if [Falcon(false), FirstPart(8)] => Q5_K;
    [Q4_K_M] if [Falcon(true), FirstPart(16)] => Q6_K;
    [Q4_K_M] if [Falcon(true), MoreBits] => Q5_K;
    [Q4_K_M] if [Falcon(false), MoreBits] => Q6_K;
    [Q5_K_M] if [MoreBits] => Q6_K;
    [IQ4_NL, IQ4_XS] if [Imatrix(false), FirstPart(8)] => Q5_K;
    // Importance weights can make these two go astray in the first layers; a minimum per block guards against it.
    [Q4_0] if [Imatrix(true), FirstPart(8)] => Q4_1;
    [Q5_0] if [Imatrix(true), FirstPart(8)] => Q5_1;
};

const FFN_GATE_UP: &[Rule] = rules! {
    [IQ3_XS] if [Middle] => IQ3_XXS;
};

/// The table for a role under a target.
fn table(target: Target, role: Role, tied: bool) -> &'static [Rule] {
    let low_bit = LOW_BIT.contains(&target);
    match role {
        Role::Output => OUTPUT,
        Role::TokenEmbd if tied => OUTPUT,
        _ if target == MXFP4_MOE => MXFP4_EXPERTS,
        Role::TokenEmbd => TOKEN_EMBD,
        Role::AttnV | Role::AttnQkv | Role::AttnKvB if low_bit => LOW_BIT_VALUE,
        Role::AttnK if low_bit => LOW_BIT_KEY,
        Role::FfnDown if low_bit => LOW_BIT_FFN_DOWN,
        Role::AttnOutput if low_bit => LOW_BIT_ATTN_OUTPUT,
        Role::AttnV | Role::AttnQkv | Role::AttnKvB => VALUE,
        Role::AttnK => KEY,
        Role::AttnQ => QUERY,
        Role::AttnOutput => ATTN_OUTPUT,
        Role::FfnDown => FFN_DOWN,
        Role::FfnGate | Role::FfnUp => FFN_GATE_UP,
        Role::Other => &[],
    }
}

/// A layer's place: `index` among `count` layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The layer's number or running count, from 0.
    pub index: i64,
    /// Number of layers.
    pub count: i64,
}

/// Where a feed-forward tensor's place comes from under a target (value tensors are always counted).
pub(crate) fn places_by_block_number(target: Target, experts: u32) -> bool {
    experts > 1 && !LOW_BIT.contains(&target)
}

/// True if a rule for this role and target looks at the tensor's place among the layers.
pub(crate) fn uses_place(target: Target, role: Role) -> bool {
    table(target, role, false)
        .iter()
        .any(|rule| rule.is_for(target) && rule.when.iter().any(|when| when.looks_at() == Looks::Place))
}

/// What a rule is applied to.
pub(crate) struct Situation<'a> {
    /// The model.
    pub facts: &'a ModelFacts,
    /// Target and imatrix presence.
    pub options: &'a Options,
    /// The tensor's role.
    pub role: Role,
    /// True if the token embedding is the output tensor too.
    pub tied: bool,
    /// The tensor's shape, row length first.
    pub shape: &'a [u64],
    /// The tensor's place, or why it cannot be told; looked at only by conditions on it, none unless [`uses_place`].
    pub place: Result<Place, RecipeError>,
}

/// What the mix says of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The type.
    pub ty: TensorType,
    /// The rule that gave it, `None` where the base type stands.
    pub rule: Option<&'static Rule>,
    /// True if the type was raised because the model is of the 70B class.
    pub raised_for_70b: bool,
}

/// Applies the mix of the target to one tensor.
///
/// # Errors
/// A rule needs a fact that the metadata lacks or states wrongly.
pub(crate) fn apply(situation: &Situation) -> Result<Verdict, RecipeError> {
    let target = situation.options.target;
    let mut verdict = Verdict { ty: target.base(), rule: None, raised_for_70b: false };
    'rules: for rule in table(target, situation.role, situation.tied) {
        if !rule.is_for(target) {
            continue;
        }
        for when in rule.when {
            if !situation.holds(*when)? {
                continue 'rules;
            }
        }
        verdict.ty = rule.ty.unwrap_or(verdict.ty);
        verdict.rule = rule.ty.is_some().then_some(rule);
        break;
    }
    // In 70B models eight heads share a value tensor, which makes it small: a bit more costs nearly nothing.
    let raisable = matches!(verdict.ty, TensorType::Q3_K | TensorType::Q4_K);
    if situation.role.is_value() && raisable && has_70b_rule(target) && situation.facts.is_70b()? {
        verdict.ty = TensorType::Q5_K;
        verdict.raised_for_70b = true;
    }
    Ok(verdict)
}

fn has_70b_rule(target: Target) -> bool {
    target != MXFP4_MOE && !LOW_BIT.contains(&target)
}

impl Rule {
    fn is_for(&self, target: Target) -> bool {
        self.targets.is_empty() || self.targets.contains(&target)
    }
}

/// Whether a condition depends on the tensor's place among the layers.
#[derive(PartialEq, Eq)]
enum Looks {
    Place,
    Elsewhere,
}

impl When {
    fn looks_at(self) -> Looks {
        match self {
            First(_) | FirstPart(_) | Middle | MoreBits => Looks::Place,
            _ => Looks::Elsewhere,
        }
    }
}

impl Situation<'_> {
    fn holds(&self, when: When) -> Result<bool, RecipeError> {
        let architecture_is = |name| self.facts.architecture() == Some(name);
        if when.looks_at() == Looks::Place {
            return Ok(self.place.clone()?.satisfies(when));
        }
        Ok(match when {
            Falcon(expected) => architecture_is("falcon") == expected,
            NotBailingMoe3 => !architecture_is("bailingmoe3"),
            GroupedBy4 => self.facts.heads_per_kv_head()? >= 4,
            EightExperts => self.facts.experts()? == 8,
            FourExperts => self.facts.experts()? >= 4,
            Imatrix(expected) => self.options.has_imatrix == expected,
            OddRow => {
                let block = self.options.target.base().info().map_or(1, |info| info.block_len as u64);
                !self.shape.first().is_none_or(|row_len| row_len.is_multiple_of(block))
            }
            Stacked => self.shape.get(2).is_some_and(|&matrices| matrices > 1),
            FeedForward => self.role.is_ffn(),
            First(_) | FirstPart(_) | Middle | MoreBits => false,
        })
    }
}

impl Place {
    /// Whether a condition on the place holds; true for conditions on other things.
    fn satisfies(self, when: When) -> bool {
        let Place { index: i, count: n } = self;
        match when {
            First(layers) => i < layers,
            FirstPart(part) => i < n / part,
            Middle => i >= n / 8 && i < 7 * n / 8,
            MoreBits => i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2,
            _ => true,
        }
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Falcon(true) => f.write_str("Falcon"),
            Falcon(false) => f.write_str("not Falcon"),
            GroupedBy4 => f.write_str("4 or more heads per KV head"),
            EightExperts => f.write_str("8 experts"),
            FourExperts => f.write_str("4 or more experts"),
            Imatrix(true) => f.write_str("with imatrix"),
            Imatrix(false) => f.write_str("without imatrix"),
            OddRow => f.write_str("odd row length"),
            Stacked => f.write_str("stack of matrices"),
            NotBailingMoe3 => f.write_str("not BailingMoe3"),
            FeedForward => f.write_str("feed-forward"),
            First(layers) => write!(f, "first {layers} layers"),
            FirstPart(part) => write!(f, "first 1/{part} of layers"),
            Middle => f.write_str("middle layers"),
            MoreBits => f.write_str("layer with more bits"),
        }
    }
}

/// The conditions, comma separated; negative ones are left out, as they would not help a reader.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let telling = |when: &&When| !matches!(when, Falcon(false) | NotBailingMoe3);
        for (at, when) in self.when.iter().filter(telling).enumerate() {
            write!(f, "{}{when}", if at == 0 { ": " } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::TARGETS;

    const ROLES: [Role; 12] = [
        Role::Output,
        Role::TokenEmbd,
        Role::AttnQkv,
        Role::AttnKvB,
        Role::AttnV,
        Role::AttnK,
        Role::AttnQ,
        Role::AttnOutput,
        Role::FfnUp,
        Role::FfnGate,
        Role::FfnDown,
        Role::Other,
    ];

    #[test]
    fn every_row_can_be_reached_by_a_target() {
        for target in TARGETS.iter().filter(|row| !row.target.is_plain()) {
            for role in ROLES {
                for tied in [false, true] {
                    let rows = table(target.target, role, tied);
                    let last = rows.iter().position(|rule| rule.is_for(target.target) && rule.when.is_empty());
                    let dead = last.is_some_and(|at| rows[at + 1..].iter().any(|rule| rule.targets == [target.target]));
                    assert!(!dead, "{} {role}: a row stands behind one that always holds", target.name);
                }
            }
        }
    }

    #[test]
    fn more_bits_covers_both_ends_and_every_third_layer() {
        let chosen: Vec<i64> = (0..32).filter(|&index| Place { index, count: 32 }.satisfies(MoreBits)).collect();
        assert_eq!(chosen, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
    }

    #[test]
    fn rules_describe_their_conditions() {
        let rule = FFN_DOWN.iter().find(|rule| rule.targets == [Q4_0]).unwrap();
        assert_eq!(rule.to_string(), ": with imatrix, first 1/8 of layers");
    }
}
