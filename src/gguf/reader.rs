//! Opens a GGUF model, one file or all shards of a split one, as a map: nothing is loaded but what is looked at.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::byte_order;
use super::bytes::Source;
use super::error::{DAMAGED, GgufError, shown, shown_path};
use super::metadata::Metadata;
use super::parse::{MAX_TENSORS, ParsedFile, parse};
use super::split;
use super::tensor_info::{TensorInfo, TensorTotals};

/// An open model: metadata, tensor table, and the mapped data of all its shards.
pub struct Gguf {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// Positions in `tensors`, sorted by name.
    sorted: Vec<u32>,
    shards: Vec<Shard>,
}

/// One file of a model.
pub struct Shard {
    path: Option<PathBuf>,
    label: String,
    version: u32,
    big_endian: bool,
    alignment: u32,
    data_start: u64,
    own_keys: Vec<String>,
    source: Arc<Source>,
}

impl Shard {
    /// The file's path, or `None` if it was read from memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The file's name for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// True if the file's numbers are big-endian.
    pub fn is_big_endian(&self) -> bool {
        self.big_endian
    }

    /// Alignment of this file's tensor data in bytes.
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// First byte of the tensor data, from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Size of the file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.source.as_slice().len() as u64
    }

    /// Of a further shard of a split model: keys that the first shard lacks or has with another value, without those that
    /// are about the file itself. [`Gguf::metadata`] does not show them.
    pub fn own_keys(&self) -> &[String] {
        &self.own_keys
    }

    /// The bytes before the tensor data, padding included.
    pub(crate) fn header(&self) -> &[u8] {
        // Checked when the file was opened: the data section lies in the file, or is empty behind its end.
        let file = self.source.as_slice();
        &file[..file.len().min(self.data_start as usize)]
    }
}

