//! How much memory a file takes when it runs: its weights, the cache of the context, and the buffers of a pass.
//!
//! The rules are those of llama.cpp (b10605) with one sequence, flash attention and its usual micro-batch; `docs/publish.md`
//! states them.

use serde::{Deserialize, Serialize};

use super::PublishError;
use crate::display::{decimal_size, printable};
use crate::gguf::{Gguf, Metadata, TensorType};
use crate::model::{LayerCache, ModelError, caches};
use crate::plan::Size;
use crate::recipe::roles::TOKEN_EMBD_WEIGHT;

/// Tokens of a micro-batch (`-ub`).
const MICRO_BATCH: u64 = 512;

/// Cells of a cache are a multiple of this (`llama_kv_cache`).
const CELLS: u64 = 256;

/// Bytes of a 32-bit float.
const FLOAT: u64 = 4;

/// Memory that a backend takes for itself, by a rule of thumb: contexts, kernels, alignment.
const BACKEND: u64 = 100_000_000;

/// Types that a cache can have, as `--cache-type-k` of llama.cpp names them.
const CACHE_TYPES: [TensorType; 9] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::IQ4_NL,
    TensorType::Q5_0,
    TensorType::Q5_1,
];

/// The type of keys and values in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheType(TensorType);

impl Default for CacheType {
    fn default() -> CacheType {
        CacheType(TensorType::F16)
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0.to_string().to_ascii_lowercase())
    }
}

impl std::str::FromStr for CacheType {
    type Err = String;

    fn from_str(text: &str) -> Result<CacheType, String> {
        let known = CACHE_TYPES.iter().find(|ty| ty.to_string().eq_ignore_ascii_case(text.trim()));
        known.map(|ty| CacheType(*ty)).ok_or_else(|| {
            let names: Vec<String> = CACHE_TYPES.iter().map(|ty| CacheType(*ty).to_string()).collect();
            format!("{text:?} is no type of a cache; give one of {}", names.join(", "))
        })
    }
}

/// A context length in tokens: a number, or thousands of 1024, such as 16k.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse_context(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let (digits, unit) = match trimmed.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (trimmed, 1),
    };
    let found = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    match found {
        Some(tokens) if (1..=1 << 32).contains(&tokens) => Ok(tokens),
        _ => Err(format!("{text:?} is no context; give tokens, such as 16384 or 16k")),
    }
}

/// A device that a file is to fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Its memory.
    pub memory: Size,
}

/// What a context of a model takes beside its weights, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextMemory {
    /// Tokens of the context.
    pub ctx: u64,
    /// Type of keys and values.
    pub cache_type: String,
    /// Keys and values of layers that see everything.
    pub full_bytes: u64,
    /// Keys and values of layers with a window.
    pub window_bytes: u64,
    /// States of recurrent layers.
    pub state_bytes: u64,
    /// Buffers of a pass.
    pub compute_bytes: u64,
    /// What a backend takes for itself.
    pub backend_bytes: u64,
    /// All of these.
    pub total_bytes: u64,
}

