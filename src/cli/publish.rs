//! `lwq publish`: a model in, a finished repository out.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::args::{ActivationsArg, RevisionArg, RoundingArg};
use super::args::{CalibrationFlags, parse_size, parse_target};
use super::progress::duration;
use super::{Common, Usage, count, decimal_size, printable};
use lwq::eval::TextOptions;
use lwq::export::Scheme;
use lwq::measure::ProbeOptions;
use lwq::plan::Size;
use lwq::publish::{
    Against, CacheType, DEFAULT_TRIALS, EvaluationOptions, Fit, Forecast, ImportanceOptions, Progress, Request, Said,
    Status, parse_context,
};
use lwq::recipe::Target;
use lwq::report::TaskFolder;
use lwq::rounding::RoundingMethod;
use lwq::text::{Set, Text};

/// Make a repository of a model: quantized files, their measurements and the model card
///
/// Converts a folder, collects the importance matrix, measures the model, plans a file for each target, size or device,
/// rounds all of them in one pass, evaluates all beside the base and the usual files, keeps the best, and writes README.md,
/// report.html, report.json and SHA256SUMS. The same command goes on where an interrupted run stopped; with other settings it
/// does again what they change.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq publish path/to/model out\n  lwq publish model-f16.gguf out --targets IQ3_M,Q4_K_M,Q6_K --shrink\n  lwq publish path/to/model out --sizes 4GB,6GB --schemes W4A16,FP8_DYNAMIC\n  lwq publish path/to/model out --fit 8GB --ctx 16k --dry-run\n  lwq publish --list out"
)]
pub struct PublishArgs {
    /// Model: a 16-bit GGUF, a Hugging Face folder, or ORG/NAME of a model in the Hugging Face cache
    #[arg(value_name = "SOURCE", required_unless_present = "list")]
    source: Option<PathBuf>,
    #[command(flatten)]
    revision: RevisionArg,
    /// Folder of the repository, which is made
    #[arg(value_name = "OUT", required_unless_present = "list")]
    output: Option<PathBuf>,
    /// A planned file in at most the bytes of each of these standard files [default: IQ2_M,IQ3_XXS,Q3_K_M,IQ4_XS,Q4_K_M,
    /// Q5_K_M,Q6_K,Q8_0, where no --sizes, --fit or --schemes are given]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_target)]
    targets: Vec<Target>,
    /// A planned file of each of these sizes, such as 4GB,5.5GiB
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_size)]
    sizes: Vec<Size>,
    /// The best file for a device with this memory: weights, cache and buffers counted
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    fit: Option<Size>,
    /// Context that memory is counted for, such as 16k [default: 8192, or the model's if that is shorter]
    #[arg(long, value_name = "TOKENS", value_parser = parse_context)]
    ctx: Option<u64>,
    /// Type of the cache of keys and values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0 or q5_1
    #[arg(long, value_name = "TYPE", default_value_t = CacheType::default())]
    cache_type: CacheType,
    /// A folder of compressed-tensors in each of these schemes, such as W4A16,FP8_DYNAMIC; SOURCE must be a folder
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    schemes: Vec<Scheme>,
    /// Keep the smallest planned file of each target whose KL divergence is not above the standard file's
    #[arg(long)]
    shrink: bool,
    /// Trials of each target for that
    #[arg(long, value_name = "N", default_value_t = DEFAULT_TRIALS as u32, value_parser = clap::value_parser!(u32).range(1..=32))]
    trials: u32,
    /// A file of others to stand beside those made here, for the target that its name ends in; repeatable
    #[arg(long, value_name = "NAME=FILE", value_parser = parse_against)]
    against: Vec<Against>,
    /// What files are called, before their target [default: SOURCE's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Calibration text, for the importance matrix and for feedback; repeatable [default: a built-in mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// Licence of that text, for the card
    #[arg(long, value_name = "LICENCE", requires = "file")]
    text_license: Option<String>,
    /// Importance matrix to take instead of collecting one
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Use at most this many chunks of the text for the importance matrix
    #[arg(long, value_name = "N", conflicts_with = "imatrix", value_parser = clap::value_parser!(u32).range(1..))]
    imatrix_chunks: Option<u32>,
    /// Collect the importance matrix in 32-bit floats: slower, the same on every processor
    #[arg(long, conflicts_with = "imatrix")]
    accurate: bool,
    /// Measurement of the model that this one was made from; serves if a check of some probes allows
    #[arg(long, value_name = "FILE")]
    measured_on: Option<PathBuf>,
    /// Probe text; repeatable [default: a built-in text]
    #[arg(long, value_name = "TEXT")]
    probe_file: Vec<PathBuf>,
    /// Tokens that every probe runs [default: 4096, from 0.1B weights on 3072, less above 0.7B]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    probe_tokens: Option<u32>,
    /// How planned files are rounded
    #[arg(long, value_enum, default_value = "feedback")]
    rounding: RoundingArg,
    #[command(flatten)]
    calibration: CalibrationFlags,
    /// Text that files are evaluated on; repeatable [default: a built-in text]
    #[arg(long, value_name = "TEXT")]
    eval_file: Vec<PathBuf>,
    /// Tokens of its windows [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..=1 << 24))]
    eval_ctx: Option<u32>,
    /// Score at most this many windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    eval_chunks: Option<u32>,
    /// Score the predictions of a window from this position on [default: half the window]
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(u32).range(..1 << 24))]
    score_from: Option<u32>,
    /// Rounding of the inputs of products in the evaluation
    #[arg(long, value_enum, default_value = "f32")]
    activations: ActivationsArg,
    /// Score the task files of this folder: .txt HellaSwag, .csv WinoGrande, .bin multiple choice, .jsonl any
    #[arg(long, value_name = "FOLDER")]
    tasks: Option<PathBuf>,
    /// Draw at most N tasks of each file at random
    #[arg(long, value_name = "N", requires = "tasks", value_parser = clap::value_parser!(u32).range(1..))]
    most_tasks: Option<u32>,
    /// llama-bench of llama.cpp: measures tokens per second and memory of the files
    #[arg(long, value_name = "PROGRAM")]
    llama_bench: Option<PathBuf>,
    /// Template of the card (minijinja), instead of the built-in one
    #[arg(long, value_name = "FILE")]
    card_template: Option<PathBuf>,
    /// Repository of the source, for the card [default: as its own card or metadata tell]
    #[arg(long, value_name = "ORG/NAME")]
    base_model: Option<String>,
    /// Who makes the files, for the card [default: lwq]
    #[arg(long, value_name = "NAME")]
    quantized_by: Option<String>,
    /// Memory for activations, such as 4G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    memory: Option<u64>,
    /// Most bytes in OUT while the run is at work, such as 50G; standard files are then made and evaluated a few at a time
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    disk: Option<u64>,
    /// Show steps, time and disk, without doing anything
    #[arg(long)]
    dry_run: bool,
    /// Show what OUT holds and how far its run is
    #[arg(
        long, value_name = "OUT",
        conflicts_with_all = ["source", "output", "dry_run", "targets", "sizes", "fit", "schemes"]
    )]
    list: Option<PathBuf>,
}

