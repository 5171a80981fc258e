//! From a model, a limit and the damage of every type to a plan.

use std::collections::HashMap;

use super::allocate::{
    AllocateError, Candidate, Item, Siblings, Solution, byte_range, fill_budget, minimize_bytes, minimize_damage,
};
use super::damage::{self, Estimate};
use super::{Budget, PLAN_VERSION, PlanError, PlanFile, PlanRow, Request, record};
use crate::display::{decimal_size, printable};
use crate::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, TensorTotals, TensorType, fingerprint, split};
use crate::imatrix::Imatrix;
use crate::measure::{Inventory, Job, MeasureError, SourceFile, with_planning};
use crate::progress::Watch;
use crate::quantize::standard_file_bytes;
use crate::recipe::candidates::Legal;
use crate::recipe::roles::siblings;
use crate::rounding::RoundingMethod;

/// `general.quantization_version` and `general.file_type` are 32-bit numbers whatever the types are.
const PLACEHOLDER: u32 = 0;

/// A file is filled up to a thousandth of its target, where types allow it.
const FILLED_TO_PART: u64 = 1000;

/// Makes a plan.
pub(super) fn make<'a>(request: &Request<'a>, gguf: &'a Gguf, watch: &dyn Watch) -> Result<PlanFile, PlanError> {
    let input = printable(gguf.label());
    let refused = |problem: String| PlanError::Limit { file: input.clone(), problem };
    let (imatrix, imatrix_source) = request.imatrix.map(with_planning).unzip();
    let mut notes = Vec::new();
    let mut plan = empty_plan(request, gguf, imatrix_source.clone());
    let metadata = output_metadata(gguf.metadata(), imatrix.as_ref(), &plan, &PlanFile::digest(""));
    let inventory = Inventory::new(gguf, &request.rules, imatrix.as_ref(), request.rounding.method(), &mut notes)?;

    let sizes = Sizes::new(&inventory, &metadata)?;
    let limit = sizes.limit(request, gguf, watch)?;
    // An impossible limit shows before the work, not after it.
    let unmeasured = sizes.items(&inventory, |_, _| 0.0);
    let grouped = |items: &[Item]| {
        let key = |name: &str| siblings(name).filter(|_| request.siblings_equal);
        Siblings::new(items, key).map_err(|error| refused(error.to_string()))
    };
    let (smallest, largest) = byte_range(grouped(&unmeasured)?.items());
    if let Limit::Bytes { budget, .. } = limit {
        if budget < smallest {
            return Err(refused(sizes.too_small(request, limit, smallest, largest)));
        }
        if budget > largest {
            notes.push(format!(
                "the largest choice of types makes a file of {}; more than that cannot be used",
                decimal_size(sizes.fixed + largest)
            ));
        }
    }

    let bits = match limit {
        Limit::Bytes { budget, .. } => free_bits(&inventory, &unmeasured, budget),
        Limit::Damage(_) => None,
    };
    let (tensors, path) = (inventory.measured(), request.sensitivity_path(gguf));
    let job = Job { gguf, imatrix: imatrix_source, tensors: &tensors, probes: &request.probes, path: &path };
    let named = |error: MeasureError| match error {
        MeasureError::Interrupted(interrupted) => PlanError::Interrupted(interrupted),
        source => PlanError::Damage { file: input.clone(), source: Box::new(source) },
    };
    let mut estimate = damage::estimate(&inventory, &job, request, bits, watch).map_err(named)?;
    let solve = |estimate: &Estimate| -> Result<(Vec<Item>, Solution), PlanError> {
        let items = sizes.items(&inventory, |name, ty| estimate.damage(name, ty));
        let siblings = grouped(&items)?;
        let groups = siblings.items();
        let solved = match limit {
            Limit::Bytes { budget, file } => minimize_damage(groups, budget).and_then(|solution| {
                let whole = file.unwrap_or(budget + sizes.kept_padded);
                fill_budget(groups, &solution, budget, whole / FILLED_TO_PART)
            }),
            Limit::Damage(most) => minimize_bytes(groups, estimate.damage_for(most)),
        };
        let solution = solved.map_err(|error| match error {
            AllocateError::BudgetTooSmall { smallest, largest, .. } => {
                refused(sizes.too_small(request, limit, smallest, largest))
            }
            AllocateError::DamageTooSmall { limit, least } => refused(format!(
                "a predicted KL divergence of {:.3e} is out of reach: the types allowed come to {:.3e} at best, in a file \
                 of {}; allow more types or a larger divergence",
                estimate.predict(limit),
                estimate.predict(least),
                decimal_size(sizes.fixed + largest)
            )),
            other => refused(other.to_string()),
        })?;
        let solution = siblings.apart(&items, solution);
        Ok((items, solution))
    };
    let (mut items, mut solution) = solve(&estimate)?;
    let chosen = |items: &[Item], solution: &Solution| -> HashMap<String, TensorType> {
        let picks = items.iter().zip(&solution.picks);
        picks.map(|(item, &pick)| (item.name.clone(), item.candidates[pick].ty)).collect()
    };
    // Not named by the model: its own errors name the file of the measurement.
    let again = request.second_round && estimate.refine(&job, &chosen(&items, &solution), watch)?;
    if again {
        (items, solution) = solve(&estimate)?;
    }
    fill_in(&mut plan, &inventory, &items, &solution, &sizes, &limit);
    plan.predicted_kld = estimate.predict(solution.damage);
    let damages = plan.tensors.iter().map(|row| (row.tensor.as_str(), row.damage));
    plan.predicted_kld_error = estimate.relative_error(damages).map(|relative| relative * plan.predicted_kld);
    plan.text = estimate.text();
    notes.iter().for_each(|line| watch.warn(line));
    Ok(plan)
}

