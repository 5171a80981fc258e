"""Makes PyPI's build of torch, which is linked to CUDA, usable on machines without CUDA's libraries.

    python torch_stand_ins.py SITE-PACKAGES/torch/lib

Each library that torch needs and that nobody provides gets an empty stand-in beside torch, which exports the symbols that
torch asks for. torch then finds no device and computes on the processor. Needs gcc and binutils.
"""

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Calls into CUDA answer with the error for "no device", what the compiler's start-up code registers is void.
NO_DEVICE, SUCCESS = 100, 0
OF_CUDA = re.compile(r"_*(cu|nccl|nv|__cuda|Nv)\w*$")


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def is_provided(name):
    """Whether the dynamic loader finds a library of this name."""
    program = f'#include <dlfcn.h>\nint main(void) {{ return dlopen("{name}", RTLD_LAZY) == 0; }}\n'
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "probe"
        subprocess.run(["gcc", "-x", "c", "-", "-o", binary, "-ldl"], input=program, text=True, check=True)
        return subprocess.run([binary]).returncode == 0


class Wanted:
    """What the libraries of a folder ask of libraries that are not there."""

    def __init__(self, folder):
        libraries = sorted(folder.glob("*.so*"))
        needed, defined = set(), {library.name for library in libraries}
        for library in libraries:
            needed |= set(re.findall(r"\(NEEDED\).*\[(.+)]", output_of("readelf", "-dW", library)))
        self.missing = sorted(name for name in needed - defined if not is_provided(name))
        owner = {}
        for library in libraries:
            current = None
            for line in output_of("readelf", "-VW", library).splitlines():
                if found := re.search(r"File: (\S+)", line):
                    current = found[1]
                elif (found := re.search(r"Name: (\S+)\s+Flags", line)) and current in self.missing:
                    owner[found[1]] = current
        # library -> version -> names; names without a version may be in any library.
        self.symbols = {name: collections.defaultdict(set) for name in self.missing}
        for version, name in owner.items():
            self.symbols[name][version] = set()
        for library in libraries:
            for line in output_of("nm", "-D", "--undefined-only", library).splitlines():
                name, _, version = line.split()[-1].partition("@")
                version = version.lstrip("@")
                if version in owner:
                    self.symbols[owner[version]][version].add(name)
                elif not version and self.missing and OF_CUDA.match(name):
                    self.symbols[self.missing[0]][""].add(name)


def answer(name):
    if name.startswith("cudaGetError"):
        return '(long)"stand-in for CUDA"'
    return SUCCESS if name.startswith("__") else NO_DEVICE


def build(path, versions):
    names = sorted(set().union(*versions.values()))
    source = "".join(f"long {name}(void) {{ return {answer(name)}; }}\n" for name in names)
    command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-x", "c", "-", "-o", path, f"-Wl,-soname,{path.name}"]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        for version in sorted(filter(None, versions)):
            exported = "".join(f"{name}; " for name in sorted(versions[version]))
            script.write(f"{version} {{ global: {exported}}};\n" if exported else f"{version} {{ }};\n")
        script.flush()
        if any(versions):
            command.append(f"-Wl,--version-script,{script.name}")
        subprocess.run(command, input=source, text=True, check=True)


def main():
    folder = Path(sys.argv[1])
    wanted = Wanted(folder)
    for name in wanted.missing:
        build(folder / name, wanted.symbols[name])
        print(f"{name}: {sum(map(len, wanted.symbols[name].values()))} symbols")


if __name__ == "__main__":
    main()
