//! `lwq eval kld`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::loaded::{Follow, Kept, Opened, TextArgs, bos, check_context, context, read_windows};
use lwq::atomic_file::check_target;
use crate::cli::{Common, Interrupted, Usage, binary_size, count, decimal_size, printable};
use lwq::eval::{
    DivergenceSummary, Evaluation, LogitsReader, LogitsWriter, PairedDifference, Percentiles, Reference,
    SequentialTest, Windows, compare_means, evaluate,
};
use lwq::model::{Model, Overrides, Pass};
use lwq::os;
use lwq::tokenizer::Tokenizer;

/// KL divergence of quantized models from their 16-bit original
#[derive(Args, Debug)]
pub struct KldArgs {
    /// Quantized models
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<PathBuf>,
    /// The original, run beside the others
    #[arg(long, value_name = "MODEL", required_unless_present = "base_logits", conflicts_with = "base_logits")]
    base: Option<PathBuf>,
    /// Distributions of the original that llama-perplexity or --save-logits saved; they hold the text too
    #[arg(long, visible_alias = "kl-divergence-base", value_name = "FILE", conflicts_with_all = ["file", "ctx", "save_logits", "state", "score_from"])]
    base_logits: Option<PathBuf>,
    /// Text to predict; repeatable
    #[arg(long, short, required_unless_present = "base_logits", value_name = "TEXT")]
    file: Vec<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Save the distributions of the original in llama-perplexity's form (16-bit, cut at 16 nats)
    #[arg(long, visible_alias = "save-all-logits", value_name = "FILE", conflicts_with_all = ["state", "score_from"])]
    save_logits: Option<PathBuf>,
    /// Stop as soon as the best model differs significantly from every other one (a confidence sequence over windows,
    /// valid at every look)
    #[arg(long)]
    sequential_test: bool,
    /// Error probability of the sequential test
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = parse_alpha)]
    alpha: f64,
}

fn parse_alpha(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(alpha) if alpha > 0.0 && alpha < 1.0 => Ok(alpha),
        _ => Err("give a probability between 0 and 1".into()),
    }
}

/// One model's line.
#[derive(Serialize)]
struct ModelReport {
    file: String,
    size_bytes: u64,
    bits_per_weight: f64,
    #[serde(flatten)]
    summary: DivergenceSummary,
    /// Against the first model, over the same windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    kld_against_first: Option<PairedDifference>,
}

/// What the run as a whole has to say.
#[derive(Serialize)]
struct RunReport {
    base: String,
    activations: &'static str,
    ctx: usize,
    windows: usize,
    scored_per_window: usize,
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequential_test: Option<TestReport>,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct TestReport {
    test: &'static str,
    alpha: f64,
    decided: bool,
    best: String,
}

/// One model: its figures at the top level. Several: one object each in `models`.
#[derive(Serialize)]
#[serde(untagged)]
enum Report<'a> {
    One {
        #[serde(flatten)]
        model: &'a ModelReport,
        #[serde(flatten)]
        run: &'a RunReport,
    },
    Several {
        #[serde(flatten)]
        run: &'a RunReport,
        models: &'a [ModelReport],
    },
}

