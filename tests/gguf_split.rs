//! Split models: shards that belong together open as one, all others are refused with the shard at fault named.

mod gguf_support;

use std::path::{Path, PathBuf};

use gguf_support::check_message;
use lwq::gguf::split::{parse_shard_path, parse_size, plan_by_size, plan_like_input, shard_metadata, shard_path};
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Gguf, GgufLayout, GgufWriter, Metadata, NewTensor, Value};

/// Three shards: the first without tensors, then a and b, then c.
fn shards() -> [RawGguf; 3] {
    let first = RawGguf::new().str("general.architecture", "llama").u32("llama.block_count", 1).split(0, 3, 3);
    let second = RawGguf::new().split(1, 3, 3).f32_tensor("a", &[3], &[1.0; 3]).f32_tensor("b", &[2], &[2.0; 2]);
    let third = RawGguf::new().split(2, 3, 3).f32_tensor("c", &[4], &[3.0; 4]);
    [first, second, third]
}

fn write(dir: &Path, shards: &[RawGguf]) -> PathBuf {
    for (number, shard) in shards.iter().enumerate() {
        let path = shard_path(&dir.join("model"), number as u16, shards.len() as u16);
        std::fs::write(path, shard.build()).unwrap();
    }
    shard_path(&dir.join("model"), 0, shards.len() as u16)
}

fn refused(shards: &[RawGguf], file: &str, parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let first = write(dir.path(), shards);
    check_message(&Gguf::open(first).map(drop).unwrap_err(), file, parts);
}

/// The sound shards with one of them changed.
fn changed(number: usize, change: impl FnOnce(RawGguf) -> RawGguf) -> Vec<RawGguf> {
    let mut shards = shards().to_vec();
    shards[number] = change(shards[number].clone());
    shards
}

#[test]
fn shards_open_as_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(write(dir.path(), &shards())).unwrap();
    assert_eq!(gguf.shards().len(), 3);
    assert_eq!(gguf.metadata().str("general.architecture").unwrap(), Some("llama"));
    let found: Vec<_> =
        gguf.tensors().iter().map(|tensor| (tensor.name.as_str(), tensor.shard, tensor.offset)).collect();
    assert_eq!(found, [("a", 1, 0), ("b", 1, 32), ("c", 2, 0)]);
    assert_eq!(gguf.data(gguf.tensor("c").unwrap()).unwrap(), [3.0f32; 4].map(f32::to_le_bytes).as_flattened());
    assert!(gguf.shards()[2].path().unwrap().ends_with("model-00003-of-00003.gguf"));
    // An extra file beside them does not matter.
    std::fs::write(dir.path().join("model-00004-of-00003.gguf"), b"other").unwrap();
    assert!(Gguf::open(dir.path().join("model-00001-of-00003.gguf")).is_ok());
}

#[test]
fn odd_prefixes_are_only_names() {
    for prefix in ["%s%n", "a-00001-of-00003", "-", "\u{e9} x", ".."] {
        let dir = tempfile::tempdir().unwrap();
        for (number, shard) in shards().iter().enumerate() {
            std::fs::write(shard_path(&dir.path().join(prefix), number as u16, 3), shard.build()).unwrap();
        }
        let sub = dir.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        let first = shard_path(&sub.join("..").join(prefix), 0, 3);
        assert_eq!(Gguf::open(first).unwrap().tensors().len(), 3, "{prefix}");
    }
}

#[test]
fn a_file_that_stands_alone_needs_no_shard_name() {
    for (number, count, total) in [(0, 0, 1), (0, 1, 1), (7, 1, 99)] {
        let file = RawGguf::new().split(number, count, total).f32_tensor("a", &[1], &[1.0]);
        assert_eq!(Gguf::from_bytes(file.build()).unwrap().tensors().len(), 1);
    }
    let shard = shards()[0].build();
    check_message(&Gguf::from_bytes(shard).map(drop).unwrap_err(), "<memory>", &["is one of 3 shards", "by its path"]);
}

#[test]
fn a_model_is_opened_by_its_first_shard() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &shards());
    let second = dir.path().join("model-00002-of-00003.gguf");
    let error = Gguf::open(&second).map(drop).unwrap_err();
    let advice = format!("give {}", dir.path().join("model-00001-of-00003.gguf").display());
    check_message(&error, "model-00002-of-00003.gguf", &["is shard 2 of 3 (split.no is 1)", &advice]);
    let renamed = dir.path().join("renamed.gguf");
    std::fs::copy(&second, &renamed).unwrap();
    let error = Gguf::open(&renamed).map(drop).unwrap_err();
    check_message(&error, "renamed.gguf", &["give the first shard", "-00001-of-00003.gguf"]);
    std::fs::copy(dir.path().join("model-00001-of-00003.gguf"), &renamed).unwrap();
    let error = Gguf::open(&renamed).map(drop).unwrap_err();
    check_message(&error, "renamed.gguf", &["is the first of 3 shards", "rename it to end in -00001-of-00003.gguf"]);
    let other_count = dir.path().join("model-00001-of-00004.gguf");
    std::fs::copy(dir.path().join("model-00001-of-00003.gguf"), &other_count).unwrap();
    let error = Gguf::open(&other_count).map(drop).unwrap_err();
    check_message(&error, "model-00001-of-00004.gguf", &["rename it to end in -00001-of-00003.gguf"]);
}

