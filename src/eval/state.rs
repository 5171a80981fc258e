//! Scored windows kept in a file, so that a run that was interrupted goes on where it stopped, and a model added to a
//! comparison does not make the others run again.
//!
//! The file is one line of JSON, which names the sections and their lengths, and after it the sections' predictions:
//! 13 bytes each, little-endian, `nll`, `nll_base` and `kld` as f32 and a byte for the same most likely token. Without a
//! reference the last three are zero. Sections of mixtures of experts that ran beside their reference have 6 bytes more: the
//! layers that sent the token to other experts as u16, and the divergence with the reference's experts as f32, NaN where that
//! was not run. A file with such a section is of version 2.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write};
use std::path::{Path, PathBuf};

use byteorder::{ByteOrder, LittleEndian, WriteBytesExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::divergence::TokenRouting;
use super::engine::RoutingNeeds;
use super::{EvalError, ModelScores, ScoredToken, Windows};
use crate::atomic_file::{AtomicFile, OutputError};

const FORMAT: &str = "lwq evaluation state 1";
const FORMAT_WITH_ROUTING: &str = "lwq evaluation state 2";
const RECORD_BYTES: usize = 13;
const ROUTING_BYTES: usize = 6;

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
    /// Layers whose experts were compared with the reference's.
    #[serde(default, skip_serializing_if = "is_zero")]
    routed_layers: usize,
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl Section {
    fn record_bytes(&self) -> usize {
        RECORD_BYTES + if self.routed_layers > 0 { ROUTING_BYTES } else { 0 }
    }
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
        if header.format != FORMAT && header.format != FORMAT_WITH_ROUTING {
            return Err(bad("is an evaluation state of another version"));
        }
        let mut data = Vec::new();
        file.read_to_end(&mut data).map_err(unreadable)?;
        let bytes = |section: &Section| section.predictions.checked_mul(section.record_bytes());
        let expected = header.sections.iter().try_fold(0usize, |sum, section| sum.checked_add(bytes(section)?));
        if expected != Some(data.len()) {
            return Err(bad("is an evaluation state of another length than its first line says"));
        }
        let mut sections = BTreeMap::new();
        let mut rest = data.as_slice();
        for section in header.sections {
            let (records, tail) = rest.split_at(section.predictions * section.record_bytes());
            rest = tail;
            let tokens: Vec<ScoredToken> = records.chunks_exact(section.record_bytes()).map(decode).collect();
            if tokens.iter().any(|t| !(t.nll.is_finite() && t.nll_base.is_finite() && t.kld.is_finite())) {
                return Err(bad("is an evaluation state with values that are no numbers"));
            }
            let nlls: Vec<f32> = tokens.iter().map(|t| t.nll).collect();
            let mut scores = ModelScores::default();
            scores.extend(&nlls, if section.with_reference { &tokens } else { &[] });
            scores.divergence.routed_layers = section.routed_layers;
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
        let knows_more = |known: &ModelScores| {
            let forced =
                |scores: &ModelScores| scores.divergence.routed_layers > 0 && scores.covers(RoutingNeeds::Forced);
            known.nlls.len() > scores.nlls.len()
                || (known.nlls.len() == scores.nlls.len() && forced(known) >= forced(scores))
        };
        if !self.sections.get(key).is_some_and(knows_more) {
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
            routed_layers: scores.divergence.routed_layers,
        });
        let sections: Vec<Section> = sections.collect();
        let routed = sections.iter().any(|section| section.routed_layers > 0);
        let format = if routed { FORMAT_WITH_ROUTING } else { FORMAT };
        let header = Header { format: format.to_owned(), sections };
        let failed = |source| OutputError::Io { path: self.path.clone(), action: "cannot write it", source };
        let mut data = serde_json::to_vec(&header).map_err(|e| failed(e.into()))?;
        data.push(b'\n');
        for scores in self.sections.values() {
            for (at, &nll) in scores.nlls.iter().enumerate() {
                let token = scores.divergence.tokens.get(at).copied();
                let token = token.unwrap_or(ScoredToken { nll, ..ScoredToken::default() });
                encode(token, scores.divergence.routed_layers > 0, &mut data).map_err(failed)?;
            }
        }
        let mut file = AtomicFile::create(&self.path, true)?;
        file.write_all(&data).map_err(failed)?;
        file.commit()?;
        Ok(())
    }
}

fn encode(token: ScoredToken, routed: bool, out: &mut impl Write) -> io::Result<()> {
    for value in [token.nll, token.nll_base, token.kld] {
        out.write_f32::<LittleEndian>(value)?;
    }
    out.write_u8(u8::from(token.same_top))?;
    if routed {
        out.write_u16::<LittleEndian>(token.routing.flips)?;
        out.write_f32::<LittleEndian>(token.routing.forced_kld)?;
    }
    Ok(())
}

fn decode(record: &[u8]) -> ScoredToken {
    let value = |at: usize| LittleEndian::read_f32(&record[at..]);
    let routing = match record.len() {
        RECORD_BYTES => TokenRouting::default(),
        _ => {
            TokenRouting { flips: LittleEndian::read_u16(&record[RECORD_BYTES..]), forced_kld: value(RECORD_BYTES + 2) }
        }
    };
    ScoredToken { nll: value(0), nll_base: value(4), kld: value(8), same_top: record[12] != 0, routing }
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
            routing: TokenRouting { flips: i as u16, forced_kld: i as f32 * 0.0625 },
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
        let unrouted = |mut token: ScoredToken| {
            token.routing = TokenRouting::default();
            token
        };
        let expected: Vec<ScoredToken> = scores(7, true).divergence.tokens.into_iter().map(unrouted).collect();
        assert_eq!(a.divergence.tokens, expected);
        assert_eq!((a.perplexity, a.nlls.len()), (scores(7, true).perplexity, 7));
        assert_eq!((b.nlls, b.divergence.tokens.len()), (scores(3, false).nlls, 0));
    }

    #[test]
    fn routes_come_back_and_forced_ones_are_kept_before_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.state");
        let mut state = EvaluationState::open(&path).unwrap();
        let mut routed = scores(7, true);
        routed.divergence.routed_layers = 4;
        let mut unforced = routed.clone();
        unforced.divergence.tokens.iter_mut().for_each(|token| token.routing.forced_kld = f32::NAN);
        state.keep("a", &unforced);
        state.keep("a", &routed);
        state.keep("a", &unforced);
        state.keep("b", &scores(3, true));
        state.save().unwrap();
        let read = EvaluationState::open(&path).unwrap();
        assert_eq!(read.section("a").divergence.tokens, routed.divergence.tokens);
        assert!(read.section("a").covers(RoutingNeeds::Forced) && !read.section("b").covers(RoutingNeeds::Flips));
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
