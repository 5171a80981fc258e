//! Telling models apart without reading them whole.

use sha2::{Digest, Sha256};

use super::reader::Gguf;
use super::split;

/// Bytes of each tensor that are looked at, at its start and in its middle.
const SAMPLE: usize = 4096;

/// SHA-256, in hexadecimal, over the metadata (without those of a shard), names, types and shapes of all tensors, and
/// a sample of each one's data: telling two models apart must not take as long as reading them.
pub fn fingerprint(model: &Gguf) -> String {
    let mut hash = Sha256::new();
    for (key, value) in model.metadata().iter() {
        if split::is_shard_key(key) {
            continue;
        }
        let bytes = value.to_bytes();
        hash.update(format!("{}:{key} {} {}:", key.len(), value.value_type().id(), bytes.len()));
        hash.update(bytes);
    }
    for tensor in model.tensors() {
        hash.update(format!("{}:{} {} {:?}\n", tensor.name.len(), tensor.name, tensor.ty.0, tensor.shape));
        if let Ok(data) = model.data(tensor) {
            let middle = data.len() / 2;
            hash.update(&data[..data.len().min(SAMPLE)]);
            hash.update(&data[middle..data.len().min(middle + SAMPLE)]);
        }
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::super::testing::RawGguf;
    use super::*;

    fn of(file: RawGguf) -> String {
        fingerprint(&Gguf::from_bytes(file.build()).unwrap())
    }

    #[test]
    fn metadata_shape_and_data_count_and_shard_keys_do_not() {
        let model = |context: u32, shape: &[u64], first: f32| {
            let values: Vec<f32> = (0..64).map(|at| if at == 0 { first } else { at as f32 }).collect();
            RawGguf::new().u32("llama.context_length", context).f32_tensor("w", shape, &values)
        };
        let base = of(model(128, &[32, 2], 1.0));
        assert_eq!(base.len(), 64);
        assert_eq!(base, of(model(128, &[32, 2], 1.0)));
        assert_eq!(base, of(model(128, &[32, 2], 1.0).split(0, 1, 1)));
        assert_ne!(base, of(model(129, &[32, 2], 1.0)));
        assert_ne!(base, of(model(128, &[64], 1.0)));
        assert_ne!(base, of(model(128, &[32, 2], 2.0)));
    }
}
