//! `lwq edit`: metadata of a GGUF changed by hand.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, ensure};
use clap::{ArgGroup, Args};
use serde::Serialize;

use super::args::parse_pair;
use super::output_name::wrong_extension;
use super::{Common, printable};
use lwq::files::{CHAT_TEMPLATE, Change, Edit};
use lwq::gguf::{Gguf, Value};
use lwq::text::read_text;

/// The form of `--set`, for messages.
const FORM: &str = "--set takes KEY=TYPE:VALUE with TYPE int, float, bool, str, or an exact one: u8, i8, u16, i16, u32, i32, \
                    u64, i64, f32, f64";

/// Change metadata of a GGUF: set, remove and rename keys, put in a chat template
///
/// Removals come first, then renamings, then values. Values of type int, float, bool and str are stored in the type that readers of
/// the key expect or that it has in the file. Tensors stay as they are; keys about the layout (general.alignment, split.*) cannot
/// be changed.
#[derive(Args, Debug)]
#[command(
    group(ArgGroup::new("changes").args(["set", "remove", "rename", "chat_template"]).multiple(true).required(true)),
    group(ArgGroup::new("place").args(["output", "in_place", "dry_run"]).multiple(true).required(true)),
    after_help = "Examples:\n  lwq edit model.gguf -o fixed.gguf --chat-template template.jinja --remove general.url\n  lwq edit model.gguf --in-place --set tokenizer.ggml.eos_token_id=int:107\n  lwq edit model.gguf --dry-run --rename general.title=general.name --set general.author=str:me"
)]
pub struct EditArgs {
    /// Model to read: a GGUF file, or with --in-place also the first file of a split one
    #[arg(value_name = "MODEL")]
    input: PathBuf,
    /// File to write; may be MODEL itself, with --force
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Change the file itself, without copying its tensors; refused where the header would need more or less space
    #[arg(long, conflicts_with = "output")]
    in_place: bool,
    /// Set a key; may be given more than once
    #[arg(long, value_name = "KEY=TYPE:VALUE", value_parser = parse_setting)]
    set: Vec<Setting>,
    /// Remove a key; may be given more than once
    #[arg(long, value_name = "KEY", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    remove: Vec<String>,
    /// Rename a key; may be given more than once
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_renaming)]
    rename: Vec<(String, String)>,
    /// Take tokenizer.chat_template from a file
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Show what would change, without writing
    #[arg(long)]
    dry_run: bool,
}

/// A key and its new value.
#[derive(Debug, Clone)]
struct Setting {
    key: String,
    value: Value,
    /// The type was named.
    is_exact: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct EditReport<'a> {
    source: String,
    output: Option<String>,
    in_place: bool,
    written: bool,
    changes: &'a [Change],
    notes: &'a [String],
}

fn parse_setting(text: &str) -> Result<Setting, String> {
    let exact = text.split_once('=').and_then(|(key, rest)| {
        let (kind, value) = rest.split_once(':')?;
        Some((key, parse_exact(kind, value)?))
    });
    match exact {
        Some((key, value)) if !key.is_empty() => {
            let value = value.ok_or_else(|| format!("the value is none of its type; {FORM}"))?;
            Ok(Setting { key: key.to_owned(), value, is_exact: true })
        }
        _ => {
            let (key, value) = parse_pair(text, FORM).map_err(|error| error.to_string())?;
            Ok(Setting { key, value, is_exact: false })
        }
    }
}

/// A value of a type that GGUF names; the outer `None` for other names, the inner one for what is no such value.
fn parse_exact(kind: &str, text: &str) -> Option<Option<Value>> {
    fn number<T: FromStr + Into<Value>>(text: &str) -> Option<Value> {
        text.parse::<T>().ok().map(Into::into)
    }
    Some(match kind {
        "u8" => number::<u8>(text),
        "i8" => number::<i8>(text),
        "u16" => number::<u16>(text),
        "i16" => number::<i16>(text),
        "u32" => number::<u32>(text),
        "i32" => number::<i32>(text),
        "u64" => number::<u64>(text),
        "i64" => number::<i64>(text),
        "f32" => text.parse().ok().filter(|number: &f32| number.is_finite()).map(Value::F32),
        "f64" => text.parse().ok().filter(|number: &f64| number.is_finite()).map(Value::F64),
        _ => return None,
    })
}

