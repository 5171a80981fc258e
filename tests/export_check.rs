//! `lwq export --check`: every fault that loaders let pass, or refuse in words that nobody understands, is named.

mod common;
mod convert_support;
mod export_support;

use std::path::{Path, PathBuf};

use common::{args, error_line, run, stdout_of};
use convert_support::{Raw, Tensors, save};
use export_support::{config_of, exported, mixture, tensors_of, two_layers};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

const UP: &str = "model.layers.0.mlp.up_proj";
const DOWN: &str = "model.layers.1.mlp.down_proj";

/// An exported folder that a test damages.
struct Broken {
    folder: PathBuf,
    config: Json,
    tensors: Tensors,
}

impl Broken {
    fn quantization(&mut self) -> &mut Json {
        &mut self.config["quantization_config"]
    }

    fn group(&mut self) -> &mut Json {
        &mut self.config["quantization_config"]["config_groups"]["group_0"]
    }

    fn tensor(&mut self, name: &str) -> &mut Raw {
        self.tensors.get_mut(name).unwrap()
    }

    /// Writes what is there now and gives the faults that are found, one a line.
    fn faults(&self) -> Vec<String> {
        std::fs::write(self.folder.join("config.json"), self.config.to_string()).unwrap();
        save(&self.tensors, &self.folder.join("model.safetensors"));
        faults_of(&self.folder, None)
    }
}

fn faults_of(folder: &Path, source: Option<&Path>) -> Vec<String> {
    let mut arguments = args!["export"];
    arguments.extend(source.map(std::ffi::OsString::from));
    arguments.extend(args![folder, "--check", "--quiet"]);
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let prefix = format!("error: {}: ", folder.display());
    stderr.lines().map(|line| line.strip_prefix(&prefix).unwrap_or_else(|| panic!("{line}")).to_owned()).collect()
}

/// The faults of an export that was damaged.
fn damaged(good: &Path, damage: impl FnOnce(&mut Broken)) -> Vec<String> {
    let folder = good.with_file_name("broken");
    std::fs::create_dir_all(&folder).unwrap();
    let mut broken = Broken { folder, config: config_of(good), tensors: tensors_of(good) };
    damage(&mut broken);
    broken.faults()
}

/// Damages an export in a scheme and compares the only fault that is found.
fn one_fault(good: &Path, expected: &str, damage: impl FnOnce(&mut Broken)) {
    let faults = damaged(good, damage);
    assert!(faults.len() == 1 && faults[0].contains(expected), "{expected:?} expected, found {faults:#?}");
}

fn raw(dtype: Dtype, shape: &[usize], bytes: usize) -> Raw {
    Raw { dtype, shape: shape.to_vec(), data: vec![0; bytes] }
}

#[test]
fn faults_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let good = exported(&two_layers().write(&dir.path().join("model")), "W4A16");
    one_fault(&good, "group_0 has key \"extra\"", |b| b.group()["extra"] = json!(1));
    one_fault(&good, "group_0.weights has key \"bits\"", |b| b.group()["weights"]["bits"] = json!(4));
    one_fault(&good, "actorder \"group\"", |b| b.group()["weights"]["actorder"] = json!("group"));
    one_fault(&good, "quantization_status \"frozen\"", |b| b.quantization()["quantization_status"] = json!("frozen"));
    one_fault(&good, "sparsity_config with targets", |b| {
        b.quantization()["sparsity_config"] = json!({ "format": "sparse-24-bitmask", "targets": ["Linear"] });
    });
    one_fault(&good, "lm_head: is not quantized, but no entry of ignore", |b| b.quantization()["ignore"] = json!([]));
    one_fault(&good, "has \"re:(\" in ignore", |b| b.quantization()["ignore"] = json!(["lm_head", "re:("]));
    one_fault(&good, "quantization_config is missing", |b| {
        b.config.as_object_mut().unwrap().shift_remove("quantization_config");
    });
    one_fault(&good, "has format \"int-quantized\"; its groups make it \"pack-quantized\"", |b| {
        b.quantization()["format"] = json!("int-quantized");
    });
    one_fault(&good, "group_0 has float weights of 4 bits", |b| b.group()["weights"]["type"] = json!("float"));
    one_fault(&good, &format!("{UP}: is quantized, but ignore names it"), |b| {
        b.quantization()["ignore"] = json!(["lm_head", UP, UP.replace("up", "gate")]);
        let gate = UP.replace("up", "gate");
        b.tensors.retain(|name, _| !name.starts_with(&gate));
        b.tensors.insert(format!("{gate}.weight"), raw(Dtype::F16, &[512, 256], 512 * 512));
    });
}

