//! The table of pre-tokenizers: every name that llama.cpp b10605 knows, with its rules and flags.

use super::Rule::{self, Categories, Scan as By, Sets};
use super::Scan::{DigitGroups, Gpt2, HanAware, Newlines, Thousands, Words};
use super::Set;
use super::Spaces::{AsMatched, LeaveLast, PowersOfTwo};

/// One row of the table.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`.
    pub names: &'static [&'static str],
    pub(in crate::tokenizer) rules: &'static [Rule],
    pub(in crate::tokenizer) flags: Flags,
}

/// What a pre-tokenizer's name says beyond its rules. All are false for most.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::tokenizer) struct Flags {
    /// A word that is a token is not merged.
    pub ignore_merges: bool,
    /// Texts begin with BOS unless the file says otherwise.
    pub add_bos: bool,
    /// Texts begin with BOS whatever the file says.
    pub force_bos: bool,
    /// There is no BOS unless the file names one.
    pub no_default_bos: bool,
    /// Merges run over UTF-8 characters instead of byte characters; bytes are tokens `<0xXX>`.
    pub raw_utf8: bool,
    /// Spaces are written `▁`.
    pub escape_spaces: bool,
    /// A run of line breaks that is a token is that token.
    pub newline_tokens: bool,
    /// The file may have no merges.
    pub merges_optional: bool,
}

const PLAIN: Flags = Flags {
    ignore_merges: false,
    add_bos: false,
    force_bos: false,
    no_default_bos: false,
    raw_utf8: false,
    escape_spaces: false,
    newline_tokens: false,
    merges_optional: false,
};
const WHOLE_WORDS: Flags = Flags { ignore_merges: true, ..PLAIN };
const BOS: Flags = Flags { add_bos: true, ..PLAIN };
const WHOLE_WORDS_BOS: Flags = Flags { ignore_merges: true, add_bos: true, ..PLAIN };

/// Finds a pre-tokenizer by name.
pub(crate) fn find(name: &str) -> Option<&'static PreTokenizer> {
    TABLE.iter().find(|row| row.names.contains(&name))
}

/// All names, those of one row together.
pub fn known_names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().flat_map(|row| row.names.iter().copied())
}

const LLAMA3: &[Rule] = &[By(Words { digits: 3, marks: false })];
const QWEN2: &[Rule] = &[By(Words { digits: 1, marks: false })];
const GPT2: &[Rule] = &[By(Gpt2)];
const DIGITS_GPT2: &[Rule] = &[Categories { pattern: r"[\p{N}]", spaces: AsMatched }, By(Gpt2)];
const LINES: &[Rule] = &[By(Newlines)];

const THREE_DIGITS: Rule = Categories { pattern: r"[\p{N}]{1,3}", spaces: AsMatched };
const ASCII_THREE_DIGITS: Rule = Categories { pattern: "[0-9][0-9][0-9]", spaces: AsMatched };
const LINE_BREAK: Rule = Categories { pattern: r"[\r\n]", spaces: AsMatched };

const DEEPSEEK_WORDS: Rule = Categories {
    pattern: concat!(
        r"[\x21-\x2F\x3A-\x40\x5B-\x60\x7B-\x7E][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"
    ),
    spaces: LeaveLast,
};
const DEEPSEEK_V3: &[Rule] = &[THREE_DIGITS, Sets { pattern: r"\xE0+", sets: &[HAN_AND_KANA] }, DEEPSEEK_WORDS];

const SPACED_WORDS: Rule = Sets { pattern: r" ?[^(\s|.,!?)\xE0]+", sets: &[SENTENCE_MARKS] };

