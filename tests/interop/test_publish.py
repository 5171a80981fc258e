"""A repository of the bundled model: its card by a YAML and a Markdown parser, its files by gguf-py."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from gguf import GGUFReader
from markdown_it import MarkdownIt

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")
DATA = Path(__file__).parent.parent / "data"
DOCLET = DATA / "doclet-4m-f16.gguf"
TARGETS = "IQ3_M,IQ3_S,IQ4_NL,Q3_K_L,Q3_K_M,Q3_K_S,Q4_K_M,Q4_K_S,Q5_K_M,Q5_K_S,Q6_K,Q8_0"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("publish") / "out"
    command = [LWQ, "publish", DOCLET, out, "--targets", TARGETS, "--base-model", "org/doclet", "--quiet"]
    command += ["--imatrix-chunks", "16", "--probe-tokens", "1024", "--calibration-tokens", "2048"]
    command += ["--eval-chunks", "16", "--score-from", "64"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return out


@pytest.fixture(scope="module")
def report(repository):
    return json.loads((repository / "report.json").read_text())


@pytest.fixture(scope="module")
def card(repository):
    text = (repository / "README.md").read_text()
    assert text.startswith("---\n")
    front, body = text[4:].split("\n---\n", 1)
    return yaml.safe_load(front), body


def tables(body):
    """Tables of a page: a list of rows, each a dictionary by heading."""
    found, rows, cells, headings = [], None, None, []
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        if token.type == "table_open":
            rows, headings = [], []
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline" and cells is not None:
            cells.append("".join(c.content for c in token.children if c.type in ("text", "code_inline")))
        elif token.type == "tr_close":
            if headings:
                assert len(cells) == len(headings)
                rows.append(dict(zip(headings, cells, strict=True)))
            else:
                headings = cells
            cells = None
        elif token.type == "table_close":
            found.append(rows)
    return found


def size(n):
    value, unit = float(n), 0
    while value >= 1000 and unit < 5:
        value, unit = value / 1000, unit + 1
    return f"{n} B" if unit == 0 else f"{value:.2f} {['B', 'kB', 'MB', 'GB', 'TB', 'PB'][unit]}"


def test_every_file_keeps_up_with_the_standard_file(repository, report):
    assert {f["made_for"] for f in report["files"]} == set(TARGETS.split(","))
    for file in report["files"]:
        standard = file["standard"]
        assert file["size_bytes"] <= standard["size_bytes"], file["file"]
        assert file["mean_kld"] <= standard["mean_kld"], file["file"]
        assert (repository / file["file"]).stat().st_size == file["size_bytes"]
        assert len(GGUFReader(repository / file["file"]).tensors) == len(GGUFReader(DOCLET).tensors)
    # Two bits and more are left to choose between: a plan is worth something there.
    low = [f for f in report["files"] if f["made_for"].startswith(("IQ3", "Q3", "Q4"))]
    assert all(f["standard"]["kld_ratio"] < 0.9 for f in low)


def test_the_front_matter_is_yaml(card, report):
    front, _ = card
    assert front["base_model"] == ["org/doclet"]
    assert (front["quantized_by"], front["pipeline_tag"]) == ("lwq", "text-generation")
    assert front["license"] == report["front_matter"]["license"] == "mit"
    assert {"gguf", "lwq"} <= set(front["tags"])


def test_every_figure_of_the_card_is_that_of_the_report(card, report):
    _, body = card
    files, memory, tried, digests = tables(body)
    base = report["base"]
    assert files[0]["file"] == f"{base['file']} (base)" and files[0]["PPL"] == f"{base['ppl']:.4f} ± {base['ppl_error']:.4f}"
    assert len(files) == 1 + len(report["files"])
    for row, f in zip(files[1:], report["files"], strict=True):
        assert row == {
            "file": f["file"],
            "size": size(f["size_bytes"]),
            "bits/weight": f"{f['bits_per_weight']:.3f}",
            "PPL": f"{f['ppl']:.4f} ± {f['ppl_error']:.4f}",
            "ρ PPL": f"{100 * f['correlation']:.2f} %",
            "mean KLD": f"{f['mean_kld']:.6f} ± {f['mean_kld_error']:.6f}",
            "RMS Δp": f"{100 * f['rms_delta_p']:.3f} %",
            "same top": f"{100 * f['same_top_p']:.2f} %",
            "standard file": size(f["standard"]["size_bytes"]),
            "its KLD": f"{f['standard']['mean_kld']:.6f}",
            "shrinkage": f"{100 * f['standard']['shrinkage']:.2f} %",
            "memory": size(f["memory_bytes"]),
        }
    expected = [{"memory": f"{size(r['memory_bytes'])} and more", "file": r["file"]} for r in report["recommended"]]
    assert memory == expected
    keys = [("for", "made_for"), ("kind", "kind"), ("why not", "reason")]
    for row, t in zip(tried, report["tried"], strict=True):
        assert [row[a] for a, _ in keys] == [t[b] for _, b in keys]
        assert (row["size"], row["mean KLD"]) == (size(t["size_bytes"]), f"{t['mean_kld']:.6f}")
    provenance = report["provenance"]
    named = [base["sha256"], provenance["imatrix"]["sha256"], provenance["measurement"]["sha256"]]
    assert [row["digest"] for row in digests] == named + [t["sha256"] for t in provenance["texts"]]
    assert base["sha256"] == hashlib.sha256(DOCLET.read_bytes()).hexdigest()


def test_links_and_checksums_lead_to_what_is_there(repository, card):
    _, body = card
    links = re.findall(r"\]\(([^)]+)\)", body)
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://huggingface.co/") or (repository / link).is_file(), link
    listed = [line.split("  ", 1) for line in (repository / "SHA256SUMS").read_text().splitlines()]
    for digest, name in listed:
        assert hashlib.sha256((repository / name).read_bytes()).hexdigest() == digest, name
    there = {path.name for path in repository.iterdir() if path.is_file()}
    assert {name for _, name in listed} == there - {"SHA256SUMS"}
