//! Multiple choice in llama-perplexity's binary form, little-endian:
//!
//! ```text
//! u32 n_task; u32 position[n_task]      byte offset of each task from the start of the file
//! task:    string question; answers mc1; answers mc2
//! answers: u32 n (at most 100); string answer[n]; i32 label[n], 1 = right
//! string:  u32 length; u8 bytes[length]
//! ```
//!
//! Only mc1, the answers of which one is right, is used.

use byteorder::{ByteOrder, LittleEndian};

use super::{MOST_ANSWERS, Source};
use crate::eval::tasks::{Task, TaskError};

/// Reads all tasks, or those of the indices given.
///
/// Without `llama_compat`, the tasks must follow one another where the offsets say, to the end of the file.
/// Compatible reading ignores the offsets when it reads all tasks, and only follows them when it reads some.
pub(crate) fn multiple_choice(
    source: Source<'_>,
    chosen: Option<&dyn Fn(usize) -> Vec<usize>>,
) -> Result<Vec<Task>, TaskError> {
    let bytes = source.bytes;
    let mut cursor = Cursor { bytes, at: 0 };
    let n_task = cursor.u32().map_err(|problem| source.error(problem))? as usize;
    if n_task == 0 {
        return Err(source.error("holds no tasks"));
    }
    let table = n_task.checked_mul(4).and_then(|len| cursor.take(len)).ok_or_else(|| {
        source.error(format!(
            "the header counts {n_task} tasks, but the file of {} bytes cannot hold their offsets; it is cut short or no \
             task file",
            bytes.len()
        ))
    })?;
    let position = |index: usize| LittleEndian::read_u32(&table[4 * index..]) as usize;
    let order: Vec<usize> = match chosen {
        Some(choose) => choose(n_task),
        None => (0..n_task).collect(),
    };
    if source.llama_compat {
        return compat_tasks(source, cursor, chosen.is_some(), &order, position);
    }
    // Every task is read, also those that are not chosen: a wrong count or offset must not go unnoticed.
    let mut slot = vec![usize::MAX; n_task];
    order.iter().enumerate().for_each(|(at, &index)| slot[index] = at);
    let mut tasks: Vec<Option<Task>> = order.iter().map(|_| None).collect();
    for (index, &slot) in slot.iter().enumerate() {
        let error = |problem| task_error(source, index, problem);
        if position(index) != cursor.at {
            let problem = format!(
                "the header places it at byte {}, but the one before ends at byte {}; the count or an offset is wrong, \
                 make the file again",
                position(index),
                cursor.at
            );
            return Err(error(problem));
        }
        let task = read_task(&mut cursor, index).map_err(error)?;
        check(&task, false).map_err(error)?;
        if let Some(place) = tasks.get_mut(slot) {
            *place = Some(task);
        }
    }
    if cursor.at != bytes.len() {
        let problem = format!(
            "{} bytes follow the last of the {n_task} tasks that the header counts; the count is wrong or the file damaged",
            bytes.len() - cursor.at
        );
        return Err(source.error(problem));
    }
    Ok(tasks.into_iter().flatten().collect())
}

fn compat_tasks<'b>(
    source: Source<'b>,
    mut cursor: Cursor<'b>,
    seek: bool,
    order: &[usize],
    position: impl Fn(usize) -> usize,
) -> Result<Vec<Task>, TaskError> {
    let mut tasks = Vec::new();
    let mut read_bytes = 0;
    for &index in order {
        let error = |problem| task_error(source, index, problem);
        if seek {
            cursor.at = position(index);
            if cursor.at > source.bytes.len() {
                return Err(error(format!(
                    "its offset {} lies beyond the end of the file of {} bytes",
                    cursor.at,
                    source.bytes.len()
                )));
            }
        }
        let start = cursor.at;
        let task = read_task(&mut cursor, index).map_err(error)?;
        check(&task, true).map_err(error)?;
        // Offsets that all name one long task would otherwise multiply it.
        read_bytes += cursor.at - start;
        if read_bytes > source.bytes.len() {
            return Err(error("the tasks overlap; the offsets are wrong".into()));
        }
        tasks.push(task);
    }
    Ok(tasks)
}