impl ContextMemory {
    /// What a context of `ctx` tokens takes of the model in `gguf`.
    ///
    /// # Errors
    /// When the metadata do not tell, or a row of the cache does not fit blocks of its type.
    pub fn new(gguf: &Gguf, ctx: u64, cache: CacheType) -> Result<ContextMemory, PublishError> {
        let file = || printable(gguf.label());
        let layers =
            layers(gguf).map_err(|source| PublishError::CannotRun { file: file(), source: Box::new(source) })?;
        let cells = ctx.next_multiple_of(CELLS);
        let (mut full, mut windowed, mut state) = (0u64, 0u64, 0u64);
        for layer in &layers {
            match *layer {
                LayerCache::Tokens { keys, values, window } => {
                    let row = |width: u64| match width {
                        0 => Some(0),
                        width => cache.0.info()?.row_bytes(width),
                    };
                    let bytes = row(keys).zip(row(values)).ok_or_else(|| {
                        let problem = format!("keys of {keys} and values of {values} do not fit blocks of {cache}");
                        PublishError::Choice(format!("{}: {problem}; give another --cache-type", file()))
                    })?;
                    let per_token = bytes.0 + bytes.1;
                    match window {
                        None => full = full.saturating_add(cells.saturating_mul(per_token)),
                        Some(window) => {
                            let seen = (window + MICRO_BATCH).next_multiple_of(CELLS).min(cells);
                            windowed = windowed.saturating_add(seen.saturating_mul(per_token));
                        }
                    }
                }
                LayerCache::State { numbers } => state = state.saturating_add(FLOAT * numbers),
                LayerCache::Shared => {}
            }
        }
        let compute = compute_bytes(gguf, cells);
        let parts = [full, windowed, state, compute, BACKEND];
        Ok(ContextMemory {
            ctx,
            cache_type: cache.to_string(),
            full_bytes: full,
            window_bytes: windowed,
            state_bytes: state,
            compute_bytes: compute,
            backend_bytes: BACKEND,
            total_bytes: parts.iter().fold(0, |sum: u64, part| sum.saturating_add(*part)),
        })
    }

    /// Bytes that a file may have on a device of so much memory.
    ///
    /// # Errors
    /// When the context alone takes all of it.
    pub(super) fn left_of(&self, memory: &Size) -> Result<u64, PublishError> {
        memory.bytes.checked_sub(self.total_bytes).filter(|left| *left > 0).ok_or_else(|| {
            PublishError::Choice(format!(
                "--fit {}: a context of {} tokens with a cache of {} takes {} by itself; give a smaller --ctx, a smaller \
                 --cache-type or more memory",
                memory.text,
                self.ctx,
                self.cache_type,
                decimal_size(self.total_bytes)
            ))
        })
    }
}

/// Buffers of a pass over a micro-batch: the logits of all its tokens or the activations of the widest layer, whatever is
/// more, its hidden states, and the mask of attention.
fn compute_bytes(gguf: &Gguf, cells: u64) -> u64 {
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture").ok().flatten().unwrap_or_default();
    let of = |suffix: &str| largest(metadata, &format!("{architecture}.{suffix}"));
    let vocabulary = gguf.tensor(TOKEN_EMBD_WEIGHT).map_or(0, |tensor| tensor.rows());
    let experts = of("expert_used_count").max(1);
    let widest = (2 * of("feed_forward_length")).max(2 * experts * of("expert_feed_forward_length"));
    let row = FLOAT * MICRO_BATCH;
    let rows = vocabulary.max(widest).saturating_add(of("embedding_length"));
    row.saturating_mul(rows).saturating_add(2 * MICRO_BATCH.saturating_mul(cells))
}

/// A count, or the largest of an array with one per layer; 0 where there is none.
fn largest(metadata: &Metadata, key: &str) -> u64 {
    if let Ok(Some(array)) = metadata.array(key) {
        let values = array.to_i64_vec().unwrap_or_default();
        return values.into_iter().filter_map(|value| u64::try_from(value).ok()).max().unwrap_or(0);
    }
    metadata.u64(key).ok().flatten().unwrap_or(0)
}

