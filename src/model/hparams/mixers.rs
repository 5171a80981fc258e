//! What mixes tokens in each layer, from the metadata, the row and the layer's number.

use super::super::arch::{Architecture, QkNorm, RopeFree, ScoreScale, Temperature as TemperatureRow};
use super::super::error::ModelError;
use super::keys::{Keys, Layers, MAX_LAYERS, MAX_WIDTH};
use super::rope::{self, LayerRope, RopeSettings, Window};
use super::{AttentionShape, DeltaShape, Factors, Mixer, Temperature};

/// The mixer of every layer, and what their rotary embeddings share. `n_ctx_train` is the context of the training.
pub(super) fn read(
    keys: &Keys,
    arch: &'static Architecture,
    layers: Layers,
    [n_embd, n_ctx_train]: [usize; 2],
    factors: &Factors,
) -> Result<(RopeSettings, Vec<Mixer>), ModelError> {
    let (n_head, n_head_kv) = heads(keys, layers)?;
    let head = head_sizes(keys, arch, n_embd, &n_head)?;
    let head_windowed = windowed_head_sizes(keys, arch, head)?;
    let (settings, rope) = rope::settings(keys, arch, n_ctx_train, head.0)?;
    let windows = rope::windows(keys, arch, layers)?;
    let any_window = windows.iter().any(Option::is_some);
    let windowed_rope = match any_window {
        true => rope::windowed_rope(keys, arch, rope, head_windowed.0)?,
        false => rope,
    };
    let delta = delta_layers(keys, arch, layers)?;
    let shared = shared_keys(keys, arch, &windows, layers)?;
    let rules = AttentionRules {
        keys,
        arch,
        layers,
        n_embd,
        factors,
        settings: &settings,
        head,
        head_windowed,
        rope,
        windowed_rope,
        any_window,
        value_scale: match arch.attention.own_value_size {
            true => keys.finite("attention.value_scale")?.filter(|&scale| scale != 0.0 && scale != 1.0),
            false => None,
        },
        // Llama 4 Maverick, which has as many, norms no queries.
        normed_by_count: keys.count("expert_count", u64::MAX)? != Some(128),
    };
    let mixers = windows.iter().enumerate().map(|(il, window)| match &delta {
        Some((recurrent, shape)) if recurrent[il] => Ok(Mixer::DeltaNet(*shape)),
        _ => {
            let shape = rules.of_layer(il, [n_head[il], n_head_kv[il]], *window)?;
            let keys_are_kept = shared.contains(&Some(il));
            Ok(Mixer::Attention(AttentionShape { keys_of: shared[il], keys_are_kept, ..shape }))
        }
    });
    let mixers = mixers.collect::<Result<_, ModelError>>()?;
    Ok((settings, mixers))
}

/// What the attention of all layers follows.
struct AttentionRules<'a> {
    keys: &'a Keys<'a>,
    arch: &'static Architecture,
    layers: Layers,
    n_embd: usize,
    factors: &'a Factors,
    settings: &'a RopeSettings,
    /// Sizes of a key's and a value's head in layers that see everything, and in windowed ones.
    head: (usize, usize),
    head_windowed: (usize, usize),
    rope: LayerRope,
    windowed_rope: LayerRope,
    any_window: bool,
    value_scale: Option<f32>,
    normed_by_count: bool,
}

impl AttentionRules<'_> {
    /// Attention of layer `il` with keys of its own that no other layer uses.
    fn of_layer(
        &self,
        il: usize,
        [n_head, n_head_kv]: [usize; 2],
        window: Option<Window>,
    ) -> Result<AttentionShape, ModelError> {
        let Self { keys, arch, .. } = *self;
        if n_head == 0 {
            return Err(keys.bad("attention.head_count", 0, "at least 1"));
        }
        if n_head_kv == 0 || n_head % n_head_kv != 0 {
            let expected = format!("a divisor of the head count {n_head}");
            return Err(keys.bad("attention.head_count_kv", n_head_kv, expected));
        }
        let ((head_k, head_v), rope) = match window {
            Some(_) => (self.head_windowed, self.windowed_rope),
            None => (self.head, self.rope),
        };
        let free = match arch.rope.free {
            RopeFree::None => false,
            RopeFree::Every(every) => (il + 1).is_multiple_of(every),
            RopeFree::SeeingAll => self.any_window && window.is_none(),
        };
        let rotates = self.factors.rotates && !free;
        let usual_scale = match arch.attention.score_scale {
            ScoreScale::One => 1.0,
            by if by.is_by_embedding(self.layers.run) => 1.0 / ((self.n_embd / n_head) as f32).sqrt(),
            _ => 1.0 / (head_k as f32).sqrt(),
        };
        Ok(AttentionShape {
            n_head,
            n_head_kv,
            head_k,
            head_v,
            score_scale: self.factors.scores.unwrap_or(usual_scale),
            value_scale: self.value_scale,
            window,
            rope: rotates.then_some(rope),
            temperature: temperature(keys, arch, self.settings, rotates)?,
            unweighted_norm: arch.attention.qk_norm == QkNorm::Unweighted && rotates && self.normed_by_count,
            keys_of: None,
            keys_are_kept: false,
        })
    }
}

fn heads(keys: &Keys, layers: Layers) -> Result<(Vec<usize>, Vec<usize>), ModelError> {
    let suffix = "attention.head_count";
    let n_head = keys.per_layer(suffix, layers)?.ok_or_else(|| keys.missing(suffix))?;
    let n_head_kv = keys.per_layer("attention.head_count_kv", layers)?.unwrap_or_else(|| n_head.clone());
    Ok((n_head, n_head_kv))
}

