//! Which types a plan may give each tensor of a model.

use super::{Keep, RecipeError, Role, Target, TensorDesc, TypeOverride, fallback, requires_imatrix, roles};
use crate::gguf::{TensorType, shown};
use crate::quant;

/// Types that are tried where 256 divides the rows: those that are not beaten at their size on any common model.
const WIDE_ROW_TYPES: &[TensorType] = &[
    TensorType::IQ1_S,
    TensorType::IQ1_M,
    TensorType::IQ2_XXS,
    TensorType::IQ2_XS,
    TensorType::IQ2_S,
    TensorType::Q2_K,
    TensorType::IQ3_XXS,
    TensorType::IQ3_S,
    TensorType::Q3_K,
    TensorType::IQ4_XS,
    TensorType::IQ4_NL,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::Q8_0,
];

/// The same for other rows that 32 divides.
const NARROW_ROW_TYPES: &[TensorType] =
    &[TensorType::IQ4_NL, TensorType::Q4_0, TensorType::Q4_1, TensorType::Q5_0, TensorType::Q5_1, TensorType::Q8_0];

/// Why a tensor keeps its type whatever the budget, or `None` where it can be chosen.
pub(crate) fn kept(tensor: &TensorDesc<'_>) -> Option<Keep> {
    roles::exemption(tensor.name, tensor.shape).or(roles::is_unconvertible(tensor.ty).then_some(Keep::SourceType))
}

/// Every type that a plan tries by itself, in rows of any length: what a measurement must know.
pub fn tried_types() -> impl Iterator<Item = TensorType> {
    let narrow = NARROW_ROW_TYPES.iter().filter(|ty| !WIDE_ROW_TYPES.contains(ty));
    WIDE_ROW_TYPES.iter().chain(narrow).copied().chain([TensorType::F16])
}

/// What the user restricts.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Types by pattern; the first that matches a name wins.
    pub tensor_types: Vec<TypeOverride>,
    /// Type of `output.weight`, and of the token embedding where the model has no `output.weight`.
    pub output_tensor_type: Option<TensorType>,
    /// Type of the token embeddings.
    pub token_embedding_type: Option<TensorType>,
    /// The only types to choose from.
    pub types: Option<Vec<TensorType>>,
    /// No type of fewer bits per weight, where none is given by hand.
    pub min_type: Option<TensorType>,
}

/// What may become of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Legal {
    /// It keeps its type.
    Kept(Keep),
    /// It gets one of these; one alone if the type was given by hand.
    Types(Vec<TensorType>),
}

/// The types of all tensors, and what the user should be told.
#[derive(Debug, Clone, PartialEq)]
pub struct LegalTypes {
    /// One entry for each tensor, in the order given.
    pub tensors: Vec<Legal>,
    /// A line for each thing that is not as the user may think.
    pub notes: Vec<String>,
}

/// Finds the legal types of each tensor. `has_imatrix` says whether there is an importance matrix at all,
/// `has_importance` whether it has data for a tensor.
///
/// # Errors
/// When a tensor is left without a type, or a type given by hand needs importance that is not there.
pub fn legal_types(
    tensors: &[TensorDesc<'_>],
    rules: &Rules,
    has_imatrix: bool,
    has_importance: impl Fn(&str) -> bool,
) -> Result<LegalTypes, RecipeError> {
    let tied = !tensors.iter().any(|tensor| tensor.name == roles::OUTPUT_WEIGHT);
    let mut notes = Vec::new();
    let mut used = vec![false; rules.tensor_types.len()];
    let mut substituted = 0;
    let mut legal = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if let Some(keep) = kept(tensor) {
            legal.push(Legal::Kept(keep));
            continue;
        }
        let weighted = has_importance(tensor.name);
        let row_len = tensor.shape.first().copied().unwrap_or(1);
        if let Some(wanted) = pinned(tensor, rules, tied, &mut used)? {
            let fit = fallback::fit(wanted, row_len, tensor.ty);
            if fit.from.is_some() {
                let name = shown(tensor.name.as_bytes());
                notes.push(format!("{name}: rows of {row_len} do not fit {wanted}; {} is used instead", fit.ty));
            }
            if !is_encodable(tensor, fit.ty, weighted) {
                let tensor = shown(tensor.name.as_bytes());
                return Err(RecipeError::PinNeedsImportance { tensor, ty: fit.ty, has_imatrix });
            }
            legal.push(Legal::Types(vec![fit.ty]));
            continue;
        }
        let (mut types, substitutes) = allowed(tensor, rules, row_len);
        substituted += usize::from(substitutes);
        types.retain(|ty| is_encodable(tensor, *ty, weighted));
        if types.is_empty() {
            let advice =
                if has_imatrix { "allow more types with --types" } else { "allow more types, or add --imatrix" };
            let tensor = shown(tensor.name.as_bytes());
            return Err(RecipeError::NoType { tensor, row_len, advice });
        }
        legal.push(Legal::Types(types));
    }
    if substituted > 0 {
        notes.push(format!("{substituted} tensors have rows that none of --types fits; they get substitutes of them"));
    }
    for (rule, used) in rules.tensor_types.iter().zip(used) {
        if !used {
            let pattern = shown(rule.pattern.as_bytes());
            notes.push(format!("--tensor-type {pattern}: no tensor that can be quantized gets its type from it"));
        }
    }
    Ok(LegalTypes { tensors: legal, notes })
}

