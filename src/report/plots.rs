//! Plots as SVG elements to stand in a page.
//!
//! Texts stay texts, drawn by the browser's fonts. Texts, axes and grid lines are drawn in stand-in colours, [`INK`] and
//! [`GRID`] among them; [`themed`] gives them to the page's style sheet, which knows whether the page is light or dark.
//! A file of its own keeps them: they are those of a light image.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::element::{Circle, EmptyElement, ErrorBar, PathElement, Rectangle, Text};
use plotters::prelude::{
    ChartBuilder, Color, ColorMap, DrawingArea, IntoDrawingArea, IntoFont, IntoLogRange, RGBColor, SVGBackend,
    ShapeStyle, ViridisRGB, WHITE,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::ReportError;

/// Stands for the colour of text and axes.
pub(super) const INK: RGBColor = RGBColor(1, 1, 1);
/// Stands for the colour of grid lines and of empty cells.
pub(super) const GRID: RGBColor = RGBColor(221, 221, 222);
/// Texts on bright and on dark cells; no other text or line has these colours.
const ON_BRIGHT: RGBColor = RGBColor(0, 0, 0);
const ON_DARK: RGBColor = RGBColor(255, 255, 255);

/// Colours of points, told apart on light and dark ground.
const POINTS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(230, 126, 20),
    RGBColor(148, 103, 189),
    RGBColor(23, 162, 184),
    RGBColor(200, 80, 160),
    RGBColor(140, 120, 60),
];

/// Size of a scatter plot in pixels.
const SCATTER: (u32, u32) = (560, 380);
/// Where the legend begins, and the height of its rows.
const LEGEND: (i32, i32) = (400, 28);
const LEGEND_ROW: i32 = 18;
const FONT: &str = "sans-serif";
/// Ratio of the largest to the smallest value from which on an axis is logarithmic.
const LOG_FROM: f64 = 8.0;

/// Name of the axis of divergences.
pub(super) const KLD_AXIS: &str = "mean KLD, nats per token";

/// An SVG element.
#[derive(Debug)]
pub(super) struct Plot {
    pub svg: String,
    /// Pixels at which texts have the size that they were drawn for.
    pub width: u32,
}

/// A value with its standard error at some size.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub size: f64,
    pub value: f64,
    pub error: f64,
    /// Short text beside the point.
    pub label: String,
    pub color: RGBColor,
}

/// The colour of the point or the file number `index`.
pub(super) fn point_color(index: usize) -> RGBColor {
    POINTS[index % POINTS.len()]
}

/// Text of a colour for HTML.
pub(super) fn css(color: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)
}

/// What a scatter plot has besides its points.
#[derive(Default)]
pub(super) struct Extras {
    /// A horizontal line.
    pub level: Option<f64>,
    /// Points of one colour that are joined by a line, with a name in a legend.
    pub series: Vec<(String, RGBColor)>,
    /// A file of its own: a white ground, and colours that need no style sheet.
    pub standalone: bool,
}