static TABLE: &[PreTokenizer] = &[
    row(
        &["default"],
        &[
            Categories { pattern: r"[\p{P}$+<=>^~|]+", spaces: AsMatched },
            By(Gpt2),
            Categories { pattern: r"[\p{N}]+", spaces: AsMatched },
            ASCII_THREE_DIGITS,
        ],
        PLAIN,
    ),
    row(
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        LLAMA3,
        WHOLE_WORDS_BOS,
    ),
    row(&["dbrx"], LLAMA3, PLAIN),
    row(&["smaug-bpe"], LLAMA3, PLAIN),
    row(&["glm4", "chatglm-bpe"], LLAMA3, Flags { no_default_bos: true, ..PLAIN }),
    row(&["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"], QWEN2, PLAIN),
    row(&["stablelm2"], QWEN2, PLAIN),
    row(&["hunyuan"], QWEN2, PLAIN),
    row(&["solar-open"], QWEN2, PLAIN),
    row(&["grok-2"], QWEN2, PLAIN),
    row(&["qwen35"], &[By(Words { digits: 1, marks: true })], PLAIN),
    row(&["laguna"], &[By(Newlines), By(Words { digits: 1, marks: false })], PLAIN),
    row(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "exaone4",
        ],
        GPT2,
        PLAIN,
    ),
    row(&["mpt"], GPT2, PLAIN),
    row(&["olmo"], GPT2, PLAIN),
    row(&["jais"], GPT2, PLAIN),
    row(&["trillion"], GPT2, PLAIN),
    row(&["granite-docling"], GPT2, PLAIN),
    row(&["starcoder"], DIGITS_GPT2, PLAIN),
    row(&["refact"], DIGITS_GPT2, PLAIN),
    row(&["command-r"], DIGITS_GPT2, PLAIN),
    row(&["smollm"], DIGITS_GPT2, PLAIN),
    row(&["codeshell"], DIGITS_GPT2, PLAIN),
    row(&["exaone"], DIGITS_GPT2, PLAIN),
    row(&["minerva-7b"], DIGITS_GPT2, PLAIN),
    row(&["mellum2"], DIGITS_GPT2, PLAIN),
    row(
        &["falcon"],
        &[Categories { pattern: r"[\p{P}$+<=>^~|`]+", spaces: AsMatched }, By(Gpt2), ASCII_THREE_DIGITS],
        PLAIN,
    ),
    row(
        &["chameleon"],
        &[
            Categories { pattern: "<sentinel:[0-9]+>", spaces: AsMatched },
            Categories { pattern: "IMGIMG[A-I]{1,4}Z", spaces: AsMatched },
            Categories { pattern: r"[\t\n]|    |  ", spaces: AsMatched },
            Categories { pattern: r"[\p{N}]", spaces: AsMatched },
            Categories { pattern: r"[\p{P}\x21-\x2F\x3A-\x40\x5B-\x60\x7B-\x7E]", spaces: AsMatched },
            By(Gpt2),
        ],
        BOS,
    ),
    row(
        &["deepseek-llm"],
        &[
            LINE_BREAK,
            Sets { pattern: r"\s?[A-Za-z\xE0]+", sets: &[CASED_LETTERS] },
            Sets { pattern: r"\s?[\x21-\x2F\x3A-\x7E\xE0]+", sets: &[WIDE_PUNCTUATION] },
            Categories { pattern: r"\s+\z", spaces: AsMatched },
            Sets { pattern: r"\xE0+", sets: &[ASIAN_BLOCKS] },
            Categories { pattern: r"[\p{N}]+", spaces: AsMatched },
        ],
        PLAIN,
    ),
    row(
        &["deepseek-coder"],
        &[
            LINE_BREAK,
            Categories { pattern: r"\s?[\p{L}]+", spaces: AsMatched },
            Categories { pattern: r"\s?[\p{P}]+", spaces: AsMatched },
            Sets { pattern: r"\xE0+", sets: &[ASIAN_BLOCKS] },
            Categories { pattern: r"[\p{N}]", spaces: AsMatched },
        ],
        PLAIN,
    ),
    row(&["deepseek-v3"], DEEPSEEK_V3, PLAIN),
    row(&["hunyuan-dense"], DEEPSEEK_V3, PLAIN),
    row(&["joyai-llm"], DEEPSEEK_V3, PLAIN),
    row(
        &["youtu"],
        &[
            Sets { pattern: r"\xE0+|\xE1+|\xE2+|\xE3+", sets: &[HANGUL, CJK_PUNCTUATION, BOPOMOFO, HAN_AND_KANA] },
            Categories {
                pattern: concat!(
                    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]*[\p{L}\p{M}]+(?:'(?i:[stmd]|re|ve|ll))?",
                    r"|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
                ),
                spaces: LeaveLast,
            },
        ],
        WHOLE_WORDS,
    ),
    row(
        &["tiny_aya", "cohere2moe"],
        &[
            By(DigitGroups),
            Categories {
                pattern: concat!(
                    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]*[\p{L}\p{M}]+(?:'(?i:[stmd]|re|ve|ll))?",
                    r"|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
                ),
                spaces: LeaveLast,
            },
        ],
        PLAIN,
    ),
    row(
        &["tekken"],
        &[Categories {
            pattern: concat!(
                r"[^\r\n\p{L}\p{N}]?[A-Z\xD2]*[a-z\xD2]+|[^\r\n\p{L}\p{N}]?[A-Z\xD2]+[a-z\xD2]*",
                r"|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
            ),
            spaces: LeaveLast,
        }],
        WHOLE_WORDS_BOS,
    ),
    row(&["gpt-4o", "llama4", "kanana2", "talkie"], GPT4O, PLAIN),
    row(&["minimax-m2"], GPT4O, PLAIN),
    row(
        &["granite-embed-multi-97m"],
        &[Categories {
            pattern: concat!(
                r"[^\r\n\p{L}\p{N}]?[A-Z\xD2\xD4]*[a-z\xD2\xD4]+(?:'(?i:[stmd]|re|ve|ll))?",
                r"|[^\r\n\p{L}\p{N}]?[A-Z\xD2\xD4]+[a-z\xD2\xD4]*(?:'(?i:[stmd]|re|ve|ll))?",
                r"|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
            ),
            spaces: LeaveLast,
        }],
        WHOLE_WORDS,
    ),
    row(
        &["jais-2"],
        &[Categories {
            pattern: concat!(
                r"'(?i:[stmd]|re|ve|ll)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
                r"|\s*[\r\n]+|\s+"
            ),
            spaces: PowersOfTwo,
        }],
        PLAIN,
    ),
    row(
        &["minicpm5"],
        &[
            THREE_DIGITS,
            Categories {
                pattern: concat!(
                    r"'(?i:[stmd]|re|ve|ll)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]+| ?[^\s\p{L}\p{N}]+[\r\n]*",
                    r"|\s*[\r\n]+|\s+"
                ),
                spaces: LeaveLast,
            },
        ],
        WHOLE_WORDS,
    ),
    row(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[Categories {
            pattern: concat!(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n]*",
                r"|\s*[\r\n]|\s+"
            ),
            spaces: LeaveLast,
        }],
        PLAIN,
    ),
    row(
        &["seed-coder"],
        &[Categories {
            pattern: concat!(
                r"'(?i:[stmd]|re|ve|ll)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]| ?[^\s\p{L}\p{N}\r\n]+",
                r"|\s*[\r\n]+|\s+"
            ),
            spaces: LeaveLast,
        }],
        PLAIN,
    ),
    row(
        &["exaone-moe"],
        &[Categories {
            pattern: concat!(
                r"'(?i:[stmd]|re|ve|ll)|[^\r\n\p{L}\p{N}]?(?:[\p{L}][\p{M}]*(?: [\p{L}][\p{M}]*)*)+",
                r"|[\p{N}]| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+"
            ),
            spaces: LeaveLast,
        }],
        PLAIN,
    ),
    row(&["afmoe"], &[By(DigitGroups), Sets { pattern: r"\xE0+", sets: &[UNSPACED_SCRIPTS] }, DEEPSEEK_WORDS], PLAIN),
    row(&["superbpe"], &[Categories { pattern: r"[\p{N}]+", spaces: AsMatched }, By(Thousands)], PLAIN),
    row(&["kimi-k2"], &[By(HanAware)], Flags { merges_optional: true, ..PLAIN }),
    row(&["poro-chat"], &[SPACED_WORDS], PLAIN),
    row(&["bloom"], &[SPACED_WORDS], PLAIN),
    row(&["gpt3-finnish"], &[SPACED_WORDS], PLAIN),
    row(&["viking"], &[SPACED_WORDS, Categories { pattern: r"[\p{N}]", spaces: AsMatched }], PLAIN),
    row(
        &["gemma4", "granite-embed-multi-311m"],
        LINES,
        Flags { raw_utf8: true, escape_spaces: true, newline_tokens: true, force_bos: true, ..PLAIN },
    ),
    row(&["sarvam-moe"], LINES, Flags { raw_utf8: true, escape_spaces: true, ..PLAIN }),
    row(&["whitespace"], &[Categories { pattern: r"\S+", spaces: AsMatched }], Flags { raw_utf8: true, ..PLAIN }),
];

