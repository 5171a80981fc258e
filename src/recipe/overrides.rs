//! Types given by hand: `REGEX=TYPE`, and lists of them in a file.

use regex::bytes::{Regex, RegexBuilder};

use super::RecipeError;
use crate::gguf::{TENSOR_TYPES, TensorType};

/// One `--tensor-type`: tensors in whose name the pattern occurs get the type.
#[derive(Clone, Debug)]
pub struct TypeOverride {
    /// The pattern as it is searched for: in lower case, as llama-quantize has it.
    pub pattern: String,
    /// The type for tensors that match.
    pub ty: TensorType,
    regex: Regex,
}

/// A pattern whose automaton needs more memory than this is refused.
const PATTERN_BYTES: usize = 1 << 20;

impl TypeOverride {
    /// Parses `REGEX=TYPE`. The first `=` separates; the pattern is lowercased, the type is ggml's name in any letter
    /// case. `place` names the option or file line in errors.
    ///
    /// # Errors
    /// Text of another form, an unknown type, a pattern that does not compile.
    pub fn parse(text: &str, place: &str) -> Result<TypeOverride, RecipeError> {
        let malformed =
            |problem| RecipeError::MalformedOverride { place: place.to_owned(), text: shorten(text), problem };
        let (pattern, ty) = text.split_once('=').ok_or_else(|| malformed("there is no '='"))?;
        if pattern.is_empty() {
            return Err(malformed("the pattern is empty"));
        }
        if ty.is_empty() {
            return Err(malformed("the type is empty"));
        }
        TypeOverride::new(pattern, parse_storable_type(ty, place)?, place)
    }

    /// An override from its parts; see [`TypeOverride::parse`].
    ///
    /// # Errors
    /// A pattern that does not compile.
    pub fn new(pattern: &str, ty: TensorType, place: &str) -> Result<TypeOverride, RecipeError> {
        let pattern = pattern.to_ascii_lowercase();
        // Bytes, not characters: as in llama-quantize, and the automata of classes such as \d stay small.
        let mut builder = RegexBuilder::new(&pattern);
        match builder.unicode(false).size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES).build() {
            Ok(regex) => Ok(TypeOverride { pattern, ty, regex }),
            Err(error) => Err(RecipeError::BadPattern {
                place: place.to_owned(),
                pattern: shorten(&pattern),
                problem: one_line(&error),
            }),
        }
    }

    /// True if the pattern occurs anywhere in the name.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.regex.is_match(name.as_bytes())
    }
}

/// Parses the contents of a `--tensor-type-file`: `REGEX=TYPE` separated by spaces or newlines. `file` names it in
/// errors.
///
/// # Errors
/// The first entry that [`TypeOverride::parse`] refuses, with its line.
pub fn parse_override_list(text: &str, file: &str) -> Result<Vec<TypeOverride>, RecipeError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut overrides = Vec::new();
    for (line, entries) in text.lines().enumerate() {
        for entry in entries.split_ascii_whitespace() {
            overrides.push(TypeOverride::parse(entry, &format!("{file}, line {}", line + 1))?);
        }
    }
    Ok(overrides)
}

/// Finds a type that tensors of a written file may have. `place` names the option in the error.
///
/// # Errors
/// [`RecipeError::UnknownType`], which lists the names; also for ggml's work formats and integers.
pub fn parse_storable_type(name: &str, place: &str) -> Result<TensorType, RecipeError> {
    TensorType::from_name(name)
        .filter(|ty| is_storable(*ty))
        .ok_or_else(|| RecipeError::UnknownType { place: place.to_owned(), found: shorten(name) })
}

/// Types that weights can be converted to: not the integers, not F64, not ggml's formats for activations.
fn is_storable(ty: TensorType) -> bool {
    !super::roles::is_unconvertible(ty) && !matches!(ty, TensorType::Q8_1 | TensorType::Q8_K)
}

/// Names of those types, comma separated.
pub(super) fn storable_types() -> String {
    let names = TENSOR_TYPES.iter().filter(|row| is_storable(row.ty)).map(|row| row.name);
    names.collect::<Vec<_>>().join(", ")
}

fn shorten(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// The last line of a regex error says what is wrong; those before it draw the pattern.
fn one_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    shorten(line.trim().trim_start_matches("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_lowercased_and_searched() {
        let rule = TypeOverride::parse(r"BLK\.[0-3]\.attn_(q|k)=Q6_k", "--tensor-type").unwrap();
        assert_eq!(rule.ty, TensorType::Q6_K);
        assert!(rule.matches("blk.2.attn_k.weight"));
        assert!(!rule.matches("blk.4.attn_k.weight"));
        let any = TypeOverride::parse(r"blk.\d+\.é=f16", "--tensor-type").unwrap();
        assert!(any.matches("blk.17.é"));
        let anchored = TypeOverride::parse("^output=f16", "--tensor-type").unwrap();
        assert!(anchored.matches("output.weight"));
        assert!(!anchored.matches("blk.0.attn_output.weight"));
    }

    #[test]
    fn malformed_entries_say_what_is_wrong() {
        for (text, part) in [
            ("attn_q", "no '='"),
            ("=q8_0", "pattern is empty"),
            ("attn_q=", "type is empty"),
            ("attn_q=q9_0", "known types: f32, f16"),
            ("attn_q=q8_K", "known types"),
            ("attn_q=i32", "known types"),
            ("a(b=q8_0", "unclosed group"),
            ("a{999999999}=q8_0", "regular expression"),
            ("(?=x)y=q8_0", "unknown tensor type"),
        ] {
            let error = TypeOverride::parse(text, "--tensor-type").unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(error.starts_with("--tensor-type") && !error.contains('\n'), "{error}");
        }
        let long = TypeOverride::parse(&"x".repeat(1 << 20), "--tensor-type").unwrap_err().to_string();
        assert!(long.len() < 400);
    }

    #[test]
    fn look_around_is_refused_by_name() {
        let error = TypeOverride::parse("a(?!b)=q8_0", "--tensor-type").unwrap_err().to_string();
        assert!(error.contains("look-around"), "{error}");
    }

    #[test]
    fn files_are_split_at_any_white_space_and_errors_name_the_line() {
        let list = parse_override_list("a=q8_0 b=q4_K\r\n\n\tc=f16\n", "types.txt").unwrap();
        let seen: Vec<_> = list.iter().map(|rule| (rule.pattern.as_str(), rule.ty)).collect();
        assert_eq!(seen, [("a", TensorType::Q8_0), ("b", TensorType::Q4_K), ("c", TensorType::F16)]);
        let error = parse_override_list("a=q8_0\nb=zz\n", "types.txt").unwrap_err().to_string();
        assert!(error.starts_with("types.txt, line 2:"), "{error}");
        assert!(parse_override_list("", "types.txt").unwrap().is_empty());
    }

    #[test]
    fn a_catastrophic_pattern_runs_in_linear_time() {
        let rule = TypeOverride::parse("(a*)*(a*)*(a*)*$=q8_0", "--tensor-type").unwrap();
        assert!(rule.matches(&format!("{}b", "a".repeat(60))));
        let rule = TypeOverride::parse("^(a+)+$=q8_0", "--tensor-type").unwrap();
        assert!(!rule.matches(&format!("{}b", "a".repeat(50_000))));
    }
}
