//! The run: rows of source tensors through widening, changes and encoding into their places in the output.
//!
//! All outputs are cut into pieces of whole rows that stand in one queue. Worker threads read, convert and write
//! a piece each; where source and output have one type, bytes are copied without a detour through floats. A piece's
//! bytes depend on nothing but its rows, so the file is the same for any number of threads. Codes that ggml's blocks can
//! hold are moved there without a detour, too.
//! Memory is a few buffers of [`PIECE_WEIGHTS`] per thread.

use std::fs::File;

use super::ConvertError;
use super::checkpoint::{Checkpoint, Dense};
use super::plan::{Content, Output, Part, Plan, Turns, ValueChange};
use super::rows::{Rows, Scratch};
use crate::gguf::{GgufLayout, TensorType, shown};
use crate::progress::{Interrupted, Unit, Watch};
use crate::quant::float16::{f16_to_f32, f32_to_f16};
use crate::quant::{self, QuantError};
use crate::workers;

/// Weights per piece: 4 MB of F32, large enough for whole reads of the disk.
const PIECE_WEIGHTS: u64 = 1 << 20;

/// Rows of one part of one output.
struct Piece {
    output: usize,
    part: usize,
    /// First row of the part.
    first: u64,
    rows: u64,
    /// First row, counted over the output.
    at: u64,
}

/// Buffers of a worker.
#[derive(Default)]
struct Buffers {
    raw: Vec<u8>,
    scratch: Scratch,
    floats: Vec<f32>,
    encoded: Vec<u8>,
}

/// Writes the data of all outputs with `threads` workers.
pub(super) fn run(
    plan: &Plan,
    checkpoint: &Checkpoint,
    layout: &GgufLayout,
    file: &File,
    threads: usize,
    watch: &dyn Watch,
) -> Result<(), ConvertError> {
    let pieces = cut(plan);
    watch.begin("converting", layout.data_bytes(), Unit::Bytes);
    let stop = watch.abandon();
    let done = workers::work_off(&pieces, threads, Buffers::default, |buffers, _, piece| {
        stop.check()?;
        let bytes = convert(plan, checkpoint, layout, file, piece, buffers)?;
        watch.advance(bytes, &layout.tensors()[piece.output].tensor.name);
        Ok::<_, ConvertError>(())
    });
    let stopped = stop.end();
    done?;
    watch.end();
    if stopped { Err(Interrupted.into()) } else { Ok(()) }
}

fn cut(plan: &Plan) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (output, Output { content, .. }) in plan.outputs.iter().enumerate() {
        match content {
            Content::Values(_) => pieces.push(Piece { output, part: 0, first: 0, rows: 1, at: 0 }),
            Content::Rows { parts, row_len, .. } => {
                let limit = (PIECE_WEIGHTS / row_len).max(1);
                let mut at = 0;
                for (part, Part { count, .. }) in parts.iter().enumerate() {
                    pieces.extend(workers::cut(*count, limit).map(|rows| Piece {
                        output,
                        part,
                        first: rows.start,
                        rows: rows.end - rows.start,
                        at: at + rows.start,
                    }));
                    at += count;
                }
            }
        }
    }
    pieces
}

