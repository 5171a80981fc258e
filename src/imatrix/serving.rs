//! Entries that serve a tensor though their name or shape is another one: where the inputs of both products are the same, so
//! are their mean squares.

use std::borrow::Cow;

use super::matching::{EntryFilter, ModelTensor};
use super::{Entry, Imatrix};

/// How the values of an entry become those of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// As they are.
    AsIs,
    /// The mean over all rows of the entry weighs every matrix of the tensor: heads that see the same input.
    Pooled,
    /// One matrix of a stack.
    Matrix(u64),
    /// The entries of single experts, stacked.
    Experts,
}

/// Most experts that are looked for one by one (`LLAMA_MAX_EXPERTS` is 1024).
const MOST_EXPERTS: u64 = 1 << 12;

/// Most values that are made for one tensor; a model with 512 experts of 16,384 columns needs an eighth. A shape of no
/// weights may have as many matrices as it likes.
const MOST_VALUES: u64 = 1 << 26;

/// Parts of a tensor's name, and those of other tensors of the same block that see the same input.
///
/// The values of multi-head latent attention and the older matrix of keys and values both see the compressed state.
/// `attn_k_b` does not: its input is the query.
const SAME_INPUT: &[(&str, &[&str])] = &[
    ("attn_v_b", &["attn_kv_b"]),
    ("attn_kv_b", &["attn_v_b"]),
    ("attn_qkv", &["attn_q", "attn_k", "attn_v"]),
    ("attn_q", &["attn_qkv"]),
    ("attn_k", &["attn_qkv"]),
    ("attn_v", &["attn_qkv"]),
    ("attn_q_a", &["attn_kv_a_mqa"]),
    ("attn_kv_a_mqa", &["attn_q_a"]),
    ("ffn_up", &["ffn_gate"]),
    ("ffn_gate", &["ffn_up"]),
    ("ffn_up_exps", &["ffn_gate_exps", "ffn_gate_up_exps"]),
    ("ffn_gate_exps", &["ffn_up_exps", "ffn_gate_up_exps"]),
    ("ffn_gate_up_exps", &["ffn_gate_exps", "ffn_up_exps"]),
    ("ffn_up_shexp", &["ffn_gate_shexp"]),
    ("ffn_gate_shexp", &["ffn_up_shexp"]),
];

/// Matrices whose entries have a row for each head in some programs and one for all in others.
const HEADS: &[&str] = &["attn_kv_b", "attn_k_b", "attn_v_b"];

/// The entry that serves the tensor, and how. `name` is the tensor's name in the imatrix.
pub(super) fn find<'a>(
    imatrix: &'a Imatrix,
    filter: &EntryFilter,
    tensor: &ModelTensor<'_>,
    name: &'a str,
) -> Option<(Cow<'a, str>, Served)> {
    let served = |name: &str| {
        let entry = imatrix.entries.get(name).filter(|_| filter.keeps(name))?;
        let served = fit(entry, tensor, name)?;
        // An entry of another tensor that knows nothing is no help.
        (!data(imatrix, name, served, tensor)?.is_empty()).then_some(served)
    };
    if let Some(own) = imatrix.entries.get(name).filter(|_| filter.keeps(name)).and_then(|own| fit(own, tensor, name)) {
        return Some((Cow::Borrowed(name), own));
    }
    if !filter.keeps(name) {
        return None;
    }
    // The first factor of an adapter sees what the matrix sees that it adapts.
    if let Some(adapted) = name.strip_suffix(".lora_a") {
        return served(adapted).map(|how| (Cow::Borrowed(adapted), how));
    }
    let (block, part) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    if let (Ok(expert), Some((block, part))) = (part.parse::<u64>(), block.rsplit_once('.')) {
        // A single expert.
        let others = std::iter::once(part).chain(same_input(part).iter().copied());
        return others.into_iter().find_map(|part| {
            let stack = format!("{block}.{part}_exps.weight");
            let entry = imatrix.entries.get(&stack).filter(|_| filter.keeps(&stack))?;
            let (_, count) = rows(entry, tensor.row_len)?.nth(usize::try_from(expert).ok()?)?;
            (count > 0 && tensor.matrices == 1).then_some((Cow::Owned(stack), Served::Matrix(expert)))
        });
    }
    let is_stack = part.ends_with("_exps") && tensor.matrices <= MOST_EXPERTS;
    if is_stack && expert_name(name, 0).is_some_and(|expert| filter.keeps(&expert)) {
        let stack = data(imatrix, name, Served::Experts, tensor);
        if stack.is_some_and(|stack| !stack.is_empty()) {
            return Some((Cow::Borrowed(name), Served::Experts));
        }
    }
    same_input(part).iter().find_map(|part| {
        let other = format!("{block}.{part}.weight");
        served(&other).map(|how| (Cow::Owned(other), how))
    })
}

fn same_input(part: &str) -> &'static [&'static str] {
    SAME_INPUT.iter().find(|row| row.0 == part).map_or(&[], |row| row.1)
}

