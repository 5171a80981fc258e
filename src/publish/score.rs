//! Figures of files, and the folders that are evaluated through their values.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::PublishError;
use super::choose::Measured;
use super::journal::{self, remove};
use super::repository::files_below;
use super::run::Run;
use super::stages::{Base, Candidate};
use crate::atomic_file::{AtomicFile, Replace};
use crate::convert::{Conversion, Options};
use crate::eval::{DivergenceSummary, TextOptions};
use crate::export::{self, Scheme};
use crate::gguf::{Gguf, fingerprint};
use crate::progress::{Interrupted, Watch};
use crate::report::{ComparisonRequest, TextFacts};

/// A file's figures, with those of the base beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Scored {
    pub size_bytes: u64,
    pub bits_per_weight: f64,
    pub divergence: DivergenceSummary,
    pub text: TextFacts,
    pub windows: usize,
    pub activations: String,
}

impl Scored {
    pub(super) fn measured(&self) -> Measured {
        Measured { bytes: self.size_bytes, kld: self.divergence.mean_kld }
    }
}

/// A folder of compressed-tensors.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    pub scheme: Scheme,
    pub key: String,
    pub path: PathBuf,
    pub facts: FolderFacts,
    /// Its values as a GGUF, unless figures are known.
    pub decoded: Option<PathBuf>,
}

/// What is known of a folder when it is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FolderFacts {
    pub size_bytes: u64,
    pub bits_per_weight: f64,
    pub rounding: String,
    pub files: Vec<String>,
}

impl Folder {
    /// Name of the result that its figures belong to.
    pub(super) fn decoded_key(&self) -> String {
        journal::key("decoded", &[&self.key])
    }
}

