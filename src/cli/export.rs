//! `lwq export`: a Hugging Face model folder in, a folder that vLLM and transformers load out.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value};

use super::args::{CalibrationFlags, RevisionArg, TargetsFlag};
use super::{Common, Usage, count, decimal_size, printable};
use lwq::export::{
    self, AlsoGguf, CheckReport, CheckedTensor, Draft, GroupSize, Odd, Request, Rounding, Scheme, Written,
};
use lwq::quantize::feedback::Outcome;
use lwq::recipe::Target;
use lwq::rounding::RoundingMethod;

/// Quantize a Hugging Face model folder to compressed-tensors, which vLLM and transformers load
///
/// Names of tensors stay those of the folder. With --check a folder is read again and compared with its source; without
/// --scheme nothing is written.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  lwq export path/to/model model-w4a16 --scheme W4A16\n  lwq export path/to/model model-fp8 --scheme FP8_DYNAMIC --check\n  lwq export path/to/model model-mixed --scheme W4A16 --like-bpw 4.6\n  lwq export path/to/model model-w4a16 --scheme W4A16 --also-gguf Q4_K_M\n  lwq export model-w4a16 --check"
)]
pub struct ExportArgs {
    /// Folder with config.json, *.safetensors and the tokenizer, or ORG/NAME of a model in the Hugging Face cache; with
    /// --check alone the folder to check
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    revision: RevisionArg,
    /// Folder to write
    #[arg(value_name = "OUT", required_unless_present = "check")]
    output: Option<PathBuf>,
    /// What weights and activations become: W4A16, W4A16_ASYM, W8A16, W8A8, FP8_DYNAMIC, FP8_BLOCK, NVFP4A16 or MXFP4A16
    #[arg(long, value_name = "SCHEME", required_unless_present = "check", requires = "output")]
    scheme: Option<Scheme>,
    /// Weights that share a scale, where the scheme leaves the choice: 32, 64, 128 or channel [default: 128]
    #[arg(long, value_name = "SIZE", requires = "scheme")]
    group_size: Option<GroupSize>,
    /// Mix 4 and 8 bits: at most so many bits per weight of the quantized matrices, scales included. Goes with W4A16 and
    /// W4A16_ASYM
    ///
    /// The model is run over a text to measure what 4 bits do to each matrix, and those that gain most get 8. What vLLM puts
    /// into one (q, k and v; gate and up; the experts of a layer) is kept equal. A dry run does not measure.
    #[arg(long, value_name = "BITS", requires = "scheme", value_parser = parse_bits)]
    like_bpw: Option<f64>,
    /// Make a GGUF of this type (Q4_K_M) as well, in the same pass over the model; may be given several times [default FILE:
    /// OUT-TYPE.gguf]
    ///
    /// It is the file that `lwq convert` and `lwq quantize --rounding feedback` make with the same texts, which run the model
    /// once more. Goes with --rounding feedback.
    #[arg(long, value_name = "TYPE[=FILE]", requires = "scheme", value_parser = parse_also)]
    also_gguf: Vec<AlsoGguf>,
    /// Leave modules in 16 bits whose name this regular expression finds; may be given several times
    #[arg(long, value_name = "REGEX", requires = "scheme")]
    ignore: Vec<Regex>,
    /// What becomes of matrices that the groups do not fit
    #[arg(long, value_enum, default_value_t = OddArg::Keep, requires = "scheme")]
    odd: OddArg,
    /// How codes and scales are chosen [default: feedback, or search for classes that lwq cannot run]
    #[arg(long, value_enum, requires = "scheme")]
    rounding: Option<RoundingArg>,
    #[command(flatten)]
    targets: TargetsFlag,
    /// W8A8: never move large inputs into the weights by powers of two that norms take up
    #[arg(long, requires = "scheme")]
    no_smooth: bool,
    /// Text that feedback goes by, other than the built-in one; repeatable
    #[arg(long = "file", short, value_name = "TEXT", requires = "scheme")]
    file: Vec<PathBuf>,
    #[command(flatten)]
    calibration: CalibrationFlags,
    /// Largest size of a safetensors file, such as 5GB, 500MB or bytes
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_shard_size, requires = "scheme")]
    shard_size: u64,
    /// Read the written folder as loaders do, name every fault, and compare it with its source
    #[arg(long)]
    check: bool,
    /// Show what would be written, without writing
    #[arg(long, requires = "scheme", conflicts_with = "check")]
    dry_run: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum OddArg {
    /// They stay in 16 bits
    Keep,
    /// They get a scale for each row; 4-bit floats stay in 16 bits
    Channel,
    /// They get groups of 32; what these do not divide stays in 16 bits
    G32,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum RoundingArg {
    /// Scales by the largest weights, as compressed-tensors does
    Rtn,
    /// Scales by the least squared error of weights
    Search,
    /// What llm-compressor does by default, for comparison: GPTQ with scales by the largest weights
    Gptq,
    /// Lets each column make up for the errors of those before it; runs the model over a calibration text
    Feedback,
}

impl From<OddArg> for Odd {
    fn from(odd: OddArg) -> Odd {
        match odd {
            OddArg::Keep => Odd::Keep,
            OddArg::Channel => Odd::Channel,
            OddArg::G32 => Odd::G32,
        }
    }
}

fn parse_also(text: &str) -> Result<AlsoGguf, String> {
    let (target, path) = text.split_once('=').map_or((text, None), |(target, path)| (target, Some(path)));
    if path.is_some_and(str::is_empty) {
        return Err("names no file behind =; give TYPE=FILE, or TYPE alone".to_owned());
    }
    let target = Target::parse(target).map_err(|error| error.to_string())?;
    Ok(AlsoGguf { target, path: path.map(PathBuf::from) })
}

fn parse_bits(text: &str) -> Result<f64, String> {
    let bits = text.parse().ok().filter(|bits: &f64| bits.is_finite() && *bits > 0.0);
    bits.ok_or_else(|| "not a number of bits per weight; give one such as 4.6".to_owned())
}

/// Sizes as transformers writes them (5GB) and as `--split-max-size` takes them (5G).
fn parse_shard_size(text: &str) -> Result<u64, String> {
    let plain = text.strip_suffix(['b', 'B']).unwrap_or(text);
    lwq::gguf::split::parse_size(plain).map_err(|_| {
        format!(
            "size {text:?} is not understood: give a number above 0 with KB, MB, GB or TB (units of 1000), such as 5GB"
        )
    })
}

#[derive(Serialize)]
struct ExportReport<'a> {
    source: String,
    output: String,
    written: bool,
    class: &'a str,
    scheme: &'static str,
    rounding: String,
    quantized: usize,
    bits_per_weight: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    like_bpw: Option<f64>,
    /// Bits of each quantized module in a mix.
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<Map<String, Value>>,
    size_bytes: u64,
    files: Vec<&'a str>,
    /// GGUF files that were made as well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    also_gguf: Vec<AlsoRow>,
    ignore: &'a [String],
    kept: Vec<KeptRow<'a>>,
    odd: Vec<OddRow<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    warnings: &'a [String],
    /// What became of each matrix that a pass of the model has shown the inputs of.
    outcomes: &'a [Outcome],
    /// Norms that have taken up factors of the columns behind them.
    smoothed: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<&'a CheckReport>,
}

