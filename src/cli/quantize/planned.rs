//! Quantizing after a plan, read from a file or made on the way.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::QuantizeArgs;
use super::plan::{Goal, Plan};
use super::rounding_plan::RoundingPlan;
use crate::cli::measure::MeasureFlags;
use crate::cli::plan::{ByHand, Made, Request, make_plan, summary};
use crate::cli::rounding::Calibration;
use crate::cli::{Common, printable};
use lwq::gguf::{Gguf, Metadata, TensorInfo};
use lwq::imatrix::Imatrix;
use lwq::model::Model;
use lwq::plan::{PlanFile, record};
use lwq::recipe::{FILE_TYPE_GUESSED, FallbackCost, Recipe, Target, TensorDesc, guess_file_type};
use lwq::rounding::{Method, RoundingRecord};

/// A plan and where it came from.
pub(super) struct Planned {
    plan: PlanFile,
    /// The plan's file, or what stands for it in messages.
    name: String,
    /// Digest of the plan's text.
    sha256: String,
    /// What the output's default name ends in.
    suffix: String,
}

impl QuantizeArgs {
    /// Types given by hand.
    pub(super) fn by_hand(&self) -> ByHand<'_> {
        ByHand {
            tensor_type: &self.tensor_type,
            tensor_type_file: self.tensor_type_file.as_deref(),
            output_tensor_type: self.output_tensor_type,
            token_embedding_type: self.token_embedding_type,
        }
    }

    /// A plan for the limit of the command line, if it has one. `feedback` is there when the file is to be rounded so.
    ///
    /// # Errors
    /// When the plan cannot be made.
    pub(super) fn planned(
        &self,
        gguf: &Gguf,
        rounding: &RoundingPlan,
        feedback: Option<(&Model<'_>, &Calibration)>,
        common: &Common,
    ) -> Result<Option<Planned>> {
        let Some(budget) = self.budget.budget() else { return Ok(None) };
        let rules = self.choice.rules(&self.by_hand())?;
        let measure = MeasureFlags::default();
        let request = Request {
            budget,
            rules,
            method: self.choice.method(),
            imatrix: self.imatrix.as_deref(),
            sensitivity: self.choice.sensitivity(&self.input),
            measure: &measure,
            second_round: self.choice.second_round(),
            rounding: rounding.record.clone().unwrap_or_default(),
            feedback,
        };
        let Made { plan, notes } = make_plan(&request, gguf, common)?;
        notes.iter().for_each(|line| common.warn(line));
        common.note(summary(&plan));
        let sha256 = PlanFile::digest(&plan.to_text());
        Ok(Some(Planned { suffix: suffix(&plan), plan, name: "the plan".to_owned(), sha256 }))
    }
}

impl Planned {
    /// The plans of `--plan`. Those that come to the same bits per weight name their outputs after their files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read_all(paths: &[PathBuf]) -> Result<Vec<Planned>> {
        let mut plans = paths.iter().map(|path| Planned::read(path)).collect::<Result<Vec<_>>>()?;
        let suffixes: Vec<String> = plans.iter().map(|planned| planned.suffix.clone()).collect();
        for (planned, path) in plans.iter_mut().zip(paths) {
            let sharing = suffixes.iter().filter(|suffix| **suffix == planned.suffix).count();
            if let Some(stem) = path.file_stem().filter(|_| sharing > 1) {
                planned.suffix = stem.to_string_lossy().into_owned();
            }
        }
        Ok(plans)
    }

    fn read(path: &Path) -> Result<Planned> {
        let (plan, sha256) = PlanFile::read(path)?;
        Ok(Planned { suffix: suffix(&plan), plan, name: path.display().to_string(), sha256 })
    }

    /// The types of all tensors, after checking that the plan belongs to these files.
    ///
    /// # Errors
    /// When the plan was made for other files or does not fit the model.
    pub fn recipe(&self, gguf: &Gguf, sources: &[(&TensorInfo, String)], imatrix: Option<&Imatrix>) -> Result<Recipe> {
        self.plan.check_sources(&self.name, gguf, imatrix)?;
        let tensors: Vec<TensorDesc> =
            sources.iter().map(|(tensor, name)| TensorDesc { name, shape: &tensor.shape, ty: tensor.ty }).collect();
        let choices = self.plan.choices(&self.name, &tensors)?;
        Ok(Recipe { choices, fallback_cost: FallbackCost::default(), notes: Vec::new() })
    }

    /// The rounding that the plan was made for.
    pub fn rounding(&self) -> Option<Method> {
        self.plan.rounding.as_ref().map(|rounding| rounding.method)
    }

    /// A note where the plan was made for another rounding than that of the run.
    pub fn rounding_note(&self, record: &RoundingRecord) -> Option<String> {
        let planned = self.plan.rounding.as_ref()?;
        let text = |record: &RoundingRecord| record.calibration.as_ref().map(|of| of.text_sha256.clone());
        if planned.method != record.method {
            return Some(format!("{} was made for rounding by {}, not {}", self.name, planned.method, record.method));
        }
        let named = planned.calibration.as_ref().map_or("none", |of| of.text.as_str());
        (text(planned) != text(record)).then(|| {
            format!(
                "{} was made for another calibration text or length ({}); give it with -f",
                self.name,
                printable(named)
            )
        })
    }

    /// The imatrix's name as the plan has it.
    pub fn imatrix_name(&self) -> Option<&str> {
        self.plan.imatrix.as_ref().map(|imatrix| imatrix.name.as_str())
    }

    /// `general.file_type`: the number of the type that most planned tensors have.
    pub fn file_type(&self) -> u32 {
        guess_file_type(self.plan.tensors.iter().map(|row| row.ty)) & !FILE_TYPE_GUESSED
    }

    /// Adds the plan's keys.
    pub fn record(&self, metadata: &mut Metadata) {
        record(metadata, &self.plan, &self.sha256);
    }

    /// What was planned for, for reports.
    pub fn label(&self) -> String {
        format!("plan: {}", self.plan.target)
    }

    /// What the output's default name ends in.
    pub fn suffix(&self) -> String {
        self.suffix.clone()
    }

    /// A note where the files come out larger than planned for: other options of the run make them so.
    pub fn size_note(&self, file_bytes: u64) -> Option<String> {
        let target = self.plan.target_bytes.filter(|target| file_bytes > *target)?;
        Some(format!(
            "the output has {file_bytes} bytes, {} more than {} was made for; metadata or shards were added since",
            file_bytes - target,
            self.name
        ))
    }
}

fn suffix(plan: &PlanFile) -> String {
    format!("{:.2}bpw", plan.bits_per_weight)
}

/// Bytes of the file that `lwq quantize --target` writes with this imatrix, headers and padding included. With feedback
/// its types are those of a file with an imatrix, and its metadata those of one without.
///
/// # Errors
/// When such a file cannot be made.
pub(in crate::cli) fn standard_file_bytes(
    gguf: &Gguf,
    target: Target,
    imatrix: Option<&Path>,
    rounding: Method,
) -> Result<u64> {
    let args = QuantizeArgs {
        imatrix: imatrix.map(Path::to_path_buf),
        allow_requantize: true,
        output: Some("standard.gguf".into()),
        ..QuantizeArgs::default()
    };
    let plan = Plan::make(&args, gguf, &Goal::Target(target), &RoundingPlan::unrecorded(rounding))?;
    if let Some(problem) = plan.problems.first() {
        anyhow::bail!("{}: the standard {target} file cannot be made: {problem}", printable(gguf.label()));
    }
    Ok(plan.file_bytes())
}
