//! Tasks as tokens: what has to be computed, and which predictions count.

use super::{Task, TaskError, TaskKind, TaskSet};
use crate::tokenizer::Tokenizer;

/// Tokens after the common prefix from which on WinoGrande judges only what follows the choice.
const FEWEST_AFTER_PREFIX: usize = 3;

/// Tasks of a set, tokenized with one vocabulary. Models that share it share this, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedTasks {
    pub(super) kind: TaskKind,
    pub(super) file: String,
    pub(super) tasks: Vec<PreparedTask>,
    pub(super) llama_compat: bool,
}

/// One task as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PreparedTask {
    pub number: usize,
    /// Tokens with which all sequences begin.
    pub prefix: Vec<u32>,
    pub answers: Vec<Answer>,
    pub right: Vec<bool>,
}

/// One answer as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// What follows the prefix.
    pub tokens: Vec<u32>,
    /// Positions in the sequence whose tokens are judged, `start <= end`.
    pub scored: std::ops::Range<usize>,
    /// What the sum is divided by.
    pub divisor: Divisor,
    /// Positions of the tokens after the context, for the normalised score; empty without one.
    pub normalised: std::ops::Range<usize>,
    /// Length of the answer in bytes.
    pub bytes: usize,
    /// The logits for the first judged token are those after the last token of the answer before: llama-perplexity's
    /// defect.
    pub judged_by_neighbour: bool,
}

/// How the sum of log-probabilities becomes a mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Divisor {
    /// The number of tokens judged.
    Tokens,
    /// Nothing is judged; the score is NaN.
    Zero,
    /// Nothing is judged; the score is zero, which is better than any other.
    Wrapped,
}

impl Task {
    /// The context with answer `index`.
    fn text(&self, index: usize, kind: TaskKind) -> Vec<u8> {
        let separator: &[u8] = if kind == TaskKind::WinoGrande { b"" } else { b" " };
        [&self.before, separator, &self.choices[index], &self.after].concat()
    }
}

impl PreparedTasks {
    /// Tokenizes all tasks.
    ///
    /// # Errors
    /// When an answer is without any token that could be judged.
    pub fn new(set: &TaskSet, tokenizer: &Tokenizer, llama_compat: bool) -> Result<Self, TaskError> {
        use rayon::prelude::*;
        let tasks: Result<Vec<_>, TaskError> = set
            .tasks()
            .par_iter()
            .map(|task| {
                prepare(task, set.kind(), tokenizer, llama_compat).map_err(|problem| TaskError::Task {
                    file: set.file().to_owned(),
                    number: task.number,
                    problem,
                })
            })
            .collect();
        Ok(PreparedTasks { kind: set.kind(), file: set.file().to_owned(), tasks: tasks?, llama_compat })
    }

    /// Checks that another vocabulary cuts the same tasks into the same tokens.
    ///
    /// # Errors
    /// [`TaskError::VocabularyDiffers`] with the first task that differs.
    pub fn check_equal(&self, other: &PreparedTasks) -> Result<(), TaskError> {
        let differs = self.tasks.iter().zip(&other.tasks).find(|(a, b)| a != b);
        match differs {
            None => Ok(()),
            Some((task, _)) => Err(TaskError::VocabularyDiffers { file: self.file.clone(), number: task.number }),
        }
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// True without tasks.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Tokens that are computed for all tasks: each common prefix once.
    pub fn total_tokens(&self) -> usize {
        self.tasks.iter().map(PreparedTask::total_tokens).sum()
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.tasks.iter().map(PreparedTask::longest).max().unwrap_or(0)
    }
}

impl PreparedTask {
    pub(crate) fn total_tokens(&self) -> usize {
        self.prefix.len() + self.answers.iter().map(|answer| answer.tokens.len()).sum::<usize>()
    }

