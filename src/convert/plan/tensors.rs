//! The walk over a model's tensors: ends, layers, experts.

use super::{Content, Output, Part, Planner, Turns, ValueChange};
use crate::convert::ConvertError;
use crate::convert::architectures::{Change, ExpertNames, Groups, Order, Role, When};
use crate::convert::sizes::Block;
use crate::gguf::{NewTensor, TensorType, shown};
use crate::model::OutputMatrix;
use crate::recipe::roles::{OUTPUT_WEIGHT, TOKEN_EMBD_WEIGHT};

/// Rows of an output and how they move.
struct Arranged {
    parts: Vec<Part>,
    /// Rows of a head, inside which they are permuted.
    permuted_rows: Option<u64>,
    /// Columns that move.
    turns: Option<Turns>,
}

impl From<Vec<Part>> for Arranged {
    fn from(parts: Vec<Part>) -> Arranged {
        Arranged { parts, permuted_rows: None, turns: None }
    }
}

/// True if columns that move do so in whole blocks of `ty`.
fn turns_fit_blocks(turns: Turns, shape: &[u64], ty: TensorType) -> bool {
    let heads = (turns.groups * turns.each) as u64;
    let block = ty.info().map_or(1, |info| info.block_len as u64);
    shape.last().is_some_and(|columns| columns.is_multiple_of(heads * block))
}

