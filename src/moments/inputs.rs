//! Second moments of the inputs of one layer.

use super::{Damping, FactorOrder, MomentsError, StreamSettings};
use crate::compute::Precision;
use crate::model::{ModelError, TapInput, Taps};
use crate::rounding::gptq::{Correction, Factor, FeedbackError, InputRows, JudgedInputs, SecondMoment, choose_damping};

/// Fewer tokens than this say nothing about an input.
const LEAST_TOKENS: u64 = 32;

/// Tokens that the mean of all experts counts as in the moment of each, as a multiple of the width: an expert that saw
/// many more has its own, one that saw few has the mean.
const SHRINKAGE: usize = 2;

/// An input that one or several weights share, as a pass over a layer shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Weights that have it.
    pub tensors: Vec<String>,
    /// Values per token.
    pub n: usize,
    /// Matrices that have an input of their own: the number of experts, or one.
    pub matrices: usize,
    /// True if one moment serves all experts, because their own would not fit into memory.
    pub pooled: bool,
    /// The model's column for each column of the input, where it is shown in another order.
    pub order: Option<Vec<usize>>,
}

impl Shape {
    fn moment_bytes(&self) -> u64 {
        4 * (self.n as u64).saturating_mul(self.n as u64)
    }

    /// Bytes of all moments.
    fn bytes(&self) -> u64 {
        match self.matrices {
            1 => self.moment_bytes(),
            _ if self.pooled => self.moment_bytes(),
            // The mean of all experts is one more.
            matrices => self.moment_bytes().saturating_mul(matrices as u64 + 1),
        }
    }
}

/// Finds out which inputs a layer has.
pub(super) struct Discovery<'w> {
    wants: &'w dyn Fn(&str) -> bool,
    pub shapes: Vec<Shape>,
}

impl<'w> Discovery<'w> {
    pub(super) fn new(wants: &'w dyn Fn(&str) -> bool) -> Discovery<'w> {
        Discovery { wants, shapes: Vec::new() }
    }
}

impl Taps for Discovery<'_> {
    fn wants(&self, tensor: &str) -> bool {
        (self.wants)(tensor)
    }

    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        let tensors: Vec<String> =
            input.tensors.iter().filter(|name| (self.wants)(name)).map(|name| (*name).to_owned()).collect();
        let matrices = input.expert.map_or(1, |expert| expert.count);
        let shape = Shape { tensors, n: input.rows.width(), matrices, pooled: false, order: None };
        if !shape.tensors.is_empty() && !self.shapes.contains(&shape) {
            self.shapes.push(shape);
        }
        Ok(())
    }
}

/// Deals inputs out to passes over the layer so that the moments of each take at most `memory` bytes. Experts whose
/// own moments exceed it share one; a single moment that exceeds it gets a pass for itself.
pub(super) fn plan_passes(shapes: Vec<Shape>, memory: u64) -> Vec<Vec<Shape>> {
    let mut passes: Vec<Vec<Shape>> = Vec::new();
    let mut used = 0u64;
    for mut shape in shapes {
        shape.pooled = shape.matrices > 1 && shape.bytes() > memory;
        let bytes = shape.bytes();
        match passes.last_mut() {
            Some(last) if used.saturating_add(bytes) <= memory => {
                last.push(shape);
                used += bytes;
            }
            _ => {
                passes.push(vec![shape]);
                used = bytes;
            }
        }
    }
    passes
}

/// Of so many rows of inputs one is held out of a moment, to choose the damping by.
const HELD_OUT: usize = 16;

/// A moment of which all tokens are in but those held out.
pub(super) struct Finished {
    pub moment: SecondMoment,
    /// `[tokens, n]`.
    pub held_out: Vec<f32>,
    /// Tokens that the matrix itself saw.
    pub own_tokens: u64,
    /// Tokens behind the moment: for experts those of all of them.
    pub tokens: u64,
}

/// What the inputs of a pass are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To round by; `holds_out` says whether some rows are held out, `raw` whether long ones are added as they are.
    Rounding { holds_out: bool, raw: bool },
    /// To judge by, so many tokens.
    Judging { tokens: usize },
}

/// Moments of one input, one for each matrix.
struct Sums {
    shape: Shape,
    /// The inputs themselves, instead of moments.
    rows: Option<InputRows>,
    moments: Vec<SecondMoment>,
    /// Rows held out of each moment, `[tokens, n]`.
    held_out: Vec<Vec<f32>>,
    /// Of all experts' rows.
    all: Option<SecondMoment>,
}

