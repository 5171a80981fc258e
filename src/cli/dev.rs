//! `lwq dev`: raw access to the block formats for tests that compare with other programs. Hidden from help.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};

use super::Common;
use lwq::gguf::TensorType;
use lwq::quant;

/// Arguments of `lwq dev`.
#[derive(Args, Debug)]
pub struct DevArgs {
    #[command(subcommand)]
    command: DevCommand,
}

#[derive(Subcommand, Debug)]
enum DevCommand {
    /// List the types that have a codec: name, id, weights and bytes per block, `rw` or `r`
    Types,
    /// Quantize little-endian f32 rows from stdin, write the blocks to stdout
    QuantizeRows {
        /// Target type, such as q4_K
        #[arg(long = "type", value_parser = tensor_type)]
        ty: TensorType,
        /// Weights per row
        #[arg(long)]
        row_len: usize,
        /// File of ROW_LEN little-endian f32 importance weights
        #[arg(long)]
        importance: Option<PathBuf>,
    },
    /// Decode blocks from stdin, write little-endian f32 to stdout
    DequantizeRows {
        /// Type of the blocks
        #[arg(long = "type", value_parser = tensor_type)]
        ty: TensorType,
    },
    Logits(super::dev_forward::LogitsArgs),
    Perplexity(super::dev_forward::PerplexityArgs),
    Gradients(super::dev_backward::GradientsArgs),
    /// Check the scales of blocks from stdin
    ValidateRows {
        /// Type of the blocks
        #[arg(long = "type", value_parser = tensor_type)]
        ty: TensorType,
    },
}

/// Runs `lwq dev`.
///
/// # Errors
/// When stdin does not hold whole rows or blocks, or stdout cannot be written.
pub fn run(args: &DevArgs, common: &Common) -> anyhow::Result<()> {
    match &args.command {
        DevCommand::Types => list_types(common),
        DevCommand::QuantizeRows { ty, row_len, importance } => {
            let importance = match importance {
                Some(path) => {
                    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
                    Some(floats(&bytes)?)
                }
                None => None,
            };
            let weights = floats(&stdin_bytes()?)?;
            let mut blocks = vec![0; encoded_len(*ty, weights.len())?];
            quant::quantize_rows(*ty, &weights, *row_len, importance.as_deref(), &mut blocks)?;
            stdout_bytes(&blocks)
        }
        DevCommand::DequantizeRows { ty } => {
            let blocks = stdin_bytes()?;
            let Some(info) = ty.info() else { bail!("type {ty} is unknown") };
            let mut weights = vec![0.0; blocks.len() / info.block_bytes * info.block_len];
            quant::dequantize(*ty, &blocks, &mut weights)?;
            stdout_bytes(&weights.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        }
        DevCommand::Logits(args) => args.run(),
        DevCommand::Gradients(args) => args.run(),
        DevCommand::Perplexity(args) => args.run(common),
        DevCommand::ValidateRows { ty } => Ok(quant::validate(*ty, &stdin_bytes()?)?),
    }
}

fn list_types(common: &Common) -> anyhow::Result<()> {
    let mut text = String::new();
    for row in quant::CODECS {
        let Some(info) = row.ty.info() else { continue };
        let access = if row.quantize.is_some() { "rw" } else { "r" };
        writeln!(text, "{} {} {} {} {access}", info.name, row.ty.0, info.block_len, info.block_bytes)?;
    }
    common.result(text)
}

fn tensor_type(name: &str) -> Result<TensorType, String> {
    TensorType::from_name(name).ok_or_else(|| format!("unknown type; `lwq dev types` lists them all: {name}"))
}

fn encoded_len(ty: TensorType, weights: usize) -> anyhow::Result<usize> {
    let bytes = ty.info().and_then(|info| info.row_bytes(weights as u64));
    Ok(bytes.with_context(|| format!("{weights} weights are not whole {ty} blocks"))?.try_into()?)
}

fn floats(bytes: &[u8]) -> anyhow::Result<Vec<f32>> {
    let (values, rest) = bytes.as_chunks::<4>();
    ensure!(rest.is_empty(), "{} bytes are not whole f32 values", bytes.len());
    Ok(values.iter().map(|v| f32::from_le_bytes(*v)).collect())
}

fn stdin_bytes() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).context("stdin cannot be read")?;
    Ok(bytes)
}

fn stdout_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}
