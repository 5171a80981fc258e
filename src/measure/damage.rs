//! From measurements to the damage of each choice.

use super::file::{JointProbe, Probe, Sensitivity, TensorSensitivity};

/// Below this many bits per weight damages no longer add up, and a round of measurements around a first solution pays.
pub const SECOND_ROUND_BITS: f64 = 4.0;

/// A second round serves budgets that differ from it by at most this many bits per weight.
const SAME_REGION_BITS: f64 = 0.6;

/// Predicted divergences of one model.
///
/// With one tensor rounded, the mean KL divergence grows in proportion to the squared error of its outputs (HIGGS, arXiv
/// 2411.17525); so a probe at one type gives all types, and more probes are interpolated. Divergences of different
/// tensors add up, nearly; the measured sum of all says how nearly. A second round measures the same around a solution:
/// what each tensor contributes when the others are rounded too.
#[derive(Clone, Debug)]
pub struct DamageModel<'s> {
    sensitivity: &'s Sensitivity,
    /// [`Sensitivity::flip_cost`].
    flip_cost: Option<f64>,
    around: Option<&'s JointProbe>,
}

impl Sensitivity {
    /// Predictions for plans of about `bits_per_weight`; a second round is used when there is one for that region.
    pub fn damage_model(&self, bits_per_weight: Option<f64>) -> DamageModel<'_> {
        let flip_cost = self.flip_cost();
        DamageModel { sensitivity: self, flip_cost, around: bits_per_weight.and_then(|bits| self.round_around(bits)) }
    }

    /// The second round for plans of about `bits_per_weight`.
    pub fn round_around(&self, bits_per_weight: f64) -> Option<&JointProbe> {
        let distance = |joint: &JointProbe| (joint.bits_per_weight - bits_per_weight).abs();
        let rounds = self.joint.iter().filter(|joint| !joint.drops.is_empty() && distance(joint) <= SAME_REGION_BITS);
        rounds.min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }
}

impl TensorSensitivity {
    /// Points of (squared error, divergence) in the order of the error; divergences that drown in noise are raised to
    /// a tenth of their own uncertainty.
    fn points(&self, flip_cost: Option<f64>) -> Vec<(f64, f64)> {
        let mut points: Vec<(f64, f64)> = self
            .probes
            .iter()
            .filter_map(|probe| {
                Some((*self.errors.get(&probe.ty)?, probe.robust_kld(flip_cost).max(0.1 * probe.kld_error)))
            })
            .filter(|(error, _)| *error > 0.0)
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    }

    /// Divergence with this tensor alone rounded with squared error `error`.
    fn divergence(&self, error: f64, flip_cost: Option<f64>) -> Option<f64> {
        let points = self.points(flip_cost);
        let after = points.iter().position(|point| point.0 >= error);
        let (low, high) = match after {
            Some(0) | None => {
                let (known, kld) = if after.is_some() { points.first()? } else { points.last()? };
                return Some(kld * error / known);
            }
            Some(i) => (points[i - 1], points[i]),
        };
        if low.1 <= 0.0 || high.1 <= 0.0 || low.0 <= 0.0 {
            return Some(high.1 * error / high.0);
        }
        let share = (error / low.0).ln() / (high.0 / low.0).ln();
        Some((low.1.ln() + share * (high.1 / low.1).ln()).exp())
    }

    /// Standard error of the probes as a part of the divergence.
    fn relative_error(&self) -> f64 {
        let kld_of = |p: &Probe| p.steady_kld.unwrap_or(p.kld).max(0.0);
        let (kld, error) = self.probes.iter().fold((0.0, 0.0), |(k, e), p| (k + kld_of(p), e + p.kld_error));
        if kld > 0.0 { error / kld } else { 0.0 }
    }
}