#[test]
fn missing_empty_and_cut_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = write(dir.path(), &shards());
    let second = dir.path().join("model-00002-of-00003.gguf");
    let whole = std::fs::read(&second).unwrap();
    let check = |parts: &[&str]| {
        let error = Gguf::open(&first).map(drop).unwrap_err();
        check_message(&error, "model-0000", parts);
    };
    std::fs::remove_file(&second).unwrap();
    check(&["shard 2 of 3 is missing", "put", "model-00002-of-00003.gguf beside it"]);
    std::fs::write(&second, b"").unwrap();
    check(&["model-00002-of-00003.gguf: not a GGUF file: it is empty"]);
    std::fs::write(&second, &whole[..whole.len() - 40]).unwrap();
    check(&["model-00002-of-00003.gguf: cut short: tensor"]);
    #[cfg(unix)]
    {
        std::fs::remove_file(&second).unwrap();
        std::os::unix::fs::symlink(&second, &second).unwrap();
        check(&["model-00002-of-00003.gguf: cannot open the file"]);
        std::fs::remove_file(&second).unwrap();
        std::os::unix::fs::symlink(dir.path().join("model-00003-of-00003.gguf"), &second).unwrap();
        check(&["model-00002-of-00003.gguf", "\"split.no\": is 2, expected 1"]);
    }
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let plain = || RawGguf::new().str("general.architecture", "llama");
    let first = |file: RawGguf| changed(0, |_| file);
    refused(&first(plain().u16("split.count", 3)), "00001-of-00003", &["\"split.no\": is missing", "split.count is 3"]);
    refused(&first(plain().split(3, 3, 3)), "00001-of-00003", &["\"split.no\": is 3, split.count is 3"]);
    refused(&first(plain().i32("split.count", -1)), "00001-of", &["\"split.count\": is i32 (-1), expected u16"]);
    refused(&first(plain().str("split.count", "3")), "00001-of", &["\"split.count\": is str (\"3\"), expected u16"]);
    refused(&first(plain().u32("split.count", 65_536)), "00001-of", &["is u32 (65536), expected u16"]);
    refused(&first(plain().split(0, 65_535, 3)), "00001-of", &["the first of 65535 shards", "-00001-of-65535.gguf"]);
    let no_total = plain().u16("split.no", 0).u16("split.count", 3);
    refused(&first(no_total), "00001-of", &["\"split.tensors.count\": is missing in a split model"]);
    refused(&first(plain().split(0, 3, -1)), "00001-of", &["\"split.tensors.count\": is i32 (-1)"]);
    refused(
        &changed(2, |_| RawGguf::new().f32_tensor("c", &[4], &[3.0; 4])),
        "00003-of",
        &["\"split.no\": is missing, expected 2"],
    );
    refused(
        &changed(2, |file| RawGguf { pairs: Vec::new(), pair_count: 0, ..file }.split(1, 3, 3)),
        "00003-of",
        &["is 1, expected 2"],
    );
    refused(
        &changed(2, |file| RawGguf { pairs: Vec::new(), pair_count: 0, ..file }.split(2, 4, 3)),
        "00003-of",
        &["\"split.count\": is 4, expected 3"],
    );
}

#[test]
fn shards_of_different_models_are_refused() {
    refused(
        &changed(2, |file| RawGguf { version: 2, ..file }),
        "00003-of",
        &["is GGUF version 2, little endian", "version 3"],
    );
    let big = RawGguf::big_endian().split(2, 3, 3).f32_tensor("c", &[4], &[3.0; 4]);
    refused(&changed(2, |_| big), "00003-of", &["version 3, big endian, the first shard is version 3, little endian"]);
    refused(
        &changed(1, |file| file.str("general.architecture", "qwen3")),
        "00002-of",
        &["general.architecture is str (\"qwen3\")", "\"llama\""],
    );
    refused(
        &changed(2, |file| file.f32_tensor("a", &[1], &[0.0])),
        "00003-of",
        &["tensor \"a\": the name occurs in", "00002-of-00003.gguf too"],
    );
    refused(
        &changed(2, |file| file.f32_tensor("d", &[1], &[0.0])),
        "00001-of",
        &["split.tensors.count is 3, the shards hold 4"],
    );
    let fewer = RawGguf::new().split(2, 3, 3);
    refused(&changed(2, |_| fewer), "00001-of", &["split.tensors.count is 3, the shards hold 2"]);
    let other_total = RawGguf::new().split(2, 3, 9).f32_tensor("c", &[4], &[3.0; 4]);
    refused(&changed(2, |_| other_total), "00003-of", &["split.tensors.count is i32 (9), in the first shard i32 (3)"]);
}

