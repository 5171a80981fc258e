use super::super::judged::{InputRows, JudgedInputs};
use super::super::layout::Layout;
use super::super::tests::{ALL, BY_COLUMNS, decoded, inputs, moment, naive_row, noise, row_bytes, searched};
use super::super::{DEFAULT_DAMPING, SecondMoment, improve_rows};
use super::*;
use crate::rounding::gptq::columns::column_weights;

/// Gradients that outputs share.
fn gradients(m: usize, seed: u64) -> SecondMoment {
    let shared = noise(3 * 4 * m, seed);
    let mut rows = noise(4 * m * m, seed + 1);
    for (token, row) in rows.chunks_exact_mut(m).enumerate() {
        let part = noise(3, seed + 2 + token as u64);
        for (j, g) in row.iter_mut().enumerate() {
            *g = 0.4 * *g + (0..3).map(|k| part[k] * shared[k * m + j]).sum::<f32>();
        }
    }
    let mut moment = SecondMoment::new(m).unwrap();
    moment.accumulate(&rows, None);
    moment
}

/// A moment with nothing beside its diagonal.
fn unrelated(m: usize) -> SecondMoment {
    let mut moment = SecondMoment::new(m).unwrap();
    for i in 0..m {
        let mut row = vec![0.0; m];
        row[i] = 1.0;
        moment.accumulate(&row, None);
    }
    moment
}

fn loss_of(ty: TensorType, weights: &[f32], inputs: &Factor, outputs: &OutputFactor, bytes: &[u8]) -> f64 {
    let errors = decoded_errors(ty, weights, bytes).unwrap();
    two_sided_loss(&errors, inputs, inputs.feedback().unwrap(), outputs).unwrap()
}

/// Bytes after so many sweeps, whether they are better than others or not.
fn swept(ty: TensorType, weights: &[f32], inputs: &Factor, outputs: &OutputFactor, sweeps: usize) -> Vec<u8> {
    fn of<F: TileFormat>(
        format: &F,
        (ty, weights): (TensorType, &[f32]),
        inputs: &Factor,
        outputs: &OutputFactor,
        sweeps: usize,
    ) -> Vec<u8> {
        let prepared = Prepared::new(format, inputs, inputs.feedback().unwrap());
        let matrix = Matrix { ty, prepared: &prepared, outputs, weights };
        let mut parts = matrix.round().unwrap();
        for _ in 0..sweeps {
            parts = matrix.sweep(parts).unwrap();
        }
        matrix.bytes(&parts).unwrap()
    }
    match checked_format(ty, inputs.n(), inputs).unwrap() {
        Format::Columns(layout) => of(&layout, (ty, weights), inputs, outputs, sweeps),
        Format::Lattice(layout) => of(&layout, (ty, weights), inputs, outputs, sweeps),
    }
}

#[test]
fn rows_are_rounded_to_the_targets_of_the_formula() {
    let (m, n) = (75, 512);
    let factor = Factor::new(&moment(1200, n, 1), 0.02).unwrap();
    let feedback = factor.feedback().unwrap();
    let outputs = OutputFactor::new(&gradients(m, 2), OUTPUT_DAMPING).unwrap();
    let a = Factor::new(&gradients(m, 2), OUTPUT_DAMPING).unwrap();
    let a = a.feedback().unwrap();
    let weights = noise(m * n, 3);
    let cost = column_weights(Some(factor.weights()), n);
    for ty in BY_COLUMNS {
        let layout = Layout::of(ty).unwrap();
        let bytes = swept(ty, &weights, &factor, &outputs, 0);
        let errors = decoded_errors(ty, &weights, &bytes).unwrap();
        // W_i + sum over k < i of A[k, i] (W_k - Q_k), every sum written out.
        let target = |at: usize| -> f32 {
            let (i, j) = (at / n, at % n);
            let others = (0..i).map(|k| f64::from(a[k * m + i]) * f64::from(errors[k * n + j])).sum::<f64>();
            (f64::from(weights[at]) + others) as f32
        };
        let targets: Vec<f32> = (0..m * n).map(target).collect();
        let expected: Vec<Vec<u8>> =
            targets.chunks_exact(n).map(|targets| naive_row(&layout, targets, &cost, feedback).0).collect();
        // Sums in another order tip a weight over where it lies between two values, and with it the rest of its row: it is
        // as near to the targets, with other bytes.
        assert!(bytes.starts_with(&expected[0]), "{ty}");
        let loss = |bytes: &[u8]| -> f64 {
            losses(&decoded_errors(ty, &targets, bytes).unwrap(), n, &factor, feedback).iter().sum()
        };
        let ratio = loss(&bytes) / loss(&expected.concat());
        assert!((ratio - 1.0).abs() < 0.03, "{ty}: {ratio}");
    }
}

