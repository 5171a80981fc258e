//! Hidden states at the boundaries of all layers, in 16 bits, in memory or in files.
//!
//! A row per token: for each of its parts (the stream, then keys and values that later layers need) a 32-bit scale and binary16
//! numbers, so that neither large nor small streams leave the range of these. States are the same whether they lie in memory or
//! in files.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use crate::model::{HiddenStates, Model, TokenGroup};
use crate::moments::MomentsError;
use crate::os;

/// Largest binary16 number that scales aim at: far from infinity.
const LARGEST: f32 = 16_384.0;

/// Bytes of a scale.
const SCALE_BYTES: usize = 4;

/// Where the states that enter one layer lie.
enum Boundary {
    Memory(Vec<u8>),
    File(PathBuf, File),
}

/// The states that enter each layer, and those that leave the last one, of all tokens.
pub(super) struct States {
    /// Folder for files; `None` where all stay in memory.
    folder: Option<PathBuf>,
    tokens: usize,
    boundaries: Vec<Option<Boundary>>,
}

impl States {
    /// Room for those of `tokens` tokens: in memory if they take at most `memory` bytes, else in files in `folder`, which must
    /// be there.
    ///
    /// # Errors
    /// When there is no space for the files.
    pub(super) fn new(model: &Model<'_>, tokens: usize, folder: &Path, memory: u64) -> Result<States, MomentsError> {
        let layers = model.n_layer();
        let needed: u64 = (0..=layers).map(|layer| row_bytes(&widths(model, layer)) as u64 * tokens as u64).sum();
        let folder = (needed > memory).then(|| folder.to_path_buf());
        if let Some(folder) = &folder
            && let Some(free) = os::free_space(folder)
            && free < needed
        {
            let problem = format!(
                "has {free} bytes free, and hidden states of {tokens} tokens need {needed}; take fewer tokens or another folder"
            );
            return Err(MomentsError::States { path: folder.clone(), problem });
        }
        Ok(States { folder, tokens, boundaries: (0..=layers).map(|_| None).collect() })
    }

    /// Keeps the states of a group that enter its next layer; its first token is number `first` of all.
    pub(super) fn write(&mut self, model: &Model<'_>, first: usize, states: &HiddenStates) -> Result<(), MomentsError> {
        let layer = states.next_layer();
        let widths = widths(model, layer);
        let row_bytes = row_bytes(&widths);
        let rows = encode(&widths, states);
        if self.boundaries[layer].is_none() {
            self.boundaries[layer] = Some(self.open(layer, row_bytes)?);
        }
        match &mut self.boundaries[layer] {
            Some(Boundary::Memory(bytes)) => bytes[first * row_bytes..][..rows.len()].copy_from_slice(&rows),
            Some(Boundary::File(path, file)) => os::write_all_at(file, &rows, (first * row_bytes) as u64)
                .map_err(|source| io_error(path, "cannot write hidden states", source))?,
            None => {}
        }
        Ok(())
    }

