//! What can be wrong with an imatrix file, and what is odd but bearable.

use std::fmt;
use std::io;

use crate::atomic_file::OutputError;
use crate::gguf::{GgufError, shown};
use crate::model::ModelError;
use crate::progress::Interrupted;
use crate::text::TextError;

/// Why an imatrix could not be read, combined or written. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ImatrixError {
    /// The file starts with the GGUF magic and is not a sound GGUF file; never retried as the legacy form.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The operating system refused to open or read the file.
    #[error("{file}: cannot read the imatrix: {source}")]
    Read {
        /// Path as the caller gave it.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The file was read and its content cannot be an imatrix.
    #[error("{file}: {problem}")]
    Content {
        /// Path as the caller gave it.
        file: String,
        /// What was found where.
        problem: Problem,
    },
    /// Two inputs of a merge contradict each other.
    #[error("{file}: cannot be merged: {problem}")]
    Merge {
        /// The input at which the contradiction appeared.
        file: String,
        /// What contradicts what.
        problem: MergeProblem,
    },
    /// The values do not fit the form in which they were to be written.
    #[error("cannot write the imatrix as {form}: {problem}")]
    Unwritable {
        /// `.dat` or `GGUF`.
        form: &'static str,
        /// What does not fit.
        problem: WriteProblem,
    },
    /// The model cannot be run.
    #[error("{file}: {source}")]
    Model {
        /// The model's file.
        file: String,
        /// Why.
        source: Box<ModelError>,
    },
    /// The text or the tokenizer is not usable.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A document has less than two chunks.
    #[error(
        "{name}: {tokens} tokens, but at least two chunks of {n_ctx} are needed; give a longer text or a smaller --ctx"
    )]
    TextTooShort {
        /// The document's name.
        name: String,
        /// Tokens that it has.
        tokens: usize,
        /// Tokens of a chunk.
        n_ctx: usize,
    },
    /// All chunks were to be left out.
    #[error("--from-chunk {from}: the text has only {available} chunks of {n_ctx} tokens")]
    FromChunk {
        /// Chunks to leave out.
        from: usize,
        /// Chunks of the text.
        available: usize,
        /// Tokens of a chunk.
        n_ctx: usize,
    },
    /// A shard has no chunk.
    #[error("--shard: {chunks} chunks are too few for {count} parts")]
    EmptyShard {
        /// Chunks of all shards together.
        chunks: usize,
        /// Shards.
        count: usize,
    },
    /// The run was stopped.
    #[error("interrupted")]
    Interrupted(#[from] Interrupted),
    /// The state of an unfinished run cannot be used.
    #[error("{file}: {problem}")]
    Checkpoint {
        /// The checkpoint's path.
        file: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The output could not be made or given its name.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// Writing the output failed.
    #[error("cannot write the imatrix: {0}")]
    Write(#[from] io::Error),
}

impl ImatrixError {
    pub(super) fn content(file: &str, problem: Problem) -> Self {
        Self::Content { file: file.to_owned(), problem }
    }
}

/// Faults in the content of one imatrix file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file ends before the field that its own lengths promise.
    #[error(
        "ends inside {field}: {needed} bytes needed at offset {offset}, {left} left; the file is cut short or no imatrix, \
         fetch or make it again"
    )]
    Truncated {
        /// The field that is not there in full.
        field: String,
        /// Where the field starts, bytes from the start of the file.
        offset: u64,
        /// Bytes that the field takes.
        needed: u64,
        /// Bytes that the file still has.
        left: u64,
    },
    /// The first four bytes are neither the GGUF magic nor a number of entries that could be true.
    #[error(
        "no imatrix: it has no GGUF magic, and read as a legacy .dat it claims {entries} entries, of which {left} bytes \
         can hold at most {most}"
    )]
    EntryCount {
        /// The number of entries as stored.
        entries: i32,
        /// Bytes after that number.
        left: u64,
        /// The most entries that fit.
        most: u64,
    },
    /// A length or count of an entry of the legacy form that cannot be.
    #[error("{field} is {found}, expected {expected}; the file is damaged or no imatrix")]
    Field {
        /// Which field of which entry.
        field: String,
        /// The value as stored.
        found: i64,
        /// The range that makes sense.
        expected: &'static str,
    },
    /// A tensor name that is no text.
    #[error("the name of entry {entry} at offset {offset} is not UTF-8 text without NUL bytes; the file is damaged")]
    Name {
        /// Number of the entry, from 1.
        entry: i32,
        /// Where the name starts.
        offset: u64,
    },
    /// The same weight twice.
    #[error("weight {0} has two entries; keep one")]
    Duplicate(Quoted),
    /// Bytes after the end of the legacy form.
    #[error("{left} bytes follow the end of the data at offset {offset}; the file is damaged or no imatrix")]
    TrailingBytes {
        /// Where the data end.
        offset: u64,
        /// How many bytes follow.
        left: u64,
    },
    /// A sum of squares that is negative, infinite or no number.
    #[error(
        "weight {tensor}: value {index} of matrix {matrix} is {value}, but a sum of squares is finite and not negative; \
         make the imatrix again"
    )]
    Value {
        /// The weight.
        tensor: Quoted,
        /// Matrix (expert), from 0.
        matrix: usize,
        /// Column in that matrix, from 0.
        index: usize,
        /// What was stored.
        value: f32,
    },
    /// A token count that cannot be.
    #[error("weight {tensor}: the count of matrix {matrix} is {value}, expected 0 to 2^53; make the imatrix again")]
    Count {
        /// The weight.
        tensor: Quoted,
        /// Matrix (expert), from 0.
        matrix: usize,
        /// What was stored.
        value: f32,
    },
    /// A metadata key that llama-quantize and this program need.
    #[error("metadata key {0} is missing; the file is no imatrix or was written by another program, make it again")]
    MissingKey(&'static str),
    /// A metadata key with a value outside its range.
    #[error("metadata key {key} is {found}, expected {expected}")]
    Key {
        /// The key.
        key: &'static str,
        /// The value, or its type.
        found: String,
        /// The range or type that makes sense.
        expected: &'static str,
    },
    /// A model was given where an imatrix is wanted.
    #[error("is a model (general.architecture is {0}), not an imatrix; give the file that `lwq imatrix` wrote")]
    IsModel(Quoted),
    /// A GGUF file without a single pair of sums and counts.
    #[error("holds no imatrix entries (none of its {tensors} tensors is named *.in_sum2)")]
    NoEntries {
        /// Tensors in the file.
        tensors: usize,
    },
    /// One tensor of the pair `.in_sum2`, `.counts` is missing.
    #[error("weight {tensor} has {present} but not {absent}; the file is damaged, make it again")]
    Unpaired {
        /// The weight.
        tensor: Quoted,
        /// The suffix that is there.
        present: &'static str,
        /// The suffix that is not.
        absent: &'static str,
    },
    /// Sums or counts in another type than F32.
    #[error("tensor {tensor} has type {found}, expected f32")]
    TensorType {
        /// The tensor, suffix included.
        tensor: Quoted,
        /// Name of the type.
        found: String,
    },
    /// Numbers of sums and of counts that do not belong together.
    #[error("weight {tensor} has {sums} sums and {counts} counts; sums must be a positive multiple of counts")]
    Shape {
        /// The weight.
        tensor: Quoted,
        /// Elements of `.in_sum2`.
        sums: u64,
        /// Elements of `.counts`.
        counts: u64,
    },
}

