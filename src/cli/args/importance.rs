//! The importance matrix: given, or found beside the model.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::cli::{Common, printable};
use lwq::imatrix::{self, Imatrix, Named};

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
