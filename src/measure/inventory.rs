//! The tensors of a model as measurements and plans see them: what may become of each, and how important its columns are.

use std::borrow::Cow;
use std::collections::HashMap;

use super::{MeasureError, MeasuredTensor};
use crate::display::printable;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::imatrix::{EntryFilter, Imatrix, ModelTensor, Named, Need, match_to_model};
use crate::moments::{has_input, output_tensor};
use crate::recipe::candidates::{Legal, Rules, legal_types};
use crate::recipe::{TensorDesc, mtp, output_order, roles};
use crate::rounding::RoundingMethod;

/// A file that a result depends on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Its name as the user gave it.
    pub name: String,
    /// Its fingerprint: 64 hexadecimal digits.
    pub sha256: String,
}

/// An importance matrix with the entries for plans among the others, and where it came from.
pub(crate) fn with_planning(imatrix: Named<'_>) -> (Imatrix, SourceFile) {
    let Named { name, imatrix } = imatrix;
    let imatrix = imatrix.clone().with_planning();
    let source = SourceFile { name: name.to_owned(), sha256: imatrix.fingerprint() };
    (imatrix, source)
}

/// Importance and expert shares of a tensor that has data.
pub(crate) struct TensorImportance {
    /// `[matrices, row_len]`, row-major.
    pub values: Vec<f32>,
    /// Tokens that each matrix saw; empty where one count stands for all.
    pub tokens: Vec<u64>,
}

/// The tensors, in the order of the written file.
pub(crate) struct Inventory<'a> {
    pub gguf: &'a Gguf,
    pub tensors: Vec<&'a TensorInfo>,
    pub legal: Vec<Legal>,
    pub importance: HashMap<String, TensorImportance>,
    /// How often each token is to be expected, where the rows of the embedding serve nothing but their tokens.
    token_frequencies: Option<Vec<f64>>,
}

impl<'a> Inventory<'a> {
    /// Matches the importance to the tensors and finds the types that `rules` leave them, in a file that is to be rounded by
    /// `rounding`. `notes` gets what the user should be told.
    ///
    /// # Errors
    /// When the imatrix does not fit the model, a tensor is left without a type, or there is nothing to choose.
    pub(crate) fn new(
        gguf: &'a Gguf,
        rules: &Rules,
        imatrix: Option<&Imatrix>,
        rounding: RoundingMethod,
        notes: &mut Vec<String>,
    ) -> Result<Inventory<'a>, MeasureError> {
        let file = || printable(gguf.label());
        let names: Vec<&str> = gguf.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        let tensors: Vec<&TensorInfo> = output_order(&names).into_iter().map(|at| &gguf.tensors()[at]).collect();
        let tied = gguf.tensor(roles::OUTPUT_WEIGHT).is_none();
        let token_frequencies = imatrix.filter(|_| !tied).and_then(Imatrix::token_frequencies);
        let importance = match imatrix {
            Some(imatrix) => match_importance(imatrix, &tensors, notes)?,
            None => HashMap::new(),
        };
        let descriptions: Vec<TensorDesc> = tensors.iter().map(|tensor| TensorDesc::from(*tensor)).collect();
        // Feedback finds out by itself how important the inputs are that the model shows.
        let feedback = rounding == RoundingMethod::Feedback;
        let by_feedback = |name: &str| feedback && has_input(name, output_tensor(gguf));
        let has_data = |name: &str| importance.contains_key(name) || by_feedback(name);
        let weighted = imatrix.is_some() || feedback;
        let legal = legal_types(&descriptions, rules, weighted, has_data)
            .map_err(|source| MeasureError::Types { file: file(), source })?;
        notes.extend(legal.notes);
        let unmeasured = fix_unmeasured(gguf, &tensors, legal.tensors)?;
        let inventory = Inventory { gguf, tensors, legal: unmeasured, importance, token_frequencies };
        if inventory.choosable().next().is_none() {
            return Err(MeasureError::NothingToChoose { file: file() });
        }
        Ok(inventory)
    }

    /// Tensors whose type can be chosen, with their types.
    pub(crate) fn choosable(&self) -> impl Iterator<Item = (&'a TensorInfo, &[TensorType])> {
        self.tensors.iter().zip(&self.legal).filter_map(|(tensor, legal)| match legal {
            Legal::Types(types) => Some((*tensor, types.as_slice())),
            Legal::Kept(_) => None,
        })
    }

    /// The same as a measurement sees them, in the same order.
    pub(crate) fn measured(&self) -> Vec<MeasuredTensor<'_>> {
        let measured = |(tensor, _): (&'a TensorInfo, _)| {
            let importance = self.importance.get(&tensor.name).map(|found| found.values.as_slice());
            MeasuredTensor::new(tensor, importance, self.row_factors(tensor))
        };
        self.choosable().map(measured).collect()
    }

    /// How much the errors of each row count, relative to the others: the share of the tokens that the matrix of each row
    /// sees, for experts; how often a token is to be expected, for an embedding.
    pub(crate) fn row_factors(&self, tensor: &TensorInfo) -> Option<Vec<f64>> {
        if tensor.name == roles::TOKEN_EMBD_WEIGHT {
            return self.token_frequencies.clone().filter(|found| found.len() as u64 == tensor.rows());
        }
        let tokens = &self.importance.get(&tensor.name).filter(|found| !found.tokens.is_empty())?.tokens;
        let rows = tensor.rows_per_matrix() as usize;
        Some(tokens.iter().flat_map(|&tokens| std::iter::repeat_n(tokens as f64, rows)).collect())
    }
}

