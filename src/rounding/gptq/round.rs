//! Rounding whole rows: the public functions, and what they do for a few rows at a time.

use rayon::prelude::*;

use super::columns::{TASK_ROWS, TILE, TileRow, column_weights, rows_at_once};
use super::error::FeedbackError;
use super::factor::Factor;
use super::format::{Prepared, TileFormat};
use super::lattice::{self, LatticeLayout};
use super::layout::Layout;
use crate::compute::{GemmOperand, gemm_f32};
use crate::gguf::TensorType;
use crate::quant::types::parts::Parts;
use crate::quant::{self, QuantError, codec, first_non_finite};

/// Passes of coordinate descent after rounding.
const SWEEPS: usize = 2;

/// Rows of one task: every thread of the pool should have the same share of `rows`.
pub(in crate::rounding) fn task_rows(n: usize, rows: usize) -> usize {
    let tasks = rows.div_ceil(rows_at_once(n)).next_multiple_of(rayon::current_num_threads());
    rows.div_ceil(tasks.max(1)).max(TASK_ROWS)
}

/// A format that this module knows how to round to.
pub(super) enum Format {
    /// Weight by weight.
    Columns(Layout),
    /// Eight weights at a time.
    Lattice(LatticeLayout),
}

impl Format {
    fn of(ty: TensorType) -> Option<Format> {
        Layout::of(ty).map(Format::Columns).or_else(|| LatticeLayout::of(ty).map(Format::Lattice))
    }
}

/// Whether [`round_rows`] takes `ty`.
#[doc(alias = "GPTQ")]
pub fn supports_feedback(ty: TensorType) -> bool {
    Format::of(ty).is_some()
}

/// Whether [`search_rows`] takes `ty`: every type with an encoder.
pub fn supports_search(ty: TensorType) -> bool {
    codec(ty).is_some_and(|codec| codec.quantize.is_some())
}

/// Rounds `rows`, row-major `[rows, n]`, to blocks of `ty` with the feedback of `factor`, `out` being exactly as long
/// as the encoded rows: [`search_rows`] with the moment's diagonal, then [`improve_rows`].
///
/// # Errors
/// Those of [`improve_rows`].
#[doc(alias = "GPTQ")]
#[doc(alias = "LDLQ")]
#[doc(alias = "OPTQ")]
#[doc(alias = "OBQ")]
pub fn round_rows(
    ty: TensorType,
    rows: &[f32],
    n: usize,
    factor: &Factor,
    out: &mut [u8],
) -> Result<(), FeedbackError> {
    checked_format(ty, n, factor)?;
    search_rows(ty, rows, n, Some(factor.plain()), out)?;
    improve_rows(ty, rows, n, factor, out)
}

/// Rounds `rows`, row-major `[rows, n]`, to blocks of `ty` with the feedback of `factor`. `out` holds them rounded in
/// another way, as by [`search_rows`]; a row that feedback does not make better than that on the moment that was
/// factored (before damping) stays as it is.
///
/// Uses rayon's current pool. The bytes depend neither on the number of threads nor on which rows are given together.
///
/// # Errors
/// [`FeedbackError`] when the type is none of [`supports_feedback`], a weight is not finite, or lengths disagree.
#[doc(alias = "GPTQ")]
#[doc(alias = "LDLQ")]
#[doc(alias = "OPTQ")]
#[doc(alias = "OBQ")]
#[doc(alias = "coordinate descent")]
pub fn improve_rows(
    ty: TensorType,
    rows: &[f32],
    n: usize,
    factor: &Factor,
    out: &mut [u8],
) -> Result<(), FeedbackError> {
    let format = checked_format(ty, n, factor)?;
    let row_bytes = checked_row_bytes(ty, rows, n, out)?;
    let Some(feedback) = factor.feedback() else { return Ok(()) };
    let task = Task { ty, n, row_bytes };
    match &format {
        Format::Columns(layout) => task.improve(&Prepared::new(layout, factor, feedback), rows, out),
        Format::Lattice(layout) => task.improve(&Prepared::new(layout, factor, feedback), rows, out),
    }
}

/// Rows that are rounded with feedback.
struct Task {
    ty: TensorType,
    n: usize,
    row_bytes: usize,
}

