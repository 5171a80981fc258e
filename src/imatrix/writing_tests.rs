//! Writing and converting: byte for byte what llama-imatrix wrote.

use super::build::{self, DatEntry, dat, gguf, keys, trailer};
use super::*;

const GOLDEN_GGUF: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.gguf");
const GOLDEN_DAT: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.dat");

fn parse(bytes: &[u8]) -> Imatrix {
    Imatrix::from_bytes(bytes, "test").unwrap()
}

fn written(imatrix: &Imatrix, form: Form) -> (Vec<u8>, Vec<Warning>) {
    let mut out = Vec::new();
    let warnings = imatrix.write(form, &mut out).unwrap();
    (out, warnings)
}

#[test]
fn golden_files_are_rewritten_byte_for_byte() {
    let imatrix = parse(GOLDEN_GGUF);
    assert!(written(&imatrix, Form::Gguf) == (GOLDEN_GGUF.to_vec(), vec![]));
    assert!(written(&imatrix, Form::Dat) == (GOLDEN_DAT.to_vec(), vec![]));
    let imatrix = parse(GOLDEN_DAT);
    assert!(written(&imatrix, Form::Dat) == (GOLDEN_DAT.to_vec(), vec![]));
}

#[test]
fn legacy_becomes_tokens_of_the_given_chunk_size() {
    let imatrix = parse(GOLDEN_DAT).counted(256);
    let (bytes, _) = written(&imatrix, Form::Gguf);
    let (back, golden) = (parse(&bytes), parse(GOLDEN_GGUF));
    assert_eq!((back.chunk_count, back.chunk_size), (golden.chunk_count, golden.chunk_size));
    for (name, entry) in &golden.entries {
        assert_eq!(back.entries[name].counts, entry.counts);
        for (a, b) in back.entries[name].sums.iter().zip(&entry.sums) {
            assert!((a - b).abs() <= b * 3e-7, "{name}: {a} {b}");
        }
    }
}

fn with_partial_experts() -> Imatrix {
    let tensors = [
        build::sums("blk.0.none.weight", &[2, 2], &[0.0; 4]),
        build::counts("blk.0.none.weight", &[0.0, 0.0]),
        build::sums("blk.0.part.weight", &[2, 3], &[34.0, 17.0, 0.0, 0.0, 6.0, 3.0]),
        build::counts("blk.0.part.weight", &[17.0, 0.0, 3.0]),
    ];
    parse(&gguf(&keys(), &tensors))
}

#[test]
fn the_legacy_form_fills_unused_experts_and_leaves_out_empty_entries() {
    let imatrix = with_partial_experts();
    let (bytes, warnings) = written(&imatrix, Form::Dat);
    // 17 tokens in chunks of 16 are two calls; every mean square is multiplied by them.
    let expected = DatEntry::new("blk.0.part.weight", 2, &[4.0, 2.0, 2.0, 2.0, 4.0, 2.0]);
    assert_eq!(bytes, dat(1, &[expected], &trailer(3, 9, "calib.txt")));
    assert_eq!(
        warnings,
        [
            Warning::LeftOut { entries: 1, first: "blk.0.none.weight".into() },
            Warning::Neutral { matrices: 1, entries: 1, first: "blk.0.part.weight".into() },
        ]
    );
    let back = parse(&bytes);
    assert_eq!(back.entries["blk.0.part.weight"].importance().values, [2.0, 1.0, 1.0, 1.0, 2.0, 1.0]);
}

#[test]
fn the_gguf_form_keeps_everything() {
    let imatrix = with_partial_experts();
    let (bytes, warnings) = written(&imatrix, Form::Gguf);
    assert_eq!(parse(&bytes), imatrix);
    assert_eq!(warnings, [Warning::Neutral { matrices: 3, entries: 2, first: "blk.0.none.weight".into() }]);
}

