//! The gate of the whole file: rounded with feedback against the same types rounded by search, as divergence from the
//! original on the text of the gate. Single tensors are judged by their outputs on the way; this asks what all of them
//! together do to the model's answers.

mod candidate;
mod restore;

use serde::Serialize;

pub(super) use self::candidate::{Candidate, Steps};
use self::restore::restore;
use super::QuantizeError;
use super::feedback::PartialFolder;
use crate::display::printable;
use crate::measure::{ProbeText, Prober};
use crate::model::{ForwardOptions, ModelError, NoTaps};
use crate::moments::Calibration;
use crate::progress::{Interrupted, Stop, Unit, Watch};

/// What the gate of a whole file found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WholeVerdict {
    /// Mean KL divergence of the file from the original on the text of the gate, nats a token.
    pub kld: f64,
    /// That of the same types rounded by search everywhere.
    pub search_kld: f64,
    /// Layers that keep what the search gave, because feedback in them did harm; the number behind the last one stands for
    /// the output matrix.
    pub searched_layers: Vec<usize>,
}

/// The original on the text of the gate, which any number of files are held against.
pub(super) struct WholeGate<'m, 'g> {
    calibration: &'m Calibration<'g>,
    prober: Prober<'m, 'g>,
}

impl<'m, 'g> WholeGate<'m, 'g> {
    /// Runs the original.
    ///
    /// # Errors
    /// When it cannot be run, or the run is interrupted.
    pub(super) fn new(
        calibration: &'m Calibration<'g>,
        stop: Stop,
        watch: &dyn Watch,
    ) -> Result<WholeGate<'m, 'g>, QuantizeError> {
        let options = ForwardOptions { cancel: Some(stop.flag().clone()), ..ForwardOptions::default() };
        let text = ProbeText::of(calibration.gate());
        watch.begin("running the original", text.tokens().len() as u64, Unit::Tokens);
        // Kept logits would be most of the memory of a run; computing them again takes little beside the layers.
        let prober =
            Prober::within(calibration.model(), options, text, 0).map_err(|error| run_error(calibration, error))?;
        watch.end();
        Ok(WholeGate { calibration, prober })
    }

    /// Judges a written file. `folder` keeps the divergences of an interrupted run.
    ///
    /// # Errors
    /// When a tensor cannot be read, a divergence not be kept, or the run is interrupted.
    pub(super) fn judge(
        &self,
        candidate: &Candidate<'_>,
        folder: &PartialFolder,
        stop: &Stop,
        watch: &dyn Watch,
    ) -> Result<WholeVerdict, QuantizeError> {
        let mut known = folder.load_judged();
        let (mix, search_kld) = restore(&candidate.steps().differ(), |searched| {
            if let Some((_, kld)) = known.iter().find(|(known, _)| known == searched) {
                return Ok(*kld);
            }
            stop.check()?;
            let run = self.divergence(candidate, searched, watch);
            let kld = run.map_err(|error| run_error(self.calibration, error))?;
            known.push((searched.to_vec(), kld));
            folder.save_judged(&known).map_err(QuantizeError::Unfinished)?;
            Ok::<f64, QuantizeError>(kld)
        })?;
        let searched = mix.searched.iter().enumerate().filter(|(_, searched)| **searched);
        Ok(WholeVerdict { kld: mix.kld, search_kld, searched_layers: searched.map(|(layer, _)| layer).collect() })
    }

    fn tokens(&self) -> u64 {
        self.prober.text().tokens().len() as u64
    }

    /// Runs the file with some steps rounded by search, a layer at a time, so that no more of it is in memory.
    fn divergence(&self, candidate: &Candidate<'_>, searched: &[bool], watch: &dyn Watch) -> Result<f64, ModelError> {
        let outside = self.prober.pass(candidate.overrides(None, searched))?;
        let mut states = self.prober.embed(&outside)?;
        let layers = self.calibration.model().n_layer();
        watch.begin("judging the whole", self.tokens(), Unit::Tokens);
        let tokens_until = |layer: usize| self.tokens() * layer as u64 / layers as u64;
        for layer in 0..layers {
            let pass = self.prober.pass(candidate.overrides(Some(layer), searched))?;
            pass.run_layer(&mut states, &mut NoTaps)?;
            candidate.release(layer);
            watch.advance(tokens_until(layer + 1) - tokens_until(layer), &format!("layer {} of {layers}", layer + 1));
        }
        let result = self.prober.score(&outside, states)?;
        watch.end();
        Ok(result.mean())
    }
}

fn run_error(calibration: &Calibration<'_>, error: ModelError) -> QuantizeError {
    match error {
        ModelError::Interrupted => Interrupted.into(),
        source => {
            QuantizeError::WholeGate { file: printable(calibration.model().gguf().label()), source: Box::new(source) }
        }
    }
}
