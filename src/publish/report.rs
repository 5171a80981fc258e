//! All that is known about a repository: `report.json`, and what the template of the card gets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bench::Speed;
use super::choose::Reason;
use super::fit::ContextMemory;
use super::identity::FrontMatter;
use crate::eval::DivergenceSummary;
use crate::measure::TransferCheck;
use crate::report::{TaskFigures, TextFacts};

/// The version of the form.
pub const REPORT_VERSION: u32 = 1;

/// A repository. It holds no times and no paths of a machine, so that the same request gives the same text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub lwq_report: u32,
    /// The program's version.
    pub lwq_version: String,
    /// What files are called, before their target.
    pub name: String,
    /// The header of the card.
    pub front_matter: FrontMatter,
    /// The unquantized model.
    pub base: BaseFacts,
    /// How files were evaluated.
    pub evaluation: EvaluationFacts,
    /// Files of the repository, from the smallest.
    pub files: Vec<FileEntry>,
    /// Folders of the repository.
    pub folders: Vec<FolderEntry>,
    /// The usual file of each target, which the repository does not hold unless it is kept.
    pub standard: Vec<Figures>,
    /// Files of others.
    pub against: Vec<AgainstEntry>,
    /// What was tried and is not kept.
    pub tried: Vec<TriedEntry>,
    /// What a context takes beside a file.
    pub memory: ContextMemory,
    /// Which file for which memory, from the smallest.
    pub recommended: Vec<Recommendation>,
    /// Why a file is kept, in words.
    pub rule: String,
    /// What the files were made of.
    pub provenance: Provenance,
    /// The check that let another model's measurement serve, or not.
    pub measured_on: Option<TransferCheck>,
    /// The program that measured the speeds.
    pub speed_of: Option<String>,
}

/// The unquantized model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BaseFacts {
    /// Name of its GGUF.
    pub file: String,
    /// Its bytes.
    pub size_bytes: u64,
    /// SHA-256 of its GGUF's bytes, all parts one after the other.
    pub sha256: String,
    /// Architecture.
    pub architecture: String,
    /// Weights.
    pub parameters: u64,
    /// Bits of tensor data a weight.
    pub bits_per_weight: f64,
    /// Perplexity on the evaluation text.
    pub ppl: f64,
    /// Its standard error.
    pub ppl_error: f64,
    /// Its scores of tasks.
    pub tasks: Vec<TaskFigures>,
}

/// How files were evaluated.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvaluationFacts {
    /// The text and how it was cut.
    #[serde(flatten)]
    pub text: TextFacts,
    /// How the inputs of products were rounded.
    pub activations: String,
}

/// Size and figures of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Its name, or the target's.
    pub file: String,
    /// Its bytes.
    pub size_bytes: u64,
    /// Bits of tensor data a weight.
    pub bits_per_weight: f64,
    /// Perplexity and divergence from the base.
    #[serde(flatten)]
    pub divergence: DivergenceSummary,
}

/// A file of the repository.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileEntry {
    /// Size and figures.
    #[serde(flatten)]
    pub figures: Figures,
    /// What it was made for: a target, a size, a device.
    pub made_for: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Why it is kept.
    pub reason: Reason,
    /// How weights were rounded.
    pub rounding: String,
    /// Its plan; none for a standard file.
    pub plan: Option<String>,
    /// What the plan predicted.
    pub predicted_kld: Option<f64>,
    /// The usual file of its target.
    pub standard: Option<StandardEntry>,
    /// Files of others for the same target, by their name.
    pub against: BTreeMap<String, Shrinkage>,
    /// Bytes of memory that it takes with the context of the report.
    pub memory_bytes: u64,
    /// Scores of tasks.
    pub tasks: Vec<TaskFigures>,
    /// Tokens per second.
    pub speed: Option<Speed>,
    /// The commands that make it, in a folder with the base and the importance matrix.
    pub commands: Vec<String>,
}

impl std::ops::Deref for FileEntry {
    type Target = Figures;

    fn deref(&self) -> &Figures {
        &self.figures
    }
}

/// The usual file beside the one that is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandardEntry {
    /// Its bytes.
    pub size_bytes: u64,
    /// Its mean KL divergence.
    pub mean_kld: f64,
    /// How much smaller the kept file is, as a part of it.
    pub shrinkage: f64,
    /// The kept file's divergence over its own.
    pub kld_ratio: f64,
}

/// A file of others beside the one that is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shrinkage {
    /// Its bytes.
    pub size_bytes: u64,
    /// How much smaller the kept file is, as a part of it.
    pub shrinkage: f64,
}

/// A file of others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgainstEntry {
    /// Whose.
    pub name: String,
    /// The target that it is of, as far as its name or metadata tell.
    pub target: Option<String>,
    /// Size and figures.
    #[serde(flatten)]
    pub figures: Figures,
}

/// A file that was tried and is not kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TriedEntry {
    /// What it was made for.
    pub made_for: String,
    /// `standard` or `planned`.
    pub kind: String,
    /// Its bytes.
    pub size_bytes: u64,
    /// Its mean KL divergence.
    pub mean_kld: f64,
    /// Why it is not kept.
    pub reason: Reason,
}

/// A folder of compressed-tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FolderEntry {
    /// Its name.
    pub folder: String,
    /// The scheme.
    pub scheme: String,
    /// Bytes of its safetensors files.
    pub size_bytes: u64,
    /// Bits a quantized weight, scales included.
    pub bits_per_weight: f64,
    /// How weights were rounded.
    pub rounding: String,
    /// Figures of its values as 16-bit floats; activations are not rounded. None where they cannot be read back.
    pub divergence: Option<DivergenceSummary>,
    /// Scores of tasks.
    pub tasks: Vec<TaskFigures>,
    /// The commands that make it.
    pub commands: Vec<String>,
}

/// The best file for devices from some memory on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recommendation {
    /// Bytes that the device needs for it.
    pub memory_bytes: u64,
    /// The file.
    pub file: String,
}

/// What the files were made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Provenance {
    /// Texts by what they were for.
    pub texts: Vec<TextEntry>,
    /// The importance matrix.
    pub imatrix: Option<Hashed>,
    /// The measurement.
    pub measurement: Option<Hashed>,
    /// The commands before those of each file.
    pub commands: Vec<String>,
}

/// A file with its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hashed {
    /// Its name.
    pub file: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
}

/// A text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextEntry {
    /// What it was for: `calibration`, `probes`, `gate`, `evaluation`.
    pub role: String,
    /// Its name.
    pub name: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Its licence, as far as it is known.
    pub license: Option<String>,
}

impl Report {
    /// The text of `report.json`.
    pub fn to_text(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The best files by memory: each needs more than the one before it and is nearer to the base.
    pub(super) fn recommend(files: &[FileEntry]) -> Vec<Recommendation> {
        let mut by_memory: Vec<&FileEntry> = files.iter().collect();
        by_memory.sort_by(|a, b| {
            let kld = |file: &FileEntry| file.divergence.mean_kld;
            a.memory_bytes.cmp(&b.memory_bytes).then(kld(a).total_cmp(&kld(b)))
        });
        let mut best = f64::INFINITY;
        by_memory.retain(|file| {
            let better = file.divergence.mean_kld < best;
            best = best.min(file.divergence.mean_kld);
            better
        });
        let row = |file: &FileEntry| Recommendation { memory_bytes: file.memory_bytes, file: file.file.clone() };
        by_memory.into_iter().map(row).collect()
    }
}
