//! Any GGUF bytes as an imatrix: an error of one line, or a matrix that survives writing and merging.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lwq::imatrix::{Form, HeatmapStyle, Imatrix, ImatrixStats, MergeOptions, Merger, SortBy, heatmap};

/// Compares sums and counts; counts beyond 2^24 lose digits in the file's f32.
fn same(a: &Imatrix, b: &Imatrix) -> bool {
    a.entries.len() == b.entries.len()
        && a.entries.iter().zip(&b.entries).all(|((name, a), (other, b))| {
            let counts = a.counts.iter().zip(&b.counts).all(|(a, b)| *a as f32 == *b as f32);
            name == other && a.sums == b.sums && a.counts.len() == b.counts.len() && counts
        })
}

fuzz_target!(|bytes: &[u8]| {
    if !bytes.starts_with(b"GGUF") {
        return;
    }
    let imatrix = match Imatrix::from_bytes(bytes, "fuzz.gguf") {
        Ok(imatrix) => imatrix,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.chars().any(char::is_control) && message.len() < 2000, "{message:?}");
            return;
        }
    };
    assert_eq!(imatrix.form, Form::Gguf);
    for entry in imatrix.entries.values() {
        let importance = entry.importance();
        assert_eq!(importance.values.len(), entry.sums.len());
        assert_eq!(entry.row_len() * entry.matrices(), entry.sums.len());
        assert!(importance.values.iter().all(|value| value.is_finite() && *value >= 0.0));
    }
    let mut again = Vec::new();
    if imatrix.write(Form::Gguf, &mut again).is_ok() {
        let again = Imatrix::from_bytes(&again, "again.gguf").expect("what was written can be read");
        assert!(same(&imatrix, &again));
    }
    let mut dat = Vec::new();
    if imatrix.write(Form::Dat, &mut dat).is_ok() {
        Imatrix::from_bytes(&dat, "again.dat").expect("what was written can be read");
    }
    let mut merger = Merger::new(MergeOptions { legacy_chunk_size: 16 });
    if merger.add("a", &imatrix).is_ok() {
        let merged = merger.finish().expect("a single input stays in range");
        assert_eq!(merged.entries, imatrix.entries);
    }
    heatmap(&ImatrixStats::new(&imatrix, SortBy::Role), HeatmapStyle { width: 40, color: false });
});
