//! Files of saved log-probabilities, as `llama-perplexity --save-all-logits` writes and `--kl-divergence-base` reads
//! them.
//!
//! ```text
//! u8  magic[8]  "_logits_"
//! i32 n_ctx, i32 n_vocab, i32 n_chunk
//! i32 token[n_chunk * n_ctx]              without the BOS that windows begin with
//! for every chunk, for every position from n_ctx / 2 to n_ctx - 2:
//!     f32 scale, f32 min_log_prob, u16 q[n_vocab], and u16 of padding when n_vocab is odd
//! ```
//!
//! A log-probability is `scale * q + min_log_prob`. Values more than 16 nats below the largest are raised to that
//! floor and the rounding is not normalised again, so a divergence from such a file is biased: a model's divergence
//! from its own file is not zero, and may be slightly negative.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian, ReadBytesExt, WriteBytesExt};
use rayon::prelude::*;

use super::{EvalError, Windows};
use crate::atomic_file::{AtomicFile, OutputError};
use crate::model::math::{exp_sum, max};

const MAGIC: &[u8; 8] = b"_logits_";

/// Log-probabilities at or below minus this many nats do not count in a divergence from a file.
pub(crate) const LOGITS_CUT: f32 = 16.0;

/// Bytes of the header without the tokens.
const HEADER_BYTES: u64 = 20;

/// Bytes of one distribution.
fn record_bytes(n_vocab: usize) -> usize {
    2 * (n_vocab.next_multiple_of(2) + 4)
}

/// A file of saved log-probabilities, read from front to back.
pub(crate) struct LogitsReader {
    path: PathBuf,
    input: BufReader<File>,
    n_ctx: usize,
    n_vocab: usize,
    tokens: Vec<u32>,
    record: Vec<u8>,
}

impl LogitsReader {
    /// Opens a file and checks its header, its tokens and its length.
    ///
    /// # Errors
    /// When the file cannot be read, is no such file, has a window or vocabulary size out of range, a token outside of
    /// its vocabulary, or another length than its header says.
    pub(crate) fn open(path: &Path) -> Result<LogitsReader, EvalError> {
        let bad = |field: &str, found: String, advice: &str| EvalError::BadLogitsFile {
            path: path.to_owned(),
            field: field.to_owned(),
            found,
            advice: advice.to_owned(),
        };
        let failed = |source| EvalError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut input = BufReader::with_capacity(1 << 20, file);
        if length < HEADER_BYTES {
            let advice = "it ends inside of its header; save the logits again";
            return Err(bad("the file", format!("has {length} bytes"), advice));
        }
        let mut magic = [0; 8];
        input.read_exact(&mut magic).map_err(failed)?;
        if &magic != MAGIC {
            let found = format!("are {}", magic.escape_ascii());
            return Err(bad(
                "the first bytes",
                found,
                "expected _logits_, a file of llama-perplexity --save-all-logits",
            ));
        }
        let mut word = || input.read_i32::<LittleEndian>().map_err(failed);
        let (n_ctx, n_vocab, n_chunk) = (word()?, word()?, word()?);
        let in_range = |field: &str, value: i32, least: i32| match usize::try_from(value) {
            Ok(n) if value >= least => Ok(n),
            _ => Err(bad(field, format!("is {value}"), "the file is damaged; save the logits again")),
        };
        let n_ctx = in_range("n_ctx", n_ctx, 4)?;
        let n_vocab = in_range("n_vocab", n_vocab, 1)?;
        let n_chunk = in_range("n_chunk", n_chunk, 1)?;
        let n_records = n_chunk as u128 * (n_ctx - 1 - n_ctx / 2) as u128;
        let n_tokens = n_chunk as u128 * n_ctx as u128;
        let expected = u128::from(HEADER_BYTES) + 4 * n_tokens + n_records * record_bytes(n_vocab) as u128;
        if u128::from(length) != expected {
            let found = format!("has {length} bytes, {n_chunk} chunks of {n_ctx} tokens need {expected}");
            return Err(bad("the file", found, "it was cut short or is damaged; save the logits again"));
        }
        let mut ids = vec![0i32; n_tokens as usize];
        input.read_i32_into::<LittleEndian>(&mut ids).map_err(failed)?;
        let mut tokens = Vec::with_capacity(ids.len());
        for (index, id) in ids.into_iter().enumerate() {
            match id {
                id if (0..n_vocab as i64).contains(&id.into()) => tokens.push(id as u32),
                id => {
                    let found = format!("is {id}, outside of the vocabulary of {n_vocab}");
                    return Err(bad(&format!("token {index}"), found, "the file is damaged; save the logits again"));
                }
            }
        }
        Ok(LogitsReader { path: path.to_owned(), input, n_ctx, n_vocab, tokens, record: Vec::new() })
    }