/// Blocks for multi-token prediction have no part in the logits that are measured, so nothing says what their bits are worth:
/// their matrices get 8 bits, or the largest type that they may have.
fn fix_unmeasured(gguf: &Gguf, tensors: &[&TensorInfo], legal: Vec<Legal>) -> Result<Vec<Legal>, MeasureError> {
    let blocks = match gguf.metadata().str("general.architecture").ok().flatten() {
        Some(architecture) => mtp::mtp_blocks(architecture, gguf.metadata())
            .map_err(|source| MeasureError::Blocks { file: printable(gguf.label()), source })?,
        None => 0..0,
    };
    let bits = |ty: &TensorType| ty.info().map_or(0.0, |info| info.bits_per_weight());
    let fixed = |(tensor, legal): (&&TensorInfo, Legal)| match legal {
        Legal::Types(types) if roles::split_block(&tensor.name).is_some_and(|(block, _)| blocks.contains(&block)) => {
            let usual = types.iter().find(|ty| **ty == TensorType::Q8_0);
            let chosen = usual.or_else(|| types.iter().max_by(|a, b| bits(a).total_cmp(&bits(b))));
            Legal::Types(chosen.copied().into_iter().collect())
        }
        other => other,
    };
    Ok(tensors.iter().zip(legal).map(fixed).collect())
}

fn match_importance(
    imatrix: &Imatrix,
    tensors: &[&TensorInfo],
    notes: &mut Vec<String>,
) -> Result<HashMap<String, TensorImportance>, MeasureError> {
    let wanted: Vec<ModelTensor> = tensors
        .iter()
        .map(|tensor| ModelTensor {
            name: &tensor.name,
            row_len: tensor.row_len(),
            matrices: tensor.matrices(),
            need: match roles::exemption(&tensor.name, &tensor.shape) {
                Some(_) => Need::Kept,
                None => Need::Optional,
            },
        })
        .collect();
    let report = match_to_model(imatrix, &wanted, &EntryFilter::All, Cow::Borrowed);
    report.check()?;
    notes.extend(report.warnings());
    let mut importance = HashMap::new();
    for used in &report.used {
        let Some(entry) = used.data(imatrix) else { continue };
        // Data of an expert tensor that no token reached weigh nothing.
        if entry.is_empty() {
            continue;
        }
        let tokens = if entry.matrices() > 1 { entry.counts.clone() } else { Vec::new() };
        importance.insert(used.tensor.clone(), TensorImportance { values: entry.importance().values, tokens });
    }
    Ok(importance)
}
