//! Reading of both forms: golden files, and hostile ones built by hand.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::build::{DatEntry, dat, trailer};
use super::*;

const GOLDEN_GGUF: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.gguf");
const GOLDEN_DAT: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.dat");

fn parse(bytes: &[u8]) -> Result<Imatrix, ImatrixError> {
    Imatrix::from_bytes(bytes, "bad.imatrix")
}

/// Asserts that reading fails quickly, on one line that names the file and holds `expected`.
#[track_caller]
fn refused(bytes: &[u8], expected: &str) {
    let started = Instant::now();
    let error = parse(bytes).expect_err("a hostile file was read").to_string();
    assert!(started.elapsed() < Duration::from_secs(2), "took {:?}", started.elapsed());
    assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    assert!(error.contains("bad.imatrix") || error.contains("<memory>"), "{error:?} names no file");
    assert!(!error.contains('\n') && error.len() < 600, "{error:?}");
}

#[test]
fn golden_gguf_is_read() {
    let imatrix = parse(GOLDEN_GGUF).unwrap();
    assert_eq!(imatrix.form, Form::Gguf);
    assert_eq!(imatrix.entries.len(), 42);
    assert_eq!(imatrix.datasets, ["calib-sample.txt"]);
    assert_eq!((imatrix.chunk_count, imatrix.chunk_size), (Some(241), Some(256)));
    assert_eq!(imatrix.warnings, []);
    let entry = &imatrix.entries["blk.0.attn_k.weight"];
    assert_eq!((entry.sums.len(), entry.counts.as_slice()), (256, &[61696][..]));
    let importance = entry.importance();
    assert_eq!(importance.values[1], 1438.9541f32 / 61696.0);
    assert_eq!(importance.neutral_matrices, 0);
}

#[test]
fn golden_dat_is_read_and_close_to_the_gguf() {
    let dat = parse(GOLDEN_DAT).unwrap();
    let gguf = parse(GOLDEN_GGUF).unwrap();
    assert_eq!(dat.form, Form::Dat);
    assert_eq!(dat.datasets, gguf.datasets);
    assert_eq!((dat.chunk_count, dat.chunk_size), (Some(241), None));
    assert_eq!(dat.entries.keys().collect::<Vec<_>>(), gguf.entries.keys().collect::<Vec<_>>());
    for (name, entry) in &dat.entries {
        assert_eq!(entry.counts, [241]);
        let (a, b) = (entry.importance(), gguf.entries[name].importance());
        for (a, b) in a.values.iter().zip(&b.values) {
            assert!((a - b).abs() <= b * 3e-7, "{name}: {a} {b}");
        }
    }
}

#[test]
fn open_tells_the_forms_apart_by_content() {
    let dir = tempfile::tempdir().unwrap();
    let misnamed: PathBuf = dir.path().join("gguf-inside.dat");
    std::fs::write(&misnamed, GOLDEN_GGUF).unwrap();
    assert_eq!(Imatrix::open(&misnamed).unwrap(), parse(GOLDEN_GGUF).unwrap());
    let misnamed = dir.path().join("dat-inside.gguf");
    std::fs::write(&misnamed, GOLDEN_DAT).unwrap();
    assert_eq!(Imatrix::open(&misnamed).unwrap(), parse(GOLDEN_DAT).unwrap());

    let damaged = dir.path().join("damaged.gguf");
    std::fs::write(&damaged, &GOLDEN_GGUF[..9000]).unwrap();
    let error = Imatrix::open(&damaged).unwrap_err();
    assert!(matches!(error, ImatrixError::Gguf(_)), "{error}");
    assert!(error.to_string().contains("damaged.gguf"), "{error}");

    for missing in [dir.path().join("none.dat"), dir.path().to_path_buf()] {
        let error = Imatrix::open(&missing).unwrap_err();
        assert!(matches!(error, ImatrixError::Read { .. }), "{error}");
    }
}

