//! Everything about a run that is decided before any tensor is touched: types, importance, files, refusals.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::planned::Planned;
use super::rounding_plan::RoundingPlan;
use super::{QuantizeArgs, kv};
use lwq::atomic_file::{AtomicFile, check_target, folder_of};
use crate::cli::{Common, count, decimal_size, printable};
use lwq::gguf::{Array, Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, TensorType, Value, split};
use lwq::imatrix::{EntryFilter, Imatrix, MatchReport, ModelTensor, Need, match_to_model};
use lwq::os;
use lwq::quantize::write::{Rounding, TensorWork};
use lwq::recipe::{
    Choice, FallbackCost, ModelFacts, Options, PrunePlan, Recipe, Target, TensorDesc, choose_types, guess_file_type,
    output_order,
};
use lwq::rounding::{Method, has_input};

/// `general.quantization_version` of all block formats (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// What an output is made for.
pub(super) enum Goal {
    /// The rules of a target.
    Target(Target),
    /// A plan's types.
    Planned(Box<Planned>),
}

impl Goal {
    /// The plan, if it is one.
    pub fn planned(&self) -> Option<&Planned> {
        match self {
            Goal::Target(_) => None,
            Goal::Planned(planned) => Some(planned),
        }
    }
}

/// One decided output.
pub(super) struct Plan<'a> {
    pub gguf: &'a Gguf,
    /// The target's name, or what was planned for.
    pub target: String,
    /// What the output's default name ends in.
    suffix: String,
    pub tensors: Vec<PlannedTensor<'a>>,
    pub files: Vec<PlannedFile>,
    /// The rounding that was asked for, and where it goes by the model's inputs what that takes.
    pub rounding: RoundingPlan,
    pub fallback_cost: FallbackCost,
    notes: Vec<String>,
    /// Reasons why the run may not start; a dry run only shows them.
    pub problems: Vec<String>,
}

/// One output tensor.
pub(super) struct PlannedTensor<'a> {
    pub source: &'a TensorInfo,
    pub name: String,
    pub choice: Choice,
    importance: Option<Vec<f32>>,
    file: usize,
    offset: u64,
    pub bytes: u64,
}

impl PlannedTensor<'_> {
    /// Output file and offset in it.
    pub fn place(&self) -> (usize, u64) {
        (self.file, self.offset)
    }

    /// True if its weights are rounded at all.
    pub fn is_rounded(&self) -> bool {
        self.choice.ty.is_quantized() && self.choice.ty != self.source.ty
    }

    /// True if importance data weigh its rounding.
    pub fn is_weighted(&self) -> bool {
        self.importance.is_some()
    }
}

/// One output file.
pub(super) struct PlannedFile {
    pub path: PathBuf,
    pub layout: GgufLayout,
}