impl KldArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When a model, the text or the saved logits are not usable, or the run was interrupted (after printing what it
    /// covers).
    pub fn run(&self, common: &Common) -> Result<()> {
        let started = Instant::now();
        if self.sequential_test && self.models.len() < 2 {
            return Err(Usage("--sequential-test compares models; give two or more".into()).into());
        }
        if let Some(path) = &self.save_logits {
            check_target(path, common.force)?;
        }
        let opened = self.models.iter().map(|path| Opened::open(path)).collect::<Result<Vec<_>>>()?;
        let models = opened.iter().map(Opened::model).collect::<Result<Vec<_>>>()?;
        let base_opened = self.base.as_deref().map(Opened::open).transpose()?;
        let base_model = base_opened.as_ref().map(Opened::model).transpose()?;
        let (main, main_model) = match (&base_opened, &base_model) {
            (Some(opened), Some(model)) => (opened, model),
            _ => (&opened[0], &models[0]),
        };
        for (other, model) in opened.iter().zip(&models) {
            main.check_same_vocabulary(other)?;
            ensure!(
                model.n_vocab() == main_model.n_vocab(),
                "{}: the embedding has {} rows, that of {} has {}; only models of one vocabulary can be compared",
                other.label(),
                model.n_vocab(),
                main.label(),
                main_model.n_vocab()
            );
        }
        let tokenizer = main.tokenizer(main_model, self.text.pre.as_deref(), common)?;
        let mut reader = self.base_logits.as_deref().map(LogitsReader::open).transpose()?;
        let windows = self.windows(reader.as_ref(), main, main_model, &tokenizer)?;
        for (other, model) in opened.iter().zip(&models) {
            check_context(windows.n_ctx(), model.hparams().n_ctx_train, &other.label())?;
        }

        let passes = models
            .iter()
            .map(|m| m.pass(self.text.activations.forward(), Overrides::new()))
            .collect::<Result<Vec<_>, _>>()?;
        let passes: Vec<&Pass<'_, '_, '_>> = passes.iter().collect();
        let base_pass =
            base_model.as_ref().map(|m| m.pass(self.text.activations.forward(), Overrides::new())).transpose()?;
        let mut writer = match &self.save_logits {
            Some(path) => Some(LogitsWriter::create(path, common.force, &windows, main_model.n_vocab())?),
            None => None,
        };
        let test = self.sequential_test.then_some(SequentialTest { alpha: self.alpha });
        let n_run = models.len() + usize::from(base_pass.is_some());
        let kept = self.text.state.as_deref();
        let kept = kept.map(|path| Kept::open(path, base_opened.as_ref(), &opened, &windows, self.text.activations));
        let mut follow = Follow::new(common, &windows, n_run, test, kept.transpose()?);
        let reference = match (&base_pass, &mut reader) {
            (Some(pass), _) => Reference::Model(pass),
            (None, Some(reader)) => Reference::File(reader),
            (None, None) => Reference::None,
        };
        let (memory, earlier) = (self.text.memory, follow.earlier());
        let result = evaluate(reference, &passes, &windows, memory, writer.as_mut(), &earlier, &mut follow)?;
        follow.finish(&result)?;
        os::end_on_interrupt();
        if result.windows == 0 {
            return Err(Interrupted.into());
        }
        if let Some(writer) = writer
            && !writer.finish()?
        {
            common.warn("the logits were not saved: the run ended before the last window");
        }

        let seconds = started.elapsed().as_secs_f64();
        let reports = self.reports(&opened, &result)?;
        let best = reports.iter().min_by(|a, b| a.summary.mean_kld.total_cmp(&b.summary.mean_kld));
        let base = self.base.as_ref().or(self.base_logits.as_ref());
        let run = RunReport {
            base: base.map_or_else(String::new, |path| path.display().to_string()),
            activations: self.text.activations.name(),
            ctx: windows.n_ctx(),
            windows: result.windows,
            scored_per_window: result.scored_per_window,
            complete: result.complete,
            sequential_test: test.and(best).map(|best| TestReport {
                test: "asymptotic confidence sequence of the windows' paired differences of mean KLD (arXiv 2103.06476), Bonferroni over pairs",
                alpha: self.alpha,
                decided: follow.decided || self.decided_at_end(&result),
                best: best.file.clone(),
            }),
            seconds,
            tokens_per_second: result.tokens_run as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
        };
        match (common.json, reports.as_slice()) {
            (true, [model]) => common.result_json(&Report::One { model, run: &run })?,
            (true, models) => common.result_json(&Report::Several { run: &run, models })?,
            (false, models) => {
                common.note(self.text.activations.describe());
                let text = if let [model] = models { one_text(model) } else { table(models) };
                common.result(text + &closing(&run))?;
            }
        }
        if result.interrupted { Err(Interrupted.into()) } else { Ok(()) }
    }

    fn windows(
        &self,
        reader: Option<&LogitsReader>,
        main: &Opened,
        model: &Model<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Windows> {
        let Some(reader) = reader else {
            let n_ctx = context(self.text.ctx, model, &main.label())?;
            return read_windows(&self.file, tokenizer, n_ctx, self.text.chunks, self.text.score_from);
        };
        let path = self.base_logits.as_deref().map_or_else(String::new, |p| printable(&p.display().to_string()));
        ensure!(
            reader.n_vocab() == model.n_vocab(),
            "{path}: n_vocab is {}, {} has {}; the logits are those of another model",
            reader.n_vocab(),
            main.label(),
            model.n_vocab()
        );
        check_context(reader.n_ctx(), model.hparams().n_ctx_train, &main.label()).context(path)?;
        Ok(reader.windows(self.text.limit(), bos(tokenizer))?)
    }

    fn reports(&self, opened: &[Opened], result: &Evaluation) -> Result<Vec<ModelReport>> {
        let means: Vec<Vec<f64>> = result.models.iter().map(|m| m.window_means(result.scored_per_window)).collect();
        let mut reports = Vec::with_capacity(opened.len());
        for (index, (opened, scores)) in opened.iter().zip(&result.models).enumerate() {
            let summary = scores.divergence.summary().context("nothing was scored")?;
            let kld_against_first = if index > 0 { compare_means(&means[index], &means[0]) } else { None };
            reports.push(ModelReport {
                file: opened.path.display().to_string(),
                size_bytes: opened.size_bytes(),
                bits_per_weight: opened.bits_per_weight(),
                summary,
                kld_against_first,
            });
        }
        Ok(reports)
    }

    /// The test may come to its decision on the very last window.
    fn decided_at_end(&self, result: &Evaluation) -> bool {
        result.complete && super::loaded::all_decided(&SequentialTest { alpha: self.alpha }, result)
    }
}

fn closing(run: &RunReport) -> String {
    let mut text = String::new();
    if let Some(test) = &run.sequential_test {
        let verdict =
            if test.decided { "is significantly better than every other" } else { "leads, not significantly" };
        let _ = writeln!(text, "{} {verdict} (alpha {}; {})", printable(&test.best), test.alpha, test.test);
    }
    let memory = run.peak_memory_bytes.map_or_else(String::new, |m| format!(", peak memory {}", decimal_size(m)));
    let covered = if run.complete { "" } else { " (not the whole text)" };
    let _ = writeln!(
        text,
        "{} windows of {} tokens, {} of them scored{covered}, {:.1} s, {:.0} tokens/s over all models{memory}",
        run.windows, run.ctx, run.scored_per_window, run.seconds, run.tokens_per_second
    );
    text
}

fn table(models: &[ModelReport]) -> String {
    let width = models.iter().map(|m| m.file.chars().count()).max().unwrap_or(4).max(4);
    let mut text = format!(
        "{:<width$} {:>10} {:>6} {:>20} {:>23} {:>10} {:>7} {:>8} {:>22}\n",
        "file", "size", "bpw", "PPL", "mean KLD", "median", "RMS Δp", "same top", "KLD against first"
    );
    for m in models {
        let s = &m.summary;
        let against = m
            .kld_against_first
            .map_or_else(String::new, |p| format!("{:.3} [{:.3}, {:.3}]", p.ratio, p.ratio_low, p.ratio_high));
        let _ = writeln!(
            text,
            "{:<width$} {:>10} {:>6.3} {:>20} {:>23} {:>10.6} {:>6.3}% {:>7.2}% {:>22}",
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
    text
}

fn one_text(model: &ModelReport) -> String {
    let s = &model.summary;
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
