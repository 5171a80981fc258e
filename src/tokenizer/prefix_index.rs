//! Byte strings in sorted order, walked byte by byte like a trie but without nodes: memory is that of the strings,
//! however long they are.

use std::ops::Range;

#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    /// Sorted by text, each text once.
    entries: Vec<(Box<[u8]>, u32)>,
    /// Entries by their first byte.
    by_first: Vec<Range<usize>>,
}

impl PrefixIndex {
    /// Of equal texts the last one stays.
    pub(crate) fn new(mut entries: Vec<(Box<[u8]>, u32)>) -> PrefixIndex {
        entries.reverse();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries.dedup_by(|later, kept| later.0 == kept.0);
        let first_at_least = |byte: usize| {
            entries.partition_point(|(text, _)| text.first().is_some_and(|b| usize::from(*b) < byte) || text.is_empty())
        };
        let by_first = (0..256).map(|byte| first_at_least(byte)..first_at_least(byte + 1)).collect();
        PrefixIndex { entries, by_first }
    }

    /// Begins a walk; `None` if no text begins with the byte.
    pub(crate) fn walk(&self, first: u8) -> Option<Walk<'_>> {
        let range = self.by_first.get(usize::from(first))?.clone();
        (!range.is_empty()).then_some(Walk { index: self, range, depth: 1 })
    }

    /// The longest text that `text` begins with, as its length and value.
    pub(crate) fn longest_match(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut walk = self.walk(*text.first()?)?;
        let mut longest = None;
        loop {
            if let Some(value) = walk.value() {
                longest = Some((walk.depth, value));
            }
            match text.get(walk.depth) {
                Some(byte) if walk.step(*byte) => {}
                _ => return longest,
            }
        }
    }

    /// How many bytes of `text` are the beginning of some entry.
    pub(crate) fn longest_shared_prefix(&self, text: &[u8]) -> usize {
        let Some(mut walk) = text.first().and_then(|byte| self.walk(*byte)) else { return 0 };
        while text.get(walk.depth).is_some_and(|byte| walk.step(*byte)) {}
        walk.depth
    }
}

/// The entries that begin with the bytes walked so far; there is at least one.
pub(super) struct Walk<'i> {
    index: &'i PrefixIndex,
    range: Range<usize>,
    depth: usize,
}

impl Walk<'_> {
    /// Goes one byte further, unless no entry goes there.
    pub(crate) fn step(&mut self, byte: u8) -> bool {
        let entries = &self.index.entries[self.range.clone()];
        let depth = self.depth;
        let start = entries.partition_point(|(text, _)| text.get(depth).is_none_or(|b| *b < byte));
        let len = entries[start..].partition_point(|(text, _)| text.get(depth) == Some(&byte));
        if len == 0 {
            return false;
        }
        self.range = self.range.start + start..self.range.start + start + len;
        self.depth += 1;
        true
    }

    /// The value of the entry that ends here.
    pub(crate) fn value(&self) -> Option<u32> {
        let (text, value) = &self.index.entries[self.range.start];
        (text.len() == self.depth).then_some(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(texts: &[&str]) -> PrefixIndex {
        PrefixIndex::new(texts.iter().zip(0..).map(|(text, id)| (text.as_bytes().into(), id)).collect())
    }

    #[test]
    fn longest_entry_wins_and_prefixes_count_without_values() {
        let index = index(&["a", "abc", "b", "abcdef", "a", "\u{ff}"]);
        assert_eq!(index.longest_match(b"abcde"), Some((3, 1)));
        assert_eq!(index.longest_match(b"ax"), Some((1, 4)), "the later of equal texts");
        assert_eq!(index.longest_match(b"c"), None);
        assert_eq!(index.longest_match(b""), None);
        assert_eq!(index.longest_shared_prefix(b"abcdeX"), 5);
        assert_eq!(index.longest_shared_prefix(b"zz"), 0);
        assert_eq!(index.longest_match("\u{ff}".as_bytes()), Some((2, 5)));
    }
}
