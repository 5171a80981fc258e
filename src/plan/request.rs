//! What is asked for.

use std::path::{Path, PathBuf};

use super::{Budget, DamageMethod, PlanError, PlanFile, make};
use crate::gguf::Gguf;
use crate::imatrix::Named;
use crate::measure::{ProbeOptions, path_for};
use crate::progress::Watch;
use crate::quantize::Rounding;
use crate::recipe::Target;
use crate::recipe::candidates::Rules;

/// A request for a plan: a type for every tensor of a model, so that the file keeps a limit and loses least.
///
/// ```
/// use lwq::gguf::Gguf;
/// use lwq::imatrix::{Imatrix, Named};
/// use lwq::plan::{DamageMethod, Request};
/// use lwq::quantize;
/// use lwq::recipe::Target;
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let imatrix = Imatrix::open("tests/data/golden/doclet.imatrix.gguf".as_ref())?;
/// let named = Named { name: "doclet.imatrix.gguf", imatrix: &imatrix };
/// // By rounding errors alone; without this line the model is measured first, which takes longer and is better.
/// let request = Request::like(Target::Q4_K_M).method(DamageMethod::Error).imatrix(named);
/// let plan = request.make(&model, &())?;
/// assert!(plan.file_bytes <= plan.target_bytes.ok_or("no limit")?);
///
/// let draft = quantize::Request::choices(plan.choices_for(&model, Some(&imatrix))?).imatrix(named).decide(&model)?;
/// assert_eq!(draft.file_bytes(), plan.file_bytes);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Request<'a> {
    pub(super) budget: Budget,
    pub(super) rules: Rules,
    pub(super) method: DamageMethod,
    pub(super) imatrix: Option<Named<'a>>,
    pub(super) sensitivity: Option<PathBuf>,
    pub(super) probes: ProbeOptions,
    pub(super) second_round: bool,
    pub(super) rounding: Rounding<'a>,
    pub(super) siblings_equal: bool,
}

impl<'a> Request<'a> {
    /// A plan that keeps a limit.
    pub fn new(budget: Budget) -> Request<'a> {
        Request {
            budget,
            rules: Rules::default(),
            method: DamageMethod::Measured,
            imatrix: None,
            sensitivity: None,
            probes: ProbeOptions::default(),
            second_round: false,
            rounding: Rounding::Ggml,
            siblings_equal: false,
        }
    }

    /// A plan for at most the bytes of the standard file of a target, made with the same imatrix.
    pub fn like(target: Target) -> Request<'a> {
        Request::new(Budget::Like(target))
    }

    /// Weighs rounding errors by an importance matrix.
    pub fn imatrix(mut self, imatrix: Named<'a>) -> Self {
        self.imatrix = Some(imatrix);
        self
    }

    /// Restricts the types.
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Where the damage of a type is taken from.
    pub fn method(mut self, method: DamageMethod) -> Self {
        self.method = method;
        self
    }

    /// File of the measurement, which is made when it is not there; without one the file beside the model, see
    /// [`path_for`](crate::measure::path_for).
    pub fn sensitivity(mut self, path: &Path) -> Self {
        self.sensitivity = Some(path.to_owned());
        self
    }

    /// What probes run on, where the measurement has to be made.
    pub fn probes(mut self, probes: ProbeOptions) -> Self {
        self.probes = probes;
        self
    }

    /// Below 4 bits per weight, measures again around the first solution what each tensor contributes while the others are
    /// rounded too, and solves again.
    pub fn second_round(mut self, second_round: bool) -> Self {
        self.second_round = second_round;
        self
    }

    /// How the planned file will be rounded.
    pub fn rounding(mut self, rounding: Rounding<'a>) -> Self {
        self.rounding = rounding;
        self
    }

    /// Gives one type to what other programs put into one matrix: q, k and v; gate and up; the experts of a layer.
    pub fn siblings_equal(mut self, siblings_equal: bool) -> Self {
        self.siblings_equal = siblings_equal;
        self
    }

    /// Makes the plan. `watch` gets warnings about it at the end.
    ///
    /// # Errors
    /// When a file is wrong, the types allowed leave a tensor without one, the limit cannot be kept, or `watch` stops the
    /// measurement. What was measured is then kept for the next run.
    pub fn make(&self, model: &'a Gguf, watch: &dyn Watch) -> Result<PlanFile, PlanError> {
        make::make(self, model, watch)
    }

    /// Bytes of the smallest and the largest file that a plan can make. Runs and reads nothing.
    ///
    /// # Errors
    /// When a file is wrong, or the types allowed leave a tensor without one.
    pub fn size_range(&self, model: &'a Gguf) -> Result<(u64, u64), PlanError> {
        make::size_range(self, model)
    }

    /// The file of the measurement of `model`.
    pub(super) fn sensitivity_path(&self, model: &Gguf) -> PathBuf {
        let path = model.shards().first().and_then(|shard| shard.path()).unwrap_or(Path::new("model.gguf"));
        self.sensitivity.clone().unwrap_or_else(|| path_for(path, None).0)
    }
}
