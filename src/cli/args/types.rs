//! Types given by hand: flags that `quantize` and `plan` share.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use lwq::gguf::TensorType;
use lwq::recipe::{Target, TypeOverride, parse_override_list, parse_storable_type};

/// Flags that give tensors types.
#[derive(Args, Debug, Clone, Default)]
pub struct TypeArgs {
    /// Type of output.weight, and of the token embedding where that is the output
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    pub output_tensor_type: Option<TensorType>,
    /// Type of token_embd.weight and per_layer_token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    pub token_embedding_type: Option<TensorType>,
    /// Type of the tensors whose name matches the pattern; repeatable, the first match wins
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<String>,
    /// File with REGEX=TYPE patterns, separated by white space; # begins a comment
    #[arg(long, value_name = "FILE")]
    tensor_type_file: Option<PathBuf>,
}

impl TypeArgs {
    /// The patterns, those of the command line first.
    ///
    /// # Errors
    /// When a pattern or the file is wrong.
    pub fn patterns(&self) -> Result<Vec<TypeOverride>> {
        let mut patterns = Vec::new();
        for text in &self.tensor_type {
            patterns.push(TypeOverride::parse(text, "--tensor-type")?);
        }
        if let Some(path) = &self.tensor_type_file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            patterns.extend(parse_override_list(&text, &path.display().to_string())?);
        }
        Ok(patterns)
    }
}

/// A tensor type by its name.
pub fn parse_type(text: &str) -> Result<TensorType, String> {
    parse_storable_type(text, "tensor type").map_err(|e| e.to_string())
}

/// A target by its name.
pub fn parse_target(text: &str) -> Result<Target, String> {
    Target::parse(text).map_err(|e| e.to_string())
}
