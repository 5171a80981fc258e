//! `lwq quantize`: any GGUF in, a mixed-precision GGUF out.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{ArgGroup, Args};
use serde::Serialize;

use super::args::{
    AimFlags, BudgetArgs, ChoiceArgs, ImportanceArgs, RoundingFlags, TypeArgs, parse_missing, parse_override,
    parse_target, rounding,
};
use super::inspect::type_table;
use super::output_name::{wrong_extension, wrong_type};
use super::{Common, Usage, binary_size, count, decimal_size, make_folder, printable};
use lwq::gguf::{Gguf, TensorType};
use lwq::imatrix::EntryFilter;
use lwq::plan::{self, PlanFile};
use lwq::progress::Watch;
use lwq::quantize::{
    Choices, Draft, MissingImportance, Mtp, QuantizeError, Report, Request, Rounding, RoundingReport, Split,
    open_source, write_all,
};
use lwq::recipe::{TARGETS, Target};
use lwq::rounding::RoundingMethod;

/// Quantize a GGUF: one type per tensor, chosen by the rules of a target, by a plan, or for a size
#[derive(Args, Debug, Default)]
#[command(
    group(ArgGroup::new("planned").args(["plan", "like", "target_size", "target_bpw", "max_kld"])),
    group(ArgGroup::new("unplanned").args(["target", "plan", "type_name"])),
    group(ArgGroup::new("goal").args(["target", "plan", "like", "target_size", "target_bpw", "max_kld", "type_name"])),
    after_help = targets_help()
)]
pub struct QuantizeArgs {
    /// Model to read: a GGUF file, or the first file of a split one
    input: PathBuf,
    /// File to write [default: INPUT's name with the target, beside it]; of several targets the folder, which is made
    output: Option<PathBuf>,
    /// Target, as llama-quantize takes it; the same as --target
    #[arg(value_name = "TYPE")]
    type_name: Option<String>,
    /// Threads, as llama-quantize takes them; the same as --threads
    #[arg(value_name = "NTHREADS", value_parser = clap::value_parser!(u16).range(1..=4096))]
    thread_count: Option<u16>,
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
    #[command(flatten)]
    importance: ImportanceArgs,
    #[command(flatten)]
    rounding: RoundingFlags,
    #[command(flatten)]
    aim: AimFlags,
    /// Calibration text for --rounding feedback; repeatable [default: a built-in mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// Use only the importance of tensors whose name contains TEXT; repeatable
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["exclude_weights", "planned"])]
    include_weights: Vec<String>,
    /// Ignore the importance of tensors whose name contains TEXT; repeatable
    #[arg(long, value_name = "TEXT", conflicts_with = "planned")]
    exclude_weights: Vec<String>,
    /// Quantized matrices without importance data: refuse; plain, without, whatever their type; or a TYPE for them
    /// [default: without, and refuse types that need data]
    #[arg(long, value_name = "refuse|plain|TYPE", value_parser = parse_missing, conflicts_with = "planned")]
    missing_importance: Option<MissingImportance>,
    #[command(flatten)]
    types: TypeArgs,
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
    /// Leave the blocks for multi-token prediction (MTP, NextN) out
    #[arg(long, conflicts_with_all = ["like", "target_size", "target_bpw", "max_kld"])]
    drop_mtp: bool,
    /// Take the blocks for multi-token prediction as they are from FILE, another GGUF of a model that has none here
    #[arg(
        long, value_name = "FILE",
        conflicts_with_all = ["drop_mtp", "prune_layers", "like", "target_size", "target_bpw", "max_kld"]
    )]
    mtp_from: Option<PathBuf>,
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

/// Characters of a line of the help text.
const LINE: usize = 76;

/// The targets for the help text, as many in a line as fit.
fn targets_help() -> String {
    let mut text = "Targets, smallest first (lwq list targets tells more):".to_owned();
    let mut line = String::new();
    for target in TARGETS {
        if line.len() + target.name.len() > LINE {
            text.push_str(&format!("\n {line}"));
            line.clear();
        }
        line.push_str(&format!(" {}", target.name));
    }
    text.push_str(&format!("\n {line}"));
    text
}

/// A target by its name, or by the number that llama-quantize lists it with.
fn target_by_name(text: &str) -> Result<Target> {
    let number: Option<u32> = text.parse().ok();
    let numbered = number.and_then(|number| TARGETS.iter().find(|info| info.file_type == Some(number)));
    match numbered {
        Some(info) => Ok(info.target),
        None => Target::parse(text).map_err(|error| Usage(error.to_string()).into()),
    }
}

