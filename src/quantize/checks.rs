//! What has to be said of choices before the work, or changed for the weights' sake.

use super::decide::Sources;
use crate::display::printable;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::recipe::{Choice, Target};
use crate::rows;

/// The problem of a source that is quantized already.
pub(super) fn requantized(sources: &Sources<'_>, choices: &[Choice]) -> Option<String> {
    let affected: Vec<_> = sources
        .iter()
        .zip(choices)
        .filter(|((tensor, _), choice)| tensor.ty.is_quantized() && tensor.ty != choice.ty)
        .collect();
    let ((tensor, name), _) = affected.first()?;
    Some(format!(
        "the source is quantized already ({} of {} tensors, {} is {}); take a 16-bit source, or add --allow-requantize \
         and lose quality twice",
        affected.len(),
        sources.len(),
        printable(name),
        tensor.ty.to_string().to_uppercase()
    ))
}

/// A note where a run does nothing of what its target says: adapters whose rows no block fits, files of vectors.
pub(super) fn nothing_done(input: &str, target: Target, sources: &Sources<'_>, choices: &[Choice]) -> Option<String> {
    let base = target.base();
    let done = |choice: &Choice| if base.is_quantized() { choice.ty.is_quantized() } else { choice.ty == base };
    if target == Target::COPY || choices.iter().any(done) {
        return None;
    }
    let of_matrix = sources.iter().zip(choices).find(|((tensor, _), _)| tensor.rows() > 1);
    let ((tensor, name), choice) = of_matrix.or_else(|| sources.iter().zip(choices).next())?;
    let why = match choice.fallback_from {
        Some(ty) => format!("rows of {} weights, which {ty} cannot hold", tensor.row_len()),
        None => choice.reason.to_string(),
    };
    Some(format!(
        "{input}: nothing is quantized to {target}: none of the {} tensors becomes {base}, for example {} ({why})",
        sources.len(),
        printable(name)
    ))
}

/// Notes about tensors that go into the output as they are though llama.cpp cannot read them, a line a kind.
pub(super) fn carried_over(sources: &Sources<'_>) -> Vec<String> {
    let mut kinds: Vec<(String, &str, usize)> = Vec::new();
    for (tensor, name) in sources {
        let reasons = tensor.ty.foreign().map(|whose| format!("are of type {whose}, and are copied as they are"));
        let limit = tensor.beyond_ggml().map(|limit| format!("are beyond llama.cpp: {limit}"));
        for reason in reasons.into_iter().chain(limit) {
            match kinds.iter().position(|(known, ..)| *known == reason) {
                Some(at) => kinds[at].2 += 1,
                None if kinds.len() < MOST_KINDS => kinds.push((reason, name, 1)),
                None => {}
            }
        }
    }
    let line = |(reason, name, count): (String, &str, usize)| {
        format!("{count} tensor(s), such as {}, {reason}", printable(name))
    };
    kinds.into_iter().map(line).collect()
}

/// Lines of [`carried_over`]: a file may make up as many kinds as it has tensors.
const MOST_KINDS: usize = 16;

/// The problem of tensors of unknown type in a file of the other byte order.
pub(super) fn unswappable(gguf: &Gguf, sources: &Sources<'_>) -> Option<String> {
    let (tensor, name) = sources.iter().find(|(tensor, _)| gguf.is_big_endian() && tensor.ty.info().is_none())?;
    Some(format!(
        "{} is of type {} in a big-endian file, and what of it has to be swapped is unknown; convert the file to little \
         endian with the program that made it",
        printable(name),
        tensor.ty.foreign().unwrap_or_default()
    ))
}

/// The smallest magnitude that becomes infinity in float16.
const BEYOND_F16: f32 = 65520.0;

/// Weights that are looked at at a time.
const SCANNED_WEIGHTS: u64 = 1 << 18;

/// Where no block fits, matrices become float16, as in llama-quantize; those whose weights it cannot hold become bfloat16
/// instead. Says so.
pub(super) fn widen_fallbacks(gguf: &Gguf, sources: &Sources<'_>, choices: &mut [Choice]) -> Vec<String> {
    let mut notes = Vec::new();
    for ((tensor, name), choice) in sources.iter().zip(choices) {
        if choice.fallback_from.is_none() || choice.ty != TensorType::F16 || tensor.ty == TensorType::F16 {
            continue;
        }
        let Some((row, weight)) = beyond_f16(gguf, tensor) else { continue };
        choice.ty = TensorType::BF16;
        notes.push(format!(
            "{}: weight {weight} in row {row} is too large for f16, so bf16 takes the place of {}",
            printable(name),
            choice.fallback_from.unwrap_or(choice.ty)
        ));
    }
    notes
}

/// The first weight that is finite and too large for float16, with its row. What cannot be read is found by the run.
fn beyond_f16(gguf: &Gguf, tensor: &TensorInfo) -> Option<(u64, f32)> {
    let row_len = tensor.row_len().max(1);
    let rows_at_once = (SCANNED_WEIGHTS / row_len).max(1);
    let (mut bytes, mut weights) = (Vec::new(), Vec::new());
    let mut first = 0;
    while first < tensor.rows() {
        let count = rows_at_once.min(tensor.rows() - first);
        let data = gguf.load_rows(tensor, first, count, &mut bytes).ok()?;
        weights.resize(usize::try_from(count * row_len).ok()?, 0.0);
        rows::decode_any(tensor, data, &mut weights).ok()?;
        if let Some(at) = weights.iter().position(|weight| weight.is_finite() && weight.abs() >= BEYOND_F16) {
            return Some((first + at as u64 / row_len, weights[at]));
        }
        first += count;
    }
    None
}
