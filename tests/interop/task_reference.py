"""Scores of tasks by llama-perplexity's rules, from llama.cpp's logits.

Run as a program, it prints the results that tests/tasks_cli.rs expects:

    python tests/interop/task_reference.py > tests/data/tasks/expected.json
"""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
from llama_reference import Reference, log_softmax

DATA = Path(__file__).parent.parent / "data"
DOCLET = DATA / "doclet-4m-f16.gguf"
TASKS = DATA / "tasks"
N_CTX = 512


def read_hellaswag(path):
    lines = path.read_text().removesuffix("\n").split("\n")
    assert len(lines) % 6 == 0
    return [(lines[i], lines[i + 2 : i + 6], int(lines[i + 1])) for i in range(0, len(lines), 6)]


def read_winogrande(path, compat):
    rows = path.read_text().removesuffix("\n").split("\n")
    if compat:
        rows.pop()
    tasks = []
    for row in rows:
        commas, quoted = [], False
        for at, char in enumerate(row):
            if char == '"':
                quoted = not quoted
            elif char == "," and not quoted:
                commas.append(at)
        a, b, c, d = commas
        sentence = row[a + 1 : b].strip('"')
        before, after = sentence.split("_")
        tasks.append((before, after, [row[b + 1 : c], row[c + 1 : d]], int(row[d + 1 :]) - 1))
    return tasks


def read_binary(path):
    raw = path.read_bytes()
    (n,) = struct.unpack_from("<I", raw)
    at = 4 + 4 * n

    def u32():
        nonlocal at
        at += 4
        return struct.unpack_from("<I", raw, at - 4)[0]

    def string():
        nonlocal at
        length = u32()
        at += length
        return raw[at - length : at].decode()

    def answers():
        count = u32()
        texts = [string() for _ in range(count)]
        return texts, [u32() for _ in range(count)]

    tasks = []
    for index in range(n):
        assert struct.unpack_from("<I", raw, 4 + 4 * index)[0] == at
        question = string()
        texts, labels = answers()
        answers()
        tasks.append((question, texts, labels.index(1)))
    return tasks


def write_binary(tasks, path):
    """`tasks` are objects of multiple-choice.jsonl."""

    def string(text):
        return struct.pack("<I", len(text.encode())) + text.encode()

    blobs = []
    for task in tasks:
        choices = task["choices"]
        blob = string(task["question"]) + struct.pack("<I", len(choices)) + b"".join(map(string, choices))
        blob += b"".join(struct.pack("<i", int(i == task["answer"])) for i in range(len(choices)))
        blobs.append(blob + struct.pack("<I", 0))
    places = np.cumsum([4 + 4 * len(blobs)] + [len(blob) for blob in blobs])[:-1]
    path.write_bytes(struct.pack(f"<I{len(blobs)}I", len(blobs), *places) + b"".join(blobs))


def random_numbers():
    """std::mt19937(1)."""
    bits = np.random.MT19937()
    bits._legacy_seeding(1)
    while True:
        yield int(bits.random_raw())


def hellaswag_order(total, count):
    """std::uniform_int_distribution of libstdc++ over what is left."""
    numbers, left, order = random_numbers(), list(range(total)), []
    for _ in range(min(count, total)):
        n = len(left)
        product = next(numbers) * n
        if product % 2**32 < n:
            while product % 2**32 < (2**32 - n) % n:
                product = next(numbers) * n
        order.append(left.pop(product >> 32))
    return order


def drawn(total, count):
    """The draw of WinoGrande and multiple choice."""
    if count >= total:
        return list(range(total))
    numbers, left, order = random_numbers(), list(range(total)), []
    for _ in range(count):
        at = int(np.float32(2.0**-32) * np.float32(next(numbers)) * np.float32(len(left)))
        order.append(left[at])
        left[at] = left[-1]
        left.pop()
    return order