impl Planner<'_> {
    /// Adds an output of `shape`, rows first.
    fn push(&mut self, name: String, shape: &[u64], rows: Arranged, change: Change) -> Result<(), ConvertError> {
        let Arranged { parts, permuted_rows, turns } = rows;
        let blocks = match change {
            Change::Keep => self.kept_blocks(&name, shape, &parts)?,
            Change::AddOne | Change::MinusExp => None,
        };
        let blocks = blocks.filter(|ty| *ty != TensorType::NVFP4 || self.scale_is_applied(&name, &parts));
        let blocks = blocks.filter(|ty| turns.is_none_or(|turns| turns_fit_blocks(turns, shape, *ty)));
        let ty = blocks.unwrap_or_else(|| self.storage(&name, shape));
        // The values of a bias move as the rows of its weight do.
        let scattered = permuted_rows.is_some() || parts.iter().any(|part| part.step != 1);
        let counted = parts.iter().map(|part| part.count).sum::<u64>();
        let alone = scattered && name.ends_with(".bias") || shape.len() == 1 && counted == shape[0];
        let row_len = if alone { 1 } else { shape.last().copied().unwrap_or(1) };
        let value_change = match (change, blocks) {
            (Change::AddOne, _) => ValueChange::AddOne,
            (Change::MinusExp, _) => ValueChange::MinusExp,
            (Change::Keep, Some(_)) => ValueChange::Blocks,
            (Change::Keep, None) => ValueChange::Keep,
        };
        let extra =
            if blocks == Some(TensorType::NVFP4) { self.scale_outputs(&name, shape, &parts) } else { Vec::new() };
        let tensor = NewTensor { name, shape: shape.iter().rev().copied().collect(), ty };
        let content = Content::Rows { parts, row_len, permuted_rows, turns, change: value_change };
        self.plan.outputs.push(Output { tensor, content });
        self.plan.outputs.extend(extra);
        Ok(())
    }

    /// Second-level scales of NVFP4, and those of its activations: a tensor of one value, or one for each expert.
    fn scale_outputs(&self, name: &str, shape: &[u64], parts: &[Part]) -> Vec<Output> {
        let stem = name.strip_suffix("weight").unwrap_or(name);
        let count = if shape.len() > 2 { shape[0] } else { 1 };
        let matrices = || parts.iter().flat_map(|part| self.matrices(part));
        let scales: Vec<f32> = matrices().map(|(coded, matrix)| coded.global_of(matrix)).collect();
        let inputs: Vec<f32> = matrices().map(|(coded, matrix)| coded.input_of(matrix)).collect();
        [("scale", scales), ("input_scale", inputs)]
            .into_iter()
            .filter(|(_, values)| values.iter().any(|value| *value != 1.0))
            .map(|(suffix, mut values)| {
                values.truncate(count as usize);
                let tensor = NewTensor { name: format!("{stem}{suffix}"), shape: vec![count], ty: TensorType::F32 };
                Output { tensor, content: Content::Values(values) }
            })
            .collect()
    }

    /// The matrices that a part's rows are of.
    fn matrices(&self, part: &Part) -> impl Iterator<Item = (&super::weights::Coded, u64)> {
        let weight = &self.plan.weights[part.weight];
        let rows = weight.rows_per_matrix().max(1);
        let last = part.first + (part.count.max(1) - 1) * part.step;
        let range = part.first / rows..=last / rows;
        weight.coded().into_iter().flat_map(move |coded| range.clone().map(move |matrix| (coded, matrix)))
    }

    /// llama.cpp multiplies the products of these tensors by their second-level scale; others it takes as 1.
    fn scale_is_applied(&mut self, name: &str, parts: &[Part]) -> bool {
        const ATTENTION: [&str; 5] = [".attn_q.", ".attn_k.", ".attn_v.", ".attn_output.", ".attn_qkv."];
        const NEVER: [&str; 3] = [".ssm_ba.", "token_embd.", "embed_tokens."];
        let ones =
            parts.iter().flat_map(|part| self.matrices(part)).all(|(coded, matrix)| coded.global_of(matrix) == 1.0);
        let holds = |names: &[&str]| names.iter().any(|part| name.contains(part));
        let others = self.row.feed_forward_scales && !holds(&NEVER);
        let applied = name == OUTPUT_WEIGHT || holds(&ATTENTION) || others;
        if !ones && !applied {
            let fallback = self.ty.tensor_type();
            let arch = self.row.arch.name;
            let what = match name.split('.').nth(2) {
                _ if name == TOKEN_EMBD_WEIGHT => "the embedding",
                Some(part) if !part.starts_with("ffn_") => part,
                _ => "the feed-forward network",
            };
            let note = format!(
                "NVFP4 weights of {what} become {fallback}: llama.cpp does not apply their second scale in {arch}"
            );
            if !self.warnings.contains(&note) {
                self.warnings.push(note);
            }
        }
        ones || applied
    }

    /// All rows of a weight.
    fn whole(&self, weight: usize) -> Vec<Part> {
        let rows = self.plan.weights[weight].shape.iter().rev().skip(1).product();
        vec![Part::rows(weight, 0, rows)]
    }

    /// The rows of a weight that a role wants, in its order. Values of a vector that do not stay are rows.
    fn arranged(&self, weight: usize, role: &Role, block: &Block, source_rows: u64) -> Arranged {
        let linear = &self.sizes.linear;
        let turns = Turns {
            groups: linear.key_heads as usize,
            each: linear.value_heads.checked_div(linear.key_heads).unwrap_or(0) as usize,
        };
        if role.order == Order::TurnsOfColumns {
            let turns = (turns.groups > 1 && turns.each > 1).then_some(turns);
            return Arranged { parts: self.whole(weight), permuted_rows: None, turns };
        }
        let permuted_rows = (role.order == Order::Neighbours).then_some(block.head);
        if role.cut.is_none() && role.order == Order::Kept {
            return Arranged { parts: self.whole(weight), permuted_rows, turns: None };
        }
        let mut runs = self.runs(role, block, source_rows);
        if role.order == Order::Turns
            && let Some((first, count)) = runs.pop()
        {
            let head = count / linear.value_heads.max(1);
            let heads = (0..turns.each as u64)
                .flat_map(|inner| (0..turns.groups as u64).map(move |group| group * turns.each as u64 + inner));
            runs.extend(heads.map(|from| (first + from * head, head)));
        }
        let mut parts: Vec<Part> = Vec::with_capacity(runs.len());
        for (first, count) in runs {
            match parts.last_mut() {
                Some(last) if last.first + last.count == first => last.count += count,
                _ => parts.push(Part::rows(weight, first, count)),
            }
        }
        Arranged { parts, permuted_rows, turns: None }
    }

    /// First rows and counts of the segments that a role wants.
    fn runs(&self, role: &Role, block: &Block, source_rows: u64) -> Vec<(u64, u64)> {
        let Some(cut) = role.cut else { return vec![(0, source_rows)] };
        let groups = match cut.groups {
            Groups::One => 1,
            Groups::KeyHeads => block.key_heads,
            Groups::LinearKeyHeads => self.sizes.linear.key_heads,
        };
        let groups = groups.max(1);
        let rows: Vec<u64> = cut.stack.iter().map(|dim| self.dim(*dim, block) / groups).collect();
        let group_rows: u64 = rows.iter().sum();
        let first_of = |segment: usize| rows[..segment].iter().sum::<u64>();
        let segments = cut.from..cut.to;
        segments
            .flat_map(|segment| {
                let (first, count) = (first_of(segment), rows[segment]);
                (0..groups).map(move |group| (group * group_rows + first, count))
            })
            .collect()
    }

    /// Embedding, last norm, output matrix.
    pub(super) fn ends(&mut self) -> Result<(), ConvertError> {
        let (vocabulary, width) = (self.sizes.vocab, self.sizes.width);
        let spare = |planner: &Self, name: &str| {
            let found = planner.names.get(name).map(|index| planner.plan.weights[*index].shape.as_slice());
            match found {
                Some([rows, _]) if planner.row.spare_rows && *rows > vocabulary => *rows,
                _ => vocabulary,
            }
        };
        let rows = spare(self, "model.embed_tokens.weight");
        let embedding = self.require("model.embed_tokens.weight", &[rows, width])?;
        let kept = vec![Part::rows(embedding, 0, vocabulary)];
        self.push(TOKEN_EMBD_WEIGHT.into(), &[vocabulary, width], kept.into(), Change::Keep)?;

        let norm = self.require("model.norm.weight", &[width])?;
        let change = if self.row.shifted_norms { Change::AddOne } else { Change::Keep };
        let parts = self.whole(norm);
        self.push("output_norm.weight".into(), &[width], parts.into(), change)?;
        if let Some(block) = self.sizes.blocks.first().copied() {
            let groups = self.row.ends.iter().filter(|group| self.holds(group.when, &block, "model."));
            let roles: Vec<&Role> = groups.flat_map(|group| group.roles).collect();
            for role in roles {
                self.role(role, &block, "model.", "")?;
            }
        }

        let rows = spare(self, "lm_head.weight");
        let output = self.find("lm_head.weight", &[rows, width])?;
        let tied = self.config.bool("tie_word_embeddings");
        match output {
            Some(output) => {
                let always_tied = self.row.arch.output == OutputMatrix::Tied;
                if (tied || always_tied) && !self.own_head(embedding, output, always_tied)? {
                    return Ok(());
                }
                let kept = vec![Part::rows(output, 0, vocabulary)];
                self.push(OUTPUT_WEIGHT.into(), &[vocabulary, width], kept.into(), Change::Keep)
            }
            None if self.row.arch.output == OutputMatrix::Own => Err(self.missing("lm_head.weight", &[rows, width])),
            None if tied || self.row.arch.output == OutputMatrix::Tied => Ok(()),
            None if self.config.architecture().ends_with("Model") => Ok(()),
            None => {
                let tie = match self.config.get("tie_word_embeddings") {
                    None => "absent from config.json",
                    Some(_) => "false",
                };
                self.warnings.push(format!(
                    "lm_head.weight is missing and tie_word_embeddings is {tie}: the embedding is assumed to be the output \
                     matrix as well, as llama.cpp does"
                ));
                Ok(())
            }
        }
    }

    /// All tensors of block `number`.
    pub(super) fn layer(&mut self, number: u64, block: Block) -> Result<(), ConvertError> {
        let (source, target) = (format!("model.layers.{number}."), format!("blk.{number}."));
        let groups = self.row.layer.iter().filter(|group| self.holds(group.when, &block, &source));
        let roles: Vec<&Role> = groups.flat_map(|group| group.roles).collect();
        for role in roles {
            self.role(role, &block, &source, &target)?;
        }
        match self.row.experts {
            Some(names) if block.experts => self.experts(number, names),
            _ => Ok(()),
        }
    }

    /// True if a block has the tensors of a group; their names begin with `source`.
    fn holds(&self, when: &[When], block: &Block, source: &str) -> bool {
        let stored = |name: &str| self.names.contains_key(&format!("{source}{name}"));
        when.iter().all(|condition| match *condition {
            When::NextN => block.nextn,
            When::Recurrent => block.recurrent,
            When::Attention => !block.recurrent,
            When::Dense => !block.experts,
            When::Experts => block.experts,
            When::Shared => self.sizes.shared_width > 0,
            When::OwnKeys => block.own_keys,
            When::OwnValues => block.own_values,
            When::SharedKeys => !block.own_keys,
            When::PerLayer => self.sizes.per_layer > 0,
            When::Flag(field) => self.config.is_set(field),
            When::Stored(name) => stored(name),
            When::NotStored(name) => !stored(name),
        })
    }

    /// The weight of a role, and its bias where there is one.
    fn role(&mut self, role: &Role, block: &Block, source: &str, target: &str) -> Result<(), ConvertError> {
        let mut shape = self.dims(role.shape, block);
        let mut source_shape = shape.clone();
        if let (Some(cut), Some(rows)) = (role.cut, source_shape.first_mut()) {
            *rows = cut.stack.iter().map(|dim| self.dim(*dim, block)).sum();
        }
        if role.squeezed {
            shape.retain(|dim| *dim != 1);
        }
        let stem = format!("{source}{}", role.source);
        let name = format!("{stem}{}", role.stored);
        let weight = match role.optional {
            true => self.find(&name, &source_shape)?,
            false => Some(self.require(&name, &source_shape)?),
        };
        let Some(weight) = weight else { return Ok(()) };
        if role.plain && self.plan.weights[weight].coded().is_some() {
            let problem =
                "holds codes whose rows and scales lie by device, which lwq cannot convert; use a 16-bit model";
            return Err(self.wrong(weight, problem.to_owned()));
        }
        let rows = self.arranged(weight, role, block, source_shape[0]);
        self.push(format!("{target}{}{}", role.target, role.written), &shape, rows, role.change)?;
        if role.bias
            && let Some(bias) = self.find(&format!("{stem}.bias"), &source_shape[..1])?
        {
            let rows = self.arranged(bias, role, block, source_shape[0]);
            self.push(format!("{target}{}.bias", role.target), &shape[..1], rows, role.change)?;
        }
        Ok(())
    }

    fn experts(&mut self, layer: u64, names: ExpertNames) -> Result<(), ConvertError> {
        let (count, inner, width) = (self.sizes.experts, self.sizes.expert_width, self.sizes.width);
        let target = |part: &str, suffix: &str| format!("blk.{layer}.ffn_{part}_exps.{suffix}");
        let shapes = [[count, inner, width], [count, inner, width], [count, width, inner]];
        let mut parts = [Vec::new(), Vec::new(), Vec::new()];

        let [fused, down] = names.stacked.map(|name| format!("model.layers.{layer}.{name}"));
        let spelled = |planner: &Self, name: &str| {
            let weight = format!("{name}.weight");
            if planner.names.contains_key(&weight) { weight } else { name.to_owned() }
        };
        let (fused_weight, down_weight) = (spelled(self, &fused), spelled(self, &down));
        if names.transposed && self.are_transposed(&fused_weight, &down_weight) {
            let fused = self.require(&fused_weight, &[count, width, 2 * inner])?;
            let down = self.require(&down_weight, &[count, inner, width])?;
            let (up, step) = if names.interleaved { (1, 2) } else { (inner, 1) };
            let columns =
                |weight, first, count, step, matrix| Part { weight, first, count, step, transposed: Some(matrix) };
            for expert in 0..count {
                parts[0].push(columns(fused, 0, inner, step, expert));
                parts[1].push(columns(fused, up, inner, step, expert));
                parts[2].push(columns(down, 0, width, 1, expert));
            }
        } else if self.names.contains_key(&fused_weight) || names.interleaved || names.prefix.is_empty() {
            let fused = self.require(&fused_weight, &[count, 2 * inner, width])?;
            let down = self.require(&down_weight, &[count, width, inner])?;
            if names.kept_fused {
                let (gate_up, down) = (self.whole(fused), self.whole(down));
                self.push(target("gate_up", "weight"), &[count, 2 * inner, width], gate_up.into(), Change::Keep)?;
                return self.push(target("down", "weight"), &shapes[2], down.into(), Change::Keep);
            }
            for expert in 0..count {
                let [gate, up] = halves(fused, expert * 2 * inner, inner, names.interleaved);
                parts[0].push(gate);
                parts[1].push(up);
            }
            parts[2] = self.whole(down);
        } else if let Some(switched) = self.switched(layer, names) {
            for (slot, name) in switched.iter().enumerate() {
                let weight = self.require(name, &shapes[slot])?;
                parts[slot] = self.whole(weight);
            }
        } else {
            for expert in 0..count {
                for (slot, name) in names.gate_up_down.iter().enumerate() {
                    let source = format!("model.layers.{layer}.{}{expert}.{name}.weight", names.prefix);
                    let weight = self.require(&source, &shapes[slot][1..])?;
                    parts[slot].extend(self.whole(weight));
                }
            }
        }
        for ((part, shape), parts) in ["gate", "up", "down"].into_iter().zip(shapes).zip(parts) {
            self.push(target(part, "weight"), &shape, parts.into(), Change::Keep)?;
        }
        if names.interleaved {
            let fused = self.require(&format!("{fused}_bias"), &[count, 2 * inner])?;
            let down = self.require(&format!("{down}_bias"), &[count, width])?;
            for (slot, part) in ["gate", "up"].into_iter().enumerate() {
                // Values alternate through all experts' biases.
                let [gate, up] = halves(fused, 0, count * inner, true);
                let parts = vec![if slot == 0 { gate } else { up }];
                self.push(target(part, "bias"), &[count, inner], parts.into(), Change::Keep)?;
            }
            let parts = self.whole(down);
            self.push(target("down", "bias"), &[count, width], parts.into(), Change::Keep)?;
        }
        Ok(())
    }

    /// Names of MLX's stacks of experts, if they are there.
    fn switched(&self, layer: u64, names: ExpertNames) -> Option<[String; 3]> {
        let parts = ["gate_proj", "up_proj", "down_proj"];
        let switched = parts.map(|part| format!("model.layers.{layer}.{}{part}.weight", names.switched));
        self.names.contains_key(&switched[0]).then_some(switched)
    }

    /// True for experts whose inputs are rows, where a product is `x W`. transformers 5 saves those of some classes the
    /// other way than transformers 4 did. Where gate and up together are square, `down` tells.
    fn are_transposed(&self, fused: &str, down: &str) -> bool {
        let (count, inner, width) = (self.sizes.experts, self.sizes.expert_width, self.sizes.width);
        let has = |name, shape: [u64; 3]| {
            let weight = self.names.get(name).map(|index| &self.plan.weights[*index]);
            weight.is_some_and(|weight| weight.coded().is_none() && weight.shape == shape)
        };
        has(fused, [count, width, 2 * inner]) && (width != 2 * inner || !has(down, [count, width, inner]))
    }

    /// An equal head is left out; another is written, with a warning. False if it is left out.
    fn own_head(&mut self, embedding: usize, output: usize, always_tied: bool) -> Result<bool, ConvertError> {
        let Some(difference) = self.head_difference(embedding, output)? else { return Ok(false) };
        let name = shown(self.plan.weights[output].name.as_bytes());
        let what_becomes = match always_tied {
            true => "it is left out, since llama.cpp knows no other output matrix for this architecture",
            false => {
                "it is written; remove it from the folder if the embedding should count (transformers 4 takes the embedding, 5 this tensor)"
            }
        };
        self.warnings.push(format!(
            "{name} differs from the embedding that config.json ties it to ({difference}): {what_becomes}"
        ));
        Ok(!always_tied)
    }
}

/// The rows of gate and up in a matrix that has both: one after the other, or in turns.
fn halves(weight: usize, first: u64, count: u64, interleaved: bool) -> [Part; 2] {
    let part = |first, step| Part { weight, first, count, step, transposed: None };
    match interleaved {
        true => [part(first, 2), part(first + 1, 2)],
        false => [part(first, 1), part(first + count, 1)],
    }
}
