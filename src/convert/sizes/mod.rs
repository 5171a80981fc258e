//! Sizes of tensors, and what kind of block each is: derived from `config.json` by the steps of a class's row.

mod families;

use serde_json::Value;

use super::ConvertError;
use super::architectures::Row;
use super::checkpoint::Checkpoint;
use super::config::{Config, Rope};

pub(super) use families::*;

/// Largest number of blocks that is believed.
const MAX_BLOCKS: u64 = 10_000;

/// Fields of the number of experts; the first that is there counts.
pub(super) const EXPERT_COUNT: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];

/// One block: its attention, or what stands for it, and its feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub key_heads: u64,
    /// Values of a query or key head.
    pub head: u64,
    /// Values of a value head.
    pub value_head: u64,
    /// Width of the dense feed-forward network.
    pub feed_forward: u64,
    /// A delta net instead of attention.
    pub recurrent: bool,
    /// Attention sees the last tokens only.
    pub window: bool,
    /// Experts instead of a dense network.
    pub experts: bool,
    /// Keys and values are its own, not those of an earlier block.
    pub own_keys: bool,
    /// Values are not the keys.
    pub own_values: bool,
    /// It predicts a further token.
    pub nextn: bool,
}

/// Heads of a delta net.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Linear {
    /// Query and key heads.
    pub key_heads: u64,
    /// Values of one.
    pub key_head: u64,
    pub value_heads: u64,
    /// Values of one.
    pub value_head: u64,
    /// Tokens that the convolution sees.
    pub kernel: u64,
}

/// Sizes of the tensors.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    /// Blocks of the model itself; those of further tokens stand behind them.
    pub layers: u64,
    pub width: u64,
    pub heads: u64,
    pub key_heads: u64,
    pub head: u64,
    pub vocab: u64,
    pub feed_forward: u64,
    pub experts: u64,
    pub expert_width: u64,
    /// Width of the shared experts together; 0 where there are none.
    pub shared_width: u64,
    pub linear: Linear,
    /// What each layer gets of a token besides the embedding.
    pub per_layer: u64,
    /// Tokens that have it.
    pub per_layer_vocab: u64,
    pub blocks: Vec<Block>,
    /// Blocks of further tokens that the folder may hold and the file does not.
    pub dropped: u64,
}

