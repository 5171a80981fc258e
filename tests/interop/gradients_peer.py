"""Gradients by torch's automatic differentiation. Runs under the Python of .ci/torch:

    gradients_peer.py FOLDER...

Each folder holds a model as transformers saves it, tokens.npy (int32, [sequences, length]) and labels.npy (the same shape).
Computes cross entropy with the labels, summed over all positions, in double precision, and writes for every linear layer its
weight and the gradient at its product, before the bias, to gradients.npz: `MODULE weight` [out, in], `MODULE gradient`
[tokens, out].
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers_peer import load


def watch(model):
    """Names of linear layers and what keeps the outputs of each."""
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            # Routers that are linear layers give more than a product.
            if isinstance(output, torch.Tensor):
                output.retain_grad()
                outputs.setdefault(name, []).append(output)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name))
    return outputs


def run(folder):
    model = load(folder, torch.float64)[0].eval()
    # The faster kinds have no double precision.
    model.set_experts_implementation("eager")
    outputs = watch(model)
    tokens, labels = (torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64)) for name in ("tokens", "labels"))
    # One sequence after the other: kernels of delta nets take padding for granted otherwise.
    for row, label in zip(tokens, labels):
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, label, reduction="sum").backward()
    found = {}
    for name, module in model.named_modules():
        parts = [output.grad for output in outputs.get(name, ()) if output.grad is not None]
        if parts:
            found[f"{name} weight"] = module.weight.detach().float().numpy()
            found[f"{name} gradient"] = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).numpy()
    np.savez(folder / "gradients.npz", **found)


def main():
    torch.set_num_threads(1)
    torch.cuda.is_current_stream_capturing = lambda: False
    transformers.logging.set_verbosity_error()
    for folder in sys.argv[1:]:
        try:
            run(Path(folder))
        except Exception as error:  # whatever a class raises is told, the others go on
            (Path(folder) / "error.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
