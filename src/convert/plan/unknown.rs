//! Tensors that the architecture does not have: what they are, and what the folder is by them.

use super::Planner;
use crate::convert::ConvertError;
use crate::convert::weights::source_of;
use crate::gguf::shown;

/// Names that are listed before a count stands for the others.
const LISTED: usize = 6;

/// Parts of names, and what a folder is whose tensors have them. The first that is found counts.
const SIGNS: &[(&[&str], &str)] = &[
    (&[".lora_A", ".lora_B", "base_model.model."], "matrices of a LoRA adapter; merge it into its base model first"),
    (&[".qweight", ".qzeros"], "GPTQ or AWQ codes; {source}"),
    (&[".absmax", ".quant_map", ".quant_state.", ".SCB", "_format"], "bitsandbytes codes; {source}"),
    (&[".switch_mlp.", ".biases"], "MLX names and layout; convert the Hugging Face model that it was made from"),
    (
        &["tok_embeddings.", ".attention.wq.", ".feed_forward.w1."],
        "the publisher's own names; take the files that transformers reads",
    ),
    (&["transformer.h.", "gpt_neox.", "decoder.layers."], "names of an architecture that config.json does not name"),
    (&[".pre_quant_scale"], "weights whose inputs are rescaled (AWQ); {source}"),
    (&["_scale", ".scales", ".zeros"], "scales of a quantization that is not known; {source}"),
    (
        &["visual.", "vision_", "audio_"],
        "of an image or sound part that config.json does not mention; use the model's own config.json",
    ),
    (
        &["mtp.", ".nextn.", ".eh_proj"],
        "blocks that predict further tokens, which config.json or this class does not have; remove them",
    ),
    (
        &[".experts.", ".block_sparse_moe."],
        "experts under names that this class does not have; save the model with its own transformers class",
    ),
];

impl Planner<'_> {
    /// Passes `made` on, unless there are tensors that do not belong to the architecture: these come first, since a tensor
    /// that is missing or has another shape is often explained by them.
    pub(super) fn refuse_unknown(&self, made: Result<(), ConvertError>) -> Result<(), ConvertError> {
        if let Err(error) = &made
            && !matches!(error, ConvertError::Missing { .. } | ConvertError::Tensor { .. })
        {
            return made;
        }
        let mut unknown: Vec<usize> = match made {
            Ok(()) => (0..self.used.len()).filter(|index| !self.used[*index]).collect(),
            Err(_) => self.names.iter().filter(|(name, _)| !self.belongs(name)).map(|(_, index)| *index).collect(),
        };
        unknown.sort_unstable();
        if unknown.is_empty() {
            return made;
        }
        let name = |index: &usize| self.plan.weights[*index].name.as_str();
        let listed: Vec<String> = unknown.iter().take(LISTED).map(|index| shown(name(index).as_bytes())).collect();
        let more = unknown.len().saturating_sub(LISTED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let lacks = match &made {
            Err(ConvertError::Missing { tensor, .. }) => format!("; {tensor} is missing"),
            Err(ConvertError::Tensor { tensor, problem, .. }) => format!("; {tensor} {problem}"),
            _ => String::new(),
        };
        let sign = SIGNS
            .iter()
            .find(|(parts, _)| unknown.iter().any(|index| parts.iter().any(|part| name(index).contains(part))));
        let advice = match sign {
            Some((_, meaning)) => {
                format!("these are {}", meaning.replace("{source}", &source_of(self.folder)))
            }
            None => "the weights do not belong to config.json".to_owned(),
        };
        Err(ConvertError::Unknown {
            path: self.folder.path().to_path_buf(),
            tensors: format!("{}{more}", listed.join(", ")),
            plural: unknown.len() != 1,
            class: self.config.architecture().to_owned(),
            layers: self.sizes.layers,
            advice: format!("{advice}{lacks}"),
        })
    }

    /// True if the architecture can have a tensor of this plain name, whatever its shape.
    fn belongs(&self, name: &str) -> bool {
        if ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"].contains(&name) {
            return true;
        }
        let mut ends = self.row.ends.iter().flat_map(|group| group.roles);
        if let Some(rest) = name.strip_prefix("model.")
            && ends.any(|role| rest.strip_suffix(role.stored) == Some(role.source))
        {
            return true;
        }
        let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else {
            return false;
        };
        if layer.parse::<u64>().is_ok_and(|layer| layer < self.sizes.blocks.len() as u64) {
            let plain = rest.strip_suffix(".weight").unwrap_or(rest);
            let is_role = self.row.roles().any(|role| {
                let bias = || role.bias && rest.strip_suffix(".bias") == Some(role.source);
                rest.strip_suffix(role.stored) == Some(role.source) || bias()
            });
            is_role
                || self.row.experts.is_some_and(|names| {
                    let numbered = || {
                        let (expert, rest) = rest.strip_prefix(names.prefix)?.split_once('.')?;
                        let part = rest.strip_suffix(".weight")?;
                        Some(expert.parse::<u64>().ok()? < self.sizes.experts && names.gate_up_down.contains(&part))
                    };
                    let switched = plain.strip_prefix(names.switched);
                    if switched.is_some_and(|part| ["gate_proj", "up_proj", "down_proj"].contains(&part)) {
                        return true;
                    }
                    let stacked = names.stacked.contains(&plain.strip_suffix("_bias").unwrap_or(plain));
                    stacked || (!names.interleaved && numbered().unwrap_or(false))
                })
        } else {
            false
        }
    }
}