fn parse_against(text: &str) -> Result<Against, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.trim().is_empty() && !path.is_empty() => {
            Ok(Against { name: name.trim().to_owned(), path: path.into() })
        }
        _ => Err(format!("{text:?}: give NAME=FILE, such as others=model-Q4_K_M.gguf")),
    }
}

impl PublishArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a step fails, or the run was interrupted; the same command goes on then.
    pub fn run(&self, common: &Common) -> Result<()> {
        if let Some(output) = &self.list {
            let status = Status::read(output)?;
            return if common.json { common.result_json(&status) } else { common.result(status_text(&status)) };
        }
        // The command line makes sure that both are there.
        let (Some(source), Some(output)) = (&self.source, &self.output) else { return Ok(()) };
        let watch = common.watch();
        let source = self.revision.find(source, common)?;
        let request = self.request(Request::new(&source, output), common)?;
        let draft = request.decide(&watch)?;
        if self.dry_run {
            let forecast = draft.forecast();
            return if common.json { common.result_json(forecast) } else { common.result(forecast_text(forecast)) };
        }
        let published = draft.run(&watch)?;
        if published.was_there {
            common.note("all of it is there already, made by the same command");
        }
        if common.json {
            return common.result(published.report.to_text());
        }
        if common.quiet {
            return Ok(());
        }
        let report = &published.report;
        let mut text = String::new();
        let width = report.files.iter().map(|file| file.file.chars().count()).max().unwrap_or(4);
        for file in &report.files {
            let _ = write!(
                text,
                "{:<width$}  {:>10}  PPL {:>9.4}  KLD {:.6}",
                printable(&file.file),
                decimal_size(file.size_bytes),
                file.divergence.ppl,
                file.divergence.mean_kld
            );
            if let Some(standard) = &file.standard {
                let _ = write!(
                    text,
                    "  (standard: {}, {:.6}; {:.2}% smaller)",
                    decimal_size(standard.size_bytes),
                    standard.mean_kld,
                    100.0 * standard.shrinkage
                );
            }
            text.push('\n');
        }
        for folder in &report.folders {
            let kld = folder.divergence.map_or_else(String::new, |d| format!("  KLD {:.6}", d.mean_kld));
            let _ = writeln!(text, "{}/  {}{kld}", printable(&folder.folder), decimal_size(folder.size_bytes));
        }
        let _ = writeln!(text, "{}: the repository", printable(&published.output.display().to_string()));
        common.result(text)
    }

    fn request(&self, request: Request, common: &Common) -> Result<Request> {
        let watch = common.watch();
        let method = RoundingMethod::from(self.rounding);
        if let Some(flag) =
            self.calibration.given(false).filter(|_| method != RoundingMethod::Feedback && self.schemes.is_empty())
        {
            return Err(Usage(format!("{flag} is used by --rounding feedback alone; the rounding is {method}")).into());
        }
        let mut calibration = self.calibration.options(&self.file, &watch)?;
        calibration.text = calibration.text.without_folders();
        calibration.gate = calibration.gate.without_folders();
        let probe_text = match self.probe_file.is_empty() {
            true => None,
            false => Some(Text::read(&self.probe_file, &watch)?.without_folders()),
        };
        let evaluation = EvaluationOptions {
            text: Text::read_or(&self.eval_file, Set::Evaluation, &watch)?.without_folders(),
            options: TextOptions {
                n_ctx: self.eval_ctx.map(|n| n as usize),
                chunks: self.eval_chunks.map(|n| n as usize),
                score_from: self.score_from.map(|n| n as usize),
                activations: self.activations.into(),
                ..TextOptions::default()
            },
            tasks: self.tasks.as_ref().map(|folder| TaskFolder {
                folder: folder.clone(),
                most_tasks: self.most_tasks.map(|n| n as usize),
                seed: 1,
                llama_compat: false,
            }),
        };
        let importance = ImportanceOptions {
            file: self.imatrix.clone(),
            chunks: self.imatrix_chunks.map(|n| n as usize),
            ctx: None,
            accurate: self.accurate,
        };
        Ok(request
            .name(self.name.clone())
            .targets(&self.targets)
            .sizes(&self.sizes)
            .fit(self.fit.clone().map(|memory| Fit { memory }))
            .schemes(&self.schemes)
            .context(self.ctx, self.cache_type)
            .smallest(self.shrink, self.trials as usize)
            .against(self.against.clone())
            .importance(importance)
            .probes(ProbeOptions {
                text: probe_text,
                tokens: self.probe_tokens.map(|n| n as usize),
                ..ProbeOptions::default()
            })
            .calibration(calibration)
            .rounding(method)
            .evaluation(evaluation)
            .measured_on(self.measured_on.clone())
            .template(self.card_template.clone())
            .llama_bench(self.llama_bench.clone())
            .said(Said { base_model: self.base_model.clone(), quantized_by: self.quantized_by.clone() })
            .text_license(self.text_license.clone())
            .limits(self.memory, self.disk)
            .replace(common.replace()))
    }
}

