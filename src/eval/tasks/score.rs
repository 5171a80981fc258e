//! Log-probabilities of the answers, many tasks at a time.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::results::{AnswerScore, TaskResult, TaskScores};
use super::sequences::{Answer, Divisor, PreparedTask, PreparedTasks};
use super::{TaskError, TaskKind};
use crate::model::math::log_sum_exp;
use crate::model::{ModelError, NoTaps, Pass, TokenGroup};
use crate::progress::{Unit, Watch};

/// Tokens per group of a model that stays in memory: enough for its full speed, few enough that progress shows.
const COMFORTABLE_GROUP: usize = 2048;

/// Group size up to which [`crate::model::Model::group_tokens`] holds the model to stay in memory.
const RESIDENT_GROUP: usize = 32_768;

/// How to score.
#[derive(Clone, Debug, Default)]
pub struct TaskOptions {
    /// Longest sequence that is allowed; the model's own context length when `None`.
    pub n_ctx: Option<usize>,
    /// Memory for activations in bytes; half of what is free when `None`.
    pub memory: Option<u64>,
}

/// Scores prepared tasks. A run that is ended by the pass's cancel flag gives the results of the tasks that were finished.
///
/// # Errors
/// When a sequence is longer than the context, before anything is computed; otherwise those of the forward pass.
pub fn score_tasks(
    pass: &Pass<'_, '_, '_>,
    tasks: &PreparedTasks,
    options: &TaskOptions,
    watch: &dyn Watch,
) -> Result<TaskScores, TaskError> {
    let model = pass.model();
    let n_ctx = options.n_ctx.unwrap_or(model.hparams().n_ctx_train);
    if let Some(long) = tasks.tasks.iter().find(|task| task.longest() > n_ctx) {
        let problem = format!("needs {} tokens; the context has {n_ctx}", long.longest());
        return Err(TaskError::Task { file: tasks.file.clone(), number: long.number, problem });
    }
    // One length for all groups: models that adapt to it must not see how tasks were grouped.
    let longest = tasks.longest();
    let affordable = model.group_tokens(options.memory, longest);
    let budget = if affordable > RESIDENT_GROUP { affordable } else { affordable.min(COMFORTABLE_GROUP) };
    let mut scores = TaskScores::new(tasks.kind, tasks.len(), tasks.llama_compat);
    let mut unfinished = Vec::new();
    watch.begin("answering", tasks.total_tokens() as u64, Unit::Tokens);
    for pieces in plan(tasks, budget) {
        let tokens = pieces.iter().map(|piece| piece.tokens(tasks)).sum();
        match score_pieces(pass, tasks, &pieces, longest) {
            Ok(means) => {
                for (piece, means) in pieces.iter().zip(means) {
                    unfinished.extend(means);
                    let task = &tasks.tasks[piece.task];
                    if piece.answers.end == task.answers.len() {
                        let kind = tasks.kind;
                        scores.push(TaskResult::new(kind, task.number, &task.right, std::mem::take(&mut unfinished)));
                    }
                }
            }
            Err(ModelError::Interrupted) => break,
            Err(error) => {
                watch.end();
                return Err(error.into());
            }
        }
        scores.ran(tokens);
        let right = scores.results().iter().filter(|result| result.correct).count();
        let so_far = format!("task {} of {}, {right} right", scores.results().len(), tasks.len());
        watch.advance(tokens as u64, &so_far);
    }
    watch.end();
    Ok(scores)
}

/// Answers of one task that share a group.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    task: usize,
    answers: Range<usize>,
}

impl Piece {
    fn tokens(&self, tasks: &PreparedTasks) -> usize {
        let task = &tasks.tasks[self.task];
        task.prefix.len() + task.answers[self.answers.clone()].iter().map(|a| a.tokens.len()).sum::<usize>()
    }
}