/// What a row of the table does to a good folder.
type Damage = fn(&mut Broken);

/// Tensors of a module by the end of its name.
fn remove(b: &mut Broken, module: &str, suffix: &str) {
    assert!(b.tensors.remove(&format!("{module}.{suffix}")).is_some());
}

#[test]
fn every_fault_that_loaders_meet_is_named_with_its_module() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    // Scheme, what loaders do with the fault, the fault, and the words that name it.
    let table: [(&str, &str, Damage, &[&str]); 14] = [
        ("W4A16", "refused", |b| b.group()["bits"] = json!(4), &["group_0", "key \"bits\"", "refuses"]),
        ("W4A16", "refused", |b| b.group()["weights"]["scale"] = json!(1), &["group_0.weights", "key \"scale\""]),
        ("W4A16", "refused", |b| b.group()["weights"]["actorder"] = json!("group"), &["actorder \"group\"", "refuse"]),
        (
            "W4A16",
            "refused",
            |b| *b.tensor(&format!("{DOWN}.weight_packed")) = raw(Dtype::I32, &[256, 32], 32768),
            &[DOWN, "weight_shape: says [256, 512]", "256 rows of 256"],
        ),
        (
            "W4A16",
            "refused",
            |b| *b.tensor(&format!("{DOWN}.weight_scale")) = raw(Dtype::F16, &[256, 2], 1024),
            &[DOWN, "weight_scale: has shape [256, 2], expected [256, 4]"],
        ),
        (
            "W8A8",
            "refused",
            |b| b.tensor(&format!("{DOWN}.weight_scale")).shape = vec![256],
            &[DOWN, "shape [256], exp"],
        ),
        (
            "W8A8",
            "refused",
            |b| b.tensor(&format!("{DOWN}.weight")).shape = vec![512, 256],
            &[DOWN, "expected [512, 1]"],
        ),
        ("W4A16", "garbage", |b| remove(b, DOWN, "weight_packed"), &[DOWN, "weight_packed: is missing", "garbage"]),
        ("W4A16", "garbage", |b| remove(b, DOWN, "weight_scale"), &[DOWN, "weight_scale: is missing", "garbage"]),
        ("W8A8", "garbage", |b| remove(b, DOWN, "weight_scale"), &[DOWN, "weight_scale: is missing", "garbage"]),
        (
            "W4A16",
            "first pass fails",
            |b| remove(b, DOWN, "weight_shape"),
            &[DOWN, "weight_shape: is missing", "fails"],
        ),
        (
            "NVFP4A16",
            "NaN",
            |b| remove(b, DOWN, "weight_global_scale"),
            &[DOWN, "weight_global_scale: is missing", "NaN"],
        ),
        (
            "W4A16",
            "ignored",
            |b| drop(b.tensors.insert(format!("{DOWN}.weight_g_idx"), raw(Dtype::I32, &[512], 2048))),
            &[DOWN, "weight_g_idx", "transformers ignores"],
        ),
        (
            "W4A16",
            "ignored",
            |b| drop(b.tensors.insert(format!("{DOWN}.weight_zero_point"), raw(Dtype::I32, &[32, 4], 512))),
            &[DOWN, "weight_zero_point", "transformers ignores"],
        ),
    ];
    for (scheme, does, damage, words) in table {
        let good = folder.with_file_name(format!("out-{scheme}"));
        let good = if good.exists() { good } else { exported(&folder, scheme) };
        let faults = damaged(&good, damage);
        let is_named = |fault: &String| words.iter().all(|word| fault.contains(word));
        assert!(faults.iter().any(is_named), "{scheme}, {does}: {words:?} expected, found {faults:#?}");
        assert!(faults.iter().all(|fault| fault.contains(words[0])), "{scheme}: {faults:#?}");
    }
    // What loads is no fault: no format in the group, keys of old writers.
    let mut fine = Broken {
        folder: dir.path().join("out-W4A16"),
        config: config_of(&dir.path().join("out-W4A16")),
        tensors: Tensors::new(),
    };
    fine.group().as_object_mut().unwrap().shift_remove("format");
    for (key, value) in [("observer", json!("minmax")), ("observer_kwargs", json!({})), ("actorder", Json::Null)] {
        fine.group()["weights"][key] = value;
    }
    std::fs::write(fine.folder.join("config.json"), fine.config.to_string()).unwrap();
    stdout_of(run(args!["export", &fine.folder, "--check"]));
}