    /// Tokens per window.
    pub(crate) fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Vocabulary size.
    pub(crate) fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// The windows that the file covers, `limit` at most.
    ///
    /// # Errors
    /// When the file holds a single window of fewer than 4 tokens; such a file is refused on opening.
    pub(crate) fn windows(&self, limit: Option<usize>, bos: Option<u32>) -> Result<Windows, EvalError> {
        Windows::whole_chunks(self.tokens.clone(), self.n_ctx, limit, bos)
    }

    /// Decodes the next `rows` distributions into `out`, `[rows, n_vocab]` row-major log-probabilities.
    ///
    /// # Errors
    /// When the file ends, or a distribution is none.
    ///
    /// # Panics
    /// When `out` has another length.
    pub(crate) fn read_rows(&mut self, rows: usize, out: &mut [f32]) -> Result<(), EvalError> {
        assert_eq!(out.len(), rows * self.n_vocab, "room for {rows} rows");
        let size = record_bytes(self.n_vocab);
        self.record.resize(rows * size, 0);
        let failed = |source| EvalError::Read { path: self.path.clone(), source };
        self.input.read_exact(&mut self.record).map_err(failed)?;
        let decoded: Result<(), (f32, f32)> =
            self.record.par_chunks_exact(size).zip(out.par_chunks_exact_mut(self.n_vocab)).try_for_each(
                |(record, row)| {
                    let (scale, least) = (LittleEndian::read_f32(record), LittleEndian::read_f32(&record[4..]));
                    let largest = scale * 65535.0 + least;
                    // A distribution has a most likely token, so its floor lies 16 nats below some value under zero;
                    // a file of ik_llama.cpp has it at 24.
                    if !(scale >= 0.0 && least.is_finite() && largest <= 0.01 && least > -100.0) {
                        return Err((scale, least));
                    }
                    for (value, q) in row.iter_mut().zip(record[8..].chunks_exact(2)) {
                        *value = scale * f32::from(LittleEndian::read_u16(q)) + least;
                    }
                    Ok(())
                },
            );
        decoded.map_err(|(scale, least)| EvalError::BadLogitsFile {
            path: self.path.clone(),
            field: "a distribution".to_owned(),
            found: format!("has scale {scale} and smallest log-probability {least}"),
            advice: "the file is damaged; save the logits again".to_owned(),
        })
    }
}

/// Writes a file of log-probabilities. It appears under its name when [`Self::finish`] has been called.
pub(crate) struct LogitsWriter {
    output: BufWriter<AtomicFile>,
    target: PathBuf,
    n_vocab: usize,
    records_left: usize,
}

