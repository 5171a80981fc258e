//! The rotary embedding's settings, and windows, which may have one of their own.

use super::super::arch::{Architecture, RopeFactors, Sections, Sliding, WindowSize, WindowedRope};
use super::super::error::ModelError;
use super::keys::{Keys, Layers, MAX_LAYERS, MAX_WIDTH};

/// How rotary frequencies are stretched beyond the training context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::model) enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by the factor.
    Linear,
    /// YaRN: low frequencies interpolated, high ones kept, scores sharpened.
    Yarn,
    /// Per-frequency factors, one set for short and one for long contexts.
    LongRope,
}

/// What all layers' rotary embeddings share.
#[derive(Clone, Debug)]
pub(in crate::model) struct RopeSettings {
    /// Kind of scaling.
    pub scaling: RopeScaling,
    /// Multiplier of positions, 1 / scaling factor.
    pub scale: f32,
    /// Context length before scaling.
    pub n_ctx_original: usize,
    /// `rope.scaling.attn_factor`.
    pub attn_factor: f32,
    /// Turns over the original context below and above which YaRN interpolates a frequency fully or not at all.
    pub yarn_beta: (f32, f32),
    /// `rope.scaling.yarn_log_multiplier`: share of YaRN's sharpening that the weights have already.
    pub yarn_log_multiplier: f32,
    /// Pairs of a head that stay as they are.
    pub fixed_pairs: Vec<bool>,
    /// Pairs lie in halves because the file has sections, whatever the row says.
    pub in_halves: bool,
}

/// The rotary embedding of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::model) struct LayerRope {
    /// Leading values of a head that are rotated.
    pub n_rot: usize,
    /// Base of the geometric series of frequencies.
    pub base: f32,
    /// Multiplier of positions.
    pub scale: f32,
    /// Nothing but `scale` stretches the frequencies.
    pub plain: bool,
    /// Tensors of factors divide the frequencies.
    pub factors: bool,
}

/// A window of the last tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::model) struct Window {
    /// Tokens.
    pub size: usize,
    /// It begins at multiples of its size.
    pub chunked: bool,
}

impl Window {
    /// The first position that a token at `position` sees.
    pub(in crate::model) fn start(self, position: usize) -> usize {
        match self.chunked {
            true => position / self.size * self.size,
            false => (position + 1).saturating_sub(self.size),
        }
    }
}

