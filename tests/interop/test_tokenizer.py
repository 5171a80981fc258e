"""Token ids against llama.cpp: its own expected ids, and llama-cpp-python on random texts.

The vocabularies `ggml-vocab-*.gguf` are in the source archive of llama-cpp-python, which is downloaded once into
target/vocabs; LWQ_VOCABS names a folder that has them already. The program is target/release/lwq, or LWQ_BIN.

    pytest tests/interop/test_tokenizer.py
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import gguf
import llama_cpp
import pytest

from tokenizer_texts import random_texts

ROOT = pathlib.Path(__file__).resolve().parents[2]
LWQ = os.environ.get("LWQ_BIN", str(ROOT / "target/release/lwq"))
SEED = int(os.environ.get("LWQ_SEED", "1"))
TEXTS = int(os.environ.get("LWQ_TEXTS", "300"))

#: What llama.cpp has shipped for years; a folder without them is not the right one.
NEEDED = {"llama-bpe", "llama-spm", "gpt-2", "qwen2"}

#: The package's llama.cpp is newer than b10605 and merges whole words here; b10605 does not.
CHANGED_SINCE = {"glm4"}
#: llama.cpp aborts on spaces with a vocabulary of another kind; it has a test of its own below.
NEEDS_OWN_VOCABULARY = {"whitespace"}


def vocab_folder():
    if "LWQ_VOCABS" in os.environ:
        return pathlib.Path(os.environ["LWQ_VOCABS"])
    folder = ROOT / "target/vocabs"
    if not all((folder / f"ggml-vocab-{name}.gguf").exists() for name in NEEDED):
        folder.mkdir(parents=True, exist_ok=True)
        version = importlib.metadata.version("llama-cpp-python")
        download = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *download, "-d", str(folder)], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source:
                path = pathlib.PurePath(member.name)
                if path.parent.name == "models" and path.name.startswith("ggml-vocab-"):
                    (folder / path.name).write_bytes(source.extractfile(member).read())
    return folder


VOCABS = {path.stem.removeprefix("ggml-vocab-"): path for path in sorted(vocab_folder().glob("ggml-vocab-*.gguf"))}


def lwq_ids(tmp_path, model, texts, *flags):
    files = []
    for index, text in enumerate(texts):
        (tmp_path / str(index)).write_bytes(text)
        files += ["-f", str(tmp_path / str(index))]
    run = subprocess.run([LWQ, "tokenize", str(model), "--ids", "--bytes", *flags, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def compare(tmp_path, model, texts, pre=None):
    overrides = {"tokenizer.ggml.pre": pre} if pre else None
    reference = llama_cpp.Llama(str(model), vocab_only=True, verbose=False, kv_overrides=overrides)
    flags = ["--pre", pre] if pre else []
    for special in (False, True):
        found = lwq_ids(tmp_path, model, texts, *flags, *(["--parse-special"] if special else []))
        assert len(found) == len(texts)
        for text, ids in zip(texts, found):
            assert ids == reference.tokenize(text, add_bos=True, special=special), (text, special)


def pre_tokenizers():
    message = subprocess.run(
        [LWQ, "tokenize", str(VOCABS["gpt-2"]), "--text", "", "--pre", "nosuch"], capture_output=True, text=True
    ).stderr
    return message.strip().partition("known are ")[2].split()


def test_all_needed_vocabularies_are_there():
    assert NEEDED <= VOCABS.keys()


@pytest.mark.parametrize("name", VOCABS)
def test_shipped_ids(tmp_path, name):
    inputs = VOCABS[name].with_name(VOCABS[name].name + ".inp")
    if not inputs.exists():
        pytest.skip("llama.cpp ships no expected ids for it")
    texts = inputs.read_bytes().split(b"\n__ggml_vocab_test__\n")
    expected = inputs.with_suffix(".out").read_text().split("\n")
    expected = [[int(number) for number in line.split()] for line in expected][: len(texts)]
    assert lwq_ids(tmp_path, VOCABS[name], texts, "--no-bos") == expected


@pytest.mark.parametrize("name", VOCABS)
def test_random_texts(tmp_path, name):
    compare(tmp_path, VOCABS[name], random_texts(SEED, TEXTS))


def test_every_pre_tokenizer_is_tested_here():
    names = pre_tokenizers()
    assert len(names) == len(set(names)) == 87


@pytest.mark.parametrize("pre", sorted(set(pre_tokenizers()) - NEEDS_OWN_VOCABULARY - CHANGED_SINCE))
def test_pre_tokenizer(tmp_path, pre):
    compare(tmp_path, VOCABS["gpt-2"], random_texts(SEED + 1, TEXTS // 2), pre)


class Vocabulary:
    """A small vocabulary file of our own making."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

    def __init__(self, path, model, **keys):
        self.path = path
        self.writer = gguf.GGUFWriter(path, "llama")
        for key in ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"):
            self.writer.add_uint32(f"llama.{key}", 32)
        self.writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        self.writer.add_tokenizer_model(model)
        for key, value in keys.items():
            self.writer.add_key_value(
                key.replace("__", "."),
                value,
                {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}[type(value)],
            )
        self.tokens, self.types, self.scores, self.merges = [], [], [], None

    def add(self, texts, kind=NORMAL, score=0.0):
        for text in texts:
            if text not in self.tokens:
                self.tokens.append(text)
                self.types.append(kind)
                self.scores.append(score)
        return self

    def build(self):
        self.writer.add_token_list(self.tokens)
        self.writer.add_token_types(self.types)
        self.writer.add_token_scores(self.scores)
        if self.merges is not None:
            self.writer.add_token_merges(self.merges)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.close()
        return self.path


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentence_piece(path, **keys):
    vocab = Vocabulary(path, "llama", **keys)
    vocab.add(["<unk>"], Vocabulary.UNKNOWN)
    vocab.add(["<s>", "</s>", "<|endoftext|>", "<|user|>", "<PRE>"], Vocabulary.CONTROL)
    vocab.add(BYTES, Vocabulary.BYTE)
    vocab.add(["<mask>", "  ", "\n\n", "user", "<|im_start|>"], Vocabulary.USER_DEFINED)
    for index, text in enumerate("▁t he ▁the ▁▁ ▁▁▁▁ ll 'l 'll in ing ▁i ▁in aa aaaa ab abab ▁a a▁ ==".split()):
        vocab.add([text], score=-float(index % 7))
    return vocab.add("▁abcdefghilmnoprstu'12=é中", score=-20.0).build()


