//! Names of tensors: what each class calls them, as in transformers' plain text model.

/// Names without the part that says that a text model is one of several, and with the one that says that it has a head.
pub(super) fn plain(name: String, _layers: u64) -> String {
    let name = name.replace("language_model.", "");
    let bare = ["layers.", "embed_tokens.", "norm."].iter().any(|start| name.starts_with(start));
    if bare { format!("model.{name}") } else { name }
}

/// ERNIE's older names.
pub(super) fn ernie(name: String, layers: u64) -> String {
    plain(name.replace("ernie.", "model."), layers)
}

/// InternLM2's ends.
pub(super) fn internlm2(name: String, layers: u64) -> String {
    match name.as_str() {
        "model.tok_embeddings.weight" => "model.embed_tokens.weight".to_owned(),
        "output.weight" => "lm_head.weight".to_owned(),
        _ => plain(name, layers),
    }
}

/// Bailing's embedding.
pub(super) fn bailing(name: String, layers: u64) -> String {
    plain(name.replace("word_embeddings.", "embed_tokens."), layers)
}

/// Names inside the block of further tokens, as other models have them.
const NEXTN: [(&str, &str); 4] = [
    ("fc.", "eh_proj."),
    ("pre_fc_norm_embedding.", "enorm."),
    ("pre_fc_norm_hidden.", "hnorm."),
    ("norm.", "shared_head.norm."),
];

/// Blocks of further tokens that are numbered by themselves, under `mtp.`.
pub(super) fn mtp(name: String, layers: u64) -> String {
    let short = name.strip_prefix("model.").unwrap_or(&name);
    let Some(rest) = short.strip_prefix("mtp.") else { return plain(name, layers) };
    if let Some((number, rest)) = rest.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) {
        return match number.parse::<u64>() {
            Ok(number) => format!("model.layers.{}.{rest}", layers.saturating_add(number)),
            Err(_) => name,
        };
    }
    let renamed = NEXTN.iter().find_map(|(from, to)| Some(format!("{to}{}", rest.strip_prefix(from)?)));
    renamed.map_or(name, |rest| format!("model.layers.{layers}.{rest}"))
}

/// Step 3.5's blocks of further tokens, which are numbered on, with names of their own for the head.
pub(super) fn step(name: String, layers: u64) -> String {
    let name = plain(name, layers);
    name.replace(".transformer.shared_head.", ".shared_head.").replace(".shared_head.output.", ".shared_head.head.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_further_tokens_follow_the_layers() {
        for (name, plain) in [
            ("mtp.layers.0.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"),
            ("model.mtp.layers.2.input_layernorm.weight", "model.layers.6.input_layernorm.weight"),
            ("mtp.fc.weight", "model.layers.4.eh_proj.weight"),
            ("mtp.pre_fc_norm_hidden.weight", "model.layers.4.hnorm.weight"),
            ("mtp.norm.weight", "model.layers.4.shared_head.norm.weight"),
            ("mtp.other.weight", "mtp.other.weight"),
            ("mtp.layers.x.mlp", "mtp.layers.x.mlp"),
            ("model.language_model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ] {
            assert_eq!(mtp(name.to_owned(), 4), plain);
        }
        let huge = format!("mtp.layers.{}.x", u64::MAX);
        assert!(mtp(huge, 4).ends_with(".x"));
    }
}