impl Gguf {
    /// Maps and checks a model. Of a split model, `path` names the first shard; the others are found beside it by
    /// name and opened too.
    ///
    /// The file must not be changed or truncated while it is open: the system then ends the process (SIGBUS) or
    /// shows other bytes than were checked.
    ///
    /// # Errors
    /// If a file cannot be opened, is no GGUF file of version 2 or 3, is cut short, or breaks the format; if shards
    /// are missing or do not fit together.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, GgufError> {
        let path = path.as_ref();
        let (first, parsed) = open_shard(path, 0)?;
        let Some(count) = split::check_first_shard(&parsed.metadata, path)? else {
            return Gguf::assemble(vec![(first, parsed)], None);
        };
        let prefix = split::check_first_name(path, count)?;
        let expected = split::tensor_count(&parsed.metadata)?;
        let mut tensors = parsed.tensors.len() as u64;
        let mut files = vec![(first, parsed)];
        for number in 1..count {
            let shard_path = split::shard_path(&prefix, number, count);
            // Other failures, such as a loop of links, are reported by the attempt to open it.
            if matches!(shard_path.try_exists(), Ok(false)) {
                return Err(GgufError::Split {
                    file: shown_path(path),
                    problem: format!("shard {} of {count} is missing", number + 1),
                    advice: format!("put {} beside it", shown_path(&shard_path)),
                });
            }
            let (mut shard, mut parsed) = open_shard(&shard_path, usize::from(number))?;
            tensors += parsed.tensors.len() as u64;
            split::check_belongs(&files[0], (&shard, &parsed), number, count)?;
            shard.own_keys = split::own_keys(&files[0].1.metadata, &parsed.metadata);
            if tensors > MAX_TENSORS {
                return Err(GgufError::Split {
                    file: shard.label,
                    problem: format!("the shards up to this one hold {tensors} tensors, lwq follows {MAX_TENSORS}"),
                    advice: DAMAGED.to_owned(),
                });
            }
            parsed.metadata = Metadata::default();
            files.push((shard, parsed));
        }
        Gguf::assemble(files, Some(expected))
    }

    /// Checks a whole single-file model held in memory.
    ///
    /// # Errors
    /// As [`Gguf::open`]; a shard of a split model is refused unless it is the only one.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf, GgufError> {
        let label = "<memory>".to_owned();
        let (shard, parsed) = parse_shard(Source::Memory(bytes), None, label, 0)?;
        if let Some(count) = split::check_first_shard(&parsed.metadata, Path::new(&shard.label))? {
            return Err(GgufError::Split {
                file: shard.label,
                problem: format!("is one of {count} shards"),
                advice: "open the first shard by its path".to_owned(),
            });
        }
        Gguf::assemble(vec![(shard, parsed)], None)
    }

    fn assemble(files: Vec<(Shard, ParsedFile)>, expected_tensors: Option<u64>) -> Result<Gguf, GgufError> {
        let mut shards = Vec::with_capacity(files.len());
        let mut tensors = Vec::new();
        let mut metadata = None;
        for (shard, parsed) in files {
            shards.push(shard);
            tensors.extend(parsed.tensors);
            metadata.get_or_insert(parsed.metadata);
        }
        let sorted = sort_by_name(&tensors, &shards)?;
        if let Some(expected) = expected_tensors
            && expected != tensors.len() as u64
        {
            return Err(GgufError::Split {
                file: shards[0].label.clone(),
                problem: format!("{} is {expected}, the shards hold {}", split::TENSOR_COUNT_KEY, tensors.len()),
                advice: "get all shards of the same model again".to_owned(),
            });
        }
        Ok(Gguf { metadata: metadata.unwrap_or_default(), tensors, sorted, shards })
    }

    /// Key-value pairs, of the first shard if the model is split.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order over all shards.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let slot = self.sorted.binary_search_by(|at| self.tensors[*at as usize].name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[self.sorted[slot] as usize])
    }

    /// The model's files, in order; one unless the model is split.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Weights and data bytes of all tensors, and with them its bits per weight.
    pub fn totals(&self) -> TensorTotals {
        self.tensors.iter().collect()
    }

    /// Size of all its files in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::file_bytes).sum()
    }

    /// The first file's name for messages.
    pub fn label(&self) -> &str {
        &self.shards[0].label
    }

    /// The same model under another name for messages and records.
    pub(crate) fn labelled(mut self, label: &str) -> Gguf {
        label.clone_into(&mut self.shards[0].label);
        self
    }

    /// True if the data of some tensors must be swapped: then [`Gguf::data`] serves few types.
    pub fn is_big_endian(&self) -> bool {
        self.shards.iter().any(|shard| shard.big_endian)
    }

    /// The tensor's bytes in the map, little-endian.
    ///
    /// # Errors
    /// If the type is unknown, or the file is big-endian and the type has numbers wider than a byte: use
    /// [`Gguf::tensor_data`], which swaps them.
    pub fn data(&self, tensor: &TensorInfo) -> Result<&[u8], GgufError> {
        let (shard, range) = self.place(tensor, None)?;
        if shard.big_endian && !byte_order::is_order_free(tensor.ty) {
            return Err(GgufError::Tensor {
                file: shard.label.clone(),
                tensor: tensor.shown_name(),
                problem: format!("big-endian data of type {} cannot be used in place", tensor.ty),
                advice: "convert the file to little endian with gguf_convert_endian.py",
            });
        }
        Ok(&shard.source.as_slice()[range])
    }

    /// The tensor's bytes, little-endian: borrowed from the map, or a swapped copy if the file is big-endian.
    ///
    /// # Errors
    /// If the type is unknown.
    pub fn tensor_data(&self, tensor: &TensorInfo) -> Result<Cow<'_, [u8]>, GgufError> {
        self.swapped(tensor, None)
    }

    /// The bytes of `n_rows` rows starting at `first_row`, little-endian: so that a huge tensor of a big-endian file
    /// needs no copy of its whole. Rows are counted over all but the first dimension.
    ///
    /// # Errors
    /// If the type is unknown or the tensor has fewer rows.
    pub fn read_rows(&self, tensor: &TensorInfo, first_row: u64, n_rows: u64) -> Result<Cow<'_, [u8]>, GgufError> {
        self.swapped(tensor, Some((first_row, n_rows)))
    }

    /// Reads the bytes of `n_rows` rows starting at `first_row` into `buffer`, little-endian, and returns them: the way
    /// to go through large tensors once, without page faults and without leaving pages mapped.
    ///
    /// # Errors
    /// As [`Gguf::read_rows`], or if the file cannot be read.
    pub fn load_rows<'a>(
        &self,
        tensor: &TensorInfo,
        first_row: u64,
        n_rows: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], GgufError> {
        let (shard, range) = self.place(tensor, Some((first_row, n_rows)))?;
        self.load(shard, range, buffer)?;
        if shard.big_endian && !byte_order::is_order_free(tensor.ty) && !byte_order::to_little_endian(tensor.ty, buffer)
        {
            return Err(self.unknown_type(tensor));
        }
        Ok(buffer)
    }

    /// Reads `count` bytes of the tensor from byte `first` on into `buffer`, whatever its type, and returns them: for copies
    /// of tensors whose layout is unknown.
    ///
    /// # Errors
    /// If the tensor has fewer bytes, the file is big-endian (what is to be swapped is unknown) or cannot be read.
    pub(crate) fn load_bytes<'a>(
        &self,
        tensor: &TensorInfo,
        first: u64,
        count: u64,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], GgufError> {
        let shard = self.shards.get(tensor.shard).filter(|shard| !shard.big_endian);
        let shard = shard.ok_or_else(|| self.unknown_type(tensor))?;
        let start = shard.data_start.checked_add(tensor.offset).and_then(|start| start.checked_add(first));
        let end = start.and_then(|start| start.checked_add(count)).filter(|end| *end <= shard.file_bytes());
        let within = first.checked_add(count).is_some_and(|end| tensor.bytes.is_some_and(|bytes| end <= bytes));
        match (start, end) {
            // Below the file's length, so both fit usize.
            (Some(start), Some(end)) if within => self.load(shard, start as usize..end as usize, buffer)?,
            _ => return Err(self.unknown_type(tensor)),
        }
        Ok(buffer)
    }

    fn load(&self, shard: &Shard, range: Range<usize>, buffer: &mut Vec<u8>) -> Result<(), GgufError> {
        shard.source.load(range, buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => GgufError::CutInUse { file: shard.label.clone() },
            _ => GgufError::Io {
                file: shard.label.clone(),
                action: "read the tensor data",
                source,
                advice: "check the disk and run again",
            },
        })
    }

    /// Lets the system drop the mapped pages of these rows, which count as resident memory of the process until
    /// then. They are read from the file again if touched later.
    pub fn release_rows(&self, tensor: &TensorInfo, first_row: u64, n_rows: u64) {
        if let Ok((shard, range)) = self.place(tensor, Some((first_row, n_rows))) {
            shard.source.release(range);
        }
    }

    /// Asks the system to read these rows from the disk in the background, ahead of their use.
    pub(crate) fn prefetch_rows(&self, tensor: &TensorInfo, first_row: u64, n_rows: u64) {
        if let Ok((shard, range)) = self.place(tensor, Some((first_row, n_rows))) {
            shard.source.prefetch(range);
        }
    }

    /// [`Gguf::release_rows`] for the whole tensor.
    pub fn release(&self, tensor: &TensorInfo) {
        self.release_rows(tensor, 0, tensor.rows());
    }

    fn swapped(&self, tensor: &TensorInfo, rows: Option<(u64, u64)>) -> Result<Cow<'_, [u8]>, GgufError> {
        let (shard, range) = self.place(tensor, rows)?;
        let stored = &shard.source.as_slice()[range];
        if !shard.big_endian || byte_order::is_order_free(tensor.ty) {
            return Ok(Cow::Borrowed(stored));
        }
        let mut data = stored.to_vec();
        if byte_order::to_little_endian(tensor.ty, &mut data) {
            Ok(Cow::Owned(data))
        } else {
            Err(self.unknown_type(tensor))
        }
    }

    fn unknown_type(&self, tensor: &TensorInfo) -> GgufError {
        GgufError::Tensor {
            file: self.shards.get(tensor.shard).map_or_else(String::new, |shard| shard.label.clone()),
            tensor: tensor.shown_name(),
            problem: match tensor.ty.foreign() {
                Some(whose) => format!("is of type {whose}, so its data cannot be decoded"),
                None => format!("of type {} has no size", tensor.ty),
            },
            advice: "a newer lwq may know the type, --target COPY carries it over",
        }
    }

    /// Where a tensor's bytes (or those of some rows) are; checked again, since any `TensorInfo` can be passed in.
    fn place(&self, tensor: &TensorInfo, rows: Option<(u64, u64)>) -> Result<(&Shard, Range<usize>), GgufError> {
        let known = tensor.bytes.filter(|_| tensor.ty.info().is_some());
        let mut bytes = known.ok_or_else(|| self.unknown_type(tensor))?;
        let wrong = |problem: String| GgufError::Tensor {
            file: self.label().to_owned(),
            tensor: tensor.shown_name(),
            problem,
            advice: "pass a tensor and rows of this model",
        };
        let shard = self.shards.get(tensor.shard).ok_or_else(|| wrong(format!("has no shard {}", tensor.shard)))?;
        let mut start = shard.data_start.checked_add(tensor.offset);
        if let Some((first_row, n_rows)) = rows {
            let row_bytes = tensor.row_bytes().ok_or_else(|| self.unknown_type(tensor))?;
            if first_row.checked_add(n_rows).is_none_or(|end| end > tensor.rows()) {
                return Err(wrong(format!("has {} rows, not {n_rows} from row {first_row}", tensor.rows())));
            }
            let skipped = first_row.checked_mul(row_bytes);
            start = start.zip(skipped).and_then(|(start, skipped)| start.checked_add(skipped));
            bytes = n_rows.saturating_mul(row_bytes);
        }
        let range = start.zip(start.and_then(|start| start.checked_add(bytes)));
        match range {
            // Below the slice's length, so both fit usize.
            Some((start, end)) if end <= shard.file_bytes() => Ok((shard, start as usize..end as usize)),
            _ => Err(wrong(format!("its {bytes} bytes are outside the file"))),
        }
    }
}

