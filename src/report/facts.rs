//! What the files alone tell: sizes, types per layer, rounding errors of the tensors.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::ReportError;
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::progress::{Stop, Unit, Watch};
use crate::quant;
use crate::recipe::roles::split_block;

/// Weights of one tensor that are decoded at once, per thread.
const CHUNK_WEIGHTS: u64 = 1 << 18;

/// Bytes of a decoded weight, as progress counts them.
const COMPARED_BYTES: u64 = 4;

/// A file and its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileFacts {
    /// Name to show: the file's name without its folder, or the path where names alone are not unique.
    pub file: String,
    /// Size on disk of all parts together, in bytes, metadata included.
    pub size_bytes: u64,
    /// Bits of tensor data per parameter, over all tensors; metadata do not count.
    pub bits_per_weight: f64,
    /// Tensors of two and more dimensions, in the order of the file.
    pub tensors: Vec<TensorFacts>,
}

/// A tensor's name and type.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorFacts {
    /// Name of the tensor in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Type as publishers write it: `Q4_K`, `IQ3_XXS`.
    #[serde(rename = "type")]
    pub ty: String,
    /// Bits per weight of the type, scales included; `None` for unknown types.
    pub bits_per_weight: Option<f64>,
}

/// Error of a tensor against the base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    /// Name of the tensor in both files.
    pub name: String,
    /// Type in the quantized file, as publishers write it: `Q4_K`, `IQ3_XXS`.
    #[serde(rename = "type")]
    pub ty: String,
    /// `sqrt(sum (q - w)^2 / sum w^2)` over the tensor's weights, a ratio: 0 where nothing differs, `None` where the
    /// base is all zero and the other is not, or the ratio is not finite.
    pub relative_error: Option<f64>,
}

impl FileFacts {
    /// Looks at a file; `name` is what to show.
    pub fn new(name: &str, gguf: &Gguf) -> FileFacts {
        FileFacts {
            file: name.to_owned(),
            size_bytes: gguf.file_bytes(),
            bits_per_weight: gguf.totals().bits_per_weight(),
            tensors: gguf.tensors().iter().filter(|t| t.rows() > 1).map(TensorFacts::new).collect(),
        }
    }
}

impl TensorFacts {
    fn new(tensor: &TensorInfo) -> TensorFacts {
        TensorFacts {
            name: tensor.name.clone(),
            ty: type_name(tensor.ty),
            bits_per_weight: tensor.ty.info().map(|info| info.bits_per_weight()),
        }
    }
}

/// As publishers write it: `Q4_K`, `IQ3_XXS`.
fn type_name(ty: TensorType) -> String {
    ty.to_string().to_ascii_uppercase()
}

/// Things of tensors arranged by layer and role: `blk.3.attn_q.weight` stands in column 3 of row `attn_q`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerGrid<T> {
    /// Roles in order of appearance.
    pub roles: Vec<String>,
    /// Number of layers.
    pub layers: usize,
    /// `[roles][layers]`.
    pub cells: Vec<Vec<Option<T>>>,
    /// Tensors outside of the layers, with their full names.
    pub others: Vec<(String, T)>,
}

/// Most layers of a grid: names are foreign, and blk.999999999 must not make a grid of that width.
const MOST_LAYERS: usize = 2000;

impl<T> LayerGrid<T> {
    /// Arranges pairs of tensor name and thing.
    pub(super) fn new<'n>(items: impl IntoIterator<Item = (&'n str, T)>) -> LayerGrid<T> {
        let mut grid = LayerGrid { roles: Vec::new(), layers: 0, cells: Vec::new(), others: Vec::new() };
        for (name, thing) in items {
            let Some((layer, role)) = place(name) else {
                grid.others.push((name.to_owned(), thing));
                continue;
            };
            let row = grid.roles.iter().position(|known| known == role).unwrap_or_else(|| {
                grid.roles.push(role.to_owned());
                grid.cells.push(Vec::new());
                grid.roles.len() - 1
            });
            let cells = &mut grid.cells[row];
            if cells.len() <= layer {
                cells.resize_with(layer + 1, || None);
            }
            cells[layer] = Some(thing);
            grid.layers = grid.layers.max(layer + 1);
        }
        for row in &mut grid.cells {
            row.resize_with(grid.layers, || None);
        }
        grid
    }
}

