//! Statistics: the table that llama-imatrix --show-statistics printed, and odd input.

use super::*;

const GOLDEN_GGUF: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.gguf");
const GOLDEN_DAT: &[u8] = include_bytes!("../../tests/data/golden/doclet.imatrix.dat");
const GOLDEN_TABLE: &str = include_str!("../../tests/data/golden/doclet-imatrix-stats.txt");

fn golden() -> Imatrix {
    Imatrix::from_bytes(GOLDEN_GGUF, "golden").unwrap()
}

/// Fields of the lines of the golden table that start with a number, by number of columns.
fn golden_rows(columns: usize) -> Vec<Vec<&'static str>> {
    GOLDEN_TABLE
        .lines()
        .map(|line| line.split('\t').map(str::trim).collect::<Vec<_>>())
        .filter(|row| row.len() == columns && row[0].parse::<u64>().is_ok())
        .collect()
}

#[test]
fn every_printed_digit_of_the_tensor_table_agrees() {
    let stats = ImatrixStats::new(&golden(), SortBy::Role);
    let rows: Vec<Vec<String>> = stats
        .tensors
        .iter()
        .map(|t| {
            vec![
                t.layer.unwrap().to_string(),
                t.role.clone(),
                format!("{:.2}", t.sum_act2),
                format!("{:.4}", t.min),
                format!("{:.4}", t.max),
                format!("{:.2}", t.mean),
                format!("{:.2}", t.deviation),
                format!("{:.2}%", t.active * 100.0),
                t.columns.to_string(),
                format!("{:.4}", t.entropy),
                format!("{:.2}%", t.entropy_normalized * 100.0),
                format!("{:.2}%", t.z_share * 100.0),
                format!("{:.4}", t.cosine),
            ]
        })
        .collect();
    let golden = golden_rows(13);
    assert_eq!(golden.len(), 42);
    for (row, golden) in rows.iter().zip(&golden) {
        assert_eq!(row, golden);
    }
    assert_eq!(rows.len(), golden.len());
}

#[test]
fn every_printed_digit_of_the_layer_table_agrees() {
    let stats = ImatrixStats::new(&golden(), SortBy::Role);
    let golden = golden_rows(4);
    assert_eq!((stats.layers.len(), golden.len()), (6, 6));
    for (layer, golden) in stats.layers.iter().zip(&golden) {
        let row = [
            layer.layer.to_string(),
            format!("{:.2}", layer.sum_act2),
            format!("{:.4}%", layer.z_share * 100.0),
            format!("{:.4}", layer.cosine),
        ];
        assert_eq!(row[..], golden[..]);
    }
}

#[test]
fn both_forms_have_the_same_statistics() {
    let gguf = ImatrixStats::new(&golden(), SortBy::Layer);
    let dat = ImatrixStats::new(&Imatrix::from_bytes(GOLDEN_DAT, "golden").unwrap(), SortBy::Layer);
    for (a, b) in gguf.tensors.iter().zip(&dat.tensors) {
        assert_eq!((&a.name, a.columns), (&b.name, b.columns));
        for (a, b) in [(a.sum_act2, b.sum_act2), (a.max, b.max), (a.entropy, b.entropy), (a.cosine, b.cosine)] {
            assert!((a - b).abs() <= a * 2e-6, "{a} {b}");
        }
    }
}

