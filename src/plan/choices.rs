//! From a plan to the choice for each tensor of a model.

use std::collections::HashMap;

use super::{PlanError, PlanFile, record};
use crate::gguf::{Gguf, Metadata, fingerprint, shown};
use crate::imatrix::Imatrix;
use crate::measure::SourceFile;
use crate::quantize::Choices;
use crate::recipe::candidates::kept;
use crate::recipe::{Choice, FILE_TYPE_GUESSED, Reason, Target, TensorDesc, guess_file_type, requires_imatrix};

/// Digits of a fingerprint that a message shows.
const SHOWN_DIGITS: usize = 12;

impl PlanFile {
    /// Checks that this is the model and the importance matrix that the plan was made for. `file` names the plan.
    ///
    /// # Errors
    /// When one of them is another, or the importance matrix is missing or not wanted.
    pub fn check_sources(&self, file: &str, model: &Gguf, imatrix: Option<&Imatrix>) -> Result<(), PlanError> {
        let mismatch = |what, planned: &SourceFile, found: String| {
            if planned.sha256.eq_ignore_ascii_case(&found) {
                return Ok(());
            }
            let short = |sha256: &str| sha256.get(..SHOWN_DIGITS).unwrap_or(sha256).to_owned();
            Err(PlanError::Mismatch {
                file: file.to_owned(),
                what,
                planned: shown(planned.name.as_bytes()),
                planned_sha256: short(&planned.sha256),
                found_sha256: short(&found),
            })
        };
        mismatch("model", &self.model, fingerprint(model))?;
        match (&self.imatrix, imatrix) {
            (Some(planned), Some(imatrix)) => mismatch("importance matrix", planned, imatrix.fingerprint()),
            (Some(planned), None) => {
                let planned = shown(planned.name.as_bytes());
                Err(PlanError::ImatrixMissing { file: file.to_owned(), planned })
            }
            (None, Some(_)) => Err(PlanError::ImatrixUnplanned { file: file.to_owned() }),
            (None, None) => Ok(()),
        }
    }

    /// What a [`quantize::Request`](crate::quantize::Request) takes, after checking that this is the model and the importance
    /// matrix that the plan was made for.
    ///
    /// # Errors
    /// When one of them is another, the importance matrix is missing or not wanted, or the plan does not fit the model.
    pub fn choices_for(&self, model: &Gguf, imatrix: Option<&Imatrix>) -> Result<Choices, PlanError> {
        self.choices_of_file("the plan", &PlanFile::digest(&self.to_text()), model, imatrix)
    }

    /// The same for a plan that was read from `file`, whose text has the digest `sha256`.
    ///
    /// # Errors
    /// As [`Self::choices_for`].
    pub fn choices_of_file(
        &self,
        file: &str,
        sha256: &str,
        model: &Gguf,
        imatrix: Option<&Imatrix>,
    ) -> Result<Choices, PlanError> {
        self.check_sources(file, model, imatrix.map(|imatrix| imatrix.clone().with_planning()).as_ref())?;
        let tensors: Vec<TensorDesc> = model.tensors().iter().map(TensorDesc::from).collect();
        let choices = self.choices(file, &tensors)?;
        let mut metadata = Metadata::new(file);
        record(&mut metadata, self, sha256);
        Ok(Choices {
            name: file.to_owned(),
            label: format!("plan: {}", self.target),
            suffix: format!("{:.2}bpw", self.bits_per_weight),
            by_tensor: tensors.iter().map(|tensor| tensor.name.to_owned()).zip(choices).collect(),
            // The number of the type that most planned tensors have.
            file_type: guess_file_type(self.tensors.iter().map(|row| row.ty)) & !FILE_TYPE_GUESSED,
            metadata,
            imatrix_name: self.imatrix.as_ref().map(|imatrix| imatrix.name.clone()),
            rounding: self.rounding.clone(),
            target_bytes: self.target_bytes,
        })
    }