fn task_error(source: Source<'_>, index: usize, problem: String) -> TaskError {
    TaskError::Task { file: source.file.to_owned(), number: index + 1, problem }
}

fn read_task(cursor: &mut Cursor<'_>, index: usize) -> Result<Task, String> {
    let before = cursor.string("the question")?.to_vec();
    let (choices, right) = cursor.answers()?;
    // The answers of which several may be right are not used.
    cursor.answers()?;
    Ok(Task { number: index + 1, before, choices, after: Vec::new(), right })
}

/// What neither program can score; a choice without alternatives or without a right answer passes in llama-perplexity.
fn check(task: &Task, llama_compat: bool) -> Result<(), String> {
    if task.before.is_empty() {
        return Err("the question is empty".into());
    }
    if task.choices.is_empty() {
        return Err("has no answers".into());
    }
    if let Some(empty) = task.choices.iter().position(Vec::is_empty) {
        return Err(format!("answer {} is empty", empty + 1));
    }
    if llama_compat {
        return Ok(());
    }
    let texts = std::iter::once(("the question".to_owned(), &task.before));
    let texts = texts.chain(task.choices.iter().enumerate().map(|(at, text)| (format!("answer {}", at + 1), text)));
    for (what, text) in texts {
        if let Err(error) = std::str::from_utf8(text) {
            return Err(format!("{what} is not valid UTF-8 at byte {}; make the file from UTF-8", error.valid_up_to()));
        }
    }
    if task.choices.len() < 2 {
        return Err("has one answer; a choice needs at least two".into());
    }
    if !task.right.contains(&true) {
        return Err("no answer is labelled as right".into());
    }
    Ok(())
}