/// The type given by hand; the precedence is that of the standard recipes.
fn pinned(
    tensor: &TensorDesc<'_>,
    rules: &Rules,
    tied: bool,
    used: &mut [bool],
) -> Result<Option<TensorType>, RecipeError> {
    let role = Role::of(tensor.name);
    let by_option = match role {
        Role::TokenEmbd => rules.token_embedding_type,
        Role::Output => rules.output_tensor_type,
        _ => None,
    };
    if by_option.is_some() {
        return Ok(by_option);
    }
    for (rule, used) in rules.tensor_types.iter().zip(used) {
        if rule.matches(tensor.name)? {
            *used = true;
            return Ok(Some(rule.ty));
        }
    }
    Ok(rules.output_tensor_type.filter(|_| role == Role::TokenEmbd && tied))
}

/// Types that fit the tensor's rows, smallest first, and whether they are substitutes of those that were asked for.
fn allowed(tensor: &TensorDesc<'_>, rules: &Rules, row_len: u64) -> (Vec<TensorType>, bool) {
    let fits = |ty: &TensorType| ty.info().is_some_and(|info| info.row_bytes(row_len).is_some());
    let large_enough = |ty: &TensorType| rules.min_type.is_none_or(|min| bits(*ty) >= bits(min));
    let mut substitutes = false;
    let mut types: Vec<TensorType> = match &rules.types {
        Some(listed) => {
            let fitting: Vec<TensorType> = listed.iter().copied().filter(fits).collect();
            if fitting.is_empty() {
                substitutes = true;
                listed.iter().map(|ty| fallback::fit(*ty, row_len, tensor.ty).ty).collect()
            } else {
                fitting
            }
        }
        None => {
            let list = if row_len.is_multiple_of(256) { WIDE_ROW_TYPES } else { NARROW_ROW_TYPES };
            let half = fallback::half_type(tensor.ty);
            let mut types: Vec<TensorType> = list.iter().copied().filter(fits).collect();
            types.push(half);
            types.push(tensor.ty);
            // Growing a tensor beyond its source gains nothing.
            types.retain(|ty| bits(*ty) <= bits(tensor.ty));
            types
        }
    };
    types.retain(large_enough);
    types.sort_by(|a, b| bits(*a).total_cmp(&bits(*b)).then(a.cmp(b)));
    types.dedup();
    (types, substitutes)
}

/// True if the tensor's weights can be brought into the type: it is theirs already, or there is an encoder that has
/// what it needs.
fn is_encodable(tensor: &TensorDesc<'_>, ty: TensorType, weighted: bool) -> bool {
    if ty == tensor.ty {
        return true;
    }
    let Some(codec) = quant::codec(ty).filter(|codec| codec.quantize.is_some()) else { return false };
    weighted || !(codec.needs_importance() || requires_imatrix(tensor.name, ty, Target::Q2_K))
}

