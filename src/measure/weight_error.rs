//! E(tensor, type): the output error that rounding a tensor to a type makes, on a sample of its rows.
//!
//! With x the inputs of a weight matrix W (`[rows, row_len]`, row-major), the expected squared error of the outputs is
//! Σ_ij E\[x_j²\] (W − Ŵ)_ij² as long as the rounding errors of different columns are uncorrelated. E\[x_j²\] are the mean
//! squares of an imatrix. Rows are sampled, whole: the codecs round rows independently of each other, so a sampled row
//! has exactly the error that it will have in the file.

use rayon::prelude::*;
use thiserror::Error;

use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::quant::{self, QuantError};
use crate::rows::{self, RowError};

/// Weights per tensor that are rounded by default. 2^18 weights are 100 to 1000 rows, whose errors differ little: the
/// sum is certain to a few percent, while neighbouring types lie a factor of 1.3 to 4 apart.
pub const DEFAULT_SAMPLED_WEIGHTS: u64 = 1 << 18;

/// Weights that one task rounds: large enough to amortize the task, small enough to keep all threads busy.
const TASK_WEIGHTS: usize = 1 << 14;

/// Which rows of a large tensor are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Weights to round per tensor at most, in whole rows but at least one row of each matrix.
    pub weights: u64,
    /// Shifts the sample. The same seed gives the same rows.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { weights: DEFAULT_SAMPLED_WEIGHTS, seed: 0 }
    }
}

/// How much an error in each weight matters.
#[derive(Debug, Clone, Copy, Default)]
pub struct ColumnWeights<'a> {
    /// Mean squares of the inputs, `[matrices, row_len]` row-major: what the quantizer gets too. `None` is all ones,
    /// and rounding without importance.
    pub importance: Option<&'a [f32]>,
    /// A factor for each row, counted over all matrices: the share of tokens that an expert sees, or how often a token
    /// occurs for the rows of an embedding. Rounding does not depend on it. `None` is all ones.
    pub rows: Option<&'a [f64]>,
}

impl<'a> From<Option<&'a [f32]>> for ColumnWeights<'a> {
    fn from(importance: Option<&'a [f32]>) -> ColumnWeights<'a> {
        ColumnWeights { importance, rows: None }
    }
}

/// The error of one type in one tensor, scaled from the sampled rows to all rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowErrors {
    /// Σ r_i w_j (W − Ŵ)_ij² with row factors r and importance w.
    pub weighted_error: f64,
    /// Σ r_i w_j W_ij², of the same rows: the error of leaving the tensor out.
    pub weighted_norm: f64,
    /// Rows that were rounded.
    pub rows_sampled: u64,
    /// Rows of the tensor, over all matrices.
    pub rows: u64,
}

impl RowErrors {
    /// The error as a part of the norm; 0 for a tensor of zeros.
    pub fn relative(&self) -> f64 {
        if self.weighted_norm > 0.0 { self.weighted_error / self.weighted_norm } else { 0.0 }
    }
}