/// Values with 95% error bars against size.
pub(super) fn scatter(points: &[Point], y_name: &str, extras: &Extras) -> Result<Plot, ReportError> {
    let finite: Vec<&Point> = points.iter().filter(|p| p.size.is_finite() && p.value.is_finite()).collect();
    let ends = |p: &&Point| [p.value - 1.96 * p.error, p.value + 1.96 * p.error, p.value];
    let values = || finite.iter().flat_map(ends).chain(extras.level);
    let (low, high) = extent(values());
    let log = low > 0.0 && high / low > LOG_FROM;
    let (x_low, x_high) = extent(finite.iter().map(|p| p.size));
    let x_margin = ((x_high - x_low) * 0.08).max(x_high.abs() * 0.02).max(1e-6);
    let x = (x_low - x_margin).max(0.0)..x_high + x_margin;
    if log {
        let (mut bottom, mut top) = (low / 1.25, high * 1.25);
        // The axis is labelled at powers of ten only: there must be two of them.
        if top / bottom < 100.0 {
            (bottom, top) = (10f64.powf(bottom.log10().floor()), 10f64.powf(top.log10().ceil()));
        }
        let y = bottom..top;
        // Labels are apart by factors: each needs the digits of its own size.
        let digits = |v: f64| (-v.abs().max(1e-12).log10() - 1e-9).ceil().clamp(0.0, 12.0) as usize;
        let labels = labels(&finite, &x, |v| (v / y.start).ln() / (y.end / y.start).ln());
        draw_scatter(
            &finite,
            &labels,
            x,
            (y.clone()).log_scale(),
            &Axis { range: y, name: y_name, digits: &digits },
            extras,
        )
    } else {
        let margin = ((high - low) * 0.1).max(high.abs() * 0.005).max(1e-9);
        let bottom = if low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
        let y = bottom..high + margin;
        let digits = axis_digits(&y);
        let labels = labels(&finite, &x, |v| (v - y.start) / (y.end - y.start));
        draw_scatter(&finite, &labels, x, y.clone(), &Axis { range: y, name: y_name, digits: &|_| digits }, extras)
    }
}

/// Labels of the points; of points that would hide each other's, the first has those of all. `height` tells how far up
/// the axis a value lies, from 0 to 1.
fn labels(points: &[&Point], x: &Range<f64>, height: impl Fn(f64) -> f64) -> Vec<String> {
    let place = |p: &Point| ((p.size - x.start) / (x.end - x.start), height(p.value));
    let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).abs() < 0.035 && (a.1 - b.1).abs() < 0.045;
    let mut labels: Vec<String> = vec![String::new(); points.len()];
    for (index, point) in points.iter().enumerate() {
        if point.label.is_empty() {
            continue;
        }
        let first = (0..index).find(|&i| !labels[i].is_empty() && near(place(points[i]), place(point)));
        match first {
            Some(first) => labels[first].push_str(&format!(", {}", point.label)),
            None => labels[index].push_str(&point.label),
        }
    }
    labels
}

fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// What the vertical axis shows.
struct Axis<'a> {
    range: Range<f64>,
    name: &'a str,
    /// Digits after the point of a label.
    digits: &'a dyn Fn(f64) -> usize,
}

fn draw_scatter<Y>(
    points: &[&Point],
    labels: &[String],
    x: Range<f64>,
    y: Y,
    axis: &Axis<'_>,
    extras: &Extras,
) -> Result<Plot, ReportError>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let label = |size: u32| (FONT, size).into_font().color(&INK);
    let x_digits = axis_digits(&x);
    let plot = svg(SCATTER, |root| {
        if extras.standalone {
            root.fill(&WHITE).map_err(plot_error)?;
        }
        let mut chart = ChartBuilder::on(root)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(46)
            .y_label_area_size(74)
            .build_cartesian_2d(x.clone(), y)
            .map_err(plot_error)?;
        chart
            .configure_mesh()
            .light_line_style(GRID.mix(0.0))
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(label(13))
            .axis_desc_style(label(14))
            .x_desc("size, GB")
            .y_desc(axis.name)
            .x_labels(6)
            .y_labels(8)
            .x_label_formatter(&|v| format!("{v:.x_digits$}"))
            .y_label_formatter(&|v| format!("{v:.0$}", (axis.digits)(*v)))
            .draw()
            .map_err(plot_error)?;
        for (row, (name, color)) in extras.series.iter().enumerate() {
            let mut of_series: Vec<&&Point> = points.iter().filter(|point| point.color == *color).collect();
            of_series.sort_by(|a, b| a.size.total_cmp(&b.size));
            let line = of_series.iter().map(|point| (point.size, point.value));
            chart
                .draw_series([PathElement::new(line.collect::<Vec<_>>(), color.stroke_width(1))])
                .map_err(plot_error)?;
            let y = LEGEND.1 + row as i32 * LEGEND_ROW;
            root.draw(&Circle::new((LEGEND.0, y), 5, color.filled())).map_err(plot_error)?;
            let style = label(13).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(shortened(name), (LEGEND.0 + 12, y), style)).map_err(plot_error)?;
        }
        if let Some(value) = extras.level {
            let line = PathElement::new([(x.start, value), (x.end, value)], INK.stroke_width(1));
            chart.draw_series([line]).map_err(plot_error)?;
        }
        for (point, text) in points.iter().zip(labels) {
            let color = point.color;
            let at = (point.size, point.value);
            let reach = 1.96 * point.error;
            let bar = ErrorBar::new_vertical(
                point.size,
                (point.value - reach).max(axis.range.start),
                point.value,
                (point.value + reach).min(axis.range.end),
                color.stroke_width(2),
                8,
            );
            chart.draw_series([bar]).map_err(plot_error)?;
            chart.draw_series([Circle::new(at, 5, color.filled())]).map_err(plot_error)?;
            let style = label(13).pos(Pos::new(HPos::Left, VPos::Bottom));
            let note = EmptyElement::at(at) + Text::new(text.clone(), (8, -4), style);
            chart.draw_series([note]).map_err(plot_error)?;
        }
        Ok(())
    })?;
    Ok(if extras.standalone { plot } else { themed(plot) })
}

