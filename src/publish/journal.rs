//! What a run keeps in `OUT/.lwq-publish`: a journal with the result of each finished step, and files that later steps need.
//!
//! A result has a name made of all that it depends on, so a run with other settings takes over what they do not touch and
//! does the rest again. The journal is written whole after each result.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::PublishError;
use crate::atomic_file::AtomicFile;

/// The version of the journal.
const VERSION: u32 = 1;

/// Larger journals are not read: those of a hundred files have some megabytes.
const MAX_BYTES: u64 = 256 << 20;

/// The folder of unfinished work in an output folder.
const FOLDER: &str = ".lwq-publish";

const JOURNAL: &str = "journal.json";
const LOCK: &str = "lock";
const FILES: &str = "files";

/// Digits of a digest in the name of a result or a file.
const DIGITS: usize = 24;

/// The journal's text.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Journal {
    pub lwq_publish: u32,
    pub lwq_version: String,
    /// Name of the source, for people.
    pub source: String,
    /// Tells sources apart.
    pub source_sha256: String,
    /// What the run does, in order.
    pub steps: Vec<StepState>,
    /// Results by name.
    pub results: BTreeMap<String, Value>,
    /// Files that lie in the output folder, by name.
    pub published: BTreeMap<String, PublishedFile>,
    /// True when all of the repository is there.
    pub finished: bool,
}

/// How far a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Not begun, or interrupted.
    Todo,
    /// Begun; after an interruption it goes on where it was.
    Begun,
    /// Done.
    Done,
}

/// A step of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepState {
    /// Its name.
    pub step: String,
    /// What it does.
    pub what: String,
    /// How far it is.
    pub state: Progress,
    /// Seconds that it has taken, over all runs.
    pub seconds: f64,
}

/// A file of the repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PublishedFile {
    /// Name of the result that it is.
    pub key: String,
    pub bytes: u64,
    pub sha256: String,
}

/// The folder of a run.
#[derive(Debug)]
pub(super) struct Work {
    output: PathBuf,
    pub journal: Journal,
    /// Results that this run has asked for.
    used: BTreeSet<String>,
    /// Held while the run lives.
    _lock: File,
}

/// The name of a result that depends on `parts`.
pub(super) fn key(kind: &str, parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(format!("{}:", part.len()));
        hash.update(part.as_bytes());
    }
    let digest = format!("{:x}", hash.finalize());
    format!("{kind}-{}", &digest[..DIGITS])
}

/// The folder of unfinished work in `output`.
pub(super) fn work_folder(output: &Path) -> PathBuf {
    output.join(FOLDER)
}

/// Reads the journal of an output folder; `None` if it has none.
///
/// # Errors
/// When it cannot be read or is no journal.
pub(super) fn read(output: &Path) -> Result<Option<Journal>, PublishError> {
    let path = work_folder(output).join(JOURNAL);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(PublishError::io(&path, "cannot read it")(source)),
    };
    let mut text = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(PublishError::io(&path, "cannot read it"))?;
    let bad = |problem: String| PublishError::file(&path, format!("{problem}; delete it to start over"));
    if text.len() as u64 > MAX_BYTES {
        return Err(bad(format!("is larger than {MAX_BYTES} bytes, no journal of lwq publish")));
    }
    let journal: Journal =
        serde_json::from_slice(&text).map_err(|error| bad(format!("is no journal of lwq publish: {error}")))?;
    if journal.lwq_publish != VERSION {
        return Err(bad(format!("has version {}, expected {VERSION}", journal.lwq_publish)));
    }
    Ok(Some(journal))
}