fn parse_renaming(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.to_owned(), to.to_owned())),
        _ => Err("give OLD=NEW, such as general.title=general.name".to_owned()),
    }
}

impl EditArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model or the template cannot be read, a change is refused, or the file cannot be written.
    pub fn run(&self, common: &Common) -> Result<()> {
        let edit = self.edit(common)?;
        let gguf = Gguf::open(&self.input)?;
        let source = gguf.label().to_owned();
        let edited = edit.apply(gguf)?;
        edited.notes().iter().for_each(|line| common.warn(line));
        if let Some(output) = &self.output {
            wrong_extension(output, true).iter().for_each(|line| common.warn(line));
        }
        let (changes, notes) = (edited.changes().to_vec(), edited.notes().to_vec());
        match (&self.output, self.dry_run) {
            (Some(output), false) => edited.write(output, common.replace(), &common.watch())?,
            (None, true) if self.in_place => edited.check_in_place()?,
            (_, true) => {}
            (None, false) => edited.write_in_place()?,
        }
        let report = EditReport {
            source,
            output: self.output.as_ref().map(|path| path.display().to_string()),
            in_place: self.in_place,
            written: !self.dry_run,
            changes: &changes,
            notes: &notes,
        };
        if common.json {
            return common.result_json(&report);
        }
        if common.quiet && !self.dry_run { Ok(()) } else { common.result(text(&changes)) }
    }

    /// What the flags ask for.
    fn edit(&self, common: &Common) -> Result<Edit> {
        let mut edit = self.remove.iter().fold(Edit::new(), |edit, key| edit.remove(key));
        edit = self.rename.iter().fold(edit, |edit, (from, to)| edit.rename(from, to));
        for setting in &self.set {
            edit = match setting.is_exact {
                true => edit.set_exact(&setting.key, setting.value.clone()),
                false => edit.set(&setting.key, setting.value.clone()),
            };
        }
        if let Some(path) = &self.chat_template {
            let template = read_text(path, &common.watch())?;
            let shown = printable(&path.display().to_string());
            ensure!(!template.is_empty(), "{shown}: is empty; --remove {CHAT_TEMPLATE} takes the template out");
            edit = edit.set_exact(CHAT_TEMPLATE, Value::String(template.into()));
        }
        Ok(edit)
    }
}

fn text(changes: &[Change]) -> String {
    let mut text = String::new();
    for change in changes {
        let key = printable(&change.key);
        let _ = match (&change.renamed, &change.before, &change.after) {
            (Some(to), _, _) => writeln!(text, "{key} is now {}", printable(to)),
            (None, Some(before), Some(after)) => writeln!(text, "{key}: {before} -> {after}"),
            (None, Some(before), None) => writeln!(text, "{key}: {before} removed"),
            (None, None, after) => writeln!(text, "{key}: {} added", after.as_deref().unwrap_or_default()),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_a_type_to_fit_or_an_exact_one() {
        let parsed = |text: &str| parse_setting(text).map(|setting| (setting.key, setting.value, setting.is_exact));
        assert_eq!(parsed("a.b=int:-3"), Ok(("a.b".into(), Value::I64(-3), false)));
        assert_eq!(parsed("a=u8:255"), Ok(("a".into(), Value::U8(255), true)));
        assert_eq!(parsed("a=f64:0.5"), Ok(("a".into(), Value::F64(0.5), true)));
        assert_eq!(parsed("a=str:u8:x=y"), Ok(("a".into(), Value::from("u8:x=y"), false)));
        for text in ["a", "a=5", "=u8:1", "a=u8:256", "a=f32:inf", "a=u32:-1", "a=u7:1", "a=int:x"] {
            let message = parsed(text).unwrap_err();
            assert!(message.contains("--set takes KEY=TYPE:VALUE") || message.contains(text), "{message}");
        }
        assert!(parse_renaming("a=b").is_ok() && parse_renaming("=b").is_err() && parse_renaming("a").is_err());
    }
}
