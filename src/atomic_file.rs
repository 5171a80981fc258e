//! Output files that appear under their final name only when they are whole.
//!
//! Data go to a locked temporary file beside the target; [`AtomicFile::commit`] syncs it and renames it. A failed
//! or interrupted run removes the temporary file; after `kill -9` the next run onto the same target does.

use std::ffi::CString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use thiserror::Error;

/// Why an output file could not be made.
#[derive(Debug, Error)]
pub enum OutputError {
    /// The target is there already and may not be replaced.
    #[error("{}: exists already; add --force to replace it or choose another name", .0.display())]
    Exists(PathBuf),
    /// The target is a directory, device, pipe or socket.
    #[error("{}: is not a regular file; give the name of a file to write", .0.display())]
    NotAFile(PathBuf),
    /// The target's folder is not there.
    #[error("{}: folder {} does not exist; create it first", .path.display(), .folder.display())]
    NoFolder {
        /// The wanted output.
        path: PathBuf,
        /// Its missing folder.
        folder: PathBuf,
    },
    /// Another process is writing the same target.
    #[error("{}: another run is writing this file; wait for it or choose another name", .0.display())]
    Busy(PathBuf),
    /// The file system refused.
    #[error("{}: {action}: {source}", .path.display())]
    Io {
        /// The wanted output.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Whether an output that exists may be replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replace {
    /// It is refused.
    #[default]
    No,
    /// It is, at once when the new one is whole.
    Yes,
}

impl Replace {
    /// True if it may.
    pub fn is_allowed(self) -> bool {
        self == Replace::Yes
    }
}

/// A file under construction; see the module's text.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    target: PathBuf,
    temporary: PathBuf,
    guard: &'static TemporaryPath,
    committed: bool,
}

impl AtomicFile {
    /// Opens a temporary file beside `target`. Leftovers of runs that were killed are removed.
    ///
    /// # Errors
    /// When `target` exists and `replace` is false, is no regular file, its folder is missing, or another
    /// process is writing it.
    pub fn create(target: &Path, replace: bool) -> Result<AtomicFile, OutputError> {
        let io_error = |action, source| OutputError::Io { path: target.to_path_buf(), action, source };
        // A link is followed, so that the file it names is replaced and not the link.
        let resolved = match std::fs::symlink_metadata(target) {
            Ok(_) => match std::fs::canonicalize(target) {
                Ok(path) => path,
                Err(source) => return Err(io_error("cannot follow the link", source)),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => target.to_path_buf(),
            Err(source) => return Err(io_error("cannot look at it", source)),
        };
        check_target(target, replace)?;
        let name = resolved.file_name().ok_or_else(|| OutputError::NotAFile(target.to_path_buf()))?;
        let folder = folder_of(&resolved);
        let prefix = format!(".{}.lwq-", name.to_string_lossy());
        remove_leftovers(folder, &prefix, target)?;

        let temporary = folder.join(format!("{prefix}{}.part", std::process::id()));
        // Before the file is there: a signal that comes right after it was made must find it.
        let guard = TemporaryPath::register(&temporary);
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(&temporary);
        let file = made.map_err(|source| {
            guard.live.store(false, Ordering::SeqCst);
            io_error("cannot create its temporary file", source)
        })?;
        let file = AtomicFile { file, target: resolved, temporary, guard, committed: false };
        match file.file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(OutputError::Busy(target.to_path_buf())),
            // File systems without locks lose only the check against two runs onto one output.
            Err(TryLockError::Error(_)) => Ok(file),
        }
    }

    /// The open temporary file, for positioned writes.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The final name.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Reserves `bytes` on the disk, so that a full disk shows before the work and not after it.
    ///
    /// # Errors
    /// When the space is not there. File systems that cannot reserve are taken as they are.
    pub fn reserve(&self, bytes: u64) -> Result<(), OutputError> {
        match crate::os::reserve(&self.file, bytes) {
            Ok(()) => Ok(()),
            Err(source) => {
                let action = "cannot reserve space on the disk";
                Err(OutputError::Io { path: self.target.clone(), action, source })
            }
        }
    }

    /// Writes everything to the disk without giving it its final name yet.
    ///
    /// # Errors
    /// When the disk reports an error.
    pub fn sync(&mut self) -> Result<(), OutputError> {
        self.file.flush().and_then(|()| self.file.sync_all()).map_err(|source| OutputError::Io {
            path: self.target.clone(),
            action: "cannot write it to the disk",
            source,
        })
    }

    /// Syncs and renames to the final name.
    ///
    /// # Errors
    /// When the disk reports an error; the target is then as it was before.
    pub fn commit(mut self) -> Result<(), OutputError> {
        self.sync()?;
        std::fs::rename(&self.temporary, &self.target).map_err(|source| OutputError::Io {
            path: self.target.clone(),
            action: "cannot give the finished file its name",
            source,
        })?;
        self.committed = true;
        self.guard.live.store(false, Ordering::SeqCst);
        // The rename itself must survive a power cut; a folder that cannot be synced is no reason to fail.
        if let Ok(folder) = File::open(folder_of(&self.target)) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            let _ = std::fs::remove_file(&self.temporary);
            self.guard.live.store(false, Ordering::SeqCst);
        }
    }
}

