//! From facts, tensors and options to a type for each tensor.

use std::fmt;

use super::error::{Note, RecipeError};
use super::facts::ModelFacts;
use super::fallback;
use super::mix::{self, Place, Situation, Verdict};
use super::overrides::TypeOverride;
use super::roles::{self, Keep, Role};
use super::target::Target;
use crate::gguf::{TensorInfo, TensorType};

/// A tensor as far as its recipe goes.
#[derive(Clone, Copy, Debug)]
pub struct TensorDesc<'a> {
    /// Its name in the output (after pruning).
    pub name: &'a str,
    /// Its shape in ggml's order: row length first.
    pub shape: &'a [u64],
    /// Its type in the source.
    pub ty: TensorType,
}

impl<'a> From<&'a TensorInfo> for TensorDesc<'a> {
    fn from(tensor: &'a TensorInfo) -> TensorDesc<'a> {
        TensorDesc { name: &tensor.name, shape: &tensor.shape, ty: tensor.ty }
    }
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The target.
    pub target: Target,
    /// True if importance data is given; some mixes depend on it.
    pub has_imatrix: bool,
    /// One type for all tensors instead of a mix; types given by hand still apply.
    pub pure: bool,
    /// Keep `output.weight` as it is.
    pub leave_output_tensor: bool,
    /// Type of `output.weight`, and of the token embedding where the model has no `output.weight`.
    pub output_tensor_type: Option<TensorType>,
    /// Type of `token_embd.weight` and `per_layer_token_embd.weight`.
    pub token_embedding_type: Option<TensorType>,
    /// Types by pattern; the first that matches a name wins.
    pub tensor_types: Vec<TypeOverride>,
    /// False to refuse types that are not the intended one.
    pub allow_fallback: bool,
}

impl Options {
    /// Options that leave everything but the target at its default.
    pub fn new(target: Target) -> Options {
        Options {
            target,
            has_imatrix: false,
            pure: false,
            leave_output_tensor: false,
            output_tensor_type: None,
            token_embedding_type: None,
            tensor_types: Vec::new(),
            allow_fallback: true,
        }
    }
}

/// Why a tensor gets its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It keeps the type it has.
    Kept(Keep),
    /// `--output-tensor-type`.
    OutputTensorType,
    /// `--token-embedding-type`.
    TokenEmbeddingType,
    /// The pattern of a `--tensor-type`.
    Pattern(String),
    /// The target's base type: nothing says otherwise.
    Base,
    /// A rule of the target's mix, with the role that it is for.
    Mix(Role, Verdict),
    /// A plan made for this model.
    Plan,
    /// `--missing-importance`.
    MissingImportance,
    /// `--mtp-from`: it comes as it is from another file.
    MtpFrom,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Kept(keep) => write!(f, "kept ({keep})"),
            Reason::OutputTensorType => f.write_str("--output-tensor-type"),
            Reason::TokenEmbeddingType => f.write_str("--token-embedding-type"),
            Reason::Pattern(pattern) => write!(f, "--tensor-type {pattern}"),
            Reason::Base => f.write_str("base type"),
            Reason::Plan => f.write_str("plan"),
            Reason::MissingImportance => f.write_str("--missing-importance"),
            Reason::MtpFrom => f.write_str("--mtp-from"),
            Reason::Mix(role, verdict) => {
                write!(f, "{role}")?;
                if let Some(rule) = verdict.rule {
                    write!(f, "{rule}")?;
                }
                if verdict.raised_for_70b { f.write_str(", 70B class") } else { Ok(()) }
            }
        }
    }
}

/// The type chosen for one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The type to write.
    pub ty: TensorType,
    /// Where it comes from.
    pub reason: Reason,
    /// The intended type, where the row length does not permit it.
    pub fallback_from: Option<TensorType>,
    /// True if the conversion needs importance weights for this tensor to give a usable result.
    pub requires_imatrix: bool,
}

impl Choice {
    /// A type given by hand, or the one that takes its place where rows do not fit it.
    pub(crate) fn by_hand(ty: TensorType, tensor: &TensorInfo, reason: Reason) -> Choice {
        let fit = fallback::fit(ty, tensor.row_len(), tensor.ty);
        Choice { ty: fit.ty, reason, fallback_from: fit.from, requires_imatrix: false }
    }
}

