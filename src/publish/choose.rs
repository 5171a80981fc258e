//! Which file is kept for a target, and which sizes are tried on the way to the smallest: rules over figures, no files.

use serde::{Deserialize, Serialize};

/// Size and divergence of a file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes of the file.
    pub bytes: u64,
    /// Mean KL divergence from the base, nats a token.
    pub kld: f64,
}

impl Measured {
    /// True if it is at most as large and at most as far from the base.
    fn keeps_up_with(self, standard: Measured) -> bool {
        self.bytes <= standard.bytes && self.kld <= standard.kld
    }
}

/// Why a file is kept or not, in words that follow its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// Kept.
    #[serde(rename = "planned: at most the standard file's bytes and divergence")]
    Planned,
    /// Kept.
    #[serde(rename = "the smallest planned file that was tried whose divergence is not above the standard file's")]
    Smallest,
    /// Kept.
    #[serde(rename = "the standard file: no planned file had at most its bytes and divergence")]
    Standard,
    /// Kept.
    #[serde(rename = "planned for this size")]
    Size,
    /// Not kept.
    #[serde(rename = "its divergence is above the standard file's")]
    Worse,
    /// Not kept.
    #[serde(rename = "a smaller file has a divergence not above the standard file's")]
    Larger,
    /// Not kept.
    #[serde(rename = "the usual file, made to compare with")]
    Compared,
}

/// Chooses among the planned files of a target, the first of which was made for the standard file's bytes: with `smallest` the
/// smallest that keeps up with the standard file, else the first if it does. `None` is the standard file itself.
pub fn choose(planned: &[Measured], standard: Measured, smallest: bool) -> Option<usize> {
    let able = planned.iter().enumerate().filter(|(_, file)| file.keeps_up_with(standard));
    match smallest {
        true => able.min_by_key(|(_, file)| file.bytes).map(|(at, _)| at),
        false => able.map(|(at, _)| at).next().filter(|at| *at == 0),
    }
}

/// What [`next_size`] aims at, as a part of the standard file's divergence: the line that it follows is none in truth.
const AIM: f64 = 0.985;

/// A search ends when what is left to try is a smaller part of the file than this.
const NARROW: f64 = 0.002;

/// No step goes nearer to what is known than this part of the gap between both sides.
const MARGIN: f64 = 0.15;

/// The size to try next on the way to the smallest file that keeps up with `standard`. `planned` are the files so far, the
/// first of which was made for the standard file's bytes; `first` is where predictions put the answer; no file can be smaller
/// than `least`. The logarithm of the divergence is taken as a line between the largest file that was too bad and the
/// smallest that was not. `None` ends the search.
pub fn next_size(planned: &[Measured], standard: Measured, first: Option<u64>, least: u64) -> Option<u64> {
    let able = planned.iter().filter(|file| file.keeps_up_with(standard));
    let best = *able.min_by_key(|file| file.bytes)?;
    let failed = planned.iter().filter(|file| !file.keeps_up_with(standard) && file.bytes < best.bytes);
    let worst = failed.max_by_key(|file| file.bytes).copied();
    let floor = worst.map_or(least, |file| file.bytes.max(least));
    if best.bytes <= floor || ((best.bytes - floor) as f64) < NARROW * best.bytes as f64 {
        return None;
    }
    let log = |kld: f64| kld.max(f64::MIN_POSITIVE).ln();
    let aim = log(AIM * standard.kld);
    let on_line = |a: Measured, b: Measured| {
        let slope = (log(b.kld) - log(a.kld)) / (b.bytes as f64 - a.bytes as f64);
        (slope.is_finite() && slope < 0.0).then(|| a.bytes as f64 + (aim - log(a.kld)) / slope)
    };
    let middle = (floor as f64 + best.bytes as f64) / 2.0;
    let guess = match worst {
        Some(worst) => on_line(worst, best).unwrap_or(middle),
        // Nothing was too bad yet: predictions, then the line from the file for all the bytes to the smallest; neighbours
        // differ by little more than noise.
        None => match (planned, first) {
            ([_], Some(first)) => first as f64,
            ([full, _, ..], _) => on_line(*full, best).unwrap_or(middle),
            _ => middle,
        },
    };
    let gap = (best.bytes - floor) as f64;
    // Without a lower side the step is free down to it; with one it stays clear of both.
    let low = if worst.is_some() { floor as f64 + MARGIN * gap } else { floor as f64 };
    let high = best.bytes as f64 - if worst.is_some() { MARGIN * gap } else { 2.0 * NARROW * best.bytes as f64 };
    let size = if guess.is_finite() { guess.clamp(low.min(high), high) } else { middle };
    Some((size as u64).clamp(floor + u64::from(worst.is_some()), best.bytes - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, kld: f64) -> Measured {
        Measured { bytes, kld }
    }

    #[test]
    fn the_standard_file_is_kept_where_the_planned_one_is_worse_or_larger() {
        let standard = file(1000, 0.1);
        assert_eq!(choose(&[file(1000, 0.1)], standard, false), Some(0));
        for worse in [file(1000, 0.11), file(1001, 0.05), file(900, f64::NAN)] {
            assert_eq!(choose(&[worse], standard, false), None);
            assert_eq!(choose(&[worse], standard, true), None);
        }
        let files = [file(1000, 0.05), file(900, 0.12), file(950, 0.09), file(970, 0.08)];
        assert_eq!((choose(&files, standard, false), choose(&files, standard, true)), (Some(0), Some(2)));
    }

    /// Divergence that falls by a factor of e for 100 bytes, and is below the standard's from 861 bytes on.
    fn divergence(bytes: u64) -> f64 {
        0.1 * (-(bytes as f64 - 860.5) / 100.0).exp()
    }

    #[test]
    fn a_few_steps_lead_to_the_smallest_file() {
        let standard = file(1000, 0.1);
        for first in [None, Some(870), Some(850), Some(600), Some(990)] {
            let mut files = vec![file(1000, divergence(1000))];
            let mut steps = 0;
            while let Some(size) = next_size(&files, standard, first, 500) {
                assert!((500..1000).contains(&size), "{size}");
                files.push(file(size, divergence(size)));
                steps += 1;
                assert!(steps < 12, "{files:?}");
            }
            let best = files[choose(&files, standard, true).unwrap()];
            assert!((861..=864).contains(&best.bytes), "{first:?}: {files:?}");
            let after_three = &files[..files.len().min(4)];
            let good = after_three[choose(after_three, standard, true).unwrap()];
            assert!(good.bytes <= 885, "{first:?}: {after_three:?}");
        }
    }

    #[test]
    fn a_search_without_room_ends_at_once() {
        let standard = file(1000, 0.1);
        assert_eq!(next_size(&[file(1000, 0.2)], standard, Some(900), 500), None);
        assert_eq!(next_size(&[file(1000, 0.05)], standard, None, 1000), None);
        let noisy = [file(1000, 0.05), file(900, 0.05), file(800, 0.3)];
        assert!(next_size(&noisy, standard, None, 500).is_some_and(|size| (801..900).contains(&size)));
    }
}
