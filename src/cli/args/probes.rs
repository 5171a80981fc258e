//! What a measurement runs on: flags that `measure` and `plan` share.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use lwq::measure::ProbeOptions;
use lwq::progress::Watch;
use lwq::text::Text;

/// Flags of probes.
#[derive(Args, Debug, Clone, Default)]
pub struct ProbeArgs {
    /// Probe text; repeatable [default: a built-in text, other documents than the calibration mix]
    #[arg(long, short, value_name = "TEXT")]
    file: Vec<PathBuf>,
    /// Tokens that every probe runs: more take longer and are more certain [default: 4096, from 0.1B weights on 3072, less above 0.7B]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    probe_tokens: Option<u32>,
}

impl ProbeArgs {
    /// As requests take them.
    ///
    /// # Errors
    /// When a text cannot be read.
    pub fn options(&self, watch: &dyn Watch) -> Result<ProbeOptions> {
        let text = if self.file.is_empty() { None } else { Some(Text::read(&self.file, watch)?) };
        Ok(ProbeOptions { text, tokens: self.probe_tokens.map(|n| n as usize), ..ProbeOptions::default() })
    }
}
