//! Values worked out by hand from the definitions of compressed-tensors.

use super::*;

pub(super) const fn layout(grid: Grid, groups: Groups, scale_type: ScaleType) -> Layout {
    Layout { grid, groups, scale_type }
}

const INT4: Grid = Grid::Int { bits: 4, symmetric: true };

#[test]
fn symmetric_whole_numbers_divide_the_peak_by_half_of_the_range() {
    let layout = layout(INT4, Groups::Columns(4), ScaleType::F32);
    let weights = [7.5, -7.5, 2.5, 0.5, 0.0, 0.0, 0.0, 0.0];
    let rounded = plain(layout, &weights, 1, 8, None);
    assert_eq!(rounded.scales, [1.0, f32::EPSILON]);
    // 7.5 is cut off at 7; halves go to even.
    assert_eq!(rounded.codes.iter().map(|&code| code as i8).collect::<Vec<_>>(), [7, -8, 2, 0, 0, 0, 0, 0]);
    assert_eq!(layout.dequantize(&rounded, 1, 8), [7.0, -8.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn asymmetric_groups_have_a_zero_point() {
    let layout = layout(Grid::Int { bits: 4, symmetric: false }, Groups::Columns(4), ScaleType::F32);
    let rounded = plain(layout, &[-1.0, 2.0, 0.1, 0.3, 3.0, 1.0, 1.5, 2.0], 1, 8, None);
    // (2 + 1) / 15, -8 + 1 / .2; and from zero to 3.
    assert_eq!((rounded.scales, rounded.zero_points), (vec![0.2, 0.2], vec![-3, -8]));
    let codes: Vec<i8> = rounded.codes.iter().map(|&code| code as i8).collect();
    assert_eq!(codes, [-8, 7, -2, -2, 7, -3, 0, 2]);
}

#[test]
fn scales_are_rounded_before_codes_are_chosen() {
    let layout = layout(Grid::Int { bits: 8, symmetric: true }, Groups::Channel, ScaleType::Bf16);
    // 1 / 127.5 = 1.00392 * 2^-7 becomes 1.00781 * 2^-7, under which -1 is no longer -127.5.
    let rounded = plain(layout, &[1.0, 0.992_2, -1.0], 1, 3, None);
    assert_eq!(rounded.scales, [1.007_812_5 * 2f32.powi(-7)]);
    assert_eq!(rounded.codes.iter().map(|&code| code as i8).collect::<Vec<_>>(), [127, 126, -127]);
}

#[test]
fn fp8_blocks_share_a_scale_and_the_last_may_be_partial() {
    let layout = layout(Grid::Fp8, Groups::Blocks { rows: 2, columns: 2 }, ScaleType::F32);
    let weights = [448.0, 1.0, 896.0, 2.0, 17.0, 1.0, 1.0, 1.0, 0.0];
    let rounded = plain(layout, &weights, 3, 3, None);
    assert_eq!(layout.scale_shape(3, 3), [2, 2]);
    assert_eq!(rounded.scales, [1.0, 2.0, 1.0 / 448.0, f32::EPSILON]);
    assert_eq!(layout.dequantize(&rounded, 3, 3)[..6], [448.0, 1.0, 896.0, 2.0, 16.0, 1.0]);
}

#[test]
fn nvfp4_scales_are_fp8_over_a_global_divisor() {
    let layout = layout(Grid::Nvfp4, Groups::Columns(16), ScaleType::F8E4M3);
    let mut weights = [0.0; 48];
    weights[0] = 6.0;
    weights[1] = -0.25;
    weights[2] = 2.5;
    weights[16] = 3.0;
    weights[17] = -2.0;
    let rounded = plain(layout, &weights, 1, 48, None);
    assert_eq!((rounded.global_scale, &rounded.scales[..]), (448.0, &[448.0, 224.0, 0.125][..]));
    assert_eq!(rounded.codes[..3], [7, 8, 4]);
    let decoded = layout.dequantize(&rounded, 1, 48);
    assert_eq!((decoded[0], decoded[2], decoded[16], decoded[17]), (6.0, 2.0, 3.0, -2.0));
    assert!(decoded[1] == 0.0 && decoded[1].is_sign_negative());
    // Tensors that share a global scale take the largest magnitude of all.
    assert_eq!(common_global_scale([&weights[..], &[-12.0][..]]), 224.0);
    assert_eq!(plain(layout, &weights, 1, 48, Some(224.0)).scales, [224.0, 112.0, 0.125]);
    assert_eq!(common_global_scale([&[0.0f32; 3][..]]), 1.0);
}

#[test]
fn mxfp4_scales_are_powers_of_two() {
    let layout = layout(Grid::Mxfp4, Groups::Columns(32), ScaleType::E8M0);
    for (peak, exponent) in [(6.0, 0), (7.0, 1), (4.0, 0), (3.5, 0), (3.4, -1), (1.0, -2), (1e-3, -12)] {
        let mut weights = [0.0; 32];
        weights[5] = peak;
        let rounded = plain(layout, &weights, 1, 32, None);
        assert_eq!(rounded.scales, [2f32.powi(exponent)], "{peak}");
    }
    assert_eq!(plain(layout, &[0.0; 32], 1, 32, None).scales, [2f32.powi(-127)]);
}

#[test]
fn fp4_ties_go_to_even() {
    let levels = Levels::of(Grid::Mxfp4);
    for (value, nearest) in [
        (0.25, 0.0),
        (0.26, 0.5),
        (0.75, 1.0),
        (1.25, 1.0),
        (1.75, 2.0),
        (2.5, 2.0),
        (3.5, 4.0),
        (5.0, 4.0),
        (5.1, 6.0),
        (100.0, 6.0),
    ] {
        assert_eq!((levels.nearest(value), levels.nearest(-value)), (nearest, -nearest), "{value}");
    }
    for code in 0..16 {
        assert_eq!(levels.code(levels.value(code)), code);
    }
}

#[test]
fn fp8_rounds_to_nearest_even_and_never_to_nan() {
    let levels = Levels::of(Grid::Fp8);
    for bits in (0..=255u8).filter(|bits| bits & 0x7f != 0x7f) {
        assert_eq!((e4m3_bits(e4m3_value(bits)), levels.code(levels.nearest(e4m3_value(bits)))), (bits, bits));
    }
    for bits in 0..0x7eu8 {
        let (low, high) = (e4m3_value(bits), e4m3_value(bits + 1));
        let middle = (low + high) / 2.0;
        let even = if bits % 2 == 0 { low } else { high };
        assert_eq!((levels.nearest(middle), levels.nearest(-middle)), (even, -even));
        assert_eq!((levels.nearest(middle.next_down()), levels.nearest(middle.next_up())), (low, high));
    }
    assert_eq!((levels.nearest(1e9), levels.nearest(f32::NEG_INFINITY)), (448.0, -448.0));
    assert!(levels.nearest(f32::NAN).abs() <= 448.0);
}

#[test]
fn scales_keep_within_their_types() {
    let types = [ScaleType::F32, ScaleType::F16, ScaleType::Bf16, ScaleType::F8E4M3, ScaleType::E8M0];
    let epsilons = [f32::EPSILON, 0.000_976_562_5, 0.007_812_5, 0.125, 2f32.powi(-127)];
    for (ty, epsilon) in types.into_iter().zip(epsilons) {
        assert_eq!((ty.round(0.0), ty.round(f32::NAN)), (epsilon, epsilon), "{ty:?}");
        for scale in [1e-30, 0.01, 1.0, 3.3, 1e5, f32::MAX, f32::INFINITY] {
            let rounded = ty.round(scale);
            assert!(rounded.is_finite() && rounded > 0.0 && ty.round(rounded) == rounded, "{ty:?} {scale}");
            if let Some(next) = ty.neighbour(rounded, 1) {
                assert!(next > rounded && ty.round(next) == next, "{ty:?} {scale}");
                assert_eq!(ty.neighbour(next, -1), Some(rounded));
            }
        }
    }
}

#[test]
fn groups_have_to_divide_a_row() {
    let groups = |groups| layout(INT4, groups, ScaleType::Bf16);
    assert!(groups(Groups::Columns(32)).fits(96) && !groups(Groups::Columns(64)).fits(96));
    assert!(groups(Groups::Channel).fits(7) && groups(Groups::Blocks { rows: 128, columns: 128 }).fits(200));
    assert!(!groups(Groups::Channel).fits(0) && !groups(Groups::Columns(0)).fits(8));
}
