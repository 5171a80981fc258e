//! Rotary embedding: scaling of its frequencies, sections, factors.

use std::f32::consts::TAU;

use super::{Keys, RopeFactors, Source};
use crate::convert::ConvertError;
use crate::gguf::{self, Array, ValueType};

/// How many pairs of a head rotate by the position in time, in height and in width.
pub(super) fn write_sections(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { arch, config, rope, .. } = source;
    let mut sections = rope.numbers(config, "mrope_section")?;
    if sections.is_empty() {
        sections = source.row.default_sections.to_vec();
    }
    if sections.is_empty() && arch.has_sections() {
        let class = config.architecture();
        let problem = format!("is missing; {class} needs it, take the model's own config.json");
        return Err(config.wrong(&format!("{}.mrope_section", rope.key), problem));
    }
    if sections.is_empty() {
        return Ok(());
    }
    let mut pairs = sections.iter().map(|pairs| gguf::Value::I32(*pairs as i32)).collect::<Vec<_>>();
    pairs.resize(4, gguf::Value::I32(0));
    keys.set("rope.dimension_sections", Array::of_values(ValueType::I32, &pairs));
    Ok(())
}

/// What the configuration calls rope scaling.
pub(super) fn write_scaling(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, rope, .. } = source;
    let factor = rope.number(config, "factor")?;
    match (rope.kind().as_deref(), factor) {
        (None | Some("default" | "llama3" | "mrope" | "proportional"), _) | (Some("linear" | "yarn"), None) => {}
        (Some("linear"), Some(factor)) => {
            keys.str("rope.scaling.type", "linear");
            keys.f32("rope.scaling.factor", factor);
        }
        (Some("yarn"), Some(factor)) => {
            keys.str("rope.scaling.type", "yarn");
            keys.f32("rope.scaling.factor", factor);
            let original = rope.required(config, "original_max_position_embeddings")?;
            if !(1.0..=f64::from(u32::MAX)).contains(&original) {
                let field = format!("{}.original_max_position_embeddings", rope.key);
                return Err(config.wrong(&field, format!("is {original}, expected a context length")));
            }
            keys.u32("rope.scaling.original_context_length", original as u64);
            let attention = match rope.number(config, "attention_factor")? {
                None => rope.number(config, "attn_factor")?,
                factor => factor,
            };
            let optional = [
                ("rope.scaling.yarn_ext_factor", rope.number(config, "extrapolation_factor")?),
                ("rope.scaling.yarn_attn_factor", attention),
                ("rope.scaling.yarn_beta_fast", rope.number(config, "beta_fast")?),
                ("rope.scaling.yarn_beta_slow", rope.number(config, "beta_slow")?),
            ];
            for (suffix, value) in optional {
                if let Some(value) = value {
                    keys.f32(suffix, value);
                }
            }
        }
        (Some("su" | "longrope"), _) => keys.str("rope.scaling.type", "longrope"),
        // Its own keys say it.
        (Some("dynamic" | "xdrope"), _) if source.row.arch.name.starts_with("hunyuan") => {}
        (Some(other), _) => {
            let other: String = other.chars().filter(|c| !c.is_control()).take(40).collect();
            keys.warnings.push(format!(
                "{}.rope_type is {other}, which GGUF cannot express; texts longer than the training \
                 context will run worse",
                rope.key
            ));
        }
    }
    Ok(())
}

/// Llama 3's scaling: low frequencies slowed down, high ones kept, those between blended.
struct Llama3 {
    base: f64,
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    /// `None` where the configuration does not ask for it.
    fn read(source: &Source) -> Result<Option<Llama3>, ConvertError> {
        let Source { config, rope, .. } = source;
        if rope.kind().as_deref() != Some("llama3") {
            return Ok(None);
        }
        let number = |name: &str, default: f64| rope.number(config, name).map(|value| value.unwrap_or(default));
        let scaling = Llama3 {
            base: number("rope_theta", 10_000.0)?,
            factor: number("factor", 8.0)?,
            low: number("low_freq_factor", 1.0)?,
            high: number("high_freq_factor", 4.0)?,
            context: number("original_max_position_embeddings", 8192.0)?,
        };
        let Llama3 { base, factor, low, high, context } = scaling;
        if [base, factor, low, high, context].iter().any(|value| *value <= 0.0) || low == high {
            return Err(
                config.wrong(rope.key, "has a factor of llama3 that is zero or negative, or equal low and high ones")
            );
        }
        Ok(Some(scaling))
    }

    /// Turns of pair `i` of `rotated` values a token, in single precision as in the reference.
    fn frequency(&self, i: u64, rotated: u64) -> f32 {
        let exponent = (2 * i) as f32 / rotated as f32;
        1.0 / f64::from(self.base as f32).powf(exponent.into()) as f32
    }

    /// The factor of a frequency, in single precision in the order of the reference, so that the tensor has its bytes.
    fn factor(&self, frequency: f32) -> f32 {
        let [factor, low, high, context] = [self.factor, self.low, self.high, self.context].map(|value| value as f32);
        let wavelength = frequency.recip() * TAU;
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (wavelength.recip() * context - low) / (high - low);
            ((1.0 - smooth) / factor + smooth).recip()
        }
    }

    /// The same in double precision, as the reference computes it for Step 3.5.
    fn precise_factor(&self, frequency: f32) -> f32 {
        let wavelength = std::f64::consts::TAU / f64::from(frequency);
        if wavelength < self.context / self.high {
            1.0
        } else if wavelength > self.context / self.low {
            self.factor as f32
        } else {
            let smooth = (self.context / wavelength - self.low) / (self.high - self.low);
            (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
        }
    }
}

/// Llama 3's factors of a whole head.
pub(super) fn write_llama3_factors(source: &Source, keys: &mut Keys) -> Result<(), ConvertError> {
    let Some(scaling) = Llama3::read(source)? else { return Ok(()) };
    let head = source.sizes.head;
    let values = (0..head / 2).map(|i| scaling.factor(scaling.frequency(i, head))).collect();
    keys.factors.push(RopeFactors { tensor: "rope_freqs.weight", values });
    Ok(())
}

/// Those of the first `rotated` values of a head; the other pairs stay as they are.
pub(super) fn write_partial_llama3_factors(source: &Source, rotated: u64, keys: &mut Keys) -> Result<(), ConvertError> {
    let Some(scaling) = Llama3::read(source)? else { return Ok(()) };
    let mut values: Vec<f32> =
        (0..rotated / 2).map(|i| scaling.precise_factor(scaling.frequency(i, rotated))).collect();
    values.resize((source.sizes.head / 2) as usize, 1.0);
    keys.factors.push(RopeFactors { tensor: "rope_freqs.weight", values });
    Ok(())
}

/// Values of a head that are rotated, `usual` of them where the configuration does not say.
pub(super) fn write_rotated(source: &Source, usual: f64, keys: &mut Keys) -> Result<(), ConvertError> {
    let Source { config, sizes, rope, .. } = source;
    let part = rope.number(config, "partial_rotary_factor")?.unwrap_or(usual);
    if !(0.0..=1.0).contains(&part) {
        return Err(config.wrong("partial_rotary_factor", format!("is {part}, expected 0 to 1")));
    }
    keys.u32("rope.dimension_count", (sizes.head as f64 * part) as u64);
    Ok(())
}
