//! Calibration text that is compiled in.
//!
//! `calibration/README.md` in the repository lists what the text consists of, where each part comes from and under which
//! licence it may be passed on.

/// The text used when the user names none: about 100,000 tokens (SmolLM2's vocabulary) of English prose, documentation,
/// source code in seven languages, worked mathematics, chat and tool-call transcripts, data formats and fourteen natural
/// languages, in passages of a few hundred tokens.
///
/// The categories take turns in proportion to their shares, so a prefix of a few thousand tokens is nearly as balanced as
/// the whole. UTF-8 with LF line ends.
pub const DEFAULT_MIX: &str = include_str!("../calibration/mixed.txt");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_clean_text_of_the_stated_size() {
        assert!((250_000..400_000).contains(&DEFAULT_MIX.len()), "{} bytes", DEFAULT_MIX.len());
        assert!(!DEFAULT_MIX.contains('\r'));
        assert!(DEFAULT_MIX.ends_with('\n'));
        assert!(DEFAULT_MIX.lines().all(|line| line.chars().count() <= 2000));
    }

    #[test]
    fn a_short_prefix_holds_several_kinds_of_text() {
        let prefix: String = DEFAULT_MIX.chars().take(60_000).collect();
        for sign in ["fn ", "Alice", "<|im_start|>", "HTTP/1.1", "```", "libertad", "кажд"] {
            assert!(prefix.contains(sign), "{sign:?} is missing from the first 60,000 characters");
        }
    }
}