impl DamageModel<'_> {
    /// Nats that rounding a tensor with relative squared error `error` adds to the divergence; `None` for tensors that
    /// were not measured.
    pub fn damage(&self, tensor: &str, error: f64) -> Option<f64> {
        let known = self.sensitivity.tensor(tensor)?;
        // No probe was made of what no pass runs, so it does no damage that could be measured.
        if known.probes.is_empty() {
            return Some(0.0);
        }
        if let Some(around) = self.around
            && let (Some(drop), Some(chosen)) = (around.drops.get(tensor), around.types.get(tensor))
            && let Some(&chosen_error) = known.errors.get(chosen)
            && chosen_error > 0.0
        {
            // A drop that drowns in noise still has the sign that it must have.
            let alone = known.divergence(chosen_error, self.flip_cost).unwrap_or(0.0);
            return Some(drop.max(0.2 * alone) * error / chosen_error);
        }
        known.divergence(error, self.flip_cost)
    }

    /// Damage of a choice of types for all tensors, as a divergence of the whole model.
    pub fn predict(&self, sum: f64) -> f64 {
        sum * self.additivity(sum)
    }

    /// Sum of damages that is predicted to give the divergence `kld`.
    pub fn sum_for(&self, kld: f64) -> f64 {
        // A fixed point, approached by a constant factor each step.
        (0..200).fold(kld, |sum, _| kld / self.additivity(sum))
    }

    /// Measured divergence of the whole over the sum of the parts, at the level of `sum`.
    fn additivity(&self, sum: f64) -> f64 {
        let mut points: Vec<(f64, f64)> = match self.around {
            Some(around) => vec![self.ratio(around)].into_iter().flatten().collect(),
            None => {
                let uniform = self.sensitivity.joint.iter().filter(|joint| joint.drops.is_empty());
                uniform.filter_map(|joint| self.ratio(joint)).collect()
            }
        };
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let after = points.iter().position(|point| point.0 >= sum);
        match (points.first(), points.last(), after) {
            (Some(first), _, Some(0)) => first.1,
            (_, Some(last), None) => last.1,
            (_, _, Some(i)) => {
                let (low, high) = (points[i - 1], points[i]);
                let share = (sum / low.0).ln() / (high.0 / low.0).ln();
                low.1 + share * (high.1 - low.1)
            }
            _ => 1.0,
        }
    }

    /// Sum of the parts and the whole over that sum.
    fn ratio(&self, joint: &JointProbe) -> Option<(f64, f64)> {
        let mut sum = 0.0;
        for (tensor, ty) in &joint.types {
            let known = self.sensitivity.tensor(tensor)?;
            sum += match (self.around, joint.drops.get(tensor)) {
                (Some(_), Some(drop)) => drop.max(0.2 * known.divergence(*known.errors.get(ty)?, self.flip_cost)?),
                _ => known.divergence(*known.errors.get(ty)?, self.flip_cost)?,
            };
        }
        (sum > 0.0 && joint.kld > 0.0).then(|| (sum, joint.kld / sum))
    }

    /// Standard error of a prediction, as a part of it: the scatter of the text in the sum of all tensors, and the
    /// probes' own, `damages` being what each tensor adds.
    pub fn relative_error<'t>(&self, damages: impl Iterator<Item = (&'t str, f64)>) -> f64 {
        let text =
            self.sensitivity.joint.iter().filter(|joint| joint.kld > 0.0).map(|joint| joint.kld_error / joint.kld);
        let text = text.fold(0.0, f64::max);
        let (mut sum, mut squares) = (0.0, 0.0);
        for (tensor, damage) in damages {
            let relative = self.sensitivity.tensor(tensor).map_or(0.0, TensorSensitivity::relative_error);
            sum += damage;
            squares += (damage * relative).powi(2);
        }
        let probes = if sum > 0.0 { squares.sqrt() / sum } else { 0.0 };
        (text * text + probes * probes).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(ty: &str, kld: f64) -> Probe {
        Probe { ty: ty.into(), kld, kld_error: 0.1 * kld, steady_kld: None, flips: None, foretold: false }
    }

    fn tensor(name: &str, klds: &[(&str, f64)]) -> TensorSensitivity {
        let errors = [("Q2_K", 0.08), ("Q3_K", 0.02), ("Q4_K", 0.005), ("Q6_K", 0.0003)];
        TensorSensitivity {
            shape: Vec::new(),
            name: name.into(),
            errors: errors.map(|(ty, error)| (ty.to_owned(), error)).into(),
            probes: klds.iter().map(|(ty, kld)| probe(ty, *kld)).collect(),
        }
    }

    fn joint(kld: f64, ty: &str, drops: &[(&str, f64)]) -> JointProbe {
        JointProbe {
            bits_per_weight: 3.4,
            kld,
            kld_error: 0.05 * kld,
            types: ["a", "b"].map(|name| (name.to_owned(), ty.to_owned())).into(),
            drops: drops.iter().map(|(name, drop)| ((*name).to_owned(), *drop)).collect(),
        }
    }

    fn close(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
    }

    #[test]
    fn one_probe_gives_all_types_in_proportion_to_their_error() {
        let measured = Sensitivity { tensors: vec![tensor("a", &[("Q3_K", 0.004)])], ..Sensitivity::default() };
        let model = measured.damage_model(None);
        close(model.damage("a", 0.08).unwrap(), 0.016);
        close(model.damage("a", 0.0003).unwrap(), 0.00006);
        assert!(model.damage("b", 0.02).is_none());
    }

    #[test]
    fn changed_experts_count_by_their_number_and_not_by_one_token() {
        let routed = |kld: f64, steady: f64, flips: f64| Probe {
            steady_kld: Some(steady),
            flips: Some(flips),
            kld,
            ..probe("Q4_K", steady)
        };
        let of = |name: &str, probe: Probe| TensorSensitivity { probes: vec![probe], ..tensor(name, &[]) };
        let tensors = vec![
            of("a", routed(0.003, 0.001, 0.2)),
            of("b", routed(0.004, 0.002, 0.2)),
            // One token of this tensor's few diverges beyond measure.
            of("c", routed(0.9, 0.001, 0.01)),
        ];
        let measured = Sensitivity { tensors, ..Sensitivity::default() };
        close(measured.flip_cost().unwrap(), 0.01);
        let model = measured.damage_model(None);
        close(model.damage("a", 0.005).unwrap(), 0.003);
        close(model.damage("c", 0.005).unwrap(), 0.0011);
    }

    #[test]
    fn between_two_probes_the_logarithms_are_interpolated() {
        let klds = [("Q4_K", 0.001), ("Q2_K", 0.008)];
        let measured = Sensitivity { tensors: vec![tensor("a", &klds)], ..Sensitivity::default() };
        let model = measured.damage_model(None);
        close(model.damage("a", 0.08).unwrap(), 0.008);
        close(model.damage("a", 0.02).unwrap(), (0.001f64 * 0.008).sqrt());
        close(model.damage("a", 0.0003).unwrap(), 0.001 * 0.0003 / 0.005);
    }

    #[test]
    fn the_whole_is_predicted_from_how_parts_added_up() {
        let tensors = vec![tensor("a", &[("Q3_K", 0.004)]), tensor("b", &[("Q3_K", 0.006)])];
        let measured = Sensitivity {
            tensors,
            joint: vec![joint(0.009, "Q3_K", &[]), joint(0.02, "Q2_K", &[])],
            ..Sensitivity::default()
        };
        let model = measured.damage_model(Some(3.4));
        close(model.predict(0.01), 0.009);
        close(model.predict(0.001), 0.0009);
        close(model.predict(0.04), 0.02);
        close(model.predict(model.sum_for(0.015)), 0.015);
        assert!(model.relative_error([("a", 0.004), ("b", 0.006)].into_iter()) > 0.05);
    }

    #[test]
    fn a_second_round_replaces_the_first_in_its_region() {
        let tensors = vec![tensor("a", &[("Q3_K", 0.004)]), tensor("b", &[("Q3_K", 0.006)])];
        let measured = Sensitivity {
            tensors,
            joint: vec![joint(0.012, "Q3_K", &[("a", 0.002), ("b", -0.001)])],
            ..Sensitivity::default()
        };
        let near = measured.damage_model(Some(3.6));
        close(near.damage("a", 0.08).unwrap(), 0.008);
        close(near.damage("b", 0.02).unwrap(), 0.0012);
        close(near.predict(0.0032), 0.012);
        let far = measured.damage_model(Some(5.0));
        close(far.damage("a", 0.08).unwrap(), 0.016);
    }
}
