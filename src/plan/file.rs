//! `plan.json`: reading, checking, writing.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::PlanError;
use crate::display::six_digits;
use crate::gguf::{TensorType, shown};
use crate::measure::SourceFile;
use crate::rounding::RoundingRecord;
use crate::text::utf8;

/// The version of the form that this program writes, and the only one it reads.
pub const PLAN_VERSION: u32 = 1;

/// Larger files are not read: a hundred times the plan of the largest model.
const MAX_BYTES: u64 = 64 << 20;

/// How the damage of each choice was predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DamageMethod {
    /// From rounding errors and what is usual for tensors of their role; nothing was run.
    Error,
    /// From rounding errors and the divergence measured when this tensor alone was rounded.
    Measured,
}

impl DamageMethod {
    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            DamageMethod::Error => "error",
            DamageMethod::Measured => "measured",
        }
    }
}

impl fmt::Display for DamageMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text on which probes were run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedText {
    /// Its name.
    pub name: String,
    /// SHA-256 of its tokens.
    pub sha256: String,
    /// How many tokens were used.
    pub tokens: u64,
}

/// A tensor's row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRow {
    /// The tensor's name.
    pub tensor: String,
    /// Its type.
    #[serde(rename = "type", serialize_with = "type_name", deserialize_with = "type_of_name")]
    pub ty: TensorType,
    /// Bytes of its data without padding.
    pub bytes: u64,
    /// What rounding it to this type is predicted to add to the divergence, in nats per token.
    pub damage: f64,
}

/// A plan. Numbers that are not bytes are rounded to six digits, so that the text stays readable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// [`PLAN_VERSION`]; first, so that a reader knows what follows.
    pub lwq_plan: u32,
    /// The program's version.
    pub lwq_version: String,
    /// What was asked for, in words.
    pub target: String,
    /// The byte limit of the whole file; absent where the request was another one.
    pub target_bytes: Option<u64>,
    /// Bytes of the whole file, written as a single one.
    pub file_bytes: u64,
    /// Bytes of all tensors' data, those included that keep their type.
    pub tensor_bytes: u64,
    /// Weights in all tensors.
    pub parameters: u64,
    /// Tensor data per weight.
    pub bits_per_weight: f64,
    /// Where the damage comes from.
    pub method: DamageMethod,
    /// Sum of the damage, plus what is there without any rounding: mean KL divergence in nats per token.
    pub predicted_kld: f64,
    /// Standard error of the prediction, as far as the measurement knows it.
    pub predicted_kld_error: Option<f64>,
    /// No choice within the limit can have less damage (or, for a limit on the damage, fewer bytes).
    pub bound: f64,
    /// How far the choice is from the bound, as a part of it.
    pub gap: f64,
    /// True if with these numbers nothing better exists; false if the search was cut short, or some damage was accepted
    /// to fill the limit.
    pub optimal: bool,
    /// The model.
    pub model: SourceFile,
    /// The importance matrix, if there was one.
    pub imatrix: Option<SourceFile>,
    /// The text that probes were run on.
    pub text: Option<PlannedText>,
    /// How the file is to be rounded; absent where nobody asked for anything else than ggml's rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounding: Option<RoundingRecord>,
    /// A row for each tensor whose type can be chosen, in the order of the written file. All other tensors keep theirs.
    pub tensors: Vec<PlanRow>,
}

fn type_name<S: Serializer>(ty: &TensorType, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(ty)
}

fn type_of_name<'de, D: Deserializer<'de>>(input: D) -> Result<TensorType, D::Error> {
    let name = String::deserialize(input)?;
    crate::recipe::parse_storable_type(&name, "type").map_err(serde::de::Error::custom)
}

impl PlanFile {
    /// The plan as it is written: JSON, a line for each field and for each tensor.
    pub fn to_text(&self) -> String {
        let mut plan = self.clone();
        let numbers = [&mut plan.bits_per_weight, &mut plan.predicted_kld, &mut plan.bound, &mut plan.gap];
        numbers.into_iter().for_each(|number| *number = six_digits(*number));
        plan.predicted_kld_error = plan.predicted_kld_error.map(six_digits);
        let rows = std::mem::take(&mut plan.tensors);
        let Ok(serde_json::Value::Object(head)) = serde_json::to_value(&plan) else { return String::new() };
        let mut text = String::from("{\n");
        for (key, value) in head.iter().filter(|(key, _)| *key != "tensors") {
            text.push_str(&format!("  {}: {value},\n", serde_json::Value::from(key.as_str())));
        }
        text.push_str("  \"tensors\": [\n");
        let lines = rows.into_iter().map(|mut row| {
            row.damage = six_digits(row.damage);
            format!("    {}", serde_json::to_string(&row).unwrap_or_default())
        });
        text.push_str(&lines.collect::<Vec<_>>().join(",\n"));
        text.push_str("\n  ]\n}\n");
        text
    }

