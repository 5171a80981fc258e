//! Names of outputs that say something else than what is in the file: readers, and people, go by names.

use std::path::Path;

use super::{Common, printable};
use lwq::gguf::TensorType;
use lwq::recipe::{TARGETS, Target};

/// Extensions of files that are no GGUF, and what people take them for.
const EXTENSIONS: &[(&str, &str)] = &[
    ("safetensors", "safetensors"),
    ("bin", "a PyTorch or ggml .bin file"),
    ("pt", "a PyTorch file"),
    ("pth", "a PyTorch file"),
    ("ckpt", "a PyTorch checkpoint"),
    ("pkl", "a pickle"),
    ("onnx", "ONNX"),
    ("ggml", "an old ggml file"),
    ("ggmf", "an old ggml file"),
    ("ggjt", "an old ggml file"),
    ("dat", "an importance matrix in .dat form"),
    ("h5", "HDF5"),
    ("pb", "a TensorFlow graph"),
    ("tflite", "TensorFlow Lite"),
    ("msgpack", "Flax"),
    ("npy", "NumPy"),
    ("npz", "NumPy"),
    ("json", "JSON"),
    ("jsonl", "JSON lines"),
    ("txt", "text"),
    ("md", "text"),
    ("csv", "a table"),
    ("html", "HTML"),
    ("parquet", "Parquet"),
    ("zip", "an archive"),
    ("gz", "an archive"),
    ("tar", "an archive"),
];

/// Types as names of files have them beside the names of targets.
const OTHER_NAMES: &[(&str, TensorType)] = &[
    ("FP16", TensorType::F16),
    ("FP32", TensorType::F32),
    ("MXFP4", TensorType::MXFP4),
    ("NVFP4", TensorType::NVFP4),
    // Q1 to Q4 are quarters of a year as often.
    ("Q5", TensorType::Q5_K),
    ("Q6", TensorType::Q6_K),
    ("Q8", TensorType::Q8_0),
];

/// A line about an extension that belongs to another format than the one written.
pub fn wrong_extension(output: &Path, is_gguf: bool) -> Option<String> {
    let extension = output.extension()?.to_str()?.to_ascii_lowercase();
    let (says, is) = if is_gguf {
        let (_, says) = EXTENSIONS.iter().find(|(known, _)| *known == extension)?;
        (*says, "GGUF")
    } else {
        let other =
            EXTENSIONS.iter().find(|(known, _)| *known == extension && extension != "dat" && extension != "bin");
        let gguf = (extension == "gguf").then_some("GGUF");
        (gguf.or(other.map(|(_, says)| *says))?, "an importance matrix in .dat form")
    };
    let shown = printable(&output.display().to_string());
    Some(format!("{shown}: .{} says that this is {says}; the file is {is}", printable(&extension)))
}

/// A type that a name has.
#[derive(Debug, PartialEq)]
struct NamedType {
    /// As it stands there.
    text: String,
    ty: TensorType,
    /// The target of this name; `None` where it is that of a family, such as Q4_K or Q4_K_XL.
    target: Option<Target>,
}

/// The types in the name of a file, set off from other letters and digits.
fn named_types(output: &Path) -> Vec<NamedType> {
    let Some(name) = output.file_name().and_then(|name| name.to_str()) else { return Vec::new() };
    let targets = TARGETS.iter().filter(|row| row.target != Target::COPY);
    let mut known: Vec<(&str, TensorType, Option<Target>)> = OTHER_NAMES.iter().map(|&(n, ty)| (n, ty, None)).collect();
    for row in targets {
        known.push((row.name, row.base, Some(row.target)));
        known.extend(row.aliases.iter().map(|alias| (*alias, row.base, None)));
    }
    known.sort_by_key(|(name, ..)| std::cmp::Reverse(name.len()));
    let upper = name.to_ascii_uppercase();
    let is_part = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let mut found = Vec::new();
    let mut at = 0;
    while at < upper.len() {
        let rest = &upper.as_bytes()[at..];
        let starts = at == 0 || !is_part(upper.as_bytes().get(at - 1));
        let fits = |(name, ..): &&(&str, TensorType, Option<Target>)| {
            rest.starts_with(name.as_bytes()) && !is_part(rest.get(name.len()))
        };
        match known.iter().find(fits).filter(|_| starts) {
            Some((text, ty, target)) => {
                found.push(NamedType {
                    text: (*text).to_owned(),
                    ty: *ty,
                    target: target.filter(|_| !goes_on(&rest[text.len()..])),
                });
                at += text.len();
            }
            None => at += 1,
        }
    }
    found
}