/// Layer and role of a tensor name.
fn place(name: &str) -> Option<(usize, &str)> {
    let (layer, role) = split_block(name)?;
    let layer = usize::try_from(layer).ok().filter(|&layer| layer < MOST_LAYERS)?;
    Some((layer, role.strip_suffix(".weight").unwrap_or(role)))
}

/// Errors of each file's tensors against the base: of all tensors of two and more dimensions that both have, in the order of
/// the file. Rows are decoded a few at a time; nothing of any file stays in memory.
///
/// # Errors
/// When a shape differs, a type cannot be decoded, or `watch` stopped it.
pub fn tensor_errors(base: &Gguf, files: &[&Gguf], watch: &dyn Watch) -> Result<Vec<Vec<TensorError>>, ReportError> {
    let stop = watch.stop();
    let errors = tensor_errors_until(base, files, watch, &stop);
    stop.end();
    errors
}

/// As [`tensor_errors`], until `stop` is requested.
pub(super) fn tensor_errors_until(
    base: &Gguf,
    files: &[&Gguf],
    watch: &dyn Watch,
    stop: &Stop,
) -> Result<Vec<Vec<TensorError>>, ReportError> {
    let weights = files.iter().map(|file| file.totals().parameters).fold(0, u64::saturating_add);
    watch.begin("comparing tensors", weights.saturating_mul(COMPARED_BYTES), Unit::Bytes);
    let errors = files.iter().map(|file| errors_of(base, file, watch, stop)).collect();
    watch.end();
    errors
}

fn errors_of(base: &Gguf, file: &Gguf, watch: &dyn Watch, stop: &Stop) -> Result<Vec<TensorError>, ReportError> {
    let mut errors = Vec::new();
    for tensor in file.tensors().iter().filter(|tensor| tensor.rows() > 1) {
        let Some(original) = base.tensor(&tensor.name) else { continue };
        if original.shape != tensor.shape {
            return Err(ReportError::Shape {
                file: file.label().to_owned(),
                tensor: tensor.shown_name(),
                found: tensor.shape_text(),
                expected: original.shape_text(),
            });
        }
        let relative_error = relative_error(base, original, file, tensor)?;
        errors.push(TensorError { name: tensor.name.clone(), ty: type_name(tensor.ty), relative_error });
        base.release(original);
        file.release(tensor);
        watch.advance(tensor.elements().saturating_mul(COMPARED_BYTES), &tensor.name);
        stop.check()?;
    }
    Ok(errors)
}

fn relative_error(
    base: &Gguf,
    original: &TensorInfo,
    file: &Gguf,
    tensor: &TensorInfo,
) -> Result<Option<f64>, ReportError> {
    let rows = tensor.rows();
    let per_chunk = (CHUNK_WEIGHTS / tensor.row_len().max(1)).max(1);
    let chunks: Vec<u64> = (0..rows.div_ceil(per_chunk)).collect();
    // Sums of chunks are added in the order of the file, whatever thread made them.
    let sums: Result<Vec<(f64, f64)>, ReportError> = chunks
        .par_iter()
        .map(|&chunk| {
            let first = chunk * per_chunk;
            let count = per_chunk.min(rows - first);
            let weights = decoded(base, original, first, count)?;
            let rounded = decoded(file, tensor, first, count)?;
            let error: f64 = weights.iter().zip(&rounded).map(|(w, q)| (f64::from(*q) - f64::from(*w)).powi(2)).sum();
            let power: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
            Ok((error, power))
        })
        .collect();
    let (error, power) = sums?.into_iter().fold((0.0, 0.0), |(a, b), (error, power)| (a + error, b + power));
    Ok(match (error, power) {
        (0.0, _) => Some(0.0),
        (_, 0.0) => None,
        _ => Some((error / power).sqrt()).filter(|ratio| ratio.is_finite()),
    })
}

