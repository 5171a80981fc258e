//! Models side by side over one text.
//!
//! All models of a run see a group of windows before any sees the next group. Layers run one model after the other;
//! the logits of all are then compared a few rows at a time and dropped, so that a large vocabulary costs a tile of
//! logits a model and not a file.

use std::sync::Arc;

use rayon::prelude::*;

use super::divergence::TokenRouting;
use super::follow::Follow;
use super::{Divergence, EvalError, LOGITS_CUT, LogitsReader, LogitsWriter, Perplexity, ScoredToken, Windows};
use crate::model::math::log_sum_exp;
use crate::model::{ForcedRoutes, HiddenStates, Model, ModelError, NoTaps, Pass, RouteFlips, Routes, Taps, TokenGroup};
use crate::progress::Watch;

/// Tokens of a group: enough to decode the weights seldom, few enough for results at short intervals.
const GROUP_TOKENS: usize = 4096;

/// What models are compared with.
pub(crate) enum Reference<'a, 'm, 'g, 'o> {
    /// Nothing: perplexity only.
    None,
    /// A model that runs beside them. Where it has experts, those that models choose are compared with its own; with
    /// `forces` models run a second time with its experts.
    Model { pass: &'a Pass<'m, 'g, 'o>, forces: bool },
    /// Log-probabilities saved before.
    File(&'a mut LogitsReader),
}

/// What a run has found about one model.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModelScores {
    /// Sums of negative log-likelihoods.
    pub perplexity: Perplexity,
    /// The negative log-likelihoods, in nats, one a scored prediction in the order of the text.
    pub nlls: Vec<f32>,
    /// Comparison with the reference, empty without one.
    pub divergence: Divergence,
}

impl ModelScores {
    /// Adds the next predictions: with a reference `tokens` has one entry each, without it is empty.
    pub(super) fn extend(&mut self, nlls: &[f32], tokens: &[ScoredToken]) {
        nlls.iter().for_each(|&nll| self.perplexity.add(f64::from(nll)));
        self.nlls.extend(nlls);
        self.divergence.tokens.extend(tokens);
    }

    /// True if the comparison holds what `needs` asks for.
    pub(super) fn covers(&self, needs: RoutingNeeds) -> bool {
        let forced = || self.divergence.tokens.iter().all(|token| !token.routing.forced_kld.is_nan());
        match needs {
            RoutingNeeds::Nothing => true,
            RoutingNeeds::Flips => self.divergence.routed_layers > 0,
            RoutingNeeds::Forced => self.divergence.routed_layers > 0 && forced(),
        }
    }

    /// Mean divergence of every window, nats a token.
    pub(crate) fn window_means(&self, scored_per_window: usize) -> Vec<f64> {
        let windows = self.divergence.tokens.chunks_exact(scored_per_window.max(1));
        windows.map(|w| w.iter().map(|t| f64::from(t.kld)).sum::<f64>() / w.len() as f64).collect()
    }
}

/// What a run has found so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Evaluation {
    /// Windows scored.
    pub windows: usize,
    /// Predictions scored in each window.
    pub scored_per_window: usize,
    /// Perplexity of a reference model, also of one read from a file.
    pub reference: Option<Perplexity>,
    /// One entry a model, in the order given.
    pub models: Vec<ModelScores>,
    /// False when the run was stopped before the last window.
    pub complete: bool,
    /// True when it was cancelled from outside.
    pub interrupted: bool,
    /// True when a sequential test has found the best model to differ from every other.
    pub decided: bool,
    /// Tokens that passed through a model, summed over models.
    pub tokens_run: usize,
}

impl Evaluation {
    /// Mean divergence of every window of every model.
    pub(super) fn window_means(&self) -> Vec<Vec<f64>> {
        self.models.iter().map(|model| model.window_means(self.scored_per_window)).collect()
    }
}

/// What a run compares of the choice of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RoutingNeeds {
    Nothing,
    Flips,
    Forced,
}

impl RoutingNeeds {
    fn of(reference: &Reference<'_, '_, '_, '_>, model: &Pass<'_, '_, '_>) -> RoutingNeeds {
        let Reference::Model { pass, forces } = reference else { return RoutingNeeds::Nothing };
        match routes_compare(pass.model(), model.model()) {
            true if *forces => RoutingNeeds::Forced,
            true => RoutingNeeds::Flips,
            false => RoutingNeeds::Nothing,
        }
    }
}

