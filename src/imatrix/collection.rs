//! A run over calibration text that collects importance.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::checkpoint::{self, CollectionState};
use super::experts::{self, LayerExperts};
use super::{Form, Imatrix, ImatrixError, ImportanceCollector};
use crate::atomic_file::{Replace, check_target};
use crate::compute::{Kernel, Precision};
use crate::display::{count, peak_memory, printable};
use crate::eval::{Perplexity, score_chunks};
use crate::gguf::{Gguf, split};
use crate::model::{ForwardOptions, Model, ModelError, NoTaps, Overrides, Pass, TokenGroup};
use crate::os;
use crate::progress::{Interrupted, Stop, Unit, Watch};
use crate::recipe::roles::OUTPUT_WEIGHT;
use crate::text::{Text, calibration_context, leading_bos, open_tokenizer};
use crate::tokenizer::Tokenizer;
use crate::unfinished::{Conditions, GOES_ON, partial_path, tokens_sha256};

/// Most tokens of a group: more gain nothing, and the state is saved only between groups.
const MOST_GROUP_TOKENS: usize = 16_384;

/// Most chunks of a group unless asked for otherwise.
const SAVE_EVERY: usize = 16;

/// Collects the importance of a model's weight columns on a text.
///
/// ```
/// use lwq::gguf::Gguf;
/// use lwq::imatrix::Collection;
/// use lwq::text::{Set, Text};
///
/// let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
/// let text = Text::built_in(Set::Calibration);
/// let imatrix = Collection::new(&model, &text).n_ctx(64).chunks(4).run(&())?;
/// assert_eq!((imatrix.chunk_count, imatrix.chunk_size), (Some(4), Some(64)));
/// assert_eq!(imatrix.entries["blk.0.attn_q.weight"].counts, [4 * 64]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Collection<'a> {
    model: &'a Gguf,
    text: &'a Text,
    n_ctx: Option<usize>,
    chunks: Option<usize>,
    from_chunk: usize,
    shard: Option<Shard>,
    process_output: bool,
    perplexity: bool,
    parse_special: bool,
    pre: Option<String>,
    precision: Precision,
    all_experts: bool,
    memory: Option<u64>,
    save_every: usize,
}

/// Part `index` of `count` of the chunks, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Which part.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Shard {
    /// Its range of `total` chunks; all shards together cover them once, in order.
    fn range(self, total: usize) -> Range<usize> {
        let bound = |part: usize| (total as u128 * part as u128 / self.count.max(1) as u128) as usize;
        bound(self.index)..bound(self.index + 1)
    }
}

/// What a run that wrote a file has done.
#[derive(Clone, Debug, Serialize)]
pub struct CollectionReport {
    /// The file.
    pub output: String,
    /// Its form, see [`Form::name`].
    pub format: &'static str,
    /// Weights with an entry; those for plans only do not count.
    pub entries: usize,
    /// Chunks of text.
    pub chunk_count: u32,
    /// Tokens of a chunk.
    pub chunk_size: usize,
    /// Names of the texts.
    pub datasets: Vec<String>,
    /// Tokens of all chunks.
    pub tokens: usize,
    /// Perplexity of the second halves of the chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl_error: Option<f64>,
    /// The experts of every layer that has some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<LayerExperts>,
    /// Time taken.
    pub seconds: f64,
    /// Tokens that this run saw, without those of an earlier one, by `seconds`.
    pub tokens_per_second: f64,
    /// Peak resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
    /// What is odd about the matrix or does not fit into the file, one line each.
    pub warnings: Vec<String>,
}

/// The chunks that a run sees.
struct Chunks {
    n_ctx: usize,
    /// Tokens of all chunks, one after the other.
    tokens: Vec<u32>,
    bos: Option<u32>,
    datasets: Vec<String>,
}

/// Where the state of a run is kept.
struct Kept {
    path: PathBuf,
    conditions: Conditions,
}

/// A finished run.
struct Collected {
    imatrix: Imatrix,
    perplexity: Perplexity,
    /// Chunks that an earlier run has seen.
    earlier: usize,
}

