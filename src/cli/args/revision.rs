//! Models by their name on the Hugging Face hub.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::cli::{Common, Usage, printable};
use lwq::hub::{HubError, find_model};

/// Which snapshot in the cache is meant.
#[derive(Args, Debug, Clone, Default)]
pub struct RevisionArg {
    /// Branch, tag or commit of a model that is named ORG/NAME and read from the Hugging Face cache [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

impl RevisionArg {
    /// The path that is meant: one that exists, or the snapshot in the cache.
    ///
    /// # Errors
    /// When only the hub can have the model and the cache does not.
    pub fn find(&self, given: &Path, common: &Common) -> anyhow::Result<PathBuf> {
        let found = find_model(given, self.revision.as_deref()).map_err(|error| match error {
            HubError::RevisionOfPath { .. } | HubError::BadRevision { .. } => Usage(error.to_string()).into(),
            other => anyhow::Error::from(other),
        })?;
        if found != given {
            common.note(format!("reading {}", printable(&found.display().to_string())));
        }
        Ok(found)
    }
}