#[test]
fn modules_that_are_not_there_at_all_are_missed() {
    let dir = tempfile::tempdir().unwrap();
    let good = exported(&two_layers().write(&dir.path().join("model")), "W4A16");
    let hole = "is missing, though other layers like this one have it";
    for module in ["self_attn.q_proj", "mlp.down_proj"] {
        let name = format!("model.layers.1.{module}");
        one_fault(&good, &format!("{name}: {hole}"), |b| b.tensors.retain(|tensor, _| !tensor.starts_with(&name)));
    }
    let norm = "model.layers.0.input_layernorm";
    one_fault(&good, &format!("{norm}: {hole}"), |b| remove(b, norm, "weight"));
    one_fault(&good, "model.layers.1: is missing; config.json says 2 layers", |b| {
        b.tensors.retain(|tensor, _| !tensor.starts_with("model.layers.1."));
    });
    one_fault(&good, "model.layers.1: is there, but config.json says 1 layers", |b| {
        b.config["num_hidden_layers"] = json!(1);
    });
    one_fault(&good, "model.norm: the norm behind the last layer is missing", |b| remove(b, "model.norm", "weight"));
    one_fault(&good, "model.embed_tokens: the embedding is missing", |b| remove(b, "model.embed_tokens", "weight"));
    one_fault(&good, "lm_head.weight: is missing, and config.json says that it is not the embedding", |b| {
        b.config["tie_word_embeddings"] = json!(false);
    });

    let good = exported(&mixture(false).write(&dir.path().join("mixture/model")), "W4A16");
    let down = "model.layers.0.mlp.experts.2.down_proj";
    one_fault(&good, &format!("{down}: is missing, though other experts have it"), |b| {
        b.tensors.retain(|tensor, _| !tensor.starts_with(down));
    });
    one_fault(&good, "model.layers.0.mlp.experts.3: is missing", |b| {
        b.config["num_experts"] = json!(4);
        b.tensors.retain(|tensor, _| !tensor.contains("experts.3."));
    });
}

#[test]
fn faults_of_tensors_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let good = exported(&two_layers().write(&dir.path().join("model")), "W4A16");
    let name = |suffix: &str| format!("{DOWN}.{suffix}");
    for (suffix, effect) in [("weight_packed", "garbage"), ("weight_scale", "garbage"), ("weight_shape", "fails")] {
        let tensor = name(suffix);
        one_fault(&good, &format!("{tensor}: is missing"), |b| drop(b.tensors.remove(&tensor)));
        one_fault(&good, effect, |b| drop(b.tensors.remove(&tensor)));
    }
    one_fault(&good, "weight_scale: has shape [256, 2], expected [256, 4]", |b| {
        *b.tensor(&name("weight_scale")) = raw(Dtype::F16, &[256, 2], 1024);
    });
    one_fault(&good, "weight_g_idx: is an order of columns", |b| {
        b.tensors.insert(name("weight_g_idx"), raw(Dtype::I32, &[512], 2048));
    });
    one_fault(&good, "weight_zero_point: is zero points, but its group is symmetric", |b| {
        b.tensors.insert(name("weight_zero_point"), raw(Dtype::I32, &[32, 4], 512));
    });
    one_fault(&good, "weight_scale: value 1 is NaN", |b| {
        b.tensor(&name("weight_scale")).data[2..4].copy_from_slice(&[0xFF, 0x7F]);
    });
    one_fault(&good, "weight_shape: says [255, 512]", |b| {
        b.tensor(&name("weight_shape")).data[0..2].copy_from_slice(&[255, 0])
    });
    one_fault(&good, "weight_packed: has dtype U32, expected I32", |b| {
        b.tensor(&name("weight_packed")).dtype = Dtype::U32;
    });
    // One that is not quantized, and of what is put into one only a part.
    one_fault(&good, &format!("{DOWN}.weight: is not quantized, but no entry of ignore"), |b| {
        b.tensors.retain(|tensor, _| !tensor.starts_with(DOWN));
        b.tensors.insert(name("weight"), raw(Dtype::F16, &[256, 512], 512 * 512));
    });
    one_fault(&good, "vLLM puts them into one and refuses that", |b| {
        b.tensors.retain(|tensor, _| !tensor.starts_with(UP));
        b.tensors.insert(format!("{UP}.weight"), raw(Dtype::F16, &[512, 256], 512 * 512));
        b.quantization()["ignore"] = json!(["lm_head", UP]);
    });
}

