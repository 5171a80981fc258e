//! Which types a plan may use, and how it judges them: flags that `plan` and `quantize` share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use lwq::gguf::TensorType;
use lwq::plan::Method;
use lwq::recipe::candidates::Rules;
use lwq::recipe::{TypeOverride, parse_override_list, parse_storable_type};

/// Flags of a plan besides its limit. A command that also does without a plan names the flags for that in a group
/// `unplanned`, which the flags here exclude.
#[derive(Args, Debug, Clone, Default)]
pub struct ChoiceArgs {
    /// Choose from these types only, such as Q3_K,IQ4_XS,Q6_K
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_type, conflicts_with = "unplanned")]
    types: Vec<TensorType>,
    /// Use no type of fewer bits than this one, where none is given by hand
    #[arg(long, value_name = "TYPE", value_parser = parse_type, conflicts_with = "unplanned")]
    min_type: Option<TensorType>,
    /// Where the damage of a type is taken from
    #[arg(long, value_enum, default_value_t = MethodArg::Measured, conflicts_with = "unplanned")]
    method: MethodArg,
    /// Measurement of the model; made when it is not there [default: the model's name with .sens.json]
    #[arg(long, value_name = "FILE", conflicts_with = "unplanned")]
    sensitivity: Option<PathBuf>,
    /// Below 4 bits per weight, measure again around the first solution what each tensor contributes while the others
    /// are rounded too, and solve again
    #[arg(long, conflicts_with = "unplanned")]
    second_round: bool,
}

/// Methods as flags name them.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MethodArg {
    /// Rounding errors, and the divergence that each tensor alone causes; measured once for all plans
    #[default]
    Measured,
    /// Rounding errors and what is usual for a tensor's role; the model is not run
    Error,
}

impl From<MethodArg> for Method {
    fn from(method: MethodArg) -> Method {
        match method {
            MethodArg::Error => Method::Error,
            MethodArg::Measured => Method::Measured,
        }
    }
}

/// Types that the user gives by hand.
#[derive(Debug, Clone, Default)]
pub(in crate::cli) struct ByHand<'a> {
    pub tensor_type: &'a [String],
    pub tensor_type_file: Option<&'a std::path::Path>,
    pub output_tensor_type: Option<TensorType>,
    pub token_embedding_type: Option<TensorType>,
}

impl ByHand<'_> {
    /// The patterns, those of the command line first.
    ///
    /// # Errors
    /// When a pattern or the file is wrong.
    pub fn patterns(&self) -> Result<Vec<TypeOverride>> {
        let mut patterns = Vec::new();
        for text in self.tensor_type {
            patterns.push(TypeOverride::parse(text, "--tensor-type")?);
        }
        if let Some(path) = self.tensor_type_file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            patterns.extend(parse_override_list(&text, &path.display().to_string())?);
        }
        Ok(patterns)
    }
}

impl ChoiceArgs {
    /// The method.
    pub(in crate::cli) fn method(&self) -> Method {
        self.method.into()
    }

    /// True if a solution of few bits is to be measured and made again.
    pub(in crate::cli) fn second_round(&self) -> bool {
        self.second_round
    }

    /// The file that holds the measurement of `model`, or will.
    pub(in crate::cli) fn sensitivity(&self, model: &Path) -> PathBuf {
        self.sensitivity.clone().unwrap_or_else(|| crate::cli::measure::default_path(model))
    }

    /// The restrictions, with the types given by hand.
    ///
    /// # Errors
    /// As [`ByHand::patterns`].
    pub(in crate::cli) fn rules(&self, by_hand: &ByHand<'_>) -> Result<Rules> {
        Ok(Rules {
            tensor_types: by_hand.patterns()?,
            output_tensor_type: by_hand.output_tensor_type,
            token_embedding_type: by_hand.token_embedding_type,
            types: (!self.types.is_empty()).then(|| self.types.clone()),
            min_type: self.min_type,
        })
    }
}

pub(in crate::cli) fn parse_type(text: &str) -> Result<TensorType, String> {
    parse_storable_type(text, "tensor type").map_err(|e| e.to_string())
}
