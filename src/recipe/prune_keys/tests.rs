use super::*;

/// Metadata of a model `m` with these layers and keys.
fn metadata(layers: u32, entries: &[(&str, Value)]) -> Metadata {
    let mut metadata = Metadata::new("test");
    metadata.set("general.architecture", "m");
    metadata.set("m.block_count", layers);
    for (key, value) in entries {
        metadata.set(key, value.clone());
    }
    metadata
}

fn plan(stack: &str, layers: u32, removed: &[u32]) -> PrunePlan {
    let names: Vec<String> = (0..layers).map(|layer| format!("{stack}blk.{layer}.ffn_up.weight")).collect();
    PrunePlan::new(names.iter().map(String::as_str), removed).unwrap()
}

fn list(elem: ValueType, numbers: &[i128]) -> Value {
    let values: Vec<Value> = numbers.iter().map(|number| Value::integer(elem, *number).unwrap()).collect();
    Value::Array(Array::of_values(elem, &values))
}

fn flags(flags: &[bool]) -> Value {
    let values: Vec<Value> = flags.iter().map(|flag| Value::Bool(*flag)).collect();
    Value::Array(Array::of_values(ValueType::Bool, &values))
}

fn floats(numbers: &[f32]) -> Value {
    let values: Vec<Value> = numbers.iter().map(|number| Value::F32(*number)).collect();
    Value::Array(Array::of_values(ValueType::F32, &values))
}

#[test]
fn lists_per_layer_lose_the_layers_and_others_of_their_length_do_not() {
    let mut metadata = metadata(
        4,
        &[
            ("m.attention.head_count_kv", list(ValueType::I32, &[2, 0, 3, 0])),
            ("m.feed_forward_length", list(ValueType::U32, &[1, 2, 3, 4])),
            ("m.attention.sliding_window_pattern", flags(&[true, false, true, false])),
            ("m.swiglu_clamp_exp", floats(&[1.0, 2.0, 3.0, 4.0])),
            ("xielu.alpha_n", floats(&[1.0, 2.0, 3.0, 4.0])),
            ("m.attention.compress_ratios", list(ValueType::U32, &[1, 2, 3, 4, 9])),
            ("m.rope.dimension_sections", list(ValueType::I32, &[16, 24, 24, 0])),
            ("m.classifier.output_labels", Array::of_strings(["a", "b", "c", "d"]).into()),
            ("m.target_layers", list(ValueType::U32, &[1, 2, 3, 4])),
            ("m.new_list", list(ValueType::U32, &[1, 2, 3, 4])),
            ("general.tags", Array::of_strings(["a", "b", "c", "d"]).into()),
            ("tokenizer.ggml.eos_token_ids", list(ValueType::U32, &[0, 1, 2, 3])),
            ("m.attention.head_count", Value::U32(4)),
        ],
    );
    let before = metadata.clone();
    let notes = rewrite(&plan("", 4, &[1]), "m", &mut metadata);
    let get = |key: &str| metadata.get(key).unwrap().clone();
    assert_eq!(get("m.block_count"), Value::U32(3));
    assert_eq!(get("m.attention.head_count_kv"), list(ValueType::I32, &[2, 3, 0]));
    assert_eq!(get("m.feed_forward_length"), list(ValueType::U32, &[1, 3, 4]));
    assert_eq!(get("m.attention.sliding_window_pattern"), flags(&[true, true, false]));
    assert_eq!(get("m.swiglu_clamp_exp"), floats(&[1.0, 3.0, 4.0]));
    assert_eq!(get("xielu.alpha_n"), floats(&[1.0, 3.0, 4.0]));
    assert_eq!(
        get("m.attention.compress_ratios"),
        list(ValueType::U32, &[1, 3, 4, 9]),
        "values behind the layers stay"
    );
    for key in [
        "m.rope.dimension_sections",
        "m.classifier.output_labels",
        "m.target_layers",
        "m.new_list",
        "general.tags",
        "tokenizer.ggml.eos_token_ids",
        "m.attention.head_count",
    ] {
        assert_eq!(metadata.get(key), before.get(key), "{key}");
    }
    assert_eq!(notes, [Note::UnknownList { key: "\"m.new_list\"".to_owned(), values: 4 }]);
}

