//! The names that `--target` takes, with their base type and file type number.

use std::fmt;

use super::RecipeError;
use crate::gguf::TensorType;

/// Facts about one target.
#[derive(Debug)]
pub struct TargetInfo {
    /// The target this row describes.
    pub target: Target,
    /// The name that files and messages use, such as `Q4_K_M`.
    pub name: &'static str,
    /// Further names that mean the same.
    pub aliases: &'static [&'static str],
    /// `general.file_type` of the written file (`llama_ftype`), `None` where the source's own is kept.
    pub file_type: Option<u32>,
    /// The type of a tensor that no rule gives another one (`llama_ftype_get_default_type`).
    pub base: TensorType,
    /// One line for the help text.
    pub description: &'static str,
}

macro_rules! targets {
    ($($variant:ident $name:literal $aliases:tt $file_type:expr, $base:ident, $description:literal;)*) => {
        /// What a file is quantized to: a mix of tensor types, a single plain type, or a plain copy.
        #[allow(non_camel_case_types, missing_docs)] // the names are llama-quantize's own
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Target {
            $($variant,)*
        }

        /// Every target, in the order of increasing size within each family.
        pub const TARGETS: &[TargetInfo] = &[
            $(TargetInfo {
                target: Target::$variant,
                name: $name,
                aliases: &$aliases,
                file_type: $file_type,
                base: TensorType::$base,
                description: $description,
            },)*
        ];
    };
}

targets! {
    IQ1_S "IQ1_S" [] Some(24), IQ1_S, "1.56 bits in most tensors, needs an imatrix";
    IQ1_M "IQ1_M" [] Some(31), IQ1_M, "1.75 bits in most tensors, needs an imatrix";
    IQ2_XXS "IQ2_XXS" [] Some(19), IQ2_XXS, "2.06 bits in most tensors, needs an imatrix";
    IQ2_XS "IQ2_XS" [] Some(20), IQ2_XS, "2.31 bits in most tensors, needs an imatrix";
    IQ2_S "IQ2_S" [] Some(28), IQ2_XS, "2.31 bits in most tensors, more in sensitive ones, needs an imatrix";
    IQ2_M "IQ2_M" [] Some(29), IQ2_S, "2.56 bits in most tensors, more in sensitive ones, needs an imatrix";
    IQ3_XXS "IQ3_XXS" [] Some(23), IQ3_XXS, "3.06 bits in most tensors, needs an imatrix";
    IQ3_XS "IQ3_XS" [] Some(22), IQ3_S, "mix of 3.06 and 3.44 bits, needs an imatrix";
    IQ3_S "IQ3_S" [] Some(26), IQ3_S, "3.44 bits in most tensors";
    IQ3_M "IQ3_M" [] Some(27), IQ3_S, "3.44 bits in most tensors, more in sensitive ones";
    IQ4_XS "IQ4_XS" [] Some(30), IQ4_XS, "4.25 bits, non-linear levels";
    IQ4_NL "IQ4_NL" [] Some(25), IQ4_NL, "4.5 bits, non-linear levels";
    Q1_0 "Q1_0" [] Some(40), Q1_0, "1.125 bits, signs with one scale per 128";
    Q2_0 "Q2_0" [] Some(41), Q2_0, "2.25 bits, one scale per 64";
    TQ1_0 "TQ1_0" [] Some(36), TQ1_0, "1.69 bits, for models trained ternary";
    TQ2_0 "TQ2_0" [] Some(37), TQ2_0, "2.06 bits, for models trained ternary";
    Q2_K_S "Q2_K_S" [] Some(21), Q2_K, "2.63 bits in most tensors, needs an imatrix";
    Q2_K "Q2_K" [] Some(10), Q2_K, "2.63 bits in most tensors, 3.44 in sensitive ones";
    Q3_K_S "Q3_K_S" [] Some(11), Q3_K, "3.44 bits in most tensors";
    Q3_K_M "Q3_K_M" ["Q3_K"] Some(12), Q3_K, "3.44 bits in most tensors, 4.5 to 5.5 in sensitive ones";
    Q3_K_L "Q3_K_L" [] Some(13), Q3_K, "3.44 bits in most tensors, 5.5 in sensitive ones";
    Q4_0 "Q4_0" [] Some(2), Q4_0, "4.5 bits, one scale per 32";
    Q4_1 "Q4_1" [] Some(3), Q4_1, "5 bits, scale and minimum per 32";
    Q4_K_S "Q4_K_S" [] Some(14), Q4_K, "4.5 bits in most tensors";
    Q4_K_M "Q4_K_M" ["Q4_K"] Some(15), Q4_K, "4.5 bits in most tensors, 6.56 in sensitive ones; the usual choice";
    MXFP4_MOE "MXFP4_MOE" [] Some(38), MXFP4, "4.25 bits in expert tensors, 8.5 in the others";
    Q5_0 "Q5_0" [] Some(8), Q5_0, "5.5 bits, one scale per 32";
    Q5_1 "Q5_1" [] Some(9), Q5_1, "6 bits, scale and minimum per 32";
    Q5_K_S "Q5_K_S" [] Some(16), Q5_K, "5.5 bits in most tensors";
    Q5_K_M "Q5_K_M" ["Q5_K"] Some(17), Q5_K, "5.5 bits in most tensors, 6.56 in sensitive ones";
    Q6_K "Q6_K" [] Some(18), Q6_K, "6.56 bits";
    Q8_0 "Q8_0" [] Some(7), Q8_0, "8.5 bits, one scale per 32";
    F16 "F16" [] Some(1), F16, "16 bits, half precision";
    BF16 "BF16" [] Some(32), BF16, "16 bits, bfloat16";
    F32 "F32" [] Some(0), F32, "32 bits";
    COPY "COPY" [] None, F32, "every tensor as it is";
}

