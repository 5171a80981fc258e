//! 4 and 8 bits in one folder: which matrices get 8 is chosen by what rounding them to 4 does to the model.
//!
//! What vLLM puts into one is a unit: q, k and v; gate and up; the experts of a layer. Each unit is rounded alone on the
//! grid of the export, in the 16-bit model that lies beside the output, and the model's divergence on a text is measured;
//! then the units are chosen whose bytes save most of it. The experts of all layers are chosen together: transformers (5.17)
//! decodes all of them by one group, and would make garbage of the others.

mod damage;

use std::collections::HashMap;
use std::path::Path;

use super::ExportError;
use super::draft::{Content, Draft, Item, Module};
use super::names::unit_of;
use super::pack;
use super::scheme::SchemeRow;
use crate::gguf::TensorType;
use crate::plan::allocate::{AllocateError, Candidate, Item as Choice, Siblings, minimize_damage};
use crate::progress::Watch;
use crate::rounding::grid::{Grid, Layout};

/// How the allocation knows 4 and 8 bits: types of GGUF of as many bits, which it only compares.
const LABELS: [TensorType; 2] = [TensorType::Q4_0, TensorType::Q8_0];

/// A mix of bits that is wanted.
#[derive(Clone, Debug)]
pub(crate) struct Mixture {
    /// Most bits of quantized matrices, scales and shapes included, per weight.
    pub(crate) wanted: f64,
    /// The layout of 8 bits stands so many places behind that of 4 bits.
    eight: usize,
    /// The choice was made.
    pub(crate) is_planned: bool,
}

/// Modules that get the same bits.
struct Unit {
    name: String,
    /// Places in [`Draft::items`].
    items: Vec<usize>,
    /// For 4 bits and for 8.
    bytes: [u64; 2],
}

impl Mixture {
    /// Adds layouts of 8 bits behind those of 4.
    ///
    /// # Errors
    /// If the scheme has no layout of 4 bits that one of 8 goes with.
    pub(crate) fn new(row: &SchemeRow, wanted: f64, layouts: &mut Vec<Layout>) -> Result<Mixture, ExportError> {
        let Grid::Int { bits: 4, .. } = row.grid else {
            let name = row.name;
            return Err(ExportError::Choice(format!(
                "{name} has no 4-bit integers to mix with 8-bit ones; give --scheme W4A16, or leave --like-bpw out"
            )));
        };
        let eight = layouts.len();
        let of_eight = |layout: &Layout| Layout { grid: Grid::Int { bits: 8, symmetric: true }, ..*layout };
        layouts.extend(layouts.clone().iter().map(of_eight));
        Ok(Mixture { wanted, eight, is_planned: false })
    }

    /// The layout that the configuration gives to all linear layers which it does not name: that of more of them.
    pub(crate) fn usual_layout(&self, items: &[Item]) -> usize {
        let of = |layout: usize| items.iter().filter_map(Item::module).filter(|module| module.group == layout).count();
        if of(self.eight) > of(0) { self.eight } else { 0 }
    }
}

impl Draft {
    fn units(&self, mixture: &Mixture) -> Vec<Unit> {
        let mut units: Vec<Unit> = Vec::new();
        let mut known: HashMap<String, usize> = HashMap::new();
        let format = self.scheme.row().format;
        for (at, item) in self.items.iter().enumerate() {
            let Some(Module { name, matrix, group }) = item.module() else { continue };
            let key = unit_of(name);
            let unit = *known.entry(key.clone()).or_insert_with(|| {
                units.push(Unit { name: key, items: Vec::new(), bytes: [0; 2] });
                units.len() - 1
            });
            units[unit].items.push(at);
            for (choice, bytes) in units[unit].bytes.iter_mut().enumerate() {
                let layout = &self.layouts[group % mixture.eight + choice * mixture.eight];
                let parts = pack::parts(format, layout, matrix.rows, matrix.columns);
                *bytes += parts.iter().map(pack::PartInfo::bytes).sum::<u64>();
            }
        }
        units
    }

