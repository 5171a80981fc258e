//! `--override-kv KEY=TYPE:VALUE`, as llama-quantize spells it.

use anyhow::{Context, bail};

use lwq::gguf::Value;

/// The form of an override, for messages.
const FORM: &str = "--override-kv takes KEY=TYPE:VALUE with TYPE int, float, bool or str";

/// Parses one override. The library brings the value to the type that readers of the key expect.
///
/// # Errors
/// When the text is not of the form, or the value is none of its type.
pub fn parse_override(text: &str) -> anyhow::Result<(String, Value)> {
    parse_pair(text, FORM)
}

/// Parses a pair; `form` is what messages say that it should be.
///
/// # Errors
/// As [`parse_override`].
pub fn parse_pair(text: &str, form: &str) -> anyhow::Result<(String, Value)> {
    let (key, rest) = text.split_once('=').with_context(|| format!("{text:?}: {form}"))?;
    let (kind, value) = rest.split_once(':').with_context(|| format!("{text:?}: {form}"))?;
    if key.is_empty() {
        bail!("{text:?}: the key is empty; {form}");
    }
    let value = match kind {
        "int" => {
            Value::I64(value.parse().with_context(|| format!("{text:?}: {value:?} is not a whole number of 64 bits"))?)
        }
        "float" => {
            let number: f64 = value.parse().with_context(|| format!("{text:?}: {value:?} is not a number"))?;
            if !number.is_finite() {
                bail!("{text:?}: {value} is not a finite number");
            }
            Value::F64(number)
        }
        "bool" => match value {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => bail!("{text:?}: {value:?} is neither true nor false"),
        },
        "str" => Value::String(value.into()),
        _ => bail!("{text:?}: {kind:?} is no type; {form}"),
    };
    Ok((key.to_string(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_parsed() {
        assert_eq!(parse_override("llama.expert_used_count=int:-3").unwrap().1, Value::I64(-3));
        assert_eq!(parse_override("a.b=float:0.5").unwrap(), ("a.b".into(), Value::F64(0.5)));
        assert_eq!(parse_override("a=bool:true").unwrap().1, Value::Bool(true));
        assert_eq!(parse_override("a=str:x=y:z").unwrap().1, Value::String("x=y:z".into()));
    }

    #[test]
    fn malformed_overrides_say_what_is_wrong() {
        for text in
            ["a", "a=int", "=int:1", "a=int:x", "a=int:9223372036854775808", "a=float:nan", "a=bool:yes", "a=u8:1"]
        {
            assert!(parse_override(text).unwrap_err().to_string().contains(text), "{text}");
        }
    }
}
