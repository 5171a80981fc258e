//! The file of second moments of gradients: what the model's loss makes of an error at each output of some matrices.
//!
//! A GGUF container of its own kind (`general.type` is `lwq-gradients`) with three tensors for each matrix `NAME`, whose m
//! outputs have the sums S of g gᵀ over the gradients g of all tokens:
//!
//! - `NAME.counts`, F64 `[2]`: the weight of the sums and the number of tokens;
//! - `NAME.diagonal`, F32 `[m]`: the diagonal of S;
//! - `NAME.correlations`, F16 `[m (m + 1) / 2]`: `S[i, j] / sqrt(S[i, i] S[j, j])` for j from i on, row by row; not of matrices
//!   of which the squares alone are known.
//!
//! Two bytes are enough for a correlation: feedback damps these moments by a tenth, which adds a tenth of the diagonal to
//! every eigenvalue of the correlations, while rounding them to 11 bits moves an eigenvalue by less than
//! `2^-12 · 2 sqrt(m)` even where all of them are near one: .03 for 4,096 outputs.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::atomic_file::AtomicFile;
use crate::gguf::{Gguf, GgufLayout, Metadata, NewTensor, TensorInfo, TensorType, fingerprint};
use crate::moments::GradientsError;
use crate::quant::float16::{f16_to_f32, f32_to_f16};
use crate::rounding::gptq::SecondMoment;

const KIND: &str = "lwq-gradients";

/// The version of the form that this program writes, and the only one it reads.
const VERSION: u32 = 1;

const VERSION_KEY: &str = "lwq.gradients.version";

/// Correlations may exceed one by so much, from rounding.
const SLACK: f32 = 1e-2;

/// Last parts of the names of what is stored of a matrix, in the order of the file.
const COUNTS: &str = ".counts";
const DIAGONAL: &str = ".diagonal";
const CORRELATIONS: &str = ".correlations";

/// What moments of gradients depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GradientProvenance {
    /// Name of the model file.
    pub model: String,
    /// [`fingerprint`] of the model.
    pub model_sha256: String,
    /// Name of the text.
    pub text: String,
    /// SHA-256 of its tokens and the length of their sequences.
    pub text_sha256: String,
    /// Tokens that gradients were taken of.
    pub tokens: u64,
    /// Seed of the labels that were drawn.
    pub seed: u64,
}

impl GradientProvenance {
    fn texts(&self) -> [(&'static str, &str); 4] {
        [
            ("lwq.gradients.model", &self.model),
            ("lwq.gradients.model_sha256", &self.model_sha256),
            ("lwq.gradients.text", &self.text),
            ("lwq.gradients.text_sha256", &self.text_sha256),
        ]
    }

    fn write(&self, metadata: &mut Metadata) {
        self.texts().iter().for_each(|(key, value)| metadata.set(key, *value));
        metadata.set("lwq.gradients.tokens", self.tokens);
        metadata.set("lwq.gradients.seed", self.seed);
    }

    fn read(metadata: &Metadata) -> Result<GradientProvenance, GradientsError> {
        let text =
            |key: &str| Ok::<_, GradientsError>(metadata.str(key)?.ok_or_else(|| metadata.missing(key))?.to_owned());
        let number = |key: &str| Ok::<_, GradientsError>(metadata.u64(key)?.ok_or_else(|| metadata.missing(key))?);
        Ok(GradientProvenance {
            model: text("lwq.gradients.model")?,
            model_sha256: text("lwq.gradients.model_sha256")?,
            text: text("lwq.gradients.text")?,
            text_sha256: text("lwq.gradients.text_sha256")?,
            tokens: number("lwq.gradients.tokens")?,
            seed: number("lwq.gradients.seed")?,
        })
    }
}

/// Elements on and above the diagonal of a matrix of `m` rows.
fn triangle(m: u64) -> Option<u64> {
    m.checked_add(1).and_then(|next| m.checked_mul(next)).map(|twice| twice / 2)
}

/// Writes a file of moments while they are found, in any order.
#[derive(Debug)]
pub struct GradientsWriter {
    file: AtomicFile,
    path: PathBuf,
    layout: GgufLayout,
    /// The first of its tensors and the number of outputs, by name of the matrix; those written are gone.
    missing: BTreeMap<String, (usize, usize)>,
}

/// Mean squares of the gradients at a matrix's outputs, without the products of different ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GradientSquares {
    /// One for each output.
    pub mean: Vec<f32>,
    /// Gradients that were added.
    pub tokens: u64,
}