fn forecast_text(forecast: &Forecast) -> String {
    let mut text = String::new();
    for file in &forecast.files {
        let _ = writeln!(text, "{}  about {}", printable(&file.file), decimal_size(file.bytes));
    }
    text.push('\n');
    let width = forecast.steps.iter().map(|step| step.step.chars().count()).max().unwrap_or(0);
    for step in &forecast.steps {
        let _ = writeln!(text, "{:<width$}  {:>9}  {}", step.step, duration(step.seconds), step.what);
    }
    let memory = &forecast.memory;
    let free = forecast.free_disk_bytes.map_or_else(String::new, |bytes| format!(", {} are free", decimal_size(bytes)));
    let _ = write!(
        text,
        "\ntime: about {}\ndisk: at most {} while at work{free}; {} stay\nmemory beside a file: {} for {} tokens with a cache of {}\n",
        duration(forecast.seconds),
        decimal_size(forecast.peak_disk_bytes),
        decimal_size(forecast.disk_bytes),
        decimal_size(memory.total_bytes),
        count(memory.ctx),
        memory.cache_type
    );
    text
}

fn status_text(status: &Status) -> String {
    let mut text = String::new();
    let state = if status.finished { "finished" } else { "unfinished: the same command goes on" };
    let _ = writeln!(
        text,
        "{} of {}: {state}, {} of {} steps",
        printable(&status.output),
        printable(&status.source),
        status.steps_done,
        status.steps.len()
    );
    let width = status.steps.iter().map(|step| step.step.chars().count()).max().unwrap_or(0);
    for step in &status.steps {
        let state = match step.state {
            Progress::Todo => "to do",
            Progress::Begun => "begun",
            Progress::Done => "done",
        };
        let _ = writeln!(
            text,
            "{:<width$}  {state:<5}  {:>9}  {}",
            printable(&step.step),
            duration(step.seconds),
            printable(&step.what)
        );
    }
    for file in &status.files {
        let gone = if file.is_there { "" } else { "  is gone or has changed" };
        let _ = writeln!(text, "{}  {}{gone}", printable(&file.file), decimal_size(file.size_bytes));
    }
    if status.unfinished_bytes > 0 {
        let _ = writeln!(text, "unfinished work: {}", decimal_size(status.unfinished_bytes));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_others_have_a_name_and_a_path() {
        assert_eq!(parse_against("a=b=c.gguf").unwrap(), Against { name: "a".into(), path: "b=c.gguf".into() });
        for text in ["", "a", "=b", "a="] {
            assert!(parse_against(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_have_a_fitting_unit() {
        let shown: Vec<String> = [0.4, 42.0, 600.0, 7200.0].into_iter().map(duration).collect();
        assert_eq!(shown, ["0.4 s", "42 s", "10 min", "2.0 h"]);
    }
}
