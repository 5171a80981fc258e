//! Types given by hand: `REGEX=TYPE`, and lists of them in a file.

use regex::bytes::RegexBuilder;

use super::RecipeError;
use crate::gguf::{TENSOR_TYPES, TensorType};

/// One `--tensor-type`: tensors in whose name the pattern occurs get the type.
#[derive(Clone, Debug)]
pub struct TypeOverride {
    /// The pattern as it is searched for: in lower case, as llama-quantize has it.
    pub pattern: String,
    /// The type for tensors that match.
    pub ty: TensorType,
    /// The option or file line that it comes from.
    place: String,
    matcher: Matcher,
}

/// A compiled pattern.
#[derive(Clone, Debug)]
enum Matcher {
    /// Without look-around and back references: time is linear in the name.
    Linear(regex::bytes::Regex),
    /// With them: the search goes back and tries again, up to a limit.
    Backtracking(Box<fancy_regex::Regex>),
}

/// A pattern whose automaton needs more memory than this is refused.
const PATTERN_BYTES: usize = 1 << 20;

/// Steps after which the search with a pattern that looks around is given up; patterns in use take some hundred.
const BACKTRACK_STEPS: usize = 100_000;

impl TypeOverride {
    /// Parses `REGEX=TYPE`. The last `=` separates, so that the pattern may look ahead; it is lowercased, the type is ggml's
    /// name in any letter case. `place` names the option or file line in errors.
    ///
    /// # Errors
    /// Text of another form, an unknown type, a pattern that does not compile.
    pub fn parse(text: &str, place: &str) -> Result<TypeOverride, RecipeError> {
        let malformed =
            |problem| RecipeError::MalformedOverride { place: place.to_owned(), text: shorten(text), problem };
        let (pattern, ty) = text.rsplit_once('=').ok_or_else(|| malformed("there is no '='"))?;
        if pattern.is_empty() {
            return Err(malformed("the pattern is empty"));
        }
        if ty.is_empty() {
            return Err(malformed("the type is empty"));
        }
        if is_comma_list(pattern) {
            return Err(malformed("commas do not separate patterns, give them one by one"));
        }
        TypeOverride::new(pattern, parse_storable_type(ty, place)?, place)
    }

    /// An override from its parts; see [`TypeOverride::parse`].
    ///
    /// # Errors
    /// A pattern that does not compile.
    pub fn new(pattern: &str, ty: TensorType, place: &str) -> Result<TypeOverride, RecipeError> {
        let pattern = pattern.to_ascii_lowercase();
        let matcher = compile(&pattern).map_err(|problem| RecipeError::BadPattern {
            place: place.to_owned(),
            pattern: shorten(&pattern),
            problem,
        })?;
        Ok(TypeOverride { pattern, ty, place: place.to_owned(), matcher })
    }

    /// True if the pattern occurs anywhere in the name.
    ///
    /// # Errors
    /// [`RecipeError::PatternTooSlow`] for a pattern that looks around and tries too many ways.
    pub(crate) fn matches(&self, name: &str) -> Result<bool, RecipeError> {
        match &self.matcher {
            Matcher::Linear(regex) => Ok(regex.is_match(name.as_bytes())),
            Matcher::Backtracking(regex) => regex.is_match(name).map_err(|_| RecipeError::PatternTooSlow {
                place: self.place.clone(),
                pattern: shorten(&self.pattern),
                tensor: shorten(name),
            }),
        }
    }
}

/// Compiles a pattern; says what is wrong with it if it is.
fn compile(pattern: &str) -> Result<Matcher, String> {
    // Bytes, not characters: as in llama-quantize, and the automata of classes such as \d stay small.
    let mut builder = RegexBuilder::new(pattern);
    let error = match builder.unicode(false).size_limit(PATTERN_BYTES).dfa_size_limit(PATTERN_BYTES).build() {
        Ok(regex) => return Ok(Matcher::Linear(regex)),
        Err(error) => one_line(&error.to_string()),
    };
    if !error.contains("look-around") && !error.contains("backreference") {
        return Err(error);
    }
    let mut builder = fancy_regex::RegexBuilder::new(pattern);
    builder.backtrack_limit(BACKTRACK_STEPS);
    builder.delegate_size_limit(PATTERN_BYTES).delegate_dfa_size_limit(PATTERN_BYTES);
    builder.build().map(|regex| Matcher::Backtracking(Box::new(regex))).map_err(|error| one_line(&error.to_string()))
}

/// True for what stands before the last `=` of a list such as `a=q8_0,b=q6_k`.
fn is_comma_list(text: &str) -> bool {
    text.split('=').skip(1).any(|part| {
        part.split_once(',').is_some_and(|(name, rest)| !rest.is_empty() && TensorType::from_name(name).is_some())
    })
}

