//! What the scores of tasks say together.

use serde::{Deserialize, Serialize};

use super::TaskKind;

/// 97.5% quantile of the normal distribution, as llama-perplexity has it.
const Z: f64 = 1.959_963_984_54;

/// What a model made of one task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskResult {
    /// Place of the task in its file, from 1.
    pub task: usize,
    /// Index of the answer with the highest score, from 0.
    pub chosen: usize,
    /// Whether that answer is right.
    pub correct: bool,
    /// Index of the answer with the highest normalised score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_norm: Option<usize>,
    /// Whether that answer is right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correct_norm: Option<bool>,
    /// Mean log-probability of each answer, in nats.
    pub scores: Vec<f64>,
    /// Log-probability per byte of each answer, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores_norm: Option<Vec<f64>>,
    /// Share of the answers that are right: what guessing would give.
    #[serde(skip)]
    chance: f64,
}

/// What was found for an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AnswerScore {
    /// Mean log-probability by the rule of the kind.
    pub mean: f64,
    /// Sum of the log-probabilities after the context by the bytes of the answer, where the kind has it.
    pub normalised: Option<f64>,
}

impl TaskResult {
    pub(super) fn new(kind: TaskKind, task: usize, right: &[bool], scores: Vec<AnswerScore>) -> TaskResult {
        let means: Vec<f64> = scores.iter().map(|score| score.mean).collect();
        let normalised: Option<Vec<f64>> = scores.iter().map(|score| score.normalised).collect();
        let chosen = match (kind, means.as_slice()) {
            (TaskKind::WinoGrande, &[first, second]) => {
                if first > second {
                    0
                } else {
                    1
                }
            }
            _ => first_highest(&means),
        };
        let chosen_norm = normalised.as_deref().map(first_highest);
        TaskResult {
            task,
            chosen,
            correct: right[chosen],
            chosen_norm,
            correct_norm: chosen_norm.map(|chosen| right[chosen]),
            scores: means,
            scores_norm: normalised,
            chance: right.iter().filter(|&&right| right).count() as f64 / right.len() as f64,
        }
    }
}

fn first_highest(scores: &[f64]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = index;
        }
    }
    best
}

/// Results of the tasks that were scored, in the order of scoring.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskScores {
    kind: TaskKind,
    selected: usize,
    llama_compat: bool,
    results: Vec<TaskResult>,
    tokens_run: usize,
}

/// The figures of a run. Shares are from 0 to 1; `None` where too few tasks were scored to tell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskSummary {
    /// Kind of the tasks.
    pub kind: TaskKind,
    /// Tasks that were scored.
    pub tasks: usize,
    /// Tasks that were to be scored; more than `tasks` after an interruption.
    pub tasks_selected: usize,
    /// Tasks answered rightly.
    pub correct: usize,
    /// Share of tasks answered rightly.
    pub accuracy: Option<f64>,
    /// Its standard error, `sqrt(p (1 - p) / (n - 1))`.
    pub accuracy_error: Option<f64>,
    /// Its 95% interval after Wilson.
    pub accuracy_interval: Option<[f64; 2]>,
    /// Share of tasks answered rightly by the normalised score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_norm: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_norm_error: Option<f64>,
    /// Accuracy of guessing.
    pub random_chance: Option<f64>,
}

/// A model against its base on the same tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskComparison {
    /// Tasks that both models were scored on.
    #[serde(rename = "tasks_compared")]
    pub tasks: usize,
    /// Accuracy of the base.
    pub base_accuracy: f64,
    /// Its standard error.
    pub base_accuracy_error: Option<f64>,
    /// Accuracy in percent of the base's; `None` if the base has none right.
    pub recovery: Option<f64>,
    /// Accuracy minus that of the base.
    pub accuracy_difference: f64,
    /// Its standard error, from the differences task by task.
    pub accuracy_difference_error: Option<f64>,
    /// Normalised accuracy of the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_accuracy_norm: Option<f64>,
    /// Normalised accuracy in percent of the base's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_norm: Option<f64>,
    /// Share of tasks for which the two models choose different answers.
    pub changed_answers: f64,
}