/// Contradictions between the inputs of a merge.
#[derive(Debug, thiserror::Error)]
pub enum MergeProblem {
    /// An entry with another number of values: the files come from different models.
    #[error("weight {tensor} has {found} values, {expected} in {earlier}; merge files of one model only")]
    Length {
        /// The weight.
        tensor: Quoted,
        /// Values here.
        found: usize,
        /// Values in the earlier input.
        expected: usize,
        /// The earlier input.
        earlier: String,
    },
    /// An entry with another number of matrices, and neither is one.
    #[error("weight {tensor} has {found} counts, {expected} in {earlier}; merge files of one model only")]
    Counts {
        /// The weight.
        tensor: Quoted,
        /// Counts here.
        found: usize,
        /// Counts in the earlier input.
        expected: usize,
        /// The earlier input.
        earlier: String,
    },
    /// Too many tokens to count exactly.
    #[error("the count of weight {tensor} would pass 2^53; a count is damaged or a file was merged too often")]
    CountOverflow {
        /// The weight.
        tensor: Quoted,
    },
    /// The sums leave the range of f32.
    #[error("value {index} of weight {tensor} would pass the range of f32; a file is damaged or was merged too often")]
    SumOverflow {
        /// The weight.
        tensor: Quoted,
        /// Index of the value.
        index: usize,
    },
    /// Nothing to merge.
    #[error("no imatrix was given")]
    NoInput,
}

/// Values that a form cannot hold.
#[derive(Debug, thiserror::Error)]
pub enum WriteProblem {
    /// A number that has a 32-bit field there.
    #[error("{field} is {value}, the form holds at most 2147483647")]
    TooLarge {
        /// Which number.
        field: String,
        /// Its value.
        value: u64,
    },
    /// A name that GGUF's readers would refuse.
    #[error("weight {tensor} has a name of {found} bytes, GGUF holds {most} here; write .dat instead")]
    LongName {
        /// The weight.
        tensor: Quoted,
        /// Length of its name.
        found: usize,
        /// The longest name that fits with its suffix.
        most: usize,
    },
    /// A value that left its range on the way, such as calls times chunk size.
    #[error("{field} of weight {tensor} becomes {value}, which no reader accepts; the input is damaged")]
    OutOfRange {
        /// Which value.
        field: String,
        /// The weight.
        tensor: Quoted,
        /// What it would be.
        value: f64,
    },
    /// No entry holds any data.
    #[error("none of its {entries} entries saw a token")]
    NoData {
        /// Entries in the imatrix.
        entries: usize,
    },
}

