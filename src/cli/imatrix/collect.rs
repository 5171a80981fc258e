//! `lwq imatrix MODEL`: the run that collects importance.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;

use super::FormatArg;
use lwq::atomic_file::check_target;
use lwq::text;
use crate::cli::eval::loaded::{bos, calibration_context, open_tokenizer};
use crate::cli::{Common, Progress, Unit, count, decimal_size, printable};
use lwq::compute::Precision;
use lwq::eval::{Perplexity, score_chunks};
use lwq::gguf::Gguf;
use lwq::imatrix::checkpoint::{self, Fingerprint};
use lwq::imatrix::{Collector, Form};
use lwq::model::{ForwardOptions, Model, Overrides, TokenGroup};
use lwq::os;
use lwq::tokenizer::Tokenizer;

/// What files made with the built-in text name as their dataset.
const BUILT_IN_TEXT: &str = "lwq built-in calibration mix";

/// Most tokens of a group: more gain nothing, and the state is saved only between groups.
const MOST_GROUP_TOKENS: usize = 16_384;

/// Flags of a collecting run.
#[derive(Args, Debug)]
pub struct CollectArgs {
    /// Model to score: a GGUF file, or the first file of a split one
    #[arg(required = true)]
    model: Option<PathBuf>,
    /// Calibration text; repeatable, each file is cut into chunks of its own [default: a built-in mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE", required = true)]
    output: Option<PathBuf>,
    /// Form of the output [default: dat if its name ends in .dat, else gguf]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Tokens per chunk [default: 512, or the model's context if that is shorter]
    #[arg(long, short = 'c', value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    ctx: Option<u32>,
    /// Use at most this many chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Leave out the first N chunks
    #[arg(long, value_name = "N", default_value_t = 0)]
    from_chunk: u32,
    /// Collect only part I of N of the chunks, to be added up with `lwq imatrix merge`
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
    shard: Option<Shard>,
    /// Collect the inputs of output.weight too
    #[arg(long)]
    process_output: bool,
    /// Do not compute the perplexity of the text
    #[arg(long)]
    no_ppl: bool,
    /// Recognize control tokens such as <|im_start|> in the text
    #[arg(long)]
    parse_special: bool,
    /// Use this pre-tokenizer instead of the one in the file
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Compute in 32-bit floats instead of bfloat16 products
    #[arg(long)]
    accurate: bool,
    /// Memory for activations, such as 2G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = lwq::gguf::split::parse_size)]
    memory: Option<u64>,
    /// Save the state after this many chunks; a stopped run goes on from there
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    save_every: u32,
}

/// Part `index` of `count`, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shard {
    index: usize,
    count: usize,
}

fn parse_shard(text: &str) -> Result<Shard, String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parts {
        Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index: index - 1, count }),
        _ => Err("give I/N with I from 1 to N, such as 2/8".into()),
    }
}

impl Shard {
    /// Its range of `total` chunks; all shards together cover them once, in order.
    fn range(self, total: usize) -> std::ops::Range<usize> {
        let bound = |part: usize| (total as u128 * part as u128 / self.count as u128) as usize;
        bound(self.index)..bound(self.index + 1)
    }
}

/// The closing facts, as printed with `--json`.
#[derive(Serialize)]
struct Report {
    output: String,
    format: &'static str,
    entries: usize,
    chunk_count: u32,
    chunk_size: usize,
    datasets: Vec<String>,
    tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    ppl: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ppl_error: Option<f64>,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: Option<u64>,
    warnings: Vec<String>,
}

/// A text cut into chunks.
struct Text {
    tokens: Vec<u32>,
    datasets: Vec<String>,
}