impl<'a> Plan<'a> {
    /// Decides everything.
    ///
    /// # Errors
    /// When the request or the files are wrong in a way that leaves nothing to plan.
    pub fn make(args: &QuantizeArgs, gguf: &'a Gguf, goal: &Goal, rounding: &RoundingPlan) -> Result<Plan<'a>> {
        let planned = goal.planned();
        let input = printable(gguf.label());
        let mut metadata = gguf.metadata().clone();
        for text in &args.override_kv {
            let (key, value) = kv::parse_override(text)?;
            metadata.set(&key, value);
        }
        // Mixes follow the whole model, as in llama-quantize: pruning must not change the types of what stays.
        let facts = ModelFacts::from_metadata(&metadata);
        let mut notes = Vec::new();
        let pruned = prune(args, gguf, &mut metadata, &mut notes).with_context(|| input.clone())?;

        let order = if args.keep_split {
            (0..gguf.tensors().len()).collect()
        } else {
            let names: Vec<&str> = gguf.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
            output_order(&names)
        };
        let sources: Vec<(&TensorInfo, String)> = order
            .into_iter()
            .map(|at| &gguf.tensors()[at])
            .filter_map(|tensor| match &pruned {
                Some(plan) => plan.rename(&tensor.name).map(|name| (tensor, name)),
                None => Some((tensor, tensor.name.clone())),
            })
            .collect();

        let imatrix = args.imatrix.as_ref().map(|path| Imatrix::open(path)).transpose()?;
        let imatrix = if planned.is_some() { imatrix.map(Imatrix::with_planning) } else { imatrix };
        // Feedback knows the importance of inputs, so the types are those of a file with an imatrix.
        let weighted = imatrix.is_some() || rounding.method == Method::Feedback;
        let mut recipe = match goal {
            Goal::Planned(planned) => planned.recipe(gguf, &sources, imatrix.as_ref())?,
            Goal::Target(target) => choose(args, *target, &facts, &sources, weighted).with_context(|| input.clone())?,
        };
        for ((tensor, _), choice) in sources.iter().zip(&mut recipe.choices) {
            choice.requires_imatrix &= !rounding.knows_input(gguf, tensor);
        }
        notes.extend(recipe.notes.iter().map(ToString::to_string));
        let fallback_cost = recipe.fallback_cost;

        let mut problems = Vec::new();
        let importance = match imatrix {
            Some(imatrix) => {
                let mut report = match_importance(args, &imatrix, &sources, &recipe.choices, pruned.as_ref())?;
                if let Some(plan) = &pruned {
                    let removed = |name: &str| gguf.tensor(name).is_some() && plan.rename(name).is_none();
                    report.unknown_names.retain(|name| !removed(name));
                }
                notes.extend(report.warnings());
                if let Err(problem) = report.check() {
                    problems.push(problem.to_string());
                }
                // A planned file has a fixed size, so its plan says how the imatrix is called.
                let name = match (planned.and_then(Planned::imatrix_name), &args.imatrix) {
                    (Some(name), _) => name.to_owned(),
                    (None, path) => path.as_ref().map_or_else(String::new, |path| path.display().to_string()),
                };
                for (key, value) in imatrix.quantize_metadata(&name, report.entries) {
                    metadata.set(key, value);
                }
                importance_values(imatrix, &report)
            }
            None => {
                problems.extend(missing_imatrix(&sources, &recipe.choices));
                HashMap::new()
            }
        };
        if !args.allow_requantize {
            problems.extend(requantized(&sources, &recipe.choices));
        }
        let (cost, input_name) = (&fallback_cost, &input);
        if cost.tensors > 0 {
            let extra = cost.got_bytes.saturating_sub(cost.wanted_bytes);
            notes.push(format!(
                "{input_name}: rows of {} tensors do not fit their type; the types used instead take {} more ({} for {}); \
                 --no-fallback refuses them",
                count(cost.tensors as u64),
                decimal_size(extra),
                decimal_size(cost.got_bytes),
                decimal_size(cost.wanted_bytes)
            ));
        }

        let of_goal = match goal {
            Goal::Target(target) => target.info().file_type,
            Goal::Planned(planned) => Some(planned.file_type()),
        };
        let file_type = match of_goal {
            Some(number) => number,
            None => match metadata.u32("general.file_type")? {
                Some(number) => number,
                None => guess_file_type(sources.iter().map(|(tensor, _)| tensor.ty)),
            },
        };
        metadata.set("general.quantization_version", QUANTIZATION_VERSION);
        metadata.set("general.file_type", file_type);

        if let Some(record) = &rounding.record {
            record.write(&mut metadata);
            notes.extend(planned.and_then(|planned| planned.rounding_note(record)));
        }
        let tensors = planned_tensors(sources, recipe, importance);
        let (target, suffix) = match goal {
            Goal::Planned(planned) => {
                planned.record(&mut metadata);
                (planned.label(), planned.suffix())
            }
            Goal::Target(target) => (target.to_string(), target.to_string()),
        };
        let mut plan = Plan {
            gguf,
            target,
            suffix,
            tensors,
            files: Vec::new(),
            rounding: rounding.clone(),
            fallback_cost,
            notes,
            problems,
        };
        plan.lay_out(args, &metadata)?;
        plan.notes.extend(planned.and_then(|planned| planned.size_note(plan.file_bytes())));
        Ok(plan)
    }

    /// Deals the tensors out to files and fixes every offset.
    fn lay_out(&mut self, args: &QuantizeArgs, metadata: &Metadata) -> Result<()> {
        let new_tensors: Vec<NewTensor> = self
            .tensors
            .iter()
            .map(|tensor| NewTensor {
                name: tensor.name.clone(),
                shape: tensor.source.shape.clone(),
                ty: tensor.choice.ty,
            })
            .collect();
        let shards = if args.keep_split {
            let shard_of: Vec<usize> = self.tensors.iter().map(|tensor| tensor.source.shard).collect();
            split::plan_like_input(&shard_of, self.gguf.shards().len())
        } else if let Some(max_bytes) = args.split_max_size {
            let bytes: Vec<u64> = new_tensors.iter().map(|tensor| unpadded_bytes(tensor).unwrap_or(0)).collect();
            split::plan_by_size(&bytes, max_bytes, metadata.alignment()?)
        } else {
            std::iter::once(0..new_tensors.len()).collect()
        };
        let Ok(shard_count) = u16::try_from(shards.len()) else {
            bail!(
                "{} output files, but a split model has at most 65535; choose a larger --split-max-size",
                shards.len()
            );
        };
        let output = self.output_path(args);
        for (file, range) in shards.into_iter().enumerate() {
            let number = file as u16;
            let shard_metadata = split::shard_metadata(metadata, number, shard_count, new_tensors.len() as u64);
            let path = if shard_count == 1 { output.clone() } else { shard_name(&output, number, shard_count) };
            let layout =
                GgufLayout::new(&path.display().to_string(), &shard_metadata, new_tensors[range.clone()].to_vec())?;
            for (tensor, placed) in self.tensors[range].iter_mut().zip(layout.tensors()) {
                tensor.file = file;
                tensor.offset = placed.offset;
                tensor.bytes = placed.bytes;
            }
            self.files.push(PlannedFile { path, layout });
        }
        Ok(())
    }

    /// OUTPUT, or the input's name with the target or the planned bits; of several outputs OUTPUT is the folder.
    fn output_path(&self, args: &QuantizeArgs) -> PathBuf {
        if let (Some(output), false) = (&args.output, args.makes_several()) {
            return output.clone();
        }
        let stem = match split::parse_shard_path(&args.input) {
            Some((prefix, _, _)) => prefix,
            None => args.input.with_extension(""),
        };
        let mut name = stem.into_os_string();
        name.push(format!("-{}.gguf", self.suffix));
        let beside = PathBuf::from(name);
        match (&args.output, beside.file_name()) {
            (Some(folder), Some(name)) => folder.join(name),
            _ => beside,
        }
    }

    /// Lines that the user should see before the work.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Checks what only the real run needs: that nothing is missing, and that the output can be written, with `others`
    /// bytes of other outputs beside it.
    ///
    /// # Errors
    /// The first reason why the run must not start.
    pub fn refuse_what_cannot_be_done(&self, others: u64, common: &Common) -> Result<()> {
        if let Some(problem) = self.problems.first() {
            bail!("{}: {problem}", printable(self.gguf.label()));
        }
        for file in &self.files {
            for shard in self.gguf.shards() {
                if shard.path().is_some_and(|input| os::same_file(input, &file.path)) {
                    bail!("{}: is the input; choose another name for the output", file.path.display());
                }
            }
            check_target(&file.path, common.force)?;
        }
        let needed = self.needed_bytes().saturating_add(others);
        // All files lie in one folder.
        let Some(folder) = self.files.first().map(|file| folder_of(&file.path)) else { return Ok(()) };
        if let Some(free) = os::free_space(folder)
            && free < needed
        {
            bail!(
                "{}: {} are needed and {} are free; free some space or choose another folder",
                folder.display(),
                decimal_size(needed),
                decimal_size(free)
            );
        }
        Ok(())
    }

    /// Bytes of disk space that the run takes for this output.
    pub fn needed_bytes(&self) -> u64 {
        self.file_bytes().saturating_add(self.unfinished_bytes())
    }

    /// Opens all output files under temporary names, reserves their space and writes their headers.
    ///
    /// # Errors
    /// When a file cannot be made.
    pub fn create_files(&self, common: &Common) -> Result<Vec<AtomicFile>> {
        let mut files = Vec::with_capacity(self.files.len());
        for planned in &self.files {
            let file = AtomicFile::create(&planned.path, common.force)?;
            file.reserve(planned.layout.file_bytes())?;
            planned.layout.write_header_at(file.file())?;
            files.push(file);
        }
        Ok(files)
    }

    /// The types of the tensors that feedback may round, by their names in the source; `output` is the matrix that
    /// gives the logits.
    pub fn types_for_feedback(&self, output: &str) -> HashMap<String, TensorType> {
        let chosen = self.tensors.iter().filter(|t| t.is_rounded() && has_input(&t.source.name, output));
        chosen.map(|tensor| (tensor.source.name.clone(), tensor.choice.ty)).collect()
    }

    /// Bytes that unfinished work takes beside the output.
    fn unfinished_bytes(&self) -> u64 {
        if self.rounding.method != Method::Feedback {
            return 0;
        }
        let rounded = self.tensors.iter().filter(|tensor| tensor.is_rounded()).map(|tensor| tensor.bytes);
        // The states that enter a layer and those that leave it.
        rounded.sum::<u64>().saturating_add(2 * self.rounding.states_bytes)
    }

    /// The pipeline's view of the plan, without the tensors named in `done`.
    pub fn work(&self, done: &HashSet<&str>) -> Vec<TensorWork<'_>> {
        let rounding = match self.rounding.method {
            Method::Ggml => Rounding::Ggml,
            Method::Search | Method::Feedback => Rounding::Search,
        };
        self.tensors
            .iter()
            .filter(|tensor| !done.contains(tensor.source.name.as_str()))
            .map(|tensor| TensorWork {
                source: tensor.source,
                target: tensor.choice.ty,
                rounding,
                importance: tensor.importance.as_deref(),
                file: tensor.file,
                offset: tensor.offset,
            })
            .collect()
    }

