//! The pages, and everything with its place.

use super::PublishError;
use super::finish::{Kept, folder_name};
use super::journal;
use super::report::{AgainstEntry, Report};
use super::repository::{CARD, Content, PAGE, PLOT, REPORT, SUMS};
use super::run::{Choice, Run};
use super::score::Folder;
use super::stages::{Base, Made, Prepared};
use crate::gguf::Gguf;
use crate::report::{
    Comparison, FileFacts, FileFigures, Run as Table, TensorError, html_page, size_plot, tensor_errors,
};

impl Run<'_> {
    /// Everything that gets a place, the pages last.
    pub(super) fn contents(
        &mut self,
        base: &Base,
        prepared: &Prepared<'_>,
        report: &Report,
        choices: &[Choice],
        files: &[Kept<'_>],
        folders: &[Folder],
    ) -> Result<Vec<(String, Content)>, PublishError> {
        let mut contents = Vec::new();
        for file in files {
            let content = Content::File { key: file.candidate.key.clone(), path: file.path.clone() };
            contents.push((file.name.clone(), content));
            if let Made::Planned(plan) = &file.candidate.made {
                contents.push((self.plan_name(file.candidate), Content::Text(plan.to_text())));
            }
        }
        for folder in folders {
            for name in &folder.facts.files {
                let there = folder.path.join(name);
                let path = if there.is_file() { Some(there) } else { self.published_file(&folder.key, name) };
                let lost =
                    || PublishError::file(&self.draft.request.output, "a finished folder was changed; run it again");
                let content = Content::File { key: format!("{}/{name}", folder.key), path: path.ok_or_else(lost)? };
                contents.push((format!("{}/{name}", folder_name(&self.draft.opened.name, folder)), content));
            }
        }
        if let Some(found) = &prepared.importance {
            if let Some(path) = self.work.find(&found.key, "gguf") {
                contents.push((found.name.clone(), Content::File { key: found.key.clone(), path }));
            }
            let content = Content::File { key: prepared.sensitivity_key.clone(), path: prepared.sensitivity.clone() };
            contents.push((format!("{}.sens.json", self.draft.opened.name), content));
        }
        let comparison = self.comparison(base, report, files)?;
        if !files.is_empty() {
            contents.push((PLOT.to_owned(), Content::Text(plot(report, choices, &comparison)?)));
        }
        contents.push((PAGE.to_owned(), Content::Text(html_page(&comparison)?)));
        contents.push((REPORT.to_owned(), Content::Text(report.to_text())));
        contents.push((CARD.to_owned(), Content::Text(self.draft.card.render(report)?)));
        debug_assert!(contents.iter().all(|(name, _)| name != SUMS));
        Ok(contents)
    }

    /// The files that stay beside the base, as `lwq compare` has them.
    fn comparison(&mut self, base: &Base, report: &Report, files: &[Kept<'_>]) -> Result<Comparison, PublishError> {
        let ggufs = files.iter().map(|file| Gguf::open(&file.path)).collect::<Result<Vec<_>, _>>()?;
        let mut parts: Vec<&str> = vec![&base.sha256];
        parts.extend(files.iter().map(|file| file.candidate.key.as_str()));
        let key = journal::key("errors", &parts);
        let errors = match self.work.get::<Vec<Vec<TensorError>>>(&key) {
            Some(known) => known,
            None => {
                let errors = tensor_errors(&base.gguf, &ggufs.iter().collect::<Vec<_>>(), &self.watch)?;
                self.work.put(&key, &errors)?
            }
        };
        let windows = files.first().map_or(report.evaluation.text.windows, |file| file.scored.windows);
        Ok(Comparison {
            base: FileFacts::new(&report.base.file, &base.gguf),
            text: report.evaluation.text.clone(),
            files: files.iter().zip(&ggufs).map(|(file, gguf)| FileFacts::new(&file.name, gguf)).collect(),
            runs: vec![Table {
                activations: report.evaluation.activations.clone(),
                windows,
                ppl_base: report.base.ppl,
                ppl_base_error: report.base.ppl_error,
                base_tasks: report.base.tasks.clone(),
                files: report
                    .files
                    .iter()
                    .map(|entry| FileFigures { divergence: entry.divergence, tasks: entry.tasks.clone() })
                    .collect(),
            }],
            tensor_errors: errors,
            complete: true,
        })
    }
}

/// The plot of the card: files here, standard files, and those of others.
fn plot(report: &Report, choices: &[Choice], comparison: &Comparison) -> Result<String, PublishError> {
    let mut all = comparison.clone();
    let facts = |label: &str, bytes: u64, bits: f64| FileFacts {
        file: label.to_owned(),
        size_bytes: bytes,
        bits_per_weight: bits,
        tensors: Vec::new(),
    };
    let own = report.files.iter().map(|entry| (entry.made_for.as_str(), &entry.figures, "lwq"));
    // Names of standard files would cover those of the files here.
    let standard = report.standard.iter().map(|figures| ("", figures, "standard"));
    let others = report.against.iter().map(|other| (label(other), &other.figures, other.name.as_str()));
    let standard = standard.filter(|_| choices.iter().any(|choice| choice.standard.is_some()));
    let points: Vec<_> = own.chain(standard).chain(others).collect();
    all.files = points.iter().map(|(label, of, _)| facts(label, of.size_bytes, of.bits_per_weight)).collect();
    let mut table = all.runs.remove(0);
    table.files =
        points.iter().map(|(_, of, _)| FileFigures { divergence: of.divergence, tasks: Vec::new() }).collect();
    let groups: Vec<String> = points.iter().map(|(_, _, group)| (*group).to_owned()).collect();
    Ok(size_plot(&all, &table, &groups)?)
}

fn label(other: &AgainstEntry) -> &str {
    other.target.as_deref().unwrap_or(&other.figures.file)
}
