//! The commands that make the files of a repository again, one after the other, in a folder with the source.

use super::Request;
use super::draft::{Goal, file_of};
use super::source::Opened;
use crate::hub::repository_of;
use crate::moments::{CalibrationOptions, Damping};
use crate::rounding::RoundingMethod;
use crate::text::Text;

/// Names in commands.
pub(super) struct Commands<'a> {
    request: &'a Request,
    opened: &'a Opened,
}

impl<'a> Commands<'a> {
    pub(super) fn new(request: &'a Request, opened: &'a Opened) -> Commands<'a> {
        Commands { request, opened }
    }

    fn imatrix(&self) -> String {
        quoted(&format!("{}.imatrix.gguf", self.opened.name))
    }

    fn measurement(&self) -> String {
        quoted(&format!("{}.sens.json", self.opened.name))
    }

    fn base(&self) -> String {
        quoted(&self.opened.base_file)
    }

    /// The source folder; of a snapshot in the hub's cache the model's name.
    fn folder(&self) -> String {
        let path = self.opened.source.path();
        quoted(&repository_of(path).unwrap_or_else(|| super::source::file_name(path)))
    }

    /// What comes before all files of models.
    pub(super) fn before(&self, plans: bool) -> Vec<String> {
        let mut lines = Vec::new();
        if self.opened.source.is_folder() {
            lines.push(format!("lwq convert {} -o {}", self.folder(), self.base()));
        }
        if !plans {
            return lines;
        }
        let importance = &self.request.importance;
        if importance.file.is_none() {
            let mut line = format!("lwq imatrix {}{}", self.base(), files("-f", &self.request.calibration.text));
            if let Some(ctx) = importance.ctx {
                line.push_str(&format!(" --ctx {ctx}"));
            }
            if let Some(chunks) = importance.chunks {
                line.push_str(&format!(" --chunks {chunks}"));
            }
            if importance.accurate {
                line.push_str(" --accurate");
            }
            if self.request.calibration.all_experts {
                line.push_str(" --all-experts");
            }
            lines.push(format!("{line} -o {}", self.imatrix()));
        }
        if self.request.measured_on.is_none() {
            let mut line = format!("lwq measure {} --imatrix {}", self.base(), self.imatrix());
            if let Some(text) = &self.request.probes.text {
                line.push_str(&files("-f", text));
            }
            if let Some(tokens) = self.request.probes.tokens {
                line.push_str(&format!(" --probe-tokens {tokens}"));
            }
            lines.push(format!("{line} -o {}", self.measurement()));
        }
        lines
    }

    /// A planned file of so many bytes.
    pub(super) fn planned(&self, goal: &Goal, bytes: u64) -> Vec<String> {
        let plan = quoted(&format!("{}-{}.plan.json", self.opened.name, goal.label));
        let file = quoted(&file_of(&self.opened.name, &goal.label));
        let (base, imatrix) = (self.base(), self.imatrix());
        let sensitivity = self.measurement();
        let (rounding, text) = self.rounding("--calibration");
        let (_, of_file) = self.rounding("-f");
        vec![
            format!(
                "lwq plan {base} --imatrix {imatrix} --sensitivity {sensitivity} --target-size {bytes}{rounding}{text} -o {plan}"
            ),
            format!("lwq quantize {base} {file} --imatrix {imatrix} --plan {plan}{rounding}{of_file}"),
        ]
    }

    /// The standard file of a target.
    pub(super) fn standard(&self, goal: &Goal) -> Vec<String> {
        let file = quoted(&file_of(&self.opened.name, &goal.label));
        vec![format!("lwq quantize {} {file} --imatrix {} --target {}", self.base(), self.imatrix(), goal.label)]
    }

    /// A folder of compressed-tensors.
    pub(super) fn export(&self, scheme: &str) -> Vec<String> {
        let folder = self.folder();
        let output = quoted(&format!("{}-{scheme}", self.opened.name));
        let text = format!("{}{}", files("-f", &self.request.calibration.text), calibration(&self.request.calibration));
        vec![format!("lwq export {folder} {output} --scheme {scheme}{text}")]
    }

    /// The flags of rounding; `text_flag` is what names the calibration text.
    fn rounding(&self, text_flag: &str) -> (String, String) {
        let method = self.request.rounding;
        match method {
            RoundingMethod::Ggml => (String::new(), String::new()),
            RoundingMethod::Search => (format!(" --rounding {method}"), String::new()),
            RoundingMethod::Feedback => (
                format!(" --rounding {method}{}", calibration(&self.request.calibration)),
                files(text_flag, &self.request.calibration.text),
            ),
        }
    }
}

/// Settings of feedback that are not the usual ones.
fn calibration(options: &CalibrationOptions) -> String {
    let usual = CalibrationOptions::default();
    let mut text = files("--gate-file", &options.gate);
    if let Damping::Given(damping) = options.damping {
        text.push_str(&format!(" --damping {damping}"));
    }
    if options.tokens != usual.tokens {
        text.push_str(&format!(" --calibration-tokens {}", options.tokens));
    }
    if let Some(ctx) = options.ctx {
        text.push_str(&format!(" --calibration-ctx {ctx}"));
    }
    if options.fast {
        text.push_str(" --fast");
    }
    if options.all_experts {
        text.push_str(" --all-experts");
    }
    if options.moment_memory != usual.moment_memory {
        text.push_str(&format!(" --moment-memory {}", options.moment_memory));
    }
    text
}

/// A flag for each file of a text; none for a built-in one.
fn files(flag: &str, text: &Text) -> String {
    if text.is_built_in() {
        return String::new();
    }
    text.documents().map(|(name, _)| format!(" {flag} {}", quoted(name))).collect()
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '=' | ',' | '+' | ':' | '@' | '%');
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_safe_for_a_shell() {
        assert_eq!(quoted("a-b_c.gguf"), "a-b_c.gguf");
        assert_eq!(quoted("my model"), "'my model'");
        assert_eq!(quoted("it's; rm -rf"), "'it'\\''s; rm -rf'");
    }
}
