use lwq::imatrix::{Form, HeatmapStyle, Imatrix, ImatrixStats, MergeOptions, Merger, SortBy, heatmap};

const MERGE: MergeOptions = MergeOptions { legacy_chunk_size: 16 };

/// Any bytes as a legacy imatrix: an error of one line, or a matrix that survives writing in both forms.
pub fn imatrix_dat(bytes: &[u8]) {
    if bytes.starts_with(b"GGUF") {
        return;
    }
    let Some(imatrix) = read(bytes, Form::Dat) else { return };
    let mut again = Vec::new();
    imatrix.write(Form::Dat, &mut again).expect("what was read can be written");
    let again = Imatrix::from_bytes(&again, "again.dat").expect("what was written can be read");
    assert_eq!(again.entries, imatrix.entries);

    // Names longer than GGUF's, and sums that chunks of tokens carry past f32, are refused there.
    let mut gguf = Vec::new();
    if imatrix.counted(16).write(Form::Gguf, &mut gguf).is_ok() {
        Imatrix::from_bytes(&gguf, "again.gguf").expect("what was written can be read");
    }
    let mut merger = Merger::new(MERGE);
    if merger.add("a", &imatrix).and_then(|_| merger.add("b", &again)).is_ok() {
        let _ = merger.finish();
    }
    heatmap(&ImatrixStats::new(&imatrix, SortBy::Importance), HeatmapStyle { width: 80, color: true });
}

/// Any GGUF bytes as an imatrix: an error of one line, or a matrix that survives writing and merging.
pub fn imatrix_gguf(bytes: &[u8]) {
    if !bytes.starts_with(b"GGUF") {
        return;
    }
    let Some(imatrix) = read(bytes, Form::Gguf) else { return };
    for entry in imatrix.entries.values() {
        assert_eq!(entry.row_len() * entry.matrices(), entry.sums.len());
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
    let mut merger = Merger::new(MERGE);
    if merger.add("a", &imatrix).is_ok() {
        let merged = merger.finish().expect("a single input stays in range");
        assert_eq!(merged.entries, imatrix.entries);
    }
    heatmap(&ImatrixStats::new(&imatrix, SortBy::Role), HeatmapStyle { width: 40, color: false });
}

/// A matrix of the expected form with sound importance, or none.
fn read(bytes: &[u8], form: Form) -> Option<Imatrix> {
    let imatrix = super::accepted(Imatrix::from_bytes(bytes, "fuzz.imatrix"))?;
    assert_eq!(imatrix.form, form);
    for entry in imatrix.entries.values() {
        let importance = entry.importance();
        assert_eq!(importance.values.len(), entry.sums.len());
        assert!(importance.values.iter().all(|value| value.is_finite() && *value >= 0.0));
    }
    Some(imatrix)
}

/// Compares sums and counts; counts beyond 2^24 lose digits in the file's f32.
fn same(a: &Imatrix, b: &Imatrix) -> bool {
    a.entries.len() == b.entries.len()
        && a.entries.iter().zip(&b.entries).all(|((name, a), (other, b))| {
            let counts = a.counts.iter().zip(&b.counts).all(|(a, b)| *a as f32 == *b as f32);
            name == other && a.sums == b.sums && a.counts.len() == b.counts.len() && counts
        })
}