impl Task {
    fn improve<F: TileFormat>(
        &self,
        prepared: &Prepared<'_, F>,
        rows: &[f32],
        out: &mut [u8],
    ) -> Result<(), FeedbackError> {
        let (n, row_bytes) = (self.n, self.row_bytes);
        let task_rows = task_rows(n, rows.len() / n);
        let tasks = rows.par_chunks(task_rows * n).zip(out.par_chunks_mut(task_rows * row_bytes));
        tasks.try_for_each(|(rows, out)| {
            let mut errors = decoded_errors(self.ty, rows, out)?;
            let before = losses(&errors, n, prepared.factor, prepared.feedback);
            let (parts, found) = prepared.round_task(rows, &mut errors, SWEEPS)?;
            let mut bytes = vec![0; out.len()];
            prepared.format.write(&parts, &mut bytes);
            let rows = out.chunks_exact_mut(row_bytes).zip(bytes.chunks_exact(row_bytes));
            for ((out, bytes), (found, before)) in rows.zip(found.iter().zip(&before)) {
                if found < before {
                    out.copy_from_slice(bytes);
                }
            }
            Ok(())
        })
    }
}

/// The format of `ty`, after checking that `factor` is of rows as long as these.
pub(super) fn checked_format(ty: TensorType, n: usize, factor: &Factor) -> Result<Format, FeedbackError> {
    let format = Format::of(ty).ok_or(FeedbackError::NoFeedback { ty })?;
    if n == factor.n() { Ok(format) } else { Err(FeedbackError::Inputs { row_len: n, found: factor.n() }) }
}

/// Rounds `rows`, row-major `[rows, n]`, to blocks of `ty` by a search over the scales of each block on the values that
/// readers decode, `out` being exactly as long as the encoded rows. Errors of column `j` count `weights[j]` (not
/// negative), or all the same.
///
/// No block ends with a greater weighed error than ggml's encoder leaves; where the search knows nothing better
/// for a type, the bytes are ggml's.
///
/// # Errors
/// [`FeedbackError`] when the type has no encoder, a weight is not finite, or lengths disagree.
#[doc(alias = "imatrix")]
#[doc(alias = "scale search")]
pub fn search_rows(
    ty: TensorType,
    rows: &[f32],
    n: usize,
    weights: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), FeedbackError> {
    let row_bytes = checked_row_bytes(ty, rows, n, out)?;
    if let Some(weights) = weights
        && weights.len() != n
    {
        return Err(QuantError::ImportanceLength { ty, found: weights.len(), row_len: n }.into());
    }
    let format = Format::of(ty);
    let cost = column_weights(weights, n);
    rows.par_chunks(TASK_ROWS * n)
        .zip(out.par_chunks_mut(TASK_ROWS * row_bytes))
        .try_for_each(|(rows, out)| search_task(ty, format.as_ref(), rows, &cost, weights, out))
}

/// Bytes of an encoded row, after all lengths and weights have been checked.
pub(super) fn checked_row_bytes(ty: TensorType, rows: &[f32], n: usize, out: &[u8]) -> Result<usize, FeedbackError> {
    let info = ty.info().filter(|_| supports_search(ty)).ok_or(QuantError::NoEncoder { ty })?;
    if n == 0 || !n.is_multiple_of(info.block_len) {
        return Err(QuantError::RowLength { ty, row_len: n, block_len: info.block_len }.into());
    }
    if !rows.len().is_multiple_of(n) {
        return Err(QuantError::PartialRow { ty, weights: rows.len(), row_len: n }.into());
    }
    let row_bytes = n / info.block_len * info.block_bytes;
    let expected = rows.len() / n * row_bytes;
    if out.len() != expected {
        return Err(QuantError::EncodedLength { ty, weights: rows.len(), expected, found: out.len() }.into());
    }
    match first_non_finite(rows) {
        Some(index) => Err(FeedbackError::NonFinite { index, value: rows[index] }),
        None => Ok(row_bytes),
    }
}

