//! Two models beside each other: keys, shapes, types, and how far the weights are apart.

use std::collections::HashSet;

use serde::Serialize;

use super::FilesError;
use super::digest::without_ones;
use crate::display::printable;
use crate::gguf::{Array, Gguf, Metadata, TensorInfo, Value, shown};
use crate::progress::{Interrupted, Unit, Watch};
use crate::quant;
use crate::rows;
use crate::workers::{cut, work_off};

/// Weights that are decoded at a time.
const PIECE_WEIGHTS: u64 = 1 << 18;

/// What two models do not have in common.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The first model's file.
    pub a: String,
    /// The second model's file.
    pub b: String,
    /// True if nothing differs.
    pub same: bool,
    /// Keys, in the order of the first model, then those of the second alone. Which part of a split model a file is
    /// does not count.
    pub metadata: Vec<KeyDifference>,
    /// Tensors, in the same order. Where they stand does not count.
    pub tensors: Vec<TensorDifference>,
    /// Tensors with the same shape, type and bytes.
    pub same_tensors: usize,
}

/// A key that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeyDifference {
    /// The key.
    pub key: String,
    /// Type and value in the first model, long ones cut; none where the key is not there.
    pub a: Option<String>,
    /// The same in the second.
    pub b: Option<String>,
    /// The first place where two texts or two lists differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<String>,
}

/// One model's side of a tensor that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    /// ggml's name of the type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Dimensions, fastest first.
    pub shape: Vec<u64>,
}

/// A tensor that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorDifference {
    /// Its name.
    pub name: String,
    /// In the first model; none where it is missing.
    pub a: Option<Side>,
    /// In the second.
    pub b: Option<Side>,
    /// `sqrt(sum (b - a)^2 / sum a^2)` over all weights, decoded. None where shapes differ, a type is not decoded, the first
    /// tensor is all zeros, or a value is not finite.
    pub relative_rms_error: Option<f64>,
    /// Of equal types and shapes: the first byte of the data that differs, from the tensor's start.
    pub first_differing_byte: Option<u64>,
}

/// Compares two models. The files' layout does not count: order and place of tensors, padding, and in how many files
/// they are.
///
/// # Errors
/// If data cannot be read or decoded, or `watch` stops the run.
pub fn compare(a: &Gguf, b: &Gguf, watch: &dyn Watch) -> Result<Comparison, FilesError> {
    let metadata = compare_metadata(a.metadata(), b.metadata());
    let pairs: Vec<(&TensorInfo, Option<&TensorInfo>)> =
        a.tensors().iter().map(|tensor| (tensor, b.tensor(&tensor.name))).collect();
    watch.begin("comparing", pairs.iter().filter_map(|(tensor, _)| tensor.bytes).sum(), Unit::Bytes);
    let stop = watch.abandon();
    let start = || (Buffers::default(), Vec::new());
    let workers = work_off(&pairs, rayon::current_num_threads(), start, |(buffers, found), index, (of_a, of_b)| {
        stop.check()?;
        let difference = match of_b {
            Some(of_b) => compare_tensors((a, of_a), (b, of_b), buffers)?,
            None => Some(TensorDifference { a: Some(side(of_a)), ..TensorDifference::of(of_a) }),
        };
        found.extend(difference.map(|difference| (index, difference)));
        watch.advance(of_a.bytes.unwrap_or(0), &of_a.name);
        Ok::<_, FilesError>(())
    });
    let stopped = stop.end();
    let mut found: Vec<(usize, TensorDifference)> = workers?.into_iter().flat_map(|(_, found)| found).collect();
    if stopped {
        return Err(Interrupted.into());
    }
    watch.end();
    found.sort_unstable_by_key(|(index, _)| *index);
    let same_tensors = pairs.len() - found.len();
    let mut tensors: Vec<TensorDifference> = found.into_iter().map(|(_, difference)| difference).collect();
    let added = b.tensors().iter().filter(|tensor| a.tensor(&tensor.name).is_none());
    tensors.extend(added.map(|tensor| TensorDifference { b: Some(side(tensor)), ..TensorDifference::of(tensor) }));
    Ok(Comparison {
        a: a.label().to_owned(),
        b: b.label().to_owned(),
        same: metadata.is_empty() && tensors.is_empty(),
        metadata,
        tensors,
        same_tensors,
    })
}

fn side(tensor: &TensorInfo) -> Side {
    Side { ty: tensor.ty.to_string(), shape: tensor.shape.clone() }
}

impl TensorDifference {
    /// With nothing but the name.
    fn of(tensor: &TensorInfo) -> TensorDifference {
        TensorDifference {
            name: tensor.name.clone(),
            a: None,
            b: None,
            relative_rms_error: None,
            first_differing_byte: None,
        }
    }
}

