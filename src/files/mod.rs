//! Verbs over whole GGUF files, which keep every weight as it is: [`split`](SplitPlan) and [`merge`](Merge), a [digest](digest())
//! of what a file holds whatever its layout, [`compare`] of two files, [`edit`](Edit) of metadata, [`extract`](Extraction) of
//! tensors for other programs. They know tensors and keys, not models.
//!
//! ```
//! use lwq::atomic_file::Replace;
//! use lwq::files::{Limit, Merge, SplitPlan, digest};
//! use lwq::gguf::Gguf;
//!
//! let folder = tempfile::tempdir()?;
//! let model = Gguf::open("tests/data/doclet-4m-f16.gguf")?;
//! let parts = SplitPlan::new(&model, &folder.path().join("doclet.gguf"), Limit::Bytes(3_000_000), false)?;
//! let parts = parts.write(Replace::No, &())?;
//!
//! let last = &parts.last().expect("there are several").path;
//! let merged = Merge::open(last)?.write(&folder.path().join("whole.gguf"), Replace::No, &())?;
//! assert_eq!(digest(&Gguf::open(&merged.path)?, true, &())?.sha256, digest(&model, true, &())?.sha256);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod copy;
mod diff;
mod digest;
mod edit;
mod error;
mod extract;
mod merge;
mod npy;
mod split;

pub use diff::{Comparison, KeyDifference, Side, TensorDifference, compare};
pub use digest::{ModelDigest, TensorDigest, digest};
pub use edit::{CHAT_TEMPLATE, Change, Edit, Edited};
pub use error::FilesError;
pub use extract::{Extracted, Extraction, Numbers};
pub use merge::Merge;
pub use split::{Limit, Part, SplitPlan};

/// A path for JSON, which has no bytes that are not text.
fn path_as_text<S: serde::Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
