"""Gradients at the outputs of the weight matrices: against automatic differentiation by torch of the classes that transformers
has, in double precision (needs the Python of .ci/torch in LWQ_TORCH_PYTHON), and against the loss itself, for every architecture.
"""

import os
import subprocess

import gguf
import hf_families
import numpy as np
import pytest
from conftest import configurations
from test_convert import convert
from test_forward import BOTH_WAYS, CAUSAL, LWQ, lwq_logits
from test_transformers import COMPUTED_OTHERWISE
from test_transformers import NAMES as WITH_CLASS

PYTHON = os.environ.get("LWQ_TORCH_PYTHON")
with_torch = pytest.mark.skipif(not PYTHON, reason="LWQ_TORCH_PYTHON names no Python with torch")

LENGTH = 96
# Pairs of a head beyond the sections of its positions are turned by transformers, and left alone by llama.cpp and lwq.
LIMITS = dict.fromkeys(("qwen35-multimodal", "qwen35moe", "qwen35moe-multimodal"), 1e-3)
NAMES = [name for name in WITH_CLASS if name not in COMPUTED_OTHERWISE]
CHOSEN = {
    "afmoe", "gemma2", "gemma3", "gemma4-moe", "gemma4-small", "granite", "llama", "llama4", "minimax_m2", "mixtral", "olmo2",
    "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen35moe", "qwen3next",
}


def lwq_gradients(path, tokens, folder):
    """The gradients by tensor, [tokens, n_out], and the labels that lwq drew."""
    tokens.astype("<i4").tofile(folder / "tokens.i32")
    out = folder / "gradients"
    out.mkdir()
    command = [LWQ, "dev", "gradients", path, "--tokens-file", folder / "tokens.i32", "--ctx", LENGTH, "--output", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {file.name.removesuffix(".f32"): np.fromfile(file, "<f4").reshape(tokens.size, -1) for file in out.glob("*.f32")}
    return found, np.fromfile(out / "labels.i32", "<i4").reshape(tokens.shape)


@pytest.fixture(scope="session")
def both(request, tmp_path_factory):
    """For every model its GGUF file, lwq's gradients and the folder with torch's."""
    root = tmp_path_factory.mktemp("gradients")
    wanted = [item for item in request.session.items if "both" in getattr(item, "fixturenames", ())]
    made = {}
    for name in sorted({item.callspec.params["name"] for item in wanted}):
        model = hf_families.make(name)
        if model.dtype == "F16":
            # The converter adds one to norms of such a model in its own 16 bits.
            model.dtype = "BF16"
        folder = model.write(root / name)
        path = convert(folder, root / f"{name}.gguf", "--type", "f32")
        tokens = np.random.default_rng(7).integers(0, 250, (2, LENGTH)).astype(np.int32)
        found, labels = lwq_gradients(path, tokens, folder)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "labels.npy", labels)
        made[name] = path, found, folder
    peer = os.path.join(os.path.dirname(__file__), "gradients_peer.py")
    done = subprocess.run([PYTHON, peer, *(folder for _, _, folder in made.values())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


def key(row):
    """Converters change the order of rows, and of columns, and put matrices together: a row is known by its values."""
    return np.sort(np.asarray(row, np.float32)).tobytes()


def torch_rows(folder):
    """The gradient at each row's product, by the row."""
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    arrays = np.load(folder / "gradients.npz")
    rows = {}
    for name in arrays.files:
        module, kind = name.rsplit(" ", 1)
        if kind == "weight":
            gradient = arrays[f"{module} gradient"]
            rows |= {key(row): gradient[:, at] for at, row in enumerate(arrays[name])}
    return rows


@with_torch
@pytest.mark.parametrize("name", configurations(NAMES, CHOSEN))
def test_gradients_agree_with_automatic_differentiation(name, both):
    path, found, folder = both[name]
    expected = torch_rows(folder)
    compared, worst = [], {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name not in found or len(tensor.data.shape) != 2:
            continue
        columns = [expected.get(key(row)) for row in tensor.data]
        if any(column is None for column in columns):
            continue
        want, got = np.stack(columns, -1), found[tensor.name].astype(np.float64)
        worst[tensor.name] = np.linalg.norm(got - want) / np.linalg.norm(want)
        compared.append(tensor.name)
    # Of every layer at least what attention, or the delta net, gives: everything below depends on everything above.
    layers = {tensor.name.split(".")[1] for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk.")}
    outputs = [part for part in compared if "attn_output" in part or "ssm_out" in part]
    assert {part.split(".")[1] for part in outputs} >= {layer for layer in layers if f"blk.{layer}.attn_output.weight" in found}
    assert len(compared) >= 2 * len(outputs), compared
    far = {tensor: error for tensor, error in worst.items() if error >= LIMITS.get(name, 1e-4)}
    assert not far, far


def loss_with_bias(model, bias, values, tokens, labels, folder):
    """Cross entropy of a model with a bias on a matrix."""
    kept = model.tensors.get(bias)
    model.tensors[bias] = ((0 if kept is None else kept) + values).astype(np.float32)
    path = model.write(folder / "moved.gguf")
    if kept is None:
        del model.tensors[bias]
    else:
        model.tensors[bias] = kept
    logits = lwq_logits(path, list(tokens), folder).astype(np.float64)
    return (np.logaddexp.reduce(logits, -1) - logits[np.arange(labels.size), labels.ravel()]).sum()


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])
def test_gradients_are_the_slopes_of_the_loss(name, tmp_path):
    """A bias on the outputs of a matrix of the first layer changes the loss by the sum of the gradients there."""
    model = (CAUSAL | BOTH_WAYS)[name]()
    tokens = np.random.default_rng(3).integers(0, 250, (2, LENGTH)).astype(np.int32)
    found, labels = lwq_gradients(model.write(tmp_path / "model.gguf"), tokens, tmp_path)
    first = [f"blk.0.{part}" for part in ("attn_q", "attn_k", "attn_qkv", "attn_output", "ssm_out", "ffn_down", "ffn_up")]
    matrices = [stem for stem in first if f"{stem}.weight" in found]
    assert matrices
    for stem in matrices:
        gradients = found[f"{stem}.weight"].astype(np.float64)
        direction = gradients.sum(0)
        square = (direction**2).sum()
        if square < 1e-6 * (gradients**2).sum():
            # Keys that are not turned may all move alike: the softmax takes that away.
            continue
        # A step on which a token's experts change tells of that change; a smaller one misses it.
        slopes = []
        for step in (0.02 / square, 0.005 / square):
            above, below = (
                loss_with_bias(model, f"{stem}.bias", sign * step * direction, tokens, labels, tmp_path) for sign in (1, -1)
            )
            slopes.append((above - below) / (2 * step))
            if abs(slopes[-1] / square - 1) < 0.02:
                break
        else:
            raise AssertionError(f"{stem}: {slopes} for {square}")
