"""Tasks: choices and scores against llama-perplexity's rules on llama.cpp's logits."""

import json
import os
import subprocess

import pytest
from task_reference import DATA, DOCLET, KINDS, TASKS, score_all

LWQ = os.environ.get("LWQ_BIN", "target/release/lwq")


def evaluate(kind, *options):
    done = subprocess.run(
        [LWQ, "eval", kind, DOCLET, TASKS / KINDS[kind], "--details", "--json", "--quiet", *map(str, options)],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def check(report, expected, tolerance):
    assert [r["task"] for r in report["results"]] == [r["task"] for r in expected]
    for got, want in zip(report["results"], expected, strict=True):
        for key in ("scores", "scores_norm"):
            assert (key in got) == (key in want)
            for a, b in zip(got.get(key, []), want.get(key, []), strict=True):
                assert (a is None) == (b is None), (got, want)
                assert a is None or abs(a - b) < tolerance, (got, want)
        for key in ("chosen", "correct", "chosen_norm", "correct_norm"):
            assert got.get(key) == want.get(key), (got, want)
    n = len(expected)
    accuracy = sum(r["correct"] for r in expected) / n
    assert report["accuracy"] == pytest.approx(accuracy)
    assert report["accuracy_error"] == pytest.approx((accuracy * (1 - accuracy) / (n - 1)) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compat", [False, True], ids=["default", "compat"])
def test_choices_and_scores_agree_with_llama_cpp(kind, compat):
    expected = score_all(DOCLET, kind, compat)
    check(evaluate(kind, *["--llama-compat"] * compat), expected, 3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_some_tasks_are_drawn_as_llama_perplexity_does(kind):
    expected = score_all(DOCLET, kind, True, count=5)
    check(evaluate(kind, "--llama-compat", "--tasks", 5), expected, 3e-3)


def test_the_stored_results_are_those_of_the_reference():
    stored = json.loads((DATA / "tasks/expected.json").read_text())
    for got, want in zip(stored["winogrande"]["default"], score_all(DOCLET, "winogrande", False), strict=True):
        assert got["chosen"] == want["chosen"]
        # llama.cpp's own sums differ by as much from processor to processor.
        assert got["scores"] == pytest.approx(want["scores"], abs=3e-3)
