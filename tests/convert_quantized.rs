//! `lwq convert` on checkpoints that are quantized already: what is refused, and in which words. That values are right is
//! checked against each format's definition in tests/interop.

mod common;
mod convert_support;

use std::path::Path;
use std::process::Output;

use common::{args, doclet, error_line, files_in, run_with, stdout_of};
use convert_support::{Raw, Source};
use lwq::gguf::{Gguf, TensorType};
use safetensors::Dtype;
use serde_json::{Value as Json, json};

const UP: &str = "model.layers.2.mlp.up_proj.weight";
const DOWN: &str = "model.layers.4.mlp.down_proj.weight";

fn source() -> Source {
    Source::doclet(&doclet())
}

fn floats(shape: &[usize], value: f32) -> Raw {
    let count: usize = shape.iter().product();
    Raw { dtype: Dtype::F32, shape: shape.to_vec(), data: value.to_le_bytes().repeat(count) }
}

/// Two matrices in FP8, all codes 1.5.
fn fp8(quantization: Json, scale: &str, scale_of: impl Fn(&[usize]) -> Raw) -> Source {
    let mut source = source();
    source.config["quantization_config"] = quantization;
    for name in [UP, DOWN] {
        let shape = source.tensors[name].shape.clone();
        let data = vec![0x3C; shape.iter().product()];
        source.tensors.insert(format!("{name}{scale}"), scale_of(&shape));
        source.tensors.insert(name.into(), Raw { dtype: Dtype::F8_E4M3, shape, data });
    }
    source
}

fn methods() -> [Json; 3] {
    let group = json!({ "targets": ["Linear"], "weights": { "num_bits": 8, "type": "float", "strategy": "tensor" } });
    [
        json!({ "quant_method": "fp8", "weight_block_size": [128, 128] }),
        json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": { "group_0": group } }),
        json!({ "quant_method": "modelopt", "quant_algo": "FP8" }),
    ]
}

fn convert(source: &Source, folder: &Path, options: &[&str]) -> Output {
    let folder = source.write(folder);
    run_with(args!["convert", &folder, "-o", folder.join("out.gguf"), "--force"], options)
}

#[test]
fn fp8_weights_without_their_scale_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    for method in methods() {
        let scale = if method["quant_method"] == "fp8" { "_scale_inv" } else { "_scale" };
        let whole = || fp8(method.clone(), scale, |_| floats(&[], 0.5));
        stdout_of(convert(&whole(), &folder, &[]));
        for options in [&[][..], &["--dry-run"]] {
            let mut one = whole();
            one.tensors.remove(&format!("{DOWN}{scale}"));
            let line = error_line(&convert(&one, &folder, options));
            assert!(line.contains(&format!("{DOWN:?} is FP8")) && line.contains("is missing"), "{line}");

            let mut renamed = whole();
            for name in [UP, DOWN] {
                let raw = renamed.tensors.remove(&format!("{name}{scale}")).unwrap();
                renamed.tensors.insert(format!("{name}_scales"), raw);
            }
            let line = error_line(&convert(&renamed, &folder, options));
            assert!(line.contains(&format!("\"{UP}_scales\" is no name that is known")), "{line}");

            let mut none = whole();
            none.tensors.retain(|name, _| !name.contains("scale"));
            assert!(error_line(&convert(&none, &folder, options)).contains("is FP8"));
        }
    }
    let mut nothing_said = fp8(Json::Null, "_scale", |_| floats(&[], 0.5));
    nothing_said.tensors.retain(|name, _| !name.contains("scale"));
    let done = convert(&nothing_said, &folder, &["--type", "f32"]);
    assert!(done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("their codes are taken as values"));
}

#[test]
fn modelopt_names_itself_in_a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let mut bare = fp8(Json::Null, "_scale", |_| floats(&[], 0.5));
    bare.tensors.remove(&format!("{UP}_scale"));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |algorithm: &str| {
        let content = json!({ "producer": { "name": "modelopt" }, "quantization": { "quant_algo": algorithm } });
        std::fs::write(folder.join("hf_quant_config.json"), content.to_string()).unwrap();
    };
    write("FP8");
    assert!(error_line(&convert(&bare, &folder, &[])).contains("method \"modelopt\""));
    write("W4A8_AWQ");
    assert!(error_line(&convert(&bare, &folder, &[])).contains("quant_algo is \"W4A8_AWQ\""));
}

