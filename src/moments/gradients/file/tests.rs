use super::*;
use crate::gguf::testing::RawGguf;
use crate::testing::Random;

fn provenance() -> GradientProvenance {
    GradientProvenance {
        model: "m.gguf".into(),
        model_sha256: "12".into(),
        text: "t.txt".into(),
        text_sha256: "34".into(),
        tokens: 77,
        seed: u64::MAX,
    }
}

fn moment(m: usize, seed: u64) -> SecondMoment {
    let mut random = Random::new(seed);
    let mut rows: Vec<f32> = (0..90 * m).map(|_| 1e-4 * random.bell()).collect();
    for row in rows.chunks_exact_mut(m) {
        (1..m).for_each(|j| row[j] += 0.8 * row[j - 1]);
        row[m / 2] = 0.0;
    }
    let mut moment = SecondMoment::new(m).unwrap();
    moment.accumulate(&rows, None);
    moment
}

fn squares() -> BTreeMap<String, GradientSquares> {
    let of = |mean: &[f32]| GradientSquares { mean: mean.to_vec(), tokens: 5 };
    // What has a moment needs no squares of its own.
    [("up".to_owned(), of(&[0.25, 0.0, 4.0])), ("w".to_owned(), of(&[9.0; 3]))].into()
}

fn saved(folder: &Path) -> (PathBuf, BTreeMap<String, SecondMoment>) {
    let path = folder.join("m.gradients.gguf");
    let moments: BTreeMap<String, SecondMoment> =
        [("blk.0.attn_q.weight".to_owned(), moment(24, 1)), ("w".to_owned(), moment(3, 2))].into();
    save_gradients(&path, false, &provenance(), &moments, &squares()).unwrap();
    (path, moments)
}

#[test]
fn moments_come_back_as_well_as_two_bytes_hold_them() {
    let folder = tempfile::tempdir().unwrap();
    let (path, moments) = saved(folder.path());
    assert!(save_gradients(&path, false, &provenance(), &moments, &squares()).is_err(), "it is there already");
    let file = GradientMoments::open(&path).unwrap();
    assert_eq!(file.provenance(), &provenance());
    assert_eq!(file.outputs().len(), 2);
    for (name, moment) in &moments {
        let found = file.moment(name).unwrap().unwrap();
        assert_eq!((found.n(), found.tokens(), found.weight()), (moment.n(), moment.tokens(), moment.weight()));
        assert_eq!(found.diagonal(), moment.diagonal());
        for i in 0..moment.n() {
            for (j, (found, sum)) in found.upper_row(i).iter().zip(moment.upper_row(i)).enumerate() {
                let scale = (moment.upper_row(i)[0] * moment.upper_row(i + j)[0]).sqrt();
                assert!((found - sum).abs() <= scale / 2048.0, "{name} {i} {j}: {found} {sum}");
            }
        }
    }
    assert!(file.moment("v").unwrap().is_none() && file.squares("v").unwrap().is_none());
    assert!(file.moment("up").unwrap().is_none());
    assert_eq!(file.squares("up").unwrap().unwrap(), [0.25, 0.0, 4.0]);
    let of_moment = file.squares("w").unwrap().unwrap();
    for (found, expected) in of_moment.iter().zip(moments["w"].diagonal()) {
        assert!((found - f64::from(expected)).abs() <= 1e-6 * f64::from(expected));
    }
}

#[test]
fn a_writer_wants_what_was_announced_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.gguf");
    let outputs = [("w".to_owned(), 3), ("v".to_owned(), 3)].into();
    let mut writer = GradientsWriter::create(&path, false, &provenance(), &outputs, &BTreeMap::new()).unwrap();
    writer.write("w", &moment(3, 1)).unwrap();
    assert!(writer.write("w", &moment(3, 1)).unwrap_err().to_string().contains("is there already"));
    assert!(writer.write("v", &moment(4, 1)).unwrap_err().to_string().contains("4 gradients, not 3"));
    let mut huge = SecondMoment::new(3).unwrap();
    huge.accumulate(&[1e30; 3], None);
    assert!(writer.write("v", &huge).unwrap_err().to_string().contains("not finite"));
    assert!(writer.finish().unwrap_err().to_string().contains("\"v\""));
    assert!(!path.exists());
}