/// What fallback types cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FallbackCost {
    /// Number of tensors with a fallback type.
    pub tensors: usize,
    /// Bytes that these tensors would take in their intended types, if rows could end within a block.
    pub wanted_bytes: u64,
    /// Bytes that they take.
    pub got_bytes: u64,
}

/// Types for all tensors of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// One choice for each tensor, in the order given.
    pub choices: Vec<Choice>,
    /// What fallback types cost.
    pub fallback_cost: FallbackCost,
    /// What the user should be told.
    pub notes: Vec<Note>,
}

/// Chooses a type for each tensor.
///
/// `tensors` must stand in the order in which they will be written ([`roles::output_order`], or the file order when
/// shards are kept): mixes count layers as they come.
///
/// # Errors
/// A rule needs a fact that the metadata lacks or states wrongly; a fallback is needed and not allowed.
pub fn choose_types(facts: &ModelFacts, tensors: &[TensorDesc], options: &Options) -> Result<Recipe, RecipeError> {
    let mut chooser = Chooser::new(facts, tensors, options)?;
    let choices = (0..tensors.len()).map(|at| chooser.choose(at)).collect::<Result<Vec<_>, _>>()?;
    let fallback_cost = chooser.fallback_cost(&choices)?;
    let notes = chooser.into_notes(&choices);
    Ok(Recipe { choices, fallback_cost, notes })
}

/// Tensors that share a note, with the first of them.
#[derive(Default)]
struct Tally {
    count: usize,
    first: String,
}

impl Tally {
    fn add(&mut self, name: &str) {
        if self.count == 0 {
            self.first = name.to_owned();
        }
        self.count += 1;
    }
}

/// Which pattern takes which tensor.
struct Matches {
    /// For each tensor the first pattern that matches its name.
    first_pattern: Vec<Option<usize>>,
    /// For each pattern whether any name matches.
    any_tensor: Vec<bool>,
}

impl Matches {
    fn new(tensors: &[TensorDesc], patterns: &[TypeOverride]) -> Result<Matches, RecipeError> {
        let mut first_pattern = vec![None; tensors.len()];
        let mut any_tensor = Vec::with_capacity(patterns.len());
        // Patterns in the outer loop: the automaton of one stays in cache while it runs over all names.
        for (at, pattern) in patterns.iter().enumerate() {
            let mut any = false;
            for (tensor, first) in tensors.iter().zip(&mut first_pattern) {
                // A pattern that is known to match something need not be tried on a tensor that is taken.
                if !(any && first.is_some()) && pattern.matches(tensor.name)? {
                    any = true;
                    first.get_or_insert(at);
                }
            }
            any_tensor.push(any);
        }
        Ok(Matches { first_pattern, any_tensor })
    }
}

/// State of the walk over the tensors.
struct Chooser<'a> {
    facts: &'a ModelFacts,
    options: &'a Options,
    tensors: &'a [TensorDesc<'a>],
    tied: bool,
    value_tensors: i64,
    seen: LayerCounts,
    matches: Matches,
    /// For each pattern whether it gave a tensor its type.
    applied: Vec<bool>,
    out_of_range: Tally,
    layered_by_hand: usize,
    overridden: usize,
    notes: Vec<Note>,
}

/// Tensors met so far of each role that mixes count.
#[derive(Default)]
struct LayerCounts {
    value: i64,
    ffn_up: i64,
    ffn_gate: i64,
    ffn_down: i64,
}

impl LayerCounts {
    /// The running count of the role, advanced by this tensor; `None` for roles without layers.
    fn advance(&mut self, role: Role) -> Option<i64> {
        let count = match role {
            role if role.is_value() => &mut self.value,
            Role::FfnUp => &mut self.ffn_up,
            Role::FfnGate => &mut self.ffn_gate,
            Role::FfnDown => &mut self.ffn_down,
            _ => return None,
        };
        *count += 1;
        Some(*count - 1)
    }
}

/// The type that a tensor should have if its rows permit.
struct Intent {
    ty: TensorType,
    reason: Reason,
    /// The option that names this very tensor: llama-quantize does not look at the row length then.
    by_tensor_option: Option<&'static str>,
}

impl Intent {
    fn new(ty: TensorType, reason: Reason) -> Intent {
        Intent { ty, reason, by_tensor_option: None }
    }
}

