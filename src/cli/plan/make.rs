//! From a model, a limit and the damage of every type to a plan.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use super::budget::Budget;
use super::damage::{self, Estimate};
use lwq::plan::allocate::{
    AllocateError, Candidate, Item, Solution, byte_range, fill_budget, minimize_bytes, minimize_damage,
};
use crate::cli::measure::{Job, MeasureFlags, Target};
use crate::cli::quantize::standard_file_bytes;
use crate::cli::rounding::Calibration;
use crate::cli::{Common, Interrupted, decimal_size, printable};
use lwq::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, TensorType, fingerprint, split};
use lwq::imatrix::{EntryFilter, Imatrix, ModelTensor, Need, match_to_model};
use lwq::model::Model;
use lwq::recipe::candidates::{Legal, Rules, legal_types};
use lwq::plan::{self, PLAN_VERSION, PlanFile, PlanRow, SourceFile, imatrix_fingerprint, record};
use lwq::recipe::{TensorDesc, output_order};
use lwq::rounding::{Method, RoundingRecord, has_input, output_tensor};

/// `general.quantization_version` and `general.file_type` are 32-bit numbers whatever the types are.
const PLACEHOLDER: u32 = 0;

/// A file is filled up to a thousandth of its target, where types allow it.
const FILLED_TO_PART: u64 = 1000;

/// What is asked for.
pub(in crate::cli) struct Request<'a> {
    pub budget: Budget,
    pub rules: Rules,
    pub method: plan::Method,
    pub imatrix: Option<&'a Path>,
    /// File of the measurement, which is made when it is not there.
    pub sensitivity: PathBuf,
    pub measure: &'a MeasureFlags,
    /// Measure around a first solution of few bits and solve again.
    pub second_round: bool,
    /// How the planned file will be rounded.
    pub rounding: RoundingRecord,
    /// The model and the texts, where that is feedback.
    pub feedback: Option<(&'a Model<'a>, &'a Calibration)>,
}

/// A plan, and what the user should be told about it.
pub(in crate::cli) struct Made {
    pub plan: PlanFile,
    pub notes: Vec<String>,
}

/// Importance and expert shares of the tensors that have data.
pub(super) struct Importance {
    /// `[matrices, row_len]`, row-major.
    pub values: Vec<f32>,
    /// Tokens that each matrix saw; empty where one count stands for all.
    pub tokens: Vec<u64>,
}

/// The model, tensors in the order of the written file.
pub(super) struct Subject<'a> {
    pub gguf: &'a Gguf,
    pub tensors: Vec<&'a TensorInfo>,
    pub legal: Vec<Legal>,
    pub importance: HashMap<String, Importance>,
    /// How often each token is to be expected, where the rows of the embedding serve nothing but their tokens.
    token_frequencies: Option<Vec<f64>>,
}

impl Subject<'_> {
    /// Tensors whose type can be chosen, with their types.
    pub fn choosable(&self) -> impl Iterator<Item = (&TensorInfo, &[TensorType])> {
        self.tensors.iter().zip(&self.legal).filter_map(|(tensor, legal)| match legal {
            Legal::Types(types) => Some((*tensor, types.as_slice())),
            Legal::Kept(_) => None,
        })
    }
}

/// An importance matrix with the entries for plans among the others, and where it came from.
fn open_imatrix(path: Option<&Path>) -> Result<Option<(Imatrix, SourceFile)>> {
    let Some(path) = path else { return Ok(None) };
    let imatrix = Imatrix::open(path)?.with_planning();
    let source = SourceFile { name: path.display().to_string(), sha256: imatrix_fingerprint(&imatrix) };
    Ok(Some((imatrix, source)))
}