#[test]
fn the_moments_of_another_model_are_refused() {
    let model = |rows: u64, value: f32| {
        let values = vec![value; 8 * rows as usize];
        Gguf::from_bytes(RawGguf::new().f32_tensor("w", &[8, rows], &values).build()).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("g.gguf");
    let of = |model: &Gguf, m: usize| {
        let provenance = GradientProvenance { model_sha256: fingerprint(model), ..provenance() };
        save_gradients(&path, true, &provenance, &[("w".to_owned(), moment(m, 1))].into(), &BTreeMap::new()).unwrap();
        GradientMoments::open(&path).unwrap()
    };
    of(&model(3, 1.0), 3).check_model(&model(3, 1.0)).unwrap();
    let refused = |file: GradientMoments, model: &Gguf| file.check_model(model).unwrap_err().to_string();
    let line = refused(of(&model(3, 2.0), 3), &model(3, 1.0));
    assert!(line.contains("\"m.gguf\"") && line.contains("measure the gradients of"), "{line}");
    assert!(refused(of(&model(4, 1.0), 3), &model(4, 1.0)).contains("the model has 4"));
}

/// A file of one matrix with these parts.
fn raw(counts: &[f64], diagonal: &[f32], correlations: &[f32]) -> RawGguf {
    let counts: Vec<u8> = counts.iter().flat_map(|value| value.to_le_bytes()).collect();
    let halves: Vec<u8> = correlations.iter().flat_map(|value| f32_to_f16(*value).to_le_bytes()).collect();
    let texts = ["model", "model_sha256", "text", "text_sha256"];
    let mut file = RawGguf::new().str("general.type", KIND).u32(VERSION_KEY, VERSION);
    for text in texts {
        file = file.str(&format!("lwq.gradients.{text}"), "x");
    }
    file = file.u64("lwq.gradients.tokens", 5).u64("lwq.gradients.seed", 0);
    file.tensor("w.counts", &[counts.len() as u64 / 8], TensorType::F64, &counts)
        .f32_tensor("w.diagonal", &[diagonal.len() as u64], diagonal)
        .tensor("w.correlations", &[correlations.len() as u64], TensorType::F16, &halves)
}

fn opened(file: &RawGguf) -> Result<GradientMoments, GradientsError> {
    GradientMoments::from_gguf(Path::new("g.gguf"), Gguf::from_bytes(file.build())?)
}

#[test]
fn damaged_files_are_refused_in_one_line() {
    let good = raw(&[5.0, 5.0], &[1.0, 4.0], &[1.0, 0.5, 1.0]);
    let found = opened(&good).unwrap().moment("w").unwrap().unwrap();
    assert_eq!(found.upper_row(0), [1.0, 1.0]);
    let refused = |file: RawGguf| {
        let line = opened(&file).and_then(|file| file.moment("w").map(|_| ())).unwrap_err().to_string();
        assert!(!line.contains('\n') && line.contains("g.gguf") || line.contains("memory"), "{line}");
        line
    };
    assert!(refused(raw(&[5.0], &[1.0, 4.0], &[1.0, 0.5, 1.0])).contains("1 counts"));
    assert!(refused(raw(&[5.0, 5.0], &[1.0, 4.0], &[1.0, 0.5])).contains("2 correlations"));
    assert!(refused(raw(&[5.0, 5.0], &[], &[])).contains("0 squares"));
    assert!(refused(raw(&[f64::NAN, 5.0], &[1.0, 4.0], &[1.0, 0.5, 1.0])).contains("no such numbers"));
    assert!(refused(raw(&[5.0, 5.0], &[1.0, -4.0], &[1.0, 0.5, 1.0])).contains("no such numbers"));
    assert!(refused(raw(&[5.0, 5.0], &[1.0, 4.0], &[1.0, 7.0, 1.0])).contains("correlation of 7"));
    assert!(refused(raw(&[5.0, 5.0], &[1.0, 4.0], &[1.0, f32::NAN, 1.0])).contains("NaN"));
    assert!(
        refused(good.clone().f32_tensor("v.diagonal", &[1], &[1.0]))
            .contains("4 tensors, expected three for each of 1 matrices")
    );
    assert!(refused(good.clone().f32_tensor("v.counts", &[2], &[1.0; 2])).contains("\"v\""));
    assert!(refused(RawGguf::new().str("general.type", "imatrix")).contains("lwq measure --gradients"));
    assert!(refused(RawGguf::new().str("general.type", KIND)).contains("version none"));
    assert!(opened(&RawGguf::new().str("general.type", KIND).u32(VERSION_KEY, VERSION)).is_err());
    let bytes = good.build();
    assert!(Gguf::from_bytes(bytes[..bytes.len() - 40].to_vec()).is_err());
}
