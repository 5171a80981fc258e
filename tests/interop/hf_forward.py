"""Logits of a model from Hugging Face's own tensors in numpy, double precision: rotary halves, no permuted rows, norms
as stored. Written from the architectures' definitions, so that a mistake of a converter cannot hide in both."""

import numpy as np
from hf_models import N_EXPERT, N_EXPERT_USED, N_HEAD, N_HEAD_KV, N_LAYER


def softmax(values):
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def silu(values):
    return values / (1 + np.exp(-values))


def gelu(values):
    return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))


class Forward:
    def __init__(self, model):
        config = model.config
        self.model, self.config = model, {**config, **config.get("text_config", {})}
        self.kind = model.kind
        self.gemma = self.kind.startswith("gemma")
        self.prefix = "language_model.model." if "text_config" in config else "model."
        self.head = self.config.get("head_dim", model.head)
        self.eps = self.config.get("rms_norm_eps", 1e-6)
        self.act = gelu if self.gemma else silu

    def weight(self, name):
        return self.model.tensors[name].astype(np.float64)

    def linear(self, x, name):
        out = x @ self.weight(f"{name}.weight").T
        bias = self.model.tensors.get(f"{name}.bias")
        return out if bias is None else out + bias

    def norm(self, x, name):
        scale = self.weight(f"{name}.weight") + (1 if self.gemma else 0)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * scale

    def frequencies(self, windowed):
        """Angle per position of each pair, and the scale of cosines and sines."""
        scaling = self.config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type"))
        n = int(self.head * self.config.get("partial_rotary_factor", 1.0))
        base = 10_000.0 if self.kind == "gemma3_text" and windowed else self.config.get("rope_theta", 1e6)
        index = np.arange(0, n, 2) / n
        frequency = 1 / base**index
        scale = 1.0
        if kind == "linear" and not windowed:
            frequency = frequency / scaling["factor"]
        elif kind == "llama3":
            factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            wavelength = 2 * np.pi / frequency
            smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        elif kind == "yarn":
            factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
            turn = lambda beta: n * np.log(old / (beta * 2 * np.pi)) / (2 * np.log(base))
            low, high = max(np.floor(turn(32)), 0), min(np.ceil(turn(1)), n - 1)
            ramp = np.clip((np.arange(n // 2) - low) / max(high - low, 0.001), 0, 1)
            frequency = frequency / factor * ramp + frequency * (1 - ramp)
            scale = 0.1 * np.log(factor) + 1
        elif kind == "longrope":
            # Texts here are shorter than the original context.
            frequency = frequency / np.array(scaling["short_factor"])
            original, longest = self.config["original_max_position_embeddings"], self.config["max_position_embeddings"]
            scale = np.sqrt(1 + np.log(longest / original) / np.log(original))
        return frequency, scale

    def rotate(self, x, windowed):
        frequency, scale = self.frequencies(windowed)
        angle = np.arange(x.shape[0])[:, None] * frequency
        cos, sin = (np.cos(angle) * scale)[:, None], (np.sin(angle) * scale)[:, None]
        half = len(frequency)
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)

    def attention(self, x, layer):
        at = f"{self.prefix}layers.{layer}.self_attn."
        n, head = len(x), self.head
        if self.kind == "phi3":
            q, k, v = np.split(self.linear(x, f"{at}qkv_proj"), np.cumsum([N_HEAD * head, N_HEAD_KV * head]), -1)
        else:
            q, k, v = (self.linear(x, f"{at}{part}_proj") for part in "qkv")
        q, k, v = (part.reshape(n, -1, head) for part in (q, k, v))
        if f"{at}q_norm.weight" in self.model.tensors:
            q, k = self.norm(q, f"{at}q_norm"), self.norm(k, f"{at}k_norm")
        windowed = (self.kind == "gemma2" and layer % 2 == 0) or (self.kind == "gemma3_text" and layer % 6 < 5)
        q, k = self.rotate(q, windowed), self.rotate(k, windowed)
        k, v = (part.repeat(N_HEAD // N_HEAD_KV, 1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(head)
        if cap := self.config.get("attn_logit_softcapping"):
            scores = cap * np.tanh(scores / cap)
        distance = np.arange(n)[:, None] - np.arange(n)
        hidden = distance < 0
        if windowed:
            hidden |= distance >= self.config["sliding_window"]
        scores[:, hidden] = -np.inf
        out = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(n, -1)
        return self.linear(out, f"{at}o_proj")

    def network(self, x, gate, up, down):
        return (self.act(x @ gate.T) * (x @ up.T)) @ down.T

    def named_network(self, x, at, names=("gate_proj", "up_proj", "down_proj")):
        return self.network(x, *(self.weight(f"{at}{name}.weight") for name in names))

    def feed_forward(self, x, layer):
        at = f"{self.prefix}layers.{layer}."
        if self.kind == "phi3":
            gate, up = np.split(self.weight(f"{at}mlp.gate_up_proj.weight"), 2)
            return self.network(x, gate, up, self.weight(f"{at}mlp.down_proj.weight"))
        if f"{at}mlp.gate_proj.weight" in self.model.tensors:
            return self.named_network(x, f"{at}mlp.")
        mixtral = self.kind == "mixtral"
        part = f"{at}block_sparse_moe." if mixtral else f"{at}mlp."
        chance = softmax(self.linear(x, f"{part}gate"))
        out = np.zeros_like(x)
        for expert in range(N_EXPERT):
            if f"{part}experts.gate_up_proj" in self.model.tensors:
                gate, up = np.split(self.weight(f"{part}experts.gate_up_proj")[expert], 2)
                made = self.network(x, gate, up, self.weight(f"{part}experts.down_proj")[expert])
            else:
                names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
                made = self.named_network(x, f"{part}experts.{expert}.", names)
            rank = (chance > chance[:, expert : expert + 1]).sum(-1)
            best = np.sort(chance, -1)[:, -N_EXPERT_USED:].sum(-1)
            share = chance[:, expert] / (1 if self.kind == "qwen2_moe" else best)
            out += made * np.where(rank < N_EXPERT_USED, share, 0)[:, None]
        if self.kind == "qwen2_moe":
            gate = 1 / (1 + np.exp(-self.linear(x, f"{part}shared_expert_gate")))
            out += gate * self.named_network(x, f"{part}shared_expert.")
        return out

    def run(self, tokens):
        embedding = self.weight(f"{self.prefix}embed_tokens.weight")
        x = embedding[tokens]
        if self.gemma:
            x = x * np.sqrt(x.shape[-1])
        for layer in range(N_LAYER):
            at = f"{self.prefix}layers.{layer}."
            mixed = self.attention(self.norm(x, f"{at}input_layernorm"), layer)
            if self.gemma:
                x = x + self.norm(mixed, f"{at}post_attention_layernorm")
                made = self.feed_forward(self.norm(x, f"{at}pre_feedforward_layernorm"), layer)
                x = x + self.norm(made, f"{at}post_feedforward_layernorm")
            else:
                x = x + mixed
                x = x + self.feed_forward(self.norm(x, f"{at}post_attention_layernorm"), layer)
        x = self.norm(x, f"{self.prefix}norm")
        output = self.model.tensors.get("lm_head.weight", embedding).astype(np.float64)
        logits = x @ output.T
        if cap := self.config.get("final_logit_softcapping"):
            logits = cap * np.tanh(logits / cap)
        return logits


def forward(model, tokens):
    """[tokens, vocabulary]."""
    return Forward(model).run(tokens)