impl Work {
    /// Makes the folder, or takes over that of an earlier run; `fresh` forgets what that has done.
    ///
    /// # Errors
    /// When another run is at work, the journal is another source's, or the disk refuses.
    pub(super) fn open(output: &Path, source: &str, sha256: &str, fresh: bool) -> Result<Work, PublishError> {
        let folder = work_folder(output);
        fs::create_dir_all(folder.join(FILES)).map_err(PublishError::io(&folder, "cannot make the folder"))?;
        let lock_path = folder.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(PublishError::io(&lock_path, "cannot make it"))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(PublishError::file(output, "another lwq publish is at work here; wait for it"));
        }
        let found = match read(output) {
            Err(_) if fresh => None,
            other => other?,
        };
        let mut journal = match found {
            Some(found) if found.source_sha256 == sha256 => found,
            Some(found) if !fresh => {
                let problem = format!(
                    "was published from another model ({}); choose another folder, or add --force to replace it",
                    crate::display::printable(&found.source)
                );
                return Err(PublishError::file(output, problem));
            }
            // What lies there under the names of this run is replaced.
            Some(found) => Journal { published: found.published, ..Journal::default() },
            None => Journal::default(),
        };
        journal.lwq_publish = VERSION;
        journal.lwq_version = env!("CARGO_PKG_VERSION").to_owned();
        (journal.source, journal.source_sha256) = (source.to_owned(), sha256.to_owned());
        Ok(Work { output: output.to_owned(), journal, used: BTreeSet::new(), _lock: lock })
    }

    /// The repository.
    pub(super) fn output(&self) -> &Path {
        &self.output
    }

    /// A path in the folder of unfinished work.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        work_folder(&self.output).join(name)
    }

    /// Where a file lies while it is not published.
    pub(super) fn file(&self, key: &str, extension: &str) -> PathBuf {
        self.path(FILES).join(format!("{key}.{extension}"))
    }

    /// The file that is the result `key`: the unpublished one, or else the published one.
    pub(super) fn find(&self, key: &str, extension: &str) -> Option<PathBuf> {
        let unpublished = self.file(key, extension);
        if unpublished.is_file() {
            return Some(unpublished);
        }
        let found = self.journal.published.iter().find(|(_, file)| file.key == key)?;
        let path = self.output.join(found.0);
        let same = fs::metadata(&path).is_ok_and(|there| there.is_file() && there.len() == found.1.bytes);
        same.then_some(path)
    }

    /// A result that is known.
    pub(super) fn get<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let value = self.journal.results.get(key)?;
        let found = serde_json::from_value(value.clone()).ok()?;
        self.used.insert(key.to_owned());
        Some(found)
    }

    /// Keeps a result, and gives it back as the next run will read it.
    pub(super) fn put<T: Serialize + DeserializeOwned>(&mut self, key: &str, result: &T) -> Result<T, PublishError> {
        let path = self.path(JOURNAL);
        let odd = |error: serde_json::Error| PublishError::file(&path, format!("cannot hold a result: {error}"));
        let text = serde_json::to_string(result).map_err(odd)?;
        self.journal.results.insert(key.to_owned(), serde_json::from_str(&text).map_err(odd)?);
        self.used.insert(key.to_owned());
        self.save()?;
        serde_json::from_str(&text).map_err(odd)
    }

    /// Forgets results that this run has not asked for.
    pub(super) fn keep_used(&mut self) {
        let used = &self.used;
        self.journal.results.retain(|key, _| used.contains(key));
    }

    /// Writes the journal.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn save(&self) -> Result<(), PublishError> {
        let path = self.path(JOURNAL);
        let text = serde_json::to_string(&self.journal).unwrap_or_default();
        let mut file = AtomicFile::create(&path, true)?;
        file.write_all(text.as_bytes()).map_err(PublishError::io(&path, "cannot write it"))?;
        Ok(file.commit()?)
    }

    /// Removes an unpublished file with what an unfinished run left beside it.
    pub(super) fn remove(&self, key: &str, extension: &str) -> Result<(), PublishError> {
        remove(&self.file(key, extension))
    }

    /// Removes everything but the journal.
    ///
    /// # Errors
    /// When the disk refuses.
    pub(super) fn remove_temporary(&self) -> Result<(), PublishError> {
        let folder = work_folder(&self.output);
        let failed = PublishError::io(&folder, "cannot remove unfinished work");
        for entry in fs::read_dir(&folder).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            if entry.file_name() != JOURNAL && entry.file_name() != LOCK {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a file or a folder that may be there.
///
/// # Errors
/// When the disk refuses.
pub(super) fn remove(path: &Path) -> Result<(), PublishError> {
    let result = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match result {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(PublishError::io(path, "cannot remove it")(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_known_to_the_next_run_of_the_same_source() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        fs::create_dir(&output).unwrap();
        let mut work = Work::open(&output, "m.gguf", "abc", false).unwrap();
        let name = key("sum", &["a", "bc"]);
        assert_ne!(name, key("sum", &["ab", "c"]));
        assert_eq!(work.get::<f64>(&name), None);
        assert_eq!(work.put(&name, &0.1).unwrap(), 0.1);
        assert!(Work::open(&output, "m.gguf", "abc", false).unwrap_err().to_string().contains("at work"));
        drop(work);
        let mut work = Work::open(&output, "m.gguf", "abc", false).unwrap();
        assert_eq!(work.get::<f64>(&name), Some(0.1));
        work.put("other", &1).unwrap();
        drop(work);
        let refused = Work::open(&output, "n.gguf", "abd", false).unwrap_err().to_string();
        assert!(refused.contains("m.gguf") && refused.contains("--force"), "{refused}");
        let mut work = Work::open(&output, "n.gguf", "abd", true).unwrap();
        assert_eq!(work.get::<f64>(&name), None);
    }

    #[test]
    fn what_no_run_has_asked_for_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut work = Work::open(folder.path(), "m", "abc", false).unwrap();
        work.put("old", &1).unwrap();
        drop(work);
        let mut work = Work::open(folder.path(), "m", "abc", false).unwrap();
        work.put("new", &2).unwrap();
        work.keep_used();
        assert_eq!(work.journal.results.keys().collect::<Vec<_>>(), ["new"]);
    }

    #[test]
    fn a_damaged_journal_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(work_folder(folder.path())).unwrap();
        for text in ["", "[]", "{\"lwq_publish\": 1}"] {
            fs::write(work_folder(folder.path()).join(JOURNAL), text).unwrap();
            let line = read(folder.path()).unwrap_err().to_string();
            assert!(line.contains("journal.json") && line.contains("delete it") && !line.contains('\n'), "{line}");
        }
    }
}
