//! What the mix rules need to know of a model, read from its metadata.

use super::RecipeError;
use crate::gguf::{Metadata, Value};

/// A metadata value as far as recipes care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaValue {
    /// The key is absent.
    Absent,
    /// A string.
    Text(String),
    /// A non-negative integer of any width.
    Unsigned(u64),
    /// An array of integers: its length and first element.
    Integers {
        /// Number of elements.
        len: u64,
        /// The first element, `None` in an empty array.
        first: Option<i64>,
    },
    /// Anything else, described for a message (`string array`, `-3`).
    Other(String),
}

/// A value that is looked at only by the rules that need it: hostile or missing metadata must not stop a target
/// that can do without.
type Lazy<T> = Result<T, RecipeError>;

/// Facts about a model on which the choice of types depends.
///
/// Numbers are kept as results: a bad one is an error for the rules that ask for it, and for no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFacts {
    architecture: Option<String>,
    blocks: Lazy<u32>,
    experts: Lazy<u32>,
    heads: Lazy<u32>,
    kv_heads: Lazy<u32>,
}

/// More blocks or experts than this no model has that llama.cpp loads (`LLAMA_MAX_LAYERS`, `LLAMA_MAX_EXPERTS`).
const MAX_BLOCKS: u64 = 512;
const MAX_EXPERTS: u64 = 1024;

/// Which models are classed as "70B" (`LLM_TYPE_70B`): architecture, number of blocks, and whether only models with
/// grouped attention heads and without eight experts are meant (an ungrouped llama of 80 blocks is the 65B).
const CLASS_70B: &[(&str, u32, bool)] = &[
    ("llama", 80, true),
    ("llama-embed", 80, true),
    ("qwen2", 80, false),
    ("deci", 80, false),
    ("olmo", 80, false),
    ("jais2", 68, false),
];

impl MetaValue {
    /// The value of a key; arrays are not expanded.
    fn of(value: Option<&Value>) -> MetaValue {
        match value {
            None => MetaValue::Absent,
            Some(Value::String(text)) => MetaValue::Text(String::from_utf8_lossy(text).into_owned()),
            Some(Value::Array(array)) => match array.iter().next().map(|first| first.as_integer()) {
                Some(Some(first)) => MetaValue::Integers { len: array.len(), first: i64::try_from(first).ok() },
                Some(None) => MetaValue::Other(value.map(Value::describe).unwrap_or_default()),
                None => MetaValue::Integers { len: 0, first: None },
            },
            Some(other) => match other.as_integer().map(u64::try_from) {
                Some(Ok(number)) => MetaValue::Unsigned(number),
                _ => MetaValue::Other(other.describe()),
            },
        }
    }
}

impl ModelFacts {
    /// Reads the facts from a model's metadata, overrides of keys already applied.
    pub fn from_metadata(metadata: &Metadata) -> ModelFacts {
        ModelFacts::from_lookup(|key| MetaValue::of(metadata.get(key)))
    }

