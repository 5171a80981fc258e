//! The output folder under construction: it appears under its name when it is whole, and an interrupted run leaves what the
//! same command goes on with.
//!
//! `OUT.partial` beside the output holds `files`, which becomes the output by one rename, and a journal: a first line that
//! says what the work belongs to, then a line for each finished item with the digest of its bytes. `work` is for whatever else
//! an unfinished run keeps.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::ExportError;
use super::files::failed;
use crate::atomic_file::{OutputError, Replace, folder_of};
use crate::quantize::feedback::Outcome;
use crate::unfinished::partial_path;

const KIND: &str = "lwq export";
const JOURNAL: &str = "journal";
const FILES: &str = "files";
const WORK: &str = "work";

/// What unfinished work depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    kind: String,
    source: String,
    settings: String,
}

impl Origin {
    pub(crate) fn new(source: String, settings: String) -> Origin {
        Origin { kind: KIND.to_owned(), source, settings }
    }
}

/// A folder that is being written.
#[derive(Debug)]
pub(crate) struct NewFolder {
    output: PathBuf,
    partial: PathBuf,
    replace: Replace,
    journal: Mutex<File>,
    /// Items that an earlier run has finished.
    pub(crate) done: HashMap<usize, Done>,
}

/// What the journal says of an item.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Done {
    /// Of its bytes.
    pub(crate) digest: String,
    /// What became of a matrix.
    pub(crate) outcome: Option<Outcome>,
}

/// Checks that `output` may become a folder of a model made from `source`, without writing anything.
///
/// # Errors
/// If it exists and may not be replaced, is something else than a model folder, or lies in the source.
pub(crate) fn check_output(output: &Path, source: &Path, replace: Replace) -> Result<(), ExportError> {
    let folder = folder_of(output);
    if !folder.is_dir() {
        let (path, folder) = (output.to_path_buf(), folder.to_path_buf());
        return Err(OutputError::NoFolder { path, folder }.into());
    }
    let wrong = |problem: &str| ExportError::Folder { path: output.to_path_buf(), problem: problem.to_owned() };
    if output.file_name().is_none() {
        return Err(wrong("has no name of its own; give the name of a folder to make"));
    }
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let (inside, source) = (resolved(folder), resolved(source));
    let here = if output.exists() { resolved(output) } else { inside.join(output.file_name().unwrap_or_default()) };
    if here.starts_with(&source) || source.starts_with(&here) {
        return Err(wrong("is the source folder, lies in it or holds it; choose another output"));
    }
    match fs::symlink_metadata(output) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed(output, "cannot look at it", source)),
        Ok(found) if !found.is_dir() => Err(wrong("is no folder; choose another output")),
        Ok(_) if !replace.is_allowed() => Err(OutputError::Exists(output.to_path_buf()).into()),
        Ok(_) => {
            let is_empty = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_none());
            let is_model = output.join("config.json").is_file();
            if is_empty || is_model {
                Ok(())
            } else {
                Err(wrong("holds no config.json, so it is no model folder, and is not replaced; choose another output"))
            }
        }
    }
}

