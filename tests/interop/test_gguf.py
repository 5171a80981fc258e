"""Files that gguf-py writes, in both byte orders and several alignments, are read as gguf-py meant them."""

import json
import os
import subprocess

import gguf
import numpy as np
import pytest

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")


def inspect(path):
    done = subprocess.run([LWQ, "inspect", "--tensors", "--json", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write(path, endianess, alignment):
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    pairs = {
        "test.u8": (writer.add_uint8, 200),
        "test.i8": (writer.add_int8, -100),
        "test.u16": (writer.add_uint16, 65_000),
        "test.i16": (writer.add_int16, -30_000),
        "test.u32": (writer.add_uint32, 4_000_000_000),
        "test.i32": (writer.add_int32, -2_000_000_000),
        "test.u64": (writer.add_uint64, 2**63 + 12345),
        "test.i64": (writer.add_int64, -(2**62)),
        "test.f32": (writer.add_float32, 0.15625),
        "test.f64": (writer.add_float64, -1234.5678),
        "test.bool": (writer.add_bool, True),
        "test.str": (writer.add_string, "grün"),
        "test.strings": (writer.add_array, ["<s>", "", "▁a"]),
        "test.ints": (writer.add_array, [1, -2, 3]),
        "test.floats": (writer.add_array, [0.5, -1.0]),
        "test.bools": (writer.add_array, [True, False]),
    }
    for key, (add, value) in pairs.items():
        add(key, value)
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("f16", np.arange(5, dtype=np.float16))
    writer.add_tensor("q8_0", np.zeros((3, 68), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("i32", np.arange(24, dtype=np.int32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {key: value for key, (_, value) in pairs.items()}


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
@pytest.mark.parametrize("endianess", list(gguf.GGUFEndian), ids=lambda endianess: endianess.name)
def test_metadata_and_tensor_table(tmp_path, endianess, alignment):
    path = str(tmp_path / "model.gguf")
    pairs = write(path, endianess, alignment)
    found = inspect(path)
    assert found["big_endian"] == (endianess == gguf.GGUFEndian.BIG)
    assert {key: found["metadata"][key] for key in pairs} == pairs
    keys = ["general.architecture"] + ([] if alignment is None else ["general.alignment"]) + list(pairs)
    assert list(found["metadata"]) == keys

    reader = gguf.GGUFReader(path)
    theirs = [
        {
            "name": tensor.name,
            "type": tensor.tensor_type.name.lower(),
            "shape": [int(dim) for dim in tensor.shape],
            "bytes": int(tensor.n_bytes),
            "offset": int(tensor.data_offset) - reader.data_offset,
        }
        for tensor in reader.tensors
    ]
    ours = [{key: tensor[key] for key in theirs[0]} for tensor in found["tensors"]]
    assert ours == theirs
