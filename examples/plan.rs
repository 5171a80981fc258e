//! Plans a file as large as a standard one and writes it:
//! `cargo run --release --example plan -- MODEL IMATRIX TARGET OUTPUT`.
//!
//! The first run measures the model, which takes minutes, and keeps the result beside it.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::error::Error;
use std::path::Path;

use lwq::atomic_file::Replace;
use lwq::gguf::Gguf;
use lwq::imatrix::{Imatrix, Named};
use lwq::plan::{MapStyle, Request, map};
use lwq::progress::Watch;
use lwq::quantize;
use lwq::recipe::Target;

/// Prints what a user should know.
struct Notes;

impl Watch for Notes {
    fn note(&self, line: &str) {
        eprintln!("{line}");
    }

    fn warn(&self, line: &str) {
        eprintln!("warning: {line}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, imatrix, target, output] = args.as_slice() else {
        return Err("give MODEL IMATRIX TARGET OUTPUT".into());
    };
    let model = Gguf::open(model)?;
    let matrix = Imatrix::open(Path::new(imatrix))?;
    let named = Named { name: imatrix, imatrix: &matrix };

    let plan = Request::like(Target::parse(target)?).imatrix(named).make(&model, &Notes)?;
    print!("{}", map(&plan, MapStyle { width: 100, color: false }));

    let choices = plan.choices_for(&model, Some(&matrix))?;
    let draft = quantize::Request::choices(choices).imatrix(named).decide(&model)?;
    let report = draft.write(Path::new(output), Replace::No, &Notes)?;
    println!("{}: {} bytes", report.output.join(", "), report.size_bytes);
    Ok(())
}
