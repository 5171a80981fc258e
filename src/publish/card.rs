//! The card: a template and the report.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use sha2::{Digest, Sha256};

use super::PublishError;
use super::report::Report;
use crate::display::{count, decimal_size, printable};
use crate::report::escaped;

/// The template that is used unless another is given.
pub const TEMPLATE: &str = include_str!("card.md");

/// Largest template, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// What the template is called inside.
const NAME: &str = "card";

/// A template that was read.
#[derive(Clone, Debug)]
pub(super) struct Card {
    /// For messages.
    file: String,
    text: String,
}

impl Card {
    /// The built-in template, or one that is read and parsed.
    ///
    /// # Errors
    /// When it cannot be read, is no text, or is no template.
    pub(super) fn open(path: Option<&Path>) -> Result<Card, PublishError> {
        let Some(path) = path else { return Ok(Card { file: "the template".to_owned(), text: TEMPLATE.to_owned() }) };
        let found = std::fs::metadata(path)
            .map_err(PublishError::io(path, "cannot read the template; give a file that is there"))?;
        if found.len() > MAX_BYTES {
            return Err(PublishError::file(path, format!("is larger than {MAX_BYTES} bytes, no template of a card")));
        }
        let bytes = std::fs::read(path)
            .map_err(PublishError::io(path, "cannot read the template; give a file that is there"))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            PublishError::file(
                path,
                format!("is not UTF-8 at byte {}; save it as UTF-8", error.utf8_error().valid_up_to()),
            )
        })?;
        let card = Card { file: printable(&path.display().to_string()), text };
        card.environment().map(|_| ())?;
        Ok(card)
    }

    /// Tells templates apart.
    pub(super) fn sha256(&self) -> String {
        format!("{:x}", Sha256::digest(&self.text))
    }

    fn environment(&self) -> Result<Environment<'_>, PublishError> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|error| self.wrong(&error))?);
        environment.add_filter("size", |bytes: u64| decimal_size(bytes));
        environment.add_filter("count", |number: u64| count(number));
        environment.add_filter("fixed", fixed);
        environment.add_filter("percent", percent);
        environment.add_filter("cell", |value: Value| escaped(&value.to_string()));
        environment.add_filter("link", |value: Value| link(&value.to_string()));
        environment.add_filter("yaml", |value: Value| yaml(&value.to_string()));
        environment.add_template(NAME, &self.text).map_err(|error| self.wrong(&error))?;
        Ok(environment)
    }

    /// The card's text.
    ///
    /// # Errors
    /// When the template asks for what is not there.
    pub(super) fn render(&self, report: &Report) -> Result<String, PublishError> {
        let environment = self.environment()?;
        let values = Value::from(Serde(report));
        let front = Value::from(Serde(&report.front_matter));
        let template = environment.get_template(NAME).map_err(|error| self.wrong(&error))?;
        let text =
            template.render(context! { report => values, front => front }).map_err(|error| self.wrong(&error))?;
        Ok(joined_blank_lines(&text))
    }

    fn wrong(&self, error: &Error) -> PublishError {
        let place = error.line().map_or_else(String::new, |line| format!("line {line}: "));
        let detail =
            error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
        PublishError::Template { file: self.file.clone(), problem: printable(&format!("{place}{detail}")) }
    }
}

/// A figure with so many digits behind the point; `–` for none.
fn fixed(value: Value, digits: Option<usize>) -> Result<String, Error> {
    let digits = digits.unwrap_or(2).min(12);
    number(&value).map(|number| number.map_or_else(|| "–".to_owned(), |number| format!("{number:.digits$}")))
}

/// A share of 1 in percent.
fn percent(value: Value, digits: Option<usize>) -> Result<String, Error> {
    let digits = digits.unwrap_or(2).min(12);
    number(&value)
        .map(|number| number.map_or_else(|| "–".to_owned(), |number| format!("{:.digits$} %", 100.0 * number)))
}

fn number(value: &Value) -> Result<Option<f64>, Error> {
    if value.is_none() {
        return Ok(None);
    }
    f64::try_from(value.clone()).map(Some).map_err(|_| Error::new(ErrorKind::InvalidOperation, "no number"))
}

/// A file's name as the target of a link.
fn link(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

/// A word as YAML has it: plain where nobody takes it for anything else, else in double quotes, as JSON.
fn yaml(word: &str) -> String {
    let starts = word.chars().next().is_some_and(|c| c.is_ascii_alphabetic());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '+');
    let reserved = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let taken = reserved.iter().any(|other| other.eq_ignore_ascii_case(word));
    match starts && word.chars().all(plain) && !taken {
        true => word.to_owned(),
        false => serde_json::to_string(word).unwrap_or_default(),
    }
}

/// At most one blank line in a row, and one newline at the end.
fn joined_blank_lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut blank = false;
    for line in text.lines() {
        let line = line.trim_end();
        if line.is_empty() {
            blank = !out.is_empty();
            continue;
        }
        if std::mem::take(&mut blank) {
            out.push('\n');
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_template_parses() {
        Card::open(None).unwrap().environment().unwrap();
    }

    #[test]
    fn a_wrong_template_is_one_line_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("card.md");
        for text in ["a\n{% if %}", "{{ report.", "\n\n{% for x %}"] {
            std::fs::write(&path, text).unwrap();
            let line = Card::open(Some(&path)).unwrap_err().to_string();
            assert!(line.contains("card.md") && line.contains("line ") && !line.contains('\n'), "{line}");
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert!(Card::open(Some(&path)).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn words_are_quoted_where_yaml_would_take_them_for_something_else() {
        for (word, expected) in [
            ("apache-2.0", "apache-2.0"),
            ("org/name", "org/name"),
            ("no", "\"no\""),
            ("7b", "\"7b\""),
            ("a: b", "\"a: b\""),
            ("", "\"\""),
            ("zh-CN", "zh-CN"),
        ] {
            assert_eq!(yaml(word), expected);
        }
    }

    #[test]
    fn names_stay_in_their_cells() {
        assert_eq!(escaped("a|b<i>\n`x`"), "a\\|b&lt;i&gt; \\`x\\`");
        assert_eq!(link("my model.gguf"), "my%20model.gguf");
    }

    #[test]
    fn blank_lines_do_not_add_up() {
        assert_eq!(joined_blank_lines("\n\na\n\n\n b \n\n"), "a\n\n b\n");
    }
}
