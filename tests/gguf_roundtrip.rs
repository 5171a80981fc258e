//! What is written is what is read back, for any metadata and any tensors.

use lwq::gguf::{
    Array, Gguf, GgufLayout, GgufWriter, Metadata, NewTensor, TENSOR_TYPES, TensorInfo, TensorType, Value, ValueType,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn string() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![".{0,20}".prop_map(String::into_bytes), vec(any::<u8>(), 0..20)]
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u32>().prop_map(|bits| Value::F32(f32::from_bits(bits))),
        any::<bool>().prop_map(Value::Bool),
        string().prop_map(|text| Value::String(text.into())),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<u64>().prop_map(|bits| Value::F64(f64::from_bits(bits))),
    ]
}

/// Arrays take the type of the first element; the others are dropped if they differ.
fn array_of(values: Vec<Value>) -> Value {
    let elem = values.first().map_or(ValueType::U8, Value::value_type);
    let same: Vec<Value> = values.into_iter().filter(|value| value.value_type() == elem).collect();
    Value::Array(Array::of_values(elem, &same))
}

fn value() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(3, 40, 8, |inner| {
        prop_oneof![
            vec(inner, 0..8).prop_map(array_of),
            vec(any::<i32>(), 0..50).prop_map(|ints| array_of(ints.into_iter().map(Value::I32).collect())),
            vec(string(), 0..20).prop_map(|strings| Value::Array(Array::of_strings(strings))),
        ]
    })
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let pairs = vec(("[a-z.\u{e9}]{1,12}", value()), 0..12);
    (pairs, prop::option::of(0u32..10)).prop_map(|(pairs, alignment)| {
        let mut metadata = Metadata::new("model.gguf");
        for (key, value) in pairs {
            metadata.set(&key, value);
        }
        if let Some(shift) = alignment {
            metadata.set("general.alignment", 1u32 << shift);
        }
        metadata
    })
}

fn tensors() -> impl Strategy<Value = Vec<(NewTensor, Vec<u8>)>> {
    let one = (0..TENSOR_TYPES.len(), vec(0u64..4, 0..5), any::<u8>());
    vec(one, 0..8).prop_map(|specs| {
        let mut tensors = Vec::new();
        for (index, (ty, mut shape, seed)) in specs.into_iter().enumerate() {
            let mut info = &TENSOR_TYPES[ty];
            match shape.first_mut() {
                Some(row_len) => *row_len *= info.block_len as u64,
                // A scalar has one element: it needs a type of single elements.
                None => info = TensorType::F32.info().unwrap(),
            }
            let elements: u64 = shape.iter().product();
            let bytes = elements / info.block_len as u64 * info.block_bytes as u64;
            let data = (0..bytes).map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed)).collect();
            tensors.push((NewTensor { name: format!("blk.{index}.\u{1b}\n/.."), shape, ty: info.ty }, data));
        }
        tensors
    })
}

fn layout_of(metadata: &Metadata, tensors: &[(NewTensor, Vec<u8>)]) -> GgufLayout {
    GgufLayout::new("out.gguf", metadata, tensors.iter().map(|(tensor, _)| tensor.clone())).unwrap()
}

