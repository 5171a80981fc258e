//! The few things that need the operating system directly: page advice, free space, peak memory.
//!
//! Each has a harmless fallback where the system offers nothing of the kind.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;

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

/// For a program's start: lets the C library keep memory that was freed, for the next layer's buffers of the same size,
/// instead of giving it back and having the system clear it anew. Saves a forward pass of a mixture of experts a quarter of
/// its processor time. Buffers of 256 MiB and more are given back as before, and so is what is free at the end of the heap
/// beyond 1 GiB.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const LARGE: libc::c_int = 256 << 20;
        const KEPT: libc::c_int = 1 << 30;
        // SAFETY: mallopt(3) sets parameters of the allocator; where it refuses, they stay as they were.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}

/// Gives back what [`keep_freed_memory`] kept: for a step that needs much memory of another kind.
pub(crate) fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim(3) touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
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

/// CPU time of all threads of this process so far, in seconds; `None` where the system does not tell.
pub(crate) fn process_cpu_seconds() -> Option<f64> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid place for the result.
        let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
        (status == 0).then_some(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
    }
    #[cfg(not(unix))]
    None
}

/// Memory that new work may take without pushing others out, in bytes; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return memory_field("MemAvailable:");
    #[cfg(not(target_os = "linux"))]
    None
}

/// Memory of this machine in bytes; `None` where the system does not tell.
pub fn total_memory() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return memory_field("MemTotal:");
    #[cfg(not(target_os = "linux"))]
    None
}

/// A line of `/proc/meminfo`, in bytes.
#[cfg(target_os = "linux")]
fn memory_field(name: &str) -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
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