impl Run<'_> {
    fn figures_key(&self, file: &str) -> String {
        journal::key("figures", &[&self.draft.opened.sha256, &self.draft.evaluation_words(), file])
    }

    /// The figures of the file `key`, if they are known.
    pub(super) fn scored(&mut self, key: &str) -> Option<Scored> {
        let key = self.figures_key(key);
        self.work.get(&key)
    }

    /// The figures of a file that was evaluated.
    pub(super) fn scored_again(&mut self, file: &Candidate) -> Result<Scored, PublishError> {
        let missing =
            || PublishError::file(self.draft.request.output.as_path(), "a file was not evaluated; run it again");
        let error = missing();
        self.scored(&file.key).ok_or(error)
    }

    /// Text options of all evaluations; scored windows are kept.
    pub(super) fn text_options(&self) -> TextOptions {
        let options = self.draft.request.evaluation.options.clone();
        TextOptions { memory: self.draft.request.memory, state: Some(self.work.path("scores")), ..options }
    }

    /// Files of others by the names of their results.
    pub(super) fn others(&self) -> Result<Vec<(String, Gguf)>, PublishError> {
        let named = |file: &super::Against| {
            let gguf = Gguf::open(&file.path)?;
            let key = journal::key("against", &[&fingerprint(&gguf), &gguf.file_bytes().to_string()]);
            Ok((key, gguf))
        };
        self.draft.request.against.iter().map(named).collect()
    }

    /// Evaluates what has no figures yet, in one pass: `files`, the values of `folders`, and the files of others. The flag
    /// says whether there was anything.
    pub(super) fn evaluate(
        &mut self,
        base: &Base,
        files: &[&Candidate],
        folders: &[Folder],
    ) -> Result<bool, PublishError> {
        let mut models: Vec<(String, Gguf)> = Vec::new();
        for file in files {
            if self.scored(&file.key).is_some() || models.iter().any(|(key, _)| *key == file.key) {
                continue;
            }
            let path = self.work.find(&file.key, "gguf");
            let path = path.ok_or_else(|| {
                PublishError::file(
                    &self.draft.request.output,
                    "a file was removed while it was evaluated; run it again",
                )
            })?;
            models.push((file.key.clone(), Gguf::open(path)?));
        }
        for folder in folders {
            let key = folder.decoded_key();
            if let Some(path) = folder.decoded.as_ref().filter(|_| self.scored(&key).is_none()) {
                models.push((key, Gguf::open(path)?));
            }
        }
        for (key, gguf) in self.others()? {
            if self.scored(&key).is_none() && !models.iter().any(|(known, _)| *known == key) {
                models.push((key, gguf));
            }
        }
        // The base's own figures are needed in any case.
        let own = journal::key("self", &[&base.sha256]);
        if models.is_empty() && files.is_empty() && folders.iter().all(|folder| folder.decoded.is_none()) {
            if self.scored(&own).is_some() {
                return Ok(false);
            }
            models.push((own, Gguf::open(&base.path)?));
        }
        if models.is_empty() {
            return Ok(false);
        }
        let text = &self.draft.request.evaluation.text;
        let ggufs: Vec<&Gguf> = models.iter().map(|(_, gguf)| gguf).collect();
        let request = ComparisonRequest::new(&base.gguf, text).options(self.text_options());
        let found = request.run(&ggufs, &self.watch)?;
        self.watch.end();
        let Some(run) = found.runs.first().filter(|_| found.complete) else { return Err(Interrupted.into()) };
        for ((key, _), (facts, figures)) in models.iter().zip(found.files.iter().zip(&run.files)) {
            let scored = Scored {
                size_bytes: facts.size_bytes,
                bits_per_weight: facts.bits_per_weight,
                divergence: figures.divergence,
                text: found.text.clone(),
                windows: run.windows,
                activations: run.activations.clone(),
            };
            let key = self.figures_key(key);
            self.work.put(&key, &scored)?;
        }
        Ok(true)
    }

    /// Folders in all schemes that are asked for.
    pub(super) fn export_all(&mut self, base: &Base) -> Result<Vec<Folder>, PublishError> {
        let schemes = self.draft.request.schemes.clone();
        schemes.into_iter().map(|scheme| self.export(base, scheme)).collect()
    }

    fn export(&mut self, base: &Base, scheme: Scheme) -> Result<Folder, PublishError> {
        let source = self.draft.opened.source.path();
        self.step(&format!("export {}", scheme.name()), |run| {
            let words = run.draft.rounding_words();
            let key = journal::key("export", &[&run.draft.opened.sha256, scheme.name(), &words]);
            let path = run.work.file(&key, "folder");
            let options = Box::new(run.draft.request.calibration.clone());
            let request = export::Request::new(scheme).rounding(export::Rounding::Feedback(options));
            let known = run.work.get::<FolderFacts>(&key).filter(|facts| {
                let inside = |name: &String| path.join(name).is_file() || run.published_file(&key, name).is_some();
                facts.files.iter().all(inside)
            });
            let mut worked = false;
            let facts = match known {
                Some(facts) => facts,
                None => {
                    worked = true;
                    let mut draft = request.decide(source)?;
                    draft.warnings().iter().for_each(|line| run.watch.warn(line));
                    if !path.is_dir() {
                        draft.write(&path, Replace::No, &run.watch)?;
                        run.watch.end();
                    }
                    let facts = FolderFacts {
                        size_bytes: draft.file_bytes(),
                        bits_per_weight: 8.0 * draft.quantized_bytes() as f64 / draft.quantized_weights().max(1) as f64,
                        rounding: draft.rounding().to_string(),
                        files: files_below(&path)?,
                    };
                    run.work.put(&key, &facts)?
                }
            };
            let mut folder = Folder { scheme, key, path, facts, decoded: None };
            let decoded = folder.decoded_key();
            let wanted = run.scored(&decoded).is_none() || run.draft.request.evaluation.tasks.is_some();
            if wanted && folder.path.is_dir() {
                let output = run.work.file(&decoded, "gguf");
                folder.decoded = Some(output.clone());
                if !output.is_file() {
                    worked = true;
                    if let Err(error) = run.decode(base, &folder.path, &output) {
                        if super::run::is_interrupted(&error) {
                            return Err(error);
                        }
                        run.watch.warn(&format!("{}: cannot be evaluated: {error}", scheme.name()));
                        remove(&output)?;
                        folder.decoded = None;
                    }
                }
            }
            Ok((folder, worked))
        })
    }

    /// The values of a folder as a GGUF that runs beside the base.
    fn decode(&self, base: &Base, folder: &std::path::Path, output: &std::path::Path) -> Result<(), PublishError> {
        let options = Options { name: Some(text_name(base)), ..Options::default() };
        let conversion = Conversion::open(folder, &options)?;
        let layout = conversion.layout("values")?;
        let file = AtomicFile::create(output, true)?;
        file.reserve(layout.file_bytes())?;
        conversion.write(&layout, file.file(), &self.watch)?;
        self.watch.end();
        file.commit()?;
        Ok(())
    }

    /// A file of a folder that is published already.
    pub(super) fn published_file(&self, key: &str, name: &str) -> Option<PathBuf> {
        let wanted = format!("{key}/{name}");
        let (place, file) = self.work.journal.published.iter().find(|(_, file)| file.key == wanted)?;
        let path = self.work.output().join(place);
        let same = std::fs::metadata(&path).is_ok_and(|found| found.len() == file.bytes);
        same.then_some(path)
    }
}

fn text_name(base: &Base) -> String {
    base.gguf.metadata().str("general.name").ok().flatten().unwrap_or("model").to_owned()
}
