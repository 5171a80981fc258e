"""What test_export.py needs torch for; run by the Python that has it.

folder GGUF OUT        the bundled model as transformers saves it, without its tokenizer
cast FOLDER OUT DTYPE  the same in another type
load SOURCE OUT...     loads exports, compares weights and logits
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float16",
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def read_gguf(path):
    """Tensors of a GGUF of F16 and F32, without a package."""
    data = path.read_bytes()
    at = 8

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0]

    def text():
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at]

    def skip(kind):
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                skip(inner)
        else:
            at += [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind]

    count, keys = take("Q"), take("Q")
    for _ in range(keys):
        text()
        skip(take("I"))
    infos = []
    for _ in range(count):
        name = text().decode()
        shape = [take("Q") for _ in range(take("I"))]
        infos.append((name, shape[::-1], take("I"), take("Q")))
    start = -(-at // 32) * 32
    for name, shape, kind, offset in infos:
        dtype = {0: np.float32, 1: np.float16}[kind]
        yield name, np.frombuffer(data, dtype, int(np.prod(shape)), start + offset).reshape(shape)


def folder(gguf, out):
    out.mkdir(parents=True)
    tensors = {}
    for name, values in read_gguf(gguf):
        values = torch.from_numpy(values.copy())
        if ".attn_q." in name or ".attn_k." in name:
            heads = 4 if ".attn_q." in name else 2
            # GGUF has rotating neighbours, transformers rotating halves.
            values = values.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(values.shape)
        parts = name.split(".")
        theirs = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(name)
        theirs = theirs or f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
        tensors[theirs] = values.to(torch.float16).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG))


def cast(source, out, dtype):
    out.mkdir(parents=True)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).to(getattr(torch, dtype)) for name in file.keys()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), "torch_dtype": dtype}))


def unpacked(words, columns, bits):
    """Unsigned values of words of 32 bits, the first in the lowest bits."""
    words = words.numpy().view(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(words.shape[0], -1)[:, :columns].astype(np.float32)


def decoded(tensors, module, bits):
    """32-bit values by the format's definition, and the type in which a reader computes them."""
    part = lambda suffix: tensors.get(f"{module}.weight{suffix}")
    scale = part("_scale")
    packed = part("_packed")
    if packed is None:
        codes = part("").to(torch.float32).numpy()
        rows, columns = codes.shape
        if scale.shape[0] != rows:
            blocks = scale.float().numpy().repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]
            return codes * blocks, scale.dtype
        return codes * scale.float().numpy(), scale.dtype
    if packed.dtype == torch.uint8:
        nibbles = packed.numpy()
        codes = E2M1[np.stack([nibbles & 15, nibbles >> 4], -1).reshape(len(nibbles), -1)]
        if scale.dtype == torch.uint8:
            steps = np.exp2(scale.numpy().astype(np.float32) - 127)
        else:
            steps = scale.float().numpy() / part("_global_scale").numpy()
        return codes * steps.repeat(codes.shape[1] // steps.shape[1], 1).astype(np.float32), torch.bfloat16
    rows, columns = part("_shape").tolist()
    codes = unpacked(packed, columns, bits)
    zeros = np.full(scale.shape, 1 << (bits - 1), np.float32)
    if part("_zero_point") is not None:
        zeros = unpacked(part("_zero_point").T.contiguous(), rows, bits).T
    group = columns // scale.shape[1]
    spread = lambda values: values.repeat(group, 1)
    return (codes - spread(zeros)) * spread(scale.float().numpy()), scale.dtype


class Base:
    """The source in one type, whose weights are replaced to compare with them."""

    def __init__(self, source, dtype):
        self.dtype = dtype
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        self.kept = {name: value.clone() for name, value in self.model.state_dict().items()}

    def logits(self, tokens, weights):
        self.model.load_state_dict({**self.kept, **weights}, strict=True)
        return self.model(tokens).logits.float()


def load(source, outputs):
    torch.manual_seed(0)
    tokens = torch.randint(3, 2048, (2, 64))
    own = getattr(torch, json.loads((source / "config.json").read_text())["torch_dtype"])
    bases = {dtype: Base(source, dtype) for dtype in {own, torch.bfloat16}}
    with torch.no_grad():
        for out in outputs:
            # compressed-tensors decodes 4-bit floats to bfloat16, whatever the model is.
            base = bases[torch.bfloat16 if "FP4" in out.name else own]
            compare(out, base, tokens)


def compare(out, base, tokens):
    with safe_open(out / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    checked = json.loads(out.with_name(out.name + ".json").read_text())
    assert not checked["faults"], checked["faults"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    weight_only = config["input_activations"] is None
    expected = {}
    for module in checked["tensors"]:
        values, computed = decoded(tensors, module["name"], config["weights"]["num_bits"])
        digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
        assert digest == module["values_sha256"], (out.name, module["name"])
        expected[f"{module['name']}.weight"] = torch.from_numpy(values).to(computed).to(base.dtype)
    assert len(expected) == 42
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=base.dtype, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, (out.name, problems)
    model.eval()
    logits = model(tokens).logits.float()
    assert torch.isfinite(logits).all(), out.name
    # The first pass has decoded the weights.
    loaded = dict(model.named_parameters())
    for name, values in expected.items():
        assert torch.equal(loaded[name].to(base.dtype), values), (out.name, name)
    before, by_hand = base.logits(tokens, {}), base.logits(tokens, expected)
    difference = (logits - by_hand).abs().max().item()
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean().item()
    print(f"{out.name}: largest difference of logits {difference:.4f}, divergence from the base {divergence:.5f}")
    # Where activations are kept nothing differs; where they are rounded, little more than 8 bits do.
    assert difference <= (0.01 if weight_only else 1.0), (out.name, difference)
    assert divergence < (0.02 if config["weights"]["num_bits"] == 8 else 0.5), (out.name, divergence)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "folder":
        folder(Path(paths[0]), Path(paths[1]))
    elif command == "cast":
        cast(Path(paths[0]), Path(paths[1]), paths[2])
    else:
        load(Path(paths[0]), [Path(path) for path in paths[1:]])