impl Sums {
    fn new(shape: &Shape, precision: Precision, purpose: Purpose) -> Result<Sums, MomentsError> {
        // From half the width on it takes longer to judge by rows than by their moment.
        let by_rows = match purpose {
            Purpose::Judging { tokens } => shape.matrices == 1 && 2 * tokens <= shape.n,
            Purpose::Rounding { .. } => false,
        };
        let rows = by_rows.then(|| InputRows::new(shape.n));
        let own = match shape {
            _ if by_rows => 0,
            Shape { pooled: true, .. } => 1,
            Shape { matrices, .. } => *matrices,
        };
        let raw = matches!(purpose, Purpose::Rounding { raw: true, .. });
        let empty = || {
            let moment = SecondMoment::with_precision(shape.n, precision)?;
            Ok::<_, MomentsError>(if raw { moment.uncapped() } else { moment })
        };
        let moments = (0..own).map(|_| empty()).collect::<Result<_, _>>()?;
        let all = (own > 1).then(empty).transpose()?;
        Ok(Sums { shape: shape.clone(), rows, moments, held_out: vec![Vec::new(); own], all })
    }

    /// The moments, those of experts drawn towards the mean of all.
    fn finish(self) -> Vec<Finished> {
        let shrinkage = (SHRINKAGE * self.shape.n) as f64;
        let n = self.shape.n.max(1);
        let shrunk = self.moments.into_iter().zip(self.held_out).map(|(mut moment, held_out)| {
            let own_tokens = moment.tokens() + (held_out.len() / n) as u64;
            if let Some(all) = &self.all {
                moment.shrink_towards(all, shrinkage);
            }
            let tokens = self.all.as_ref().map_or(own_tokens, SecondMoment::tokens);
            Finished { moment, held_out, own_tokens, tokens }
        });
        shrunk.collect()
    }
}

/// Adds up the moments of some inputs of a layer.
pub(super) struct MomentCollector {
    sums: Vec<Sums>,
    purpose: Purpose,
}

impl MomentCollector {
    /// No inputs yet. `precision` is that of the moments' products.
    pub(super) fn new(
        shapes: &[Shape],
        precision: Precision,
        purpose: Purpose,
    ) -> Result<MomentCollector, MomentsError> {
        let sums = shapes.iter().map(|shape| Sums::new(shape, precision, purpose)).collect::<Result<_, _>>()?;
        Ok(MomentCollector { sums, purpose })
    }

    /// The finished moments of each input.
    pub(super) fn finish(self) -> impl Iterator<Item = (Shape, Vec<Finished>)> {
        self.sums.into_iter().map(|sums| (sums.shape.clone(), sums.finish()))
    }

    /// What each input is judged by, one for each matrix.
    pub(super) fn finish_judging(self) -> impl Iterator<Item = (Shape, Vec<JudgedInputs>)> {
        self.sums.into_iter().map(|mut sums| {
            let shape = sums.shape.clone();
            let judged = match sums.rows.take() {
                Some(rows) => vec![JudgedInputs::Rows(rows)],
                None => sums.finish().into_iter().map(|found| found.moment.into()).collect(),
            };
            (shape, judged)
        })
    }
}

impl Taps for MomentCollector {
    fn wants(&self, tensor: &str) -> bool {
        self.sums.iter().any(|sums| sums.shape.tensors.iter().any(|name| name == tensor))
    }

    fn input(&mut self, input: &TapInput<'_>) -> Result<(), ModelError> {
        let holds_out = matches!(self.purpose, Purpose::Rounding { holds_out: true, .. });
        let of_this = |sums: &&mut Sums| input.tensors.contains(&sums.shape.tensors[0].as_str());
        self.sums.iter_mut().filter(of_this).try_for_each(|sums| sums.add(input, holds_out))
    }
}

impl Sums {
    fn add(&mut self, input: &TapInput<'_>, holds_out: bool) -> Result<(), ModelError> {
        let sums = self;
        let matrix = if sums.shape.pooled { 0 } else { input.expert.map_or(0, |expert| expert.index) };
        let same_width = sums.shape.n == input.rows.width();
        let moved = sums.shape.order.as_ref().filter(|_| same_width).map(|order| in_order(input.rows.data(), order));
        let data = moved.as_deref().unwrap_or(input.rows.data());
        match (&mut sums.rows, sums.moments.get_mut(matrix)) {
            (Some(rows), _) if same_width => rows.accumulate(data),
            (None, Some(moment)) if same_width => {
                // The last rows of a batch, which are a sequence of their own where there are many.
                let held_out = if holds_out { input.rows.len() / HELD_OUT } else { 0 };
                let (rows, rest) = data.split_at((input.rows.len() - held_out) * sums.shape.n);
                moment.accumulate(rows, None);
                sums.held_out[matrix].extend_from_slice(rest);
            }
            _ => {
                let reason = format!("inputs of {} changed their shape between two blocks", sums.shape.tensors[0]);
                return Err(ModelError::BadInput { reason });
            }
        }
        if let Some(all) = &mut sums.all {
            all.accumulate(data, None);
        }
        Ok(())
    }
}

