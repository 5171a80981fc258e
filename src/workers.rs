//! Work that is cut into pieces and done by threads.
//!
//! The pieces stand in one queue, from which every thread takes the next one when it is done with its last. What a
//! thread keeps between pieces, such as buffers, is its own; nobody else is woken when a piece is done.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// What an error says when a thread panicked.
pub(crate) const PANICKED: &str = "a worker thread failed; this is a bug, please report it";

/// A thread panicked; a bug of this program.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Cuts `rows` rows into pieces of `most` rows, of which the last may have fewer.
pub(crate) fn cut(rows: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
    (0..rows.div_ceil(most)).map(move |piece| piece * most..((piece + 1) * most).min(rows))
}

/// Does all pieces with `threads` threads. Each thread makes itself a worker with `start` and hands it to `work`
/// with one piece after the other and the piece's index. Gives the workers back.
///
/// # Errors
/// The error of the first piece, in the order of the queue, that failed; after a failure no further piece is handed
/// out. [`Panicked`] if no piece failed but a thread panicked.
pub(crate) fn work_off<P, W, E>(
    pieces: &[P],
    threads: usize,
    start: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, usize, &P) -> Result<(), E> + Sync,
) -> Result<Vec<W>, E>
where
    P: Sync,
    W: Send,
    E: From<Panicked> + Send,
{
    let (next, stopped) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failure: Mutex<Option<(usize, E)>> = Mutex::new(None);
    let run = || {
        let mut worker = start();
        while !stopped.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index) else { break };
            if let Err(error) = work(&mut worker, index, piece) {
                stopped.store(true, Ordering::SeqCst);
                let mut slot = failure.lock().unwrap_or_else(PoisonError::into_inner);
                // Pieces are handed out in order, so the smallest failing index is the same in every run.
                if slot.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
                    *slot = Some((index, error));
                }
            }
        }
        worker
    };
    let workers: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    if let Some((_, error)) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    workers.into_iter().collect::<Result<_, _>>().map_err(|_| Panicked.into())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[derive(Debug, PartialEq)]
    enum Failed {
        At(usize),
        Panicked,
    }

    impl From<Panicked> for Failed {
        fn from(_: Panicked) -> Failed {
            Failed::Panicked
        }
    }

    #[test]
    fn pieces_are_all_rows_in_order() {
        for (rows, most) in [(0, 5), (1, 5), (5, 5), (6, 5), (23, 1), (23, 7)] {
            let pieces: Vec<Range<u64>> = cut(rows, most).collect();
            assert_eq!(pieces.iter().cloned().flatten().collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
            assert!(pieces.iter().rev().skip(1).all(|piece| piece.end - piece.start == most), "{rows} {most}");
        }
    }

    /// All threads hold a piece at the same moment, again and again until the queue is empty: nobody would pass the
    /// barrier otherwise.
    #[test]
    fn all_threads_always_find_work() {
        const THREADS: usize = 8;
        let pieces: Vec<usize> = (0..64 * THREADS).collect();
        let barrier = Barrier::new(THREADS);
        let done = work_off(&pieces, THREADS, Vec::new, |done, index, piece| {
            barrier.wait();
            done.push((index, *piece));
            barrier.wait();
            Ok::<_, Failed>(())
        });
        let mut done: Vec<(usize, usize)> = done.unwrap().into_iter().flatten().collect();
        done.sort_unstable();
        assert_eq!(done, pieces.into_iter().enumerate().collect::<Vec<_>>());
    }

    #[test]
    fn the_first_failure_in_the_queue_ends_the_work() {
        for threads in [0, 1, 3, 16] {
            let taken = AtomicUsize::new(0);
            let result = work_off(
                &[(); 1000],
                threads,
                || (),
                |(), index, ()| {
                    taken.fetch_add(1, Ordering::Relaxed);
                    if index < 5 { Ok(()) } else { Err(Failed::At(index)) }
                },
            );
            assert_eq!(result, Err(Failed::At(5)), "{threads} threads");
            assert!(taken.into_inner() <= 5 + threads.max(1), "{threads} threads");
        }
    }

    #[test]
    fn a_panic_is_an_error_and_a_failed_piece_says_more() {
        let run = |failing: usize| {
            work_off(
                &[(); 100],
                3,
                || (),
                |(), index, ()| match index {
                    0 => panic!("meant by the test"),
                    _ if index == failing => Err(Failed::At(index)),
                    _ => Ok(()),
                },
            )
        };
        assert_eq!(run(100), Err(Failed::Panicked));
        assert_eq!(run(50), Err(Failed::At(50)));
    }
}
