//! Progress of long work: a bar on a terminal, plain lines when piped, nothing with `--quiet`.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Common;

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

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown as MB and MB/s.
    Bytes,
    /// Tokens, shown as a count and tokens/s.
    Tokens,
    /// Millions of floating-point operations, shown as Gflop/s.
    Megaflop,
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