/// Values of a key's and of a value's head.
fn head_sizes(keys: &Keys, arch: &Architecture, n_embd: usize, n_head: &[usize]) -> Result<(usize, usize), ModelError> {
    let usual = || match n_head.iter().find(|&&heads| heads > 0).map(|heads| n_embd / heads) {
        None => Err(keys.bad("attention.head_count", 0, "at least 1")),
        Some(0) => Err(keys.bad("attention.head_count", n_head[0], format!("at most embedding_length {n_embd}"))),
        Some(head) => Ok(head),
    };
    let size = |suffix: &str| match keys.optional_positive(suffix, MAX_WIDTH)? {
        Some(size) => Ok(size),
        None => usual(),
    };
    let (head_k, head_v) = (size("attention.key_length")?, size("attention.value_length")?);
    if head_k != head_v && !arch.attention.own_value_size {
        return Err(keys.bad("attention.value_length", head_v, format!("the key length {head_k}")));
    }
    Ok((head_k, head_v))
}

/// The same in windowed layers, which may have sizes of their own.
fn windowed_head_sizes(keys: &Keys, arch: &Architecture, head: (usize, usize)) -> Result<(usize, usize), ModelError> {
    let row = &arch.attention;
    let size = |suffix: &str, usual: usize| match keys.optional_positive(suffix, MAX_WIDTH)? {
        Some(found) if !row.own_windowed_size && found != usual => {
            Err(keys.bad(suffix, found, format!("{usual} as in layers without a window")))
        }
        Some(found) if row.own_windowed_size => Ok(found),
        _ => Ok(usual),
    };
    let (head_k, head_v) = (size("attention.key_length_swa", head.0)?, size("attention.value_length_swa", head.1)?);
    if head_k != head_v && !row.own_value_size {
        return Err(keys.bad("attention.value_length_swa", head_v, format!("the key length {head_k}")));
    }
    Ok((head_k, head_v))
}

fn temperature(
    keys: &Keys,
    arch: &Architecture,
    rope: &RopeSettings,
    rotates: bool,
) -> Result<Option<Temperature>, ModelError> {
    Ok(match arch.attention.temperature {
        TemperatureRow::None => None,
        TemperatureRow::ByKey => {
            let scale = keys.finite("attention.temperature_scale")?.filter(|&scale| scale != 0.0);
            scale.map(|scale| Temperature { scale, length: rope.n_ctx_original as f32, offset: 0.0 })
        }
        TemperatureRow::RopeFree { scale, length, offset } => {
            (!rotates).then_some(Temperature { scale, length, offset })
        }
    })
}

/// Which layers have a delta net, and its dimensions.
fn delta_layers(
    keys: &Keys,
    arch: &Architecture,
    layers: Layers,
) -> Result<Option<(Vec<bool>, DeltaShape)>, ModelError> {
    let Some(row) = arch.delta_net else { return Ok(None) };
    let recurrent = match keys.flags("attention.recurrent_layers", layers)? {
        Some(flags) => flags,
        None => {
            let every = keys.optional_positive("full_attention_interval", MAX_LAYERS)?.unwrap_or(4);
            (1..=layers.run).map(|nth| nth % every != 0).collect()
        }
    };
    /// Far above any model's; a convolution of more taps than tokens is no short one.
    const MAX_KERNEL: u64 = 1024;
    let shape = DeltaShape {
        row,
        n_key: keys.required_count("ssm.group_count", MAX_WIDTH)?,
        n_value: keys.required_count("ssm.time_step_rank", MAX_WIDTH)?,
        head: keys.required_count("ssm.state_size", MAX_WIDTH)?,
        kernel: keys.required_count("ssm.conv_kernel", MAX_KERNEL)?,
    };
    if !shape.n_value.is_multiple_of(shape.n_key) {
        let expected = format!("a divisor of ssm.time_step_rank, {}", shape.n_value);
        return Err(keys.bad("ssm.group_count", shape.n_key, expected));
    }
    let inner = keys.required_count("ssm.inner_size", MAX_WIDTH)?;
    if shape.n_value.checked_mul(shape.head) != Some(inner) {
        let expected = format!("time_step_rank {} times state_size {}", shape.n_value, shape.head);
        return Err(keys.bad("ssm.inner_size", inner, expected));
    }
    Ok(Some((recurrent, shape)))
}

/// The layer whose keys and values each layer uses instead of its own.
fn shared_keys(
    keys: &Keys,
    arch: &Architecture,
    windows: &[Option<Window>],
    layers: Layers,
) -> Result<Vec<Option<usize>>, ModelError> {
    let suffix = "attention.shared_kv_layers";
    let sharing = match arch.attention.shares_keys {
        true => keys.count(suffix, MAX_LAYERS)?.unwrap_or(0),
        false => 0,
    };
    if sharing == 0 {
        return Ok(vec![None; layers.run]);
    }
    // The last layers with keys of their own are one of each kind: with a window, then without.
    let bad = |expected: &str| keys.bad(suffix, sharing, expected);
    let own =
        layers.run.checked_sub(sharing).filter(|&own| own >= 2).ok_or_else(|| bad("all layers but two or more"))?;
    let source = |il: usize| if windows[il].is_some() { own - 2 } else { own - 1 };
    let sources = (0..layers.run).map(|il| (il >= own).then(|| source(il)));
    let sources: Vec<Option<usize>> = sources.collect();
    let same_kind = |il: usize, source: usize| windows[il].is_some() == windows[source].is_some();
    match sources.iter().enumerate().all(|(il, source)| source.is_none_or(|source| same_kind(il, source))) {
        true => Ok(sources),
        false => Err(bad("layers behind one with a window and one without")),
    }
}
