//! How large the result may be: the flags, and what they mean for a model.

use clap::Args;

use lwq::gguf::split;
use lwq::plan::{Budget, Size};
use lwq::recipe::Target;

/// The limit, one of several kinds.
#[derive(Args, Debug, Clone, Default)]
#[group(id = "budget", multiple = false)]
pub struct BudgetArgs {
    /// At most the bytes of the standard file NAME, such as Q4_K_M, made with the same imatrix
    #[arg(long, value_name = "NAME", value_parser = parse_target)]
    like: Option<Target>,
    /// At most this many bytes in all, such as 4.18GB (units of 1000) or 3.9GiB (units of 1024)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    target_size: Option<Size>,
    /// At most this many bits of tensor data per weight, such as 3.5
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    target_bpw: Option<f64>,
    /// The smallest file whose predicted mean KL divergence is at most this, such as 0.02
    #[arg(long, value_name = "NATS", value_parser = parse_divergence)]
    max_kld: Option<f64>,
}

impl BudgetArgs {
    /// The one that was given; the command line makes sure that there is one.
    pub fn budget(&self) -> Option<Budget> {
        let like = self.like.map(Budget::Like);
        like.or_else(|| self.target_size.clone().map(Budget::File))
            .or_else(|| self.target_bpw.map(Budget::BitsPerWeight))
            .or_else(|| self.max_kld.map(Budget::Divergence))
    }
}

/// Reads a size with a unit of 1000 (K, M, G, T, with or without B) or of 1024 (KiB, MiB, GiB, TiB), or plain bytes.
///
/// # Errors
/// A sentence that says what was given and what is accepted.
pub fn parse_size(text: &str) -> Result<Size, String> {
    let trimmed = text.trim();
    let bad = || {
        format!(
            "size {text:?} is not understood: give a number above 0 with KB, MB, GB (units of 1000) or KiB, MiB, GiB \
             (units of 1024), such as 4.18GB"
        )
    };
    let without_b = trimmed.strip_suffix(['b', 'B']).unwrap_or(trimmed).trim_end();
    let bytes = match without_b.strip_suffix(['i', 'I']) {
        Some(binary) if without_b.len() < trimmed.len() => {
            let unit = binary.chars().last().map(|c| c.to_ascii_uppercase());
            let step = [Some('K'), Some('M'), Some('G'), Some('T')].iter().position(|known| *known == unit);
            let step = step.ok_or_else(bad)? as u32 + 1;
            let decimal = split::parse_size(&spaceless(binary)).map_err(|_| bad())?;
            // Exact: the decimal unit is taken out again before the binary one comes in.
            let scaled = u128::from(decimal) * 1024_u128.pow(step) / 1000_u128.pow(step);
            u64::try_from(scaled).map_err(|_| bad())?
        }
        _ => split::parse_size(&spaceless(without_b)).map_err(|_| bad())?,
    };
    Ok(Size { text: trimmed.to_owned(), bytes })
}

/// `4.18 G` is `4.18G`.
fn spaceless(text: &str) -> String {
    text.split_whitespace().collect()
}

fn parse_target(text: &str) -> Result<Target, String> {
    match Target::parse(text) {
        Ok(Target::COPY) => Err("COPY keeps every tensor; give a target that has a size of its own".to_owned()),
        other => other.map_err(|e| e.to_string()),
    }
}

fn parse_bits(text: &str) -> Result<f64, String> {
    positive(text, "bits per weight, such as 3.5", 64.0)
}

fn parse_divergence(text: &str) -> Result<f64, String> {
    positive(text, "a KL divergence in nats, such as 0.02", 1e6)
}

fn positive(text: &str, expected: &str, most: f64) -> Result<f64, String> {
    let value = text.trim().parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= most);
    value.ok_or_else(|| format!("{text:?} is not understood: give {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_know_both_kinds_of_units() {
        for (text, bytes) in [
            ("4.18GB", 4_180_000_000),
            ("4.18 GB", 4_180_000_000),
            ("4.18g", 4_180_000_000),
            ("2GiB", 2 << 30),
            ("1.5 MiB", 3 << 19),
            ("1KiB", 1024),
            ("123456", 123_456),
            ("123456B", 123_456),
        ] {
            assert_eq!(parse_size(text).unwrap().bytes, bytes, "{text}");
        }
        for text in ["", "0", "-1GB", "GB", "4.18XB", "1iB", "4 GiGiB", "nan", "99999999999TB", "1e9", "1GI"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn limits_must_be_positive_numbers() {
        assert_eq!(parse_bits("3.5"), Ok(3.5));
        for text in ["0", "-1", "nan", "inf", "65", "x", ""] {
            assert!(parse_bits(text).is_err(), "{text}");
        }
    }
}
