//! Tokens that go through the layers together, and their hidden states between two layers.

use std::ops::Range;
use std::sync::Arc;

use super::error::ModelError;

/// One run of tokens: a sequence of its own, or the continuation of an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    /// Rows of the group.
    rows: Range<usize>,
    /// Segment that this one continues.
    parent: Option<usize>,
    /// Position of the first token in its sequence.
    first_position: usize,
}

/// Sequences of tokens that advance through the layers together. Attention never crosses from one sequence to another. In
/// causal models a continuation sees the segment that it continues and that one's own past, so a prefix shared by several
/// continuations is computed once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenGroup {
    tokens: Vec<u32>,
    segments: Vec<Segment>,
    context: Option<usize>,
}

impl TokenGroup {
    /// An empty group.
    pub fn new() -> Self {
        Self::default()
    }

    /// A group of independent sequences.
    pub fn from_sequences<S: AsRef<[u32]>>(sequences: impl IntoIterator<Item = S>) -> Self {
        let mut group = Self::new();
        for sequence in sequences {
            group.push(sequence.as_ref());
        }
        group
    }

    /// Adds a sequence; returns the number of its segment.
    pub fn push(&mut self, tokens: &[u32]) -> usize {
        self.append(tokens, None, 0)
    }

    /// Adds a continuation of segment `parent`; returns the number of the new segment.
    ///
    /// # Errors
    /// When `parent` does not belong to the sequence pushed last.
    pub fn push_continuation(&mut self, parent: usize, tokens: &[u32]) -> Result<usize, ModelError> {
        let last_root = self.segments.iter().rposition(|s| s.parent.is_none());
        let (Some(segment), Some(root)) = (self.segments.get(parent), last_root) else {
            return Err(ModelError::BadInput { reason: format!("segment {parent} does not exist in this group") });
        };
        if parent < root {
            let reason = format!("segment {parent} can no longer be continued: a new sequence was started after it");
            return Err(ModelError::BadInput { reason });
        }
        let first_position = segment.first_position + segment.rows.len();
        Ok(self.append(tokens, Some(parent), first_position))
    }

    fn append(&mut self, tokens: &[u32], parent: Option<usize>, first_position: usize) -> usize {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.segments.push(Segment { rows: start..self.tokens.len(), parent, first_position });
        self.segments.len() - 1
    }

    /// States the context length that the sequences belong to, where it is longer than they are: models with two
    /// sets of rotary factors choose between them by it.
    pub fn with_context(mut self, context: usize) -> Self {
        self.context = Some(context);
        self
    }

    /// All tokens, one row each.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Rows of segment `index`.
    ///
    /// # Panics
    /// When there is no such segment.
    pub fn rows(&self, index: usize) -> Range<usize> {
        self.segments[index].rows.clone()
    }

    /// True if a segment continues another.
    pub(super) fn has_continuations(&self) -> bool {
        self.segments.iter().any(|segment| segment.parent.is_some())
    }

    /// Positions after the last one of the longest sequence.
    pub(crate) fn longest(&self) -> usize {
        self.segments.iter().map(|s| s.first_position + s.rows.len()).max().unwrap_or(0)
    }

    /// The context length given, or that of the longest sequence.
    pub(crate) fn context(&self) -> usize {
        self.context.unwrap_or(0).max(self.longest())
    }

    /// Position in its sequence of every row of `rows`.
    pub(super) fn positions(&self, rows: Range<usize>) -> Vec<usize> {
        let mut positions = Vec::with_capacity(rows.len());
        for segment in &self.segments {
            let start = segment.rows.start.max(rows.start);
            let end = segment.rows.end.min(rows.end);
            positions.extend((start..end).map(|row| segment.first_position + row - segment.rows.start));
        }
        positions
    }

    /// Number of the sequence that `row` belongs to, and its position there.
    ///
    /// # Panics
    /// When `row` is not below the group's length.
    pub(super) fn place_of(&self, row: usize) -> (usize, usize) {
        let index = self.segments.partition_point(|segment| segment.rows.end <= row);
        let segment = &self.segments[index];
        let sequences = self.segments[..=index].iter().filter(|segment| segment.parent.is_none()).count();
        (sequences - 1, segment.first_position + row - segment.rows.start)
    }