impl<'a> Subject<'a> {
    fn new(
        gguf: &'a Gguf,
        rules: &Rules,
        imatrix: Option<Imatrix>,
        rounding: Method,
        notes: &mut Vec<String>,
    ) -> Result<Subject<'a>> {
        let input = printable(gguf.label());
        let names: Vec<&str> = gguf.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        let tensors: Vec<&TensorInfo> = output_order(&names).into_iter().map(|at| &gguf.tensors()[at]).collect();
        let has_imatrix = imatrix.is_some();
        let tied = gguf.tensor("output.weight").is_none();
        let token_frequencies = imatrix.as_ref().filter(|_| !tied).and_then(Imatrix::token_frequencies);
        let importance = match imatrix {
            Some(imatrix) => match_importance(imatrix, &tensors, notes)?,
            None => HashMap::new(),
        };
        let descriptions: Vec<TensorDesc> = tensors.iter().map(|tensor| TensorDesc::from(*tensor)).collect();
        // Feedback finds out by itself how important the inputs are that the model shows.
        let by_feedback = |name: &str| rounding == Method::Feedback && has_input(name, output_tensor(gguf));
        let has_data = |name: &str| importance.contains_key(name) || by_feedback(name);
        let weighted = has_imatrix || rounding == Method::Feedback;
        let legal =
            legal_types(&descriptions, rules, weighted, has_data).map_err(|error| anyhow!("{input}: {error}"))?;
        notes.extend(legal.notes);
        let subject = Subject { gguf, tensors, legal: legal.tensors, importance, token_frequencies };
        if subject.choosable().next().is_none() {
            bail!("{input}: holds no tensor that can be quantized; there is nothing to plan");
        }
        Ok(subject)
    }

    /// The tensors as a measurement sees them.
    pub fn targets(&self) -> Vec<Target<'_>> {
        let target = |(tensor, _): (&'a TensorInfo, _)| {
            let importance = self.importance.get(&tensor.name);
            Target {
                tensor,
                importance: importance.map(|found| found.values.as_slice()),
                rows: self.row_factors(tensor),
            }
        };
        let chosen = self.tensors.iter().copied().zip(&self.legal).filter(|(_, l)| matches!(l, Legal::Types(_)));
        chosen.map(target).collect()
    }

    /// How much the errors of each row count, relative to the others: the share of the tokens that the matrix of each row
    /// sees, for experts; how often a token is to be expected, for an embedding.
    pub fn row_factors(&self, tensor: &TensorInfo) -> Option<Vec<f64>> {
        if tensor.name == "token_embd.weight" {
            return self.token_frequencies.clone().filter(|found| found.len() as u64 == tensor.rows());
        }
        let tokens = &self.importance.get(&tensor.name).filter(|found| !found.tokens.is_empty())?.tokens;
        let rows = tensor.rows_per_matrix() as usize;
        Some(tokens.iter().flat_map(|&tokens| std::iter::repeat_n(tokens as f64, rows)).collect())
    }
}

