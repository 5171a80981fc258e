//! What this program can do with each tensor type and architecture, gathered from the tables that decide it.
//!
//! Block lengths are [`gguf`](crate::gguf)'s, encoders and decoders [`quant`]'s, searches and feedback
//! [`rounding`](crate::rounding)'s, the types that a plan tries [`recipe`](crate::recipe)'s. Nothing here is a fact of
//! its own.

use serde::Serialize;

use crate::convert;
use crate::gguf::{TENSOR_TYPES, TensorType};
use crate::model::ARCHITECTURES;
use crate::quant;
use crate::recipe::candidates::tried_types;
use crate::rounding::gptq::{supports_feedback, supports_search};

/// What this program can do with one tensor type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TypeCapabilities {
    /// The type.
    #[serde(skip)]
    pub ty: TensorType,
    /// ggml's name, such as `q4_K`.
    pub name: &'static str,
    /// ggml's id, as GGUF files store it.
    pub id: u32,
    /// Weights per block, 1 for plain numbers; a row's length is a multiple of it.
    pub block_len: usize,
    /// Bytes per block.
    pub block_bytes: usize,
    /// Bits per weight, scales included.
    pub bits_per_weight: f64,
    /// Whether weights of the type can be read.
    pub decode: bool,
    /// Whether weights can be quantized to the type.
    pub encode: bool,
    /// Whether the encoder cannot do without importance: without an importance matrix, the type is refused.
    pub needs_importance: bool,
    /// Whether [`search_rows`](crate::rounding::gptq::search_rows) takes the type.
    pub search: bool,
    /// Whether rounding with feedback ([`improve_rows`](crate::rounding::gptq::improve_rows)) takes the type.
    pub feedback: bool,
    /// Whether a plan tries the type by itself. Others may be asked for.
    pub plan_candidate: bool,
}

impl TypeCapabilities {
    /// Those of `ty`, or `None` for an id that this program does not know.
    pub fn of(ty: TensorType) -> Option<TypeCapabilities> {
        let info = ty.info()?;
        let codec = quant::codec(ty);
        Some(TypeCapabilities {
            ty,
            name: info.name,
            id: ty.0,
            block_len: info.block_len,
            block_bytes: info.block_bytes,
            bits_per_weight: info.bits_per_weight(),
            decode: codec.is_some(),
            encode: codec.is_some_and(|codec| codec.quantize.is_some()),
            needs_importance: codec.is_some_and(quant::Codec::needs_importance),
            search: supports_search(ty),
            feedback: supports_feedback(ty),
            plan_candidate: tried_types().any(|tried| tried == ty),
        })
    }

    /// Those of every known type, in the order of the ids.
    pub fn all() -> impl Iterator<Item = TypeCapabilities> {
        TENSOR_TYPES.iter().filter_map(|info| Self::of(info.ty))
    }
}

/// What this program can do with models of one architecture.
///
/// A model of any other architecture can be quantized, and planned for by rounding errors alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ArchitectureCapabilities {
    /// `general.architecture`.
    pub name: &'static str,
    /// Models that it covers.
    pub covers: &'static str,
    /// Class names in `config.json` that are converted to it; without any there is no conversion.
    pub converts: Vec<&'static str>,
    /// Whether its files can be quantized by a target or a plan.
    pub quantize: bool,
    /// Whether types can be planned by rounding errors (`--method error`).
    pub plan_by_error: bool,
    /// Whether the forward pass runs it: for an importance matrix,
    pub imatrix: bool,
    /// perplexity, KL divergence and tasks,
    pub eval: bool,
    /// measured plans,
    pub plan: bool,
    /// and rounding with feedback.
    pub feedback: bool,
}