#[test]
fn the_last_dataset_goes_to_the_legacy_trailer() {
    let mut imatrix = with_partial_experts();
    imatrix.datasets = vec!["first".into(), "last".into()];
    assert_eq!(parse(&written(&imatrix, Form::Dat).0).datasets, ["last"]);
    imatrix.datasets.clear();
    assert_eq!(parse(&written(&imatrix, Form::Dat).0).datasets, [""; 0]);
    assert_eq!(parse(&written(&imatrix, Form::Gguf).0).datasets, [""; 0]);
}

#[test]
fn what_a_form_cannot_hold_is_refused() {
    let refused = |imatrix: &Imatrix, form| imatrix.write(form, Vec::new()).unwrap_err().to_string();
    let mut imatrix = with_partial_experts();
    imatrix.chunk_size = Some(1);
    imatrix.entries.get_mut("blk.0.part.weight").unwrap().counts[0] = 1 << 31;
    let error = refused(&imatrix, Form::Dat);
    assert!(error.contains("the call count of \"blk.0.part.weight\" is 2147483648"), "{error}");

    imatrix.entries.retain(|name, _| name == "blk.0.none.weight");
    let error = refused(&imatrix, Form::Dat);
    assert!(error.contains("none of its 1 entries saw a token"), "{error}");

    let mut imatrix = Imatrix::default();
    imatrix.entries.insert("x".repeat(55), Entry::new(1, 1));
    assert!(imatrix.write(Form::Gguf, Vec::new()).is_ok());
    imatrix.entries.insert("x".repeat(56), Entry::new(1, 1));
    let error = refused(&imatrix, Form::Gguf);
    assert!(error.contains("has a name of 56 bytes, GGUF holds 55"), "{error}");
}

#[test]
fn values_that_leave_their_range_are_not_written() {
    let full = |form, count| Imatrix {
        entries: [("w".to_owned(), Entry { sums: vec![0.0, f32::MAX], counts: vec![count] })].into(),
        form,
        ..Imatrix::default()
    };
    let error = full(Form::Dat, 1).write(Form::Gguf, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("value 1 of weight \"w\" becomes inf"), "{error}");
    let mut partial = full(Form::Gguf, 1);
    partial.entries.insert("v".into(), Entry { sums: vec![f32::MAX, 1.0], counts: vec![1, 5000] });
    let error = partial.write(Form::Dat, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("value 0 of weight \"v\" becomes inf"), "{error}");
    let mut many = full(Form::Gguf, 2 * MOST_TOKENS);
    many.entries.get_mut("w").unwrap().sums = vec![1.0, 1.0];
    let error = many.write(Form::Gguf, Vec::new()).unwrap_err().to_string();
    assert!(error.contains("a count of weight \"w\" becomes 18014398509481984"), "{error}");
}

#[test]
fn save_replaces_only_when_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("imx.dat");
    let imatrix = parse(GOLDEN_GGUF);
    imatrix.save(&path, Form::of_name(&path), false).unwrap();
    assert!(std::fs::read(&path).unwrap() == GOLDEN_DAT);
    let error = imatrix.save(&path, Form::Dat, false).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    imatrix.save(&path, Form::Gguf, true).unwrap();
    assert!(std::fs::read(&path).unwrap() == GOLDEN_GGUF);
}

#[test]
fn forms_follow_the_suffix() {
    for (name, form) in [("a.dat", Form::Dat), ("a.DAT", Form::Dat), ("a.gguf", Form::Gguf), ("dat", Form::Gguf)] {
        assert_eq!(Form::of_name(Path::new(name)), form, "{name}");
    }
}

