use super::*;

fn lattices8() -> [(&'static str, &'static Lattice<8>, &'static [u16], usize); 4] {
    [
        ("iq2_xxs", iq2_xxs(), &points::IQ2_XXS, 2),
        ("iq2_xs", iq2_xs(), &points::IQ2_XS, 2),
        ("iq2_s", iq2_s(), &points::IQ2_S, 1),
        ("iq1", iq1(), &points::IQ1, 3),
    ]
}

fn lattices4() -> [(&'static str, &'static Lattice<4>, &'static [u16], usize); 2] {
    [("iq3_xxs", iq3_xxs(), &points::IQ3_XXS, 2), ("iq3_s", iq3_s(), &points::IQ3_S, 3)]
}

fn distance<const D: usize>(a: &[u8; D], b: &[u8; D]) -> i32 {
    (0..D).map(|i| (i32::from(a[i]) - i32::from(b[i])).pow(2)).sum()
}

fn check_lattice<const D: usize>(name: &str, lattice: &Lattice<D>, packed: &[u16], shells: usize) {
    assert!(packed.is_sorted_by(|a, b| a < b), "{name}: points are distinct and in rising order");
    assert_eq!(lattice.cells.len(), Lattice::<D>::LEVELS.pow(D as u32), "{name}");
    let mut points = 0;
    for (tuple, cell) in lattice.cells.iter().enumerate() {
        let levels: [u8; D] =
            std::array::from_fn(|i| (tuple / Lattice::<D>::LEVELS.pow(i as u32) % Lattice::<D>::LEVELS) as u8);
        assert_eq!(Lattice::tuple(&levels), tuple, "{name}");
        match *cell {
            Cell::Point(point) => {
                assert_eq!(lattice.levels(point), &levels, "{name}");
                points += 1;
            }
            Cell::Near { start, end } => {
                let near = &lattice.neighbours[start as usize..end as usize];
                let keys: Vec<_> = near.iter().map(|&p| (distance(lattice.levels(p), &levels), p)).collect();
                assert!(keys.is_sorted_by(|a, b| a < b), "{name}: by distance, then index");
                let nearest = lattice.levels.iter().map(|l| distance(l, &levels)).min();
                assert_eq!(keys.first().map(|k| k.0), nearest, "{name}: the nearest point is among the neighbours");
                let farthest = keys[keys.len() - 1].0;
                let within = lattice.levels.iter().filter(|l| distance(l, &levels) <= farthest).count();
                assert_eq!(within, keys.len(), "{name}: shells are complete");
                let mut occurring: Vec<_> = keys.iter().map(|k| k.0).collect();
                occurring.dedup();
                assert!(occurring.len() <= shells, "{name}");
            }
        }
    }
    assert_eq!(points, packed.len(), "{name}: every point has a cell");
}

#[test]
fn lattices_hold_every_point_and_complete_neighbour_shells() {
    for (name, lattice, packed, shells) in lattices8() {
        check_lattice(name, lattice, packed, shells);
    }
    for (name, lattice, packed, shells) in lattices4() {
        check_lattice(name, lattice, packed, shells);
    }
}

#[test]
fn decode_tables_hold_the_published_constants() {
    assert_eq!(IQ2_XXS_POINTS[1], 0x0808_0808_0808_082b);
    assert_eq!(IQ2_XXS_POINTS[15], 0x0808_0808_192b_0819);
    assert_eq!(IQ1_POINTS[0], u64::MAX);
    assert_eq!(IQ1_POINTS[3], 0xffff_ffff_ffff_01ff);
    assert_eq!(IQ3_XXS_POINTS[5], 0x0404_0c3e);
    assert_eq!(IQ3_S_POINTS[24], 0x0101_0f0f);
}

#[test]
fn even_signs_are_even_and_keep_seven_bits() {
    for code in 0..=255u8 {
        let signs = even_signs(code);
        assert_eq!(signs & 127, code & 127);
        assert_eq!(signs.count_ones() % 2, 0);
    }
}

#[test]
fn cheapest_neighbour_is_the_first_of_equals_and_never_absent() {
    let lattice = iq3_s();
    let off = lattice.cells.iter().position(|c| matches!(c, Cell::Near { .. })).unwrap();
    let levels: [u8; 4] = std::array::from_fn(|i| (off >> (3 * i) & 7) as u8);
    let Cell::Near { start, .. } = lattice.cells[off] else { unreachable!() };
    let first = lattice.neighbours[start as usize];
    for cost in [0.0, 1.0, f32::INFINITY, f32::NAN] {
        assert_eq!(lattice.nearest(InOrder, &levels, || [cost; 32]), (first, false), "{cost}");
    }
}