/// Bytes of the smallest and the largest file that a plan can make.
pub(super) fn size_range(request: &Request<'_>, gguf: &Gguf) -> Result<(u64, u64), PlanError> {
    let (imatrix, source) = request.imatrix.map(with_planning).unzip();
    let plan = empty_plan(request, gguf, source);
    let metadata = output_metadata(gguf.metadata(), imatrix.as_ref(), &plan, &PlanFile::digest(""));
    let method = request.rounding.method();
    let inventory = Inventory::new(gguf, &request.rules, imatrix.as_ref(), method, &mut Vec::new())?;
    let sizes = Sizes::new(&inventory, &metadata)?;
    let (smallest, largest) = byte_range(&sizes.items(&inventory, |_, _| 0.0));
    Ok((sizes.fixed + smallest, sizes.fixed + largest))
}

/// Bits per weight that a byte budget leaves for the tensors that have a choice.
fn free_bits(inventory: &Inventory<'_>, items: &[Item], budget: u64) -> Option<f64> {
    let (mut left, mut weights) = (budget, 0);
    for ((tensor, types), item) in inventory.choosable().zip(items) {
        match types {
            [_] => left = left.saturating_sub(item.candidates[0].bytes),
            _ => weights += tensor.elements(),
        }
    }
    (weights > 0).then(|| TensorTotals { parameters: weights, bytes: left }.bits_per_weight())
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
        rounding: Some(request.rounding.record()).filter(|record| record.method != RoundingMethod::Ggml),
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
    fn new(inventory: &Inventory<'_>, metadata: &Metadata) -> Result<Sizes, PlanError> {
        let smallest = |tensor: &TensorInfo, legal: &Legal| match legal {
            Legal::Types(types) => types.first().copied().unwrap_or(tensor.ty),
            Legal::Kept(_) => tensor.ty,
        };
        let pairs = || inventory.tensors.iter().zip(&inventory.legal);
        let new_tensors = pairs().map(|(tensor, legal)| {
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            (NewTensor { name, shape, ty: smallest(tensor, legal) }, tensor.bytes)
        });
        let metadata = split::shard_metadata(metadata, 0, 1, inventory.tensors.len() as u64);
        let layout = GgufLayout::carried(inventory.gguf.label(), &metadata, new_tensors)?;
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
            parameters: inventory.tensors.iter().map(|tensor| tensor.elements()).sum(),
        })
    }

    /// What the request leaves for the tensors that are chosen.
    fn limit<'a>(&self, request: &Request<'a>, gguf: &'a Gguf, watch: &dyn Watch) -> Result<Limit, PlanError> {
        let for_file = |bytes: u64| Limit::Bytes { budget: bytes.saturating_sub(self.fixed), file: Some(bytes) };
        Ok(match &request.budget {
            Budget::File(size) => for_file(size.bytes),
            Budget::Like(target) => {
                let bytes = standard_file_bytes(gguf, *target, request.imatrix, request.rounding)?;
                watch.note(&format!("a standard {target} file has {bytes} bytes ({})", decimal_size(bytes)));
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
    fn items(&self, inventory: &Inventory<'_>, damage: impl Fn(&str, TensorType) -> f64) -> Vec<Item> {
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
        inventory.choosable().map(item).collect()
    }

    fn too_small(&self, request: &Request<'_>, limit: Limit, smallest: u64, largest: u64) -> String {
        let wanted = request.budget.words();
        let range = |fixed: u64| (fixed + smallest, fixed + largest);
        match limit {
            Limit::Bytes { file: None, .. } => {
                let (smallest, largest) = range(self.kept_padded);
                let bits = |bytes: u64| TensorTotals { parameters: self.parameters, bytes }.bits_per_weight();
                format!(
                    "{wanted} cannot be reached: the smallest choice of types has {:.4} bits per weight (a file of {} \
                     bytes), the largest {:.4}; allow smaller types or ask for more",
                    bits(smallest),
                    self.fixed + smallest - self.kept_padded,
                    bits(largest)
                )
            }
            _ => {
                let (smallest, largest) = range(self.fixed);
                format!(
                    "{wanted} cannot be reached: the smallest possible file has {smallest} bytes ({}), the largest \
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
    inventory: &Inventory<'_>,
    items: &[Item],
    solution: &Solution,
    sizes: &Sizes,
    limit: &Limit,
) {
    plan.tensors = inventory
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
    let totals = TensorTotals { parameters: plan.parameters, bytes: plan.tensor_bytes };
    plan.bits_per_weight = totals.bits_per_weight();
    plan.bound = solution.bound;
    plan.optimal = solution.optimal;
    (plan.target_bytes, plan.gap) = match limit {
        Limit::Bytes { file, .. } => (*file, solution.relative_gap(solution.damage)),
        Limit::Damage(_) => (None, solution.relative_gap(solution.bytes as f64)),
    };
}