/// Digits after the point that tell the labels of an axis apart.
fn axis_digits(range: &Range<f64>) -> usize {
    let step = (range.end - range.start).abs().min(range.start.abs().max((range.end - range.start) / 10.0)) / 10.0;
    (-step.max(1e-9).log10()).ceil().clamp(0.0, 8.0) as usize
}

/// One cell of a heat map: its colour, and a text if there is room.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub color: RGBColor,
    pub text: String,
}

const CELL_HEIGHT: i32 = 20;
const TOP: i32 = 6;
const AXIS_HEIGHT: i32 = 40;
/// Pixels of a digit or capital letter in cells.
const CELL_FONT_WIDTH: f64 = 6.1;

/// Rows of cells with names, columns numbered from 0.
pub(super) fn heat_map(rows: &[(String, Vec<Option<Cell>>)], x_name: &str) -> Result<Plot, ReportError> {
    let columns = rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0).max(1) as i32;
    let longest = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let left = (longest as i32 * 8 + 14).clamp(60, 260);
    let cell_width = (1000 / columns).clamp(7, 46);
    let size = (left + columns * cell_width + 12, TOP + rows.len() as i32 * CELL_HEIGHT + AXIS_HEIGHT);
    let style = |font: u32, h, v| (FONT, font).into_font().color(&INK).pos(Pos::new(h, v));
    let plot = svg((size.0 as u32, size.1 as u32), |root| {
        for (row, (name, cells)) in rows.iter().enumerate() {
            let y = TOP + row as i32 * CELL_HEIGHT;
            let label =
                Text::new(shortened(name), (left - 8, y + CELL_HEIGHT / 2), style(12, HPos::Right, VPos::Center));
            root.draw(&label).map_err(plot_error)?;
            for column in 0..columns {
                let x = left + column * cell_width;
                let corners = [(x, y), (x + cell_width - 1, y + CELL_HEIGHT - 1)];
                let Some(cell) = cells.get(column as usize).and_then(Option::as_ref) else {
                    let empty: ShapeStyle = GRID.mix(0.4).filled();
                    root.draw(&Rectangle::new(corners, empty)).map_err(plot_error)?;
                    continue;
                };
                root.draw(&Rectangle::new(corners, cell.color.filled())).map_err(plot_error)?;
                if cell.text.chars().count() as f64 * CELL_FONT_WIDTH < f64::from(cell_width) {
                    let center = (x + cell_width / 2, y + CELL_HEIGHT / 2);
                    let color = contrast(cell.color);
                    let style = (FONT, 10).into_font().color(&color).pos(Pos::new(HPos::Center, VPos::Center));
                    root.draw(&Text::new(cell.text.clone(), center, style)).map_err(plot_error)?;
                }
            }
        }
        let bottom = TOP + rows.len() as i32 * CELL_HEIGHT;
        let every = [1, 2, 5, 10, 20, 50, 100, 200, 500].into_iter().find(|n| n * cell_width >= 24).unwrap_or(1000);
        for column in (0..columns).step_by(every as usize) {
            let at = (left + column * cell_width + cell_width / 2, bottom + 3);
            let number = Text::new(column.to_string(), at, style(11, HPos::Center, VPos::Top));
            root.draw(&number).map_err(plot_error)?;
        }
        let at = (left + columns * cell_width / 2, bottom + 20);
        root.draw(&Text::new(x_name.to_owned(), at, style(12, HPos::Center, VPos::Top))).map_err(plot_error)
    })?;
    Ok(themed(plot))
}