impl LogitsWriter {
    /// Begins a file for all of `windows`; `replace` allows to replace one that exists.
    ///
    /// # Errors
    /// When the file cannot be made, or windows overlap: the form has no place for strides.
    pub(crate) fn create(
        path: &Path,
        replace: bool,
        windows: &Windows,
        n_vocab: usize,
    ) -> Result<LogitsWriter, EvalError> {
        let n_ctx = windows.n_ctx();
        let chunked = windows.scored() == (n_ctx / 2..n_ctx - 1);
        let counts = [n_ctx, n_vocab, windows.len()].map(|n| i32::try_from(n).ok());
        let (true, [Some(ctx), Some(vocab), Some(chunks)]) = (chunked, counts) else {
            let reason = "a logits file holds windows side by side; leave out the stride or the file".to_owned();
            return Err(EvalError::BadWindow { reason });
        };
        let file = AtomicFile::create(path, replace)?;
        let records_left = windows.len() * windows.scored_per_window();
        let tokens = windows.len() * n_ctx;
        let bytes = HEADER_BYTES + 4 * tokens as u64 + records_left as u64 * record_bytes(n_vocab) as u64;
        file.reserve(bytes)?;
        let mut writer = LogitsWriter {
            output: BufWriter::with_capacity(1 << 20, file),
            target: path.to_owned(),
            n_vocab,
            records_left,
        };
        let written = write_header(&mut writer.output, [ctx, vocab, chunks], &windows.tokens()[..tokens]);
        written.map_err(|source| writer.failed(source))?;
        Ok(writer)
    }

    fn failed(&self, source: io::Error) -> EvalError {
        OutputError::Io { path: self.target.clone(), action: "cannot write it", source }.into()
    }

    /// Adds distributions, `[rows, n_vocab]` row-major logits, in the order of the text.
    ///
    /// # Errors
    /// When the disk reports an error.
    pub(crate) fn add_rows(&mut self, logits: &[f32]) -> Result<(), EvalError> {
        let size = record_bytes(self.n_vocab);
        let rows = logits.len() / self.n_vocab;
        let mut records = vec![0u8; rows * size];
        let pairs = logits.par_chunks_exact(self.n_vocab).zip(records.par_chunks_exact_mut(size));
        pairs.for_each(|(row, record)| encode(row, record));
        self.records_left = self.records_left.saturating_sub(rows);
        self.output.write_all(&records).map_err(|source| self.failed(source))
    }

    /// Gives the file its name. Without all distributions nothing appears and `false` is returned.
    ///
    /// # Errors
    /// When the disk reports an error.
    pub(crate) fn finish(self) -> Result<bool, EvalError> {
        if self.records_left > 0 {
            return Ok(false);
        }
        let target = self.target;
        let file = self.output.into_inner().map_err(|e| OutputError::Io {
            path: target,
            action: "cannot write it",
            source: e.into_error(),
        })?;
        file.commit()?;
        Ok(true)
    }
}

fn write_header(out: &mut impl Write, numbers: [i32; 3], tokens: &[u32]) -> io::Result<()> {
    out.write_all(MAGIC)?;
    numbers.into_iter().try_for_each(|number| out.write_i32::<LittleEndian>(number))?;
    tokens.iter().try_for_each(|token| out.write_u32::<LittleEndian>(*token))
}

