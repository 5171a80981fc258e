"""Every tensor type against ggml: the same rows through ggml_quantize_chunk and through `lwq dev quantize-rows`.

Bytes must be equal with and without importance weights, and decoded floats must be equal bit for bit.

The reference is libggml-base.so of the PyPI package libggml-python (0.20.2 was seen to give b10605's bytes), or
the library that LWQ_GGML_LIB names. The program is target/release/lwq, or what LWQ_BIN names.

    pytest tests/interop/test_quant.py
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
import subprocess
import tempfile

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LWQ = os.environ.get("LWQ_BIN", str(ROOT / "target/release/lwq"))

ROW_LEN = 1024
#: 2560 rows of 1024 weights are 10,240 blocks of 256, the largest block, and more of the others.
ROWS = 2560
RANDOM_BLOCKS = 4096

#: ggml refuses to quantize these without importance weights.
NEEDS_IMPORTANCE = {"iq2_xxs", "iq2_xs", "iq1_s"}

#: ggml calls abort() when a group finds no point on these types' grids, as happens once products of weights overflow.
ON_GRID = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
OVERFLOWING = {"huge"}


def ggml_path():
    if "LWQ_GGML_LIB" in os.environ:
        return os.environ["LWQ_GGML_LIB"]
    package = importlib.util.find_spec("libggml")
    if package is None:
        raise SystemExit("pip install libggml-python, or set LWQ_GGML_LIB to libggml-base.so")
    (folder,) = package.submodule_search_locations
    return str(pathlib.Path(folder) / "lib64" / "libggml-base.so")


FLOATS = ctypes.POINTER(ctypes.c_float)
TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, FLOATS, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    ]


@functools.cache
def ggml():
    lib = ctypes.CDLL(ggml_path())
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [FLOATS]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    return lib


def floats(array):
    return array.ctypes.data_as(FLOATS)


class Type:
    """One line of `lwq dev types`."""

    def __init__(self, line):
        self.name, number, block_len, block_bytes, self.access = line.split()
        self.id, self.block_len, self.block_bytes = int(number), int(block_len), int(block_bytes)

    def ggml_quantize(self, rows, importance):
        ggml().ggml_quantize_init(self.id)
        out = np.zeros(rows.size // self.block_len * self.block_bytes, np.uint8)
        weights = None if importance is None else floats(importance)
        size = ggml().ggml_quantize_chunk(self.id, floats(rows), out.ctypes.data, 0, *rows.shape, weights)
        assert size == out.size
        return out

    def ggml_dequantize(self, blocks):
        values = blocks.size // self.block_bytes * self.block_len
        if self.name == "f32":
            return blocks.view(np.float32)
        out = np.empty(values, np.float32)
        if self.name == "q8_K":  # to_float is null
            ggml().dequantize_row_q8_K(ctypes.c_void_p(blocks.ctypes.data), floats(out), ctypes.c_int64(values))
        else:
            ggml().ggml_get_type_traits(self.id).contents.to_float(blocks.ctypes.data, floats(out), values)
        return out

    def lwq_quantize(self, rows, importance):
        arguments = ["quantize-rows", "--type", self.name, "--row-len", str(rows.shape[1])]
        if importance is None:
            return lwq(arguments, rows)
        with tempfile.NamedTemporaryFile() as file:
            file.write(importance.tobytes())
            file.flush()
            return lwq(arguments + ["--importance", file.name], rows)

    def lwq_dequantize(self, blocks):
        return lwq(["dequantize-rows", "--type", self.name], blocks).view(np.float32)


def lwq(arguments, array):
    run = subprocess.run([LWQ, "dev", *arguments], input=array.tobytes(), capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    return np.frombuffer(run.stdout, np.uint8).copy()


@functools.cache
def types():
    listing = subprocess.run([LWQ, "dev", "types"], capture_output=True, check=True, text=True).stdout
    return [Type(line) for line in listing.splitlines()]


def gaussian(rng, n):
    return rng.normal(size=(n, ROW_LEN)) * np.exp(rng.normal(size=(n, 1)) * 2 - 3)


def one_outlier(rng, n):
    rows = gaussian(rng, n)
    rows[np.arange(n), rng.integers(ROW_LEN, size=n)] *= 10 ** rng.uniform(1, 5, n)
    return rows


def alternating(rng, n):
    signs = np.where(np.arange(ROW_LEN) % 2 == 0, 1.0, -1.0)
    magnitudes = np.abs(gaussian(rng, n))
    magnitudes[: n // 2] = magnitudes[: n // 2, :1]
    return magnitudes * signs


def sparse(rng, n):
    rows = gaussian(rng, n) * (rng.random((n, ROW_LEN)) < rng.uniform(0.001, 0.3, (n, 1)))
    rows[:, ::7] *= -1.0  # minus zeros
    return rows


def mixed_exponents(rng, n):
    """Neighbouring groups of 16 weights that differ by many orders of magnitude."""
    powers = np.repeat(rng.uniform(-12, 3, (n, ROW_LEN // 16)), 16, axis=1)
    return rng.normal(size=(n, ROW_LEN)) * 10**powers


#: name -> (rng, number of rows) -> rows
DISTRIBUTIONS = {
    "gaussian": gaussian,
    "heavy-tailed": lambda rng, n: rng.standard_t(1.5, size=(n, ROW_LEN)) * 0.02,
    "laplace-shifted": lambda rng, n: rng.laplace(size=(n, ROW_LEN)) * 0.05 + rng.normal(size=(n, 1)),
    "constant": lambda rng, n: np.broadcast_to(gaussian(rng, n)[:, :1], (n, ROW_LEN)),
    "zero": lambda rng, n: np.zeros((n, ROW_LEN)) * np.where(np.arange(n) % 2 == 0, 1.0, -1.0)[:, None],
    "one-outlier": one_outlier,
    "denormal": lambda rng, n: rng.normal(size=(n, ROW_LEN)) * 10 ** rng.uniform(-44, -37, (n, 1)),
    "tiny": lambda rng, n: rng.normal(size=(n, ROW_LEN)) * 10 ** rng.uniform(-37, -6, (n, 1)),
    "large": lambda rng, n: rng.normal(size=(n, ROW_LEN)) * 10 ** rng.uniform(1, 5, (n, 1)),
    "huge": lambda rng, n: rng.uniform(-1, 1, size=(n, ROW_LEN)) * 10 ** rng.uniform(5, 38.5, (n, 1)),
    "alternating-sign": alternating,
    "sparse": sparse,
    "mixed-exponents": mixed_exponents,
    "one-sided": lambda rng, n: np.abs(gaussian(rng, n)) * rng.choice([-1.0, 1.0], (n, 1)),
    "small-integers": lambda rng, n: rng.integers(-8, 9, size=(n, ROW_LEN)) * 2.0 ** rng.integers(-8, 3, (n, 1)),
    "ramp": lambda rng, n: np.linspace(-1, 1, ROW_LEN) * rng.normal(size=(n, 1)),
}


def already_quantized(ty, rng, n):
    """What decoding this type, and Q8_0 in every other row, yields."""
    rows = gaussian(rng, n).astype(np.float32)
    importance = np.ones(ROW_LEN, np.float32)
    own = ty.ggml_dequantize(ty.ggml_quantize(rows, importance)).reshape(rows.shape).copy()
    q8_0 = next(other for other in types() if other.name == "q8_0")
    own[1::2] = q8_0.ggml_dequantize(q8_0.ggml_quantize(rows[1::2].copy(), None)).reshape(rows[1::2].shape)
    return own


def rows_of(ty, kind, count):
    rng = np.random.default_rng([sum(kind.encode()), count])
    if kind == "already-quantized":
        rows = already_quantized(ty, rng, count)
    else:
        rows = DISTRIBUTIONS[kind](rng, count)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, np.float32)
    limit = np.float32(3.4e38)
    return np.clip(rows, -limit, limit)


KINDS = [*DISTRIBUTIONS, "already-quantized"]


def one_hot(rng):
    weights = np.zeros(ROW_LEN, np.float32)
    weights[rng.integers(ROW_LEN)] = 3.5
    return weights


IMPORTANCE = {
    "log-normal": lambda rng: np.exp(rng.normal(size=ROW_LEN) * 2).astype(np.float32),
    "zero": lambda rng: np.zeros(ROW_LEN, np.float32),
    "one-hot": one_hot,
    "constant": lambda rng: np.full(ROW_LEN, 0.37, np.float32),
    "half-zero": lambda rng: np.repeat((rng.random(ROW_LEN // 8) < 0.5) * rng.random(ROW_LEN // 8), 8).astype(np.float32),
    "tiny": lambda rng: (rng.random(ROW_LEN) * 1e-38).astype(np.float32),
}


def assert_same_blocks(ty, rows, importance):
    expected = ty.ggml_quantize(rows, importance)
    found = ty.lwq_quantize(rows, importance)
    wrong = np.flatnonzero((expected != found).reshape(-1, ty.block_bytes).any(axis=1))
    if wrong.size:
        block = wrong[0]
        span = slice(block * ty.block_bytes, (block + 1) * ty.block_bytes)
        weights = rows.reshape(-1, ty.block_len)[block]
        pytest.fail(
            f"{ty.name}: {wrong.size} of {expected.size // ty.block_bytes} blocks differ, first {block}\n"
            f"ggml {expected[span].tobytes().hex()}\nlwq  {found[span].tobytes().hex()}\nweights {weights.tolist()}"
        )
    return expected


def assert_same_floats(ty, blocks):
    expected, found = ty.ggml_dequantize(blocks), ty.lwq_dequantize(blocks)
    differs = expected.view(np.uint32) != found.view(np.uint32)
    # Which NaN of two operands survives an addition is the compiler's choice.
    differs &= ~(np.isnan(expected) & np.isnan(found))
    assert not differs.any(), f"{ty.name}: first at weight {np.flatnonzero(differs)[0]}"


def writable():
    return [ty for ty in types() if ty.access == "rw"]


def ggml_aborts(ty, kind):
    return ty.name in ON_GRID and kind in OVERFLOWING


def shares(total, parts):
    """`total` rows over `parts` cases, none left out."""
    return -(-total // parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ty", writable(), ids=lambda ty: ty.name)
def test_without_importance(ty, kind):
    if ty.name in NEEDS_IMPORTANCE:
        pytest.skip("ggml needs importance weights for this type")
    rows = rows_of(ty, kind, shares(ROWS, len(KINDS)))
    if ggml_aborts(ty, kind):
        ty.lwq_quantize(rows, None)  # must not fail
        return
    assert_same_floats(ty, assert_same_blocks(ty, rows, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ty", writable(), ids=lambda ty: ty.name)
def test_with_importance(ty, kind):
    rng = np.random.default_rng(len(kind))
    rows = rows_of(ty, kind, shares(shares(ROWS, len(KINDS)), len(IMPORTANCE)))
    for make in IMPORTANCE.values():
        if ggml_aborts(ty, kind):
            ty.lwq_quantize(rows, make(rng))  # must not fail
            continue
        assert_same_floats(ty, assert_same_blocks(ty, rows, make(rng)))


@pytest.mark.parametrize("ty", writable(), ids=lambda ty: ty.name)
def test_rows_of_a_single_block(ty):
    """The shortest rows: facts that a whole row shares are then facts of a block."""
    rng = np.random.default_rng(7)
    rows = rows_of(ty, "gaussian", 64).reshape(-1, ty.block_len).copy()
    importance = np.exp(rng.normal(size=ty.block_len)).astype(np.float32)
    assert_same_blocks(ty, rows, importance)


@pytest.mark.parametrize("ty", types(), ids=lambda ty: ty.name)
def test_any_bytes_decode_alike(ty):
    rng = np.random.default_rng(ty.id)
    blocks = rng.integers(0, 256, RANDOM_BLOCKS * ty.block_bytes, np.uint8)
    assert_same_floats(ty, blocks)


@pytest.mark.parametrize("ty", types(), ids=lambda ty: ty.name)
def test_validation_agrees(ty):
    """ggml_validate_row_data on random blocks, sound and not."""
    rng = np.random.default_rng(ty.id)
    verdicts = []
    for _ in range(200):
        block = rng.integers(0, 256, ty.block_bytes, np.uint8)
        sound = ggml().ggml_validate_row_data(ty.id, ctypes.c_void_p(block.ctypes.data), ctypes.c_size_t(block.size)) & 0xFF
        run = subprocess.run([LWQ, "dev", "validate-rows", "--type", ty.name], input=block.tobytes(), capture_output=True, check=False)
        assert (run.returncode == 0) == bool(sound), (block.tobytes().hex(), run.stderr)
        verdicts.append(bool(sound))
    assert any(verdicts)
