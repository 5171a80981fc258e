//! How the command line follows work of the library: bars or lines, notes, warnings, and interrupts.

use std::sync::{Mutex, PoisonError};

use super::{Common, Progress, Unit};
use lwq::os;
use lwq::progress::{Stop, Watch};

/// Follows one command.
pub struct Follow<'a> {
    common: &'a Common,
    stage: Mutex<Option<Progress>>,
}

impl Common {
    /// What the command's work reports to.
    pub fn watch(&self) -> Follow<'_> {
        Follow { common: self, stage: Mutex::new(None) }
    }
}

impl Follow<'_> {
    fn set(&self, stage: Option<Progress>) {
        let mut slot = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = std::mem::replace(&mut *slot, stage) {
            last.finish();
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

    fn note(&self, line: &str) {
        self.common.note(line);
    }

    fn warn(&self, line: &str) {
        self.common.warn(line);
    }

    fn stop(&self) -> Stop {
        Stop::with_end(os::cancel_on_interrupt(), |_| os::end_on_interrupt())
    }
}