/// Positions sorted by name; a name that occurs twice is an error. n log n in the number of tensors.
fn sort_by_name(tensors: &[TensorInfo], shards: &[Shard]) -> Result<Vec<u32>, GgufError> {
    // At most 2^20 tensors.
    let mut sorted: Vec<u32> = (0..tensors.len() as u32).collect();
    sorted.sort_unstable_by(|a, b| tensors[*a as usize].name.cmp(&tensors[*b as usize].name).then(a.cmp(b)));
    for pair in sorted.windows(2) {
        let (first, second) = (&tensors[pair[0] as usize], &tensors[pair[1] as usize]);
        if first.name == second.name {
            let problem = if first.shard == second.shard {
                format!("the name occurs twice, as tensors {} and {}", pair[0], pair[1])
            } else {
                format!("the name occurs in {} too", shards[first.shard].label)
            };
            return Err(GgufError::Tensor {
                file: shards[second.shard].label.clone(),
                tensor: shown(second.name.as_bytes()),
                problem,
                advice: DAMAGED,
            });
        }
    }
    Ok(sorted)
}

fn open_shard(path: &Path, number: usize) -> Result<(Shard, ParsedFile), GgufError> {
    let label = shown_path(path);
    let io = |action: &'static str| {
        let file = label.clone();
        move |source| GgufError::Io { file, action, source, advice: "check the path and its permissions" }
    };
    // Asked before opening: opening a FIFO would wait for a writer.
    let kind = std::fs::metadata(path).map_err(io("open the file"))?.file_type();
    if !kind.is_file() {
        let found = if kind.is_dir() { "a directory" } else { "a special file" };
        return Err(GgufError::NotAFile { file: label, found });
    }
    let file = File::open(path).map_err(io("open the file"))?;
    let len = file.metadata().map_err(io("read the size of the file"))?.len();
    let source = if len == 0 {
        Source::Memory(Vec::new())
    } else {
        // SAFETY: the map is read-only and private to this process, and all reads of it are plain byte reads. Another
        // process that changes the file can change the bytes or, by truncating it, end this process; `Gguf::open`
        // documents that the file must be left alone.
        Source::Map(unsafe { Mmap::map(&file) }.map_err(io("map the file"))?, file)
    };
    parse_shard(source, Some(path.to_owned()), label, number)
}

fn parse_shard(
    source: Source,
    path: Option<PathBuf>,
    label: String,
    number: usize,
) -> Result<(Shard, ParsedFile), GgufError> {
    let source = Arc::new(source);
    let parsed = parse(&source, &label, number)?;
    let shard = Shard {
        path,
        label,
        version: parsed.version,
        big_endian: parsed.big_endian,
        alignment: parsed.metadata.alignment()?,
        data_start: parsed.data_start,
        own_keys: Vec::new(),
        source,
    };
    Ok((shard, parsed))
}
