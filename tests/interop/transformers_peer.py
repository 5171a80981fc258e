"""What transformers makes of folders. Runs under the Python of .ci/torch, which has torch:

    transformers_peer.py FOLDERS OUT

For every folder F in FOLDERS: loads it, or, where it has an options.json, makes a random model of its config.json with these
options; saves the model to OUT/F as this version of transformers writes it (other files are copied), and writes the logits of F/tokens.npy (int32, [sequences, length]) in single precision to OUT/F/logits.npy. Prints a
line of JSON for each: its name, and either the tensors that the class wanted in vain and those that it did not know, or the
error.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

CLASSES = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
# Files that are for this program.
OWN = ("options.json", "tokens.npy")
PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load(folder, dtype="auto"):
    """The model of a folder by the first class that has one for it."""
    for auto in CLASSES:
        try:
            # The faster kinds of attention leave soft caps out.
            options = {"dtype": dtype, "ignore_mismatched_sizes": True, "attn_implementation": "eager"}
            return auto.from_pretrained(folder, output_loading_info=True, **options)
        except ValueError as error:
            if "nrecognized" not in str(error):
                raise
    raise ValueError("no class for it")


def make(folder):
    """A random model of the class, with other options than the folder's."""
    config = transformers.AutoConfig.from_pretrained(folder, dtype="bfloat16", attn_implementation="eager")
    for option, value in json.loads((folder / "options.json").read_text()).items():
        known = [part for part in (config, config.get_text_config()) if hasattr(part, option)]
        assert known, f"{type(config).__name__} has no {option}"
        for part in known:
            setattr(part, option, value)
    torch.manual_seed(1)
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.bfloat16)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        with torch.no_grad():
            if values.dim() > 1:
                values.normal_(0, 0.3 if "embed" in name else 1.5 * values.shape[-1] ** -0.5)
            elif name.endswith(("bias", "norm.weight", "layernorm.weight")):
                values += 0.2 * torch.randn(values.shape)
    return model, dict.fromkeys(PROBLEMS, ())


def save_and_run(folder, out):
    model, info = make(folder) if (folder / "options.json").exists() else load(folder)
    # Defaults of some classes name sampling parameters without sampling, which cannot be saved.
    model.generation_config.do_sample = True
    model.save_pretrained(out)
    for file in folder.iterdir():
        if not (out / file.name).exists() and ".safetensors" not in file.name and file.name not in OWN:
            shutil.copy(file, out / file.name)
    model.float().eval()
    with torch.no_grad():
        rows = np.load(folder / "tokens.npy").astype(np.int64)
        logits = [model(input_ids=torch.from_numpy(row[None]), use_cache=False).logits[0] for row in rows]
    np.save(out / "logits.npy", torch.stack(logits).numpy())
    return {key: sorted(map(str, info[key])) for key in PROBLEMS}


def main():
    folders, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    # transformers asks before every pass, which raises where CUDA's libraries are stand-ins.
    torch.cuda.is_current_stream_capturing = lambda: False
    transformers.logging.set_verbosity_error()
    for folder in sorted(folders.iterdir()):
        try:
            found = save_and_run(folder, out / folder.name)
        except Exception as error:  # whatever a class raises is told, the others go on
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": folder.name, **found}), flush=True)


if __name__ == "__main__":
    main()