    /// Cuts the group between sequences into tiles of at least `target` rows (the last may be smaller).
    pub(super) fn tiles(&self, target: usize) -> Vec<Tile> {
        let mut tiles = Vec::new();
        let mut first = 0;
        for (index, segment) in self.segments.iter().enumerate() {
            let start = self.segments[first].rows.start;
            if segment.parent.is_none() && segment.rows.start - start >= target {
                tiles.push(self.tile(first..index));
                first = index;
            }
        }
        if first < self.segments.len() {
            tiles.push(self.tile(first..self.segments.len()));
        }
        tiles
    }

    fn tile(&self, segments: Range<usize>) -> Tile {
        let rows = self.segments[segments.start].rows.start..self.segments[segments.end - 1].rows.end;
        let first = segments.start;
        let spans = segments.map(|index| {
            let segment = &self.segments[index];
            let mut past = Vec::new();
            let mut ancestor = segment.parent;
            while let Some(parent) = ancestor {
                let above = &self.segments[parent];
                past.push(above.rows.start - rows.start..above.rows.end - rows.start);
                ancestor = above.parent;
            }
            past.reverse();
            Span {
                rows: segment.rows.start - rows.start..segment.rows.end - rows.start,
                past,
                parent: segment.parent.map(|parent| parent - first),
                first_position: segment.first_position,
            }
        });
        Tile { spans: spans.collect(), rows: rows.clone() }
    }
}

/// Whole sequences that attention handles together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Rows of the group.
    pub rows: Range<usize>,
    /// Segments; their rows count from the tile's first.
    pub spans: Vec<Span>,
}

/// A segment within a tile.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Rows of the tile.
    pub rows: Range<usize>,
    /// Rows of the tile that hold the positions before the first one, in order.
    pub past: Vec<Range<usize>>,
    /// The span of the tile that it continues.
    pub parent: Option<usize>,
    /// Position of the first row.
    pub first_position: usize,
}

/// Values per token of an earlier layer's keys and values that later layers need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptWidths {
    /// The layer.
    pub layer: usize,
    /// Of its keys.
    pub keys: usize,
    /// Of its values.
    pub values: usize,
}

/// Input of layer `next_layer` for every token of a group: the state of a run between two layers. Clone it to
/// return to this point later, for instance to repeat the layers after it with one tensor replaced.
#[derive(Clone, Debug)]
pub struct HiddenStates {
    pub(super) group: Arc<TokenGroup>,
    pub(super) next_layer: usize,
    pub(super) n_embd: usize,
    pub(super) data: Vec<f32>,
    /// What later layers need of earlier ones.
    pub(super) kept: Vec<(usize, Arc<Kept>)>,
}

/// Keys and values of all tokens of a group in a layer, `[n, n_head_kv * head]` each.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

impl Kept {
    /// Keys and values of `rows`, of a group of `n` tokens.
    pub(super) fn rows(&self, rows: Range<usize>, n: usize) -> (&[f32], &[f32]) {
        let of = |values: &[f32]| {
            let width = values.len() / n.max(1);
            rows.start * width..rows.end * width
        };
        (&self.k[of(&self.k)], &self.v[of(&self.v)])
    }
}

impl HiddenStates {
    /// States from values computed before, a row per token: its place in the stream, `n_embd` values, and behind it for each
    /// of `widths` its key and its value, which later layers need
    /// ([`Model::kept_widths`](super::Model::kept_widths)).
    ///
    /// # Errors
    /// When `values` has another length.
    pub fn from_parts(
        group: Arc<TokenGroup>,
        next_layer: usize,
        n_embd: usize,
        widths: &[KeptWidths],
        values: Vec<f32>,
    ) -> Result<Self, ModelError> {
        let row_len = widths.iter().map(|widths| widths.keys + widths.values).sum::<usize>() + n_embd;
        let n = group.len();
        if n.checked_mul(row_len) != Some(values.len()) {
            let reason = format!("{} values are not {n} rows of {row_len}", values.len());
            return Err(ModelError::BadInput { reason });
        }
        if widths.is_empty() {
            return Ok(HiddenStates { group, next_layer, n_embd, data: values, kept: Vec::new() });
        }
        let mut first = 0;
        let mut take = |width: usize| -> Vec<f32> {
            let range = first..first + width;
            first += width;
            values.chunks_exact(row_len).flat_map(|row| &row[range.clone()]).copied().collect()
        };
        let data = take(n_embd);
        let kept = widths
            .iter()
            .map(|widths| (widths.layer, Arc::new(Kept { k: take(widths.keys), v: take(widths.values) })))
            .collect();
        Ok(HiddenStates { group, next_layer, n_embd, data, kept })
    }