/// A thread's buffers.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    others: Vec<u8>,
    weights: Vec<f32>,
    other_weights: Vec<f32>,
}

/// A model and one of its tensors.
type Of<'a> = (&'a Gguf, &'a TensorInfo);

/// How two tensors of one name differ.
fn compare_tensors(a: Of<'_>, b: Of<'_>, buffers: &mut Buffers) -> Result<Option<TensorDifference>, FilesError> {
    let mut difference = TensorDifference { a: Some(side(a.1)), b: Some(side(b.1)), ..TensorDifference::of(a.1) };
    if without_ones(&a.1.shape) != without_ones(&b.1.shape) {
        return Ok(Some(difference));
    }
    if a.1.ty == b.1.ty {
        difference.first_differing_byte = first_differing_byte(a, b, buffers)?;
        if difference.first_differing_byte.is_none() {
            return Ok(None);
        }
    }
    difference.relative_rms_error = relative_rms_error(a, b, buffers)?;
    Ok(Some(difference))
}

/// Of tensors of one type and shape.
fn first_differing_byte(a: Of<'_>, b: Of<'_>, buffers: &mut Buffers) -> Result<Option<u64>, FilesError> {
    const PIECE_BYTES: u64 = 1 << 20;
    // Of a type whose layout is unknown the sizes may differ by padding.
    let common = a.1.bytes.min(b.1.bytes).unwrap_or(0);
    let unit = a.1.row_bytes().filter(|bytes| *bytes > 0).unwrap_or(1);
    for units in cut(common / unit, (PIECE_BYTES / unit).max(1)) {
        let (at, count) = (units.start * unit, (units.end - units.start) * unit);
        let bytes = load(a, at, count, &mut buffers.bytes)?;
        let others = load(b, at, count, &mut buffers.others)?;
        if bytes != others {
            return Ok(bytes.iter().zip(others).position(|(a, b)| a != b).map(|byte| at + byte as u64));
        }
    }
    Ok(None)
}

/// Bytes of whole rows of a tensor, little-endian; of a type whose layout is unknown any bytes.
fn load<'b>((gguf, tensor): Of<'_>, at: u64, count: u64, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], FilesError> {
    Ok(match tensor.row_bytes().filter(|row_bytes| gguf.is_big_endian() && *row_bytes > 0) {
        Some(row_bytes) => gguf.load_rows(tensor, at / row_bytes, count / row_bytes, buffer)?,
        None => gguf.load_bytes(tensor, at, count, buffer)?,
    })
}

/// Sums are in double precision and in the order of the weights.
fn relative_rms_error(a: Of<'_>, b: Of<'_>, buffers: &mut Buffers) -> Result<Option<f64>, FilesError> {
    let row_len = a.1.row_len();
    if quant::codec(a.1.ty).is_none() || quant::codec(b.1.ty).is_none() || row_len == 0 {
        return Ok(None);
    }
    let Buffers { bytes, others, weights, other_weights } = buffers;
    let (mut errors, mut squares) = (0.0f64, 0.0f64);
    for rows in cut(a.1.rows(), (PIECE_WEIGHTS / row_len).max(1)) {
        for ((gguf, tensor), bytes, weights) in
            [(a, &mut *bytes, &mut *weights), (b, &mut *others, &mut *other_weights)]
        {
            let count = rows.end - rows.start;
            let data = gguf.load_rows(tensor, rows.start, count, bytes)?;
            weights.resize((count * row_len) as usize, 0.0);
            let failed = |source| FilesError::Rows { file: printable(gguf.label()), source };
            rows::decode_any(tensor, data, weights).map_err(failed)?;
        }
        for (a, b) in weights.iter().zip(other_weights.iter()) {
            errors += (f64::from(*b) - f64::from(*a)).powi(2);
            squares += f64::from(*a).powi(2);
        }
    }
    Ok(Some((errors / squares).sqrt()).filter(|error| error.is_finite()))
}

fn compare_metadata(a: &Metadata, b: &Metadata) -> Vec<KeyDifference> {
    let is_shard_key = crate::gguf::split::is_shard_key;
    let mut differences = Vec::new();
    let mut seen = HashSet::new();
    for (key, of_a) in a.iter().filter(|(key, _)| !is_shard_key(key)) {
        seen.insert(key);
        let of_b = b.get(key);
        if of_b == Some(of_a) {
            continue;
        }
        differences.push(KeyDifference {
            key: key.to_owned(),
            a: Some(of_a.describe()),
            b: of_b.map(Value::describe),
            first_difference: of_b.and_then(|of_b| first_difference(of_a, of_b)),
        });
    }
    let added = b.iter().filter(|(key, _)| !is_shard_key(key) && !seen.contains(key));
    differences.extend(added.map(|(key, of_b)| KeyDifference {
        key: key.to_owned(),
        a: None,
        b: Some(of_b.describe()),
        first_difference: None,
    }));
    differences
}