fn decoded(gguf: &Gguf, tensor: &TensorInfo, first: u64, count: u64) -> Result<Vec<f32>, ReportError> {
    let data = gguf.read_rows(tensor, first, count)?;
    // The data exist in the file, so their weights can be counted in memory.
    let mut weights = vec![0.0; (count * tensor.row_len()) as usize];
    quant::dequantize(tensor.ty, &data, &mut weights).map_err(|source| ReportError::Decode {
        file: gguf.label().to_owned(),
        tensor: tensor.shown_name(),
        source,
    })?;
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::gguf::testing::RawGguf;

    fn file(ty: TensorType, values: &[f32], rows: u64) -> Gguf {
        let row_len = values.len() as u64 / rows;
        let mut data = vec![0; (ty.info().unwrap().row_bytes(row_len).unwrap() * rows) as usize];
        quant::quantize_rows(ty, values, row_len as usize, None, &mut data).unwrap();
        let raw = RawGguf::new().str("general.architecture", "llama");
        Gguf::from_bytes(raw.tensor("blk.0.attn_q.weight", &[row_len, rows], ty, &data).build()).unwrap()
    }

    /// Asks at once.
    struct Stopped;

    impl Watch for Stopped {
        fn stop(&self) -> Stop {
            Stop::when(Arc::new(AtomicBool::new(true)))
        }
    }

    #[test]
    fn relative_error_follows_its_definition() {
        let values: Vec<f32> = (0..64 * 32).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let base = file(TensorType::F32, &values, 32);
        let rounded = file(TensorType::Q4_0, &values, 32);
        let errors = &tensor_errors(&base, &[&rounded], &()).unwrap()[0];
        let mut decoded = vec![0.0; values.len()];
        quant::dequantize(TensorType::Q4_0, rounded.data(&rounded.tensors()[0]).unwrap(), &mut decoded).unwrap();
        let sum = |f: &dyn Fn(usize) -> f64| (0..values.len()).map(f).sum::<f64>();
        let expected =
            (sum(&|i| f64::from(decoded[i] - values[i]).powi(2)) / sum(&|i| f64::from(values[i]).powi(2))).sqrt();
        assert_eq!((errors.len(), errors[0].ty.as_str()), (1, "Q4_0"));
        assert!((errors[0].relative_error.unwrap() / expected - 1.0).abs() < 1e-4);
        assert_eq!(tensor_errors(&base, &[&base], &()).unwrap()[0][0].relative_error, Some(0.0));
        assert!(matches!(tensor_errors(&base, &[&rounded], &Stopped), Err(ReportError::Interrupted(_))));
    }

    #[test]
    fn other_shapes_are_refused_and_zeros_have_no_ratio() {
        let zeros = file(TensorType::F32, &[0.0; 64], 2);
        let ones = file(TensorType::F32, &[1.0; 64], 2);
        assert_eq!(tensor_errors(&zeros, &[&ones], &()).unwrap()[0][0].relative_error, None);
        let other = file(TensorType::F32, &[1.0; 96], 3);
        let error = tensor_errors(&zeros, &[&other], &()).unwrap_err().to_string();
        assert!(error.contains("\"blk.0.attn_q.weight\" has shape 32 x 3, the base's 32 x 2"), "{error}");
    }

    #[test]
    fn grids_have_a_row_per_role() {
        let names = ["blk.0.attn_q.weight", "blk.2.attn_q.weight", "blk.1.ffn_up.weight", "output.weight"];
        let grid = LayerGrid::new(names.iter().enumerate().map(|(i, name)| (*name, i)));
        assert_eq!((grid.layers, &grid.roles[..]), (3, &["attn_q".to_owned(), "ffn_up".to_owned()][..]));
        assert_eq!(grid.cells, [[Some(0), None, Some(1)], [None, Some(2), None]]);
        assert_eq!(grid.others, [("output.weight".to_owned(), 3)]);
        assert_eq!(LayerGrid::new([("blk.999999999.attn_q.weight", 1)]).layers, 0);
    }
}
