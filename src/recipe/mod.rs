//! Recipes: which type every tensor of a model gets. Pure functions over facts, no files.
//!
//! A [`Target`] such as Q4_K_M stands for a base type and a mix of rules that give some tensors more bits
//! or fewer, by their [`Role`] and layer. On top come types given by hand ([`TypeOverride`]), tensors that are never
//! quantized ([`roles`]) and substitutes for types that do not fit a row. The result equals that of
//! llama-quantize b10605 except where that program aborts or misbehaves; such places give a [`Note`].

pub mod candidates;
mod choose;
mod error;
mod facts;
mod fallback;
mod mix;
pub mod mtp;
mod overrides;
mod prune;
mod prune_keys;
pub mod roles;
mod target;

pub use choose::{Choice, FallbackCost, Options, Reason, Recipe, TensorDesc, choose_types, requires_imatrix};
pub use error::{Note, RecipeError};
pub use facts::{MetaValue, ModelFacts};
pub use overrides::{TypeOverride, parse_override_list, parse_storable_type};
pub use prune::PrunePlan;
pub use roles::{Keep, Role, output_order};
pub use target::{FILE_TYPE_GUESSED, TARGETS, Target, TargetInfo, guess_file_type};
