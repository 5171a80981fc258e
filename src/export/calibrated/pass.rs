//! The pass over the layers, which rounds what it shows.

use std::collections::{HashMap, HashSet};

use super::guests::{self, Passengers};
use super::matrix::MatrixJob;
use super::model::Converted;
use super::norms::{self, Norm};
use super::{Calibrated, Job, Method, Sink};
use crate::convert::places::Place;
use crate::export::ExportError;
use crate::gguf::Gguf;
use crate::moments::{Calibration, CalibrationOptions, FactorOrder, Input, Visitor, has_input, has_states};
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::quantize::Guests;
use crate::quantize::feedback;
use crate::recipe::roles;
use crate::rounding::grid::Grid;
use crate::unfinished::going_on;

/// See [`Calibrated::round`].
pub(super) fn run(
    request: &Calibrated<'_>,
    converted: &Converted<'_>,
    watch: &dyn Watch,
    sink: &mut dyn Sink,
) -> Result<Vec<usize>, ExportError> {
    let raw = matches!(request.method, Method::Gptq { .. });
    // NVFP4 has so many scales that choosing them on the way is worth more than the order of columns.
    let descending = request.jobs.iter().all(|job| job.layout.grid != Grid::Nvfp4);
    let order = match (descending, request.also.is_empty()) {
        (false, _) => FactorOrder::Stored,
        (true, true) => FactorOrder::Descending,
        (true, false) => FactorOrder::Both,
    };
    let sampled = if request.smooths { norms::SAMPLED_INPUTS } else { 0 };
    let options = CalibrationOptions { raw, order, sampled, ..request.options.clone() };
    let calibration = Calibration::new(&converted.gguf, &options, watch)?;
    let output = calibration.model().output_tensor();
    let mut by_tensor: HashMap<String, Vec<(&Job, Place)>> = HashMap::new();
    let mut left: HashSet<usize> = HashSet::new();
    for job in request.jobs {
        if !request.done.contains(&job.key) {
            left.insert(job.key);
        }
        match converted.place_of(&job.matrix).filter(|place| has_input(&place.tensor, output)) {
            Some(place) => by_tensor.entry(place.tensor.clone()).or_default().push((job, place)),
            None => continue,
        }
    }
    let of_files = guests::calibration(request, &converted.gguf)?;
    let drafts = guests::drafts(request, of_files.as_ref(), &converted.gguf, watch)?;
    let folders = guests::open(request, &drafts, of_files.as_ref())?;
    let outputs = folders.as_ref().map(Guests::outputs).unwrap_or_default();

    let stop = watch.stop();
    let files = Passengers::new(of_files.as_ref(), &outputs, stop.clone());
    let stream = calibration.stream(request.work, stop.clone())?;
    let steps = stream.steps();
    let done =
        [first_unfinished(request, &by_tensor, output, steps), files.as_ref().map_or(steps, Passengers::steps_done)];
    let done = done.into_iter().min().unwrap_or(0);
    let result = if done == steps {
        Ok(left)
    } else {
        let first =
            (1..=done).rev().find(|step| has_states(request.work, *step, request.options.corrected)).unwrap_or(0);
        if first > 0 {
            watch.note(&going_on(first, steps, "steps"));
        }
        let (gguf, files) = (&converted.gguf, files.as_ref().map(|files| files.rounder(first)));
        let norms = if request.smooths { norms::find(converted, &by_tensor) } else { HashMap::new() };
        let (decoded, stop) = (Vec::new(), stop.clone());
        let mut rounder = Rounder { request, converted, norms, by_tensor, left, decoded, sink, files, gguf, stop };
        watch.begin("rounding", stream.total_work(first, &rounder), Unit::Megaflop);
        let result = stream.run(first, &mut rounder, watch);
        watch.end();
        result.map(|()| rounder.left)
    };
    let stopped = stop.end();
    let mut left: Vec<usize> = result?.into_iter().collect();
    if stopped {
        return Err(Interrupted.into());
    }
    left.sort_unstable();
    for (draft, path) in &drafts {
        draft.write(path, request.replace, watch)?;
    }
    Ok(left)
}

/// The step of a tensor: its layer, or the last one.
fn step_of(tensor: &str, steps: usize, output: &str) -> usize {
    match roles::block_number(tensor).and_then(|block| usize::try_from(block).ok()) {
        Some(block) => block,
        None if tensor == output => steps - 1,
        None => 0,
    }
}

