//! Quantizing and decoding, each type, one thread and all, against ggml in the same run.
//!
//!     LWQ_GGML_LIB=/path/to/libggml-base.so cargo bench --bench quantize [-- TYPE...]
//!
//! Both programs take turns on the same rows and the best time of each counts. Each thread has rows of its own, as many
//! as any other, and passes all of them in one call. Without LWQ_GGML_LIB only this program's speed is printed. `Mw/s` are million weights per second,
//! `GB/s` the bytes of f32 read (quantize) or written (decode). `ratio` is ggml's time divided by ours: above 1 we
//! are faster.

#![allow(clippy::print_stdout)] // figures go to stdout

#[allow(dead_code)] // what the tests use is more
#[path = "../src/testing.rs"]
mod testing;

use std::env;
use std::ffi::{c_int, c_void};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use libloading::{Library, Symbol};
use lwq::gguf::{TensorType, TypeInfo};
use lwq::quant::{self, CODECS, Codec};
use testing::Random;

const ROW_LEN: usize = 4096;
/// Most rows per pass and thread; slow encoders get fewer.
const ROWS: usize = 32;
/// What a pass should take: not much more, so that many passes fit into the budget and the best one is undisturbed, and
/// not much less, so that starting the threads does not count.
const PASS: Duration = Duration::from_millis(2);
/// Time for both sides together.
const BUDGET: Duration = Duration::from_millis(600);

type QuantizeChunk = unsafe extern "C" fn(c_int, *const f32, *mut c_void, i64, i64, i64, *const f32) -> usize;
type ToFloat = unsafe extern "C" fn(*const c_void, *mut f32, i64);

/// `ggml_type_traits` as b10605 lays it out.
#[repr(C)]
struct TypeTraits {
    name: *const u8,
    block_len: i64,
    interleave: i64,
    block_bytes: usize,
    is_quantized: bool,
    to_float: Option<ToFloat>,
    from_float_ref: *const c_void,
}

struct Ggml {
    library: Library,
}

impl Ggml {
    fn load() -> Option<Self> {
        let path = env::var_os("LWQ_GGML_LIB")?;
        // SAFETY: the user names ggml's library; its initializers only fill tables.
        let library = unsafe { Library::new(&path) }.expect("LWQ_GGML_LIB names a library that can be loaded");
        Some(Self { library })
    }

    fn quantize(&self) -> Symbol<'_, QuantizeChunk> {
        // SAFETY: the type is that of ggml.h.
        unsafe { self.library.get(b"ggml_quantize_chunk") }.expect("the library exports ggml_quantize_chunk")
    }

    fn prepare(&self, ty: TensorType) {
        // SAFETY: the type is that of ggml.h; the call builds the tables of grid types.
        unsafe {
            let init: Symbol<'_, unsafe extern "C" fn(c_int)> =
                self.library.get(b"ggml_quantize_init").expect("the library exports ggml_quantize_init");
            init(ty.0 as c_int);
        }
    }

    fn to_float(&self, ty: TensorType) -> Option<ToFloat> {
        // SAFETY: the type is that of ggml.h, and the table it points into lives as long as the library.
        unsafe {
            let traits: Symbol<'_, unsafe extern "C" fn(c_int) -> *const TypeTraits> =
                self.library.get(b"ggml_get_type_traits").expect("the library exports ggml_get_type_traits");
            (*traits(ty.0 as c_int)).to_float
        }
    }
}

/// Outputs of the threads of the pool.
struct Outputs<T>(Vec<Mutex<Vec<T>>>);

impl<T: Clone + Default + Send> Outputs<T> {
    fn new(len: usize) -> Self {
        let threads = rayon::current_num_threads();
        Self((0..threads).map(|_| Mutex::new(vec![T::default(); len / threads])).collect())
    }

    /// Seconds that `work` takes on all threads at once, of `repeat` times in a row.
    fn time(&self, repeat: u32, work: &(impl Fn(usize, &mut [T]) + Sync)) -> f64 {
        let start = Instant::now();
        rayon::broadcast(|thread| {
            let mut out = self.0[thread.index()].lock().expect("no thread panicked");
            for _ in 0..repeat {
                work(thread.index(), &mut out);
            }
        });
        start.elapsed().as_secs_f64() / f64::from(repeat)
    }