/// Runs `work` with all tensors of a model that a plan may choose types for.
///
/// # Errors
/// When the imatrix does not fit the model, and those of `work`.
pub(in crate::cli) fn with_targets<T>(
    gguf: &Gguf,
    imatrix: Option<&Path>,
    common: &Common,
    work: impl FnOnce(Vec<Target<'_>>, Option<SourceFile>) -> Result<T>,
) -> Result<T> {
    let (imatrix, source) = open_imatrix(imatrix)?.unzip();
    let mut notes = Vec::new();
    let subject = Subject::new(gguf, &Rules::default(), imatrix, Method::Ggml, &mut notes)?;
    notes.iter().for_each(|line| common.warn(line));
    work(subject.targets(), source)
}

/// Makes a plan.
///
/// # Errors
/// When a file is wrong, the types allowed leave a tensor without one, or the limit cannot be kept.
pub(in crate::cli) fn make_plan(request: &Request<'_>, gguf: &Gguf, common: &Common) -> Result<Made> {
    let input = printable(gguf.label());
    let (imatrix, imatrix_source) = open_imatrix(request.imatrix)?.unzip();
    let mut notes = Vec::new();
    let mut plan = empty_plan(request, gguf, imatrix_source.clone());
    let metadata = output_metadata(gguf.metadata(), imatrix.as_ref(), &plan, &PlanFile::digest(""));
    let subject = Subject::new(gguf, &request.rules, imatrix, request.rounding.method, &mut notes)?;

    let sizes = Sizes::new(&subject, &metadata)?;
    let limit = sizes.limit(request, gguf, common)?;
    // An impossible limit shows before the work, not after it.
    let unmeasured = sizes.items(&subject, |_, _| 0.0);
    let (smallest, largest) = byte_range(&unmeasured);
    if let Limit::Bytes { budget, .. } = limit {
        if budget < smallest {
            bail!(sizes.too_small(&input, request, limit, smallest, largest));
        }
        if budget > largest {
            notes.push(format!(
                "the largest choice of types makes a file of {}; more than that cannot be used",
                decimal_size(sizes.fixed + largest)
            ));
        }
    }

    let bits = match limit {
        Limit::Bytes { budget, .. } => free_bits(&subject, &unmeasured, budget),
        Limit::Damage(_) => None,
    };
    let job = Job {
        gguf,
        imatrix: imatrix_source,
        targets: subject.targets(),
        flags: request.measure,
        path: &request.sensitivity,
    };
    let named = |error: anyhow::Error| if error.is::<Interrupted>() { error } else { error.context(input.clone()) };
    let mut estimate = damage::estimate(&subject, &job, request, bits, common).map_err(named)?;
    let solve = |estimate: &Estimate| -> Result<(Vec<Item>, Solution)> {
        let items = sizes.items(&subject, |name, ty| estimate.damage(name, ty));
        let solved = match limit {
            Limit::Bytes { budget, file } => minimize_damage(&items, budget).and_then(|solution| {
                let whole = file.unwrap_or(budget + sizes.kept_padded);
                fill_budget(&items, &solution, budget, whole / FILLED_TO_PART)
            }),
            Limit::Damage(most) => minimize_bytes(&items, estimate.damage_for(most)),
        };
        let solution = solved.map_err(|error| match error {
            AllocateError::BudgetTooSmall { smallest, largest, .. } => {
                anyhow!(sizes.too_small(&input, request, limit, smallest, largest))
            }
            AllocateError::DamageTooSmall { limit, least } => anyhow!(
                "{input}: a predicted KL divergence of {:.3e} is out of reach: the types allowed come to {:.3e} at best, \
                 in a file of {}; allow more types or a larger divergence",
                estimate.predict(limit),
                estimate.predict(least),
                decimal_size(sizes.fixed + largest)
            ),
            other => anyhow!("{input}: {other}"),
        })?;
        Ok((items, solution))
    };
    let (mut items, mut solution) = solve(&estimate)?;
    let chosen = |items: &[Item], solution: &Solution| -> HashMap<String, TensorType> {
        let picks = items.iter().zip(&solution.picks);
        picks.map(|(item, &pick)| (item.name.clone(), item.candidates[pick].ty)).collect()
    };
    if request.second_round && estimate.refine(&job, &chosen(&items, &solution), common)? {
        (items, solution) = solve(&estimate)?;
    }
    fill_in(&mut plan, &subject, &items, &solution, &sizes, &limit);
    plan.predicted_kld = estimate.predict(solution.damage);
    let damages = plan.tensors.iter().map(|row| (row.tensor.as_str(), row.damage));
    plan.predicted_kld_error = estimate.relative_error(damages).map(|relative| relative * plan.predicted_kld);
    plan.text = estimate.text();
    Ok(Made { plan, notes })
}

/// Bits per weight that a byte budget leaves for the tensors that have a choice.
fn free_bits(subject: &Subject<'_>, items: &[Item], budget: u64) -> Option<f64> {
    let (mut left, mut weights) = (budget, 0);
    for ((tensor, types), item) in subject.choosable().zip(items) {
        match types {
            [_] => left = left.saturating_sub(item.candidates[0].bytes),
            _ => weights += tensor.elements(),
        }
    }
    (weights > 0).then(|| 8.0 * left as f64 / weights as f64)
}

fn empty_plan(request: &Request<'_>, gguf: &Gguf, imatrix: Option<SourceFile>) -> PlanFile {
    PlanFile {
        lwq_plan: PLAN_VERSION,
        lwq_version: env!("CARGO_PKG_VERSION").to_owned(),
        target: request.budget.words(),
        target_bytes: None,
        file_bytes: 0,
        tensor_bytes: 0,
        parameters: 0,
        bits_per_weight: 0.0,
        method: request.method,
        predicted_kld: 0.0,
        predicted_kld_error: None,
        bound: 0.0,
        gap: 0.0,
        optimal: false,
        model: SourceFile { name: gguf.label().to_owned(), sha256: fingerprint(gguf) },
        imatrix,
        text: None,
        rounding: (request.rounding.method != Method::Ggml).then(|| request.rounding.clone()),
        tensors: Vec::new(),
    }
}

/// The metadata of a file written after `plan`, in all but the values of two numbers. What a run of `lwq quantize` with
/// the plan writes must come out exactly as long.
fn output_metadata(source: &Metadata, imatrix: Option<&Imatrix>, plan: &PlanFile, sha256: &str) -> Metadata {
    let mut metadata = source.clone();
    if let (Some(imatrix), Some(source)) = (imatrix, &plan.imatrix) {
        for (key, value) in imatrix.quantize_metadata(&source.name, imatrix.entries.len()) {
            metadata.set(key, value);
        }
    }
    metadata.set("general.quantization_version", PLACEHOLDER);
    metadata.set("general.file_type", PLACEHOLDER);
    record(&mut metadata, plan, sha256);
    if let Some(rounding) = &plan.rounding {
        rounding.write(&mut metadata);
    }
    metadata
}

fn match_importance(
    mut imatrix: Imatrix,
    tensors: &[&TensorInfo],
    notes: &mut Vec<String>,
) -> Result<HashMap<String, Importance>> {
    let wanted: Vec<ModelTensor> = tensors
        .iter()
        .map(|tensor| ModelTensor {
            name: &tensor.name,
            row_len: tensor.row_len(),
            matrices: tensor.matrices(),
            need: match lwq::recipe::roles::exemption(&tensor.name, &tensor.shape) {
                Some(_) => Need::Kept,
                None => Need::Optional,
            },
        })
        .collect();
    let report = match_to_model(&imatrix, &wanted, &EntryFilter::All, Cow::Borrowed);
    report.check()?;
    notes.extend(report.warnings());
    let mut importance = HashMap::new();
    for used in &report.used {
        let Some(entry) = imatrix.entries.remove(&used.entry) else { continue };
        // Data of an expert tensor that no token reached weigh nothing.
        if entry.is_empty() {
            continue;
        }
        let tokens = if entry.matrices() > 1 { entry.counts.clone() } else { Vec::new() };
        importance.insert(used.tensor.clone(), Importance { values: entry.into_importance().values, tokens });
    }
    Ok(importance)
}

/// What the allocation has to keep.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// Bytes for the data of the tensors that are chosen, padding included, and for the whole file where that is what
    /// the request limits.
    Bytes { budget: u64, file: Option<u64> },
    /// Damage.
    Damage(f64),
}

