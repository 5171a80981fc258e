//! Blocks for multi-token prediction (MTP, also NextN): the last blocks of a model, which guess further tokens and have no
//! part in the next one. Where they begin, and what the metadata become when those of another file are added.

use std::ops::Range;

use super::prune_keys::{self, MOST_LAYERS};
use crate::display::printable;
use crate::gguf::{Metadata, Value};

/// How many of the blocks guess further tokens, behind the architecture's name.
const PREDICTING: &str = "nextn_predict_layers";
const BLOCK_COUNT: &str = "block_count";

/// Keys behind the architecture's name that must be the same in two files of one model.
const OF_MODEL: &[&str] = &[
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
];

/// Keys of [`OF_MODEL`] that no model lacks.
const NEVER_MISSING: &[&str] = &["embedding_length", "attention.head_count"];

/// Why blocks cannot be told from the trunk, or those of one file not be added to another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MtpError {
    /// A count is missing or wrong.
    #[error("{key} is {found}, expected {expected}; correct it with --override-kv {key}=int:NUMBER")]
    Count {
        /// The key.
        key: String,
        /// Its value, or that it is missing.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// The two files are of different models.
    #[error("{key} is {here} in the model and {there} in the other file; give a file of the same model")]
    Differs {
        /// The key.
        key: String,
        /// Its value in the model.
        here: String,
        /// Its value in the file with the blocks.
        there: String,
    },
    /// A list has a value for each layer, and none for the new blocks.
    #[error("{key} is a list by layer in the model and missing in the other file; give a file of the same converter")]
    NoValues {
        /// The key.
        key: String,
    },
    /// There is nothing to add.
    #[error(
        "{key} is {found} in the other file, which has no blocks to take; give a file that was converted with them"
    )]
    NoBlocks {
        /// The key.
        key: String,
        /// Its value, or that it is missing.
        found: String,
    },
}

/// Numbers of the blocks for multi-token prediction by the metadata; empty for a model without.
///
/// # Errors
/// [`MtpError::Count`] if the counts make no sense.
pub fn mtp_blocks(architecture: &str, metadata: &Metadata) -> Result<Range<u64>, MtpError> {
    let count = |key: &str| {
        let full = full_key(architecture, key);
        let number = metadata.get(&full).map(|value| (value, value.as_integer().and_then(|n| u64::try_from(n).ok())));
        match number {
            None => Ok(None),
            Some((_, Some(number))) if number <= MOST_LAYERS => Ok(Some(number)),
            Some((value, _)) => {
                Err(MtpError::Count { key: printable(&full), found: text(value), expected: expected(MOST_LAYERS) })
            }
        }
    };
    let predicting = count(PREDICTING)?.unwrap_or(0);
    let Some(blocks) = count(BLOCK_COUNT)? else {
        if predicting == 0 {
            return Ok(0..0);
        }
        let key = printable(&full_key(architecture, BLOCK_COUNT));
        return Err(MtpError::Count { key, found: "missing".to_owned(), expected: expected(MOST_LAYERS) });
    };
    match blocks.checked_sub(predicting) {
        Some(trunk) => Ok(trunk..blocks),
        None => Err(MtpError::Count {
            key: printable(&full_key(architecture, PREDICTING)),
            found: predicting.to_string(),
            expected: expected(blocks),
        }),
    }
}

