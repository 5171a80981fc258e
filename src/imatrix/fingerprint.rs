//! Telling importance matrices apart.

use sha2::{Digest, Sha256};

use super::{Form, Imatrix};

impl Imatrix {
    /// SHA-256, in hexadecimal, over the names, sums and counts of all entries: what rounding depends on. Calibration file
    /// names and the like do not count. The two file forms count differently, so that a converted file differs.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update([u8::from(self.form == Form::Dat)]);
        for (name, entry) in self.entries.iter().chain(&self.planning) {
            hash.update(format!("{}:{name} {} {}\n", name.len(), entry.sums.len(), entry.counts.len()));
            entry.sums.iter().for_each(|sum| hash.update(sum.to_le_bytes()));
            entry.counts.iter().for_each(|count| hash.update(count.to_le_bytes()));
        }
        format!("{:x}", hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imatrix::Entry;

    #[test]
    fn values_count_and_dataset_names_do_not() {
        let entry = |sum: f32| Entry { sums: vec![sum; 4], counts: vec![7] };
        let imatrix = |sum| Imatrix { entries: [("a".to_owned(), entry(sum))].into(), ..Imatrix::default() };
        let base = imatrix(1.0).fingerprint();
        let renamed = Imatrix { datasets: vec!["b.txt".to_owned()], ..imatrix(1.0) };
        assert_eq!(base, renamed.fingerprint());
        assert_ne!(base, imatrix(2.0).fingerprint());
    }
}
