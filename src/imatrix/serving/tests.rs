use super::super::matching::Need;
use super::*;

fn imatrix(entries: &[(&str, &[f32], &[u64])]) -> Imatrix {
    let entry = |sums: &[f32], counts: &[u64]| Entry { sums: sums.to_vec(), counts: counts.to_vec() };
    Imatrix {
        entries: entries.iter().map(|(name, sums, counts)| ((*name).to_owned(), entry(sums, counts))).collect(),
        ..Imatrix::default()
    }
}

/// The entry that serves a tensor with rows of two weights, and the importance that it gives.
fn served(imatrix: &Imatrix, name: &str, matrices: u64) -> Option<(String, Served, Vec<f32>)> {
    let tensor = ModelTensor { name, row_len: 2, matrices, need: Need::Required };
    let (entry, how) = find(imatrix, &EntryFilter::All, &tensor, name)?;
    let values = data(imatrix, &entry, how, &tensor)?.importance().values;
    Some((entry.into_owned(), how, values))
}

#[test]
fn heads_that_see_one_input_share_its_data() {
    let rows = imatrix(&[("blk.0.attn_kv_b.weight", &[2.0, 4.0, 6.0, 0.0], &[1, 3])]);
    let pooled = |name: &str, matrices| served(&rows, name, matrices);
    let own = ("blk.0.attn_kv_b.weight".to_owned(), Served::Pooled, vec![2.0, 1.0]);
    assert_eq!(pooled("blk.0.attn_kv_b.weight", 1), Some(own), "a row for each head, one matrix");
    let values = pooled("blk.0.attn_v_b.weight", 3).unwrap();
    assert_eq!((values.1, values.2), (Served::Pooled, vec![2.0, 1.0, 2.0, 1.0, 2.0, 1.0]));
    assert_eq!(pooled("blk.0.attn_v_b.weight", 2).unwrap().2, [2.0, 4.0, 2.0, 0.0], "as many heads as rows");
    assert_eq!(pooled("blk.0.attn_k_b.weight", 2), None, "keys see the query");
    let one = imatrix(&[("blk.0.attn_v_b.weight", &[2.0, 4.0], &[2])]);
    assert_eq!(served(&one, "blk.0.attn_v_b.weight", 2).unwrap().2, [1.0, 2.0, 1.0, 2.0], "one row for all heads");
    assert_eq!(served(&one, "blk.0.attn_kv_b.weight", 1).unwrap().0, "blk.0.attn_v_b.weight");
}

#[test]
fn single_experts_and_stacks_serve_each_other() {
    let stack = imatrix(&[("blk.0.ffn_up_exps.weight", &[1.0, 2.0, 0.0, 0.0, 8.0, 4.0], &[1, 0, 4])]);
    assert_eq!(served(&stack, "blk.0.ffn_up.2.weight", 1).unwrap().2, [2.0, 1.0]);
    assert_eq!(served(&stack, "blk.0.ffn_gate.0.weight", 1).unwrap().2, [1.0, 2.0], "gate and up see one input");
    assert_eq!(served(&stack, "blk.0.ffn_up.1.weight", 1), None, "an expert that no token reached");
    assert_eq!(served(&stack, "blk.0.ffn_up.3.weight", 1), None);
    assert_eq!(served(&stack, "blk.0.ffn_down.0.weight", 1), None);
    let single = imatrix(&[("blk.0.ffn_up.0.weight", &[1.0, 2.0], &[1]), ("blk.0.ffn_up.2.weight", &[8.0, 4.0], &[4])]);
    let (_, how, values) = served(&single, "blk.0.ffn_up_exps.weight", 3).unwrap();
    assert_eq!((how, values), (Served::Experts, vec![1.0, 2.0, 1.0, 1.0, 2.0, 1.0]));
    assert_eq!(served(&single, "blk.1.ffn_up_exps.weight", 3), None);
}

#[test]
fn fused_matrices_and_adapters_take_the_data_of_the_same_input() {
    let own = imatrix(&[("blk.0.attn_q.weight", &[1.0, 2.0], &[1]), ("blk.0.attn_k.weight", &[0.0, 0.0], &[0])]);
    assert_eq!(served(&own, "blk.0.attn_qkv.weight", 1).unwrap().0, "blk.0.attn_q.weight");
    assert_eq!(served(&own, "blk.0.attn_q.weight.lora_a", 1).unwrap().0, "blk.0.attn_q.weight");
    assert_eq!(served(&own, "blk.0.attn_q.weight.lora_b", 1), None);
    assert_eq!(served(&own, "blk.0.attn_v.weight", 1), None);
}

#[test]
fn other_lengths_and_filtered_entries_serve_nothing() {
    let long = imatrix(&[("blk.0.ffn_up.weight", &[1.0; 4], &[1]), ("blk.0.attn_v_b.weight", &[1.0; 3], &[1])]);
    assert_eq!(served(&long, "blk.0.ffn_up.weight", 1), None, "four columns are those of another model");
    assert_eq!(served(&long, "blk.0.attn_v_b.weight", 1), None);
    assert_eq!(served(&long, "blk.0.ffn_up.weight", u64::MAX), None);
    let own = imatrix(&[("blk.0.attn_v_b.weight", &[2.0, 4.0], &[2])]);
    let tensor = ModelTensor { name: "blk.0.attn_kv_b.weight", row_len: 2, matrices: 1, need: Need::Optional };
    let filter = EntryFilter::Exclude(vec!["attn_v".to_owned()]);
    assert_eq!(find(&own, &filter, &tensor, tensor.name), None);
    let filter = EntryFilter::Exclude(vec!["attn_kv".to_owned()]);
    assert_eq!(find(&own, &filter, &tensor, tensor.name), None);
}

#[test]
fn a_made_up_number_of_experts_costs_nothing() {
    let single = imatrix(&[("blk.0.ffn_up.0.weight", &[1.0, 2.0], &[1])]);
    assert_eq!(served(&single, "blk.0.ffn_up_exps.weight", u64::MAX), None);
    assert_eq!(served(&single, "blk.1.ffn_up_exps.weight", 4096), None);
    let tensor = ModelTensor { name: "b.0.ffn_up_exps.weight", row_len: u64::MAX, matrices: 2, need: Need::Optional };
    assert_eq!(find(&single, &EntryFilter::All, &tensor, tensor.name), None);
    // Shapes of no weights at all.
    let own = imatrix(&[("blk.0.attn_v_b.weight", &[2.0, 4.0], &[2]), ("blk.0.ffn_up.1.weight", &[1.0, 2.0], &[1])]);
    assert_eq!(served(&own, "blk.0.attn_v_b.weight", 1 << 60), None);
    for (name, row_len) in [("blk.0.ffn_up_exps.weight", 1 << 60), ("blk.0.attn_v_b.weight", 1 << 60)] {
        let tensor = ModelTensor { name, row_len, matrices: 2, need: Need::Optional };
        assert_eq!(find(&own, &EntryFilter::All, &tensor, name), None);
    }
}