/// The first step that has a matrix which is not done; their number if there is none.
fn first_unfinished(
    request: &Calibrated<'_>,
    by_tensor: &HashMap<String, Vec<(&Job, Place)>>,
    output: &str,
    steps: usize,
) -> usize {
    let unfinished = by_tensor.iter().filter(|(_, jobs)| jobs.iter().any(|(job, _)| !request.done.contains(&job.key)));
    unfinished.map(|(tensor, _)| step_of(tensor, steps, output)).min().unwrap_or(steps)
}

/// Rounds what the pass shows.
struct Rounder<'a, 's> {
    request: &'a Calibrated<'a>,
    converted: &'a Converted<'a>,
    /// Norms that may take up factors, by the first matrix behind each.
    norms: HashMap<String, Norm>,
    by_tensor: HashMap<String, Vec<(&'a Job, Place)>>,
    /// Keys of matrices that are not done.
    left: HashSet<usize>,
    /// Matrices of the last input, as they are decoded, where what follows is rounded from that.
    decoded: Vec<(&'a Job, Vec<f32>)>,
    sink: &'s mut dyn Sink,
    /// Rounds the tensors of GGUF files.
    files: Option<feedback::Rounder<'a>>,
    gguf: &'a Gguf,
    stop: Stop,
}

impl Rounder<'_, '_> {
    fn own_roundings(&self, tensor: &str) -> usize {
        // Also of a step of which a run before had done a part: what is chosen for an input depends on all that share it.
        usize::from(self.by_tensor.contains_key(tensor))
    }

    /// The order of columns that the folder's matrix has.
    fn own_order(&self, tensor: &str) -> Option<Vec<usize>> {
        self.by_tensor.get(tensor)?.first()?.1.order.clone()
    }
}

impl Visitor for Rounder<'_, '_> {
    type Error = ExportError;

    fn roundings(&self, tensor: &str, step: usize) -> usize {
        self.own_roundings(tensor) + self.files.as_ref().map_or(0, |files| files.roundings(tensor, step))
    }

    fn column_orders(&self, tensor: &str) -> Vec<Option<Vec<usize>>> {
        match (self.own_order(tensor), &self.files) {
            (Some(order), Some(_)) => vec![Some(order), None],
            (order, _) => vec![order],
        }
    }

    fn input(&mut self, input: Input) -> Result<(), ExportError> {
        self.decoded.clear();
        // What follows depends on it.
        let keeps = self.request.options.corrected && input.matrices.len() == 1;
        let norm = input.tensors.iter().find_map(|tensor| self.norms.get(tensor));
        let smoothing = norm.map(|norm| norm.smoothing(self.converted, &self.by_tensor, &input, &self.stop));
        let smoothing = smoothing.transpose()?.flatten();
        if let Some(smoothing) = &smoothing {
            self.sink.vector(smoothing.norm, &smoothing.bytes)?;
        }
        let factors = smoothing.as_ref().map(|smoothing| smoothing.factors.as_slice());
        for tensor in &input.tensors {
            let is_own = self.own_order(tensor).is_some() == input.is_moved;
            let Some(jobs) = self.by_tensor.get(tensor).filter(|_| is_own) else { continue };
            for (job, place) in jobs {
                if !self.left.contains(&job.key) && !keeps {
                    continue;
                }
                let work = MatrixJob { request: self.request, job, factors, stop: &self.stop };
                let (rounded, outcome) = work.round(&input, place.index)?;
                if keeps {
                    self.decoded.push((job, work.decoded(&rounded)));
                }
                if self.left.remove(&job.key) {
                    self.sink.matrix(job.key, rounded, outcome)?;
                }
            }
        }
        match self.files.as_mut().filter(|_| !input.is_moved) {
            Some(files) => files.input(input).map_err(|error| guests::rounding_error(self.gguf, error)),
            None => Ok(()),
        }
    }

    fn rounded(&mut self, tensor: &str) -> Option<Vec<f32>> {
        let jobs = self.by_tensor.get(tensor)?;
        let is_of = |decoded: &&(&Job, Vec<f32>)| jobs.iter().any(|(job, _)| job.key == decoded.0.key);
        let matrices = self.decoded.iter().filter(is_of).map(|(job, values)| (&job.matrix, values.as_slice()));
        self.converted.matrix_of(tensor, &matrices.collect::<Vec<_>>())
    }

    fn done(&mut self, step: usize) -> Result<(), ExportError> {
        let Some(files) = &mut self.files else { return Ok(()) };
        files.done(step).map_err(|error| guests::rounding_error(self.gguf, error))
    }
}