impl TaskScores {
    pub(super) fn new(kind: TaskKind, selected: usize, llama_compat: bool) -> TaskScores {
        TaskScores { kind, selected, llama_compat, results: Vec::with_capacity(selected), tokens_run: 0 }
    }

    pub(super) fn push(&mut self, result: TaskResult) {
        self.results.push(result);
    }

    /// `tokens` more have passed through the model.
    pub(super) fn ran(&mut self, tokens: usize) {
        self.tokens_run += tokens;
    }

    /// Tokens that passed through the model.
    pub fn tokens_run(&self) -> usize {
        self.tokens_run
    }

    /// The results.
    pub fn results(&self) -> &[TaskResult] {
        &self.results
    }

    /// Whether every selected task was scored.
    pub fn is_complete(&self) -> bool {
        self.results.len() == self.selected
    }

    /// All figures.
    pub fn summary(&self) -> TaskSummary {
        let n = self.results.len();
        let correct = self.results.iter().filter(|result| result.correct).count();
        let correct_norm: Option<Vec<bool>> = self.results.iter().map(|result| result.correct_norm).collect();
        let correct_norm = correct_norm.map(|norm| norm.into_iter().filter(|&correct| correct).count());
        let has_norm = self.kind != TaskKind::WinoGrande;
        TaskSummary {
            kind: self.kind,
            tasks: n,
            tasks_selected: self.selected,
            correct,
            accuracy: share(correct, n),
            accuracy_error: share_error(correct, n),
            accuracy_interval: wilson_interval(correct, n),
            accuracy_norm: correct_norm.filter(|_| has_norm).and_then(|correct| share(correct, n)),
            accuracy_norm_error: correct_norm.filter(|_| has_norm).and_then(|correct| share_error(correct, n)),
            random_chance: self.random_chance(),
        }
    }

    /// Mean over the tasks of the share of right answers; llama-perplexity divides tasks by answers.
    fn random_chance(&self) -> Option<f64> {
        let n = self.results.len();
        if n == 0 {
            return None;
        }
        if self.llama_compat {
            let answers: usize = self.results.iter().map(|result| result.scores.len()).sum();
            return Some(n as f64 / answers as f64);
        }
        Some(self.results.iter().map(|result| result.chance).sum::<f64>() / n as f64)
    }

    /// Compares with the base's results on the same tasks; `None` without any that both were scored on.
    pub fn compare(&self, base: &TaskScores) -> Option<TaskComparison> {
        let pairs: Vec<_> = self.results.iter().zip(&base.results).collect();
        let n = pairs.len();
        let count = |correct: &dyn Fn(&(&TaskResult, &TaskResult)) -> bool| pairs.iter().filter(|p| correct(p)).count();
        let own = count(&|(own, _)| own.correct);
        let of_base = count(&|(_, base)| base.correct);
        let gained = count(&|(own, base)| own.correct && !base.correct);
        let lost = count(&|(own, base)| !own.correct && base.correct);
        let own_norm = count(&|(own, _)| own.correct_norm == Some(true));
        let base_norm = count(&|(_, base)| base.correct_norm == Some(true));
        let has_norm = self.kind != TaskKind::WinoGrande;
        let difference = (gained as f64 - lost as f64) / n as f64;
        let variance = (gained + lost) as f64 / n as f64 - difference * difference;
        let percent = |own: usize, base: usize| (base > 0).then(|| 100.0 * own as f64 / base as f64);
        Some(TaskComparison {
            tasks: n,
            base_accuracy: share(of_base, n)?,
            base_accuracy_error: share_error(of_base, n),
            recovery: percent(own, of_base),
            accuracy_difference: difference,
            accuracy_difference_error: (n > 1).then(|| (variance.max(0.0) / (n - 1) as f64).sqrt()),
            base_accuracy_norm: share(base_norm, n).filter(|_| has_norm),
            recovery_norm: percent(own_norm, base_norm).filter(|_| has_norm),
            changed_answers: count(&|(own, base)| own.chosen != base.chosen) as f64 / n as f64,
        })
    }
}

