//! Removing layers: which blocks stay, how they are renumbered, under which name their importance is found.

use std::collections::BTreeMap;

use super::error::{Note, RecipeError};
use super::roles::find_block;

/// A plan for removing blocks from a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrunePlan {
    /// Old block number → new one, `None` for those removed.
    new_numbers: BTreeMap<u64, Option<u64>>,
    notes: Vec<Note>,
}

impl PrunePlan {
    /// Plans to remove `layers` from a model with tensors of these names.
    ///
    /// Blocks before the first removed one keep their number; those after it close up.
    ///
    /// # Errors
    /// [`RecipeError::NothingLeft`] if no block would stay.
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, layers: &[u32]) -> Result<PrunePlan, RecipeError> {
        let mut new_numbers: BTreeMap<u64, Option<u64>> =
            names.into_iter().filter_map(find_block).map(|(number, _)| (number, None)).collect();
        let notes = layers.iter().filter(|layer| !new_numbers.contains_key(&u64::from(**layer)));
        let notes = notes.map(|&layer| Note::LayerNotFound { layer }).collect();

        let first = layers.iter().min().map_or(u64::MAX, |&layer| u64::from(layer));
        let mut next = 0;
        for (&old, new) in &mut new_numbers {
            if layers.iter().any(|&layer| u64::from(layer) == old) {
                continue;
            }
            let number = if old < first { old } else { next };
            *new = Some(number);
            next = number.saturating_add(1);
        }
        if next == 0 && !layers.is_empty() {
            return Err(RecipeError::NothingLeft { blocks: new_numbers.len() });
        }
        Ok(PrunePlan { new_numbers, notes })
    }

    /// The tensor's name after pruning, or `None` if it is removed.
    pub fn rename(&self, name: &str) -> Option<String> {
        let Some((old, digits)) = find_block(name) else {
            return Some(name.to_owned());
        };
        let new = self.new_numbers.get(&old).copied().flatten()?;
        Some(format!("{}{new}{}", &name[..digits.start], &name[digits.end..]))
    }

    /// `block_count` of the pruned model: one more than its highest block number.
    pub fn block_count(&self) -> u64 {
        self.new_numbers.values().flatten().max().map_or(0, |highest| highest.saturating_add(1))
    }

    /// Number of blocks that are removed.
    pub fn removed(&self) -> usize {
        self.new_numbers.values().filter(|new| new.is_none()).count()
    }

    /// Old numbers of the blocks that stay, in ascending order: the elements to keep of per-block metadata arrays.
    pub fn kept_blocks(&self) -> Vec<u64> {
        self.new_numbers.iter().filter(|(_, new)| new.is_some()).map(|(old, _)| *old).collect()
    }

    /// What the user should be told, such as layers that the model lacks.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(blocks: std::ops::Range<u32>) -> Vec<String> {
        let mut names = vec!["token_embd.weight".to_owned()];
        names.extend(blocks.map(|block| format!("blk.{block}.ffn_up.weight")));
        names
    }

    fn plan(blocks: std::ops::Range<u32>, layers: &[u32]) -> Result<PrunePlan, RecipeError> {
        PrunePlan::new(names(blocks).iter().map(String::as_str), layers)
    }

    #[test]
    fn later_blocks_close_up() {
        let plan = plan(0..13, &[1, 5, 11]).unwrap();
        assert_eq!(plan.rename("token_embd.weight").as_deref(), Some("token_embd.weight"));
        assert_eq!(plan.rename("blk.0.ffn_up.weight").as_deref(), Some("blk.0.ffn_up.weight"));
        assert_eq!(plan.rename("blk.5.ffn_up.weight"), None);
        assert_eq!(plan.rename("blk.6.ffn_up.weight").as_deref(), Some("blk.4.ffn_up.weight"));
        assert_eq!(plan.rename("blk.12.ffn_up.weight").as_deref(), Some("blk.9.ffn_up.weight"));
        assert_eq!((plan.block_count(), plan.removed()), (10, 3));
        assert_eq!(plan.kept_blocks(), [0, 2, 3, 4, 6, 7, 8, 9, 10, 12]);
    }

    #[test]
    fn both_stacks_of_an_encoder_decoder_are_renumbered_alike() {
        let names = ["dec.blk.0.a", "dec.blk.1.a", "dec.blk.10.a", "dec.blk.2.a", "enc.blk.1.a", "enc.blk.2.a"];
        let plan = PrunePlan::new(names, &[1]).unwrap();
        assert_eq!(plan.rename("dec.blk.10.a").as_deref(), Some("dec.blk.2.a"));
        assert_eq!(plan.rename("enc.blk.2.a").as_deref(), Some("enc.blk.1.a"));
        assert_eq!(plan.rename("enc.blk.1.a"), None);
    }

    #[test]
    fn missing_layers_are_noted_and_an_empty_model_refused() {
        let plan_of_missing = plan(0..3, &[1, 7]).unwrap();
        assert_eq!(plan_of_missing.notes(), [Note::LayerNotFound { layer: 7 }]);
        assert_eq!(plan(0..2, &[0, 1]), Err(RecipeError::NothingLeft { blocks: 2 }));
        assert!(plan(0..0, &[0]).is_err());
    }

    #[test]
    fn odd_names_are_left_alone() {
        let plan =
            PrunePlan::new(["blk.0.a", "blk.1.a", "blk.x.a", "blk..a", "blk.99999999999999999999.a"], &[1]).unwrap();
        for name in ["blk.x.a", "blk..a", "blk.99999999999999999999.a", "blk.", "blk.1"] {
            assert_eq!(plan.rename(name).as_deref(), Some(name));
        }
    }
}
