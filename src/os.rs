//! The few things that need the operating system directly: page advice, free space, peak memory, signals.
//!
//! Each has a harmless fallback where the system offers nothing of the kind.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;
#[cfg(unix)]
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that an ordinary user may still write to the file system of `folder`; `None` if unknown.
pub fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(folder).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// True if files should be made in `folder`: it may be written to, and is no snapshot in the cache of the Hugging Face hub,
/// where files of others do not belong.
pub fn is_writable(folder: &Path) -> bool {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let names: Vec<_> = absolute.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    let in_cache = names.windows(2).any(|pair| pair[0].starts_with("models--") && pair[1] == "snapshots");
    // The mode counts for the superuser too, who could write everywhere.
    let read_only = std::fs::metadata(folder).is_ok_and(|found| found.permissions().readonly());
    #[cfg(unix)]
    let allowed = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok();
    #[cfg(not(unix))]
    let allowed = true;
    allowed && !read_only && !in_cache
}

/// Reserves `bytes` for `file` where the file system can, and sets its length.
///
/// # Errors
/// When the space is not there.
pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if bytes > 0 {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::NOSPC | rustix::io::Errno::FBIG | rustix::io::Errno::DQUOT) => {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            Err(_) => {}
        }
    }
    file.set_len(bytes)
}

/// Writes all of `data` at `offset` without moving a shared file position.
///
/// # Errors
/// Those of the file system.
pub fn write_all_at(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, data, offset);
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt;
        let mut done = 0;
        while done < data.len() {
            match file.seek_write(&data[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}

/// Fills `out` with the bytes at `offset` without moving a shared file position.
///
/// # Errors
/// Those of the file system; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
pub fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, out, offset);
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt;
        let mut done = 0;
        while done < out.len() {
            match file.seek_read(&mut out[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}

/// Asks the system to start bringing what was written to the disk, without waiting for it. No effect where the system
/// cannot be asked.
pub fn start_writeback(file: &File) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open; a length of zero means up to the end. The outcome does not matter: errors of
        // the disk are reported by the sync at the end.
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

/// True if the page of a file mapping that holds `byte` is in memory, as far as the system tells.
pub(crate) fn is_resident(byte: &u8) -> bool {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: sysconf(3) has no requirements.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let Some(page) = usize::try_from(page).ok().filter(|page| page.is_power_of_two()) else { return false };
        let address = std::ptr::from_ref(byte).addr() & !(page - 1);
        let mut resident = 0u8;
        // SAFETY: mincore(2) reads no memory at the address, which lies in a page of this process, and writes one byte.
        let status = unsafe { libc::mincore(std::ptr::without_provenance_mut(address), 1, &mut resident) };
        status == 0 && resident & 1 == 1
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = byte;
        false
    }
}

/// Peak resident memory of this process in bytes, file mappings included; `None` where the system does not tell.
pub fn peak_memory() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Memory that new work may take without pushing others out, in bytes; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let info = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Columns of the terminal on stdout; `None` if there is none or it does not tell.
pub fn terminal_width() -> Option<usize> {
    #[cfg(unix)]
    {
        // SAFETY: TIOCGWINSZ fills a winsize, of which all-zero bytes are a valid value.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a live winsize, as the request wants.
        let status = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) };
        (status == 0 && size.ws_col > 0).then(|| size.ws_col.into())
    }
    #[cfg(not(unix))]
    {
        None
    }
}

/// True when both paths name one file, by hard link, symbolic link or spelling.
pub fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        match (std::fs::metadata(a), std::fs::metadata(b)) {
            (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
            _ => false,
        }
    }
    #[cfg(not(unix))]
    matches!((std::fs::canonicalize(a), std::fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// Removes a file; async-signal-safe on Unix.
pub(crate) fn unlink(path: &CStr) {
    #[cfg(unix)]
    // SAFETY: `path` is a valid C string; unlink(2) has no other requirement.
    unsafe {
        libc::unlink(path.as_ptr());
    }
    #[cfg(not(unix))]
    if let Ok(path) = path.to_str() {
        let _ = std::fs::remove_file(path);
    }
}

/// Makes SIGINT and SIGTERM remove temporary files and end the process (exit codes 130 and 143), and turns the
/// SIGBUS of an input that shrinks while it is mapped into one line and exit code 1. Call once, from the binary.
pub fn install_signal_handlers() {
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

/// Whether a signal only asks a run to stop.
#[cfg(unix)]
fn asks_to_stop() -> bool {
    CANCELLING.load(Ordering::SeqCst) && CANCEL.get().is_some_and(|flag| !flag.swap(true, Ordering::SeqCst))
}

#[cfg(unix)]
extern "C" fn on_signal(signal: libc::c_int) {
    if signal != libc::SIGBUS && asks_to_stop() {
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
