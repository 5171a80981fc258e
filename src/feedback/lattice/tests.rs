use super::super::tests::noise;
use super::*;

#[test]
fn the_nearest_point_is_found_when_columns_are_independent() {
    let costs: Vec<f32> = noise(8, 1).iter().map(|x| x * x + 0.1).collect();
    for ty in [TensorType::IQ2_XXS, TensorType::IQ2_XS, TensorType::IQ2_S, TensorType::IQ3_XXS, TensorType::IQ3_S] {
        let layout = LatticeLayout::of(ty).unwrap();
        let dims = layout.points.coordinates.len();
        let metric = Metric::new(&costs, None, 0);
        let (mut sum, mut sum_expected) = (0.0, 0.0);
        for seed in 0..20 {
            let t: [f32; 8] = noise(8, seed + 2).try_into().unwrap();
            let scale = 0.9 / layout.points.coordinates[0].iter().fold(0.0f32, |max, v| max.max(*v));
            let found = layout.nearest(&t, &metric, scale);
            let loss = |values: &[f32; 8]| (0..8).map(|i| costs[i] * (t[i] - values[i]).powi(2)).sum::<f32>();
            assert!((loss(&found.values) - found.best).abs() <= 1e-4 * found.best);
            assert!(!layout.even || found.octet.signs.count_ones().is_multiple_of(2), "{ty}");
            // Every point, with the best legal signs of one turn at most.
            let mut expected = f32::INFINITY;
            for point in 0..layout.points.len() {
                let others = if dims == 4 { layout.points.len() } else { 1 };
                for other in 0..others {
                    let magnitude =
                        |i: usize| scale * layout.points.coordinates[i % dims][if i < dims { point } else { other }];
                    let values: [f32; 8] = std::array::from_fn(|i| magnitude(i).copysign(t[i]));
                    let odd = t.iter().filter(|t| **t < 0.0).count() % 2 == 1;
                    if !(layout.even && odd) {
                        expected = expected.min(loss(&values));
                        continue;
                    }
                    let least = (0..8).map(|i| 4.0 * costs[i] * (t[i] * values[i])).fold(f32::INFINITY, f32::min);
                    expected = expected.min(loss(&values) + least);
                }
            }
            sum += found.best;
            sum_expected += expected;
            if !layout.even {
                assert!(found.best <= expected * 1.0001, "{ty}: {} for {expected}", found.best);
            }
        }
        // The list is made without regard to parity.
        assert!(sum <= 1.02 * sum_expected, "{ty}: {sum} for {sum_expected}");
    }
}

#[test]
fn rounding_reckons_with_the_values_that_readers_decode() {
    let n = 512;
    let factor = Factor::new(&super::super::tests::moment(700, n, 3), 0.02).unwrap();
    let rows = noise(3 * n, 4);
    for ty in [TensorType::IQ2_XXS, TensorType::IQ2_XS, TensorType::IQ2_S, TensorType::IQ3_XXS, TensorType::IQ3_S] {
        let layout = LatticeLayout::of(ty).unwrap();
        let mut errors = vec![0.0; rows.len()];
        let parts = round_task(&layout, &rows, &factor, factor.feedback().unwrap(), &mut errors).unwrap();
        let mut bytes = vec![0; parts.len() * layout.bytes];
        for (parts, block) in parts.iter().zip(bytes.chunks_exact_mut(layout.bytes)) {
            parts.write(ty, block);
        }
        let mut decoded = vec![0.0; rows.len()];
        quant::dequantize(ty, &bytes, &mut decoded).unwrap();
        for ((w, q), error) in rows.iter().zip(&decoded).zip(&errors) {
            assert_eq!(w - q, *error, "{ty}");
        }
    }
}
