//! What a quantized file tells about the plan behind it.

use super::PlanFile;
use crate::gguf::Metadata;

/// Adds the keys of a plan to the metadata of a file that is written after it: `lwq.version`, `lwq.plan.method`,
/// `lwq.plan.target`, `lwq.plan.predicted_kld` and `lwq.plan.sha256`, the digest of the plan file's bytes. The length of
/// the values depends on the plan's inputs alone, not on the choice of types.
pub fn record(metadata: &mut Metadata, plan: &PlanFile, sha256: &str) {
    metadata.set("lwq.version", env!("CARGO_PKG_VERSION"));
    metadata.set("lwq.plan.method", plan.method.name());
    metadata.set("lwq.plan.target", plan.target.as_str());
    metadata.set("lwq.plan.predicted_kld", plan.predicted_kld as f32);
    metadata.set("lwq.plan.sha256", sha256);
}