fn streamed(layout: GgufLayout, tensors: &[(NewTensor, Vec<u8>)], part: usize) -> Vec<u8> {
    let mut writer = GgufWriter::new(Vec::new(), layout).unwrap();
    for (index, (_, data)) in tensors.iter().enumerate() {
        for part in data.chunks(part) {
            writer.write(index, part).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn check_same(gguf: &Gguf, metadata: &Metadata, tensors: &[(NewTensor, Vec<u8>)]) {
    assert_eq!(gguf.metadata(), metadata);
    assert_eq!(gguf.tensors().len(), tensors.len());
    for (read, (written, data)) in gguf.tensors().iter().zip(tensors) {
        assert_eq!(NewTensor::from(read), *written);
        assert_eq!(gguf.data(read).unwrap(), data);
        assert_eq!(gguf.tensor(&written.name).map(|found: &TensorInfo| found.offset), Some(read.offset));
        for row in 0..read.rows() {
            let bytes = read.row_bytes().unwrap() as usize;
            let row_data = gguf.read_rows(read, row, 1).unwrap();
            assert_eq!(*row_data, data[row as usize * bytes..][..bytes]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn written_files_are_read_back_the_same(
        metadata in metadata(),
        tensors in tensors(),
        part in 1usize..5000,
        order in any::<prop::sample::Index>(),
    ) {
        let layout = layout_of(&metadata, &tensors);
        let bytes = streamed(layout.clone(), &tensors, part);
        prop_assert_eq!(bytes.len() as u64, layout.file_bytes());
        let gguf = Gguf::from_bytes(bytes.clone()).unwrap();
        check_same(&gguf, &metadata, &tensors);

        // Written again from what was read: the same bytes.
        let again = GgufLayout::new("again.gguf", gguf.metadata(), gguf.tensors().iter().map(NewTensor::from)).unwrap();
        prop_assert_eq!(&streamed(again, &tensors, usize::MAX), &bytes);

        // Positioned writes in another order, onto old content: the same bytes.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("positioned.gguf");
        std::fs::write(&path, vec![0xaa; bytes.len()]).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let turn = order.index(tensors.len().max(1));
        for index in (0..tensors.len()).map(|index| (index + turn) % tensors.len()).rev() {
            for (number, data) in tensors[index].1.chunks(part).enumerate().collect::<Vec<_>>().into_iter().rev() {
                layout.write_data_at(&file, index, (number * part) as u64, data).unwrap();
            }
        }
        layout.write_header_at(&file).unwrap();
        prop_assert_eq!(&std::fs::read(&path).unwrap(), &bytes);
        check_same(&Gguf::open(&path).unwrap(), &metadata, &tensors);
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in vec(any::<u8>(), 0..400), sound in any::<bool>()) {
        if sound && bytes.len() > 24 {
            bytes[..8].copy_from_slice(b"GGUF\x03\0\0\0");
            for at in 9..16 {
                bytes[at] = 0;
                bytes[at + 8] = 0;
            }
        }
        if let Err(error) = Gguf::from_bytes(bytes) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}

#[test]
fn the_bundled_model_is_written_back_byte_for_byte() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/doclet-4m-f16.gguf");
    let gguf = Gguf::open(path).unwrap();
    let layout = GgufLayout::new("out.gguf", gguf.metadata(), gguf.tensors().iter().map(NewTensor::from)).unwrap();
    let mut writer = GgufWriter::new(Vec::new(), layout).unwrap();
    for (index, tensor) in gguf.tensors().iter().enumerate() {
        writer.write(index, gguf.data(tensor).unwrap()).unwrap();
    }
    assert!(writer.finish().unwrap() == std::fs::read(path).unwrap());
}

#[test]
fn a_writer_refuses_what_its_layout_does_not_foresee() {
    let tensor = |name: &str, ty| NewTensor { name: name.to_owned(), shape: vec![4], ty };
    let metadata = Metadata::new("m");
    let two = [tensor("a", TensorType::F32), tensor("b", TensorType::F32)];
    let layout = GgufLayout::new("out.gguf", &metadata, two.clone()).unwrap();
    let says = |result: Result<(), lwq::gguf::GgufError>, part: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("out.gguf") && message.contains(part), "{message}");
    };
    let mut writer = GgufWriter::new(Vec::new(), layout).unwrap();
    says(writer.write(1, &[0; 16]), "the one due is \"a\"");
    writer.write(0, &[0; 10]).unwrap();
    says(writer.write(0, &[0; 7]), "lacks 6");
    writer.write(0, &[0; 6]).unwrap();
    says(writer.finish().map(drop), "tensor \"b\" has 16 bytes, 0 came");

    let refused = |tensors: &[NewTensor]| GgufLayout::new("out.gguf", &metadata, tensors.iter().cloned()).map(drop);
    says(refused(&[two[0].clone(), two[0].clone()]), "two tensors are named \"a\"");
    says(refused(&[tensor("a", TensorType(36))]), "type#36");
    says(refused(&[tensor("", TensorType::F32)]), "empty name");
    says(
        refused(&[tensor(&"x".repeat(64), TensorType::F32)]),
        "64 bytes, at most 63 are taken by ggml (GGML_MAX_NAME)",
    );
    says(refused(&[tensor("a", TensorType::Q4_K)]), "not a multiple of 256");
    says(
        refused(&[NewTensor { shape: vec![1; 5], ..two[0].clone() }]),
        "5 dimensions, at most 4 are taken by ggml (GGML_MAX_DIMS)",
    );
    let half = NewTensor { name: "c".to_owned(), shape: vec![1 << 62], ty: TensorType::I8 };
    let name = |name: &str| NewTensor { name: name.to_owned(), ..half.clone() };
    says(refused(&[name("a"), name("b"), name("c"), name("d")]), "2^64 bytes");
}

#[test]
fn metadata_keeps_its_order_through_changes() {
    let mut metadata = Metadata::new("m.gguf");
    for key in ["c", "a", "d", "b"] {
        metadata.set(key, 1u32);
    }
    metadata.set("a", "changed");
    metadata.set_last("c", 2.5f32);
    assert_eq!(metadata.remove("d"), Some(Value::U32(1)));
    assert_eq!(metadata.remove("d"), None);
    let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["a", "b", "c"]);
    assert_eq!(metadata.str("a").unwrap(), Some("changed"));
    assert_eq!(metadata.f32("c").unwrap(), Some(2.5));
    assert_eq!(metadata.u64("b").unwrap(), Some(1));
    metadata.set("scores", Array::of_values(ValueType::I8, &[Value::I8(1)]));
    let message = metadata.array("scores").unwrap().unwrap().to_f32_vec().unwrap_err().to_string();
    for part in ["m.gguf", "\"scores\"", "arr of i8", "an array of f32"] {
        assert!(message.contains(part), "{message}");
    }
}