#[test]
fn scales_of_zero_are_refused_and_scales_of_one_kind_are_applied() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    for method in methods() {
        let zeros = fp8(method.clone(), "_scale", |shape| floats(&[shape[0], 1], 0.0));
        let line = error_line(&convert(&zeros, &folder, &[]));
        assert!(line.contains("_scale\" holds nothing but zeros"), "{line}");
        let mut with_inputs = fp8(method, "_scale", |shape| floats(&[shape[0], 1], 0.25));
        let input = UP.replace("weight", "input_scale");
        with_inputs.tensors.insert(input, floats(&[], 3.0));
        stdout_of(convert(&with_inputs, &folder, &["--type", "f32"]));
        let gguf = Gguf::open(folder.join("out.gguf")).unwrap();
        let data = gguf.data(gguf.tensor("blk.2.ffn_up.weight").unwrap()).unwrap();
        assert!(data.as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes) == 0.375));
    }
}

#[test]
fn methods_that_cannot_be_read_say_what_to_convert_from() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    std::fs::create_dir_all(&folder).unwrap();
    let compressed = |key: &str, value: Json| {
        let mut config = methods()[1].clone();
        config[key] = value;
        config
    };
    for (config, found) in [
        (json!({ "quant_method": "gptq", "bits": 4 }), "method \"gptq\""),
        (json!({ "quant_method": "awq", "bits": 4 }), "method \"awq\""),
        (json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }), "method \"bitsandbytes\""),
        (json!({ "bits": 4, "group_size": 128 }), "names no method"),
        (json!({ "quant_method": "modelopt", "quant_algo": "NVFP4_AWQ" }), "quant_algo \"NVFP4_AWQ\""),
        (compressed("format", json!("marlin-24")), "(\"marlin-24\")"),
        (compressed("sparsity_config", json!({ "format": "sparse-24-bitmask" })), "sparse weights"),
        (compressed("transform_config", json!({ "config_groups": { "R1": {} } })), "weights are rotated"),
    ] {
        let mut model = source();
        model.config["quantization_config"] = config;
        let line = error_line(&convert(&model, &folder, &[]));
        assert!(line.contains(found) && line.contains("convert the 16-bit model that it was made from"), "{line}");
        std::fs::write(folder.join("README.md"), "---\nbase_model: maker/model-7B\n---\n").unwrap();
        assert!(error_line(&convert(&model, &folder, &[])).contains("\"maker/model-7B\" by its README.md"));
        std::fs::remove_file(folder.join("README.md")).unwrap();
    }
    let mut mlx = source();
    for field in ["quantization", "quantization_config"] {
        mlx.config[field] = json!({ "group_size": 64, "bits": 4 });
        assert!(error_line(&convert(&mlx, &folder, &[])).contains("weights for MLX"));
    }
    assert!(!files_in(&folder).contains(&"out.gguf".to_owned()));
}

/// `UP` as 4-bit integers in groups of 32, all of value (9 - 8) x .5.
fn packed() -> Source {
    let mut source = source();
    source.tensors.remove(UP);
    source.config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": { "group_0": { "weights": { "num_bits": 4, "type": "int", "group_size": 32 } } },
    });
    let words = Raw { dtype: Dtype::I32, shape: vec![512, 32], data: vec![0x99; 512 * 32 * 4] };
    let shape = [512i64, 256].iter().flat_map(|dim| dim.to_le_bytes()).collect();
    source.tensors.insert(format!("{UP}_packed"), words);
    source.tensors.insert(format!("{UP}_scale"), floats(&[512, 8], 0.5));
    source.tensors.insert(format!("{UP}_shape"), Raw { dtype: Dtype::I64, shape: vec![2], data: shape });
    source
}