/// Rewrites the metadata of a model for the blocks of `donor`, another file of it: counts and lists by layer become the
/// donor's. Returns the numbers of the blocks.
///
/// # Errors
/// When the files are of different models, or the donor has no such blocks.
pub fn graft_keys(architecture: &str, model: &mut Metadata, donor: &Metadata) -> Result<Range<u64>, MtpError> {
    let trunk = mtp_blocks(architecture, model)?.start;
    let blocks = mtp_blocks(architecture, donor)?;
    if blocks.is_empty() {
        let full = full_key(architecture, PREDICTING);
        return Err(MtpError::NoBlocks { key: printable(&full), found: text_of(donor.get(&full)) });
    }
    if trunk != blocks.start {
        let key = format!("{} without blocks for multi-token prediction", full_key(architecture, BLOCK_COUNT));
        let differs =
            MtpError::Differs { key: printable(&key), here: trunk.to_string(), there: blocks.start.to_string() };
        return Err(differs);
    }
    for key in OF_MODEL {
        compare(&full_key(architecture, key), NEVER_MISSING.contains(key), trunk, model, donor)?;
    }
    for key in prune_keys::keys_of_layers() {
        let full = full_key(architecture, key);
        match (model.get(&full), donor.get(&full)) {
            (Some(Value::Array(_)), None) => return Err(MtpError::NoValues { key: printable(&full) }),
            (here, Some(there)) if is_list(here) || is_list(Some(there)) => {
                compare(&full, false, trunk, model, donor)?;
                model.set(&full, there.clone());
            }
            _ => {}
        }
    }
    for key in [BLOCK_COUNT, PREDICTING] {
        let full = full_key(architecture, key);
        if let Some(value) = donor.get(&full) {
            model.set(&full, value.clone());
        }
    }
    Ok(blocks)
}

/// Refuses values of a key that are not the same for every layer of the trunk. A single value stands for all layers.
fn compare(key: &str, needed: bool, trunk: u64, model: &Metadata, donor: &Metadata) -> Result<(), MtpError> {
    let (here, there) = match (model.get(key), donor.get(key)) {
        (Some(here), Some(there)) => match difference(here, there, trunk) {
            Some(difference) => difference,
            None => return Ok(()),
        },
        _ if !needed => return Ok(()),
        (here, there) => (text_of(here), text_of(there)),
    };
    Err(MtpError::Differs { key: printable(key), here, there })
}

/// What two values say where they do not say the same of each of the first layers.
fn difference(here: &Value, there: &Value, layers: u64) -> Option<(String, String)> {
    if !is_list(Some(here)) && !is_list(Some(there)) {
        return (!same(here, there)).then(|| (text(here), text(there)));
    }
    let (ours, theirs) = (by_layer(here, layers), by_layer(there, layers));
    let (Some(ours), Some(theirs)) = (ours, theirs) else { return Some((text(here), text(there))) };
    let at = ours.iter().zip(&theirs).position(|(here, there)| !same(here, there))?;
    Some((format!("{} for layer {at}", text(&ours[at])), text(&theirs[at])))
}

/// A value for each layer; `None` for a list that has fewer.
fn by_layer(value: &Value, layers: u64) -> Option<Vec<Value>> {
    let count = usize::try_from(layers).ok()?;
    let values: Vec<Value> = match value {
        Value::Array(array) => array.iter().take(count).collect(),
        single => vec![single.clone(); count],
    };
    (values.len() == count).then_some(values)
}

/// Integers of different widths are the same number.
fn same(here: &Value, there: &Value) -> bool {
    match (here.as_integer(), there.as_integer()) {
        (Some(here), Some(there)) => here == there,
        _ => here == there,
    }
}

fn is_list(value: Option<&Value>) -> bool {
    matches!(value, Some(Value::Array(_)))
}

fn full_key(architecture: &str, key: &str) -> String {
    format!("{architecture}.{key}")
}

fn expected(most: u64) -> String {
    format!("a number of blocks up to {most}")
}

fn text_of(value: Option<&Value>) -> String {
    value.map_or_else(|| "missing".to_owned(), text)
}

