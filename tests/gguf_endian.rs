//! Big-endian files hold the same model as little-endian ones.

mod gguf_support;

use std::borrow::Cow;

use gguf_support::accepted;
use lwq::gguf::testing::RawGguf;
use lwq::gguf::{Array, Gguf, TENSOR_TYPES, TensorType, Value, ValueType};

const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn both(build: impl Fn(RawGguf) -> RawGguf) -> [Gguf; 2] {
    [RawGguf::new(), RawGguf::big_endian()].map(|file| accepted(build(file).build()))
}

#[test]
fn metadata_of_either_order_is_equal() {
    let [little, big] = both(|file| {
        let f64s: Vec<u8> = [1.5f64, -0.0].iter().flat_map(|value| file.ordered(value.to_le_bytes())).collect();
        let strings = [file.string(b"\xff\xfe"), file.string(b"")].concat();
        let i16s: Vec<u8> = [-2i16, 300].iter().flat_map(|value| file.ordered(value.to_le_bytes())).collect();
        let nested = [
            file.array_payload(STRING, 2, &strings),
            file.array_payload(3, 2, &i16s),
            file.array_payload(ARRAY, 1, &file.array_payload(7, 2, &[0, 3])),
        ]
        .concat();
        let [i8_, i16_, i64_, f64_] = [1, 3, 11, 12];
        let number = |bytes: &[u8]| bytes.to_vec();
        let (short, long, double) = (
            file.ordered((-300i16).to_le_bytes()),
            file.ordered((-5i64).to_le_bytes()),
            file.ordered(2.25f64.to_le_bytes()),
        );
        file.pair("u8", 0, &[200])
            .pair("i8", i8_, &[0x80])
            .u16("u16", 65_000)
            .pair("i16", i16_, &number(&short))
            .u32("general.alignment", 32)
            .i32("i32", -70_000)
            .f32("f32", f32::from_bits(0x7fc0_1234))
            .bool("bool", true)
            .str("str", "gr\u{fc}n")
            .u64("u64", u64::MAX - 1)
            .pair("i64", i64_, &number(&long))
            .pair("f64", f64_, &number(&double))
            .strings("tokens", &["a", "", "\u{2581}b"])
            .f32s("scores", &[0.5, -1.0])
            .i32s("types", &[1, -2])
            .array("f64s", f64_, 2, &f64s)
            .array("nested", ARRAY, 3, &nested)
    });
    assert!(!little.is_big_endian() && big.is_big_endian());
    assert_eq!(little.metadata(), big.metadata());
    assert_eq!(big.metadata().array("scores").unwrap().unwrap().to_f32_vec().unwrap(), [0.5, -1.0]);
    assert_eq!(big.metadata().array("types").unwrap().unwrap().to_i64_vec().unwrap(), [1, -2]);
    let inner = Value::Array(Array::of_values(ValueType::Bool, &[Value::Bool(false), Value::Bool(true)]));
    let expected = Array::of_values(
        ValueType::Array,
        &[
            Value::Array(Array::of_strings([&b"\xff\xfe"[..], b""])),
            Value::Array(Array::of_values(ValueType::I16, &[Value::I16(-2), Value::I16(300)])),
            Value::Array(Array::of_values(ValueType::Array, &[inner])),
        ],
    );
    assert_eq!(big.metadata().get("nested"), Some(&Value::Array(expected)));
}

#[test]
fn plain_numbers_are_swapped_and_rows_cut_out() {
    let values: Vec<f32> = (0..12).map(|value| value as f32 * 0.75 - 2.0).collect();
    let [little, big] = both(|file| {
        let halves: Vec<u8> = (0..6u16).flat_map(|value| file.ordered((value * 1000).to_le_bytes())).collect();
        let longs: Vec<u8> = (0..3i64).flat_map(|value| file.ordered((value << 40).to_le_bytes())).collect();
        file.f32_tensor("f32", &[4, 3], &values)
            .tensor("f16", &[6], TensorType::F16, &halves)
            .tensor("bf16", &[3, 2], TensorType::BF16, &halves)
            .tensor("i64", &[3], TensorType::I64, &longs)
            .tensor("i8", &[5], TensorType::I8, &[1, 2, 3, 4, 5])
    });
    assert_eq!(little.tensors(), big.tensors());
    for tensor in little.tensors() {
        let expected = little.data(tensor).unwrap();
        assert_eq!(big.tensor_data(tensor).unwrap(), expected, "{}", tensor.name);
        assert!(matches!(little.tensor_data(tensor).unwrap(), Cow::Borrowed(_)));
        for row in 0..tensor.rows() {
            let rows = tensor.rows() - row;
            assert_eq!(big.read_rows(tensor, row, rows).unwrap(), little.read_rows(tensor, row, rows).unwrap());
        }
    }
    // In place only what needs no swapping.
    assert_eq!(big.data(big.tensor("i8").unwrap()).unwrap(), [1, 2, 3, 4, 5]);
    let message = big.data(big.tensor("f32").unwrap()).unwrap_err().to_string();
    assert!(message.contains("tensor \"f32\": big-endian data of type f32"), "{message}");
}

/// Where `gguf_convert_endian.py` swaps two bytes, for the block types that it handles.
const SCRIPT_SWAPS: &[(TensorType, &[usize])] = &[
    (TensorType::Q1_0, &[0]),
    (TensorType::Q4_0, &[0]),
    (TensorType::Q8_0, &[0]),
    (TensorType::Q4_K, &[0, 2]),
    (TensorType::Q6_K, &[208]),
    (TensorType::TQ2_0, &[64]),
    (TensorType::MXFP4, &[]),
    (TensorType::NVFP4, &[]),
];

#[test]
fn blocks_are_swapped_as_the_converter_script_does() {
    for (ty, swaps) in SCRIPT_SWAPS {
        let info = ty.info().unwrap();
        let little: Vec<u8> = (0..info.block_bytes * 3).map(|at| (at * 31) as u8).collect();
        let mut big = little.clone();
        for block in big.chunks_exact_mut(info.block_bytes) {
            swaps.iter().for_each(|at| block.swap(*at, at + 1));
        }
        let file = RawGguf::big_endian().tensor("t", &[info.block_len as u64, 3], *ty, &big);
        let gguf = accepted(file.build());
        let tensor = &gguf.tensors()[0];
        assert_eq!(gguf.tensor_data(tensor).unwrap(), little, "{ty}");
        assert_eq!(*gguf.read_rows(tensor, 1, 1).unwrap(), little[info.block_bytes..2 * info.block_bytes]);
        assert_eq!(gguf.data(tensor).is_ok(), swaps.is_empty());
    }
}

#[test]
fn every_known_type_of_a_big_endian_file_can_be_read() {
    for info in TENSOR_TYPES {
        let data = vec![0x5a; info.block_bytes * 2];
        let file = RawGguf::big_endian().tensor("t", &[info.block_len as u64, 2], info.ty, &data);
        let gguf = accepted(file.build());
        assert_eq!(gguf.tensor_data(&gguf.tensors()[0]).unwrap(), data, "{}", info.name);
    }
}
