//! Who the model is: what the source's own card, or the GGUF's general keys, say of it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::convert::front_matter;
use crate::gguf::Metadata;
use crate::hub::{is_repository, repository_of};

/// Largest card that is read, in bytes.
const MAX_CARD: u64 = 8 << 20;

/// What models of this program are for.
const PIPELINE: &str = "text-generation";

/// Tags that name what a model is for; GGUF files have them among the others.
const PIPELINES: [&str; 6] =
    [PIPELINE, "image-text-to-text", "text2text-generation", "feature-extraction", "any-to-any", "audio-text-to-text"];

/// The front matter of the card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontMatter {
    /// Repository of the source, or the nearest that is known of it.
    pub base_model: Vec<String>,
    /// Who made the files.
    pub quantized_by: String,
    /// Licence, as the Hub names it.
    pub license: Option<String>,
    /// Name of a licence that the Hub does not know.
    pub license_name: Option<String>,
    /// Where it can be read.
    pub license_link: Option<String>,
    /// Languages.
    pub language: Vec<String>,
    /// What it is for.
    pub pipeline_tag: String,
    /// Tags, those of the source first.
    pub tags: Vec<String>,
}

/// What a user says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Said {
    /// Repository of the source.
    pub base_model: Option<String>,
    /// Who makes the files.
    pub quantized_by: Option<String>,
}

impl FrontMatter {
    /// From the card of a folder, if the source is one, or else from `metadata`; `name` is what the model is called. True
    /// with it if nothing names the repository of the source.
    pub(super) fn new(
        source: &Path,
        metadata: &Metadata,
        name: &str,
        said: &Said,
        tags: &[&str],
    ) -> (FrontMatter, bool) {
        let card = if source.is_dir() { read_card(source) } else { Vec::new() };
        let of_card = |key: &str| -> Vec<String> {
            let found = card.iter().find(|(found, _)| found == key);
            found.map(|(_, values)| values.iter().filter(|value| is_word(value)).cloned().collect()).unwrap_or_default()
        };
        let text = |key: &str| {
            let found = metadata.str(key).ok().flatten().unwrap_or_default();
            Some(found.to_owned()).filter(|found| is_word(found))
        };
        let list = |key: &str| -> Vec<String> {
            let array = metadata.array(key).ok().flatten();
            let words =
                array.and_then(|array| Some(array.iter_str().ok()?.map(String::from_utf8_lossy).collect::<Vec<_>>()));
            words.unwrap_or_default().iter().map(|word| word.to_string()).filter(|word| is_word(word)).collect()
        };
        let one = |key: &str, of_file: &str| of_card(key).into_iter().next().or_else(|| text(of_file));
        let either = |key: &str, of_file: &str| {
            let found = of_card(key);
            if found.is_empty() { list(of_file) } else { found }
        };
        let source_tags = either("tags", "general.tags");
        let pipeline = of_card("pipeline_tag").into_iter().next();
        let pipeline = pipeline.or_else(|| source_tags.iter().find(|tag| PIPELINES.contains(&tag.as_str())).cloned());
        let pipeline_tag = pipeline.unwrap_or_else(|| PIPELINE.to_owned());
        let mut all = Vec::new();
        let own = source_tags.into_iter().filter(|tag| *tag != pipeline_tag && !tag.contains(':'));
        for tag in own.chain(tags.iter().map(|tag| (*tag).to_owned())) {
            if !all.contains(&tag) {
                all.push(tag);
            }
        }
        let known = said.base_model.clone().map(|id| vec![id]);
        let known = known.or_else(|| repository_of(source).map(|id| vec![id]));
        let known = known.or_else(|| own_repository(metadata).map(|id| vec![id]));
        let known = known.or_else(|| Some(of_card("base_model")).filter(|found| !found.is_empty()));
        let known = known.or_else(|| repository(&text("general.base_model.0.repo_url")?).map(|id| vec![id]));
        let guessed = known.is_none();
        let front = FrontMatter {
            base_model: known.unwrap_or_else(|| vec![as_repository(name)]),
            quantized_by: said.quantized_by.clone().unwrap_or_else(|| "lwq".to_owned()),
            license: one("license", "general.license"),
            license_name: one("license_name", "general.license.name"),
            license_link: one("license_link", "general.license.link"),
            language: either("language", "general.languages"),
            pipeline_tag,
            tags: all,
        };
        (front, guessed)
    }
}