    /// Bytes of all output files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.layout.file_bytes()).sum()
    }
}

/// Opens the model; a directory or another kind of file is told apart from a damaged GGUF.
///
/// # Errors
/// When it is no readable GGUF model.
pub(in crate::cli) fn open_source(path: &Path) -> Result<Gguf> {
    let gguf = Gguf::open(path)?;
    if gguf.tensors().is_empty() {
        bail!("{}: holds no tensors; give a model", printable(gguf.label()));
    }
    if gguf.metadata().str("general.type")? == Some("imatrix") {
        bail!("{}: is an importance matrix, not a model; pass it with --imatrix", printable(gguf.label()));
    }
    Ok(gguf)
}

fn prune(
    args: &QuantizeArgs,
    gguf: &Gguf,
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<Option<PrunePlan>> {
    if args.prune_layers.is_empty() {
        return Ok(None);
    }
    let plan = PrunePlan::new(gguf.tensors().iter().map(|tensor| tensor.name.as_str()), &args.prune_layers)?;
    notes.extend(plan.notes().iter().map(ToString::to_string));
    let Some(architecture) = metadata.str("general.architecture")?.map(str::to_owned) else {
        bail!(
            "general.architecture is missing; --prune-layers needs it, add --override-kv general.architecture=str:NAME"
        );
    };
    let key = format!("{architecture}.block_count");
    let old_count = metadata.u64(&key)?;
    // Values given per block must lose the same blocks, or the pruned model has values for blocks that are gone.
    let prefix = format!("{architecture}.");
    let per_block: Vec<(String, Array)> = metadata
        .iter()
        .filter_map(|(key, value)| match value {
            Value::Array(array) if key.starts_with(&prefix) && Some(array.len()) == old_count => {
                Some((key.to_owned(), array.clone()))
            }
            _ => None,
        })
        .collect();
    let kept = plan.kept_blocks();
    for (key, array) in per_block {
        let values: Vec<Value> = array
            .iter()
            .enumerate()
            .filter(|(block, _)| kept.contains(&(*block as u64)))
            .map(|(_, value)| value)
            .collect();
        metadata.set(&key, Array::of_values(array.elem_type(), &values));
    }
    metadata.set(&key, u32::try_from(plan.block_count()).context("block numbers beyond 32 bits")?);
    notes.push(format!("{} of {} layers are removed", plan.removed(), plan.removed() + kept.len()));
    Ok(Some(plan))
}

fn choose(
    args: &QuantizeArgs,
    target: Target,
    facts: &ModelFacts,
    sources: &[(&TensorInfo, String)],
    has_imatrix: bool,
) -> Result<Recipe> {
    let tensor_types = args.by_hand().patterns()?;
    let options = Options {
        has_imatrix,
        pure: args.pure,
        leave_output_tensor: args.leave_output_tensor,
        output_tensor_type: args.output_tensor_type,
        token_embedding_type: args.token_embedding_type,
        tensor_types,
        allow_fallback: !args.no_fallback,
        ..Options::new(target)
    };
    let tensors: Vec<TensorDesc> =
        sources.iter().map(|(tensor, name)| TensorDesc { name, shape: &tensor.shape, ty: tensor.ty }).collect();
    Ok(choose_types(facts, &tensors, &options)?)
}

fn match_importance(
    args: &QuantizeArgs,
    imatrix: &Imatrix,
    sources: &[(&TensorInfo, String)],
    choices: &[Choice],
    pruned: Option<&PrunePlan>,
) -> Result<MatchReport> {
    let filter = EntryFilter::new(&args.include_weights, &args.exclude_weights)?;
    let old_names: HashMap<&str, &str> = match pruned {
        Some(_) => sources.iter().map(|(tensor, name)| (name.as_str(), tensor.name.as_str())).collect(),
        None => HashMap::new(),
    };
    let tensors: Vec<ModelTensor> = sources
        .iter()
        .zip(choices)
        .map(|((tensor, name), choice)| ModelTensor {
            name,
            row_len: tensor.row_len(),
            matrices: tensor.matrices(),
            need: match choice {
                _ if choice.ty == tensor.ty || !choice.ty.is_quantized() => Need::Kept,
                Choice { requires_imatrix: true, .. } => Need::Required,
                _ => Need::Optional,
            },
        })
        .collect();
    let entry_name = |name| Cow::Borrowed(old_names.get(name).copied().unwrap_or(name));
    Ok(match_to_model(imatrix, &tensors, &filter, entry_name))
}

/// Importance by output tensor name, one matrix after another.
fn importance_values(mut imatrix: Imatrix, report: &MatchReport) -> HashMap<String, Vec<f32>> {
    let mut values_of = |entry: &str| Some(imatrix.entries.remove(entry)?.into_importance().values);
    report.used.iter().filter_map(|used| Some((used.tensor.clone(), values_of(&used.entry)?))).collect()
}

fn missing_imatrix(sources: &[(&TensorInfo, String)], choices: &[Choice]) -> Option<String> {
    let needing: Vec<_> = sources.iter().zip(choices).filter(|(_, choice)| choice.requires_imatrix).collect();
    let ((_, name), choice) = needing.first()?;
    let others = match needing.len() - 1 {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Some(format!(
        "{} needs an importance matrix (tensor {}{others}); add --imatrix FILE",
        choice.ty.to_string().to_uppercase(),
        printable(name)
    ))
}

fn requantized(sources: &[(&TensorInfo, String)], choices: &[Choice]) -> Option<String> {
    let affected: Vec<_> = sources
        .iter()
        .zip(choices)
        .filter(|((tensor, _), choice)| tensor.ty.is_quantized() && tensor.ty != choice.ty)
        .collect();
    let ((tensor, name), _) = affected.first()?;
    Some(format!(
        "the source is quantized already ({} of {} tensors, {} is {}); take a 16-bit source, or add --allow-requantize \
         and lose quality twice",
        affected.len(),
        sources.len(),
        printable(name),
        tensor.ty.to_string().to_uppercase()
    ))
}

fn planned_tensors<'a>(
    sources: Vec<(&'a TensorInfo, String)>,
    recipe: Recipe,
    mut importance: HashMap<String, Vec<f32>>,
) -> Vec<PlannedTensor<'a>> {
    sources
        .into_iter()
        .zip(recipe.choices)
        .map(|((source, name), choice)| {
            let importance = importance.remove(&name);
            PlannedTensor { source, name, choice, importance, file: 0, offset: 0, bytes: 0 }
        })
        .collect()
}

fn unpadded_bytes(tensor: &NewTensor) -> Option<u64> {
    let row_len = tensor.shape.first().copied().unwrap_or(1);
    let rows: u64 = tensor.shape.iter().skip(1).product();
    tensor.ty.info()?.row_bytes(row_len)?.checked_mul(rows)
}

/// The name of a shard: OUTPUT without `.gguf`, number and count behind it.
fn shard_name(output: &Path, number: u16, count: u16) -> PathBuf {
    let named_gguf = output.extension().is_some_and(|extension| extension == "gguf");
    let prefix = if named_gguf { output.with_extension("") } else { output.to_path_buf() };
    split::shard_path(&prefix, number, count)
}