#[derive(Serialize)]
struct AlsoRow {
    target: String,
    file: String,
    /// Of a file that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
}

#[derive(Serialize)]
struct KeptRow<'a> {
    module: &'a str,
    reason: &'a str,
}

#[derive(Serialize)]
struct OddRow<'a> {
    module: &'a str,
    problem: &'a str,
    becomes: &'a str,
}

#[derive(Serialize)]
struct CheckOnly<'a> {
    folder: String,
    #[serde(flatten)]
    report: &'a CheckReport,
}

impl ExportArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Anything wrong with the source, the output or, with --check, what is in it.
    pub fn run(&self, common: &Common) -> Result<()> {
        let folder = self.revision.find(&self.folder, common)?;
        let Some(scheme) = self.scheme else { return self.check_only(&folder, common) };
        let output = self.output.as_ref().ok_or_else(|| Usage("give the folder to write".to_owned()))?;
        let started = Instant::now();
        let mut request =
            Request::new(scheme).ignore(self.ignore.clone()).odd(self.odd.into()).shard_bytes(self.shard_size);
        if let Some(size) = self.group_size {
            if !scheme.has_free_groups() {
                return Err(Usage(format!("{scheme} has groups of its own; leave --group-size out")).into());
            }
            request = request.group_size(size);
        }
        request = request.smooth(!self.no_smooth);
        if let Some(rounding) = self.rounding(common)? {
            request = request.rounding(rounding);
        }
        request = request.also_gguf(self.also_gguf.clone());
        if let Some(bits) = self.like_bpw {
            request = request.like_bits_per_weight(bits);
        }
        let mut draft = request.decide(&folder)?;
        draft.warnings().iter().for_each(|warning| common.warn(warning));
        for odd in draft.odd() {
            common.warn(format!("{}: {}; it {}", odd.module, odd.problem, odd.becomes));
        }
        let mut write = || draft.write(output, common.replace(), &common.watch());
        let written = (!self.dry_run).then(&mut write).transpose()?;
        let seconds = written.is_some().then(|| started.elapsed().as_secs_f64());
        let check = self.check.then(|| export::check(output, Some(&folder), &common.watch())).transpose()?;
        report(common, &draft, output, (written.as_ref(), seconds), check.as_ref())?;
        check.map_or(Ok(()), |check| refuse(output, &check))
    }

    /// The rounding that the flags ask for.
    fn rounding(&self, common: &Common) -> Result<Option<Rounding>> {
        let options = || Ok::<_, anyhow::Error>(Box::new(self.calibration.options(&self.file, &common.watch())?));
        let given = self.calibration.given(!self.file.is_empty());
        if let (Some(other), false) = (self.rounding.filter(|r| *r != RoundingArg::Feedback), self.also_gguf.is_empty())
        {
            let name = other.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            return Err(Usage(format!("--also-gguf goes with --rounding feedback, not with {name}")).into());
        }
        self.targets.check(matches!(self.rounding, None | Some(RoundingArg::Feedback)))?;
        let feedback = || {
            let mut options = options()?;
            options.corrected = self.targets.corrected();
            Ok::<_, anyhow::Error>(Some(Rounding::Feedback(options)))
        };
        if self.targets.corrected() && !self.also_gguf.is_empty() {
            let problem = "--also-gguf goes with --targets model: corrected targets are those of one output";
            return Err(Usage(problem.to_owned()).into());
        }
        Ok(match (self.rounding, given) {
            (Some(RoundingArg::Rtn | RoundingArg::Search), Some(flag)) => {
                return Err(Usage(format!("{flag} is used by --rounding feedback and gptq alone")).into());
            }
            (Some(RoundingArg::Rtn), None) => Some(Rounding::Rtn),
            (Some(RoundingArg::Search), None) => Some(Rounding::Search),
            (Some(RoundingArg::Gptq), _) => Some(Rounding::Gptq { options: options()?, resaved: true }),
            (Some(RoundingArg::Feedback), _) | (None, Some(_)) => feedback()?,
            (None, None) if self.targets.is_given() => feedback()?,
            (None, None) => None,
        })
    }

    /// Checks a folder that is there: the second, made from the first, or the only one.
    fn check_only(&self, named: &Path, common: &Common) -> Result<()> {
        let (folder, source) = match &self.output {
            Some(output) => (output.as_path(), Some(named)),
            None => (named, None),
        };
        let found = export::check(folder, source, &common.watch())?;
        if common.json {
            common.result_json(&CheckOnly { folder: folder.display().to_string(), report: &found })?;
        } else {
            found.warnings.iter().for_each(|warning| common.warn(warning));
            if found.faults.is_empty() {
                common.result(check_text(folder, &found))?;
            }
        }
        refuse(folder, &found)
    }
}

