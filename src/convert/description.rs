//! What describes a model without influencing a run: its name, its size, its licence; and the publisher's sampling
//! defaults, which do.

use std::path::PathBuf;

use serde_json::Value;

use super::ConvertError;
use super::files::{Folder, kind};
use super::plan::{Output, Plan};
use crate::gguf::{Array, Metadata};
use crate::hub::repository_of;

/// Sampling defaults of `generation_config.json`, their keys, and whether they are integers.
const SAMPLING: [(&str, &str, bool); 11] = [
    ("top_k", "general.sampling.top_k", true),
    ("top_p", "general.sampling.top_p", false),
    ("min_p", "general.sampling.min_p", false),
    ("xtc_probability", "general.sampling.xtc_probability", false),
    ("xtc_threshold", "general.sampling.xtc_threshold", false),
    ("temperature", "general.sampling.temp", false),
    ("penalty_last_n", "general.sampling.penalty_last_n", true),
    ("penalty_repeat", "general.sampling.penalty_repeat", false),
    ("mirostat", "general.sampling.mirostat", true),
    ("mirostat_tau", "general.sampling.mirostat_tau", false),
    ("mirostat_eta", "general.sampling.mirostat_eta", false),
];

pub(super) fn write_sampling(folder: &Folder, metadata: &mut Metadata) -> Result<(), ConvertError> {
    const FILE: &str = "generation_config.json";
    let Some(config) = folder.object(FILE)? else { return Ok(()) };
    let wrong = |field: &str, value: &Value, expected: &str| ConvertError::Field {
        file: folder.file(FILE),
        field: field.to_owned(),
        problem: format!("is {}, expected {expected}", kind(value)),
    };
    if let Some(sequence) = config.get("sequence").and_then(Value::as_str) {
        metadata.set("general.sampling.sequence", sequence);
    }
    for (field, key, integer) in SAMPLING {
        let Some(value) = config.get(field).filter(|value| !value.is_null()) else { continue };
        if integer {
            let number = value.as_i64().and_then(|number| i32::try_from(number).ok());
            metadata.set(key, number.ok_or_else(|| wrong(field, value, "an integer"))?);
        } else {
            let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
            metadata.set(key, number.ok_or_else(|| wrong(field, value, "a number"))?);
        }
    }
    Ok(())
}

/// Name, size and licence.
pub(super) fn write(
    folder: &Folder,
    name: Option<&str>,
    plan: &Plan,
    metadata: &mut Metadata,
) -> Result<(), ConvertError> {
    let card = front_matter(&folder.text("README.md").unwrap_or_default().unwrap_or_default());
    let path = std::fs::canonicalize(folder.path()).unwrap_or_else(|_| folder.path().to_path_buf());
    // A snapshot in the hub's cache is called by its commit.
    let named = repository_of(&path).map_or(path, PathBuf::from);
    let folder_name = named.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let card_name = card.iter().find(|(key, _)| key == "model_name").and_then(|(_, values)| values.first());
    let name = match (name, card_name) {
        (Some(name), _) => name.to_owned(),
        (None, Some(name)) => name.clone(),
        (None, None) => title(&folder_name),
    };
    metadata.set("general.name", name);
    metadata.set("general.size_label", size_label(plan));
    let list = |key: &str| card.iter().find(|(found, _)| found == key).map(|(_, values)| values.as_slice());
    for (field, key) in [
        ("license", "general.license"),
        ("license_name", "general.license.name"),
        ("license_link", "general.license.link"),
    ] {
        if let Some(values) = list(field).filter(|values| !values.is_empty()) {
            metadata.set(key, values.join(","));
        }
    }
    let tags: Vec<&String> = ["tags", "pipeline_tag"].iter().filter_map(|key| list(key)).flatten().collect();
    if !tags.is_empty() {
        metadata.set("general.tags", Array::of_strings(&tags));
    }
    let languages: Vec<&String> = ["languages", "language"].iter().filter_map(|key| list(key)).flatten().collect();
    if !languages.is_empty() {
        metadata.set("general.languages", Array::of_strings(&languages));
    }
    Ok(())
}

/// The model that this one was made from, as the model card says.
pub(super) fn base_model(folder: &Folder) -> Option<String> {
    let card = front_matter(&folder.text("README.md").ok()??);
    let (_, values) = card.into_iter().find(|(key, _)| key == "base_model")?;
    values.into_iter().next().filter(|name| !name.is_empty())
}