/// [`search_rows`] for a few rows, with `cost` from [`column_weights`].
fn search_task(
    ty: TensorType,
    format: Option<&Format>,
    rows: &[f32],
    cost: &[f32],
    weights: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), FeedbackError> {
    let n = cost.len();
    let optional = codec(ty).is_none_or(|codec| !codec.needs_importance());
    let Some(format) = format else {
        // Where ggml needs importance, ones are as good as none.
        quant::quantize_rows(ty, rows, n, weights.or((!optional).then_some(cost)), out)?;
        return Ok(());
    };
    quant::quantize_rows(ty, rows, n, Some(weights.unwrap_or(cost)), out)?;
    if weights.is_none() && optional {
        let mut plain = vec![0; out.len()];
        quant::quantize_rows(ty, rows, n, None, &mut plain)?;
        keep_better(ty, rows, cost, &plain, out)?;
    }
    let mut bytes = vec![0; out.len()];
    match format {
        Format::Columns(layout) => search_columns(layout, rows, cost, &mut bytes),
        Format::Lattice(layout) => layout.write(&lattice::search_task(layout, rows, cost, out), &mut bytes),
    }
    keep_better(ty, rows, cost, &bytes, out)?;
    Ok(())
}

/// Rounds a few rows by search alone.
fn search_columns(layout: &Layout, rows: &[f32], cost: &[f32], bytes: &mut [u8]) {
    let n = cost.len();
    let mut parts = vec![Parts::ZERO; TILE / layout.len];
    let (mut targets, mut errors) = (vec![0.0; TILE], vec![0.0; TILE]);
    for (row, bytes) in rows.chunks_exact(n).zip(bytes.chunks_exact_mut(n / layout.len * layout.bytes)) {
        for (start, bytes) in (0..n).step_by(TILE).zip(bytes.chunks_mut(TILE / layout.len * layout.bytes)) {
            let columns = start..n.min(start + TILE);
            let weights = &row[columns.clone()];
            let targets = &mut targets[..weights.len()];
            targets.copy_from_slice(weights);
            let errors = &mut errors[..weights.len()];
            let parts = &mut parts[..weights.len() / layout.len];
            layout.round_tile(TileRow { weights, targets, errors, parts }, &cost[columns], None);
            layout.write(parts, bytes);
        }
    }
}

/// Replaces those blocks of `out` that lose more than the ones of `bytes`.
fn keep_better(ty: TensorType, rows: &[f32], cost: &[f32], bytes: &[u8], out: &mut [u8]) -> Result<(), QuantError> {
    let Some(info) = ty.info() else { return Err(QuantError::NoCodec { ty }) };
    let n = cost.len();
    let (mut new, mut old) = (vec![0.0; n], vec![0.0; n]);
    let row_bytes = n / info.block_len * info.block_bytes;
    let rows = rows.chunks_exact(n).zip(bytes.chunks_exact(row_bytes)).zip(out.chunks_exact_mut(row_bytes));
    for ((row, bytes), out) in rows {
        quant::dequantize(ty, bytes, &mut new)?;
        quant::dequantize(ty, out, &mut old)?;
        for (block, start) in (0..n).step_by(info.block_len).enumerate() {
            let columns = start..start + info.block_len;
            let loss = |decoded: &[f32]| -> f64 {
                let terms = row[columns.clone()].iter().zip(&decoded[columns.clone()]).zip(&cost[columns.clone()]);
                terms.map(|((w, q), c)| f64::from(*c) * (f64::from(*w) - f64::from(*q)).powi(2)).sum()
            };
            let old = loss(&old);
            if loss(&new) < old || !old.is_finite() {
                let block = block * info.block_bytes..(block + 1) * info.block_bytes;
                out[block.clone()].copy_from_slice(&bytes[block]);
            }
        }
    }
    Ok(())
}

/// Weights minus decoded weights, row-major.
pub(super) fn decoded_errors(ty: TensorType, rows: &[f32], bytes: &[u8]) -> Result<Vec<f32>, FeedbackError> {
    let mut errors = vec![0.0; rows.len()];
    quant::dequantize(ty, bytes, &mut errors)?;
    for (error, w) in errors.iter_mut().zip(rows) {
        *error = w - *error;
    }
    Ok(errors)
}

/// The loss of each row with these errors, `[rows, n]`.
pub(in crate::rounding) fn losses(errors: &[f32], n: usize, factor: &Factor, feedback: &[f32]) -> Vec<f64> {
    let rows = errors.len() / n;
    let mut u = errors.to_vec();
    for start in (0..n).step_by(TILE) {
        let columns = TILE.min(n - start);
        let a = GemmOperand::Plain { data: &feedback[start..], stride: n };
        gemm_f32(rows, columns, start + columns, errors, n, a, &mut u[start..], n, true);
    }
    errors.chunks_exact(n).zip(u.chunks_exact(n)).map(|(errors, u)| factor.loss(errors, u)).collect()
}
