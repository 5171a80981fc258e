//! Tasks as JSON lines.

use serde_json::{Map, Value};

use super::hellaswag::ENDINGS;
use super::{MOST_ANSWERS, Source, lines};
use crate::eval::tasks::{Task, TaskError, TaskKind};

type Object = Map<String, Value>;

/// Reads all tasks.
pub(crate) fn json_lines(source: Source<'_>, kind: TaskKind) -> Result<Vec<Task>, TaskError> {
    let mut tasks = Vec::new();
    for (line, text) in lines(source.bytes).into_iter().enumerate() {
        if text.trim_ascii().is_empty() {
            continue;
        }
        let object: Object = serde_json::from_slice(text)
            .map_err(|error| source.line_error(line, format!("is no JSON object: {error}")))?;
        let task = match kind {
            TaskKind::HellaSwag => hellaswag(&object),
            TaskKind::WinoGrande => winogrande(&object),
            TaskKind::MultipleChoice => multiple_choice(&object),
        };
        let task = task.map_err(|problem| source.line_error(line, problem))?;
        tasks.push(Task { number: tasks.len() + 1, ..task });
    }
    if tasks.is_empty() { Err(source.error("holds no tasks; expected one JSON object per line")) } else { Ok(tasks) }
}

/// The kind whose fields the first object has.
pub(in crate::eval::tasks) fn kind_of(bytes: &[u8]) -> Option<TaskKind> {
    let first = lines(bytes).into_iter().find(|line| !line.trim_ascii().is_empty())?;
    let object: Object = serde_json::from_slice(first).ok()?;
    [("endings", TaskKind::HellaSwag), ("sentence", TaskKind::WinoGrande), ("choices", TaskKind::MultipleChoice)]
        .into_iter()
        .find(|(field, _)| object.contains_key(*field))
        .map(|(_, kind)| kind)
}

fn hellaswag(object: &Object) -> Result<Task, String> {
    let choices = strings(object, "endings")?;
    if choices.len() != ENDINGS {
        return Err(format!("endings has {} entries, not {ENDINGS}", choices.len()));
    }
    let right = vec![index("label", field(object, "label")?, 0..ENDINGS)?];
    Ok(task(string(object, "context")?, choices, &right, Vec::new()))
}

fn winogrande(object: &Object) -> Result<Task, String> {
    let sentence = string(object, "sentence")?;
    let parts: Vec<&[u8]> = sentence.split(|&byte| byte == b'_').collect();
    let &[before, after] = parts.as_slice() else {
        return Err(format!("sentence has {} _; exactly one must mark the gap", parts.len() - 1));
    };
    let choices = vec![string(object, "option1")?, string(object, "option2")?];
    if choices[0] == choices[1] {
        return Err("option1 and option2 are equal".into());
    }
    let answer = index("answer", field(object, "answer")?, 1..3)?;
    Ok(task(before.to_vec(), choices, &[answer - 1], after.to_vec()))
}

fn multiple_choice(object: &Object) -> Result<Task, String> {
    let choices = strings(object, "choices")?;
    if !(2..=MOST_ANSWERS).contains(&choices.len()) {
        return Err(format!("choices has {} entries, not 2 to {MOST_ANSWERS}", choices.len()));
    }
    let range = 0..choices.len();
    let right = match field(object, "answer")? {
        Value::Array(answers) => {
            let indices: Result<Vec<_>, _> =
                answers.iter().map(|answer| index("answer", answer, range.clone())).collect();
            indices?
        }
        answer => vec![index("answer", answer, range)?],
    };
    if right.is_empty() {
        return Err("answer names no right choice".into());
    }
    Ok(task(string(object, "question")?, choices, &right, Vec::new()))
}

fn task(before: Vec<u8>, choices: Vec<Vec<u8>>, right: &[usize], after: Vec<u8>) -> Task {
    let right = (0..choices.len()).map(|choice| right.contains(&choice)).collect();
    Task { number: 0, before, choices, after, right }
}

fn field<'o>(object: &'o Object, name: &str) -> Result<&'o Value, String> {
    object.get(name).ok_or_else(|| format!("field {name} is missing"))
}

fn string(object: &Object, name: &str) -> Result<Vec<u8>, String> {
    match field(object, name)? {
        Value::String(text) if text.is_empty() => Err(format!("{name} is empty")),
        Value::String(text) => Ok(text.clone().into_bytes()),
        _ => Err(format!("{name} is no string")),
    }
}