impl NewFolder {
    /// Makes the folder, or takes over what a run of the same origin has left.
    ///
    /// # Errors
    /// If the work there is another's and may not be replaced, another run is at it, or the disk refuses.
    pub(crate) fn open(output: &Path, replace: Replace, origin: &Origin) -> Result<NewFolder, ExportError> {
        let partial = partial_path(output);
        if partial.exists() {
            match Self::take_over(output, &partial, replace, origin) {
                Ok(folder) => return Ok(folder),
                Err(ExportError::Folder { .. }) if replace.is_allowed() && partial.join(JOURNAL).exists() => {
                    fs::remove_dir_all(&partial)
                        .map_err(|source| failed(&partial, "cannot remove unfinished work", source))?;
                }
                Err(error) => return Err(error),
            }
        }
        let made = |source| failed(&partial, "cannot make the folder for unfinished work", source);
        fs::create_dir_all(partial.join(FILES)).map_err(made)?;
        let journal = partial.join(JOURNAL);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&journal).map_err(made)?;
        lock(&file, output)?;
        let line = serde_json::to_string(origin).unwrap_or_default();
        writeln!(file, "{line}").map_err(made)?;
        Ok(NewFolder {
            output: output.to_path_buf(),
            partial,
            replace,
            journal: Mutex::new(file),
            done: HashMap::new(),
        })
    }

    fn take_over(output: &Path, partial: &Path, replace: Replace, origin: &Origin) -> Result<NewFolder, ExportError> {
        let wrong = |problem: &str| ExportError::Folder {
            path: partial.to_path_buf(),
            problem: format!("{problem}; delete it or add --force to start over"),
        };
        let path = partial.join(JOURNAL);
        let Ok(mut file) = OpenOptions::new().read(true).append(true).open(&path) else {
            return Err(wrong("is no unfinished work of lwq export"));
        };
        lock(&file, output)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|source| failed(&path, "cannot read it", source))?;
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let found: Option<Origin> = lines.next().and_then(|line| serde_json::from_str(line).ok());
        match found {
            None => return Err(wrong("is no unfinished work of lwq export")),
            Some(found) if found.source != origin.source => return Err(wrong("was made of another source")),
            Some(found) if found != *origin => return Err(wrong("was made with other settings")),
            Some(_) => {}
        }
        fs::create_dir_all(partial.join(FILES)).map_err(|source| failed(partial, "cannot make the folder", source))?;
        let entry = |line: &str| {
            let mut fields = line.splitn(3, ' ');
            let (item, digest) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
            let outcome = fields.next().map(serde_json::from_str).transpose().ok()?;
            Some((item, Done { digest, outcome }))
        };
        let done = lines.filter_map(entry).collect();
        if !text.ends_with('\n') {
            // What a killed run wrote of its last line must not run into the next.
            writeln!(file).map_err(|source| failed(&path, "cannot write it", source))?;
        }
        let (output, partial) = (output.to_path_buf(), partial.to_path_buf());
        Ok(NewFolder { output, partial, replace, journal: Mutex::new(file), done })
    }

    /// Where a file of the output lies until it is whole.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.partial.join(FILES).join(name)
    }

    /// Where unfinished work lies that is no part of the output.
    pub(crate) fn work(&self) -> PathBuf {
        self.partial.join(WORK)
    }

    /// The same, made if it is not there.
    pub(crate) fn make_work(&self) -> Result<PathBuf, ExportError> {
        let work = self.work();
        fs::create_dir_all(&work).map_err(|source| failed(&work, "cannot make the folder", source))?;
        Ok(work)
    }

    /// Notes that an item is written; `digest` is that of its bytes.
    pub(crate) fn note(&self, item: usize, digest: &str, outcome: Option<&Outcome>) -> Result<(), ExportError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        // One write: a line is there or not.
        let outcome = outcome.and_then(|outcome| serde_json::to_string(outcome).ok());
        let line = match outcome {
            Some(outcome) => format!("{item} {digest} {outcome}\n"),
            None => format!("{item} {digest}\n"),
        };
        journal
            .write_all(line.as_bytes())
            .map_err(|source| failed(&self.partial.join(JOURNAL), "cannot write it", source))
    }

    /// Gives the folder its name.
    pub(crate) fn commit(self) -> Result<(), ExportError> {
        let files = self.partial.join(FILES);
        let named = |source| failed(&self.output, "cannot give the finished folder its name", source);
        if let Ok(folder) = File::open(&files) {
            let _ = folder.sync_all();
        }
        if self.output.exists() {
            if !self.replace.is_allowed() {
                return Err(OutputError::Exists(self.output.clone()).into());
            }
            exchange(&files, &self.output).map_err(named)?;
        } else {
            fs::rename(&files, &self.output).map_err(named)?;
        }
        if let Ok(folder) = File::open(folder_of(&self.output)) {
            let _ = folder.sync_all();
        }
        fs::remove_dir_all(&self.partial)
            .map_err(|source| failed(&self.partial, "cannot remove unfinished work", source))
    }
}

/// Puts `new` in the place of `old` at once where the system can, and `old` where `new` was.
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    let aside = new.with_file_name("replaced");
    fs::rename(old, &aside)?;
    fs::rename(new, old)
}

fn lock(file: &File, output: &Path) -> Result<(), ExportError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(OutputError::Busy(output.to_path_buf()).into()),
        // File systems without locks lose only the check against two runs onto one output.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(source: &str, settings: &str) -> Origin {
        Origin::new(source.into(), settings.into())
    }

    #[test]
    fn work_is_taken_over_and_that_of_others_refused() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let folder = NewFolder::open(&output, Replace::No, &origin("a", "b")).unwrap();
        folder.note(3, "abc", None).unwrap();
        let busy = NewFolder::open(&output, Replace::No, &origin("a", "b")).unwrap_err();
        assert!(busy.to_string().contains("another run is writing"), "{busy}");
        drop(folder);
        let journal = partial_path(&output).join(JOURNAL);
        let text = fs::read_to_string(&journal).unwrap();
        fs::write(&journal, format!("{text}4 ab")).unwrap();
        let folder = NewFolder::open(&output, Replace::No, &origin("a", "b")).unwrap();
        assert_eq!(folder.done.get(&3).map(|done| done.digest.as_str()), Some("abc"));
        drop(folder);
        let refused = |origin| NewFolder::open(&output, Replace::No, &origin).unwrap_err().to_string();
        assert!(refused(origin("x", "b")).contains("another source"));
        assert!(refused(origin("a", "x")).contains("other settings"));
        let fresh = NewFolder::open(&output, Replace::Yes, &origin("a", "x")).unwrap();
        assert!(fresh.done.is_empty());
        fs::write(fresh.path("config.json"), "{}").unwrap();
        fresh.commit().unwrap();
        assert!(output.join("config.json").is_file() && !partial_path(&output).exists());
    }

    #[test]
    fn only_models_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (output, source) = (dir.path().join("out"), dir.path().join("source"));
        fs::create_dir_all(&source).unwrap();
        fs::create_dir_all(output.join("inner")).unwrap();
        let problem = |output: &Path, replace| check_output(output, &source, replace).unwrap_err().to_string();
        assert!(problem(&output, Replace::No).contains("exists already"));
        assert!(problem(&output, Replace::Yes).contains("no model folder"));
        assert!(problem(&source, Replace::Yes).contains("is the source folder"));
        assert!(problem(&source.join("x"), Replace::No).contains("lies in it"));
        assert!(problem(dir.path(), Replace::Yes).contains("holds it"));
        fs::write(output.join("config.json"), "{}").unwrap();
        check_output(&output, &source, Replace::Yes).unwrap();
        let folder = NewFolder::open(&output, Replace::Yes, &origin("a", "b")).unwrap();
        fs::write(folder.path("new"), "").unwrap();
        folder.commit().unwrap();
        assert!(output.join("new").exists() && !output.join("inner").exists());
    }
}
