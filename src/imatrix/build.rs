//! Builders of imatrix files, sound or not, for the tests of this module.

/// One entry of a legacy file; every field can lie.
#[derive(Clone)]
pub(super) struct DatEntry {
    pub(super) name_len: i32,
    pub(super) name: Vec<u8>,
    pub(super) ncall: i32,
    pub(super) nval: i32,
    pub(super) values: Vec<f32>,
}

impl DatEntry {
    pub(super) fn new(name: &str, ncall: i32, values: &[f32]) -> DatEntry {
        DatEntry {
            name_len: name.len() as i32,
            name: name.as_bytes().to_vec(),
            ncall,
            nval: values.len() as i32,
            values: values.to_vec(),
        }
    }
}

pub(super) fn dat(n_entries: i32, entries: &[DatEntry], trailer: &[u8]) -> Vec<u8> {
    let mut out = n_entries.to_le_bytes().to_vec();
    for entry in entries {
        out.extend(entry.name_len.to_le_bytes());
        out.extend(&entry.name);
        out.extend(entry.ncall.to_le_bytes());
        out.extend(entry.nval.to_le_bytes());
        out.extend(entry.values.iter().flat_map(|value| value.to_le_bytes()));
    }
    out.extend(trailer);
    out
}

/// `chunk_count`, `dataset_len` and the dataset's bytes.
pub(super) fn trailer(chunk_count: i32, dataset_len: i32, dataset: &str) -> Vec<u8> {
    let mut out = chunk_count.to_le_bytes().to_vec();
    out.extend(dataset_len.to_le_bytes());
    out.extend(dataset.as_bytes());
    out
}

pub(super) const U32: u32 = 4;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// A key-value pair: key, type id, raw value.
pub(super) type Pair = (&'static str, u32, Vec<u8>);

pub(super) fn datasets(names: &[&str]) -> Pair {
    let mut raw = STRING.to_le_bytes().to_vec();
    raw.extend((names.len() as u64).to_le_bytes());
    raw.extend(names.iter().flat_map(|name| string(name)));
    ("imatrix.datasets", ARRAY, raw)
}

pub(super) fn number(key: &'static str, value: u32) -> Pair {
    (key, U32, value.to_le_bytes().to_vec())
}

pub(super) fn text(key: &'static str, value: &str) -> Pair {
    (key, STRING, string(value))
}

pub(super) fn keys() -> Vec<Pair> {
    vec![datasets(&["calib.txt"]), number("imatrix.chunk_count", 3), number("imatrix.chunk_size", 16)]
}

/// Name, ggml type id, dimensions, raw data.
pub(super) type Tensor = (String, u32, Vec<u64>, Vec<u8>);

pub(super) fn f32s(name: &str, shape: &[u64], values: &[f32]) -> Tensor {
    (name.to_owned(), 0, shape.to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

pub(super) fn sums(weight: &str, shape: &[u64], values: &[f32]) -> Tensor {
    f32s(&format!("{weight}.in_sum2"), shape, values)
}

pub(super) fn counts(weight: &str, values: &[f32]) -> Tensor {
    f32s(&format!("{weight}.counts"), &[1, values.len() as u64], values)
}

pub(super) fn gguf(pairs: &[Pair], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((pairs.len() as u64).to_le_bytes());
    for (key, kind, raw) in pairs {
        out.extend(string(key));
        out.extend(kind.to_le_bytes());
        out.extend(raw);
    }
    let mut offset = 0u64;
    for (name, ty, shape, data) in tensors {
        out.extend(string(name));
        out.extend((shape.len() as u32).to_le_bytes());
        out.extend(shape.iter().flat_map(|ne| ne.to_le_bytes()));
        out.extend(ty.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (data.len() as u64).next_multiple_of(32);
    }
    for (.., data) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out
}
