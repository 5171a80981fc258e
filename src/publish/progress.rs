//! How far all steps are, and how long the rest will take.
//!
//! Every stage of every step has an estimate in seconds. What a stage of some kind has really taken corrects those of its
//! kind that are still to come, and of other kinds as long as they have shown nothing of their own; the stage at work goes
//! by its own speed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::progress::{Stop, Unit, Watch};
use crate::unfinished::GOES_ON;

/// What a stage does, as far as speeds have something in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Bytes copied, hashed or compared.
    Copy,
    /// Weights encoded in blocks.
    Encode,
    /// The forward pass for the importance matrix.
    Importance,
    /// Probes.
    Probe,
    /// Rounding with feedback, and what that is measured by.
    Feedback,
    /// The forward pass of several models.
    Evaluate,
    /// Another program.
    Program,
}

/// A stage of a step and how long it is thought to take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stage {
    /// What [`Watch::begin`] calls it; empty for what reports no stage.
    pub name: &'static str,
    pub kind: Kind,
    pub seconds: f64,
}

/// A stage is judged by its own speed when it has run so long and got so far.
const OWN_SECONDS: f64 = 0.5;
const OWN_PART: f64 = 0.05;

/// Time between two reports.
const INTERVAL: Duration = Duration::from_millis(100);

struct Entry {
    step: usize,
    stage: Stage,
    done: bool,
}

struct Now {
    step: usize,
    begun: Instant,
    stage: Option<usize>,
    total: u64,
    advanced: u64,
    stage_begun: Instant,
}

struct State {
    entries: Vec<Entry>,
    now: Option<Now>,
    names: Vec<String>,
    /// Estimated and real seconds of finished stages, by kind.
    seen: HashMap<Kind, (f64, f64)>,
    started: Instant,
    last: Option<Instant>,
}

/// Follows all steps, and is the [`Watch`] that each of them reports to.
pub(super) struct Overall<'a> {
    watch: &'a dyn Watch,
    state: Mutex<State>,
}