#[test]
fn orders_are_what_they_say() {
    let by_importance = ImatrixStats::new(&golden(), SortBy::Importance);
    assert!(by_importance.tensors.is_sorted_by(|a, b| a.sum_act2 >= b.sum_act2));
    assert_eq!(by_importance.tensors[0].name, "blk.0.ffn_down.weight");
    assert_eq!(by_importance.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [5, 0, 4, 3, 2, 1]);
    let by_layer = ImatrixStats::new(&golden(), SortBy::Layer);
    assert!(by_layer.tensors.is_sorted_by(|a, b| (a.layer, &a.role) <= (b.layer, &b.role)));
    assert_eq!(by_layer.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
}

fn with(entries: &[(&str, &[f32], &[u64])]) -> Imatrix {
    let entry = |sums: &[f32], counts: &[u64]| Entry { sums: sums.to_vec(), counts: counts.to_vec() };
    Imatrix {
        entries: entries.iter().map(|(name, sums, counts)| ((*name).to_owned(), entry(sums, counts))).collect(),
        ..Imatrix::default()
    }
}

#[test]
fn experts_without_tokens_do_not_count() {
    let imatrix = with(&[("blk.0.up.weight", &[2.0, 4.0, 9.0, 9.0], &[2, 0]), ("blk.0.none.weight", &[0.0], &[0])]);
    let stats = ImatrixStats::new(&imatrix, SortBy::Layer);
    assert_eq!(stats.without_data, ["blk.0.none.weight"]);
    assert_eq!((stats.tensors[0].columns, stats.tensors[0].sum_act2, stats.tensors[0].mean), (2, 3.0, 1.5));
}

#[test]
fn cosine_needs_the_same_tensor_one_block_before() {
    let imatrix = with(&[
        ("blk.0.a.weight", &[1.0, 0.0], &[1]),
        ("blk.1.a.weight", &[2.0, 0.0], &[1]),
        ("blk.2.a.weight", &[0.0, 3.0], &[1]),
        ("blk.4.a.weight", &[0.0, 3.0], &[1]),
        ("blk.5.a.weight", &[0.0, 3.0, 1.0], &[1]),
        ("mtp.blk.10.a.weight", &[1.0], &[1]),
        ("mtp.blk.9.a.weight", &[1.0], &[1]),
    ]);
    let stats = ImatrixStats::new(&imatrix, SortBy::Layer);
    let cosines: Vec<_> = stats.tensors.iter().map(|t| t.cosine).collect();
    assert_eq!(cosines, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn extreme_values_give_no_nan_and_no_panic() {
    let imatrix = with(&[
        ("blk.0.a.weight", &[f32::MAX, f32::MAX], &[1]),
        ("blk.1.a.weight", &[f32::MAX, 0.0], &[1]),
        ("blk.0.zero.weight", &[0.0, 0.0], &[1]),
        ("blk.1.zero.weight", &[0.0, 0.0], &[1]),
        ("blk.0.one.weight", &[1e-40], &[1]),
        ("blk.99999999999999999999.one.weight", &[1.0], &[1]),
        ("output.weight", &[1.0], &[1]),
        ("no dots", &[1.0], &[1]),
        (".weight", &[1.0], &[1]),
    ]);
    for sort in [SortBy::Importance, SortBy::Role, SortBy::Layer] {
        let stats = ImatrixStats::new(&imatrix, sort);
        assert_eq!(stats.tensors.len(), 9);
        assert!(stats.tensors.iter().all(|t| !t.cosine.is_nan() && !t.entropy.is_nan()));
        heatmap(&stats, HeatmapStyle { width: 80, color: true });
    }
    let empty = ImatrixStats::new(&with(&[]), SortBy::Role);
    assert_eq!(heatmap(&empty, HeatmapStyle { width: 80, color: false }), "");
}

#[test]
fn the_heat_map_has_a_line_per_role_and_a_cell_per_layer() {
    let stats = ImatrixStats::new(&golden(), SortBy::Importance);
    let map = heatmap(&stats, HeatmapStyle { width: 80, color: false });
    let lines: Vec<&str> = map.lines().collect();
    assert_eq!(lines.len(), 1 + 7 + 1, "{map}");
    assert!(lines[0].trim_start().starts_with('0'), "{map}");
    let cells: Vec<char> = lines[1].strip_prefix("attn_k      ").unwrap().chars().collect();
    assert_eq!(cells.len(), 12, "{map}");
    assert_eq!(cells[0], '·', "{map}");
    assert_eq!(lines[5].chars().nth(12), Some('█'), "layer 0 of ffn_down is the strongest:\n{map}");
    assert!(lines[8].starts_with("mean square activation: up to 0.4"), "{map}");

    // A model of 100 layers on a narrow terminal goes to several bands.
    let deep: Vec<String> = (0..100).map(|layer| format!("blk.{layer}.a.weight")).collect();
    let deep: Vec<(&str, &[f32], &[u64])> = deep.iter().map(|name| (name.as_str(), &[1.0][..], &[1][..])).collect();
    let map = heatmap(&ImatrixStats::new(&with(&deep), SortBy::Role), HeatmapStyle { width: 42, color: false });
    assert_eq!(map.lines().count(), 3 * 2 + 1, "{map}");
    assert!(map.lines().all(|line| line.chars().count() <= 64), "{map}");
}
