"""`lwq export` in every scheme, loaded by transformers and compressed-tensors on CPU: nothing missing or unexpected, weights bit by
bit those of the format's definition, logits close to a model with these weights.

torch, transformers 5.17 and compressed-tensors 0.19 are in a Python of their own, which LWQ_TORCH_PYTHON names.
"""

import json
import os
import subprocess
from pathlib import Path

import hf_models
import numpy as np
import pytest
from gguf import GGUFReader
from test_convert import LWQ

TORCH = os.environ.get("LWQ_TORCH_PYTHON")
DATA = Path(__file__).parents[1] / "data"
SCHEMES = {
    "W4A16": [], "W4A16-g32": ["--group-size", "32"], "W4A16-channel": ["--group-size", "channel"], "W4A16_ASYM": [],
    "W8A16": [], "W8A16-channel": ["--group-size", "channel"], "W8A8": [], "FP8_DYNAMIC": [], "FP8_BLOCK": [],
    "NVFP4A16": [], "MXFP4A16": [],
    # Scales may be negative here.
    "W4A16-search": ["--rounding", "search"],
    # Two groups in config.json, one of them by patterns.
    "W4A16-mixed": ["--like-bpw", "5"],
}

pytestmark = pytest.mark.skipif(not TORCH, reason="LWQ_TORCH_PYTHON names no Python with torch and compressed-tensors")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0,
}


def bundled_model(folder, dtype):
    """The bundled model as a folder of transformers."""
    folder.mkdir()
    tensors = {}
    reader = GGUFReader(DATA / "doclet-4m-f16.gguf")
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")
        values = tensor.data.astype(np.float32)
        if part in ("attn_q", "attn_k"):
            heads = CONFIG["num_attention_heads"] if part == "attn_q" else CONFIG["num_key_value_heads"]
            # GGUF has rotating neighbours, transformers rotating halves.
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        name = f"model.layers.{block[1]}.{NAMES[part]}" if block else NAMES[part]
        stored = ("BF16", hf_models.to_bf16(values)) if dtype == "bfloat16" else ("F16", values.astype(np.float16))
        tensors[f"{name}.weight"] = stored
    hf_models.save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": dtype}))
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    added = [{"id": at, "content": token, "special": True, "normalized": False} for at, token in enumerate(tokens[:3])]
    split = [{"type": "Digits", "individual_digits": True},
             {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split}, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": tokens[0], "eos_token": tokens[0]}))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_scheme_loads_with_the_values_that_lwq_reads(tmp_path, dtype):
    source = bundled_model(tmp_path / dtype, dtype)
    folders = []
    for case, options in SCHEMES.items():
        if case == "W4A16-mixed" and dtype == "float16":
            continue  # measuring takes a while
        output = tmp_path / case
        scheme = case.split("-")[0]
        rounding = [] if "--rounding" in options else ["--rounding", "rtn"]
        run(LWQ, "export", source, output, "--scheme", scheme, "--quiet", *rounding, *options)
        checked = json.loads(run(LWQ, "export", source, output, "--check", "--json"))
        (tmp_path / f"{case}.json").write_text(json.dumps(checked))
        folders.append(output)
    print(run(TORCH, Path(__file__).with_name("export_loading.py"), source, *folders))