    /// Reads the facts through `look_up`, which returns the value of a metadata key.
    pub fn from_lookup(mut look_up: impl FnMut(&str) -> MetaValue) -> ModelFacts {
        let architecture = match look_up("general.architecture") {
            MetaValue::Text(text) if !text.is_empty() => Some(text),
            _ => None,
        };
        let Some(arch) = &architecture else {
            let missing = || RecipeError::MissingKey { key: "general.architecture".to_owned(), form: "str:NAME" };
            return ModelFacts {
                architecture: None,
                blocks: Err(missing()),
                experts: Err(missing()),
                heads: Err(missing()),
                kv_heads: Err(missing()),
            };
        };
        // An image encoder states its sizes under other keys; no rule looks at them.
        if arch == "clip" {
            let (blocks, experts, heads, kv_heads) = (Ok(0), Ok(0), Ok(0), Ok(0));
            return ModelFacts { architecture, blocks, experts, heads, kv_heads };
        }

        let stated_key = format!("{arch}.block_count");
        let stated_value = look_up(&stated_key);
        let stated = number(&stated_key, &stated_value, 1, MAX_BLOCKS, None);
        let blocks = stated.clone().and_then(|stated| match arch.as_str() {
            // Each pass through a looped model counts as further layers.
            "nanbeige" => {
                let key = format!("{arch}.num_loops");
                let loops = number(&key, &look_up(&key), 1, MAX_BLOCKS / u64::from(stated), Some(1))?;
                Ok(stated * loops)
            }
            // One more layer holds the keys of the adapter router.
            "graniteswitch" => Ok(stated + 1),
            _ => Ok(stated),
        });

        let experts_key = format!("{arch}.expert_count");
        let experts = number(&experts_key, &look_up(&experts_key), 0, MAX_EXPERTS, Some(0));
        let heads_key = format!("{arch}.attention.head_count");
        let heads = first_number(&heads_key, &look_up(&heads_key), stated.as_ref().ok().copied(), Some(&Ok(0)));
        let kv_heads_key = format!("{arch}.attention.head_count_kv");
        let kv_heads =
            first_number(&kv_heads_key, &look_up(&kv_heads_key), stated.as_ref().ok().copied(), Some(&heads));
        ModelFacts { architecture, blocks, experts, heads, kv_heads }
    }

    /// `general.architecture`, if it is a string that is not empty.
    pub(crate) fn architecture(&self) -> Option<&str> {
        self.architecture.as_deref()
    }

    /// Number of blocks, those for multi-token prediction included (`hparams.n_layer_all`).
    ///
    /// # Errors
    /// The metadata lacks the count or states an impossible one.
    pub(crate) fn blocks(&self) -> Result<u32, RecipeError> {
        self.blocks.clone()
    }

    /// Number of experts, 0 in dense models.
    ///
    /// # Errors
    /// The metadata states an impossible count.
    pub(crate) fn experts(&self) -> Result<u32, RecipeError> {
        self.experts.clone()
    }

    /// Query heads per key-value head in the first block, rounded down; 0 for models without attention
    /// (`hparams.n_gqa`).
    ///
    /// # Errors
    /// The metadata states impossible head counts.
    pub(crate) fn heads_per_kv_head(&self) -> Result<u32, RecipeError> {
        let kv_heads = self.kv_heads.clone()?;
        if kv_heads == 0 {
            return Ok(0);
        }
        Ok(self.heads.clone()? / kv_heads)
    }

    /// True for models that llama.cpp classes as "70B", whose value tensors are small beside the rest.
    ///
    /// # Errors
    /// The metadata lacks what the class depends on.
    pub(crate) fn is_70b(&self) -> Result<bool, RecipeError> {
        let Some(row) = CLASS_70B.iter().find(|row| Some(row.0) == self.architecture()) else {
            return Ok(false);
        };
        let (_, class_blocks, grouped_only) = *row;
        if self.blocks()? != class_blocks {
            return Ok(false);
        }
        Ok(!grouped_only || (self.experts()? != 8 && self.heads.clone()? != self.kv_heads.clone()?))
    }
}

/// A single integer between `min` and `max`; `default` stands in for an absent key.
fn number(key: &str, value: &MetaValue, min: u64, max: u64, default: Option<u32>) -> Lazy<u32> {
    let found = match value {
        MetaValue::Unsigned(found) if (min..=max).contains(found) => return Ok(*found as u32),
        MetaValue::Absent => {
            return default.ok_or_else(|| RecipeError::MissingKey { key: shown_key(key), form: "int:N" });
        }
        other => describe(other),
    };
    let expected = format!("an integer from {min} to {max}");
    Err(RecipeError::BadValue { key: shown_key(key), found, expected, form: "int:N" })
}

/// An integer that may also be stated per block, of which the first counts.
fn first_number(key: &str, value: &MetaValue, blocks: Option<u32>, default: Option<&Lazy<u32>>) -> Lazy<u32> {
    match (value, default) {
        (MetaValue::Absent, Some(default)) => default.clone(),
        (MetaValue::Integers { len, first }, _) => {
            let expected = match blocks {
                Some(blocks) => format!("one value per block ({blocks})"),
                None => "one value per block".to_owned(),
            };
            let bad = |found| RecipeError::BadValue { key: shown_key(key), found, expected, form: "int:N" };
            if *len == 0 || blocks.is_some_and(|blocks| u64::from(blocks) != *len) {
                return Err(bad(format!("an array of {len}")));
            }
            let first = first.unwrap_or(-1);
            u32::try_from(first).map_err(|_| bad(first.to_string()))
        }
        _ => number(key, value, 0, u64::from(u32::MAX), None),
    }
}

