//! Divergences that are told from gradients instead of measured.
//!
//! To second order, errors E of a matrix W cost the model `tr(H_O E H_I E^T) / 2` nats of KL divergence a token, with the second
//! moments H_O of the gradients at its outputs and H_I of its inputs (the Fisher information of its weights, taken apart by
//! Kronecker, as in K-FAC: Martens and Grosse, arXiv 1503.05671). Errors of rounding in different rows and columns have little
//! to do with each other, so the diagonals are what counts: `sum over i, j of h_i w_j E_ij^2 / 2`, with mean squares h of
//! gradients and w of inputs. That is the weighed error of the rows that are sampled anyway. A few probes, one for each role,
//! say how far off it is, and scale it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::file::Probe;
use super::{MeasuredTensor, RowErrors, TensorSensitivity};
use crate::display::six_digits;
use crate::gguf::TensorType;
use crate::moments::{GradientMoments, GradientsError};
use crate::recipe::Role;

/// How the divergences that were told from gradients compare with those that were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurvatureCheck {
    /// Probes that were run.
    pub probes: usize,
    /// Geometric mean of what they measured over what had been told.
    pub ratio: f64,
    /// Standard deviation of the logarithm of these ratios.
    pub spread: f64,
}

/// Mean squares of the gradients at the outputs of a tensor's rows, where its divergence can be told from them: it is one
/// matrix, whose inputs are known.
///
/// # Errors
/// When the file of gradients is damaged.
pub(super) fn squares_of(
    gradients: Option<&GradientMoments>,
    measured: &MeasuredTensor<'_>,
) -> Result<Option<Vec<f64>>, GradientsError> {
    let tensor = measured.tensor;
    let Some(gradients) = gradients.filter(|_| tensor.matrices() == 1 && measured.importance.is_some()) else {
        return Ok(None);
    };
    // The rows of an embedding are looked up, too, which no product shows.
    if Role::of(&tensor.name) == Role::TokenEmbd {
        return Ok(None);
    }
    Ok(gradients.squares(&tensor.name)?.filter(|squares| squares.len() as u64 == tensor.rows()))
}

/// The divergence of a rounding whose errors were weighed by mean squares of gradients.
pub(super) fn foretold(ty: TensorType, errors: &RowErrors) -> Probe {
    Probe {
        ty: super::type_name(ty),
        kld: six_digits(errors.weighted_error / 2.0),
        kld_error: 0.0,
        steady_kld: None,
        flips: None,
        foretold: true,
    }
}

/// One tensor of every role whose divergence is told, by name and type: of layers that are spread over the model.
pub(super) fn calibrating(tensors: &[TensorSensitivity]) -> Vec<(String, String)> {
    let mut roles: BTreeMap<String, Vec<&TensorSensitivity>> = BTreeMap::new();
    for tensor in tensors.iter().filter(|tensor| tensor.probes.iter().any(|probe| probe.foretold)) {
        roles.entry(role_of(&tensor.name)).or_default().push(tensor);
    }
    let count = roles.len();
    let chosen = |(at, tensors): (usize, &Vec<&TensorSensitivity>)| {
        // Of each role another part of the model.
        let part = (2 * at + 1) as f64 / (2 * count) as f64;
        let tensor = tensors[(part * tensors.len() as f64) as usize];
        let probe = tensor.probes.iter().find(|probe| probe.foretold)?;
        Some((tensor.name.clone(), probe.ty.clone()))
    };
    roles.values().enumerate().filter_map(chosen).collect()
}

