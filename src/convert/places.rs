//! Where the matrices of a folder stand in the GGUF: what the model computes under GGUF's names serves the folder's.

use std::collections::HashMap;

use super::Conversion;
use super::plan::{Content, Output, Part, Turns, ValueChange};
use super::rows::permuted;
use super::source::Matrix;

/// The matrix of the GGUF that rows of the folder's go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The tensor.
    pub(crate) tensor: String,
    /// The matrix in it: the number of an expert, or 0.
    pub(crate) index: usize,
    /// The GGUF's column for each column of the folder's matrix, where they are in another order.
    pub(crate) order: Option<Vec<usize>>,
}

impl Conversion {
    /// The matrix of the GGUF that holds the first row of `matrix` of the folder's weight `name`. Rows of a matrix that the
    /// GGUF cuts into several all have one input, so the first stands for them; the order of rows is left out, since each is
    /// rounded by itself.
    pub(crate) fn place_of(&self, name: &str, matrix: &Matrix) -> Option<Place> {
        let weight = self.plan.weights.iter().position(|weight| weight.name == name)?;
        self.plan.outputs.iter().find_map(|output| place_in(output, weight, matrix))
    }

    /// The rows of a matrix of the GGUF, made of those of the folder's matrices, which `values` has by the names of their
    /// weights; `None` where it lacks one, or the GGUF holds other values.
    pub(crate) fn matrix_of(&self, tensor: &str, values: &HashMap<&str, (&Matrix, &[f32])>) -> Option<Vec<f32>> {
        let output = self.plan.outputs.iter().find(|output| output.tensor.name == tensor)?;
        let Content::Rows { parts, row_len, permuted_rows, turns, change: ValueChange::Keep | ValueChange::Blocks } =
            &output.content
        else {
            return None;
        };
        let columns = *row_len as usize;
        let mut rows = Vec::new();
        for part in parts {
            let (matrix, values) = values.get(self.plan.weights[part.weight].name.as_str())?;
            let is_plain = part.transposed.is_none() && matrix.part.transposed.is_none() && matrix.part.step == 1;
            if !is_plain || matrix.columns != *row_len {
                return None;
            }
            for row in 0..part.count {
                let row = permuted_rows.map_or(row, |head_rows| permuted(row, head_rows));
                let at = (part.first + row * part.step).checked_sub(matrix.part.first)? as usize;
                rows.extend_from_slice(values.get(at * columns..(at + 1) * columns)?);
            }
        }
        if let Some(turns) = turns {
            let copy = rows.clone();
            copy.chunks(columns).zip(rows.chunks_mut(columns)).for_each(|(row, moved)| turns.arrange(row, moved));
        }
        Some(rows)
    }

    /// The folder's weight that a vector of the GGUF holds, value for value.
    pub(crate) fn vector_of(&self, tensor: &str) -> Option<&str> {
        let output = self.plan.outputs.iter().find(|output| output.tensor.name == tensor)?;
        let Content::Rows { parts, permuted_rows: None, turns: None, change: ValueChange::Keep, .. } = &output.content
        else {
            return None;
        };
        match (parts.as_slice(), output.tensor.shape.as_slice()) {
            ([Part { weight, first: 0, step: 1, transposed: None, .. }], [_]) => Some(&self.plan.weights[*weight].name),
            _ => None,
        }
    }

    /// All matrices of the GGUF that hold rows of `matrix` of the folder's weight `name`.
    pub(crate) fn places_of(&self, name: &str, matrix: &Matrix) -> Vec<Place> {
        let Some(weight) = self.plan.weights.iter().position(|weight| weight.name == name) else { return Vec::new() };
        self.plan.outputs.iter().flat_map(|output| places_in(output, weight, matrix)).collect()
    }
}

/// A tensor that rows of a matrix may be in.
struct Rows<'o> {
    parts: &'o [Part],
    /// Of each of its matrices.
    rows: u64,
    /// Of its columns.
    order: Option<Vec<usize>>,
}

