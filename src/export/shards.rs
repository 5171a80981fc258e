//! Where each tensor stands: safetensors files of limited size, their headers, and the index over them.

use std::collections::BTreeMap;

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::pack::dtype_bytes;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Slowest first.
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
}

/// Where the bytes of a tensor are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) file: usize,
    /// From the start of the file.
    pub(crate) offset: u64,
}

/// One file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) name: String,
    /// Length and JSON.
    pub(crate) header: Vec<u8>,
    /// With the header.
    pub(crate) bytes: u64,
}

/// All files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Shards {
    pub(crate) files: Vec<Shard>,
    /// One for each tensor, in the order in which they were given.
    pub(crate) places: Vec<Place>,
    /// `model.safetensors.index.json`, if there are several files.
    pub(crate) index: Option<Value>,
}

/// Deals `items`, each with tensors that stay together, to files of at most `limit` bytes of tensors; an item that is
/// larger has a file of its own.
pub(crate) fn lay_out(items: &[Vec<NewTensor>], limit: u64) -> Shards {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let (mut first, mut filled) = (0, 0u64);
    for (at, item) in items.iter().enumerate() {
        let bytes: u64 = item.iter().map(|tensor| tensor.bytes).sum();
        if at > first && filled.saturating_add(bytes) > limit {
            ranges.push((first, at));
            (first, filled) = (at, 0);
        }
        filled = filled.saturating_add(bytes);
    }
    ranges.push((first, items.len()));
    let starts: Vec<usize> = items
        .iter()
        .scan(0, |next, item| {
            let start = *next;
            *next += item.len();
            Some(start)
        })
        .collect();
    let mut shards =
        Shards { files: Vec::new(), places: vec![Place::default(); items.iter().map(Vec::len).sum()], index: None };
    let (mut weight_map, mut total) = (BTreeMap::new(), 0u64);
    for (number, &(first, end)) in ranges.iter().enumerate() {
        let name = match ranges.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut tensors: Vec<(usize, &NewTensor)> = (first..end)
            .flat_map(|item| items[item].iter().enumerate().map(move |(at, tensor)| (item, at, tensor)))
            .map(|(item, at, tensor)| (starts[item] + at, tensor))
            .collect();
        // Wide elements first: every tensor is aligned to its own then, which readers that map the file rely on.
        tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(dtype_bytes(tensor.dtype)));
        let (mut entries, mut at) = (Map::new(), 0u64);
        entries.insert("__metadata__".into(), json!({ "format": "pt" }));
        for (_, tensor) in &tensors {
            let dtype = serde_json::to_value(tensor.dtype).unwrap_or_default();
            let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.bytes] });
            entries.insert(tensor.name.clone(), entry);
            weight_map.insert(tensor.name.clone(), name.clone());
            at += tensor.bytes;
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        let mut offset = header.len() as u64;
        for (index, tensor) in tensors {
            shards.places[index] = Place { file: number, offset };
            offset += tensor.bytes;
        }
        total += at;
        shards.files.push(Shard { name, header, bytes: offset });
    }
    shards.index = (ranges.len() > 1).then(|| json!({ "metadata": { "total_size": total }, "weight_map": weight_map }));
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dtype: Dtype, count: u64) -> NewTensor {
        NewTensor { name: name.into(), dtype, shape: vec![count], bytes: count * dtype_bytes(dtype) }
    }

    #[test]
    fn wide_elements_come_first_and_all_are_aligned() {
        let items = [vec![tensor("a", Dtype::U8, 3), tensor("b", Dtype::I64, 2)], vec![tensor("c", Dtype::BF16, 1)]];
        let shards = lay_out(&items, 1 << 20);
        assert!(shards.index.is_none() && shards.files[0].name == "model.safetensors");
        let start = shards.files[0].header.len() as u64;
        assert_eq!(start % 8, 0);
        let offsets: Vec<u64> = shards.places.iter().map(|place| place.offset - start).collect();
        assert_eq!(offsets, [18, 0, 16]);
        assert_eq!(shards.files[0].bytes, start + 21);
        let mut file = shards.files[0].header.clone();
        file.resize(shards.files[0].bytes as usize, 0);
        assert_eq!(safetensors::SafeTensors::deserialize(&file).unwrap().tensor("b").unwrap().shape(), [2]);
    }

    #[test]
    fn files_keep_to_their_limit() {
        let items: Vec<Vec<NewTensor>> = (0..5).map(|at| vec![tensor(&format!("t{at}"), Dtype::F32, 10)]).collect();
        let shards = lay_out(&items, 85);
        let names: Vec<&str> = shards.files.iter().map(|shard| shard.name.as_str()).collect();
        assert_eq!(names[0], "model-00001-of-00003.safetensors");
        assert_eq!(shards.places.iter().map(|place| place.file).collect::<Vec<_>>(), [0, 0, 1, 1, 2]);
        let index = shards.index.unwrap();
        assert_eq!(index["metadata"]["total_size"], 200);
        assert_eq!(index["weight_map"]["t4"], names[2]);
        assert_eq!(lay_out(&items, 1).files.len(), 5);
    }
}
