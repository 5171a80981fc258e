//! `lwq bench quantize` measures what it is asked for, and says what it cannot.

mod common;

use common::{error_line, json_of, run, stdout_of};
use serde_json::Value;

#[test]
fn bench_quantize_reports_each_way_at_each_instruction_set() {
    let arguments = "bench quantize --type q4_0,iq2_xs,q8_K --isa scalar --rounds 1 --rows 1 --threads 2 --json";
    let report: Value = json_of(run(arguments.split(' ')));
    let rows: Vec<_> = report["rows"].as_array().unwrap().iter().collect();
    let ways: Vec<_> = rows.iter().map(|row| format!("{} {} {}", row["type"], row["what"], row["threads"])).collect();
    // Two threads each; IQ2_XS cannot go without importance, Q8_K is only read.
    assert_eq!(ways.len(), 2 * (3 + 2 + 1), "{ways:?}");
    assert!(rows.iter().all(|row| row["isa"] == "scalar" && row["weights_per_second"].as_f64().unwrap() > 0.0));
    let table = stdout_of(run("bench quantize --type tq2_0 --rounds 1 --rows 1 --threads 1".split(' ')));
    assert!(table.contains("copy, 1 threads") && table.contains("tq2_0    decode"), "{table}");
}

#[test]
fn bench_quantize_names_an_instruction_set_that_is_not_there() {
    let outcome = run("bench quantize --isa sse9".split(' '));
    let line = error_line(&outcome);
    assert!(line.contains("--isa sse9") && line.contains("scalar"), "{line}");
}