/// True if one or two letters or digits follow, as in Q4_K_XL and Q4_0_4_4: a variant of the type before them.
fn goes_on(rest: &[u8]) -> bool {
    let Some(rest) = rest.strip_prefix(b"_") else { return false };
    let length = rest.iter().take_while(|byte| byte.is_ascii_alphanumeric()).count();
    (1..=2).contains(&length)
}

/// A line about a name with a type that is not `target`'s, and none that is. `pure` files have no mix. A copy has `types`.
pub fn wrong_type(output: &Path, target: Target, pure: bool, types: &[TensorType]) -> Option<String> {
    let named = named_types(output);
    let is_right = |named: &NamedType| match named.target {
        _ if target == Target::COPY => types.contains(&named.ty),
        Some(of_name) if !pure => of_name == target,
        _ => {
            named.ty == target.base()
                || (named.text == "Q5" && [TensorType::Q5_0, TensorType::Q5_1].contains(&target.base()))
        }
    };
    if named.iter().any(is_right) {
        return None;
    }
    let says = &named.last()?.text;
    let shown = printable(&output.display().to_string());
    Some(match target {
        Target::COPY => format!("{shown}: the name says {says}; no tensor of the file has that type"),
        target => format!("{shown}: the name says {says}; the file is {target}"),
    })
}

/// Warns of the name of a converted file whose matrices have type `ty`.
pub fn check_converted(common: &Common, output: &Path, ty: TensorType) {
    let target = Target::parse(&ty.to_string()).ok();
    let lines = [wrong_extension(output, true), target.and_then(|target| wrong_type(output, target, true, &[]))];
    lines.into_iter().flatten().for_each(|line| common.warn(line));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_of_other_formats_are_told() {
        for name in ["m.safetensors", "m.BIN", "a/m.dat", "m.gguf.txt", "m.npz", "m.json", "m.pt"] {
            let line = wrong_extension(Path::new(name), true).unwrap_or_else(|| panic!("{name}"));
            assert!(line.starts_with(name) && line.ends_with("the file is GGUF"), "{line}");
        }
        for name in ["m.gguf", "m", "m.GGUF", "m.imatrix", "m.Q4_K_M", "model.v2", ".json/m"] {
            assert_eq!(wrong_extension(Path::new(name), true), None);
        }
        for (name, is_wrong) in [("m.dat", false), ("m.bin", false), ("m", false), ("m.gguf", true), ("m.txt", true)] {
            assert_eq!(wrong_extension(Path::new(name), false).is_some(), is_wrong, "{name}");
        }
    }

    #[test]
    fn types_in_names_must_hold_the_target() {
        use Target as T;
        for (name, target, says) in [
            ("model-Q8_0.gguf", T::Q4_K_M, Some("Q8_0")),
            ("model.q8_0.gguf", T::Q8_0, None),
            ("model-f16-Q4_K_M.gguf", T::Q4_K_M, None),
            ("model-f16.gguf", T::Q4_K_M, Some("F16")),
            ("model_fp16.gguf", T::F16, None),
            ("model-bf16.gguf", T::F16, Some("BF16")),
            ("IQ3_S.gguf", T::IQ3_M, Some("IQ3_S")),
            ("model_iq3_s_v2.gguf", T::IQ3_S, None),
            ("model-Q4_K.gguf", T::Q4_K_S, None),
            ("model-UD-Q4_K_XL.gguf", T::Q4_K_M, None),
            ("model-UD-Q4_K_XL.gguf", T::Q6_K, Some("Q4_K")),
            ("model-Q4_K_S.gguf", T::Q4_K_M, Some("Q4_K_S")),
            ("model-Q2_K.gguf", T::Q2_K_S, Some("Q2_K")),
            ("model-mxfp4.gguf", T::MXFP4_MOE, None),
            ("model-Q8.gguf", T::Q8_0, None),
            ("model-Q8.gguf", T::Q4_0, Some("Q8")),
            ("report-Q2-2024.gguf", T::Q4_0, None),
            ("xq8_0y.gguf", T::Q4_0, None),
            ("modell.gguf", T::Q4_0, None),
            ("Q8_0/model.gguf", T::Q4_0, None),
        ] {
            let line = wrong_type(Path::new(name), target, false, &[]);
            let expected = says.map(|says| format!("{name}: the name says {says}; the file is {target}"));
            assert_eq!(line, expected, "{name} {target}");
        }
        assert_eq!(wrong_type(Path::new("m-Q4_K_S.gguf"), T::Q4_K_M, true, &[]), None);
        assert_eq!(wrong_type(Path::new("m-F16.gguf"), T::COPY, false, &[TensorType::F16]), None);
        assert!(wrong_type(Path::new("m-Q8_0.gguf"), T::COPY, false, &[TensorType::F16]).is_some());
        assert!(wrong_type(Path::new("é\u{301}-Q8_0.gguf"), T::Q4_0, false, &[]).is_some());
    }
}
