//! The local cache of the Hugging Face hub: from `org/name` to the folder of a snapshot. Nothing is downloaded.
//!
//! The cache holds a folder `models--org--name` for each model, in it `refs/REVISION` with the commit that a branch or tag
//! points to, and `snapshots/COMMIT` with the files (often links into `blobs`). It lies where `HF_HUB_CACHE` says, else in
//! `hub` below `HF_HOME`, else below `XDG_CACHE_HOME/huggingface`, else below `~/.cache/huggingface`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::display::printable;

/// The revision that is meant where none is named.
pub const MAIN: &str = "main";

/// The index over the files of a model with several.
const INDEX: &str = "model.safetensors.index.json";

/// Largest index that is read, in bytes; that of the largest models has some ten million.
const MAX_INDEX: u64 = 512 << 20;

/// Longest commit in `refs`, in bytes; they have 40.
const MAX_COMMIT: u64 = 256;

/// Missing files that a message names.
const SHOWN_FILES: usize = 3;

/// Why no snapshot can be used.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The cache does not hold the model.
    #[error(
        "{name}: no such file or folder, and the Hugging Face cache {cache} does not hold it; `{command}` brings it"
    )]
    NotFound {
        /// `org/name`.
        name: String,
        /// The cache.
        cache: String,
        /// What downloads it.
        command: String,
    },
    /// The cache holds the model, but not this revision.
    #[error("{name}: revision {revision} is not in the Hugging Face cache, which has {known}; `{command}` brings it")]
    Revision {
        /// `org/name`.
        name: String,
        /// The revision.
        revision: String,
        /// The branches, tags and commits that are there.
        known: String,
        /// What downloads it.
        command: String,
    },
    /// Files of the snapshot are missing.
    #[error("{snapshot}: the snapshot of {name} lacks {missing}; `{command}` brings the rest")]
    Incomplete {
        /// The snapshot's folder.
        snapshot: String,
        /// `org/name`.
        name: String,
        /// The first missing files, and how many there are besides.
        missing: String,
        /// What downloads them.
        command: String,
    },
    /// A revision that cannot be one.
    #[error("{name}: {revision:?} cannot be a revision; give a branch, a tag or a whole commit")]
    BadRevision {
        /// `org/name`.
        name: String,
        /// What was given.
        revision: String,
    },
    /// A revision was named for a path.
    #[error("{path}: is a path on this machine, which has no revisions; leave {revision} away")]
    RevisionOfPath {
        /// The path.
        path: String,
        /// What was given.
        revision: String,
    },
}

/// The model that `given` names: a path that exists, or else the snapshot of a model `org/name` in the cache, whose files
/// are all there. What is neither comes back as it is: whoever opens it says what is wrong.
///
/// # Errors
/// When `given` can only be a model of the hub and the cache lacks it, the revision (`main` where none is given) or some
/// of its files; when a path that exists has a revision.
pub fn find_model(given: &Path, revision: Option<&str>) -> Result<PathBuf, HubError> {
    find_in(Cache::from_environment().as_ref(), given, revision)
}

fn find_in(cache: Option<&Cache>, given: &Path, revision: Option<&str>) -> Result<PathBuf, HubError> {
    /// A file of this kind that is missing is not a model of that name.
    const FILES: [&str; 4] = [".gguf", ".safetensors", ".json", ".bin"];
    let of_path = |revision: &str| HubError::RevisionOfPath {
        path: printable(&given.display().to_string()),
        revision: printable(revision),
    };
    if given.exists() {
        return revision.map_or_else(|| Ok(given.to_owned()), |revision| Err(of_path(revision)));
    }
    let is_file = |name: &str| FILES.iter().any(|ending| name.to_ascii_lowercase().ends_with(ending));
    let name = given.to_str().filter(|name| is_repository(name) && !is_file(name));
    match (name, cache) {
        // Old models have no organization; a single word is rather a file that is not there.
        (Some(name), Some(cache)) if name.contains('/') || cache.folder(name).is_dir() => {
            cache.snapshot(name, revision.unwrap_or(MAIN))
        }
        _ => revision.map_or_else(|| Ok(given.to_owned()), |revision| Err(of_path(revision))),
    }
}

