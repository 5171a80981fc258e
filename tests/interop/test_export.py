"""`lwq export` in every scheme, loaded by transformers and compressed-tensors on CPU: nothing missing or unexpected, weights bit by
bit those of the format's definition, logits close to a model with these weights.

torch, transformers 5.17 and compressed-tensors 0.19 are in a Python of their own, which LWQ_TORCH_PYTHON names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_convert import LWQ

TORCH = os.environ.get("LWQ_TORCH_PYTHON")
DATA = Path(__file__).parents[1] / "data"
SCHEMES = {
    "W4A16": [], "W4A16-g32": ["--group-size", "32"], "W4A16-channel": ["--group-size", "channel"], "W4A16_ASYM": [],
    "W8A16": [], "W8A16-channel": ["--group-size", "channel"], "W8A8": [], "FP8_DYNAMIC": [], "FP8_BLOCK": [],
    "NVFP4A16": [], "MXFP4A16": [],
    # Scales may be negative here.
    "W4A16-search": ["--rounding", "search"],
}

pytestmark = pytest.mark.skipif(not TORCH, reason="LWQ_TORCH_PYTHON names no Python with torch and compressed-tensors")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def doclet(tmp_path_factory):
    """The bundled model as a folder of transformers, made from its GGUF."""
    folder = tmp_path_factory.mktemp("export") / "doclet"
    run(TORCH, Path(__file__).with_name("export_loading.py"), "folder", DATA / "doclet-4m-f16.gguf", folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_scheme_loads_with_the_values_that_lwq_reads(doclet, tmp_path, dtype):
    source = tmp_path / dtype
    run(TORCH, Path(__file__).with_name("export_loading.py"), "cast", doclet, source, dtype)
    folders = []
    for case, options in SCHEMES.items():
        output = tmp_path / case
        scheme = case.split("-")[0]
        rounding = [] if "--rounding" in options else ["--rounding", "rtn"]
        run(LWQ, "export", source, output, "--scheme", scheme, "--quiet", *rounding, *options)
        checked = json.loads(run(LWQ, "export", source, output, "--check", "--json"))
        (tmp_path / f"{case}.json").write_text(json.dumps(checked))
        folders.append(output)
    print(run(TORCH, Path(__file__).with_name("export_loading.py"), "load", source, *folders))
