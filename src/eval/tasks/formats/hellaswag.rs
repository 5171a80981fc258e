//! HellaSwag as text: six lines per task, `activity: context`, index of the right ending, four endings.

use super::{Source, lines, quoted, raw_lines, small_number};
use crate::eval::tasks::{Task, TaskError};

const LINES: usize = 6;
/// Endings of every task.
pub(crate) const ENDINGS: usize = 4;

/// Reads all tasks.
///
/// Compatible reading differs in what llama-perplexity keeps: carriage returns, a byte order mark, empty texts.
pub(crate) fn hellaswag(source: Source<'_>) -> Result<Vec<Task>, TaskError> {
    let lines = if source.llama_compat {
        // `-f` drops one line feed at the end, then a last line without text is none.
        raw_lines(source.bytes.strip_suffix(b"\n").unwrap_or(source.bytes))
    } else {
        let mut lines = lines(source.bytes);
        while lines.last().is_some_and(|line| line.is_empty()) {
            lines.pop();
        }
        lines
    };
    if lines.is_empty() {
        return Err(source.error("holds no tasks; expected six lines per task"));
    }
    if !lines.len().is_multiple_of(LINES) {
        let problem = format!(
            "has {} lines, not a multiple of {LINES} (context, index of the right ending, four endings)",
            lines.len()
        );
        return Err(source.error(problem));
    }
    lines.chunks_exact(LINES).enumerate().map(|(index, lines)| task(source, index, lines)).collect()
}

fn task(source: Source<'_>, index: usize, lines: &[&[u8]]) -> Result<Task, TaskError> {
    let first = index * LINES;
    if !source.llama_compat
        && let Some(empty) = lines.iter().position(|line| line.trim_ascii().is_empty())
    {
        return Err(source.line_error(first + empty, "is empty; every task needs a context, an index and four endings"));
    }
    let gold = small_number(lines[1]).map(|gold| gold as usize).filter(|&gold| gold < ENDINGS);
    let gold = gold.ok_or_else(|| {
        let problem = format!("{} is not the index of the right ending, 0 to {}", quoted(lines[1]), ENDINGS - 1);
        source.line_error(first + 1, problem)
    })?;
    Ok(Task {
        number: index + 1,
        before: lines[0].to_vec(),
        choices: lines[2..].iter().map(|line| line.to_vec()).collect(),
        after: Vec::new(),
        right: (0..ENDINGS).map(|ending| ending == gold).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, llama_compat: bool) -> Result<Vec<Task>, String> {
        hellaswag(Source { file: "h.txt", bytes: text.as_bytes(), llama_compat }).map_err(|e| e.to_string())
    }

    #[test]
    fn six_lines_are_a_task() {
        let tasks = read("Cook: a\n2\nb\nc\nd\ne\nF: f\n0\ng\nh\ni\nj\n", false).unwrap();
        assert_eq!(tasks.len(), 2);
        assert_eq!((tasks[0].number, &tasks[0].before[..], &tasks[0].choices[3][..]), (1, &b"Cook: a"[..], &b"e"[..]));
        assert_eq!(tasks[0].right, [false, false, true, false]);
    }

    #[test]
    fn windows_line_ends_and_blank_lines_at_the_end_are_dropped() {
        let tasks = read("a\r\n0\r\nb\r\nc\r\nd\r\ne\r\n\r\n\n", false).unwrap();
        assert_eq!(tasks[0].choices[3], b"e");
        let tasks = read("a\r\n0\r\nb\r\nc\r\nd\r\ne\r\n", true).unwrap();
        assert_eq!(tasks[0].choices[3], b"e\r");
    }

    #[test]
    fn damage_is_named_with_its_line() {
        for (text, message) in [
            ("", "h.txt: holds no tasks"),
            ("a\n0\nb\nc\nd\n", "has 5 lines"),
            ("a\n0\nb\nc\nd\ne\nf\n", "has 7 lines"),
            ("a\n4\nb\nc\nd\ne\n", "line 2: \"4\" is not the index"),
            ("a\n-1\nb\nc\nd\ne\n", "line 2: \"-1\" is not"),
            ("a\nx\nb\nc\nd\ne\n", "line 2: \"x\" is not"),
            ("a\n0\nb\n\nd\ne\n", "line 4: is empty"),
        ] {
            let error = read(text, false).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
