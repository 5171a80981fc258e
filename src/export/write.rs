//! The run: matrices through the rounding into their places, everything else copied.
//!
//! Without calibration all items are cut into pieces of whole rows that stand in one queue. Bytes of a piece depend on its
//! rows alone (and, for NVFP4, on the largest weight of all that loaders put into one, which a pass before finds), so the files
//! are the same for any number of threads, and for a run that goes on where another stopped. With calibration matrices come
//! layer by layer from a pass of the model, and the queue takes what that does not show.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::tensor::Dtype;

use super::ExportError;
use super::calibrated::{self, Calibrated, Job, Method, guests};
use super::draft::{Content, Draft, Item};
use super::files::{self, failed};
use super::folder::{self, NewFolder, Origin};
use super::pieces::{Piece, global_key};
use super::request::Rounding;
use super::sink::{COPY_BYTES, Sink};
use crate::atomic_file::{Replace, folder_of};
use crate::convert::source::ReadBuffers;
use crate::display::decimal_size;
use crate::moments::CalibrationOptions;
use crate::os;
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::quantize::feedback::Outcome;
use crate::recipe::Target;
use crate::rounding::grid::Rounded;
use crate::unfinished::{GOES_ON, going_on, partial_path};
use crate::workers;

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Bytes of the safetensors files.
    pub bytes: u64,
    /// Items that an earlier run had finished.
    pub taken_over: usize,
    /// What became of each matrix that a pass of the model has shown the inputs of.
    pub outcomes: Vec<Outcome>,
    /// Norms that have taken up factors of the matrices behind them.
    pub smoothed: Vec<String>,
}

/// What an earlier run had finished, and what became of matrices so far.
struct State {
    todo: Vec<usize>,
    outcomes: Vec<Outcome>,
}

/// What a pass over the model writes to.
struct Run<'a> {
    folder: &'a NewFolder,
    sink: &'a Sink<'a>,
    /// GGUF files.
    also: &'a [(Target, PathBuf)],
    replace: Replace,
    watch: &'a dyn Watch,
}