#[test]
fn a_list_that_is_too_short_is_left_and_named() {
    let short = list(ValueType::U32, &[1, 2, 3]);
    let mut of_layers = metadata(5, &[("m.attention.head_count", short.clone())]);
    let notes = rewrite(&plan("", 5, &[1]), "m", &mut of_layers);
    assert_eq!(of_layers.get("m.attention.head_count"), Some(&short));
    assert!(notes[0].to_string().contains("m.attention.head_count"), "{notes:?}");
    // Layers for multi-token prediction may have no value.
    let mut with_nextn = metadata(4, &[("m.attention.head_count", short), ("m.nextn_predict_layers", Value::U32(1))]);
    assert_eq!(rewrite(&plan("", 4, &[1]), "m", &mut with_nextn), []);
    assert_eq!(with_nextn.get("m.attention.head_count"), Some(&list(ValueType::U32, &[1, 3])));
}

#[test]
fn counts_of_first_and_last_layers_lose_theirs() {
    for (removed, dense, nextn, shared) in [
        (&[0][..], 2, 2, 3),
        (&[3], 3, 2, 3),
        (&[8], 3, 1, 2),
        (&[0, 1, 9], 1, 1, 2),
        (&[8, 9], 3, 0, 1),
        (&[7], 3, 2, 2),
    ] {
        let mut metadata = metadata(
            10,
            &[
                ("m.leading_dense_block_count", Value::U32(3)),
                ("m.nextn_predict_layers", Value::U64(2)),
                ("m.attention.shared_kv_layers", Value::I32(3)),
            ],
        );
        rewrite(&plan("", 10, removed), "m", &mut metadata);
        assert_eq!(metadata.get("m.leading_dense_block_count"), Some(&Value::U32(dense)), "{removed:?}");
        assert_eq!(metadata.get("m.nextn_predict_layers"), Some(&Value::U64(nextn)), "{removed:?}");
        assert_eq!(metadata.get("m.attention.shared_kv_layers"), Some(&Value::I32(shared)), "{removed:?}");
    }
    let mut shared = metadata(10, &[("m.attention.shared_kv_layers", Value::U32(3))]);
    let notes = rewrite(&plan("", 10, &[6]), "m", &mut shared);
    assert!(notes.iter().any(|note| matches!(note, Note::SharedSourceRemoved { layer: 6, .. })), "{notes:?}");
}

#[test]
fn numbers_of_layers_follow_the_renumbering() {
    let key = "m.attention.cross_attention_layers";
    let mut of_layers = metadata(8, &[(key, list(ValueType::I32, &[-1, 0, 3, 4, 7]))]);
    rewrite(&plan("", 8, &[0, 3]), "m", &mut of_layers);
    assert_eq!(of_layers.get(key), Some(&list(ValueType::I32, &[-1, 2, 5])));
    let mut of_layers = metadata(8, &[(key, list(ValueType::U32, &[3]))]);
    let notes = rewrite(&plan("", 8, &[3]), "m", &mut of_layers);
    assert_eq!(notes, [Note::NoLayerLeft { key: format!("\"{key}\"") }]);
}

#[test]
fn periods_warn_only_where_they_break() {
    let broken = |key: &str, period: u32, removed: &[u32]| {
        let mut metadata = metadata(12, &[(key, Value::U32(period))]);
        let notes = rewrite(&plan("", 12, removed), "m", &mut metadata);
        assert_eq!(metadata.get(key), Some(&Value::U32(period)));
        notes.iter().any(|note| matches!(note, Note::PeriodBroken { .. }))
    };
    for key in ["m.full_attention_interval", "m.attention.sliding_window_pattern", "m.interleave_moe_layer_step"] {
        assert!(broken(key, 4, &[1]), "{key}");
        assert!(!broken(key, 4, &[4, 5, 6, 7]), "{key}: a whole period goes");
        assert!(!broken(key, 4, &[3, 4, 5, 6]), "{key}: three of one kind and one of the other");
        assert!(!broken(key, 1, &[1]) && !broken(key, 0, &[1]), "{key}");
    }
    assert!(broken("m.rescale_every_n_layers", 6, &[0]) && !broken("m.rescale_every_n_layers", 6, &[11]));
    let mut one_by_one = metadata(
        4,
        &[
            ("m.full_attention_interval", Value::U32(2)),
            ("m.attention.recurrent_layers", flags(&[true, false, true, false])),
        ],
    );
    assert_eq!(rewrite(&plan("", 4, &[0]), "m", &mut one_by_one), []);
    assert_eq!(one_by_one.get("m.attention.recurrent_layers"), Some(&flags(&[false, true, false])));
}

