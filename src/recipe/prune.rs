//! Removing layers: which blocks stay, how they are renumbered, under which name their importance is found. What that
//! means for the metadata is in [`super::prune_keys`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::error::{Note, RecipeError};
use super::prune_keys;
use super::roles::find_block;
use crate::gguf::Metadata;

/// A plan for removing blocks from a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrunePlan {
    /// Numbers of the layers that go, ascending; the model has all of them.
    removed: Vec<u64>,
    /// The layers of each stack of blocks: what stands before `blk.` in their names, and their old numbers.
    stacks: BTreeMap<String, BTreeSet<u64>>,
    notes: Vec<Note>,
}

/// Tensors that belong to a block of the image encoder though their names say it otherwise.
const DEEPSTACK_PREFIX: &str = "v.deepstack.";

/// The stack, the number and the place of the number's digits in the name of a tensor that belongs to a block.
fn find_layer(name: &str) -> Option<(&str, u64, Range<usize>)> {
    if let Some(rest) = name.strip_prefix(DEEPSTACK_PREFIX) {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number = rest[..digits].parse().ok()?;
        let start = DEEPSTACK_PREFIX.len();
        return rest[digits..].starts_with('.').then_some(("v.", number, start..start + digits));
    }
    let (number, digits) = find_block(name)?;
    Some((&name[..digits.start - "blk.".len()], number, digits))
}