const GPT4O: &[Rule] = &[Categories {
    pattern: concat!(
        r"[^\r\n\p{L}\p{N}]?[A-Z\xD2]*[a-z\xD2]+(?:'(?i:[stmd]|re|ve|ll))?",
        r"|[^\r\n\p{L}\p{N}]?[A-Z\xD2]+[a-z\xD2]*(?:'(?i:[stmd]|re|ve|ll))?",
        r"|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
    ),
    spaces: LeaveLast,
}];

const fn row(names: &'static [&'static str], rules: &'static [Rule], flags: Flags) -> PreTokenizer {
    PreTokenizer { names, rules, flags }
}

/// Letters of DeepSeek LLM: those of the scripts that have case.
#[rustfmt::skip]
const CASED_LETTERS: Set = &[
    (0xB5, 0xB5), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x1BA), (0x1BC, 0x1BF), (0x1C4, 0x293), (0x295, 0x2AF),
    (0x370, 0x373), (0x376, 0x377), (0x37B, 0x37D), (0x37F, 0x37F), (0x386, 0x386), (0x388, 0x38A), (0x38C, 0x38C),
    (0x38E, 0x3A1), (0x3A3, 0x3F5), (0x3F7, 0x481), (0x48A, 0x52F), (0x531, 0x556), (0x10A0, 0x10C5),
    (0x13A0, 0x13F5), (0x13F8, 0x13FD), (0x1C90, 0x1CBA), (0x1CBD, 0x1CBF), (0x1D00, 0x1D2B), (0x1D6B, 0x1D77),
    (0x1D79, 0x1D9A), (0x1E00, 0x1F15), (0x1F18, 0x1F1D), (0x1F20, 0x1F45), (0x1F48, 0x1F4D), (0x1F50, 0x1F57),
    (0x1F59, 0x1F59), (0x1F5B, 0x1F5B), (0x1F5D, 0x1F5D), (0x1F5F, 0x1F7D), (0x1F80, 0x1FB4), (0x1FB6, 0x1FBC),
    (0x1FBE, 0x1FBE), (0x1FC2, 0x1FC4), (0x1FC6, 0x1FCC), (0x1FD0, 0x1FD3), (0x1FD6, 0x1FDB), (0x1FE0, 0x1FEC),
    (0x1FF2, 0x1FF4), (0x1FF6, 0x1FFC), (0x2102, 0x2102), (0x2107, 0x2107), (0x210A, 0x2113), (0x2115, 0x2115),
    (0x2119, 0x211D), (0x2124, 0x2124), (0x2126, 0x2126), (0x2128, 0x2128), (0x212A, 0x212D), (0x212F, 0x2134),
    (0x2139, 0x2139), (0x213C, 0x213F), (0x2145, 0x2149), (0x214E, 0x214E), (0x2183, 0x2184), (0x2C00, 0x2C7B),
    (0x2C7E, 0x2CE4), (0x2CEB, 0x2CEE), (0x2CF2, 0x2CF3), (0xA640, 0xA66D), (0xA680, 0xA69B), (0xA722, 0xA76F),
    (0xA771, 0xA787), (0xA78B, 0xA78E), (0xAB70, 0xABBF), (0xFB00, 0xFB06), (0xFB13, 0xFB17), (0xFF21, 0xFF3A),
    (0xFF41, 0xFF5A), (0x10400, 0x1044F), (0x104B0, 0x104D3), (0x104D8, 0x104FB), (0x10C80, 0x10CB2),
    (0x10CC0, 0x10CF2), (0x118A0, 0x118DF), (0x1E900, 0x1E943),
];