fn strings(object: &Object, name: &str) -> Result<Vec<Vec<u8>>, String> {
    let Value::Array(items) = field(object, name)? else { return Err(format!("{name} is no list")) };
    let texts = items.iter().enumerate().map(|(at, item)| match item {
        Value::String(text) if text.is_empty() => Err(format!("entry {at} of {name} is empty")),
        Value::String(text) => Ok(text.clone().into_bytes()),
        _ => Err(format!("entry {at} of {name} is no string")),
    });
    texts.collect()
}

/// A number of `range`, also as a string.
fn index(name: &str, value: &Value, range: std::ops::Range<usize>) -> Result<usize, String> {
    let number = match value {
        Value::Number(number) => number.as_u64().and_then(|n| usize::try_from(n).ok()),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|n| range.contains(n))
        .ok_or_else(|| format!("{name} is {value}, not a number from {} to {}", range.start, range.end - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: TaskKind, text: &str) -> Result<Vec<Task>, String> {
        json_lines(Source { file: "t.jsonl", bytes: text.as_bytes(), llama_compat: false }, kind)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_three_kinds_are_read() {
        let text = r#"{"context":"C: a","endings":["b","c","d","e"],"label":"3","extra":[1]}"#;
        let tasks = read(TaskKind::HellaSwag, text).unwrap();
        assert_eq!((tasks[0].number, &tasks[0].right[..]), (1, &[false, false, false, true][..]));
        assert_eq!(kind_of(text.as_bytes()), Some(TaskKind::HellaSwag));
        let text = "\n{\"sentence\":\"a _ b\",\"option1\":\"x\",\"option2\":\"y\",\"answer\":2}\n";
        let tasks = read(TaskKind::WinoGrande, text).unwrap();
        assert_eq!((&tasks[0].before[..], &tasks[0].after[..], tasks[0].right[1]), (&b"a "[..], &b" b"[..], true));
        assert_eq!(kind_of(text.as_bytes()), Some(TaskKind::WinoGrande));
        let text = r#"{"question":"q","choices":["x","y","z"],"answer":[0,2]}"#;
        assert_eq!(read(TaskKind::MultipleChoice, text).unwrap()[0].right, [true, false, true]);
        assert_eq!(kind_of(text.as_bytes()), Some(TaskKind::MultipleChoice));
    }

    #[test]
    fn damage_is_named_with_line_and_field() {
        use TaskKind::{HellaSwag, MultipleChoice, WinoGrande};
        for (kind, text, message) in [
            (HellaSwag, "", "holds no tasks"),
            (HellaSwag, "{", "line 1: is no JSON object"),
            (HellaSwag, "\n[1]", "line 2: is no JSON object"),
            (HellaSwag, r#"{"endings":["b","c","d"],"label":0}"#, "endings has 3 entries"),
            (HellaSwag, r#"{"context":"a","endings":["b","c","d",""],"label":0}"#, "entry 3 of endings is empty"),
            (HellaSwag, r#"{"context":"a","endings":["b","c","d","e"],"label":4}"#, "label is 4"),
            (HellaSwag, r#"{"context":"a","endings":["b","c","d","e"],"label":-1}"#, "label is -1"),
            (HellaSwag, r#"{"context":7,"endings":["b","c","d","e"],"label":1}"#, "context is no string"),
            (WinoGrande, r#"{"sentence":"a b","option1":"x","option2":"y","answer":2}"#, "0 _"),
            (WinoGrande, r#"{"sentence":"a _ b","option1":"x","option2":"y","answer":0}"#, "answer is 0"),
            (WinoGrande, r#"{"sentence":"a _ b","option1":"x","option2":"x","answer":1}"#, "equal"),
            (WinoGrande, r#"{"sentence":"a _ b","option1":"x","answer":1}"#, "option2 is missing"),
            (MultipleChoice, r#"{"question":"a","choices":["x"],"answer":0}"#, "choices has 1 entries"),
            (MultipleChoice, r#"{"question":"a","choices":["x","y"],"answer":[]}"#, "no right choice"),
            (MultipleChoice, r#"{"question":"","choices":["x","y"],"answer":1}"#, "question is empty"),
        ] {
            let error = read(kind, text).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