#[test]
fn legacy_without_a_trailer_or_dataset_is_read() {
    let entries = [DatEntry::new("blk.0.a.weight", 4, &[8.0, 2.0]), DatEntry::new("blk.1.a.weight", 4, &[1.0, 0.0])];
    let imatrix = parse(&dat(2, &entries, &[])).unwrap();
    assert_eq!(imatrix.entries["blk.0.a.weight"].importance().values, [2.0, 0.5]);
    assert_eq!((imatrix.chunk_count, imatrix.datasets.len()), (None, 0));
    let imatrix = parse(&dat(2, &entries, &7i32.to_le_bytes())).unwrap();
    assert_eq!((imatrix.chunk_count, imatrix.datasets.len()), (Some(7), 0));
    let imatrix = parse(&dat(2, &entries, &trailer(7, 0, ""))).unwrap();
    assert_eq!((imatrix.chunk_count, imatrix.datasets.len()), (Some(7), 0));
}

#[test]
fn legacy_values_without_calls_are_taken_as_they_are() {
    let imatrix = parse(&dat(1, &[DatEntry::new("w", 0, &[3.0, 5.0])], &[])).unwrap();
    assert_eq!(imatrix.entries["w"].importance().values, [3.0, 5.0]);
    assert_eq!(imatrix.warnings, [Warning::NoCalls { entries: 1, first: "w".into() }]);
}

#[test]
fn legacy_headers_that_lie_are_refused() {
    refused(b"", "ends inside the number of entries");
    refused(b"\x01\0\0", "ends inside the number of entries");
    for count in [0, -1, i32::MAX, i32::MIN, 2] {
        refused(&dat(count, &[DatEntry::new("w", 1, &[1.0])], &[]), "no imatrix");
    }
    refused(b"GGU\x07 is no magic but still a count", "no imatrix");
    refused(b"PK\x03\x04 some archive that was renamed to .dat", "no imatrix");
    refused(b"GGUFx", "cut short");
    refused(b"GGUF\x03\0\0\0", "cut short");
}

#[test]
fn legacy_entries_that_lie_are_refused() {
    let sound = DatEntry::new("w", 1, &[1.0, 2.0]);
    let with = |change: &dyn Fn(&mut DatEntry)| {
        let mut entry = sound.clone();
        change(&mut entry);
        dat(1, &[entry], &trailer(1, 1, "t"))
    };
    for len in [-1, 0, i32::MIN] {
        refused(&with(&|e| e.name_len = len), "the name length of entry 1");
    }
    refused(&with(&|e| e.name_len = i32::MAX), "ends inside the name of entry 1");
    refused(&with(&|e| e.name = vec![0xff]), "the name of entry 1");
    refused(&with(&|e| e.name = vec![0]), "the name of entry 1");
    for ncall in [-1, i32::MIN] {
        refused(&with(&|e| e.ncall = ncall), "the call count of \"w\"");
    }
    for nval in [-1, 0, i32::MIN] {
        refused(&with(&|e| e.nval = nval), "the number of values of \"w\"");
    }
    refused(&with(&|e| e.nval = i32::MAX), "ends inside the values of \"w\"");
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -1e-30] {
        refused(&with(&|e| e.values[1] = value), "value 1 of matrix 0");
    }
    assert!(parse(&with(&|e| e.values[1] = -0.0)).is_ok());
    refused(&dat(2, &[sound.clone(), sound.clone()], &[]), "two entries");
}

#[test]
fn legacy_trailers_that_lie_are_refused() {
    let entries = [DatEntry::new("w", 1, &[1.0])];
    refused(&dat(1, &entries, &trailer(1, -1, "t")), "the length of the dataset name (trailer) is -1");
    refused(&dat(1, &entries, &trailer(1, 2, "t")), "ends inside the dataset name (trailer)");
    refused(&dat(1, &entries, &trailer(1, i32::MAX, "t")), "ends inside the dataset name (trailer)");
    refused(&dat(1, &entries, &trailer(1, 1, "text")), "3 bytes follow the end");
    let odd = parse(&dat(1, &entries, &trailer(-5, 1, "t"))).unwrap();
    assert_eq!((odd.chunk_count, odd.warnings), (None, vec![Warning::ChunkCount(-5)]));
}

