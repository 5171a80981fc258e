//! Everything about an output that is decided before any tensor is touched: types, importance, files, refusals.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::mtp::{self, Grafted};
use super::request::{Goal, Request};
use super::whole_gate::WholeVerdict;
use super::write::{RowRounding, TensorWork};
use super::{QuantizeError, Report, checks, importance, override_kv};
use crate::atomic_file::{AtomicFile, Replace, check_target, folder_of};
use crate::display::{count, decimal_size, printable};
use crate::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, TensorType, split};
use crate::imatrix::Imatrix;
use crate::moments::{Calibration, has_input, output_tensor};
use crate::os;
use crate::progress::Watch;
use crate::recipe::{
    Choice, FallbackCost, ModelFacts, PrunePlan, Reason, Recipe, Target, TensorDesc, choose_types, guess_file_type,
    output_order,
};
use crate::rounding::{RoundingMethod, RoundingRecord};

/// `general.quantization_version` of all block formats (`GGML_QNT_VERSION`).
const QUANTIZATION_VERSION: u32 = 2;

/// A decided output.
pub struct Draft<'a> {
    pub(super) gguf: &'a Gguf,
    /// Another file of the model whose blocks are added.
    donor: Option<&'a Gguf>,
    /// The target's name, or what the choices were made for.
    pub(super) target: String,
    /// What the output's default name ends in.
    suffix: String,
    pub(super) tensors: Vec<DraftTensor<'a>>,
    /// The files in order.
    files: Vec<GgufLayout>,
    /// Metadata of the first one.
    head: Metadata,
    pub(super) method: RoundingMethod,
    /// What the output records of its rounding.
    pub(super) record: Option<RoundingRecord>,
    pub(super) calibration: Option<&'a Calibration<'a>>,
    pub(super) fallback_cost: FallbackCost,
    notes: Vec<String>,
    problems: Vec<String>,
}

/// One output tensor.
pub(super) struct DraftTensor<'a> {
    /// The file that it comes from: the source, or another whose blocks are added.
    from: &'a Gguf,
    pub source: &'a TensorInfo,
    /// The file of a split source beside whose tensors it stands where the output is split alike.
    shard: usize,
    pub name: String,
    pub choice: Choice,
    importance: Option<Vec<f32>>,
    file: usize,
    offset: u64,
    pub bytes: u64,
}

impl DraftTensor<'_> {
    /// Output file and offset in it.
    pub(super) fn place(&self) -> (usize, u64) {
        (self.file, self.offset)
    }

    /// True if its weights are rounded at all.
    pub(super) fn is_rounded(&self) -> bool {
        self.choice.ty.is_quantized() && self.choice.ty != self.source.ty
    }

    /// True if importance data weigh its rounding.
    pub(super) fn is_weighted(&self) -> bool {
        self.importance.is_some()
    }
}

/// The source tensors of an output, in its order, with their names there.
pub(super) type Sources<'a> = Vec<(&'a TensorInfo, String)>;

impl<'a> Draft<'a> {
    /// Decides everything; the output gets `record` of its rounding.
    pub(super) fn decide(
        request: &Request<'a>,
        gguf: &'a Gguf,
        record: Option<RoundingRecord>,
    ) -> Result<Draft<'a>, QuantizeError> {
        let input = printable(gguf.label());
        let method = request.rounding.method();
        let mut metadata = gguf.metadata().clone();
        let mut notes = override_kv::apply(&mut metadata, &request.metadata, "--override-kv")?;
        // Without its blocks for multi-token prediction it is the model that was converted without them.
        let dropped = mtp::leave_out(request.mtp, gguf, &mut metadata, &mut notes)?;
        let left: Vec<&TensorInfo> = gguf.tensors().iter().filter(|tensor| stays(dropped.as_ref(), tensor)).collect();
        // Mixes follow the whole model, as in llama-quantize: pruning must not change the types of what stays.
        let facts = ModelFacts::from_metadata(&metadata);
        let grafted = mtp::graft(request.mtp, gguf, &mut metadata, &mut notes)?;
        let pruned = prune(request, gguf, &left, &mut metadata, &mut notes)?;
        let sources = sources(request, &left, pruned.as_ref());

