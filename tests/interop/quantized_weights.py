"""Weights as quantized checkpoints store them, and the values that they stand for. Numpy only, by the formats' definitions.

Each encoder takes a float matrix and gives `parts`, tensors by the suffix that follows the module's name, and the exact
float32 values.
"""

import numpy as np
from hf_models import e4m3_values, from_bf16, to_bf16

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E4M3 = e4m3_values()


def nearest(values, table):
    """Index of the nearest finite entry of `table` for each value."""
    order = np.argsort(np.nan_to_num(table, nan=np.inf), kind="stable")[: np.isfinite(table).sum()]
    ascending = table[order]
    middle = (ascending[1:] + ascending[:-1]) / 2
    return order[np.searchsorted(middle, values)].astype(np.uint8)


def pack_words(codes, bits):
    """Unsigned codes into words of 32 bits along the last axis, the first in the lowest bits."""
    share = 32 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % share)]).astype(np.uint64)
    groups = padded.reshape(*codes.shape[:-1], -1, share)
    return (groups << (np.arange(share, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32).view(np.int32)


def pack_halves(codes):
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def integers(weight, bits=4, group=32, symmetric=True, half=False, order=None):
    """compressed-tensors pack-quantized; `half` keeps scales to three bits, so that minima are half-precision numbers."""
    rows, columns = weight.shape
    group = group or columns
    levels = 2**bits - 1
    source = weight if order is None else weight[:, np.argsort(order, kind="stable")]
    parts = source.reshape(rows, -1, group)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = np.maximum(-low, high) / (levels / 2) if symmetric else (high - low) / levels
    if half:
        scale = 2.0 ** np.round(np.log2(scale))
    stored = to_bf16(scale)
    scale = from_bf16(stored).reshape(scale.shape)
    zero = np.full(scale.shape, 2 ** (bits - 1)) if symmetric else np.round(-low / scale).clip(0, levels).astype(int)
    codes = (np.round(parts / scale[..., None]) + zero[..., None]).clip(0, levels).astype(np.uint64)
    values = ((codes.astype(np.float32) - zero[..., None].astype(np.float32)) * scale[..., None]).astype(np.float32)
    codes, values = codes.reshape(rows, columns), values.reshape(rows, columns)
    tensors = {
        "weight_packed": ("I32", pack_words(codes, bits)),
        "weight_scale": ("BF16", stored.reshape(scale.shape)),
        "weight_shape": ("I64", np.array([rows, columns], np.int64)),
    }
    if not symmetric:
        tensors["weight_zero_point"] = ("I32", np.ascontiguousarray(pack_words(zero.astype(np.uint64).T, bits).T))
    if order is not None:
        # Column j of the file is in group order[j]; codes were made in sorted order.
        back = np.argsort(np.argsort(order, kind="stable"), kind="stable")
        tensors["weight_packed"] = ("I32", pack_words(codes[:, back], bits))
        tensors["weight_g_idx"] = ("I32", np.asarray(order, np.int32))
        values = values[:, back]
    return tensors, values


def int8(weight):
    """compressed-tensors int-quantized, a scale for each row."""
    stored = to_bf16(np.abs(weight).max(1, keepdims=True) / 127.5)
    scale = from_bf16(stored).reshape(-1, 1)
    codes = np.round(weight / scale).clip(-128, 127).astype(np.int8)
    return {"weight": ("I8", codes), "weight_scale": ("BF16", stored)}, (codes * scale).astype(np.float32)


def fp8_e8m0(weight, group=32, dtype="U8"):
    """MXFP8: a power of two for each group of columns."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, group)
    exponent = (np.ceil(np.log2(np.abs(parts).max(-1) / 448)) + 127).astype(np.uint8)
    scale = 2.0 ** (exponent.astype(np.float32) - 127)
    codes = nearest(parts / scale[..., None], E4M3)
    values = (E4M3[codes] * scale[..., None]).astype(np.float32).reshape(rows, columns)
    return {"weight": ("F8_E4M3", codes.reshape(rows, columns)), "weight_scale": (dtype, exponent)}, values


def mxfp4(weight):
    """Codes, exponents and values; the last axis is cut into groups of 32."""
    parts = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = (np.floor(np.log2(np.abs(parts).max(-1))) - 2 + 127).astype(np.uint8)
    scale = 2.0 ** (exponent.astype(np.float32) - 127)
    codes = nearest(parts / scale[..., None], E2M1)
    values = (E2M1[codes] * scale[..., None]).astype(np.float32).reshape(weight.shape)
    return codes, exponent, values


def mxfp4_compressed(weight):
    codes, exponent, values = mxfp4(weight)
    packed = pack_halves(codes.reshape(weight.shape))
    return {"weight_packed": ("U8", packed), "weight_scale": ("U8", exponent)}, values


def nvfp4(weight, modelopt, negative=False):
    """NVFP4 with the names of ModelOpt or of compressed-tensors, whose second scale is a divisor."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, 16)
    divisor = np.float32(448 * 6 / np.abs(weight).max())
    second = np.float32(1) / divisor
    block = nearest(np.abs(parts).max(-1) / 6 / second, E4M3)
    if negative:
        block[:, 0] |= 128
    scale = E4M3[block]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = nearest(np.nan_to_num(parts / (scale * second)[..., None]).clip(-6, 6), E2M1)
    values = (E2M1[codes] * scale[..., None] * second).astype(np.float32).reshape(rows, columns)
    packed = pack_halves(codes.reshape(rows, columns))
    if modelopt:
        names = ("weight", "weight_scale", "weight_scale_2", second)
    else:
        names = ("weight_packed", "weight_scale", "weight_global_scale", divisor)
    shape = () if modelopt else (1,)
    tensors = {
        names[0]: ("U8", packed),
        names[1]: ("F8_E4M3", block),
        names[2]: ("F32", np.full(shape, names[3], np.float32)),
    }
    return tensors, values
