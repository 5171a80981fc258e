//! Tensor types that ggml does not have, or has no more: whose they are, so that messages can say so.

use super::tensor_type::TensorType;

/// Who knows a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The fork of that name.
    IkLlama,
    /// Older versions of ggml.
    Removed,
}

use Owner::{IkLlama, Removed};

/// Types by their ids. Those of the fork are from its `gguf-py`; `r4` and `r8` are rows that are interleaved.
const FOREIGN: &[(u32, &str, Owner)] = &[
    (4, "q4_2", Removed),
    (5, "q4_3", Removed),
    (31, "q4_0_4_4", Removed),
    (32, "q4_0_4_8", Removed),
    (33, "q4_0_8_8", Removed),
    (36, "iq4_nl_4_4", Removed),
    (37, "iq4_nl_4_8", Removed),
    (38, "iq4_nl_8_8", Removed),
    (97, "q8_0_x4", IkLlama),
    (98, "q8_1_x4", IkLlama),
    (99, "q8_2_x4", IkLlama),
    (133, "q6_0", IkLlama),
    (134, "iq1_bn", IkLlama),
    (135, "iq2_bn", IkLlama),
    (136, "q8_k64", IkLlama),
    (137, "iq2_k", IkLlama),
    (138, "iq3_k", IkLlama),
    (139, "iq4_k", IkLlama),
    (140, "iq5_k", IkLlama),
    (141, "iq6_k", IkLlama),
    (144, "iq4_ks", IkLlama),
    (145, "iq2_ks", IkLlama),
    (146, "iq4_kss", IkLlama),
    (147, "q8_k16", IkLlama),
    (148, "q8_k32", IkLlama),
    (149, "q8_kr8", IkLlama),
    (150, "q8_k128", IkLlama),
    (151, "q8_kv", IkLlama),
    (152, "iq5_ks", IkLlama),
    (153, "iq2_kt", IkLlama),
    (154, "iq3_kt", IkLlama),
    (155, "iq4_kt", IkLlama),
    (156, "iq3_ks", IkLlama),
    (157, "iq2_kl", IkLlama),
    (158, "iq1_kt", IkLlama),
    (202, "q4_0_r8", IkLlama),
    (206, "q5_0_r4", IkLlama),
    (208, "q8_0_r8", IkLlama),
    (210, "q2_k_r4", IkLlama),
    (211, "q3_k_r4", IkLlama),
    (212, "q4_k_r4", IkLlama),
    (213, "q5_k_r4", IkLlama),
    (214, "q6_k_r4", IkLlama),
    (216, "iq2_xxs_r4", IkLlama),
    (217, "iq2_xs_r4", IkLlama),
    (218, "iq3_xxs_r4", IkLlama),
    (219, "iq1_s_r4", IkLlama),
    (220, "iq4_nl_r4", IkLlama),
    (221, "iq3_s_r4", IkLlama),
    (222, "iq2_s_r4", IkLlama),
    (223, "iq4_xs_r8", IkLlama),
    (229, "iq1_m_r4", IkLlama),
    (230, "bf16_r16", IkLlama),
    (233, "q6_0_r4", IkLlama),
    (335, "iq2_bn_r4", IkLlama),
    (337, "iq2_k_r4", IkLlama),
    (338, "iq3_k_r4", IkLlama),
    (339, "iq4_k_r4", IkLlama),
    (340, "iq5_k_r4", IkLlama),
    (344, "iq4_ks_r4", IkLlama),
    (352, "iq5_ks_r4", IkLlama),
    (398, "q8_kv_r8", IkLlama),
    (399, "q8_k_r8", IkLlama),
];

impl TensorType {
    /// Whose type it is, for messages, where this program does not know its layout; `None` for types that it knows.
    pub fn foreign(self) -> Option<String> {
        if self.info().is_some() {
            return None;
        }
        Some(match FOREIGN.iter().find(|row| row.0 == self.0) {
            Some((_, name, IkLlama)) => format!("{self} ({name} of ik_llama.cpp, which stock llama.cpp cannot read)"),
            Some((_, name, Removed)) => format!("{self} ({name}, which llama.cpp no longer reads)"),
            None => format!("{self}, which llama.cpp b10605 does not know"),
        })
    }

    /// The fork whose type bears this name.
    pub(crate) fn foreign_name(name: &str) -> Option<&'static str> {
        let row = FOREIGN.iter().find(|row| row.1.eq_ignore_ascii_case(name))?;
        Some(match row.2 {
            IkLlama => "a type of ik_llama.cpp, which stock llama.cpp cannot read",
            Removed => "a type that llama.cpp no longer reads",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_types_say_whose_they_are() {
        for (id, text) in [
            (144, "type#144 (iq4_ks of ik_llama.cpp, which stock llama.cpp cannot read)"),
            (31, "type#31 (q4_0_4_4, which llama.cpp no longer reads)"),
            (77, "type#77, which llama.cpp b10605 does not know"),
        ] {
            assert_eq!(TensorType(id).foreign().as_deref(), Some(text));
        }
        assert_eq!(TensorType::Q4_K.foreign(), None);
        assert!(FOREIGN.iter().all(|row| TensorType(row.0).info().is_none() && TensorType::from_name(row.1).is_none()));
        assert!(FOREIGN.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(TensorType::foreign_name("IQ4_KS").is_some() && TensorType::foreign_name("q4_K").is_none());
    }
}