impl<'a> Collection<'a> {
    /// Collects from `model` on `text`, each document of which is cut into chunks of its own.
    pub fn new(model: &'a Gguf, text: &'a Text) -> Collection<'a> {
        Collection {
            model,
            text,
            n_ctx: None,
            chunks: None,
            from_chunk: 0,
            shard: None,
            process_output: false,
            perplexity: true,
            parse_special: false,
            pre: None,
            precision: Precision::Fast,
            all_experts: false,
            memory: None,
            save_every: SAVE_EVERY,
        }
    }

    /// Tokens of a chunk; 512 when `None`, or the model's context if that is shorter.
    pub fn n_ctx(self, n_ctx: impl Into<Option<usize>>) -> Self {
        Collection { n_ctx: n_ctx.into(), ..self }
    }

    /// Uses at most this many chunks.
    pub fn chunks(self, chunks: impl Into<Option<usize>>) -> Self {
        Collection { chunks: chunks.into(), ..self }
    }

    /// Leaves out the first chunks.
    pub fn from_chunk(self, first: usize) -> Self {
        Collection { from_chunk: first, ..self }
    }

    /// Collects only a part of the chunks, to be added up with [`Merger`](super::Merger).
    pub fn shard(self, shard: impl Into<Option<Shard>>) -> Self {
        Collection { shard: shard.into(), ..self }
    }

    /// Makes the entry of `output.weight` an ordinary one, as llama-imatrix does.
    pub fn process_output(self, process_output: bool) -> Self {
        Collection { process_output, ..self }
    }

    /// Whether the perplexity of the text is computed, too; it is unless told otherwise, or attention is not causal.
    pub fn perplexity(self, perplexity: bool) -> Self {
        Collection { perplexity, ..self }
    }

    /// Recognizes control tokens in the text.
    pub fn parse_special(self, parse_special: bool) -> Self {
        Collection { parse_special, ..self }
    }

    /// Uses this pre-tokenizer instead of the one that the file names.
    pub fn pre(self, name: impl Into<Option<String>>) -> Self {
        Collection { pre: name.into(), ..self }
    }

    /// Arithmetic of the products; [`Precision::Fast`] unless told otherwise.
    pub fn precision(self, precision: Precision) -> Self {
        Collection { precision, ..self }
    }

    /// Sends every token through all experts of a layer, those that it did not choose without weight in the output: each
    /// expert has data, of tokens that it would not see.
    pub fn all_experts(self, all_experts: bool) -> Self {
        Collection { all_experts, ..self }
    }

    /// Memory for activations in bytes; half of what is free when `None`.
    pub fn memory(self, memory: impl Into<Option<u64>>) -> Self {
        Collection { memory: memory.into(), ..self }
    }

    /// Chunks after which the state is saved, where there is a file to save it beside.
    pub fn save_every(self, chunks: usize) -> Self {
        Collection { save_every: chunks, ..self }
    }

    /// Collects in memory. A run that `watch` stops leaves nothing.
    ///
    /// # Errors
    /// When the model or the text is not usable, or the run was stopped.
    pub fn run(&self, watch: &dyn Watch) -> Result<Imatrix, ImatrixError> {
        let model = self.open()?;
        let chunks = self.cut(&model, watch)?;
        Ok(self.collect(&model, &chunks, None, watch)?.imatrix)
    }

    /// Collects into the file `output`. The state of finished chunks is kept beside it, see
    /// [`partial_path`]: a run that `watch` stopped, or that was killed, goes on from there when it is started again.
    ///
    /// # Errors
    /// As [`Collection::run`], and when the output cannot be written, or a state is that of a run under other conditions and
    /// `replace` does not allow to start over.
    pub fn write(
        &self,
        output: &Path,
        form: Form,
        replace: Replace,
        watch: &dyn Watch,
    ) -> Result<CollectionReport, ImatrixError> {
        let started = Instant::now();
        check_target(output, replace.is_allowed())?;
        let model = self.open()?;
        let chunks = self.cut(&model, watch)?;
        let texts = [("text", tokens_sha256(&chunks.tokens))];
        let conditions = Conditions::new(self.model, &texts, self.settings(chunks.n_ctx));
        let kept = Kept { path: partial_path(output), conditions };
        let state = match checkpoint::load(&kept.path, &kept.conditions, self.process_output) {
            Err(_) if replace.is_allowed() => None,
            other => other?,
        };
        let collected = self.collect(&model, &chunks, Some((&kept, state)), watch)?;
        let Collected { imatrix, perplexity, earlier } = collected;
        let mut warnings: Vec<String> = imatrix.neutral_warning().iter().map(ToString::to_string).collect();
        warnings.extend(imatrix.save(output, form, replace.is_allowed())?.iter().map(ToString::to_string));
        checkpoint::remove(&kept.path)?;
        warnings.iter().for_each(|line| watch.warn(&printable(line)));
        let seconds = started.elapsed().as_secs_f64();
        let scored = perplexity.tokens > 0;
        let tokens = chunks.tokens.len();
        Ok(CollectionReport {
            output: output.display().to_string(),
            format: form.name(),
            entries: imatrix.entries.len(),
            chunk_count: chunks.len() as u32,
            chunk_size: chunks.n_ctx,
            experts: imatrix.experts(),
            datasets: imatrix.datasets,
            tokens,
            ppl: scored.then(|| perplexity.ppl()),
            ppl_error: scored.then(|| perplexity.error()),
            seconds,
            tokens_per_second: tokens.saturating_sub(earlier * chunks.n_ctx) as f64 / seconds,
            peak_memory_bytes: os::peak_memory(),
            warnings,
        })
    }

    fn open(&self) -> Result<Model<'a>, ImatrixError> {
        Model::open(self.model).map_err(|source| self.of_model(source))
    }

    /// An error of the model, or the stop that ended it.
    fn of_model(&self, source: ModelError) -> ImatrixError {
        match source {
            ModelError::Interrupted => Interrupted.into(),
            source => ImatrixError::Model { file: printable(self.model.label()), source: Box::new(source) },
        }
    }

    /// The chunks that this run is to see.
    fn cut(&self, model: &Model<'_>, watch: &dyn Watch) -> Result<Chunks, ImatrixError> {
        model.warn(watch);
        if self.perplexity && !model.is_causal() {
            watch.note("attention.causal is false: the model predicts no next token, and the text has no perplexity");
        }
        let tokenizer = open_tokenizer(model, self.pre.as_deref(), watch)?;
        let n_ctx = calibration_context(self.n_ctx, model, "chunks", watch);
        let (tokens, datasets) = self.tokens(&tokenizer, n_ctx)?;
        let available = tokens.len() / n_ctx;
        let from = self.from_chunk;
        if from >= available {
            return Err(ImatrixError::FromChunk { from, available, n_ctx });
        }
        let until = self.chunks.map_or(available, |chunks| available.min(from.saturating_add(chunks)));
        let range = match self.shard {
            Some(shard) => {
                let part = shard.range(until - from);
                if part.is_empty() {
                    return Err(ImatrixError::EmptyShard { chunks: until - from, count: shard.count });
                }
                from + part.start..from + part.end
            }
            None => from..until,
        };
        let tokens = tokens[range.start * n_ctx..range.end * n_ctx].to_vec();
        Ok(Chunks { n_ctx, tokens, bos: leading_bos(&tokenizer), datasets })
    }

    /// The tokens of whole chunks of all documents, and the names of these.
    fn tokens(&self, tokenizer: &Tokenizer, n_ctx: usize) -> Result<(Vec<u32>, Vec<String>), ImatrixError> {
        let mut tokens = Vec::new();
        let mut datasets = Vec::new();
        for (name, document) in self.text.documents() {
            let ids = tokenizer.encode(document, true, self.parse_special);
            if ids.len() < 2 * n_ctx {
                return Err(ImatrixError::TextTooShort { name: name.to_owned(), tokens: ids.len(), n_ctx });
            }
            tokens.extend_from_slice(&ids[..ids.len() / n_ctx * n_ctx]);
            datasets.push(name.to_owned());
        }
        Ok((tokens, datasets))
    }

    /// Everything beside model and text that the sums depend on.
    fn settings(&self, n_ctx: usize) -> String {
        let mut text = format!("ctx {n_ctx}");
        // bfloat16 products differ between instruction sets; f32 products do not.
        match self.precision {
            Precision::Accurate => text.push_str(", accurate"),
            Precision::Fast => text.push_str(&format!(", fast on {}", Kernel::best(Precision::Fast).name)),
        }
        if self.process_output {
            text.push_str(", output");
        }
        if self.all_experts {
            text.push_str(", all experts");
        }
        if !self.perplexity {
            text.push_str(", no perplexity");
        }
        text
    }

    /// Runs all chunks. `kept` is where their state is saved, and what an earlier run has saved.
    fn collect(
        &self,
        model: &Model<'_>,
        chunks: &Chunks,
        kept: Option<(&Kept, Option<CollectionState>)>,
        watch: &dyn Watch,
    ) -> Result<Collected, ImatrixError> {
        let (kept, state) = kept.unzip();
        let total = chunks.len();
        let mut state = match state.flatten() {
            Some(state) => {
                watch.note(&format!("going on after chunk {} of {total} of an earlier run", state.chunks_done));
                state
            }
            None => CollectionState {
                chunks_done: 0,
                perplexity: Perplexity::default(),
                collector: ImportanceCollector::new(self.process_output),
            },
        };
        let earlier = state.chunks_done as usize;
        watch.begin("collecting", (total.saturating_sub(earlier) * chunks.n_ctx) as u64, Unit::Tokens);
        let stop = watch.stop();
        let outcome = self.run_groups(model, chunks, kept, &mut state, watch, &stop);
        stop.end();
        watch.end();
        if let Err(ImatrixError::Interrupted(_)) = outcome
            && kept.is_some()
            && state.chunks_done > 0
        {
            watch.warn(GOES_ON);
        }
        outcome?;

        let datasets = chunks.datasets.clone();
        let mut imatrix = state.collector.to_imatrix(datasets, total as u32, chunks.n_ctx as u32);
        if self.model.tensor(OUTPUT_WEIGHT).is_some() {
            imatrix.count_tokens(&chunks.tokens, model.n_vocab());
        }
        Ok(Collected { imatrix, perplexity: state.perplexity, earlier })
    }

    /// Runs the chunks that `state` does not have, some at a time; after each group it is saved.
    fn run_groups(
        &self,
        model: &Model<'_>,
        chunks: &Chunks,
        kept: Option<&Kept>,
        state: &mut CollectionState,
        watch: &dyn Watch,
        stop: &Stop,
    ) -> Result<(), ImatrixError> {
        let (n_ctx, total) = (chunks.n_ctx, chunks.len());
        let options = ForwardOptions {
            precision: self.precision,
            all_experts: self.all_experts,
            cancel: Some(stop.flag().clone()),
            ..ForwardOptions::default()
        };
        let pass = model.pass(options, Overrides::new()).map_err(|source| self.of_model(source))?;
        let group_tokens = model.group_tokens(self.memory, n_ctx).min(MOST_GROUP_TOKENS);
        let group_chunks = (group_tokens / n_ctx).clamp(1, self.save_every.max(1));
        while (state.chunks_done as usize) < total {
            let begin = state.chunks_done as usize;
            let end = total.min(begin + group_chunks);
            self.run_group(&pass, chunks, begin..end, state, watch).map_err(|source| self.of_model(source))?;
            state.chunks_done = end as u32;
            if let Some(kept) = kept.filter(|_| end < total) {
                checkpoint::save(&kept.path, &kept.conditions, state)?;
            }
        }
        Ok(())
    }

    fn run_group(
        &self,
        pass: &Pass<'_, '_, '_>,
        chunks: &Chunks,
        range: Range<usize>,
        state: &mut CollectionState,
        watch: &dyn Watch,
    ) -> Result<(), ModelError> {
        let (n_ctx, n_layer) = (chunks.n_ctx, pass.model().n_layer());
        let group = Arc::new(TokenGroup::from_sequences(chunks.sequences(range.clone())).with_context(n_ctx));
        let tokens = group.len();
        let mut hidden = pass.embed(group)?;
        while hidden.next_layer() < n_layer {
            pass.run_layer(&mut hidden, &mut state.collector)?;
            let (done, layers, layer) = (tokens as u64, n_layer as u64, hidden.next_layer() as u64);
            let step = done * layer / layers - done * (layer - 1) / layers;
            watch.advance(step, &so_far(&state.perplexity, range.end, chunks.len()));
        }
        let rows: Vec<usize> = (0..tokens).collect();
        pass.tap_output(&hidden, &rows, &mut state.collector)?;
        if self.perplexity && pass.model().is_causal() {
            score_chunks(pass, &hidden, n_ctx, &mut NoTaps, &mut state.perplexity)?;
        }
        Ok(())
    }
}

