//! The run as a whole, on small models in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use super::*;
use crate::gguf::testing::RawGguf;
use crate::progress::Stop;
use crate::quant::{self, float16::f32_to_f16};
use crate::rows::RowError;
use crate::testing::Random;

const ROW_LEN: u64 = 256;
const ROWS: u64 = 96;
const EXPERTS: u64 = 24;

/// A stack of experts in F16 and what each weighs, and a norm that is copied.
fn model() -> (Gguf, Vec<f32>, Vec<f32>) {
    let mut random = Random::new(1);
    let experts = EXPERTS * ROWS * ROW_LEN;
    let data: Vec<u8> = (0..experts).flat_map(|_| f32_to_f16(random.unit() - 0.5).to_le_bytes()).collect();
    let mut floats = vec![0.0; experts as usize];
    quant::dequantize(TensorType::F16, &data, &mut floats).unwrap();
    let importance = (0..EXPERTS * ROW_LEN).map(|_| random.unit()).collect();
    let norm: Vec<f32> = (0..ROW_LEN).map(|_| random.unit()).collect();
    let bytes = RawGguf::new()
        .tensor("experts", &[ROW_LEN, ROWS, EXPERTS], TensorType::F16, &data)
        .f32_tensor("norm", &[ROW_LEN], &norm)
        .build();
    (Gguf::from_bytes(bytes).unwrap(), floats, importance)
}

/// Bytes that were reported by tensor.
#[derive(Default)]
struct Seen(Mutex<BTreeMap<String, u64>>);

impl Watch for Seen {
    fn advance(&self, amount: u64, what: &str) {
        *self.0.lock().unwrap().entry(what.to_owned()).or_default() += amount;
    }
}

fn quantized(work: &[TensorWork<'_>], threads: usize, folder: &Path) -> Result<Vec<u8>, PipelineError> {
    let path = folder.join("out");
    let files = [AtomicFile::create(&path, true).unwrap()];
    let seen = Seen::default();
    let stages = run(work, &files, threads, &seen)?;
    assert!(stages.encoding > 0.0);
    let expected = work.iter().map(|item| (item.source.name.clone(), item.source.bytes.unwrap()));
    assert_eq!(seen.0.into_inner().unwrap(), expected.collect());
    for file in files {
        file.commit().unwrap();
    }
    Ok(std::fs::read(path).unwrap())
}

#[test]
fn each_expert_is_encoded_with_its_own_importance_whatever_the_threads() {
    let (gguf, floats, importance) = model();
    let dir = tempfile::tempdir().unwrap();
    let experts = TensorWork {
        gguf: &gguf,
        source: gguf.tensor("experts").unwrap(),
        target: TensorType::Q4_K,
        rounding: RowRounding::Ggml,
        importance: Some(&importance),
        file: 0,
        offset: 64,
    };
    let encoded_bytes = experts.source.elements() / 256 * 144;
    let source = gguf.tensor("norm").unwrap();
    let norm = TensorWork {
        gguf: &gguf,
        source,
        target: source.ty,
        rounding: RowRounding::Ggml,
        importance: None,
        file: 0,
        offset: 64 + encoded_bytes,
    };
    let mut expected = vec![0; 64];
    let weights = floats.chunks((ROWS * ROW_LEN) as usize);
    for (weights, importance) in weights.zip(importance.chunks(ROW_LEN as usize)) {
        let mut out = vec![0; weights.len() / 256 * 144];
        quant::quantize_rows(TensorType::Q4_K, weights, ROW_LEN as usize, Some(importance), &mut out).unwrap();
        expected.extend(out);
    }
    expected.extend_from_slice(gguf.data(source).unwrap());
    for threads in [1, 2, 7, 64] {
        assert!(quantized(&[experts, norm], threads, dir.path()).unwrap() == expected, "{threads} threads");
    }
}

#[test]
fn a_weight_that_is_not_finite_is_named_by_its_place_in_the_tensor() {
    let at = 70_000u64;
    let mut data = vec![0u8; 2 * 512 * 256];
    data[2 * at as usize..][..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    let bytes = RawGguf::new().tensor("t", &[512, 256], TensorType::F16, &data).build();
    let gguf = Gguf::from_bytes(bytes).unwrap();
    let source = gguf.tensor("t").unwrap();
    let dir = tempfile::tempdir().unwrap();
    for threads in [1, 3] {
        let work = TensorWork {
            gguf: &gguf,
            source,
            target: TensorType::Q8_0,
            rounding: RowRounding::Ggml,
            importance: None,
            file: 0,
            offset: 0,
        };
        match quantized(&[work], threads, dir.path()) {
            Err(PipelineError::Rows { source, .. }) => match *source {
                RowError::NonFinite { index, value, .. } => assert_eq!((index, value), (at, f32::INFINITY)),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_run_that_is_stopped_ends_without_an_output() {
    struct Stopped;
    impl Watch for Stopped {
        fn stop(&self) -> Stop {
            Stop::when(std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true)))
        }
    }
    let (gguf, ..) = model();
    let dir = tempfile::tempdir().unwrap();
    let source = gguf.tensor("norm").unwrap();
    let work = [TensorWork {
        gguf: &gguf,
        source,
        target: source.ty,
        rounding: RowRounding::Ggml,
        importance: None,
        file: 0,
        offset: 0,
    }];
    let files = [AtomicFile::create(&dir.path().join("out"), true).unwrap()];
    assert!(matches!(run(&work, &files, 2, &Stopped), Err(PipelineError::Interrupted(_))));
    drop(files);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
