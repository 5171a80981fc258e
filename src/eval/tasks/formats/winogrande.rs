//! WinoGrande as CSV: `index,sentence,choice 1,choice 2,answer`, without a header.
//!
//! The sentence may stand in double quotes, which protect commas; a quote within is written twice (RFC 4180).
//! llama-perplexity knows no doubled quotes and takes any quote as the beginning or end of a protected part.

use super::{Source, lines, quoted, raw_lines, small_number};
use crate::eval::tasks::{Task, TaskError};

const COLUMNS: usize = 5;

/// Reads all tasks; rows that were skipped are described in `warnings`.
///
/// Compatible reading loses the last row and skips bad rows; otherwise a bad row is an error.
pub(crate) fn winogrande(source: Source<'_>, warnings: &mut Vec<String>) -> Result<Vec<Task>, TaskError> {
    let rows = if source.llama_compat {
        // `-f` drops the line feed at the end, and a row that ends with the text is not read.
        let mut rows = raw_lines(source.bytes);
        rows.pop();
        rows
    } else {
        lines(source.bytes)
    };
    let mut tasks = Vec::new();
    for (line, row) in rows.iter().enumerate() {
        if row.is_empty() && !source.llama_compat {
            continue;
        }
        let fields = if source.llama_compat { compat_fields(row) } else { fields(row) };
        match fields.and_then(|fields| task(&fields, tasks.len(), source.llama_compat)) {
            Ok(task) => tasks.push(task),
            Err(problem) if source.llama_compat => {
                warnings.push(format!("{}: line {} skipped: {problem}", source.file, line + 1));
            }
            Err(problem) => return Err(source.line_error(line, problem)),
        }
    }
    if tasks.is_empty() {
        return Err(source.error("holds no tasks; expected rows of index,sentence,choice 1,choice 2,answer"));
    }
    Ok(tasks)
}

/// A task from columns.
fn task(fields: &[Vec<u8>; COLUMNS], index: usize, llama_compat: bool) -> Result<Task, String> {
    let [_, sentence, choice1, choice2, answer] = fields;
    let gap = sentence.iter().position(|&byte| byte == b'_');
    let gap = gap.ok_or_else(|| format!("the sentence {} has no _ for the choice to stand in", quoted(sentence)))?;
    if sentence[gap + 1..].contains(&b'_') && !llama_compat {
        return Err(format!("the sentence {} has two _; exactly one must mark the gap", quoted(sentence)));
    }
    let answer = small_number(answer)
        .filter(|n| (1..=2).contains(n))
        .ok_or_else(|| format!("the answer is {}, not 1 or 2", quoted(answer)))?;
    // llama-perplexity scores these all the same.
    if !llama_compat {
        if let Some(empty) = [choice1, choice2].iter().position(|choice| choice.is_empty()) {
            return Err(format!("choice {} is empty", empty + 1));
        }
        if choice1 == choice2 {
            return Err(format!("both choices are {}", quoted(choice1)));
        }
    }
    Ok(Task {
        number: index + 1,
        before: sentence[..gap].to_vec(),
        choices: vec![choice1.clone(), choice2.clone()],
        after: sentence[gap + 1..].to_vec(),
        right: vec![answer == 1, answer == 2],
    })
}

/// The columns of a row.
fn fields(row: &[u8]) -> Result<[Vec<u8>; COLUMNS], String> {
    let mut fields = vec![Vec::new()];
    let mut bytes = row.iter().copied().peekable();
    let mut quote_open = false;
    let mut at_start = true;
    while let Some(byte) = bytes.next() {
        let last = fields.len() - 1;
        match byte {
            b'"' if quote_open && bytes.peek() == Some(&b'"') => {
                bytes.next();
                fields[last].push(b'"');
            }
            b'"' if quote_open => quote_open = false,
            b'"' if at_start => quote_open = true,
            b',' if !quote_open => {
                if fields.len() == COLUMNS {
                    return Err(format!("has more than {COLUMNS} columns; a sentence with commas needs quotes"));
                }
                fields.push(Vec::new());
                at_start = true;
                continue;
            }
            byte => fields[last].push(byte),
        }
        at_start = false;
    }
    if quote_open {
        return Err("a quote is not closed".into());
    }
    let found = fields.len();
    fields
        .try_into()
        .map_err(|_| format!("has {found} columns, not {COLUMNS} (index, sentence, choice 1, choice 2, answer)"))
}

