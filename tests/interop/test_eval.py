"""Perplexity, KL divergence and saved logits against llama.cpp's own logits and an independent reader and writer."""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from llama_reference import Reference, log_softmax

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
DATA = Path(__file__).parent.parent / "data"
DOCLET = DATA / "doclet-4m-f16.gguf"
TEXT = DATA / "golden/eval-sample.txt"
N_CTX, CHUNKS = 256, 8
FIRST = N_CTX // 2


def run(*args):
    done = subprocess.run([LWQ, *map(str, args), "--json", "--quiet"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "q.gguf"
    run("quantize", DOCLET, path, "--target", "Q3_K_M", "--imatrix", DATA / "golden/doclet.imatrix.gguf")
    return path


def windows(reference):
    tokens = reference.tokenize(TEXT.read_text().removesuffix("\n"))
    chunks = [tokens[i * N_CTX : (i + 1) * N_CTX].copy() for i in range(CHUNKS)]
    seen = [chunk.copy() for chunk in chunks]
    if reference.bos() is not None:
        for chunk in seen:
            chunk[0] = reference.bos()
    return tokens, chunks, seen


def logits_of(path, as_run):
    reference = Reference(path)
    tokens, chunks, seen = windows(reference)
    logits = reference.logits(seen, N_CTX, as_run=as_run).reshape(CHUNKS, N_CTX, -1)
    reference.close()
    return tokens, chunks, logits


def scored(logits):
    """Rows whose predictions count, [chunks * rows, vocabulary]."""
    return logits[:, FIRST : N_CTX - 1].reshape(-1, logits.shape[-1])


def targets(chunks):
    return np.concatenate([chunk[FIRST + 1 :] for chunk in chunks])


def test_figures_follow_from_the_logits_of_llama_cpp(quantized):
    _, chunks, base = logits_of(DOCLET, as_run=True)
    _, _, other = logits_of(quantized, as_run=True)
    p, q = log_softmax(scored(base)), log_softmax(scored(other))
    follows = targets(chunks)
    rows = np.arange(len(follows))
    found = run("eval", "kld", quantized, "--base", DOCLET, "-f", TEXT, "--chunks", CHUNKS, "--activations", "ggml")
    kld = (np.exp(p) * (p - q)).sum(-1)
    assert found["tokens"] == len(follows)
    assert found["mean_kld"] == pytest.approx(kld.mean(), rel=0.02)
    assert found["median_kld"] == pytest.approx(np.median(kld), rel=0.03)
    assert found["ppl"] == pytest.approx(np.exp(-q[rows, follows].mean()), rel=2e-3)
    assert found["ppl_base"] == pytest.approx(np.exp(-p[rows, follows].mean()), rel=1e-3)
    delta = np.exp(q[rows, follows]) - np.exp(p[rows, follows])
    assert found["rms_delta_p"] == pytest.approx(np.sqrt((delta**2).mean()), rel=0.02)
    assert found["mean_delta_p"] == pytest.approx(delta.mean(), abs=1e-3)
    assert found["same_top_p"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=0.006)
    assert found["correlation"] == pytest.approx(np.corrcoef(p[rows, follows], q[rows, follows])[0, 1], abs=2e-3)


def test_strided_perplexity_follows_from_the_logits_of_llama_cpp():
    reference = Reference(DOCLET)
    tokens = reference.tokenize(TEXT.read_text().removesuffix("\n"))
    stride, count = 48, 10
    n_ctx = 128 + stride // 2
    sequences = [tokens[i * stride : i * stride + n_ctx] for i in range(count)]
    logp = log_softmax(reference.logits(sequences, n_ctx)).reshape(count, n_ctx, -1)
    reference.close()
    nll = []
    for i in range(count):
        for j in range(n_ctx - stride - 1, n_ctx - 1):
            nll.append(-logp[i, j, tokens[i * stride + j + 1]])
    found = run("eval", "ppl", DOCLET, "-f", TEXT, "-c", 128, "--ppl-stride", stride, "--chunks", count)
    assert found["tokens"] == len(nll)
    assert found["ppl"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def encode(row):
    """One distribution as llama-perplexity stores it."""
    row = row.astype(np.float32)
    high = row.max()
    low = max(row.min(), high - np.float32(16))
    total = np.float32(np.log(np.exp(row - high).sum(dtype=np.float64)))
    scale = np.float32((high - low) / np.float32(65535))
    q = np.where(row > low, np.rint((np.float32(1) / scale) * (row - low)), 0).astype("<u2")
    padding = b"\0\0" * (len(row) % 2)
    return struct.pack("<ff", scale, low - high - total) + q.tobytes() + padding


def decode(path):
    raw = path.read_bytes()
    assert raw[:8] == b"_logits_"
    n_ctx, n_vocab, n_chunk = struct.unpack_from("<iii", raw, 8)
    tokens = np.frombuffer(raw, "<i4", n_chunk * n_ctx, 20)
    size = 2 * (2 * ((n_vocab + 1) // 2) + 4)
    records = np.frombuffer(raw, np.uint8, offset=20 + 4 * len(tokens)).reshape(-1, size)
    head = records[:, :8].copy().view("<f4")
    q = records[:, 8 : 8 + 2 * n_vocab].copy().view("<u2").astype(np.float32)
    return n_ctx, n_vocab, tokens, head[:, :1] * q + head[:, 1:]


def test_a_file_made_from_llama_cpp_logits_is_read(quantized, tmp_path):
    tokens, chunks, base = logits_of(DOCLET, as_run=True)
    _, _, other = logits_of(quantized, as_run=True)
    path = tmp_path / "base.kld"
    with path.open("wb") as out:
        out.write(b"_logits_" + struct.pack("<iii", N_CTX, base.shape[-1], CHUNKS))
        out.write(tokens[: CHUNKS * N_CTX].astype("<i4").tobytes())
        for row in scored(base):
            out.write(encode(row))
    b = decode(path)[3].astype(np.float64)
    q = log_softmax(scored(other))
    kld = np.where(b > -16, np.exp(b) * (b - q), 0).sum(-1)
    found = run("eval", "kld", quantized, "--base-logits", path, "--activations", "ggml")
    assert found["tokens"] == len(kld)
    assert found["mean_kld"] == pytest.approx(kld.mean(), rel=0.02)
    assert found["ppl_base"] == pytest.approx(np.exp(-b[np.arange(len(b)), targets(chunks)].mean()), rel=1e-5)


def test_a_saved_file_holds_the_distributions_of_llama_cpp(tmp_path):
    path = tmp_path / "base.kld"
    options = ("--chunks", CHUNKS, "--activations", "ggml")
    run("eval", "ppl", DOCLET, "-f", TEXT, *options, "--save-logits", path)
    tokens, _, base = logits_of(DOCLET, as_run=True)
    n_ctx, n_vocab, stored, logp = decode(path)
    assert (n_ctx, n_vocab) == (N_CTX, base.shape[-1])
    assert (stored == tokens[: CHUNKS * N_CTX]).all()
    want = log_softmax(scored(base))
    floor = logp.max(-1, keepdims=True) - 16
    difference = np.abs(np.maximum(want, floor) - logp)
    # Half a step of the 16 bits is 1.2e-4; the rest is llama.cpp's 16-bit attention.
    assert difference.mean() < 1e-3 and difference.max() < 0.02
    assert np.abs((np.exp(want) * (want - logp)).sum(-1)).mean() < 1e-4
