//! Mixtures of experts: dimensions and routing.

use super::super::arch::{Architecture, DenseLayers, Gating, Mixture, SharedExpert};
use super::super::error::ModelError;
use super::keys::{Keys, Layers, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH};

/// Mixture-of-experts dimensions.
#[derive(Clone, Copy, Debug)]
pub(in crate::model) struct Experts {
    /// Experts per layer.
    pub count: usize,
    /// Experts chosen per token.
    pub used: usize,
    /// Width of one expert; `None` means `n_ff` of the layer.
    pub n_ff: Option<usize>,
    /// Width of the shared expert, when there is one; `Some(None)` means `n_ff` of the layer.
    pub shared_n_ff: Option<Option<usize>>,
    /// How weights follow from router outputs.
    pub gating: Gating,
    /// Multiplies the weights of the chosen experts.
    pub scale: f32,
    /// Number of groups of experts, and of those that are chosen first.
    pub groups: Option<(usize, usize)>,
}

/// The dimensions, for a model that has experts.
pub(super) fn experts(keys: &Keys, arch: &'static Architecture) -> Result<Option<Experts>, ModelError> {
    let row = &arch.feed_forward;
    let count = keys.count("expert_count", MAX_EXPERTS)?.unwrap_or(0);
    let used = keys.count("expert_used_count", MAX_EXPERTS)?.unwrap_or(0);
    let usual = match row.mixture {
        Mixture::None if count > 1 => {
            return Err(keys.bad("expert_count", count, format!("none: {} has no experts", arch.name)));
        }
        Mixture::None => return Ok(None),
        Mixture::Optional(_) if count == 0 => {
            return if used == 0 { Ok(None) } else { Err(keys.bad("expert_used_count", used, "0 without experts")) };
        }
        Mixture::Optional(gating) | Mixture::Always(gating) => gating,
    };
    if count == 0 {
        return Err(keys.bad("expert_count", 0, format!("1 to {MAX_EXPERTS}: {} has experts", arch.name)));
    }
    if used == 0 || used > count {
        return Err(keys.bad("expert_used_count", used, format!("1 to the number of experts, {count}")));
    }
    let groups = match keys.count("expert_group_count", MAX_EXPERTS)?.filter(|&groups| groups > 1) {
        None => None,
        Some(groups) if row.selection_bias => {
            let chosen = keys.required_count("expert_group_used_count", groups as u64)?;
            // The score of a group is the sum of its two best.
            if count % groups != 0 || count / groups < 2 || chosen * (count / groups) < used {
                let expected = format!("groups of equal size, of which {chosen} hold {used} experts");
                return Err(keys.bad("expert_group_count", groups, expected));
            }
            Some((groups, chosen))
        }
        Some(_) => return Err(keys.bad("expert_group_count", "above 1", "no groups of experts")),
    };
    let gating = gating(keys, arch, usual)?;
    let scale = match row.routing_keys.scale {
        true => keys.finite("expert_weights_scale")?.filter(|&scale| scale != 0.0).unwrap_or(1.0),
        false => 1.0,
    };
    let own_width = keys.optional_positive("expert_feed_forward_length", MAX_WIDTH)?;
    let n_ff = own_width.filter(|_| row.own_expert_width);
    let shared_n_ff = shared_width(keys, arch, n_ff)?;
    Ok(Some(Experts { count, used, n_ff, shared_n_ff, gating, scale, groups }))
}

fn shared_width(
    keys: &Keys,
    arch: &'static Architecture,
    n_ff: Option<usize>,
) -> Result<Option<Option<usize>>, ModelError> {
    let own = || keys.count("expert_shared_feed_forward_length", MAX_WIDTH).map(|width| width.filter(|&w| w > 0));
    let count = || keys.count("expert_shared_count", MAX_EXPERTS).map(|count| count.filter(|&count| count > 0));
    let times = |width: Option<usize>, count: usize| width.map(|width| width * count);
    Ok(match arch.feed_forward.shared {
        SharedExpert::None => None,
        SharedExpert::Gated => Some(keys.optional_positive("expert_shared_feed_forward_length", MAX_WIDTH)?),
        SharedExpert::Wide => own()?.map(Some),
        SharedExpert::AsDense => Some(own()?),
        SharedExpert::AsExpert => Some(own()?.or(n_ff)),
        SharedExpert::Counted => count()?.map(|count| times(n_ff, count)),
        SharedExpert::CountedWide => {
            let width = own()?.or(n_ff);
            count()?.map(|count| times(width, count))
        }
    })
}

/// The gating rule: the architecture's, or what the file says where it may.
fn gating(keys: &Keys, arch: &'static Architecture, usual: Gating) -> Result<Gating, ModelError> {
    let by_file = arch.feed_forward.routing_keys;
    let function = match by_file.function {
        true => keys.count("expert_gating_func", u64::from(u32::MAX))?.filter(|&function| function != 0),
        false => None,
    };
    let gating = match function {
        None => usual,
        Some(1) => Gating::Softmax,
        Some(2) => Gating::Sigmoid,
        Some(3) => Gating::SoftmaxOfChosen,
        Some(4) => Gating::SqrtSoftplus,
        Some(other) => {
            let expected = "1 (softmax), 2 (sigmoid), 3 (softmax of the chosen) or 4 (root of softplus)";
            return Err(keys.bad("expert_gating_func", other, expected));
        }
    };
    let normalized = match by_file.norm {
        true => keys.bool("expert_weights_norm")?.unwrap_or(false),
        false => usual.is_normalized(),
    };
    Ok(gating.with_sum(normalized))
}

/// Which layers have experts, in a model that has some, as far as the metadata tell.
pub(super) fn expert_layers(keys: &Keys, arch: &'static Architecture, layers: Layers) -> Result<Vec<bool>, ModelError> {
    if arch.feed_forward.dense_layers != DenseLayers::ByKeys {
        return Ok(vec![true; layers.run]);
    }
    let leading = keys.count("leading_dense_block_count", MAX_LAYERS)?.unwrap_or(0);
    let step = keys.optional_positive("interleave_moe_layer_step", MAX_LAYERS)?.unwrap_or(1);
    Ok((0..layers.run).map(|il| il >= leading && (il + 1) % step == 0).collect())
}
