//! One model into several files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::FilesError;
use super::copy::{Output, write_outputs};
use crate::atomic_file::Replace;
use crate::display::decimal_size;
use crate::gguf::{Gguf, GgufLayout, Metadata, TensorInfo, align_up, split};
use crate::progress::Watch;

/// What a part may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Bytes of its file, metadata and padding included. A tensor that is larger has a part of its own.
    Bytes(u64),
    /// Tensors.
    Tensors(usize),
}

/// A file of a split model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The file.
    #[serde(rename = "file", serialize_with = "super::path_as_text")]
    pub path: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of the file.
    pub size_bytes: u64,
}

/// A model dealt out to files, which are named as llama-gguf-split names them: `OUTPUT-00001-of-00003.gguf`.
///
/// The first part holds all metadata, the others the three keys of a part alone. Tensors keep their order, names, types and
/// bytes. Files are version 3, little-endian.
pub struct SplitPlan<'a> {
    gguf: &'a Gguf,
    outputs: Vec<Output<'a>>,
    parts: Vec<Part>,
    warnings: Vec<String>,
}

impl<'a> SplitPlan<'a> {
    /// Deals the tensors out. `output` is the name that the parts have in common, with `.gguf` at its end or without.
    /// `metadata_alone` leaves the first part without tensors (`--no-tensor-first-split`).
    ///
    /// # Errors
    /// If one part holds everything, there would be more than 65535, or the metadata alone exceed the limit.
    pub fn new(gguf: &'a Gguf, output: &Path, limit: Limit, metadata_alone: bool) -> Result<Self, FilesError> {
        let ranges = deal(gguf, limit, metadata_alone)?;
        let refused = |problem: String| FilesError::refused(gguf.label(), problem);
        let count = match u16::try_from(ranges.len()) {
            Ok(0 | 1) => {
                let size = decimal_size(gguf.file_bytes());
                let tensors = gguf.tensors().len();
                return Err(refused(format!("{size} in {tensors} tensors fit in one part; there is nothing to split")));
            }
            Ok(count) => count,
            Err(_) => {
                let problem = format!("would have {} parts, 65535 are the most; allow larger ones", ranges.len());
                return Err(refused(problem));
            }
        };
        let (mut outputs, mut parts, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
        for (number, range) in ranges.into_iter().enumerate() {
            let metadata = split::shard_metadata(gguf.metadata(), number as u16, count, gguf.tensors().len() as u64);
            let path = split::shard_path_of(output, number as u16, count);
            let tensors: Vec<&TensorInfo> = gguf.tensors()[range].iter().collect();
            let output = Output::new(path.clone(), &metadata, tensors.clone())?;
            let size_bytes = output.file_bytes();
            if let (Limit::Bytes(most), [tensor]) = (limit, tensors.as_slice())
                && size_bytes > most
            {
                let (name, size) = (tensor.shown_name(), decimal_size(size_bytes));
                let path = path.display();
                warnings.push(format!("{path}: has {size}, more than was allowed: tensor {name} cannot be cut"));
            }
            parts.push(Part { path, tensors: tensors.len(), size_bytes });
            outputs.push(output);
        }
        Ok(SplitPlan { gguf, outputs, parts, warnings })
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// What a user should know, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Writes the parts. None has its name before all are complete.
    ///
    /// # Errors
    /// If a part exists and may not be replaced, or is a file of the model itself; if the source cannot be read or an output
    /// not written, or `watch` stops the run. No part is left then.
    pub fn write(self, replace: Replace, watch: &dyn Watch) -> Result<Vec<Part>, FilesError> {
        write_outputs(self.gguf, &self.outputs, false, "splitting", replace, watch)?;
        Ok(self.parts)
    }
}

/// Which tensors each part has.
fn deal(gguf: &Gguf, limit: Limit, metadata_alone: bool) -> Result<Vec<Range<usize>>, FilesError> {
    let count = gguf.tensors().len();
    let first = metadata_alone.then_some(0..0);
    let ranges = match limit {
        Limit::Tensors(most) => {
            let most = most.max(1);
            (0..count.div_ceil(most)).map(|part| part * most..((part + 1) * most).min(count)).collect()
        }
        Limit::Bytes(most) => {
            let (first, further) = (PartSize::empty(gguf, 0)?, PartSize::empty(gguf, 1)?);
            if first.file_bytes() > most {
                let (alone, most) = (decimal_size(first.file_bytes()), decimal_size(most));
                let problem = format!("the metadata alone take {alone}, a part may have {most}; allow larger parts");
                return Err(FilesError::refused(gguf.label(), problem));
            }
            let sizes = gguf.tensors().iter().map(|tensor| (table_bytes(tensor), tensor.bytes.unwrap_or(0)));
            deal_by_bytes(if metadata_alone { further } else { first }, further, sizes, most)
        }
    };
    Ok(first.into_iter().chain(ranges).collect())
}

/// The size of a part in the making.
#[derive(Clone, Copy)]
struct PartSize {
    alignment: u64,
    /// Header without padding.
    header: u64,
    /// Tensor data with padding.
    data: u64,
}

impl PartSize {
    /// The size of a part with metadata and no tensors.
    fn empty(gguf: &Gguf, number: u16) -> Result<PartSize, FilesError> {
        // The number of parts does not change the size of its key.
        let metadata: Metadata = split::shard_metadata(gguf.metadata(), number, 2, 0);
        let layout = GgufLayout::new(gguf.label(), &metadata, [])?;
        Ok(PartSize { alignment: layout.alignment().into(), header: layout.header().len() as u64, data: 0 })
    }

    /// The size with a further tensor.
    fn with(self, table: u64, bytes: u64) -> PartSize {
        let padded = align_up(bytes, self.alignment).unwrap_or(u64::MAX);
        PartSize { header: self.header + table, data: self.data.saturating_add(padded), ..self }
    }

    fn file_bytes(self) -> u64 {
        align_up(self.header, self.alignment).unwrap_or(u64::MAX).saturating_add(self.data)
    }
}

/// Bytes of a tensor's row in the table: name with its length, dimensions with their count, type and offset.
fn table_bytes(tensor: &TensorInfo) -> u64 {
    8 + tensor.name.len() as u64 + 4 + 8 * tensor.shape.len() as u64 + 4 + 8
}

/// Starts a new part whenever the next tensor would take the file of the current one beyond `most` bytes.
fn deal_by_bytes(
    first: PartSize,
    further: PartSize,
    sizes: impl Iterator<Item = (u64, u64)>,
    most: u64,
) -> Vec<Range<usize>> {
    let (mut ranges, mut start, mut size, mut count) = (Vec::new(), 0, first, 0);
    for (position, (table, bytes)) in sizes.enumerate() {
        let grown = size.with(table, bytes);
        // A first part whose metadata leave no place for a tensor stands without any.
        let is_empty = position == start && !(ranges.is_empty() && further.with(table, bytes).file_bytes() <= most);
        if grown.file_bytes() > most && !is_empty {
            ranges.push(start..position);
            (start, size) = (position, further.with(table, bytes));
        } else {
            size = grown;
        }
        count = position + 1;
    }
    if count > start {
        ranges.push(start..count);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;

    #[test]
    fn parts_are_as_full_as_their_limit_allows() {
        let empty = PartSize { alignment: 32, header: 96, data: 0 };
        let first = PartSize { header: 960, ..empty };
        let deal = |most, sizes: &[u64]| deal_by_bytes(first, empty, sizes.iter().map(|bytes| (0, *bytes)), most);
        assert_eq!(deal(1024, &[64, 64]), [0..1, 1..2]);
        assert_eq!(deal(1024, &[32, 33, 900]), [0..1, 1..2, 2..3]);
        assert_eq!(deal(1024, &[64, 928, 1]), [0..1, 1..2, 2..3]);
        // The second tensor only fits where the metadata are not.
        assert_eq!(deal(1024, &[128, 800, 900]), [0..0, 0..2, 2..3]);
        // A tensor that is too large for any part does not leave an empty one before it.
        assert_eq!(deal(1024, &[2000, 10]), [0..1, 1..2]);
        assert_eq!(deal(4096, &[2000, 10, 4000]), [0..2, 2..3]);
    }

    #[test]
    fn computed_sizes_are_those_of_the_layout() {
        let file = RawGguf { alignment: 64, ..RawGguf::new() }.str("general.architecture", "llama");
        let values: Vec<f32> = (0..40).map(|at| at as f32).collect();
        let file = file.u32("general.alignment", 64).f32_tensor("a", &[40], &values);
        let gguf = Gguf::from_bytes(file.f32_tensor("long.name", &[8, 5], &values).build()).unwrap();
        for (most, parts) in [(320, 3), (400, 3), (448, 2), (600, 2)] {
            let plan =
                SplitPlan::new(&gguf, Path::new("out"), Limit::Bytes(most), false).unwrap_or_else(|e| panic!("{e}"));
            let largest = plan.parts().iter().map(|part| part.size_bytes).max().unwrap();
            assert!(largest <= most && plan.parts().len() == parts, "{most}: {:?}", plan.parts());
        }
        let plan =
            SplitPlan::new(&gguf, Path::new("out.gguf"), Limit::Tensors(1), true).unwrap_or_else(|e| panic!("{e}"));
        let tensors: Vec<usize> = plan.parts().iter().map(|part| part.tensors).collect();
        assert_eq!(tensors, [0, 1, 1]);
        assert_eq!(plan.parts()[2].path, Path::new("out-00003-of-00003.gguf"));
    }
}