/// Why the errors of a tensor could not be measured.
#[derive(Debug, Error)]
pub enum WeightErrorProblem {
    /// Rows of the source could not be read.
    #[error(transparent)]
    Rows(#[from] RowError),
    /// Importance or row factors of another length.
    #[error("tensor {tensor}: {found} {what}, expected {expected}; they belong to another model")]
    Length {
        /// The tensor's name.
        tensor: String,
        /// `importance values` or `row factors`.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many the shape asks for.
        expected: u64,
    },
    /// A codec refused.
    #[error("tensor {tensor}: {source}")]
    Codec {
        /// The tensor's name.
        tensor: String,
        /// The codec's answer.
        source: QuantError,
    },
}

/// True if rows of `row_len` weights can be stored in the type: its block divides them.
pub fn fits_row(ty: TensorType, row_len: u64) -> bool {
    row_len > 0 && ty.info().is_some_and(|info| row_len.is_multiple_of(info.block_len as u64))
}

/// Measures the error of rounding `tensor` to each of `types`, in the order given. The result depends on nothing but
/// the arguments: not on the number of threads.
///
/// # Errors
/// When the tensor cannot be read or holds values that are not finite, a length disagrees, a type has no encoder, does
/// not fit the row length, or needs importance that is not given.
pub fn weight_errors(
    gguf: &Gguf,
    tensor: &TensorInfo,
    weights: ColumnWeights<'_>,
    types: &[TensorType],
    sampling: Sampling,
) -> Result<Vec<(TensorType, RowErrors)>, WeightErrorProblem> {
    check_lengths(tensor, weights)?;
    let sample = sample_rows(tensor, weights.rows, sampling);
    let row_len = tensor.row_len() as usize;
    let rows_per_task = (TASK_WEIGHTS / row_len.max(1)).max(1);
    let parts: Vec<Part> =
        sample.chunks(rows_per_task).map(|rows| read_part(gguf, tensor, weights, rows)).collect::<Result<_, _>>()?;
    let tasks: Vec<(TensorType, &Part)> = types.iter().flat_map(|ty| parts.iter().map(|part| (*ty, part))).collect();
    let errors: Vec<f64> = tasks
        .into_par_iter()
        .map(|(ty, part)| part.error(ty, row_len))
        .collect::<Result<_, _>>()
        .map_err(|source| WeightErrorProblem::Codec { tensor: tensor.shown_name(), source })?;
    let weighted_norm = parts.iter().map(|part| part.norm(row_len)).sum();
    let (rows_sampled, rows) = (sample.len() as u64, tensor.rows());
    Ok(types
        .iter()
        .enumerate()
        .map(|(at, ty)| {
            let weighted_error = errors[at * parts.len()..(at + 1) * parts.len()].iter().sum();
            (*ty, RowErrors { weighted_error, weighted_norm, rows_sampled, rows })
        })
        .collect())
}

fn check_lengths(tensor: &TensorInfo, weights: ColumnWeights<'_>) -> Result<(), WeightErrorProblem> {
    let check = |what, found: usize, expected: u64| {
        if found as u64 == expected {
            return Ok(());
        }
        Err(WeightErrorProblem::Length { tensor: tensor.shown_name(), what, found, expected })
    };
    if let Some(importance) = weights.importance {
        check("importance values", importance.len(), tensor.row_len().saturating_mul(tensor.matrices()))?;
    }
    if let Some(rows) = weights.rows {
        check("row factors", rows.len(), tensor.rows())?;
    }
    Ok(())
}

/// A row of the sample: its number over all matrices, and how many rows it stands for times its factor.
#[derive(Debug, Clone, Copy, PartialEq)]
struct SampledRow {
    row: u64,
    factor: f64,
}

/// Takes all rows, or a systematic sample: points at equal distances, shifted by the seed, on a line on which each row
/// has a stretch. Half of the line is divided equally, half by the row factors; so rare rows are seen, and the frequent
/// ones whose errors count most are all there. Dividing by the stretch makes the sums unbiased.
fn sample_rows(tensor: &TensorInfo, factors: Option<&[f64]>, sampling: Sampling) -> Vec<SampledRow> {
    let rows = tensor.rows();
    let factor = |row: u64| factors.map_or(1.0, |factors| factors[row as usize]);
    let wanted = (sampling.weights / tensor.row_len().max(1)).max(tensor.matrices()).max(1);
    if wanted >= rows {
        return (0..rows).map(|row| SampledRow { row, factor: factor(row) }).collect();
    }
    let total: f64 = factors.map_or(0.0, |factors| factors.iter().sum());
    let stretch = |row: u64| {
        let equal = 1.0 / rows as f64;
        if total > 0.0 { 0.5 * equal + 0.5 * factor(row) / total } else { equal }
    };
    let shift = unit_hash(sampling.seed, &tensor.name);
    if factors.is_none() {
        // Rounding errors of the sum below would make the sample of equal rows uneven.
        let row = |point: u64| (((point as f64 + shift) * rows as f64 / wanted as f64) as u64).min(rows - 1);
        let factor = rows as f64 / wanted as f64;
        return (0..wanted).map(|point| SampledRow { row: row(point), factor }).collect();
    }
    let mut sample: Vec<SampledRow> = Vec::with_capacity(wanted as usize);
    let (mut point, mut end) = (0, 0.0);
    for row in 0..rows {
        end += stretch(row);
        let mut hits = 0_u64;
        while point < wanted && (point as f64 + shift) / (wanted as f64) < end {
            (hits, point) = (hits + 1, point + 1);
        }
        if hits > 0 {
            let factor = factor(row) * hits as f64 / (wanted as f64 * stretch(row));
            sample.push(SampledRow { row, factor });
        }
    }
    sample
}

/// A number in [0, 1) from seed and name: splitmix64's finalizer over an FNV-1a hash.
fn unit_hash(seed: u64, name: &str) -> f64 {
    let hash = name
        .bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mixed = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Decoded rows of the sample, each with its matrix's importance.
struct Part<'a> {
    /// `[rows, row_len]`, row-major.
    values: Vec<f32>,
    rows: Vec<(SampledRow, Option<&'a [f32]>)>,
}

fn read_part<'a>(
    gguf: &Gguf,
    tensor: &TensorInfo,
    weights: ColumnWeights<'a>,
    sample: &[SampledRow],
) -> Result<Part<'a>, WeightErrorProblem> {
    let row_len = tensor.row_len() as usize;
    let mut values = vec![0.0; sample.len() * row_len];
    for (sampled, values) in sample.iter().zip(values.chunks_exact_mut(row_len.max(1))) {
        let data = gguf.read_rows(tensor, sampled.row, 1).map_err(RowError::from)?;
        rows::decode(tensor, sampled.row, &data, values)?;
    }
    let rows_per_matrix = tensor.rows_per_matrix().max(1);
    let of_row = |row: u64| {
        let first = (row / rows_per_matrix) as usize * row_len;
        weights.importance.map(|importance| &importance[first..first + row_len])
    };
    Ok(Part { values, rows: sample.iter().map(|sampled| (*sampled, of_row(sampled.row))).collect() })
}

