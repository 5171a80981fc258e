//! Pre-tokenizers: how byte-pair vocabularies cut text into words before merging.
//!
//! Each pre-tokenizer is a list of rules. The first rule cuts the text, each further rule cuts every piece again;
//! what a rule does not match stays as pieces between its matches. Rules see one byte per character (a *haystack*):
//! ASCII as it is, everything else as the byte of its class, so that byte regexes serve for Unicode categories. White
//! space beyond ASCII looks like a vertical tab. This is also how llama.cpp sees the text, with consequences that
//! are kept: `\p{Lu}` and `\p{Ll}` both mean any letter beyond ASCII.

mod names;
mod scan;

use regex::bytes::{Regex, RegexBuilder};

use super::unicode::{self, CharClass};
pub use names::known_names;
pub(super) use names::{Flags, PreTokenizer, find};
use scan::Scan;

/// One cut.
#[derive(Debug)]
pub(super) enum Rule {
    /// The matches of a regex over the haystack of categories.
    Categories {
        /// Syntax of crate regex, where `\p{..}` inside brackets names a category.
        pattern: &'static str,
        /// What becomes of white space that the pattern's last alternative, `\s+`, takes.
        spaces: Spaces,
    },
    /// The matches of a regex over a haystack where characters of set i beyond ASCII are the byte 0xE0 + i.
    Sets {
        /// Syntax of crate regex.
        pattern: &'static str,
        /// The sets; the first that holds a character counts.
        sets: &'static [Set],
    },
    /// A hand-written cut.
    Scan(Scan),
}

/// The published patterns end in `\s+(?!\S)|\s+`, with a look-ahead that the regex crate does not know: they are
/// written with `\s+` alone, and the run of white space that it takes is cut here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spaces {
    /// No such alternative.
    AsMatched,
    /// The last character before a word is left to that word.
    LeaveLast,
    /// As `LeaveLast`, and what stays is cut to pieces of 512, 256, .., 4, 2 and 1 characters.
    PowersOfTwo,
}

// Haystack bytes of characters beyond ASCII.
const OTHER: u8 = 0xD0;
const NUMBER: u8 = 0xD1;
const LETTER: u8 = 0xD2;
const PUNCTUATION: u8 = 0xD3;
const MARK: u8 = 0xD4;
const SYMBOL: u8 = 0xD5;
/// A Han letter, in the haystack of [`Scan::HanAware`].
const HAN_LETTER: u8 = 0xD6;
/// An unassigned code point of a Han block, in the same haystack.
const HAN_OTHER: u8 = 0xD7;
const FIRST_SET: u8 = 0xE0;
const WHITESPACE: u8 = 0x0B;

/// Category names in patterns, and the haystack bytes that they stand for.
const CATEGORIES: [(&str, &str); 5] = [
    (r"\p{N}", r"0-9\xD1"),
    (r"\p{L}", r"A-Za-z\xD2"),
    (r"\p{P}", r"\x21-\x23\x25-\x2A\x2C-\x2F\x3A\x3B\x3F\x40\x5B-\x5D\x5F\x7B\x7D\xD3"),
    (r"\p{M}", r"\xD4"),
    (r"\p{S}", r"\x24\x2B\x3C-\x3E\x5E\x60\x7C\x7E\xD5"),
];

fn category_byte(code_point: u32) -> u8 {
    match unicode::class_of(code_point) {
        CharClass::Whitespace => WHITESPACE,
        CharClass::Number => NUMBER,
        CharClass::Letter => LETTER,
        CharClass::Punctuation => PUNCTUATION,
        CharClass::Mark => MARK,
        CharClass::Symbol => SYMBOL,
        CharClass::Undefined | CharClass::Control => OTHER,
    }
}

fn is_han(code_point: u32) -> bool {
    matches!(code_point,
        0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF | 0x2_0000..=0x2_A6DF | 0x2_A700..=0x2_EBEF
        | 0x2_F800..=0x2_FA1F)
}

fn han_aware_byte(code_point: u32) -> u8 {
    match category_byte(code_point) {
        LETTER if is_han(code_point) => HAN_LETTER,
        _ if is_han(code_point) => HAN_OTHER,
        byte => byte,
    }
}

/// Ranges of characters beyond ASCII, first and last, in ascending order.
pub(super) type Set = &'static [(u32, u32)];

