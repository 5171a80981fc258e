//! Blocks for multi-token prediction: left out of the output, or taken from another file of the model.

use super::QuantizeError;
use super::request::Mtp;
use crate::display::{count, printable};
use crate::gguf::{Gguf, Metadata, TensorInfo};
use crate::recipe::roles::split_block;
use crate::recipe::{PrunePlan, mtp, output_order};

const ARCHITECTURE: &str = "general.architecture";

/// Tensor that has a row for each token in every file of a model.
const TOKEN_EMBEDDING: &str = "token_embd.weight";

/// The tensors of blocks that are taken from another file, in the order of the output.
pub(super) struct Grafted<'a> {
    pub donor: &'a Gguf,
    pub tensors: Vec<&'a TensorInfo>,
}

/// The architecture, which the keys of blocks begin with.
fn architecture(gguf: &Gguf, metadata: &Metadata, flag: &str) -> Result<String, QuantizeError> {
    match metadata.str(ARCHITECTURE)? {
        Some(architecture) => Ok(architecture.to_owned()),
        None => Err(QuantizeError::Prune {
            file: printable(gguf.label()),
            problem: format!("{ARCHITECTURE} is missing; {flag} needs it, add --override-kv {ARCHITECTURE}=str:NAME"),
        }),
    }
}

/// Leaves the blocks out where the request says so, and rewrites the metadata: what is left is the model as if it had been
/// converted without them.
pub(super) fn leave_out(
    mtp: Mtp<'_>,
    gguf: &Gguf,
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<Option<PrunePlan>, QuantizeError> {
    let Mtp::Drop = mtp else { return Ok(None) };
    let refused = |problem: String| QuantizeError::Prune { file: printable(gguf.label()), problem };
    let architecture = architecture(gguf, metadata, "--drop-mtp")?;
    let blocks = mtp::mtp_blocks(&architecture, metadata).map_err(|error| refused(error.to_string()))?;
    if blocks.is_empty() {
        notes.push("--drop-mtp: the model has no blocks for multi-token prediction; nothing is left out".to_owned());
        return Ok(None);
    }
    let number = blocks.end - blocks.start;
    let names = gguf.tensors().iter().map(|tensor| tensor.name.as_str());
    let plan = PrunePlan::of_last(names, blocks).map_err(|error| refused(format!("--drop-mtp: {error}")))?;
    notes.extend(plan.rewrite(&architecture, metadata).iter().map(|note| format!("--drop-mtp: {note}")));
    notes.push(format!("{} block(s) for multi-token prediction are left out", count(number)));
    Ok(Some(plan))
}

/// Finds the blocks that the request takes from another file, and rewrites the metadata for them.
pub(super) fn graft<'a>(
    mtp: Mtp<'a>,
    gguf: &Gguf,
    metadata: &mut Metadata,
    notes: &mut Vec<String>,
) -> Result<Option<Grafted<'a>>, QuantizeError> {
    let Mtp::From(donor) = mtp else { return Ok(None) };
    let refused = |problem: String| QuantizeError::Graft {
        file: printable(gguf.label()),
        donor: printable(donor.label()),
        problem,
    };
    let architecture = architecture(gguf, metadata, "--mtp-from")?;
    let theirs = donor.metadata().str(ARCHITECTURE)?;
    if theirs != Some(&architecture) {
        let theirs = theirs.map_or_else(|| "missing".to_owned(), printable);
        let ours = printable(&architecture);
        return Err(refused(format!(
            "{ARCHITECTURE} is {ours} in the model and {theirs} in the other file; give a file of the same model"
        )));
    }
    let blocks =
        mtp::graft_keys(&architecture, metadata, donor.metadata()).map_err(|error| refused(error.to_string()))?;
    let number = |tensor: &TensorInfo| split_block(&tensor.name).map(|(number, _)| number);
    if let Some(tensor) = gguf.tensors().iter().find(|tensor| number(tensor).is_some_and(|n| n >= blocks.start)) {
        return Err(refused(format!(
            "the model has blocks for multi-token prediction of its own, such as {}; leave --mtp-from away",
            printable(&tensor.name)
        )));
    }
    same_vocabulary(gguf, donor).map_err(refused)?;
    let names: Vec<&str> = donor.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    let ordered = output_order(&names).into_iter().map(|at| &donor.tensors()[at]);
    let tensors: Vec<&TensorInfo> =
        ordered.filter(|tensor| number(tensor).is_some_and(|number| blocks.contains(&number))).collect();
    if let Some(empty) = blocks.clone().find(|block| !tensors.iter().any(|tensor| number(tensor) == Some(*block))) {
        return Err(refused(format!(
            "the other file has no tensor of block {empty}, which is for multi-token prediction; give a file with them"
        )));
    }
    notes.push(format!(
        "{} block(s) for multi-token prediction, {} tensors, are taken from {} as they are",
        count(blocks.end - blocks.start),
        count(tensors.len() as u64),
        printable(donor.label())
    ));
    Ok(Some(Grafted { donor, tensors }))
}

/// Refuses embeddings of different shapes: blocks may have matrices of their own with a row for each token.
fn same_vocabulary(gguf: &Gguf, donor: &Gguf) -> Result<(), String> {
    match (gguf.tensor(TOKEN_EMBEDDING), donor.tensor(TOKEN_EMBEDDING)) {
        (Some(ours), Some(theirs)) if ours.shape != theirs.shape => Err(format!(
            "{TOKEN_EMBEDDING} has shape {:?} in the model and {:?} in the other file; give a file of the same model",
            ours.shape, theirs.shape
        )),
        _ => Ok(()),
    }
}