    /// Checks the limit, and makes the choice where there is none.
    ///
    /// # Errors
    /// If everything in 4 bits takes more, or nobody can tell which matrices matter.
    pub(crate) fn bound_bits(&mut self) -> Result<(), ExportError> {
        let Some(mixture) = self.mixture.clone() else { return Ok(()) };
        let class = self.class();
        if !self.source.is_known() {
            let problem = format!("{class} is no class that lwq can run, so nothing tells which matrices need 8 bits");
            return Err(ExportError::Choice(format!("{problem}; leave --like-bpw out")));
        }
        let units = self.units(&mixture);
        let [smallest, largest] = [0, 1].map(|choice| units.iter().map(|unit| unit.bytes[choice]).sum::<u64>());
        let weights = self.quantized_weights();
        let budget = budget(mixture.wanted, weights);
        if budget < smallest {
            // Rounded up, so that what is named can be given.
            let least = (8000.0 * smallest as f64 / weights as f64).ceil() / 1000.0;
            let wanted = mixture.wanted;
            return Err(ExportError::Choice(format!(
                "{wanted} bits per weight is too little: all matrices in 4 bits with their scales take {least}; give \
                 --like-bpw {least} or more"
            )));
        }
        if budget >= largest {
            let bits = 8.0 * largest as f64 / weights as f64;
            self.warnings.push(format!(
                "all matrices get 8 bits, which takes {bits:.3} bits per weight; more than that cannot be used"
            ));
            self.set_bits(&mixture, &units, |_| 1);
            self.mixture = Some(Mixture { is_planned: true, ..mixture });
        }
        Ok(())
    }

    /// Measures what 4 bits do to each unit, as far as `work` does not hold it, and gives the best of them 8.
    ///
    /// # Errors
    /// If the model cannot be run, or `watch` stops the run.
    pub(crate) fn plan_bits(&mut self, work: &Path, watch: &dyn Watch) -> Result<(), ExportError> {
        let Some(mixture) = self.mixture.clone().filter(|mixture| !mixture.is_planned) else { return Ok(()) };
        let units = self.units(&mixture);
        let damage = damage::measure(self, &mixture, &units, work, watch)?;
        let choice = |(unit, damage): (&Unit, &[f64; 2])| Choice {
            name: unit.name.clone(),
            candidates: (0..2)
                .map(|at| Candidate { ty: LABELS[at], bytes: unit.bytes[at], damage: damage[at] })
                .collect(),
        };
        let choices: Vec<Choice> = units.iter().zip(&damage).map(choice).collect();
        let budget = budget(mixture.wanted, self.quantized_weights());
        let refused = |error: AllocateError| ExportError::Choice(error.to_string());
        let together = |unit: &str| unit.ends_with(".experts").then(|| "experts".to_owned());
        let siblings = Siblings::new(&choices, together).map_err(refused)?;
        let solution = minimize_damage(siblings.items(), budget).map_err(refused)?;
        let solution = siblings.apart(&choices, solution);
        self.set_bits(&mixture, &units, |unit| solution.picks[unit]);
        self.mixture = Some(Mixture { is_planned: true, ..mixture });
        self.lay_out()
    }

    fn set_bits(&mut self, mixture: &Mixture, units: &[Unit], choice: impl Fn(usize) -> usize) {
        for (at, unit) in units.iter().enumerate() {
            for &item in &unit.items {
                if let Content::Module(module) = &mut self.items[item].content {
                    module.group = module.group % mixture.eight + choice(at) * mixture.eight;
                }
            }
        }
    }
}

/// Bytes that so many bits per weight come to, rounded down.
fn budget(bits_per_weight: f64, weights: u64) -> u64 {
    let bytes = (bits_per_weight * weights as f64 / 8.0) as u64;
    if 8.0 * bytes as f64 / weights as f64 > bits_per_weight { bytes - 1 } else { bytes }
}
