//! Recipes against what llama.cpp b10605 chooses.
//!
//! `types-*.json` holds what `llama-quantize --dry-run` printed for real model shapes; `rules-*.json` holds what the
//! same program's rule functions return for further shapes (70B, fused QKV, Falcon, latent attention, stacks of 32 to
//! 256 experts, encoders, state space models). The two kinds agree where both exist.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lwq::gguf::TensorType;
use lwq::recipe::{MetaValue, ModelFacts, Options, Target, TensorDesc, choose_types, output_order};
use serde::Deserialize;

/// A model and what was chosen for it.
#[derive(Deserialize)]
struct Golden {
    model: String,
    metadata: serde_json::Map<String, serde_json::Value>,
    /// Name (`blk.*.` stands for all blocks listed), shape, source type, blocks.
    tensors: Vec<TensorRow>,
    targets: Vec<TargetRow>,
}

#[derive(Deserialize)]
struct TensorRow(String, Vec<u64>, String, #[serde(default)] String);

#[derive(Deserialize)]
struct TargetRow {
    /// Target names, `+imatrix` where importance data was given.
    names: Vec<String>,
    /// Size of the result in MiB to two decimals, where llama-quantize printed it.
    mib: Option<f64>,
    /// `NAME type` or `blk.*.NAME type blocks`, for every tensor that does not become F32.
    types: Vec<String>,
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
    ty: TensorType,
}

fn golden_files() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden");
    let is_recipe = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        (name.starts_with("types-") || name.starts_with("rules-")) && name.ends_with(".json")
    };
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(is_recipe);
    files.sort();
    files
}

fn load(path: &Path) -> Golden {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// `0-3,7` → 0, 1, 2, 3, 7.
fn blocks(ranges: &str) -> Vec<u32> {
    let expand = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        first.parse::<u32>().unwrap()..=last.parse().unwrap()
    };
    ranges.split(',').flat_map(expand).collect()
}

fn names(pattern: &str, ranges: &str) -> Vec<String> {
    if ranges.is_empty() {
        return vec![pattern.to_owned()];
    }
    blocks(ranges).iter().map(|block| pattern.replacen('*', &block.to_string(), 1)).collect()
}

impl Golden {
    fn facts(&self) -> ModelFacts {
        ModelFacts::from_lookup(|key| match self.metadata.get(key) {
            None => MetaValue::Absent,
            Some(serde_json::Value::String(text)) => MetaValue::Text(text.clone()),
            Some(value) => MetaValue::Unsigned(value.as_u64().unwrap()),
        })
    }

    /// All tensors in output order.
    fn tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for TensorRow(pattern, shape, ty, ranges) in &self.tensors {
            let ty = TensorType::from_name(ty).unwrap();
            tensors.extend(names(pattern, ranges).into_iter().map(|name| Tensor { name, shape: shape.clone(), ty }));
        }
        let order = output_order(&tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>());
        let mut slots: Vec<_> = tensors.into_iter().map(Some).collect();
        order.into_iter().map(|at| slots[at].take().unwrap()).collect()
    }
}

impl TargetRow {
    fn expected(&self) -> BTreeMap<String, TensorType> {
        let mut expected = BTreeMap::new();
        for line in &self.types {
            let mut words = line.split(' ');
            let (pattern, ty) = (words.next().unwrap(), words.next().unwrap());
            for name in names(pattern, words.next().unwrap_or("")) {
                expected.insert(name, TensorType::from_name(ty).unwrap());
            }
        }
        expected
    }
}

fn describe(tensors: &[Tensor]) -> Vec<TensorDesc<'_>> {
    tensors.iter().map(|tensor| TensorDesc { name: &tensor.name, shape: &tensor.shape, ty: tensor.ty }).collect()
}

fn bytes(shape: &[u64], ty: TensorType) -> u64 {
    ty.info().unwrap().row_bytes(shape[0]).unwrap() * shape[1..].iter().product::<u64>()
}

#[test]
fn every_tensor_gets_the_type_that_llama_quantize_chose() {
    let (mut combinations, mut entries) = (0, 0);
    for path in golden_files() {
        let golden = load(&path);
        let (facts, tensors) = (golden.facts(), golden.tensors());
        for row in &golden.targets {
            let expected = row.expected();
            for name in &row.names {
                let mut options = Options::new(Target::parse(name.trim_end_matches("+imatrix")).unwrap());
                options.has_imatrix = name.ends_with("+imatrix");
                let recipe = choose_types(&facts, &describe(&tensors), &options).unwrap();
                let mut size = 0;
                for (tensor, choice) in tensors.iter().zip(&recipe.choices) {
                    let wanted = expected.get(&tensor.name).copied().unwrap_or(TensorType::F32);
                    assert_eq!(
                        choice.ty, wanted,
                        "{} {name} {} ({}, fallback from {:?})",
                        golden.model, tensor.name, choice.reason, choice.fallback_from
                    );
                    size += bytes(&tensor.shape, choice.ty);
                    entries += 1;
                }
                if let Some(mib) = row.mib {
                    let found = size as f64 / f64::from(1 << 20);
                    assert!((found - mib).abs() < 0.006, "{} {name}: {found} MiB, expected {mib}", golden.model);
                }
                combinations += 1;
            }
        }
    }
    println!("{entries} tensors in {combinations} combinations of model, target and imatrix agree");
    assert!(combinations >= 1000, "only {combinations} combinations were found");
}