/// Bytes of everything that the choice does not change.
struct Sizes {
    alignment: u64,
    /// Header and kept tensors, padding included.
    fixed: u64,
    /// Data of the kept tensors, without padding, and with it.
    kept: u64,
    kept_padded: u64,
    parameters: u64,
}

impl Sizes {
    fn new(subject: &Subject<'_>, metadata: &Metadata) -> Result<Sizes> {
        let smallest = |tensor: &TensorInfo, legal: &Legal| match legal {
            Legal::Types(types) => types.first().copied().unwrap_or(tensor.ty),
            Legal::Kept(_) => tensor.ty,
        };
        let pairs = || subject.tensors.iter().zip(&subject.legal);
        let new_tensors = pairs().map(|(tensor, legal)| NewTensor {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            ty: smallest(tensor, legal),
        });
        let metadata = split::shard_metadata(metadata, 0, 1, subject.tensors.len() as u64);
        let layout = GgufLayout::new(subject.gguf.label(), &metadata, new_tensors)?;
        let chosen = |legal: &Legal| matches!(legal, Legal::Types(_));
        let placed = || layout.tensors().iter().zip(pairs());
        let planned: u64 =
            placed().filter(|(_, (_, legal))| chosen(legal)).map(|(placed, _)| placed.padded_bytes).sum();
        let kept = || placed().filter(|(_, (_, legal))| !chosen(legal)).map(|(placed, _)| placed);
        Ok(Sizes {
            alignment: layout.alignment().into(),
            fixed: layout.file_bytes() - planned,
            kept: kept().map(|placed| placed.bytes).sum(),
            kept_padded: kept().map(|placed| placed.padded_bytes).sum(),
            parameters: subject.tensors.iter().map(|tensor| tensor.elements()).sum(),
        })
    }