impl<'a> Chooser<'a> {
    fn new(
        facts: &'a ModelFacts,
        tensors: &'a [TensorDesc<'a>],
        options: &'a Options,
    ) -> Result<Chooser<'a>, RecipeError> {
        Ok(Chooser {
            facts,
            options,
            tensors,
            tied: !tensors.iter().any(|tensor| tensor.name == roles::OUTPUT_WEIGHT),
            value_tensors: tensors.iter().filter(|tensor| Role::of(tensor.name).is_value()).count() as i64,
            seen: LayerCounts::default(),
            matches: Matches::new(tensors, &options.tensor_types)?,
            applied: vec![false; options.tensor_types.len()],
            out_of_range: Tally::default(),
            layered_by_hand: 0,
            overridden: 0,
            notes: Vec::new(),
        })
    }

    fn choose(&mut self, at: usize) -> Result<Choice, RecipeError> {
        let tensor = &self.tensors[at];
        if let Some(keep) = self.keep(tensor) {
            return Ok(Choice {
                ty: tensor.ty,
                reason: Reason::Kept(keep),
                fallback_from: None,
                requires_imatrix: false,
            });
        }
        let intent = self.intent(tensor, self.matches.first_pattern[at])?;
        let row_len = tensor.shape.first().copied().unwrap_or(1);
        let fit = fallback::fit(intent.ty, row_len, tensor.ty);
        match (fit.from, intent.by_tensor_option) {
            (Some(from), Some(option)) => {
                let (tensor, to) = (tensor.name.to_owned(), fit.ty);
                self.notes.push(Note::OptionTypeDoesNotFit { option, tensor, row_len, from, to });
            }
            (Some(from), None) if fit.beyond_reference => self.note_new_fallback(tensor, from, fit.ty, row_len),
            _ => {}
        }
        Ok(Choice {
            ty: fit.ty,
            requires_imatrix: fit.ty != tensor.ty && requires_imatrix(tensor.name, fit.ty, self.options.target),
            reason: intent.reason,
            fallback_from: fit.from,
        })
    }

    fn keep(&mut self, tensor: &TensorDesc) -> Option<Keep> {
        if self.options.target == Target::COPY {
            return Some(Keep::Copy);
        }
        if let Some(keep) = roles::exemption(tensor.name, tensor.shape) {
            return Some(keep);
        }
        if self.options.leave_output_tensor && tensor.name == roles::OUTPUT_WEIGHT {
            return Some(Keep::LeaveOutput);
        }
        if roles::is_unconvertible(tensor.ty) {
            if tensor.ty.info().is_none() {
                return Some(Keep::SourceType);
            }
            self.notes.push(Note::SourceTypeKept { tensor: tensor.name.to_owned(), ty: tensor.ty });
            return Some(Keep::SourceType);
        }
        None
    }

    /// The type that the tensor should have if its rows permit.
    fn intent(&mut self, tensor: &TensorDesc, pattern: Option<usize>) -> Result<Intent, RecipeError> {
        let options = self.options;
        let role = Role::of(tensor.name);
        if let (Role::TokenEmbd, Some(ty)) = (role, options.token_embedding_type) {
            let by_tensor_option = Some(TOKEN_EMBEDDING_TYPE);
            return Ok(Intent { ty, reason: Reason::TokenEmbeddingType, by_tensor_option });
        }
        if let (Role::Output, Some(ty)) = (role, options.output_tensor_type) {
            let by_tensor_option = Some(OUTPUT_TENSOR_TYPE);
            return Ok(Intent { ty, reason: Reason::OutputTensorType, by_tensor_option });
        }
        let count = self.seen.advance(role);
        if let Some(at) = pattern {
            let rule = &options.tensor_types[at];
            self.applied[at] = true;
            self.overridden += 1;
            self.layered_by_hand += usize::from(count.is_some());
            return Ok(Intent::new(rule.ty, Reason::Pattern(rule.pattern.clone())));
        }
        // An adapter is no stack of layers that a mix could tell apart.
        if options.pure || options.target.is_plain() || roles::adapted_name(tensor.name).is_some() {
            return Ok(Intent::new(options.target.base(), Reason::Base));
        }
        if let (Role::TokenEmbd, true, Some(ty)) = (role, self.tied, options.output_tensor_type) {
            return Ok(Intent::new(ty, Reason::OutputTensorType));
        }
        let place = match count {
            Some(count) if mix::uses_place(options.target, role) => self.place(tensor, role, count),
            _ => Ok(Place { index: 0, count: 0 }),
        };
        let situation = Situation { facts: self.facts, options, role, tied: self.tied, shape: tensor.shape, place };
        let verdict = mix::apply(&situation)?;
        let by_rule = verdict.rule.is_some() || verdict.raised_for_70b;
        let reason = if by_rule { Reason::Mix(role, verdict) } else { Reason::Base };
        Ok(Intent::new(verdict.ty, reason))
    }

    /// The tensor's place among the layers.
    fn place(&mut self, tensor: &TensorDesc, role: Role, count: i64) -> Result<Place, RecipeError> {
        if role.is_value() {
            return Ok(Place { index: count, count: self.value_tensors });
        }
        let blocks = i64::from(self.facts.blocks()?);
        if !mix::places_by_block_number(self.options.target, self.facts.experts()?) {
            return Ok(Place { index: count, count: blocks });
        }
        let index = roles::block_number(tensor.name).map_or(-1, i64::from);
        if index < 0 || index >= blocks {
            self.out_of_range.add(tensor.name);
        }
        Ok(Place { index: index.clamp(0, (blocks - 1).max(0)), count: blocks })
    }

    fn note_new_fallback(&mut self, tensor: &TensorDesc, from: TensorType, ty: TensorType, row_len: u64) {
        let known = self.notes.iter_mut().find_map(|note| match note {
            Note::FallbackBeyondReference { tensors, from: known, to, row_len: length, .. } => {
                (*known == from && *to == ty && *length == row_len).then_some(tensors)
            }
            _ => None,
        });
        match known {
            Some(tensors) => *tensors += 1,
            None => self.notes.push(Note::FallbackBeyondReference {
                tensors: 1,
                tensor: tensor.name.to_owned(),
                row_len,
                from,
                to: ty,
            }),
        }
    }

    /// Adds up what fallbacks cost, or refuses them.
    fn fallback_cost(&self, choices: &[Choice]) -> Result<FallbackCost, RecipeError> {
        let mut cost = FallbackCost::default();
        let mut first = None;
        for (tensor, choice) in self.tensors.iter().zip(choices) {
            let Some(from) = choice.fallback_from else { continue };
            first = first.or(Some((tensor, from, choice.ty)));
            cost.tensors += 1;
            cost.wanted_bytes = cost.wanted_bytes.saturating_add(unrounded_bytes(from, tensor.shape));
            cost.got_bytes = cost.got_bytes.saturating_add(unrounded_bytes(choice.ty, tensor.shape));
        }
        match first {
            Some((tensor, intended, fallback)) if !self.options.allow_fallback => Err(RecipeError::FallbackRefused {
                count: cost.tensors,
                tensor: tensor.name.to_owned(),
                row_len: tensor.shape.first().copied().unwrap_or(1),
                intended,
                fallback,
                extra_bytes: cost.got_bytes.saturating_sub(cost.wanted_bytes),
            }),
            _ => Ok(cost),
        }
    }

    fn into_notes(mut self, choices: &[Choice]) -> Vec<Note> {
        self.note_patterns(choices);
        self.note_options(choices);
        if self.out_of_range.count > 0 {
            let Tally { count: tensors, first: tensor } = self.out_of_range;
            self.notes.push(Note::BlockOutOfRange { tensors, tensor, blocks: self.facts.blocks().unwrap_or(0) });
        }
        let target = self.options.target;
        if target.is_plain() && self.overridden > 0 {
            self.notes.push(Note::OverridesOnPlainTarget { target, tensors: self.overridden });
        }
        let mixed = choices.iter().any(|choice| matches!(choice.reason, Reason::Mix(..)));
        if mixed && self.layered_by_hand > 0 {
            self.notes.push(Note::MixNotShifted { tensors: self.layered_by_hand });
        }
        self.notes
    }

    fn note_patterns(&mut self, choices: &[Choice]) {
        if self.options.target == Target::COPY {
            return;
        }
        for (at, rule) in self.options.tensor_types.iter().enumerate() {
            if self.applied[at] {
                continue;
            }
            let pattern = rule.pattern.clone();
            if !self.matches.any_tensor[at] {
                self.notes.push(Note::PatternMatchesNothing { pattern });
                continue;
            }
            let mut matching =
                self.tensors.iter().zip(choices).filter(|(tensor, _)| rule.matches(tensor.name) == Ok(true));
            let all_kept = matching.clone().all(|(_, choice)| matches!(choice.reason, Reason::Kept(_)));
            self.notes.push(match matching.next().filter(|_| all_kept) {
                Some((tensor, _)) => Note::PatternOnlyExempt { pattern, tensor: tensor.name.to_owned() },
                None => Note::PatternWithoutEffect { pattern },
            });
        }
    }

    fn note_options(&mut self, choices: &[Choice]) {
        let options = self.options;
        let output = options.output_tensor_type.map(|_| (OUTPUT_TENSOR_TYPE, Reason::OutputTensorType));
        let embedding = options.token_embedding_type.map(|_| (TOKEN_EMBEDDING_TYPE, Reason::TokenEmbeddingType));
        if options.target == Target::COPY {
            let leave = options.leave_output_tensor.then_some("--leave-output-tensor");
            let patterns = (!options.tensor_types.is_empty()).then_some("--tensor-type");
            let pure = options.pure.then_some("--pure");
            let given = [output.map(|option| option.0), embedding.map(|option| option.0), patterns, leave, pure];
            self.notes.extend(given.into_iter().flatten().map(|option| Note::IgnoredByCopy { option }));
            return;
        }
        for (option, reason) in [output, embedding].into_iter().flatten() {
            if choices.iter().any(|choice| choice.reason == reason) {
                continue;
            }
            let problem = match (&reason, options.leave_output_tensor && !self.tied) {
                (Reason::OutputTensorType, true) => "--leave-output-tensor keeps output.weight as it is",
                (Reason::OutputTensorType, false) if self.tied => {
                    "the model has no output.weight (its token embedding serves as output, see --token-embedding-type)"
                }
                (Reason::OutputTensorType, false) => "output.weight is not quantized",
                _ => "the model has no token embedding that is quantized",
            };
            self.notes.push(Note::OptionWithoutTensor { option, problem: problem.to_owned() });
        }
        if options.leave_output_tensor && self.tied {
            let problem = "the model has no output.weight".to_owned();
            self.notes.push(Note::OptionWithoutTensor { option: "--leave-output-tensor", problem });
        }
    }
}