impl CollectArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// When the model, the text or the output is not usable, or a checkpoint belongs to another run.
    pub fn run(&self, common: &Common) -> Result<()> {
        let (Some(model_path), Some(output)) = (&self.model, &self.output) else {
            bail!("MODEL and --output are needed");
        };
        let started = Instant::now();
        check_target(output, common.force)?;
        let gguf = Gguf::open(model_path)?;
        let label = printable(gguf.label());
        let model = Model::open(&gguf).with_context(|| label.clone())?;
        let tokenizer = open_tokenizer(&gguf, &model, self.pre.as_deref(), common)?;
        let n_ctx = calibration_context(self.ctx, &model, "chunks", common);
        let text = self.text(&tokenizer, n_ctx)?;
        let total = text.tokens.len() / n_ctx;
        let fingerprint = Fingerprint::new(&gguf, &text.tokens, self.settings(n_ctx));
        let state_path = checkpoint::path_of(output);
        let mut state = match self.saved_state(&state_path, &fingerprint, common)? {
            Some(state) => {
                common.note(format!("going on after chunk {} of {total} of an earlier run", state.chunks_done));
                state
            }
            None => checkpoint::Progress {
                chunks_done: 0,
                perplexity: Perplexity::default(),
                collector: Collector::new(self.process_output),
            },
        };

        let first = state.chunks_done as usize;
        let progress = Progress::new(common, "collecting", ((total - first.min(total)) * n_ctx) as u64, Unit::Tokens);
        let precision = if self.accurate { Precision::Accurate } else { Precision::Fast };
        let pass = model.pass(ForwardOptions { precision, ..ForwardOptions::default() }, Overrides::new())?;
        let group_tokens = model.group_tokens(self.memory, n_ctx).min(MOST_GROUP_TOKENS);
        let group_chunks = (group_tokens / n_ctx).clamp(1, self.save_every as usize);
        let bos = bos(&tokenizer);
        while (state.chunks_done as usize) < total {
            let begin = state.chunks_done as usize;
            let end = total.min(begin + group_chunks);
            let sequences = text.tokens[begin * n_ctx..end * n_ctx].chunks_exact(n_ctx).map(|chunk| {
                let mut chunk = chunk.to_vec();
                if let Some(bos) = bos {
                    chunk[0] = bos;
                }
                chunk
            });
            let group = Arc::new(TokenGroup::from_sequences(sequences).with_context(n_ctx));
            let mut hidden = pass.embed(group).with_context(|| label.clone())?;
            while hidden.next_layer() < model.n_layer() {
                pass.run_layer(&mut hidden, &mut state.collector).with_context(|| label.clone())?;
                let done = ((end - begin) * n_ctx) as u64;
                let layers = model.n_layer() as u64;
                let layer = hidden.next_layer() as u64;
                let step = done * layer / layers - done * (layer - 1) / layers;
                progress.advance(step, &so_far(&state.perplexity, end, total));
            }
            let rows: Vec<usize> = (0..(end - begin) * n_ctx).collect();
            pass.tap_output(&hidden, &rows, &mut state.collector).with_context(|| label.clone())?;
            if !self.no_ppl {
                let mut no_taps = lwq::model::NoTaps;
                score_chunks(&pass, &hidden, n_ctx, &mut no_taps, &mut state.perplexity)
                    .with_context(|| label.clone())?;
            }
            state.chunks_done = end as u32;
            if end < total {
                checkpoint::save(&state_path, &fingerprint, &state)?;
            }
        }
        progress.finish();

        let form = match self.format {
            Some(FormatArg::Gguf) => Form::Gguf,
            Some(FormatArg::Dat) => Form::Dat,
            None => Form::of_name(output),
        };
        let mut imatrix = state.collector.to_imatrix(text.datasets, total as u32, n_ctx as u32);
        if gguf.tensor("output.weight").is_some() {
            imatrix.count_tokens(&text.tokens, model.n_vocab());
        }
        let mut warnings: Vec<String> = Vec::new();
        warnings.extend(imatrix.neutral_warning().map(|warning| warning.to_string()));
        warnings.extend(imatrix.save(output, form, common.force)?.iter().map(ToString::to_string));
        checkpoint::remove(&state_path)?;
        warnings.iter().for_each(|line| common.warn(printable(line)));
        let seconds = started.elapsed().as_secs_f64();
        let tokens = total * n_ctx;
        let scored = state.perplexity.tokens > 0;
        let report = Report {
            output: output.display().to_string(),
            format: form.name(),
            entries: imatrix.entries.len(),
            chunk_count: total as u32,
            chunk_size: n_ctx,
            datasets: imatrix.datasets,
            tokens,
            ppl: scored.then(|| state.perplexity.ppl()),
            ppl_error: scored.then(|| state.perplexity.error()),
            seconds,
            tokens_per_second: (total.saturating_sub(first) * n_ctx) as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
            warnings,
        };
        report.print(common)
    }

    /// The tokens of all chunks that this run is to see.
    fn text(&self, tokenizer: &Tokenizer, n_ctx: usize) -> Result<Text> {
        let mut tokens = Vec::new();
        let mut datasets = Vec::new();
        let mut add = |name: String, bytes: &[u8]| -> Result<()> {
            // As llama.cpp's tools read a text file: without one final newline.
            let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
            let ids = tokenizer.encode(bytes, true, self.parse_special);
            ensure!(
                ids.len() >= 2 * n_ctx,
                "{name}: {} tokens, but at least two chunks of {n_ctx} are needed; give a longer text or a smaller --ctx",
                ids.len()
            );
            tokens.extend_from_slice(&ids[..ids.len() / n_ctx * n_ctx]);
            datasets.push(name);
            Ok(())
        };
        if self.file.is_empty() {
            add(BUILT_IN_TEXT.to_owned(), calibration::DEFAULT_MIX.as_bytes())?;
        }
        for path in &self.file {
            let name = path.display().to_string();
            let bytes = std::fs::read(path).with_context(|| printable(&name))?;
            add(name, &bytes)?;
        }
        let available = tokens.len() / n_ctx;
        let from = self.from_chunk as usize;
        ensure!(from < available, "--from-chunk {from}: the text has only {available} chunks of {n_ctx} tokens");
        let until = self.chunks.map_or(available, |chunks| available.min(from + chunks as usize));
        let range = match self.shard {
            Some(shard) => {
                let part = shard.range(until - from);
                ensure!(!part.is_empty(), "--shard: {} chunks are too few for {} parts", until - from, shard.count);
                from + part.start..from + part.end
            }
            None => from..until,
        };
        Ok(Text { tokens: tokens[range.start * n_ctx..range.end * n_ctx].to_vec(), datasets })
    }

    /// Everything beside model and text that the sums depend on.
    fn settings(&self, n_ctx: usize) -> String {
        let mut text = format!("ctx {n_ctx}");
        // bfloat16 products differ between instruction sets; f32 products do not.
        match self.accurate {
            true => text.push_str(", accurate"),
            false => text.push_str(&format!(", fast on {}", lwq::cpu::level().name())),
        }
        if self.process_output {
            text.push_str(", output");
        }
        if self.no_ppl {
            text.push_str(", no perplexity");
        }
        text
    }

    fn saved_state(
        &self,
        path: &std::path::Path,
        fingerprint: &Fingerprint,
        common: &Common,
    ) -> Result<Option<checkpoint::Progress>> {
        match checkpoint::load(path, fingerprint, self.process_output) {
            Err(_) if common.force => Ok(None),
            other => Ok(other?),
        }
    }
}

