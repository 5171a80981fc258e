//! What long work tells while it runs, and how it is asked to stop.
//!
//! Every verb takes a [`Watch`]. `()` is one that listens to nothing and never stops; the command line's draws bars.
//!
//! Work is reported in stages: [`Watch::begin`] names one and its size, [`Watch::advance`] counts, [`Watch::end`] closes
//! it. Stages do not nest. All methods take `&self`, because threads of one stage report side by side.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a stage counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of weights.
    Bytes,
    /// Tokens that pass through a model.
    Tokens,
    /// Millions of floating-point operations.
    Megaflop,
}

/// Follows long work and may ask it to stop.
pub trait Watch: Sync {
    /// A stage of `total` units begins.
    fn begin(&self, stage: &'static str, total: u64, unit: Unit) {
        let _ = (stage, total, unit);
    }

    /// `amount` more is done; `what` names the piece that was finished or is in work.
    fn advance(&self, amount: u64, what: &str) {
        let _ = (amount, what);
    }

    /// The stage is over.
    fn end(&self) {}

    /// Of work in several steps that knows what all of them take: how much of all is done, from 0 to 1, and how long the
    /// rest will take. It stands instead of stages; `what` names the piece in work.
    fn overall(&self, done: f64, left: Duration, what: &str) {
        let _ = (done, left, what);
    }

    /// A line for people who watch.
    fn note(&self, line: &str) {
        let _ = line;
    }

    /// A line that should be seen: the work goes on, but something is not as its user may think.
    fn warn(&self, line: &str) {
        let _ = line;
    }

    /// Asked once by each piece of work that can be stopped, when it begins. Work that was stopped keeps what its docs say,
    /// and ends with [`Interrupted`].
    fn stop(&self) -> Stop {
        Stop::never()
    }

    /// The same, asked by work that keeps nothing when it is stopped and leaves no output. The command line lets the signal
    /// end the process there.
    fn abandon(&self) -> Stop {
        self.stop()
    }
}

impl Watch for () {}

/// The way to stop a piece of work from outside: a flag that it looks at every few milliseconds.
#[derive(Clone)]
pub struct Stop {
    flag: Arc<AtomicBool>,
    on_end: fn(&AtomicBool) -> bool,
}

impl Stop {
    /// One that is never asked for.
    pub fn never() -> Stop {
        Stop::when(Arc::new(AtomicBool::new(false)))
    }

    /// Stops when somebody sets `flag`.
    pub fn when(flag: Arc<AtomicBool>) -> Stop {
        Stop { flag, on_end: |flag| flag.load(Ordering::SeqCst) }
    }

    /// As [`Stop::when`]; `on_end` is called when the work is over and nobody looks at the flag any more, and tells whether
    /// a stop was asked for.
    pub fn with_end(flag: Arc<AtomicBool>, on_end: fn(&AtomicBool) -> bool) -> Stop {
        Stop { flag, on_end }
    }

    /// True once somebody asked.
    pub fn is_requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// The flag itself, for loops that share it.
    pub(crate) fn flag(&self) -> &Arc<AtomicBool> {
        &self.flag
    }

    /// The work is over. True if a stop was asked for, also when the work came to its end before it noticed.
    pub(crate) fn end(&self) -> bool {
        (self.on_end)(&self.flag)
    }

    /// An error once somebody asked.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.is_requested() { Err(Interrupted) } else { Ok(()) }
    }
}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stop").field(&self.is_requested()).finish()
    }
}

/// Work was stopped because its [`Watch`] asked for it. Errors of verbs have it among their sources, where whoever reports
/// them can find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;
