//! What a user asks for, and how it becomes a [`Draft`].

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use regex::Regex;
use safetensors::tensor::Dtype;
use serde_json::Map;

use super::calibrated::guests::AlsoGguf;
use super::decide::Decision;
use super::draft::{Draft, Item, KeptTensor};
use super::mixed::Mixture;
use super::scheme::{Activations, GroupSize, Scheme};
use super::{ExportError, files, names, shards};
use crate::convert::source::ModelFolder;
use crate::moments::CalibrationOptions;
use crate::rounding::grid::Grid;

/// Bytes of tensors in a file, unless a request says otherwise.
const SHARD_BYTES: u64 = 5_000_000_000;

/// What becomes of matrices whose rows are no whole groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Odd {
    /// They stay in 16 bits.
    #[default]
    Keep,
    /// They get a scale for each row.
    Channel,
    /// They get groups of 32; what these do not divide stays in 16 bits.
    G32,
}

/// How codes and scales are chosen.
#[derive(Clone, Debug)]
pub enum Rounding {
    /// Scales by the largest weights, each weight to its nearest code: what compressed-tensors does.
    Rtn,
    /// Scales by the least squared error.
    Search,
    /// Each column makes up for the errors of those before it, by the second moment of the inputs on a text; by search where
    /// that is better on another text.
    Feedback(Box<CalibrationOptions>),
    /// What llm-compressor does by default, for comparison.
    Gptq {
        /// The texts.
        options: Box<CalibrationOptions>,
        /// Codes of a bfloat16 model are chosen again from weights in that type, as llm-compressor does when it saves them.
        resaved: bool,
    },
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Rounding::Rtn => "rtn",
            Rounding::Search => "search",
            Rounding::Feedback(_) => "feedback",
            Rounding::Gptq { .. } => "gptq",
        })
    }
}

/// An export that is wanted.
#[derive(Clone, Debug)]
pub struct Request {
    scheme: Scheme,
    pub(super) group_size: Option<GroupSize>,
    pub(super) ignore: Vec<Regex>,
    pub(super) odd: Odd,
    rounding: Option<Rounding>,
    smooth: bool,
    bits: Option<f64>,
    also: Vec<AlsoGguf>,
    shard_bytes: u64,
}

impl Request {
    /// An export in this scheme, with its usual groups.
    pub fn new(scheme: Scheme) -> Request {
        Request {
            scheme,
            group_size: None,
            ignore: Vec::new(),
            odd: Odd::Keep,
            rounding: None,
            smooth: true,
            bits: None,
            also: Vec::new(),
            shard_bytes: SHARD_BYTES,
        }
    }

    /// Another size of groups, where the scheme leaves the choice.
    pub fn group_size(mut self, size: GroupSize) -> Request {
        self.group_size = Some(size);
        self
    }

    /// Modules whose name one of these finds stay in 16 bits.
    pub fn ignore(mut self, patterns: Vec<Regex>) -> Request {
        self.ignore = patterns;
        self
    }

    /// What becomes of rows that groups do not divide.
    pub fn odd(mut self, odd: Odd) -> Request {
        self.odd = odd;
        self
    }

    /// How codes and scales are chosen. Where nothing is said it is with feedback on the built-in text, or by search for
    /// classes that lwq cannot run.
    pub fn rounding(mut self, rounding: Rounding) -> Request {
        self.rounding = Some(rounding);
        self
    }

    /// Whether norms may take up powers of two that large inputs of W8A8 are divided by, where feedback finds that better.
    /// True unless this says otherwise.
    pub fn smooth(mut self, smooth: bool) -> Request {
        self.smooth = smooth;
        self
    }

    /// A mix of 4 and 8 bits of at most so many bits per weight of the quantized matrices, scales included. Which get 8 is
    /// measured: what vLLM puts into one is rounded alone, and the divergence of the model says what its bits are worth.
    pub fn like_bits_per_weight(mut self, bits: f64) -> Request {
        self.bits = Some(bits);
        self
    }

