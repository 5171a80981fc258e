//! Scored windows kept in a file, so that a run that was interrupted goes on where it stopped, and a model added to a
//! comparison does not make the others run again.
//!
//! The file is one line of JSON, which names the sections and their lengths, and after it the sections' predictions:
//! 13 bytes each, little-endian, `nll`, `nll_base` and `kld` as f32 and a byte for the same most likely token. Without a
//! reference the last three are zero.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write};
use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian, WriteBytesExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{EvalError, ModelScores, ScoredToken, Windows};
use crate::atomic_file::{AtomicFile, OutputError};

const FORMAT: &str = "lwq evaluation state 1";
const RECORD_BYTES: usize = 13;

/// Longest first line: that of some 100,000 sections.
const LONGEST_HEADER: u64 = 1 << 24;

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    sections: Vec<Section>,
}

#[derive(Serialize, Deserialize)]
struct Section {
    key: String,
    predictions: usize,
    with_reference: bool,
}

/// Scores of models on the first windows of a text, by [`section_key`].
#[derive(Debug)]
pub(crate) struct EvaluationState {
    path: PathBuf,
    sections: BTreeMap<String, ModelScores>,
}

/// Names what a model's scores depend on: the model, the reference (fingerprints), the text and how it is cut, and how
/// activations are rounded. The number of windows does not count.
pub(crate) fn section_key(model: &str, reference: Option<&str>, windows: &Windows, activations: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{model}\n{}\n{activations}\n", reference.unwrap_or("none")));
    hash.update(format!("{} {:?} {:?}\n", windows.n_ctx(), windows.scored(), windows.bos()));
    windows.tokens().iter().for_each(|token| hash.update(token.to_le_bytes()));
    format!("{:x}", hash.finalize())
}

