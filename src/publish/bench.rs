//! Tokens per second and memory by the user's own llama-bench.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::PublishError;
use crate::display::printable;

/// Prompt and generated tokens that are timed.
const PROMPT: u64 = 512;
const GENERATED: u64 = 128;

/// Characters of a program's complaint that a message shows.
const SHOWN: usize = 200;

/// What llama-bench says of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Tokens per second of a prompt of 512.
    pub pp512: f64,
    /// Its standard deviation over the repetitions.
    pub pp512_deviation: f64,
    /// Tokens per second of 128 generated ones.
    pub tg128: f64,
    /// Its standard deviation over the repetitions.
    pub tg128_deviation: f64,
    /// Most resident memory of the program, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// The program, the backend and the machine, in a line.
    pub on: String,
}

/// A test as llama-bench prints it, as far as it is looked at.
#[derive(Deserialize)]
struct Row {
    n_prompt: u64,
    n_gen: u64,
    #[serde(default)]
    n_depth: u64,
    avg_ts: f64,
    #[serde(default)]
    stddev_ts: f64,
    #[serde(default)]
    build_commit: String,
    #[serde(default)]
    build_number: u64,
    #[serde(default)]
    cpu_info: String,
    #[serde(default)]
    gpu_info: String,
    #[serde(default)]
    backends: String,
    #[serde(default)]
    n_threads: u64,
}

/// Reads what `llama-bench -o json` prints.
///
/// # Errors
/// A sentence that says what is missing.
pub fn parse(json: &str) -> Result<Speed, String> {
    let rows: Vec<Row> =
        serde_json::from_str(json.trim()).map_err(|error| format!("printed no JSON of llama-bench: {error}"))?;
    let find = |prompt: u64, generated: u64| {
        let found = rows.iter().find(|row| (row.n_prompt, row.n_gen, row.n_depth) == (prompt, generated, 0));
        let found = found.filter(|row| row.avg_ts.is_finite() && row.avg_ts > 0.0 && row.stddev_ts.is_finite());
        found.ok_or_else(|| format!("printed no test of {prompt} prompt and {generated} generated tokens"))
    };
    let (prompt, generated) = (find(PROMPT, 0)?, find(0, GENERATED)?);
    let device = [&generated.gpu_info, &generated.cpu_info].into_iter().find(|text| !text.is_empty());
    let mut on = format!("llama-bench {} ({})", generated.build_number, generated.build_commit);
    for part in [Some(&generated.backends), device].into_iter().flatten().filter(|text| !text.is_empty()) {
        on.push_str(&format!(", {part}"));
    }
    on.push_str(&format!(", {} threads", generated.n_threads));
    Ok(Speed {
        pp512: prompt.avg_ts,
        pp512_deviation: prompt.stddev_ts,
        tg128: generated.avg_ts,
        tg128_deviation: generated.stddev_ts,
        peak_memory_bytes: None,
        on: printable(&on),
    })
}

/// Checks that there is a program.
///
/// # Errors
/// When it is no file that can be run.
pub(super) fn check(program: &Path) -> Result<(), PublishError> {
    let found = std::fs::metadata(program)
        .map_err(PublishError::io(program, "cannot look at it; give the path of llama-bench"))?;
    #[cfg(unix)]
    let runs = std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o111 != 0;
    #[cfg(not(unix))]
    let runs = true;
    match found.is_file() && runs {
        true => Ok(()),
        false => Err(PublishError::file(program, "is no program; give the path of llama-bench")),
    }
}

/// Runs the program on a file.
///
/// # Errors
/// When it cannot be started, fails, or prints something else.
pub(super) fn run(program: &Path, model: &Path, threads: usize) -> Result<Speed, PublishError> {
    let refused =
        |problem: String| PublishError::file(program, format!("{problem}; leave --llama-bench out, or give another"));
    let mut child = Command::new(std::path::absolute(program).unwrap_or_else(|_| program.to_owned()))
        .arg("-m")
        .arg(model)
        .args(["-p", &PROMPT.to_string(), "-n", &GENERATED.to_string(), "-t", &threads.to_string(), "-o", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(PublishError::io(program, "cannot start it"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let complaint = std::thread::spawn(move || read(err));
    let printed = read(out);
    let (succeeded, memory) = wait(&mut child).map_err(PublishError::io(program, "cannot wait for it"))?;
    let complaint = complaint.join().unwrap_or_default();
    if !succeeded {
        let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("without a word");
        let shown: String = printable(last).chars().take(SHOWN).collect();
        return Err(refused(format!("failed on {}: {shown}", super::source::file_name(model))));
    }
    let speed = parse(&printed).map_err(refused)?;
    Ok(Speed { peak_memory_bytes: memory, ..speed })
}

/// All that a pipe gives, as text.
fn read(pipe: Option<impl std::io::Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for a program: whether it succeeded, and the most memory that was resident.
fn wait(child: &mut std::process::Child) -> std::io::Result<(bool, Option<u64>)> {
    #[cfg(target_os = "linux")]
    {
        let mut status = 0;
        // SAFETY: an all-zero rusage is a valid value, and wait4(2) fills what it is given.
        let (pid, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            let pid = loop {
                let pid = libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage);
                if pid >= 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
                    break pid;
                }
            };
            (pid, usage)
        };
        if pid < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // Linux counts kilobytes.
        let memory = u64::try_from(usage.ru_maxrss).ok().map(|kilobytes| kilobytes * 1024);
        Ok((libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, memory))
    }
    #[cfg(not(target_os = "linux"))]
    Ok((child.wait()?.success(), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_output_is_refused() {
        for text in ["", "{}", "error: no model", "[]", "[{\"n_prompt\": 512, \"n_gen\": 0, \"avg_ts\": 1.0}]"] {
            assert!(parse(text).is_err(), "{text}");
        }
        let row = |prompt: u64, generated: u64, speed: &str| {
            format!("{{\"n_prompt\": {prompt}, \"n_gen\": {generated}, \"avg_ts\": {speed}, \"stddev_ts\": 0.5}}")
        };
        let good = format!("[{}, {}]", row(512, 0, "100.5"), row(0, 128, "20"));
        let speed = parse(&good).unwrap();
        assert_eq!((speed.pp512, speed.tg128, speed.pp512_deviation), (100.5, 20.0, 0.5));
        assert!(parse(&good.replace("100.5", "-1")).is_err());
    }
}