impl GradientsWriter {
    /// Begins a file for matrices of so many outputs, by name, and others of which the squares alone are kept.
    ///
    /// # Errors
    /// When the file cannot be made or exists and `replace` is false.
    pub fn create(
        path: &Path,
        replace: bool,
        provenance: &GradientProvenance,
        outputs: &BTreeMap<String, usize>,
        squares: &BTreeMap<String, usize>,
    ) -> Result<GradientsWriter, GradientsError> {
        let label = path.display().to_string();
        let mut metadata = Metadata::new(label.clone());
        metadata.set("general.type", KIND);
        metadata.set(VERSION_KEY, VERSION);
        metadata.set("lwq.version", env!("CARGO_PKG_VERSION"));
        provenance.write(&mut metadata);
        let mut tensors = Vec::new();
        let mut missing = BTreeMap::new();
        for (name, &m) in outputs {
            missing.insert(name.clone(), (tensors.len(), m));
            let pairs = triangle(m as u64).ok_or_else(|| problem(path, name, format!("has {m} outputs, too many")))?;
            let parts = [(COUNTS, 2, TensorType::F64), (DIAGONAL, m as u64, TensorType::F32)];
            for (part, len, ty) in parts.into_iter().chain([(CORRELATIONS, pairs, TensorType::F16)]) {
                tensors.push((NewTensor { name: format!("{name}{part}"), shape: vec![len], ty }, None));
            }
        }
        for (name, &m) in squares.iter().filter(|(name, _)| !outputs.contains_key(*name)) {
            missing.insert(name.clone(), (tensors.len(), m));
            for (part, len, ty) in [(COUNTS, 2, TensorType::F64), (DIAGONAL, m as u64, TensorType::F32)] {
                tensors.push((NewTensor { name: format!("{name}{part}"), shape: vec![len], ty }, None));
            }
        }
        let layout = GgufLayout::carried(&label, &metadata, tensors)?;
        let file = AtomicFile::create(path, replace)?;
        file.reserve(layout.file_bytes())?;
        layout.write_header_at(file.file())?;
        Ok(GradientsWriter { file, path: path.to_owned(), layout, missing })
    }

    /// Writes the moment of one matrix.
    ///
    /// # Errors
    /// When no such matrix is missing, its moment is not finite, or the disk reports an error.
    pub fn write(&mut self, tensor: &str, moment: &SecondMoment) -> Result<(), GradientsError> {
        let wrong = |found: String| problem(&self.path, tensor, found);
        let Some(&(index, m)) = self.missing.get(tensor) else {
            return Err(wrong("was not announced or is there already".to_owned()));
        };
        if moment.n() != m {
            return Err(wrong(format!("has a moment of {} gradients, not {m}", moment.n())));
        }
        let diagonal: Vec<f32> = (0..m).map(|i| moment.upper_row(i)[0]).collect();
        self.write_diagonal(tensor, index, [moment.weight(), moment.tokens() as f64], &diagonal)?;
        let file = self.file.file();
        let inverses: Vec<f64> = diagonal.iter().map(|value| inverse_root(*value)).collect();
        let mut row = Vec::new();
        let mut at = 0;
        for i in 0..m {
            row.clear();
            for (sum, inverse) in moment.upper_row(i).iter().zip(&inverses[i..]) {
                let correlation = (f64::from(*sum) * inverses[i] * inverse) as f32;
                let correlation = if correlation.is_finite() { correlation.clamp(-1.0, 1.0) } else { 0.0 };
                row.extend_from_slice(&f32_to_f16(correlation).to_le_bytes());
            }
            self.layout.write_data_at(file, index + 2, at, &row)?;
            at += row.len() as u64;
        }
        self.missing.remove(tensor);
        Ok(())
    }