impl<'a> Overall<'a> {
    /// Steps by name, with their stages.
    pub(super) fn new(watch: &'a dyn Watch, steps: Vec<(String, Vec<Stage>)>) -> Overall<'a> {
        let mut state = State {
            entries: Vec::new(),
            now: None,
            names: Vec::new(),
            seen: HashMap::new(),
            started: Instant::now(),
            last: None,
        };
        for (step, (name, stages)) in steps.into_iter().enumerate() {
            state.names.push(name);
            state.entries.extend(stages.into_iter().map(|stage| Entry { step, stage, done: false }));
        }
        Overall { watch, state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step begins.
    pub(super) fn begin_step(&self, step: usize) {
        let mut state = self.state();
        let now = Instant::now();
        state.now = Some(Now { step, begun: now, stage: None, total: 0, advanced: 0, stage_begun: now });
        state.last = None;
        self.tell(&mut state, "");
    }

    /// The step is over; `worked` says that it has done all of its work now, so that its time counts.
    pub(super) fn end_step(&self, worked: bool) -> f64 {
        let mut state = self.state();
        let Some(now) = state.now.take() else { return 0.0 };
        let real = now.begun.elapsed().as_secs_f64();
        let of_step = |entry: &&mut Entry| entry.step == now.step && !entry.done;
        let mut unseen: Vec<Stage> = Vec::new();
        state.entries.iter_mut().filter(of_step).for_each(|entry| {
            entry.done = true;
            unseen.push(entry.stage);
        });
        // A step that reports no stages is measured as a whole.
        let estimate: f64 = unseen.iter().map(|stage| stage.seconds).sum();
        if let (true, [stage]) = (worked && now.stage.is_none() && estimate > 0.0, unseen.as_slice()) {
            let seen = state.seen.entry(stage.kind).or_default();
            *seen = (seen.0 + estimate, seen.1 + real);
        }
        real
    }

    /// Seconds left, and the share that is done.
    fn left(state: &State) -> (f64, f64) {
        let sums = state.seen.values().fold((0.0, 0.0), |sum, seen| (sum.0 + seen.0, sum.1 + seen.1));
        let factor = |(estimate, real): (f64, f64)| if estimate > 0.0 { real / estimate } else { 1.0 };
        let own = |kind: Kind| state.seen.get(&kind).copied().map_or_else(|| factor(sums), factor);
        let mut left = 0.0;
        for (index, entry) in state.entries.iter().enumerate().filter(|(_, entry)| !entry.done) {
            let expected = entry.stage.seconds * own(entry.stage.kind);
            let running = state.now.as_ref().filter(|now| now.stage == Some(index) && now.total > 0);
            left += match running {
                Some(now) => {
                    let part = (now.advanced as f64 / now.total as f64).clamp(0.0, 1.0);
                    let spent = now.stage_begun.elapsed().as_secs_f64();
                    match part >= OWN_PART && spent >= OWN_SECONDS {
                        true => spent * (1.0 - part) / part,
                        false => expected * (1.0 - part),
                    }
                }
                None => expected,
            };
        }
        let spent = state.started.elapsed().as_secs_f64();
        (left, spent / (spent + left).max(1e-9))
    }

    fn tell(&self, state: &mut State, what: &str) {
        let now = Instant::now();
        if state.last.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            return;
        }
        state.last = Some(now);
        let (left, done) = Overall::left(state);
        let step = state.now.as_ref().map_or(0, |now| now.step);
        let name = state.names.get(step).map_or("", String::as_str);
        let line = match what {
            "" => format!("step {} of {}: {name}", step + 1, state.names.len()),
            what => format!("step {} of {}: {name}, {what}", step + 1, state.names.len()),
        };
        self.watch.overall(done, Duration::from_secs_f64(left.clamp(0.0, 1e9)), &line);
    }
}

impl Watch for Overall<'_> {
    fn begin(&self, stage: &'static str, total: u64, _unit: Unit) {
        let mut state = self.state();
        let Some(step) = state.now.as_ref().map(|now| now.step) else { return };
        let found =
            state.entries.iter().position(|entry| entry.step == step && !entry.done && entry.stage.name == stage);
        if let Some(now) = &mut state.now {
            (now.stage, now.total, now.advanced, now.stage_begun) = (found, total, 0, Instant::now());
        }
    }

    fn advance(&self, amount: u64, what: &str) {
        let mut state = self.state();
        if let Some(now) = &mut state.now {
            now.advanced = now.advanced.saturating_add(amount);
        }
        self.tell(&mut state, what);
    }

    fn end(&self) {
        let mut state = self.state();
        let Some(now) = &mut state.now else { return };
        let (index, real) = (now.stage.take(), now.stage_begun.elapsed().as_secs_f64());
        if let Some(index) = index {
            let stage = state.entries[index].stage;
            state.entries[index].done = true;
            let seen = state.seen.entry(stage.kind).or_default();
            *seen = (seen.0 + stage.seconds, seen.1 + real);
        }
    }

    fn note(&self, line: &str) {
        self.watch.note(line);
    }

    fn warn(&self, line: &str) {
        // The run says so itself, once.
        if !line.starts_with(GOES_ON) {
            self.watch.warn(line);
        }
    }

    fn stop(&self) -> Stop {
        self.watch.stop()
    }

    fn abandon(&self) -> Stop {
        self.watch.abandon()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &'static str, kind: Kind, seconds: f64) -> Stage {
        Stage { name, kind, seconds }
    }

    #[test]
    fn what_was_measured_corrects_what_is_to_come() {
        let steps = vec![
            ("a".to_owned(), vec![stage("first", Kind::Encode, 10.0)]),
            ("b".to_owned(), vec![stage("second", Kind::Encode, 10.0), stage("third", Kind::Evaluate, 10.0)]),
        ];
        let overall = Overall::new(&(), steps);
        assert!((Overall::left(&overall.state()).0 - 30.0).abs() < 1e-9);
        overall.begin_step(0);
        overall.begin("first", 100, Unit::Bytes);
        overall.end();
        // As if it had taken two seconds.
        overall.state().seen.insert(Kind::Encode, (10.0, 2.0));
        overall.end_step(true);
        // Both kinds follow what is known: the same one, and the other as long as nothing else is.
        assert!((Overall::left(&overall.state()).0 - 4.0).abs() < 1e-9);
        overall.state().seen.insert(Kind::Evaluate, (10.0, 30.0));
        assert!((Overall::left(&overall.state()).0 - 32.0).abs() < 1e-9);
    }

    #[test]
    fn a_step_that_reports_nothing_is_timed_as_a_whole() {
        let overall = Overall::new(&(), vec![("a".to_owned(), vec![stage("", Kind::Copy, 5.0)])]);
        overall.begin_step(0);
        overall.end_step(true);
        let (left, done) = Overall::left(&overall.state());
        assert!(left == 0.0 && done > 0.0);
        assert_eq!(overall.state().seen[&Kind::Copy].0, 5.0);
    }
}