/// How an entry of this name serves the tensor, as far as shapes tell.
fn fit(entry: &Entry, tensor: &ModelTensor<'_>, name: &str) -> Option<Served> {
    let found = entry.sums.len() as u64;
    let wanted = tensor.row_len.saturating_mul(tensor.matrices);
    if found == wanted {
        return Some(Served::AsIs);
    }
    if wanted > MOST_VALUES {
        return None;
    }
    // One row for all matrices of a tensor; or a row for each head where the tensor has them side by side.
    let one_for_all = found == tensor.row_len && tensor.matrices > 1;
    let rows = rows(entry, tensor.row_len)?.len() as u64;
    let part = name.strip_suffix(".weight").and_then(|name| name.rsplit('.').next()).unwrap_or_default();
    let of_heads = tensor.matrices == 1 && rows > 1 && (HEADS.contains(&part) || entry.matrices() as u64 == rows);
    let pooled = HEADS.contains(&part) && rows > 1 && tensor.matrices > 1 && entry.matrices() as u64 == rows;
    (one_for_all || of_heads || pooled).then_some(Served::Pooled)
}

/// The rows of an entry with the tokens of each.
fn rows(entry: &Entry, row_len: u64) -> Option<impl ExactSizeIterator<Item = (&[f32], u64)>> {
    let row_len = usize::try_from(row_len).ok().filter(|row_len| *row_len > 0)?;
    let count = entry.sums.len() / row_len;
    let shaped = entry.sums.len().is_multiple_of(row_len) && (entry.counts.len() == count || entry.counts.len() == 1);
    if !shaped {
        return None;
    }
    let of_row = |row: usize| *entry.counts.get(row).or(entry.counts.first()).unwrap_or(&0);
    Some(entry.sums.chunks_exact(row_len).enumerate().map(move |(row, sums)| (sums, of_row(row))))
}

/// The name of a single expert of a stack: `blk.0.ffn_up_exps.weight` → `blk.0.ffn_up.3.weight`.
fn expert_name(stack: &str, expert: u64) -> Option<String> {
    Some(format!("{}.{expert}.weight", stack.strip_suffix("_exps.weight")?))
}

/// The data that the entry `name`, served in this way, gives the tensor.
pub(super) fn data<'a>(
    imatrix: &'a Imatrix,
    name: &str,
    served: Served,
    tensor: &ModelTensor<'_>,
) -> Option<Cow<'a, Entry>> {
    let row_len = usize::try_from(tensor.row_len).ok()?;
    match served {
        Served::AsIs => imatrix.entries.get(name).map(Cow::Borrowed),
        Served::Pooled => {
            let mut sums = vec![0.0_f64; row_len];
            let mut tokens = 0_u64;
            for (row, count) in rows(imatrix.entries.get(name)?, tensor.row_len)?.filter(|(_, count)| *count > 0) {
                tokens = tokens.saturating_add(count);
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            // The mean over the rows, not their sum: it stays in the range of f32.
            let scale = if tokens > 0 { 1.0 / tokens as f64 } else { 0.0 };
            let mean: Vec<f32> = sums.iter().map(|sum| (sum * scale) as f32).collect();
            let sums = mean.repeat(usize::try_from(tensor.matrices).ok()?);
            Some(Cow::Owned(Entry { sums, counts: vec![u64::from(tokens > 0)] }))
        }
        Served::Matrix(matrix) => {
            let (sums, count) = rows(imatrix.entries.get(name)?, tensor.row_len)?.nth(usize::try_from(matrix).ok()?)?;
            Some(Cow::Owned(Entry { sums: sums.to_vec(), counts: vec![count] }))
        }
        Served::Experts => {
            let of_expert = |expert: u64| {
                let entry = imatrix.entries.get(&expert_name(name, expert)?)?;
                (entry.sums.len() == row_len && entry.counts.len() == 1).then_some(entry)
            };
            let matrices = tensor.matrices.min(MOST_EXPERTS);
            if matrices.saturating_mul(tensor.row_len) > MOST_VALUES || (0..matrices).all(|at| of_expert(at).is_none())
            {
                return None;
            }
            let mut stack = Entry::default();
            for expert in 0..matrices {
                match of_expert(expert) {
                    Some(entry) => stack.sums.extend_from_slice(&entry.sums),
                    None => stack.sums.resize(stack.sums.len() + row_len, 0.0),
                }
                stack.counts.push(of_expert(expert).map_or(0, |entry| entry.counts[0]));
            }
            Some(Cow::Owned(stack))
        }
    }
}

/// Names of the entries that [`data`] of [`Served::Experts`] looks at.
pub(super) fn experts<'a>(imatrix: &'a Imatrix, name: &'a str, matrices: u64) -> impl Iterator<Item = String> + 'a {
    let names = (0..matrices.min(MOST_EXPERTS)).map_while(move |expert| expert_name(name, expert));
    names.filter(|name| imatrix.entries.contains_key(name))
}

#[cfg(test)]
mod tests;