    /// Writes the squares of a matrix that was announced with nothing else.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_squares(&mut self, tensor: &str, squares: &GradientSquares) -> Result<(), GradientsError> {
        let Some((index, _)) = self.missing.get(tensor).copied().filter(|(_, m)| *m == squares.mean.len()) else {
            let found = format!("was not announced with {} outputs, or is there already", squares.mean.len());
            return Err(problem(&self.path, tensor, found));
        };
        let tokens = squares.tokens as f64;
        let sums: Vec<f32> = squares.mean.iter().map(|mean| (f64::from(*mean) * tokens) as f32).collect();
        self.write_diagonal(tensor, index, [tokens; 2], &sums)?;
        self.missing.remove(tensor);
        Ok(())
    }

    fn write_diagonal(
        &self,
        tensor: &str,
        index: usize,
        counts: [f64; 2],
        diagonal: &[f32],
    ) -> Result<(), GradientsError> {
        let sound = |value: f32| value.is_finite() && value >= 0.0;
        if !diagonal.iter().all(|value| sound(*value)) || !counts.iter().all(|count| count.is_finite()) {
            let found = "has gradients that are not finite; the model overflows on this text".to_owned();
            return Err(problem(&self.path, tensor, found));
        }
        let file = self.file.file();
        self.layout.write_data_at(file, index, 0, &counts.map(f64::to_le_bytes).concat())?;
        let bytes: Vec<u8> = diagonal.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(self.layout.write_data_at(file, index + 1, 0, &bytes)?)
    }

    /// Completes the file, which appears under its name.
    ///
    /// # Errors
    /// When a matrix is missing or the disk reports an error.
    pub fn finish(self) -> Result<(), GradientsError> {
        if let Some(name) = self.missing.keys().next() {
            return Err(problem(&self.path, name, "was announced and not written".to_owned()));
        }
        Ok(self.file.commit()?)
    }
}

/// `1 / sqrt(value)`, and 0 for 0.
fn inverse_root(value: f32) -> f64 {
    if value > 0.0 { 1.0 / f64::from(value).sqrt() } else { 0.0 }
}

/// Writes all moments at once, by the names of their matrices, and squares of matrices that have no moments.
///
/// # Errors
/// Those of [`GradientsWriter`].
pub fn save_gradients(
    path: &Path,
    replace: bool,
    provenance: &GradientProvenance,
    moments: &BTreeMap<String, SecondMoment>,
    squares: &BTreeMap<String, GradientSquares>,
) -> Result<(), GradientsError> {
    let outputs = moments.iter().map(|(name, moment)| (name.clone(), moment.n())).collect();
    let more = squares.iter().filter(|(name, _)| !moments.contains_key(*name));
    let lengths = more.clone().map(|(name, squares)| (name.clone(), squares.mean.len())).collect();
    let mut writer = GradientsWriter::create(path, replace, provenance, &outputs, &lengths)?;
    moments.iter().try_for_each(|(name, moment)| writer.write(name, moment))?;
    more.into_iter().try_for_each(|(name, squares)| writer.write_squares(name, squares))?;
    writer.finish()
}

fn problem(path: &Path, tensor: &str, problem: String) -> GradientsError {
    GradientsError::Tensor { path: path.to_owned(), tensor: crate::gguf::shown(tensor.as_bytes()), problem }
}

/// An opened file of moments, which are decoded when they are asked for.
pub struct GradientMoments {
    path: PathBuf,
    gguf: Gguf,
    provenance: GradientProvenance,
    /// Outputs by name of the matrix.
    outputs: BTreeMap<String, usize>,
    /// The same of matrices of which the squares alone are known.
    squares: BTreeMap<String, usize>,
}

impl fmt::Debug for GradientMoments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GradientMoments { path, provenance, outputs, squares, .. } = self;
        f.debug_struct("GradientMoments")
            .field("path", path)
            .field("provenance", provenance)
            .field("outputs", outputs)
            .field("squares", squares)
            .finish_non_exhaustive()
    }
}

impl GradientMoments {
    /// Maps a file and checks what it says it holds.
    ///
    /// # Errors
    /// When it cannot be read, is no such file, or its parts do not fit each other.
    pub fn open(path: &Path) -> Result<GradientMoments, GradientsError> {
        GradientMoments::from_gguf(path, Gguf::open(path)?)
    }

