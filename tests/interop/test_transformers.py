"""Folders as transformers 5 saves them: what it makes of the small random models, against what lwq makes of the result.

Needs the Python of .ci/torch in LWQ_TORCH_PYTHON. The golden file holds what convert_hf_to_gguf.py of llama.cpp b10605 gives
for the same folders under transformers 5.17.
"""

import json
import os
import subprocess

import hf_families
import hf_models
import numpy as np
import pytest
from conftest import configurations
from llama_reference import kl_divergence
from test_convert import GOLDEN, convert, facts
from test_forward import lwq_logits

PYTHON = os.environ.get("LWQ_TORCH_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LWQ_TORCH_PYTHON names no Python with torch")

# Files of publishers' own code, that transformers has no class for, and forms that it does not save as it read them.
FOREIGN = {
    "bailingmoe2", "bailingmoe2-bias", "ernie-fused", "ernie_moe-interval", "fp8", "fp8-32", "hunyuan_dense-plain", "internlm2",
    "mimo2", "mimo2-fused", "minicpm", "minicpm-plain", "qwen35-fp8", "qwen35-nvfp4", "step35", "step35-trunk",
}
NAMES = [name for name in (*hf_models.MODELS, *hf_models.FAMILIES, *hf_families.FAMILIES) if name not in FOREIGN]
# One for each kind of part and of folder; the others run with --all-configs.
CHOSEN = {
    "exaone_moe", "gemma3", "gemma4-moe", "gemma4-small", "glm4moe", "hunyuan_dense", "llama", "llama4", "minimax_m2", "mistral3",
    "qwen35moe", "qwen3next", "qwen3next-made", "qwen3vlmoe",
}
# Further models of families that have one configuration there, made by transformers itself with these options.
OPTIONS = {
    "afmoe": {"route_scale": 1.0, "num_shared_experts": 2, "num_dense_layers": 2},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "glm4": {"attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "granite": {"tie_word_embeddings": False, "num_key_value_heads": 4, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "hunyuan_moe": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "minimax_m2": {"num_experts_per_tok": 3, "num_key_value_heads": 4},
    "olmoe": {"num_experts_per_tok": 3, "num_key_value_heads": 4},
    "qwen2vl": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3next": {"num_experts_per_tok": 3, "linear_num_value_heads": 4, "tie_word_embeddings": True},
    "qwen3vl": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen3vlmoe": {"num_experts_per_tok": 3, "num_key_value_heads": 4},
    "seed_oss": {"attention_bias": False, "tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}
MADE = {f"{name}-made": name for name in OPTIONS}
# llama.cpp computes these otherwise than transformers; lwq follows it (see test_forward.py).
COMPUTED_OTHERWISE = {
    "exaone4": "windows in models of 64 layers only",
    "olmo3": "YaRN's attention factor from its formula",
    "qwen35": "heads of values as wide as those of keys only",
}
COMPUTED_ALIKE = [name for name in (*NAMES, *MADE) if name not in COMPUTED_OTHERWISE]
# The converter adds one to the norms of this F16 model in F16.
LIMITS = {"qwen35-multimodal": 1e-2}
# The reference converter runs the publisher's code for one, and turns the other's experts, which transformers 5 saves as
# llama.cpp wants them.
WITHOUT_REFERENCE = {"hunyuan_moe", "qwen3vlmoe"}
WITH_REFERENCE = [name for name in (*NAMES, *MADE) if MADE.get(name, name) not in WITHOUT_REFERENCE]
# Parts that lwq leaves out, and tensors that a class makes without need.
NOT_TEXT = ("visual.", "vision_tower.", "vision_model.", "multi_modal_projector.", "embed_vision.")
OWN = {"llama": "self_attn.o_proj.bias"}


@pytest.fixture(scope="session")
def saved(request, tmp_path_factory):
    folders, out = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("saved")
    wanted = [item for item in request.session.items if "saved" in getattr(item, "fixturenames", ())]
    for name in sorted({item.callspec.params["name"] for item in wanted}):
        folder = hf_families.make(MADE.get(name, name)).write(folders / name)
        if name in MADE:
            (folder / "options.json").write_text(json.dumps(OPTIONS[MADE[name]]))
        np.save(folder / "tokens.npy", np.random.default_rng(7).integers(0, 250, (2, 96)).astype(np.int32))
    peer = os.path.join(os.path.dirname(__file__), "transformers_peer.py")
    done = subprocess.run([PYTHON, peer, folders, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        info = json.loads(line)
        found[info.pop("name")] = info
    return folders, out, found


@pytest.mark.parametrize("name", configurations(NAMES, CHOSEN))
def test_the_class_finds_its_tensors_in_the_folder(name, saved):
    info = saved[2][name]
    assert "error" not in info, info
    ignored = (*NOT_TEXT, *filter(None, [OWN.get(name)]))
    for problem in ("missing_keys", "mismatched_keys"):
        assert [key for key in info[problem] if not any(part in key for part in ignored)] == []
    # Blocks of further tokens stay out of the classes.
    extra = [key for key in info["unexpected_keys"] if not any(part in key for part in NOT_TEXT)]
    assert all(key.startswith(("mtp.", "model.layers.3.")) and name in ("glm4moe", "exaone_moe") for key in extra), extra


@pytest.mark.parametrize("name", configurations(WITH_REFERENCE, CHOSEN))
def test_files_are_those_of_the_reference_converter(name, saved, tmp_path):
    expected = json.loads(GOLDEN.with_name("convert-transformers5.json").read_text())[name]
    found = facts(convert(saved[1] / name, tmp_path / "model.gguf"))
    metadata = expected["metadata"]
    if name == "exaone_moe":
        # The reference counts the block of further tokens that transformers did not save.
        del metadata["exaone-moe.nextn_predict_layers"]
        metadata["exaone-moe.block_count"][1] -= 1
    if name == "hunyuan_dense":
        # The reference sees this field under transformers 5 only; its requirements name transformers 4.
        metadata["tokenizer.ggml.eos_token_id"][1] = 269
    assert found["metadata"] == metadata
    assert found["digest"] == expected["digest"]


@pytest.mark.parametrize("name", configurations(sorted(WITHOUT_REFERENCE), CHOSEN))
def test_weights_stay_what_they_were_before_transformers_saved_them(name, saved, tmp_path):
    found = facts(convert(saved[1] / name, tmp_path / "model.gguf"))
    assert found["digest"] == json.loads(GOLDEN.read_text())[name]["digest"]


@pytest.mark.parametrize("name", configurations(COMPUTED_ALIKE, CHOSEN))
def test_logits_agree_with_transformers(name, saved, tmp_path):
    folders, out, _ = saved
    tokens = np.load(folders / name / "tokens.npy")
    path = convert(out / name, tmp_path / "model.gguf", "--type", "f32")
    got = lwq_logits(path, list(tokens), tmp_path)
    want = np.load(out / name / "logits.npy").reshape(got.shape)
    assert want.std() > 0.3, "the random model says nothing"
    kl = kl_divergence(want, got)
    assert kl.max() < LIMITS.get(name, 1e-6), f"{name}: worst KL divergence {kl.max():.3g}"
