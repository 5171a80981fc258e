//! The schemes: what weights become, and what the file says about it.

use std::fmt;
use std::str::FromStr;

use safetensors::tensor::Dtype;

use crate::rounding::grid::{Grid, Groups, Layout, ScaleType};

/// A named combination of weights and activations, as users of vLLM and llm-compressor know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)] // the names that users type
pub enum Scheme {
    /// 4-bit integers in groups, symmetric.
    W4A16,
    /// 4-bit integers in groups with zero points.
    W4A16_ASYM,
    /// 8-bit integers in groups, symmetric.
    W8A16,
    /// 8-bit integers a row, activations rounded to 8 bits a token.
    W8A8,
    /// FP8 a row, activations rounded to FP8 a token.
    FP8_DYNAMIC,
    /// FP8 in blocks of 128 x 128, activations rounded to FP8 in groups of 128.
    FP8_BLOCK,
    /// FP4 in groups of 16 with FP8 scales and a global one.
    NVFP4A16,
    /// FP4 in groups of 32 with scales that are powers of two.
    MXFP4A16,
}

/// Which weights share a scale, where a scheme leaves the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupSize {
    /// So many neighbours in a row: 32, 64 or 128.
    Columns(usize),
    /// A whole row.
    Channel,
}

/// How tensors of a layout are stored, `format` in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    PackQuantized,
    IntQuantized,
    FloatQuantized,
    Nvfp4Pack,
    Mxfp4Pack,
}

/// How activations are rounded when the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Activations {
    /// They are not.
    Kept,
    /// With a scale for each token, found as it comes.
    Token,
    /// With a scale for each group of 128 of a token.
    Group,
}

/// One scheme.
#[derive(Debug)]
pub(crate) struct SchemeRow {
    pub(crate) scheme: Scheme,
    pub(crate) name: &'static str,
    pub(crate) format: Format,
    pub(crate) grid: Grid,
    pub(crate) groups: Groups,
    /// Other sizes of groups may be chosen.
    pub(crate) free_groups: bool,
    pub(crate) activations: Activations,
    /// Stored type of scales; `None` is the model's own type.
    pub(crate) scale_type: Option<ScaleType>,
    /// transformers 5.17 reads single experts, which it puts into stacks, of this scheme. Others fail there, or (NVFP4) come
    /// out wrong without a word.
    pub(crate) experts_load: bool,
}

const G128: Groups = Groups::Columns(128);

const W4A16: SchemeRow = SchemeRow {
    scheme: Scheme::W4A16,
    name: "W4A16",
    format: Format::PackQuantized,
    grid: Grid::Int { bits: 4, symmetric: true },
    groups: G128,
    free_groups: true,
    activations: Activations::Kept,
    scale_type: None,
    experts_load: true,
};

/// All schemes.
pub(crate) const SCHEMES: [SchemeRow; 8] = [
    W4A16,
    SchemeRow {
        scheme: Scheme::W4A16_ASYM,
        name: "W4A16_ASYM",
        grid: Grid::Int { bits: 4, symmetric: false },
        experts_load: false,
        ..W4A16
    },
    SchemeRow { scheme: Scheme::W8A16, name: "W8A16", grid: Grid::Int { bits: 8, symmetric: true }, ..W4A16 },
    SchemeRow {
        scheme: Scheme::W8A8,
        name: "W8A8",
        format: Format::IntQuantized,
        grid: Grid::Int { bits: 8, symmetric: true },
        groups: Groups::Channel,
        free_groups: false,
        activations: Activations::Token,
        scale_type: None,
        experts_load: false,
    },
    SchemeRow {
        scheme: Scheme::FP8_DYNAMIC,
        name: "FP8_DYNAMIC",
        format: Format::FloatQuantized,
        grid: Grid::Fp8,
        groups: Groups::Channel,
        free_groups: false,
        activations: Activations::Token,
        scale_type: None,
        experts_load: true,
    },
    SchemeRow {
        scheme: Scheme::FP8_BLOCK,
        name: "FP8_BLOCK",
        format: Format::FloatQuantized,
        grid: Grid::Fp8,
        groups: Groups::Blocks { rows: 128, columns: 128 },
        free_groups: false,
        activations: Activations::Group,
        scale_type: None,
        experts_load: false,
    },
    SchemeRow {
        scheme: Scheme::NVFP4A16,
        name: "NVFP4A16",
        format: Format::Nvfp4Pack,
        grid: Grid::Nvfp4,
        groups: Groups::Columns(16),
        free_groups: false,
        activations: Activations::Kept,
        scale_type: Some(ScaleType::F8E4M3),
        experts_load: false,
    },
    SchemeRow {
        scheme: Scheme::MXFP4A16,
        name: "MXFP4A16",
        format: Format::Mxfp4Pack,
        grid: Grid::Mxfp4,
        groups: Groups::Columns(32),
        free_groups: false,
        activations: Activations::Kept,
        scale_type: Some(ScaleType::E8M0),
        experts_load: true,
    },
];

