"""Loads exports of a folder as users do, and compares weights and logits. Run by the Python that has torch:

    export_loading.py SOURCE OUT...

Beside each OUT stands OUT.json, what `lwq export SOURCE OUT --check --json` says of it.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpacked(words, columns, bits):
    """Unsigned values of words of 32 bits, the first in the lowest bits."""
    words = words.numpy().view(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(words.shape[0], -1)[:, :columns].astype(np.float32)


def decoded(tensors, module):
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
    bits = 32 * packed.shape[1] // columns
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
        values, computed = decoded(tensors, module["name"])
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
    source, *outputs = map(Path, sys.argv[1:])
    load(source, outputs)