    /// Makes GGUF files of the model as well, rounded in the same pass over it: those that [`quantize`](crate::quantize) makes
    /// with feedback of the converted folder.
    pub fn also_gguf(mut self, files: Vec<AlsoGguf>) -> Request {
        self.also = files;
        self
    }

    /// Largest number of bytes of tensors in a file.
    pub fn shard_bytes(mut self, bytes: u64) -> Request {
        self.shard_bytes = bytes;
        self
    }

    /// Reads the folder and decides what becomes of each tensor, without reading weights.
    ///
    /// # Errors
    /// If the folder is damaged, holds nothing to quantize, or the choices do not go together.
    pub fn decide(&self, folder: &Path) -> Result<Draft, ExportError> {
        let row = self.scheme.row();
        if self.group_size.is_some() && !row.free_groups {
            let scheme = self.scheme;
            return Err(ExportError::Choice(format!("{scheme} has groups of its own; leave --group-size out")));
        }
        let source = ModelFolder::open(folder)?;
        let rounding = self.choose(&source)?;
        let mut decision = Decision::new(self, row, &source);
        for weight in 0..source.len() {
            decision.weight(weight)?;
        }
        decision.route_odd();
        let Decision { groups, items, kept, odd, mut warnings, .. } = decision;

        let quantized: Vec<&str> = items.iter().filter_map(|item| item.module().map(|m| m.name.as_str())).collect();
        if quantized.is_empty() {
            let problem =
                "holds no weights of linear layers to quantize; take a language model, or ignore less".to_owned();
            return Err(ExportError::Folder { path: folder.to_path_buf(), problem });
        }
        let named: HashMap<&str, usize> = quantized.iter().enumerate().map(|(at, name)| (*name, at)).collect();
        if let Some(twice) = quantized.iter().enumerate().find(|(at, name)| named[**name] != *at).map(|(_, name)| *name)
        {
            let problem = format!("holds {twice} alone and in a stack; remove one of them");
            return Err(ExportError::Folder { path: folder.to_path_buf(), problem });
        }
        warnings.extend(split_siblings(&items, &kept));
        let experts = items.iter().filter_map(Item::module).filter(|module| names::experts_of(&module.name).is_some());
        let of_experts: HashSet<usize> = experts.map(|module| module.group).collect();
        if of_experts.len() > 1 {
            warnings.push("experts become different things; transformers (5.17) reads all of them as one".to_owned());
        }
        if matches!(row.grid, Grid::Nvfp4 | Grid::Mxfp4) && source.model_type() == Dtype::F16 {
            let name = row.name;
            warnings.push(format!(
                "transformers decodes {name} to bfloat16 only: load this float16 model as bfloat16 there"
            ));
        }
        if !row.experts_load && quantized.iter().any(|module| names::experts_of(module).is_some()) {
            let name = row.name;
            warnings.push(format!(
                "transformers (5.17) cannot read experts in {name}, or reads other weights; it reads those in W4A16, W8A16, \
                 FP8_DYNAMIC and MXFP4A16"
            ));
        }
        if self.rounding.is_none() && !source.is_known() {
            let class = source.class();
            warnings.push(format!("{class} is no class that lwq can run: rounded by search, without a text"));
        }
        let ignore = ignore_list(&kept, &quantized, source.count("num_hidden_layers"));
        let has_integer_inputs = row.activations == Activations::Token && matches!(row.grid, Grid::Int { .. });
        let smooths = self.smooth && has_integer_inputs && matches!(rounding, Rounding::Feedback(_));
        let mut layouts = groups.iter().map(|groups| row.layout(*groups, source.model_type())).collect::<Vec<_>>();
        let mixture = self.bits.map(|wanted| Mixture::new(row, wanted, &mut layouts)).transpose()?;
        let mut draft = Draft {
            scheme: self.scheme,
            settings: self.words(&rounding),
            rounding,
            smooths,
            extra: files::beside(&source)?,
            source,
            layouts,
            mixture,
            also: self.also.clone(),
            shard_bytes: self.shard_bytes,
            items,
            tensors: Vec::new(),
            starts: Vec::new(),
            shards: shards::lay_out(&[], self.shard_bytes),
            config: Map::new(),
            ignore,
            kept,
            odd,
            warnings,
        };
        draft.bound_bits()?;
        draft.lay_out()?;
        Ok(draft)
    }
}

