//! The web page: one file, nothing loaded from elsewhere, no scripts.

use std::fmt::Write as _;

use super::facts::LayerGrid;
use super::plots::{self, Cell, Extras, KLD_AXIS, Plot, Point, css, heat_map, point_color, scale_color, scatter};
use super::table::{Table, notes, table};
use super::{Comparison, FileFacts, ReportError, Run, TensorError};

/// Tensors of the largest error that are listed for each file.
const WORST: usize = 12;

/// Most files whose tensor maps are open: more make a page that nobody reads to its end.
const OPEN_MAPS: usize = 3;

/// Task files side by side in a table: more are wider than most windows.
const TASKS_ABREAST: usize = 5;

/// Natural width in pixels from which on a plot takes a row of its own.
const WIDE: u32 = 640;

/// How far a plot is enlarged at most to fill its place.
const LARGEST_SCALE: f64 = 1.5;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b636d; --page: #ffffff; --panel: #f6f7f9; --line: #d9dce1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2a9b3; --page: #15171a; --panel: #1e2125; --line: #3a3f46; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 24px clamp(12px, 2vw, 40px); background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 8px; }
h3 { font-size: 16px; margin: 20px 0 6px; }
p { margin: 4px 0; } .soft { color: var(--soft); }
summary { cursor: pointer; } summary h3 { display: inline-block; margin: 6px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0; }
th, td { padding: 5px 6px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; min-width: 110px; }
.figures { width: 100%; }
.figures th:first-child, .tasks th:first-child { width: 20%; }
.figures th, .figures td { overflow-wrap: break-word; }
.figures td:first-child { overflow-wrap: anywhere; padding-left: 24px; text-indent: -18px; }
.tasks th { overflow-wrap: anywhere; min-width: 72px; width: 16%; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin: 10px 0; }
figure { margin: 0; padding: 10px; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin: 0 0 4px 4px; }
figure .scroll { margin: 0 auto; }
svg { width: 100%; height: auto; display: block; }
.wide svg { min-width: 840px; }
svg rect { stroke: var(--line); stroke-width: 1px; }
.grid { stroke: var(--line); } .empty { fill: var(--line); } .on-bright { fill: #000000; } .on-dark { fill: #ffffff; }
.swatch, .bar { box-shadow: 0 0 0 1px var(--line); }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 5px -1px 0; }
.legend span.item { margin-right: 16px; white-space: nowrap; }
.bar { display: inline-block; width: min(180px, 25vw); height: 12px; border-radius: 3px; margin: 0 8px -1px; }
@media (max-width: 820px) {
  .plots { grid-template-columns: minmax(0, 1fr); }
  table { font-size: 12px; }
}
@media (max-width: 660px) {
  table { font-size: 11px; } th, td { padding: 4px 3px; }
  .figures th:first-child, .figures td:first-child { min-width: 100px; }
}
";

/// The page.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn html_page(comparison: &Comparison) -> Result<String, ReportError> {
    let title = format!("Quantized files of {}", escape(&comparison.base.file));
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    for run in &comparison.runs {
        if comparison.runs.len() > 1 {
            let _ = writeln!(out, "<h2>Activations: {}</h2>", escape(&run.activations));
        }
        figures_tables(&mut out, comparison, run);
        for note in notes(comparison, run) {
            let _ = writeln!(out, "<p class=\"soft\">{}</p>", escape(&note));
        }
        size_plots(&mut out, comparison, run)?;
    }
    layers(&mut out, comparison)?;
    out.push_str("</body>\n</html>\n");
    Ok(out)
}

/// The figures, and the tasks in tables of their own: together they would be wider than most windows.
fn figures_tables(out: &mut String, comparison: &Comparison, run: &Run) {
    let Table { headings, rows, first_task } = table(comparison, run);
    let figures: Vec<usize> = (0..first_task).collect();
    html_table(out, "figures", &headings, &rows, &figures);
    let tasks: Vec<usize> = (first_task..headings.len()).collect();
    for tasks in tasks.chunks(TASKS_ABREAST) {
        let columns: Vec<usize> = [0].into_iter().chain(tasks.iter().copied()).collect();
        html_table(out, "figures tasks", &headings, &rows, &columns);
    }
}

