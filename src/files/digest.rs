//! What a model holds, in one number.

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::FilesError;
use super::copy::for_each_piece;
use crate::gguf::{Gguf, Metadata, is_layout_key};
use crate::progress::{Interrupted, Unit, Watch};
use crate::workers::work_off;

/// The digest of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelDigest {
    /// SHA-256 in hexadecimal, of what [`digest`] says.
    pub sha256: String,
    /// Whether metadata are part of it.
    pub metadata: bool,
    /// Those of all tensors, by name.
    pub tensors: Vec<TensorDigest>,
}

/// The digest of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorDigest {
    /// SHA-256 in hexadecimal of its data alone, little-endian and without padding.
    pub sha256: String,
    /// ggml's name of the type.
    #[serde(rename = "type")]
    pub ty: String,
    /// Dimensions, fastest first, without ones at the end.
    pub shape: Vec<u64>,
    /// The tensor's name.
    pub name: String,
    #[serde(skip)]
    type_id: u32,
}

/// Digests a model: metadata (where `with_metadata` says so) and tensors, whatever their order, the padding between
/// them, the version and byte order of the file, and however many files there are.
///
/// The digest is SHA-256 over `lwq-hash 1`, a line feed, for each key in the order of their bytes `key LENGTH:KEY TYPE BYTES:`,
/// the value as GGUF stores it and a line feed (keys that describe the layout, `general.alignment` and `split.*`, left out), and
/// for each tensor in the order of the names `tensor LENGTH:NAME TYPE NE0xNE1… SHA256` and a line feed; types as GGUF's numbers,
/// ones at the end of a shape left out.
///
/// # Errors
/// If data cannot be read, or `watch` stops the run.
pub fn digest(gguf: &Gguf, with_metadata: bool, watch: &dyn Watch) -> Result<ModelDigest, FilesError> {
    let tensors = digest_tensors(gguf, watch)?;
    let mut hash = Sha256::new_with_prefix(b"lwq-hash 1\n");
    if with_metadata {
        add_metadata(&mut hash, gguf.metadata());
    }
    for tensor in &tensors {
        let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
        let (name, shape) = (&tensor.name, shape.join("x"));
        hash.update(format!("tensor {}:{name} {} {shape} {}\n", name.len(), tensor.type_id, tensor.sha256));
    }
    Ok(ModelDigest { sha256: format!("{:x}", hash.finalize()), metadata: with_metadata, tensors })
}

fn add_metadata(hash: &mut Sha256, metadata: &Metadata) {
    let mut pairs: Vec<_> = metadata.iter().filter(|(key, _)| !is_layout_key(key)).collect();
    pairs.sort_unstable_by_key(|(key, _)| *key);
    for (key, value) in pairs {
        let bytes = value.to_bytes();
        hash.update(format!("key {}:{key} {} {}:", key.len(), value.value_type().id(), bytes.len()));
        hash.update(bytes);
        hash.update(b"\n");
    }
}

/// Of all tensors, by name.
fn digest_tensors(gguf: &Gguf, watch: &dyn Watch) -> Result<Vec<TensorDigest>, FilesError> {
    watch.begin("hashing", gguf.tensors().iter().filter_map(|tensor| tensor.bytes).sum(), Unit::Bytes);
    let stop = watch.abandon();
    let start = || (Vec::new(), Vec::new());
    let workers = work_off(gguf.tensors(), rayon::current_num_threads(), start, |(buffer, done), _, tensor| {
        let mut hash = Sha256::new();
        for_each_piece(gguf, tensor, buffer, |_, piece| {
            stop.check()?;
            hash.update(piece);
            watch.advance(piece.len() as u64, &tensor.name);
            Ok(())
        })?;
        done.push(TensorDigest {
            sha256: format!("{:x}", hash.finalize()),
            ty: tensor.ty.to_string(),
            shape: without_ones(&tensor.shape).to_vec(),
            name: tensor.name.clone(),
            type_id: tensor.ty.0,
        });
        Ok::<_, FilesError>(())
    });
    let stopped = stop.end();
    let mut tensors: Vec<TensorDigest> = workers?.into_iter().flat_map(|(_, done)| done).collect();
    if stopped {
        return Err(Interrupted.into());
    }
    watch.end();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

/// A shape without ones at its end: ggml takes missing dimensions for ones, and writers drop them or not. At least one
/// dimension stays.
pub(super) fn without_ones(shape: &[u64]) -> &[u64] {
    let kept = shape.iter().rposition(|dim| *dim != 1).map_or(1, |last| last + 1);
    &shape[..kept.min(shape.len())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::RawGguf;

    fn of(file: &RawGguf) -> ModelDigest {
        digest(&Gguf::from_bytes(file.build()).unwrap(), true, &()).unwrap()
    }

    #[test]
    fn the_digest_is_that_of_the_text_in_the_documentation() {
        let found = of(&RawGguf::new().u32("a", 7).f32_tensor("w", &[2, 1], &[1.0, 2.0]));
        let data = [1.0f32, 2.0].map(f32::to_le_bytes);
        let data = format!("{:x}", Sha256::digest(data.as_flattened()));
        assert_eq!(found.tensors[0].sha256, data);
        let mut text = b"lwq-hash 1\nkey 1:a 4 4:\x07\0\0\0\n".to_vec();
        text.extend(format!("tensor 1:w 0 2 {data}\n").bytes());
        assert_eq!(found.sha256, format!("{:x}", Sha256::digest(&text)));
    }

    #[test]
    fn order_alignment_and_byte_order_do_not_count_and_content_does() {
        let (a, b) = ([1.0f32, 2.0, 3.0], [4.0f32, 5.0]);
        let base = RawGguf::new().u32("x", 1).str("y", "z").f32_tensor("a", &[3], &a).f32_tensor("b", &[2], &b);
        let turned = RawGguf::new().str("y", "z").u32("x", 1).f32_tensor("b", &[2, 1], &b).f32_tensor("a", &[3], &a);
        let aligned = RawGguf { alignment: 128, ..RawGguf::new() }.u32("general.alignment", 128);
        let aligned = aligned.u32("x", 1).str("y", "z").f32_tensor("a", &[3], &a).f32_tensor("b", &[2], &b);
        let big = RawGguf::big_endian().u32("x", 1).str("y", "z").f32_tensor("a", &[3], &a).f32_tensor("b", &[2], &b);
        for same in [&turned, &aligned, &big] {
            assert_eq!(of(same), of(&base));
        }
        let base_sha = of(&base).sha256;
        assert_ne!(of(&base.clone().u32("w", 1)).sha256, base_sha);
        assert_ne!(of(&base.clone().f32_tensor("c", &[1], &[0.0])).sha256, base_sha);
        let other = RawGguf::new().u32("x", 1).str("y", "z").f32_tensor("a", &[1, 3], &a).f32_tensor("b", &[2], &b);
        assert_ne!(of(&other).sha256, base_sha);
        assert_eq!((without_ones(&[1, 1]), without_ones(&[])), (&[1][..], &[][..]));
    }
}