    pub(crate) fn longest(&self) -> usize {
        self.prefix.len() + self.answers.iter().map(|answer| answer.tokens.len()).max().unwrap_or(0)
    }
}

fn prepare(task: &Task, kind: TaskKind, tokenizer: &Tokenizer, llama_compat: bool) -> Result<PreparedTask, String> {
    let encode = |text: &[u8]| tokenizer.encode(text, true, false);
    let sequences: Vec<Vec<u32>> = (0..task.choices.len()).map(|index| encode(&task.text(index, kind))).collect();
    let shortest = sequences.iter().map(Vec::len).min().unwrap_or(0);
    let equal = common_prefix(&sequences);
    let answers: Vec<Answer>;
    let prefix_len;
    if kind == TaskKind::WinoGrande {
        let bases: Vec<usize> =
            task.choices.iter().map(|choice| encode(&[&task.before[..], choice].concat()).len()).collect();
        prefix_len = equal.min(shortest.saturating_sub(1));
        let skip_choice = sequences.iter().all(|sequence| sequence.len() - equal > FEWEST_AFTER_PREFIX);
        let start = |index: usize| if skip_choice { bases[index] } else { equal };
        let whole = sequences.iter().map(|s| &s[prefix_len..]);
        answers = whole
            .enumerate()
            .map(|(index, tokens)| {
                let len = sequences[index].len();
                let (scored, divisor) = if llama_compat {
                    compat_range(start(index), len)
                } else {
                    // Where nothing follows the choice, the choice itself is judged.
                    let follows = sequences.iter().zip(&bases).all(|(sequence, &base)| base < sequence.len());
                    let start = if skip_choice && follows { bases[index] } else { equal };
                    (without_last(start.clamp(1, len.max(2) - 1)..len), Divisor::Tokens)
                };
                Answer {
                    tokens: tokens.to_vec(),
                    judged_by_neighbour: llama_compat
                        && index == 1
                        && !scored.is_empty()
                        && start(index) == equal
                        && sequences[0].len() > equal,
                    scored,
                    divisor,
                    normalised: 0..0,
                    bytes: task.choices[index].len(),
                }
            })
            .collect();
    } else {
        prefix_len = equal.min(shortest.saturating_sub(1));
        let context = encode(&task.before);
        answers = sequences
            .iter()
            .zip(&task.choices)
            .map(|(sequence, choice)| {
                let context = common_prefix(&[&context[..], sequence]).clamp(1, sequence.len().max(2) - 1);
                Answer {
                    tokens: sequence[prefix_len..].to_vec(),
                    scored: prefix_len.max(1)..sequence.len(),
                    divisor: Divisor::Tokens,
                    normalised: context..sequence.len(),
                    bytes: choice.len(),
                    judged_by_neighbour: false,
                }
            })
            .collect();
    }
    if let Some(empty) = answers.iter().position(|a| a.divisor == Divisor::Tokens && a.scored.is_empty()) {
        return Err(format!("answer {} has no token that follows another; there is nothing to judge", empty + 1));
    }
    let prefix = sequences.first().map(|sequence| sequence[..prefix_len].to_vec()).unwrap_or_default();
    Ok(PreparedTask { number: task.number, prefix, answers, right: task.right.clone() })
}

/// Number of leading tokens that are equal in all sequences.
fn common_prefix<S: AsRef<[u32]>>(sequences: &[S]) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let first = first.as_ref();
    let shared = |other: &S| first.iter().zip(other.as_ref()).take_while(|(a, b)| a == b).count();
    others.iter().map(shared).min().unwrap_or(first.len())
}

/// The range without its last element, if it has more than one.
fn without_last(range: std::ops::Range<usize>) -> std::ops::Range<usize> {
    if range.len() > 1 { range.start..range.end - 1 } else { range }
}

/// What llama-perplexity judges of a sequence of `len` tokens from `start` on; its lengths are unsigned and wrap.
fn compat_range(start: usize, len: usize) -> (std::ops::Range<usize>, Divisor) {
    if start == len {
        (start..start, Divisor::Zero)
    } else if start > len || start == 0 {
        (len..len, Divisor::Wrapped)
    } else {
        (without_last(start..len), Divisor::Tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_prefixes_end_with_the_shortest() {
        assert_eq!(common_prefix(&[vec![1, 2, 3], vec![1, 2], vec![1, 2, 4]]), 2);
        assert_eq!(common_prefix(&[vec![1, 2], vec![3]]), 0);
        assert_eq!(common_prefix::<Vec<u32>>(&[]), 0);
    }

    #[test]
    fn lengths_wrap_as_in_llama_perplexity() {
        assert_eq!(compat_range(4, 9), (4..8, Divisor::Tokens));
        assert_eq!(compat_range(8, 9), (8..9, Divisor::Tokens));
        assert_eq!(compat_range(7, 9), (7..8, Divisor::Tokens));
        assert_eq!(compat_range(9, 9), (9..9, Divisor::Zero));
        assert_eq!(compat_range(10, 9), (9..9, Divisor::Wrapped));
        assert_eq!(compat_range(0, 9), (9..9, Divisor::Wrapped));
    }
}