impl Chunks {
    fn len(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    /// Chunks as the model sees them.
    fn sequences(&self, range: Range<usize>) -> impl Iterator<Item = Vec<u32>> {
        self.tokens[range.start * self.n_ctx..range.end * self.n_ctx].chunks_exact(self.n_ctx).map(|chunk| {
            let mut chunk = chunk.to_vec();
            if let Some(bos) = self.bos {
                chunk[0] = bos;
            }
            chunk
        })
    }
}

impl fmt::Display for CollectionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (output, chunks) = (printable(&self.output), count(self.chunk_count.into()));
        writeln!(f, "{output}: {} entries from {chunks} chunks of {} tokens", self.entries, self.chunk_size)?;
        if let (Some(ppl), Some(error)) = (self.ppl, self.ppl_error) {
            writeln!(f, "perplexity of the text {ppl:.4} ± {error:.4}")?;
        }
        f.write_str(&experts::text(&self.experts))?;
        let memory = peak_memory(self.peak_memory_bytes);
        writeln!(f, "{:.1} s, {:.0} tokens/s{memory}", self.seconds, self.tokens_per_second)
    }
}

fn so_far(perplexity: &Perplexity, chunk: usize, total: usize) -> String {
    match perplexity.tokens {
        0 => format!("chunk {chunk} of {total}"),
        _ => format!("chunk {chunk} of {total}, perplexity {:.4}", perplexity.ppl()),
    }
}