fn shortened(name: &str) -> String {
    const LONGEST: usize = 32;
    if name.chars().count() <= LONGEST {
        return name.to_owned();
    }
    name.chars().take(LONGEST - 1).chain(['…']).collect()
}

/// A colour of the scale from 0 (dark) to 1 (bright).
pub(super) fn scale_color(share: f64) -> RGBColor {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    ViridisRGB.get_color_normalized(share as f32, 0.0, 1.0)
}

/// Whichever can be read on `color`.
fn contrast(color: RGBColor) -> RGBColor {
    // Empty cells follow the page's scheme, so does what stands on them.
    if color == GRID {
        return INK;
    }
    let brightness = 0.299 * f64::from(color.0) + 0.587 * f64::from(color.1) + 0.114 * f64::from(color.2);
    if brightness > 128.0 { ON_BRIGHT } else { ON_DARK }
}

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn svg(size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Result<(), ReportError>) -> Result<Plot, ReportError> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, size).into_drawing_area();
        draw(&root)?;
        root.present().map_err(plot_error)?;
    }
    Ok(Plot { svg: out, width: size.0 })
}

/// Replaces stand-in colours by the page's: those of texts and axes by the colour of the text around the plot, the
/// others by classes of the style sheet (`grid`, `empty`, `on-bright`, `on-dark`).
fn themed(plot: Plot) -> Plot {
    let attribute = |name: &str, color: RGBColor| format!(" {name}=\"{}\"", css(color));
    let stand_ins = [
        (attribute("fill", INK), " fill=\"currentColor\""),
        (attribute("stroke", INK), " stroke=\"currentColor\""),
        (attribute("stroke", GRID), " class=\"grid\""),
        (attribute("fill", GRID), " class=\"empty\""),
        (attribute("fill", ON_BRIGHT), " class=\"on-bright\""),
        (attribute("fill", ON_DARK), " class=\"on-dark\""),
    ];
    let mut svg = String::with_capacity(plot.svg.len());
    for line in plot.svg.lines() {
        // What a text says stands on lines of its own, escaped, and is left as it is.
        if line.starts_with('<') {
            svg += &stand_ins.iter().fold(line.to_owned(), |line, (color, themed)| line.replace(color, themed));
        } else {
            svg += line;
        }
        svg.push('\n');
    }
    Plot { svg, ..plot }
}