/// The key for a message: its architecture part comes from the file, which may hold anything.
fn shown_key(key: &str) -> String {
    const SHOWN: usize = 80;
    let escaped: String = key.escape_debug().take(SHOWN + 1).collect();
    if escaped.chars().count() > SHOWN {
        format!("{}…", escaped.chars().take(SHOWN).collect::<String>())
    } else {
        escaped
    }
}

fn describe(value: &MetaValue) -> String {
    match value {
        MetaValue::Absent => "missing".to_owned(),
        MetaValue::Text(text) => format!("the string {}", shown_key(text)),
        MetaValue::Unsigned(number) => number.to_string(),
        MetaValue::Integers { len, .. } => format!("an array of {len}"),
        MetaValue::Other(text) => text.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, ValueType};

    fn facts(entries: &[(&str, MetaValue)]) -> ModelFacts {
        ModelFacts::from_lookup(|key| {
            entries.iter().find(|entry| entry.0 == key).map_or(MetaValue::Absent, |entry| entry.1.clone())
        })
    }

    fn llama(blocks: u64, heads: u64, kv_heads: u64, experts: u64) -> ModelFacts {
        facts(&[
            ("general.architecture", MetaValue::Text("llama".into())),
            ("llama.block_count", MetaValue::Unsigned(blocks)),
            ("llama.attention.head_count", MetaValue::Unsigned(heads)),
            ("llama.attention.head_count_kv", MetaValue::Unsigned(kv_heads)),
            ("llama.expert_count", MetaValue::Unsigned(experts)),
        ])
    }

    #[test]
    fn the_70b_class_is_told_from_65b_and_experts() {
        assert_eq!(llama(80, 64, 8, 0).is_70b(), Ok(true));
        assert_eq!(llama(80, 64, 64, 0).is_70b(), Ok(false));
        assert_eq!(llama(80, 64, 8, 8).is_70b(), Ok(false));
        assert_eq!(llama(80, 64, 8, 16).is_70b(), Ok(true));
        assert_eq!(llama(79, 64, 8, 0).is_70b(), Ok(false));
        for (arch, blocks, expected) in [("qwen2", 80, true), ("jais2", 68, true), ("jais2", 80, false)] {
            let facts = facts(&[
                ("general.architecture", MetaValue::Text(arch.into())),
                (&format!("{arch}.block_count"), MetaValue::Unsigned(blocks)),
            ]);
            assert_eq!(facts.is_70b(), Ok(expected), "{arch} {blocks}");
        }
    }

    #[test]
    fn absent_kv_heads_equal_the_heads_and_zero_kv_heads_mean_no_groups() {
        let no_kv = facts(&[
            ("general.architecture", MetaValue::Text("mpt".into())),
            ("mpt.block_count", MetaValue::Unsigned(32)),
            ("mpt.attention.head_count", MetaValue::Unsigned(32)),
        ]);
        assert_eq!(no_kv.heads_per_kv_head(), Ok(1));
        assert_eq!(llama(32, 32, 0, 0).heads_per_kv_head(), Ok(0));
        assert_eq!(llama(32, 0, 8, 0).heads_per_kv_head(), Ok(0));
        assert_eq!(llama(32, 30, 8, 0).heads_per_kv_head(), Ok(3));
    }

    #[test]
    fn per_block_head_counts_take_the_first_and_must_have_the_right_length() {
        let deci = |len, first| {
            facts(&[
                ("general.architecture", MetaValue::Text("deci".into())),
                ("deci.block_count", MetaValue::Unsigned(80)),
                ("deci.attention.head_count", MetaValue::Unsigned(64)),
                ("deci.attention.head_count_kv", MetaValue::Integers { len, first }),
            ])
        };
        assert_eq!(deci(80, Some(8)).heads_per_kv_head(), Ok(8));
        assert_eq!(deci(80, Some(0)).heads_per_kv_head(), Ok(0));
        let error = deci(79, Some(8)).heads_per_kv_head().unwrap_err().to_string();
        assert!(error.contains("deci.attention.head_count_kv is an array of 79"), "{error}");
        assert!(error.contains("80"), "{error}");
        assert!(deci(80, Some(-1)).heads_per_kv_head().is_err());
        assert!(deci(0, None).heads_per_kv_head().is_err());
    }

    #[test]
    fn hostile_numbers_are_errors_only_where_they_are_asked_for() {
        for blocks in [0, 513, 1 << 32, u64::MAX] {
            let facts = llama(blocks, 32, 8, 0);
            assert_eq!(facts.heads_per_kv_head(), Ok(4));
            assert_eq!(facts.experts(), Ok(0));
            let error = facts.blocks().unwrap_err().to_string();
            assert!(error.contains("llama.block_count") && error.contains(&blocks.to_string()), "{error}");
            assert!(error.contains("--override-kv"), "{error}");
        }
        assert!(llama(32, 32, 8, 1 << 32).experts().is_err());
        assert!(llama(32, 1 << 32, 8, 0).heads_per_kv_head().is_err());
        let none = facts(&[]);
        assert!(none.blocks().unwrap_err().to_string().contains("general.architecture is missing"));
        assert_eq!(none.is_70b(), Ok(false));
        let text = facts(&[
            ("general.architecture", MetaValue::Text("llama".into())),
            ("llama.block_count", MetaValue::Text("x".repeat(1 << 20))),
        ]);
        assert!(text.blocks().unwrap_err().to_string().len() < 300);
        let long_name = facts(&[("general.architecture", MetaValue::Text("a\n".repeat(1 << 20)))]);
        let error = long_name.blocks().unwrap_err().to_string();
        assert!(error.len() < 300 && !error.contains('\n'), "{error}");
    }

    #[test]
    fn metadata_values_of_every_kind_are_understood_or_described() {
        let mut metadata = Metadata::new("test");
        metadata.set("general.architecture", Value::String("deci".into()));
        metadata.set("deci.block_count", Value::I32(80));
        metadata.set("deci.attention.head_count", Value::U64(64));
        let per_block = vec![Value::I32(8); 80];
        metadata.set("deci.attention.head_count_kv", Value::Array(Array::of_values(ValueType::I32, &per_block)));
        let facts = ModelFacts::from_metadata(&metadata);
        assert_eq!((facts.blocks(), facts.heads_per_kv_head(), facts.is_70b()), (Ok(80), Ok(8), Ok(true)));

        metadata.set("deci.attention.head_count_kv", Value::Array(Array::of_strings(["8"])));
        metadata.set("deci.block_count", Value::I32(-1));
        metadata.set("deci.expert_count", Value::F32(8.0));
        let facts = ModelFacts::from_metadata(&metadata);
        assert!(facts.heads_per_kv_head().unwrap_err().to_string().contains("arr of str"));
        assert!(facts.blocks().unwrap_err().to_string().contains("-1"));
        assert!(facts.experts().unwrap_err().to_string().contains("f32"));
    }

    #[test]
    fn looped_and_routed_models_count_more_layers() {
        let looped = |loops| {
            facts(&[
                ("general.architecture", MetaValue::Text("nanbeige".into())),
                ("nanbeige.block_count", MetaValue::Unsigned(32)),
                ("nanbeige.num_loops", MetaValue::Unsigned(loops)),
            ])
        };
        assert_eq!(looped(2).blocks(), Ok(64));
        assert!(looped(0).blocks().is_err());
        assert!(looped(17).blocks().is_err());
        let routed = facts(&[
            ("general.architecture", MetaValue::Text("graniteswitch".into())),
            ("graniteswitch.block_count", MetaValue::Unsigned(40)),
        ]);
        assert_eq!(routed.blocks(), Ok(41));
    }
}