impl Draft {
    /// Writes the folder. A run that is stopped leaves `OUT.partial`, with which the same call goes on.
    ///
    /// # Errors
    /// If the output may not be made, the disk is too small, the source cannot be read or holds NaN or infinity, the model
    /// cannot be run where that is wanted, or `watch` stops the run.
    pub fn write(&mut self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Written, ExportError> {
        folder::check_output(output, self.folder(), replace)?;
        let origin = Origin::new(self.source.fingerprint()?, self.settings());
        let also: Vec<PathBuf> = self.also.iter().map(|file| file.path(output)).collect();
        // Files that an interrupted run has finished are there and are not made again.
        let is_begun = partial_path(output).exists();
        guests::check_paths(&also, output, is_begun || replace.is_allowed())?;
        let folder = NewFolder::open(output, replace, &origin)?;
        let left = self.files_left(&folder, &also);
        let paths: Vec<PathBuf> = left.iter().map(|file| also[*file].clone()).collect();
        guests::check_paths(&paths, output, replace.is_allowed())?;
        self.check_space(output, &folder)?;
        let goes_on = |error: &ExportError| {
            if matches!(error, ExportError::Interrupted(_)) {
                watch.warn(GOES_ON);
            }
        };
        if self.has_to_measure() {
            self.plan_bits(&folder.make_work()?, watch).inspect_err(goes_on)?;
            self.check_space(output, &folder)?;
        }
        let files = self.open_files(&folder)?;
        let sink = Sink { draft: self, files: &files };
        let files_left: Vec<(usize, PathBuf)> = left.into_iter().zip(paths).collect();
        let written = self.run(&folder, &sink, &files_left, replace, watch).inspect_err(goes_on)?;
        for (file, shard) in files.iter().zip(&self.shards.files) {
            file.sync_all()
                .map_err(|source| failed(&folder.path(&shard.name), "cannot write it to the disk", source))?;
        }
        if let Some(index) = &self.shards.index {
            files::write_json(&folder.path("model.safetensors.index.json"), index)?;
        }
        files::copy(&self.extra, self.folder(), &folder.path(""))?;
        files::write_json(&folder.path("config.json"), &self.config)?;
        folder.commit()?;
        Ok(written)
    }

    /// All choices in words, with digests of texts: unfinished work of other choices is not taken over.
    fn settings(&self) -> String {
        let words = self.calibration().map(|(method, options)| {
            let (jobs, done) = (&[][..], &HashSet::new());
            let (also, replace, work) = (&[][..], Replace::No, Path::new(""));
            let (folder, smooths) = (&self.source, self.smooths);
            Calibrated { folder, jobs, done, method, smooths, options, work, also, replace }.words()
        });
        format!("{} {}", self.settings, words.unwrap_or_default())
    }

    /// Method and texts of a rounding that runs the model.
    fn calibration(&self) -> Option<(Method, &CalibrationOptions)> {
        match &self.rounding {
            Rounding::Rtn | Rounding::Search => None,
            Rounding::Feedback(options) => Some((Method::Feedback, options)),
            Rounding::Gptq { options, resaved } => {
                // Other models are divided in another type.
                let resaved = *resaved && self.source.model_type() == Dtype::BF16;
                Some((Method::Gptq { resaved }, options))
            }
        }
    }

    /// GGUF files that are still to be made, by their places.
    fn files_left(&self, folder: &NewFolder, paths: &[PathBuf]) -> Vec<usize> {
        let is_done = |file: &usize| folder.done.contains_key(&(self.items.len() + file)) && paths[*file].is_file();
        (0..paths.len()).filter(|file| !is_done(file)).collect()
    }

    /// A mix of bits is wanted and not planned yet.
    fn has_to_measure(&self) -> bool {
        self.mixture.as_ref().is_some_and(|mixture| !mixture.is_planned)
    }

    /// Compares what is still to be written with the space on the disk.
    fn check_space(&self, output: &Path, folder: &NewFolder) -> Result<(), ExportError> {
        let there = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
        let of_files =
            self.shards.files.iter().map(|shard| shard.bytes.saturating_sub(there(&folder.path(&shard.name))));
        let mut wanted: u64 = of_files.sum();
        if (self.calibration().is_some() || self.has_to_measure()) && !folder.work().join("model.gguf").exists() {
            wanted +=
                (0..self.source.len()).map(|weight| 2 * self.source.shape(weight).iter().product::<u64>()).sum::<u64>();
        }
        match os::free_space(folder_of(output)) {
            Some(free) if free < wanted => {
                let (wanted, free) = (decimal_size(wanted), decimal_size(free));
                let problem = format!("needs {wanted}, but its disk has {free} free; make room or choose another disk");
                Err(ExportError::Folder { path: output.to_path_buf(), problem })
            }
            _ => Ok(()),
        }
    }

    /// The safetensors files, with their headers and full lengths.
    fn open_files(&self, folder: &NewFolder) -> Result<Vec<File>, ExportError> {
        let open = |shard: &super::shards::Shard| {
            let path = folder.path(&shard.name);
            let wrong = |action| move |source| failed(&path, action, source);
            let made = wrong.clone()("cannot make it");
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(folder.path(&shard.name)).map_err(made)?;
            if file.metadata().map_or(0, |found| found.len()) != shard.bytes {
                os::reserve(&file, shard.bytes).map_err(wrong("cannot reserve space on the disk"))?;
            }
            os::write_all_at(&file, &shard.header, 0)
                .map_err(|source| failed(&folder.path(&shard.name), "cannot write it", source))?;
            Ok(file)
        };
        self.shards.files.iter().map(open).collect()
    }

    fn run(
        &self,
        folder: &NewFolder,
        sink: &Sink<'_>,
        files: &[(usize, PathBuf)],
        replace: Replace,
        watch: &dyn Watch,
    ) -> Result<Written, ExportError> {
        let mut state = stoppable(watch, |stop| self.state(folder, sink, stop))?;
        let taken_over = self.items.len() - state.todo.len();
        if taken_over > 0 {
            watch.note(&going_on(taken_over, self.items.len(), "tensors"));
        }
        let globals = stoppable(watch, |stop| self.global_scales(&state.todo, watch, stop))?;
        if let Some((method, options)) = self.calibration()
            && (!files.is_empty() || state.todo.iter().any(|item| self.items[*item].module().is_some()))
        {
            let also: Vec<(Target, PathBuf)> =
                files.iter().map(|(file, path)| (self.also[*file].target, path.clone())).collect();
            let run = Run { folder, sink, also: &also, replace, watch };
            self.calibrate(&run, &globals, &mut state, (method, options))?;
            files.iter().try_for_each(|(file, _)| folder.note(self.items.len() + file, "written", None))?;
        }
        stoppable(watch, |stop| self.pieces(folder, sink, &state.todo, &globals, watch, stop))?;
        let smoothed = if self.smooths { self.changed_norms(sink)? } else { Vec::new() };
        Ok(Written { bytes: self.file_bytes(), taken_over, outcomes: state.outcomes, smoothed })
    }

    /// Names of copied vectors that are not what they are in the source.
    fn changed_norms(&self, sink: &Sink<'_>) -> Result<Vec<String>, ExportError> {
        let mut changed = Vec::new();
        for (at, item) in self.items.iter().enumerate() {
            let Content::Stored { weight, bytes, ref shape, .. } = item.content else { continue };
            if shape.len() != 1 || bytes > COPY_BYTES {
                continue;
            }
            let mut original = vec![0; bytes as usize];
            self.source.read_stored(weight, 0, &mut original)?;
            if sink.read(at, 0)? != original {
                changed.push(item.name.clone());
            }
        }
        Ok(changed)
    }

    /// What the journal says that is true.
    fn state(&self, folder: &NewFolder, sink: &Sink<'_>, stop: &Stop) -> Result<State, ExportError> {
        let mut state = State { todo: Vec::new(), outcomes: Vec::new() };
        for item in 0..self.items.len() {
            match folder.done.get(&item) {
                // A disk that lost what the journal names is not believed.
                Some(done) if sink.digest(item)? == done.digest => state.outcomes.extend(done.outcome.clone()),
                _ => state.todo.push(item),
            }
            stop.check()?;
        }
        Ok(state)
    }

    /// Rounds what a pass of the model shows the inputs of.
    fn calibrate(
        &self,
        run: &Run<'_>,
        globals: &HashMap<String, f32>,
        state: &mut State,
        (method, options): (Method, &CalibrationOptions),
    ) -> Result<(), ExportError> {
        let Run { folder, sink, also, replace, watch } = *run;
        let job = |(key, item): (usize, &Item)| {
            let module = item.module()?;
            Some(Job {
                key,
                module: module.name.clone(),
                matrix: module.matrix.clone(),
                layout: self.layouts[module.group],
                global: globals.get(&global_key(&module.name)).copied(),
            })
        };
        let jobs: Vec<Job> = self.items.iter().enumerate().filter_map(job).collect();
        let mut left: HashSet<usize> = state.todo.iter().copied().collect();
        let done: HashSet<usize> = jobs.iter().map(|job| job.key).filter(|key| !left.contains(key)).collect();
        let work = folder.make_work()?;
        let (source, smooths, jobs, done, work) = (&self.source, self.smooths, &jobs, &done, &work);
        let calibrated = Calibrated { folder: source, jobs, done, method, smooths, options, work, also, replace };
        let mut taker = Taker { draft: self, folder, sink, left: &mut left, outcomes: &mut state.outcomes };
        let unseen = calibrated.round(watch, &mut taker)?;
        if !unseen.is_empty() {
            let names: Vec<&str> = unseen.iter().take(3).map(|key| self.items[*key].name.as_str()).collect();
            let more = if unseen.len() > names.len() { " and others" } else { "" };
            watch.note(&format!("rounded without inputs, which the model does not show: {}{more}", names.join(", ")));
        }
        state.todo.retain(|item| left.contains(item));
        Ok(())
    }

    /// Works off the queue of pieces.
    fn pieces(
        &self,
        folder: &NewFolder,
        sink: &Sink<'_>,
        todo: &[usize],
        globals: &HashMap<String, f32>,
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<(), ExportError> {
        let pieces = self.cut(todo);
        let mut left: HashMap<usize, AtomicU64> = HashMap::new();
        for piece in &pieces {
            left.entry(piece.item).or_default().fetch_add(1, Ordering::Relaxed);
        }
        let bytes = |piece: &Piece| -> u64 {
            let of_item: u64 = self.tensors[piece.item].iter().map(|tensor| tensor.bytes).sum();
            let whole = self.length(piece.item).max(1);
            (u128::from(of_item) * u128::from(piece.count) / u128::from(whole)) as u64
        };
        watch.begin("exporting", pieces.iter().map(bytes).sum(), Unit::Bytes);
        workers::work_off(&pieces, rayon::current_num_threads(), ReadBuffers::default, |buffers, _, piece| {
            stop.check()?;
            self.piece(sink, piece, globals, buffers)?;
            watch.advance(bytes(piece), &self.items[piece.item].name);
            if left[&piece.item].fetch_sub(1, Ordering::AcqRel) == 1 {
                folder.note(piece.item, &sink.digest(piece.item)?, None)?;
            }
            Ok::<_, ExportError>(())
        })?;
        Ok(())
    }
}

/// Writes what the pass over the model makes, and notes it.
struct Taker<'a> {
    draft: &'a Draft,
    folder: &'a NewFolder,
    sink: &'a Sink<'a>,
    left: &'a mut HashSet<usize>,
    outcomes: &'a mut Vec<Outcome>,
}

impl calibrated::Sink for Taker<'_> {
    fn matrix(&mut self, key: usize, rounded: Rounded, outcome: Outcome) -> Result<(), ExportError> {
        self.sink.put(key, 0, self.draft.length(key), &rounded)?;
        self.folder.note(key, &self.sink.digest(key)?, Some(&outcome))?;
        self.left.remove(&key);
        self.outcomes.push(outcome);
        Ok(())
    }

    fn vector(&mut self, weight: usize, bytes: &[u8]) -> Result<(), ExportError> {
        let is_it = |item: &Item| matches!(item.content, Content::Stored { weight: found, .. } if found == weight);
        let Some(item) = self.draft.items.iter().position(is_it) else { return Ok(()) };
        self.sink.write(item, 0, 0, bytes)?;
        self.folder.note(item, &self.sink.digest(item)?, None)?;
        self.left.remove(&item);
        Ok(())
    }
}

/// Work that `watch` may stop.
fn stoppable<T>(watch: &dyn Watch, work: impl FnOnce(&Stop) -> Result<T, ExportError>) -> Result<T, ExportError> {
    let stop = watch.stop();
    let result = work(&stop);
    let stopped = stop.end();
    watch.end();
    let done = result?;
    if stopped { Err(Interrupted.into()) } else { Ok(done) }
}