/// How a rule's haystack shows characters beyond ASCII.
#[derive(Debug, PartialEq)]
enum View {
    Categories,
    HanAware,
    Sets(&'static [Set]),
}

impl View {
    fn haystack(&self, text: &[u8]) -> Vec<u8> {
        match self {
            View::Categories => haystack(text, category_byte),
            View::HanAware => haystack(text, han_aware_byte),
            View::Sets(sets) => haystack(text, |code_point| {
                let holds = |set: &Set| {
                    let after = set.partition_point(|range| range.0 <= code_point);
                    after > 0 && code_point <= set[after - 1].1
                };
                if unicode::class_of(code_point) == CharClass::Whitespace {
                    WHITESPACE
                } else {
                    sets.iter().position(holds).map_or(OTHER, |set| FIRST_SET + set as u8)
                }
            }),
        }
    }
}

/// One byte per character of a text in lenient UTF-8.
fn haystack(text: &[u8], class_byte: impl Fn(u32) -> u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(&first) = rest.first() {
        if first < 0x80 {
            out.push(first);
            rest = &rest[1..];
        } else {
            let (code_point, len) = unicode::decode(rest).unwrap_or((unicode::REPLACEMENT, 1));
            out.push(class_byte(code_point));
            rest = &rest[len..];
        }
    }
    out
}

#[derive(Debug)]
enum Cut {
    Regex(Regex, Spaces),
    Scan(Scan),
}

/// The rules of one pre-tokenizer, ready to use.
#[derive(Debug)]
pub(super) struct WordSplitter {
    views: Vec<View>,
    /// Each cut with its view.
    cuts: Vec<(Cut, usize)>,
}

impl WordSplitter {
    /// Compiles the rules.
    pub(super) fn new(rules: &[Rule]) -> WordSplitter {
        let mut views = Vec::new();
        let cuts = rules
            .iter()
            .map(|rule| {
                let (cut, view) = match rule {
                    Rule::Categories { pattern, spaces } => {
                        let spelled_out =
                            CATEGORIES.iter().fold((*pattern).to_owned(), |text, (name, set)| text.replace(name, set));
                        (Cut::Regex(byte_regex(&spelled_out), *spaces), View::Categories)
                    }
                    Rule::Sets { pattern, sets } => {
                        (Cut::Regex(byte_regex(pattern), Spaces::AsMatched), View::Sets(sets))
                    }
                    Rule::Scan(scan) => {
                        let view = if *scan == Scan::HanAware { View::HanAware } else { View::Categories };
                        (Cut::Scan(*scan), view)
                    }
                };
                let index = views.iter().position(|known| *known == view).unwrap_or_else(|| {
                    views.push(view);
                    views.len() - 1
                });
                (cut, index)
            })
            .collect();
        WordSplitter { views, cuts }
    }

    /// Calls `word` with each word in order. `text` must be what [`unicode::normalized_utf8`] gives.
    pub(super) fn split<'t>(&self, text: &'t [u8], mut word: impl FnMut(&'t [u8])) {
        let haystacks: Vec<Vec<u8>> = self.views.iter().map(|view| view.haystack(text)).collect();
        let characters = haystacks.first().map_or(0, Vec::len);
        let mut start = 0;
        self.cut(&haystacks, 0, 0, characters, &mut |chars| {
            let mut end = start;
            for _ in 0..chars {
                end = (end + unicode::announced_len(text[end])).min(text.len());
            }
            word(&text[start..end]);
            start = end;
        });
    }

    /// Cuts characters `start..end` with the rules from `rule` on; `emit` gets the length of each piece in order.
    fn cut(&self, haystacks: &[Vec<u8>], rule: usize, start: usize, end: usize, emit: &mut dyn FnMut(usize)) {
        let Some((cut, view)) = self.cuts.get(rule) else {
            if end > start {
                emit(end - start);
            }
            return;
        };
        let piece = &haystacks[*view][start..end];
        let mut done = 0;
        let mut next = |until: usize| {
            if until > done {
                self.cut(haystacks, rule + 1, start + done, start + until, emit);
                done = until;
            }
        };
        match cut {
            Cut::Regex(regex, spaces) => regex_cuts(regex, *spaces, piece, &mut next),
            Cut::Scan(scan) => scan.cuts(piece, &mut next),
        }
        next(piece.len());
    }
}

fn byte_regex(pattern: &str) -> Regex {
    RegexBuilder::new(pattern).unicode(false).build().expect("the patterns of the table are valid")
}

/// Calls `cut_at` with the beginning and the end of each match.
fn regex_cuts(regex: &Regex, spaces: Spaces, piece: &[u8], cut_at: &mut dyn FnMut(usize)) {
    if spaces == Spaces::AsMatched {
        for found in regex.find_iter(piece) {
            cut_at(found.start());
            cut_at(found.end());
        }
        return;
    }
    let mut from = 0;
    while let Some(found) = regex.find_at(piece, from) {
        cut_at(found.start());
        from = found.end();
        // Only the alternative `\s+` matches white space that does not end in a line break.
        let run = found.as_bytes();
        let is_run = !matches!(run.last(), Some(b'\r' | b'\n')) && run.iter().all(|byte| is_space(*byte));
        if is_run {
            let kept = if from == piece.len() { run.len() } else { run.len().saturating_sub(1) };
            if spaces == Spaces::PowersOfTwo {
                let mut rest = kept;
                while rest > 0 {
                    rest -= 1 << rest.ilog2().min(9);
                    cut_at(found.start() + kept - rest);
                }
            }
            if kept > 0 {
                from = found.start() + kept;
            }
        }
        cut_at(from);
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}
