//! Split models: names of shards, their keys, and how tensors are dealt out to them.

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::error::{DAMAGED, GgufError, shown, shown_path};
use super::metadata::{Metadata, is_layout_key};
use super::parse::ParsedFile;
use super::reader::Shard;
use super::tensor_info::align_up;
use super::value::Value;

/// Number of a shard, from 0; u16.
pub(crate) const NUMBER_KEY: &str = "split.no";
/// Number of shards; u16. 0 and 1 mean that the file stands alone.
pub(crate) const COUNT_KEY: &str = "split.count";
/// Number of tensors in all shards; i32.
pub(crate) const TENSOR_COUNT_KEY: &str = "split.tensors.count";

/// The path of shard `number` (from 0) of `count`: `PREFIX-00001-of-00003.gguf` (`llama_split_path`).
pub fn shard_path(prefix: &Path, number: u16, count: u16) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(format!("-{:05}-of-{count:05}.gguf", u32::from(number) + 1));
    PathBuf::from(name)
}

/// The path of shard `number` (from 0) of `count` of an output that is named as a whole: its `.gguf` is left out.
pub fn shard_path_of(output: &Path, number: u16, count: u16) -> PathBuf {
    let named_gguf = output.extension().is_some_and(|extension| extension == "gguf");
    let prefix = if named_gguf { output.with_extension("") } else { output.to_path_buf() };
    shard_path(&prefix, number, count)
}

/// Takes a shard's path apart: prefix, number from 0, count. `None` if it is not named like a shard.
pub fn parse_shard_path(path: &Path) -> Option<(PathBuf, u16, u16)> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let parse = |digits: &str| -> Option<u16> {
        (digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
    };
    let (number, count) = (parse(number)?, parse(count)?);
    let number = number.checked_sub(1)?;
    (number < count).then(|| (path.with_file_name(prefix), number, count))
}

fn key_error(metadata: &Metadata, key: &str, problem: String, advice: &'static str) -> GgufError {
    GgufError::Key { file: metadata.file().to_owned(), key: shown(key.as_bytes()), problem, advice }
}

/// An integer of any type, as the split keys are found in the wild, that fits u16.
fn small(metadata: &Metadata, key: &str) -> Result<Option<u16>, GgufError> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    match value.as_integer().map(u16::try_from) {
        Some(Ok(number)) => Ok(Some(number)),
        _ => Err(key_error(metadata, key, format!("is {}, expected u16", value.describe()), DAMAGED)),
    }
}

/// Reads the split keys of a file that was named to be opened: the number of shards, `None` if it stands alone.
pub(crate) fn check_first_shard(metadata: &Metadata, path: &Path) -> Result<Option<u16>, GgufError> {
    let Some(count) = small(metadata, COUNT_KEY)?.filter(|count| *count > 1) else { return Ok(None) };
    let number = small(metadata, NUMBER_KEY)?
        .ok_or_else(|| key_error(metadata, NUMBER_KEY, format!("is missing, {COUNT_KEY} is {count}"), DAMAGED))?;
    if number >= count {
        let problem = format!("is {number}, {COUNT_KEY} is {count}: shards are numbered from 0");
        return Err(key_error(metadata, NUMBER_KEY, problem, DAMAGED));
    }
    if number > 0 {
        let advice = match parse_shard_path(path) {
            Some((prefix, _, _)) => format!("give {}", shown_path(&shard_path(&prefix, 0, count))),
            None => format!("give the first shard, which is named like PREFIX-00001-of-{count:05}.gguf"),
        };
        return Err(GgufError::Split {
            file: shown_path(path),
            problem: format!(
                "is shard {} of {count} ({NUMBER_KEY} is {number}), a model is opened by its first",
                number + 1
            ),
            advice,
        });
    }
    Ok(Some(count))
}

/// True for the keys that only shards have.
pub(crate) fn is_shard_key(key: &str) -> bool {
    [NUMBER_KEY, COUNT_KEY, TENSOR_COUNT_KEY].contains(&key)
}

/// Checks the first shard's name against its keys and returns the prefix that all shards share.
pub(crate) fn check_first_name(path: &Path, count: u16) -> Result<PathBuf, GgufError> {
    match parse_shard_path(path) {
        Some((prefix, 0, named)) if named == count => Ok(prefix),
        _ => Err(GgufError::Split {
            file: shown_path(path),
            problem: format!("is the first of {count} shards by its keys, but is not named so"),
            advice: format!("rename it to end in -00001-of-{count:05}.gguf, and the others likewise"),
        }),
    }
}

/// `split.tensors.count` of the first shard.
pub(crate) fn tensor_count(metadata: &Metadata) -> Result<u64, GgufError> {
    let Some(value) = metadata.get(TENSOR_COUNT_KEY) else {
        let problem = "is missing in a split model".to_owned();
        return Err(key_error(metadata, TENSOR_COUNT_KEY, problem, "split the model again"));
    };
    value.as_integer().and_then(|count| u64::try_from(count).ok()).ok_or_else(|| {
        let problem = format!("is {}, expected a number of tensors", value.describe());
        key_error(metadata, TENSOR_COUNT_KEY, problem, DAMAGED)
    })
}

/// Checks the split keys of a shard that was found by name.
pub(crate) fn check_further_shard(metadata: &Metadata, number: u16, count: u16) -> Result<(), GgufError> {
    const ADVICE: &str = "get all shards of the same model again";
    for (key, expected) in [(NUMBER_KEY, number), (COUNT_KEY, count)] {
        match small(metadata, key)? {
            Some(found) if found == expected => {}
            Some(found) => {
                return Err(key_error(
                    metadata,
                    key,
                    format!("is {found}, expected {expected} by the file's name"),
                    ADVICE,
                ));
            }
            // b10605 reads the count from the first shard only.
            None if key == COUNT_KEY => {}
            None => return Err(key_error(metadata, key, format!("is missing, expected {expected}"), ADVICE)),
        }
    }
    Ok(())
}

