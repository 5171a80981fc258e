//! Texts that are compiled in.
//!
//! Measuring, choosing and judging must not use the same documents, or the choice is fitted to the text it is judged by.
//! There are four sets that share no document: [`Set::Calibration`] collects the importance of weights, [`Set::Probe`] measures
//! what a change of type costs, [`Set::Gate`] decides whether a tuned tensor is kept, and the files in `tests/data/eval`
//! judge the result. `calibration/README.md` in the repository lists what the text consists of, where each part comes from
//! and under which licence it may be passed on.

/// A text that is compiled in. All are UTF-8 with LF line ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// The text used when the user names none: about 100,000 tokens (SmolLM2's vocabulary) of English prose,
    /// documentation, source code in seven languages, worked mathematics, chat and tool-call transcripts, data formats and
    /// fourteen natural languages, in passages of a few hundred tokens.
    ///
    /// The categories take turns in proportion to their shares, so a prefix of a few thousand tokens is nearly as balanced
    /// as the whole.
    Calibration,
    /// The text that probes run on: about 17,000 tokens of the same kinds, from documents that occur in none of the other
    /// sets.
    ///
    /// Passages of about 300 tokens of English prose, source code, other languages, documentation, chat, data and
    /// mathematics take turns. The first 1,000 tokens hold four of these kinds, the first 3,000 all of them, and from there
    /// on the shares stay near those of the whole.
    Probe,
    /// The text that judges whether a tensor that was rounded with feedback is kept: about 16,000 tokens, arranged as
    /// [`Set::Probe`] and again from documents that occur in none of the other sets.
    Gate,
    /// The text that `lwq eval` and `lwq compare` score when the user names none: passages of the files in
    /// `tests/data/eval` in turn, prose, source code and languages other than English.
    Evaluation,
}

impl Set {
    /// All of them.
    pub const ALL: [Set; 4] = [Set::Calibration, Set::Probe, Set::Gate, Set::Evaluation];

