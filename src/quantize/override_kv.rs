//! Metadata values given by hand, brought to the type that readers of the key expect, or refused.

use super::QuantizeError;
use super::known_keys::{Expected, architecture_of, expected};
use crate::gguf::{Metadata, Value, ValueType, shown};

/// Where the data of tensors begins, in bytes; GGUF allows only these values.
const ALIGNMENT: &str = "general.alignment";

/// Sets `values`, which were given with `flag`, in `metadata`. Returns what the user should be told.
///
/// # Errors
/// [`QuantizeError::Override`] for a value that cannot be what the key's readers expect.
pub(crate) fn apply(
    metadata: &mut Metadata,
    values: &[(String, Value)],
    flag: &'static str,
) -> Result<Vec<String>, QuantizeError> {
    let mut notes = Vec::new();
    for (key, value) in values {
        let (value, note) = converted(key, value, metadata.get(key), flag)?;
        notes.extend(note);
        metadata.set(key, value);
    }
    let architecture = metadata.str("general.architecture").ok().flatten();
    for (key, _) in values {
        if let (Some(of_key), Some(architecture)) = (architecture_of(key), architecture)
            && of_key != architecture
        {
            notes.push(format!(
                "{flag} {}: the architecture is {}, whose readers do not look at this key",
                shown(key.as_bytes()),
                shown(architecture.as_bytes())
            ));
        }
    }
    Ok(notes)
}

/// The value in the type that the key has, and a note about it.
fn converted(
    key: &str,
    value: &Value,
    old: Option<&Value>,
    flag: &'static str,
) -> Result<(Value, Option<String>), QuantizeError> {
    let refused = |expected: String| QuantizeError::Override {
        flag,
        key: shown(key.as_bytes()),
        expected,
        found: value.describe(),
        advice: "give a value of that kind",
    };
    let Some(wanted) = Wanted::of(key, value, old) else {
        return Err(QuantizeError::Override {
            flag,
            key: shown(key.as_bytes()),
            expected: "a list".to_owned(),
            found: value.describe(),
            advice: "single values cannot replace a list; leave this key away",
        });
    };
    let new = convert(value, wanted.ty).ok_or_else(|| refused(describe(wanted.ty)))?;
    if key == ALIGNMENT && !new.as_integer().is_some_and(|bytes| bytes > 0 && bytes.count_ones() == 1) {
        return Err(refused("a power of two".to_owned()));
    }
    let note = match old {
        Some(Value::Array(list)) => Some(format!(
            "{flag} {}: the file has a list of {} values, one a layer; a single value replaces it for all layers",
            shown(key.as_bytes()),
            list.len()
        )),
        None if !wanted.known => Some(format!(
            "{flag} {}: the file does not have this key, and it is none that llama.cpp is known to read; it is \
             added as {}",
            shown(key.as_bytes()),
            wanted.ty
        )),
        _ => None,
    };
    Ok((new, note))
}

/// The type of a single value, or that of lists, that readers of a key expect; `None` for keys that llama.cpp is not known
/// to read.
pub(crate) fn reader_type(key: &str) -> Option<ValueType> {
    Some(match expected(key)? {
        Expected::U16 => ValueType::U16,
        Expected::U32 | Expected::U32OrList => ValueType::U32,
        Expected::I32 => ValueType::I32,
        Expected::F32 | Expected::F32OrList => ValueType::F32,
        Expected::Bool => ValueType::Bool,
        Expected::Text => ValueType::String,
        Expected::List => ValueType::Array,
    })
}

/// The type that a value has to have.
struct Wanted {
    ty: ValueType,
    /// True if it is that of the key's readers, or of the file.
    known: bool,
}

impl Wanted {
    /// `None` for a list, which no single value can be.
    fn of(key: &str, value: &Value, old: Option<&Value>) -> Option<Wanted> {
        let known = |ty| Some(Wanted { ty, known: true });
        match reader_type(key) {
            // Lists come from callers of the library, never from the command line.
            Some(ValueType::Array) => {
                matches!(value, Value::Array(_)).then_some(Wanted { ty: ValueType::Array, known: true })
            }
            Some(ty) => known(ty),
            None => match (old, value) {
                (Some(Value::Array(_)), Value::Array(_)) => known(ValueType::Array),
                (Some(Value::Array(_)), _) => None,
                (Some(old), _) => known(old.value_type()),
                (None, _) => Some(Wanted { ty: unknown_type(value), known: false }),
            },
        }
    }
}

