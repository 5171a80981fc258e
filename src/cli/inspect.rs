//! `lwq inspect`: what a GGUF file holds, from its header alone.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value as Json, json};

use super::{Common, binary_size, count, decimal_size, printable};
use lwq::gguf::{Array, Gguf, TensorInfo, TypeRow, Value, rows_by_type};

/// Array elements shown of each array.
const SHOWN_ELEMENTS: usize = 6;
/// Characters shown of each string.
const SHOWN_CHARACTERS: usize = 72;

/// Show metadata, types and sizes of a GGUF file
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// GGUF file, or the first file of a split one
    input: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

/// A table of the rows with shares of the total size.
pub(super) fn type_table(rows: &[TypeRow]) -> String {
    let total: u64 = rows.iter().map(|row| row.bytes).sum();
    let mut text = format!("{:<10} {:>8} {:>18} {:>12} {:>7}\n", "type", "tensors", "parameters", "size", "share");
    for row in rows {
        let share = 100.0 * row.bytes as f64 / total.max(1) as f64;
        let _ = writeln!(
            text,
            "{:<10} {:>8} {:>18} {:>12} {:>6.1}%",
            row.name,
            row.tensors,
            count(row.parameters),
            decimal_size(row.bytes),
            share
        );
    }
    text
}

impl InspectArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the file cannot be read as GGUF.
    pub fn run(&self, common: &Common) -> Result<()> {
        let gguf = Gguf::open(&self.input)?;
        for line in beyond_llama_cpp(&gguf) {
            common.warn(line);
        }
        if common.json { common.result_json(&self.as_json(&gguf)) } else { common.result(self.as_text(&gguf)) }
    }

    fn as_json(&self, gguf: &Gguf) -> Json {
        let totals = gguf.totals();
        let metadata: Map<String, Json> =
            gguf.metadata().iter().map(|(key, value)| (key.to_string(), value_json(value))).collect();
        let mut object = json!({
            "files": gguf.shards().iter().map(|shard| shard.label()).collect::<Vec<_>>(),
            "version": gguf.shards().first().map(|shard| shard.version()),
            "big_endian": gguf.is_big_endian(),
            "metadata": metadata,
            "tensor_count": gguf.tensors().len(),
            "parameters": totals.parameters,
            "size_bytes": gguf.file_bytes(),
            "tensor_bytes": totals.bytes,
            "bits_per_weight": totals.bits_per_weight(),
            "types": types(gguf),
        });
        if self.tensors {
            object["tensors"] = gguf.tensors().iter().map(|tensor| tensor_json(gguf, tensor)).collect();
        }
        object
    }

    fn as_text(&self, gguf: &Gguf) -> String {
        let totals = gguf.totals();
        let mut text = String::new();
        for shard in gguf.shards() {
            let order = if shard.is_big_endian() { "big-endian" } else { "little-endian" };
            let _ = writeln!(
                text,
                "{}: GGUF version {}, {order}, {}",
                printable(shard.label()),
                shard.version(),
                decimal_size(shard.file_bytes())
            );
        }
        let _ = writeln!(
            text,
            "{} tensors, {} parameters, {} ({}), {:.2} bits per weight\n",
            gguf.tensors().len(),
            count(totals.parameters),
            decimal_size(gguf.file_bytes()),
            binary_size(gguf.file_bytes()),
            totals.bits_per_weight()
        );
        for (key, value) in gguf.metadata().iter() {
            let _ = writeln!(text, "{} = {}", printable(key), value_text(value));
        }
        let _ = write!(text, "\n{}", type_table(&types(gguf)));
        if self.tensors {
            text.push('\n');
            let width = gguf.tensors().iter().map(|tensor| tensor.name.chars().count()).max().unwrap_or(0);
            for tensor in gguf.tensors() {
                let size = tensor.bytes.map_or_else(|| "unknown size".into(), decimal_size);
                let _ = writeln!(
                    text,
                    "{:<width$}  {:<8} {:>22} {size:>12}",
                    printable(&tensor.name),
                    tensor.ty,
                    tensor.shape_text()
                );
            }
        }
        text
    }
}

/// Why llama.cpp cannot read the file, a line for each kind of reason.
fn beyond_llama_cpp(gguf: &Gguf) -> Vec<String> {
    /// A file may make up as many reasons as it has tensors.
    const MOST_LINES: usize = 16;
    let mut lines: Vec<(String, String)> = Vec::new();
    for tensor in gguf.tensors() {
        let of_type = tensor.ty.foreign().map(|whose| format!("is of type {whose}"));
        let of_limit = tensor.beyond_ggml().map(|limit| format!("cannot be read by llama.cpp: {limit}"));
        for reason in of_type.into_iter().chain(of_limit) {
            if lines.len() < MOST_LINES && !lines.iter().any(|(known, _)| *known == reason) {
                lines.push((reason, tensor.shown_name()));
            }
        }
    }
    lines.into_iter().map(|(reason, name)| format!("tensor {name} {reason}")).collect()
}

fn types(gguf: &Gguf) -> Vec<TypeRow> {
    rows_by_type(gguf.tensors().iter().map(|tensor| (tensor.ty, tensor.elements(), tensor.bytes.unwrap_or(0))))
}

fn tensor_json(gguf: &Gguf, tensor: &TensorInfo) -> Json {
    json!({
        "name": tensor.name,
        "type": tensor.ty.to_string(),
        "shape": tensor.shape,
        "bytes": tensor.bytes,
        "offset": tensor.offset,
        "file": gguf.shards()[tensor.shard].label(),
    })
}

/// A value for a person: long strings and arrays are cut, control characters escaped.
fn value_text(value: &Value) -> String {
    match value {
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::String(bytes) => shortened(&String::from_utf8_lossy(bytes)),
        Value::Array(array) => array_text(array),
        integer => integer.as_integer().unwrap_or_default().to_string(),
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}... ({} characters)", printable(&text[..end]), text.chars().count()),
        None => printable(text),
    }
}

fn array_text(array: &Array) -> String {
    let shown: Vec<String> = array.iter().take(SHOWN_ELEMENTS).map(|value| value_text(&value)).collect();
    let more = if array.len() > SHOWN_ELEMENTS as u64 { ", ..." } else { "" };
    format!("[{}{more}] ({} {})", shown.join(", "), array.len(), array.elem_type())
}

/// A value for a script: strings and short arrays whole, long arrays as their type and length.
fn value_json(value: &Value) -> Json {
    const LONGEST_WHOLE_ARRAY: u64 = 256;
    match value {
        // JSON has no NaN or infinity; null says that there is no number.
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(bytes) => json!(String::from_utf8_lossy(bytes)),
        Value::Array(array) if array.len() <= LONGEST_WHOLE_ARRAY => array.iter().map(|v| value_json(&v)).collect(),
        Value::Array(array) => json!({ "array_of": array.elem_type().to_string(), "length": array.len() }),
        Value::U64(v) => json!(v),
        integer => json!(integer.as_integer().unwrap_or_default() as i64),
    }
}
