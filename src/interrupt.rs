//! Signals: an interrupt removes temporary files and ends the process, or asks a run to stop that can.
//!
//! Only the binary installs the handlers; a program that uses the library keeps its own and stops work through
//! [`Watch::stop`](crate::progress::Watch::stop).

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Makes SIGINT and SIGTERM remove temporary files and end the process (exit codes 130 and 143), and turns the
/// SIGBUS of an input that shrinks while it is mapped into one line and exit code 1. Call once, from the binary.
pub fn install_handlers() {
    #[cfg(unix)]
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGBUS] {
        // SAFETY: `on_signal` only calls async-signal-safe functions; the zeroed action is a valid empty one.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            // Under nohup a hangup stays ignored.
            let known = libc::sigaction(signal, std::ptr::null(), &mut action) == 0;
            if known && signal == libc::SIGHUP && action.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            action = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            // No second signal may interrupt the handler on its own thread: it would wait there for ever.
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Set by the first interrupt while [`CANCELLING`].
static CANCEL: std::sync::OnceLock<std::sync::Arc<AtomicBool>> = std::sync::OnceLock::new();

/// True while an interrupt sets [`CANCEL`] instead of ending the process.
static CANCELLING: AtomicBool = AtomicBool::new(false);

/// Makes the first SIGINT, SIGTERM or SIGHUP set the flag that is returned instead of ending the process, so that a
/// run can print what it has. The second ends it, and so does the first after [`end_on_interrupt`].
pub fn cancel_on_interrupt() -> std::sync::Arc<AtomicBool> {
    let flag = CANCEL.get_or_init(Default::default).clone();
    CANCELLING.store(true, Ordering::SeqCst);
    flag
}

/// Takes [`cancel_on_interrupt`] back: nobody looks at the flag any more. True if an interrupt has set it.
pub fn end_on_interrupt() -> bool {
    CANCELLING.store(false, Ordering::SeqCst);
    CANCEL.get().is_some_and(|flag| flag.swap(false, Ordering::SeqCst))
}

/// The signal that asked last.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The exit code of a run that an interrupt has stopped: 128 and the number of the signal.
pub fn exit_code() -> u8 {
    const SIGINT: i32 = 2;
    let signal = SIGNAL.load(Ordering::SeqCst);
    u8::try_from(128 + if signal > 0 { signal } else { SIGINT }).unwrap_or(u8::MAX)
}

/// Whether a signal only asks a run to stop.
#[cfg(unix)]
fn asks_to_stop() -> bool {
    CANCELLING.load(Ordering::SeqCst) && CANCEL.get().is_some_and(|flag| !flag.swap(true, Ordering::SeqCst))
}

#[cfg(unix)]
extern "C" fn on_signal(signal: libc::c_int) {
    if signal != libc::SIGBUS && asks_to_stop() {
        SIGNAL.store(signal, Ordering::SeqCst);
        return;
    }
    // Several threads can touch a lost page at once: one ends the process, the others must not return to the page.
    static ENDING: AtomicBool = AtomicBool::new(false);
    if ENDING.swap(true, Ordering::SeqCst) {
        loop {
            // SAFETY: pause(2) is async-signal-safe.
            unsafe { libc::pause() };
        }
    }
    crate::atomic_file::remove_temporary_files();
    let (message, code): (&[u8], _) = match signal {
        libc::SIGBUS => {
            (b"error: an input file was cut short or could not be read while in use; restore it and run again\n", 1)
        }
        _ => (b"interrupted: no output was written\n", 128 + signal),
    };
    // SAFETY: write(2) and _exit(2) are async-signal-safe; the buffer is static.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.len());
        libc::_exit(code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn an_interrupt_is_a_request_only_while_somebody_looks_at_it() {
        assert!(!asks_to_stop());
        let flag = cancel_on_interrupt();
        assert!(asks_to_stop() && flag.load(Ordering::SeqCst));
        assert!(!asks_to_stop(), "the second ends the process");
        assert!(end_on_interrupt() && !flag.load(Ordering::SeqCst));
        assert!(!asks_to_stop() && !end_on_interrupt());
    }
}