fn plot_error(error: impl std::fmt::Display) -> ReportError {
    ReportError::Plot(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(size: f64, value: f64) -> Point {
        Point { size, value, error: 0.01 * value, label: "1 <b>".into(), color: point_color(0) }
    }

    #[test]
    fn plots_hold_their_texts_escaped() {
        let plot = scatter(
            &[point(1.0, 0.1), point(2.0, 0.001)],
            "mean <KLD>",
            &Extras { level: Some(0.05), ..Extras::default() },
        )
        .unwrap()
        .svg;
        assert!(plot.contains("mean &lt;KLD&gt;"), "{plot}");
        assert!(plot.contains("1 &lt;b&gt;") && !plot.contains("<b>"));
        assert_eq!(plot.matches("r=\"5\" opacity=\"1\" fill=\"#").count(), 2);
    }

    #[test]
    fn points_on_one_spot_share_a_label() {
        let mut points = [point(1.0, 0.1), point(2.0, 0.5), point(1.0, 0.1)];
        points.iter_mut().zip(["1", "2", "3"]).for_each(|(point, label)| point.label = label.into());
        let plot = scatter(&points, "y", &Extras::default()).unwrap().svg;
        let texts: Vec<&str> = plot.lines().map(str::trim).filter(|line| ["1, 3", "2"].contains(line)).collect();
        assert_eq!(texts, ["1, 3", "2"], "{plot}");
    }

    #[test]
    fn series_are_joined_and_named() {
        let points = [point(2.0, 0.1), point(1.0, 0.5), point(3.0, 0.05)];
        let extras = Extras { series: vec![("a & b".into(), point_color(0))], standalone: true, ..Extras::default() };
        let plot = scatter(&points, "y", &extras).unwrap().svg;
        assert!(plot.contains("a &amp; b"), "{plot}");
        let color = css(point_color(0));
        let joined =
            |line: &&str| line.contains("<polyline") && line.matches(',').count() == 3 && line.contains(&color);
        assert_eq!(plot.lines().filter(joined).count(), 1, "{plot}");
    }

    #[test]
    fn odd_values_make_no_odd_plots() {
        for points in [
            vec![],
            vec![point(1.0, 0.0)],
            vec![point(1.0, 0.1), point(1.0, 0.1)],
            vec![point(1.0, f64::NAN), point(1.0, f64::INFINITY), point(1.0, 3.0)],
            vec![point(0.0, -1.0), point(1e9, 1e-9)],
        ] {
            let plot = scatter(&points, "y", &Extras::default()).unwrap().svg;
            assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>") && !plot.contains("NaN"), "{plot}");
        }
        assert!(heat_map(&[], "layer").unwrap().svg.starts_with("<svg"));
    }

    #[test]
    fn heat_maps_have_a_rectangle_per_cell() {
        let cell = |text: &str| Some(Cell { color: scale_color(0.3), text: text.into() });
        let rows = [("attn_q".to_owned(), vec![cell("Q4_K"), None]), ("<i>".to_owned(), vec![cell("Q6_K")])];
        let plot = heat_map(&rows, "layer").unwrap().svg;
        assert_eq!(plot.matches("<rect").count(), 4, "{plot}");
        assert!(plot.contains("&lt;i&gt;") && plot.contains("Q4_K"));
    }

    #[test]
    fn plots_of_a_page_have_the_colours_of_its_scheme() {
        let cell = |color| Some(Cell { color, text: "–".into() });
        let hostile = "<b fill=\"#010101\">".to_owned();
        let colors = [scale_color(0.0), scale_color(1.0), GRID];
        let map = heat_map(&[(hostile, colors.map(cell).to_vec()), ("b".into(), vec![None])], "layer").unwrap().svg;
        for (text, count) in [("class=\"on-dark\"", 1), ("class=\"on-bright\"", 1), ("class=\"empty\"", 4)] {
            assert_eq!(map.matches(text).count(), count, "{text} in {map}");
        }
        assert!(map.contains("#010101"), "a name was changed: {map}");
        let plot = scatter(&[point(1.0, 0.1)], "y", &Extras { level: Some(0.2), ..Extras::default() }).unwrap().svg;
        assert!(plot.contains("class=\"grid\"") && plot.contains("stroke=\"currentColor\""), "{plot}");
        for line in map.lines().chain(plot.lines()).filter(|line| line.starts_with("<text")) {
            assert!(!line.contains("=\"#"), "{line}");
        }
    }

    #[test]
    fn a_file_of_its_own_needs_no_style_sheet() {
        let extras = Extras { standalone: true, ..Extras::default() };
        let plot = scatter(&[point(1.0, 0.1)], "y", &extras).unwrap().svg;
        assert!(!plot.contains("currentColor") && !plot.contains("class="), "{plot}");
        assert!(plot.contains("fill=\"#FFFFFF\"") && plot.contains("fill=\"#010101\""), "{plot}");
    }
}