/// A line on stderr for each fault.
fn refuse(folder: &Path, found: &CheckReport) -> Result<()> {
    use std::io::Write as _;
    let Some((last, others)) = found.faults.split_last() else { return Ok(()) };
    let line = |fault: &str| printable(&format!("{}: {fault}", folder.display()));
    for fault in others {
        let _ = writeln!(io::stderr(), "error: {}", line(fault));
    }
    Err(anyhow!("{}", line(last)))
}

fn check_text(folder: &Path, found: &CheckReport) -> String {
    let name = printable(&folder.display().to_string());
    let mut text = format!("{name}: {} quantized matrices, no fault\n", count(found.tensors.len() as u64));
    let errors: Vec<(f64, &CheckedTensor)> =
        found.tensors.iter().filter_map(|tensor| Some((tensor.relative_error?, tensor))).collect();
    if let Some((largest, worst)) = errors.iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
        let mean = errors.iter().map(|(error, _)| error).sum::<f64>() / errors.len() as f64;
        let worst = printable(&worst.name);
        let _ = writeln!(text, "relative error of weights: mean {mean:.4}, largest {largest:.4} ({worst})");
    }
    text
}

/// The GGUF files of an export.
fn also_rows(draft: &Draft, output: &Path, written: bool) -> Vec<AlsoRow> {
    let row = |file: &AlsoGguf| {
        let path = file.path(output);
        let size_bytes = std::fs::metadata(&path).ok().filter(|_| written).map(|found| found.len());
        AlsoRow { target: file.target.to_string(), file: path.display().to_string(), size_bytes }
    };
    draft.also_gguf().iter().map(row).collect()
}