#[test]
fn unrelated_outputs_are_rounded_as_by_themselves() {
    let (m, n) = (40, 512);
    let factor = Factor::new(&moment(900, n, 4), 0.02).unwrap();
    let outputs = OutputFactor::new(&unrelated(m), OUTPUT_DAMPING).unwrap();
    let weights = noise(m * n, 5);
    for ty in ALL {
        let mut expected = vec![0; m * row_bytes(ty, n)];
        let one_sided = |format: &Format, out: &mut [u8]| {
            let mut errors = vec![0.0; weights.len()];
            let feedback = factor.feedback().unwrap();
            match format {
                Format::Columns(layout) => {
                    let parts =
                        Prepared::new(layout, &factor, feedback).round_task(&weights, &mut errors, 0).unwrap().0;
                    layout.write(&parts, out);
                }
                Format::Lattice(layout) => {
                    let parts =
                        Prepared::new(layout, &factor, feedback).round_task(&weights, &mut errors, 0).unwrap().0;
                    layout.write(&parts, out);
                }
            }
        };
        one_sided(&checked_format(ty, n, &factor).unwrap(), &mut expected);
        assert!(swept(ty, &weights, &factor, &outputs, 0) == expected, "{ty}");
        // There are more sweeps here.
        let start = searched(ty, &weights, n, Some(factor.plain()));
        let (mut alone, mut tied) = (start.clone(), start);
        improve_rows(ty, &weights, n, &factor, &mut alone).unwrap();
        improve_two_sided(ty, &weights, n, &factor, &outputs, &mut tied).unwrap();
        let loss = |bytes: &[u8]| loss_of(ty, &weights, &factor, &outputs, bytes);
        assert!(loss(&tied) < 1.002 * loss(&alone), "{ty}: {} {}", loss(&tied), loss(&alone));
    }
}

#[test]
fn shared_gradients_let_rows_make_up_for_each_other() {
    let (m, n) = (64, 512);
    let factor = Factor::new(&moment(3000, n, 6), DEFAULT_DAMPING).unwrap();
    let known = gradients(m, 7);
    let outputs = OutputFactor::new(&known, OUTPUT_DAMPING).unwrap();
    let weights = noise(m * n, 8);
    for ty in ALL {
        let start = searched(ty, &weights, n, Some(factor.plain()));
        let (mut alone, mut tied) = (start.clone(), start);
        improve_rows(ty, &weights, n, &factor, &mut alone).unwrap();
        improve_two_sided(ty, &weights, n, &factor, &outputs, &mut tied).unwrap();
        let loss = |bytes: &[u8]| loss_of(ty, &weights, &factor, &outputs, bytes);
        let ratio = loss(&tied) / loss(&alone);
        assert!(ratio < 0.8, "{ty}: {ratio} of one-sided feedback");
        // Inputs that nobody has seen.
        let mut judge = InputRows::new(n);
        judge.accumulate(&inputs(400, n, 9));
        let judge = JudgedInputs::Rows(judge);
        let held_out = |bytes: &[u8]| judge.weighed_loss(&outputs, &weights, &decoded(ty, bytes, weights.len()));
        let ratio = held_out(&tied) / held_out(&alone);
        assert!(ratio < 0.85, "{ty}: {ratio} of one-sided feedback on other inputs");
    }
}