    /// What the request leaves for the tensors that are chosen.
    fn limit(&self, request: &Request<'_>, gguf: &Gguf, common: &Common) -> Result<Limit> {
        let for_file = |bytes: u64| Limit::Bytes { budget: bytes.saturating_sub(self.fixed), file: Some(bytes) };
        Ok(match &request.budget {
            Budget::File(size) => for_file(size.bytes),
            Budget::Like(target) => {
                let bytes = standard_file_bytes(gguf, *target, request.imatrix, request.rounding.method)?;
                common.note(format!("a standard {target} file has {bytes} bytes ({})", decimal_size(bytes)));
                for_file(bytes)
            }
            Budget::BitsPerWeight(bits) => {
                let bytes = (bits * self.parameters as f64 / 8.0).floor() as u64;
                Limit::Bytes { budget: bytes.saturating_sub(self.kept_padded), file: None }
            }
            Budget::Divergence(most) => Limit::Damage(*most),
        })
    }

    /// The items of the allocation, one for each tensor that can be chosen.
    fn items(&self, subject: &Subject<'_>, damage: impl Fn(&str, TensorType) -> f64) -> Vec<Item> {
        let item = |(tensor, types): (&TensorInfo, &[TensorType])| Item {
            name: tensor.name.clone(),
            candidates: types
                .iter()
                .map(|&ty| Candidate {
                    ty,
                    bytes: data_bytes(tensor, ty).next_multiple_of(self.alignment),
                    damage: damage(&tensor.name, ty),
                })
                .collect(),
        };
        subject.choosable().map(item).collect()
    }

    fn too_small(&self, input: &str, request: &Request<'_>, limit: Limit, smallest: u64, largest: u64) -> String {
        let wanted = request.budget.words();
        let range = |fixed: u64| (fixed + smallest, fixed + largest);
        match limit {
            Limit::Bytes { file: None, .. } => {
                let (smallest, largest) = range(self.kept_padded);
                let bits = |bytes: u64| 8.0 * bytes as f64 / self.parameters.max(1) as f64;
                format!(
                    "{input}: {wanted} cannot be reached: the smallest choice of types has {:.4} bits per weight (a file of {} \
                     bytes), the largest {:.4}; allow smaller types or ask for more",
                    bits(smallest),
                    self.fixed + smallest - self.kept_padded,
                    bits(largest)
                )
            }
            _ => {
                let (smallest, largest) = range(self.fixed);
                format!(
                    "{input}: {wanted} cannot be reached: the smallest possible file has {smallest} bytes ({}), the largest \
                     {largest} ({}); allow smaller types or ask for more",
                    decimal_size(smallest),
                    decimal_size(largest)
                )
            }
        }
    }
}

/// Bytes of a tensor in a type that fits it.
fn data_bytes(tensor: &TensorInfo, ty: TensorType) -> u64 {
    let row = ty.info().and_then(|info| info.row_bytes(tensor.row_len())).unwrap_or(0);
    row.saturating_mul(tensor.rows())
}

fn fill_in(
    plan: &mut PlanFile,
    subject: &Subject<'_>,
    items: &[Item],
    solution: &Solution,
    sizes: &Sizes,
    limit: &Limit,
) {
    plan.tensors = subject
        .choosable()
        .zip(items.iter().zip(&solution.picks))
        .map(|((tensor, _), (item, &pick))| {
            let chosen = item.candidates[pick];
            let bytes = data_bytes(tensor, chosen.ty);
            PlanRow { tensor: tensor.name.clone(), ty: chosen.ty, bytes, damage: chosen.damage }
        })
        .collect();
    plan.file_bytes = sizes.fixed + solution.bytes;
    plan.tensor_bytes = sizes.kept + plan.tensors.iter().map(|row| row.bytes).sum::<u64>();
    plan.parameters = sizes.parameters;
    plan.bits_per_weight = 8.0 * plan.tensor_bytes as f64 / sizes.parameters.max(1) as f64;
    plan.bound = solution.bound;
    plan.optimal = solution.optimal;
    (plan.target_bytes, plan.gap) = match limit {
        Limit::Bytes { file, .. } => (*file, solution.relative_gap(solution.damage)),
        Limit::Damage(_) => (None, solution.relative_gap(solution.bytes as f64)),
    };
}