/// Which matrices got 8 bits in a mix, by the role that their names end with.
fn mixture_text(draft: &Draft) -> String {
    let Some(wanted) = draft.wanted_bits() else { return String::new() };
    let Some(bits) = draft.mixed_bits() else {
        return format!(
            "a mix of 4 and 8 bits of at most {wanted} bits per weight; sizes are those of 4 bits, since a dry run does not \
             measure\n"
        );
    };
    let mut roles: Vec<(&str, [usize; 2])> = Vec::new();
    for (module, bits) in &bits {
        let role = module.rsplit('.').next().unwrap_or(module);
        let at = roles.iter().position(|(known, _)| *known == role).unwrap_or(roles.len());
        if at == roles.len() {
            roles.push((role, [0; 2]));
        }
        roles[at].1[usize::from(*bits == 8)] += 1;
    }
    let of_8: Vec<String> = roles
        .iter()
        .filter(|(_, count)| count[1] > 0)
        .map(|(role, [four, eight])| format!("{role} {eight} of {}", four + eight))
        .collect();
    let in_8 = bits.iter().filter(|(_, bits)| *bits == 8).count();
    let list = if of_8.is_empty() { String::new() } else { format!(": {}", printable(&of_8.join(", "))) };
    format!("{} of {} matrices in 8 bits{list}\n", count(in_8 as u64), count(bits.len() as u64))
}

fn report(
    common: &Common,
    draft: &Draft,
    output: &Path,
    (written, seconds): (Option<&Written>, Option<f64>),
    check: Option<&CheckReport>,
) -> Result<()> {
    let (outcomes, smoothed) = written.map_or((&[][..], &[][..]), |written| (&written.outcomes, &written.smoothed));
    let bits = 8.0 * draft.quantized_bytes() as f64 / draft.quantized_weights().max(1) as f64;
    if common.json {
        return common.result_json(&ExportReport {
            source: draft.folder().display().to_string(),
            output: output.display().to_string(),
            written: seconds.is_some(),
            class: draft.class(),
            scheme: draft.scheme().name(),
            rounding: draft.rounding().to_string(),
            quantized: draft.quantized(),
            bits_per_weight: bits,
            like_bpw: draft.wanted_bits(),
            bits: draft
                .mixed_bits()
                .map(|all| all.into_iter().map(|(name, bits)| (name.to_owned(), bits.into())).collect()),
            size_bytes: draft.file_bytes(),
            files: draft.file_names().collect(),
            also_gguf: also_rows(draft, output, seconds.is_some()),
            ignore: draft.ignored(),
            kept: draft.kept().iter().map(|kept| KeptRow { module: &kept.module, reason: kept.reason }).collect(),
            odd: draft
                .odd()
                .iter()
                .map(|odd| OddRow { module: &odd.module, problem: &odd.problem, becomes: &odd.becomes })
                .collect(),
            seconds,
            peak_memory_bytes: lwq::os::peak_memory(),
            warnings: draft.warnings(),
            outcomes,
            smoothed,
            check,
        });
    }
    if common.quiet && seconds.is_some() {
        return Ok(());
    }
    let verb = if seconds.is_some() { "wrote" } else { "would write" };
    let name = printable(&output.display().to_string());
    let files = draft.file_names().count();
    let mut text = format!("{verb} {name}: {} in {files} safetensors files\n", decimal_size(draft.file_bytes()));
    let _ = writeln!(
        text,
        "{} in {}, {} matrices quantized at {bits:.2} bits per weight, rounding {}",
        printable(draft.class()),
        draft.scheme(),
        count(draft.quantized() as u64),
        draft.rounding(),
    );
    text.push_str(&mixture_text(draft));
    for AlsoRow { target, file, size_bytes } in also_rows(draft, output, seconds.is_some()) {
        let size = size_bytes.map(|bytes| format!(", {}", decimal_size(bytes))).unwrap_or_default();
        let _ = writeln!(text, "{verb} {}: {target}{size}", printable(&file));
    }
    if !outcomes.is_empty() && matches!(draft.rounding(), Rounding::Feedback(_)) {
        let with_feedback = outcomes.iter().filter(|outcome| outcome.method == RoundingMethod::Feedback).count();
        let ratios: Vec<f64> = outcomes.iter().filter_map(|outcome| outcome.held_out_ratio).collect();
        let _ =
            write!(text, "{} of {} matrices with feedback", count(with_feedback as u64), count(outcomes.len() as u64));
        if !ratios.is_empty() {
            let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
            let _ = write!(text, "; held-out error, mean ratio to search {mean:.3}");
        }
        text.push('\n');
    }
    if !smoothed.is_empty() {
        let _ = writeln!(text, "{} norms take up factors of the matrices behind them", count(smoothed.len() as u64));
    }
    let _ = writeln!(text, "not quantized: {}", printable(&draft.ignored().join(", ")));
    if let Some(seconds) = seconds {
        let _ = writeln!(text, "{seconds:.1} s");
    }
    if let Some(check) = check.filter(|check| check.faults.is_empty()) {
        text.push_str(&check_text(output, check));
    }
    common.result(text)
}
