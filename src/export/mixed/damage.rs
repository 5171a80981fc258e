//! What 4 bits do to each unit, on the grid of the export.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::super::calibrated::model::Converted;
use super::super::draft::Draft;
use super::super::request::Rounding;
use super::{ExportError, Mixture, Unit};
use crate::gguf::{Gguf, TensorInfo, TensorType};
use crate::measure::{self, Job, MeasureError, ProbeOptions, RoundedUnit, WeightErrorProblem};
use crate::progress::{Stop, Watch};
use crate::quant::{self, QuantError};
use crate::rounding::grid::{Layout, plain, search};
use crate::rows::read_rows;

/// Its name in the folder of unfinished work.
const FILE: &str = "bits.sens.json";

/// Names of the two roundings in that file.
const NAMES: [&str; 2] = ["W4", "W8"];

/// Weights that a task rounds.
const TASK_WEIGHTS: u64 = 1 << 17;

/// A matrix of a tensor of the GGUF that a module became.
struct Part {
    /// The GGUF's column for each of the module's, where they are in another order.
    order: Option<Vec<usize>>,
    /// Of 4 bits and of 8.
    layouts: [Layout; 2],
}

/// Tensors of a unit, each with those of its matrices that are rounded.
type Parts = BTreeMap<String, BTreeMap<usize, Part>>;

/// Divergence that each unit adds in 4 bits and in 8, nats a token.
pub(super) fn measure(
    draft: &Draft,
    mixture: &Mixture,
    units: &[Unit],
    work: &Path,
    watch: &dyn Watch,
) -> Result<Vec<[f64; 2]>, ExportError> {
    let converted = Converted::open(&draft.source, work, draft.also.is_empty(), watch)?;
    let parts: Vec<Parts> = units.iter().map(|unit| parts_of(draft, mixture, unit, &converted)).collect();
    // What the model does not use does no damage.
    let used: Vec<usize> = (0..units.len()).filter(|unit| !parts[*unit].is_empty()).collect();
    let unit =
        |&at: &usize| measure::Unit { name: units[at].name.clone(), tensors: parts[at].keys().cloned().collect() };
    let measured: Vec<measure::Unit> = used.iter().map(unit).collect();
    // Only plain rounding takes scales from the largest weights, and what repeats others.
    let by_search = matches!(draft.rounding, Rounding::Search | Rounding::Feedback(_));
    let round = |at: usize, stop: &Stop| round_unit(&converted.gguf, &parts[used[at]], by_search, stop);
    let (probes, path) = (ProbeOptions::default(), work.join(FILE));
    let job = Job { gguf: &converted.gguf, imatrix: None, tensors: &[], probes: &probes, path: &path };
    let sensitivity = job.measure_units(&measured, &round, watch)?;
    let model = sensitivity.damage_model(None);
    let damage = |unit: &Unit| {
        let errors = sensitivity.tensor(&unit.name).map(|known| &known.errors);
        NAMES.map(|name| {
            let error = errors.and_then(|errors| errors.get(name)).copied().unwrap_or(0.0);
            model.damage(&unit.name, error).unwrap_or(0.0).max(0.0)
        })
    };
    Ok(units.iter().map(damage).collect())
}

fn parts_of(draft: &Draft, mixture: &Mixture, unit: &Unit, converted: &Converted<'_>) -> Parts {
    let mut parts = Parts::new();
    for module in unit.items.iter().filter_map(|item| draft.items[*item].module()) {
        let four = module.group % mixture.eight;
        for place in converted.places_of(&module.matrix) {
            let layouts = [draft.layouts[four], draft.layouts[four + mixture.eight]];
            parts.entry(place.tensor).or_default().insert(place.index, Part { order: place.order, layouts });
        }
    }
    parts
}