/// All schemes, in the order in which they are listed.
pub fn schemes() -> impl Iterator<Item = Scheme> {
    SCHEMES.iter().map(|row| row.scheme)
}

impl Scheme {
    pub(crate) fn row(self) -> &'static SchemeRow {
        &SCHEMES[self as usize]
    }

    /// The name in commands.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// True if the size of groups can be chosen.
    pub fn has_free_groups(self) -> bool {
        self.row().free_groups
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Scheme {
    type Err = String;

    fn from_str(text: &str) -> Result<Scheme, String> {
        let found = SCHEMES.iter().find(|row| row.name.eq_ignore_ascii_case(text));
        found.map(|row| row.scheme).ok_or_else(|| {
            let known: Vec<&str> = SCHEMES.iter().map(|row| row.name).collect();
            format!("not a scheme; known: {}", known.join(" "))
        })
    }
}

impl FromStr for GroupSize {
    type Err = String;

    fn from_str(text: &str) -> Result<GroupSize, String> {
        match text {
            "32" | "64" | "128" => Ok(GroupSize::Columns(text.parse().map_err(|_| "no number".to_owned())?)),
            "channel" => Ok(GroupSize::Channel),
            _ => Err("not a size of groups that vLLM has kernels for; give 32, 64, 128 or channel".to_owned()),
        }
    }
}

impl From<GroupSize> for Groups {
    fn from(size: GroupSize) -> Groups {
        match size {
            GroupSize::Columns(columns) => Groups::Columns(columns),
            GroupSize::Channel => Groups::Channel,
        }
    }
}

impl Format {
    /// All of them.
    pub(crate) const ALL: [Format; 5] =
        [Format::PackQuantized, Format::IntQuantized, Format::FloatQuantized, Format::Nvfp4Pack, Format::Mxfp4Pack];

    /// The name in `config.json`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::PackQuantized => "pack-quantized",
            Format::IntQuantized => "int-quantized",
            Format::FloatQuantized => "float-quantized",
            Format::Nvfp4Pack => "nvfp4-pack-quantized",
            Format::Mxfp4Pack => "mxfp4-pack-quantized",
        }
    }

    /// True if codes lie in `weight_packed`.
    pub(crate) fn is_packed(self) -> bool {
        !matches!(self, Format::IntQuantized | Format::FloatQuantized)
    }
}

/// The type of scales in a model whose matrices have type `model`.
pub(crate) fn scale_type_of(model: Dtype) -> ScaleType {
    match model {
        Dtype::F16 => ScaleType::F16,
        Dtype::F32 => ScaleType::F32,
        _ => ScaleType::Bf16,
    }
}

impl SchemeRow {
    /// What weights become in a model whose matrices have type `model`.
    pub(crate) fn layout(&self, groups: Groups, model: Dtype) -> Layout {
        Layout { grid: self.grid, groups, scale_type: self.scale_type.unwrap_or_else(|| scale_type_of(model)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_the_schemes() {
        for row in &SCHEMES {
            assert_eq!(row.scheme.row().name, row.name);
            assert_eq!(row.name.to_lowercase().parse::<Scheme>(), Ok(row.scheme));
        }
        assert!("W3A16".parse::<Scheme>().unwrap_err().contains("W4A16_ASYM"));
        assert_eq!("channel".parse::<GroupSize>(), Ok(GroupSize::Channel));
        assert!("16".parse::<GroupSize>().is_err());
    }
}