#[test]
fn model_metadata_names_the_imatrix() {
    let mut imatrix = parse(GOLDEN_GGUF);
    imatrix.datasets.push("second.txt".into());
    let text = |value: &str| Value::String(value.into());
    let pairs = imatrix.quantize_metadata("some/doclet.imatrix.gguf", 42);
    let expected = [
        ("quantize.imatrix.file", text("some/doclet.imatrix.gguf")),
        ("quantize.imatrix.dataset", text("calib-sample.txt")),
        ("quantize.imatrix.entries_count", Value::U32(42)),
        ("quantize.imatrix.chunks_count", Value::U32(241)),
    ];
    assert!(pairs == expected, "{pairs:?}");
    imatrix.datasets.clear();
    for chunks in [None, Some(0), Some(1 << 31)] {
        imatrix.chunk_count = chunks;
        let keys: Vec<_> = imatrix.quantize_metadata("x", 1).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["quantize.imatrix.file", "quantize.imatrix.entries_count"]);
    }
}

mod properties {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    /// Entries of one to four matrices, with magnitudes from tiny to large and some matrices without tokens.
    fn entries(single_count: bool) -> impl Strategy<Value = BTreeMap<String, Entry>> {
        let matrices = if single_count { 1..2usize } else { 1..5usize };
        let sum = prop_oneof![Just(0.0f32), 0.0f32..1e6, (-30i32..30).prop_map(|exponent| 2f32.powi(exponent))];
        let entry = (1usize..9, matrices).prop_flat_map(move |(row_len, matrices)| {
            let count = if single_count { 1u64..1 << 31 } else { 0..1 << 24 };
            (vec(sum.clone(), row_len * matrices), vec(count, matrices))
                .prop_map(|(sums, counts)| Entry { sums, counts })
        });
        btree_map("[a-zA-Z0-9_.é]{1,20}", entry, 1..6)
    }

    fn imatrix(form: Form) -> impl Strategy<Value = Imatrix> {
        let datasets = if form == Form::Dat { 0..2usize } else { 0..4 };
        let count = 0u32..=i32::MAX as u32;
        (entries(form == Form::Dat), vec("[^\0]{1,9}", datasets), count, 1u32..5000).prop_map(
            move |(entries, datasets, chunk_count, chunk_size)| Imatrix {
                entries,
                datasets,
                chunk_count: Some(chunk_count),
                chunk_size: (form == Form::Gguf).then_some(chunk_size),
                form,
                ..Imatrix::default()
            },
        )
    }

    proptest! {
        #[test]
        fn gguf_comes_back_as_it_was(imatrix in imatrix(Form::Gguf)) {
            let mut back = parse(&written(&imatrix, Form::Gguf).0);
            // Sums without tokens are named when read.
            back.warnings.clear();
            prop_assert_eq!(back, imatrix);
        }

        #[test]
        fn dat_comes_back_as_it_was(imatrix in imatrix(Form::Dat)) {
            prop_assert_eq!(parse(&written(&imatrix, Form::Dat).0), imatrix);
        }

        #[test]
        fn importance_survives_the_legacy_form(imatrix in imatrix(Form::Gguf)) {
            let mut out = Vec::new();
            if imatrix.write(Form::Dat, &mut out).is_ok() {
                let back = parse(&out);
                for (name, entry) in imatrix.entries.iter().filter(|(_, entry)| !entry.is_empty()) {
                    let (a, b) = (entry.importance().values, back.entries[name].importance().values);
                    for (a, b) in a.iter().zip(&b) {
                        prop_assert!((a - b).abs() <= a * 3e-7 + f32::MIN_POSITIVE, "{}: {} {}", name, a, b);
                    }
                }
            }
        }

        #[test]
        fn damaged_bytes_never_panic(imatrix in imatrix(Form::Gguf), at in any::<proptest::sample::Index>(), byte: u8) {
            for form in [Form::Gguf, Form::Dat] {
                let mut out = Vec::new();
                if imatrix.write(form, &mut out).is_ok() {
                    let at = at.index(out.len());
                    out[at] = byte;
                    if let Err(error) = Imatrix::from_bytes(&out, "damaged") {
                        prop_assert!(!error.to_string().contains('\n'));
                    }
                    let _ = Imatrix::from_bytes(&out[..at], "cut");
                }
            }
        }
    }
}
