"""What llama-imatrix collects, from llama.cpp's own graph: the callback before and after every node sees the products."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

F32 = 0


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`, as far as products need it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]

GGML = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
GGML.ggml_op_name.restype = ctypes.c_char_p
GGML.ggml_op_name.argtypes = [ctypes.c_int]


def values_of(tensor, kind):
    """The tensor's values, [ne3, ne2, ne1, ne0], of a host buffer with any strides."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    span = sum((n - 1) * stride for n, stride in zip(shape, strides)) + np.dtype(kind).itemsize
    return np.ndarray(shape, kind, (ctypes.c_uint8 * span).from_address(tensor.data), strides=strides)


class Collector:
    """Sums of squared inputs and counts by weight, as llama-imatrix has them."""

    def __init__(self):
        self.sums, self.counts = {}, {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.see)

    def see(self, address, ask, _user_data):
        tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        op = GGML.ggml_op_name(tensor.op)
        if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return False
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if op == b"MUL_MAT" and (inputs.ne[1] < 16 or inputs.type != F32 or not name.startswith("blk.")):
            return False
        if not ask:
            if op == b"MUL_MAT":
                self.add_dense(name, weight, values_of(inputs, np.float32))
            else:
                self.add_routed(name, weight, values_of(inputs, np.float32), values_of(tensor.src[2].contents, np.int32))
        return True

    def entry(self, name, matrices, width, counts):
        self.counts.setdefault(name, np.zeros(counts, np.int64))
        return self.sums.setdefault(name, np.zeros((matrices, width))), self.counts[name]

    def add_dense(self, name, weight, inputs):
        """A matrix for each index of the third dimension sees the inputs of that index."""
        matrices = weight.ne[2]
        sums, counts = self.entry(name, matrices, inputs.shape[-1], 1)
        for at, block in enumerate(inputs.reshape(-1, *inputs.shape[2:])):
            sums[at % matrices] += (block.astype(np.float64) ** 2).sum(0)
        counts += inputs[..., 0].size // matrices

    def add_routed(self, name, weight, inputs, ids):
        """`inputs` is [1, tokens, 1 or used, width], `ids` [1, 1, tokens, used]."""
        sums, counts = self.entry(name, weight.ne[2], inputs.shape[-1], weight.ne[2])
        for token, experts in enumerate(ids[0, 0]):
            for at, expert in enumerate(experts):
                sums[expert] += inputs[0, token, at % inputs.shape[2]].astype(np.float64) ** 2
                counts[expert] += 1


def collect(reference, chunks, n_ctx):
    """What the model of a `Reference` collects from chunks of tokens: two dictionaries, sums and counts by weight."""
    collector = Collector()
    reference.logits(chunks, n_ctx, callback=collector.callback)
    return collector.sums, collector.counts
