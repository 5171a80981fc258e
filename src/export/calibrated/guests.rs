//! GGUF files that a pass over the model rounds beside the folder: what `lwq convert` and `lwq quantize --rounding feedback`
//! would write, without running the model again.

use std::path::{Path, PathBuf};

use super::Calibrated;
use crate::atomic_file::{OutputError, check_target, folder_of};
use crate::display::printable;
use crate::export::ExportError;
use crate::gguf::Gguf;
use crate::moments::{Calibration, CalibrationOptions, FactorOrder};
use crate::progress::{Stop, Watch};
use crate::quantize::feedback::{Rounder, RoundingError, Run, RunOutput};
use crate::quantize::{Draft, Guests, QuantizeError, Request, Rounding};
use crate::recipe::Target;

/// A GGUF that an export makes as well.
#[derive(Clone, Debug, PartialEq)]
pub struct AlsoGguf {
    /// Its types.
    pub target: Target,
    /// The file; `None` is `OUT-TARGET.gguf` beside the folder `OUT`.
    pub path: Option<PathBuf>,
}

impl AlsoGguf {
    /// The file, if the folder is `output`.
    pub fn path(&self, output: &Path) -> PathBuf {
        let beside = || {
            let mut name = output.file_name().unwrap_or_default().to_os_string();
            name.push(format!("-{}.gguf", self.target));
            output.with_file_name(name)
        };
        self.path.clone().unwrap_or_else(beside)
    }
}

/// Checks that the files may be written beside a folder, without writing anything.
///
/// # Errors
/// If two have one name, one is there and may not be replaced, or would lie in the folder.
pub(crate) fn check_paths(paths: &[PathBuf], output: &Path, replace: bool) -> Result<(), ExportError> {
    let resolved = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    for (at, path) in paths.iter().enumerate() {
        let wrong = |problem: &str| ExportError::Folder { path: path.clone(), problem: problem.to_owned() };
        if paths[..at].contains(path) {
            return Err(wrong("is the name of two files; give one of them another, as TYPE=FILE"));
        }
        if path == output || path.starts_with(output) || resolved(folder_of(path)).starts_with(resolved(output)) {
            return Err(wrong("lies in the folder to be written, which appears as a whole; choose another place"));
        }
        match check_target(path, replace) {
            Err(OutputError::NoFolder { .. }) => {
                return Err(wrong("lies in a folder that does not exist; make it first"));
            }
            other => other?,
        }
    }
    Ok(())
}

/// The model as its files are rounded by: without the order that other grids want.
pub(super) fn calibration<'g>(
    request: &Calibrated<'_>,
    gguf: &'g Gguf,
) -> Result<Option<Calibration<'g>>, ExportError> {
    if request.also.is_empty() {
        return Ok(None);
    }
    let options = CalibrationOptions { raw: false, order: FactorOrder::Stored, ..request.options.clone() };
    // What is to be said of model and texts is said for the folder.
    Ok(Some(Calibration::new(gguf, &options, &())?))
}

/// What is to become of each file.
pub(super) fn drafts<'a>(
    request: &Calibrated<'_>,
    calibration: Option<&'a Calibration<'a>>,
    gguf: &'a Gguf,
    watch: &dyn Watch,
) -> Result<Vec<(Draft<'a>, PathBuf)>, ExportError> {
    let Some(calibration) = calibration else { return Ok(Vec::new()) };
    let decide = |(target, path): &(Target, PathBuf)| {
        let draft = Request::target(*target).rounding(Rounding::Feedback(calibration)).decide(gguf)?;
        draft.notes().iter().for_each(|note| watch.warn(&format!("{target}: {note}")));
        Ok((draft, path.clone()))
    };
    request.also.iter().map(decide).collect()
}

/// All files in one pass.
pub(super) struct Passengers<'a, 'g> {
    run: Run<'a, 'g>,
}

impl<'a, 'g> Passengers<'a, 'g> {
    /// `None` where there are none.
    pub(super) fn new(
        calibration: Option<&'a Calibration<'g>>,
        outputs: &'a [RunOutput<'a>],
        stop: Stop,
    ) -> Option<Passengers<'a, 'g>> {
        calibration.map(|calibration| Passengers { run: Run { calibration, outputs, stop } })
    }

    /// Steps that are done for all of them.
    pub(super) fn steps_done(&self) -> usize {
        self.run.steps_done()
    }

    /// What rounds in a pass that begins at step `first`.
    pub(super) fn rounder(&self, first: usize) -> Rounder<'_> {
        self.run.rounder(first)
    }
}

/// Opens what earlier runs have left of the files, after checking that they can be written.
pub(super) fn open(
    request: &Calibrated<'_>,
    drafts: &[(Draft<'_>, PathBuf)],
    calibration: Option<&Calibration<'_>>,
) -> Result<Option<Guests>, ExportError> {
    let Some(calibration) = calibration else { return Ok(None) };
    let outputs: Vec<(&Draft<'_>, PathBuf)> = drafts.iter().map(|(draft, path)| (draft, path.clone())).collect();
    Ok(Some(Guests::open(&outputs, calibration, request.replace)?))
}

/// The error of a rounding in the words of the verb that rounds alone.
pub(super) fn rounding_error(gguf: &Gguf, source: RoundingError) -> ExportError {
    match source {
        RoundingError::Interrupted(interrupted) => ExportError::Interrupted(interrupted),
        source => QuantizeError::Rounding { file: printable(gguf.label()), source: Box::new(source) }.into(),
    }
}