/// A value as messages show it.
fn text(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("a list of {} values", array.len()),
        single => single.as_integer().map_or_else(|| single.describe(), |number| number.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, ValueType};

    fn metadata(entries: &[(&str, Value)]) -> Metadata {
        let mut metadata = Metadata::new("test");
        for (key, value) in [("embedding_length", 64_u32), ("attention.head_count", 4)] {
            metadata.set(&format!("m.{key}"), value);
        }
        for (key, value) in entries {
            metadata.set(&format!("m.{key}"), value.clone());
        }
        metadata
    }

    fn list(numbers: &[u32]) -> Value {
        let values: Vec<Value> = numbers.iter().map(|number| Value::U32(*number)).collect();
        Value::Array(Array::of_values(ValueType::U32, &values))
    }

    #[test]
    fn the_last_blocks_are_for_multi_token_prediction() {
        let blocks = |entries: &[(&str, Value)]| mtp_blocks("m", &metadata(entries));
        let count = ("block_count", Value::U32(5));
        assert_eq!(blocks(&[]), Ok(0..0));
        assert_eq!(blocks(std::slice::from_ref(&count)), Ok(5..5));
        assert_eq!(blocks(&[count.clone(), ("nextn_predict_layers", Value::U64(2))]), Ok(3..5));
        for (entries, key) in [
            (vec![("nextn_predict_layers", Value::U32(1))], "m.block_count is missing"),
            (vec![count.clone(), ("nextn_predict_layers", Value::U32(6))], "m.nextn_predict_layers is 6"),
            (vec![count, ("nextn_predict_layers", Value::I32(-1))], "m.nextn_predict_layers is"),
            (vec![("block_count", Value::U64(1 << 40))], "m.block_count is"),
        ] {
            let line = blocks(&entries).unwrap_err().to_string();
            assert!(line.contains(key) && line.contains("--override-kv"), "{line}");
        }
    }

    #[test]
    fn counts_and_lists_become_the_donors() {
        let mut model = metadata(&[
            ("block_count", Value::U32(3)),
            ("attention.head_count_kv", list(&[2, 1, 2])),
            ("feed_forward_length", Value::U32(96)),
        ]);
        let donor = metadata(&[
            ("block_count", Value::U32(4)),
            ("nextn_predict_layers", Value::U32(1)),
            ("attention.head_count_kv", list(&[2, 1, 2, 4])),
            ("feed_forward_length", list(&[96, 96, 96, 32])),
            ("attention.sliding_window_pattern", list(&[1, 0, 1, 0])),
            ("context_length", Value::U32(9)),
        ]);
        assert_eq!(graft_keys("m", &mut model, &donor), Ok(3..4));
        for key in [
            "m.block_count",
            "m.nextn_predict_layers",
            "m.attention.head_count_kv",
            "m.feed_forward_length",
            "m.attention.sliding_window_pattern",
        ] {
            assert_eq!(model.get(key), donor.get(key), "{key}");
        }
        assert!(!model.contains("m.context_length"));
    }

    #[test]
    fn files_of_other_models_are_refused_with_the_key_and_both_values() {
        let ours = [("block_count", Value::U32(3)), ("attention.head_count_kv", list(&[2, 1, 2]))];
        let theirs = [
            ("block_count", Value::U32(4)),
            ("nextn_predict_layers", Value::U32(1)),
            ("attention.head_count_kv", list(&[2, 1, 2, 4])),
        ];
        for (change, parts) in [
            (("embedding_length", Value::U32(65)), ["m.embedding_length", "64", "65"]),
            (("attention.head_count", Value::U32(8)), ["m.attention.head_count", "4", "8"]),
            (
                ("attention.head_count_kv", list(&[2, 2, 2, 4])),
                ["m.attention.head_count_kv", "is 1 for layer 1", "and 2 in"],
            ),
            (("attention.head_count_kv", list(&[2])), ["m.attention.head_count_kv", "list of 3", "list of 1"]),
            (("attention.head_count_kv", Value::U32(2)), ["m.attention.head_count_kv", "is 1 for layer 1", "and 2 in"]),
            (("block_count", Value::U32(5)), ["m.block_count", "3", "4"]),
            (("nextn_predict_layers", Value::U32(0)), ["m.nextn_predict_layers", "0", "no blocks"]),
        ] {
            let mut entries = theirs.to_vec();
            entries.push(change);
            let mut model = metadata(&ours);
            let line = graft_keys("m", &mut model, &metadata(&entries)).unwrap_err().to_string();
            assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        }
        let mut listed = metadata(&[("block_count", Value::U32(3)), ("swiglu_clamp_exp", list(&[1, 2, 3]))]);
        let line = graft_keys("m", &mut listed, &metadata(&theirs)).unwrap_err().to_string();
        assert!(line.contains("m.swiglu_clamp_exp") && line.contains("missing"), "{line}");
    }
}