/// True if the experts that `model` chooses can be compared with those of `base`.
pub(super) fn routes_compare(base: &Model<'_>, model: &Model<'_>) -> bool {
    base.experts().is_some() && base.experts() == model.experts() && base.n_layer() == model.n_layer()
}

/// Perplexity on windows of tokens that are cut already. `memory` bounds the activations in bytes (default: half of what is
/// free). A cancelled pass gives what was scored before.
///
/// # Errors
/// Those of the forward pass.
pub fn perplexity_of(
    pass: &Pass<'_, '_, '_>,
    windows: &Windows,
    memory: Option<u64>,
    watch: &dyn Watch,
) -> Result<Perplexity, EvalError> {
    let follow = Follow::new(watch, windows, 1, None, None);
    let result = evaluate(Reference::None, &[pass], windows, memory, None, follow)?;
    Ok(result.models.first().map_or_else(Perplexity::default, |scores| scores.perplexity))
}

/// Scores `models` on `windows`, against `reference` if there is one. `memory` bounds the activations in bytes
/// (default: half of what is free). `save` receives the reference's distributions, or those of the first model when there is
/// no reference model. `follow` may know what a run before has found about the first windows, which are not run again. A run
/// that reads or saves logits passes over the whole text and leaves that aside.
///
/// A cancelled pass ends the run: what was scored before is returned.
///
/// # Errors
/// Those of the forward passes, which name the model by its number from 1, the reference not at all; vocabularies of
/// different sizes; a damaged logits file; a full disk.
pub(crate) fn evaluate(
    reference: Reference<'_, '_, '_, '_>,
    models: &[&Pass<'_, '_, '_>],
    windows: &Windows,
    memory: Option<u64>,
    save: Option<&mut LogitsWriter>,
    mut follow: Follow<'_>,
) -> Result<Evaluation, EvalError> {
    let result = score_windows(reference, models, windows, memory, save, &mut follow);
    follow.end();
    let result = result?;
    follow.finish(&result)?;
    Ok(result)
}

fn score_windows(
    mut reference: Reference<'_, '_, '_, '_>,
    models: &[&Pass<'_, '_, '_>],
    windows: &Windows,
    memory: Option<u64>,
    mut save: Option<&mut LogitsWriter>,
    follow: &mut Follow<'_>,
) -> Result<Evaluation, EvalError> {
    let n_vocab = check_vocabularies(&reference, models)?;
    let n_ctx = windows.n_ctx();
    let whole = save.is_some() || matches!(reference, Reference::File(_));
    let earlier = if whole { Vec::new() } else { follow.earlier() };
    let mut result = Evaluation {
        scored_per_window: windows.scored_per_window(),
        reference: (!matches!(reference, Reference::None)).then(Perplexity::default),
        models: vec![ModelScores::default(); models.len()],
        ..Evaluation::default()
    };
    let Some(first_model) = models.first() else {
        return Ok(result);
    };
    let shared = memory.map(|bytes| bytes / (models.len() as u64 + 1));
    let affordable = first_model.model().group_tokens(shared, n_ctx);
    let per_group = (affordable.min(GROUP_TOKENS) / n_ctx).max(1);

    let scored = windows.scored_per_window();
    let mut first = 0;
    while first < windows.len() {
        let end = windows.len().min(first + per_group);
        let known: Vec<Option<GroupScores>> = (0..models.len())
            .map(|index| {
                let needs = RoutingNeeds::of(&reference, models[index]);
                let earlier = earlier.get(index).filter(|earlier| earlier.covers(needs))?;
                GroupScores::known(earlier, first * scored..end * scored, &reference)
            })
            .collect();
        let to_run: Vec<(usize, &Pass<'_, '_, '_>)> =
            models.iter().copied().enumerate().filter(|(index, _)| known[*index].is_none()).collect();
        let mut found = Vec::new();
        if !to_run.is_empty() {
            match score_group(&mut reference, &to_run, windows, first..end, n_vocab, save.as_deref_mut(), follow) {
                Ok(scores) => found = scores,
                Err(error) if error.is_cancelled() => {
                    result.interrupted = true;
                    return Ok(result);
                }
                Err(error) => return Err(error),
            }
            let forced =
                |(_, pass): &&(usize, &Pass<'_, '_, '_>)| RoutingNeeds::of(&reference, pass) == RoutingNeeds::Forced;
            let again = to_run.iter().filter(forced).count();
            let passes = to_run.len() + again + usize::from(matches!(reference, Reference::Model { .. }));
            result.tokens_run += passes * (end - first) * n_ctx;
        }
        let mut found = found.into_iter();
        for (index, (total, known)) in result.models.iter_mut().zip(known).enumerate() {
            let Some(part) = known.or_else(|| found.next()) else { continue };
            total.extend(&part.nlls, &part.tokens);
            total.divergence.routed_layers = part.routed_layers;
            if let (0, Some(reference)) = (index, &mut result.reference) {
                part.tokens.iter().for_each(|token| reference.add(f64::from(token.nll_base)));
            }
        }
        result.windows = end;
        first = end;
        result.complete = end == windows.len();
        if follow.scored(&mut result).is_break() {
            break;
        }
    }
    Ok(result)
}

fn check_vocabularies(reference: &Reference<'_, '_, '_, '_>, models: &[&Pass<'_, '_, '_>]) -> Result<usize, EvalError> {
    let sizes = models.iter().map(|pass| pass.model().n_vocab());
    let expected = match reference {
        Reference::None => models.first().map_or(0, |pass| pass.model().n_vocab()),
        Reference::Model { pass, .. } => pass.model().n_vocab(),
        Reference::File(reader) => reader.n_vocab(),
    };
    for (index, found) in sizes.enumerate() {
        if found != expected {
            return Err(EvalError::VocabularySize { model: name(index), found, expected });
        }
    }
    Ok(expected)
}

fn name(index: usize) -> String {
    format!("model {}", index + 1)
}

/// One model's part of a group.
#[derive(Default)]
struct GroupScores {
    nlls: Vec<f32>,
    /// Empty without a reference.
    tokens: Vec<ScoredToken>,
    /// Layers whose experts were compared.
    routed_layers: usize,
}

impl GroupScores {
    /// The predictions `range` of an earlier run, if it got that far.
    fn known(
        earlier: &ModelScores,
        range: std::ops::Range<usize>,
        reference: &Reference<'_, '_, '_, '_>,
    ) -> Option<GroupScores> {
        let nlls = earlier.nlls.get(range.clone())?.to_vec();
        let tokens = match reference {
            Reference::None => Vec::new(),
            _ => earlier.divergence.tokens.get(range)?.to_vec(),
        };
        Some(GroupScores { nlls, tokens, routed_layers: earlier.divergence.routed_layers })
    }
}

/// Scores the windows `range` with the given models, which come with their place among all models of the run.
fn score_group(
    reference: &mut Reference<'_, '_, '_, '_>,
    models: &[(usize, &Pass<'_, '_, '_>)],
    windows: &Windows,
    range: std::ops::Range<usize>,
    n_vocab: usize,
    mut save: Option<&mut LogitsWriter>,
    follow: &Follow<'_>,
) -> Result<Vec<GroupScores>, EvalError> {
    let n_ctx = windows.n_ctx();
    let sequences = range.clone().map(|index| windows.sequence(index));
    let group = Arc::new(TokenGroup::from_sequences(sequences).with_context(n_ctx));
    let run = |pass: &Pass<'_, '_, '_>, taps: &mut dyn Taps| -> Result<HiddenStates, ModelError> {
        let mut hidden = pass.embed(group.clone())?;
        let layers = pass.model().n_layer();
        let mut reported = 0;
        while hidden.next_layer() < layers {
            pass.run_layer(&mut hidden, taps)?;
            let done = group.len() * hidden.next_layer() / layers;
            follow.advanced(done - reported);
            reported = done;
        }
        Ok(hidden)
    };
    let of_model =
        |index: usize| move |source: ModelError| EvalError::OneModel { model: name(index), source: source.into() };
    let mut routes = Routes::default();
    let base_hidden = match reference {
        Reference::Model { pass, .. } => Some(run(pass, &mut routes)?),
        _ => None,
    };
    let mut hidden = Vec::with_capacity(models.len());
    let mut forced_hidden = Vec::with_capacity(models.len());
    let mut flips = Vec::with_capacity(models.len());
    for (index, pass) in models {
        let needs = RoutingNeeds::of(reference, pass);
        if needs == RoutingNeeds::Nothing {
            hidden.push(run(pass, &mut NoTaps).map_err(of_model(*index))?);
            flips.push(Vec::new());
        } else {
            let mut compared = RouteFlips::new(&routes, group.len());
            hidden.push(run(pass, &mut compared).map_err(of_model(*index))?);
            flips.push(compared.flips().to_vec());
        }
        let forced = (needs == RoutingNeeds::Forced).then(|| run(pass, &mut ForcedRoutes(&routes)));
        forced_hidden.push(forced.transpose().map_err(of_model(*index))?);
    }

    // Rows of the group and the tokens that should follow them.
    let rows: Vec<(usize, u32)> = range
        .clone()
        .flat_map(|index| windows.scored().map(move |position| (index, position)))
        .map(|(index, position)| ((index - range.start) * n_ctx + position, windows.target(index, position)))
        .collect();
    let tile_rows = models.first().map_or(1, |(_, pass)| pass.logits_tile_rows()).min(rows.len().max(1));
    let mut base = vec![0.0f32; if matches!(reference, Reference::None) { 0 } else { tile_rows * n_vocab }];
    let mut logits = vec![0.0f32; tile_rows * n_vocab];
    let mut result: Vec<GroupScores> = Vec::new();
    result.resize_with(models.len(), GroupScores::default);
    for tile in rows.chunks(tile_rows) {
        let places: Vec<usize> = tile.iter().map(|(row, _)| *row).collect();
        let size = tile.len() * n_vocab;
        // Log-sum-exp of the reference's rows; none when there is no reference. A file holds log-probabilities.
        let (base_lse, cut): (Option<Vec<f64>>, f32) = match reference {
            Reference::None => (None, 0.0),
            Reference::Model { pass, .. } => {
                let base = &mut base[..size];
                if let Some(hidden) = &base_hidden {
                    pass.logits_into(hidden, &places, base, &mut NoTaps)?;
                }
                (Some(base.par_chunks_exact(n_vocab).map(log_sum_exp).collect()), f32::NEG_INFINITY)
            }
            Reference::File(reader) => {
                reader.read_rows(tile.len(), &mut base[..size])?;
                (Some(vec![0.0; tile.len()]), -LOGITS_CUT)
            }
        };
        let base_rows = &base[..if base_lse.is_some() { size } else { 0 }];
        if let (Reference::Model { .. }, Some(writer)) = (&*reference, save.as_deref_mut()) {
            writer.add_rows(base_rows)?;
        }
        for (at, (index, pass)) in models.iter().enumerate() {
            let logits = &mut logits[..size];
            pass.logits_into(&hidden[at], &places, logits, &mut NoTaps).map_err(of_model(*index))?;
            if *index == 0
                && !matches!(reference, Reference::Model { .. })
                && let Some(writer) = save.as_deref_mut()
            {
                writer.add_rows(logits)?;
            }
            let scores = &mut result[at];
            let rows = tile.par_iter().zip(logits.par_chunks_exact(n_vocab));
            match &base_lse {
                None => {
                    let nlls =
                        rows.map(|((_, target), row)| (log_sum_exp(row) - f64::from(row[*target as usize])) as f32);
                    scores.nlls.extend(nlls.collect::<Vec<f32>>());
                }
                Some(base_lse) => {
                    let compare = |logits: &[f32]| -> Vec<ScoredToken> {
                        let rows = tile.par_iter().zip(logits.par_chunks_exact(n_vocab));
                        let pairs = rows.zip(base_rows.par_chunks_exact(n_vocab).zip(base_lse));
                        let compared = pairs.map(|(((_, target), row), (base, lse))| {
                            ScoredToken::compare(base, *lse, row, *target as usize, cut)
                        });
                        compared.collect()
                    };
                    let mut tokens = compare(logits);
                    if !flips[at].is_empty() {
                        let routing = |&row: &usize| TokenRouting { flips: flips[at][row], forced_kld: f32::NAN };
                        tokens.iter_mut().zip(&places).for_each(|(token, row)| token.routing = routing(row));
                        scores.routed_layers = routes.n_layers();
                    }
                    if let Some(hidden) = &forced_hidden[at] {
                        pass.logits_into(hidden, &places, logits, &mut NoTaps).map_err(of_model(*index))?;
                        for (token, forced) in tokens.iter_mut().zip(compare(logits)) {
                            token.routing.forced_kld = forced.kld;
                        }
                    }
                    scores.nlls.extend(tokens.iter().map(|t| t.nll));
                    scores.tokens.extend(tokens);
                }
            }
        }
    }
    models.iter().for_each(|(_, pass)| pass.model().release_output());
    if let Reference::Model { pass, .. } = reference {
        pass.model().release_output();
    }
    Ok(result)
}
