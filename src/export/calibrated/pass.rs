//! The pass over the layers, which rounds what it shows.

use std::collections::{HashMap, HashSet};

use super::matrix::MatrixJob;
use super::model::Converted;
use super::norms::{self, Norm};
use super::{Calibrated, Job, Method, Sink};
use crate::convert::places::Place;
use crate::export::ExportError;
use crate::moments::{Calibration, CalibrationOptions, Input, Visitor, has_input, has_states};
use crate::progress::{Interrupted, Stop, Unit, Watch};
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
    let sampled = if request.smooths { norms::SAMPLED_INPUTS } else { 0 };
    let options = CalibrationOptions { raw, descending, sampled, ..request.options.clone() };
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
    let stop = watch.stop();
    let stream = calibration.stream(request.work, stop.clone())?;
    let steps = stream.steps();
    let first = first_step(request, &by_tensor, steps, output);
    if first > 0 {
        watch.note(&going_on(first, steps, "steps"));
    }
    let norms = if request.smooths { norms::find(converted, &by_tensor) } else { HashMap::new() };
    let mut rounder =
        Rounder { request, converted, norms, by_tensor, left, decoded: Vec::new(), sink, stop: stop.clone() };
    watch.begin("rounding", stream.total_work(first, &rounder), Unit::Megaflop);
    let result = stream.run(first, &mut rounder, watch);
    watch.end();
    let stopped = stop.end();
    result?;
    if stopped {
        return Err(Interrupted.into());
    }
    let mut left: Vec<usize> = rounder.left.into_iter().collect();
    left.sort_unstable();
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

/// The step to begin with: one that hidden states lie ready for, with nothing left to do before it.
fn first_step(
    request: &Calibrated<'_>,
    by_tensor: &HashMap<String, Vec<(&Job, Place)>>,
    steps: usize,
    output: &str,
) -> usize {
    let unfinished = by_tensor.iter().filter(|(_, jobs)| jobs.iter().any(|(job, _)| !request.done.contains(&job.key)));
    let least = unfinished.map(|(tensor, _)| step_of(tensor, steps, output)).min().unwrap_or(0);
    let corrected = request.options.corrected;
    (1..=least.min(steps - 1)).rev().find(|step| has_states(request.work, *step, corrected)).unwrap_or(0)
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
    stop: Stop,
}

impl Visitor for Rounder<'_, '_> {
    type Error = ExportError;

    fn roundings(&self, tensor: &str, _step: usize) -> usize {
        // Also of a step of which a run before had done a part: what is chosen for an input depends on all that share it.
        usize::from(self.by_tensor.contains_key(tensor))
    }

    fn column_order(&self, tensor: &str) -> Option<Vec<usize>> {
        self.by_tensor.get(tensor)?.first()?.1.order.clone()
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
            let Some(jobs) = self.by_tensor.get(tensor) else { continue };
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
        Ok(())
    }

    fn rounded(&mut self, tensor: &str) -> Option<Vec<f32>> {
        let jobs = self.by_tensor.get(tensor)?;
        let is_of = |decoded: &&(&Job, Vec<f32>)| jobs.iter().any(|(job, _)| job.key == decoded.0.key);
        let matrices = self.decoded.iter().filter(is_of).map(|(job, values)| (&job.matrix, values.as_slice()));
        self.converted.matrix_of(tensor, &matrices.collect::<Vec<_>>())
    }

    fn done(&mut self, _step: usize) -> Result<(), ExportError> {
        Ok(())
    }
}
