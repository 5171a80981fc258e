//! Rounded matrices and copied bytes into their places in the output's files.

use std::fs::File;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::ExportError;
use super::draft::{Content, Draft};
use super::files::failed;
use super::pack;
use super::shards::Place;
use crate::os;
use crate::rounding::grid::Rounded;
use crate::workers;

/// Bytes that are copied or read back at a time.
pub(crate) const COPY_BYTES: u64 = 8 << 20;

/// The files of the output.
pub(crate) struct Sink<'a> {
    pub(crate) draft: &'a Draft,
    pub(crate) files: &'a [File],
}

impl Sink<'_> {
    /// Writes rows of a rounded matrix: `count` from row `first`.
    pub(crate) fn put(&self, item: usize, first: u64, count: u64, rounded: &Rounded) -> Result<(), ExportError> {
        let Content::Module(module) = &self.draft.items[item].content else { return Ok(()) };
        let (rows, columns) = (module.matrix.rows, module.matrix.columns);
        let layout = &self.draft.layouts[module.group];
        let format = self.draft.scheme.row().format;
        for (at, info) in pack::parts(format, layout, rows, columns).iter().enumerate() {
            let bytes = pack::pack(info, layout, rounded, rows, columns);
            let (start, length) = info.range(first, count);
            debug_assert_eq!(bytes.len() as u64, length, "{}", info.suffix);
            self.write(item, at, start, &bytes)?;
        }
        Ok(())
    }

    /// Writes bytes of tensor `tensor` of an item.
    pub(crate) fn write(&self, item: usize, tensor: usize, at: u64, bytes: &[u8]) -> Result<(), ExportError> {
        let place = self.place(item, tensor);
        os::write_all_at(&self.files[place.file], bytes, place.offset + at)
            .map_err(|source| self.failed(place.file, "cannot write it", source))
    }

    fn place(&self, item: usize, tensor: usize) -> Place {
        self.draft.shards.places[self.draft.starts[item] + tensor]
    }

    fn failed(&self, file: usize, action: &'static str, source: std::io::Error) -> ExportError {
        failed(Path::new(&self.draft.shards.files[file].name), action, source)
    }

    /// What stands in the files for tensor `tensor` of an item, which should be small.
    pub(crate) fn read(&self, item: usize, tensor: usize) -> Result<Vec<u8>, ExportError> {
        let place = self.place(item, tensor);
        let mut bytes = vec![0; self.draft.tensors[item][tensor].bytes as usize];
        os::read_exact_at(&self.files[place.file], &mut bytes, place.offset)
            .map_err(|source| self.failed(place.file, "cannot read it back", source))?;
        Ok(bytes)
    }

    /// SHA-256, in hexadecimal, of what stands in the files for an item.
    pub(crate) fn digest(&self, item: usize) -> Result<String, ExportError> {
        let mut hash = Sha256::new();
        let mut buffer = Vec::new();
        for (at, tensor) in self.draft.tensors[item].iter().enumerate() {
            let place = self.place(item, at);
            for range in workers::cut(tensor.bytes, COPY_BYTES) {
                buffer.resize((range.end - range.start) as usize, 0);
                os::read_exact_at(&self.files[place.file], &mut buffer, place.offset + range.start)
                    .map_err(|source| self.failed(place.file, "cannot read it back", source))?;
                hash.update(&buffer);
            }
        }
        Ok(format!("{:x}", hash.finalize()))
    }
}
