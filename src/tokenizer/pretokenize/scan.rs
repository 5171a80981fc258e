//! The cuts that are faster or simpler by hand than by regex, and those that no regex describes.
//!
//! Each works on a piece of a haystack (one byte per character, see the parent module) and reports the end of every
//! word; positions are relative to the piece.

use super::{HAN_LETTER, HAN_OTHER, LETTER, MARK, NUMBER, is_space};

/// A hand-written cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::tokenizer) enum Scan {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?W+|\p{N}{1,d}| ?[^\sW\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    /// where W is `\p{L}`, or `[\p{L}\p{M}]` with `marks`, and d is `digits`.
    Words {
        /// Longest word of digits.
        digits: usize,
        /// Whether combining marks count as letters.
        marks: bool,
    },
    /// As `Words` with three digits, but Han letters are words of their own, and a contraction belongs to the word
    /// before it.
    HanAware,
    /// Cuts inside runs of digits so that groups of three are counted from the right. The first group stays with
    /// whatever stands before it.
    DigitGroups,
    /// `(?=(\d{3})+(?!\d))`: before every group of three ASCII digits, counted from the right.
    Thousands,
    /// `[^\n]+|[\n]+`
    Newlines,
}

impl Scan {
    /// Calls `cut_at` with the end of each word.
    pub(super) fn cuts(self, piece: &[u8], cut_at: &mut dyn FnMut(usize)) {
        match self {
            Scan::Gpt2 => each_word(piece, cut_at, gpt2_word),
            Scan::Words { digits, marks: false } => {
                each_word(piece, cut_at, |piece, at| word(piece, at, digits, is_letter))
            }
            Scan::Words { digits, marks: true } => {
                each_word(piece, cut_at, |piece, at| word(piece, at, digits, |byte| is_letter(byte) || byte == MARK))
            }
            Scan::HanAware => each_word(piece, cut_at, han_aware_word),
            Scan::DigitGroups => digit_groups(piece, cut_at),
            Scan::Thousands => thousands(piece, cut_at),
            Scan::Newlines => each_word(piece, cut_at, |piece, at| {
                let newline = piece[at] == b'\n';
                run_end(piece, at, |byte| (byte == b'\n') == newline)
            }),
        }
    }
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || matches!(byte, LETTER | HAN_LETTER)
}

fn is_number(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == NUMBER
}

fn is_line_break(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

/// Repeats `end_of_word` from the end of the last word on; it must advance.
fn each_word(piece: &[u8], cut_at: &mut dyn FnMut(usize), end_of_word: impl Fn(&[u8], usize) -> usize) {
    let mut at = 0;
    while at < piece.len() {
        at = end_of_word(piece, at);
        cut_at(at);
    }
}

/// End of the run of bytes from `at` on that `belongs` accepts.
fn run_end(piece: &[u8], at: usize, belongs: impl Fn(u8) -> bool) -> usize {
    piece[at..].iter().position(|byte| !belongs(*byte)).map_or(piece.len(), |len| at + len)
}

/// Length of `'s`, `'t`, `'m`, `'d`, `'re`, `'ve` or `'ll` at `at`, or 0.
fn contraction_len(piece: &[u8], at: usize, fold_case: bool) -> usize {
    let letter = |i: usize| match piece.get(at + i) {
        Some(byte) if fold_case => byte.to_ascii_lowercase(),
        Some(byte) => *byte,
        None => 0,
    };
    if piece.get(at) != Some(&b'\'') {
        return 0;
    }
    match (letter(1), letter(2)) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        _ => 0,
    }
}

/// End of a run of white space: one character before a word stays with the word. At least one is taken.
fn space_end(piece: &[u8], at: usize) -> usize {
    let end = run_end(piece, at, is_space);
    if end < piece.len() && end - at > 1 { end - 1 } else { end.max(at + 1) }
}