fn so_far(perplexity: &Perplexity, chunk: usize, total: usize) -> String {
    match perplexity.tokens {
        0 => format!("chunk {chunk} of {total}"),
        _ => format!("chunk {chunk} of {total}, perplexity {:.4}", perplexity.ppl()),
    }
}

impl Report {
    fn print(&self, common: &Common) -> Result<()> {
        if common.json {
            return common.result_json(self);
        }
        if common.quiet {
            return Ok(());
        }
        let mut text = format!(
            "{}: {} entries from {} chunks of {} tokens\n",
            printable(&self.output),
            self.entries,
            count(self.chunk_count.into()),
            self.chunk_size
        );
        if let (Some(ppl), Some(error)) = (self.ppl, self.ppl_error) {
            text.push_str(&format!("perplexity of the text {ppl:.4} ± {error:.4}\n"));
        }
        text.push_str(&format!("{:.1} s, {:.0} tokens/s", self.seconds, self.tokens_per_second));
        if let Some(peak) = self.peak_memory_bytes {
            text.push_str(&format!(", peak memory {}", decimal_size(peak)));
        }
        text.push('\n');
        common.result(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_every_chunk_once() {
        for (total, count) in [(10, 3), (7, 7), (100, 8)] {
            let mut next = 0;
            for index in 0..count {
                let range = Shard { index, count }.range(total);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, total);
        }
    }

    #[test]
    fn shards_are_named_from_one() {
        assert_eq!(parse_shard("2/8"), Ok(Shard { index: 1, count: 8 }));
        for wrong in ["0/8", "9/8", "1", "a/b", "1/0", "-1/2"] {
            assert!(parse_shard(wrong).is_err(), "{wrong}");
        }
    }
}
