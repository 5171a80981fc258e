//! The output folder: files get their places when they are whole, pages come last, and checksums list what is there.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::PublishError;
use super::draft::file_sha256;
use super::journal::{PublishedFile, Work, remove};
use crate::atomic_file::AtomicFile;

/// Digests of all files.
pub(super) const SUMS: &str = "SHA256SUMS";
/// The card.
pub(super) const CARD: &str = "README.md";
/// The plot of the card.
pub(super) const PLOT: &str = "plot.svg";
/// The page.
pub(super) const PAGE: &str = "report.html";
/// All figures.
pub(super) const REPORT: &str = "report.json";

/// What is written at the end, in this order.
pub(super) const PAGES: [&str; 5] = [PLOT, PAGE, REPORT, CARD, SUMS];

/// Something that gets a place in the repository.
pub(super) enum Content {
    /// A file that lies elsewhere in the folder of the run, or at its place already.
    File { key: String, path: PathBuf },
    /// A text.
    Text(String),
}

/// Puts everything to its place: first what is large, then the pages, then the checksums. Files of an earlier run that are
/// not among them go.
///
/// # Errors
/// When the disk refuses.
pub(super) fn place(work: &mut Work, contents: Vec<(String, Content)>) -> Result<(), PublishError> {
    let mut files: BTreeMap<String, PublishedFile> = BTreeMap::new();
    for (name, content) in &contents {
        let file = match content {
            Content::File { key, path } => {
                let known = work.journal.published.get(name).filter(|known| known.key == *key);
                let there = fs::metadata(path).map_err(PublishError::io(path, "cannot look at it"))?.len();
                let sha256 = match known.filter(|known| known.bytes == there && *path == work.output().join(name)) {
                    Some(known) => known.sha256.clone(),
                    None => file_sha256(path)?,
                };
                PublishedFile { key: key.clone(), bytes: there, sha256 }
            }
            Content::Text(text) => of_text(text),
        };
        files.insert(name.clone(), file);
    }
    let mut sums: String = files.iter().map(|(name, file)| format!("{}  {name}\n", file.sha256)).collect();
    if sums.is_empty() {
        sums.push('\n');
    }
    files.insert(SUMS.to_owned(), of_text(&sums));

    // From here on the old checksums may not hold.
    let changes = files.iter().any(|(name, file)| work.journal.published.get(name) != Some(file));
    let leaves = work.journal.published.keys().any(|name| !files.contains_key(name));
    if changes || leaves {
        remove(&work.output().join(SUMS))?;
    }
    // Files that lie here under other names are copied before any name changes its meaning.
    let mut copies: BTreeMap<String, AtomicFile> = BTreeMap::new();
    let unfinished = super::journal::work_folder(work.output());
    for (name, content) in &contents {
        let target = work.output().join(name);
        if let Content::File { path, .. } = content
            && *path != target
            && !path.starts_with(&unfinished)
        {
            copies.insert(name.clone(), copy_of(path, &target)?);
        }
    }
    // Goals of one size may have one file: it moves to its first name and is copied to the others.
    let mut moved: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
    for (name, content) in contents {
        let target = work.output().join(&name);
        let Some(file) = files.get(&name) else { continue };
        match content {
            Content::File { path, .. } if path == target => {}
            Content::File { path, .. } => {
                if let Some(folder) = target.parent() {
                    fs::create_dir_all(folder).map_err(PublishError::io(folder, "cannot make the folder"))?;
                }
                let failed = PublishError::io(&target, "cannot move the finished file here");
                match (copies.remove(&name), moved.get(&path)) {
                    (Some(copy), _) => copy.commit()?,
                    (None, Some(first)) => copy_of(first, &target)?.commit()?,
                    (None, None) => {
                        // Known before it is there, so that a run that is killed in between finds it again.
                        work.journal.published.insert(name.clone(), file.clone());
                        work.save()?;
                        fs::rename(&path, &target).map_err(failed)?;
                        moved.insert(path, target);
                    }
                }
            }
            Content::Text(text) => write(&target, &text)?,
        }
        work.journal.published.insert(name, file.clone());
    }
    let stale: Vec<String> = work.journal.published.keys().filter(|name| !files.contains_key(*name)).cloned().collect();
    for name in stale {
        remove(&work.output().join(&name))?;
        if let Some(folder) = Path::new(&name).parent().filter(|folder| !folder.as_os_str().is_empty()) {
            // Only when it is empty.
            let _ = fs::remove_dir(work.output().join(folder));
        }
        work.journal.published.remove(&name);
    }
    write(&work.output().join(SUMS), &sums)?;
    work.journal.published = files;
    work.save()
}

