//! How the command line follows work of the library: a bar on a terminal, plain lines when piped, nothing with `--quiet`;
//! notes, warnings, and interrupts.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Common;
use lwq::interrupt;
use lwq::progress::{Stop, Unit, Watch};

/// Time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Shows how much of a known total is done, with speed and time left.
pub struct Progress {
    shown: Shown,
}

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
}

struct Lines {
    label: &'static str,
    unit: Unit,
    total: u64,
    done: u64,
    started: Instant,
    next: Instant,
}

impl Progress {
    /// Starts at zero of `total`; `label` names the work.
    pub fn new(common: &Common, label: &'static str, total: u64, unit: Unit) -> Progress {
        let shown = if common.quiet {
            Shown::Nothing
        } else if io::stderr().is_terminal() {
            let template = match unit {
                Unit::Bytes => "{prefix} {bar:28} {percent:>3}%  {decimal_bytes_per_sec}  {eta} left  {wide_msg}",
                Unit::Tokens => "{prefix} {bar:28} {percent:>3}%  {per_sec} tokens  {eta} left  {wide_msg}",
                Unit::Megaflop => "{prefix} {bar:28} {percent:>3}%  {eta} left  {wide_msg}",
            };
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            bar.set_style(style);
            bar.set_prefix(label);
            Shown::Bar(bar)
        } else {
            let now = Instant::now();
            Shown::Lines(Mutex::new(Lines { label, unit, total, done: 0, started: now, next: now + PLAIN_INTERVAL }))
        };
        Progress { shown }
    }

    /// Adds `amount` to what is done; `what` names the piece that was finished or is in work.
    pub fn advance(&self, amount: u64, what: &str) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.inc(amount);
                bar.set_message(super::printable(what));
            }
            Shown::Lines(lines) => {
                let Ok(mut lines) = lines.lock() else { return };
                lines.done += amount;
                let now = Instant::now();
                if now >= lines.next {
                    lines.next = now + PLAIN_INTERVAL;
                    lines.print(what);
                }
            }
        }
    }

    /// Ends the display.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Lines {
    fn print(&self, what: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        let speed = self.done as f64 / seconds.max(1e-9);
        let left = (self.total.saturating_sub(self.done)) as f64 / speed.max(1e-9);
        let speed = match self.unit {
            Unit::Bytes => format!("{:.0} MB/s", speed / 1e6),
            Unit::Tokens => format!("{speed:.0} tokens/s"),
            Unit::Megaflop => format!("{:.0} Gflop/s", speed / 1e3),
        };
        let percent = 100.0 * self.done as f64 / self.total.max(1) as f64;
        let what = super::printable(what);
        let _ = writeln!(io::stderr(), "{}: {percent:.0}%, {speed}, {left:.0} s left, {what}", self.label);
    }
}

/// Follows one command.
pub struct Follow<'a> {
    common: &'a Common,
    stage: Mutex<Option<Progress>>,
    overall: Mutex<Option<Overall>>,
}

/// How far work in several steps is.
enum Overall {
    Bar(ProgressBar),
    /// When the next plain line is due.
    Lines(Instant),
}

/// Positions of the bar of several steps.
const PARTS: u64 = 1000;

impl Overall {
    fn new() -> Overall {
        if !io::stderr().is_terminal() {
            return Overall::Lines(Instant::now() + PLAIN_INTERVAL);
        }
        let style = ProgressStyle::with_template("{bar:28} {percent:>3}%  {wide_msg}");
        let bar = ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr_with_hz(8));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Overall::Bar(bar)
    }

    fn show(&mut self, done: f64, left: Duration, what: &str) {
        let (left, what) = (duration(left.as_secs_f64()), super::printable(what));
        match self {
            Overall::Bar(bar) => {
                bar.set_position((done * PARTS as f64) as u64);
                bar.set_message(format!("{left} left  {what}"));
            }
            Overall::Lines(next) => {
                let now = Instant::now();
                if now >= *next {
                    *next = now + PLAIN_INTERVAL;
                    let _ = writeln!(io::stderr(), "in all: {:.0}%, {left} left, {what}", 100.0 * done);
                }
            }
        }
    }
}

/// Seconds as people say them.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 90.0 => format!("{whole} s"),
        s if s < 5400.0 => format!("{} min", (seconds / 60.0).round()),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

impl Drop for Overall {
    fn drop(&mut self) {
        if let Overall::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

impl Common {
    /// What the command's work reports to.
    pub fn watch(&self) -> Follow<'_> {
        Follow { common: self, stage: Mutex::new(None), overall: Mutex::new(None) }
    }
}

impl Follow<'_> {
    fn set(&self, stage: Option<Progress>) {
        let mut slot = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = std::mem::replace(&mut *slot, stage) {
            last.finish();
        }
    }

    /// Prints while the bar of several steps, if there is one, is out of the way.
    fn above_the_bar(&self, print: impl FnOnce()) {
        match &*self.overall.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Overall::Bar(bar)) => bar.suspend(print),
            _ => print(),
        }
    }
}

impl Watch for Follow<'_> {
    fn begin(&self, stage: &'static str, total: u64, unit: Unit) {
        self.set(Some(Progress::new(self.common, stage, total, unit)));
    }

    fn advance(&self, amount: u64, what: &str) {
        if let Some(stage) = &*self.stage.lock().unwrap_or_else(PoisonError::into_inner) {
            stage.advance(amount, what);
        }
    }

    fn end(&self) {
        self.set(None);
    }

    fn overall(&self, done: f64, left: Duration, what: &str) {
        if !self.common.quiet {
            let mut overall = self.overall.lock().unwrap_or_else(PoisonError::into_inner);
            overall.get_or_insert_with(Overall::new).show(done, left, what);
        }
    }

    fn note(&self, line: &str) {
        self.above_the_bar(|| self.common.note(line));
    }

    fn warn(&self, line: &str) {
        self.above_the_bar(|| self.common.warn(line));
    }

    fn stop(&self) -> Stop {
        Stop::with_end(interrupt::cancel_on_interrupt(), |_| interrupt::end_on_interrupt())
    }

    fn abandon(&self) -> Stop {
        // The signal handler removes temporary files and ends the process.
        Stop::never()
    }
}