/// The type of a key that nobody knows: whole numbers have 32 bits, as llama-quantize stores them.
fn unknown_type(value: &Value) -> ValueType {
    match value {
        Value::I64(number) if *number < 0 => ValueType::I32,
        Value::I64(_) => ValueType::U32,
        Value::F64(_) => ValueType::F32,
        other => other.value_type(),
    }
}

/// The same value in another type, `None` if something would be lost or guessed.
fn convert(value: &Value, ty: ValueType) -> Option<Value> {
    if value.value_type() == ty {
        return Some(value.clone());
    }
    match ty {
        ValueType::Bool => Some(Value::Bool(match (value, value.as_integer()) {
            (_, Some(0)) => false,
            (_, Some(1)) => true,
            (Value::String(text), _) if text.eq_ignore_ascii_case(b"true") => true,
            (Value::String(text), _) if text.eq_ignore_ascii_case(b"false") => false,
            _ => return None,
        })),
        ValueType::String => Some(Value::String(match value {
            Value::Bool(flag) => flag.to_string().into(),
            Value::F32(number) => number.to_string().into(),
            Value::F64(number) => number.to_string().into(),
            other => other.as_integer()?.to_string().into(),
        })),
        ValueType::F32 => {
            let wide = as_float(value)?;
            let number = wide as f32;
            // Decimals are rounded, whole numbers are not.
            let kept = value.as_integer().is_none() || f64::from(number) == wide;
            (number.is_finite() && kept).then_some(Value::F32(number))
        }
        ValueType::F64 => as_float(value).map(Value::F64),
        ValueType::Array => None,
        integer => Value::integer(integer, as_integer(value)?),
    }
}

fn as_float(value: &Value) -> Option<f64> {
    /// Whole numbers up to here a double holds exactly.
    const EXACT: i128 = 1 << 53;
    let number = match value {
        Value::F32(number) => f64::from(*number),
        Value::F64(number) => *number,
        Value::String(text) => std::str::from_utf8(text).ok()?.trim().parse().ok()?,
        other => other.as_integer().filter(|number| number.abs() <= EXACT)? as f64,
    };
    number.is_finite().then_some(number)
}

fn as_integer(value: &Value) -> Option<i128> {
    /// Beyond this a double no longer tells whole numbers apart.
    const EXACT: f64 = (1_u64 << 53) as f64;
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() <= EXACT).then_some(number as i128);
    match value {
        Value::F32(number) => whole(f64::from(*number)),
        Value::F64(number) => whole(*number),
        Value::String(text) => std::str::from_utf8(text).ok()?.trim().parse().ok(),
        other => other.as_integer(),
    }
}

