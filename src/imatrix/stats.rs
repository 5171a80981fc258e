//! Statistics of an importance matrix: the columns of llama-imatrix `--show-statistics`.
//!
//! With a = Σx² / count, the mean square of one input column, over all N columns (of all matrices with data):
//!
//! | column | formula |
//! |---|---|
//! | Σ(Act²), min, max, μ | Σa, min a, max a, Σa / N |
//! | σ | sqrt(max(0, Σa²/N − μ²)) |
//! | % active | share of a > 1e-5 |
//! | entropy, E (norm) | −Σ p·log2 p with p = a / Σa; the same over log2 N |
//! | ZD | share of (a − μ) / σ > 1 |
//! | CosSim | cosine of Σx² with that of the same tensor one block before, 0 without such a tensor |
//!
//! All sums run in f32 from the first value to the last, like the reference's: for large expert tensors a more
//! precise sum would show other digits than it does.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::{DEFAULT_CHUNK_SIZE, Entry, Form, Imatrix};
use crate::recipe::roles::find_block;

/// Mean squares up to here count as inactive.
const INACTIVE: f32 = 1e-5;

/// Order of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SortBy {
    /// Largest Σ(Act²) first.
    #[default]
    Importance,
    /// By role, then by Σ(Act²): the order of llama-imatrix.
    Role,
    /// By layer, then by role; tensors outside of layers last.
    Layer,
}

/// Statistics of one entry.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorStats {
    /// Weight name.
    pub name: String,
    /// Block number, if the name has one.
    pub layer: Option<u64>,
    /// Part of the name before `.weight`, such as `ffn_down`; the whole name without that part.
    pub role: String,
    /// Σ(Act²): sum of the mean squares over all columns.
    pub sum_act2: f32,
    /// Smallest mean square.
    pub min: f32,
    /// Largest mean square.
    pub max: f32,
    /// Mean of the mean squares.
    pub mean: f32,
    /// Their standard deviation.
    pub deviation: f32,
    /// Share of columns above 1e-5, from 0 to 1.
    pub active: f32,
    /// Number of columns, N.
    pub columns: usize,
    /// Entropy of the distribution over columns, in bits.
    pub entropy: f32,
    /// Entropy over its largest possible value, from 0 to 1.
    pub entropy_normalized: f32,
    /// Share of columns more than one deviation above the mean, from 0 to 1.
    pub z_share: f32,
    /// Cosine similarity with the same tensor of the previous block; 0 if there is none.
    pub cosine: f32,
}

/// Means over the tensors of one block, weighted by their columns.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerStats {
    /// Block number.
    pub layer: u64,
    /// Mean of Σ(Act²).
    pub sum_act2: f32,
    /// Mean share of columns with z > 1, from 0 to 1.
    pub z_share: f32,
    /// Mean cosine similarity with the previous block.
    pub cosine: f32,
    /// Columns of all its tensors together.
    pub columns: usize,
}

/// Statistics of a whole imatrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImatrixStats {
    /// Per entry with data.
    pub tensors: Vec<TensorStats>,
    /// Per block.
    pub layers: Vec<LayerStats>,
    /// Entries in which no token reached any matrix; they have no statistics.
    pub without_data: Vec<String>,
}

impl ImatrixStats {
    /// Computes all statistics, sorted by `sort`; layers follow the same order.
    pub fn new(imatrix: &Imatrix, sort: SortBy) -> ImatrixStats {
        // The reference turns legacy entries into token counts first; the quotients can differ in the last digit.
        let imatrix = match imatrix.form {
            Form::Gguf => Cow::Borrowed(imatrix),
            Form::Dat => Cow::Owned(imatrix.counted(DEFAULT_CHUNK_SIZE)),
        };
        let mut tensors = Vec::with_capacity(imatrix.entries.len());
        let mut without_data = Vec::new();
        for (name, entry) in &imatrix.entries {
            match tensor_stats(name, entry) {
                Some(mut stats) => {
                    stats.cosine = previous_block(name).and_then(|previous| imatrix.entries.get(&previous)).map_or(
                        0.0,
                        |previous| if previous.is_empty() { 0.0 } else { cosine(&entry.sums, &previous.sums) },
                    );
                    tensors.push(stats);
                }
                None => without_data.push(name.clone()),
            }
        }
        // Layer means are summed in the reference's order.
        tensors.sort_by(by_role);
        let mut layers = layer_stats(&tensors);
        match sort {
            SortBy::Role => {}
            SortBy::Importance => {
                tensors.sort_by(|a, b| b.sum_act2.total_cmp(&a.sum_act2).then_with(|| natural(a, b)));
                layers.sort_by(|a, b| b.sum_act2.total_cmp(&a.sum_act2).then(a.layer.cmp(&b.layer)));
            }
            SortBy::Layer => tensors.sort_by(natural),
        }
        ImatrixStats { tensors, layers, without_data }
    }
}