/// Where two values of one type that are shown cut begin to differ.
fn first_difference(a: &Value, b: &Value) -> Option<String> {
    match (a, b) {
        (Value::String(a), Value::String(b)) => {
            let at = a.iter().zip(b.iter()).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            Some(format!("byte {at}: {} / {}", shown(&a[at..]), shown(&b[at..])))
        }
        (Value::Array(a), Value::Array(b)) if a.elem_type() == b.elem_type() => first_element(a, b),
        _ => None,
    }
}

fn first_element(a: &Array, b: &Array) -> Option<String> {
    let differs = a.iter().zip(b.iter()).enumerate().find(|(_, (a, b))| a != b);
    differs.map(|(at, (a, b))| format!("element {at}: {} / {}", a.describe(), b.describe()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::TensorType;
    use crate::gguf::testing::RawGguf;

    fn differences(a: &RawGguf, b: &RawGguf) -> Comparison {
        let open = |file: &RawGguf| Gguf::from_bytes(file.build()).unwrap();
        compare(&open(a), &open(b), &()).unwrap()
    }

    #[test]
    fn each_kind_of_difference_is_found() {
        let a = RawGguf::new().u32("n", 1).str("gone", "x").strings("list", &["a", "b", "c"]).str("t", "same here");
        let b = RawGguf::new().u32("n", 2).strings("list", &["a", "X"]).str("t", "same there").bool("new", true);
        let halves = [3.0f32, 4.0].map(|v| half::f16::from_f32(v).to_le_bytes());
        let a =
            a.f32_tensor("both", &[2], &[3.0, 4.0]).f32_tensor("lost", &[1], &[0.0]).f32_tensor("s", &[2], &[1.0; 2]);
        let a = a.f32_tensor("h", &[2], &[3.0, 4.0]).f32_tensor("zero", &[1], &[0.0]);
        let b = b.f32_tensor("zero", &[1], &[1.0]).tensor("h", &[2], TensorType::F16, halves.as_flattened());
        let b =
            b.f32_tensor("s", &[1, 2], &[1.0; 2]).f32_tensor("both", &[2], &[3.0, 4.5]).f32_tensor("more", &[1], &[0.]);
        let found = differences(&a, &b);
        let keys: Vec<_> =
            found.metadata.iter().map(|row| (row.key.as_str(), row.a.is_some(), row.b.is_some())).collect();
        assert_eq!(
            keys,
            [("n", true, true), ("gone", true, false), ("list", true, true), ("t", true, true), ("new", false, true)]
        );
        assert_eq!(found.metadata[2].first_difference.as_deref(), Some("element 1: str (\"b\") / str (\"X\")"));
        assert_eq!(found.metadata[3].first_difference.as_deref(), Some("byte 5: \"here\" / \"there\""));
        let rows: Vec<_> = found
            .tensors
            .iter()
            .map(|row| (row.name.as_str(), row.a.is_some(), row.b.is_some(), row.first_differing_byte))
            .collect();
        assert_eq!(
            rows,
            [
                ("both", true, true, Some(6)),
                ("lost", true, false, None),
                ("s", true, true, None),
                ("h", true, true, None),
                ("zero", true, true, Some(2)),
                ("more", false, true, None)
            ]
        );
        // 0.5 of a norm of 5.
        assert_eq!(found.tensors[0].relative_rms_error, Some(0.1));
        assert_eq!(found.tensors[2].relative_rms_error, None);
        assert_eq!(found.tensors[3].relative_rms_error, Some(0.0));
        assert_eq!(found.tensors[4].relative_rms_error, None);
        assert!(!found.same && found.same_tensors == 0);
    }

    #[test]
    fn layout_and_byte_order_are_no_difference() {
        let file = |file: RawGguf| file.u32("n", 1).f32_tensor("w", &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let big = file(RawGguf::big_endian());
        let found =
            differences(&file(RawGguf::new()).f32_tensor("v", &[1], &[1.0]), &big.f32_tensor("v", &[1, 1], &[1.0]));
        assert!(found.same && found.same_tensors == 2, "{found:?}");
        let changed = RawGguf::big_endian().u32("n", 1).f32_tensor("w", &[2, 2], &[1.0, 2.0, 3.0, 5.0]);
        let found = differences(&file(RawGguf::new()), &changed);
        assert_eq!(found.tensors[0].first_differing_byte, Some(14));
        assert_eq!(differences(&changed, &changed).same_tensors, 1);
    }
}
