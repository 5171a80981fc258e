"""`lwq convert` on folders as transformers saves them: against llama.cpp's converter, llama.cpp and plain numpy.

The golden file holds digests and metadata that convert_hf_to_gguf.py of llama.cpp b10605 gives for the same folders
(transformers 4.57.6, torch 2.6, for hf_families 2.15, pre-tokenizers of the models named, since it knows no vocabulary this
small; the vocabulary of hunyuan_moe by its rules for byte-level ones, since that class runs the publisher's code).
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import gguf
import hf_families
import hf_models
import numpy as np
import pytest
from hf_forward import forward
from llama_reference import Reference, kl_divergence

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
GOLDEN = Path(__file__).parent.parent / "data/golden/convert.json"
N_CTX = 160
DESCRIPTIVE = ("general.name", "general.basename", "general.finetune", "general.size_label", "general.version")


def convert(folder, output, *options):
    done = subprocess.run([LWQ, "convert", folder, "-o", output, "--force", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def facts(path):
    """Digest of the tensors, independent of their order, and the metadata that influence a run."""
    reader = gguf.GGUFReader(path)
    rows = []
    for tensor in reader.tensors:
        shape = "x".join(str(int(dim)) for dim in tensor.shape)
        data = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        rows.append(f"{tensor.name} {int(tensor.tensor_type)} {shape} {data}\n")
    metadata = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in DESCRIPTIVE:
            continue
        value = field.contents()
        if isinstance(value, list) and len(value) > 8:
            value = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        metadata[key] = ["/".join(kind.name for kind in field.types), value]
    return {"digest": hashlib.sha256("".join(sorted(rows)).encode()).hexdigest(), "metadata": metadata}


@pytest.mark.parametrize("name", [*hf_models.MODELS, *hf_models.FAMILIES, *hf_families.FAMILIES])
def test_files_are_those_of_the_reference_converter(name, tmp_path):
    folder = hf_families.make(name).write(tmp_path / name)
    found = facts(convert(folder, tmp_path / "model.gguf"))
    expected = json.loads(GOLDEN.read_text())[name]
    assert found["metadata"] == expected["metadata"]
    assert found["digest"] == expected["digest"]


@pytest.mark.parametrize("name", hf_families.DROPPED)
def test_dropped_blocks_are_those_that_the_reference_converter_drops(name, tmp_path):
    folder = hf_families.make(name).write(tmp_path / name)
    found = facts(convert(folder, tmp_path / "model.gguf", "--drop-mtp"))
    assert found == json.loads(GOLDEN.read_text())[f"{name} --no-mtp"]


def refusal(folder, output):
    done = subprocess.run([LWQ, "convert", folder, "-o", output, "--force"], capture_output=True, text=True)
    assert done.returncode != 0 and not output.exists(), "it was converted"
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def last_attention(model):
    """The tensor behind attention in the last block that has one."""
    ends = ("o_proj.weight", "attention.dense.weight", "attention.wo.weight")
    return [name for name in sorted(model.tensors) if name.endswith(ends) and "mtp" not in name and "visual" not in name][-1]


@pytest.mark.parametrize("name", [name for name in hf_families.FAMILIES if not name.endswith("-fp8")])
def test_a_tensor_that_is_missing_or_misshapen_is_refused(name, tmp_path):
    model = hf_families.make(name)
    tensor = last_attention(model)
    values = model.tensors.pop(tensor)
    plain = tensor.replace("language_model.", "").replace("ernie.", "model.")
    plain = plain if plain.startswith("model.") else f"model.{plain}"
    error = refusal(model.write(tmp_path / "missing"), tmp_path / "missing.gguf")
    assert f'"{plain}" is missing' in error, error
    model.tensors[tensor] = np.concatenate([values, values[:1]])
    error = refusal(model.write(tmp_path / "wide"), tmp_path / "wide.gguf")
    rows, columns = values.shape
    assert f'"{tensor}" has shape [{rows + 1}, {columns}]; config.json implies [{rows}, {columns}]' in error, error


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("olmoe", "clip_qkv", 8.0, "clip_qkv is 8.0; llama.cpp computes olmoe with null"),
        ("dots1", "sliding_window", 64, "sliding_window is 64; llama.cpp computes dots1 with null"),
        ("minimax_m2", "qk_norm_type", "per_head", 'qk_norm_type is "per_head"; llama.cpp computes minimax-m2 with "per_layer"'),
        ("afmoe", "layer_types", ["full_attention"] * 4, "layer_types is not full_attention in every 4th layer"),
        ("afmoe", "mup_enabled", False, "mup_enabled is false; llama.cpp computes afmoe with true"),
        ("llama4", "attention_chunk_size", 64, "attention_chunk_size is 64; llama.cpp computes llama4 with 8192"),
        ("hunyuan_dense", "use_cla", True, "use_cla is true; llama.cpp computes hunyuan-dense with false"),
        ("qwen3next", "norm_topk_prob", False, "norm_topk_prob is false; llama.cpp computes qwen3next with true"),
        ("gemma4-moe", "hidden_activation", "silu", "hidden_activation is silu; llama.cpp computes gemma4 with gelu"),
    ],
)
def test_what_llama_cpp_ignores_is_said(name, field, value, said, tmp_path):
    model = hf_families.make(name)
    model.config[field] = value
    folder = model.write(tmp_path / "model")
    command = [LWQ, "convert", folder, "-o", tmp_path / "model.gguf", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("qwen35", "layer_types", ["full_attention"] * 4, "GGUF has full attention in every 4th layer"),
        ("gemma4-moe", "layer_types", ["full_attention"], "layer_types has 1 entries, expected 4"),
        ("gemma4-moe", "global_head_dim", None, "global_head_dim is missing"),
        ("gemma4-moe", "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "is not proportional"),
        ("mimo2", "topk_method", "greedy", "topk_method is not noaux_tc"),
        ("mimo2", "moe_layer_freq", [0, 1], "moe_layer_freq is no list of 3 numbers"),
        ("mimo2", "swa_head_dim", 32, "swa_head_dim is not head_dim"),
        ("step35", "moe_layers_enum", "1,x", "moe_layers_enum is no list of numbers"),
        ("hunyuan_moe", "moe_topk", [1, 2], "moe_topk is no list of equal counts"),
        ("hunyuan_dense", "max_position_embeddings", 512, "rope_scaling of type dynamic is known for rope_theta 10000"),
        ("llama4", "moe_layers", [1, 3], "moe_layers names other layers than interleave_moe_layer_step, 1, implies"),
        ("bailingmoe2", "routed_scaling_factor", None, "routed_scaling_factor is missing"),
        ("bailingmoe2", "score_function", "tanh", "score_function is none of softmax, sigmoid and sqrtsoftplus"),
        ("ministral3", "rope_parameters", {"rope_type": "default"}, "is not yarn"),
        ("glm4moe", "n_shared_experts", 1 << 20, "n_shared_experts is 1048576, expected at most 65536"),
    ],
)
def test_settings_that_gguf_cannot_express_are_refused(name, field, value, said, tmp_path):
    model = hf_families.make(name)
    model.config[field] = value
    error = refusal(model.write(tmp_path / "model"), tmp_path / "model.gguf")
    assert said in error, error


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_logits_are_those_of_the_folder(name, tmp_path):
    model = hf_models.make(name)
    path = convert(model.write(tmp_path / name), tmp_path / "model.gguf", "--type", "f32")
    tokens = np.random.default_rng(3).integers(0, model.n_vocab, N_CTX)
    own = forward(model, tokens)
    assert own.std() > 0.3, "the random model says nothing"

    reference = Reference(path)
    theirs = reference.logits([tokens], N_CTX)
    reference.close()
    tokens.astype("<i4").tofile(tmp_path / "tokens.i32")
    command = [LWQ, "dev", "logits", path, "--tokens-file", tmp_path / "tokens.i32", "--ctx", str(N_CTX)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    ours = np.frombuffer(done.stdout, "<f4").reshape(N_CTX, -1)

    for label, got in (("llama.cpp", theirs), ("lwq", ours)):
        kl = kl_divergence(own, got)
        assert kl.max() < 1e-5, f"{name}: {label} differs from the folder, worst KL divergence {kl.max():.3g}"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "phi4mini"])
def test_tokens_are_those_of_llama_cpp(name, tmp_path):
    path = convert(hf_models.make(name).write(tmp_path / name), tmp_path / "model.gguf")
    text = "the thing 1234 on a  hill\n\n<|tool|> in <|x|> é the"
    reference = Reference(path)
    expected = list(reference.tokenize(text, parse_special=True))
    reference.close()
    command = [LWQ, "tokenize", path, "--text", text, "--ids", "--parse-special"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_rank_scores_cut_texts_as_the_merges_do(tmp_path):
    path = convert(hf_models.llama_merged().write(tmp_path / "model"), tmp_path / "model.gguf", "--rank-scores")
    command = [LWQ, "tokenize", path, "--text", "the thing  on a hat\nin the sea", "--ids", "--no-bos"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # From the PyPI package tokenizers 0.22.2 on the same tokenizer.json.
    expected = [272, 259, 270, 279, 259, 259, 276, 274, 259, 267, 262, 261, 13, 273, 272, 278, 260, 262]
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(("option", "kind"), [("f32", 0), ("f16", 1), ("bf16", 30), ("q8_0", 8)])
def test_types_are_those_of_gguf_py(option, kind, tmp_path):
    model = hf_models.smollm()
    path = convert(model.write(tmp_path / "smollm"), tmp_path / "model.gguf", "--type", option)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    name = "blk.1.ffn_down.weight"
    values = model.tensors["model.layers.1.mlp.down_proj.weight"]
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
    assert int(tensors[name].tensor_type) == kind
    assert tensors[name].data.tobytes() == expected.tobytes()
    assert int(tensors["blk.1.attn_norm.weight"].tensor_type) == 0
