//! The importance matrix: given, or found beside the model.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::cli::{Common, printable};
use lwq::imatrix::{self, Imatrix, Named};
use lwq::quant;
use lwq::quantize::MissingImportance;
use lwq::recipe::{Target, parse_storable_type, requires_imatrix};

/// Flags that name an importance matrix.
#[derive(Args, Debug, Clone, Default)]
pub struct ImportanceArgs {
    /// Importance matrix, GGUF or .dat [default: the model's name with .imatrix.gguf, if that is there]
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Leave an importance matrix beside the model aside
    #[arg(long, conflicts_with = "imatrix")]
    no_imatrix: bool,
}

/// An importance matrix that was opened.
pub struct Opened {
    path: String,
    imatrix: Imatrix,
}

impl Opened {
    /// As requests take it.
    pub fn named(&self) -> Named<'_> {
        Named { name: &self.path, imatrix: &self.imatrix }
    }

    /// The matrix alone.
    pub fn matrix(&self) -> &Imatrix {
        &self.imatrix
    }
}

impl ImportanceArgs {
    /// The file that was named.
    pub fn path(&self) -> Option<&Path> {
        self.imatrix.as_deref()
    }

    /// Opens the file that was named, or the one beside `model` where `wanted` says that it serves; says so then.
    ///
    /// # Errors
    /// When the file is not usable.
    pub fn open(&self, model: &Path, wanted: bool, common: &Common) -> Result<Option<Opened>> {
        let beside = imatrix::default_path(model);
        let path = match &self.imatrix {
            Some(path) => path,
            None if wanted && !self.no_imatrix && beside.exists() => {
                let shown = printable(&beside.display().to_string());
                common.note(format!("importance from {shown}; --no-imatrix leaves it aside"));
                &beside
            }
            None => return Ok(None),
        };
        Ok(Some(Opened { path: path.display().to_string(), imatrix: Imatrix::open(path)? }))
    }
}

/// What `--missing-importance` says.
pub fn parse_missing(text: &str) -> Result<MissingImportance, String> {
    match text.to_ascii_lowercase().as_str() {
        "refuse" => return Ok(MissingImportance::Refuse),
        "plain" => return Ok(MissingImportance::Plain),
        _ => {}
    }
    let ty = parse_storable_type(text, "refuse, plain or a tensor type").map_err(|error| error.to_string())?;
    let needs_data = quant::codec(ty).is_some_and(quant::Codec::needs_importance);
    // Any ordinary matrix stands for the ones in question.
    if needs_data || requires_imatrix("blk.0.ffn_up.weight", ty, Target::Q2_K) {
        return Err(format!("{ty} needs importance data itself; give a type that does without, such as q4_K"));
    }
    if quant::codec(ty).is_none_or(|codec| codec.quantize.is_none()) {
        return Err(format!("{ty} cannot be written; give another type, such as q4_K"));
    }
    Ok(MissingImportance::Type(ty))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lwq::gguf::TensorType;

    #[test]
    fn missing_importance_is_a_word_or_a_type_that_needs_no_data() {
        assert_eq!(parse_missing("Refuse"), Ok(MissingImportance::Refuse));
        assert_eq!(parse_missing("plain"), Ok(MissingImportance::Plain));
        assert_eq!(parse_missing("Q4_K"), Ok(MissingImportance::Type(TensorType::Q4_K)));
        assert!(parse_missing("iq2_xxs").unwrap_err().contains("needs importance data itself"));
        assert!(parse_missing("q9").unwrap_err().contains("q9"));
    }
}