/// Parses the contents of a `--tensor-type-file`: `REGEX=TYPE` separated by spaces or newlines. A `#` at the begin of a
/// line or after white space begins a comment. `file` names it in errors.
///
/// # Errors
/// The first entry that [`TypeOverride::parse`] refuses, with its line.
pub fn parse_override_list(text: &str, file: &str) -> Result<Vec<TypeOverride>, RecipeError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut overrides = Vec::new();
    for (line, entries) in text.lines().enumerate() {
        for entry in entries.split_ascii_whitespace().take_while(|entry| !entry.starts_with('#')) {
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
    TensorType::from_name(name).filter(|ty| is_storable(*ty)).ok_or_else(|| match TensorType::foreign_name(name) {
        Some(whose) => RecipeError::ForeignType { place: place.to_owned(), found: shorten(name), whose },
        None => RecipeError::UnknownType { place: place.to_owned(), found: shorten(name) },
    })
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
fn one_line(text: &str) -> String {
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
        assert_eq!(rule.matches("blk.2.attn_k.weight"), Ok(true));
        assert_eq!(rule.matches("blk.4.attn_k.weight"), Ok(false));
        let any = TypeOverride::parse(r"blk.\d+\.é=f16", "--tensor-type").unwrap();
        assert_eq!(any.matches("blk.17.é"), Ok(true));
        let anchored = TypeOverride::parse("^output=f16", "--tensor-type").unwrap();
        assert_eq!(anchored.matches("output.weight"), Ok(true));
        assert_eq!(anchored.matches("blk.0.attn_output.weight"), Ok(false));
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
            ("a=q8_0,b=q6_k", "commas do not separate"),
            ("(?=x=q8_0", "not a valid regular expression"),
        ] {
            let error = TypeOverride::parse(text, "--tensor-type").unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
            assert!(error.starts_with("--tensor-type") && !error.contains('\n'), "{error}");
        }
        let long = TypeOverride::parse(&"x".repeat(1 << 20), "--tensor-type").unwrap_err().to_string();
        assert!(long.len() < 400);
    }

    #[test]
    fn patterns_may_look_around_and_refer_back() {
        for (pattern, yes, no) in [
            (r"blk\.(?!0\.)\d+\.ffn_up=q8_0", "blk.10.ffn_up.weight", "blk.0.ffn_up.weight"),
            (r"blk\.(?=1\.)\d+\.ffn_up=q8_0", "blk.1.ffn_up.weight", "blk.12.ffn_up.weight"),
            (r"(?<=attn_)[kv]\.weight=q8_0", "blk.0.attn_k.weight", "blk.0.ffn_k.weight"),
            (r"(?<!cross_)attn_k=q8_0", "blk.0.attn_k.weight", "blk.0.cross_attn_k.weight"),
            (r"blk\.(\d)\1\.=q8_0", "blk.11.ffn_up.weight", "blk.12.ffn_up.weight"),
        ] {
            let rule = TypeOverride::parse(pattern, "--tensor-type").unwrap();
            assert_eq!(rule.ty, TensorType::Q8_0);
            assert_eq!((rule.matches(yes), rule.matches(no)), (Ok(true), Ok(false)), "{pattern}");
        }
        let error = parse_override_list("a=q8_0\n(?!b=q8_0\n", "types.txt").unwrap_err().to_string();
        assert!(error.starts_with("types.txt, line 2:") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_pattern_that_goes_back_too_often_is_given_up() {
        let start = std::time::Instant::now();
        let name = "a".repeat(2000);
        for pattern in [r"(a*)*(a*)*b\1$=q8_0", r"^(a+)+\1b(?=c)=q8_0", r"(?=(a|aa)+$)b=q8_0"] {
            let rule = TypeOverride::parse(pattern, "types.txt, line 7").unwrap();
            match rule.matches(&name) {
                Ok(found) => assert!(!found, "{pattern}"),
                Err(error) => assert!(error.to_string().starts_with("types.txt, line 7: pattern"), "{error}"),
            }
        }
        let slow = TypeOverride::parse(r"(a|b|ab)*(?!\.)c=q8_0", "--tensor-type").unwrap();
        assert!(matches!(slow.matches(&"ab".repeat(60)), Err(RecipeError::PatternTooSlow { .. })));
        assert_eq!(slow.matches("abc"), Ok(true));
        assert!(start.elapsed().as_secs() < 30, "{:?}", start.elapsed());
    }

    #[test]
    fn comments_begin_a_line_or_follow_white_space() {
        let text = "# my recipe=q8_0\n\n  # more\na=q8_0 # b=q4_K\nc#d=f16\t#e=f16\n#\n";
        let list = parse_override_list(text, "types.txt").unwrap();
        let seen: Vec<_> = list.iter().map(|rule| (rule.pattern.as_str(), rule.ty)).collect();
        assert_eq!(seen, [("a", TensorType::Q8_0), ("c#d", TensorType::F16)]);
        let error = parse_override_list("# a\n\nb=zz # c\n", "types.txt").unwrap_err().to_string();
        assert!(error.starts_with("types.txt, line 3:"), "{error}");
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
        assert_eq!(rule.matches(&format!("{}b", "a".repeat(60))), Ok(true));
        let rule = TypeOverride::parse("^(a+)+$=q8_0", "--tensor-type").unwrap();
        assert_eq!(rule.matches(&format!("{}b", "a".repeat(50_000))), Ok(false));
    }
}
