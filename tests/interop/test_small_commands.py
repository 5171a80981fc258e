"""Other programs read what split, merge, edit and extract write, and agree on what hash says."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_reference import Reference
from safetensors.numpy import load_file

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
ROOT = Path(__file__).resolve().parents[2]
DOCLET = ROOT / "tests/data/doclet-4m-f16.gguf"
PROMPT = "The function returns"


def lwq(*arguments):
    done = subprocess.run([LWQ, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits(path):
    reference = Reference(path)
    ids = reference.tokenize(PROMPT)
    found = reference.logits([ids], 64)
    reference.close()
    return found


def fields(path):
    """All keys with their values, but those that gguf-py makes of the header itself."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("limit", [("--max-size", "2MB"), ("--max-tensors", "20", "--no-tensor-first-split")])
def test_llama_cpp_loads_the_parts_and_the_merged_file(tmp_path, limit):
    report = json.loads(lwq("split", DOCLET, tmp_path / "doclet", *limit, "--json"))
    parts = [part["file"] for part in report["parts"]]
    assert len(parts) > 1
    np.testing.assert_array_equal(logits(parts[0]), logits(DOCLET))
    whole = tmp_path / "whole.gguf"
    lwq("merge", parts[-1], whole)
    assert whole.read_bytes() == DOCLET.read_bytes()


def test_parts_have_the_keys_that_gguf_py_knows(tmp_path):
    lwq("split", DOCLET, tmp_path / "doclet", "--max-tensors", "30")
    parts = sorted(tmp_path.glob("doclet-*.gguf"))
    total = 0
    for number, part in enumerate(parts):
        found = fields(part)
        assert (found[gguf.Keys.Split.LLM_KV_SPLIT_NO], found[gguf.Keys.Split.LLM_KV_SPLIT_COUNT]) == (number, len(parts))
        total += len(gguf.GGUFReader(part).tensors)
    assert total == found[gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT] == len(gguf.GGUFReader(DOCLET).tensors)


@pytest.mark.parametrize("place", ["new", "in place"])
def test_gguf_py_reads_edited_files(tmp_path, place):
    path = tmp_path / "edited.gguf"
    changes = ["--set", "llama.context_length=int:321"]
    if place == "new":
        template = tmp_path / "template.jinja"
        template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}ü")
        lwq("edit", DOCLET, "-o", path, *changes, "--chat-template", template, "--set", "a.new=f64:0.25")
    else:
        path.write_bytes(DOCLET.read_bytes())
        lwq("edit", path, "--in-place", *changes)
    expected = fields(DOCLET)
    expected["llama.context_length"] = 321
    if place == "new":
        expected["tokenizer.chat_template"] = template.read_text()
        expected["a.new"] = 0.25
    assert fields(path) == expected
    for ours, theirs in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(DOCLET).tensors, strict=True):
        assert (ours.name, ours.data.tobytes()) == (theirs.name, theirs.data.tobytes())
    np.testing.assert_array_equal(logits(path), logits(DOCLET))


def test_hash_lines_are_digests_of_the_data_that_gguf_py_reads():
    lines = lwq("hash", DOCLET, "--tensors").splitlines()
    found = {line.split()[3]: line.split()[0] for line in lines}
    expected = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(DOCLET).tensors}
    assert found == expected


def decoded(path):
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("target", ["Q4_K_M", "F16"])
def test_numpy_and_safetensors_read_what_extract_writes(tmp_path, target):
    model = DOCLET
    if target != "F16":
        model = tmp_path / "model.gguf"
        lwq("quantize", DOCLET, model, target)
    expected = decoded(model)
    lwq("extract", model, "-o", tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values.reshape(found[name].shape))
    lwq("extract", model, "-o", tmp_path / "folder")
    for name, values in expected.items():
        array = np.load(tmp_path / "folder" / f"{name}.npy")
        assert array.dtype == np.float32 and array.shape == found[name].shape
        np.testing.assert_array_equal(array, found[name])


def test_kept_types_are_numpys_own(tmp_path):
    lwq("extract", DOCLET, "^token_embd", "-o", tmp_path / "e.npy", "--keep-types")
    array = np.load(tmp_path / "e.npy")
    tensor = next(t for t in gguf.GGUFReader(DOCLET).tensors if t.name == "token_embd.weight")
    assert array.dtype == np.float16
    np.testing.assert_array_equal(array, tensor.data.reshape(array.shape))


def test_diff_gives_the_error_that_numpy_computes(tmp_path):
    model = tmp_path / "model.gguf"
    lwq("quantize", DOCLET, model, "Q4_K_M")
    a, b = decoded(DOCLET), decoded(model)
    rows = json.loads(lwq("diff", DOCLET, model, "--json"))["tensors"]
    assert rows
    for row in rows:
        x, y = (tensors[row["name"]].astype(np.float64) for tensors in (a, b))
        expected = np.sqrt(((y - x) ** 2).sum() / (x**2).sum())
        np.testing.assert_allclose(row["relative_rms_error"], expected, rtol=1e-9)
