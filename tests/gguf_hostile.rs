//! Broken and hostile files, built by hand: each is refused with one line that says what and where, in bounded time
//! and memory. Published vulnerabilities of other readers are named where a case stands for one.

mod gguf_support;

use gguf_support::{accepted, check_message, open_watched, peak_bytes, refused};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, TensorType, Value};

const U8: u32 = 0;
const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;

const CUT: &str = "download or copy the file again";
const DAMAGED: &str = "the file is damaged or hostile, download or convert it again";

fn base() -> RawGguf {
    RawGguf::new().str("general.architecture", "llama")
}

/// One tensor description with as many dimensions as given, at offset 0, followed by 64 bytes of data.
fn one_info(name: &str, dims: &[i64], ty: TensorType) -> Vec<u8> {
    base().info(name, dims.len() as u32, dims, ty.0, 0).data(&[0; 64]).build()
}

/// A file with every kind of value and several tensors.
fn sample(file: RawGguf) -> RawGguf {
    let inner = file.array_payload(STRING, 2, &[file.string(b"x"), file.string(b"")].concat());
    let nested = [inner, file.array_payload(U8, 3, &[1, 2, 3])].concat();
    file.str("general.architecture", "llama")
        .pair("u8", U8, &[7])
        .u16("u16", 300)
        .u32("u32", 70_000)
        .i32("i32", -5)
        .u64("u64", 1 << 40)
        .f32("f32", 1.5)
        .bool("bool", true)
        .strings("tokens", &["<s>", "", "\u{e9}"])
        .f32s("scores", &[0.0, -1.0])
        .i32s("types", &[1, 2, 3])
        .array("nested", ARRAY, 2, &nested)
        .f32_tensor("a", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .tensor("b", &[32, 1], TensorType::Q8_0, &[3; 34])
        .f32_tensor("c", &[5], &[1.0; 5])
}

#[test]
fn files_that_are_not_gguf_say_how_they_begin() {
    refused(b"", &["it is empty", CUT]);
    for short in [&b"G"[..], b"GG", b"GGU"] {
        refused(short, &["and ends there", CUT]);
    }
    for (magic, advice) in [
        (b"GGML", "converted to GGUF first"),
        (b"FUGG", "swapped order"),
        (b"gguf", "give a GGUF file"),
        (b"\x1b[2J", "give a GGUF file"),
        (b"\xff\xfe\0\0", "give a GGUF file"),
    ] {
        refused(&RawGguf { magic: *magic, ..base() }.build(), &["it begins with", "expected \"GGUF\"", advice]);
    }
    refused(b"GGUF", &["cut short: the version at byte 4 needs 4 bytes, 0 are left", CUT]);
    refused(b"GGUF\x03\0", &["the version", "2 are left"]);
}

#[test]
fn versions_other_than_two_and_three_are_refused() {
    for (version, advice) in
        [(0, DAMAGED), (1, "newer llama.cpp"), (4, "newer lwq"), (0x30003, DAMAGED), (u32::MAX, DAMAGED)]
    {
        let file = RawGguf { version, ..base() }.build();
        refused(&file, &[&format!("GGUF version {version} is not supported, only 2 and 3 are"), advice]);
    }
    refused(&RawGguf { version: 4, ..RawGguf::big_endian() }.build(), &["GGUF version 67108864", "only 2 and 3"]);
    // Version 3 in the other byte order announces a big-endian file: its counts are read so.
    let mut swapped = base().build();
    swapped[4..8].copy_from_slice(&0x0300_0000u32.to_le_bytes());
    refused(&swapped, &["n_tensors is 0", "n_kv is 72057594037927936"][1..]);
}

#[test]
fn counts_are_compared_with_the_file_before_anything_is_allocated() {
    // CVE-2024-23605 (n_kv) and CVE-2024-21836 (n_tensors) and their kin: count times size wraps.
    for count in [-1, i64::MIN] {
        refused(&RawGguf { n_kv: Some(count), ..base() }.build(), &[&format!("n_kv is {count}, which is negative")]);
        let file = RawGguf { n_tensors: Some(count), ..base() }.build();
        refused(&file, &[&format!("n_tensors is {count}, which is negative"), "download or convert"]);
    }
    for count in [1i64 << 31, i64::MAX, 0x0aaa_aaaa_aaaa_aaab, 1 << 60, (1 << 20) + 1] {
        refused(&RawGguf { n_kv: Some(count), ..base() }.build(), &[&format!("n_kv is {count}, more than")]);
        let file = RawGguf { n_tensors: Some(count), ..base() }.build();
        refused(&file, &[&format!("n_tensors is {count}, more than the 1048576 that lwq follows")]);
    }
    let more = base().pair("a", U8, &[1]);
    refused(&RawGguf { n_kv: Some(1 << 20), ..more.clone() }.build(), &["n_kv is 1048576, which needs 14680064 bytes"]);
    refused(&RawGguf { n_tensors: Some(1000), ..more.clone() }.build(), &["n_tensors is 1000, which needs"]);
    // One more than there are: the tensor description is taken for a pair.
    refused(&RawGguf { n_kv: Some(3), ..more.f32_tensor("a", &[1], &[1.0]) }.build(), &["key \"a\": occurs twice"]);
    let none = accepted(RawGguf::new().build());
    assert!(none.metadata().is_empty() && none.tensors().is_empty());
    assert_eq!(accepted(base().build()).metadata().len(), 1);
}

#[test]
fn a_file_cut_at_any_byte_is_refused_until_its_last_tensor_is_whole() {
    for big_endian in [false, true] {
        for version in [2, 3] {
            let file = sample(RawGguf { version, big_endian, ..RawGguf::new() });
            let whole = file.build();
            // The last tensor has 20 bytes; the zeros behind it may be missing.
            let needed = whole.len() - 12;
            for len in 0..whole.len() {
                match Gguf::from_bytes(whole[..len].to_vec()) {
                    Ok(_) => assert!(len >= needed, "accepted at {len} of {needed} bytes"),
                    Err(error) => {
                        assert!(len < needed, "{error}");
                        check_message(&error, "<memory>", &[]);
                    }
                }
            }
            refused(&whole[..needed - 1], &["tensor \"c\"", "needs 20 bytes, 19 are left", CUT]);
        }
    }
}

#[test]
fn no_change_of_a_byte_makes_the_reader_panic() {
    for big_endian in [false, true] {
        let whole = sample(RawGguf { big_endian, ..RawGguf::new() }).build();
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff, whole[at] ^ 1, whole[at].wrapping_add(1)] {
                let mut changed = whole.clone();
                changed[at] = value;
                let (result, peak) = peak_bytes(|| Gguf::from_bytes(changed));
                assert!(peak < 64 * 1024, "{peak} bytes at {at}");
                match result {
                    Ok(gguf) => gguf.tensors().iter().for_each(|tensor| drop(gguf.tensor_data(tensor))),
                    Err(error) => check_message(&error, "<memory>", &[]),
                }
            }
        }
    }
}