    fn take(self) -> Vec<T> {
        self.0.into_iter().flat_map(|out| out.into_inner().expect("no thread panicked")).collect()
    }
}

/// Best seconds of two sides that take turns, and what they put out. The sides are called with a thread's number and its
/// output.
fn race<T: Clone + Default + Send>(
    len: usize,
    ours: impl Fn(usize, &mut [T]) + Sync,
    theirs: Option<impl Fn(usize, &mut [T]) + Sync>,
) -> ((f64, Option<f64>), [Vec<T>; 2]) {
    let outputs = [Outputs::new(len), Outputs::new(len)];
    let repeats = |seconds: f64| (PASS.as_secs_f64() / seconds).clamp(1.0, 1e5) as u32;
    let our_repeats = repeats(outputs[0].time(1, &ours).min(outputs[0].time(1, &ours)));
    let their_repeats =
        theirs.as_ref().map_or(0, |work| repeats(outputs[1].time(1, work).min(outputs[1].time(1, work))));
    let mut best = [f64::INFINITY; 2];
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < 3 || start.elapsed() < BUDGET {
        best[0] = best[0].min(outputs[0].time(our_repeats, &ours));
        if let Some(theirs) = &theirs {
            best[1] = best[1].min(outputs[1].time(their_repeats, theirs));
        }
        rounds += 1;
    }
    ((best[0], theirs.map(|_| best[1])), outputs.map(Outputs::take))
}

#[derive(Clone, Copy)]
struct Bench<'a> {
    codec: &'static Codec,
    info: &'static TypeInfo,
    weights: &'a [f32],
    importance: &'a [f32],
    ggml: Option<&'a Ggml>,
}

impl Bench<'_> {
    /// Rows that both encoders get through in the time of a pass, an even share for each thread.
    fn fit_to_pass(mut self, threads: usize) -> Self {
        if self.codec.quantize.is_some() {
            let mut row = vec![0u8; self.row_bytes()];
            let start = Instant::now();
            self.encode(&self.weights[..ROW_LEN], Some(self.importance), &mut row);
            let ours = start.elapsed();
            if let Some(ggml) = self.ggml {
                ggml.prepare(self.info.ty);
                let (quantize, id) = (ggml.quantize(), self.info.ty.0 as c_int);
                let (weights, importance) = (self.weights.as_ptr(), self.importance.as_ptr());
                // SAFETY: one row of ROW_LEN weights, as many importance weights, and its encoded bytes.
                unsafe { quantize(id, weights, row.as_mut_ptr().cast(), 0, 1, ROW_LEN as i64, importance) };
            }
            // A pass that outlasts a time slice is never undisturbed.
            let slower = ours.max(start.elapsed() - ours);
            let rows = PASS.as_nanos() / slower.as_nanos().max(1) * threads as u128;
            let rows = (rows as usize).clamp(threads, ROWS * threads) / threads * threads;
            self.weights = &self.weights[..rows * ROW_LEN];
        }
        self
    }

    fn encode(&self, weights: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        quant::quantize_rows(self.info.ty, weights, ROW_LEN, importance, out).expect("rows of whole blocks encode");
    }

    fn rows(&self) -> usize {
        self.weights.len() / ROW_LEN
    }

    fn row_bytes(&self) -> usize {
        ROW_LEN / self.info.block_len * self.info.block_bytes
    }

    fn quantize(&self, weighted: bool) -> Option<(f64, Option<f64>)> {
        self.codec.quantize?;
        let importance = weighted.then_some(self.importance);
        let share = self.weights.len() / rayon::current_num_threads();
        let rows = |thread: usize| &self.weights[thread * share..][..share];
        let id = self.info.ty.0 as c_int;
        let their_run = self.ggml.map(|ggml| {
            ggml.prepare(self.info.ty);
            let quantize = ggml.quantize();
            move |thread: usize, out: &mut [u8]| {
                let weights = importance.map_or(std::ptr::null(), <[f32]>::as_ptr);
                let (src, count) = (rows(thread).as_ptr(), (share / ROW_LEN) as i64);
                // SAFETY: `count` rows of ROW_LEN weights, as many importance weights, and the rows' encoded bytes.
                unsafe { quantize(id, src, out.as_mut_ptr().cast(), 0, count, ROW_LEN as i64, weights) };
            }
        });
        let our_run = |thread: usize, out: &mut [u8]| self.encode(rows(thread), importance, out);
        let (result, [ours, theirs]) = race(self.rows() * self.row_bytes(), our_run, their_run);
        assert!(self.ggml.is_none() || ours == theirs, "{}: bytes differ from ggml's", self.info.name);
        Some(result)
    }

    fn dequantize(&self) -> (f64, Option<f64>) {
        let mut blocks = vec![0u8; self.rows() * self.row_bytes()];
        if self.codec.quantize.is_some() {
            self.encode(self.weights, Some(self.importance), &mut blocks);
        }
        let share = blocks.len() / rayon::current_num_threads();
        let rows = |thread: usize| &blocks[thread * share..][..share];
        let their_run = self.ggml.and_then(|ggml| ggml.to_float(self.info.ty)).map(|to_float| {
            move |thread: usize, out: &mut [f32]| {
                for (row, out) in rows(thread).chunks(self.row_bytes()).zip(out.chunks_mut(ROW_LEN)) {
                    // SAFETY: one encoded row and room for its ROW_LEN weights.
                    unsafe { to_float(row.as_ptr().cast(), out.as_mut_ptr(), ROW_LEN as i64) };
                }
            }
        });
        let our_run = |thread: usize, out: &mut [f32]| {
            quant::dequantize(self.info.ty, rows(thread), out).expect("rows decode");
        };
        race(self.weights.len(), our_run, their_run).0
    }
}