/// Odd but bearable: printed once, and the work goes on. Every message is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warning {
    /// Legacy entries with a call count of 0; their values are taken as they are.
    NoCalls {
        /// How many.
        entries: usize,
        /// The first of them.
        first: Quoted,
    },
    /// The legacy trailer holds a negative number of chunks, which is dropped.
    ChunkCount(i32),
    /// Counts with a fraction, which are rounded.
    FractionalCounts {
        /// How many entries have such a count.
        entries: usize,
        /// The first of them.
        first: Quoted,
    },
    /// Matrices with sums but no tokens; their sums are not used.
    SumsWithoutCount {
        /// How many matrices.
        matrices: usize,
        /// Weight of the first of them.
        first: Quoted,
    },
    /// GGUF tensors with a suffix that this program does not know.
    IgnoredTensors {
        /// How many.
        tensors: usize,
        /// The first of them.
        first: Quoted,
    },
    /// Legacy input: the number of tokens behind a call is not stored.
    AssumedChunkSize {
        /// The legacy file.
        file: String,
        /// Tokens per call that were assumed.
        chunk_size: u32,
    },
    /// Two inputs of a merge with the same content.
    SameContent {
        /// The later input.
        file: String,
        /// The earlier input.
        earlier: String,
    },
    /// Inputs of a merge with different chunk sizes.
    ChunkSizes {
        /// The later input.
        file: String,
        /// Its chunk size.
        found: u32,
        /// The chunk size that is kept.
        kept: u32,
    },
    /// Inputs of a merge of which one has a count per expert and the other a single count.
    SingleCounts {
        /// How many entries.
        entries: usize,
        /// The first of them.
        first: Quoted,
    },
    /// Entries that only some inputs of a merge have.
    PartlyPresent {
        /// How many.
        entries: usize,
        /// The first of them.
        first: Quoted,
    },
    /// Entries without any data, which the legacy form cannot hold.
    LeftOut {
        /// How many.
        entries: usize,
        /// The first of them.
        first: Quoted,
    },
    /// Matrices that no token reached and that stand as ones.
    Neutral {
        /// How many matrices.
        matrices: usize,
        /// How many entries they belong to.
        entries: usize,
        /// The first of these entries.
        first: Quoted,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCalls { entries, first } => {
                write!(f, "{entries} entries have a call count of 0 (first {first}); their values are used as they are")
            }
            Self::ChunkCount(found) => write!(f, "the number of chunks is {found}; ignored"),
            Self::FractionalCounts { entries, first } => {
                write!(f, "{entries} entries have counts that are no whole numbers (first {first}); rounded")
            }
            Self::SumsWithoutCount { matrices, first } => write!(
                f,
                "{matrices} matrices have sums but a count of 0 (first in {first}); they get neutral weights of 1"
            ),
            Self::IgnoredTensors { tensors, first } => {
                write!(f, "{tensors} tensors are neither sums nor counts (first {first}); ignored")
            }
            Self::AssumedChunkSize { file, chunk_size } => write!(
                f,
                "{file}: a legacy .dat does not say how many tokens a chunk had; {chunk_size} assumed (--chunk-size sets it)"
            ),
            Self::SameContent { file, earlier } => {
                write!(f, "{file}: holds the same data as {earlier}; its tokens now count twice")
            }
            Self::ChunkSizes { file, found, kept } => {
                write!(
                    f,
                    "{file}: has chunks of {found} tokens, the result states {kept}; token counts are added as they are"
                )
            }
            Self::SingleCounts { entries, first } => write!(
                f,
                "{entries} entries have a count per expert in one file and a single count in another (first {first}); the \
                 single count is used for every expert"
            ),
            Self::PartlyPresent { entries, first } => {
                write!(f, "{entries} entries are in some of the files only (first {first}); kept")
            }
            Self::LeftOut { entries, first } => {
                write!(f, "{entries} entries saw no token and are left out (first {first})")
            }
            Self::Neutral { matrices, entries, first } => write!(
                f,
                "{matrices} matrices in {entries} entries saw no token (first in {first}); they stand as neutral weights of 1"
            ),
        }
    }
}

/// A name from a file; shown quoted, with control characters escaped and cut to a bearable length.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quoted(pub String);

impl From<&str> for Quoted {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

impl From<&String> for Quoted {
    fn from(name: &String) -> Self {
        Self(name.clone())
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(self.0.as_bytes()))
    }
}