#[test]
fn faults_of_tensors_in_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let good = exported(&folder, "W8A8");
    let (weight, scale) = (format!("{DOWN}.weight"), format!("{DOWN}.weight_scale"));
    one_fault(&good, "weight_scale: has shape [256], expected [256, 1]", |b| b.tensor(&scale).shape = vec![256]);
    one_fault(&good, "weight_scale: has shape [256, 1], expected [512, 1]", |b| {
        b.tensor(&weight).shape = vec![512, 256]
    });
    one_fault(&good, "weight_scale: is missing", |b| drop(b.tensors.remove(&scale)));

    let good = exported(&folder, "FP8_BLOCK");
    one_fault(&good, "weight 5 is NaN", |b| b.tensor(&weight).data[5] = 0x7F);
    one_fault(&good, "weight_scale: has shape [4, 2], expected [2, 4]", |b| b.tensor(&scale).shape = vec![4, 2]);

    one_fault(&good, "no block_structure such as [128, 128]", |b| {
        b.group()["weights"]["block_structure"] = json!([200, 128]);
    });

    let good = exported(&folder, "NVFP4A16");
    let global = format!("{DOWN}.weight_global_scale");
    one_fault(&good, "weight_global_scale: is missing: loaders make NaN", |b| drop(b.tensors.remove(&global)));
    one_fault(&good, "weight_global_scale: is 0", |b| b.tensor(&global).data.fill(0));
    // Loaders take the larger of two: a warning.
    let fused = dir.path().join("fused");
    std::fs::create_dir_all(&fused).unwrap();
    let mut tensors = tensors_of(&good);
    tensors.get_mut(&format!("{UP}.weight_global_scale")).unwrap().data.copy_from_slice(&1f32.to_le_bytes());
    std::fs::copy(good.join("config.json"), fused.join("config.json")).unwrap();
    save(&tensors, &fused.join("model.safetensors"));
    let output = run(args!["export", &fused, "--check"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("weight_global_scale: is 1, but that of"));
    stdout_of(output);

    let good = exported(&folder, "MXFP4A16");
    one_fault(&good, "weight_scale: value 3 is NaN", |b| b.tensor(&scale).data[3] = 255);
    let good = exported(&folder, "W4A16_ASYM");
    let zero = format!("{DOWN}.weight_zero_point");
    one_fault(&good, "weight_zero_point: is missing: loaders make garbage", |b| drop(b.tensors.remove(&zero)));
}