/// A copy that has no name yet.
fn copy_of(source: &Path, target: &Path) -> Result<AtomicFile, PublishError> {
    let failed = PublishError::io(target, "cannot copy the finished file here");
    let mut copy = AtomicFile::create(target, true)?;
    let mut source = fs::File::open(source).map_err(&failed)?;
    std::io::copy(&mut source, &mut copy).map_err(failed)?;
    Ok(copy)
}

fn of_text(text: &str) -> PublishedFile {
    let sha256 = format!("{:x}", Sha256::digest(text));
    PublishedFile { key: format!("text-{}", &sha256[..24]), bytes: text.len() as u64, sha256 }
}

/// Writes a text unless it stands there already.
fn write(path: &Path, text: &str) -> Result<(), PublishError> {
    if fs::read(path).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(());
    }
    let mut file = AtomicFile::create(path, true)?;
    file.write_all(text.as_bytes()).map_err(PublishError::io(path, "cannot write it"))?;
    Ok(file.commit()?)
}

/// Files below a folder with their names from there, sorted.
///
/// # Errors
/// When it cannot be read.
pub(super) fn files_below(folder: &Path) -> Result<Vec<String>, PublishError> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        let path = folder.join(&below);
        let failed = PublishError::io(&path, "cannot read the folder");
        for entry in fs::read_dir(&path).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            let name = below.join(entry.file_name());
            match entry.file_type().map_err(&failed)?.is_dir() {
                true => open.push(name),
                false => found.push(name.to_string_lossy().into_owned()),
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Content {
        Content::Text(text.to_owned())
    }

    #[test]
    fn one_file_may_have_two_names() {
        let folder = tempfile::tempdir().unwrap();
        let mut work = Work::open(folder.path(), "m", "abc", false).unwrap();
        let path = work.file("a-1", "gguf");
        fs::write(&path, "abc").unwrap();
        let file = |path: &Path| Content::File { key: "a-1".to_owned(), path: path.to_owned() };
        let (a, b, c) = ("m-A.gguf".to_owned(), "m-B.gguf".to_owned(), "m-C.gguf".to_owned());
        place(&mut work, vec![(a.clone(), file(&path)), (b.clone(), file(&path))]).unwrap();
        let found = work.find("a-1", "gguf").unwrap();
        place(&mut work, vec![(a.clone(), file(&found)), (b.clone(), file(&found)), (c.clone(), file(&found))])
            .unwrap();
        for name in [&a, &b, &c] {
            assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), "abc");
        }
        // Names change their meaning: what was B is A now, and B is new.
        let next = work.file("b-1", "gguf");
        fs::write(&next, "xyz").unwrap();
        let new = Content::File { key: "b-1".to_owned(), path: next };
        place(&mut work, vec![(b.clone(), new), (a.clone(), file(&folder.path().join(&b)))]).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!((read(&a), read(&b), folder.path().join(&c).exists()), ("abc".to_owned(), "xyz".to_owned(), false));
    }

    #[test]
    fn checksums_list_what_is_there_and_what_is_no_longer_made_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut work = Work::open(folder.path(), "m", "abc", false).unwrap();
        let path = work.file("a-1", "gguf");
        fs::write(&path, "abc").unwrap();
        let file = Content::File { key: "a-1".to_owned(), path: path.clone() };
        place(&mut work, vec![("m-A.gguf".to_owned(), file), (CARD.to_owned(), text("x"))]).unwrap();
        assert!(!path.exists() && work.find("a-1", "gguf").is_some_and(|found| found.ends_with("m-A.gguf")));
        let sums = fs::read_to_string(folder.path().join(SUMS)).unwrap();
        let of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  m-A.gguf\n";
        assert!(sums.contains(of_abc) && sums.contains("  README.md\n"), "{sums}");
        place(&mut work, vec![(CARD.to_owned(), text("y"))]).unwrap();
        assert!(!folder.path().join("m-A.gguf").exists());
        assert!(!fs::read_to_string(folder.path().join(SUMS)).unwrap().contains("m-A.gguf"));
    }
}
