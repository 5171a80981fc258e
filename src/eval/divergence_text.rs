//! Divergence of models for people: all figures of one, or a table of several.

use std::fmt::{self, Write as _};

use super::{DivergenceReport, DivergenceRun, ModelDivergence, Percentiles};
use crate::display::{binary_size, count, decimal_size, peak_memory, printable};

impl fmt::Display for DivergenceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.models.as_slice() {
            [model] => f.write_str(&one_text(model))?,
            models => f.write_str(&table(models))?,
        }
        f.write_str(&closing(&self.run))
    }
}

fn closing(run: &DivergenceRun) -> String {
    let mut text = String::new();
    if let Some(test) = &run.sequential_test {
        let verdict =
            if test.decided { "is significantly better than every other" } else { "leads, not significantly" };
        let _ = writeln!(text, "{} {verdict} (alpha {}; {})", printable(&test.best), test.alpha, test.test);
    }
    let memory = peak_memory(run.peak_memory_bytes);
    let covered = if run.complete { "" } else { " (not the whole text)" };
    let _ = writeln!(
        text,
        "{} windows of {} tokens, {} of them scored{covered}, {:.1} s, {:.0} tokens/s over all models{memory}",
        run.windows, run.ctx, run.scored_per_window, run.seconds, run.tokens_per_second
    );
    text
}

fn table(models: &[ModelDivergence]) -> String {
    let width = models.iter().map(|m| m.file.chars().count()).max().unwrap_or(4).max(4);
    let routed = models.iter().any(|m| m.divergence.routing.is_some());
    let routing = if routed { format!(" {:>8} {:>10}", "flips", "unflipped") } else { String::new() };
    let mut text = format!(
        "{:<width$} {:>10} {:>6} {:>20} {:>23} {:>10} {:>7} {:>8}{routing} {:>22}\n",
        "file", "size", "bpw", "PPL", "mean KLD", "median", "RMS Δp", "same top", "KLD against first"
    );
    for m in models {
        let s = &m.divergence;
        let routing = match (&s.routing, routed) {
            (Some(r), _) => {
                let forced = r.forced_mean_kld.map_or_else(String::new, |kld| format!("{kld:.6}"));
                format!(" {:>7.3}% {forced:>10}", 100.0 * r.flips)
            }
            (None, true) => format!(" {:>8} {:>10}", "", ""),
            (None, false) => String::new(),
        };
        let against = m
            .kld_against_first
            .map_or_else(String::new, |p| format!("{:.3} [{:.3}, {:.3}]", p.ratio, p.ratio_low, p.ratio_high));
        let _ = writeln!(
            text,
            "{:<width$} {:>10} {:>6.3} {:>20} {:>23} {:>10.6} {:>6.3}% {:>7.2}%{routing} {:>22}",
            printable(&m.file),
            decimal_size(m.size_bytes),
            m.bits_per_weight,
            format!("{:.4} ± {:.4}", s.ppl, s.ppl_error),
            format!("{:.6} ± {:.6}", s.mean_kld, s.mean_kld_error),
            s.median_kld,
            100.0 * s.rms_delta_p,
            100.0 * s.same_top_p,
            against
        );
    }
    if routed {
        text.push_str(
            "flips: token-layers with other experts than the base's; unflipped: mean KLD with the base's experts\n",
        );
    }
    text
}

fn one_text(model: &ModelDivergence) -> String {
    let s = &model.divergence;
    let mut text = format!(
        "{}: {} ({}), {:.3} bits per weight, {} predictions\n\n",
        printable(&model.file),
        decimal_size(model.size_bytes),
        binary_size(model.size_bytes),
        model.bits_per_weight,
        count(s.tokens as u64)
    );
    let mut line = |name: &str, value: f64, error: Option<f64>, unit: &str| {
        let error = error.map_or_else(String::new, |e| format!(" ± {e:.6}"));
        let _ = writeln!(text, "{name:<24}{value:>12.6}{error}{unit}");
    };
    line("PPL(Q)", s.ppl, Some(s.ppl_error), "");
    line("PPL(base)", s.ppl_base, Some(s.ppl_base_error), "");
    line("correlation of ln PPL", 100.0 * s.correlation, None, " %");
    line("ln(PPL(Q)/PPL(base))", s.log_ppl_ratio, Some(s.log_ppl_ratio_error), "");
    line("PPL(Q)/PPL(base)", s.ppl_ratio, Some(s.ppl_ratio_error), "");
    line("PPL(Q)-PPL(base)", s.ppl_difference, Some(s.ppl_difference_error), "");
    line("mean KLD", s.mean_kld, Some(s.mean_kld_error), "");
    for (name, value) in named(&s.kld) {
        line(&format!("{name} KLD"), value, None, "");
    }
    line("mean Δp", 100.0 * s.mean_delta_p, Some(100.0 * s.mean_delta_p_error), " %");
    for (name, value) in named(&s.delta_p) {
        line(&format!("{name} Δp"), 100.0 * value, None, " %");
    }
    line("RMS Δp", 100.0 * s.rms_delta_p, Some(100.0 * s.rms_delta_p_error), " %");
    line("same top p", 100.0 * s.same_top_p, Some(100.0 * s.same_top_p_error), " %");
    if let Some(routing) = &s.routing {
        line("experts flipped", 100.0 * routing.flips, None, " % of token-layers");
        line("tokens with a flip", 100.0 * routing.tokens_flipped, None, " %");
        line("mean KLD without flip", routing.steady_mean_kld, None, "");
        if let (Some(mean), Some(median)) = (routing.forced_mean_kld, routing.forced_median_kld) {
            line("mean KLD, base's experts", mean, routing.forced_mean_kld_error, "");
            line("median, base's experts", median, None, "");
        }
    }
    text.push('\n');
    text
}

/// Percentiles with the names that tables give them.
fn named(p: &Percentiles) -> [(&'static str, f64); 13] {
    [
        ("maximum", p.maximum),
        ("99.9%", p.p99_9),
        ("99%", p.p99),
        ("95%", p.p95),
        ("90%", p.p90),
        ("75%", p.p75),
        ("median", p.median),
        ("25%", p.p25),
        ("10%", p.p10),
        ("5%", p.p5),
        ("1%", p.p1),
        ("0.1%", p.p0_1),
        ("minimum", p.minimum),
    ]
}