impl PrunePlan {
    /// Plans to remove `layers` from a model with tensors of these names. Where there are several stacks of blocks (encoder
    /// and decoder), each loses the layers of these numbers.
    ///
    /// # Errors
    /// [`RecipeError::NothingLeft`] if a stack would have no block left; [`RecipeError::TensorOfAllLayers`].
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>, layers: &[u32]) -> Result<PrunePlan, RecipeError> {
        let mut stacks: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for name in names {
            prune_keys::refuse_tensor_of_all_layers(name)?;
            let Some((stack, number, _)) = find_layer(name) else { continue };
            if let Some(numbers) = stacks.get_mut(stack) {
                numbers.insert(number);
            } else {
                stacks.insert(stack.to_owned(), BTreeSet::from([number]));
            }
        }
        let wanted: BTreeSet<u32> = layers.iter().copied().collect();
        let (found, missing): (Vec<u32>, Vec<u32>) =
            wanted.into_iter().partition(|layer| stacks.values().any(|stack| stack.contains(&u64::from(*layer))));
        let removed: Vec<u64> = found.into_iter().map(u64::from).collect();
        let emptied = stacks.values().find(|stack| stack.iter().all(|number| removed.contains(number)));
        if let Some(stack) = emptied.filter(|_| !removed.is_empty()) {
            return Err(RecipeError::NothingLeft { blocks: stack.len() });
        }
        if stacks.is_empty() && !layers.is_empty() {
            return Err(RecipeError::NothingLeft { blocks: 0 });
        }
        let notes = missing.into_iter().map(|layer| Note::LayerNotFound { layer }).collect();
        Ok(PrunePlan { removed, stacks, notes })
    }

    /// Plans to remove the last blocks of the main stack, which have these numbers, whether they have tensors or not.
    ///
    /// # Errors
    /// [`RecipeError::NothingLeft`] if the blocks are all that there are.
    pub fn of_last<'a>(names: impl IntoIterator<Item = &'a str>, blocks: Range<u64>) -> Result<PrunePlan, RecipeError> {
        if blocks.start == 0 {
            return Err(RecipeError::NothingLeft { blocks: blocks.count() });
        }
        let of_main = |name| find_layer(name).filter(|(stack, ..)| stack.is_empty()).map(|(_, number, _)| number);
        let numbers = names.into_iter().filter_map(of_main).chain(blocks.clone()).collect();
        let stacks = BTreeMap::from([(String::new(), numbers)]);
        Ok(PrunePlan { removed: blocks.collect(), stacks, notes: Vec::new() })
    }

    /// The tensor's name after pruning, or `None` if it is removed.
    pub fn rename(&self, name: &str) -> Option<String> {
        let Some((_, old, digits)) = find_layer(name).filter(|(stack, ..)| self.stacks.contains_key(*stack)) else {
            return Some(name.to_owned());
        };
        if self.is_removed(old) {
            return None;
        }
        let new = self.new_number(old);
        // A number that stays keeps its digits.
        if new == old {
            return Some(name.to_owned());
        }
        Some(format!("{}{new}{}", &name[..digits.start], &name[digits.end..]))
    }

    /// True if the layer of this number goes.
    pub(super) fn is_removed(&self, layer: u64) -> bool {
        self.removed.binary_search(&layer).is_ok()
    }

    /// How many layers below this number go.
    pub(super) fn removed_below(&self, layer: u64) -> u64 {
        self.removed.partition_point(|removed| *removed < layer) as u64
    }

    /// The number of a layer that stays, or of the first one behind it that does: those above close up.
    pub(super) fn new_number(&self, layer: u64) -> u64 {
        layer - self.removed_below(layer)
    }

    /// Names of the stacks: what stands before `blk.`, such as an empty text, `enc.` or `v.`.
    pub(super) fn stacks(&self) -> impl Iterator<Item = &str> {
        self.stacks.keys().map(String::as_str)
    }

    /// The highest number of the stack's layers.
    pub(super) fn last_layer(&self, stack: &str) -> Option<u64> {
        self.stacks.get(stack)?.last().copied()
    }

    /// Number of layers that are removed, those of the same number in several stacks counted once.
    pub fn removed(&self) -> usize {
        self.removed.len()
    }

    /// Number of layers that there were, counted alike.
    pub fn layers(&self) -> usize {
        self.stacks.values().flatten().collect::<BTreeSet<_>>().len()
    }

    /// Rewrites the metadata for the pruned model: numbers of layers, values per layer. Returns what the user should be
    /// told.
    pub fn rewrite(&self, architecture: &str, metadata: &mut Metadata) -> Vec<Note> {
        prune_keys::rewrite(self, architecture, metadata)
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
        assert_eq!((plan.layers(), plan.removed()), (13, 3));
    }

    #[test]
    fn both_stacks_of_an_encoder_decoder_are_renumbered_alike() {
        let names =
            ["dec.blk.0.a", "dec.blk.1.a", "dec.blk.2.a", "dec.blk.10.a", "enc.blk.0.a", "enc.blk.1.a", "enc.blk.2.a"];
        let plan = PrunePlan::new(names, &[1]).unwrap();
        assert_eq!(
            plan.rename("dec.blk.10.a").as_deref(),
            Some("dec.blk.9.a"),
            "a layer without tensors stays a layer"
        );
        assert_eq!(plan.rename("enc.blk.2.a").as_deref(), Some("enc.blk.1.a"));
        assert_eq!(plan.rename("enc.blk.1.a"), None);
        assert_eq!(plan.stacks().collect::<Vec<_>>(), ["dec.", "enc."]);
        let short = ["enc.blk.0.a", "enc.blk.1.a", "dec.blk.0.a"];
        assert_eq!(PrunePlan::new(short, &[0]), Err(RecipeError::NothingLeft { blocks: 1 }));
        assert!(PrunePlan::new(short, &[1]).is_ok());
    }

    #[test]
    fn deepstack_layers_go_with_the_block_that_they_follow() {
        let names = ["v.blk.0.a", "v.blk.1.a", "v.blk.2.a", "v.deepstack.2.fc1.weight"];
        let plan = PrunePlan::new(names, &[1]).unwrap();
        assert_eq!(plan.rename("v.deepstack.2.fc1.weight").as_deref(), Some("v.deepstack.1.fc1.weight"));
        assert_eq!(PrunePlan::new(names, &[2]).unwrap().rename("v.deepstack.2.fc1.weight"), None);
        for name in ["v.deepstack.x.a", "v.deepstack.", "v.deepstack.1"] {
            assert_eq!(plan.rename(name).as_deref(), Some(name));
        }
    }

    #[test]
    fn missing_layers_are_noted_and_an_empty_model_refused() {
        let plan_of_missing = plan(0..3, &[1, 7]).unwrap();
        assert_eq!(plan_of_missing.notes(), [Note::LayerNotFound { layer: 7 }]);
        assert_eq!(plan(0..2, &[0, 1]), Err(RecipeError::NothingLeft { blocks: 2 }));
        assert!(plan(0..0, &[0]).is_err());
    }

    #[test]
    fn last_blocks_go_with_or_without_tensors_and_other_stacks_stay() {
        let names = ["blk.0.a", "blk.1.a", "blk.2.a", "v.blk.2.a", "enc.blk.2.a", "output.weight"];
        let plan = PrunePlan::of_last(names, 2..4).unwrap();
        assert_eq!(plan.rename("blk.2.a"), None);
        for name in ["blk.0.a", "blk.1.a", "v.blk.2.a", "enc.blk.2.a", "output.weight"] {
            assert_eq!(plan.rename(name).as_deref(), Some(name));
        }
        assert_eq!((plan.layers(), plan.removed()), (4, 2));
        assert_eq!(PrunePlan::of_last(names, 0..3), Err(RecipeError::NothingLeft { blocks: 3 }));
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