#[test]
fn legacy_cut_anywhere_is_refused_or_ends_before_the_trailer() {
    let entries = [DatEntry::new("blk.0.a.weight", 4, &[8.0, 2.0]), DatEntry::new("blk.1.a.weight", 4, &[1.0])];
    let whole = dat(2, &entries, &trailer(7, 9, "calib.txt"));
    let data_end = dat(2, &entries, &[]).len();
    for len in 0..whole.len() {
        let result = parse(&whole[..len]);
        // Old files end after the data, or after the number of chunks.
        let complete = len == data_end || len == data_end + 4;
        assert_eq!(result.is_ok(), complete, "cut at {len}: {result:?}");
    }
    for len in (0..GOLDEN_DAT.len() - 24).step_by(97) {
        assert!(parse(&GOLDEN_DAT[..len]).is_err(), "cut at {len}");
    }
}

mod gguf_files {
    use super::super::build::*;
    use super::*;

    fn pair(weight: &str, row_len: u64, values: &[f32], tokens: &[f32]) -> Vec<Tensor> {
        vec![sums(weight, &[row_len, values.len() as u64 / row_len], values), counts(weight, tokens)]
    }

    fn sound() -> Vec<Tensor> {
        pair("blk.0.a.weight", 2, &[8.0, 2.0, 3.0, 9.0], &[4.0, 3.0])
    }

    #[test]
    fn experts_keep_their_own_counts() {
        let imatrix = parse(&gguf(&keys(), &sound())).unwrap();
        let entry = &imatrix.entries["blk.0.a.weight"];
        assert_eq!((entry.matrices(), entry.row_len()), (2, 2));
        assert_eq!(entry.importance().values, [2.0, 0.5, 1.0, 3.0]);
    }

    #[test]
    fn an_expert_without_tokens_gets_ones() {
        let file = gguf(&keys(), &pair("w", 2, &[8.0, 2.0, 0.0, 0.0], &[4.0, 0.0]));
        let imatrix = parse(&file).unwrap();
        let importance = imatrix.entries["w"].importance();
        assert_eq!((importance.values.as_slice(), importance.neutral_matrices), (&[2.0, 0.5, 1.0, 1.0][..], 1));
        assert_eq!(imatrix.warnings, []);
        assert_eq!(imatrix.neutral_warning(), Some(Warning::Neutral { matrices: 1, entries: 1, first: "w".into() }));
    }

    #[test]
    fn one_count_may_stand_for_several_matrices() {
        let file = gguf(&keys(), &[sums("w", &[6], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), counts("w", &[2.0])]);
        let entry = &parse(&file).unwrap().entries["w"];
        assert_eq!(entry.importance().values, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);
    }

    #[test]
    fn keys_that_are_missing_or_of_another_type_are_refused() {
        for missing in 0..3 {
            let mut pairs = keys();
            let (key, ..) = pairs.remove(missing);
            refused(&gguf(&pairs, &sound()), &format!("metadata key {key} is missing"));
        }
        for other in 0..3 {
            let mut pairs = keys();
            pairs[other] = text(pairs[other].0, "many");
            refused(&gguf(&pairs, &sound()), pairs[other].0);
        }
        let mut pairs = keys();
        pairs[1] = ("imatrix.chunk_count", 10, 3u64.to_le_bytes().to_vec());
        refused(&gguf(&pairs, &sound()), "imatrix.chunk_count");
        let mut pairs = keys();
        pairs[0] = ("imatrix.datasets", ARRAY, [4u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat());
        refused(&gguf(&pairs, &sound()), "imatrix.datasets");
        let mut pairs = keys();
        pairs[2] = number("imatrix.chunk_size", 0);
        refused(&gguf(&pairs, &sound()), "imatrix.chunk_size");
    }

    #[test]
    fn unpaired_tensors_are_refused() {
        refused(&gguf(&keys(), &sound()[..1]), "has .in_sum2 but not .counts");
        refused(&gguf(&keys(), &sound()[1..]), "has .counts but not .in_sum2");
    }

    #[test]
    fn other_types_than_f32_are_refused() {
        for (ty, row) in [(1, vec![0; 4]), (30, vec![0; 4]), (26, vec![0; 8])] {
            let mut tensors = sound();
            tensors[0] = ("blk.0.a.weight.in_sum2".into(), ty, vec![2], row);
            refused(&gguf(&keys(), &tensors), "expected f32");
        }
        let mut tensors = sound();
        tensors[0] = ("blk.0.a.weight.in_sum2".into(), 8, vec![32], vec![0; 34]);
        refused(&gguf(&keys(), &tensors), "expected f32");
        let mut tensors = sound();
        tensors[1] = ("blk.0.a.weight.counts".into(), 1, vec![1, 2], vec![0; 4]);
        refused(&gguf(&keys(), &tensors), "expected f32");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let cases = [
            (vec![2, 2], vec![1.0; 4], vec![1.0; 3]),
            (vec![2], vec![1.0; 2], vec![1.0; 4]),
            (vec![2, 2], vec![1.0; 4], vec![]),
            (vec![0], vec![], vec![1.0]),
            (vec![0], vec![], vec![]),
        ];
        for (shape, values, tokens) in cases {
            let file = gguf(&keys(), &[sums("w", &shape, &values), counts("w", &tokens)]);
            refused(&file, "sums must be a positive multiple of counts");
        }
    }

    #[test]
    fn impossible_values_and_counts_are_refused() {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            refused(&gguf(&keys(), &pair("w", 2, &[1.0, 1.0, 1.0, value], &[1.0, 1.0])), "value 1 of matrix 1");
        }
        for count in [f32::NAN, f32::INFINITY, -1.0, -0.3, 1e30, 9.1e15] {
            refused(&gguf(&keys(), &pair("w", 2, &[1.0; 4], &[1.0, count])), "the count of matrix 1");
        }
        assert!(parse(&gguf(&keys(), &pair("w", 2, &[1.0; 4], &[1.0, (1u64 << 53) as f32]))).is_ok());
    }

