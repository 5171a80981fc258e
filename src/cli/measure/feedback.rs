//! The errors that rounding with feedback leaves, as a section of a measurement.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

use super::Job;
use crate::cli::rounding::Calibration;
use crate::cli::{Common, Interrupted, Progress, Unit, count, printable};
use lwq::model::Model;
use lwq::os;
use lwq::recipe::candidates::tried_types;
use lwq::rounding::{RoundingError, Stream, has_input};
use lwq::measure::{FeedbackErrors, FeedbackMeter, FeedbackProvenance, FeedbackSubject, Sensitivity, fits_row};

/// Where hidden states lie while the errors with feedback are measured.
fn states_folder(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".states");
    PathBuf::from(name)
}

impl Job<'_> {
    /// Adds to `state` what rounding with feedback leaves, unless it is there for these texts and settings, and writes the
    /// file after each layer.
    ///
    /// # Errors
    /// When a tensor cannot be rounded or a file written, or the run is interrupted.
    pub fn measure_feedback(
        &self,
        state: &mut Sensitivity,
        model: &Model<'_>,
        calibration: &Calibration,
        common: &Common,
    ) -> Result<()> {
        let provenance = FeedbackProvenance {
            text: calibration.text.name().to_owned(),
            text_sha256: calibration.text.sha256(),
            gate_sha256: calibration.gate.sha256(),
            tokens: calibration.text.len() as u64,
            settings: calibration.words(),
        };
        let known = state.feedback.take().filter(|known| known.provenance == provenance);
        if let Some(known) = known.as_ref().filter(|known| known.is_complete()) {
            state.feedback = Some(known.clone());
            return Ok(());
        }
        let folder = states_folder(self.path);
        let failed = |error: std::io::Error| anyhow!("{}: {error}", printable(&folder.display().to_string()));
        let states_are_there = folder.is_dir();
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let (gate, settings) = (&calibration.gate, calibration.interruptible());
        let stream = Stream::new(model, &calibration.text, gate, &folder, settings)?;
        let mut errors = known.filter(|_| states_are_there).unwrap_or_default();
        (errors.provenance, errors.steps) = (provenance, stream.steps());
        if errors.steps_done > 0 {
            common.note(format!("going on after {} of {} steps of an earlier run", errors.steps_done, errors.steps));
        }
        let output = model.output_tensor();
        let reached = self.targets.iter().filter(|target| has_input(&target.tensor.name, output));
        let subjects: HashMap<String, FeedbackSubject<'_>> = reached
            .map(|target| {
                let types = tried_types().filter(|ty| fits_row(*ty, target.tensor.row_len())).collect();
                (target.tensor.name.clone(), FeedbackSubject { types, importance: target.importance })
            })
            .collect();
        common.note(format!(
            "measuring what feedback leaves, on {} tokens of {}",
            count(calibration.text.len() as u64),
            calibration.text.name()
        ));
        let units = |flop: f64| (flop / 1e6) as u64;
        let first = errors.steps_done;
        let path = self.path;
        let saved = &mut *state;
        let mut on_step = |errors: &FeedbackErrors| {
            saved.feedback = Some(errors.clone());
            saved.save(path, true).map_err(|error| RoundingError::Visitor(error.to_string()))
        };
        let mut meter =
            FeedbackMeter { gguf: self.gguf, subjects: &subjects, errors: &mut errors, on_step: &mut on_step };
        let total = units(stream.total_work(first, &meter));
        let progress = Progress::new(common, "rounding samples with feedback", total, Unit::Megaflop);
        let result = stream.run(first, &mut meter, &mut |flop, what| progress.advance(units(flop), what));
        let stopped = os::end_on_interrupt();
        if stopped || result.as_ref().is_err_and(RoundingError::is_interrupt) {
            common.warn("interrupted: the same command goes on with what was measured");
            return Err(Interrupted.into());
        }
        result?;
        progress.finish();
        std::fs::remove_dir_all(&folder).map_err(failed)
    }
}