impl Target {
    /// This target's row of facts.
    pub fn info(self) -> &'static TargetInfo {
        // The table is generated in the order of the variants.
        &TARGETS[self as usize]
    }

    /// The base type: that of a tensor which no rule gives another one. Without meaning for [`Target::COPY`].
    pub fn base(self) -> TensorType {
        self.info().base
    }

    /// True where the base type is a plain number or nothing is converted: such targets have no mix.
    pub(crate) fn is_plain(self) -> bool {
        !self.base().is_quantized()
    }

    /// Finds a target by name or alias in any letter case, or by its file type number.
    ///
    /// # Errors
    /// [`RecipeError::UnknownTarget`], which lists every name.
    pub fn parse(text: &str) -> Result<Target, RecipeError> {
        let text = text.trim();
        // "07" or "7b.gguf" are not numbers of a file type: only the number as this program prints it is.
        let by_number = |row: &&TargetInfo| row.file_type.is_some_and(|number| number.to_string() == text);
        let by_name = |row: &&TargetInfo| {
            row.name.eq_ignore_ascii_case(text) || row.aliases.iter().any(|alias| alias.eq_ignore_ascii_case(text))
        };
        TARGETS
            .iter()
            .find(by_name)
            .or_else(|| TARGETS.iter().find(by_number))
            .map(|row| row.target)
            .ok_or_else(|| RecipeError::UnknownTarget { found: text.to_owned() })
    }

    /// Names of all targets, comma separated, for messages.
    pub(super) fn list() -> String {
        TARGETS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.info().name)
    }
}

/// The flag in `general.file_type` that says the number was guessed from the tensors (`LLAMA_FTYPE_GUESSED`).
pub const FILE_TYPE_GUESSED: u32 = 1024;

/// The `general.file_type` of a plain copy whose source does not state one: the file type of the most frequent
/// tensor type, marked with [`FILE_TYPE_GUESSED`]. `types` are those of all tensors in output order; of two equally
/// frequent types the one that reaches the count first wins.
pub fn guess_file_type(types: impl IntoIterator<Item = TensorType>) -> u32 {
    let mut counts: Vec<(TensorType, usize)> = Vec::new();
    let (mut most, mut winner) = (0, TensorType::F16);
    for ty in types {
        let at = counts.iter().position(|(known, _)| *known == ty).unwrap_or_else(|| {
            counts.push((ty, 0));
            counts.len() - 1
        });
        counts[at].1 += 1;
        if counts[at].1 > most {
            (most, winner) = (counts[at].1, ty);
        }
    }
    let number = match winner {
        // These base types belong to several targets; the medium one stands for them.
        TensorType::Q2_K => 10,
        TensorType::Q3_K => 12,
        TensorType::Q4_K => 15,
        TensorType::Q5_K => 17,
        TensorType::IQ2_XS => 20,
        TensorType::IQ2_S => 28,
        TensorType::IQ3_S => 26,
        TensorType::NVFP4 => 39,
        // ggml's loader has no guess for this type and falls to "all F32".
        TensorType::MXFP4 => 0,
        other => TARGETS.iter().find(|row| row.base == other).and_then(|row| row.file_type).unwrap_or(0),
    };
    number | FILE_TYPE_GUESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_at_their_variant() {
        for (at, row) in TARGETS.iter().enumerate() {
            assert_eq!(row.target as usize, at);
            assert_eq!(row.target.info().name, row.name);
        }
        let mut numbers: Vec<_> = TARGETS.iter().filter_map(|row| row.file_type).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), TARGETS.len() - 1, "file type numbers are distinct");
    }

    #[test]
    fn names_aliases_and_numbers_are_found_in_any_letter_case() {
        for row in TARGETS {
            assert_eq!(Target::parse(row.name), Ok(row.target));
            assert_eq!(Target::parse(&row.name.to_lowercase()), Ok(row.target));
            if let Some(number) = row.file_type {
                assert_eq!(Target::parse(&number.to_string()), Ok(row.target));
            }
        }
        assert_eq!(Target::parse("q4_k"), Ok(Target::Q4_K_M));
        assert_eq!(Target::parse("Q5_k"), Ok(Target::Q5_K_M));
        assert_eq!(Target::parse("Q3_K"), Ok(Target::Q3_K_M));
    }

    #[test]
    fn file_names_and_unknown_numbers_are_no_targets() {
        for text in ["", "7b.gguf", "07", "+7", "-1", "39", "4", "Q4_K_X", "NVFP4"] {
            let error = Target::parse(text).unwrap_err().to_string();
            assert!(error.contains("Q4_K_M") && error.contains("COPY"), "{error}");
        }
    }

    #[test]
    fn guessed_file_type_follows_the_most_frequent_type() {
        use TensorType as T;
        assert_eq!(guess_file_type([T::F32, T::Q4_K, T::Q4_K]), 15 | FILE_TYPE_GUESSED);
        assert_eq!(guess_file_type([T::F32, T::Q4_0, T::Q4_0, T::F32]), 2 | FILE_TYPE_GUESSED);
        assert_eq!(guess_file_type([T::MXFP4]), FILE_TYPE_GUESSED);
        assert_eq!(guess_file_type([]), 1 | FILE_TYPE_GUESSED);
        assert_eq!(guess_file_type([T::IQ2_XS]), 20 | FILE_TYPE_GUESSED);
    }
}