    fn from_gguf(path: &Path, gguf: Gguf) -> Result<GradientMoments, GradientsError> {
        let bad = |reason: String| GradientsError::BadFile { path: path.to_owned(), reason };
        let metadata = gguf.metadata();
        if metadata.str("general.type")? != Some(KIND) {
            return Err(
                bad("holds no moments of gradients; give a file that lwq measure --gradients wrote".to_owned()),
            );
        }
        match metadata.u32(VERSION_KEY)? {
            Some(VERSION) => {}
            found => {
                let found = found.map_or("none".to_owned(), |version| version.to_string());
                return Err(bad(format!("has version {found}, expected {VERSION}; measure the gradients again")));
            }
        }
        let provenance = GradientProvenance::read(metadata)?;
        let (mut outputs, mut squares) = (BTreeMap::new(), BTreeMap::new());
        for counts in gguf.tensors() {
            let Some(name) = counts.name.strip_suffix(COUNTS) else { continue };
            let (m, has_pairs) = checked_outputs(&gguf, name).map_err(|found| problem(path, name, found))?;
            if has_pairs { &mut outputs } else { &mut squares }.insert(name.to_owned(), m);
        }
        if gguf.tensors().len() != 3 * outputs.len() + 2 * squares.len() {
            return Err(bad(format!(
                "holds {} tensors, expected three for each of {} matrices and two for each of {}; measure the gradients again",
                gguf.tensors().len(),
                outputs.len(),
                squares.len()
            )));
        }
        Ok(GradientMoments { path: path.to_owned(), gguf, provenance, outputs, squares })
    }

    /// What the moments depend on.
    pub fn provenance(&self) -> &GradientProvenance {
        &self.provenance
    }

    /// Outputs of the matrices that have a moment, by name.
    pub fn outputs(&self) -> &BTreeMap<String, usize> {
        &self.outputs
    }

    /// Digest of everything that the moments depend on and of a sample of them.
    pub fn digest(&self) -> String {
        fingerprint(&self.gguf)
    }

    /// Refuses the moments of another model.
    ///
    /// # Errors
    /// When the model's fingerprint is another, or it lacks a matrix with so many outputs.
    pub fn check_model(&self, model: &Gguf) -> Result<(), GradientsError> {
        if self.provenance.model_sha256 != fingerprint(model) {
            return Err(GradientsError::OtherModel {
                path: self.path.clone(),
                found: crate::gguf::shown(self.provenance.model.as_bytes()),
                model: crate::display::printable(model.label()),
            });
        }
        for (name, &m) in self.outputs.iter().chain(&self.squares) {
            let found = model.tensor(name).map(TensorInfo::rows_per_matrix);
            if found != Some(m as u64) {
                let found =
                    found.map_or("the model has no such tensor".to_owned(), |rows| format!("the model has {rows}"));
                return Err(problem(&self.path, name, format!("has {m} outputs here, {found}")));
            }
        }
        Ok(())
    }

    /// Mean squares of a matrix's gradients, `[outputs]`; `None` where the file has none.
    ///
    /// # Errors
    /// When its numbers are no squares.
    pub fn squares(&self, tensor: &str) -> Result<Option<Vec<f64>>, GradientsError> {
        if !self.outputs.contains_key(tensor) && !self.squares.contains_key(tensor) {
            return Ok(None);
        }
        let ([weight, _], sums) = self.diagonal(tensor)?;
        Ok(Some(sums.iter().map(|sum| if weight > 0.0 { f64::from(*sum) / weight } else { 0.0 }).collect()))
    }

    /// All of which the squares alone are known, by the names of their matrices.
    ///
    /// # Errors
    /// As [`Self::squares`].
    pub(crate) fn only_squares(&self) -> Result<Vec<(String, GradientSquares)>, GradientsError> {
        let of = |name: &String| {
            let ([weight, tokens], sums) = self.diagonal(name)?;
            let mean = |sum: &f32| if weight > 0.0 { (f64::from(*sum) / weight) as f32 } else { 0.0 };
            Ok((name.clone(), GradientSquares { mean: sums.iter().map(mean).collect(), tokens: tokens as u64 }))
        };
        self.squares.keys().map(of).collect()
    }

