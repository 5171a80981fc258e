//! What quantized models lose against their original, in a table:
//!
//! ```text
//! cargo run --release --example evaluate -- model-f16.gguf model-Q4_K_M.gguf model-Q3_K_M.gguf
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::error::Error;
use std::path::PathBuf;

use lwq::display::decimal_size;
use lwq::eval::{DivergenceRequest, TextOptions};
use lwq::gguf::Gguf;
use lwq::progress::{Unit, Watch};
use lwq::text::{Set, Text};

/// Prints which stage has begun, and what the library wants to be seen.
struct Lines;

impl Watch for Lines {
    fn begin(&self, stage: &'static str, total: u64, unit: Unit) {
        eprintln!("{stage}, {total} {unit:?} ...");
    }

    fn warn(&self, line: &str) {
        eprintln!("warning: {line}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(base), models) = (paths.next(), paths.collect::<Vec<_>>()) else {
        return Err("give the original and its quantized files".into());
    };
    let base = Gguf::open(&base)?;
    let models = models.iter().map(Gguf::open).collect::<Result<Vec<_>, _>>()?;
    let text = Text::built_in(Set::Evaluation);
    let options = TextOptions { n_ctx: Some(128), chunks: Some(16), ..TextOptions::default() };
    let report =
        DivergenceRequest::from_base(&base, &text).options(options).run(&models.iter().collect::<Vec<_>>(), &Lines)?;

    println!("{:<40} {:>10} {:>6} {:>10} {:>10} {:>9}", "file", "size", "bpw", "PPL", "mean KLD", "same top");
    for model in &report.models {
        let figures = &model.divergence;
        println!(
            "{:<40} {:>10} {:>6.2} {:>10.4} {:>10.6} {:>8.2}%",
            model.file,
            decimal_size(model.size_bytes),
            model.bits_per_weight,
            figures.ppl,
            figures.mean_kld,
            100.0 * figures.same_top_p
        );
    }
    println!("{} windows of {} tokens", report.run.windows, report.run.ctx);
    Ok(())
}
