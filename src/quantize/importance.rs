//! Which importance data each tensor of an output gets, and what becomes of those without.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::decide::Sources;
use super::request::MissingImportance;
use crate::display::printable;
use crate::gguf::TensorInfo;
use crate::imatrix::{EntryFilter, Imatrix, MatchError, MatchReport, ModelTensor, Need, match_to_model};
use crate::quant;
use crate::recipe::{Choice, PrunePlan, Reason, roles};

/// What matching goes by.
pub(super) struct Matching<'a, 'm> {
    pub filter: &'a EntryFilter,
    pub missing: MissingImportance,
    pub imatrix: Option<&'a Imatrix>,
    pub sources: &'a Sources<'m>,
    pub pruned: Option<&'a PrunePlan>,
    /// True for tensors whose importance the run finds by itself.
    pub by_feedback: &'a dyn Fn(&TensorInfo) -> bool,
}

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    /// `None` without an imatrix.
    pub report: Option<MatchReport>,
    /// Importance by output tensor name, one matrix after another.
    pub values: HashMap<String, Vec<f32>>,
    pub notes: Vec<String>,
    /// Why the run must not begin.
    pub problem: Option<String>,
}

impl Matching<'_, '_> {
    /// Finds the data, and gives tensors without any the type that the request has for them.
    pub(super) fn decide(&self, choices: &mut [Choice]) -> Found {
        let mut found = Found::default();
        let mut report = self.report(choices);
        let missing = self.missing_names(report.as_ref(), choices, false);
        match self.missing {
            MissingImportance::ByType => {}
            MissingImportance::Refuse => {
                let names = self.missing_names(report.as_ref(), choices, true);
                if !names.is_empty() {
                    found.problem = Some(match self.imatrix {
                        Some(_) => MatchError::MissingRefused(names).to_string(),
                        None => format!(
                            "{} matrices have no importance data, and --missing-importance says refuse; add --imatrix FILE",
                            names.len()
                        ),
                    });
                }
            }
            MissingImportance::Plain => found.notes.extend(self.make_plain(&missing, choices, &mut found.values)),
            MissingImportance::Type(_) => {
                found.notes.extend(self.give_type(&missing, choices));
                report = self.report(choices);
            }
        }
        if matches!(self.missing, MissingImportance::Plain) {
            // What is rounded without data needs none any more.
            report = self.report(choices);
        }
        match (&report, self.imatrix) {
            (Some(report), Some(imatrix)) => {
                if let (Err(problem), None) = (report.check(), &found.problem) {
                    found.problem = Some(problem.to_string());
                }
                for used in &report.used {
                    let uniform = found.values.contains_key(&used.tensor);
                    if let Some(data) = used.data(imatrix).filter(|_| !uniform) {
                        found.values.insert(used.tensor.clone(), data.into_owned().into_importance().values);
                    }
                }
            }
            _ => found.problem = found.problem.or_else(|| self.missing_imatrix(choices)),
        }
        found.report = report;
        found
    }

    fn report(&self, choices: &[Choice]) -> Option<MatchReport> {
        let old_names: HashMap<&str, &str> = match self.pruned {
            Some(_) => self.sources.iter().map(|(tensor, name)| (name.as_str(), tensor.name.as_str())).collect(),
            None => HashMap::new(),
        };
        let tensors: Vec<ModelTensor> = self
            .sources
            .iter()
            .zip(choices)
            .map(|((tensor, name), choice)| ModelTensor {
                name,
                row_len: tensor.row_len(),
                matrices: tensor.matrices(),
                need: match choice {
                    _ if !is_rounded(tensor, choice) => Need::Kept,
                    Choice { requires_imatrix: true, .. } => Need::Required,
                    _ => Need::Optional,
                },
            })
            .collect();
        let entry_name = |name| Cow::Borrowed(old_names.get(name).copied().unwrap_or(name));
        self.imatrix.map(|imatrix| match_to_model(imatrix, &tensors, self.filter, entry_name))
    }

