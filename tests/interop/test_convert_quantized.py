"""`lwq convert` on checkpoints that are quantized already: values by each format's definition, kept codes, gpt-oss."""

import json
import subprocess

import gguf
import hf_models
import numpy as np
import pytest
import quantized_weights as quantized
from test_convert import LWQ, convert

T = gguf.GGMLQuantizationType


def compressed(fmt, bits, kind="int", **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}}
    config = {"quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed"}
    return {**config, "ignore": ["lm_head"], "config_groups": {"group_0": group}}


PACKED4, PACKED8 = compressed("pack-quantized", 4), compressed("pack-quantized", 8)
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
CT_NVFP4 = compressed("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16)

# Q4_1 for the tensors of which every minimum happens to be a half-precision number.
SOME = object()

# Name: configuration, encoder, types that are kept with auto and with source.
CASES = {
    "w4-g32": (PACKED4, lambda w: quantized.integers(w), None, T.Q4_0),
    "w4-channel": (PACKED4, lambda w: quantized.integers(w, group=None), None, T.Q4_0),
    "w4-asym": (PACKED4, lambda w: quantized.integers(w, symmetric=False), None, SOME),
    "w4-asym-half": (PACKED4, lambda w: quantized.integers(w, symmetric=False, half=True), None, T.Q4_1),
    "w4-asym-channel": (PACKED4, lambda w: quantized.integers(w, group=None, symmetric=False), None, SOME),
    "w4-ordered": (
        PACKED4,
        lambda w: quantized.integers(w, order=np.random.default_rng(5).permutation(np.arange(w.shape[1]) // 32)),
        None, None,
    ),
    "w8-g32": (PACKED8, lambda w: quantized.integers(w, bits=8), None, T.Q8_0),
    "w8-channel": (PACKED8, lambda w: quantized.integers(w, bits=8, group=None), None, T.Q8_0),
    "w8-asym": (PACKED8, lambda w: quantized.integers(w, bits=8, symmetric=False), None, None),
    "int8": (compressed("int-quantized", 8), quantized.int8, None, T.Q8_0),
    "mxfp8-u8": (compressed("mxfp8-quantized", 8, "float"), quantized.fp8_e8m0, None, None),
    "mxfp8-e8m0": (
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        lambda w: quantized.fp8_e8m0(w, dtype="F8_E8M0"),
        None, None,
    ),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", 4, "float", group_size=32), quantized.mxfp4_compressed,
        T.MXFP4, T.MXFP4,
    ),
    "nvfp4-modelopt": (MODELOPT, lambda w: quantized.nvfp4(w, True), T.NVFP4, T.NVFP4),
    "nvfp4-compressed": (CT_NVFP4, lambda w: quantized.nvfp4(w, False), T.NVFP4, T.NVFP4),
    "nvfp4-negative": (CT_NVFP4, lambda w: quantized.nvfp4(w, False, True), T.NVFP4, T.NVFP4),
}


def quantize(model, encode):
    """Replaces all matrices of the layers by what `encode` gives; the model's values become those that the file has."""
    for name in [n for n in model.tensors if ".layers." in n and model.tensors[n].ndim == 2 and not n.endswith(".mlp.gate.weight")]:
        parts, values = encode(model.tensors.pop(name))
        module = name.removesuffix("weight")
        model.raw.update({module + suffix: tensor for suffix, tensor in parts.items()})
        model.values[name] = values
    return model


def make(kind, case):
    config, encode, *_ = CASES[case]
    model = hf_models.make(kind)
    model.config["quantization_config"] = config
    model.values = {}
    return quantize(model, encode)


def expected(model, heads):
    """Values by GGUF's names; llama's rows of queries and keys are permuted."""
    parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    found = {}
    for name, values in model.values.items():
        _, _, layer, _, part, _ = name.split(".")
        part = part.removesuffix("_proj")
        target = parts.get(part, f"ffn_{part}")
        if part in heads:
            count = heads[part]
            values = values.reshape(count, 2, values.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
        found[f"blk.{layer}.{target}.weight"] = values
    return found


def stored(path):
    """Values and types by name, second-level scales applied."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values = {}
    for name, tensor in tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        scale = tensors.get(name.removesuffix("weight") + "scale")
        values[name] = array if scale is None else array * scale.data.reshape(-1, *[1] * (array.ndim - 1))
    return values, {name: tensor.tensor_type for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_values_are_those_of_the_format(kind, case, tmp_path):
    model = make(kind, case)
    folder = model.write(tmp_path / "model")
    want = expected(model, {"q": 4, "k": 2} if kind == "llama" else {})
    got, _ = stored(convert(folder, tmp_path / "f32.gguf", "--type", "f32"))
    for name, values in want.items():
        assert np.array_equal(got[name], values), name
    *_, auto, source = CASES[case]
    for option, kind in (("auto", auto), ("source", source)):
        got, types = stored(convert(folder, tmp_path / f"{option}.gguf", "--type", option))
        for name, values in want.items():
            kept = T.Q4_1 if kind is SOME and types[name] != T.BF16 else kind
            if kept is SOME or (kept == T.NVFP4 and values.shape[-1] % 64):
                kept = None
            assert types[name] == (kept or T.BF16), (option, name)
            if kept:
                assert np.array_equal(got[name], values), (option, name)
            else:
                rounded = hf_models.from_bf16(hf_models.to_bf16(values)).reshape(values.shape)
                assert np.array_equal(got[name], rounded), (option, name)


def test_second_scales_that_llama_cpp_ignores_are_not_written(tmp_path):
    model = make("qwen2", "nvfp4-modelopt")
    folder = model.write(tmp_path / "model")
    command = [LWQ, "convert", folder, "-o", tmp_path / "auto.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "does not apply their second scale in qwen2" in done.stderr
    _, types = stored(tmp_path / "auto.gguf")
    assert types["blk.0.attn_q.weight"] == T.NVFP4 and types["blk.0.attn_q.scale"] == T.F32
    assert types["blk.0.ffn_up.weight"] == T.BF16 and "blk.0.ffn_up.scale" not in types


def test_experts_of_a_stack_keep_their_own_second_scale(tmp_path):
    model = make("qwen3moe", "nvfp4-modelopt")
    for name in [name for name in model.values if "experts.2." in name]:
        # The other scale makes other values.
        dtype, scale = model.raw[name + "_scale_2"]
        model.raw[name + "_scale_2"] = (dtype, np.full(scale.shape, scale * 2, np.float32))
        model.values[name] = model.values[name] * 2
    got, types = stored(convert(model.write(tmp_path / "model"), tmp_path / "auto.gguf"))
    assert types["blk.1.ffn_gate_exps.weight"] == T.NVFP4 and types["blk.1.ffn_gate_exps.scale"] == T.F32
    want = np.stack([model.values[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] for e in range(4)])
    assert np.array_equal(got["blk.1.ffn_gate_exps.weight"], want)
    # Rows of 32 fit no block of 64.
    assert types["blk.1.ffn_down_exps.weight"] == T.BF16


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_experts_of_gpt_oss_are_taken_apart(form, tmp_path):
    n, width, inner = hf_models.N_EXPERT, hf_models.N_EMBD, 64
    model = hf_models.gpt_oss(inner)
    fused, down, biases = {}, {}, {}
    for il in range(hf_models.N_LAYER):
        at = f"model.layers.{il}.mlp.experts."
        for part, rows, columns, keep in (("gate_up_proj", 2 * inner, width, fused), ("down_proj", width, inner, down)):
            codes, exponent, values = quantized.mxfp4(model.rng.normal(0, 0.1, (n, rows, columns)).astype(np.float32))
            keep[il] = values
            if form == "mxfp4":
                model.raw[f"{at}{part}_blocks"] = ("U8", quantized.pack_halves(codes))
                model.raw[f"{at}{part}_scales"] = ("U8", exponent)
            else:
                model.tensors[f"{at}{part}"] = np.ascontiguousarray(values.swapaxes(1, 2))
            bias = model.rng.normal(size=(n, rows)).astype(np.float32)
            model.raw[f"{at}{part}_bias"] = ("BF16", hf_models.to_bf16(bias))
            biases[il, part] = hf_models.from_bf16(hf_models.to_bf16(bias)).reshape(bias.shape)
    if form == "mxfp4":
        model.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    path = convert(model.write(tmp_path / "model"), tmp_path / "model.gguf")
    got, types = stored(path)
    assert types["blk.0.ffn_up_exps.weight"] == (T.MXFP4 if form == "mxfp4" else T.BF16)
    for il in range(hf_models.N_LAYER):
        want = {
            "ffn_gate_exps.weight": fused[il][:, ::2], "ffn_up_exps.weight": fused[il][:, 1::2],
            "ffn_down_exps.weight": down[il], "ffn_gate_exps.bias": biases[il, "gate_up_proj"][:, ::2],
            "ffn_up_exps.bias": biases[il, "gate_up_proj"][:, 1::2], "ffn_down_exps.bias": biases[il, "down_proj"],
            "attn_sinks.weight": model.tensors[f"model.layers.{il}.self_attn.sinks"],
        }
        for name, values in want.items():
            assert np.array_equal(got[f"blk.{il}.{name}"], values), name
    # llama.cpp and lwq agree on the file: both read every tensor of it.
    tokens = np.random.default_rng(3).integers(0, model.n_vocab, 40)
    from llama_reference import Reference, kl_divergence

    reference = Reference(path)
    theirs = reference.logits([tokens], 40)
    reference.close()
    tokens.astype("<i4").tofile(tmp_path / "tokens.i32")
    command = [LWQ, "dev", "logits", path, "--tokens-file", tmp_path / "tokens.i32", "--ctx", "40"]
    ours = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4").reshape(40, -1)
    assert kl_divergence(theirs, ours).max() < 1e-3


@pytest.mark.parametrize(("kind", "case"), [("llama", "nvfp4-modelopt"), ("qwen3", "nvfp4-compressed"), ("qwen3", "mxfp4")])
def test_llama_cpp_computes_with_kept_codes(kind, case, tmp_path):
    """The same folder once with its codes and once widened: llama.cpp finds the same model."""
    from llama_reference import Reference, kl_divergence

    folder = make(kind, case).write(tmp_path / "model")
    tokens = np.random.default_rng(4).integers(0, 260, 60)
    logits = []
    for option in ("auto", "f32"):
        reference = Reference(convert(folder, tmp_path / f"{option}.gguf", "--type", option))
        logits.append(reference.logits([tokens], 60))
        reference.close()
    assert logits[1].std() > 0.3
    # Products with 4-bit blocks round their inputs to 8 bits.
    assert kl_divergence(logits[1], logits[0]).mean() < 2e-3


def test_file_types_name_the_kept_codes(tmp_path):
    for case, option, number in (("mxfp4", "auto", 38), ("nvfp4-compressed", "auto", 39), ("w4-g32", "source", 2), ("w4-g32", "auto", 32)):
        path = convert(make("qwen3", case).write(tmp_path / case), tmp_path / "model.gguf", "--type", option)
        assert gguf.GGUFReader(path).fields["general.file_type"].contents() == number, case


def test_reports_name_the_kept_type(tmp_path):
    folder = make("qwen3", "mxfp4").write(tmp_path / "model")
    command = [LWQ, "convert", folder, "--dry-run", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert report["type"] == "mxfp4" and report["output"].endswith("model-mxfp4.gguf")