    #[test]
    fn fractions_and_sums_without_tokens_are_bearable() {
        let imatrix = parse(&gguf(&keys(), &pair("w", 1, &[1.0, 2.0, 3.0], &[2.5, 1.4, 0.0]))).unwrap();
        assert_eq!(imatrix.entries["w"].counts, [3, 1, 0]);
        let first: Quoted = "w".into();
        assert_eq!(
            imatrix.warnings,
            [
                Warning::FractionalCounts { entries: 1, first: first.clone() },
                Warning::SumsWithoutCount { matrices: 1, first },
            ]
        );
        assert_eq!(imatrix.entries["w"].importance().values[2], 1.0);
    }

    #[test]
    fn unknown_suffixes_are_counted_and_ignored() {
        let mut tensors = sound();
        tensors.push(f32s("blk.0.a.weight.in_sum", &[2, 2], &[1.0; 4]));
        let imatrix = parse(&gguf(&keys(), &tensors)).unwrap();
        assert_eq!(imatrix.entries.len(), 1);
        assert_eq!(imatrix.warnings, [Warning::IgnoredTensors { tensors: 1, first: "blk.0.a.weight.in_sum".into() }]);
    }

    #[test]
    fn a_model_is_no_imatrix() {
        let model = [f32s("token_embd.weight", &[2, 2], &[1.0; 4])];
        refused(&gguf(&[text("general.architecture", "llama")], &model), "is a model");
        refused(&gguf(&keys(), &model), "no imatrix entries");
        refused(&gguf(&keys(), &[]), "no imatrix entries");
    }

    #[test]
    fn sizes_that_wrap_are_refused() {
        // 2^62 + 2^61 floats: the byte size wraps; 2^62 - 8: the padding does.
        for elements in [(1u64 << 62) + (1 << 61), (1 << 62) - 8, u64::MAX, u64::MAX / 4 - 7] {
            let mut tensors = sound();
            tensors[0].2 = vec![elements];
            refused(&gguf(&keys(), &tensors), "tensor \"blk.0.a.weight.in_sum2\"");
        }
        let mut tensors = sound();
        tensors[0].2 = vec![1 << 32, 1 << 32];
        refused(&gguf(&keys(), &tensors), "tensor \"blk.0.a.weight.in_sum2\"");
    }

    #[test]
    fn cut_anywhere_is_refused_as_gguf() {
        let whole = gguf(&keys(), &sound());
        // The padding after the last tensor's 8 bytes may be missing.
        for len in 4..whole.len() - 24 {
            let error = parse(&whole[..len]).expect_err(&format!("cut at {len}"));
            assert!(matches!(error, ImatrixError::Gguf(_)), "cut at {len}: {error}");
        }
    }
}