/// Distributes the tasks over groups of at most `budget` tokens. A task goes whole into one group if it fits into
/// any; otherwise its answers are distributed, each part with the prefix.
fn plan(tasks: &PreparedTasks, budget: usize) -> Vec<Vec<Piece>> {
    let mut groups = Vec::new();
    let mut group: Vec<Piece> = Vec::new();
    let mut used = 0;
    for (index, task) in tasks.tasks.iter().enumerate() {
        let whole = task.total_tokens();
        if used + whole > budget && !group.is_empty() {
            groups.push(std::mem::take(&mut group));
            used = 0;
        }
        // The two sequences of WinoGrande stay together: one may be judged by the logits of the other.
        if whole <= budget || tasks.kind == TaskKind::WinoGrande {
            group.push(Piece { task: index, answers: 0..task.answers.len() });
            used += whole;
            continue;
        }
        let mut first = 0;
        used = task.prefix.len();
        for (number, answer) in task.answers.iter().enumerate() {
            if used + answer.tokens.len() > budget && number > first {
                groups.push(vec![Piece { task: index, answers: first..number }]);
                first = number;
                used = task.prefix.len();
            }
            used += answer.tokens.len();
        }
        group.push(Piece { task: index, answers: first..task.answers.len() });
    }
    if !group.is_empty() {
        groups.push(group);
    }
    groups
}

/// A token whose log-probability is wanted, and the row whose logits tell it.
#[derive(Clone, Copy)]
struct Prediction {
    row: usize,
    token: u32,
    /// Place among the wanted.
    slot: usize,
}

/// Scores of the answers of every piece.
fn score_pieces(
    pass: &Pass<'_, '_, '_>,
    tasks: &PreparedTasks,
    pieces: &[Piece],
    context: usize,
) -> Result<Vec<Vec<AnswerScore>>, ModelError> {
    let mut group = TokenGroup::new();
    let mut predictions: Vec<Prediction> = Vec::new();
    for piece in pieces {
        add_piece(&mut group, &tasks.tasks[piece.task], piece.answers.clone(), &mut predictions)?;
    }
    let log_probs = log_probs(pass, group.with_context(context), predictions)?;
    let mut rest = log_probs.as_slice();
    let scores = pieces.iter().map(|piece| {
        let answers = &tasks.tasks[piece.task].answers[piece.answers.clone()];
        let scores = answers.iter().map(|answer| {
            let (own, others) = rest.split_at(answer.judged().len());
            rest = others;
            answer_score(answer, own, tasks)
        });
        scores.collect()
    });
    Ok(scores.collect())
}

/// Adds the sequences of a task to the group, and what is to be predicted.
fn add_piece(
    group: &mut TokenGroup,
    task: &PreparedTask,
    answers: Range<usize>,
    predictions: &mut Vec<Prediction>,
) -> Result<(), ModelError> {
    let prefix = task.prefix.len();
    let root = if prefix > 0 { Some(group.push(&task.prefix)) } else { None };
    let root_rows = root.map_or(0..0, |root| group.rows(root));
    let mut last_row_before = None;
    for index in answers {
        let answer = &task.answers[index];
        // Nothing is predicted from the last token, except where the next answer is judged by it.
        let neighbour = task.answers.get(index + 1).is_some_and(|next| next.judged_by_neighbour);
        let kept = answer.tokens.len() - usize::from(!neighbour && !answer.tokens.is_empty());
        let tokens = &answer.tokens[..kept];
        let rows = match root {
            _ if tokens.is_empty() => 0..0,
            Some(root) => {
                let segment = group.push_continuation(root, tokens)?;
                group.rows(segment)
            }
            None => {
                let segment = group.push(tokens);
                group.rows(segment)
            }
        };
        for position in answer.judged() {
            let from = position - 1;
            let own = if from < prefix { root_rows.start + from } else { rows.start + from - prefix };
            let row = match last_row_before {
                Some(row) if answer.judged_by_neighbour && position == answer.scored.start => row,
                _ => own,
            };
            let token = if position < prefix { task.prefix[position] } else { answer.tokens[position - prefix] };
            predictions.push(Prediction { row, token, slot: predictions.len() });
        }
        last_row_before = rows.end.checked_sub(1);
    }
    Ok(())
}

