//! The tables: for a terminal, and in Markdown as model cards have them.

use std::fmt::Write as _;

use super::{Comparison, Run, TaskFigures, describe_activations};

/// Headings and rows, all cells as text. The columns from `first_task` on are those of the tasks.
pub(super) struct Table {
    pub headings: Vec<String>,
    pub rows: Vec<Vec<String>>,
    pub first_task: usize,
}

/// Size in GB below which more digits are shown.
const SMALL: f64 = 0.1;

/// The table of one run: the base first.
pub(super) fn table(comparison: &Comparison, run: &Run) -> Table {
    let fixed = ["file", "GB", "GiB", "bits/weight", "PPL", "ρ PPL", "mean KLD", "RMS Δp", "same top"];
    let mut headings: Vec<String> = fixed.iter().map(|heading| (*heading).to_owned()).collect();
    headings.extend(run.base_tasks.iter().map(|task| task.name.clone()));
    let sizes = comparison.files.iter().chain([&comparison.base]).map(|file| file.size_bytes);
    let digits = if sizes.min().unwrap_or(0) as f64 / 1e9 < SMALL { 5 } else { 3 };
    let size = |bytes: u64, bits: f64| {
        [
            format!("{:.digits$}", bytes as f64 / 1e9),
            format!("{:.digits$}", bytes as f64 / f64::from(1 << 30)),
            format!("{bits:.3}"),
        ]
    };
    let mut base = vec![comparison.base.file.clone()];
    base.extend(size(comparison.base.size_bytes, comparison.base.bits_per_weight));
    base.push(with_error(run.ppl_base, run.ppl_base_error, 4));
    base.extend(std::iter::repeat_n("–".to_owned(), 4));
    base.extend(run.base_tasks.iter().map(task_cell));
    let mut rows = vec![base];
    for (facts, figures) in comparison.files.iter().zip(&run.files) {
        let d = &figures.divergence;
        let mut row = vec![facts.file.clone()];
        row.extend(size(facts.size_bytes, facts.bits_per_weight));
        row.push(with_error(d.ppl, d.ppl_error, 4));
        row.push(format!("{:.2} %", 100.0 * d.correlation));
        row.push(with_error(d.mean_kld, d.mean_kld_error, 6));
        row.push(format!("{} %", with_error(100.0 * d.rms_delta_p, 100.0 * d.rms_delta_p_error, 3)));
        row.push(format!("{} %", with_error(100.0 * d.same_top_p, 100.0 * d.same_top_p_error, 2)));
        row.extend(figures.tasks.iter().map(task_cell));
        row.resize(headings.len(), String::new());
        rows.push(row);
    }
    rows.iter_mut().for_each(|row| row.resize(headings.len(), String::new()));
    Table { headings, rows, first_task: fixed.len() }
}

fn with_error(value: f64, error: f64, digits: usize) -> String {
    format!("{value:.digits$} ± {error:.digits$}")
}

/// `45.20 ± 1.10 % (98.3)`: accuracy, and in brackets what it recovers of the base's.
fn task_cell(task: &TaskFigures) -> String {
    let Some(accuracy) = task.summary.accuracy else { return "–".to_owned() };
    let mut cell = match task.summary.accuracy_error {
        Some(error) => format!("{} %", with_error(100.0 * accuracy, 100.0 * error, 2)),
        None => format!("{:.2} %", 100.0 * accuracy),
    };
    if let Some(recovery) = task.comparison.as_ref().and_then(|c| c.recovery) {
        let _ = write!(cell, " ({recovery:.1})");
    }
    cell
}

/// What the figures rest on, one sentence each.
pub(super) fn notes(comparison: &Comparison, run: &Run) -> Vec<String> {
    let text = &comparison.text;
    let mut notes = vec![format!(
        "{} windows of {} tokens, {} of them scored, of {}; {}.",
        run.windows,
        text.ctx,
        text.scored_per_window,
        text.files.join(", "),
        describe_activations(&run.activations)
    )];
    if !run.base_tasks.is_empty() {
        notes.push("Tasks: accuracy ± standard error; in brackets what it recovers of the base's, in percent.".into());
    }
    if !comparison.complete {
        notes.push(format!(
            "Interrupted: the figures cover {} of {} windows, and the tasks that were finished.",
            run.windows, text.windows
        ));
    }
    notes
}

/// Tables for a terminal, one for each run. `shown` makes foreign text safe for it.
pub fn text_tables(comparison: &Comparison, shown: impl Fn(&str) -> String) -> String {
    let mut out = String::new();
    for run in &comparison.runs {
        let Table { headings, rows, .. } = table(comparison, run);
        let headings: Vec<String> = headings.iter().map(|cell| shown(cell)).collect();
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| shown(cell)).collect()).collect();
        let widths: Vec<usize> = (0..headings.len())
            .map(|i| rows.iter().chain([&headings]).map(|row| row[i].chars().count()).max().unwrap_or(0))
            .collect();
        for row in [&headings].into_iter().chain(&rows) {
            for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = if i == 0 { write!(out, "{cell:<width$}") } else { write!(out, "  {cell:>width$}") };
            }
            out.truncate(out.trim_end().len());
            out.push('\n');
        }
        for note in notes(comparison, run) {
            let _ = writeln!(out, "{}", shown(&note));
        }
        out.push('\n');
    }
    out
}

/// The section of a model card.
pub fn markdown(comparison: &Comparison) -> String {
    let mut out = format!("## Quantized files of {}\n\n", escaped(&comparison.base.file));
    for run in &comparison.runs {
        let Table { headings, rows, .. } = table(comparison, run);
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        out.push_str(&line(&headings));
        out.push_str("| :-- |");
        out.push_str(&" --: |".repeat(headings.len() - 1));
        out.push('\n');
        rows.iter().for_each(|row| out.push_str(&line(row)));
        out.push('\n');
        for note in notes(comparison, run) {
            let _ = writeln!(out, "{}\n", escaped(&note));
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// Text that Markdown shows as it is, on one line and in one cell. Underscores within words have no meaning there.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '\\' | '`' | '*' | '[' | ']' => out.extend(['\\', c]),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::tests::sample;

    #[test]
    fn tables_line_up() {
        let text = text_tables(&sample(), str::to_owned);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("file") && lines[0].contains("mean KLD"), "{text}");
        let column = |line: &str| line.chars().take_while(|&c| c != '±').count();
        assert_eq!(column(lines[1]), column(lines[2]), "{text}");
        assert!(lines[2].contains("(90.0)"), "{text}");
    }

    #[test]
    fn markdown_is_a_table_whatever_the_files_are_called() {
        let mut comparison = sample();
        comparison.files[0].file = "a|b<i>\n.gguf".into();
        let text = markdown(&comparison);
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        let cells = |row: &str| row.replace("\\|", "").matches('|').count();
        assert!(rows.len() == 5 && rows.iter().all(|row| cells(row) == cells(rows[0])), "{text}");
        assert!(text.contains("a\\|b&lt;i&gt; .gguf"), "{text}");
    }
}