    /// Shows `sink` all values that [`Self::from_parts`] takes, in its order, piece by piece.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn parts<E>(&self, mut sink: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
        if self.kept.is_empty() {
            return sink(&self.data);
        }
        let n = self.group.len();
        let kept = self.kept.iter().flat_map(|(_, kept)| [kept.k.as_slice(), kept.v.as_slice()]);
        let all: Vec<&[f32]> = std::iter::once(self.data.as_slice()).chain(kept).collect();
        for row in 0..n {
            for values in &all {
                let width = values.len() / n;
                sink(&values[row * width..][..width])?;
            }
        }
        Ok(())
    }

    /// Keys and values of `layer`, where one is asked for.
    pub(super) fn kept(&self, layer: Option<usize>) -> Result<Option<&Kept>, ModelError> {
        let Some(layer) = layer else { return Ok(None) };
        let found = self.kept.iter().find(|(of, _)| *of == layer);
        let missing = || ModelError::BadInput {
            reason: format!("these states are without the keys and values of layer {layer}, which later layers use"),
        };
        found.map(|(_, kept)| Some(kept.as_ref())).ok_or_else(missing)
    }

    /// Keeps keys and values of `layer` for later ones.
    pub(super) fn keep(&mut self, layer: usize, kept: Kept) {
        self.kept.push((layer, Arc::new(kept)));
    }

    /// The tokens.
    pub fn group(&self) -> &Arc<TokenGroup> {
        &self.group
    }

    /// The layer that these values enter; the number of layers when all have run.
    pub fn next_layer(&self) -> usize {
        self.next_layer
    }

    /// The values, `[group.len(), n_embd]` row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// Values of one token.
    ///
    /// # Panics
    /// When `row` is not below the group's length.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.n_embd..(row + 1) * self.n_embd]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continuations_share_their_prefix() {
        let mut group = TokenGroup::new();
        let prefix = group.push(&[1, 2, 3]);
        let a = group.push_continuation(prefix, &[4, 5]).unwrap();
        group.push_continuation(prefix, &[6]).unwrap();
        group.push_continuation(a, &[7]).unwrap();
        assert_eq!(group.positions(0..7), [0, 1, 2, 3, 4, 3, 5]);
        assert_eq!(group.longest(), 6);
        assert_eq!((group.place_of(2), group.place_of(5)), ((0, 2), (0, 3)));
        let tiles = group.tiles(1);
        assert_eq!(tiles.len(), 1);
        assert_eq!(tiles[0].spans[3], Span { rows: 6..7, past: vec![0..3, 3..5], parent: Some(1), first_position: 5 });
        group.push(&[9]);
        assert!(group.push_continuation(prefix, &[1]).is_err());
        assert_eq!(group.tiles(1)[1].rows, 7..8);
        assert_eq!(group.place_of(7), (1, 0));
    }

    #[test]
    fn states_come_back_with_what_later_layers_need() {
        let group = Arc::new(TokenGroup::from_sequences([[1, 2]]));
        let widths = [KeptWidths { layer: 3, keys: 2, values: 1 }];
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let states = HiddenStates::from_parts(group.clone(), 5, 3, &widths, values.clone()).unwrap();
        assert_eq!(states.data(), [0.0, 1.0, 2.0, 6.0, 7.0, 8.0]);
        let kept = states.kept(Some(3)).unwrap().unwrap();
        assert_eq!((kept.k.as_slice(), kept.v.as_slice()), (&[3.0, 4.0, 9.0, 10.0][..], &[5.0, 11.0][..]));
        assert_eq!(kept.rows(1..2, 2), (&[9.0, 10.0][..], &[11.0][..]));
        let mut back = Vec::new();
        states
            .parts(|part| {
                back.extend_from_slice(part);
                Ok::<(), ()>(())
            })
            .unwrap();
        assert_eq!(back, values);
        assert!(states.kept(Some(2)).is_err());
        assert!(HiddenStates::from_parts(group, 5, 3, &[], values).is_err());
    }

    #[test]
    fn tiles_hold_whole_sequences() {
        let group = TokenGroup::from_sequences([vec![0; 5], vec![0; 5], vec![0; 3]]);
        let rows: Vec<_> = group.tiles(6).into_iter().map(|t| t.rows).collect();
        assert_eq!(rows, [0..10, 10..13]);
        assert!(TokenGroup::new().tiles(4).is_empty());
    }
}