fn round_unit(gguf: &Gguf, parts: &Parts, by_search: bool, stop: &Stop) -> Result<RoundedUnit, MeasureError> {
    let mut rounded = RoundedUnit::default();
    let (mut squares, mut norm) = ([0.0; 2], 0.0);
    for (name, matrices) in parts {
        let Some(tensor) = gguf.tensor(name) else { continue };
        let ty = match tensor.ty {
            ty @ (TensorType::F16 | TensorType::F32) => ty,
            _ => TensorType::BF16,
        };
        let mut data = Vec::new();
        for slice in round_tensor(gguf, tensor, ty, matrices, by_search, stop)? {
            data.extend(slice.data);
            squares.iter_mut().zip(slice.squares).for_each(|(sum, part)| *sum += part);
            norm += slice.norm;
        }
        gguf.release(tensor);
        rounded.replacements.push((name.clone(), ty, data));
    }
    let relative = |squares: f64| if norm > 0.0 { squares / norm } else { 0.0 };
    rounded.errors = NAMES.into_iter().zip(squares.map(relative)).collect();
    Ok(rounded)
}

/// Rows of a tensor after rounding.
struct Slice {
    data: Vec<u8>,
    /// Squared errors of 4 bits and of 8.
    squares: [f64; 2],
    norm: f64,
}

fn round_tensor(
    gguf: &Gguf,
    tensor: &TensorInfo,
    ty: TensorType,
    matrices: &BTreeMap<usize, Part>,
    by_search: bool,
    stop: &Stop,
) -> Result<Vec<Slice>, MeasureError> {
    let per_matrix = tensor.rows_per_matrix().max(1);
    let together = (TASK_WEIGHTS / tensor.row_len().max(1)).max(1);
    let tasks: Vec<(usize, u64, u64)> = (0..tensor.matrices())
        .flat_map(|matrix| crate::workers::cut(per_matrix, together).map(move |rows| (matrix, rows)))
        .map(|(matrix, rows)| (matrix as usize, matrix * per_matrix + rows.start, rows.end - rows.start))
        .collect();
    let round = |&(matrix, first, rows): &(usize, u64, u64)| {
        stop.check()?;
        let weights = read_rows(gguf, tensor, first, rows)?;
        let columns = tensor.row_len() as usize;
        let (values, squares, norm) = match matrices.get(&matrix) {
            Some(part) => part.round(&weights, columns, by_search),
            None => (weights, [0.0; 2], 0.0),
        };
        let problem = |source: QuantError| WeightErrorProblem::Codec { tensor: tensor.shown_name(), source };
        let row_bytes = ty.info().and_then(|info| info.row_bytes(columns as u64)).unwrap_or(0) as usize;
        let mut data = vec![0; rows as usize * row_bytes];
        quant::quantize_rows(ty, &values, columns, None, &mut data).map_err(problem)?;
        Ok(Slice { data, squares, norm })
    };
    tasks.par_iter().map(round).collect()
}

impl Part {
    /// The rows in 4 bits, in the order that they came in, with the squared errors of 4 and 8 bits.
    fn round(&self, weights: &[f32], columns: usize, by_search: bool) -> (Vec<f32>, [f64; 2], f64) {
        let rows = weights.len() / columns.max(1);
        let moved: Option<Vec<f32>> = self.order.as_ref().map(|order| {
            weights.chunks_exact(columns).flat_map(|row| order.iter().map(|&column| row[column])).collect()
        });
        let own = moved.as_deref().unwrap_or(weights);
        let rounded = self.layouts.map(|layout| {
            let rounded = match by_search {
                true => search(layout, own, rows, columns, None, None),
                false => plain(layout, own, rows, columns, None),
            };
            layout.dequantize(&rounded, rows, columns)
        });
        let square =
            |values: &Vec<f32>| own.iter().zip(values).map(|(own, value)| f64::from(own - value).powi(2)).sum::<f64>();
        let squares = [square(&rounded[0]), square(&rounded[1])];
        let norm = own.iter().map(|weight| f64::from(*weight).powi(2)).sum();
        let [mut values, _] = rounded;
        if let Some(order) = &self.order {
            let back = values.clone();
            for (row, of_module) in values.chunks_exact_mut(columns).zip(back.chunks_exact(columns)) {
                order.iter().zip(of_module).for_each(|(&column, value)| row[column] = *value);
            }
        }
        (values, squares, norm)
    }
}
