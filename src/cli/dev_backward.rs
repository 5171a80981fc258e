//! `lwq dev gradients`: the way back from the logits, for tests that compare with other programs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;

use super::dev_forward::read_tokens;
use lwq::gguf::Gguf;
use lwq::model::{
    ForwardOptions, GradientTaps, Model, ModelError, NoTaps, Overrides, SampledLabels, TapGradient, TokenGroup,
};

/// Write the gradients at the outputs of all matrices but stacked ones, of cross entropy with drawn labels: a file NAME.f32 of
/// little-endian rows each, and labels.i32
#[derive(Args, Debug)]
pub struct GradientsArgs {
    /// Model file
    model: PathBuf,
    /// File of little-endian i32 token ids
    #[arg(long)]
    tokens_file: PathBuf,
    /// Cut the tokens into sequences of N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Draw labels from this seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Folder to write to
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
}

/// Gradients of each matrix, in the order of the tokens.
#[derive(Default)]
struct Collected(BTreeMap<String, Vec<f32>>);

impl GradientTaps for Collected {
    fn wants(&self, _tensor: &str) -> bool {
        true
    }

    fn gradient(&mut self, gradient: &TapGradient<'_>) -> Result<(), ModelError> {
        if gradient.expert.is_none() {
            self.0.entry(gradient.tensor.to_owned()).or_default().extend_from_slice(gradient.rows.data());
        }
        Ok(())
    }
}

impl GradientsArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let tokens = read_tokens(&self.tokens_file)?;
        let gguf = Gguf::open(&self.model)?;
        let model = Model::open(&gguf).with_context(|| self.model.display().to_string())?;
        let pass = model.pass(ForwardOptions::default(), Overrides::new())?;
        let ctx = self.ctx.map_or(tokens.len().max(1), |n| n as usize);
        let group = Arc::new(TokenGroup::from_sequences(tokens.chunks(ctx)).with_context(ctx));
        let mut states = vec![pass.embed(group)?];
        for layer in 0..model.n_layer() {
            let mut hidden = states[layer].clone();
            pass.run_layer(&mut hidden, &mut NoTaps)?;
            states.push(hidden);
        }
        let (mut labels, mut collected) = (SampledLabels::new(self.seed, 0), Collected::default());
        let mut gradient = pass.head_gradient(&states[model.n_layer()], &mut labels, &mut collected)?;
        for input in states[..model.n_layer()].iter().rev() {
            gradient = pass.layer_gradient(input, gradient, &mut collected)?;
        }
        let write = |name: &str, bytes: Vec<u8>| {
            let path = self.output.join(name);
            std::fs::write(&path, bytes).with_context(|| format!("{}: cannot be written", path.display()))
        };
        write("labels.i32", labels.labels().iter().flat_map(|label| label.to_le_bytes()).collect())?;
        for (name, rows) in collected.0 {
            write(&format!("{name}.f32"), rows.iter().flat_map(|value| value.to_le_bytes()).collect())?;
        }
        Ok(())
    }
}