fn rows_of<'o>(output: &'o Output, matrix: &Matrix) -> Option<Rows<'o>> {
    let Output { tensor, content } = output;
    let Content::Rows { parts, row_len, turns, change, .. } = content else { return None };
    let columns = tensor.shape.first().copied()?;
    let is_matrix = tensor.shape.len() >= 2 && *row_len == matrix.columns && columns == matrix.columns;
    if !is_matrix || !matches!(change, ValueChange::Keep | ValueChange::Blocks) {
        return None;
    }
    let order = turns.map(|turns| column_order(turns, columns as usize));
    Some(Rows { parts, rows: tensor.shape[1].max(1), order })
}

/// The place of a part of weight `weight`, if `output` is made of it.
fn place_in(output: &Output, weight: usize, matrix: &Matrix) -> Option<Place> {
    let Rows { parts, rows, order } = rows_of(output, matrix)?;
    let mut at = 0;
    for part in parts {
        if let Some(row) = row_in(part, weight, &matrix.part) {
            let index = usize::try_from((at + row) / rows).ok()?;
            return Some(Place { tensor: output.tensor.name.clone(), index, order });
        }
        at += part.count;
    }
    None
}

/// All places of rows of weight `weight` in `output`.
fn places_in(output: &Output, weight: usize, matrix: &Matrix) -> Vec<Place> {
    let Some(Rows { parts, rows, order }) = rows_of(output, matrix) else { return Vec::new() };
    let mut indices: Vec<usize> = Vec::new();
    let mut at = 0;
    for part in parts.iter() {
        if let Some((first, last)) = shared_rows(part, weight, &matrix.part) {
            indices.extend(((at + first) / rows..=(at + last) / rows).filter_map(|index| usize::try_from(index).ok()));
        }
        at += part.count;
    }
    indices.dedup();
    let place = |index| Place { tensor: output.tensor.name.clone(), index, order: order.clone() };
    indices.into_iter().map(place).collect()
}

/// First and last row of `part` that `wanted`, whose rows follow each other, has too.
fn shared_rows(part: &Part, weight: usize, wanted: &Part) -> Option<(u64, u64)> {
    if part.weight != weight || part.transposed != wanted.transposed {
        return None;
    }
    let first = wanted.first.saturating_sub(part.first).div_ceil(part.step);
    let end = (wanted.first + wanted.count).saturating_sub(part.first).div_ceil(part.step).min(part.count);
    (first < end).then(|| (first, end - 1))
}

/// The row of `part` that is the first of `wanted`.
fn row_in(part: &Part, weight: usize, wanted: &Part) -> Option<u64> {
    if part.weight != weight || part.transposed != wanted.transposed {
        return None;
    }
    let row = wanted.first.checked_sub(part.first)?;
    let is_in = row.is_multiple_of(part.step) && row / part.step < part.count;
    is_in.then_some(row / part.step)
}