#[test]
fn sweeps_lower_the_loss_and_nothing_ends_worse_than_it_was() {
    let (m, n) = (70, 768);
    let factor = Factor::new(&moment(2000, n, 10), 0.02).unwrap();
    let outputs = OutputFactor::new(&gradients(m, 11), OUTPUT_DAMPING).unwrap();
    let weights = noise(m * n, 12);
    for ty in [TensorType::Q2_K, TensorType::Q6_K, TensorType::IQ3_S] {
        let loss = |bytes: &[u8]| loss_of(ty, &weights, &factor, &outputs, bytes);
        let losses = [0, 1, 2].map(|sweeps| loss(&swept(ty, &weights, &factor, &outputs, sweeps)));
        assert!(losses[1] < 0.98 * losses[0] && losses[2] < losses[1], "{ty}: {losses:?}");
        // What is better than feedback is left alone: its own result after more sweeps.
        let mut best = swept(ty, &weights, &factor, &outputs, 5);
        let before = best.clone();
        improve_two_sided(ty, &weights, n, &factor, &outputs, &mut best).unwrap();
        assert!(best == before || loss(&best) < loss(&before), "{ty}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (m, n) = (100, 1280);
    let weights = noise(m * n, 13);
    let run = |threads: usize, ty: TensorType| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let factor = Factor::new(&moment(1500, n, 14), 0.02).unwrap();
            let outputs = OutputFactor::new(&gradients(m, 15), OUTPUT_DAMPING).unwrap();
            let mut out = searched(ty, &weights, n, Some(factor.plain()));
            improve_two_sided(ty, &weights, n, &factor, &outputs, &mut out).unwrap();
            let loss = loss_of(ty, &weights, &factor, &outputs, &out);
            (out, loss.to_bits())
        })
    };
    for ty in [TensorType::Q3_K, TensorType::IQ2_S] {
        let one = run(1, ty);
        assert!(one == run(2, ty) && one == run(3, ty), "{ty}");
    }
}

#[test]
fn weighed_losses_are_those_of_the_damped_moment() {
    let (m, n, tokens) = (20, 48, 90);
    let known = gradients(m, 16);
    let outputs = OutputFactor::new(&known, OUTPUT_DAMPING).unwrap();
    let mean = known.diagonal().iter().map(|v| f64::from(*v)).sum::<f64>() / m as f64;
    let h = |i: usize, k: usize| {
        let sum = f64::from(known.upper_row(i.min(k))[i.max(k) - i.min(k)]) / known.weight() / mean;
        if i == k { sum } else { sum * (1.0 - OUTPUT_DAMPING) }
    };
    let (w, q) = (noise(m * n, 17), noise(m * n, 18));
    let mut rows = InputRows::new(n);
    rows.accumulate(&noise(tokens * n, 19));
    let mut expected = 0.0;
    for x in rows.rows().chunks_exact(n) {
        let change = |i: usize| -> f64 {
            (0..n).map(|j| (f64::from(w[i * n + j]) - f64::from(q[i * n + j])) * f64::from(x[j])).sum()
        };
        let e: Vec<f64> = (0..m).map(change).collect();
        expected += (0..m * m).map(|at| e[at / m] * h(at / m, at % m) * e[at % m]).sum::<f64>() / tokens as f64;
    }
    let found = JudgedInputs::Rows(rows).weighed_loss(&outputs, &w, &q);
    assert!((found / expected - 1.0).abs() < 1e-4, "{found} for {expected}");
}

#[test]
fn rows_and_gradients_must_be_as_many() {
    let n = 256;
    let factor = Factor::new(&moment(600, n, 20), 0.02).unwrap();
    let outputs = OutputFactor::new(&gradients(5, 21), OUTPUT_DAMPING).unwrap();
    let mut out = vec![0; 4 * row_bytes(TensorType::Q4_K, n)];
    let found = improve_two_sided(TensorType::Q4_K, &noise(4 * n, 22), n, &factor, &outputs, &mut out);
    assert_eq!(found, Err(FeedbackError::Outputs { rows: 4, found: 5 }));
    // Without inputs nothing is known, and the rows stay as they are.
    let (before, diagonal) = (out.clone(), Factor::diagonal(&vec![1.0; n]));
    let outputs = OutputFactor::new(&gradients(4, 21), OUTPUT_DAMPING).unwrap();
    improve_two_sided(TensorType::Q4_K, &noise(4 * n, 22), n, &diagonal, &outputs, &mut out).unwrap();
    assert_eq!(out, before);
}
