//! `lwq quantize`: any GGUF in, a mixed-precision GGUF out.

mod feedback;
mod kv;
mod plan;
mod planned;
mod report;
mod rounding_plan;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{ArgGroup, Args};

use super::plan::{BudgetArgs, ChoiceArgs};
use super::rounding::{RoundingFlags, open_model};
use super::{Common, Progress, Unit, Usage, printable};
use lwq::atomic_file::AtomicFile;
use lwq::gguf::TensorType;
use lwq::quantize::write;
use lwq::recipe::Target;
use lwq::rounding::Method;

use feedback::Rounded;
pub(super) use plan::open_source;
use plan::{Goal, Plan};
use planned::Planned;
pub(super) use planned::standard_file_bytes;
use report::{Report, Times};
use rounding_plan::RoundingPlan;

/// Quantize a GGUF: one type per tensor, chosen by the rules of a target, by a plan, or for a size
#[derive(Args, Debug, Default)]
#[command(
    group(ArgGroup::new("planned").args(["plan", "like", "target_size", "target_bpw", "max_kld"])),
    group(ArgGroup::new("unplanned").args(["target", "plan"])),
    group(ArgGroup::new("goal").required(true).args([
        "target", "plan", "like", "target_size", "target_bpw", "max_kld"
    ])),
    after_help = "Targets, smallest first:\n  IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_XS IQ4_NL\n  \
Q1_0 TQ1_0 TQ2_0 Q2_0 Q2_K_S Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_0 Q4_1 Q4_K_S Q4_K_M\n  Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0 \
MXFP4_MOE F16 BF16 F32 COPY"
)]
pub struct QuantizeArgs {
    /// Model to read: a GGUF file, or the first file of a split one
    input: PathBuf,
    /// File to write [default: INPUT's name with the target, beside it]; of several targets the folder
    output: Option<PathBuf>,
    /// Target name, such as Q4_K_M, IQ3_M or COPY; any letter case; several, as Q4_K_M,Q3_K_M, make a file each
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = parse_target)]
    target: Vec<Target>,
    /// Plan made by `lwq plan` for this model and this imatrix; several make a file each
    #[arg(
        long, value_name = "FILE", value_delimiter = ',',
        conflicts_with_all = ["tensor_type", "tensor_type_file", "output_tensor_type", "token_embedding_type"]
    )]
    plan: Vec<PathBuf>,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Importance matrix, GGUF or .dat
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    #[command(flatten)]
    rounding: RoundingFlags,
    /// Calibration text for --rounding feedback; repeatable [default: a built-in mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// Use only the importance of tensors whose name contains TEXT; repeatable
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["exclude_weights", "planned"])]
    include_weights: Vec<String>,
    /// Ignore the importance of tensors whose name contains TEXT; repeatable
    #[arg(long, value_name = "TEXT", conflicts_with = "planned")]
    exclude_weights: Vec<String>,
    /// Type of output.weight
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    output_tensor_type: Option<TensorType>,
    /// Type of token_embd.weight and per_layer_token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = parse_type)]
    token_embedding_type: Option<TensorType>,
    /// Type of the tensors whose name matches the pattern; repeatable, the first match wins
    #[arg(long, value_name = "REGEX=TYPE")]
    tensor_type: Vec<String>,
    /// File with REGEX=TYPE patterns, separated by white space
    #[arg(long, value_name = "FILE")]
    tensor_type_file: Option<PathBuf>,
    /// Give every tensor the target's base type, without the mix
    #[arg(long, conflicts_with = "planned")]
    pure: bool,
    /// Leave output.weight as it is
    #[arg(long, conflicts_with = "planned")]
    leave_output_tensor: bool,
    /// Accept a source that is quantized already
    #[arg(long)]
    allow_requantize: bool,
    /// Refuse tensors whose rows do not fit their type, instead of taking a larger type
    #[arg(long, conflicts_with = "planned")]
    no_fallback: bool,
    /// Remove these blocks and renumber the rest, such as 20,21,22
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', conflicts_with = "planned")]
    prune_layers: Vec<u32>,
    /// Set a metadata value; TYPE is int, float, bool or str; repeatable
    #[arg(long, value_name = "KEY=TYPE:VALUE")]
    override_kv: Vec<String>,
    /// Write one file per input file
    #[arg(long, conflicts_with = "split_max_size")]
    keep_split: bool,
    /// Start a new file before this many bytes of tensors, such as 500M or 4G (units of 1000)
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    split_max_size: Option<u64>,
    /// Show what would be written, without writing
    #[arg(long)]
    dry_run: bool,
}

fn parse_target(text: &str) -> Result<Target, String> {
    Target::parse(text).map_err(|e| e.to_string())
}

fn parse_type(text: &str) -> Result<TensorType, String> {
    lwq::recipe::parse_storable_type(text, "tensor type").map_err(|e| e.to_string())
}