/// The new column of each old one.
fn column_order(turns: Turns, columns: usize) -> Vec<usize> {
    let old: Vec<usize> = (0..columns).collect();
    let mut moved = vec![0; columns];
    turns.arrange(&old, &mut moved);
    let mut order = vec![0; columns];
    for (new, old) in moved.into_iter().enumerate() {
        order[old] = new;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{NewTensor, TensorType};

    #[test]
    fn experts_and_moved_columns_are_found() {
        let part = |weight, first, count, transposed| Part { weight, first, count, step: 1, transposed };
        let output = |name: &str, shape: &[u64], parts, turns| Output {
            tensor: NewTensor { name: name.into(), shape: shape.to_vec(), ty: TensorType::F16 },
            content: Content::Rows { parts, row_len: shape[0], permuted_rows: None, turns, change: ValueChange::Keep },
        };
        let matrix = |part: Part| Matrix { rows: part.count, columns: 8, part };
        // Gate and up of two experts, which share a weight; then one weight for each.
        let stacked = vec![part(5, 0, 4, None), part(5, 8, 4, None)];
        let up = vec![part(5, 4, 4, None), part(5, 12, 4, None)];
        let outputs = [
            output("gate", &[8, 4, 2], stacked, None),
            output("up", &[8, 4, 2], up, None),
            output("down", &[8, 4, 2], vec![part(6, 0, 4, None), part(7, 0, 4, None)], None),
            output("out", &[8, 4], vec![part(8, 0, 4, None)], Some(Turns { groups: 2, each: 2 })),
            output("moved", &[8, 4, 2], vec![part(9, 0, 4, Some(0)), part(9, 0, 4, Some(1))], None),
        ];
        let find = |wanted: Part| {
            let found = outputs.iter().find_map(|output| place_in(output, wanted.weight, &matrix(wanted.clone())));
            found.map(|place| (place.tensor, place.index, place.order))
        };
        let at = |name: &str, index| Some((name.to_owned(), index, None));
        assert_eq!(find(part(5, 0, 4, None)), at("gate", 0));
        assert_eq!(find(part(5, 8, 4, None)), at("gate", 1));
        assert_eq!(find(part(5, 12, 4, None)), at("up", 1));
        assert_eq!(find(part(7, 0, 4, None)), at("down", 1));
        assert_eq!(find(part(9, 0, 4, Some(1))), at("moved", 1));
        assert_eq!(find(part(8, 0, 4, None)).unwrap().2.unwrap(), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(find(part(4, 0, 4, None)), None);

        let all = |wanted: Part| {
            let found = outputs.iter().flat_map(|output| places_in(output, wanted.weight, &matrix(wanted.clone())));
            found.map(|place| (place.tensor, place.index)).collect::<Vec<_>>()
        };
        // Gate and up of both experts are one weight of the folder.
        let names = [("gate", 0), ("gate", 1), ("up", 0), ("up", 1)].map(|(name, at)| (name.to_owned(), at));
        assert_eq!(all(part(5, 0, 16, None)), names);
        assert_eq!(all(part(5, 8, 4, None)), names[1..2]);
        assert_eq!(all(part(9, 0, 4, Some(1))), [("moved".to_owned(), 1)]);
        assert!(all(part(4, 0, 4, None)).is_empty());
    }

    #[test]
    fn columns_are_found_again_after_their_heads_have_taken_turns() {
        let turns = Turns { groups: 2, each: 3 };
        let order = column_order(turns, 12);
        let row: Vec<usize> = (100..112).collect();
        let mut moved = vec![0; 12];
        turns.arrange(&row, &mut moved);
        assert_eq!(order.iter().map(|&at| moved[at]).collect::<Vec<_>>(), row);
        assert_ne!(moved, row);
    }

    #[test]
    fn a_row_is_found_in_the_part_that_has_it() {
        let part = |first, count, step, transposed| Part { weight: 3, first, count, step, transposed };
        let wanted = part(8, 4, 1, None);
        assert_eq!(row_in(&part(4, 8, 1, None), 3, &wanted), Some(4));
        assert_eq!(row_in(&part(0, 8, 2, None), 3, &wanted), Some(4));
        assert_eq!(row_in(&part(1, 8, 2, None), 3, &wanted), None);
        assert_eq!(row_in(&part(0, 8, 1, None), 3, &wanted), None);
        assert_eq!(row_in(&part(9, 8, 1, None), 3, &wanted), None);
        assert_eq!(row_in(&part(4, 8, 1, None), 2, &wanted), None);
        assert_eq!(row_in(&part(4, 8, 1, Some(1)), 3, &wanted), None);
        assert_eq!(shared_rows(&part(4, 8, 1, None), 3, &wanted), Some((4, 7)));
        assert_eq!(shared_rows(&part(10, 8, 1, None), 3, &wanted), Some((0, 1)));
        assert_eq!(shared_rows(&part(1, 8, 2, None), 3, &wanted), Some((4, 5)));
        assert_eq!(shared_rows(&part(12, 8, 1, None), 3, &wanted), None);
        assert_eq!(shared_rows(&part(0, 8, 1, None), 3, &wanted), None);
        assert_eq!(shared_rows(&part(8, 4, 1, None), 2, &wanted), None);
    }
}
