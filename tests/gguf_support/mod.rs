//! What the tests of broken GGUF files share: opening with a watch on time and memory, and checking the message.
#![allow(dead_code)] // each test binary uses its own part

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use lwq::gguf::{Gguf, GgufError};

/// Counts the bytes that the calling thread holds, so that tests can run side by side.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // Fails only while a thread is being torn down, where nothing is measured.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `work` had allocated at its worst moment, beyond what was held before.
pub(crate) fn peak_bytes<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, (PEAK.get() - before).max(0) as usize)
}

/// Generous, since machines are shared; what is caught are hangs and quadratic loops.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Opens a file; fails the test if that takes long or allocates out of proportion to the file's size.
pub(crate) fn open_watched(path: &Path, file_bytes: u64) -> Result<Gguf, GgufError> {
    let started = Instant::now();
    let (result, peak) = peak_bytes(|| Gguf::open(path));
    let allowed = 64 * 1024 + usize::try_from(file_bytes).unwrap_or(usize::MAX).saturating_mul(16);
    assert!(peak <= allowed.min(1 << 30), "{}: {peak} bytes allocated for {file_bytes} in the file", path.display());
    assert!(started.elapsed() < TIME_LIMIT, "{}: took {:?}", path.display(), started.elapsed());
    result
}

/// Checks that a message is one line, names the file, says what to do, and holds all `parts`.
pub(crate) fn check_message(error: &GgufError, file: &str, parts: &[&str]) {
    let message = error.to_string();
    assert!(!message.chars().any(char::is_control), "not one clean line: {message:?}");
    assert!(message.len() < 1000, "too long: {message}");
    assert!(message.contains(file), "{file} is not named: {message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert!(message.contains("; "), "no advice: {message}");
}

/// Writes `bytes` to a file, opens it and checks that it is refused with a message that holds all `parts`.
pub(crate) fn refused(bytes: &[u8], parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    std::fs::write(&path, bytes).unwrap();
    match open_watched(&path, bytes.len() as u64) {
        Ok(_) => panic!("accepted; expected an error with {parts:?}"),
        Err(error) => check_message(&error, "hostile.gguf", parts),
    }
}

/// Opens `bytes` that are sound.
pub(crate) fn accepted(bytes: Vec<u8>) -> Gguf {
    Gguf::from_bytes(bytes).unwrap_or_else(|error| panic!("{error}"))
}