@pytest.mark.parametrize("name", ["plain", "phi-3"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_with_added_tokens(tmp_path, name, prefix):
    path = sentence_piece(tmp_path / "v.gguf", general__name=name, tokenizer__ggml__add_space_prefix=prefix)
    compare(tmp_path, path, random_texts(SEED + 2, TEXTS))


def test_unigram_with_added_tokens(tmp_path):
    vocab = Vocabulary(
        tmp_path / "v.gguf",
        "t5",
        tokenizer__ggml__add_space_prefix=True,
        tokenizer__ggml__add_bos_token=False,
        general__name="x",
    )
    vocab.add(["<pad>", "</s>"], Vocabulary.CONTROL).add(["<unk>"], Vocabulary.UNKNOWN)
    vocab.add(["<mask>", "user", "naive", "\n\n"], Vocabulary.USER_DEFINED)
    for index, text in enumerate("▁t he ▁the ▁▁ ll 'll ing ▁in aa aaaa ab abab ▁a a▁ ==".split()):
        vocab.add([text], score=-1.0 - index / 3)
    path = vocab.add("▁abcdefghilmnoprstu'12=é中", score=-9.5).build()
    compare(tmp_path, path, random_texts(SEED + 3, TEXTS))


def test_rwkv(tmp_path):
    vocab = Vocabulary(tmp_path / "v.gguf", "rwkv").add(["<s>"], Vocabulary.CONTROL)
    vocab.add([f"\\x{byte:02x}" for byte in range(256)])
    words = ["the", "he", "user", " t", "  ", "\\n\\n", "\\t\\t", "\\\\n", "12", "\\xe4\\xbd\\xa0", "ab", "abab"]
    compare(tmp_path, vocab.add(words).build(), random_texts(SEED + 4, TEXTS))


def test_plamo(tmp_path):
    vocab = Vocabulary(tmp_path / "v.gguf", "plamo2").add(["<|plamo:unk|>"], Vocabulary.UNKNOWN)
    vocab.add(["<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>"], Vocabulary.CONTROL).add(BYTES, Vocabulary.BYTE)
    for index, text in enumerate("the he user t h  e  ab abab aa aaa aaaa 12 1 2 é 中 日本 日本語 a b".split(" ")):
        vocab.add([text], score=-(index * 7 % 13) - 0.5)
    path = vocab.add(["<mask>", "  "], Vocabulary.USER_DEFINED).add(["never"], score=-2500.0).build()
    compare(tmp_path, path, random_texts(SEED + 7, TEXTS) + [b"\xef\xbb\xbfthe", b"never"])


MERGES = ["t h", "th e", "a b", "ab ab", "l l", "' ll", "1 2", "x y", "u s", "e r", "us er", "A C", "G T"]


def test_whitespace(tmp_path):
    vocab = Vocabulary(tmp_path / "v.gguf", "whitespace", tokenizer__ggml__pre="whitespace", tokenizer__ggml__add_bos_token=False)
    vocab.add(["<s>", "</s>"], Vocabulary.CONTROL).add(["<mask>"], Vocabulary.USER_DEFINED).add(BYTES, Vocabulary.BYTE)
    vocab.add("abcdefghilmnoprstuxyACGT'12=é中")
    vocab.add([left_right.replace(" ", "") for left_right in MERGES if left_right != "x y"])
    vocab.merges = MERGES
    compare(tmp_path, vocab.build(), random_texts(SEED + 5, TEXTS))


def byte_characters():
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(0x100 + index) for index in range(256 - len(plain))]


@pytest.mark.parametrize("model", ["gpt2", "hybriddna"])
def test_byte_pairs_with_added_tokens(tmp_path, model):
    vocab = Vocabulary(tmp_path / "v.gguf", model, tokenizer__ggml__pre="jina-v2-de", tokenizer__ggml__add_eos_token=True)
    vocab.add(byte_characters())
    vocab.add([left_right.replace(" ", "") for left_right in MERGES if left_right != "x y"])
    vocab.add(["<mask>", "<PRE>", "</s>", "<|end|>", "user", "  "], Vocabulary.USER_DEFINED)
    vocab.add(["<s>", "<|user|>"], Vocabulary.CONTROL).add(["<unk>"], Vocabulary.UNKNOWN)
    vocab.add(["<dna>", "</dna>", "<oov>"] + [f"{word}\ue000" for word in ("ACGTAC", "ACGTAA", "GTAAAA")])
    vocab.merges = MERGES
    compare(tmp_path, vocab.build(), random_texts(SEED + 6, TEXTS))
