//! Quantizes a model: `cargo run --release --example quantize -- MODEL OUTPUT TARGET [IMATRIX]`.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program prints

use std::error::Error;
use std::path::Path;

use lwq::atomic_file::Replace;
use lwq::display::decimal_size;
use lwq::gguf::Gguf;
use lwq::imatrix::{Imatrix, Named};
use lwq::progress::{Unit, Watch};
use lwq::quantize::Request;
use lwq::recipe::Target;

/// Prints what is done, a line a stage.
struct Lines;

impl Watch for Lines {
    fn begin(&self, stage: &'static str, total: u64, unit: Unit) {
        eprintln!("{stage}: {total} {unit:?}");
    }

    fn warn(&self, line: &str) {
        eprintln!("warning: {line}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, output, target, imatrix) = match args.as_slice() {
        [model, output, target] => (model, output, target, None),
        [model, output, target, imatrix] => (model, output, target, Some(imatrix)),
        _ => return Err("give MODEL OUTPUT TARGET [IMATRIX]".into()),
    };
    let model = Gguf::open(model)?;
    let matrix = imatrix.map(|path| Imatrix::open(Path::new(path))).transpose()?;

    let mut request = Request::target(Target::parse(target)?);
    if let (Some(name), Some(imatrix)) = (imatrix, &matrix) {
        request = request.imatrix(Named { name, imatrix });
    }
    let draft = request.decide(&model)?;
    draft.notes().iter().for_each(|line| Lines.warn(line));
    println!("{} will be {}", output, decimal_size(draft.file_bytes()));

    let report = draft.write(Path::new(output), Replace::No, &Lines)?;
    println!("{:.3} bits per weight, {} tensors", report.bits_per_weight, report.tensors.len());
    Ok(())
}