/// As [`space_end`], after `\s*[\r\n]+`: a run that has line breaks ends with the last of them.
fn space_or_line_end(piece: &[u8], at: usize) -> usize {
    let end = run_end(piece, at, is_space);
    match piece[at..end].iter().rposition(|byte| is_line_break(*byte)) {
        Some(last) => at + last + 1,
        None => space_end(piece, at),
    }
}

fn gpt2_word(piece: &[u8], at: usize) -> usize {
    let contraction = contraction_len(piece, at, false);
    if contraction > 0 {
        return at + contraction;
    }
    let first = at + usize::from(piece[at] == b' ');
    match piece.get(first) {
        Some(byte) if is_letter(*byte) => run_end(piece, first, is_letter),
        Some(byte) if is_number(*byte) => run_end(piece, first, is_number),
        Some(byte) if !is_space(*byte) => {
            run_end(piece, first, |byte| !is_space(byte) && !is_letter(byte) && !is_number(byte))
        }
        _ => space_end(piece, at),
    }
}

fn word(piece: &[u8], at: usize, digits: usize, is_word: impl Fn(u8) -> bool + Copy) -> usize {
    let contraction = contraction_len(piece, at, true);
    if contraction > 0 {
        return at + contraction;
    }
    let first = piece[at];
    if !is_line_break(first) && !is_number(first) {
        let next_is_word = piece.get(at + 1).is_some_and(|byte| is_word(*byte));
        if is_word(first) || next_is_word {
            return run_end(piece, at + 1, is_word);
        }
    }
    if is_number(first) {
        return run_end(&piece[..piece.len().min(at + digits)], at, is_number);
    }
    symbols_or_space(piece, at, is_word)
}

/// ` ?[^\s\p{N}W]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
fn symbols_or_space(piece: &[u8], at: usize, is_word: impl Fn(u8) -> bool) -> usize {
    let is_symbol = |byte: u8| !is_space(byte) && !is_number(byte) && !is_word(byte);
    let first = at + usize::from(piece[at] == b' ');
    match piece.get(first) {
        Some(byte) if is_symbol(*byte) => run_end(piece, run_end(piece, first, is_symbol), is_line_break),
        _ => space_or_line_end(piece, at),
    }
}

fn han_aware_word(piece: &[u8], at: usize) -> usize {
    let is_han = |byte: u8| matches!(byte, HAN_LETTER | HAN_OTHER);
    let is_word = |byte: u8| is_letter(byte) && byte != HAN_LETTER;
    let first = piece[at];
    if is_han(first) {
        return run_end(piece, at, is_han);
    }
    let leads = !is_line_break(first) && !is_number(first) && !is_letter(first);
    let letters = at + usize::from(leads);
    if piece.get(letters).is_some_and(|byte| is_word(*byte)) {
        let end = run_end(piece, letters, is_word);
        return end + contraction_len(piece, end, true);
    }
    if is_number(first) {
        return run_end(&piece[..piece.len().min(at + 3)], at, is_number);
    }
    symbols_or_space(piece, at, is_letter)
}

fn digit_groups(piece: &[u8], cut_at: &mut dyn FnMut(usize)) {
    let mut at = 0;
    while let Some(skip) = piece[at..].iter().position(|byte| is_number(*byte)) {
        let start = at + skip;
        let end = run_end(piece, start, is_number);
        let mut cut = start + (end - start) % 3;
        if cut > start {
            cut_at(cut);
        }
        while cut < end {
            cut += 3;
            cut_at(cut);
        }
        at = end;
    }
}

fn thousands(piece: &[u8], cut_at: &mut dyn FnMut(usize)) {
    let mut at = 0;
    while let Some(skip) = piece[at..].iter().position(u8::is_ascii_digit) {
        let start = at + skip;
        let end = run_end(piece, start, |byte| byte.is_ascii_digit());
        for cut in (start + (end - start) % 3..end).step_by(3) {
            cut_at(cut);
        }
        at = end;
    }
}