impl Part<'_> {
    /// Σ r w (W − Ŵ)² over the rows of the part.
    fn error(&self, ty: TensorType, row_len: usize) -> Result<f64, QuantError> {
        let no_codec = QuantError::NoCodec { ty };
        let row_bytes = ty.info().and_then(|info| info.row_bytes(row_len as u64)).ok_or(no_codec)? as usize;
        let mut encoded = Vec::new();
        let mut decoded = vec![0.0; self.values.len()];
        let mut total = 0.0;
        // Rows of one matrix go to the encoder together: it may work on several at once.
        let mut first = 0;
        for rows in self.rows.chunk_by(|a, b| same_slice(a.1, b.1)) {
            let range = first * row_len..(first + rows.len()) * row_len;
            let (values, decoded) = (&self.values[range.clone()], &mut decoded[range]);
            encoded.clear();
            encoded.resize(rows.len() * row_bytes, 0);
            quant::quantize_rows(ty, values, row_len, rows[0].1, &mut encoded)?;
            quant::dequantize(ty, &encoded, decoded)?;
            let pairs = values.chunks_exact(row_len).zip(decoded.chunks_exact(row_len));
            for ((sampled, importance), (values, decoded)) in rows.iter().zip(pairs) {
                let squares = |j: usize| {
                    let error = f64::from(values[j]) - f64::from(decoded[j]);
                    error * error
                };
                // A type whose range the weights exceed gives infinite scales: never a choice.
                let error = weighted_sum(row_len, *importance, squares);
                total += sampled.factor * if error.is_finite() { error } else { f64::INFINITY };
            }
            first += rows.len();
        }
        Ok(total)
    }

    /// Σ r w W² over the rows of the part.
    fn norm(&self, row_len: usize) -> f64 {
        let rows = self.rows.iter().zip(self.values.chunks_exact(row_len.max(1)));
        rows.map(|((sampled, importance), values)| {
            sampled.factor * weighted_sum(row_len, *importance, |j| f64::from(values[j]) * f64::from(values[j]))
        })
        .sum()
    }
}

/// Σ_j w_j f(j) in double precision, in an order that vectors can follow: eight partial sums.
fn weighted_sum(len: usize, weights: Option<&[f32]>, value: impl Fn(usize) -> f64) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0; LANES];
    match weights {
        Some(weights) => {
            for (j, weight) in weights[..len].iter().enumerate() {
                lanes[j % LANES] += f64::from(*weight) * value(j);
            }
        }
        None => (0..len).for_each(|j| lanes[j % LANES] += value(j)),
    }
    lanes.iter().sum()
}

