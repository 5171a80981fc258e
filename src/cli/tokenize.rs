//! `lwq tokenize`: text to token ids.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::Common;
use lwq::gguf::Gguf;
use lwq::text::{read_text, read_text_from};
use lwq::tokenizer::Tokenizer;

/// Show the tokens of a text, as the model's own vocabulary cuts it
///
/// The ids are those of llama.cpp. Without TEXT and --file, the text is read from stdin.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  lwq tokenize model.gguf 'Hello world'\n  lwq tokenize model.gguf -f a.txt --ids")]
pub struct TokenizeArgs {
    /// Model whose vocabulary is used
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Text to tokenize
    #[arg(value_name = "TEXT", conflicts_with_all = ["file", "text"])]
    argument: Option<String>,
    /// Read text from FILE, - for stdin; may be given more than once, each file is tokenized on its own
    #[arg(long, short, value_name = "FILE", conflicts_with = "text")]
    file: Vec<PathBuf>,
    /// Tokenize TEXT, which may begin with a dash
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// Print only the ids, one line per text
    #[arg(long)]
    ids: bool,
    /// Leave out BOS, EOS and separators
    #[arg(long)]
    no_bos: bool,
    /// Recognize control tokens such as <|im_start|> in the text
    #[arg(long)]
    parse_special: bool,
    /// Take files as they are, in no encoding; for comparisons of tokenizers byte by byte
    #[arg(long, hide = true, requires = "file")]
    bytes: bool,
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
}

#[derive(Serialize)]
struct TokenizeReport {
    model: String,
    pre: String,
    texts: Vec<Vec<TokenReport>>,
}

#[derive(Serialize)]
struct TokenReport {
    id: u32,
    /// Bytes that are not UTF-8 alone are replaced by U+FFFD.
    text: String,
}

impl TokenizeArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model or a text cannot be read, or the vocabulary is not usable.
    pub fn run(&self, common: &Common) -> anyhow::Result<()> {
        let gguf = Gguf::open(&self.model)?;
        let tokenizer = Tokenizer::from_gguf(gguf.metadata(), self.pre.as_deref())?;
        for warning in tokenizer.warnings() {
            common.warn(warning);
        }
        let mut report =
            TokenizeReport { model: gguf.label().to_owned(), pre: tokenizer.pre_name().to_owned(), texts: Vec::new() };
        for text in self.texts(common)? {
            let ids = tokenizer.encode(text, !self.no_bos, self.parse_special);
            if common.json {
                report.texts.push(ids.iter().map(|id| token_report(&tokenizer, *id)).collect());
            } else if self.ids {
                let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                common.result(format!("[{}]\n", ids.join(", ")))?;
            } else {
                common.result(listing(&tokenizer, &ids)?)?;
            }
        }
        if common.json { common.result_json(&report) } else { Ok(()) }
    }

    fn texts(&self, common: &Common) -> anyhow::Result<Vec<Vec<u8>>> {
        if let Some(text) = self.argument.as_ref().or(self.text.as_ref()) {
            return Ok(vec![text.as_bytes().to_vec()]);
        }
        let watch = common.watch();
        let read = |path: &Path| match path == Path::new("-") {
            true => read_text_from(io::stdin().lock(), "stdin", &watch),
            false => read_text(path, &watch),
        };
        if self.file.is_empty() {
            return Ok(vec![read(Path::new("-"))?]);
        }
        if self.bytes {
            let read =
                |path: &PathBuf| std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()));
            return self.file.iter().map(read).collect();
        }
        Ok(self.file.iter().map(|path| read(path)).collect::<Result<_, _>>()?)
    }
}

fn token_report(tokenizer: &Tokenizer, id: u32) -> TokenReport {
    TokenReport { id, text: String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned() }
}

/// One line per token: id and quoted bytes.
fn listing(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, std::fmt::Error> {
    let width = tokenizer.len().to_string().len();
    let mut out = String::new();
    for id in ids {
        writeln!(out, "{id:width$}  {}", lwq::gguf::shown(&tokenizer.token_bytes(*id)))?;
    }
    Ok(out)
}