    /// Weight of the sums and number of tokens, and sums of squares.
    fn diagonal(&self, tensor: &str) -> Result<([f64; 2], Vec<f32>), GradientsError> {
        let data = self.part(tensor, COUNTS)?;
        let counts: Vec<f64> = data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        let data = self.part(tensor, DIAGONAL)?;
        let diagonal: Vec<f32> = data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let sound = |value: f64| value.is_finite() && value >= 0.0;
        match counts[..] {
            [weight, tokens]
                if sound(weight) && sound(tokens) && diagonal.iter().all(|value| sound(f64::from(*value))) =>
            {
                Ok(([weight, tokens], diagonal))
            }
            _ => {
                let found = "has counts or squares that are no such numbers; measure the gradients again".to_owned();
                Err(problem(&self.path, tensor, found))
            }
        }
    }

    fn part(&self, tensor: &str, part: &str) -> Result<std::borrow::Cow<'_, [u8]>, GradientsError> {
        match self.gguf.tensor(&format!("{tensor}{part}")) {
            Some(found) => Ok(self.gguf.tensor_data(found)?),
            None => Err(problem(&self.path, tensor, format!("lacks {part}"))),
        }
    }

    /// The moment of a matrix's gradients; `None` where the file has none. Takes `4 m^2` bytes.
    ///
    /// # Errors
    /// When its numbers are not those of a moment, or there is no memory for it.
    pub fn moment(&self, tensor: &str) -> Result<Option<SecondMoment>, GradientsError> {
        let Some(&m) = self.outputs.get(tensor) else { return Ok(None) };
        let wrong = |found: String| problem(&self.path, tensor, found);
        let (counts, diagonal) = self.diagonal(tensor)?;
        let data = self.part(tensor, CORRELATIONS)?;
        let mut correlations = data.as_chunks().0.iter().map(|bytes| f16_to_f32(u16::from_le_bytes(*bytes)));
        let roots: Vec<f64> = diagonal.iter().map(|value| f64::from(*value).sqrt()).collect();
        let mut moment = SecondMoment::new(m).map_err(|error| wrong(error.to_string()))?;
        for i in 0..m {
            let row = moment.upper_row_mut(i);
            for ((sum, root), correlation) in row.iter_mut().zip(&roots[i..]).zip(&mut correlations) {
                if correlation.is_nan() || correlation.abs() > 1.0 + SLACK {
                    return Err(wrong(format!("has a correlation of {correlation}; measure the gradients again")));
                }
                *sum = (f64::from(correlation) * roots[i] * root) as f32;
            }
            row[0] = diagonal[i];
        }
        if let Some(found) = self.gguf.tensor(&format!("{tensor}{CORRELATIONS}")) {
            self.gguf.release(found);
        }
        moment.set_counts(counts[0], counts[1] as u64);
        Ok(Some(moment))
    }
}

/// Outputs and whether there is more than their squares, of a matrix whose parts have the types and lengths that this asks for.
fn checked_outputs(gguf: &Gguf, name: &str) -> Result<(usize, bool), String> {
    let len = |part: &str, ty: TensorType| match gguf.tensor(&format!("{name}{part}")) {
        Some(found) if found.ty == ty && found.shape.len() == 1 => Ok(found.row_len()),
        Some(found) => Err(format!("has {part} of type {} {}, expected a row of {ty}", found.ty, found.shape_text())),
        None => Err(format!("has counts and lacks {part}")),
    };
    let (counts, m) = (len(COUNTS, TensorType::F64)?, len(DIAGONAL, TensorType::F32)?);
    let has_pairs = gguf.tensor(&format!("{name}{CORRELATIONS}")).is_some();
    let pairs = if has_pairs { Some(len(CORRELATIONS, TensorType::F16)?) } else { None };
    if counts != 2 || m == 0 || pairs.is_some_and(|pairs| triangle(m) != Some(pairs)) {
        let pairs = pairs.unwrap_or(0);
        return Err(format!("has {counts} counts, {m} squares and {pairs} correlations; measure the gradients again"));
    }
    let m = usize::try_from(m).map_err(|_| format!("has {m} outputs, too many for this machine"))?;
    Ok((m, has_pairs))
}