/// Keys of a further shard that the first lacks or has with another value. How a file is aligned and which shard it is are
/// matters of that file.
pub(super) fn own_keys(first: &Metadata, further: &Metadata) -> Vec<String> {
    let is_own = |(key, value): &(&str, &Value)| !is_layout_key(key) && first.get(key) != Some(*value);
    further.iter().filter(is_own).map(|(key, _)| key.to_owned()).collect()
}

/// Checks that a further shard is the right one of the same model as the first.
pub(super) fn check_belongs(
    first: &(Shard, ParsedFile),
    (shard, parsed): (&Shard, &ParsedFile),
    number: u16,
    count: u16,
) -> Result<(), GgufError> {
    let wrong = |problem: String| GgufError::Split {
        file: shard.label().to_owned(),
        problem,
        advice: "get all shards of the same model again".to_owned(),
    };
    check_further_shard(&parsed.metadata, number, count)?;
    if (shard.version(), shard.is_big_endian()) != (first.0.version(), first.0.is_big_endian()) {
        let order = |big| if big { "big" } else { "little" };
        return Err(wrong(format!(
            "is GGUF version {}, {} endian, the first shard is version {}, {} endian",
            shard.version(),
            order(shard.is_big_endian()),
            first.0.version(),
            order(first.0.is_big_endian())
        )));
    }
    for key in ["general.architecture", "general.name", TENSOR_COUNT_KEY] {
        if let (Some(here), Some(there)) = (parsed.metadata.get(key), first.1.metadata.get(key))
            && here != there
        {
            return Err(wrong(format!("{key} is {}, in the first shard {}", here.describe(), there.describe())));
        }
    }
    Ok(())
}

/// How the tensors of a model are dealt out to output files: position ranges in file order, one per shard.
pub type SplitPlan = Vec<Range<usize>>;

/// Starts a new shard whenever the next tensor would take the tensor bytes of the current one, each padded to
/// `alignment`, beyond `max_bytes` (`llama-gguf-split --split-max-size`). A tensor larger than that gets a shard of
/// its own. Headers are not counted. No tensors make one empty shard.
pub fn plan_by_size(tensor_bytes: &[u64], max_bytes: u64, alignment: u32) -> SplitPlan {
    let mut plan = Vec::new();
    let (mut first, mut size) = (0, 0u64);
    for (position, bytes) in tensor_bytes.iter().enumerate() {
        let padded = align_up(*bytes, alignment.into()).unwrap_or(u64::MAX);
        match size.checked_add(padded) {
            Some(grown) if grown <= max_bytes || position == first => size = grown,
            _ => {
                plan.push(first..position);
                (first, size) = (position, padded);
            }
        }
    }
    plan.push(first..tensor_bytes.len());
    plan
}

/// The shards of the input again (`--keep-split`): `shard_of[i]` is the input shard of tensor `i`, ascending as
/// [`super::Gguf::tensors`] lists them; an input shard without tensors stays one.
pub fn plan_like_input(shard_of: &[usize], n_shards: usize) -> SplitPlan {
    let mut plan = Vec::with_capacity(n_shards);
    let mut first = 0;
    for shard in 0..n_shards {
        let end = first + shard_of[first..].iter().take_while(|of| **of <= shard).count();
        plan.push(first..end);
        first = end;
    }
    plan
}

/// The metadata of shard `number` of `count`: everything and the split keys in the first, the split keys alone in the
/// others. With one shard the split keys are removed instead.
pub fn shard_metadata(whole: &Metadata, number: u16, count: u16, n_tensors: u64) -> Metadata {
    let mut metadata = if number == 0 { whole.clone() } else { Metadata::new(whole.file()) };
    for key in [NUMBER_KEY, COUNT_KEY, TENSOR_COUNT_KEY] {
        metadata.remove(key);
    }
    if count > 1 {
        metadata.set(NUMBER_KEY, number);
        metadata.set(COUNT_KEY, count);
        metadata.set(TENSOR_COUNT_KEY, Value::I32(i32::try_from(n_tensors).unwrap_or(i32::MAX)));
    }
    metadata
}

/// Reads a size such as `4G`, `500M`, `1.5G`, `800K` or plain bytes; units of 1000, as llama-gguf-split counts.
///
/// # Errors
/// A sentence that says what was given and what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || {
        format!("size {text:?} is not understood: give a number above 0 with K, M, G or T (units of 1000), such as 4G")
    };
    let trimmed = text.trim();
    let (digits, unit) = match trimmed.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&trimmed[..trimmed.len() - 1], 1_000u64),
        Some('M') => (&trimmed[..trimmed.len() - 1], 1_000_000),
        Some('G') => (&trimmed[..trimmed.len() - 1], 1_000_000_000),
        Some('T') => (&trimmed[..trimmed.len() - 1], 1_000_000_000_000),
        _ => (trimmed, 1),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 12 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let mut bytes = whole.checked_mul(unit).ok_or_else(bad)?;
    if !fraction.is_empty() {
        // At most 12 digits and 10^12: the product is below 2^127.
        let scaled: u128 = fraction.parse().map_err(|_| bad())?;
        bytes = bytes
            .checked_add((scaled * u128::from(unit) / 10u128.pow(fraction.len() as u32)) as u64)
            .ok_or_else(bad)?;
    }
    if bytes == 0 { Err(bad()) } else { Ok(bytes) }
}
