//! Which experts of a mixture saw how many tokens.

use std::fmt::Write as _;

use serde::Serialize;

use super::Imatrix;
use crate::display::count;
use crate::recipe::roles::split_block;

/// Experts that saw fewer tokens than this are short of data: their importance is that of the few texts that reached them.
pub const FEW_TOKENS: u64 = 128;

/// Most layers that a report lists.
const MOST_LINES: usize = 12;

/// The experts of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerExperts {
    /// The layer.
    pub layer: u64,
    /// Experts in it.
    pub experts: usize,
    /// Experts that saw no token.
    pub unused: usize,
    /// Experts that saw fewer than [`FEW_TOKENS`], the unused included.
    pub short_of_data: usize,
    /// Tokens of the expert that saw the fewest.
    pub fewest_tokens: u64,
}

impl Imatrix {
    /// The experts of every layer that has some, by the inputs of their down projections.
    pub fn experts(&self) -> Vec<LayerExperts> {
        let layers = self.entries.iter().filter_map(|(name, entry)| {
            let (layer, rest) = split_block(name)?;
            let counted = rest == "ffn_down_exps.weight" && !entry.counts.is_empty();
            counted.then(|| LayerExperts {
                layer,
                experts: entry.counts.len(),
                unused: entry.counts.iter().filter(|&&tokens| tokens == 0).count(),
                short_of_data: entry.counts.iter().filter(|&&tokens| tokens < FEW_TOKENS).count(),
                fewest_tokens: entry.counts.iter().copied().min().unwrap_or(0),
            })
        });
        let mut layers: Vec<LayerExperts> = layers.collect();
        layers.sort_by_key(|found| found.layer);
        layers
    }
}

/// The report for people; empty without experts.
pub(super) fn text(layers: &[LayerExperts]) -> String {
    let Some(fewest) = layers.iter().map(|found| found.fewest_tokens).min() else { return String::new() };
    let short: Vec<&LayerExperts> = layers.iter().filter(|found| found.short_of_data > 0).collect();
    if short.is_empty() {
        return format!("every expert saw {} tokens or more\n", count(fewest));
    }
    let mut text = String::new();
    for found in short.iter().take(MOST_LINES) {
        let LayerExperts { layer, experts, unused, short_of_data, .. } = found;
        let _ = writeln!(
            text,
            "layer {layer}: {short_of_data} of {experts} experts saw fewer than {FEW_TOKENS} tokens, {unused} of them none"
        );
    }
    if let Some(more) = short.len().checked_sub(MOST_LINES).filter(|&more| more > 0) {
        let _ = writeln!(text, "{more} more layers have experts that are short of data");
    }
    text.push_str("give more text, or --all-experts\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imatrix::Entry;

    #[test]
    fn experts_without_tokens_are_counted_by_layer() {
        let entry = |counts: &[u64]| Entry { sums: vec![1.0; 2 * counts.len()], counts: counts.to_vec() };
        let entries = [
            ("blk.10.ffn_down_exps.weight", entry(&[500, 0, 127])),
            ("blk.2.ffn_down_exps.weight", entry(&[128, 900, 300])),
            ("blk.2.ffn_up_exps.weight", entry(&[0, 0, 0])),
            ("blk.0.ffn_down.weight", entry(&[4])),
        ];
        let entries = entries.into_iter().map(|(name, entry)| (name.to_owned(), entry)).collect();
        let layers = Imatrix { entries, ..Imatrix::default() }.experts();
        assert_eq!(layers.iter().map(|found| found.layer).collect::<Vec<_>>(), [2, 10]);
        assert_eq!((layers[0].short_of_data, layers[0].fewest_tokens), (0, 128));
        assert_eq!((layers[1].unused, layers[1].short_of_data), (1, 2));
        let told = text(&layers);
        assert!(told.starts_with("layer 10: 2 of 3 experts saw fewer than 128 tokens, 1 of them none\n"), "{told}");
        assert_eq!(text(&layers[..1]), "every expert saw 128 tokens or more\n");
        assert_eq!(text(&[]), "");
    }
}