const OUTPUT_TENSOR_TYPE: &str = "--output-tensor-type";
const TOKEN_EMBEDDING_TYPE: &str = "--token-embedding-type";

/// True if a tensor of this type is of no use without importance weights (`tensor_requires_imatrix`).
pub fn requires_imatrix(name: &str, ty: TensorType, target: Target) -> bool {
    if roles::is_embedding_or_output(name) {
        return false;
    }
    match ty {
        TensorType::IQ1_S
        | TensorType::IQ1_M
        | TensorType::IQ2_XXS
        | TensorType::IQ2_XS
        | TensorType::IQ2_S
        | TensorType::IQ3_XXS => true,
        TensorType::Q2_K => target == Target::Q2_K_S,
        _ => false,
    }
}

/// Bytes of a tensor of this shape, as if rows could end within a block; rounded up, saturating.
fn unrounded_bytes(ty: TensorType, shape: &[u64]) -> u64 {
    let Some(info) = ty.info() else { return 0 };
    let elements = shape.iter().fold(1_u128, |product, &length| product.saturating_mul(u128::from(length)));
    let bytes = elements.saturating_mul(info.block_bytes as u128).div_ceil(info.block_len as u128);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::MetaValue;

    const F16: TensorType = TensorType::F16;

    /// Metadata of a model with 32 blocks and grouped heads, keys added or replaced by `entries`.
    fn facts(arch: &str, entries: &[(&str, u64)]) -> ModelFacts {
        let base = [("block_count", 32), ("attention.head_count", 32), ("attention.head_count_kv", 8)];
        ModelFacts::from_lookup(|key| {
            if key == "general.architecture" {
                return MetaValue::Text(arch.to_owned());
            }
            let key = key.strip_prefix(arch).and_then(|rest| rest.strip_prefix('.')).unwrap();
            let found = entries.iter().chain(&base).find(|entry| entry.0 == key);
            found.map_or(MetaValue::Absent, |entry| MetaValue::Unsigned(entry.1))
        })
    }

    /// Names and shapes of a dense model with an output tensor, in output order.
    fn dense(blocks: u32, row_len: u64) -> Vec<(String, Vec<u64>)> {
        let mut tensors = vec![
            ("output.weight".to_owned(), vec![row_len, 1000]),
            ("output_norm.weight".to_owned(), vec![row_len]),
            ("token_embd.weight".to_owned(), vec![row_len, 1000]),
        ];
        for block in 0..blocks {
            for role in ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"] {
                tensors.push((format!("blk.{block}.{role}.weight"), vec![row_len, row_len]));
            }
        }
        tensors
    }

    fn run(facts: &ModelFacts, tensors: &[(String, Vec<u64>)], options: &Options) -> Result<Recipe, RecipeError> {
        let descriptions: Vec<_> = tensors.iter().map(|(name, shape)| TensorDesc { name, shape, ty: F16 }).collect();
        choose_types(facts, &descriptions, options)
    }

    fn types_of(tensors: &[(String, Vec<u64>)], recipe: &Recipe, part: &str) -> Vec<TensorType> {
        let matching = tensors.iter().zip(&recipe.choices).filter(|((name, _), _)| name.contains(part));
        matching.map(|(_, choice)| choice.ty).collect()
    }

    fn with_types(target: Target, types: &[&str]) -> Options {
        let parse = |text: &&str| TypeOverride::parse(text, "--tensor-type").unwrap();
        Options { tensor_types: types.iter().map(parse).collect(), ..Options::new(target) }
    }

    #[test]
    fn a_type_by_hand_does_not_shift_the_mix_of_later_layers() {
        let (facts, tensors) = (facts("llama", &[]), dense(32, 256));
        let plain = run(&facts, &tensors, &Options::new(Target::Q4_K_M)).unwrap();
        let by_hand = run(&facts, &tensors, &with_types(Target::Q4_K_M, &[r"blk\.[0-4]\.(attn_v|ffn_down)=q8_0"]));
        let by_hand = by_hand.unwrap();
        for part in ["attn_v", "ffn_down"] {
            let (before, after) = (types_of(&tensors, &plain, part), types_of(&tensors, &by_hand, part));
            assert_eq!(after[..5], [TensorType::Q8_0; 5]);
            assert_eq!(after[5..], before[5..], "{part}");
        }
        assert_eq!(by_hand.notes, [Note::MixNotShifted { tensors: 10 }]);
    }

    #[test]
    fn the_first_pattern_wins_and_useless_ones_are_named() {
        let (facts, tensors) = (facts("llama", &[]), dense(2, 256));
        let types = ["attn_q=q8_0", r"blk\.1\.attn_q=q4_0", "attn_w=q4_0", "output_norm=f16", "token_embd=q4_0"];
        let mut options = with_types(Target::Q6_K, &types);
        options.token_embedding_type = Some(TensorType::Q8_0);
        let recipe = run(&facts, &tensors, &options).unwrap();
        assert_eq!(types_of(&tensors, &recipe, "attn_q"), [TensorType::Q8_0; 2]);
        assert_eq!(types_of(&tensors, &recipe, "token_embd"), [TensorType::Q8_0]);
        let exempt = "output_norm.weight".to_owned();
        assert_eq!(
            recipe.notes,
            [
                Note::PatternWithoutEffect { pattern: r"blk\.1\.attn_q".to_owned() },
                Note::PatternMatchesNothing { pattern: "attn_w".to_owned() },
                Note::PatternOnlyExempt { pattern: "output_norm".to_owned(), tensor: exempt },
                Note::PatternWithoutEffect { pattern: "token_embd".to_owned() },
            ]
        );
    }

    #[test]
    fn types_by_hand_apply_to_plain_targets_too() {
        let (facts, tensors) = (facts("llama", &[]), dense(1, 256));
        let recipe = run(&facts, &tensors, &with_types(Target::BF16, &["ffn_up=q8_0"])).unwrap();
        assert_eq!(types_of(&tensors, &recipe, "ffn_up"), [TensorType::Q8_0]);
        assert_eq!(types_of(&tensors, &recipe, "ffn_down"), [TensorType::BF16]);
        assert_eq!(recipe.notes, [Note::OverridesOnPlainTarget { target: Target::BF16, tensors: 1 }]);
    }

    #[test]
    fn option_types_that_do_not_fit_the_row_fall_back() {
        let (facts, tensors) = (facts("llama", &[]), dense(1, 576));
        let mut options = Options::new(Target::Q8_0);
        options.output_tensor_type = Some(TensorType::Q6_K);
        options.token_embedding_type = Some(TensorType::Q4_K);
        let recipe = run(&facts, &tensors, &options).unwrap();
        assert_eq!(types_of(&tensors, &recipe, "output.weight")[0], TensorType::Q8_0);
        assert_eq!(types_of(&tensors, &recipe, "token_embd"), [TensorType::Q5_0]);
        assert_eq!(recipe.fallback_cost.tensors, 2);
        let text: Vec<_> = recipe.notes.iter().map(Note::to_string).collect();
        assert!(text[0].starts_with("--output-tensor-type: output.weight has rows of 576"), "{text:?}");
        assert!(text[1].starts_with("--token-embedding-type: token_embd.weight has rows of 576"), "{text:?}");
    }

    #[test]
    fn fallbacks_are_priced_and_can_be_refused() {
        let (facts, tensors) = (facts("llama", &[]), dense(1, 320));
        let mut options = Options::new(Target::Q4_K_S);
        options.pure = true;
        let recipe = run(&facts, &tensors, &options).unwrap();
        let weights = 7 * 320 * 320 + 2 * 320 * 1000;
        let cost = FallbackCost { tensors: 9, wanted_bytes: weights * 144 / 256, got_bytes: weights / 32 * 22 };
        assert_eq!(recipe.fallback_cost, cost);
        options.allow_fallback = false;
        let error = run(&facts, &tensors, &options).unwrap_err().to_string();
        assert!(error.contains("9 tensor(s)") && error.contains("rows of 320 cannot be q4_K"), "{error}");
        assert!(error.contains(&(cost.got_bytes - cost.wanted_bytes).to_string()), "{error}");
    }

    #[test]
    fn rows_without_any_block_become_f16_with_one_note() {
        let (facts, tensors) = (facts("llama", &[]), dense(2, 100));
        let recipe = run(&facts, &tensors, &Options::new(Target::Q8_0)).unwrap();
        assert!(recipe.choices.iter().all(|choice| choice.ty == F16));
        let text: Vec<_> = recipe.notes.iter().map(Note::to_string).collect();
        assert_eq!(text.len(), 1, "{text:?}");
        assert!(text[0].contains("16 tensor(s) such as output.weight have rows of 100"), "{text:?}");
    }

    #[test]
    fn blocks_beyond_the_count_of_an_expert_model_count_as_the_last() {
        let mut tensors = dense(33, 256);
        tensors.push(("mtp.ffn_down.weight".to_owned(), vec![256, 256]));
        let facts = facts("glm4moe", &[("expert_count", 128)]);
        let recipe = run(&facts, &tensors, &Options::new(Target::Q4_K_M)).unwrap();
        assert_eq!(types_of(&tensors, &recipe, "ffn_down")[32..], [TensorType::Q6_K; 2]);
        let (tensors, tensor) = (2, "blk.32.ffn_down.weight".to_owned());
        assert_eq!(recipe.notes, [Note::BlockOutOfRange { tensors, tensor, blocks: 32 }]);
    }

    #[test]
    fn missing_metadata_stops_only_the_mixes_that_need_it() {
        let none = ModelFacts::from_lookup(|_| MetaValue::Absent);
        let tensors = dense(4, 256);
        for target in [Target::Q8_0, Target::F16, Target::COPY, Target::Q6_K, Target::TQ1_0] {
            let recipe = run(&none, &tensors, &Options { pure: true, ..Options::new(target) });
            assert!(recipe.is_ok(), "{target}");
        }
        let error = run(&none, &tensors, &Options::new(Target::Q4_K_M)).unwrap_err().to_string();
        assert!(error.contains("general.architecture is missing"), "{error}");
        for bad in [0, 1 << 32] {
            let facts = facts("llama", &[("block_count", bad)]);
            let error = run(&facts, &tensors, &Options::new(Target::Q4_K_M)).unwrap_err().to_string();
            assert!(error.contains("llama.block_count is"), "{error}");
            assert!(run(&facts, &tensors, &Options::new(Target::Q4_0)).is_ok());
        }
    }

    #[test]
    fn a_copy_keeps_everything_and_says_which_options_it_ignores() {
        let mut options = with_types(Target::COPY, &["attn_q=q8_0"]);
        options.pure = true;
        let tensors = dense(1, 256);
        let recipe = run(&facts("llama", &[]), &tensors, &options).unwrap();
        assert!(recipe.choices.iter().all(|choice| choice.reason == Reason::Kept(Keep::Copy) && choice.ty == F16));
        let ignored = ["--tensor-type", "--pure"].map(|option| Note::IgnoredByCopy { option });
        assert_eq!(recipe.notes, ignored);
    }

    #[test]
    fn options_for_a_tensor_that_is_not_there_are_named() {
        let tied: Vec<_> = dense(1, 256).into_iter().filter(|tensor| tensor.0 != "output.weight").collect();
        let mut options = Options::new(Target::Q4_K_M);
        options.leave_output_tensor = true;
        options.output_tensor_type = Some(TensorType::Q8_0);
        let recipe = run(&facts("llama", &[]), &tied, &options).unwrap();
        assert_eq!(types_of(&tied, &recipe, "token_embd"), [TensorType::Q8_0], "the embedding is the output");
        assert_eq!(recipe.notes.len(), 1, "{:?}", recipe.notes);
        assert!(recipe.notes[0].to_string().starts_with("--leave-output-tensor has no effect"));
        let recipe = run(&facts("llama", &[]), &dense(1, 256), &options).unwrap();
        assert_eq!(recipe.choices[0].reason, Reason::Kept(Keep::LeaveOutput));
        assert!(recipe.notes[0].to_string().contains("--leave-output-tensor keeps output.weight"));
    }

    #[test]
    fn importance_is_required_only_where_a_conversion_needs_it() {
        let facts = facts("llama", &[]);
        let name = "blk.0.ffn_up.weight";
        let choose = |ty, target| {
            let tensor = TensorDesc { name, shape: &[256, 256], ty };
            choose_types(&facts, &[tensor], &Options::new(target)).unwrap().choices.remove(0).requires_imatrix
        };
        assert!(choose(F16, Target::IQ2_XS));
        assert!(!choose(TensorType::IQ2_XS, Target::IQ2_XS), "a copy needs none");
        assert!(choose(F16, Target::Q2_K_S));
        assert!(!choose(F16, Target::Q2_K));
        assert!(!choose(F16, Target::IQ3_S));
        assert!(!requires_imatrix("token_embd.weight", TensorType::IQ1_S, Target::IQ1_S));
    }

    #[test]
    fn integer_tensors_are_kept() {
        let facts = facts("llama", &[]);
        let tensor = TensorDesc { name: "blk.0.ids.weight", shape: &[256, 256], ty: TensorType::I32 };
        let recipe = choose_types(&facts, &[tensor], &Options::new(Target::Q4_K_M)).unwrap();
        assert_eq!(recipe.choices[0].ty, TensorType::I32);
        assert_eq!(recipe.notes.len(), 1);
    }

    #[test]
    fn absurd_shapes_do_not_overflow() {
        let facts = facts("llama", &[]);
        let shape = &[u64::MAX, u64::MAX, u64::MAX, u64::MAX];
        let tensor = TensorDesc { name: "blk.0.attn_q.weight", shape, ty: F16 };
        let recipe = choose_types(&facts, &[tensor], &Options::new(Target::Q4_K_M)).unwrap();
        assert_eq!(recipe.fallback_cost.got_bytes, u64::MAX);
    }

    #[test]
    fn ten_thousand_patterns_are_bearable() {
        let patterns: Vec<_> = (0..10_000).map(|at| format!(r"^blk\.{at}\.attn_[qk]\.\w+$=q8_0")).collect();
        let options = with_types(Target::Q4_K_M, &patterns.iter().map(String::as_str).collect::<Vec<_>>());
        let start = std::time::Instant::now();
        let tensors = dense(80, 256);
        let recipe = run(&facts("llama", &[("block_count", 80)]), &tensors, &options).unwrap();
        assert_eq!(types_of(&tensors, &recipe, "attn_q"), [TensorType::Q8_0; 80]);
        assert_eq!(recipe.notes.len(), 10_000 - 80);
        assert!(start.elapsed().as_secs() < 120, "{:?}", start.elapsed());
    }
}