/// Full-width and curly punctuation.
#[rustfmt::skip]
const WIDE_PUNCTUATION: Set = &[
    (0x2018, 0x201F), (0x3000, 0x3002), (0xFF01, 0xFF0F), (0xFF1A, 0xFF5E),
];

/// Everything from Samaritan to the common Han characters, and Hangul.
#[rustfmt::skip]
const ASIAN_BLOCKS: Set = &[
    (0x800, 0x9FA5), (0xAC00, 0xD7FF),
];

/// Common Han characters, Hiragana and Katakana.
#[rustfmt::skip]
const HAN_AND_KANA: Set = &[
    (0x3040, 0x30FF), (0x4E00, 0x9FA5),
];

/// Hangul syllables and letters.
#[rustfmt::skip]
const HANGUL: Set = &[
    (0x3131, 0x318E), (0xAC00, 0xD7A3),
];

/// Punctuation of Chinese and Japanese.
#[rustfmt::skip]
const CJK_PUNCTUATION: Set = &[
    (0x2014, 0x2014), (0x2018, 0x2019), (0x201C, 0x201D), (0x2026, 0x2026), (0x3001, 0x303F), (0xFE30, 0xFE4F),
    (0xFF01, 0xFF01), (0xFF0C, 0xFF0C), (0xFF1A, 0xFF1B),
];

/// Bopomofo.
#[rustfmt::skip]
const BOPOMOFO: Set = &[
    (0x3105, 0x312F),
];

/// Marks that end or divide sentences: ellipsis, and those of Han, Devanagari, Urdu and Arabic.
#[rustfmt::skip]
const SENTENCE_MARKS: Set = &[
    (0x60C, 0x60C), (0x6D4, 0x6D4), (0x964, 0x964), (0x2026, 0x2026), (0x3001, 0x3002), (0xFF0C, 0xFF0C),
];

/// Scripts without spaces. The wide range from U+8C48 is what llama.cpp has.
#[rustfmt::skip]
const UNSPACED_SCRIPTS: Set = &[
    (0xE40, 0xEFF), (0x1000, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x2F00, 0x2FDF), (0x3040, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0xFAFF), (0xFF65, 0xFF9F),
];