/// Where the importance matrix of a model lies unless told otherwise: `model.imatrix.gguf` beside `model.gguf`, and the same
/// for all parts of a split model.
pub fn default_path(model: &Path) -> PathBuf {
    let whole = split::parse_shard_path(model).map_or_else(|| model.to_owned(), |(prefix, ..)| prefix);
    let mut name = match whole.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("gguf") => whole.with_extension(""),
        _ => whole,
    }
    .into_os_string();
    name.push(".imatrix.gguf");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::text::Set;

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
    fn the_default_file_lies_beside_the_model() {
        for (model, expected) in [
            ("a/model.gguf", "a/model.imatrix.gguf"),
            ("a/model.v1.GGUF", "a/model.v1.imatrix.gguf"),
            ("model-00001-of-00003.gguf", "model.imatrix.gguf"),
            ("a/model-00002-of-00003.gguf", "a/model.imatrix.gguf"),
            ("a.b/model", "a.b/model.imatrix.gguf"),
        ] {
            assert_eq!(default_path(Path::new(model)), Path::new(expected));
        }
    }

    /// Asks to stop once a chunk is through all layers and the next has begun.
    struct StopAfterOneChunk {
        n_ctx: u64,
        flag: Arc<AtomicBool>,
        seen: std::sync::Mutex<u64>,
    }

    impl Watch for StopAfterOneChunk {
        fn advance(&self, amount: u64, _: &str) {
            let mut seen = self.seen.lock().unwrap();
            *seen += amount;
            self.flag.store(*seen > self.n_ctx, Ordering::Relaxed);
        }

        fn stop(&self) -> Stop {
            Stop::when(self.flag.clone())
        }
    }

    #[test]
    fn a_stopped_run_keeps_its_finished_chunks_and_goes_on_to_the_same_matrix() {
        let model = Gguf::open(Path::new("tests/data/doclet-4m-f16.gguf")).unwrap();
        let text = Text::built_in(Set::Probe);
        let request = Collection::new(&model, &text).n_ctx(64).chunks(3).save_every(1);
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("imx.gguf");
        let stopping = || StopAfterOneChunk { n_ctx: 64, flag: Arc::default(), seen: Default::default() };

        let in_memory = request.run(&stopping()).unwrap_err();
        assert!(matches!(in_memory, ImatrixError::Interrupted(_)));
        let stopped = request.write(&output, Form::Gguf, Replace::No, &stopping()).unwrap_err();
        assert!(matches!(stopped, ImatrixError::Interrupted(_)));
        assert!(partial_path(&output).exists() && !output.exists());

        let report = request.write(&output, Form::Gguf, Replace::No, &()).unwrap();
        assert!(report.ppl.is_some() && !partial_path(&output).exists());
        assert_eq!((report.chunk_count, report.tokens), (3, 192));
        assert_eq!(Imatrix::open(&output).unwrap(), request.run(&()).unwrap());
    }
}