/// Words of a folder's name, capitalized unless they are numbers, versions or capitalized already. So are the parts of a
/// word, behind an underscore or a digit.
fn title(name: &str) -> String {
    let word = |word: &str| {
        let version = word.strip_prefix('v').unwrap_or(word).starts_with(|c: char| c.is_ascii_digit());
        if version || word != word.to_lowercase() {
            return word.to_owned();
        }
        let mut capitalized = String::with_capacity(word.len());
        let mut inside = false;
        for c in word.chars() {
            match inside {
                true => capitalized.push(c),
                false => capitalized.extend(c.to_uppercase()),
            }
            inside = c.is_alphabetic();
        }
        capitalized
    };
    let words: Vec<String> = name.replace('-', " ").split_whitespace().map(word).collect();
    if words.is_empty() { "model".to_owned() } else { words.join(" ") }
}

/// Parameters in words, such as `1.5B` or `8x7B`.
fn size_label(plan: &Plan) -> String {
    let (mut shared, mut expert, mut experts, mut stacks) = (0u64, 0u64, 0u64, 0u64);
    for Output { tensor, .. } in &plan.outputs {
        let size: u64 = tensor.shape.iter().product();
        match tensor.shape.as_slice() {
            [_, _, count] if tensor.name.contains("_exps.") && *count > 0 => {
                expert += size / count;
                experts += count;
                stacks += 1;
            }
            _ => shared += size,
        }
    }
    let label = rounded(shared + expert);
    match experts.checked_div(stacks) {
        Some(experts) => format!("{experts}x{label}"),
        None => label,
    }
}

/// Two digits at least: `4.1M`, `135M`, `1.5B`.
fn rounded(parameters: u64) -> String {
    let parameters = parameters as f64;
    let (scaled, suffix) = match parameters {
        p if p > 1e12 => (p * 1e-12, "T"),
        p if p > 1e9 => (p * 1e-9, "B"),
        p if p > 1e6 => (p * 1e-6, "M"),
        p => (p * 1e-3, "K"),
    };
    let digits = match scaled.round_ties_even() as u64 {
        0 => 2,
        whole => 2usize.saturating_sub(whole.to_string().len()),
    };
    format!("{scaled:.digits$}{suffix}")
}

/// Top-level entries of a model card's YAML header that are a word or a list of words; anything else is passed over.
pub(crate) fn front_matter(text: &str) -> Vec<(String, Vec<String>)> {
    let mut lines = text.lines();
    let mut entries: Vec<(String, Vec<String>)> = Vec::new();
    if lines.next() != Some("---") {
        return entries;
    }
    let plain = |text: &str| text.trim().trim_matches(['"', '\'']).to_owned();
    for line in lines.take_while(|line| *line != "---").take(1000) {
        if let Some(item) = line.trim_start().strip_prefix("- ") {
            if let Some((_, values)) = entries.last_mut() {
                values.push(plain(item));
            }
        } else if let Some((key, value)) = line.split_once(':')
            && !line.starts_with([' ', '#', '\t'])
        {
            let value = value.trim();
            let values = match value.strip_prefix('[').and_then(|list| list.strip_suffix(']')) {
                Some(list) => list.split(',').map(plain).filter(|item| !item.is_empty()).collect(),
                None if value.is_empty() => Vec::new(),
                None => vec![plain(value)],
            };
            entries.push((key.trim().to_owned(), values));
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_titles() {
        assert_eq!(title("doclet-4m-hf"), "Doclet 4m Hf");
        assert_eq!(title("Qwen2.5-Coder-1.5B-instruct-v0.3"), "Qwen2.5 Coder 1.5B Instruct v0.3");
        assert_eq!(title("my_model-glm4moe_7b-V2_x"), "My_Model Glm4Moe_7B V2_x");
        assert_eq!(title(""), "model");
    }

    #[test]
    fn sizes_have_two_digits() {
        let cases = [(4_069_888, "4.1M"), (134_515_008, "135M"), (1_543_714_304, "1.5B"), (70_000_000_000, "70B")];
        for (parameters, label) in cases.into_iter().chain([(9_700, "10K"), (9_400, "9.4K"), (300, "0.30K")]) {
            assert_eq!(rounded(parameters), label);
        }
    }

    #[test]
    fn model_cards_are_read_as_far_as_they_are_plain() {
        let card =
            "---\nlicense: apache-2.0\nlanguage:\n- en\n- \"no\"\ntags: [chat, code]\nextra:\n  deep: 1\n---\n# x\n";
        let found = front_matter(card);
        let get = |key: &str| found.iter().find(|(name, _)| name == key).map(|(_, values)| values.join(" "));
        assert_eq!(get("license").as_deref(), Some("apache-2.0"));
        assert_eq!(get("language").as_deref(), Some("en no"));
        assert_eq!(get("tags").as_deref(), Some("chat code"));
        assert!(front_matter("no card").is_empty());
    }
}