/// What the positional arguments mean: llama-quantize's forms are INPUT [OUTPUT] TYPE [NTHREADS].
struct Positional<'a> {
    output: Option<&'a Path>,
    target: Option<Target>,
    threads: Option<u16>,
}

/// A plan that was read from a file.
struct ReadPlan {
    plan: PlanFile,
    file: String,
    sha256: String,
}

impl QuantizeArgs {
    /// Threads among the positional arguments.
    pub fn threads(&self) -> Option<u16> {
        self.positional().ok().and_then(|positional| positional.threads)
    }

    fn has_goal(&self) -> bool {
        !self.target.is_empty() || !self.plan.is_empty() || self.budget.budget().is_some()
    }

    fn positional(&self) -> Result<Positional<'_>> {
        let output = self.output.as_deref();
        let Some(name) = &self.type_name else {
            // INPUT TYPE
            let target = output.filter(|_| !self.has_goal()).and_then(|text| target_by_name(text.to_str()?).ok());
            let output = output.filter(|_| target.is_none());
            return Ok(Positional { output, target, threads: self.thread_count });
        };
        // INPUT TYPE NTHREADS
        let threads = name.parse().ok().filter(|threads| (1..=4096).contains(threads));
        if let (Some(target), Some(threads), None) =
            (output.and_then(|text| target_by_name(text.to_str()?).ok()), threads, self.thread_count)
        {
            return Ok(Positional { output: None, target: Some(target), threads: Some(threads) });
        }
        Ok(Positional { output, target: Some(target_by_name(name)?), threads: self.thread_count })
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Anything wrong with the files or the request; no output file is left then.
    pub fn run(&self, common: &Common) -> Result<()> {
        let Positional { output, target, .. } = self.positional()?;
        let targets: Vec<Target> = self.target.iter().copied().chain(target).collect();
        if targets.is_empty() && !self.has_goal() {
            let goals =
                "--target NAME, --plan FILE, --like NAME, --target-size SIZE, --target-bpw BITS or --max-kld NATS";
            return Err(Usage(format!("nothing says what to make; give one of {goals}")).into());
        }
        let folder = output.filter(|_| targets.len() + self.plan.len() > 1);
        if let Some(path) = folder.filter(|path| path.exists() && !path.is_dir()) {
            let path = printable(&path.display().to_string());
            return Err(Usage(format!("{path}: several outputs need a folder; name one, or leave OUTPUT out")).into());
        }
        let watch = common.watch();
        let gguf = open_source(&self.input)?;
        let donor = self.mtp_from.as_deref().map(open_source).transpose()?;
        let mtp = match &donor {
            Some(donor) => Mtp::From(donor),
            None if self.drop_mtp => Mtp::Drop,
            None => Mtp::Keep,
        };
        let plans = self.plan.iter().map(|path| ReadPlan::open(path)).collect::<Result<Vec<_>>>()?;
        let method = self.method(&plans)?;
        if method == RoundingMethod::Feedback && !self.prune_layers.is_empty() {
            let advice = "remove the layers first with --target COPY, then quantize that file";
            return Err(Usage(format!("--prune-layers: --rounding feedback runs the whole model; {advice}")).into());
        }
        self.aim.check(method == RoundingMethod::Feedback)?;
        let calibration = self.rounding.calibration(method, &self.file, &self.aim, &gguf, &watch)?;
        let rounding = rounding(method, calibration.as_ref());
        let weighted = targets.iter().any(|target| target.base().is_quantized()) || self.budget.budget().is_some();
        let wanted = weighted || (!plans.is_empty() && plans.iter().all(|read| read.plan.imatrix.is_some()));
        let importance = self.importance.open(&self.input, wanted, common)?;
        let importance = importance.as_ref();

        let mut requests: Vec<Request<'_>> = targets.iter().copied().map(Request::target).collect();
        let matrix = importance.map(|opened| opened.matrix());
        for choices in self.choices(&plans, &gguf, matrix)? {
            requests.push(Request::choices(choices));
        }
        if let Some(budget) = self.budget.budget() {
            let mut request = plan::Request::new(budget).rounding(rounding);
            if let Some(opened) = importance {
                request = request.imatrix(opened.named());
            }
            let plan = self.choice.apply(request, &self.types, &self.input, output, common)?.make(&gguf, &watch)?;
            common.note(super::plan::summary(&plan));
            requests.push(Request::choices(plan.choices_for(&gguf, matrix)?));
        }
        let drafts = requests
            .into_iter()
            .map(|request| {
                let request = self.apply(request, rounding)?.mtp(mtp);
                let request = match importance {
                    Some(opened) => request.imatrix(opened.named()),
                    None => request,
                };
                Ok(request.decide(&gguf)?)
            })
            .collect::<Result<Vec<Draft<'_>>>>()?;
        let outputs: Vec<(&Draft<'_>, PathBuf)> = drafts
            .iter()
            .map(|draft| {
                let beside = draft.default_output();
                let path = match (output, folder, beside.file_name()) {
                    (Some(output), None, _) => output.to_owned(),
                    (_, Some(folder), Some(name)) => folder.join(name),
                    _ => beside,
                };
                (draft, path)
            })
            .collect();
        check_names(&outputs)?;
        for (at, (draft, output)) in outputs.iter().enumerate() {
            self.check_name(draft, output, targets.get(at).copied(), common);
        }
        drafts.iter().flat_map(|draft| draft.notes()).for_each(|line| watch.warn(line));
        if self.dry_run {
            let reports: Vec<Report> = outputs.iter().map(|(draft, path)| draft.report(path)).collect();
            return print(&reports, common);
        }
        if let Some(folder) = folder {
            make_folder(folder)?;
        }
        let reports = write_all(&outputs, common.replace(), &watch).map_err(|error| match error {
            QuantizeError::SameName(_) => Usage(error.to_string()).into(),
            other => anyhow::Error::from(other),
        })?;
        print(&reports, common)
    }

    /// Warns of a name that says something else than what the file is. What plans and types by hand make has no name of its
    /// own.
    fn check_name(&self, draft: &Draft<'_>, output: &Path, target: Option<Target>, common: &Common) {
        let paths = draft.paths(output);
        let extension = paths.first().and_then(|path| wrong_extension(path, true));
        let types: Vec<TensorType> = match target {
            Some(Target::COPY) => {
                draft.report(output).types.iter().filter_map(|row| TensorType::from_name(&row.name)).collect()
            }
            _ => Vec::new(),
        };
        let target = target.filter(|_| self.types.patterns().is_ok_and(|patterns| patterns.is_empty()));
        let ty = target.and_then(|target| wrong_type(output, target, self.pure, &types));
        extension.into_iter().chain(ty).for_each(|line| common.warn(line));
    }

    /// Adds what the flags say.
    fn apply<'a>(&self, request: Request<'a>, rounding: Rounding<'a>) -> Result<Request<'a>> {
        let split = match self.split_max_size {
            Some(bytes) => Split::MaxBytes(bytes),
            None if self.keep_split => Split::AsInput,
            None => Split::Whole,
        };
        let metadata = self.override_kv.iter().map(|text| parse_override(text)).collect::<Result<Vec<_>>>()?;
        Ok(request
            .rounding(rounding)
            .importance_of(EntryFilter::new(&self.include_weights, &self.exclude_weights).map_err(QuantizeError::from)?)
            .missing_importance(self.missing_importance.unwrap_or_default())
            .output_tensor_type(self.types.output_tensor_type)
            .token_embedding_type(self.types.token_embedding_type)
            .tensor_types(self.types.patterns()?)
            .pure(self.pure)
            .leave_output_tensor(self.leave_output_tensor)
            .allow_requantize(self.allow_requantize)
            .allow_fallback(!self.no_fallback)
            .prune_layers(&self.prune_layers)
            .metadata(metadata)
            .split(split))
    }

    /// The choices of the plans that were read. Those that come to the same bits per weight name their outputs after their
    /// files.
    fn choices(
        &self,
        plans: &[ReadPlan],
        gguf: &Gguf,
        imatrix: Option<&lwq::imatrix::Imatrix>,
    ) -> Result<Vec<Choices>> {
        let made = |read: &ReadPlan| Ok(read.plan.choices_of_file(&read.file, &read.sha256, gguf, imatrix)?);
        let mut choices = plans.iter().map(made).collect::<Result<Vec<Choices>>>()?;
        let suffixes: Vec<String> = choices.iter().map(|choices| choices.suffix.clone()).collect();
        for (choices, path) in choices.iter_mut().zip(&self.plan) {
            let sharing = suffixes.iter().filter(|suffix| **suffix == choices.suffix).count();
            if let Some(stem) = path.file_stem().filter(|_| sharing > 1) {
                choices.suffix = stem.to_string_lossy().into_owned();
            }
        }
        Ok(choices)
    }

    /// The rounding: what the command line says, or else what the plans were made for.
    fn method(&self, plans: &[ReadPlan]) -> Result<RoundingMethod> {
        let of_plans: Vec<_> = plans.iter().map(|read| read.plan.rounding.as_ref().map(|of| of.method)).collect();
        let first = of_plans.first().copied().flatten();
        let method = self.rounding.method(!self.file.is_empty(), first)?;
        let asked = self.rounding.is_given() || !self.file.is_empty();
        match of_plans.iter().position(|other| *other != first) {
            Some(at) if !asked => {
                let (a, b) = (&plans[0].file, &plans[at].file);
                let problem = "were made for different roundings; quantize them one by one, or say --rounding";
                Err(Usage(format!("{} and {} {problem}", printable(a), printable(b))).into())
            }
            _ => Ok(method),
        }
    }
}

impl ReadPlan {
    fn open(path: &Path) -> Result<ReadPlan> {
        let (plan, sha256) = PlanFile::read(path)?;
        Ok(ReadPlan { plan, file: path.display().to_string(), sha256 })
    }
}

/// Refuses outputs of one name.
fn check_names(outputs: &[(&Draft<'_>, PathBuf)]) -> Result<()> {
    let mut seen = HashSet::new();
    let paths = outputs.iter().flat_map(|(draft, output)| draft.paths(output));
    match paths.into_iter().find(|path| !seen.insert(path.clone())) {
        Some(path) => Err(Usage(QuantizeError::SameName(path).to_string()).into()),
        None => Ok(()),
    }
}

/// Prints reports on stdout, as JSON or as tables. One is an object by itself, several stand under `outputs`.
fn print(reports: &[Report], common: &Common) -> Result<()> {
    /// What `--json` prints for several outputs.
    #[derive(Serialize)]
    struct Several<'a> {
        outputs: &'a [Report],
    }
    match reports {
        [report] if common.json => common.result_json(report),
        several if common.json => common.result_json(&Several { outputs: several }),
        _ if common.quiet && !reports.iter().any(|report| report.dry_run) => Ok(()),
        _ => common.result(reports.iter().map(text).collect::<Vec<_>>().join("\n")),
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    if report.dry_run {
        let width = report.tensors.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for row in &report.tensors {
            text.push_str(&format!(
                "{:<width$}  {:>8} -> {:<8} {:>12}  {}\n",
                printable(&row.name),
                row.source_type,
                row.ty,
                decimal_size(row.bytes),
                row.reason
            ));
        }
        text.push('\n');
    }
    text.push_str(&type_table(&report.types));
    let verb = if report.dry_run { "would be" } else { "is" };
    text.push_str(&format!(
        "\n{} {verb} {} ({}), {:.2} bits per weight\n",
        printable(&report.output.join(", ")),
        decimal_size(report.size_bytes),
        binary_size(report.size_bytes),
        report.bits_per_weight
    ));
    if let Some(rounding) = &report.rounding {
        text.push_str(&rounding_text(rounding));
    }
    for problem in &report.problems {
        text.push_str(&format!("not possible yet: {problem}\n"));
    }
    if let Some(seconds) = report.seconds {
        text.push_str(&format!("{seconds:.1} s"));
        if let Some(peak) = report.peak_memory_bytes {
            text.push_str(&format!(", peak memory {}", decimal_size(peak)));
        }
        text.push('\n');
    }
    text
}

fn rounding_text(report: &RoundingReport) -> String {
    let mut text = String::new();
    if !report.roles.is_empty() {
        text.push_str(&format!(
            "\n{:<16} {:>8} {:>13} {:>24}\n",
            "role", "tensors", "with feedback", "held-out error, ratio"
        ));
        for row in &report.roles {
            let ratio = row.held_out_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
            text.push_str(&format!("{:<16} {:>8} {:>13} {:>24}\n", row.role, row.tensors, row.feedback, ratio));
        }
    }
    let words = |list: Vec<String>| list.join(", ");
    let methods = words(report.methods.iter().map(|(method, n)| format!("{} {method}", count(*n as u64))).collect());
    let kept = words(report.kept.iter().map(|(kept, n)| format!("{} {kept}", count(*n as u64))).collect());
    match (methods.is_empty(), kept.is_empty()) {
        (true, _) => text.push_str(&format!("rounding: {}\n", report.record.method)),
        (false, true) => text.push_str(&format!("rounded: {methods}\n")),
        (false, false) => text.push_str(&format!("rounded: {methods} (kept for: {kept})\n")),
    }
    if let Some(whole) = &report.whole {
        text.push_str(&format!(
            "the whole on the text of the gate: KL divergence {:.6}, rounded by search {:.6}\n",
            whole.kld, whole.search_kld
        ));
        if !whole.searched_layers.is_empty() {
            let layers: Vec<String> = whole.searched_layers.iter().map(ToString::to_string).collect();
            text.push_str(&format!("layers that keep search, since feedback did harm there: {}\n", layers.join(", ")));
        }
    }
    text
}