/// `org/name` of a path in the snapshot of a model in a cache.
pub fn repository_of(path: &Path) -> Option<String> {
    let absolute = std::path::absolute(path).ok()?;
    let names: Vec<_> = absolute.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    let at = names.windows(2).position(|pair| pair[0].starts_with("models--") && pair[1] == "snapshots")?;
    let name = names[at].strip_prefix("models--")?.replacen("--", "/", 1);
    is_repository(&name).then_some(name)
}

/// True for what can be the name of a model on the hub: one part, or two with a slash between them.
pub(crate) fn is_repository(name: &str) -> bool {
    const MOST_CHARACTERS: usize = 96;
    let is_part = |part: &str| {
        let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !part.is_empty()
            && part.chars().all(inside)
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("--")
            && !part.contains("..")
    };
    let parts: Vec<&str> = name.split('/').collect();
    name.len() <= MOST_CHARACTERS && parts.len() <= 2 && parts.into_iter().all(is_part)
}

/// A cache of the hub.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The one that the environment names; `None` where there is no home folder either.
    pub fn from_environment() -> Option<Cache> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Some(Cache { root: root_of(variable, std::env::home_dir())? })
    }

    /// The one in this folder.
    pub fn at(root: impl Into<PathBuf>) -> Cache {
        Cache { root: root.into() }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(format!("models--{}", name.replace('/', "--")))
    }

    /// The folder of a snapshot whose files are all there. `revision` is a branch, a tag or a whole commit.
    ///
    /// # Errors
    /// When the cache lacks the model, the revision or files of it.
    pub fn snapshot(&self, name: &str, revision: &str) -> Result<PathBuf, HubError> {
        let command = || match revision {
            MAIN => format!("hf download {name}"),
            _ => format!("hf download {name} --revision {}", printable(revision)),
        };
        let folder = self.folder(name);
        if !folder.join("snapshots").is_dir() {
            let cache = printable(&self.root.display().to_string());
            return Err(HubError::NotFound { name: name.to_owned(), cache, command: command() });
        }
        if !is_plain(revision) {
            return Err(HubError::BadRevision { name: name.to_owned(), revision: revision.to_owned() });
        }
        let commit = read_ref(&folder.join("refs").join(revision)).unwrap_or_else(|| revision.to_owned());
        let snapshot = folder.join("snapshots").join(&commit);
        if !snapshot.is_dir() {
            return Err(HubError::Revision {
                name: name.to_owned(),
                revision: printable(revision),
                known: revisions(&folder),
                command: command(),
            });
        }
        let missing = missing_files(&snapshot);
        if missing.is_empty() {
            return Ok(snapshot);
        }
        let more = missing.len().saturating_sub(SHOWN_FILES);
        let mut shown: Vec<String> = missing.iter().take(SHOWN_FILES).map(|file| printable(file)).collect();
        if more > 0 {
            shown.push(format!("{more} more"));
        }
        Err(HubError::Incomplete {
            snapshot: printable(&snapshot.display().to_string()),
            name: name.to_owned(),
            missing: shown.join(", "),
            command: command(),
        })
    }
}

/// Where the cache lies, as `huggingface_hub.constants` has it.
fn root_of(variable: impl Fn(&'static str) -> Option<OsString>, home: Option<PathBuf>) -> Option<PathBuf> {
    let path = |name| {
        let path = PathBuf::from(variable(name)?);
        match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => Some(home.join(rest)),
            _ => Some(path),
        }
    };
    path("HF_HUB_CACHE")
        .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| path("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface/hub")))
}

/// True for a relative path that leads only downwards. Branches may have slashes.
fn is_plain(text: &str) -> bool {
    !text.is_empty() && Path::new(text).components().all(|part| matches!(part, Component::Normal(_)))
}