/// Values that can stand in a header: on one line, and not endless.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= 400 && !text.chars().any(char::is_control)
}

fn read_card(folder: &Path) -> Vec<(String, Vec<String>)> {
    let path = folder.join("README.md");
    match std::fs::metadata(&path) {
        Ok(found) if found.is_file() && found.len() <= MAX_CARD => {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
            front_matter(text.trim_start_matches('\u{feff}'))
        }
        _ => Vec::new(),
    }
}

/// The repository that the file says it is of.
fn own_repository(metadata: &Metadata) -> Option<String> {
    let keys = ["general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"];
    keys.iter().find_map(|key| repository(metadata.str(key).ok().flatten()?))
}

/// `ORG/NAME` in an address of the Hub, or by itself.
fn repository(text: &str) -> Option<String> {
    let id = ["https://huggingface.co/", "http://huggingface.co/", "https://hf.co/"]
        .iter()
        .find_map(|start| text.strip_prefix(start))
        .unwrap_or(text)
        .trim_end_matches('/');
    let id: Vec<&str> = id.splitn(3, '/').take(2).collect();
    Some(id.join("/")).filter(|id| is_repository(id) && id.contains('/'))
}

/// A name with everything that the Hub refuses replaced.
fn as_repository(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' };
    let id: String = name.chars().map(plain).take(96).collect();
    let id = id.trim_matches(['-', '.']).to_owned();
    if id.is_empty() { "model".to_owned() } else { id }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Array;

    #[test]
    fn the_card_of_the_source_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let card = "---\r\nlicense: other\r\nlicense_name: house\r\nlanguage:\r\n- en\r\n- \"no\"\r\ntags: [chat, text-generation]\r\n\
                    base_model: org/base\r\npipeline_tag: text-generation\r\n---\r\n# x\r\n";
        std::fs::write(folder.path().join("README.md"), card).unwrap();
        let mut metadata = Metadata::new("m");
        metadata.set("general.license", "mit");
        let (front, guessed) = FrontMatter::new(folder.path(), &metadata, "x", &Said::default(), &["gguf"]);
        assert!(!guessed);
        assert_eq!(front.base_model, ["org/base"]);
        assert_eq!((front.license.as_deref(), front.license_name.as_deref()), (Some("other"), Some("house")));
        assert_eq!((front.language, front.tags), (vec!["en".into(), "no".into()], vec!["chat".into(), "gguf".into()]));
        let said = Said { base_model: Some("me/it".into()), quantized_by: Some("me".into()) };
        let (front, _) = FrontMatter::new(folder.path(), &metadata, "x", &said, &[]);
        assert_eq!((&front.base_model[0][..], &front.quantized_by[..]), ("me/it", "me"));
    }

    #[test]
    fn a_gguf_tells_by_its_general_keys() {
        let mut metadata = Metadata::new("m");
        metadata.set("general.license", "mit");
        metadata.set("general.tags", Array::of_strings(["code", "text-generation"]));
        metadata.set("general.languages", Array::of_strings(["en"]));
        let of = |metadata: &Metadata| FrontMatter::new("m.gguf".as_ref(), metadata, "My model", &Said::default(), &[]);
        let (front, guessed) = of(&metadata);
        assert!(guessed && front.base_model == ["My-model"]);
        assert_eq!(
            (front.license.as_deref(), &front.language[..], &front.tags[..]),
            (Some("mit"), &["en".to_owned()][..], &["code".to_owned()][..])
        );
        metadata.set("general.base_model.0.repo_url", "https://huggingface.co/org/older");
        assert_eq!(of(&metadata).0.base_model, ["org/older"]);
        metadata.set("general.source.repo_url", "https://huggingface.co/org/it/tree/main");
        assert_eq!(of(&metadata).0.base_model, ["org/it"]);
    }
}