class Scorer:
    known = {}
    """Rows by model, mode and sequence: the same sequences are wanted by several tests."""

    def __init__(self, path, as_run):
        self.reference = Reference(path)
        self.path, self.as_run = path, as_run

    def tokens(self, text):
        return list(self.reference.tokenize(text))

    def rows(self, sequence):
        """Log-probabilities of every token of the vocabulary after each position."""
        key = (self.path, self.as_run, tuple(sequence))
        if key not in self.known:
            self.known[key] = log_softmax(self.reference.logits([sequence], N_CTX, self.as_run))
        return self.known[key]

    def mean_of_endings(self, context, endings):
        """HellaSwag and multiple choice: means after the common prefix, and per byte after the context."""
        sequences = [self.tokens(f"{context} {ending}") for ending in endings]
        common = min(common_prefix(sequences), min(map(len, sequences)) - 1)
        context_tokens = self.tokens(context)
        means, norms = [], []
        for sequence, ending in zip(sequences, endings, strict=True):
            rows = self.rows(sequence)
            own = common_prefix([context_tokens, sequence])
            log_probs = [rows[i - 1][sequence[i]] for i in range(len(sequence)) if i > 0]
            means.append(float(np.mean(log_probs[common - 1 :])))
            norms.append(float(np.sum(log_probs[own - 1 :])) / len(ending.encode()))
        return means, norms

    def winogrande(self, before, after, choices, compat):
        sequences = [self.tokens(before + choice + after) for choice in choices]
        bases = [len(self.tokens(before + choice)) for choice in choices]
        common = common_prefix(sequences)
        rows = [self.rows(sequence) for sequence in sequences]
        skip_choice = all(len(s) - common > 3 for s in sequences)
        if not compat and any(base >= len(s) for base, s in zip(bases, sequences, strict=True)):
            skip_choice = False
        scores = []
        for which, sequence in enumerate(sequences):
            start = bases[which] if skip_choice else common
            if start >= len(sequence):
                scores.append(math.nan)
                continue
            end = len(sequence) - 1 if len(sequence) - start > 1 else len(sequence)
            log_probs = []
            for i in range(start, end):
                row = rows[which][i - 1]
                if compat and which == 1 and i == start == common:
                    row = rows[0][-1]
                log_probs.append(row[sequence[i]])
            scores.append(float(np.mean(log_probs)))
        return scores


def common_prefix(sequences):
    length = 0
    for tokens in zip(*sequences, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        length += 1
    return length


def best(scores):
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def score_all(path, kind, compat, count=None, as_run=False):
    """Results as `lwq eval KIND --details --json` has them."""
    scorer = Scorer(path, as_run)
    results = []
    if kind == "winogrande":
        tasks = read_winogrande(TASKS / "winogrande.csv", compat)
        for index in drawn(len(tasks), count or len(tasks)):
            before, after, choices, right = tasks[index]
            scores = scorer.winogrande(before, after, choices, compat)
            chosen = 0 if scores[0] > scores[1] else 1
            scores = [None if math.isnan(s) else s for s in scores]
            results.append({"task": index + 1, "chosen": chosen, "correct": chosen == right, "scores": scores})
    else:
        if kind == "hellaswag":
            tasks = read_hellaswag(TASKS / "hellaswag.txt")
            order = hellaswag_order(len(tasks), count or 400) if compat else range(len(tasks))
        else:
            tasks = read_binary(TASKS / "multiple-choice.bin")
            order = drawn(len(tasks), count or len(tasks))
        for index in order:
            context, endings, right = tasks[index]
            means, norms = scorer.mean_of_endings(context, endings)
            chosen, chosen_norm = best(means), best(norms)
            results.append(
                {
                    "task": index + 1,
                    "chosen": chosen,
                    "correct": chosen == right,
                    "chosen_norm": chosen_norm,
                    "correct_norm": chosen_norm == right,
                    "scores": means,
                    "scores_norm": norms,
                }
            )
    scorer.reference.close()
    return results


KINDS = {"hellaswag": "hellaswag.txt", "winogrande": "winogrande.csv", "multiple-choice": "multiple-choice.bin"}


def main():
    source = (TASKS / "multiple-choice.jsonl").read_text().splitlines()
    write_binary(map(json.loads, source), TASKS / "multiple-choice.bin")
    expected = {
        kind: {mode: score_all(DOCLET, kind, mode == "llama_compat") for mode in ("default", "llama_compat")}
        for kind in KINDS
    }
    rounded = json.loads(json.dumps(expected), parse_float=lambda text: round(float(text), 6))
    lines = json.dumps(rounded, indent=1)
    # One line a list of scores.
    print(re.sub(r"\[\s+([-\d.,\s]|null)+\]", lambda found: " ".join(found.group().split()), lines))


if __name__ == "__main__":
    main()