/// Runs a group and gives the log-probability of every prediction, in nats, in the order of their slots.
fn log_probs(
    pass: &Pass<'_, '_, '_>,
    group: TokenGroup,
    mut predictions: Vec<Prediction>,
) -> Result<Vec<f64>, ModelError> {
    let mut hidden = pass.embed(Arc::new(group))?;
    pass.run_remaining(&mut hidden, &mut NoTaps)?;
    predictions.sort_by_key(|prediction| prediction.row);
    let mut rows: Vec<usize> = predictions.iter().map(|prediction| prediction.row).collect();
    rows.dedup();
    let mut out = vec![0.0; predictions.len()];
    let mut rest = predictions.as_slice();
    pass.logits(&hidden, &rows, &mut NoTaps, |tile| {
        let normalisers: Vec<f64> = tile.logits.par_chunks_exact(tile.n_vocab).map(log_sum_exp).collect();
        for ((row, logits), normaliser) in tile.iter().zip(normalisers) {
            let (of_row, others) = rest.split_at(rest.partition_point(|prediction| prediction.row == row));
            for prediction in of_row {
                out[prediction.slot] = f64::from(logits[prediction.token as usize]) - normaliser;
            }
            rest = others;
        }
        Ok(())
    })?;
    Ok(out)
}

/// Scores an answer; `log_probs` are those of the positions [`Answer::judged`].
fn answer_score(answer: &Answer, log_probs: &[f64], tasks: &PreparedTasks) -> AnswerScore {
    let first = answer.judged().start;
    let part = |range: &Range<usize>| &log_probs[range.start - first..range.end - first];
    let mean = match answer.divisor {
        Divisor::Zero => f64::NAN,
        Divisor::Wrapped => 0.0,
        // HellaSwag's sums are in double precision there, too.
        Divisor::Tokens if tasks.llama_compat && tasks.kind != TaskKind::HellaSwag => {
            let sum = part(&answer.scored).iter().fold(0f32, |sum, &value| sum + value as f32);
            f64::from(sum / answer.scored.len() as f32)
        }
        Divisor::Tokens => part(&answer.scored).iter().sum::<f64>() / answer.scored.len() as f64,
    };
    let normalised = (!answer.normalised.is_empty())
        .then(|| part(&answer.normalised).iter().sum::<f64>() / answer.bytes.max(1) as f64);
    AnswerScore { mean, normalised }
}

impl Answer {
    /// Positions whose log-probability any score needs.
    fn judged(&self) -> Range<usize> {
        match (self.scored.is_empty(), self.normalised.is_empty()) {
            (_, true) => self.scored.clone(),
            (true, false) => self.normalised.clone(),
            (false, false) => self.scored.start.min(self.normalised.start)..self.scored.end.max(self.normalised.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(prefix: usize, answers: &[usize]) -> PreparedTask {
        let answer = |&len: &usize| Answer {
            tokens: vec![0; len],
            scored: prefix..prefix + len,
            divisor: Divisor::Tokens,
            normalised: 0..0,
            bytes: 1,
            judged_by_neighbour: false,
        };
        PreparedTask {
            number: 1,
            prefix: vec![0; prefix],
            answers: answers.iter().map(answer).collect(),
            right: vec![true; answers.len()],
        }
    }

    #[test]
    fn groups_keep_the_budget_and_cover_every_answer_once() {
        let tasks = vec![task(5, &[2, 2]), task(5, &[1, 1]), task(10, &[8, 8, 8, 1]), task(1, &[1])];
        let tasks = PreparedTasks { kind: TaskKind::MultipleChoice, file: String::new(), tasks, llama_compat: false };
        let groups = plan(&tasks, 20);
        let piece = |task, answers| Piece { task, answers };
        let expected = [
            vec![piece(0, 0..2), piece(1, 0..2)],
            vec![piece(2, 0..1)],
            vec![piece(2, 1..2)],
            vec![piece(2, 2..4)],
            vec![piece(3, 0..1)],
        ];
        assert_eq!(groups, expected);
    }
}