/// Scales what was told by what the probes of `calibrating` have measured, and drops what is measured now. `None` if there are
/// none.
pub(super) fn calibrate(tensors: &mut [TensorSensitivity], flip_cost: Option<f64>) -> Option<CurvatureCheck> {
    let mut ratios: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for tensor in tensors.iter() {
        for told in tensor.probes.iter().filter(|probe| probe.foretold) {
            let measured = tensor.probes.iter().find(|probe| !probe.foretold && probe.ty == told.ty);
            let Some(measured) = measured.filter(|_| told.kld > 0.0) else { continue };
            // A divergence that drowns in noise is at least a part of it.
            let kld = measured.robust_kld(flip_cost).max(0.1 * measured.kld_error);
            if kld > 0.0 {
                ratios.entry(role_of(&tensor.name)).or_default().push((kld / told.kld).ln());
            }
        }
    }
    let all: Vec<f64> = ratios.values().flatten().copied().collect();
    if all.is_empty() {
        return None;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let overall = mean(&all);
    let squares: f64 = all.iter().map(|ratio| (ratio - overall).powi(2)).sum();
    let spread = (squares / (all.len() - 1).max(1) as f64).sqrt();
    for tensor in tensors.iter_mut() {
        let of_role = ratios.get(&role_of(&tensor.name));
        // One probe of a role is worth as much as the mean of all others.
        let scale = of_role.map_or(overall, |ratios| (mean(ratios) + overall) / 2.0).exp();
        let measured: Vec<String> =
            tensor.probes.iter().filter(|probe| !probe.foretold).map(|probe| probe.ty.clone()).collect();
        tensor.probes.retain(|probe| !probe.foretold || !measured.contains(&probe.ty));
        for probe in tensor.probes.iter_mut().filter(|probe| probe.foretold) {
            probe.kld = six_digits(scale * probe.kld);
            probe.kld_error = six_digits(spread.min(1.0) * probe.kld);
        }
    }
    Some(CurvatureCheck { probes: all.len(), ratio: six_digits(overall.exp()), spread: six_digits(spread) })
}

/// What a tensor does in its layer: its name without the number of the layer.
fn role_of(name: &str) -> String {
    crate::recipe::roles::split_block(name).map_or(name, |(_, rest)| rest).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(kld: f64, foretold: bool) -> Probe {
        Probe { ty: "Q3_K".into(), kld, kld_error: 0.01 * kld, steady_kld: None, flips: None, foretold }
    }

    fn model(roles: &[&str], layers: usize) -> Vec<TensorSensitivity> {
        let names = (0..layers).flat_map(|layer| roles.iter().map(move |role| format!("blk.{layer}.{role}.weight")));
        let of = |name: String| TensorSensitivity { name, probes: vec![probe(0.5, true)], ..Default::default() };
        names.map(of).collect()
    }

    #[test]
    fn every_role_is_probed_once_and_in_another_part_of_the_model() {
        let tensors = model(&["attn_q", "attn_v", "ffn_down", "ffn_up"], 12);
        let chosen = calibrating(&tensors);
        let names: Vec<&str> = chosen.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["blk.1.attn_q.weight", "blk.4.attn_v.weight", "blk.7.ffn_down.weight", "blk.10.ffn_up.weight"]
        );
        assert!(calibrating(&[]).is_empty());
    }

    #[test]
    fn what_was_told_is_scaled_by_what_was_measured() {
        let mut tensors = model(&["attn_q", "ffn_up"], 3);
        tensors[0].probes.push(probe(1.0, false));
        tensors[5].probes.push(probe(4.0, false));
        let check = calibrate(&mut tensors, None).unwrap();
        // Ratios of 2 and 8: 4 overall.
        assert_eq!((check.probes, check.ratio), (2, 4.0));
        assert!((check.spread - 2f64.ln() * 2f64.sqrt()).abs() < 1e-5);
        assert_eq!(tensors[0].probes, [probe(1.0, false)]);
        let told: Vec<f64> = tensors[1..5].iter().map(|tensor| tensor.probes[0].kld).collect();
        // Halfway from the overall ratio: sqrt(8 * 4) and sqrt(2 * 4).
        let expected = [32f64.sqrt(), 8f64.sqrt(), 32f64.sqrt(), 8f64.sqrt()].map(|ratio| 0.5 * ratio);
        assert!(told.iter().zip(expected).all(|(told, expected)| (told / expected - 1.0).abs() < 1e-5), "{told:?}");
        assert!(tensors[1].probes[0].kld_error > 0.5 * told[0]);
        assert_eq!(calibrate(&mut model(&["attn_q"], 2), None), None);
    }
}