#[test]
fn an_architecture_keeps_its_own_period_too() {
    let mut metadata = Metadata::new("test");
    metadata.set("gemma2.block_count", 4u32);
    let notes = rewrite(&plan("", 4, &[1]), "gemma2", &mut metadata);
    assert!(notes[0].to_string().contains("gemma2.attention.sliding_window_pattern"), "{notes:?}");
    metadata.set("gemma2.block_count", 4u32);
    assert_eq!(rewrite(&plan("", 4, &[1, 2]), "gemma2", &mut metadata), []);
    let mut metadata = Metadata::new("test");
    metadata.set("exaone4.block_count", 8u32);
    assert_eq!(rewrite(&plan("", 8, &[1]), "exaone4", &mut metadata), [], "no window, no pattern");
}

#[test]
fn each_stack_has_its_own_count() {
    let names = ["enc.blk.0.a", "enc.blk.1.a", "enc.blk.2.a", "dec.blk.0.a", "dec.blk.1.a"];
    let mut t5 = metadata(3, &[("m.decoder_block_count", Value::U32(2))]);
    rewrite(&PrunePlan::new(names, &[2]).unwrap(), "m", &mut t5);
    assert_eq!((t5.u32("m.block_count").unwrap(), t5.u32("m.decoder_block_count").unwrap()), (Some(2), Some(2)));
    let mut t5 = metadata(3, &[("m.decoder_block_count", Value::U32(2))]);
    rewrite(&PrunePlan::new(names, &[1]).unwrap(), "m", &mut t5);
    assert_eq!((t5.u32("m.block_count").unwrap(), t5.u32("m.decoder_block_count").unwrap()), (Some(2), Some(1)));

    let mut clip = Metadata::new("test");
    clip.set("clip.vision.block_count", 4u32);
    clip.set("clip.vision.feature_layer", list(ValueType::I32, &[1, 4]));
    clip.set("clip.vision.wa_layer_indexes", list(ValueType::I32, &[1, 3]));
    clip.set("clip.vision.is_deepstack_layers", flags(&[false, true, true, false]));
    clip.set("clip.vision.image_mean", floats(&[0.5; 4]));
    let notes = rewrite(&plan("v.", 4, &[1]), "clip", &mut clip);
    assert_eq!(clip.u32("clip.vision.block_count").unwrap(), Some(3));
    assert_eq!(clip.get("clip.vision.feature_layer"), Some(&list(ValueType::I32, &[1, 3])));
    assert_eq!(clip.get("clip.vision.wa_layer_indexes"), Some(&list(ValueType::I32, &[2])));
    assert_eq!(clip.get("clip.vision.is_deepstack_layers"), Some(&flags(&[false, true, false])));
    assert_eq!(clip.get("clip.vision.image_mean"), Some(&floats(&[0.5; 4])));
    assert!(!clip.contains("clip.block_count"));
    assert_eq!(notes, []);
}

#[test]
fn counts_that_a_file_makes_up_cost_nothing() {
    let mut hostile = metadata(
        4,
        &[
            ("m.block_count", Value::U64(u64::MAX)),
            ("m.leading_dense_block_count", Value::U64(u64::MAX)),
            ("m.nextn_predict_layers", Value::I64(-1)),
            ("m.full_attention_interval", Value::U64(3)),
            ("m.attention.head_count", list(ValueType::I8, &[1, 2, 3, 4])),
        ],
    );
    rewrite(&plan("", 4, &[1]), "m", &mut hostile);
    assert_eq!(hostile.get("m.block_count"), Some(&Value::U64(u64::MAX - 1)));
}

#[test]
fn tensors_of_all_layers_are_refused() {
    let error = PrunePlan::new(["blk.0.a", "blk.1.a", "per_layer_token_embd.weight"], &[1]).unwrap_err();
    assert!(error.to_string().contains("per_layer_token_embd.weight"), "{error}");
}