    fn open(&self, layer: usize, row_bytes: usize) -> Result<Boundary, MomentsError> {
        let Some(folder) = &self.folder else { return Ok(Boundary::Memory(vec![0; self.tokens * row_bytes])) };
        let path = folder.join(format!("gradient-states-{layer:04}"));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|source| io_error(&path, "cannot make it", source))?;
        Ok(Boundary::File(path, file))
    }

    /// The states of `group` that enter `layer`, where they were kept.
    pub(super) fn read(
        &self,
        model: &Model<'_>,
        layer: usize,
        first: usize,
        group: &Arc<TokenGroup>,
    ) -> Result<HiddenStates, MomentsError> {
        let widths = widths(model, layer);
        let row_bytes = row_bytes(&widths);
        let mut bytes = Vec::new();
        let rows = match &self.boundaries[layer] {
            Some(Boundary::Memory(all)) => &all[first * row_bytes..][..group.len() * row_bytes],
            Some(Boundary::File(path, file)) => {
                bytes.resize(group.len() * row_bytes, 0);
                os::read_exact_at(file, &mut bytes, (first * row_bytes) as u64)
                    .map_err(|source| io_error(path, "cannot read hidden states", source))?;
                &bytes
            }
            None => {
                let path = PathBuf::from(format!("states of layer {layer}"));
                return Err(MomentsError::States { path, problem: "were not kept; this is a bug".to_owned() });
            }
        };
        let values = decode(&widths, rows);
        let n_embd = model.hparams().n_embd;
        Ok(HiddenStates::from_parts(group.clone(), layer, n_embd, &model.kept_widths(layer), values)?)
    }

    /// Forgets the states that enter `layer`.
    pub(super) fn remove(&mut self, layer: usize) {
        if let Some(Boundary::File(path, file)) = self.boundaries[layer].take() {
            drop(file);
            // A file that stays costs space and nothing else.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for States {
    fn drop(&mut self) {
        (0..self.boundaries.len()).for_each(|layer| self.remove(layer));
    }
}

fn io_error(path: &Path, action: &'static str, source: std::io::Error) -> MomentsError {
    MomentsError::Io { path: path.to_path_buf(), action, source }
}

/// Values of each part of a token's row.
fn widths(model: &Model<'_>, layer: usize) -> Vec<usize> {
    let kept = model.kept_widths(layer).into_iter().flat_map(|kept| [kept.keys, kept.values]);
    std::iter::once(model.hparams().n_embd).chain(kept).collect()
}

fn row_bytes(widths: &[usize]) -> usize {
    widths.iter().map(|width| SCALE_BYTES + 2 * width).sum()
}

fn encode(widths: &[usize], states: &HiddenStates) -> Vec<u8> {
    let row_len: usize = widths.iter().sum();
    let mut values = Vec::with_capacity(states.group().len() * row_len);
    let gathered: Result<(), std::convert::Infallible> = states.parts(|part| {
        values.extend_from_slice(part);
        Ok(())
    });
    let Ok(()) = gathered;
    let mut bytes = vec![0; states.group().len() * row_bytes(widths)];
    bytes.par_chunks_mut(row_bytes(widths)).zip(values.par_chunks(row_len)).for_each(|(mut bytes, mut values)| {
        for &width in widths {
            let (part, rest) = values.split_at(width);
            let (target, tail) = bytes.split_at_mut(SCALE_BYTES + 2 * width);
            encode_part(part, target);
            (values, bytes) = (rest, tail);
        }
    });
    bytes
}

fn encode_part(values: &[f32], target: &mut [u8]) {
    let largest = values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    // A power of two, so that the scale itself rounds nothing.
    let scale = if largest > 0.0 { (largest / LARGEST).log2().ceil().max(-120.0).exp2() } else { 1.0 };
    let (of_scale, of_values) = target.split_at_mut(SCALE_BYTES);
    of_scale.copy_from_slice(&scale.to_le_bytes());
    for (target, value) in of_values.chunks_exact_mut(2).zip(values) {
        target.copy_from_slice(&f16::from_f32(value / scale).to_le_bytes());
    }
}

fn decode(widths: &[usize], rows: &[u8]) -> Vec<f32> {
    let row_len: usize = widths.iter().sum();
    let mut values = vec![0.0; rows.len() / row_bytes(widths) * row_len];
    values.par_chunks_mut(row_len).zip(rows.par_chunks(row_bytes(widths))).for_each(|(mut values, mut bytes)| {
        for &width in widths {
            let (target, rest) = values.split_at_mut(width);
            let (of_scale, tail) = bytes.split_at(SCALE_BYTES);
            let (of_values, tail) = tail.split_at(2 * width);
            let scale = f32::from_le_bytes(of_scale.try_into().unwrap_or_default());
            for (value, bytes) in target.iter_mut().zip(of_values.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32() * scale;
            }
            (values, bytes) = (rest, tail);
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_to_eleven_bits_whatever_their_size() {
        let widths = [5, 2];
        for size in [1e-30f32, 1e-3, 1.0, 3e7] {
            let row: Vec<f32> = [1.0, -0.3, 0.0, 0.01, 0.77, 500.0, -2.0].iter().map(|x| x * size).collect();
            let group = Arc::new(TokenGroup::from_sequences([[0u32]]));
            let kept = [crate::model::KeptWidths { layer: 0, keys: 1, values: 1 }];
            let states = HiddenStates::from_parts(group, 1, 5, &kept, row.clone()).unwrap();
            // Three parts here: keys and values have a scale each.
            let widths = [widths[0], 1, 1];
            let back = decode(&widths, &encode(&widths, &states));
            for (back, value) in back.iter().zip(&row) {
                assert!((back - value).abs() <= value.abs() * 2f32.powi(-11), "{back} {value}");
            }
        }
    }
}