impl Request {
    fn choose(&self, source: &ModelFolder) -> Result<Rounding, ExportError> {
        let chosen = self.choose_rounding(source)?;
        if !self.also.is_empty() && !matches!(chosen, Rounding::Feedback(_)) {
            return Err(ExportError::Choice(format!(
                "--also-gguf takes part in the pass over the model that --rounding feedback makes, and the rounding is \
                 {chosen}; leave it out, and use lwq convert and lwq quantize"
            )));
        }
        Ok(chosen)
    }

    fn choose_rounding(&self, source: &ModelFolder) -> Result<Rounding, ExportError> {
        match &self.rounding {
            Some(Rounding::Feedback(_) | Rounding::Gptq { .. }) if !source.is_known() => {
                let class = source.class();
                let problem = format!("{class} is no class that lwq can run; give --rounding search or rtn");
                Err(ExportError::Choice(problem))
            }
            Some(rounding) => Ok(rounding.clone()),
            None if source.is_known() => Ok(Rounding::Feedback(Box::default())),
            None => Ok(Rounding::Search),
        }
    }

    /// All choices but the texts of the rounding.
    fn words(&self, rounding: &Rounding) -> String {
        let Request { scheme, group_size, ignore, odd, bits, also, shard_bytes, .. } = self;
        let also: Vec<String> = also.iter().map(|file| format!("{} {:?}", file.target, file.path)).collect();
        let ignore: Vec<&str> = ignore.iter().map(Regex::as_str).collect();
        format!("{scheme} {group_size:?} {ignore:?} {odd:?} {bits:?} {also:?} {shard_bytes} {rounding}")
    }
}

/// The names that the configuration lists as not quantized.
fn ignore_list(kept: &[KeptTensor], quantized: &[&str], layers: Option<u64>) -> Vec<String> {
    let of = |odd: bool| kept.iter().filter(move |kept| kept.odd == odd).map(|kept| kept.module.clone());
    let mut ignore = names::entries(&of(false).collect::<Vec<_>>(), quantized, layers);
    ignore.extend(of(true));
    // A head that shares its matrix with the embedding has no tensor, but loaders make a module of it.
    if !ignore.iter().any(|entry| names::matches(entry, "lm_head")) {
        ignore.insert(0, "lm_head".to_owned());
    }
    ignore
}

/// Modules that loaders put into one, of which only some are quantized or not all alike: a line for each kind.
fn split_siblings(items: &[Item], kept: &[KeptTensor]) -> Vec<String> {
    let mut seen: HashMap<String, (String, Option<usize>)> = HashMap::new();
    let mut lines = Vec::new();
    let mut told = HashSet::new();
    let all = items.iter().filter_map(Item::module).map(|module| (module.name.as_str(), Some(module.group)));
    for (module, group) in all.chain(kept.iter().map(|kept| (kept.module.as_str(), None))) {
        let keys = [names::fused_of(module).map(|(key, ..)| key), names::experts_of(module).map(str::to_owned)];
        for key in keys.into_iter().flatten() {
            let (first, of_first) = seen.entry(key.clone()).or_insert_with(|| (module.to_owned(), group));
            if *of_first != group && told.insert(key) {
                lines.push(format!(
                    "{first} and {module} become different things; vLLM puts them into one and refuses that"
                ));
            }
        }
    }
    lines
}