        // Only plans know the entries that are for plans alone.
        let imatrix: Option<Cow<'_, Imatrix>> = request.imatrix.map(|named| match request.goal {
            Goal::Choices(_) => Cow::Owned(named.imatrix.clone().with_planning()),
            Goal::Target(_) => Cow::Borrowed(named.imatrix),
        });
        // Feedback knows the importance of inputs, so the types are those of a file with an imatrix.
        let weighted = imatrix.is_some() || method == RoundingMethod::Feedback;
        let mut recipe = match &request.goal {
            Goal::Choices(choices) => {
                let missing = |name: &str| QuantizeError::NotChosen {
                    file: input.clone(),
                    tensor: printable(name),
                    choices: choices.name.clone(),
                };
                let of_tensor =
                    |(_, name): &(_, String)| choices.by_tensor.get(name).cloned().ok_or_else(|| missing(name));
                let found = sources.iter().map(of_tensor).collect::<Result<_, _>>()?;
                Recipe { choices: found, fallback_cost: FallbackCost::default(), notes: Vec::new() }
            }
            Goal::Target(target) => choose(request, *target, &facts, &sources, weighted)
                .map_err(|source| QuantizeError::Recipe { file: input.clone(), source })?,
        };
        // The run finds out by itself how important these inputs are.
        let by_feedback =
            |tensor: &TensorInfo| method == RoundingMethod::Feedback && has_input(&tensor.name, output_tensor(gguf));
        for ((tensor, _), choice) in sources.iter().zip(&mut recipe.choices) {
            choice.requires_imatrix &= !by_feedback(tensor);
        }
        notes.extend(recipe.notes.iter().map(ToString::to_string));
        let fallback_cost = recipe.fallback_cost;
        let choices = match &request.goal {
            Goal::Choices(choices) => Some(choices.as_ref()),
            Goal::Target(_) => None,
        };
        if choices.is_none() {
            notes.extend(checks::widen_fallbacks(gguf, &sources, &mut recipe.choices));
        }

        let (mut problems, mut donor) = (Vec::new(), None);
        let matching = importance::Matching {
            filter: &request.filter,
            missing: request.missing_importance,
            imatrix: imatrix.as_deref(),
            sources: &sources,
            pruned: pruned.as_ref(),
            by_feedback: &by_feedback,
        };
        let found = matching.decide(&mut recipe.choices);
        if let (Some(imatrix), Some(named), Some(mut report)) = (&imatrix, request.imatrix, found.report) {
            let kept = |name: &str| [&dropped, &pruned].into_iter().flatten().all(|plan| plan.rename(name).is_some());
            report.unknown_names.retain(|name| gguf.tensor(name).is_none() || kept(name));
            notes.extend(report.warnings());
            let name = choices.and_then(|choices| choices.imatrix_name.as_deref()).unwrap_or(named.name);
            for (key, value) in imatrix.quantize_metadata(name, report.entries) {
                metadata.set(key, value);
            }
        }
        notes.extend(found.notes);
        problems.extend(found.problem);
        let importance = found.values;
        if let Goal::Target(target) = request.goal {
            notes.extend(checks::nothing_done(&input, target, &sources, &recipe.choices));
        }
        notes.extend(checks::carried_over(&sources));
        problems.extend(checks::unswappable(gguf, &sources));
        if !request.allow_requantize {
            problems.extend(checks::requantized(&sources, &recipe.choices));
        }
        if fallback_cost.tensors > 0 {
            let cost = &fallback_cost;
            let extra = cost.got_bytes.saturating_sub(cost.wanted_bytes);
            notes.push(format!(
                "{input}: rows of {} tensors do not fit their type; the types used instead take {} more ({} for {}); \
                 --no-fallback refuses them",
                count(cost.tensors as u64),
                decimal_size(extra),
                decimal_size(cost.got_bytes),
                decimal_size(cost.wanted_bytes)
            ));
        }

        let of_goal = match &request.goal {
            Goal::Target(target) => target.info().file_type,
            Goal::Choices(choices) => Some(choices.file_type),
        };
        let file_type = match of_goal {
            Some(number) => number,
            None => match metadata.u32("general.file_type")? {
                Some(number) => number,
                None => guess_file_type(sources.iter().map(|(tensor, _)| tensor.ty)),
            },
        };
        // What the user says of the file holds, as in llama-quantize.
        for (key, number) in [("general.quantization_version", QUANTIZATION_VERSION), ("general.file_type", file_type)]
        {
            if !request.metadata.iter().any(|(by_hand, _)| by_hand == key) {
                metadata.set(key, number);
            }
        }
        if let Some(record) = &record {
            record.write(&mut metadata);
            notes.extend(choices.and_then(|choices| choices.rounding_note(record)));
        }
        let mut tensors = draft_tensors(gguf, sources, recipe, importance);
        if let Some(grafted) = grafted {
            let added = grafted_tensors(&grafted, gguf);
            let sources: Sources<'_> = added.iter().map(|tensor| (tensor.source, tensor.name.clone())).collect();
            notes.extend(checks::carried_over(&sources));
            problems.extend(checks::unswappable(grafted.donor, &sources));
            donor = Some(grafted.donor);
            tensors.extend(added);
        }
        let (target, suffix) = match &request.goal {
            Goal::Choices(choices) => {
                for (key, value) in choices.metadata.iter() {
                    metadata.set(key, value.clone());
                }
                (choices.label.clone(), choices.suffix.clone())
            }
            Goal::Target(target) => (target.to_string(), target.to_string()),
        };
        let mut draft = Draft {
            gguf,
            donor,
            target,
            suffix,
            tensors,
            files: Vec::new(),
            head: metadata.clone(),
            method,
            record,
            calibration: request.rounding.calibration(),
            fallback_cost,
            notes,
            problems,
        };
        draft.lay_out(request, &metadata)?;
        draft.notes.extend(choices.and_then(|choices| choices.size_note(draft.file_bytes())));
        Ok(draft)
    }

    /// Deals the tensors out to files and fixes every offset.
    fn lay_out(&mut self, request: &Request<'_>, metadata: &Metadata) -> Result<(), QuantizeError> {
        use super::Split;
        let new_tensors: Vec<NewTensor> = self
            .tensors
            .iter()
            .map(|tensor| NewTensor {
                name: tensor.name.clone(),
                shape: tensor.source.shape.clone(),
                ty: tensor.choice.ty,
            })
            .collect();
        let shards = match request.split {
            Split::AsInput => {
                let shard_of: Vec<usize> = self.tensors.iter().map(|tensor| tensor.shard).collect();
                split::plan_like_input(&shard_of, self.gguf.shards().len())
            }
            Split::MaxBytes(max_bytes) => {
                let bytes = new_tensors.iter().zip(&self.tensors);
                let bytes = bytes.map(|(new, tensor)| unpadded_bytes(new).or(tensor.source.bytes).unwrap_or(0));
                let bytes: Vec<u64> = bytes.collect();
                split::plan_by_size(&bytes, max_bytes, metadata.alignment()?)
            }
            Split::Whole => std::iter::once(0..new_tensors.len()).collect(),
        };
        let Ok(shard_count) = u16::try_from(shards.len()) else {
            return Err(QuantizeError::TooManyFiles { count: shards.len() });
        };
        // The size of a type that nobody here knows is that in the source.
        let sized: Vec<(NewTensor, Option<u64>)> =
            new_tensors.into_iter().zip(&self.tensors).map(|(new, tensor)| (new, tensor.source.bytes)).collect();
        for (file, range) in shards.into_iter().enumerate() {
            let shard_metadata = split::shard_metadata(metadata, file as u16, shard_count, sized.len() as u64);
            let layout = GgufLayout::carried(self.gguf.label(), &shard_metadata, sized[range.clone()].to_vec())?;
            if file == 0 {
                self.head = shard_metadata;
            }
            for (tensor, placed) in self.tensors[range].iter_mut().zip(layout.tensors()) {
                tensor.file = file;
                tensor.offset = placed.offset;
                tensor.bytes = placed.bytes;
            }
            self.files.push(layout);
        }
        Ok(())
    }

    /// Lines that the user should see before the work.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Reasons why the draft cannot be written, such as a type that needs an importance matrix.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Bytes of all output files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(GgufLayout::file_bytes).sum()
    }

    /// The name of the output where none was chosen: that of the model with the target or the planned bits, beside it.
    pub fn default_output(&self) -> PathBuf {
        let input = self.gguf.shards().first().and_then(|shard| shard.path()).unwrap_or(Path::new("model.gguf"));
        let stem = match split::parse_shard_path(input) {
            Some((prefix, _, _)) => prefix,
            None => input.with_extension(""),
        };
        let mut name = stem.into_os_string();
        name.push(format!("-{}.gguf", self.suffix));
        PathBuf::from(name)
    }

    /// Names of all files of an output: itself, or numbered ones where it is split.
    pub fn paths(&self, output: &Path) -> Vec<PathBuf> {
        let count = self.files.len() as u16;
        if count == 1 {
            return vec![output.to_owned()];
        }
        (0..count).map(|number| split::shard_path_of(output, number, count)).collect()
    }

    /// What [`Self::write`] to `output` would make.
    pub fn report(&self, output: &Path) -> Report {
        Report::new(self, output, Vec::new(), None, None)
    }

    /// Makes the files.
    ///
    /// An interrupted run of [`Rounding::Feedback`](super::Rounding::Feedback) leaves its finished layers beside the
    /// output, and the next one goes on behind them; any other leaves nothing.
    ///
    /// # Errors
    /// Anything wrong with the files; no output file is left then.
    pub fn write(&self, output: &Path, replace: Replace, watch: &dyn Watch) -> Result<Report, QuantizeError> {
        let mut reports = super::write_all(&[(self, output.to_owned())], replace, watch)?;
        Ok(reports.remove(0))
    }

    /// Checks what only the real run needs: that nothing is missing, and that the output can be written, with `others`
    /// bytes of other outputs beside it.
    pub(super) fn refuse_what_cannot_be_done(
        &self,
        paths: &[PathBuf],
        others: u64,
        replace: Replace,
    ) -> Result<(), QuantizeError> {
        if let Some(problem) = self.problems.first() {
            return Err(QuantizeError::Problem { file: printable(self.gguf.label()), problem: problem.clone() });
        }
        for path in paths {
            for shard in [Some(self.gguf), self.donor].into_iter().flatten().flat_map(Gguf::shards) {
                if shard.path().is_some_and(|input| os::same_file(input, path)) {
                    return Err(QuantizeError::IsInput(path.clone()));
                }
            }
            check_target(path, replace.is_allowed())?;
        }
        let needed = self.needed_bytes().saturating_add(others);
        // All files lie in one folder.
        let Some(folder) = paths.first().map(|path| folder_of(path)) else { return Ok(()) };
        match os::free_space(folder) {
            Some(free) if free < needed => Err(QuantizeError::NoSpace { folder: folder.to_owned(), needed, free }),
            _ => Ok(()),
        }
    }

    /// Bytes of disk space that the run takes for this output, unfinished work included.
    pub fn needed_bytes(&self) -> u64 {
        self.file_bytes().saturating_add(self.unfinished_bytes())
    }

    /// Bytes that unfinished work takes beside the output.
    fn unfinished_bytes(&self) -> u64 {
        let Some(calibration) = self.calibration else { return 0 };
        let rounded = self.tensors.iter().filter(|tensor| tensor.is_rounded()).map(|tensor| tensor.bytes);
        // What feedback gives, and search where the whole is judged.
        let roundings = 1 + u64::from(calibration.has_final_gate());
        // The states that enter a layer and those that leave it.
        rounded.sum::<u64>().saturating_mul(roundings).saturating_add(2 * calibration.states_bytes())
    }

    /// Opens all output files under temporary names, reserves their space and writes their headers.
    pub(super) fn create_files(&self, paths: &[PathBuf], replace: Replace) -> Result<Vec<AtomicFile>, QuantizeError> {
        let mut files = Vec::with_capacity(self.files.len());
        for (layout, path) in self.files.iter().zip(paths) {
            let file = AtomicFile::create(path, replace.is_allowed())?;
            file.reserve(layout.file_bytes())?;
            layout.write_header_at(file.file())?;
            files.push(file);
        }
        Ok(files)
    }

    /// Writes what the gate of the whole file found to its place in the first file's metadata, which keep their length.
    pub(super) fn record_verdict(&self, first: &AtomicFile, verdict: &WholeVerdict) -> Result<(), QuantizeError> {
        let mut metadata = self.head.clone();
        let searched = verdict.searched_layers.len() as u32;
        RoundingRecord::write_verdict(&mut metadata, verdict.kld, verdict.search_kld, searched);
        let tensors = self.files[0].tensors().iter().map(|placed| (placed.tensor.clone(), Some(placed.bytes)));
        Ok(GgufLayout::carried(self.gguf.label(), &metadata, tensors)?.write_header_at(first.file())?)
    }

    /// The types of the tensors that feedback may round, by their names in the source; `output` is the matrix that
    /// gives the logits.
    pub(super) fn types_for_feedback(&self, output: &str) -> HashMap<String, TensorType> {
        let chosen = self.tensors.iter().filter(|t| t.is_rounded() && has_input(&t.source.name, output));
        chosen.map(|tensor| (tensor.source.name.clone(), tensor.choice.ty)).collect()
    }

    /// The pipeline's view of the draft, without the tensors named in `done`.
    pub(super) fn work(&self, done: &HashSet<&str>) -> Vec<TensorWork<'_>> {
        let rounding = match self.method {
            RoundingMethod::Ggml => RowRounding::Ggml,
            RoundingMethod::Search | RoundingMethod::Feedback => RowRounding::Search,
        };
        self.tensors
            .iter()
            .filter(|tensor| !done.contains(tensor.source.name.as_str()))
            .map(|tensor| TensorWork {
                gguf: tensor.from,
                source: tensor.source,
                target: tensor.choice.ty,
                rounding,
                importance: tensor.importance.as_deref(),
                file: tensor.file,
                offset: tensor.offset,
            })
            .collect()
    }
}