    /// The digest of a plan's text, in hexadecimal: what `sha256sum plan.json` prints.
    pub fn digest(text: &str) -> String {
        format!("{:x}", Sha256::digest(text))
    }

    /// Reads and checks a file; also gives its digest.
    ///
    /// # Errors
    /// When it cannot be read or [`PlanFile::parse`] refuses it.
    pub fn read(path: &Path) -> Result<(PlanFile, String), PlanError> {
        let file = path.display().to_string();
        let read_error = |source| PlanError::Read { file: file.clone(), source };
        let input = File::open(path).map_err(read_error)?;
        let mut text = Vec::new();
        input.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(read_error)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(PlanError::TooLarge { file, bytes: text.len() as u64, limit: MAX_BYTES });
        }
        let malformed = |problem: &str| PlanError::Malformed { file: file.clone(), problem: problem.to_owned() };
        let plan = PlanFile::parse(utf8(&text).map_err(|error| malformed(&error.to_string()))?, &file)?;
        Ok((plan, format!("{:x}", Sha256::digest(&text))))
    }

    /// Parses and checks a plan; `file` names it in errors.
    ///
    /// # Errors
    /// When it is no JSON of the documented form, of another version, or lists a tensor twice.
    pub fn parse(text: &str, file: &str) -> Result<PlanFile, PlanError> {
        let malformed = |problem: String| PlanError::Malformed { file: file.to_owned(), problem };
        // The version decides what else may be in the file, so it is looked at before unknown fields are refused.
        #[derive(Deserialize)]
        struct Version {
            lwq_plan: u32,
        }
        let version: Version = serde_json::from_str(text).map_err(|e| malformed(one_line(&e)))?;
        if version.lwq_plan != PLAN_VERSION {
            return Err(malformed(format!("lwq_plan is {}, this program knows {PLAN_VERSION}", version.lwq_plan)));
        }
        let plan: PlanFile = serde_json::from_str(text).map_err(|e| malformed(one_line(&e)))?;
        plan.check(file)?;
        Ok(plan)
    }

    fn check(&self, file: &str) -> Result<(), PlanError> {
        let malformed = |problem: String| PlanError::Malformed { file: file.to_owned(), problem };
        if self.tensors.is_empty() {
            return Err(malformed("tensors is empty".to_owned()));
        }
        let sources = [Some(("model", &self.model)), self.imatrix.as_ref().map(|imatrix| ("imatrix", imatrix))];
        for (key, source) in sources.into_iter().flatten() {
            if source.sha256.len() != 64 || !source.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(malformed(format!("{key}.sha256 is not 64 hexadecimal digits")));
            }
        }
        let numbers = [
            ("bits_per_weight", self.bits_per_weight),
            ("predicted_kld", self.predicted_kld),
            ("bound", self.bound),
            ("gap", self.gap),
        ];
        if let Some((key, value)) = numbers.iter().find(|(_, value)| !is_amount(*value)) {
            return Err(malformed(format!("{key} is {value}, expected a number that is not negative")));
        }
        let mut seen = HashSet::new();
        for row in &self.tensors {
            let wrong = |problem: String| {
                let tensor = shown(row.tensor.as_bytes());
                Err(PlanError::Row { file: file.to_owned(), tensor, problem })
            };
            if !seen.insert(row.tensor.as_str()) {
                return wrong("is listed twice".to_owned());
            }
            if !is_amount(row.damage) {
                return wrong(format!("damage is {}, expected a number that is not negative", row.damage));
            }
        }
        Ok(())
    }
}