/// Settings of the model, and the embedding of layers that see everything.
pub(super) fn settings(
    keys: &Keys,
    arch: &'static Architecture,
    n_ctx_train: usize,
    head: usize,
) -> Result<(RopeSettings, LayerRope), ModelError> {
    let base = base(keys, arch, head)?;
    let scaling = match keys.metadata.str(&keys.name("rope.scaling.type"))? {
        None | Some("linear") => RopeScaling::Linear,
        Some("none") => RopeScaling::None,
        Some("yarn") => RopeScaling::Yarn,
        Some("longrope") => RopeScaling::LongRope,
        Some(other) => {
            let other: String = other.chars().take(64).collect();
            return Err(keys.bad("rope.scaling.type", format!("{other:?}"), "none, linear, yarn or longrope"));
        }
    };
    let factor = match keys.non_negative("rope.scaling.factor")? {
        None => keys.non_negative("rope.scale_linear")?,
        factor => factor,
    };
    let scale = match factor {
        _ if scaling == RopeScaling::None => 1.0,
        None | Some(0.0) => 1.0,
        Some(factor) => 1.0 / factor,
    };
    let n_rot = rotated(keys, "rope.dimension_count", head)?.unwrap_or(head);
    if !n_rot.is_multiple_of(2) {
        return Err(keys.bad("rope.dimension_count", n_rot, format!("an even number up to the head size {head}")));
    }
    let n_ctx_original =
        keys.optional_positive("rope.scaling.original_context_length", u64::from(u32::MAX))?.unwrap_or(n_ctx_train);
    let (mut yarn_beta, mut yarn_log_multiplier) = ((32.0, 1.0), 0.0);
    if arch.rope.yarn_keys {
        let beta = |suffix: &str, usual: f32| keys.positive(suffix).map(|beta| beta.unwrap_or(usual));
        yarn_beta = (beta("rope.scaling.yarn_beta_fast", 32.0)?, beta("rope.scaling.yarn_beta_slow", 1.0)?);
        yarn_log_multiplier = keys.finite("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
    }
    let fixed_pairs = fixed_pairs(keys, arch, n_rot)?;
    let settings = RopeSettings {
        scaling,
        scale,
        n_ctx_original,
        attn_factor: keys.finite("rope.scaling.attn_factor")?.unwrap_or(1.0),
        yarn_beta,
        yarn_log_multiplier,
        in_halves: arch.rope.sections == Sections::IfGiven && fixed_pairs.is_some(),
        fixed_pairs: fixed_pairs.unwrap_or_default(),
    };
    let n_rot = if arch.rope.half_where_seeing_all { n_rot / 4 * 2 } else { n_rot };
    let rope = LayerRope { n_rot, base, scale, plain: false, factors: arch.rope.factors != RopeFactors::None };
    Ok((settings, rope))
}

/// Base of the frequencies of heads of size `head`.
fn base(keys: &Keys, arch: &'static Architecture, head: usize) -> Result<f32, ModelError> {
    let base = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    if !arch.rope.base_by_alpha || head <= 2 {
        return Ok(base);
    }
    let head = head as f32;
    Ok(match keys.non_negative("rope.scaling.alpha")?.filter(|alpha| *alpha > 0.0) {
        Some(alpha) => base * alpha.powf(head / (head - 2.0)),
        None => base,
    })
}

/// Rotated values of a head of size `head`, if the key is there.
fn rotated(keys: &Keys, suffix: &str, head: usize) -> Result<Option<usize>, ModelError> {
    match keys.optional_positive(suffix, MAX_WIDTH)? {
        Some(n_rot) if n_rot > head || n_rot % 2 != 0 => {
            Err(keys.bad(suffix, n_rot, format!("an even number up to the head size {head}")))
        }
        found => Ok(found),
    }
}

/// Pairs that belong to no position of a text, where the architecture has sections. As in `ggml_mrope_cache_init` (llama.cpp
/// b10605), sections repeat where they are shorter than a head.
fn fixed_pairs(keys: &Keys, arch: &'static Architecture, n_rot: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let suffix = "rope.dimension_sections";
    let found = match (arch.rope.sections, keys.metadata.array(&keys.name(suffix))?) {
        (Sections::None, _) | (Sections::IfGiven, None) => return Ok(None),
        (_, Some(found)) => found,
        (_, None) => return Err(keys.missing(suffix)),
    };
    let expected = "up to four numbers of pairs, together at least 1";
    let bad = || keys.bad(suffix, format!("an array of {}", found.len()), expected);
    let mut sections = [0usize; 4];
    if found.len() > 4 {
        return Err(bad());
    }
    for (section, value) in sections.iter_mut().zip(found.to_i64_vec()?) {
        // More pairs than a head has are allowed: what is behind its end is not used.
        *section = usize::try_from(value).ok().filter(|&pairs| pairs as u64 <= MAX_WIDTH).ok_or_else(bad)?;
    }
    // `llama_hparams::use_mrope`.
    if arch.rope.sections == Sections::IfGiven && (sections[0] == 0 || sections[1] == 0) {
        return Ok(None);
    }
    let all: usize = sections.iter().sum();
    if all == 0 {
        return Err(bad());
    }
    let fixed = (0..n_rot / 2).map(|pair| match (arch.rope.sections, pair % all) {
        (Sections::Interleaved, place) => place >= 3 * sections[place % 3],
        (_, place) => place >= all - sections[3],
    });
    Ok(Some(fixed.collect()))
}

/// The window of each layer.
pub(super) fn windows(
    keys: &Keys,
    arch: &'static Architecture,
    layers: Layers,
) -> Result<Vec<Option<Window>>, ModelError> {
    let none = || Ok(vec![None; layers.run]);
    let Some(sliding) = arch.attention.sliding else { return none() };
    if sliding.only_with_layers.is_some_and(|needed| needed != layers.run) {
        return none();
    }
    let found = keys.count("attention.sliding_window", u64::from(u32::MAX))?;
    let size = match sliding.size {
        WindowSize::Optional => found.filter(|&size| size > 0),
        WindowSize::Or(size) => Some(found.unwrap_or(size as usize)).filter(|&size| size > 0),
        WindowSize::Required => match found {
            None => return Err(keys.missing("attention.sliding_window")),
            Some(0) => return Err(keys.bad("attention.sliding_window", 0, "at least 1")),
            found => found,
        },
        WindowSize::Fixed(_) if found == Some(0) => {
            return Err(keys.bad("attention.sliding_window", 0, "windows: llama.cpp runs no such model without"));
        }
        WindowSize::Fixed(size) => Some(size as usize),
    };
    let Some(size) = size else { return none() };
    let windowed = windowed(keys, sliding, layers)?;
    let window = Window { size, chunked: sliding.chunked };
    Ok(windowed.into_iter().map(|windowed| windowed.then_some(window)).collect())
}

/// Which layers have a window.
fn windowed(keys: &Keys, sliding: Sliding, layers: Layers) -> Result<Vec<bool>, ModelError> {
    let suffix = "attention.sliding_window_pattern";
    if let Some(flags) = keys.flags(suffix, layers)? {
        return Ok(flags);
    }
    let Some(period) = sliding.period else { return Err(keys.missing(suffix)) };
    let period = keys.count(suffix, MAX_LAYERS)?.unwrap_or(period as usize);
    Ok((0..layers.run).map(|il| period == 0 || il % period < period - 1).collect())
}

/// The embedding of windowed layers, of heads of size `head`; `all` is that of the others.
pub(super) fn windowed_rope(
    keys: &Keys,
    arch: &'static Architecture,
    all: LayerRope,
    head: usize,
) -> Result<LayerRope, ModelError> {
    let Some(sliding) = arch.attention.sliding else { return Ok(all) };
    let base = keys.positive("rope.freq_base_swa")?;
    let rope = match sliding.rope {
        WindowedRope::Same => all,
        WindowedRope::OwnBase => LayerRope { base: base.unwrap_or(all.base), ..all },
        WindowedRope::Unscaled(usual) => LayerRope { base: base.unwrap_or(usual), scale: 1.0, ..all },
        WindowedRope::Plain => LayerRope { scale: 1.0, plain: true, ..all },
    };
    let factors = rope.factors && arch.rope.factors == RopeFactors::All;
    // Without a key of their own these layers rotate what the key of all layers says, before it is halved.
    let usual = rotated(keys, "rope.dimension_count", head);
    let n_rot = match rotated(keys, "rope.dimension_count_swa", head)? {
        Some(n_rot) => n_rot,
        None if arch.rope.half_where_seeing_all || arch.attention.own_windowed_size => usual?.unwrap_or(head),
        None => rope.n_rot,
    };
    Ok(LayerRope { n_rot, factors, ..rope })
}
