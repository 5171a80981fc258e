//! A map of the mean square activation for terminals: a line per tensor role, a cell per layer.

use std::collections::HashMap;

use super::stats::ImatrixStats;

/// How a heat map is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeatmapStyle {
    /// Characters per line; layers that do not fit go to further bands.
    pub width: usize,
    /// Cells in 256 colours, else in shades of characters.
    pub color: bool,
}

/// Shades without colour, low to high.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];
/// 256-colour indices from dark blue over green and yellow to red, low to high.
const COLORS: [u8; 16] = [17, 18, 19, 25, 31, 37, 43, 48, 84, 120, 156, 192, 226, 220, 208, 196];
/// Narrowest line that is drawn.
const NARROWEST: usize = 40;
/// Longest role name that is written out.
const LONGEST_ROLE: usize = 24;

/// Draws layers (left to right) by tensor role (top to bottom); empty if no tensor belongs to a layer. The scale is
/// logarithmic from the tenth percentile of all cells to the largest.
pub fn heatmap(stats: &ImatrixStats, style: HeatmapStyle) -> String {
    let (layers, roles) = stats.by_role_and_layer();
    let mut means: Vec<f32> = roles.values().flat_map(HashMap::values).copied().filter(|mean| *mean > 0.0).collect();
    means.sort_unstable_by(f32::total_cmp);
    // The inputs of the first block are far below all others in many models; they must not flatten the rest.
    let Some((&low, &high)) = means.get(means.len() / 10).zip(means.last()) else { return String::new() };
    let names: Vec<String> = roles.keys().map(|role| label(role)).collect();
    let margin = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) + 1;
    let room = style.width.max(NARROWEST).saturating_sub(margin).max(8);
    let cell_width = if layers.len() * 2 <= room { 2 } else { 1 };

    let mut out = String::new();
    for band in layers.chunks(room / cell_width) {
        out.push_str(&ruler(band, margin, cell_width));
        for (name, cells) in names.iter().zip(roles.values()) {
            out.push_str(&format!("{name:<margin$}"));
            for layer in band {
                let level = cells.get(layer).map(|&mean| position(mean, low, high));
                out.push_str(&cell(level, cell_width, style.color));
            }
            out.push('\n');
        }
    }
    let scale: String =
        (0..SHADES.len()).map(|step| cell(Some(step as f32 / (SHADES.len() - 1) as f32), 1, style.color)).collect();
    out.push_str(&format!("mean square activation: up to {low:.4} {scale} {high:.4}, logarithmic\n"));
    out
}

fn label(role: &str) -> String {
    role.chars().map(|c| if c.is_control() { '?' } else { c }).take(LONGEST_ROLE).collect()
}

/// Where `mean` lies between `low` (0) and `high` (1), on a logarithmic scale.
fn position(mean: f32, low: f32, high: f32) -> f32 {
    if mean <= low || low >= high {
        return if mean >= high { 1.0 } else { 0.0 };
    }
    ((mean / low).ln() / (high / low).ln()).clamp(0.0, 1.0)
}

/// Numbers every fifth layer of the band.
fn ruler(band: &[u64], margin: usize, cell_width: usize) -> String {
    let mut line = " ".repeat(margin);
    for (column, layer) in band.iter().enumerate() {
        let at = margin + column * cell_width;
        let room_left = line.chars().count() <= at;
        if (column == 0 || layer.is_multiple_of(5)) && room_left {
            line.push_str(&" ".repeat(at - line.chars().count()));
            line.push_str(&layer.to_string());
            line.push(' ');
        }
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

fn cell(level: Option<f32>, width: usize, color: bool) -> String {
    let Some(level) = level else { return " ".repeat(width) };
    let step = |steps: usize| ((level * steps as f32) as usize).min(steps - 1);
    if color {
        format!("\x1b[38;5;{}m{}\x1b[0m", COLORS[step(COLORS.len())], "█".repeat(width))
    } else {
        SHADES[step(SHADES.len())].to_string().repeat(width)
    }
}
