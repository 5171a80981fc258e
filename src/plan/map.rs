//! A plan for the eye: a map of layers by role, a letter for each type, and the totals.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::PlanFile;
use crate::display::printable;
use crate::gguf::TensorType;
use crate::recipe::roles::split_block;

/// How a plan is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapStyle {
    /// Characters per line; layers that do not fit go to further bands.
    pub width: usize,
    /// Cells in 256 colours.
    pub color: bool,
}

/// 256-colour indices from few bits to many: red, yellow, green, blue.
const COLORS: [u8; 12] = [196, 202, 208, 214, 220, 190, 118, 48, 43, 37, 31, 25];
/// Narrowest line that is drawn.
const NARROWEST: usize = 40;
/// Longest role name that is written out.
const LONGEST_ROLE: usize = 24;

/// Draws the plan.
pub fn map(plan: &PlanFile, style: MapStyle) -> String {
    let legend = Legend::new(plan);
    let mut out = String::new();
    draw_layers(&mut out, plan, &legend, style);
    for row in plan.tensors.iter().filter(|row| layer_and_role(&row.tensor).is_none()) {
        let _ = writeln!(out, "{}  {} {}", printable(&row.tensor), legend.cell(row.ty, 1, style.color), row.ty);
    }
    out.push('\n');
    legend.write(&mut out, plan, style.color);
    write_totals(&mut out, plan);
    out
}

/// The layer and the rest of the name without `.weight`, for tensors of numbered layers.
fn layer_and_role(name: &str) -> Option<(u64, &str)> {
    let (layer, role) = split_block(name)?;
    Some((layer, role.strip_suffix(".weight").unwrap_or(role)))
}

/// A letter for each type of the plan, a for the fewest bits.
struct Legend {
    types: Vec<TensorType>,
}

impl Legend {
    fn new(plan: &PlanFile) -> Legend {
        let mut types: Vec<TensorType> = plan.tensors.iter().map(|row| row.ty).collect();
        types.sort_by(|a, b| bits(*a).total_cmp(&bits(*b)).then(a.cmp(b)));
        types.dedup();
        Legend { types }
    }

    fn cell(&self, ty: TensorType, width: usize, color: bool) -> String {
        let at = self.types.iter().position(|known| *known == ty).unwrap_or(0);
        // More types than letters do not exist.
        let letter = char::from(b'a' + (at % 26) as u8).to_string().repeat(width);
        if !color {
            return letter;
        }
        // Half a bit per step from 1.5 bits on: what is common spreads over the whole scale.
        let step = ((bits(ty) - 1.5) * 2.0).clamp(0.0, COLORS.len() as f64 - 1.0) as usize;
        format!("\x1b[48;5;{};38;5;16m{letter}\x1b[0m", COLORS[step])
    }

    fn write(&self, out: &mut String, plan: &PlanFile, color: bool) {
        out.push_str("  type     bits/weight  tensors         bytes  damage\n");
        for ty in &self.types {
            let rows = plan.tensors.iter().filter(|row| row.ty == *ty);
            let (tensors, bytes) = (rows.clone().count(), rows.clone().map(|row| row.bytes).sum::<u64>());
            let damage: f64 = rows.map(|row| row.damage).sum();
            let cell = self.cell(*ty, 1, color);
            let _ = writeln!(out, "{cell} {ty:<8} {:>11.3}  {tensors:>7}  {bytes:>12}  {damage:.6}", bits(*ty));
        }
    }
}

fn bits(ty: TensorType) -> f64 {
    ty.info().map_or(0.0, |info| info.bits_per_weight())
}

fn draw_layers(out: &mut String, plan: &PlanFile, legend: &Legend, style: MapStyle) {
    let mut roles: BTreeMap<&str, BTreeMap<u64, TensorType>> = BTreeMap::new();
    let mut layers = BTreeSet::new();
    for row in &plan.tensors {
        if let Some((layer, role)) = layer_and_role(&row.tensor) {
            roles.entry(role).or_default().insert(layer, row.ty);
            layers.insert(layer);
        }
    }
    let layers: Vec<u64> = layers.into_iter().collect();
    let label = |role: &str| printable(role).chars().take(LONGEST_ROLE).collect::<String>();
    let margin = roles.keys().map(|role| label(role).chars().count()).max().unwrap_or(0) + 1;
    let room = style.width.max(NARROWEST).saturating_sub(margin).max(8);
    let cell_width = if layers.len() * 2 <= room { 2 } else { 1 };
    for band in layers.chunks(room / cell_width) {
        out.push_str(&ruler(band, margin, cell_width));
        for (role, cells) in &roles {
            let _ = write!(out, "{:<margin$}", label(role));
            for layer in band {
                match cells.get(layer) {
                    Some(ty) => out.push_str(&legend.cell(*ty, cell_width, style.color)),
                    None => out.push_str(&" ".repeat(cell_width)),
                }
            }
            out.push('\n');
        }
    }
}

