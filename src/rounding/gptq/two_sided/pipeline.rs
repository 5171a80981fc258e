//! Items that pass through stages, each stage taking them in order: cells of a grid, every one of which needs the cell
//! before it in its row and the one in its column.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::Scope;

/// Calls `work` for every item with every stage: a stage takes the items in their order, an item the stages in theirs. Runs
/// on rayon's current pool, as many pairs at once as that order and the pool allow. Gives the items back.
pub(super) fn run<S: Send, T: Send>(
    stages: Vec<S>,
    items: Vec<T>,
    work: impl Fn(usize, &mut S, &mut T) + Sync,
) -> Vec<T> {
    let Some(last) = stages.len().checked_sub(1) else { return items };
    let mut stages: Vec<Mutex<Stage<S, T>>> =
        stages.into_iter().map(|state| Mutex::new(Stage { state: Some(state), waiting: VecDeque::new() })).collect();
    if let Some(first) = stages.first_mut() {
        first.get_mut().unwrap_or_else(PoisonError::into_inner).waiting = items.into();
    }
    let pipeline = Pipeline { stages, done: Mutex::new(Vec::new()), last, work };
    rayon::scope(|scope| pipeline.advance(scope, 0));
    pipeline.done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

struct Stage<S, T> {
    /// `None` while it is at work.
    state: Option<S>,
    waiting: VecDeque<T>,
}

struct Pipeline<S, T, W> {
    stages: Vec<Mutex<Stage<S, T>>>,
    done: Mutex<Vec<T>>,
    last: usize,
    work: W,
}

/// A panic elsewhere ends the whole scope; what it left locked is not used.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Send, T: Send, W: Fn(usize, &mut S, &mut T) + Sync> Pipeline<S, T, W> {
    /// Does the next item of a stage, unless it is at work: whoever is at it then comes back here.
    fn advance<'s>(&'s self, scope: &Scope<'s>, index: usize) {
        let (mut state, mut item) = {
            let mut stage = lock(&self.stages[index]);
            let Some(state) = stage.state.take() else { return };
            match stage.waiting.pop_front() {
                Some(item) => (state, item),
                None => {
                    stage.state = Some(state);
                    return;
                }
            }
        };
        (self.work)(index, &mut state, &mut item);
        lock(&self.stages[index]).state = Some(state);
        // A thread takes what it spawned last: items leave before others enter, so that few are under way.
        scope.spawn(move |scope| self.advance(scope, index));
        if index == self.last {
            lock(&self.done).push(item);
        } else {
            lock(&self.stages[index + 1]).waiting.push_back(item);
            scope.spawn(move |scope| self.advance(scope, index + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_take_items_in_order_for_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let items: Vec<(usize, Vec<usize>)> = (0..40).map(|item| (item, Vec::new())).collect();
                let done = run(vec![0; 7], items, |index, next, (item, stages)| {
                    assert_eq!(*item, *next, "stage {index}");
                    *next += 1;
                    stages.push(index);
                });
                let names: Vec<usize> = done.iter().map(|(item, _)| *item).collect();
                assert_eq!(names, (0..40).collect::<Vec<_>>());
                assert!(done.iter().all(|(_, stages)| *stages == (0..7).collect::<Vec<_>>()));
            });
        }
        assert_eq!(run(Vec::<()>::new(), vec![3], |_, (), _| {}), [3]);
        assert!(run(vec![(); 3], Vec::<u8>::new(), |_, (), _| {}).is_empty());
    }
}