/// The commit in a file of `refs`, if it can be the name of a snapshot.
fn read_ref(file: &Path) -> Option<String> {
    let mut text = String::new();
    fs::File::open(file).ok()?.take(MAX_COMMIT).read_to_string(&mut text).ok()?;
    let commit = text.trim();
    (!commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric())).then(|| commit.to_owned())
}

/// The branches and tags of a model in the cache, and the commits that none of them points to.
fn revisions(folder: &Path) -> String {
    const MOST: usize = 8;
    /// Folders in folders that branches such as `refs/pr/1` make.
    const DEEPEST: usize = 4;
    fn collect(folder: &Path, prefix: &str, depth: usize, found: &mut Vec<(String, Option<String>)>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.path().is_dir() {
                true if depth < DEEPEST => collect(&entry.path(), &format!("{name}/"), depth + 1, found),
                true => {}
                false => found.push((name, read_ref(&entry.path()))),
            }
        }
    }
    let mut refs = Vec::new();
    collect(&folder.join("refs"), "", 0, &mut refs);
    let snapshots: BTreeSet<String> = fs::read_dir(folder.join("snapshots"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    refs.retain(|(_, commit)| commit.as_ref().is_some_and(|commit| snapshots.contains(commit)));
    let named = |commit: &String| refs.iter().any(|(_, of_ref)| of_ref.as_ref() == Some(commit));
    let mut names: Vec<String> = snapshots.iter().filter(|commit| !named(commit)).cloned().collect();
    names.extend(refs.iter().map(|(name, _)| name.clone()));
    names.sort();
    match names.len() {
        0 => "none".to_owned(),
        count => {
            let more = if count > MOST { format!(" and {} more", count - MOST) } else { String::new() };
            let shown: Vec<String> = names.iter().take(MOST).map(|name| printable(name)).collect();
            format!("{}{more}", shown.join(", "))
        }
    }
}

/// What a model needs and the snapshot lacks: the configuration, and files that the index or the others' names speak of.
fn missing_files(snapshot: &Path) -> Vec<String> {
    let mut wanted = BTreeSet::from(["config.json".to_owned()]);
    // A model in one file needs no others, whatever an index beside it says.
    if !snapshot.join("model.safetensors").exists() {
        match indexed_files(&snapshot.join(INDEX)) {
            Some(files) => wanted.extend(files),
            None => wanted.extend(numbered_files(snapshot)),
        }
    }
    // A link into `blobs` whose file is gone does not exist either.
    wanted.into_iter().filter(|file| !snapshot.join(file).exists()).collect()
}

/// The files that an index names. One that cannot be read is left to whoever reads the folder.
fn indexed_files(index: &Path) -> Option<BTreeSet<String>> {
    let mut bytes = Vec::new();
    fs::File::open(index).ok()?.take(MAX_INDEX).read_to_end(&mut bytes).ok()?;
    let index: Value = serde_json::from_slice(&bytes).ok()?;
    let files = index.get("weight_map")?.as_object()?.values().filter_map(Value::as_str);
    Some(files.filter(|file| is_plain(file)).map(str::to_owned).collect())
}

/// All of `model-00001-of-0000N.safetensors`, if there is one of them.
fn numbered_files(snapshot: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(snapshot).into_iter().flatten().flatten();
    let count = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let (_, count) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
        (count.len() == 5).then(|| count.parse::<u32>().ok())?
    });
    let count = count.max().unwrap_or(0);
    (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// A cache with one model of one file, whose branches `main` and `refs/pr/1` are the same commit.
    fn cache(root: &Path) -> PathBuf {
        let folder = root.join("models--org--name");
        let snapshot = folder.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(folder.join("refs/refs/pr")).unwrap();
        for name in ["main", "refs/pr/1"] {
            fs::write(folder.join("refs").join(name), COMMIT).unwrap();
        }
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        fs::write(snapshot.join("model.safetensors"), "").unwrap();
        snapshot
    }

    #[test]
    fn branches_and_commits_lead_to_the_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = cache(dir.path());
        let cache = Cache::at(dir.path());
        for revision in [MAIN, "refs/pr/1", COMMIT] {
            assert_eq!(cache.snapshot("org/name", revision).unwrap(), snapshot);
        }
        let message = cache.snapshot("org/name", "v2").unwrap_err().to_string();
        assert!(message.contains("has main, refs/pr/1;"), "{message}");
        assert!(message.contains("`hf download org/name --revision v2`"), "{message}");
        let message = cache.snapshot("org/other", MAIN).unwrap_err().to_string();
        assert!(message.contains("`hf download org/other` brings it"), "{message}");
        for revision in ["", "..", "../main", "/etc"] {
            assert!(matches!(cache.snapshot("org/name", revision), Err(HubError::BadRevision { .. })), "{revision}");
        }
    }

    #[test]
    fn files_that_are_missing_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = cache(dir.path());
        let lacks = || Cache::at(dir.path()).snapshot("org/name", MAIN).unwrap_err().to_string();
        fs::remove_file(snapshot.join("model.safetensors")).unwrap();
        fs::write(snapshot.join("model-00002-of-00003.safetensors"), "").unwrap();
        let message = lacks();
        assert!(message.contains("lacks model-00001-of-00003.safetensors, model-00003-of-00003"), "{message}");
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "../../x", "c": "two.safetensors"}}"#;
        fs::write(snapshot.join(INDEX), index).unwrap();
        let message = lacks();
        assert!(message.contains("lacks one.safetensors, two.safetensors; `hf download org/name`"), "{message}");
        for file in ["one.safetensors", "two.safetensors"] {
            fs::write(snapshot.join(file), "").unwrap();
        }
        assert!(Cache::at(dir.path()).snapshot("org/name", MAIN).is_ok());
        fs::remove_file(snapshot.join("config.json")).unwrap();
        assert!(lacks().contains("lacks config.json"));
    }

    #[test]
    fn a_path_that_is_there_comes_before_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = cache(dir.path());
        let cache = Cache::at(dir.path());
        let find = |given: &Path, revision| find_in(Some(&cache), given, revision);
        assert_eq!(find(Path::new("org/name"), None).unwrap(), snapshot);
        assert_eq!(find(dir.path(), None).unwrap(), dir.path());
        assert!(matches!(find(dir.path(), Some(MAIN)), Err(HubError::RevisionOfPath { .. })));
        assert!(matches!(find(Path::new("org/lost"), None), Err(HubError::NotFound { .. })));
        // None of these can be a model of the hub.
        for path in ["lost", "a/b/c", "/org/name", "../name", "models/lost.gguf", "org/na me"] {
            assert_eq!(find(Path::new(path), None).unwrap(), Path::new(path));
        }
    }

    #[test]
    fn variables_name_the_cache_in_their_order() {
        let root = |set: &[(&'static str, &str)]| {
            let variable = |name| set.iter().find(|(of, _)| *of == name).map(|(_, value)| OsString::from(value));
            root_of(variable, Some("/home/a".into())).unwrap()
        };
        assert_eq!(root(&[]), Path::new("/home/a/.cache/huggingface/hub"));
        assert_eq!(root(&[("XDG_CACHE_HOME", "/c")]), Path::new("/c/huggingface/hub"));
        assert_eq!(root(&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/c")]), Path::new("/home/a/hf/hub"));
        assert_eq!(root(&[("HF_HUB_CACHE", "/hub"), ("HF_HOME", "/hf")]), Path::new("/hub"));
    }

    #[test]
    fn snapshots_name_their_repository() {
        let of = |path: &str| repository_of(Path::new(path));
        assert_eq!(of("/c/hub/models--org--a-b.c/snapshots/0123").as_deref(), Some("org/a-b.c"));
        assert_eq!(of("/c/hub/models--gpt2/snapshots/0123/model.safetensors").as_deref(), Some("gpt2"));
        assert_eq!(of("/c/models--x/y"), None);
    }
}
