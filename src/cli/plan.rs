//! `lwq plan`: a type for every tensor, so that the file keeps a limit and loses least.

use std::io::{self, IsTerminal, Write as _};
use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::args::{AimFlags, BudgetArgs, ChoiceArgs, ImportanceArgs, ProbeArgs, RoundingFlags, TypeArgs, rounding};
use super::{Common, decimal_size};
use lwq::atomic_file::{AtomicFile, check_target};
use lwq::os::{same_file, terminal_width};
use lwq::plan::{MapStyle, PlanFile, Request, map, tensor_types};
use lwq::quantize::open_source;

/// Width of the map where there is no terminal to fit it to.
const PIPED_WIDTH: usize = 120;

/// Choose every tensor's type for a size, by the damage that each type does
#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    group(ArgGroup::new("unplanned")),
    group(ArgGroup::new("limit").required(true).args(["like", "target_size", "target_bpw", "max_kld"]))
)]
pub struct PlanArgs {
    #[command(flatten)]
    make: MakeArgs,
    #[command(subcommand)]
    command: Option<PlanCommand>,
}

/// What can be done with a plan.
#[derive(Subcommand, Debug)]
pub enum PlanCommand {
    Show(ShowArgs),
}

/// Show a plan: a map of layers by role, and the totals
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// Plan to read
    #[arg(value_name = "PLAN")]
    plan: PathBuf,
}

/// Flags for making a plan.
#[derive(Args, Debug)]
pub struct MakeArgs {
    /// Model to plan for: a GGUF file, or the first file of a split one
    #[arg(required = true, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    importance: ImportanceArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    probes: ProbeArgs,
    #[command(flatten)]
    rounding: RoundingFlags,
    /// Calibration text for --rounding feedback; repeatable [default: a built-in mix]
    #[arg(long, value_name = "TEXT")]
    calibration: Vec<PathBuf>,
    #[command(flatten)]
    types: TypeArgs,
    /// Give one type to what other programs put into one matrix: q, k and v; gate and up; the experts of a layer
    #[arg(long)]
    siblings_equal: bool,
    /// File to write [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value_t = FormatArg::Json)]
    format: FormatArg,
}

/// Forms as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatArg {
    /// plan.json, for lwq quantize --plan
    Json,
    /// REGEX=TYPE lines, for --tensor-type-file of llama-quantize and lwq quantize
    TensorTypes,
}

impl PlanArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a file cannot be read or written, or the limit cannot be kept.
    pub fn run(&self, common: &Common) -> Result<()> {
        match &self.command {
            Some(PlanCommand::Show(args)) => args.run(common),
            None => self.make.run(common),
        }
    }
}

impl MakeArgs {
    fn run(&self, common: &Common) -> Result<()> {
        // The command line makes sure that both are there.
        let (Some(model), Some(budget)) = (&self.model, self.budget.budget()) else { return Ok(()) };
        let gguf = open_source(model)?;
        if let Some(output) = &self.output {
            let inputs = gguf.shards().iter().filter_map(|shard| shard.path()).chain(self.importance.path());
            for input in inputs {
                if same_file(input, output) {
                    anyhow::bail!("{}: is an input; choose another name for the plan", output.display());
                }
            }
            check_target(output, common.force)?;
        }
        let watch = common.watch();
        let method = self.rounding.method(!self.calibration.is_empty(), None)?;
        let calibration = self.rounding.calibration(method, &self.calibration, &AimFlags::default(), &gguf, &watch)?;
        let importance = self.importance.open(model, true, common)?;
        let mut request =
            Request::new(budget).probes(self.probes.options(&watch)?).rounding(rounding(method, calibration.as_ref()));
        if let Some(opened) = &importance {
            request = request.imatrix(opened.named());
        }
        let request = request.siblings_equal(self.siblings_equal);
        let request = self.choice.apply(request, &self.types, model, self.output.as_deref(), common)?;
        let plan = request.make(&gguf, &watch)?;
        common.note(summary(&plan));
        let text = match self.format {
            FormatArg::Json => plan.to_text(),
            FormatArg::TensorTypes => tensor_types(&plan),
        };
        match &self.output {
            Some(output) => {
                let mut file = AtomicFile::create(output, common.force)?;
                file.write_all(text.as_bytes())?;
                file.commit()?;
                if common.json { common.result(plan.to_text()) } else { Ok(()) }
            }
            None => common.result(text),
        }
    }
}

/// The plan in one line.
pub(super) fn summary(plan: &PlanFile) -> String {
    let error = plan.predicted_kld_error.map_or_else(String::new, |error| format!(" ± {error:.5}"));
    format!(
        "planned {} ({} bytes, {:.4} bits per weight), predicted KL divergence {:.5}{error} by method {}, {:.3}% above \
         the bound",
        decimal_size(plan.file_bytes),
        plan.file_bytes,
        plan.bits_per_weight,
        plan.predicted_kld,
        plan.method,
        100.0 * plan.gap
    )
}

impl ShowArgs {
    fn run(&self, common: &Common) -> Result<()> {
        let (plan, _) = PlanFile::read(&self.plan)?;
        if common.json {
            return common.result(plan.to_text());
        }
        let terminal = io::stdout().is_terminal();
        let color = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let width = terminal_width().filter(|_| terminal).unwrap_or(PIPED_WIDTH);
        common.result(map(&plan, MapStyle { width, color }))
    }
}
