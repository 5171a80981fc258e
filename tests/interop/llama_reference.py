"""Logits and token ids from llama.cpp through llama-cpp-python's C interface."""

import ctypes

import llama_cpp
import numpy as np

F32 = 0
FLASH_ATTENTION_DISABLED = 0


@llama_cpp.llama_log_callback
def _discard(_level, _text, _data):
    pass


llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Reference:
    """A model loaded by llama.cpp."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def close(self):
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text, add_special=True, parse_special=False):
        raw = text.encode()
        # A space may become three bytes, and each byte a token.
        ids = (llama_cpp.llama_token * (3 * len(raw) + 16))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
        return np.array(ids[:n], dtype=np.int32)

    def bos(self):
        """The BOS id, or None when the vocabulary adds none."""
        return llama_cpp.llama_vocab_bos(self.vocab) if llama_cpp.llama_vocab_get_add_bos(self.vocab) else None

    def logits(self, sequences, n_ctx, as_run=False, callback=None):
        """Logits of every token, [tokens, n_vocab]; `as_run` keeps llama.cpp's 16-bit cache and flash attention, `callback`
        sees the graph's nodes."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 2
        if not as_run:
            params.type_k = params.type_v = F32
            params.flash_attn_type = FLASH_ATTENTION_DISABLED
        if callback:
            params.cb_eval = callback
        context = llama_cpp.llama_init_from_model(self.model, params)
        assert context, "llama.cpp made no context"
        parts = []
        for sequence in sequences:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch = llama_cpp.llama_batch_init(len(sequence), 0, 1)
            batch.n_tokens = len(sequence)
            for i, token in enumerate(sequence):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, 1
            assert llama_cpp.llama_decode(context, batch) == 0
            pointer = llama_cpp.llama_get_logits(context)
            flat = np.ctypeslib.as_array(pointer, (len(sequence) * self.n_vocab,))
            parts.append(flat.reshape(len(sequence), self.n_vocab).copy())
            llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return np.concatenate(parts)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(base, other):
    """Per row, in nats, of the distributions that two blocks of logits describe."""
    p, q = log_softmax(base), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)