/// The caches of all layers; of multi-head latent attention, which lwq does not run, from the metadata.
fn layers(gguf: &Gguf) -> Result<Vec<LayerCache>, ModelError> {
    let error = match caches(gguf) {
        Ok(layers) => return Ok(layers),
        Err(error) => error,
    };
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture").ok().flatten().unwrap_or_default();
    let of = |suffix: &str| metadata.u64(&format!("{architecture}.{suffix}")).ok().flatten();
    // One latent vector and one rotated key a token, which all heads share; values are made from the former.
    let latent = of("attention.kv_lora_rank").zip(of("rope.dimension_count")).zip(of("block_count"));
    match latent {
        Some(((rank, rotated), blocks)) => {
            let keys = rank.saturating_add(rotated);
            Ok(vec![LayerCache::Tokens { keys, values: 0, window: None }; blocks.min(4096) as usize])
        }
        None => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;

    fn f16() -> CacheType {
        CacheType::default()
    }

    #[test]
    fn contexts_and_types_are_read() {
        assert_eq!(parse_context("16k"), Ok(16_384));
        assert_eq!(parse_context(" 4096 "), Ok(4096));
        for text in ["", "0", "k", "1.5k", "-1", "99999999999999999999", "9999999999k"] {
            assert!(parse_context(text).is_err(), "{text}");
        }
        assert_eq!("Q8_0".parse::<CacheType>().unwrap().to_string(), "q8_0");
        assert!("q4_K".parse::<CacheType>().unwrap_err().contains("iq4_nl"));
    }

    #[test]
    fn a_cache_holds_keys_and_values_of_the_key_value_heads() {
        let doclet = Gguf::open("tests/data/doclet-4m-f16.gguf").unwrap();
        let metadata = doclet.metadata();
        let count = |key: &str| metadata.u64(&format!("llama.{key}")).unwrap().unwrap();
        let head = count("embedding_length") / count("attention.head_count");
        let per_token = 2 * 2 * head * count("attention.head_count_kv") * count("block_count");
        let found = ContextMemory::new(&doclet, 200, f16()).unwrap();
        // 200 tokens take 256 cells.
        assert_eq!((found.full_bytes, found.window_bytes, found.state_bytes), (256 * per_token, 0, 0));
        let small = ContextMemory::new(&doclet, 200, "q8_0".parse().unwrap()).unwrap();
        assert_eq!(small.full_bytes, found.full_bytes / 32 * 17);
        assert!(found.left_of(&Size::from(found.total_bytes)).unwrap_err().to_string().contains("--ctx"));
        assert_eq!(found.left_of(&Size::from(found.total_bytes + 7)).unwrap(), 7);
    }

    /// What llama.cpp (llama-cpp-python 0.3.36) says of both models with 2,048 tokens: caches to the byte, buffers within a
    /// tenth.
    #[test]
    fn sizes_are_those_of_llama_cpp() {
        const MIB: f64 = (1 << 20) as f64;
        for (file, keys, state, compute) in [
            ("tests/data/doclet-4m-f16.gguf", 6.0, 0.0, 6.5137),
            ("tests/data/doclet-hybrid-f16.gguf", 1.0, 0.2051, 7.0508),
        ] {
            let found = ContextMemory::new(&Gguf::open(file).unwrap(), 2048, f16()).unwrap();
            assert_eq!(found.full_bytes as f64, keys * MIB);
            assert!((found.state_bytes as f64 / MIB - state).abs() < 1e-4);
            assert!((found.compute_bytes as f64 / MIB / compute - 1.0).abs() < 0.1);
        }
    }

    #[test]
    fn recurrent_layers_keep_a_state_whatever_the_context() {
        let hybrid = Gguf::open("tests/data/doclet-hybrid-f16.gguf").unwrap();
        let short = ContextMemory::new(&hybrid, 256, f16()).unwrap();
        let long = ContextMemory::new(&hybrid, 4096, f16()).unwrap();
        assert!(short.state_bytes > 0 && short.state_bytes == long.state_bytes);
        // One of four layers has attention.
        assert_eq!(long.full_bytes, 16 * short.full_bytes);
    }

    #[test]
    fn latent_attention_keeps_one_vector_a_token() {
        let model = RawGguf::new()
            .str("general.architecture", "deepseek2")
            .u32("deepseek2.block_count", 3)
            .u32("deepseek2.attention.kv_lora_rank", 512)
            .u32("deepseek2.rope.dimension_count", 64)
            .f32_tensor("token_embd.weight", &[8, 4], &[0.0; 32]);
        let model = Gguf::from_bytes(model.build()).unwrap();
        let found = ContextMemory::new(&model, 1024, f16()).unwrap();
        assert_eq!(found.full_bytes, 3 * 1024 * 2 * (512 + 64));
    }
}