    /// What files and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Set::Calibration => "lwq built-in calibration mix",
            Set::Probe => "lwq built-in probe text",
            Set::Gate => "lwq built-in tuning text",
            Set::Evaluation => "lwq built-in evaluation text",
        }
    }

    /// The text itself.
    pub fn text(self) -> &'static str {
        match self {
            Set::Calibration => include_str!("../../calibration/mixed.txt"),
            Set::Probe => include_str!("../../calibration/probe.txt"),
            Set::Gate => include_str!("../../calibration/tune.txt"),
            Set::Evaluation => include_str!("../../calibration/eval.txt"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::ops::Range;
    use std::path::Path;

    /// Words in a row that two texts must not have in common.
    const RUN: usize = 13;
    /// Shortest paragraph or line that is compared as a whole, in characters.
    const SHORTEST: usize = 40;

    const EVALUATION_FILES: [&str; 3] =
        ["tests/data/eval/prose.txt", "tests/data/eval/code.txt", "tests/data/eval/second-language.txt"];

    fn repository_file(path: &str) -> String {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
    }

    fn assert_clean(name: &str, text: &str, bytes: Range<usize>) {
        assert!(bytes.contains(&text.len()), "{name}: {} bytes", text.len());
        assert!(!text.contains('\r'), "{name}: carriage return");
        assert!(text.ends_with('\n') && !text.starts_with('\n'), "{name}: line end");
        assert!(!text.contains('\u{fffd}'), "{name}: replacement character");
        assert!(text.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'), "{name}: control character");
        assert!(text.lines().all(|line| line.chars().count() <= 2000), "{name}: line above 2,000 characters");
    }

    #[test]
    fn the_mixes_are_clean_text_of_the_stated_size() {
        assert_clean("mixed.txt", Set::Calibration.text(), 250_000..400_000);
        assert_clean("probe.txt", Set::Probe.text(), 45_000..60_000);
        assert_clean("tune.txt", Set::Gate.text(), 45_000..60_000);
        assert_clean("eval.txt", Set::Evaluation.text(), 45_000..60_000);
        for path in EVALUATION_FILES {
            assert_clean(path, &repository_file(path), 65_000..80_000);
        }
    }

    #[test]
    fn a_short_prefix_holds_several_kinds_of_text() {
        let prefix: String = Set::Calibration.text().chars().take(60_000).collect();
        for sign in ["fn ", "Alice", "<|im_start|>", "HTTP/1.1", "```", "libertad", "кажд"] {
            assert!(prefix.contains(sign), "{sign:?} is missing from the first 60,000 characters");
        }
        // Prose, code, a language and documentation within 1,000 tokens; then chat, data and mathematics.
        let short: [(&str, &str, [&str; 4], [&str; 3]); 2] = [
            (
                "probe.txt",
                Set::Probe.text(),
                ["cried Emma", "`set()`", "marido", "# Configuration"],
                ["<|im_", "smtpd[", "Claim:"],
            ),
            (
                "tune.txt",
                Set::Gate.text(),
                ["Darcy", "use crate::", "rameau", "Isolation"],
                ["<|eot_id|>", "\"obs\"", "How large"],
            ),
        ];
        for (name, text, first, next) in short {
            for (count, signs) in [(4_200, first.as_slice()), (12_000, next.as_slice())] {
                let prefix: String = text.chars().take(count).collect();
                for sign in signs {
                    assert!(prefix.contains(sign), "{name}: {sign:?} is missing from the first {count} characters");
                }
            }
        }
    }

    /// What two texts are compared by: hashes of all runs of [`RUN`] words, and of all paragraphs and lines of at least
    /// [`SHORTEST`] characters, with white space normalised. Runs of numbers and lines that hold nothing but turn markers
    /// of a chat template do not count. Each hash comes with a text to show.
    fn fingerprints(text: &str) -> Vec<(u64, String)> {
        let hash = |piece: &[&str]| {
            let mut hasher = DefaultHasher::new();
            piece.hash(&mut hasher);
            hasher.finish()
        };
        let lower = text.to_lowercase();
        let words: Vec<&str> =
            lower.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect();
        let mut found: Vec<_> = words
            .windows(RUN)
            // Counting from 1 to 20 is not a document.
            .filter(|run| run.iter().any(|word| word.chars().any(char::is_alphabetic)))
            .map(|run| (hash(run), run.join(" ")))
            .collect();
        for piece in paragraphs(text).iter().map(String::as_str).chain(text.lines()) {
            let normal = piece.split_whitespace().collect::<Vec<_>>().join(" ");
            let only_markers = normal.starts_with("<|") && normal.ends_with("|>") && !normal.contains(' ');
            if normal.chars().count() >= SHORTEST && !only_markers {
                found.push((hash(&[&normal]), normal));
            }
        }
        found
    }

    /// Groups of lines between blank lines.
    fn paragraphs(text: &str) -> Vec<String> {
        let mut groups = vec![String::new()];
        for line in text.lines() {
            if line.trim().is_empty() {
                groups.push(String::new());
            } else if let Some(last) = groups.last_mut() {
                last.push_str(line);
                last.push('\n');
            }
        }
        groups
    }

    #[test]
    fn the_sets_have_nothing_in_common() {
        let owned = |names: &[&str]| -> Vec<(String, String)> {
            names.iter().map(|name| ((*name).to_owned(), repository_file(name))).collect()
        };
        // The built-in evaluation text is a part of the evaluation files.
        let mut evaluation = owned(&EVALUATION_FILES);
        evaluation.push(("eval.txt".to_owned(), Set::Evaluation.text().to_owned()));
        let files: [Vec<(String, String)>; 5] = [
            vec![("mixed.txt".to_owned(), Set::Calibration.text().to_owned())],
            vec![("probe.txt".to_owned(), Set::Probe.text().to_owned())],
            vec![("tune.txt".to_owned(), Set::Gate.text().to_owned())],
            evaluation,
            owned(&["tests/data/golden/eval-sample.txt", "tests/data/golden/calib-sample.txt"]),
        ];
        let mut seen: Vec<(String, HashSet<u64>)> = Vec::new();
        for set in files {
            let mut of_this_set = Vec::new();
            for (name, text) in set {
                let prints = fingerprints(&text);
                for (other, hashes) in &seen {
                    if let Some((_, shown)) = prints.iter().find(|(hash, _)| hashes.contains(hash)) {
                        panic!("{name} and {other} have in common: {shown}");
                    }
                }
                of_this_set.push((name, prints.into_iter().map(|(hash, _)| hash).collect()));
            }
            seen.append(&mut of_this_set);
        }
    }

    #[test]
    fn the_evaluation_text_consists_of_passages_of_the_evaluation_files_in_turn() {
        let files: Vec<HashSet<String>> =
            EVALUATION_FILES.iter().map(|path| paragraphs(&repository_file(path)).into_iter().collect()).collect();
        let mut passages: Vec<(usize, usize)> = Vec::new();
        for paragraph in paragraphs(Set::Evaluation.text()).iter().filter(|paragraph| !paragraph.is_empty()) {
            let Some(file) = files.iter().position(|file| file.contains(paragraph)) else {
                panic!("in none of the files: {paragraph}");
            };
            match passages.last_mut().filter(|(last, _)| *last == file) {
                Some((_, bytes)) => *bytes += paragraph.len(),
                None => passages.push((file, paragraph.len())),
            }
        }
        assert!(passages.len() >= 30, "{} passages", passages.len());
        for (file, path) in EVALUATION_FILES.iter().enumerate() {
            let bytes: usize = passages.iter().filter(|(of, _)| *of == file).map(|(_, bytes)| bytes).sum();
            assert!(bytes * 10 > Set::Evaluation.text().len() * 3, "{path}: {bytes} bytes are less than three tenths");
        }
    }

    #[test]
    fn the_comparison_sees_a_shared_run_and_a_shared_line() {
        let run = "One two three four five six seven eight nine ten eleven twelve thirteen";
        let shares = |a: &str, b: &str| {
            let hashes: HashSet<u64> = fingerprints(a).into_iter().map(|(hash, _)| hash).collect();
            fingerprints(b).iter().any(|(hash, _)| hashes.contains(hash))
        };
        assert!(shares(&format!("Zero, {run}."), &format!("({})!\nmore", run.to_uppercase().replace(' ', "\n"))));
        assert!(!shares("one two three four five six", "one two three four five six"));
        let line = "自由と平等について、この文書はこう言う。自由と平等について、この文書はこう言う。";
        assert!(shares(&format!("a\n{line}\nb"), &format!("c\n\n  {line}")));
    }
}