impl QuantizeArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// Anything wrong with the files or the request; no output file is left then.
    pub fn run(&self, common: &Common) -> anyhow::Result<()> {
        let started = Instant::now();
        self.check_folder()?;
        let gguf = plan::open_source(&self.input)?;
        let plans = Planned::read_all(&self.plan)?;
        let method = self.method(&plans)?;
        if method == Method::Feedback && !self.prune_layers.is_empty() {
            let advice = "remove the layers first with --target COPY, then quantize that file";
            return Err(Usage(format!("--prune-layers: --rounding feedback runs the whole model; {advice}")).into());
        }
        let model = if method == Method::Feedback { Some(open_model(&gguf)?) } else { None };
        let calibration = match &model {
            Some(model) => Some(self.rounding.calibration(&self.file, &gguf, model, common)?),
            None => None,
        };
        let rounding = RoundingPlan::new(method, calibration.as_ref());
        let feedback = model.as_ref().zip(calibration.as_ref());
        let mut goals: Vec<Goal> = self.target.iter().map(|target| Goal::Target(*target)).collect();
        let planned = self.planned(&gguf, &rounding, feedback, common)?;
        goals.extend(plans.into_iter().chain(planned).map(|planned| Goal::Planned(Box::new(planned))));
        let plans =
            goals.iter().map(|goal| Plan::make(self, &gguf, goal, &rounding)).collect::<anyhow::Result<Vec<_>>>()?;
        check_names(&plans)?;
        plans.iter().flat_map(Plan::notes).for_each(|line| common.warn(line));
        if self.dry_run {
            return report::print(&plans.iter().map(|plan| Report::new(plan, &[], None)).collect::<Vec<_>>(), common);
        }
        let needed: u64 = plans.iter().map(Plan::needed_bytes).sum();
        for plan in &plans {
            plan.refuse_what_cannot_be_done(needed - plan.needed_bytes(), common)?;
        }
        let rounded = match feedback {
            Some((model, calibration)) => Rounded::make(&plans, model, calibration, common)?,
            None => Vec::new(),
        };
        let mut rounded = rounded.into_iter();
        let mut reports = Vec::with_capacity(plans.len());
        for plan in &plans {
            reports.push(write(plan, rounded.next(), started, common)?);
        }
        report::print(&reports, common)
    }

    /// True if the command line asks for more than one output.
    fn makes_several(&self) -> bool {
        self.target.len() + self.plan.len() > 1
    }

    /// Refuses an OUTPUT of several files that is no folder.
    fn check_folder(&self) -> anyhow::Result<()> {
        match &self.output {
            Some(path) if self.makes_several() && !path.is_dir() => {
                let path = printable(&path.display().to_string());
                Err(Usage(format!("{path}: several outputs need a folder; make it, or leave OUTPUT out")).into())
            }
            _ => Ok(()),
        }
    }

    /// The rounding: what the command line says, or else what the plans were made for.
    fn method(&self, plans: &[Planned]) -> anyhow::Result<Method> {
        let of_plans: Vec<Option<Method>> = plans.iter().map(Planned::rounding).collect();
        let first = of_plans.first().copied().flatten();
        let method = self.rounding.method(!self.file.is_empty(), first)?;
        let asked = self.rounding.is_given() || !self.file.is_empty();
        match of_plans.iter().position(|other| *other != first) {
            Some(at) if !asked => {
                let (a, b) = (self.plan[0].display().to_string(), self.plan[at].display().to_string());
                let problem = "were made for different roundings; quantize them one by one, or say --rounding";
                Err(Usage(format!("{} and {} {problem}", printable(&a), printable(&b))).into())
            }
            _ => Ok(method),
        }
    }
}

/// Refuses outputs of one name.
fn check_names(plans: &[Plan<'_>]) -> anyhow::Result<()> {
    let mut seen = HashSet::new();
    match plans.iter().flat_map(|plan| &plan.files).find(|file| !seen.insert(&file.path)) {
        Some(file) => {
            let path = printable(&file.path.display().to_string());
            Err(Usage(format!("{path}: two outputs would have this name; make them one by one")).into())
        }
        None => Ok(()),
    }
}

/// Makes the files of one output, with the tensors that feedback has rounded, in a run that began at `started`.
fn write(plan: &Plan<'_>, rounded: Option<Rounded>, started: Instant, common: &Common) -> anyhow::Result<Report> {
    let files = plan.create_files(common)?;
    let done = rounded.as_ref().map(Rounded::names).unwrap_or_default();
    let work = plan.work(&done);
    let left = work.iter().filter_map(|work| work.source.bytes).sum();
    let progress = Progress::new(common, "quantizing", left, Unit::Bytes);
    let stages = pipeline::run(plan.gguf, &work, &files, common.thread_count(), &mut |index, bytes| {
        progress.advance(bytes, &work[index].source.name);
    })?;
    progress.finish();
    if let Some(rounded) = &rounded {
        rounded.write(plan, &files)?;
    }
    let written = Instant::now();
    commit(files).context("the tensors are done, but the file is not complete")?;
    let times = Times { threads: common.thread_count(), stages, syncing: written.elapsed().as_secs_f64() };
    let outcomes = rounded.as_ref().map_or(&[][..], Rounded::outcomes);
    let report = Report::new(plan, outcomes, Some((started.elapsed(), times)));
    if let Some(rounded) = rounded {
        rounded.finish()?;
    }
    Ok(report)
}

/// Syncs all files before the first gets its name, then names them last to first: the file that a reader opens
/// first appears when all others are there.
fn commit(mut files: Vec<AtomicFile>) -> anyhow::Result<()> {
    for file in &mut files {
        file.sync()?;
    }
    while let Some(file) = files.pop() {
        file.commit()?;
    }
    Ok(())
}