/// A type for messages, with its range.
fn describe(ty: ValueType) -> String {
    let range = match ty {
        ValueType::U8 => "an integer from 0 to 255",
        ValueType::I8 => "an integer from -128 to 127",
        ValueType::U16 => "an integer from 0 to 65535",
        ValueType::I16 => "an integer from -32768 to 32767",
        ValueType::U32 => "an integer from 0 to 4294967295",
        ValueType::I32 => "an integer from -2147483648 to 2147483647",
        ValueType::U64 => "an integer from 0 to 18446744073709551615",
        ValueType::I64 => "an integer from -2^63 to 2^63 - 1",
        ValueType::F32 | ValueType::F64 => "a finite number that the type holds",
        ValueType::Bool => "true or false",
        ValueType::String => "a text",
        ValueType::Array => "a list",
    };
    format!("{ty} ({range})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Array;

    fn set(key: &str, value: impl Into<Value>) -> Result<Value, String> {
        let mut metadata = Metadata::new("test");
        metadata.set("general.architecture", "llama");
        metadata.set("custom.u8", 7u8);
        metadata.set("custom.i64", -7i64);
        metadata.set("custom.text", "a");
        metadata.set("custom.f64", 0.5f64);
        metadata.set("custom.list", Array::of_strings(["a"]));
        metadata.set("llama.attention.head_count_kv", Array::of_values(ValueType::U32, &[Value::U32(1)]));
        apply(&mut metadata, &[(key.to_owned(), value.into())], "--set").map_err(|error| error.to_string())?;
        Ok(metadata.get(key).unwrap().clone())
    }

    #[test]
    fn values_become_what_readers_expect() {
        for (key, given, stored) in [
            ("llama.rope.freq_base", Value::I64(10_000), Value::F32(10_000.0)),
            ("llama.rope.freq_base", Value::F64(0.1), Value::F32(0.1)),
            ("llama.rope.freq_base", Value::from("500000"), Value::F32(500_000.0)),
            ("tokenizer.ggml.add_bos_token", Value::I64(1), Value::Bool(true)),
            ("tokenizer.ggml.add_bos_token", Value::from("False"), Value::Bool(false)),
            ("general.name", Value::I64(7), Value::from("7")),
            ("general.name", Value::F64(0.5), Value::from("0.5")),
            ("llama.block_count", Value::from("4"), Value::U32(4)),
            ("llama.block_count", Value::F64(4.0), Value::U32(4)),
            ("general.sampling.top_k", Value::I64(-1), Value::I32(-1)),
            ("llama.attention.head_count_kv", Value::I64(2), Value::U32(2)),
            ("custom.u8", Value::I64(255), Value::U8(255)),
            ("custom.i64", Value::I64(-1), Value::I64(-1)),
            ("custom.text", Value::Bool(true), Value::from("true")),
            ("custom.f64", Value::I64(3), Value::F64(3.0)),
            ("custom.new", Value::I64(3), Value::U32(3)),
            ("custom.new", Value::I64(-3), Value::I32(-3)),
            ("custom.new", Value::F64(0.5), Value::F32(0.5)),
        ] {
            assert_eq!(set(key, given.clone()), Ok(stored), "{key} {given:?}");
        }
    }

    #[test]
    fn what_would_be_lost_or_guessed_is_refused_with_key_type_and_value() {
        for (key, given, parts) in [
            ("llama.block_count", Value::I64(-1), ["u32 (an integer from 0 to 4294967295)", "-1"]),
            ("llama.block_count", Value::I64(1 << 32), ["u32", "4294967296"]),
            ("llama.block_count", Value::F64(4.5), ["u32", "4.5"]),
            ("llama.block_count", Value::from("four"), ["u32", "four"]),
            ("llama.block_count", Value::Bool(true), ["u32", "true"]),
            ("llama.rope.freq_base", Value::from("big"), ["f32", "big"]),
            ("llama.rope.freq_base", Value::F64(1e39), ["f32", "1000"]),
            ("llama.rope.freq_base", Value::I64(16_777_217), ["f32", "16777217"]),
            ("llama.rope.freq_base", Value::Bool(true), ["f32", "true"]),
            ("tokenizer.ggml.add_bos_token", Value::I64(2), ["bool", "2"]),
            ("tokenizer.ggml.add_bos_token", Value::from("yes"), ["bool", "yes"]),
            ("tokenizer.ggml.add_bos_token", Value::F64(1.0), ["bool", "1"]),
            ("tokenizer.ggml.bos_token_id", Value::I64(-1), ["u32", "-1"]),
            ("tokenizer.ggml.tokens", Value::from("a"), ["a list", "\"a\""]),
            ("custom.list", Value::from("a"), ["a list", "\"a\""]),
            ("custom.u8", Value::I64(256), ["u8 (an integer from 0 to 255)", "256"]),
            ("general.alignment", Value::I64(33), ["a power of two", "33"]),
            ("custom.new", Value::I64(1 << 40), ["u32", "1099511627776"]),
            ("custom.new", Value::I64(-(1 << 40)), ["i32", "-1099511627776"]),
        ] {
            let error = set(key, given.clone()).unwrap_err();
            assert!(error.contains(key) && !error.contains('\n'), "{error}");
            for part in parts {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    }

    #[test]
    fn lists_unknown_keys_and_other_architectures_are_told() {
        let mut metadata = Metadata::new("test");
        metadata.set("general.architecture", "llama");
        metadata.set("llama.attention.head_count", Array::of_values(ValueType::U32, &[Value::U32(1), Value::U32(2)]));
        let values = [
            ("llama.attention.head_count", Value::I64(4)),
            ("llama.expert_used_cout", Value::I64(4)),
            ("qwen2.block_count", Value::I64(4)),
            ("llama.block_count", Value::I64(4)),
        ];
        let values: Vec<_> = values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let notes = apply(&mut metadata, &values, "--set").unwrap();
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert!(notes[0].contains("a list of 2 values"), "{notes:?}");
        assert!(notes[1].contains("expert_used_cout") && notes[1].contains("u32"), "{notes:?}");
        assert!(notes[2].contains("qwen2.block_count") && notes[2].contains("\"llama\""), "{notes:?}");
    }
}
