"""Forward pass: logits of small random models of every architecture against llama.cpp in f32."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_delta_net
import tiny_families
import tiny_gemma4
from gguf import GGMLQuantizationType
from llama_reference import Reference, kl_divergence
from tiny_models import BOTH_WAYS, MODELS, N_VOCAB, gpt_oss, llama

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
DATA = Path(__file__).parent.parent / "data"
DOCLET = DATA / "doclet-4m-f16.gguf"
# Beyond every window and original context of the models, and four chunks of a delta net.
N_CTX = 256
CAUSAL = MODELS | tiny_delta_net.MODELS | tiny_gemma4.MODELS | tiny_families.MODELS


def run(*args):
    return subprocess.run([LWQ, *map(str, args)], capture_output=True, check=False)


def lwq_logits(path, sequences, tmp_path, *options):
    tokens = tmp_path / "tokens.i32"
    np.concatenate(sequences).astype("<i4").tofile(tokens)
    done = run("dev", "logits", path, "--tokens-file", tokens, "--ctx", len(sequences[0]), *options)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, "<f4").reshape(sum(map(len, sequences)), -1)


def random_sequences(n_vocab, n, length=N_CTX, seed=7):
    return list(np.random.default_rng(seed).integers(0, n_vocab, (n, length)))


def both_logits(path, sequences, tmp_path):
    """Logits of llama.cpp and of lwq, of the same shape."""
    reference = Reference(path)
    want = reference.logits(sequences, N_CTX)
    reference.close()
    assert np.isfinite(want).all()
    assert want.std() > 0.3, "the random model says nothing"
    # ggml's CPU backend looks GELU up in a table of 16-bit floats, whatever the weights.
    got = lwq_logits(path, sequences, tmp_path, "--tabled-gelu")
    assert got.shape == want.shape
    return want, got


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])
def test_logits_agree_with_llama_cpp(name, tmp_path):
    path = (CAUSAL | BOTH_WAYS)[name]().write(tmp_path / f"{name}.gguf")
    want, got = both_logits(path, random_sequences(N_VOCAB, 2), tmp_path)
    kl = kl_divergence(want, got)
    # Both ways every sum runs over the whole sequence, so roundings differ in more terms.
    limit = 1e-6 if name in CAUSAL else 3e-6
    assert kl.max() < limit, f"{name}: worst KL divergence {kl.max():.3g}, mean {kl.mean():.3g}"
    assert (want.argmax(-1) == got.argmax(-1)).all()


@pytest.mark.parametrize("length", [1, 3, 64, 201])
@pytest.mark.parametrize("name", ["qwen35", "qwen3next-ssm-in"])
def test_sequences_end_within_and_at_the_end_of_a_chunk(name, length, tmp_path):
    path = tiny_delta_net.MODELS[name]().write(tmp_path / f"{name}.gguf")
    want, got = both_logits(path, random_sequences(N_VOCAB, 2, length), tmp_path)
    kl = kl_divergence(want, got)
    assert kl.max() < 1e-6, f"{name}: worst KL divergence {kl.max():.3g}, mean {kl.mean():.3g}"


def test_results_do_not_depend_on_threads_or_grouping(tmp_path):
    path = MODELS["mixtral"]().write(tmp_path / "model.gguf")
    sequences = random_sequences(N_VOCAB, 4, 96)
    one = lwq_logits(path, sequences, tmp_path, "--threads", "1")
    assert one.tobytes() == lwq_logits(path, sequences, tmp_path, "--threads", "3").tobytes()
    alone = lwq_logits(path, sequences[2:3], tmp_path)
    assert one[2 * 96 : 3 * 96].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("model", "matrix_type", "only"),
    [
        (llama, GGMLQuantizationType.Q8_0, ""),
        (llama, GGMLQuantizationType.Q5_0, ""),
        (gpt_oss, GGMLQuantizationType.MXFP4, "_exps"),
    ],
)
def test_rounded_activations_come_closer_to_llama_cpp_as_run(model, matrix_type, only, tmp_path):
    # One layer: further ones amplify the last bit of a rounding until even two runs of llama.cpp (with and without
    # flash attention) differ by half of what the rounding itself does.
    path = model(n_layer=1).write(tmp_path / "model.gguf", matrix_type, only)
    sequences = random_sequences(N_VOCAB, 2)
    reference = Reference(path)
    want = reference.logits(sequences, N_CTX, as_run=True)
    reference.close()
    rounded = kl_divergence(want, lwq_logits(path, sequences, tmp_path, "--activations", "ggml")).mean()
    unrounded = kl_divergence(want, lwq_logits(path, sequences, tmp_path)).mean()
    assert rounded < 0.05 * unrounded, f"{rounded:.3g} rounded, {unrounded:.3g} unrounded"


def test_perplexity_agrees_with_llama_perplexity(tmp_path):
    golden = json.loads((DATA / "golden/doclet-eval.json").read_text())["f16"]
    reference = Reference(DOCLET)
    text = (DATA / "golden/eval-sample.txt").read_text().removesuffix("\n")
    tokens = tmp_path / "tokens.i32"
    reference.tokenize(text).astype("<i4").tofile(tokens)
    bos = reference.bos()
    reference.close()
    options = [] if bos is None else ["--bos", bos]
    done = run("dev", "perplexity", DOCLET, "--tokens-file", tokens, "--ctx", N_CTX, *options)
    assert done.returncode == 0, done.stderr.decode()
    ppl, error, scored = map(float, done.stdout.split())
    assert abs(ppl / golden["ppl"] - 1) < 1e-3
    assert abs(error / golden["error"] - 1) < 1e-2
    assert scored == 21463


def broken(change):
    model = llama()
    change(model)
    return model


def rename(model, old, new):
    model.tensors[new] = model.tensors.pop(old)


REFUSED = {
    "unknown architecture": (lambda m: setattr(m, "arch", "mystery"), "nearest is qwen2"),
    "missing tensor": (lambda m: m.tensors.pop("blk.1.attn_k.weight"), "blk.1.attn_k.weight is missing"),
    "missing norm": (lambda m: m.tensors.pop("output_norm.weight"), "output_norm.weight is missing"),
    "transposed": (
        lambda m: m.tensors.update({"blk.0.ffn_up.weight": m.tensors["blk.0.ffn_up.weight"].T.copy()}),
        "blk.0.ffn_up.weight has shape [96, 64]",
    ),
    "extra tensor": (lambda m: m.vector("blk.0.mystery.weight", 4), '"blk.0.mystery.weight" is not part of'),
    "block beyond the count": (
        lambda m: rename(m, "blk.2.attn_norm.weight", "blk.3.attn_norm.weight"),
        "blk.2.attn_norm.weight is missing",
    ),
    "no blocks": (lambda m: m.u32("block_count", 0), "llama.block_count is 0"),
    "too many blocks": (lambda m: m.u32("block_count", 2**32 - 1), "llama.block_count is 4294967295"),
    "no heads": (lambda m: m.u32("attention.head_count", 0), "llama.attention.head_count is 0"),
    "odd heads": (lambda m: m.u32("attention.head_count_kv", 3), "head_count_kv is 3; expected a divisor"),
    "too many kv heads": (lambda m: m.u32("attention.head_count_kv", 8), "head_count_kv is 8; expected a divisor"),
    "NaN epsilon": (lambda m: m.f32("attention.layer_norm_rms_epsilon", float("nan")), "rms_epsilon is NaN"),
    "odd rope": (lambda m: m.u32("rope.dimension_count", 7), "rope.dimension_count is 7"),
    "wide rope": (lambda m: m.u32("rope.dimension_count", 64), "rope.dimension_count is 64"),
    "no context": (lambda m: m.u32("context_length", 0), "context_length is 0"),
    "experts without tensors": (
        lambda m: (m.u32("expert_count", 4), m.u32("expert_used_count", 2)),
        "blk.0.ffn_gate_inp.weight is missing",
    ),
    "more experts used than there are": (
        lambda m: (m.u32("expert_count", 4), m.u32("expert_used_count", 5)),
        "expert_used_count is 5",
    ),
    "vocabulary of another size": (
        lambda m: m.tensors.update({"token_embd.weight": m.tensors["token_embd.weight"][:-1]}),
        "319 rows",
    ),
    "NaN weight": (
        lambda m: m.tensors["blk.1.ffn_down.weight"].__setitem__((3, 4), np.nan),
        "layer 1: blk.1.ffn_down.weight gave NaN",
    ),
    "unknown rope scaling": (lambda m: m.string("rope.scaling.type", "magic"), 'rope.scaling.type is "magic"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_models_are_refused_in_one_line(name, tmp_path):
    change, message = REFUSED[name]
    path = broken(change).write(tmp_path / "model.gguf")
    tokens = tmp_path / "tokens.i32"
    np.arange(8, dtype="<i4").tofile(tokens)
    done = run("dev", "logits", path, "--tokens-file", tokens)
    text = done.stderr.decode()
    assert done.returncode == 1, text
    assert message in text, text
    assert text.count("\n") == 1 and "panicked" not in text, text


def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path):
    path = llama().write(tmp_path / "model.gguf")
    tokens = tmp_path / "tokens.i32"
    np.array([5, N_VOCAB], dtype="<i4").tofile(tokens)
    done = run("dev", "logits", path, "--tokens-file", tokens)
    assert done.returncode == 1
    assert f"token {N_VOCAB} at position 1 is outside" in done.stderr.decode()
