//! What is refused before anything is done: choices that do not go together, sizes that no plan can keep, and files that are
//! not to be touched.

use std::collections::BTreeSet;
use std::path::Path;

use super::draft::{Goal, Kind, file_of};
use super::journal::{self, Journal};
use super::source::Opened;
use super::{PublishError, Request, repository};
use crate::display::{decimal_size, printable};
use crate::gguf::Gguf;
use crate::hub::is_repository;
use crate::imatrix::{Imatrix, Named};
use crate::measure::Sensitivity;
use crate::moments::Calibration;
use crate::plan::{self, Budget};
use crate::quantize::Rounding;

/// Refuses choices that do not go together.
pub(super) fn choices(request: &Request, opened: &Opened) -> Result<(), PublishError> {
    let refuse = |line: String| Err(PublishError::Choice(line));
    if !request.schemes.is_empty() && !opened.source.is_folder() {
        let source = printable(&request.source.display().to_string());
        return refuse(format!("{source}: --schemes needs a Hugging Face folder as the source, not a GGUF"));
    }
    if let Some(target) = request.targets.iter().find(|target| target.is_plain()) {
        return refuse(format!("{target} quantizes nothing; give targets such as Q4_K_M"));
    }
    if let Some(id) = request.said.base_model.as_deref().filter(|id| !is_repository(id)) {
        return refuse(format!("--base-model {id:?} is no repository; give ORG/NAME"));
    }
    let inside = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let (output, source) = (inside(&request.output), inside(&request.source));
    if opened.source.is_folder() && (output.starts_with(&source) || source.starts_with(&output)) {
        let output = printable(&request.output.display().to_string());
        return refuse(format!("{output}: is the source folder, lies in it or holds it; choose another folder"));
    }
    if request.output.exists() && !request.output.is_dir() {
        return Err(PublishError::file(&request.output, "is no folder; give the folder of the repository"));
    }
    if let Some(tasks) = &request.evaluation.tasks {
        tasks.count()?;
    }
    if let Some(program) = &request.llama_bench {
        super::bench::check(program)?;
    }
    if let Some(file) = &request.measured_on {
        Sensitivity::open(file)?;
    }
    Ok(())
}

/// Sizes that no plan can keep show before the work.
pub(super) fn sizes(
    request: &Request,
    gguf: &Gguf,
    goals: &[Goal],
    calibration: &Calibration<'_>,
) -> Result<(), PublishError> {
    if goals.is_empty() {
        return Ok(());
    }
    let given =
        request.importance.file.as_deref().map(|file| Imatrix::open(file).map(|found| (file, found))).transpose()?;
    let mut plan = plan::Request::new(Budget::BitsPerWeight(1.0)).rounding(Rounding::Feedback(calibration));
    if let Some((_, imatrix)) = &given {
        plan = plan.imatrix(Named { name: "imatrix", imatrix });
    }
    let (smallest, largest) = plan.size_range(gguf)?;
    for goal in goals {
        let what = match &goal.kind {
            // Without an importance matrix fewer types are allowed than there will be.
            Kind::Target(_) => continue,
            Kind::Size(size) => format!("--sizes {}", size.text),
            Kind::Fit(memory) => {
                format!("--fit {}: {} are left for the file, and that", memory.text, decimal_size(goal.bytes))
            }
        };
        if goal.bytes < smallest {
            return Err(PublishError::Choice(format!(
                "{what} cannot be reached: the smallest possible file has {smallest} bytes ({}), the largest {largest} ({}); ask for more",
                decimal_size(smallest),
                decimal_size(largest)
            )));
        }
    }
    Ok(())
}

/// Refuses to touch what the journal does not know.
pub(super) fn files(request: &Request, opened: &Opened, goals: &[Goal]) -> Result<(), PublishError> {
    if request.replace.is_allowed() {
        return Ok(());
    }
    let journal = journal::read(&request.output)?.unwrap_or_default();
    let wanted = wanted_names(&opened.name, request, goals);
    for name in &wanted {
        let path = request.output.join(name);
        if path.symlink_metadata().is_ok() && !journal.published.contains_key(name) && !holds_exports(&journal, name) {
            return Err(PublishError::file(&path, "exists and is not lwq publish's; add --force to replace it"));
        }
    }
    let stale = journal.published.keys().find(|name| {
        let top = name.split('/').next().unwrap_or(name);
        !wanted.contains(top) && request.output.join(name).exists()
    });
    match stale.filter(|_| journal.source_sha256 == opened.sha256) {
        Some(name) => Err(PublishError::file(
            &request.output.join(name),
            "is of an earlier run, and this one does not make it; ask for it, too, or add --force to remove it",
        )),
        None => Ok(()),
    }
}

fn holds_exports(journal: &Journal, folder: &str) -> bool {
    let inside = format!("{folder}/");
    journal.published.keys().any(|name| name.starts_with(&inside))
}

/// Names in the output folder that a run writes.
fn wanted_names(name: &str, request: &Request, goals: &[Goal]) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = repository::PAGES.iter().map(|page| (*page).to_owned()).collect();
    for goal in goals {
        names.insert(file_of(name, &goal.label));
        names.insert(format!("{name}-{}.plan.json", goal.label));
    }
    if !goals.is_empty() {
        names.insert(format!("{name}.imatrix.gguf"));
        names.insert(format!("{name}.sens.json"));
    }
    names.extend(request.schemes.iter().map(|scheme| format!("{name}-{}", scheme.name())));
    names
}