    /// Quantized matrices without data, with `gaps` also those of which some experts have none.
    fn missing_names(&self, report: Option<&MatchReport>, choices: &[Choice], gaps: bool) -> Vec<String> {
        let by_feedback: HashSet<&str> = self.of_sources(choices, |tensor, _| (self.by_feedback)(tensor)).collect();
        let mut names = match report {
            Some(report) if gaps => report.with_gaps(),
            Some(report) => report.without_data(),
            None => {
                let named = |tensor: &TensorInfo, choice: &Choice| {
                    is_rounded(tensor, choice) && !roles::is_embedding_or_output(&tensor.name)
                };
                self.of_sources(choices, named).map(str::to_owned).collect()
            }
        };
        names.retain(|name| !by_feedback.contains(name.as_str()));
        names
    }

    fn of_sources<'s>(
        &'s self,
        choices: &'s [Choice],
        wanted: impl Fn(&TensorInfo, &Choice) -> bool + 's,
    ) -> impl Iterator<Item = &'s str> {
        let both = self.sources.iter().zip(choices);
        both.filter(move |((tensor, _), choice)| wanted(tensor, choice)).map(|((_, name), _)| name.as_str())
    }

    /// Lets the tensors of these names be rounded without data; types that know no rounding without get ones.
    fn make_plain(
        &self,
        names: &[String],
        choices: &mut [Choice],
        values: &mut HashMap<String, Vec<f32>>,
    ) -> Option<String> {
        let names: HashSet<&str> = names.iter().map(String::as_str).collect();
        let (mut plain, mut uniform) = (Vec::new(), false);
        for ((tensor, name), choice) in self.sources.iter().zip(choices) {
            if !names.contains(name.as_str()) || !choice.requires_imatrix {
                continue;
            }
            choice.requires_imatrix = false;
            plain.push((name, choice.ty));
            // A shape without weights may have as many columns as it likes.
            if quant::codec(choice.ty).is_some_and(quant::Codec::needs_importance) && tensor.elements() > 0 {
                let columns = tensor.row_len().saturating_mul(tensor.matrices());
                values.insert(name.clone(), vec![1.0; usize::try_from(columns).unwrap_or(0)]);
                uniform = true;
            }
        }
        let (first, ty) = plain.first()?;
        let how = if uniform { "all their columns count the same" } else { "they are rounded without" };
        Some(format!(
            "--missing-importance plain: {} tensors without importance data, such as {} ({ty}), have types that need them; \
             {how}, and quality suffers",
            plain.len(),
            printable(first)
        ))
    }

    /// Gives the tensors of these names the type for those without data.
    fn give_type(&self, names: &[String], choices: &mut [Choice]) -> Option<String> {
        let MissingImportance::Type(ty) = self.missing else { return None };
        let names: HashSet<&str> = names.iter().map(String::as_str).collect();
        let mut changed = Vec::new();
        for ((tensor, name), choice) in self.sources.iter().zip(choices) {
            if names.contains(name.as_str()) {
                *choice = Choice::by_hand(ty, tensor, Reason::MissingImportance);
                changed.push((name, choice.ty));
            }
        }
        let (first, ty) = changed.first()?;
        Some(format!(
            "--missing-importance: {} tensors have no importance data and become {ty}, such as {}",
            changed.len(),
            printable(first)
        ))
    }

    fn missing_imatrix(&self, choices: &[Choice]) -> Option<String> {
        let needing: Vec<_> = self.sources.iter().zip(choices).filter(|(_, choice)| choice.requires_imatrix).collect();
        let ((_, name), choice) = needing.first()?;
        let others = match needing.len() - 1 {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        Some(format!(
            "{} needs an importance matrix (tensor {}{others}); add --imatrix FILE, or say with --missing-importance what to \
             do without: plain, or a type",
            choice.ty.to_string().to_uppercase(),
            printable(name)
        ))
    }
}

/// True if the tensor's weights are rounded to blocks.
fn is_rounded(tensor: &TensorInfo, choice: &Choice) -> bool {
    choice.ty != tensor.ty && choice.ty.is_quantized()
}