#[test]
fn keys_are_bounded_valid_and_unique() {
    refused(&base().pair("", U8, &[1]).build(), &["key number 1 (after \"general.architecture\"): is empty", DAMAGED]);
    // CVE-2024-23496: length + 1 wraps to 0.
    for len in [u64::MAX, (1 << 30) + 1, 1 << 63, 65_536] {
        let file = RawGguf { n_kv: Some(1), ..RawGguf::new().raw_pairs(&len.to_le_bytes()).raw_pairs(&[b'k'; 40]) };
        refused(&file.build(), &["metadata key number 0: has length", &len.to_string(), "at most 65535"]);
    }
    let one_more = RawGguf { n_kv: Some(1), ..RawGguf::new().raw_pairs(&9u64.to_le_bytes()).raw_pairs(b"12345678") };
    refused(&one_more.header(), &["metadata key number 0 at byte 32 needs 9 bytes, 8 are left", CUT]);
    refused(&base().pair(b"a\xff\x1b[31m", U8, &[1]).build(), &[r#""a\xff\u{1b}[31m" is not valid UTF-8"#, DAMAGED]);
    refused(&base().pair("a\0b", U8, &[1]).build(), &["holds a NUL byte"]);
    refused(&base().u32("k", 1).u32("other", 1).str("k", "x").build(), &["key \"k\": occurs twice, as pairs 1 and 3"]);
    // A long name is cut in the message, a control character shown escaped.
    let long = "n".repeat(60_000);
    refused(&base().u32(&long, 1).u32(&long, 1).build(), &["(60000 bytes): occurs twice"]);
    let evil = base().str("evil\x1b]0;title\x07", "x").build();
    assert!(accepted(evil).metadata().contains("evil\x1b]0;title\x07"));
}

#[test]
fn a_million_keys_take_no_quadratic_time() {
    let mut file = RawGguf::new();
    let mut pairs = Vec::new();
    for number in 0..1_000_000u32 {
        let key = format!("k{:06}", u64::from(number) * 7_919 % 1_000_000);
        pairs.extend((key.len() as u64).to_le_bytes());
        pairs.extend(key.as_bytes());
        pairs.extend(U8.to_le_bytes());
        pairs.push(1);
    }
    file = file.raw_pairs(&pairs);
    file.n_kv = Some(1_000_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    std::fs::write(&path, file.build()).unwrap();
    let gguf = open_watched(&path, pairs.len() as u64).unwrap();
    assert_eq!(gguf.metadata().u64("k123456").unwrap(), Some(1));
    drop(gguf);
    file.n_kv = Some(1_000_001);
    std::fs::write(&path, file.pair("k500000", U8, &[1]).build()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[16..24].copy_from_slice(&1_000_001u64.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = open_watched(&path, bytes.len() as u64).map(drop).unwrap_err();
    check_message(&error, "hostile.gguf", &["\"k500000\"", "occurs twice"]);
}

#[test]
fn value_types_and_arrays_are_bounded() {
    for id in [13u32, 255, u32::MAX] {
        let shown = format!("value type is {}, GGUF has 0 to 12", id.cast_signed());
        refused(&base().pair("k", id, &[0; 16]).build(), &["key \"k\"", &shown, DAMAGED]);
        let shown = format!("array element type is {}", id.cast_signed());
        refused(&base().array("k", id, 1, &[0; 16]).build(), &["key \"k\"", &shown]);
    }
    // CVE-2024-21825 and the Python reader's hang: counts whose product with the size wraps.
    for (elem, name) in [(U8, "u8"), (U32, "u32"), (U64, "u64"), (STRING, "str"), (ARRAY, "arr")] {
        for count in [1u64 << 63, u64::MAX, (1 << 61) + 1, (1 << 30) + 1] {
            let file = base().array("k", elem, count, &[0; 32]).build();
            refused(&file, &["key \"k\": claims an array of", &count.to_string()]);
        }
        let file = RawGguf::new().array("k", elem, 9, &[0; 8]).header();
        refused(&file, &["array of 9 elements", name, "\"k\""]);
    }
    let past = base().array("k", F32, 3, &[0; 11]).header();
    refused(&past, &["an array of 3 elements of f32 in key \"k\"", "needs 12 bytes, 11 are left"]);
    // CVE-2025-49847 and the like: a string length beyond 31 or 63 bits.
    for len in [1u64 << 31, (1 << 63) + 1, u64::MAX] {
        let elements = [&len.to_le_bytes()[..], b"token"].concat();
        let parts = ["a string in the value of key \"k\"", &format!("needs {len} bytes"), CUT];
        refused(&base().array("k", STRING, 1, &elements).build(), &parts);
        refused(&base().pair("k", STRING, &elements).build(), &parts);
    }
}

#[test]
fn nesting_is_bounded_and_kept_within_the_bound() {
    let nest = |depth: usize| {
        let mut payload = base().array_payload(U8, 2, &[1, 2]);
        for _ in 1..depth {
            payload = base().array_payload(ARRAY, 1, &payload);
        }
        base().pair("deep", ARRAY, &payload).build()
    };
    let gguf = accepted(nest(8));
    let mut array = gguf.metadata().array("deep").unwrap().unwrap().clone();
    for _ in 1..8 {
        let Some(Value::Array(inner)) = array.iter().next() else { panic!("{array:?}") };
        array = inner;
    }
    assert_eq!(array.to_i64_vec().unwrap(), [1, 2]);
    for depth in [9, 10_000] {
        refused(&nest(depth), &["key \"deep\": nests arrays more than 8 deep", DAMAGED]);
    }
    // Wide nesting: many empty arrays in arrays, more elements than may be visited, hardly any bytes to hold them.
    let empty = base().array_payload(STRING, 1 << 40, &[]);
    refused(&base().array("wide", ARRAY, 1, &empty).build(), &["key \"wide\": claims an array of 1099511627776"]);
}

#[cfg(unix)]
#[test]
fn a_sparse_file_cannot_make_the_reader_visit_gigabytes() {
    let claims = |file: RawGguf, part: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hostile.gguf");
        std::fs::write(&path, file.header()).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9 << 30).unwrap();
        let error = open_watched(&path, file.header().len() as u64).map(drop).unwrap_err();
        check_message(&error, "hostile.gguf", &[part]);
    };
    claims(base().array("k", STRING, 1 << 30, &[]), "array of 1073741824 strings or arrays, at most 16777216");
    claims(base().array("k", ARRAY, 1 << 29, &[]), "at most 16777216");
    claims(RawGguf::big_endian().array("k", U64, 1 << 30, &[]), "to be reordered to 8589934592 bytes");
    // The zeros that follow are read as the next key, which is empty.
    claims(RawGguf { n_kv: Some(3), ..base().array("k", U64, 1 << 30, &[]) }, "is empty");
    let long = [&(1u64 << 31).to_le_bytes()[..]].concat();
    claims(RawGguf::new().pair("k", STRING, &long), "a string of 2147483648 bytes, at most 1073741824");
    let bad_name = base().info("x", 1, &[1], 0, 0);
    claims(RawGguf { n_tensors: Some(1 << 20), ..bad_name }, "has an empty name");
}

#[test]
fn long_strings_stay_in_the_file() {
    let open = |file: RawGguf, len: u64| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long.gguf");
        std::fs::write(&path, file.header()).unwrap();
        let whole = file.header().len() as u64 + len;
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(whole).unwrap();
        open_watched(&path, file.header().len() as u64).unwrap()
    };
    let template = base().pair("tokenizer.chat_template", STRING, &100_000_000u64.to_le_bytes());
    let gguf = open(template, 100_000_000);
    assert_eq!(gguf.metadata().bytes("tokenizer.chat_template").unwrap().map(<[u8]>::len), Some(100_000_000));
    let token = base().array("tokenizer.ggml.tokens", STRING, 1, &(1u64 << 30).to_le_bytes());
    let gguf = open(token, 1 << 30);
    let tokens = gguf.metadata().array("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.iter_str().unwrap().next().map(<[u8]>::len), Some(1 << 30));
}

#[test]
fn odd_bools_are_true_and_written_as_one() {
    let gguf = accepted(base().pair("b", BOOL, &[2]).array("bs", BOOL, 3, &[0, 1, 200]).build());
    assert_eq!(gguf.metadata().bool("b").unwrap(), Some(true));
    let bools = gguf.metadata().array("bs").unwrap().unwrap();
    assert_eq!(bools.to_bool_vec().unwrap(), [false, true, true]);
    assert_eq!(bools.raw(), [0, 1, 1]);
}

#[test]
fn alignment_must_be_a_u32_power_of_two_and_is_honoured() {
    for alignment in [0, 1 + 2, 33, u32::MAX] {
        let parts = ["\"general.alignment\"", &format!("is {alignment}, expected a power of two"), DAMAGED];
        refused(&base().u32("general.alignment", alignment).build(), &parts);
    }
    refused(&base().u64("general.alignment", 32).build(), &["is of type u64 (32), expected u32"]);
    refused(&base().i32("general.alignment", 32).build(), &["is of type i32 (32), expected u32"]);
    refused(&base().str("general.alignment", "32").build(), &["is of type str (\"32\"), expected u32"]);
    refused(
        &base().array("general.alignment", U32, 1, &[32, 0, 0, 0]).build(),
        &["arr of u32 (1 elements), expected u32"],
    );
    let huge = base().u32("general.alignment", 1 << 31).f32_tensor("a", &[1], &[1.0]).build();
    refused(&huge, &["padding before the tensor data (general.alignment is 2147483648)", CUT]);
    for alignment in [1u32, 8, 64, 4096] {
        let file = RawGguf { alignment: alignment as usize, ..RawGguf::new() }.u32("general.alignment", alignment);
        let gguf = accepted(file.f32_tensor("a", &[3], &[1.0; 3]).f32_tensor("b", &[1], &[2.0]).build());
        let b = gguf.tensor("b").unwrap();
        assert_eq!(b.offset, 12u64.next_multiple_of(alignment.into()));
        assert_eq!(gguf.data(b).unwrap(), 2.0f32.to_le_bytes());
    }
    // Offsets that follow another alignment than the key says.
    let file = base().u32("general.alignment", 64).f32_tensor("a", &[3], &[1.0; 3]).f32_tensor("b", &[1], &[2.0]);
    refused(&file.build(), &["tensor \"b\"", "offset 32 is not a multiple of the alignment 64"]);
}

#[test]
fn tensor_names_are_bounded_valid_and_unique() {
    refused(&one_info("", &[1], TensorType::F32), &["tensor number 0 (\"\"): has an empty name", DAMAGED]);
    refused(
        &one_info(&"n".repeat(1025), &[1], TensorType::F32),
        &["tensor number 0: name has 1025 bytes, at most 1024"],
    );
    assert_eq!(accepted(one_info(&"n".repeat(63), &[1], TensorType::F32)).tensors()[0].beyond_ggml(), None);
    // Image models of other programs have longer names: they are read, and whose limit it is is said.
    for len in [64, 1024] {
        let long = accepted(one_info(&"n".repeat(len), &[1], TensorType::F32));
        let problem = long.tensors()[0].beyond_ggml().unwrap();
        assert!(problem.contains(&len.to_string()) && problem.contains("63 (GGML_MAX_NAME)"), "{problem}");
    }
    for len in [1u64 << 30, u64::MAX] {
        let file = RawGguf { n_tensors: Some(1), ..base().raw_infos(&len.to_le_bytes()).raw_infos(&[b'n'; 80]) };
        refused(&file.build(), &["tensor number 0: name has", &len.to_string()]);
    }
    let bad = base().info(b"blk\xc3.weight\x1b[1m", 1, &[1], 0, 0).data(&[0; 4]).build();
    refused(&bad, &[r"blk\xc3.weight\u{1b}[1m", "name is not valid UTF-8"]);
    refused(&base().info("a\0b", 1, &[1], 0, 0).data(&[0; 4]).build(), &["name holds a NUL byte"]);
    let twice = base().f32_tensor("a", &[1], &[1.0]).f32_tensor("b", &[1], &[1.0]).f32_tensor("a", &[1], &[1.0]);
    refused(&twice.build(), &["tensor \"a\": the name occurs twice, as tensors 0 and 2", DAMAGED]);
    // Legal, and harmless here: names are never used as paths and always shown escaped.
    for name in ["../../etc/passwd", "a/b", "line\nbreak", "\x1b[2Jclear", "\u{202e}desrever"] {
        let gguf = accepted(one_info(name, &[1], TensorType::F32));
        assert_eq!(gguf.tensors()[0].name, name);
        assert!(!gguf.tensors()[0].shown_name().chars().any(char::is_control));
    }
}

#[test]
fn dimensions_and_sizes_never_wrap() {
    // CVE-2024-21802: more dimensions than there is room for.
    for n_dims in [9, 10, u32::MAX] {
        let file = base().info("t", n_dims, &[1; 9], 0, 0).data(&[0; 64]).build();
        refused(&file, &["tensor \"t\"", &format!("has {n_dims} dimensions, at most 8")]);
    }
    for n_dims in [5, 8] {
        let gguf = accepted(base().info("t", n_dims, &[1; 8][..n_dims as usize], 0, 0).data(&[0; 64]).build());
        let problem = gguf.tensors()[0].beyond_ggml().unwrap();
        assert!(problem.contains(&format!("{n_dims} dimensions, and ggml takes 4 (GGML_MAX_DIMS)")), "{problem}");
    }
    refused(&one_info("t", &[-1], TensorType::F32), &["tensor \"t\": dimension 0 is -1, expected 0 to 2^63 - 1"]);
    refused(&one_info("t", &[4, i64::MIN], TensorType::F32), &["dimension 1 is -9223372036854775808"]);
    // Products that wrap to zero, to a negative and to a small positive number.
    let wrapping: [&[i64]; 7] = [
        &[1 << 32, 1 << 32],
        &[1 << 62, 4],
        &[1 << 32, 1 << 31],
        &[i64::MAX, i64::MAX],
        &[i64::MAX],
        &[0x1_0000_0001, 0xffff_ffff, 3, 1],
        &[0, 1 << 62, 1 << 62],
    ];
    for dims in wrapping {
        refused(&one_info("t", dims, TensorType::F32), &["tensor \"t\": shape", "2^63 elements or more", DAMAGED]);
    }
    // CVE-2026-33298: the size in bytes wraps though the number of elements does not; for plain and block types.
    for (dims, ty) in [
        (&[(1i64 << 62) - 1, 2][..], TensorType::F32),
        (&[1 << 61, 2], TensorType::F64),
        (&[1 << 62], TensorType::F64),
        (&[256, (1 << 54) + 1], TensorType::Q8_K),
    ] {
        let bytes = one_info("t", dims, ty);
        let error = Gguf::from_bytes(bytes).map(drop).unwrap_err().to_string();
        assert!(error.contains("2^64 bytes or more") || error.contains("cut short: tensor \"t\""), "{error}");
    }
    refused(&one_info("t", &[1 << 62], TensorType::F64), &["type f64 has 2^64 bytes or more"]);
    // Within 31 bytes of 2^64: the padding would wrap (fed to llama-quantize as an imatrix).
    refused(
        &one_info("t", &[(1 << 62) - 1], TensorType::F32),
        &["18446744073709551612 bytes at offset 0 end beyond 2^64"],
    );
    refused(
        &one_info("t", &[1 << 40], TensorType::F32),
        &["tensor \"t\"", "needs 4398046511104 bytes, 64 are left", CUT],
    );
    // CVE-2026-7482: a shape larger than the data would copy foreign memory into the output.
    refused(&one_info("t", &[17], TensorType::F32), &["tensor \"t\"", "needs 68 bytes, 64 are left"]);
    refused(
        &one_info("t", &[255, 2], TensorType::Q4_K),
        &["row length 255 is not a multiple of 256, the block of type q4_K"],
    );
    refused(&one_info("t", &[], TensorType::Q8_0), &["row length 1 is not a multiple of 32"]);
}

#[test]
fn empty_tensors_and_scalars_are_accepted() {
    for dims in [&[0i64][..], &[0, 5], &[4, 0], &[0, 0, 0, 0], &[32, 7, 0, 3]] {
        let gguf = accepted(one_info("t", dims, TensorType::Q8_0.min(TensorType::F32)));
        let tensor = &gguf.tensors()[0];
        assert_eq!((tensor.elements(), tensor.bytes), (0, Some(0)));
        assert!(gguf.data(tensor).unwrap().is_empty());
    }
    let scalar = accepted(one_info("t", &[], TensorType::F32));
    assert_eq!((scalar.tensors()[0].elements(), scalar.tensors()[0].rows()), (1, 1));
}

#[test]
fn unknown_types_are_kept_and_refused_only_where_their_data_is_needed() {
    for id in [4u32, 5, 31, 32, 33, 36, 37, 38, 43, 255, u32::MAX] {
        let file =
            base().info("new", 1, &[100], id, 0).data(&[7; 64]).info("next", 1, &[8], 0, 64).data(&[1; 32]).build();
        let gguf = accepted(file.clone());
        let tensor = gguf.tensor("new").unwrap();
        let by_offset = Some(64);
        assert_eq!((tensor.ty.0, tensor.bytes, tensor.ty.to_string()), (id, by_offset, format!("type#{id}")));
        for result in
            [gguf.data(tensor).map(drop), gguf.tensor_data(tensor).map(drop), gguf.read_rows(tensor, 0, 1).map(drop)]
        {
            let error = result.unwrap_err();
            check_message(&error, "<memory>", &["tensor \"new\"", &format!("type#{id}"), "a newer lwq"]);
        }
        assert_eq!(gguf.data(gguf.tensor("next").unwrap()).unwrap(), [1; 32]);
    }
    let unknown = |offset| base().info("x", 1, &[9], 36, 32).info("next", 1, &[8], 0, offset).data(&[1; 96]);
    refused(&unknown(0).build(), &["tensor \"x\"", "offset is 32, expected 0"]);
    let unknown = |offset| base().info("x", 1, &[9], 36, 0).info("next", 1, &[8], 0, offset).data(&[1; 96]);
    refused(&unknown(8).build(), &["tensor \"next\"", "offset 8 is not a multiple of the alignment 32"]);
    refused(&unknown(96).build(), &["tensor \"next\"", "needs 32 bytes, 0 are left"]);
    refused(&unknown(u64::MAX - 31).build(), &["tensor \"next\"", "end beyond 2^64"]);
    accepted(unknown(64).build());
    // Integers, doubles and the types for sums are no weights, but files may hold them.
    for (ty, len) in [
        (TensorType::I8, 1),
        (TensorType::I64, 8),
        (TensorType::F64, 8),
        (TensorType::Q8_1, 36),
        (TensorType::Q8_K, 292),
    ] {
        let row = ty.info().unwrap().block_len as u64;
        let gguf = accepted(base().tensor("t", &[row], ty, &vec![1; len]).build());
        assert_eq!(gguf.data(&gguf.tensors()[0]).unwrap(), vec![1; len]);
    }
}

#[test]
fn offsets_must_follow_each_other_inside_the_file() {
    let second = |offset: u64| base().info("a", 1, &[8], 0, 0).info("b", 1, &[8], 0, offset).data(&[0; 128]).build();
    accepted(second(32));
    refused(&second(33), &["tensor \"b\"", "offset 33 is not a multiple of the alignment 32", DAMAGED]);
    // Two tensors at one offset, holes, and decreasing offsets.
    refused(&second(0), &["tensor \"b\"", "offset is 0, expected 32"]);
    refused(&second(64), &["tensor \"b\"", "offset is 64, expected 32"]);
    refused(&second(u64::MAX - 31), &["tensor \"b\"", "offset is 18446744073709551584, expected 32"]);
    refused(&second(1 << 40), &["tensor \"b\"", "offset is 1099511627776, expected 32"]);
    let first = base().info("a", 1, &[8], 0, 32).data(&[0; 128]).build();
    refused(&first, &["tensor \"a\"", "offset is 32, expected 0"]);
    // CVE-2025-53630: the running sum of sizes wraps. The first tensor that is not in the file ends it.
    let sum = base().info("a", 1, &[(1 << 62) - 8], 0, 0).info(
        "b",
        1,
        &[8],
        0,
        (1u64 << 63).wrapping_mul(2).wrapping_sub(32),
    );
    refused(&sum.data(&[0; 64]).build(), &["tensor \"a\"", "needs 18446744073709551584 bytes"]);
}

#[test]
fn the_data_section_may_be_followed_by_anything_but_not_be_cut() {
    let file = base().f32_tensor("a", &[3], &[1.0; 3]).f32_tensor("b", &[3], &[2.0; 3]);
    let whole = file.build();
    let header = file.header();
    refused(&header, &["the padding before the tensor data", CUT]);
    refused(&whole[..header.len().next_multiple_of(32)], &["tensor \"a\"", "needs 12 bytes, 0 are left"]);
    refused(&whole[..whole.len() - 21], &["tensor \"b\"", "needs 12 bytes, 11 are left"]);
    accepted(whole[..whole.len() - 20].to_vec());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trailing.gguf");
    std::fs::write(&path, &whole).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let gguf = open_watched(&path, whole.len() as u64).unwrap();
    assert_eq!(gguf.shards()[0].file_bytes(), 1 << 30);
    assert_eq!(gguf.data(gguf.tensor("b").unwrap()).unwrap(), [2.0f32; 3].map(f32::to_le_bytes).as_flattened());
}

#[test]
fn a_hundred_and_forty_gigabytes_open_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.gguf");
    let mut file = sample(RawGguf::new());
    let mut offset = file.data.len() as u64;
    for layer in 0..80u64 {
        // 28672 x 30000 x 2 bytes = 1.72 GB each.
        file = file.info(format!("blk.{layer}.ffn_up.weight"), 2, &[28672, 30000], TensorType::F16.0, offset);
        offset += 28672 * 30000 * 2;
    }
    let header = file.build();
    std::fs::write(&path, &header).unwrap();
    let sparse = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    if let Err(error) = sparse.set_len(header.len() as u64 + offset) {
        println!("skipped: no sparse file of {offset} bytes here: {error}");
        return;
    }
    let started = std::time::Instant::now();
    let (gguf, peak) = peak_bytes(|| Gguf::open(&path).unwrap());
    assert!(gguf.shards()[0].file_bytes() > 137_000_000_000);
    assert!(peak < 1 << 20, "{peak} bytes allocated");
    assert!(started.elapsed().as_secs_f64() < 1.0, "{:?}", started.elapsed());
    let last = gguf.tensors().last().unwrap();
    assert!(gguf.read_rows(last, 29_999, 1).unwrap().iter().all(|byte| *byte == 0));
    gguf.release(last);
}

#[test]
fn arrays_of_the_wrong_element_type_are_refused_where_they_are_used() {
    let gguf = accepted(base().array("tokenizer.ggml.scores", 1, 4, &[1, 2, 3, 4]).i32s("types", &[1]).build());
    let scores = gguf.metadata().array("tokenizer.ggml.scores").unwrap().unwrap();
    let wrong = scores.to_f32_vec().unwrap_err();
    assert!(
        wrong
            .to_string()
            .contains("\"tokenizer.ggml.scores\" is of type arr of i8 (4 elements), expected an array of f32")
    );
    assert!(scores.iter_str().is_err() && scores.to_bool_vec().is_err());
    assert!(gguf.metadata().array("types").unwrap().unwrap().to_f32_vec().is_err());
    let missing = gguf.metadata().missing("llama.block_count");
    assert!(missing.to_string().contains("\"llama.block_count\" is missing"));
}

#[test]
fn numbers_out_of_range_are_refused_where_they_are_used() {
    let gguf = accepted(base().i32("neg", -1).u64("big", u64::MAX).f32("pi", 3.5).str("bytes", b"\xff\x1b[0m").build());
    let metadata = gguf.metadata();
    for (error, part) in [
        (metadata.u64("neg").unwrap_err(), "\"neg\" is of type i32 (-1), expected a non-negative integer"),
        (metadata.u32("big").unwrap_err(), "\"big\" is of type u64 (18446744073709551615), expected an integer from 0"),
        (metadata.i64("big").unwrap_err(), "expected an integer below 2^63"),
        (metadata.u64("pi").unwrap_err(), "\"pi\" is of type f32 (3.5)"),
        (metadata.f32("neg").unwrap_err(), "expected f32"),
        (metadata.bool("neg").unwrap_err(), "expected bool"),
        (metadata.array("pi").unwrap_err(), "expected arr"),
        (metadata.str("bytes").unwrap_err(), r#"str ("\xff\u{1b}[0m"), expected str of valid UTF-8"#),
    ] {
        check_message(&error, "<memory>", &[part]);
    }
    assert_eq!(metadata.bytes("bytes").unwrap(), Some(&b"\xff\x1b[0m"[..]));
    assert_eq!(metadata.u64("absent").unwrap(), None);
}

#[cfg(unix)]
#[test]
fn paths_that_are_no_regular_files_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let check = |path: &std::path::Path, part: &str| {
        let message = Gguf::open(path).map(drop).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains(&*path.to_string_lossy()), "{message}");
    };
    check(dir.path(), "a directory, not a regular file");
    check(&dir.path().join("absent.gguf"), "cannot open the file");
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    if made.is_ok_and(|status| status.success()) {
        check(&fifo, "a special file");
    }
    check(std::path::Path::new("/dev/zero"), "a special file");
    let link = dir.path().join("loop.gguf");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    check(&link, "cannot open the file");
}