    /// The choice for each of the model's tensors, in the order given.
    ///
    /// # Errors
    /// When a tensor that can be chosen is missing, a row names a tensor that is not there or keeps its type, a type
    /// does not fit the tensor, or the bytes of a row are not those of its type.
    pub fn choices(&self, file: &str, tensors: &[TensorDesc<'_>]) -> Result<Vec<Choice>, PlanError> {
        let mut rows: HashMap<&str, _> = self.tensors.iter().map(|row| (row.tensor.as_str(), row)).collect();
        let wrong = |tensor: &str, problem: String| {
            Err(PlanError::Row { file: file.to_owned(), tensor: shown(tensor.as_bytes()), problem })
        };
        let mut choices = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            if let Some(keep) = kept(tensor) {
                choices.push(Choice {
                    ty: tensor.ty,
                    reason: Reason::Kept(keep),
                    fallback_from: None,
                    requires_imatrix: false,
                });
                continue;
            }
            let Some(row) = rows.remove(tensor.name) else {
                return wrong(tensor.name, "is in the model and not in the plan".to_owned());
            };
            match tensor_bytes(row.ty, tensor.shape) {
                None => {
                    let row_len = tensor.shape.first().copied().unwrap_or(1);
                    return wrong(tensor.name, format!("type {} does not fit rows of {row_len} weights", row.ty));
                }
                Some(bytes) if bytes != row.bytes => {
                    let problem = format!("bytes is {}, but {} takes {bytes}", row.bytes, row.ty);
                    return wrong(tensor.name, problem);
                }
                Some(_) => choices.push(Choice {
                    ty: row.ty,
                    reason: Reason::Plan,
                    fallback_from: None,
                    // Q2_K needs importance in one standard mix only.
                    requires_imatrix: row.ty != tensor.ty && requires_imatrix(tensor.name, row.ty, Target::Q2_K),
                }),
            }
        }
        // The first of the file, not of the map: the message must not depend on chance.
        match self.tensors.iter().find(|row| rows.contains_key(row.tensor.as_str())) {
            None => Ok(choices),
            Some(row) if tensors.iter().any(|tensor| tensor.name == row.tensor) => {
                wrong(&row.tensor, "is never quantized, yet it is in the plan".to_owned())
            }
            Some(row) => wrong(&row.tensor, "is not in the model".to_owned()),
        }
    }
}

/// Bytes of a tensor of this shape without padding; `None` if the type does not fit.
pub(super) fn tensor_bytes(ty: crate::gguf::TensorType, shape: &[u64]) -> Option<u64> {
    let row = ty.info()?.row_bytes(shape.first().copied().unwrap_or(1))?;
    shape.iter().skip(1).try_fold(row, |bytes, &len| bytes.checked_mul(len))
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use crate::gguf::TensorType;
    use crate::gguf::testing::RawGguf;

    const EMBEDDING: [u64; 2] = [256, 2];

    fn tensors() -> Vec<TensorDesc<'static>> {
        let tensor = |name, shape| TensorDesc { name, shape, ty: TensorType::F16 };
        vec![
            tensor("token_embd.weight", &EMBEDDING),
            tensor("blk.0.attn_norm.weight", &EMBEDDING[..1]),
            tensor("blk.0.attn_q.weight", &EMBEDDING),
        ]
    }

    fn error(change: impl FnOnce(&mut PlanFile)) -> String {
        let mut plan = example();
        change(&mut plan);
        plan.choices("plan.json", &tensors()).unwrap_err().to_string()
    }

    #[test]
    fn tensors_get_their_rows_and_the_others_stay() {
        let choices = example().choices("p", &tensors()).unwrap();
        let types: Vec<_> = choices.iter().map(|choice| choice.ty).collect();
        assert_eq!(types, [TensorType::Q6_K, TensorType::F16, TensorType::IQ3_S]);
    }

    #[test]
    fn a_plan_that_does_not_fit_the_model_is_refused() {
        assert!(error(|plan| plan.tensors.truncate(1)).contains("\"blk.0.attn_q.weight\": is in the model and not"));
        assert!(error(|plan| plan.tensors.push(example_row("blk.9.x.weight"))).contains("is not in the model"));
        assert!(error(|plan| plan.tensors.push(example_row("blk.0.attn_norm.weight"))).contains("never quantized"));
        assert!(error(|plan| plan.tensors[0].bytes += 1).contains("bytes is 421, but q6_K takes 420"));
        let mut plan = example();
        plan.tensors[1].tensor = "blk.0.attn_k.weight".to_owned();
        let narrow = [TensorDesc { name: "blk.0.attn_k.weight", shape: &[64, 2], ty: TensorType::F16 }];
        plan.tensors.remove(0);
        let error = plan.choices("p", &narrow).unwrap_err().to_string();
        assert!(error.contains("iq3_s does not fit rows of 64"), "{error}");
    }

    fn example_row(name: &str) -> super::super::PlanRow {
        super::super::PlanRow { tensor: name.to_owned(), ..example().tensors[0].clone() }
    }

    #[test]
    fn another_model_or_imatrix_is_refused() {
        let model = Gguf::from_bytes(RawGguf::new().f32_tensor("w", &[32], &[0.5; 32]).build()).unwrap();
        let imatrix = Imatrix::default();
        let mut plan = example();
        let refused = |plan: &PlanFile, imatrix: Option<&Imatrix>| {
            plan.check_sources("plan.json", &model, imatrix).unwrap_err().to_string()
        };
        assert!(refused(&plan, None).contains("another model (\"m.gguf\", 000000000000), this is"));
        plan.model.sha256 = fingerprint(&model);
        assert!(refused(&plan, None).contains("give it with --imatrix"));
        assert!(refused(&plan, Some(&imatrix)).contains("another importance matrix"));
        plan.imatrix.as_mut().unwrap().sha256 = imatrix.fingerprint().to_uppercase();
        assert!(plan.check_sources("p", &model, Some(&imatrix)).is_ok());
        plan.imatrix = None;
        assert!(refused(&plan, Some(&imatrix)).contains("leave --imatrix away"));
    }
}