impl super::Choices {
    /// A note where the choices were made for another rounding than that of the run.
    fn rounding_note(&self, record: &RoundingRecord) -> Option<String> {
        let planned = self.rounding.as_ref()?;
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

    /// A note where the files come out larger than planned for: other options of the run make them so.
    fn size_note(&self, file_bytes: u64) -> Option<String> {
        let target = self.target_bytes.filter(|target| file_bytes > *target)?;
        Some(format!(
            "the output has {file_bytes} bytes, {} more than {} was made for; metadata or shards were added since",
            file_bytes - target,
            self.name
        ))
    }
}

/// Bytes of the file that a target makes with this imatrix, headers and padding included. With feedback its types are
/// those of a file with an imatrix, and its metadata those of one without.
///
/// # Errors
/// When such a file cannot be made.
pub(crate) fn standard_file_bytes<'a>(
    gguf: &'a Gguf,
    target: Target,
    imatrix: Option<crate::imatrix::Named<'a>>,
    rounding: super::Rounding<'a>,
) -> Result<u64, QuantizeError> {
    let mut request = Request::target(target).rounding(rounding).allow_requantize(true);
    request.imatrix = imatrix;
    let draft = Draft::decide(&request, gguf, None)?;
    match draft.problems.first() {
        Some(problem) => Err(QuantizeError::Problem {
            file: printable(gguf.label()),
            problem: format!("the standard {target} file cannot be made: {problem}"),
        }),
        None => Ok(draft.file_bytes()),
    }
}

