"""Files rounded with feedback: llama.cpp loads them and computes what lwq computes."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_delta_net
import tiny_families
import tiny_gemma4
from gguf import GGUFReader
from llama_reference import Reference, kl_divergence
from tiny_models import MODELS

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
DATA = Path(__file__).parent.parent / "data"
DOCLET = DATA / "doclet-4m-f16.gguf"
N_CTX, SEQUENCES = 256, 4
FAMILIES = tiny_delta_net.MODELS | tiny_gemma4.MODELS | tiny_families.MODELS
# One of each kind, with blocks for multi-token prediction where it may have them; those see no text.
ALL = MODELS | {
    name: FAMILIES[name]
    for name in (
        "qwen35-next-token",
        "qwen35moe-fused",
        "qwen3next-ssm-in",
        "gemma4",
        "gemma4-inputs",
        "gemma4-experts-chosen",
        "glm4",
        "glm4moe",
        "exaone4",
        "exaone-moe-next-token",
        "hunyuan-dense",
        "hunyuan-moe",
        "olmo2-windows",
        "mistral3",
        "minicpm",
        "bailingmoe2-next-token",
        "afmoe",
        "step35-next-token",
        "mimo2-next-token",
        "llama4-step",
    )
}


def lwq(*arguments):
    done = subprocess.run([LWQ, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def lwq_logits(path, sequences, tmp_path):
    tokens = tmp_path / "tokens.i32"
    np.concatenate(sequences).astype("<i4").tofile(tokens)
    out = lwq("dev", "logits", path, "--tokens-file", tokens, "--ctx", N_CTX, "--activations", "ggml")
    return np.frombuffer(out, "<f4").reshape(len(sequences) * N_CTX, -1)


@pytest.mark.parametrize("target", ["Q4_K_M", "Q2_K", "IQ3_S"])
def test_logits_of_a_file_rounded_with_feedback_agree_with_llama_cpp(target, tmp_path):
    path = tmp_path / "feedback.gguf"
    text = DATA / "golden/calib-sample.txt"
    lwq("quantize", DOCLET, path, "--target", target, "-f", text, "--calibration-tokens", 4096, "--quiet")
    assert "lwq.rounding.method" in GGUFReader(path).fields
    original = Reference(DOCLET)
    tokens = original.tokenize((DATA / "golden/eval-sample.txt").read_text())[: SEQUENCES * N_CTX]
    sequences = list(tokens.reshape(SEQUENCES, N_CTX))
    base = original.logits(sequences, N_CTX)
    original.close()
    reference = Reference(path)
    want = reference.logits(sequences, N_CTX, as_run=True)
    reference.close()
    # Both round activations as ggml does. A last bit that tips such a rounding is amplified by the layers after it (see
    # test_forward), which is small beside the damage of the quantization itself, and unbiased.
    between = kl_divergence(want, lwq_logits(path, sequences, tmp_path)).mean()
    damage = kl_divergence(base, want).mean()
    assert between < 0.15 * damage, f"{between:.3g} between both, {damage:.3g} from the original"


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_is_rounded_with_feedback(name, tmp_path):
    source = ALL[name]().write(tmp_path / "model.gguf")
    gate = tmp_path / "gate.txt"
    gate.write_text((DATA / "golden/eval-sample.txt").read_text()[:6000])
    out = tmp_path / "out.gguf"
    options = ["--rounding", "feedback", "--calibration-tokens", 1024, "--gate-file", gate, "--json", "--quiet"]
    report = json.loads(lwq("quantize", source, out, "--target", "Q4_0", *options))
    ratios = {}
    for tensor in report["tensors"]:
        rounding = tensor.get("rounding", {})
        if rounding.get("method") == "feedback":
            ratios[tensor["name"]] = rounding["held_out_ratio"]
        else:
            assert rounding.get("kept") != "factorization", tensor
    predicting = {t["name"].split(".")[1] for t in report["tensors"] if ".nextn." in t["name"]}
    rounded = [t for t in report["tensors"] if t["name"].startswith("blk.") and "rounding" in t]
    blocks = [t for t in rounded if t["name"].split(".")[1] not in predicting]
    assert not ratios.keys() & ({t["name"] for t in rounded} - {t["name"] for t in blocks})
    assert len([t for t in blocks if t["name"] in ratios]) >= 0.9 * len(blocks)
    assert np.mean(list(ratios.values())) < 0.9
    reference = Reference(out)
    assert np.isfinite(reference.logits([np.arange(1, 65)], 64, as_run=True)).all()
    reference.close()
