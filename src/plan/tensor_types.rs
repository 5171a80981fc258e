//! A plan in the form that llama-quantize reads.

use super::PlanFile;

/// The plan as a `--tensor-type-file`: a line `^name$=type` per tensor. Both programs search for the lowercased
/// pattern in the name, so capital letters become the pattern for any character.
pub fn tensor_types(plan: &PlanFile) -> String {
    let pattern = |name: &str| {
        let mut pattern = String::from("^");
        for c in name.chars() {
            match c {
                'a'..='z' | '0'..='9' | '_' | '-' => pattern.push(c),
                // White space separates entries and '=' ends a pattern; letter case and encoding are lost.
                'A'..='Z' | '=' | ' ' => pattern.push('.'),
                c if c.is_ascii_graphic() => pattern.extend(['\\', c]),
                c => (0..c.len_utf8()).for_each(|_| pattern.push('.')),
            }
        }
        pattern + "$"
    };
    plan.tensors.iter().map(|row| format!("{}={}\n", pattern(&row.tensor), row.ty)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn patterns_are_anchored_and_escaped() {
        let mut plan = example();
        plan.tensors[0].tensor = "A b=c".to_owned();
        let text = tensor_types(&plan);
        assert_eq!(text, "^..b.c$=q6_K\n^blk\\.0\\.attn_q\\.weight$=iq3_s\n");
        let rules = crate::recipe::parse_override_list(&text, "t").unwrap();
        assert_eq!(rules[1].matches("blk.0.attn_q.weight"), Ok(true));
        assert_eq!(rules[1].matches("blk.10.attn_q.weight"), Ok(false));
        assert_eq!(rules[0].matches("A b=c"), Ok(true));
    }
}
