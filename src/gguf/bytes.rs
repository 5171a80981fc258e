//! Bytes that live in a mapped file or in memory, shared without copying.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// Where the bytes of one GGUF file are.
pub(crate) enum Source {
    /// A read-only map of the whole file, and the file.
    Map(Mmap, File),
    /// The whole file, or a value built by a program.
    Memory(Vec<u8>),
}

impl Source {
    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Source::Map(map, _) => map,
            Source::Memory(bytes) => bytes,
        }
    }

    /// Lets the system drop the pages of a range: they are read again from the file when next touched. Pages that
    /// the range only shares with its neighbours go too, or a file released piece by piece would leave one behind
    /// at every seam. No effect on bytes in memory or where unsupported.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Source::Map(map, _) = self
            && range.start < range.end
            && range.end <= map.len()
        {
            // SAFETY: the map is read-only and backed by the file, never written through, so dropped pages come back
            // with the file's content; this is no different from ordinary eviction. memmap2 aligns the start down.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // Advice only: a system that declines keeps the pages a while longer.
            drop(advised);
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Asks the system to start reading a range of the file in the background, unless it is in memory already.
    pub(crate) fn prefetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Source::Map(map, _) = self
            && range.start < range.end
            && range.end <= map.len()
            // Looking at two pages costs less than having the system look for all of them.
            && !(crate::os::is_resident(&map[range.start]) && crate::os::is_resident(&map[range.end - 1]))
        {
            // Advice only, as above.
            drop(map.advise_range(memmap2::Advice::WillNeed, range.start, range.len()));
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Fills `buffer` with the bytes of a range: large runs that are looked at once cost less when
    /// they are copied than as pages of the map, and leave nothing mapped.
    pub(crate) fn load(&self, range: Range<usize>, buffer: &mut Vec<u8>) -> io::Result<()> {
        buffer.resize(range.len(), 0);
        match self {
            Source::Map(_, file) => crate::os::read_exact_at(file, buffer, range.start as u64)?,
            Source::Memory(bytes) => buffer.copy_from_slice(&bytes[range]),
        }
        Ok(())
    }
}

/// A byte string: a shared slice of a mapped file, or owned. GGUF strings carry no promise of UTF-8.
#[derive(Clone)]
pub struct Bytes {
    source: Arc<Source>,
    start: usize,
    len: usize,
}

impl Bytes {
    /// A slice of `source`; the range must lie inside it.
    pub(crate) fn shared(source: &Arc<Source>, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= source.as_slice().len());
        Bytes { source: Arc::clone(source), start: range.start, len: range.end - range.start }
    }

    /// A part of this byte string, sharing its storage; the range must lie inside it.
    pub(crate) fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.len);
        Bytes { source: Arc::clone(&self.source), start: self.start + range.start, len: range.end - range.start }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.source.as_slice()[self.start..self.start + self.len]
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        let len = bytes.len();
        Bytes { source: Arc::new(Source::Memory(bytes)), start: 0, len }
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Bytes {
        Bytes::from(text.as_bytes().to_vec())
    }
}

impl From<String> for Bytes {
    fn from(text: String) -> Bytes {
        Bytes::from(text.into_bytes())
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Bytes) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&super::error::shown(self))
    }
}