impl ArchitectureCapabilities {
    /// Those of every architecture that the forward pass or the conversion knows.
    pub fn all() -> impl Iterator<Item = ArchitectureCapabilities> {
        ARCHITECTURES.iter().map(|row| ArchitectureCapabilities {
            name: row.name,
            covers: row.covers,
            converts: convert::classes(row.name),
            // Recipes and plans by error need no forward pass; all else does, and has one for each row of the table.
            quantize: true,
            plan_by_error: true,
            imatrix: true,
            eval: true,
            plan: true,
            feedback: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::multiplies_as_integers;
    use crate::cpu::Level;
    use crate::quant::kernels;
    use crate::quant::shape::BlockShape;
    use std::path::Path;

    /// Set to anything, it makes the test below write what it would compare.
    const UPDATE: &str = "LWQ_UPDATE_GOLDEN";

    const HEADER: &str = "type     id  block  bytes   bits  decode encode importance shape   search feedback integers plan  \
                          e:avx2/neon e:avx512 d:avx2 d:avx512";

    /// A line for each type. The columns of vector code stand at the end; those that other architectures have are left
    /// out.
    fn matrix() -> Vec<String> {
        let mark = |can: bool| if can { "yes" } else { "-" };
        let line = |row: TypeCapabilities| {
            let shape = match quant::codec(row.ty).and_then(|codec| codec.shape) {
                Some(BlockShape::Levels(_)) => "levels",
                Some(BlockShape::Lattice(_)) => "lattice",
                None => "-",
            };
            let mut line = format!(
                "{:<8} {:>2}  {:>5}  {:>5}  {:>5.2}  {:<6} {:<6} {:<10} {shape:<7} {:<6} {:<8} {:<8} {:<4}",
                row.name,
                row.id,
                row.block_len,
                row.block_bytes,
                row.bits_per_weight,
                mark(row.decode),
                mark(row.encode),
                if row.needs_importance { "needed" } else { "-" },
                mark(row.search),
                mark(row.feedback),
                mark(multiplies_as_integers(row.ty)),
                mark(row.plan_candidate),
            );
            let encoder = |level| mark(kernels::encoder(row.ty, level).is_some());
            let decoder = |level| mark(kernels::decoder(row.ty, level).is_some());
            if cfg!(target_arch = "aarch64") {
                line += &format!("  {:<11}", encoder(Level::Neon));
            } else if cfg!(target_arch = "x86_64") {
                let [avx2, avx512] = [Level::Avx2, Level::Avx512];
                line += &format!("  {:<11} {:<8}", encoder(avx2), encoder(avx512));
                line += &format!(" {:<6} {:<8}", decoder(avx2), decoder(avx512));
            }
            line.trim_end().to_owned()
        };
        TypeCapabilities::all().map(line).collect()
    }

    #[test]
    fn what_each_type_can_do_is_as_written_down() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/type-capabilities.txt");
        let found = matrix();
        if cfg!(target_arch = "x86_64") && std::env::var_os(UPDATE).is_some() {
            let lines: Vec<&str> = std::iter::once(HEADER).chain(found.iter().map(String::as_str)).collect();
            std::fs::write(&file, lines.join("\n") + "\n").unwrap();
        }
        let expected = std::fs::read_to_string(&file).unwrap();
        let mut expected = expected.lines();
        assert_eq!(expected.next(), Some(HEADER), "the columns; see below for how to write the file anew");
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for found in &found {
            let expected = expected.next().unwrap_or_default();
            let (found_words, mut expected_words) = (words(found), words(expected));
            expected_words.truncate(found_words.len());
            assert!(
                found_words == expected_words,
                "the tables now say\n{HEADER}\n{found}\nand {} says\n{expected}\nIf a type has gained or lost something on \
                 purpose, write the file anew on an x86-64 machine with {UPDATE}=1 cargo test --lib capabilities, and \
                 check its diff; if not, some match or table forgets the type",
                file.display(),
            );
        }
        assert_eq!(expected.next(), None, "a type is gone");
    }

    #[test]
    fn unknown_types_can_do_nothing() {
        assert_eq!(TypeCapabilities::of(TensorType(4711)), None);
        assert_eq!(TypeCapabilities::all().count(), TENSOR_TYPES.len());
    }
}
