//! What an output folder holds and how far its run is.

use std::path::Path;

use serde::Serialize;

use super::PublishError;
use super::finish::bytes_below;
use super::journal::{self, Progress, StepState, work_folder};
use super::repository::SUMS;

/// The state of an output folder: what `lwq publish --list` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The folder.
    pub output: String,
    /// The source's name.
    pub source: String,
    /// True when all of the repository is there.
    pub finished: bool,
    /// Steps in their order.
    pub steps: Vec<StepState>,
    /// Steps that are done.
    pub steps_done: usize,
    /// Files of the repository.
    pub files: Vec<StatusFile>,
    /// Bytes of unfinished work.
    pub unfinished_bytes: u64,
}

/// A file of a repository.
#[derive(Clone, Debug, Serialize)]
pub struct StatusFile {
    /// Its name.
    pub file: String,
    /// Its bytes.
    pub size_bytes: u64,
    /// SHA-256 of its bytes when it was written.
    pub sha256: String,
    /// False if it is gone or has another size now.
    pub is_there: bool,
}

impl Status {
    /// Looks at a folder.
    ///
    /// # Errors
    /// When nothing was published there, or the journal is damaged.
    pub fn read(output: &Path) -> Result<Status, PublishError> {
        let found = journal::read(output)?
            .ok_or_else(|| PublishError::file(output, "holds no journal of lwq publish; name its output folder"))?;
        let file = |(name, file): (&String, &journal::PublishedFile)| StatusFile {
            file: name.clone(),
            size_bytes: file.bytes,
            sha256: file.sha256.clone(),
            is_there: std::fs::metadata(output.join(name)).is_ok_and(|there| there.len() == file.bytes),
        };
        let files: Vec<StatusFile> = found.published.iter().filter(|(name, _)| *name != SUMS).map(file).collect();
        Ok(Status {
            output: output.display().to_string(),
            source: found.source,
            finished: found.finished,
            steps_done: found.steps.iter().filter(|step| step.state == Progress::Done).count(),
            steps: found.steps,
            files,
            unfinished_bytes: if found.finished { 0 } else { bytes_below(&work_folder(output)) },
        })
    }
}