fn by_role(a: &TensorStats, b: &TensorStats) -> Ordering {
    a.role.cmp(&b.role).then_with(|| b.sum_act2.total_cmp(&a.sum_act2)).then_with(|| natural(a, b))
}

fn natural(a: &TensorStats, b: &TensorStats) -> Ordering {
    let layer = |stats: &TensorStats| stats.layer.map_or((1, 0), |layer| (0, layer));
    layer(a).cmp(&layer(b)).then_with(|| a.role.cmp(&b.role)).then_with(|| a.name.cmp(&b.name))
}

/// Block number and role of a weight name (`process_tensor_name`).
fn layer_and_role(name: &str) -> (Option<u64>, &str) {
    let parts: Vec<&str> = name.split('.').collect();
    let block = parts.iter().position(|&part| part == "blk").and_then(|at| parts.get(at + 1));
    let weight = parts.iter().skip(1).position(|&part| part == "weight").map(|at| parts[at]);
    let role = weight.filter(|role| !role.is_empty()).unwrap_or(name);
    (block.and_then(|block| block.parse().ok()), role)
}

/// The name with its block number less one.
fn previous_block(name: &str) -> Option<String> {
    let (block, digits) = find_block(name)?;
    Some(format!("{}{}{}", &name[..digits.start], block.checked_sub(1)?, &name[digits.end..]))
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return 0.0;
    }
    let cosine = dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt());
    if cosine.is_finite() { cosine } else { 0.0 }
}

fn tensor_stats(name: &str, entry: &Entry) -> Option<TensorStats> {
    let mut mean_squares: Vec<f32> = Vec::with_capacity(entry.sums.len());
    for (sums, &count) in entry.sums.chunks_exact(entry.row_len().max(1)).zip(&entry.counts) {
        if count > 0 {
            mean_squares.extend(sums.iter().map(|sum| sum / count as f32));
        }
    }
    if mean_squares.is_empty() {
        return None;
    }
    let columns = mean_squares.len();
    let n = columns as f32;
    let total = mean_squares.iter().fold(0.0f32, |sum, a| sum + a);
    let mean = total / n;
    let variance = dot(&mean_squares, &mean_squares) / n - mean * mean;
    let deviation = variance.max(0.0).sqrt();
    let inactive = mean_squares.iter().filter(|a| a.abs() <= INACTIVE).count();
    let mut entropy = 0.0f32;
    if total > 0.0 {
        for p in mean_squares.iter().map(|a| a / total).filter(|&p| p > 0.0) {
            entropy -= p * p.log2();
        }
    }
    let outliers =
        if deviation > 0.0 { mean_squares.iter().filter(|&a| (a - mean) / deviation > 1.0).count() } else { 0 };
    let (layer, role) = layer_and_role(name);
    Some(TensorStats {
        name: name.to_owned(),
        layer,
        role: role.to_owned(),
        sum_act2: total,
        min: mean_squares.iter().copied().fold(f32::INFINITY, f32::min),
        max: mean_squares.iter().copied().fold(0.0, f32::max),
        mean,
        deviation,
        active: 1.0 - inactive as f32 / n,
        columns,
        entropy,
        entropy_normalized: if columns > 1 { (f64::from(entropy) / (columns as f64).log2()) as f32 } else { 0.0 },
        z_share: outliers as f32 / n,
        cosine: 0.0,
    })
}

fn layer_stats(tensors: &[TensorStats]) -> Vec<LayerStats> {
    let mut layers: BTreeMap<u64, LayerStats> = BTreeMap::new();
    for tensor in tensors {
        let Some(layer) = tensor.layer else { continue };
        let empty = LayerStats { layer, sum_act2: 0.0, z_share: 0.0, cosine: 0.0, columns: 0 };
        let stats = layers.entry(layer).or_insert(empty);
        let weight = tensor.columns as f32;
        stats.sum_act2 += weight * tensor.sum_act2;
        stats.z_share += weight * tensor.z_share;
        stats.cosine += weight * tensor.cosine;
        stats.columns += tensor.columns;
    }
    for stats in layers.values_mut() {
        let weight = stats.columns as f32;
        stats.sum_act2 /= weight;
        stats.z_share /= weight;
        stats.cosine /= weight;
    }
    layers.into_values().collect()
}

impl ImatrixStats {
    /// Mean square per role and block, for plots: roles in alphabetical order, blocks ascending.
    pub(super) fn by_role_and_layer(&self) -> (Vec<u64>, BTreeMap<&str, HashMap<u64, f32>>) {
        let mut roles: BTreeMap<&str, HashMap<u64, f32>> = BTreeMap::new();
        let mut layers: Vec<u64> = Vec::new();
        for tensor in &self.tensors {
            if let Some(layer) = tensor.layer {
                roles.entry(&tensor.role).or_default().insert(layer, tensor.mean);
                layers.push(layer);
            }
        }
        layers.sort_unstable();
        layers.dedup();
        (layers, roles)
    }
}
