//! Which types a plan may use, and how it judges them: flags that `plan` and `quantize` share.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::types::{TypeArgs, parse_type};
use crate::cli::{Common, printable};
use lwq::gguf::TensorType;
use lwq::measure::path_for;
use lwq::plan::{DamageMethod, Request};
use lwq::recipe::candidates::Rules;

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

impl From<MethodArg> for DamageMethod {
    fn from(method: MethodArg) -> DamageMethod {
        match method {
            MethodArg::Error => DamageMethod::Error,
            MethodArg::Measured => DamageMethod::Measured,
        }
    }
}

impl ChoiceArgs {
    /// Adds what the flags say to a request for `model` whose result is `output`; says where the measurement goes when it
    /// cannot stay beside the model.
    ///
    /// # Errors
    /// When a pattern of types is wrong.
    pub fn apply<'a>(
        &self,
        request: Request<'a>,
        types: &TypeArgs,
        model: &Path,
        output: Option<&Path>,
        common: &Common,
    ) -> Result<Request<'a>> {
        let rules = Rules {
            tensor_types: types.patterns()?,
            output_tensor_type: types.output_tensor_type,
            token_embedding_type: types.token_embedding_type,
            types: (!self.types.is_empty()).then(|| self.types.clone()),
            min_type: self.min_type,
        };
        let sensitivity = match &self.sensitivity {
            Some(path) => path.clone(),
            None => measurement_path(model, output, self.method == MethodArg::Measured, common),
        };
        let request = request.rules(rules).method(self.method.into()).sensitivity(&sensitivity);
        Ok(request.second_round(self.second_round))
    }
}

/// Where the measurement of `model` lies or goes, see [`path_for`]; says so when that is not beside the model.
pub fn measurement_path(model: &Path, output: Option<&Path>, used: bool, common: &Common) -> PathBuf {
    let (path, elsewhere) = path_for(model, output);
    if elsewhere && used {
        let shown = printable(&path.display().to_string());
        common.note(format!("the measurement is not kept beside the model but in {shown}"));
    }
    path
}
