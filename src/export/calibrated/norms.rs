//! Norms that can take up factors of the columns of the matrices behind them.

use std::collections::{HashMap, HashSet};

use safetensors::tensor::Dtype;

use super::Job;
use super::model::Converted;
use crate::convert::places::Place;
use crate::convert::source::ReadBuffers;
use crate::export::ExportError;
use crate::moments::Input;
use crate::progress::Stop;
use crate::quant::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::rounding::grid::smooth;

/// Rows of each matrix that show what factors are worth.
const SAMPLED_ROWS: u64 = 128;

/// Inputs that do.
pub(super) const SAMPLED_INPUTS: usize = 256;

/// Parts of a layer, all of which read and write the stream of hidden states as in Llama: what stands in front of `attn_q`,
/// `attn_k` and `attn_v` is seen by them alone.
const ATTENTION: [&str; 9] = [
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "post_attention_norm",
    "post_ffw_norm",
];

/// The same for what stands in front of `ffn_gate` and `ffn_up`.
const NETWORK: [&str; 4] = ["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"];

/// A norm whose output only matrices that are rounded see.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    /// The folder's weight.
    weight: usize,
    /// The GGUF's matrices.
    matrices: Vec<String>,
}

/// Factors for the columns of matrices.
pub(super) struct Smoothing {
    /// The norm's weight.
    pub(super) norm: usize,
    /// Its bytes after division by them.
    pub(super) bytes: Vec<u8>,
    /// By which weights are multiplied; powers of two.
    pub(super) factors: Vec<f32>,
}

/// The norms of a model that may take up factors, by the first matrix behind each.
pub(super) fn find(converted: &Converted<'_>, jobs: &HashMap<String, Vec<(&Job, Place)>>) -> HashMap<String, Norm> {
    let mut layers: HashMap<u64, HashSet<&str>> = HashMap::new();
    for tensor in converted.gguf.tensors() {
        let mut parts = tensor.name.splitn(3, '.');
        if let (Some("blk"), Some(layer), Some(part)) = (parts.next(), parts.next(), parts.next())
            && let Ok(layer) = layer.parse()
        {
            layers.entry(layer).or_default().insert(part);
        }
    }
    let mut norms = HashMap::new();
    for (layer, parts) in &layers {
        // A layer without a norm before its network may compute both side by side.
        if !parts.contains("attn_norm.weight") || !parts.contains("ffn_norm.weight") {
            continue;
        }
        let stem = |part: &str| part.rsplit_once('.').map_or_else(|| part.to_owned(), |(stem, _)| stem.to_owned());
        let is_network = |part: &str| part.starts_with("ffn_");
        let knows = |of_network: bool, known: &[&str]| {
            parts.iter().filter(|part| is_network(part) == of_network).all(|part| known.contains(&stem(part).as_str()))
        };
        for (norm, behind, is_plain) in [
            ("attn_norm", &["attn_q", "attn_k", "attn_v"][..], knows(false, &ATTENTION)),
            ("ffn_norm", &["ffn_gate", "ffn_up"][..], knows(false, &ATTENTION) && knows(true, &NETWORK)),
        ] {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let matrices: Vec<String> = behind
                .iter()
                .filter(|part| parts.contains(format!("{part}.weight").as_str()))
                .map(|p| name(p))
                .collect();
            let has_bias = parts.contains(format!("{norm}.bias").as_str());
            let all_rounded = matrices.iter().all(|matrix| jobs.get(matrix).is_some_and(|jobs| jobs.len() == 1));
            if let (true, false, true, Some(weight), Some(first)) =
                (is_plain, has_bias, all_rounded, converted.vector(&name(norm)), matrices.first())
            {
                norms.insert(first.clone(), Norm { weight, matrices });
            }
        }
    }
    norms
}

