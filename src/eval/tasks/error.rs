//! What can be wrong with tasks.

use std::io;

use crate::model::ModelError;

/// Why tasks could not be read or scored. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The operating system refused to open or read the file.
    #[error("{file}: cannot read the tasks: {source}")]
    Read {
        /// Path as the caller gave it.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The file as a whole is no task file.
    #[error("{file}: {problem}")]
    File {
        /// Path as the caller gave it.
        file: String,
        /// What was found and what is expected.
        problem: String,
    },
    /// A line is not what its place demands.
    #[error("{file}: line {line}: {problem}")]
    Line {
        /// Path as the caller gave it.
        file: String,
        /// Number of the line, from 1.
        line: usize,
        /// What was found and what is expected.
        problem: String,
    },
    /// A task of a binary file is damaged.
    #[error("{file}: task {number}: {problem}")]
    Task {
        /// Path as the caller gave it.
        file: String,
        /// Number of the task, from 1.
        number: usize,
        /// What was found and what is expected.
        problem: String,
    },
    /// The base model cuts the tasks into other tokens: figures of the two could not be compared task by task.
    #[error(
        "{file}: task {number}: the base model's vocabulary cuts it into other tokens; give a base of the same vocabulary"
    )]
    VocabularyDiffers {
        /// Task file.
        file: String,
        /// Number of the task, from 1.
        number: usize,
    },
    /// The forward pass failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