fn share(part: usize, n: usize) -> Option<f64> {
    (n > 0).then(|| part as f64 / n as f64)
}

/// Standard error of a share.
fn share_error(part: usize, n: usize) -> Option<f64> {
    if n < 2 {
        return None;
    }
    let p = part as f64 / n as f64;
    Some((p * (1.0 - p) / (n - 1) as f64).sqrt())
}

/// 95% interval of a share after Wilson.
fn wilson_interval(part: usize, n: usize) -> Option<[f64; 2]> {
    if n == 0 {
        return None;
    }
    let n = n as f64;
    let p = part as f64 / n;
    let z = Z * Z / n;
    let half = (z * (4.0 * p * (1.0 - p) + z)).sqrt() / 2.0;
    Some([(p + z / 2.0 - half) / (1.0 + z), (p + z / 2.0 + half) / (1.0 + z)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(kind: TaskKind, right: usize, means: &[f64]) -> TaskResult {
        let right: Vec<bool> = (0..means.len()).map(|i| i == right).collect();
        let scores =
            means.iter().map(|&mean| AnswerScore { mean, normalised: (kind != TaskKind::WinoGrande).then_some(-mean) });
        TaskResult::new(kind, 1, &right, scores.collect())
    }

    #[test]
    fn ties_go_to_the_first_answer_and_to_the_second_of_winogrande() {
        assert!(result(TaskKind::HellaSwag, 1, &[-2.0, -1.0, -1.0, -3.0]).correct);
        assert!(result(TaskKind::WinoGrande, 1, &[-1.0, -1.0]).correct);
        assert!(result(TaskKind::WinoGrande, 0, &[-1.0, -1.1]).correct);
        assert_eq!(result(TaskKind::WinoGrande, 0, &[f64::NAN, -1.1]).chosen, 1);
        assert_eq!(result(TaskKind::WinoGrande, 0, &[-1.0, f64::NAN]).chosen, 1);
    }

    #[test]
    fn figures_follow_from_their_definitions() {
        let kind = TaskKind::MultipleChoice;
        let mut scores = TaskScores::new(kind, 5, false);
        let mut base = scores.clone();
        for (own, of_base) in [(0, 0), (0, 1), (1, 0), (0, 0)] {
            let means = |right| if right == 0 { [-1.0, -2.0] } else { [-2.0, -1.0] };
            scores.push(result(kind, 0, &means(own)));
            base.push(result(kind, 0, &means(of_base)));
        }
        let summary = scores.summary();
        assert_eq!((summary.tasks, summary.tasks_selected, summary.correct), (4, 5, 3));
        assert_eq!(summary.accuracy, Some(0.75));
        assert_eq!(summary.accuracy_error, Some((0.75f64 * 0.25 / 3.0).sqrt()));
        assert_eq!((summary.accuracy_norm, summary.random_chance), (Some(0.25), Some(0.5)));
        let comparison = scores.compare(&base).unwrap();
        assert_eq!((comparison.recovery, comparison.accuracy_difference), (Some(100.0), 0.0));
        assert_eq!(comparison.accuracy_difference_error, Some((0.5f64 / 3.0).sqrt()));
        assert_eq!(comparison.changed_answers, 0.5);
        assert!(scores.compare(&TaskScores::new(kind, 5, false)).is_none());
    }

    #[test]
    fn wilson_is_that_of_llama_perplexity() {
        // 300 of 400: its formula by hand.
        let [low, high] = wilson_interval(300, 400).unwrap();
        assert!((low - 0.705_322_867).abs() < 1e-8 && (high - 0.789_920_986).abs() < 1e-8, "{low} {high}");
        assert!(wilson_interval(0, 7).unwrap()[0].abs() < 1e-12);
    }
}
