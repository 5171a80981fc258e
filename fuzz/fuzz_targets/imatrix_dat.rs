//! Any bytes as a legacy imatrix: an error of one line, or a matrix that survives writing in both forms.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lwq::imatrix::{Form, HeatmapStyle, Imatrix, ImatrixStats, MergeOptions, Merger, SortBy, heatmap};

fuzz_target!(|bytes: &[u8]| {
    if bytes.starts_with(b"GGUF") {
        return;
    }
    let imatrix = match Imatrix::from_bytes(bytes, "fuzz.dat") {
        Ok(imatrix) => imatrix,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.chars().any(char::is_control) && message.len() < 2000, "{message:?}");
            return;
        }
    };
    assert_eq!(imatrix.form, Form::Dat);
    for entry in imatrix.entries.values() {
        let importance = entry.importance();
        assert_eq!(importance.values.len(), entry.sums.len());
        assert!(importance.values.iter().all(|value| value.is_finite() && *value >= 0.0));
    }
    let mut again = Vec::new();
    imatrix.write(Form::Dat, &mut again).expect("what was read can be written");
    let again = Imatrix::from_bytes(&again, "again.dat").expect("what was written can be read");
    assert_eq!(again.entries, imatrix.entries);

    // Names longer than GGUF's, and sums that chunks of tokens carry past f32, are refused there.
    let mut gguf = Vec::new();
    if imatrix.counted(16).write(Form::Gguf, &mut gguf).is_ok() {
        Imatrix::from_bytes(&gguf, "again.gguf").expect("what was written can be read");
    }
    let mut merger = Merger::new(MergeOptions { legacy_chunk_size: 16 });
    if merger.add("a", &imatrix).and_then(|_| merger.add("b", &again)).is_ok() {
        let _ = merger.finish();
    }
    heatmap(&ImatrixStats::new(&imatrix, SortBy::Importance), HeatmapStyle { width: 80, color: true });
});