/// The columns as llama-perplexity finds them: the first four commas outside of quotes separate, a quote directly
/// after the first one is cut off together with the byte before the second.
fn compat_fields(row: &[u8]) -> Result<[Vec<u8>; COLUMNS], String> {
    let mut commas = Vec::with_capacity(COLUMNS - 1);
    let mut quote_open = false;
    for (at, &byte) in row.iter().enumerate() {
        match byte {
            b'"' => quote_open = !quote_open,
            b',' if !quote_open => commas.push(at),
            _ => {}
        }
        if commas.len() == COLUMNS - 1 {
            break;
        }
    }
    let &[first, second, third, fourth] = commas.as_slice() else {
        return Err(format!("has {} commas outside of quotes, not 4", commas.len()));
    };
    let mut sentence = &row[first + 1..second];
    if let Some(rest) = sentence.strip_prefix(b"\"") {
        sentence = rest.split_last().map_or(rest, |(_, inner)| inner);
    }
    // A stream of numbers stops at the first byte that is no digit.
    let answer = row[fourth + 1..].trim_ascii_start();
    let digits = answer.iter().take_while(|byte| byte.is_ascii_digit()).count();
    Ok([
        row[..first].to_vec(),
        sentence.to_vec(),
        row[second + 1..third].to_vec(),
        row[third + 1..fourth].to_vec(),
        answer[..digits].to_vec(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, llama_compat: bool) -> (Result<Vec<Task>, String>, Vec<String>) {
        let mut warnings = Vec::new();
        let source = Source { file: "w.csv", bytes: text.as_bytes(), llama_compat };
        (winogrande(source, &mut warnings).map_err(|e| e.to_string()), warnings)
    }

    const TWO: &str = "0,\"Well, the _ is red.\",cup,plate,2\n1,A _ sings.,bird,stone,1";

    #[test]
    fn quotes_protect_commas() {
        let tasks = read(TWO, false).0.unwrap();
        assert_eq!(tasks.len(), 2);
        assert_eq!(tasks[0].before, b"Well, the ");
        assert_eq!(tasks[0].after, b" is red.");
        assert_eq!(tasks[0].right, [false, true]);
        let doubled = read("0,\"Say \"\"_\"\", please.\",cup,plate,2\n", false).0.unwrap();
        assert_eq!(doubled[0].before, b"Say \"");
    }

    #[test]
    fn compatible_reading_loses_the_last_row() {
        for end in ["", "\n"] {
            let (tasks, warnings) = read(&format!("{TWO}{end}"), true);
            let tasks = tasks.unwrap();
            assert_eq!((tasks.len(), &tasks[0].before[..], warnings.len()), (1, &b"Well, the "[..], 0));
        }
    }

    #[test]
    fn bad_rows_are_errors_or_skipped() {
        let cases = [
            ("0,A _ sings,bird,1", "4 columns"),
            ("0,\"A _ sings,bird,stone,1", "quote"),
            ("0,A bird sings.,bird,stone,1", "no _"),
            ("0,A _ _ sings.,bird,stone,1", "two _"),
            ("0,A _ sings.,bird,stone,3", "\"3\", not 1 or 2"),
            ("0,A _ sings.,bird,stone,", "not 1 or 2"),
            ("0,A _ sings.,,stone,1", "choice 1 is empty"),
            ("0,A _ sings.,bird,bird,1", "both choices are \"bird\""),
            ("0,A _ sings, loud.,bird,stone,1", "more than 5 columns"),
        ];
        for (row, message) in cases {
            let text = format!("{row}\n{TWO}\n");
            let error = read(&text, false).0.unwrap_err();
            assert!(error.starts_with("w.csv: line 1: ") && error.contains(message), "{error}");
            let (tasks, warnings) = read(&text, true);
            let passes = ["two _", "choice 1 is empty", "both choices are \"bird\""].contains(&message);
            assert_eq!(tasks.unwrap().len(), 1 + usize::from(passes), "{row}");
            assert_eq!(warnings.len(), usize::from(!passes), "{row}");
        }
        assert!(read("", false).0.unwrap_err().contains("holds no tasks"));
        assert!(read("0,A _ sings.,bird,stone,1", true).0.unwrap_err().contains("holds no tasks"));
    }
}