#[test]
fn each_shard_keeps_its_own_alignment() {
    let mut second = RawGguf { alignment: 64, ..RawGguf::new() }.u32("general.alignment", 64).split(1, 3, 3);
    second = second.f32_tensor("a", &[3], &[1.0; 3]).f32_tensor("b", &[2], &[2.0; 2]);
    let dir = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(write(dir.path(), &changed(1, |_| second))).unwrap();
    assert_eq!(gguf.tensor("b").unwrap().offset, 64);
    assert_eq!(gguf.data(gguf.tensor("b").unwrap()).unwrap(), [2.0f32; 2].map(f32::to_le_bytes).as_flattened());
}

#[test]
fn shard_paths_are_built_and_taken_apart() {
    assert_eq!(shard_path(Path::new("dir/m"), 0, 3), Path::new("dir/m-00001-of-00003.gguf"));
    assert_eq!(shard_path(Path::new("m"), 65_534, 65_535), Path::new("m-65535-of-65535.gguf"));
    let (prefix, number, count) = parse_shard_path(Path::new("dir/a-of-b-00002-of-00003.gguf")).unwrap();
    assert_eq!((prefix.as_path(), number, count), (Path::new("dir/a-of-b"), 1, 3));
    for name in [
        "m.gguf",
        "m-00001-of-00003",
        "m-0001-of-0003.gguf",
        "m-00000-of-00003.gguf",
        "m-00004-of-00003.gguf",
        "m-+0001-of-00003.gguf",
        "00001-of-00003.gguf",
        "m-99999-of-99999.gguf",
    ] {
        assert!(parse_shard_path(Path::new(name)).is_none(), "{name}");
    }
}

#[test]
fn tensors_are_dealt_out_by_size_or_like_the_input() {
    assert_eq!(plan_by_size(&[100, 100, 100], 256, 32), [0..2, 2..3]);
    // Sizes count padded to the alignment: 128 each.
    assert_eq!(plan_by_size(&[100, 100, 100], 255, 32), [0..1, 1..2, 2..3]);
    // A tensor larger than the limit gets a shard of its own, and none is empty.
    assert_eq!(plan_by_size(&[1000, 10, 10, 1000], 100, 32), [0..1, 1..3, 3..4]);
    assert_eq!(plan_by_size(&[], 100, 32), vec![0..0; 1]);
    assert_eq!(plan_by_size(&[u64::MAX, u64::MAX], u64::MAX, 32), [0..1, 1..2]);
    assert_eq!(plan_like_input(&[1, 1, 2], 3), [0..0, 0..2, 2..3]);
    assert_eq!(plan_like_input(&[0, 0], 1), vec![0..2; 1]);
    assert_eq!(plan_like_input(&[], 2), [0..0, 0..0]);
}

#[test]
fn sizes_are_read_in_units_of_a_thousand() {
    for (text, bytes) in [
        ("4G", 4_000_000_000),
        ("500M", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("800k", 800_000),
        ("77", 77),
        ("2T", 2_000_000_000_000),
    ] {
        assert_eq!(parse_size(text), Ok(bytes));
    }
    for text in ["", "G", "0G", "-1G", "4GiB", "1e9", "1..5G", ".5G", "99999999999999T", "4 G", "0.0001K"] {
        let message = parse_size(text).unwrap_err();
        assert!(message.contains(&format!("{text:?}")) && message.contains("such as 4G"), "{message}");
    }
}

#[test]
fn a_model_split_while_writing_is_read_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let source = Gguf::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf")).unwrap();
    let sizes: Vec<u64> = source.tensors().iter().map(|tensor| tensor.bytes.unwrap()).collect();
    let plan = plan_by_size(&sizes, 1_500_000, source.metadata().alignment().unwrap());
    assert!(plan.len() > 3);
    let count = plan.len() as u16;
    for (number, range) in plan.iter().enumerate() {
        let number = number as u16;
        let metadata = shard_metadata(source.metadata(), number, count, source.tensors().len() as u64);
        let tensors = &source.tensors()[range.clone()];
        let path = shard_path(&dir.path().join("doclet"), number, count);
        let layout = GgufLayout::new("shard", &metadata, tensors.iter().map(NewTensor::from)).unwrap();
        let mut writer = GgufWriter::new(std::fs::File::create(path).unwrap(), layout).unwrap();
        for (index, tensor) in tensors.iter().enumerate() {
            writer.write(index, source.data(tensor).unwrap()).unwrap();
        }
        writer.finish().unwrap();
    }
    let merged = Gguf::open(shard_path(&dir.path().join("doclet"), 0, count)).unwrap();
    assert_eq!(merged.tensors().len(), source.tensors().len());
    for (ours, theirs) in merged.tensors().iter().zip(source.tensors()) {
        assert_eq!(NewTensor::from(ours), NewTensor::from(theirs));
        assert!(merged.data(ours).unwrap() == source.data(theirs).unwrap());
    }
    assert_eq!(merged.metadata().get("split.count"), Some(&Value::U16(count)));
    // One shard again: the split keys go.
    let whole: Metadata = shard_metadata(merged.metadata(), 0, 1, 0);
    assert_eq!(&whole, source.metadata());
}
