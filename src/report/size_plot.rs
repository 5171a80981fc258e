//! Divergence against size as a file of its own, for a model card.

use super::plots::{Extras, KLD_AXIS, Point, point_color, scatter};
use super::{Comparison, ReportError, Run};

/// An SVG image of the mean KL divergence of a run's files against their sizes, with 95% bars. `groups` names the group
/// of each file, in the order of the files: those of one group have one colour and are joined. Labels are the names of
/// the files without folder and extension; a file without a name has no label.
///
/// # Errors
/// When the plot cannot be drawn.
pub fn size_plot(comparison: &Comparison, run: &Run, groups: &[String]) -> Result<String, ReportError> {
    let mut names: Vec<&String> = Vec::new();
    for group in groups {
        if !names.contains(&group) {
            names.push(group);
        }
    }
    let color = |group: &String| point_color(names.iter().position(|name| *name == group).unwrap_or(0));
    let files = comparison.files.iter().zip(&run.files).zip(groups);
    let points: Vec<Point> = files
        .map(|((facts, figures), group)| Point {
            size: facts.size_bytes as f64 / 1e9,
            value: figures.divergence.mean_kld,
            error: figures.divergence.mean_kld_error,
            label: label(&facts.file),
            color: color(group),
        })
        .collect();
    let series = names.iter().map(|name| ((*name).clone(), color(name)));
    scatter(&points, KLD_AXIS, &Extras { series: series.collect(), standalone: true, ..Extras::default() })
        .map(|plot| plot.svg)
}

fn label(file: &str) -> String {
    let name = file.rsplit(['/', '\\']).next().unwrap_or(file);
    name.strip_suffix(".gguf").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        assert_eq!((label("a/b/Q4_K.gguf"), label("x")), ("Q4_K".to_owned(), "x".to_owned()));
    }
}
