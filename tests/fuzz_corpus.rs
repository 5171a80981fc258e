//! The fuzz targets without a fuzzer: the seeds of each, then mutations of them for LWQ_FUZZ_SECONDS (20), in an order that is
//! always the same.

// What a library of the fuzz package makes public is private in a test.
#[allow(unreachable_pub)]
#[path = "../fuzz/src/lib.rs"]
mod bodies;
mod common;
mod gguf_support;

use std::fs::File;
use std::io::{Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::random::Random;

/// Most bytes of a mutated input.
const MOST_BYTES: usize = 1 << 16;
/// What one input may take, on a machine that has other things to do as well.
const MOST_TIME: Duration = Duration::from_secs(10);
/// What one input may hold in memory.
const MOST_MEMORY: usize = 256 << 20;

/// Numbers at which fields break: signs, powers of two and their neighbours.
const INTERESTING: [i64; 20] = [
    0,
    1,
    2,
    3,
    4,
    0x20,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX,
    i64::MIN,
    -1,
    -2,
];

/// One target with the file that holds the input at work, so that it is known also after an abort.
struct Target {
    name: &'static str,
    body: fn(&[u8]),
    path: PathBuf,
    file: File,
}

impl Target {
    fn new(name: &'static str, body: fn(&[u8])) -> Target {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        let file = File::create(&path).unwrap();
        Target { name, body, path, file }
    }

    fn run(&mut self, input: &[u8]) {
        self.file.rewind().unwrap();
        self.file.write_all(input).unwrap();
        self.file.set_len(input.len() as u64).unwrap();
        let started = Instant::now();
        let (result, peak) = gguf_support::peak_bytes(|| catch_unwind(AssertUnwindSafe(|| (self.body)(input))));
        let took = started.elapsed();
        let problem = match result {
            Err(_) => "panics".to_owned(),
            Ok(()) if took > MOST_TIME => format!("takes {took:?}"),
            Ok(()) if peak > MOST_MEMORY => format!("takes {peak} bytes of memory"),
            Ok(()) => return,
        };
        let (name, path) = (self.name, self.path.display());
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!(
            "{name} {problem} on the {} bytes in {path}; keep them as fuzz/seeds/{name}/found-SOMETHING to run them \
             first, or: cargo fuzz run {name} {path}\n{hex}",
            input.len()
        );
    }

    /// The committed inputs, by name.
    fn seeds(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(self.name);
        let seeds: Vec<_> = common::files_in(&folder).iter().map(|f| std::fs::read(folder.join(f)).unwrap()).collect();
        assert!(!seeds.is_empty(), "{} is empty", folder.display());
        seeds
    }
}

fn seconds() -> f64 {
    let Some(text) = std::env::var_os("LWQ_FUZZ_SECONDS") else { return 20.0 };
    text.to_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("LWQ_FUZZ_SECONDS={text:?}: no number"))
}

#[allow(clippy::print_stderr)] // how much was tried, for those who look
fn fuzz(name: &'static str, body: fn(&[u8])) {
    let mut target = Target::new(name, body);
    let seeds = target.seeds();
    seeds.iter().for_each(|seed| target.run(seed));
    let runs = run_mutations(&mut target, &seeds, Duration::from_secs_f64(seconds()));
    eprintln!("{name}: {} seeds, {runs} mutations", seeds.len());
    std::fs::remove_file(&target.path).unwrap();
}

/// Runs mutated seeds until the time is over; gives their number.
fn run_mutations(target: &mut Target, seeds: &[Vec<u8>], time: Duration) -> u64 {
    let end = Instant::now() + time;
    let (mut random, mut runs) = (Random::new(1), 0);
    while Instant::now() < end {
        let mut input = seeds[random.below(seeds.len())].clone();
        // One change half of the time: what has many fails at the first of them.
        for _ in 0..=random.bits().leading_zeros().min(7) {
            mutate(&mut input, seeds, &mut random);
        }
        target.run(&input);
        runs += 1;
    }
    runs
}

/// Changes `input` in one place.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let rest = input.len() - at;
    match random.below(8) {
        0 => input.truncate(at),
        1 if rest > 0 => input[at] ^= 1 << random.below(8),
        2 if rest > 0 => input[at] = random.bits() as u8,
        3 | 4 => {
            let number = INTERESTING[random.below(INTERESTING.len())].wrapping_add(random.below(3) as i64 - 1);
            let width = (1 << random.below(4)).min(rest);
            let bytes = if random.below(4) == 0 { number.to_be_bytes() } else { number.to_le_bytes() };
            let from = if random.below(4) == 0 { 8 - width } else { 0 };
            input[at..at + width].copy_from_slice(&bytes[from..from + width]);
        }
        5 => {
            // Bytes repeated or of another seed.
            let source = if random.below(2) == 0 { input.clone() } else { seeds[random.below(seeds.len())].clone() };
            let part = part(&source, random);
            let replaced = if random.below(2) == 0 { part.len().min(rest) } else { 0 };
            input.splice(at..at + replaced, part.iter().copied());
        }
        6 => {
            input.drain(at..at + random.below(rest.min(64) + 1));
        }
        _ => {
            let byte = random.bits() as u8;
            input.splice(at..at, std::iter::repeat_n(byte, 1 + random.below(16)));
        }
    }
    input.truncate(MOST_BYTES);
}

/// A short run of bytes most of the time, any part else.
fn part<'a>(bytes: &'a [u8], random: &mut Random) -> &'a [u8] {
    let start = random.below(bytes.len() + 1);
    let rest = bytes.len() - start;
    let most = if random.below(4) == 0 { rest } else { rest.min(64) };
    &bytes[start..][..random.below(most + 1)]
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name), bodies::$name);
            }
        )*

        #[test]
        fn every_target_is_run() {
            let here = [$(concat!(stringify!($name), ".rs")),*];
            let targets = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
            assert_eq!(common::files_in(&targets), here);
        }
    };
}

// By name.
targets! {
    convert_checkpoint convert_safetensors convert_tokenizer_json convert_tokenizer_pair gguf_reader imatrix_dat
    imatrix_gguf tokenizer
}

#[test]
fn a_panic_is_found_and_reported_with_its_input() {
    fn planted(bytes: &[u8]) {
        assert!(!bytes.windows(2).any(|pair| pair == [0xff, 0x7f]), "planted");
    }

    let mut target = Target::new("planted", planted);
    let found = catch_unwind(AssertUnwindSafe(|| {
        run_mutations(&mut target, &[b"GGUF\x03\0\0\0".to_vec()], Duration::from_secs(60))
    }));
    let report =
        *found.expect_err("a field of two bytes is soon the largest of its kind").downcast::<String>().unwrap();
    let input = std::fs::read(&target.path).unwrap();
    assert!(catch_unwind(|| planted(&input)).is_err(), "the file holds what brings the panic");
    let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(report.starts_with("planted panics on the ") && report.ends_with(&format!("\n{hex}")), "{report}");
    std::fs::remove_file(&target.path).unwrap();
}