fn same_slice(a: Option<&[f32]>, b: Option<&[f32]>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gguf::testing::RawGguf;
    use crate::testing::Random;

    const ALL: Sampling = Sampling { weights: u64::MAX, seed: 0 };

    /// Values without a pattern in [-1, 1).
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        (0..len).map(|_| random.signed()).collect()
    }

    fn model(shape: &[u64], values: &[f32]) -> Gguf {
        Gguf::from_bytes(RawGguf::new().f32_tensor("w.weight", shape, values).build()).unwrap()
    }

    fn measure(gguf: &Gguf, weights: ColumnWeights, types: &[TensorType], sampling: Sampling) -> Vec<RowErrors> {
        let errors = weight_errors(gguf, &gguf.tensors()[0], weights, types, sampling).unwrap();
        errors.into_iter().map(|(_, errors)| errors).collect()
    }

    #[test]
    fn all_rows_give_the_error_of_the_whole_tensor() {
        let values = noise(40 * 256, 1);
        let importance: Vec<f32> = noise(256, 2).iter().map(|value| value.abs() + 0.01).collect();
        let gguf = model(&[256, 40], &values);
        for ty in [TensorType::Q4_K, TensorType::IQ2_XS, TensorType::Q8_0] {
            let mut encoded = vec![0; ty.info().unwrap().row_bytes(values.len() as u64).unwrap() as usize];
            quant::quantize_rows(ty, &values, 256, Some(&importance), &mut encoded).unwrap();
            let mut decoded = vec![0.0; values.len()];
            quant::dequantize(ty, &encoded, &mut decoded).unwrap();
            let terms = values.iter().zip(&decoded).enumerate();
            let expected: f64 =
                terms.map(|(at, (w, q))| f64::from(importance[at % 256]) * f64::from(w - q).powi(2)).sum();
            let found = measure(&gguf, Some(&importance[..]).into(), &[ty], ALL)[0];
            assert!((found.weighted_error / expected - 1.0).abs() < 1e-6, "{ty}: {found:?}, expected {expected}");
            assert_eq!((found.rows_sampled, found.rows), (40, 40));
        }
    }

    #[test]
    fn more_bits_make_less_error() {
        let gguf = model(&[256, 16], &noise(16 * 256, 3));
        let types = [TensorType::Q2_K, TensorType::Q3_K, TensorType::Q4_K, TensorType::Q5_K, TensorType::Q6_K];
        let errors = measure(&gguf, ColumnWeights::default(), &types, ALL);
        assert!(errors.windows(2).all(|pair| pair[0].relative() > 2.0 * pair[1].relative()), "{errors:?}");
        assert_eq!(measure(&gguf, ColumnWeights::default(), &[TensorType::F32], ALL)[0].weighted_error, 0.0);
    }

    #[test]
    fn a_sample_is_close_to_the_whole_and_repeatable() {
        let gguf = model(&[256, 512], &noise(512 * 256, 4));
        let types = [TensorType::Q3_K, TensorType::Q5_0];
        let whole = measure(&gguf, ColumnWeights::default(), &types, ALL);
        let sampling = Sampling { weights: 64 * 256, seed: 7 };
        let sampled = measure(&gguf, ColumnWeights::default(), &types, sampling);
        assert_eq!(sampled, measure(&gguf, ColumnWeights::default(), &types, sampling));
        for (whole, sampled) in whole.iter().zip(&sampled) {
            assert_eq!((sampled.rows_sampled, sampled.rows), (64, 512));
            assert!((sampled.weighted_error / whole.weighted_error - 1.0).abs() < 0.05, "{sampled:?} {whole:?}");
            assert!((sampled.weighted_norm / whole.weighted_norm - 1.0).abs() < 0.05, "{sampled:?} {whole:?}");
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_number_of_threads() {
        let gguf = model(&[512, 300], &noise(300 * 512, 5));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| measure(&gguf, ColumnWeights::default(), &[TensorType::Q4_K, TensorType::IQ4_XS], ALL))
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn every_expert_is_sampled_with_its_own_importance_and_share() {
        let values = noise(3 * 8 * 32, 6);
        let gguf = model(&[32, 8, 3], &values);
        let importance: Vec<f32> = [1.0, 4.0, 9.0].iter().flat_map(|value| [*value; 32]).collect();
        let rows: Vec<f64> = [0.5, 0.25, 0.0].iter().flat_map(|share| [*share; 8]).collect();
        let weights = ColumnWeights { importance: Some(&importance), rows: Some(&rows) };
        let found = measure(&gguf, weights, &[TensorType::Q4_0], ALL)[0];
        let norm: f64 =
            values.iter().enumerate().map(|(at, w)| [0.5, 1.0, 0.0][at / 256] * f64::from(*w).powi(2)).sum();
        assert!((found.weighted_norm / norm - 1.0).abs() < 1e-6);
        let few = Sampling { weights: 1, seed: 0 };
        assert_eq!(measure(&gguf, Some(&importance[..]).into(), &[TensorType::Q4_0], few)[0].rows_sampled, 3);
    }

    #[test]
    fn frequent_rows_are_always_in_the_sample() {
        let gguf = model(&[32, 1000], &noise(32 * 1000, 8));
        // As words of a language: row r has frequency 1 / (r + 1).
        let rows: Vec<f64> = (0..1000).map(|row| 1.0 / f64::from(row + 1)).collect();
        let sample = sample_rows(&gguf.tensors()[0], Some(&rows), Sampling { weights: 64 * 32, seed: 1 });
        assert_eq!(sample[0].row, 0);
        let weights = ColumnWeights { importance: None, rows: Some(&rows) };
        let whole = measure(&gguf, weights, &[TensorType::Q4_0], ALL)[0];
        let sampled = measure(&gguf, weights, &[TensorType::Q4_0], Sampling { weights: 100 * 32, seed: 1 })[0];
        assert!((sampled.weighted_error / whole.weighted_error - 1.0).abs() < 0.1, "{sampled:?} {whole:?}");
    }

    #[test]
    fn wrong_lengths_and_bad_weights_are_refused() {
        let gguf = model(&[32, 2], &[1.0; 64]);
        let tensor = &gguf.tensors()[0];
        let refused = |gguf: &Gguf, weights, ty| {
            weight_errors(gguf, &gguf.tensors()[0], weights, &[ty], ALL).unwrap_err().to_string()
        };
        assert!(refused(&gguf, Some(&[1.0; 31][..]).into(), TensorType::Q4_0).contains("31 importance values"));
        let weights = ColumnWeights { importance: None, rows: Some(&[1.0; 3]) };
        assert!(refused(&gguf, weights, TensorType::Q4_0).contains("3 row factors"));
        assert!(refused(&gguf, ColumnWeights::default(), TensorType::Q4_K).contains("w.weight"));
        assert!(!fits_row(TensorType::Q4_K, tensor.row_len()) && fits_row(TensorType::Q4_0, tensor.row_len()));
        let broken = model(&[32, 1], &[f32::NAN; 32]);
        assert!(refused(&broken, ColumnWeights::default(), TensorType::Q4_0).contains("weight 0 is NaN"));
    }

    proptest! {
        #[test]
        fn sampled_factors_sum_to_those_of_all_rows(
            rows in 1_u64..2000, wanted in 1_u64..200, seed: u64, weighted: bool,
        ) {
            let tensor = TensorInfo {
                name: "w".into(), shape: vec![32, rows], ty: TensorType::F32, offset: 0, bytes: None, shard: 0,
            };
            let factors: Option<Vec<f64>> =
                weighted.then(|| (0..rows).map(|row| unit_hash(seed, &row.to_string()) + 0.5).collect());
            let sampling = Sampling { weights: wanted * 32, seed };
            let sample = sample_rows(&tensor, factors.as_deref(), sampling);
            prop_assert!(sample.len() as u64 <= wanted.min(rows));
            prop_assert!(sample.windows(2).all(|pair| pair[0].row < pair[1].row));
            let all = factors.map_or(rows as f64, |factors| factors.iter().sum());
            let sum: f64 = sample.iter().map(|sampled| sampled.factor).sum();
            // Exact for equal rows; for others the factor over the stretch is bounded by two.
            let fits = if weighted { sum < 2.1 * all && sum > 0.4 * all } else { (sum / all - 1.0).abs() < 1e-9 };
            prop_assert!(fits, "{sum} of {all}");
        }
    }
}