/// Syncs all files before the first gets its name, then names them last to first: the file that a reader opens
/// first appears when all others are there.
///
/// # Errors
/// As [`AtomicFile::commit`].
pub fn commit_all(mut files: Vec<AtomicFile>) -> Result<(), OutputError> {
    for file in &mut files {
        file.sync()?;
    }
    while let Some(file) = files.pop() {
        file.commit()?;
    }
    Ok(())
}

/// Checks that `target` may be written, without writing anything.
///
/// # Errors
/// As [`AtomicFile::create`].
pub fn check_target(target: &Path, replace: bool) -> Result<(), OutputError> {
    let folder = folder_of(target);
    if !folder.is_dir() {
        return Err(OutputError::NoFolder { path: target.to_path_buf(), folder: folder.to_path_buf() });
    }
    match std::fs::metadata(target) {
        Ok(found) if !found.is_file() => Err(OutputError::NotAFile(target.to_path_buf())),
        Ok(_) if !replace => Err(OutputError::Exists(target.to_path_buf())),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(OutputError::Io { path: target.to_path_buf(), action: "cannot look at it", source }),
    }
}

/// The folder a path lies in; `.` for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Removes temporary files of dead runs; a living run holds a lock on its own.
fn remove_leftovers(folder: &Path, prefix: &str, target: &Path) -> Result<(), OutputError> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with(prefix) && name.ends_with(".part")) {
            continue;
        }
        let Ok(file) = OpenOptions::new().write(true).open(entry.path()) else { continue };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(OutputError::Busy(target.to_path_buf())),
            _ => {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
    Ok(())
}

/// A temporary path that a signal handler can reach: nodes are leaked and only ever prepended, so the list can be
/// walked at any moment without a lock.
#[derive(Debug)]
struct TemporaryPath {
    path: CString,
    live: AtomicBool,
    next: *const TemporaryPath,
}

// SAFETY: `path` and `next` never change after the node is published; `live` is atomic.
unsafe impl Sync for TemporaryPath {}
// SAFETY: as above, the node is immutable but for an atomic.
unsafe impl Send for TemporaryPath {}

static TEMPORARY_PATHS: AtomicPtr<TemporaryPath> = AtomicPtr::new(ptr::null_mut());

impl TemporaryPath {
    fn register(path: &Path) -> &'static TemporaryPath {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap_or_default();
        let node =
            Box::leak(Box::new(TemporaryPath { path, live: AtomicBool::new(true), next: ptr::null() })) as *mut Self;
        let mut head = TEMPORARY_PATHS.load(Ordering::Acquire);
        loop {
            // SAFETY: the node is not published yet, so nobody else reads or writes it.
            unsafe { (*node).next = head };
            match TEMPORARY_PATHS.compare_exchange(head, node, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: the node was leaked above and is never freed.
                Ok(_) => return unsafe { &*node },
                Err(found) => head = found,
            }
        }
    }
}

/// Removes every temporary file of this process. Async-signal-safe: no locks, no allocation.
pub(crate) fn remove_temporary_files() {
    let mut node = TEMPORARY_PATHS.load(Ordering::Acquire).cast_const();
    while !node.is_null() {
        // SAFETY: published nodes are never freed.
        let entry = unsafe { &*node };
        if entry.live.swap(false, Ordering::SeqCst) {
            crate::os::unlink(&entry.path);
        }
        node = entry.next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn target_appears_only_on_commit() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.gguf");
        let mut file = AtomicFile::create(&target, false).unwrap();
        file.write_all(b"whole").unwrap();
        assert!(!target.exists());
        file.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"whole");
        assert_eq!(files_in(dir.path()), ["out.gguf"]);
    }

    #[test]
    fn dropped_file_leaves_nothing_and_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.gguf");
        std::fs::write(&target, b"old").unwrap();
        let mut file = AtomicFile::create(&target, true).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(files_in(dir.path()), ["out.gguf"]);
    }

    #[test]
    fn leftovers_of_dead_runs_go_and_living_runs_are_respected() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.gguf");
        let leftover = dir.path().join(".out.gguf.lwq-1.part");
        std::fs::write(&leftover, b"dead").unwrap();
        let first = AtomicFile::create(&target, false).unwrap();
        assert!(!leftover.exists());
        assert!(matches!(AtomicFile::create(&target, false), Err(OutputError::Busy(_))));
        drop(first);
        assert!(AtomicFile::create(&target, false).is_ok());
    }

    #[test]
    fn existing_targets_folders_and_missing_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.gguf");
        std::fs::write(&target, b"old").unwrap();
        assert!(matches!(AtomicFile::create(&target, false), Err(OutputError::Exists(_))));
        assert!(matches!(AtomicFile::create(dir.path(), true), Err(OutputError::NotAFile(_))));
        let lost = dir.path().join("no/such/out.gguf");
        assert!(matches!(AtomicFile::create(&lost, false), Err(OutputError::NoFolder { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real.gguf");
        let link = dir.path().join("link.gguf");
        std::fs::write(&real, b"old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut file = AtomicFile::create(&link, true).unwrap();
        file.write_all(b"new").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&real).unwrap(), b"new");
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