impl Norm {
    /// Factors for the matrices behind it, where they are clearly better with some.
    ///
    /// # Errors
    /// When a matrix or the norm cannot be read.
    pub(super) fn smoothing(
        &self,
        converted: &Converted<'_>,
        jobs: &HashMap<String, Vec<(&Job, Place)>>,
        input: &Input,
        stop: &Stop,
    ) -> Result<Option<Smoothing>, ExportError> {
        let Some(sample) = &input.matrix(0).sample else { return Ok(None) };
        if self.matrices.iter().any(|matrix| !input.tensors.contains(matrix)) {
            return Ok(None);
        }
        let (mut rows, mut buffers) = (Vec::new(), ReadBuffers::default());
        let mut layout = None;
        for matrix in &self.matrices {
            let Some([(job, place)]) = jobs.get(matrix).map(Vec::as_slice) else { return Ok(None) };
            if place.order.is_some() || job.matrix.columns != input.n as u64 {
                return Ok(None);
            }
            layout = Some(job.layout);
            let count = SAMPLED_ROWS.min(job.matrix.rows);
            for at in 0..count {
                stop.check()?;
                let row = at * job.matrix.rows / count;
                converted.folder.read_rows(&job.matrix, row, 1, &mut buffers, &mut rows)?;
            }
        }
        let Some(exponents) = layout.and_then(|layout| smooth(layout, &rows, sample.rows(), input.n)) else {
            return Ok(None);
        };
        let (bytes, factors) = converted.divided(self.weight, &exponents)?;
        Ok(factors.iter().any(|factor| *factor != 1.0).then_some(Smoothing { norm: self.weight, bytes, factors }))
    }
}

/// Values of `bytes` divided by powers of two, and these powers: 1 where the quotient is no number of the type, or the type
/// is none of floats.
pub(super) fn divided(bytes: &[u8], dtype: Dtype, exponents: &[i8]) -> (Vec<u8>, Vec<f32>) {
    let (mut out, mut factors) = (bytes.to_vec(), vec![1.0f32; exponents.len()]);
    let width = match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        _ => return (out, factors),
    };
    for ((value, factor), exponent) in out.chunks_exact_mut(width).zip(&mut factors).zip(exponents) {
        let by = 2f32.powi(i32::from(*exponent));
        let half = u16::from_le_bytes([value[0], value[1]]);
        let old = match dtype {
            Dtype::F16 => f16_to_f32(half),
            Dtype::BF16 => bf16_to_f32(half),
            _ => f32::from_le_bytes([value[0], value[1], value[2], value[3]]),
        };
        let new = old / by;
        let (stored, bytes) = match dtype {
            Dtype::F16 => (f16_to_f32(f32_to_f16(new)), f32_to_f16(new).to_le_bytes().to_vec()),
            Dtype::BF16 => (bf16_to_f32(f32_to_bf16(new)), f32_to_bf16(new).to_le_bytes().to_vec()),
            _ => (new, new.to_le_bytes().to_vec()),
        };
        if stored * by == old {
            value.copy_from_slice(&bytes);
            *factor = by;
        }
    }
    (out, factors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_take_up_factors_exactly_or_not_at_all() {
        let halves = |values: &[u16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        // 1.5, the least normal number and infinity.
        let (bytes, factors) = divided(&halves(&[0x3e00, 0x0401, 0x7c00]), Dtype::F16, &[3, 2, 1]);
        assert_eq!(factors, [8.0, 1.0, 2.0]);
        assert_eq!(bytes, halves(&[0x3200, 0x0401, 0x7c00]));
        let (bytes, factors) = divided(&halves(&[0x3fc0, 0xbf80]), Dtype::BF16, &[-1, 0]);
        assert_eq!((bytes, factors), (halves(&[0x4040, 0xbf80]), vec![0.5, 1.0]));
        let (bytes, factors) = divided(&3f32.to_le_bytes(), Dtype::F32, &[1]);
        assert_eq!((bytes, factors), (1.5f32.to_le_bytes().to_vec(), vec![2.0]));
        assert_eq!(divided(&[3, 4], Dtype::I8, &[1, 1]), (vec![3, 4], vec![1.0, 1.0]));
    }
}
