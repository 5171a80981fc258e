//! Which steps of a rounding to take back when the whole of it does harm.

/// A rounding of all steps, some of them by search.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mix {
    /// True for steps that keep what a search gives.
    pub searched: Vec<bool>,
    /// Its divergence.
    pub kld: f64,
}

/// The rounding with feedback in as many steps as do no harm together, and the divergence of searching everywhere.
/// `differs` marks the steps in which the two are not the same.
///
/// Feedback everywhere stays if it diverges less than search everywhere. Otherwise search everywhere is where it begins,
/// and feedback comes back by halves: a range of steps that diverges less with it gets it, one that does not is halved.
/// What is left is no worse than the search, and takes about two runs for each step to blame and each halving.
///
/// # Errors
/// Those of `divergence`, which runs the model with the steps rounded by search that are marked.
pub(super) fn restore<E>(
    differs: &[bool],
    mut divergence: impl FnMut(&[bool]) -> Result<f64, E>,
) -> Result<(Mix, f64), E> {
    let none = vec![false; differs.len()];
    let feedback = divergence(&none)?;
    let search = if differs.contains(&true) { divergence(differs)? } else { feedback };
    if feedback < search || !differs.contains(&true) {
        return Ok((Mix { searched: none, kld: feedback }, search));
    }
    let mut mix = Mix { searched: differs.to_vec(), kld: search };
    let steps: Vec<usize> = (0..differs.len()).filter(|step| differs[*step]).collect();
    let mut ranges: Vec<&[usize]> = halves(&steps);
    while let Some(range) = ranges.pop() {
        let mut searched = mix.searched.clone();
        range.iter().for_each(|step| searched[*step] = false);
        let kld = divergence(&searched)?;
        if kld < mix.kld {
            mix = Mix { searched, kld };
        } else {
            ranges.extend(halves(range));
        }
    }
    Ok((mix, search))
}

/// Both halves of a range, the first one last; nothing of a single step.
fn halves(range: &[usize]) -> Vec<&[usize]> {
    if range.len() < 2 {
        return Vec::new();
    }
    let (first, second) = range.split_at(range.len() / 2);
    vec![second, first]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Restores with a divergence that is the sum of those of the steps, `[feedback, search]` each; tells the runs too.
    fn restored(steps: &[[f64; 2]]) -> (Mix, f64, usize) {
        let mut runs = 0;
        let differs: Vec<bool> = steps.iter().map(|[feedback, search]| feedback != search).collect();
        let divergence = |searched: &[bool]| {
            runs += 1;
            Ok::<f64, ()>(steps.iter().zip(searched).map(|(step, searched)| step[usize::from(*searched)]).sum())
        };
        let (mix, search) = restore(&differs, divergence).unwrap();
        (mix, search, runs)
    }

    #[test]
    fn feedback_that_helps_stays_after_two_runs() {
        let (mix, search, runs) = restored(&[[1.0, 2.0], [3.0, 2.5], [1.0, 1.5]]);
        assert_eq!((mix, search, runs), (Mix { searched: vec![false; 3], kld: 5.0 }, 6.0, 2));
    }

    #[test]
    fn a_step_that_does_harm_is_found_by_halves() {
        let mut steps = [[0.5, 1.0]; 32];
        steps[21] = [100.0, 1.0];
        let (mix, search, runs) = restored(&steps);
        let blamed: Vec<usize> = (0..32).filter(|step| mix.searched[*step]).collect();
        assert_eq!((blamed, mix.kld, search), (vec![21], 16.5, 32.0));
        assert!(runs <= 2 + 2 * 5, "{runs}");
    }

    #[test]
    fn several_are_found_and_the_result_is_never_worse_than_search() {
        let mut steps = [[0.5, 1.0]; 10];
        (steps[0], steps[7], steps[9]) = ([9.0, 1.0], [9.0, 1.0], [1.0, 1.0]);
        let (mix, search, _) = restored(&steps);
        assert_eq!(mix.searched, [true, false, false, false, false, false, false, true, false, false]);
        assert!(mix.kld < search);
        let (mix, search, _) = restored(&[[2.0, 1.0]; 6]);
        assert_eq!((mix.searched, mix.kld), (vec![true; 6], search));
    }

    #[test]
    fn what_is_the_same_is_run_once() {
        let (mix, search, runs) = restored(&[[1.0, 1.0], [2.0, 2.0]]);
        assert_eq!((mix, search, runs), (Mix { searched: vec![false; 2], kld: 3.0 }, 3.0, 1));
    }

    #[test]
    fn equal_divergence_keeps_what_is_certain() {
        // The first step gains what the second loses.
        let (mix, ..) = restored(&[[1.0, 2.0], [2.0, 1.0]]);
        assert_eq!(mix, Mix { searched: vec![false, true], kld: 2.0 });
    }
}