/// Rows with their columns in another order.
pub(super) fn in_order(rows: &[f32], order: &[usize]) -> Vec<f32> {
    rows.chunks_exact(order.len().max(1)).flat_map(|row| order.iter().map(|&at| row[at])).collect()
}

/// Why a matrix cannot be rounded with feedback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Its input was seen too rarely.
    TooFewTokens(u64),
    /// The second moment has no factor, however much it is damped.
    Factorization(String),
    /// The pass shows raw moments.
    Raw,
}

/// What is known of the input of one matrix.
pub struct InputMatrix {
    /// Its second moment on the calibration text, factored.
    pub factor: Result<Factor, Unusable>,
    /// The same with the inputs in their own order, if the pass shows both and they differ.
    pub stored: Option<Result<Factor, Unusable>>,
    /// Mean squares of the columns on that text.
    pub importance: Vec<f32>,
    /// Tokens of that text that this matrix saw.
    pub tokens: u64,
    /// Its inputs on the text of the gate, which its rounding is judged by.
    pub gate: JudgedInputs,
    /// The moment itself, if the pass shows raw ones.
    pub raw: Option<SecondMoment>,
    /// Some of the inputs themselves, evenly from the calibration text's end of each batch, if the pass shows them.
    pub sample: Option<InputRows>,
    /// What the weights to be rounded differ by from the model's own, where the inputs are those of a rounded model.
    pub correction: Option<Correction>,
}

/// An input of one or several weights.
pub struct Input {
    /// Names of the weights.
    pub tensors: Vec<String>,
    /// Values per token: the length of the weights' rows.
    pub n: usize,
    /// One for each expert, or one for all matrices.
    pub matrices: Vec<InputMatrix>,
    /// The columns are in another order than the model's.
    pub is_moved: bool,
}

impl Input {
    /// The entry of matrix `index` of a stack, or of a lone matrix.
    pub fn matrix(&self, index: usize) -> &InputMatrix {
        &self.matrices[index.min(self.matrices.len() - 1)]
    }
}

/// The calibration side of an [`InputMatrix`].
pub(super) struct Calibrated {
    pub factor: Result<Factor, Unusable>,
    pub stored: Option<Result<Factor, Unusable>>,
    pub importance: Vec<f32>,
    pub tokens: u64,
    pub raw: Option<SecondMoment>,
    pub sample: Option<InputRows>,
}

impl Calibrated {
    /// A moment as it is.
    pub(super) fn raw(found: Finished) -> Calibrated {
        let Finished { moment, own_tokens, .. } = found;
        Calibrated {
            factor: Err(Unusable::Raw),
            stored: None,
            importance: moment.diagonal(),
            tokens: own_tokens,
            raw: Some(moment),
            sample: None,
        }
    }

    /// Factors a moment, which is gone afterwards, with all tokens in. `weights` are rows `[.., n]` of a matrix that has
    /// the input, to choose the damping with.
    pub(super) fn new(found: Finished, settings: &StreamSettings, weights: &[f32]) -> Calibrated {
        let Finished { mut moment, mut held_out, own_tokens, tokens } = found;
        let sample = (settings.sampled > 0).then(|| sample_of(&held_out, moment.n(), settings.sampled));
        let damping = match settings.damping {
            Damping::Given(damping) => Ok(damping),
            Damping::Chosen => choose_damping(&moment, &mut held_out, weights),
        };
        if !held_out.is_empty() {
            moment.accumulate(&held_out, None);
        }
        drop(held_out);
        let importance = moment.diagonal();
        // A rare expert has the moment of all; only what no text reaches has too few.
        let unusable = |error: FeedbackError| Unusable::Factorization(error.to_string());
        let damping = match tokens {
            tokens if tokens < LEAST_TOKENS => Err(Unusable::TooFewTokens(tokens)),
            _ => damping.map_err(unusable),
        };
        let in_own_order = |moment: &SecondMoment| Factor::new(moment, damping.clone()?).map_err(unusable);
        let stored = (settings.order == FactorOrder::Both).then(|| in_own_order(&moment));
        let factor = match settings.order {
            FactorOrder::Stored => in_own_order(&moment),
            FactorOrder::Descending | FactorOrder::Both => {
                damping.clone().and_then(|damping| Factor::descending(moment, damping).map_err(unusable))
            }
        };
        Calibrated { factor, stored, importance, tokens: own_tokens, raw: None, sample }
    }
}