/// Some columns of a table; the first row is that of the base.
fn html_table(out: &mut String, class: &str, headings: &[String], rows: &[Vec<String>], columns: &[usize]) {
    let _ = write!(out, "<div class=\"scroll\"><table class=\"{class}\">\n<tr>");
    for &column in columns {
        let _ = write!(out, "<th>{}</th>", breakable(&escape(&headings[column])));
    }
    out.push_str("</tr>\n");
    for (number, row) in rows.iter().enumerate() {
        out.push_str("<tr>");
        for &column in columns {
            let cell = escape(&row[column]);
            let _ = match (column, number) {
                (0, 0) => write!(out, "<td>base: {cell}</td>"),
                (0, number) => write!(out, "<td>{}{cell}</td>", file_mark(number - 1)),
                _ => write!(out, "<td>{}</td>", wrapped_before_errors(&cell)),
            };
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// A heading that a narrow column breaks after the signs that join words.
fn breakable(heading: &str) -> String {
    ['/', '_', '.'].iter().fold(heading.to_owned(), |text, &sign| text.replace(sign, &format!("{sign}<wbr>")))
}

/// Figures that a narrow column breaks before `±` and before a bracket only.
fn wrapped_before_errors(cell: &str) -> String {
    cell.replace("± ", "±\u{a0}").replace(" %", "\u{a0}%")
}

/// Colour and number by which the plots name a file.
fn file_mark(index: usize) -> String {
    format!("<span class=\"swatch\" style=\"background:{}\"></span>{} ", css(point_color(index)), index + 1)
}

fn size_plots(out: &mut String, comparison: &Comparison, run: &Run) -> Result<(), ReportError> {
    let points = |value: &dyn Fn(usize) -> (f64, f64)| -> Vec<Point> {
        let files = comparison.files.iter().zip(&run.files).enumerate();
        files
            .map(|(index, (facts, _))| {
                let (value, error) = value(index);
                let label = (index + 1).to_string();
                Point { size: facts.size_bytes as f64 / 1e9, value, error, label, color: point_color(index) }
            })
            .collect()
    };
    let kld = points(&|i| (run.files[i].divergence.mean_kld, run.files[i].divergence.mean_kld_error));
    let ppl = points(&|i| (run.files[i].divergence.ppl, run.files[i].divergence.ppl_error));
    let caption = format!("Perplexity (bars: 95%; line: base, {:.4})", run.ppl_base);
    out.push_str("<div class=\"plots\">\n");
    figure(out, "Mean KL divergence from the base (bars: 95%)", &scatter(&kld, KLD_AXIS, &Extras::default())?);
    let base = Extras { level: Some(run.ppl_base), ..Extras::default() };
    figure(out, &caption, &scatter(&ppl, "perplexity", &base)?);
    out.push_str("</div>\n");
    Ok(())
}

fn figure(out: &mut String, caption: &str, plot: &Plot) {
    let class = if plot.width > WIDE { " class=\"wide\"" } else { "" };
    let largest = LARGEST_SCALE * f64::from(plot.width);
    let _ = writeln!(
        out,
        "<figure{class}><figcaption>{}</figcaption>\n<div class=\"scroll\" style=\"max-width:{largest}px\">{}</div></figure>",
        escape(caption),
        plot.svg
    );
}

/// Types and errors of every file, layer by layer.
fn layers(out: &mut String, comparison: &Comparison) -> Result<(), ReportError> {
    let types = Types::of(comparison);
    out.push_str("<h2>Types per layer</h2>\n<p class=\"legend\">");
    for (index, (name, bits)) in types.known.iter().enumerate() {
        let bits = bits.map_or_else(String::new, |bits| format!(" ({bits:.2} bits)"));
        let color = css(types.color(index));
        let _ = write!(
            out,
            "<span class=\"item\"><span class=\"swatch\" style=\"background:{color}\"></span>{}{bits}</span>",
            escape(name)
        );
    }
    out.push_str("</p>\n");
    let scale = ErrorScale::of(&comparison.tensor_errors);
    if let Some(scale) = &scale {
        let _ = writeln!(
            out,
            "<p class=\"legend\">Relative error of a tensor, ‖quantized − base‖ / ‖base‖: <span class=\"item\">{:.4}<span class=\"bar\" \
             style=\"background:linear-gradient(to right,{})\"></span>{:.4} (logarithmic)</span></p>",
            scale.low,
            (0..=8).map(|i| css(scale_color(f64::from(i) / 8.0))).collect::<Vec<_>>().join(","),
            scale.high
        );
    }
    let folded = comparison.files.len() > OPEN_MAPS;
    for (index, file) in comparison.files.iter().enumerate() {
        let heading = format!("<h3>{}{}</h3>", file_mark(index), escape(&file.file));
        let errors = comparison.tensor_errors.get(index).map_or(&[][..], Vec::as_slice);
        if folded {
            let _ = writeln!(out, "<details class=\"maps\"><summary>{heading}</summary>");
        } else {
            let _ = writeln!(out, "{heading}");
        }
        maps(out, file, errors, &types, scale.as_ref())?;
        if folded {
            out.push_str("</details>\n");
        }
    }
    Ok(())
}

/// What `layers` shows of one file.
fn maps(
    out: &mut String,
    file: &FileFacts,
    errors: &[TensorError],
    types: &Types,
    scale: Option<&ErrorScale>,
) -> Result<(), ReportError> {
    let grid = LayerGrid::new(file.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.ty.as_str())));
    let others: Vec<String> = grid.others.iter().map(|(name, ty)| format!("{name} {ty}")).collect();
    out.push_str("<div class=\"plots\">\n");
    if grid.layers > 0 {
        let plot = heat_map(&cells(&grid, |ty| types.cell(ty)), "layer")?;
        figure(out, "Types", &plot);
    }
    if let Some(scale) = scale {
        let grid = LayerGrid::new(errors.iter().map(|e| (e.name.as_str(), e.relative_error)));
        if grid.layers > 0 {
            let plot = heat_map(&cells(&grid, |error| scale.cell(*error)), "layer")?;
            figure(out, "Relative error against the base", &plot);
        }
    }
    out.push_str("</div>\n");
    if !others.is_empty() {
        let _ = writeln!(out, "<p class=\"soft\">Outside of the layers: {}</p>", escape(&others.join(", ")));
    }
    worst(out, errors);
    Ok(())
}

fn cells<T>(grid: &LayerGrid<T>, cell: impl Fn(&T) -> Cell) -> Vec<(String, Vec<Option<Cell>>)> {
    let rows = grid.roles.iter().zip(&grid.cells);
    rows.map(|(role, cells)| (role.clone(), cells.iter().map(|c| c.as_ref().map(&cell)).collect())).collect()
}

fn worst(out: &mut String, errors: &[TensorError]) {
    let mut known: Vec<(&TensorError, f64)> =
        errors.iter().filter_map(|error| Some((error, error.relative_error?))).filter(|(_, e)| *e > 0.0).collect();
    known.sort_by(|a, b| b.1.total_cmp(&a.1));
    if known.is_empty() {
        return;
    }
    out.push_str("<details><summary>Tensors of the largest relative error</summary>\n<table>\n");
    out.push_str("<tr><th>tensor</th><th>type</th><th>relative error</th></tr>\n");
    for (error, ratio) in known.into_iter().take(WORST) {
        let _ =
            writeln!(out, "<tr><td>{}</td><td>{}</td><td>{ratio:.5}</td></tr>", escape(&error.name), escape(&error.ty));
    }
    out.push_str("</table></details>\n");
}

/// All types of the files, by bits per weight: a type has one colour on the whole page.
struct Types {
    known: Vec<(String, Option<f64>)>,
}

impl Types {
    fn of(comparison: &Comparison) -> Types {
        let mut known: Vec<(String, Option<f64>)> = Vec::new();
        for tensor in comparison.files.iter().flat_map(|file| &file.tensors) {
            if !known.iter().any(|(name, _)| *name == tensor.ty) {
                known.push((tensor.ty.clone(), tensor.bits_per_weight));
            }
        }
        known.sort_by(|a, b| a.1.unwrap_or(0.0).total_cmp(&b.1.unwrap_or(0.0)).then(a.0.cmp(&b.0)));
        Types { known }
    }

    fn color(&self, index: usize) -> plotters::prelude::RGBColor {
        let last = self.known.len().saturating_sub(1).max(1);
        scale_color(index as f64 / last as f64)
    }

    fn cell(&self, ty: &str) -> Cell {
        let index = self.known.iter().position(|(name, _)| name == ty).unwrap_or(0);
        Cell { color: self.color(index), text: ty.to_owned() }
    }
}

/// Range of all errors of the page.
struct ErrorScale {
    low: f64,
    high: f64,
}

impl ErrorScale {
    fn of(errors: &[Vec<TensorError>]) -> Option<ErrorScale> {
        let known = || errors.iter().flatten().filter_map(|e| e.relative_error).filter(|e| *e > 0.0);
        let low = known().min_by(f64::total_cmp)?;
        let high = known().max_by(f64::total_cmp)?;
        Some(ErrorScale { low, high })
    }

    fn cell(&self, error: Option<f64>) -> Cell {
        let Some(error) = error else { return Cell { color: plots::GRID, text: "–".into() } };
        let width = (self.high / self.low).ln();
        let share = if error > 0.0 && width > 0.0 { (error / self.low).ln() / width } else { 0.0 };
        // Two digits say enough: .083 for 0.083, .0008 where it is smaller.
        let text = format!("{error:.3}").trim_start_matches('0').to_owned();
        Cell { color: scale_color(share), text: if error == 0.0 { "0".into() } else { text } }
    }
}

/// Text that HTML shows as it is, also within attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::eval::tasks::{TaskComparison, TaskKind, TaskSummary};
    use crate::eval::{Divergence, ScoredToken};
    use crate::report::{FileFacts, FileFigures, TaskFigures, TensorFacts, TextFacts};

    /// A comparison of two files with hostile names.
    pub(in crate::report) fn sample() -> Comparison {
        let facts = |file: &str, bits: f64, ty: &str| FileFacts {
            file: file.into(),
            size_bytes: (bits * 1e8) as u64,
            bits_per_weight: bits,
            tensors: ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "<script>alert(1)</script>"]
                .map(|name| TensorFacts { name: name.into(), ty: ty.into(), bits_per_weight: Some(bits) })
                .to_vec(),
        };
        let summary = TaskSummary {
            kind: TaskKind::HellaSwag,
            tasks: 400,
            tasks_selected: 400,
            correct: 180,
            accuracy: Some(0.45),
            accuracy_error: Some(0.025),
            accuracy_interval: Some([0.4, 0.5]),
            accuracy_norm: None,
            accuracy_norm_error: None,
            random_chance: Some(0.25),
        };
        let comparison = TaskComparison {
            tasks: 400,
            base_accuracy: 0.5,
            base_accuracy_error: Some(0.025),
            recovery: Some(90.0),
            accuracy_difference: -0.05,
            accuracy_difference_error: Some(0.01),
            base_accuracy_norm: None,
            recovery_norm: None,
            changed_answers: 0.1,
        };
        let task = |comparison| TaskFigures { name: "hella<b>".into(), summary: summary.clone(), comparison };
        let figures = |scale: f32| {
            let token = |i: u32| ScoredToken {
                nll: 2.0 + scale * (i % 7) as f32,
                nll_base: 2.0,
                kld: scale,
                same_top: i % 9 != 3,
                routing: Default::default(),
            };
            FileFigures {
                divergence: Divergence { tokens: (0..100).map(token).collect(), routed_layers: 0 }.summary().unwrap(),
                tasks: vec![task(Some(comparison.clone()))],
            }
        };
        let error =
            |relative_error| TensorError { name: "blk.0.attn_q.weight".into(), ty: "Q4_K".into(), relative_error };
        Comparison {
            base: facts("base & co.gguf", 16.0, "F16"),
            text: TextFacts { files: vec!["a.txt".into()], ctx: 512, windows: 4, scored_per_window: 255 },
            files: vec![facts("a\"<img src=x>.gguf", 4.5, "Q4_K"), facts("b.gguf", 3.4, "Q3_K")],
            runs: vec![Run {
                activations: "f32".into(),
                windows: 4,
                ppl_base: 7.4,
                ppl_base_error: 0.1,
                base_tasks: vec![task(None)],
                files: vec![figures(0.01), figures(0.1)],
            }],
            tensor_errors: vec![vec![error(Some(0.05))], vec![error(None)]],
            complete: true,
        }
    }

    #[test]
    fn foreign_names_are_text_and_nothing_is_loaded() {
        let page = html_page(&sample()).unwrap();
        for wrong in ["<script", "<img", "<b>", "href=", "src=x>", "url("] {
            assert!(!page.contains(wrong), "{wrong}");
        }
        assert!(page.contains("a&quot;&lt;img src=x&gt;.gguf") && page.contains("base &amp; co.gguf"));
        // Names of XML are no addresses to load from.
        let addresses = page.matches("http").count() - page.matches("http://www.w3.org/2000/svg").count();
        assert_eq!(addresses, page.matches("http-equiv").count());
    }

    #[test]
    fn every_file_has_its_maps_and_points() {
        let page = html_page(&sample()).unwrap();
        assert_eq!(page.matches("<figcaption>Types</figcaption>").count(), 2);
        assert_eq!(page.matches("r=\"5\" opacity=\"1\" fill=\"#").count(), 4);
        assert!(page.contains("Q3_K (3.40 bits)") && page.contains("Tensors of the largest relative error"));
    }

    #[test]
    fn an_empty_comparison_makes_a_page() {
        let mut comparison = sample();
        comparison.runs.clear();
        comparison.files.clear();
        comparison.tensor_errors.clear();
        assert!(html_page(&comparison).unwrap().ends_with("</html>\n"));
    }

    #[test]
    fn maps_of_many_files_are_folded() {
        let with_files = |count: usize| {
            let mut comparison = sample();
            let (file, figures, errors) =
                (comparison.files[0].clone(), comparison.runs[0].files[0].clone(), comparison.tensor_errors[0].clone());
            comparison.files = vec![file; count];
            comparison.runs[0].files = vec![figures; count];
            comparison.tensor_errors = vec![errors; count];
            html_page(&comparison).unwrap()
        };
        for (count, folds) in [(3, 0), (4, 4)] {
            let page = with_files(count);
            assert_eq!(page.matches("<details class=\"maps\"><summary><h3>").count(), folds);
            assert_eq!(page.matches("<figcaption>Types</figcaption>").count(), count);
            assert_eq!(page.matches("<details").count(), page.matches("</details>").count());
        }
    }

    #[test]
    fn the_page_and_its_plots_follow_the_readers_scheme() {
        let page = html_page(&sample()).unwrap();
        assert!(page.contains("<meta name=\"color-scheme\" content=\"light dark\">"));
        assert!(page.contains("@media (prefers-color-scheme: dark)"));
        let texts: Vec<&str> = page.lines().filter(|line| line.starts_with("<text")).collect();
        assert!(texts.len() > 20, "{}", texts.len());
        for text in texts {
            assert!(!text.contains("=\"#") && !text.contains("rgb"), "{text}");
        }
        // Each class that the plots have is one of the style sheet.
        for class in ["grid", "empty", "on-bright", "on-dark"] {
            assert!(STYLE.contains(&format!(".{class} {{")), "{class}");
        }
    }

    #[test]
    fn tables_break_where_it_is_harmless_and_tasks_are_few_abreast() {
        let mut comparison = sample();
        let run = &mut comparison.runs[0];
        let tasks = vec![run.base_tasks[0].clone(); 2 * TASKS_ABREAST + 1];
        run.base_tasks.clone_from(&tasks);
        run.files.iter_mut().for_each(|file| file.tasks.clone_from(&tasks));
        let page = html_page(&comparison).unwrap();
        assert_eq!(page.matches("<table class=\"figures tasks\">").count(), 3);
        assert_eq!(page.matches("<table class=\"figures\">").count(), 1);
        assert!(page.contains("<td>7.4000 ±\u{a0}0.1000</td>") && page.contains("<td>45.00 ±\u{a0}2.50\u{a0}%</td>"));
        assert!(page.contains("<th>bits/<wbr>weight</th>"));
    }
}