/// False for tensors that the plan removes.
fn stays(plan: Option<&PrunePlan>, tensor: &TensorInfo) -> bool {
    plan.is_none_or(|plan| plan.rename(&tensor.name).is_some())
}

/// The tensors in the order of the output, with their names there; `left` are those of the source that may be in it.
fn sources<'a>(request: &Request<'_>, left: &[&'a TensorInfo], pruned: Option<&PrunePlan>) -> Sources<'a> {
    let order = if request.split == super::Split::AsInput {
        (0..left.len()).collect()
    } else {
        let names: Vec<&str> = left.iter().map(|tensor| tensor.name.as_str()).collect();
        output_order(&names)
    };
    order
        .into_iter()
        .map(|at| left[at])
        .filter_map(|tensor| match pruned {
            Some(plan) => plan.rename(&tensor.name).map(|name| (tensor, name)),
            None => Some((tensor, tensor.name.clone())),
        })
        .collect()
}

fn prune(
    request: &Request<'_>,
    gguf: &Gguf,
    left: &[&TensorInfo],
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<Option<PrunePlan>, QuantizeError> {
    if request.prune_layers.is_empty() {
        return Ok(None);
    }
    let refused = |problem: String| QuantizeError::Prune { file: printable(gguf.label()), problem };
    let flagged = |note: &dyn std::fmt::Display| format!("--prune-layers: {note}");
    let plan = PrunePlan::new(left.iter().map(|tensor| tensor.name.as_str()), &request.prune_layers)
        .map_err(|error| refused(flagged(&error)))?;
    notes.extend(plan.notes().iter().map(|note| flagged(note)));
    let architecture = metadata.str("general.architecture").map_err(|error| refused(error.to_string()))?;
    let Some(architecture) = architecture.map(str::to_owned) else {
        return Err(refused(
            "general.architecture is missing; --prune-layers needs it, add --override-kv general.architecture=str:NAME"
                .to_owned(),
        ));
    };
    notes.extend(plan.rewrite(&architecture, metadata).iter().map(|note| flagged(note)));
    notes.push(format!("{} of {} layers are removed", plan.removed(), plan.layers()));
    Ok(Some(plan))
}

fn choose(
    request: &Request<'_>,
    target: Target,
    facts: &ModelFacts,
    sources: &Sources<'_>,
    weighted: bool,
) -> Result<Recipe, crate::recipe::RecipeError> {
    let tensors: Vec<TensorDesc> =
        sources.iter().map(|(tensor, name)| TensorDesc { name, shape: &tensor.shape, ty: tensor.ty }).collect();
    choose_types(facts, &tensors, &request.recipe_options(target, weighted))
}

fn draft_tensors<'a>(
    gguf: &'a Gguf,
    sources: Sources<'a>,
    recipe: Recipe,
    mut importance: HashMap<String, Vec<f32>>,
) -> Vec<DraftTensor<'a>> {
    sources
        .into_iter()
        .zip(recipe.choices)
        .map(|((source, name), choice)| {
            let importance = importance.remove(&name);
            DraftTensor {
                from: gguf,
                source,
                shard: source.shard,
                name,
                choice,
                importance,
                file: 0,
                offset: 0,
                bytes: 0,
            }
        })
        .collect()
}

/// The tensors that another file gives as they are. Their blocks are the last ones, so they stand behind all others, and in
/// the last file of a split output.
fn grafted_tensors<'a>(grafted: &Grafted<'a>, gguf: &Gguf) -> Vec<DraftTensor<'a>> {
    let of_donor = |source: &&'a TensorInfo| DraftTensor {
        from: grafted.donor,
        source,
        shard: gguf.shards().len().saturating_sub(1),
        name: source.name.clone(),
        choice: Choice { ty: source.ty, reason: Reason::MtpFrom, fallback_from: None, requires_imatrix: false },
        importance: None,
        file: 0,
        offset: 0,
        bytes: 0,
    };
    grafted.tensors.iter().map(of_donor).collect()
}

fn unpadded_bytes(tensor: &NewTensor) -> Option<u64> {
    let row_len = tensor.shape.first().copied().unwrap_or(1);
    let rows: u64 = tensor.shape.iter().skip(1).product();
    tensor.ty.info()?.row_bytes(row_len)?.checked_mul(rows)
}