fn is_amount(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

/// What serde says, on one line; values of the file that it quotes may hold anything.
fn one_line(error: &serde_json::Error) -> String {
    const SHOWN: usize = 300;
    let text = error.to_string();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sound plan of two tensors.
    pub(crate) fn example() -> PlanFile {
        let row = |tensor: &str, ty, bytes, damage| PlanRow { tensor: tensor.to_owned(), ty, bytes, damage };
        PlanFile {
            lwq_plan: PLAN_VERSION,
            lwq_version: "0.1.0".to_owned(),
            target: "size 4.18GB".to_owned(),
            target_bytes: Some(1000),
            file_bytes: 990,
            tensor_bytes: 800,
            parameters: 2000,
            bits_per_weight: 3.2,
            method: DamageMethod::Error,
            predicted_kld: 0.0125,
            predicted_kld_error: None,
            bound: 0.0124,
            gap: 0.008,
            optimal: true,
            model: SourceFile { name: "m.gguf".to_owned(), sha256: "0".repeat(64) },
            imatrix: Some(SourceFile { name: "i \"quoted\".gguf".to_owned(), sha256: "a".repeat(64) }),
            text: None,
            rounding: None,
            tensors: vec![
                row("token_embd.weight", TensorType::Q6_K, 420, 0.0025),
                row("blk.0.attn_q.weight", TensorType::IQ3_S, 220, 0.01),
            ],
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let plan = example();
        let text = plan.to_text();
        assert_eq!(PlanFile::parse(&text, "p").unwrap(), plan);
        let line = r#"    {"tensor":"blk.0.attn_q.weight","type":"iq3_s","bytes":220,"damage":0.01}"#;
        assert!(text.lines().any(|found| found == line), "{text}");
        assert!(text.lines().any(|found| found == r#"  "target_bytes": 1000,"#), "{text}");
        let without = PlanFile { imatrix: None, target_bytes: None, ..plan };
        assert_eq!(PlanFile::parse(&without.to_text(), "p").unwrap(), without);
    }

    #[test]
    fn a_bad_file_gives_one_line_that_says_what_is_wrong() {
        let text = example().to_text();
        let cases: &[(String, &str)] = &[
            (String::new(), "EOF"),
            ("[]".to_owned(), "line 1"),
            ("{}".to_owned(), "lwq_plan"),
            ("{".repeat(100_000), "line 1"),
            ("[".repeat(100_000), "line 1"),
            (text.replace("\"lwq_plan\": 1", "\"lwq_plan\": 2"), "lwq_plan is 2"),
            (text.replace("\"lwq_plan\": 1", "\"lwq_plan\": -1"), "line 2"),
            (text.replace("iq3_s", "iq9_z"), "known types"),
            (text.replace("iq3_s", "q8_K"), "known types"),
            (text.replace("\"bytes\":220", "\"bytes\":-220"), "line"),
            (text.replace("\"damage\":0.01", "\"damage\":-0.01"), "damage is -0.01"),
            (text.replace("\"damage\":0.01", "\"damage\":1e999"), "line"),
            (text.replace("\"damage\":0.01", "\"damaged\":0.01"), "damaged"),
            (text.replace("blk.0.attn_q.weight", "token_embd.weight"), "\"token_embd.weight\": is listed twice"),
            (text.replace(&"a".repeat(64), "abc"), "imatrix.sha256"),
            (text.replace("\"method\": \"error\"", "\"method\": \"guess\""), "guess"),
            (text.replace("\"gap\": 0.008", "\"gap\": \"small\""), "line"),
            (text[..text.len() / 2].to_owned(), "EOF"),
        ];
        for (text, part) in cases {
            let error = PlanFile::parse(text, "plan.json").unwrap_err().to_string();
            assert!(error.contains(part), "{error} should contain {part}");
            assert!(error.starts_with("plan.json: ") && !error.contains('\n') && error.len() < 700, "{error}");
        }
        let empty = PlanFile { tensors: Vec::new(), ..example() };
        assert!(PlanFile::parse(&empty.to_text(), "p").unwrap_err().to_string().contains("tensors is empty"));
    }

    proptest! {
        #[test]
        fn damaged_text_never_panics(at in 0_usize..1000, byte: u8, cut: bool) {
            let mut text = example().to_text().into_bytes();
            let at = at % text.len();
            if cut { text.truncate(at) } else { text[at] = byte }
            if let Ok(text) = String::from_utf8(text) {
                let _ = PlanFile::parse(&text, "p");
            }
        }
    }
}