/// Numbers the first layer of the band and every fifth, as far as the numbers fit.
fn ruler(band: &[u64], margin: usize, cell_width: usize) -> String {
    let mut line = " ".repeat(margin);
    let end = margin + band.len() * cell_width;
    for (column, layer) in band.iter().enumerate() {
        let at = margin + column * cell_width;
        let length = line.chars().count();
        let fits = length <= at && at + layer.to_string().len() <= end;
        if column == 0 || (layer.is_multiple_of(5) && fits) {
            let _ = write!(line, "{}{layer} ", " ".repeat(at - length));
        }
    }
    line.truncate(line.trim_end().len());
    line + "\n"
}

fn write_totals(out: &mut String, plan: &PlanFile) {
    let _ = write!(out, "\n{}: {} bytes", printable(&plan.target), plan.file_bytes);
    if let Some(target) = plan.target_bytes {
        let _ = write!(out, " of {target} ({:.2}%)", 100.0 * plan.file_bytes as f64 / target.max(1) as f64);
    }
    let _ = writeln!(out, ", {:.4} bits per weight", plan.bits_per_weight);
    let error = plan.predicted_kld_error.map_or_else(String::new, |error| format!(" ± {error:.6}"));
    let search = if plan.optimal { "nothing better exists" } else { "not proven best" };
    let _ = writeln!(
        out,
        "predicted KL divergence {:.6}{error} (method {}), {:.3}% above the bound, {search}",
        plan.predicted_kld,
        plan.method,
        100.0 * plan.gap
    );
    let imatrix = plan.imatrix.as_ref().map_or_else(|| "none".to_owned(), |imatrix| printable(&imatrix.name));
    let _ = write!(out, "model {}, imatrix {imatrix}", printable(&plan.model.name));
    if let Some(rounding) = &plan.rounding {
        let _ = write!(out, ", rounding {}", rounding.method);
        if let Some(calibration) = &rounding.calibration {
            let _ = write!(out, " on {} tokens of {}", calibration.tokens, printable(&calibration.text));
        }
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{PlanRow, example};

    fn plan(layers: u64) -> PlanFile {
        let mut plan = example();
        plan.tensors.truncate(1);
        for layer in 0..layers {
            for (role, ty) in [("attn_q", TensorType::IQ3_S), ("ffn_up", TensorType::Q4_K)] {
                let tensor = format!("blk.{layer}.{role}.weight");
                plan.tensors.push(PlanRow { tensor, ty, bytes: 100, damage: 0.001 });
            }
        }
        plan
    }

    #[test]
    fn layers_stand_side_by_side_and_the_rest_below() {
        let text = map(&plan(3), MapStyle { width: 80, color: false });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..4], ["       0", "attn_q aaaaaa", "ffn_up bbbbbb", "token_embd.weight  c q6_K"], "{text}");
        assert!(text.contains("a iq3_s          3.438        3           300  0.003000"), "{text}");
        assert!(text.contains("990 bytes of 1000 (99.00%)"), "{text}");
        assert!(text.contains("predicted KL divergence 0.012500 (method error)"), "{text}");
        assert!(!text.contains('\x1b'));
        assert!(map(&plan(3), MapStyle { width: 80, color: true }).contains("\x1b[48;5;"));
    }

    #[test]
    fn many_layers_go_to_bands_within_the_width() {
        let text = map(&plan(100), MapStyle { width: 40, color: false });
        assert!(text.lines().take(9).all(|line| line.chars().count() <= 40), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("attn_q ")).count(), 4);
    }

    #[test]
    fn names_from_a_hostile_plan_are_escaped() {
        let mut plan = plan(1);
        plan.tensors[1].tensor = "blk.0.\x1b[31mred.weight".to_owned();
        plan.tensors[0].tensor = "a\nb".to_owned();
        assert!(!map(&plan, MapStyle { width: 80, color: false }).contains('\x1b'));
    }
}