#[test]
fn faults_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let folder = two_layers().write(&dir.path().join("model"));
    let good = dir.path().join("good");
    stdout_of(run(args!["export", &folder, &good, "--scheme", "W8A8", "--shard-size", "1MB", "--rounding", "rtn"]));
    let broken = dir.path().join("broken");
    let fresh = || {
        let _ = std::fs::remove_dir_all(&broken);
        std::fs::create_dir_all(&broken).unwrap();
        for name in common::files_in(&good) {
            std::fs::copy(good.join(&name), broken.join(&name)).unwrap();
        }
    };
    let shard = broken.join("model-00002-of-00003.safetensors");
    let index = broken.join("model.safetensors.index.json");
    let read_index = || serde_json::from_slice::<Json>(&std::fs::read(&index).unwrap()).unwrap();
    let one = |expected: &str| {
        let faults = faults_of(&broken, None);
        assert!(faults.len() == 1 && faults[0].contains(expected), "{expected:?} expected, found {faults:#?}");
    };

    fresh();
    let mut listed = read_index();
    listed["weight_map"]["model.norm.extra"] = json!("model-00001-of-00003.safetensors");
    std::fs::write(&index, listed.to_string()).unwrap();
    one("model.norm.extra: model.safetensors.index.json says that it is in model-00001");

    fresh();
    let mut listed = read_index();
    listed["weight_map"].as_object_mut().unwrap().shift_remove("model.norm.weight");
    std::fs::write(&index, listed.to_string()).unwrap();
    one("model.norm.weight: is in model-0000");

    fresh();
    let mut listed = read_index();
    let total = listed["metadata"]["total_size"].as_u64().unwrap();
    listed["metadata"]["total_size"] = json!(total + 2);
    std::fs::write(&index, listed.to_string()).unwrap();
    one(&format!("metadata.total_size is {}, but the tensors have {total} bytes", total + 2));

    let contains = |expected: &str| {
        let faults = faults_of(&broken, None);
        assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected:?} expected, found {faults:#?}");
    };
    fresh();
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes.extend([0; 8]);
    std::fs::write(&shard, &bytes).unwrap();
    contains("model-00002-of-00003.safetensors: has 8 bytes behind its last tensor");
    bytes.truncate(bytes.len() - 20);
    std::fs::write(&shard, &bytes).unwrap();
    contains("model-00002-of-00003.safetensors: is cut");

    fresh();
    let bytes = std::fs::read(&shard).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Json = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let (name, _) = header.as_object().unwrap().iter().find(|(name, _)| name.ends_with(".weight")).unwrap();
    let name = name.clone();
    for offset in header[&name]["data_offsets"].as_array_mut().unwrap() {
        *offset = json!(offset.as_u64().unwrap() + 4);
    }
    let text = header.to_string();
    let mut damaged = (text.len() as u64).to_le_bytes().to_vec();
    damaged.extend(text.as_bytes());
    damaged.extend(&bytes[8 + length..]);
    std::fs::write(&shard, damaged).unwrap();
    contains("begins at byte");

    fresh();
    std::fs::remove_file(&shard).unwrap();
    contains("model-00002-of-00003.safetensors: is missing");
    std::fs::write(broken.join("config.json"), "{").unwrap();
    contains("config.json: is no JSON object");
    assert!(error_line(&run(args!["export", dir.path().join("nothing"), "--check"])).contains("is no folder"));
}

#[test]
fn the_source_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let source = two_layers();
    let folder = source.write(&dir.path().join("model"));
    let good = exported(&folder, "W4A16");
    let text = stdout_of(run(args!["export", &folder, &good, "--check"]));
    assert!(text.contains("relative error of weights: mean 0."), "{text}");
    let against = |change: &dyn Fn(&mut Tensors), expected: &str| {
        let mut other = two_layers();
        change(&mut other.tensors);
        let other = other.write(&dir.path().join("other"));
        let faults = faults_of(&good, Some(&other));
        assert!(faults.len() == 1 && faults[0].contains(expected), "{expected:?} expected, found {faults:#?}");
    };
    let negate = |raw: &mut Raw| raw.data.iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= 0x80);
    let up = format!("{UP}.weight");
    against(&|tensors| negate(tensors.get_mut(&up).unwrap()), "up_proj: is 200% away from the source");
    against(
        &|tensors| negate(tensors.get_mut("model.norm.weight").unwrap()),
        "model.norm.weight: is not quantized, but differs from the source",
    );
    against(&|tensors| drop(tensors.remove("model.norm.weight")), "model.norm.weight: is not in the source");
    against(&|tensors| drop(tensors.remove(&up)), "up_proj: is not in the source");
    against(
        &|tensors| {
            let raw = tensors.get_mut(&up).unwrap();
            raw.shape = vec![256, 512];
        },
        "up_proj: has shape [512, 256], in the source [256, 512]",
    );
    against(
        &|tensors| drop(tensors.insert("model.layers.0.extra.weight".into(), raw(Dtype::F16, &[4], 8))),
        "model.layers.0.extra.weight: is in the source, but not here",
    );
}
