"""Random texts that are hard to tokenize: scripts, white space, digits, markup, code, broken UTF-8."""

import random

WORDS = (
    "the of Don't I'll it's HELLO's we'VE They'Re camelCase HTTPServer fooBar Straße naïve Привет мир 你好世界 "
    "日本語テスト カタカナ 한국어 ไทย สวัสดี हिन्दी नमस्ते العربية עברית Ελληνικά Türkçe İstanbul ǅ 𝒳𝒴 ﬁ ½ ² Ⅷ ١٢٣ १२३ 12345 "
    "1234567 0x1F 3.14 1,000,000 <|im_start|> <|endoftext|> </s> <s> <unk> <mask> [MASK] [SEP] <|fim_prefix|> "
    "<start_of_turn> <|begin_of_text|> <|user|> <PRE> <dna> </dna> ACGTAC acgtacgt IMGIMGABZ <sentinel:12> "
    "http://x.y/z?q=1 foo@bar.com ### ``` != === -> <= ... — – “quoted” ‘q’ … 🚀 👨‍👩‍👧 🇩🇪 é é ё́ K ſ ß ẞ ꙮ ﷽ ก็ कि "
    "〜 、。 ！ ？ ㄅㄆ 一 龥 鿿 豈 𠀀 𫝀 (a) [b] {c} a_b _x_ $x #tag ' 's 'S 'll 'LL \" \\ / // \\n"
).split(" ") + ["\ufeff", "\u200b", "\u200d", "\xa0", "\u3000", "\u2028", "\x85", "\x0b", "\x0c", "\x1c", "\0", "\x7f", "\x01"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n", " \n ", "    ", "\xa0", "\u3000", "", "", "", "\n\n\n "]
SPACES += [" " * 9, " " * 40]
PLANES = [
    (0x20, 0x7F), (0, 0x100), (0x100, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xE80), (0x1000, 0x1800),
    (0x1E00, 0x2100), (0x2000, 0x2C00), (0x3000, 0x3400), (0x3400, 0xA000), (0xA000, 0xD7FF), (0xE000, 0xFFFF),
    (0x10000, 0x11FFF), (0x1F000, 0x1FBFF), (0x20000, 0x2FA20), (0xE0000, 0xE01FF), (0, 0xD7FF), (0x10000, 0xFFFFF),
]
CODE = 'fn main() {\n    let x: Vec<u8> = b"a\\x00".to_vec();\n\tif x[0] != 10 && y >= 3.5e-7 { return Err(E::A(x)); }\n}\n'


def random_text(rng):
    kind = rng.random()
    if kind < 0.45:
        return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randrange(1, 20))).encode()
    if kind < 0.6:
        plane = rng.choice(PLANES)
        return "".join(chr(rng.randrange(*plane)) for _ in range(rng.randrange(1, 40))).encode()
    if kind < 0.75:
        pieces = (
            chr(rng.randrange(*rng.choice(PLANES))) if rng.random() < 0.6 else rng.choice(WORDS + SPACES)
            for _ in range(rng.randrange(1, 30))
        )
        return "".join(pieces).encode()
    if kind < 0.82:
        start = rng.randrange(len(CODE) - 20)
        return CODE[start : start + rng.randrange(10, 120)].encode()
    if kind < 0.9:
        return "".join(rng.choice("aAbB19 \n\r\t'.,-sStTé中́") for _ in range(rng.randrange(1, 40))).encode()
    if kind < 0.95:
        # Bytes from 0xF4 on can spell code points above U+10FFFF, at which llama.cpp aborts.
        ranges = [(0, 0xF4), (0x80, 0xF4), (0x20, 0x7F)]
        return bytes(rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(1, 30)))
    unit = rng.choice(["a", " ", "\n", "=", "1", "é", "中", "ab", "\t", "-", "!", "\r\n", "A"])
    return (unit * rng.randrange(1, 400)).encode()


def random_texts(seed, count):
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(count)]
