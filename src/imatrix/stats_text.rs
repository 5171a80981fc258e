//! Statistics for people: a table of the tensors and one of the layers.

use std::fmt::{self, Write as _};

use super::{ImatrixStats, TensorStats};
use crate::display::printable;

impl fmt::Display for ImatrixStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&tensor_table(&self.tensors))?;
        f.write_str(&layer_table(self))?;
        if !self.without_data.is_empty() {
            writeln!(f, "\n{} entries saw no token and have no statistics", self.without_data.len())?;
        }
        Ok(())
    }
}

fn layer_name(layer: Option<u64>) -> String {
    layer.map_or_else(|| "-".to_owned(), |layer| layer.to_string())
}

fn tensor_table(tensors: &[TensorStats]) -> String {
    let mut text = format!(
        "\n{:>5}  {:<20} {:>12} {:>9} {:>11} {:>9} {:>9} {:>9} {:>7} {:>9} {:>8} {:>7} {:>7}\n",
        "Layer", "Tensor", "Σ(Act²)", "Min", "Max", "μ", "σ", "% Active", "N", "Entropy", "E (norm)", "ZD", "CosSim"
    );
    for t in tensors {
        let _ = writeln!(
            text,
            "{:>5}  {:<20} {:>12.2} {:>9.4} {:>11.4} {:>9.2} {:>9.2} {:>8.2}% {:>7} {:>9.4} {:>7.2}% {:>6.2}% {:>7.4}",
            layer_name(t.layer),
            printable(&t.role),
            t.sum_act2,
            t.min,
            t.max,
            t.mean,
            t.deviation,
            100.0 * t.active,
            t.columns,
            t.entropy,
            100.0 * t.entropy_normalized,
            100.0 * t.z_share,
            t.cosine
        );
    }
    text
}

fn layer_table(stats: &ImatrixStats) -> String {
    if stats.layers.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{:>5}  {:>12} {:>9} {:>8}\n", "Layer", "μΣ(Act²)", "μZD", "μCosSim");
    for layer in &stats.layers {
        let _ = writeln!(
            text,
            "{:>5}  {:>12.2} {:>8.4}% {:>8.4}",
            layer.layer,
            layer.sum_act2,
            100.0 * layer.z_share,
            layer.cosine
        );
    }
    text
}