fn print(name: &str, what: &str, threads: usize, weights: usize, (ours, theirs): (f64, Option<f64>)) {
    let weights = weights as f64;
    let speed = weights / ours / 1e6;
    let gigabytes = weights * 4.0 / ours / 1e9;
    let (rival, ratio) = match theirs {
        Some(theirs) => (format!("{:.1}", weights / theirs / 1e6), format!("{:.2}", theirs / ours)),
        None => ("-".into(), "-".into()),
    };
    println!("{name:<8} {what:<20} {threads:>7} {speed:>9.1} {gigabytes:>7.2} {rival:>10} {ratio:>6}");
}

fn main() {
    let wanted: Vec<String> = env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let ggml = Ggml::load();
    let all: usize = std::thread::available_parallelism().map_or(1, Into::into);
    let mut random = Random::new(1);
    let weights: Vec<f32> = (0..all * ROWS * ROW_LEN).map(|_| random.bell() * 0.03).collect();
    let importance: Vec<f32> = (0..ROW_LEN).map(|_| (random.signed() * 2.0).exp()).collect();

    println!("type     what                 threads      Mw/s    GB/s  ggml Mw/s  ratio");
    for codec in CODECS {
        let Some(info) = codec.ty.info() else { continue };
        if !wanted.is_empty() && !wanted.iter().any(|name| name.eq_ignore_ascii_case(info.name)) {
            continue;
        }
        for threads in if all > 1 { vec![1, all] } else { vec![1] } {
            let weights = &weights[..threads * ROWS * ROW_LEN];
            let bench = Bench { codec, info, weights, importance: &importance, ggml: ggml.as_ref() };
            let fewer = bench.fit_to_pass(threads);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
            pool.install(|| {
                if !codec.needs_importance()
                    && let Some(result) = fewer.quantize(false)
                {
                    print(info.name, "quantize", threads, fewer.weights.len(), result);
                }
                if let Some(result) = fewer.quantize(true) {
                    print(info.name, "quantize weighted", threads, fewer.weights.len(), result);
                }
                print(info.name, "dequantize", threads, bench.weights.len(), bench.dequantize());
            });
        }
    }
}
