#!/usr/bin/env python3
"""Writes src/tokenizer/unicode/tables.rs.

The tokenizer must see the general categories that llama.cpp sees, which are those of Unicode 15.1 whatever the
compiler's own version is. Run:  pip install unicodedata2==15.1.0 && python3 scripts/unicode_tables.py
"""
import pathlib

import unicodedata2 as ucd

CLASSES = {"N": "N", "L": "L", "Z": "W", "M": "M", "P": "P", "S": "S"}
# White_Space of PropList.txt; separators (Z) are all in it.
WHITESPACE = {*range(0x09, 0x0E), 0x85}


def char_class(cp):
    if cp in WHITESPACE:
        return "W"
    category = ucd.category(chr(cp))
    return CLASSES.get(category[0], "U" if category == "Cn" else "C")


def runs(values):
    """(start, value) wherever the value changes."""
    out = []
    for cp, value in enumerate(values):
        if not out or out[-1][1] != value:
            out.append((cp, value))
    return out


def lowercase_runs():
    """(first, last, step, mapped first) of code points whose lower case is at a constant distance."""
    pairs = [(cp, ord(chr(cp).lower()[0])) for cp in range(0x110000) if not 0xD800 <= cp < 0xE000]
    out = []
    for cp, low in ((cp, low) for cp, low in pairs if cp != low):
        if out:
            first, last, step, mapped = out[-1]
            gap = cp - last
            if low - cp == mapped - first and gap <= 2 and (step == 0 or step == gap):
                out[-1] = (first, cp, gap, mapped)
                continue
        out.append((cp, cp, 0, low))
    return [(a, b, s or 1, m) for a, b, s, m in out]


def decomposition_runs():
    """(first, last, base): code points whose canonical decomposition begins with another character."""
    out = []
    for cp in range(0x110000):
        if 0xD800 <= cp < 0xE000:
            continue
        base = ord(ucd.normalize("NFD", chr(cp))[0])
        if base == cp:
            continue
        if out and out[-1][1] == cp - 1 and out[-1][2] == base:
            out[-1] = (out[-1][0], cp, base)
        else:
            out.append((cp, cp, base))
    return out


def lines(items, width=116):
    line = ""
    for item in items:
        if len(line) + len(item) + 2 > width:
            yield "    " + line.rstrip()
            line = ""
        line += item + ", "
    yield "    " + line.rstrip()


def table(doc, name, kind, items):
    return [f"/// {doc}", "#[rustfmt::skip]", f"pub(super) static {name}: &[{kind}] = &[", *lines(items), "];", ""]


def main():
    assert ucd.unidata_version == "15.1.0", ucd.unidata_version
    text = [
        f"//! Character tables of Unicode {ucd.unidata_version}, written by `scripts/unicode_tables.py`.",
        "",
        "use super::{C, CharClass, L, M, N, P, S, U, W};",
        "",
        *table("First code point of each run of one class; a run ends where the next begins.", "CLASS_RUNS",
               "(u32, CharClass)", [f"(0x{cp:X}, {c})" for cp, c in runs(map(char_class, range(0x110000)))]),
        *table("Simple lower case as (first, last, step, lower case of first).", "LOWERCASE_RUNS",
               "(u32, u32, u32, u32)", [f"(0x{a:X}, 0x{b:X}, {s}, 0x{m:X})" for a, b, s, m in lowercase_runs()]),
        *table("First character of the canonical decomposition as (first, last, base).", "DECOMPOSITION_RUNS",
               "(u32, u32, u32)", [f"(0x{a:X}, 0x{b:X}, 0x{m:X})" for a, b, m in decomposition_runs()]),
    ]
    path = pathlib.Path(__file__).parent.parent / "src/tokenizer/unicode/tables.rs"
    path.write_text("\n".join(text))


if __name__ == "__main__":
    main()