/// At most `count` of the rows `[.., n]`, evenly spread.
fn sample_of(rows: &[f32], n: usize, count: usize) -> InputRows {
    let mut sample = InputRows::new(n);
    let step = (rows.len() / n).div_ceil(count).max(1);
    let spread: Vec<f32> = rows.chunks_exact(n).step_by(step).flatten().copied().collect();
    sample.accumulate(&spread);
    sample
}

/// Puts both sides of an input together.
pub(super) fn join(shape: Shape, calibrated: Vec<Calibrated>, gate: Vec<JudgedInputs>) -> Result<Input, MomentsError> {
    if calibrated.len() != gate.len() || calibrated.is_empty() {
        return Err(MomentsError::Inputs { tensor: shape.tensors[0].clone() });
    }
    let matrices = calibrated.into_iter().zip(gate).map(|(calibrated, gate)| InputMatrix {
        factor: calibrated.factor,
        stored: calibrated.stored,
        importance: calibrated.importance,
        tokens: calibrated.tokens,
        gate,
        raw: calibrated.raw,
        sample: calibrated.sample,
        correction: None,
    });
    let is_moved = shape.order.is_some();
    Ok(Input { n: shape.n, matrices: matrices.collect(), tensors: shape.tensors, is_moved })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Expert, Rows};

    fn settings(damping: Damping) -> StreamSettings {
        StreamSettings {
            damping,
            moment_memory: 0,
            precision: Precision::Accurate,
            all_experts: false,
            raw: false,
            order: FactorOrder::Stored,
            sampled: 0,
            corrected: false,
        }
    }

    fn shape(name: &str, n: usize, matrices: usize) -> Shape {
        Shape { tensors: vec![name.to_owned()], n, matrices, pooled: false, order: None }
    }

    #[test]
    fn passes_keep_the_memory_and_experts_share_where_they_must() {
        let shapes = vec![shape("q", 10, 1), shape("o", 10, 1), shape("down", 20, 1), shape("exps", 10, 8)];
        let plan = |memory| -> Vec<Vec<(String, bool)>> {
            let passes = plan_passes(shapes.clone(), memory);
            passes.into_iter().map(|p| p.into_iter().map(|s| (s.tensors[0].clone(), s.pooled)).collect()).collect()
        };
        let named = |names: &[(&str, bool)]| names.iter().map(|(n, p)| ((*n).to_owned(), *p)).collect::<Vec<_>>();
        assert_eq!(plan(1 << 20).len(), 1);
        assert_eq!(plan(3600), [named(&[("q", false), ("o", false), ("down", false)]), named(&[("exps", false)])]);
        assert_eq!(plan(2400), [named(&[("q", false), ("o", false), ("down", false)]), named(&[("exps", true)])]);
        assert_eq!(plan(100).len(), 4, "what exceeds the limit alone still gets its pass");
    }

    #[test]
    fn shared_inputs_are_found_once() {
        let wants = |name: &str| name != "v";
        let mut discovery = Discovery::new(&wants);
        let rows = [1.0f32; 8];
        for expert in [None, None, Some(Expert { index: 1, count: 3 })] {
            let tensors: &[&str] = if expert.is_some() { &["up"] } else { &["q", "k", "v"] };
            let input = TapInput { tensors, layer: Some(0), expert, rows: Rows::new(&rows, 4) };
            discovery.input(&input).unwrap();
        }
        let names: Vec<_> = discovery.shapes.iter().map(|shape| (shape.tensors.join(" "), shape.matrices)).collect();
        assert_eq!(names, [("q k".to_owned(), 1), ("up".to_owned(), 3)]);
    }

    #[test]
    fn an_expert_that_nobody_reached_has_the_mean_of_all() {
        let mut collector = MomentCollector::new(
            &[shape("up", 4, 3)],
            Precision::Accurate,
            Purpose::Rounding { holds_out: false, raw: false },
        )
        .unwrap();
        let rows: Vec<f32> = (0..4 * 64).map(|at| ((at * 37 % 19) as f32 - 9.0) * 0.1).collect();
        let expert = Some(Expert { index: 1, count: 3 });
        collector.input(&TapInput { tensors: &["up"], layer: None, expert, rows: Rows::new(&rows, 4) }).unwrap();
        let (_, moments) = collector.finish().next().unwrap();
        let tokens: Vec<u64> = moments.iter().map(|found| found.own_tokens).collect();
        assert_eq!(tokens, [0, 64, 0]);
        for (a, b) in moments[0].moment.diagonal().iter().zip(moments[1].moment.diagonal()) {
            assert!((a - b).abs() < 1e-5 * b.abs(), "{a} {b}");
        }
        let calibrated = Calibrated::new(moments.into_iter().next().unwrap(), &settings(Damping::Chosen), &[]);
        assert!(calibrated.factor.is_ok() && calibrated.tokens == 0);
    }

    #[test]
    fn columns_come_in_the_order_that_is_asked_for() {
        let order = vec![2, 0, 3, 1];
        let rows: Vec<f32> = (0..4 * 64).map(|at| ((at * 37 % 19) as f32 - 9.0) * (1 + at % 4) as f32).collect();
        let diagonal = |order: Option<Vec<usize>>| {
            let shapes = [Shape { order, ..shape("out", 4, 1) }];
            let purpose = Purpose::Rounding { holds_out: false, raw: true };
            let mut collector = MomentCollector::new(&shapes, Precision::Accurate, purpose).unwrap();
            let input = TapInput { tensors: &["out"], layer: None, expert: None, rows: Rows::new(&rows, 4) };
            collector.input(&input).unwrap();
            collector.finish().next().unwrap().1.remove(0).moment.diagonal()
        };
        let (kept, moved) = (diagonal(None), diagonal(Some(order.clone())));
        assert_eq!(moved, order.iter().map(|&at| kept[at]).collect::<Vec<_>>());
        assert_ne!(moved, kept);
    }

    #[test]
    fn rows_are_held_out_of_each_batch_and_counted() {
        let mut collector = MomentCollector::new(
            &[shape("down", 4, 1)],
            Precision::Accurate,
            Purpose::Rounding { holds_out: true, raw: false },
        )
        .unwrap();
        let rows: Vec<f32> = (0..4 * 50).map(|at| ((at * 37 % 19) as f32 - 9.0) * 0.1).collect();
        for _ in 0..2 {
            let input = TapInput { tensors: &["down"], layer: None, expert: None, rows: Rows::new(&rows, 4) };
            collector.input(&input).unwrap();
        }
        let found = collector.finish().next().unwrap().1.remove(0);
        assert_eq!((found.moment.tokens(), found.own_tokens), (94, 100));
        assert_eq!(found.held_out, [&rows[47 * 4..], &rows[47 * 4..]].concat());
        // In the end all are in.
        let mut whole = SecondMoment::new(4).unwrap();
        whole.accumulate(&rows, None);
        for (a, b) in Calibrated::new(found, &settings(Damping::Chosen), &[]).importance.iter().zip(whole.diagonal()) {
            assert!((a - b).abs() < 1e-5 * b, "{a} {b}");
        }
    }

    #[test]
    fn few_rows_to_judge_by_are_kept_as_they_are() {
        let rows: Vec<f32> = (0..80 * 40).map(|at| ((at * 37 % 19) as f32 - 9.0) * 0.1).collect();
        let mut judged = Vec::new();
        for tokens in [40, 41] {
            let mut collector =
                MomentCollector::new(&[shape("down", 80, 1)], Precision::Accurate, Purpose::Judging { tokens })
                    .unwrap();
            let input = TapInput { tensors: &["down"], layer: None, expert: None, rows: Rows::new(&rows, 80) };
            collector.input(&input).unwrap();
            judged.push(collector.finish_judging().next().unwrap().1.remove(0));
        }
        assert!(matches!(judged[0], JudgedInputs::Rows(_)) && matches!(judged[1], JudgedInputs::Moment(_)));
        assert_eq!(judged.iter().map(JudgedInputs::tokens).collect::<Vec<_>>(), [40, 40]);
        // Experts have moments, which the mean of all is mixed into.
        let purpose = Purpose::Judging { tokens: 2 };
        let collector = MomentCollector::new(&[shape("up", 80, 3)], Precision::Accurate, purpose).unwrap();
        assert_eq!(collector.finish_judging().next().unwrap().1.len(), 3);
    }

    #[test]
    fn an_input_without_tokens_has_no_factor() {
        let found = Finished { moment: SecondMoment::new(8).unwrap(), held_out: Vec::new(), own_tokens: 0, tokens: 0 };
        let both = StreamSettings { order: FactorOrder::Both, ..settings(Damping::Given(0.02)) };
        let calibrated = Calibrated::new(found, &both, &[]);
        assert_eq!(calibrated.factor.err(), Some(Unusable::TooFewTokens(0)));
        assert_eq!(calibrated.stored.unwrap().err(), Some(Unusable::TooFewTokens(0)));
    }
}
