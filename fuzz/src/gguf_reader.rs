use lwq::gguf::{Array, Gguf, GgufLayout, GgufWriter, NewTensor, Value};

/// Visits every element; arrays inside arrays too.
fn walk(array: &Array) -> u64 {
    let mut seen = 0;
    for value in array.iter() {
        seen += 1;
        if let Value::Array(inner) = &value {
            assert_eq!(walk(inner), inner.len());
        }
    }
    seen
}

/// Any bytes as GGUF: an error of one line, or a file that can be walked, read, written and read again the same.
pub fn gguf_reader(bytes: &[u8]) {
    let Some(gguf) = super::accepted(Gguf::from_bytes(bytes.to_vec())) else { return };
    let metadata = gguf.metadata();
    for (key, value) in metadata.iter() {
        assert_eq!(metadata.get(key), Some(value));
        let _ = (metadata.u64(key), metadata.i64(key), metadata.f32(key), metadata.str(key), metadata.bool(key));
        if let Value::Array(array) = value {
            assert_eq!(walk(array), array.len());
            let _ = (array.to_f32_vec(), array.to_i64_vec(), array.to_bool_vec());
            if let Ok(strings) = array.iter_str() {
                assert_eq!(strings.count() as u64, array.len());
            }
        }
    }
    let mut known = true;
    for tensor in gguf.tensors() {
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
        let data = gguf.tensor_data(tensor);
        assert_eq!(data.is_ok(), tensor.ty.info().is_some());
        // What ggml cannot hold is not written anew.
        known &= data.is_ok() && tensor.beyond_ggml().is_none();
        if let Ok(data) = data {
            assert_eq!(Some(data.len() as u64), tensor.bytes);
            if tensor.rows() > 0 {
                let last = gguf.read_rows(tensor, tensor.rows() - 1, 1).unwrap();
                assert!(data.ends_with(&last));
            }
        }
    }
    // A large alignment makes a large file of nothing but padding.
    if !known || metadata.alignment().unwrap() > 1 << 12 {
        return;
    }
    let layout = GgufLayout::new("again", metadata, gguf.tensors().iter().map(NewTensor::from)).unwrap();
    let mut writer = GgufWriter::new(Vec::new(), layout).unwrap();
    for (index, tensor) in gguf.tensors().iter().enumerate() {
        writer.write(index, &gguf.tensor_data(tensor).unwrap()).unwrap();
    }
    let again = Gguf::from_bytes(writer.finish().unwrap()).unwrap();
    assert_eq!(again.metadata(), metadata);
    for (first, second) in gguf.tensors().iter().zip(again.tensors()) {
        assert_eq!(NewTensor::from(first), NewTensor::from(second));
        assert_eq!(gguf.tensor_data(first).unwrap(), again.tensor_data(second).unwrap());
    }
}