/// One record. The order of operations is llama-perplexity's.
fn encode(logits: &[f32], record: &mut [u8]) {
    let largest = max(logits);
    let least = logits.iter().fold(f32::INFINITY, |a, &b| a.min(b)).max(largest - LOGITS_CUT);
    let log_sum = exp_sum(logits, largest).ln() as f32;
    let scale = (largest - least) / 65535.0;
    LittleEndian::write_f32(record, scale);
    LittleEndian::write_f32(&mut record[4..], least - largest - log_sum);
    if scale > 0.0 {
        let inverse = 1.0 / scale;
        for (q, &logit) in record[8..].chunks_exact_mut(2).zip(logits) {
            let value = if logit > least { (inverse * (logit - least)).round_ties_even() as u16 } else { 0 };
            LittleEndian::write_u16(q, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::math::log_sum_exp;

    fn row(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 11) % 41) as f32 * 0.6 - 5.0).collect()
    }

    fn saved(folder: &tempfile::TempDir, n_vocab: usize) -> (PathBuf, Vec<f32>, Windows) {
        let path = folder.path().join("base.kld");
        let tokens = (0..20).map(|i| i % n_vocab as u32).collect();
        let windows = Windows::chunks(tokens, 8, None, Some(1)).unwrap();
        let mut writer = LogitsWriter::create(&path, false, &windows, n_vocab).unwrap();
        let logits: Vec<f32> = (0..6).flat_map(|i| row(n_vocab, i)).collect();
        writer.add_rows(&logits[..4 * n_vocab]).unwrap();
        writer.add_rows(&logits[4 * n_vocab..]).unwrap();
        assert!(writer.finish().unwrap());
        (path, logits, windows)
    }

    #[test]
    fn what_was_written_comes_back_to_half_a_step() {
        for n_vocab in [50, 51] {
            let folder = tempfile::tempdir().unwrap();
            let (path, logits, windows) = saved(&folder, n_vocab);
            assert_eq!(
                std::fs::metadata(&path).unwrap().len(),
                20 + 4 * 16 + 6 * 2 * (n_vocab.div_ceil(2) as u64 * 2 + 4)
            );
            let mut reader = LogitsReader::open(&path).unwrap();
            assert_eq!((reader.n_ctx(), reader.n_vocab()), (8, n_vocab));
            assert_eq!(reader.windows(None, Some(1)).unwrap().sequence(1), windows.sequence(1));
            let mut out = vec![0.0; 6 * n_vocab];
            reader.read_rows(6, &mut out).unwrap();
            for (logits, decoded) in logits.chunks_exact(n_vocab).zip(out.chunks_exact(n_vocab)) {
                let lse = log_sum_exp(logits);
                let floor = max(decoded) - 16.0;
                for (l, d) in logits.iter().zip(decoded) {
                    let want = (f64::from(*l) - lse).max(f64::from(floor));
                    assert!((want - f64::from(*d)).abs() < 1.3e-4 + 1e-5, "{want} {d}");
                }
            }
        }
    }

    #[test]
    fn an_unfinished_file_does_not_appear() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.kld");
        let windows = Windows::chunks((0..16).collect(), 8, None, None).unwrap();
        let mut writer = LogitsWriter::create(&path, false, &windows, 30).unwrap();
        writer.add_rows(&row(30, 1)).unwrap();
        assert!(!writer.finish().unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_files_are_refused_by_field() {
        let folder = tempfile::tempdir().unwrap();
        let (path, ..) = saved(&folder, 50);
        let whole = std::fs::read(&path).unwrap();
        let refused = |change: &dyn Fn(&mut Vec<u8>), field: &str| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            let outcome = LogitsReader::open(&path).and_then(|mut reader| reader.read_rows(6, &mut [0.0; 300]));
            let text = outcome.unwrap_err().to_string();
            assert!(text.contains(field) && !text.contains('\n'), "{text}");
        };
        let set = |at: usize, value: i32| move |b: &mut Vec<u8>| b[at..at + 4].copy_from_slice(&value.to_le_bytes());
        refused(&|b| b[0] = b'x', "first bytes");
        for value in [0, 1, -1, i32::MAX] {
            refused(&set(8, value), if value == i32::MAX { "bytes" } else { "n_ctx" });
        }
        refused(&set(12, 0), "n_vocab");
        refused(&set(12, -5), "n_vocab");
        refused(&set(12, 40), "bytes");
        refused(&set(16, 0), "n_chunk");
        refused(&set(16, -1), "n_chunk");
        refused(&set(16, i32::MAX), "bytes");
        refused(&set(20, -1), "token 0");
        refused(&set(24, 50), "token 1");
        refused(&set(20 + 64, f32::NAN.to_bits() as i32), "scale");
        refused(&set(20 + 64, (-1.0f32).to_bits() as i32), "scale");
        refused(&set(20 + 64 + 4, f32::INFINITY.to_bits() as i32), "scale");
        for length in [0, 7, 12, 19, 30, 100, whole.len() - 1] {
            refused(&|b| b.truncate(length), "");
        }
        refused(&|b| b.push(0), "bytes");
    }
}