struct Cursor<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Cursor<'b> {
    fn take(&mut self, len: usize) -> Option<&'b [u8]> {
        let part = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(part)
    }

    fn u32(&mut self) -> Result<u32, String> {
        let part = self.take(4).ok_or_else(|| format!("the file ends at byte {}", self.bytes.len()))?;
        Ok(LittleEndian::read_u32(part))
    }

    fn string(&mut self, what: &str) -> Result<&'b [u8], String> {
        let len = self.u32()? as usize;
        let left = self.bytes.len() - self.at;
        self.take(len).ok_or_else(|| format!("{what} claims {len} bytes, the file has {left} more"))
    }

    fn answers(&mut self) -> Result<(Vec<Vec<u8>>, Vec<bool>), String> {
        let n = self.u32()? as usize;
        if n > MOST_ANSWERS {
            return Err(format!("counts {n} answers; at most {MOST_ANSWERS} are possible"));
        }
        let mut answers = Vec::with_capacity(n);
        for number in 1..=n {
            answers.push(self.string(&format!("answer {number}"))?.to_vec());
        }
        let labels: Result<Vec<bool>, String> = (0..n).map(|_| Ok(self.u32()? == 1)).collect();
        Ok((answers, labels?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
    }

    fn answers(texts: &[&str], right: usize) -> Vec<u8> {
        let mut out = (texts.len() as u32).to_le_bytes().to_vec();
        texts.iter().for_each(|text| out.extend(string(text)));
        (0..texts.len()).for_each(|i| out.extend(i32::from(i == right).to_le_bytes()));
        out
    }

    fn task(question: &str, texts: &[&str], right: usize) -> Vec<u8> {
        [string(question), answers(texts, right), answers(&[], 0)].concat()
    }

    fn file(tasks: &[Vec<u8>]) -> Vec<u8> {
        let mut out = (tasks.len() as u32).to_le_bytes().to_vec();
        let mut at = 4 + 4 * tasks.len();
        for task in tasks {
            out.extend((at as u32).to_le_bytes());
            at += task.len();
        }
        tasks.iter().for_each(|task| out.extend(task));
        out
    }

    fn read(bytes: &[u8], llama_compat: bool) -> Result<Vec<Task>, String> {
        multiple_choice(Source { file: "m.bin", bytes, llama_compat }, None).map_err(|e| e.to_string())
    }

    fn two() -> Vec<u8> {
        file(&[task("q1", &["a", "b", "c"], 2), task("q2", &["d", "e"], 0)])
    }

    #[test]
    fn tasks_are_read_whole_or_chosen() {
        for compat in [false, true] {
            let tasks = read(&two(), compat).unwrap();
            assert_eq!((tasks.len(), &tasks[0].right[..]), (2, &[false, false, true][..]));
            let chosen = |n: usize| vec![n - 1];
            let source = Source { file: "m.bin", bytes: &two(), llama_compat: compat };
            let tasks = multiple_choice(source, Some(&chosen)).unwrap();
            assert_eq!((tasks.len(), tasks[0].number, &tasks[0].before[..]), (1, 2, &b"q2"[..]));
        }
    }

    #[test]
    fn wrong_counts_and_offsets_are_noticed() {
        let with_count = |n: u32| {
            let mut bytes = two();
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            bytes
        };
        for (bytes, message) in [
            (Vec::new(), "ends at byte 0"),
            (with_count(0), "holds no tasks"),
            (with_count(1), "places it at byte 12, but the one before ends at byte 8"),
            (with_count(3), "places it at byte 12, but the one before ends at byte 16"),
            (with_count(u32::MAX), "counts 4294967295 tasks"),
            ([two(), vec![0]].concat(), "1 bytes follow the last of the 2 tasks"),
            (two()[..two().len() - 1].to_vec(), "task 2: the file ends"),
            (file(&[task("q", &["a"], 0)]), "has one answer"),
            (file(&[task("q", &["a", "b"], 9)]), "no answer is labelled"),
            (file(&[task("", &["a", "b"], 0)]), "the question is empty"),
            (file(&[task("q", &["a", ""], 0)]), "answer 2 is empty"),
            (file(&[task("q", &[], 0)]), "has no answers"),
            (file(&[task("q", &["a"; 101], 0)]), "counts 101 answers"),
        ] {
            let error = read(&bytes, false).unwrap_err();
            assert!(error.starts_with("m.bin: ") && error.contains(message), "{error}");
        }
        let mut long = two();
        long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(read(&long, false).unwrap_err().contains("the question claims 4294967295 bytes"));
    }

    #[test]
    fn compatible_reading_stays_within_the_file() {
        let mut bytes = two();
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let source = Source { file: "m.bin", bytes: &bytes, llama_compat: true };
        let first = |_: usize| vec![0];
        assert!(multiple_choice(source, Some(&first)).unwrap_err().to_string().contains("beyond the end"));
        // Offsets are not looked at when all tasks are read.
        assert_eq!(read(&bytes, true).unwrap().len(), 2);
        let mut bytes = file(&vec![task(&"long ".repeat(50), &["a", "b"], 0); 3]);
        let place: [u8; 4] = bytes[4..8].try_into().unwrap();
        bytes[8..12].copy_from_slice(&place);
        bytes[12..16].copy_from_slice(&place);
        bytes.truncate(place[0] as usize + 330);
        let source = Source { file: "m.bin", bytes: &bytes, llama_compat: true };
        let all = |n: usize| (0..n).collect();
        assert!(multiple_choice(source, Some(&all)).unwrap_err().to_string().contains("overlap"));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), compat: bool) {
            let _ = read(&bytes, compat);
            // A sound beginning reaches further.
            let mut sound = two();
            let at = bytes.len() % sound.len();
            sound.truncate(at);
            sound.append(&mut bytes);
            let _ = read(&sound, compat);
        }
    }
}
