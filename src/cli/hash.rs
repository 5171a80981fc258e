//! `lwq hash`: digests of what GGUF files hold.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{Common, printable};
use lwq::files::{ModelDigest, TensorDigest, digest};
use lwq::gguf::Gguf;

/// Print a digest of what a GGUF holds, whatever its layout
///
/// Files with the same keys and the same tensors have the same digest: the order of both does not count, nor padding,
/// alignment, the version and byte order of the file, or in how many parts it is.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq hash model.gguf model-00001-of-00003.gguf\n  lwq hash model.gguf --no-metadata\n  lwq hash model.gguf --tensors --json"
)]
pub struct HashArgs {
    /// Models: GGUF files, or the first files of split ones
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// Print a line for each tensor instead: digest of its data, type, shape, name
    #[arg(long)]
    tensors: bool,
    /// Leave metadata out of the digest
    #[arg(long)]
    no_metadata: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct HashReport {
    models: Vec<HashRow>,
}

#[derive(Serialize)]
struct HashRow {
    file: String,
    sha256: String,
    metadata: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<TensorDigest>>,
}

impl HashArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model cannot be read.
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut report = HashReport { models: Vec::new() };
        for path in &self.models {
            let gguf = Gguf::open(path)?;
            let found = digest(&gguf, !self.no_metadata, &common.watch())?;
            match common.json {
                true => report.models.push(HashRow {
                    file: gguf.label().to_owned(),
                    sha256: found.sha256,
                    metadata: found.metadata,
                    tensors: self.tensors.then_some(found.tensors),
                }),
                false => common.result(self.text(gguf.label(), &found))?,
            }
        }
        if common.json { common.result_json(&report) } else { Ok(()) }
    }

    fn text(&self, file: &str, found: &ModelDigest) -> String {
        let file = printable(file);
        if !self.tensors {
            return format!("{}  {file}\n", found.sha256);
        }
        let mut text = String::new();
        if self.models.len() > 1 {
            let _ = writeln!(text, "{file}:");
        }
        for tensor in &found.tensors {
            let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
            let (sha256, ty, name) = (&tensor.sha256, &tensor.ty, printable(&tensor.name));
            let _ = writeln!(text, "{sha256}  {ty:<8} {:>16}  {name}", shape.join("x"));
        }
        text
    }
}