fn bits(ty: TensorType) -> f64 {
    ty.info().map_or(0.0, |info| info.bits_per_weight())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: [u64; 2] = [512, 64];
    const NARROW: [u64; 2] = [576, 64];
    const ODD: [u64; 2] = [100, 64];

    fn tensor<'a>(name: &'a str, shape: &'a [u64]) -> TensorDesc<'a> {
        TensorDesc { name, shape, ty: TensorType::F16 }
    }

    fn types(tensor: TensorDesc, rules: &Rules, weighted: bool) -> Vec<TensorType> {
        match legal_types(&[tensor], rules, weighted, |_| weighted).unwrap().tensors.remove(0) {
            Legal::Types(types) => types,
            Legal::Kept(keep) => panic!("kept: {keep}"),
        }
    }

    fn refused(tensors: &[TensorDesc], rules: &Rules) -> String {
        legal_types(tensors, rules, false, |_| false).unwrap_err().to_string()
    }

    #[test]
    fn rows_and_importance_limit_the_types() {
        let rules = Rules::default();
        let all = types(tensor("blk.0.attn_q.weight", &WIDE), &rules, true);
        assert_eq!((all[0], *all.last().unwrap()), (TensorType::IQ1_S, TensorType::F16));
        let plain = types(tensor("blk.0.attn_q.weight", &WIDE), &rules, false);
        assert!(!plain.contains(&TensorType::IQ2_S) && plain.contains(&TensorType::IQ3_S));
        assert_eq!(plain[0], TensorType::Q2_K);
        let narrow = types(tensor("blk.0.attn_q.weight", &NARROW), &rules, true);
        assert!(narrow.contains(&TensorType::IQ4_NL) && !narrow.contains(&TensorType::Q4_K));
        assert_eq!(types(tensor("blk.0.attn_q.weight", &ODD), &rules, true), [TensorType::F16]);
        // Embeddings may go without importance, but not in types whose encoder cannot do without.
        let embedding = types(tensor("token_embd.weight", &WIDE), &rules, false);
        assert!(embedding.contains(&TensorType::IQ2_S) && !embedding.contains(&TensorType::IQ2_XS));
    }

    #[test]
    fn a_source_is_never_blown_up() {
        let quantized = TensorDesc { name: "blk.0.attn_q.weight", shape: &WIDE, ty: TensorType::Q5_K };
        assert_eq!(types(quantized, &Rules::default(), true).last(), Some(&TensorType::Q5_K));
        let bf16 = TensorDesc { name: "blk.0.attn_q.weight", shape: &WIDE, ty: TensorType::BF16 };
        let bf16 = types(bf16, &Rules::default(), true);
        assert!(bf16.contains(&TensorType::BF16) && !bf16.contains(&TensorType::F16));
        let f32 = TensorDesc { name: "blk.0.attn_q.weight", shape: &WIDE, ty: TensorType::F32 };
        assert!(types(f32, &Rules::default(), true).ends_with(&[TensorType::F16, TensorType::F32]));
    }

    #[test]
    fn lists_and_minima_restrict() {
        let rules = Rules { types: Some(vec![TensorType::Q6_K, TensorType::Q4_K]), ..Rules::default() };
        let wide = tensor("blk.0.attn_q.weight", &WIDE);
        assert_eq!(types(wide, &rules, true), [TensorType::Q4_K, TensorType::Q6_K]);
        // As the standard recipes do: Q5_0 for Q4_K, Q8_0 for Q6_K.
        let narrow = tensor("blk.0.attn_q.weight", &NARROW);
        assert_eq!(types(narrow, &rules, true), [TensorType::Q5_0, TensorType::Q8_0]);
        let notes = legal_types(&[narrow], &rules, true, |_| true).unwrap().notes;
        assert!(notes[0].contains("substitutes"), "{notes:?}");
        let rules = Rules { min_type: Some(TensorType::Q5_K), ..Rules::default() };
        assert_eq!(types(wide, &rules, true)[0], TensorType::Q5_K);
        let rules = Rules { types: Some(vec![TensorType::IQ2_XS]), ..Rules::default() };
        assert!(refused(&[wide], &rules).contains("add --imatrix"));
    }

    #[test]
    fn types_by_hand_win_in_the_order_of_the_standard_recipes() {
        let rule = |text: &str| TypeOverride::parse(text, "--tensor-type").unwrap();
        let rules = Rules {
            tensor_types: vec![rule("attn_q=q8_0"), rule("attn=q2_K"), rule("nothing=q2_K")],
            output_tensor_type: Some(TensorType::Q6_K),
            min_type: Some(TensorType::Q5_K),
            ..Rules::default()
        };
        let names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_norm.weight"];
        let mut tensors: Vec<_> = names.iter().map(|name| tensor(name, &WIDE)).collect();
        let only = |ty| Legal::Types(vec![ty]);
        let found = legal_types(&tensors, &rules, false, |_| false).unwrap();
        // The embedding is the output here.
        assert_eq!(found.tensors[..3], [only(TensorType::Q6_K), only(TensorType::Q8_0), only(TensorType::Q2_K)]);
        assert!(matches!(found.tensors[3], Legal::Kept(_)));
        assert!(found.notes.len() == 1 && found.notes[0].contains("nothing"), "{:?}", found.notes);
        tensors.push(tensor("output.weight", &WIDE));
        let found = legal_types(&tensors, &rules, false, |_| false).unwrap();
        assert_eq!(found.tensors[4], only(TensorType::Q6_K));
        assert!(matches!(&found.tensors[0], Legal::Types(types) if types.len() > 1));
    }

    #[test]
    fn a_type_by_hand_that_lacks_importance_is_refused() {
        let rule = TypeOverride::parse("attn_q=iq2_xxs", "--tensor-type").unwrap();
        let rules = Rules { tensor_types: vec![rule], ..Rules::default() };
        let error = refused(&[tensor("blk.0.attn_q.weight", &WIDE)], &rules);
        assert!(error.contains("iq2_xxs needs importance data, which only --imatrix gives"), "{error}");
    }
}