fn convert(
    plan: &Plan,
    checkpoint: &Checkpoint,
    layout: &GgufLayout,
    file: &File,
    piece: &Piece,
    buffers: &mut Buffers,
) -> Result<u64, ConvertError> {
    let Output { tensor, content } = &plan.outputs[piece.output];
    let (parts, row_len, permuted_rows, turns, change) = match content {
        Content::Values(values) => {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            layout.write_data_at(file, piece.output, 0, &bytes)?;
            return Ok(bytes.len() as u64);
        }
        Content::Rows { parts, row_len, permuted_rows, turns, change } => {
            (parts, *row_len, *permuted_rows, *turns, *change)
        }
    };
    let part = &parts[piece.part];
    let rows = Rows { checkpoint, weight: &plan.weights[part.weight], part, row_len, permuted_rows };
    let Buffers { raw, scratch, floats, encoded } = buffers;
    rows.read(piece.first, piece.rows, raw, scratch)?;
    if let Some(dense) = rows.dense()
        && dense.tensor_type() == Some(tensor.ty)
        && !matches!(change, ValueChange::AddOne | ValueChange::MinusExp)
    {
        if let Some(at) = dense.first_non_finite(raw) {
            return Err(rows.non_finite(piece.first, at));
        }
        take_turns(turns, raw, piece.rows, &mut scratch.bytes);
        layout.write_data_at(file, piece.output, piece.at * row_len * dense.bytes(), raw)?;
        return Ok(raw.len() as u64);
    }
    let codec = |source| ConvertError::Codec {
        file: checkpoint.file_of(rows.weight.tensor).to_path_buf(),
        tensor: shown(rows.weight.name.as_bytes()),
        source,
    };
    let no_codec = || codec(QuantError::NoCodec { ty: tensor.ty });
    let row_bytes = tensor.ty.info().and_then(|info| info.row_bytes(row_len)).ok_or_else(no_codec)?;
    encoded.resize((row_bytes * piece.rows) as usize, 0);
    if change == ValueChange::Blocks {
        rows.to_blocks(tensor.ty, piece.first, raw, encoded, scratch)?;
        take_turns(turns, encoded, piece.rows, &mut scratch.bytes);
        layout.write_data_at(file, piece.output, piece.at * row_bytes, encoded)?;
        return Ok(encoded.len() as u64);
    }
    floats.resize((piece.rows * row_len) as usize, 0.0);
    rows.widen(piece.first, raw, floats)?;
    if let Some(at) = quant::first_non_finite(floats) {
        return Err(rows.non_finite(piece.first, at as u64));
    }
    // The reference computes in the source's own precision.
    let half = rows.dense() == Some(Dense::F16);
    let rounded = |value: f32| if half { f16_to_f32(f32_to_f16(value)) } else { value };
    match change {
        ValueChange::AddOne => floats.iter_mut().for_each(|value| *value = rounded(*value + 1.0)),
        ValueChange::MinusExp => floats.iter_mut().for_each(|value| *value = -rounded(exp(*value))),
        ValueChange::Keep | ValueChange::Blocks => {}
    }
    if let Some(turns) = turns {
        let copy = floats.clone();
        for (row, values) in copy.chunks(row_len as usize).zip(floats.chunks_mut(row_len as usize)) {
            turns.arrange(row, values);
        }
    }
    quant::quantize_rows(tensor.ty, floats, row_len as usize, None, encoded).map_err(codec)?;
    if tensor.ty != TensorType::F32 && quant::validate(tensor.ty, encoded).is_err() {
        return Err(too_large(&rows, piece, floats, tensor.ty));
    }
    layout.write_data_at(file, piece.output, piece.at * row_bytes, encoded)?;
    Ok(encoded.len() as u64)
}

/// Moves the columns of rows of bytes.
fn take_turns(turns: Option<Turns>, bytes: &mut [u8], rows: u64, copy: &mut Vec<u8>) {
    let Some(turns) = turns else { return };
    let row_bytes = bytes.len() / (rows as usize).max(1);
    copy.clear();
    copy.extend_from_slice(bytes);
    for (row, moved) in copy.chunks(row_bytes).zip(bytes.chunks_mut(row_bytes)) {
        turns.arrange(row, moved);
    }
}

/// `e` to the power of `x`, rounded once. The mathematical library behind the reference converter differs from this by
/// one unit in the last place for about one value in a hundred.
fn exp(x: f32) -> f32 {
    f64::from(x).exp() as f32
}

/// The largest value of a piece that its type cannot hold.
fn too_large(rows: &Rows, piece: &Piece, floats: &[f32], ty: TensorType) -> ConvertError {
    let largest = floats.iter().enumerate().max_by(|(_, a), (_, b)| a.abs().total_cmp(&b.abs()));
    let (at, value) = largest.map_or((0, 0.0), |(at, value)| (at as u64, *value));
    let row = piece.at + at / rows.row_len;
    rows.wrong(format!("holds {value} in row {row}, too large for {ty}; use --type bf16 or f32"))
}