impl EvaluationState {
    /// Reads a file; one that does not exist holds nothing.
    ///
    /// # Errors
    /// When the file cannot be read, or is damaged or none of these.
    pub(crate) fn open(path: &Path) -> Result<EvaluationState, EvalError> {
        let empty = EvaluationState { path: path.to_owned(), sections: BTreeMap::new() };
        let unreadable = |source| EvalError::Read { path: path.to_owned(), source };
        let mut file = match File::open(path) {
            Ok(file) => BufReader::new(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(empty),
            Err(source) => return Err(unreadable(source)),
        };
        let bad = |found: &str| EvalError::BadState { path: path.to_owned(), found: found.to_owned() };
        // The rest is read only when the first line is right: the name of a model may be given by mistake.
        let mut line = Vec::new();
        file.by_ref().take(LONGEST_HEADER).read_until(b'\n', &mut line).map_err(unreadable)?;
        let header: Header = serde_json::from_slice(&line).map_err(|_| bad("is no evaluation state"))?;
        if header.format != FORMAT {
            return Err(bad("is an evaluation state of another version"));
        }
        let mut data = Vec::new();
        file.read_to_end(&mut data).map_err(unreadable)?;
        let mut records = data.chunks_exact(RECORD_BYTES);
        let expected = header.sections.iter().try_fold(0usize, |sum, s| sum.checked_add(s.predictions));
        if expected != Some(records.len()) || !records.remainder().is_empty() {
            return Err(bad("is an evaluation state of another length than its first line says"));
        }
        let mut sections = BTreeMap::new();
        for section in header.sections {
            let tokens: Vec<ScoredToken> = records.by_ref().take(section.predictions).map(decode).collect();
            if tokens.iter().any(|t| !(t.nll.is_finite() && t.nll_base.is_finite() && t.kld.is_finite())) {
                return Err(bad("is an evaluation state with values that are no numbers"));
            }
            let nlls: Vec<f32> = tokens.iter().map(|t| t.nll).collect();
            let mut scores = ModelScores::default();
            scores.extend(&nlls, if section.with_reference { &tokens } else { &[] });
            sections.insert(section.key, scores);
        }
        Ok(EvaluationState { sections, ..empty })
    }

    /// What is known of the section, nothing at first.
    pub(crate) fn section(&self, key: &str) -> ModelScores {
        self.sections.get(key).cloned().unwrap_or_default()
    }

    /// Takes scores over, unless it knows more of them.
    pub(crate) fn keep(&mut self, key: &str, scores: &ModelScores) {
        if self.sections.get(key).is_none_or(|known| known.nlls.len() < scores.nlls.len()) {
            self.sections.insert(key.to_owned(), scores.clone());
        }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn save(&self) -> Result<(), EvalError> {
        let sections = self.sections.iter().map(|(key, scores)| Section {
            key: key.clone(),
            predictions: scores.nlls.len(),
            with_reference: !scores.divergence.tokens.is_empty(),
        });
        let header = Header { format: FORMAT.to_owned(), sections: sections.collect() };
        let failed = |source| OutputError::Io { path: self.path.clone(), action: "cannot write it", source };
        let mut data = serde_json::to_vec(&header).map_err(|e| failed(e.into()))?;
        data.push(b'\n');
        for scores in self.sections.values() {
            for (at, &nll) in scores.nlls.iter().enumerate() {
                let token = scores.divergence.tokens.get(at).copied();
                encode(token.unwrap_or(ScoredToken { nll, ..ScoredToken::default() }), &mut data).map_err(failed)?;
            }
        }
        let mut file = AtomicFile::create(&self.path, true)?;
        file.write_all(&data).map_err(failed)?;
        file.commit()?;
        Ok(())
    }
}

fn encode(token: ScoredToken, out: &mut impl Write) -> io::Result<()> {
    for value in [token.nll, token.nll_base, token.kld] {
        out.write_f32::<LittleEndian>(value)?;
    }
    out.write_u8(u8::from(token.same_top))
}

fn decode(record: &[u8]) -> ScoredToken {
    let value = |at: usize| LittleEndian::read_f32(&record[at..]);
    ScoredToken { nll: value(0), nll_base: value(4), kld: value(8), same_top: record[12] != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(n: usize, with_reference: bool) -> ModelScores {
        let token = |i: usize| ScoredToken {
            nll: i as f32 * 0.5,
            nll_base: i as f32 * 0.25,
            kld: 0.125,
            same_top: i.is_multiple_of(3),
        };
        let tokens: Vec<ScoredToken> = (0..n).map(token).collect();
        let nlls: Vec<f32> = tokens.iter().map(|t| t.nll).collect();
        let mut scores = ModelScores::default();
        scores.extend(&nlls, if with_reference { &tokens } else { &[] });
        scores
    }

    #[test]
    fn sections_come_back_and_never_get_shorter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.state");
        let mut state = EvaluationState::open(&path).unwrap();
        assert!(state.section("a").nlls.is_empty());
        state.keep("a", &scores(7, true));
        state.keep("b", &scores(3, false));
        state.keep("a", &scores(5, true));
        state.save().unwrap();
        let read = EvaluationState::open(&path).unwrap();
        let (a, b) = (read.section("a"), read.section("b"));
        assert_eq!(a.divergence.tokens, scores(7, true).divergence.tokens);
        assert_eq!((a.perplexity, a.nlls.len()), (scores(7, true).perplexity, 7));
        assert_eq!((b.nlls, b.divergence.tokens.len()), (scores(3, false).nlls, 0));
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.state");
        let mut state = EvaluationState::open(&path).unwrap();
        state.keep("a", &scores(7, true));
        state.save().unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut nan = whole.clone();
        let last = nan.len() - RECORD_BYTES;
        nan[last..last + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        let huge = String::from_utf8_lossy(&whole).replace("\"predictions\":7", "\"predictions\":18446744073709551615");
        for (data, problem) in [
            (&b"no line"[..], "is no evaluation state"),
            (b"{}\n", "is no evaluation state"),
            (&whole[..whole.len() - 1], "another length"),
            (huge.as_bytes(), "another length"),
            (&nan, "no numbers"),
        ] {
            std::fs::write(&path, data).unwrap();
            let error = EvaluationState::open(&path).unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("run.state"), "{error}");
        }
    }
}