/// A step that derives sizes from the configuration.
#[derive(Debug, Clone, Copy)]
pub(super) enum Layout {
    /// A field holds the number of layers at the beginning that have no experts.
    LeadingDense(&'static str),
    /// Only every so many layers have experts, the last of them.
    ExpertsEvery(&'static str),
    /// A field holds the width of the shared experts.
    SharedWidth(&'static str),
    /// The same, where it is there.
    SharedWidthWhereGiven(&'static str),
    /// A field holds their number; each is as wide as the others.
    SharedCount(&'static str),
    /// A field holds the number of blocks that predict further tokens.
    NextN(&'static str),
    /// The same, where the field may be absent: the folder's tensors then tell.
    NextNOrStored(&'static str),
    /// What only one class has.
    Part(fn(&Config, &mut Sizes) -> Result<(), ConvertError>),
}

impl Layout {
    fn apply(self, config: &Config, sizes: &mut Sizes) -> Result<(), ConvertError> {
        let number = |field| config.optional_u32(field).map(|number| u64::from(number.unwrap_or(0)));
        match self {
            Layout::LeadingDense(field) => {
                let count = number(field)? as usize;
                sizes.blocks.iter_mut().take(count).for_each(|block| block.experts = false);
            }
            Layout::ExpertsEvery(field) => {
                let every = config.optional_count(field)?.unwrap_or(1);
                let others = (1u64..).zip(&mut sizes.blocks).filter(|(number, _)| !number.is_multiple_of(every));
                others.for_each(|(_, block)| block.experts = false);
            }
            Layout::SharedWidth(field) => sizes.shared_width = number(field)?,
            Layout::SharedWidthWhereGiven(field) => {
                sizes.shared_width = config.optional_u32(field)?.map_or(sizes.shared_width, u64::from);
            }
            Layout::SharedCount(field) => {
                let count = number(field)?;
                if count > 1 << 16 {
                    return Err(config.wrong(field, format!("is {count}, expected at most 65536")));
                }
                sizes.shared_width = count * sizes.expert_width;
            }
            Layout::NextN(field) | Layout::NextNOrStored(field) => sizes.add_nextn(config, field, number(field)?)?,
            Layout::Part(part) => part(config, sizes)?,
        }
        Ok(())
    }
}

impl Sizes {
    /// All sizes, by the steps of the row.
    pub(super) fn read(config: &Config, row: &Row) -> Result<Sizes, ConvertError> {
        let (width, heads) = (config.count("hidden_size")?, config.count("num_attention_heads")?);
        let key_heads = config.count("num_key_value_heads")?;
        if key_heads > heads || !heads.is_multiple_of(key_heads) {
            let problem = format!("is {key_heads}, expected a divisor of num_attention_heads, {heads}");
            return Err(config.wrong("num_key_value_heads", problem));
        }
        let head = match config.optional_count("head_dim")? {
            Some(head) => head,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let problem = format!("is {heads}, which does not divide hidden_size, {width}; add head_dim");
                return Err(config.wrong("num_attention_heads", problem));
            }
        };
        if !head.is_multiple_of(2) {
            return Err(config.wrong("head_dim", format!("is {head}, expected an even number")));
        }
        let layers = config.count("num_hidden_layers")?;
        if layers > MAX_BLOCKS {
            return Err(config.wrong("num_hidden_layers", format!("is {layers}, expected at most {MAX_BLOCKS}")));
        }
        // A class of experts only need not name it.
        let feed_forward = match row.may_be_dense() {
            true => config.count("intermediate_size")?,
            false => config.optional_count("intermediate_size")?.unwrap_or(0),
        };
        let block = Block {
            heads,
            key_heads,
            head,
            value_head: head,
            feed_forward,
            recurrent: false,
            window: false,
            experts: false,
            own_keys: true,
            own_values: true,
            nextn: false,
        };
        let mut sizes = Sizes {
            layers,
            width,
            heads,
            key_heads,
            head,
            vocab: config.count("vocab_size")?,
            feed_forward,
            experts: 0,
            expert_width: 0,
            shared_width: 0,
            linear: Linear::default(),
            per_layer: 0,
            per_layer_vocab: 0,
            blocks: vec![block; layers as usize],
            dropped: 0,
        };
        if let Some(names) = row.experts {
            sizes.read_experts(config, row, names.width)?;
        }
        for step in row.layout {
            step.apply(config, &mut sizes)?;
        }
        Ok(sizes)
    }

    fn read_experts(&mut self, config: &Config, row: &Row, width: &str) -> Result<(), ConvertError> {
        let key = EXPERT_COUNT.into_iter().find(|key| config.get(key).is_some()).unwrap_or(EXPERT_COUNT[0]);
        // A class that may be dense says so by a count of none.
        let none = row.may_be_dense() && config.optional_u32(key)?.unwrap_or(0) == 0;
        self.experts = if none { 0 } else { config.count(key)? };
        if self.experts > 65_536 {
            return Err(config.wrong(key, format!("is {}, expected at most 65536", self.experts)));
        }
        if self.experts > 0 {
            self.expert_width = config.count(width)?;
            self.blocks.iter_mut().for_each(|block| block.experts = true);
        }
        Ok(())
    }

    /// Adds `count` blocks that predict further tokens, with attention that sees everything.
    pub(super) fn add_nextn(&mut self, config: &Config, field: &str, count: u64) -> Result<(), ConvertError> {
        if count > MAX_BLOCKS {
            return Err(config.wrong(field, format!("is {count}, expected at most {MAX_BLOCKS}")));
        }
        let block = Block {
            heads: self.heads,
            key_heads: self.key_heads,
            head: self.head,
            value_head: self.head,
            feed_forward: self.feed_forward,
            recurrent: false,
            window: false,
            experts: self.experts > 0,
            own_keys: true,
            own_values: true,
            nextn: true,
        };
        self.blocks.extend(std::iter::repeat_n(block, count as usize));
        Ok(())
    }

    /// Blocks that predict further tokens.
    pub(super) fn nextn(&self) -> u64 {
        self.blocks.len() as u64 - self.layers
    }

    /// Blocks that predict further tokens have experts if the folder holds any for them.
    pub(super) fn set_nextn_experts(&mut self, row: &Row, checkpoint: &Checkpoint) {
        let Some(names) = row.experts.filter(|_| self.experts > 0) else { return };
        let starts = [names.prefix, names.stacked[0], names.switched];
        let holds_experts = |name: &str| {
            let rest = name.strip_prefix("model.layers.")?.split_once('.')?.1;
            starts.iter().any(|start| !start.is_empty() && rest.starts_with(start)).then_some(())
        };
        self.blocks.iter_mut().filter(|block| block.nextn).for_each(|block| block.experts = false);
        for tensor in checkpoint.tensors() {
            let name = (row.names)(tensor.name.clone(), self.layers);
            let number = self.nextn_block(&name).filter(|_| holds_experts(&name).is_some());
            if let Some(block) = number.and_then(|number| self.blocks.get_mut(usize::try_from(number).ok()?)) {
                block.experts = true;
            }
        }
    }

    /// Leaves them out.
    pub(super) fn drop_nextn(&mut self) {
        self.dropped = self.nextn();
        self.blocks.truncate(self.layers as usize);
    }

    /// The block of further tokens, counted over all blocks, that a tensor of this plain name is of.
    pub(super) fn nextn_block(&self, name: &str) -> Option<u64> {
        let (number, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
        number.parse::<u64>().ok().filter(|number| *number >= self.layers)
    }

    /// Values of a head that are rotated, where only a part is.
    pub(super) fn rotated(&self, config: &Config, rope: &Rope) -> Result<u64, ConvertError> {
        let part = rope.number(config, "partial_rotary_factor")?.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&part) {
            return Err(config.wrong("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
        }
        Ok((part * self.width as f64) as u64 / self.heads)
    }
}

/// A list with a text for each layer, such as `layer_types`; `None` where it is absent.
pub(super) fn layer_types<'a>(config: &'a Config, field: &str) -> Result<Option<Vec<&'a str>>, ConvertError> {
    let Some(value) = config.get(field) else { return Ok(None) };
    let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<&str>>>());
    texts.map(Some).ok_or_else(|| config.wrong(field, "is no list of texts, one for each layer"))
}