#[test]
fn packed_integers_are_read_and_kept_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    // Parts of a weight may lie in several files.
    let folder = packed().write_sharded(&dir.path().join("model"), 3);
    let output = folder.join("out.gguf");
    for (option, ty) in [("auto", TensorType::F16), ("source", TensorType::Q4_0)] {
        stdout_of(run_with(args!["convert", &folder, "-o", &output, "--force"], &["--type", option]));
        let gguf = Gguf::open(&output).unwrap();
        let tensor = gguf.tensor("blk.2.ffn_up.weight").unwrap();
        assert_eq!(tensor.ty, ty);
        let mut values = vec![0f32; 512 * 256];
        lwq::quant::dequantize(ty, gguf.data(tensor).unwrap(), &mut values).unwrap();
        assert!(values.iter().all(|value| *value == 0.5));
    }
}

/// A change of the parts of [`packed`], and a part of the message.
type PartCase = (&'static str, fn(&mut Source), &'static str);

#[test]
fn parts_that_are_missing_or_contradict_are_refused() {
    let cases: &[PartCase] = &[
        ("scale", |s| drop(s.tensors.remove(&format!("{UP}_scale"))), "up_proj.weight_scale\" is missing"),
        ("shape", |s| drop(s.tensors.remove(&format!("{UP}_shape"))), "up_proj.weight_shape\" is missing"),
        (
            "bits",
            |s| s.config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = json!(8),
            "holds 4 bits a weight; config.json says [8]",
        ),
        (
            "words",
            |s| {
                let raw = s.tensors.get_mut(&format!("{UP}_packed")).unwrap();
                (raw.shape, raw.data) = (vec![512, 31], vec![0; 512 * 31 * 4]);
            },
            "which is neither 4 nor 8 bits",
        ),
        (
            "groups",
            |s| drop(s.tensors.insert(format!("{UP}_scale"), floats(&[512, 7], 0.5))),
            "_scale\" has shape [512, 7]",
        ),
        (
            "negative shape",
            |s| s.tensors.get_mut(&format!("{UP}_shape")).unwrap().data[7] = 0x80,
            "expected rows and columns",
        ),
        (
            "zero points",
            |s| drop(s.tensors.insert(format!("{UP}_zero_point"), floats(&[512, 8], 8.0))),
            "_zero_point\" has dtype F32",
        ),
        (
            "order",
            |s| {
                let data = 9i32.to_le_bytes().repeat(256);
                s.tensors.insert(format!("{UP}_g_idx"), Raw { dtype: Dtype::I32, shape: vec![256], data });
            },
            "value 0 is 9, but there are 8 groups",
        ),
        (
            "second scale",
            |s| {
                s.tensors.retain(|name, _| !name.starts_with(UP));
                let codes = Raw { dtype: Dtype::U8, shape: vec![512, 128], data: vec![0x22; 512 * 128] };
                let scales = Raw { dtype: Dtype::F8_E4M3, shape: vec![512, 16], data: vec![0x38; 512 * 16] };
                s.tensors.insert(format!("{UP}_packed"), codes);
                s.tensors.insert(format!("{UP}_scale"), scales);
            },
            "up_proj.weight_global_scale\" is missing",
        ),
        (
            "scale that is no number",
            |s| {
                s.tensors.retain(|name, _| !name.starts_with(UP));
                let codes = Raw { dtype: Dtype::U8, shape: vec![512, 128], data: vec![0x22; 512 * 128] };
                let scales = Raw { dtype: Dtype::U8, shape: vec![512, 8], data: vec![0xFF; 512 * 8] };
                s.tensors.insert(format!("{UP}_packed"), codes);
                s.tensors.insert(format!("{UP}_scale"), scales);
            },
            "value 0 is NaN",
        ),
        (
            "codes of a byte",
            |s| {
                s.tensors.retain(|name, _| !name.starts_with(UP));
                s.tensors
                    .insert(UP.into(), Raw { dtype: Dtype::U8, shape: vec![512, 128], data: vec![0x22; 512 * 128] });
            },
            "up_proj.weight\" holds codes of dtype U8, but",
        ),
        (
            "both forms",
            |s| {
                let raw = Source::doclet(&doclet()).tensors[UP].clone();
                s.tensors.insert(UP.into(), raw);
            },
            "stands for the same weights",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (name, change, message) in cases {
        let mut source = packed();
        change(&mut source);
        let folder = dir.path().join(name.replace(' ', "-"));
        let line = error_line(&convert(&source, &folder, &[]));
        assert!(line.contains(message), "{name}: {line}");
        assert!(!folder.join("out.gguf").exists(), "{name}");
    }
}
