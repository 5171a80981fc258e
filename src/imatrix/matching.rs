//! Which tensors of a model have imatrix data, decided before any work begins.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::error::{Quoted, Warning};
use super::serving::{self, Served};
use super::{Entry, Imatrix};
use crate::recipe::roles;

/// Whether a tensor can do without imatrix data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// It is not quantized: data for it are known but not used.
    Kept,
    /// It is quantized, better with data.
    Optional,
    /// Its type gives garbage without data.
    Required,
}

/// What matching has to know of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTensor<'a> {
    /// Its name in the output.
    pub name: &'a str,
    /// Columns, ggml's ne0.
    pub row_len: u64,
    /// Stacked matrices, ggml's ne2; 1 for plain ones.
    pub matrices: u64,
    /// What the chosen type asks for.
    pub need: Need,
}

/// Which entries of the imatrix are used, by parts of their names (`--include-weights`, `--exclude-weights`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum EntryFilter {
    /// All of them.
    #[default]
    All,
    /// Those whose name contains one of these.
    Include(Vec<String>),
    /// Those whose name contains none of these.
    Exclude(Vec<String>),
}

impl EntryFilter {
    /// From the two lists of a command line, of which one at least must be empty.
    ///
    /// # Errors
    /// When both have members.
    pub fn new(include: &[String], exclude: &[String]) -> Result<EntryFilter, MatchError> {
        match (include.is_empty(), exclude.is_empty()) {
            (true, true) => Ok(EntryFilter::All),
            (false, true) => Ok(EntryFilter::Include(include.to_vec())),
            (true, false) => Ok(EntryFilter::Exclude(exclude.to_vec())),
            (false, false) => Err(MatchError::BothFilters),
        }
    }

    /// True if an entry of this name is used.
    pub(crate) fn keeps(&self, name: &str) -> bool {
        let contains = |parts: &[String]| parts.iter().any(|part| name.contains(part.as_str()));
        match self {
            EntryFilter::All => true,
            EntryFilter::Include(parts) => contains(parts),
            EntryFilter::Exclude(parts) => !contains(parts),
        }
    }
}

/// A tensor and the entry that weighs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatchedEntry {
    /// Name of the tensor in the output.
    pub tensor: String,
    /// Name of the entry: the tensor's own, its old one where layers were renumbered, or that of another tensor that sees
    /// the same input.
    pub entry: String,
    /// How the entry's values become those of the tensor.
    pub served: Served,
    /// Columns of the tensor.
    pub row_len: u64,
    /// Matrices in the tensor.
    pub matrices: u64,
    /// Matrices that no token reached and that get weights of one.
    pub neutral_matrices: usize,
}

impl MatchedEntry {
    /// The tensor's data, of the imatrix that was matched.
    pub fn data<'a>(&self, imatrix: &'a Imatrix) -> Option<Cow<'a, Entry>> {
        let MatchedEntry { tensor: name, row_len, matrices, .. } = self;
        let tensor = ModelTensor { name, row_len: *row_len, matrices: *matrices, need: Need::Optional };
        serving::data(imatrix, &self.entry, self.served, &tensor)
    }
}

/// A tensor whose entry has another number of values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongLength {
    /// Name of the tensor in the output.
    pub tensor: String,
    /// Values in the entry.
    pub found: usize,
    /// Columns times matrices of the tensor.
    pub expected: u64,
}

/// What the tensors of a model get from an imatrix. All lists are in the order of the model's tensors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MatchReport {
    /// Quantized tensors with data.
    pub used: Vec<MatchedEntry>,
    /// Quantized tensors without data that can do without.
    pub missing_optional: Vec<String>,
    /// Quantized tensors without data whose type gives garbage then.
    pub missing_required: Vec<String>,
    /// Entries that no tensor of the model bears the name of, sorted.
    pub unknown_names: Vec<String>,
    /// Entries of another length than their tensor.
    pub wrong_length: Vec<WrongLength>,
    /// The same for token embeddings, where llama-quantize goes on without weights.
    pub wrong_length_embedding: Vec<WrongLength>,
    /// Tensors of which some matrices saw no token; also in `used`.
    pub neutral: Vec<MatchedEntry>,
    /// Tensors whose data are those of an entry of another name or shape; also in `used`.
    pub served: Vec<MatchedEntry>,
    /// Entries left after filtering.
    pub entries: usize,
    /// Entries that the filter removed.
    pub filtered_out: usize,
    /// What was odd in the file itself.
    pub file_warnings: Vec<Warning>,
}

/// Why quantization with this imatrix must not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatchError {
    /// Both filters at once.
    #[error("--include-weights and --exclude-weights exclude each other; give one of them")]
    BothFilters,
    /// The filter removed every entry.
    #[error(
        "--include-weights or --exclude-weights leaves none of the {0} imatrix entries; names contain parts such as \
         attn_v or ffn_down, correct the filter or leave --imatrix away"
    )]
    NothingLeft(usize),
    /// Tensors lack data that their types need.
    #[error(
        "{} {} no imatrix data and a type that needs them: {}{}; use an imatrix made from this model, choose larger types \
         with --tensor-type, or say with --missing-importance what to do: plain, or a type",
        .0.len(), if .0.len() == 1 { "tensor has" } else { "tensors have" }, list(.0), cause(.0)
    )]
    MissingRequired(Vec<String>),
    /// Matrices lack data, and the user wants none without.
    #[error(
        "{} {} matrices without imatrix data: {}{}; use an imatrix that has them, or say with --missing-importance what to \
         do instead of refuse: plain, or a type",
        .0.len(), if .0.len() == 1 { "tensor has" } else { "tensors have" }, list(.0), cause(.0)
    )]
    MissingRefused(Vec<String>),
    /// Entries belong to another model.
    #[error(
        "{} imatrix {} another length than the tensor, first {}: {} values, expected {}; the imatrix was made from another \
         model, make one from this",
        .0.len(), if .0.len() == 1 { "entry has" } else { "entries have" },
        first_tensor(.0), first_length(.0).0, first_length(.0).1
    )]
    WrongLength(Vec<WrongLength>),
}

/// Names that an error line lists before it only counts.
const LISTED_NAMES: usize = 8;

fn list(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(LISTED_NAMES).map(|name| Quoted::from(name).to_string()).collect();
    let more = names.len() - shown.len();
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

/// Why data are missing, as far as the names tell.
fn cause(names: &[String]) -> &'static str {
    let any = |part: &str| names.iter().any(|name| name.contains(part));
    if any("attn_k_b.") {
        " (attn_k_b sees another input than attn_kv_b, whose data therefore do not serve it)"
    } else if any("nextn.") {
        " (blocks for multi-token prediction do not run on calibration text)"
    } else if any("_exps.") {
        " (experts that no token of the calibration text reached)"
    } else {
        ""
    }
}

fn first_tensor(wrong: &[WrongLength]) -> String {
    wrong.first().map_or_else(String::new, |first| Quoted::from(&first.tensor).to_string())
}

fn first_length(wrong: &[WrongLength]) -> (usize, u64) {
    wrong.first().map_or((0, 0), |first| (first.found, first.expected))
}

impl MatchReport {
    /// Refuses what would give garbage; to be called before any work.
    ///
    /// # Errors
    /// When the filter leaves no entry, an entry has another length than its tensor, or a tensor lacks data that its
    /// type needs.
    pub fn check(&self) -> Result<(), MatchError> {
        if self.entries == 0 && self.filtered_out > 0 {
            return Err(MatchError::NothingLeft(self.filtered_out));
        }
        if !self.wrong_length.is_empty() {
            return Err(MatchError::WrongLength(self.wrong_length.clone()));
        }
        if !self.missing_required.is_empty() {
            return Err(MatchError::MissingRequired(self.missing_required.clone()));
        }
        Ok(())
    }

    /// One line for everything that is bearable but must be said. Token embeddings never have data in files of
    /// llama-imatrix, so their absence alone is not mentioned.
    pub fn warnings(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.file_warnings.iter().map(|warning| format!("imatrix: {warning}")).collect();
        let missing: Vec<String> =
            self.missing_optional.iter().filter(|name| !roles::is_embedding_or_output(name)).cloned().collect();
        if !missing.is_empty() {
            lines.push(format!(
                "{} of the quantized tensors have no imatrix data and are quantized without: {}",
                missing.len(),
                list(&missing)
            ));
        }
        if !self.unknown_names.is_empty() {
            lines.push(format!(
                "{} imatrix entries belong to no tensor of this model: {}",
                self.unknown_names.len(),
                list(&self.unknown_names)
            ));
        }
        if !self.served.is_empty() {
            let pairs: Vec<String> = self.served.iter().take(LISTED_NAMES).map(served_text).collect();
            let more = self.served.len() - pairs.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            lines.push(format!(
                "{} tensors are weighed by imatrix entries of another form that have the same input: {}{more}",
                self.served.len(),
                pairs.join(", ")
            ));
        }
        for wrong in &self.wrong_length_embedding {
            lines.push(format!(
                "{}: its imatrix entry has {} values, expected {}; quantized without",
                Quoted::from(&wrong.tensor),
                wrong.found,
                wrong.expected
            ));
        }
        if let Some(first) = self.neutral.first() {
            let matrices: usize = self.neutral.iter().map(|entry| entry.neutral_matrices).sum();
            let of: u64 = self.neutral.iter().map(|entry| entry.matrices).sum();
            lines.push(format!(
                "{matrices} of {of} matrices (experts) in {} tensors saw no token and get neutral weights, first in {}",
                self.neutral.len(),
                Quoted::from(&first.tensor)
            ));
        }
        lines
    }
}

fn served_text(matched: &MatchedEntry) -> String {
    let MatchedEntry { tensor, entry, served, .. } = matched;
    let (tensor, from) = (Quoted::from(tensor), Quoted::from(entry));
    match served {
        Served::AsIs => format!("{tensor} by {from}"),
        Served::Pooled => format!("{tensor} by {from}, one row for all"),
        Served::Matrix(matrix) => format!("{tensor} by matrix {matrix} of {from}"),
        Served::Experts => format!("{tensor} by those of its experts"),
    }
}

impl MatchReport {
    /// Quantized tensors without any data; token embeddings and the output matrix, which never have some in files of
    /// llama-imatrix, do not count.
    pub fn without_data(&self) -> Vec<String> {
        let missing = self.missing_required.iter().chain(&self.missing_optional);
        let named = missing.filter(|name| !roles::is_embedding_or_output(name)).cloned();
        let empty = self.neutral.iter().filter(|entry| entry.neutral_matrices as u64 >= entry.matrices);
        named.chain(empty.map(|entry| entry.tensor.clone())).collect()
    }

    /// As [`MatchReport::without_data`], with those of which only some matrices have none.
    pub fn with_gaps(&self) -> Vec<String> {
        let mut names = self.without_data();
        let partly = self.neutral.iter().filter(|entry| (entry.neutral_matrices as u64) < entry.matrices);
        names.extend(partly.map(|entry| entry.tensor.clone()));
        names
    }
}

/// Finds the entry of each tensor. `tensors` should hold every tensor of the model, also those that are kept, so
/// that entries of theirs are not reported as unknown. `entry_name` gives the name that a tensor has in the
/// imatrix: the old one where layers were pruned and the rest renumbered, else its own.
///
/// An entry in which no token reached any matrix is no data for a tensor that needs them.
pub fn match_to_model<'a>(
    imatrix: &Imatrix,
    tensors: &[ModelTensor<'a>],
    filter: &EntryFilter,
    entry_name: impl Fn(&'a str) -> Cow<'a, str>,
) -> MatchReport {
    let mut report = MatchReport { file_warnings: imatrix.warnings.clone(), ..MatchReport::default() };
    let mut known = BTreeSet::new();
    for tensor in tensors {
        let entry_name = entry_name(tensor.name);
        let own = imatrix.entries.get(&*entry_name).filter(|_| filter.keeps(&entry_name));
        if tensor.need != Need::Kept {
            match (serving::find(imatrix, filter, tensor, &entry_name), own) {
                (Some((entry, served)), _) => {
                    if served == Served::Experts {
                        known.extend(serving::experts(imatrix, &entry, tensor.matrices).map(Cow::Owned));
                    }
                    known.insert(Cow::Owned(entry.clone().into_owned()));
                    place(&mut report, tensor, &entry_name, &entry, served, imatrix);
                }
                (None, Some(own)) => place_wrong_length(&mut report, tensor, own),
                (None, None) => place_missing(&mut report, tensor),
            }
        }
        known.insert(entry_name);
    }
    report.entries = imatrix.entries.keys().filter(|name| filter.keeps(name)).count();
    report.filtered_out = imatrix.entries.len() - report.entries;
    report.unknown_names =
        imatrix.entries.keys().filter(|name| filter.keeps(name) && !known.contains(name.as_str())).cloned().collect();
    report
}

fn place_missing(report: &mut MatchReport, tensor: &ModelTensor<'_>) {
    match tensor.need {
        Need::Kept => {}
        Need::Optional => report.missing_optional.push(tensor.name.to_owned()),
        Need::Required => report.missing_required.push(tensor.name.to_owned()),
    }
}

fn place_wrong_length(report: &mut MatchReport, tensor: &ModelTensor<'_>, entry: &Entry) {
    let expected = tensor.row_len.saturating_mul(tensor.matrices);
    let wrong = WrongLength { tensor: tensor.name.to_owned(), found: entry.sums.len(), expected };
    // A wrong length of theirs llama-quantize bears.
    if roles::is_embedding(tensor.name) {
        report.wrong_length_embedding.push(wrong);
        place_missing(report, tensor);
    } else {
        report.wrong_length.push(wrong);
    }
}

fn place(
    report: &mut MatchReport,
    tensor: &ModelTensor<'_>,
    own_name: &str,
    entry_name: &str,
    served: Served,
    imatrix: &Imatrix,
) {
    let data = serving::data(imatrix, entry_name, served, tensor);
    let Some(data) = data.filter(|data| !(data.is_empty() && tensor.need == Need::Required)) else {
        place_missing(report, tensor);
        return;
    };
    let matched = MatchedEntry {
        tensor: tensor.name.to_owned(),
        entry: entry_name.to_owned(),
        served,
        row_len: tensor.row_len,
        matrices: tensor.matrices,
        neutral_matrices: match data.neutral_matrices() {
            // A single count stands for all matrices of the tensor.
            1 if data.matrices() == 1 => tensor.matrices as usize,
            neutral => neutral,
        },
    };
    if matched.neutral_matrices > 0 {
        report.neutral.push(matched.clone());
    }
    if served != Served::AsIs || entry_name != own_name {
        report.served.push(matched.clone());
    }
    report.used.push(matched);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imatrix(entries: &[(&str, Entry)]) -> Imatrix {
        Imatrix {
            entries: entries.iter().map(|(name, entry)| ((*name).to_owned(), entry.clone())).collect(),
            ..Imatrix::default()
        }
    }

    fn entry(sums: usize, counts: &[u64]) -> Entry {
        Entry { sums: vec![1.0; sums], counts: counts.to_vec() }
    }

    fn tensor(name: &str, row_len: u64, matrices: u64, need: Need) -> ModelTensor<'_> {
        ModelTensor { name, row_len, matrices, need }
    }

    fn own_name(name: &str) -> Cow<'_, str> {
        Cow::Borrowed(name)
    }

    #[test]
    fn every_tensor_and_entry_ends_in_one_list() {
        let imatrix = imatrix(&[
            ("blk.0.attn_q.weight", entry(8, &[4])),
            ("blk.0.ffn_gate_inp.weight", entry(8, &[4])),
            ("blk.0.ffn_up_exps.weight", entry(24, &[4, 0, 2])),
            ("blk.9.attn_q.weight", entry(8, &[4])),
        ]);
        let tensors = [
            tensor("token_embd.weight", 8, 1, Need::Optional),
            tensor("blk.0.attn_q.weight", 8, 1, Need::Required),
            tensor("blk.0.attn_k.weight", 8, 1, Need::Required),
            tensor("blk.0.attn_v.weight", 8, 1, Need::Optional),
            tensor("blk.0.ffn_gate_inp.weight", 8, 1, Need::Kept),
            tensor("blk.0.ffn_up_exps.weight", 8, 3, Need::Required),
        ];
        let report = match_to_model(&imatrix, &tensors, &EntryFilter::All, own_name);
        let used: Vec<_> = report.used.iter().map(|used| used.tensor.as_str()).collect();
        assert_eq!(used, ["blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"]);
        assert_eq!(report.missing_optional, ["token_embd.weight", "blk.0.attn_v.weight"]);
        assert_eq!(report.missing_required, ["blk.0.attn_k.weight"]);
        assert_eq!(report.unknown_names, ["blk.9.attn_q.weight"]);
        assert_eq!(report.neutral.len(), 1);
        assert_eq!((report.neutral[0].neutral_matrices, report.neutral[0].matrices), (1, 3));
        assert_eq!((report.entries, report.filtered_out), (4, 0));
        let error = report.check().unwrap_err().to_string();
        assert!(error.contains("1 tensor has no imatrix data") && error.contains("blk.0.attn_k.weight"), "{error}");
        let warnings = report.warnings();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("1 of the quantized tensors") && warnings[0].contains("blk.0.attn_v.weight"));
        assert!(warnings[1].contains("blk.9.attn_q.weight"));
        assert!(warnings[2].contains("1 of 3 matrices"));
    }

    #[test]
    fn other_lengths_are_errors_except_for_token_embeddings() {
        let imatrix = imatrix(&[("token_embd.weight", entry(4, &[1])), ("blk.0.a.weight", entry(4, &[1]))]);
        let tensors =
            [tensor("token_embd.weight", 8, 1, Need::Optional), tensor("blk.0.a.weight", 8, 1, Need::Optional)];
        let report = match_to_model(&imatrix, &tensors, &EntryFilter::All, own_name);
        assert_eq!(report.used, []);
        assert_eq!(report.missing_optional, ["token_embd.weight"]);
        assert_eq!(report.wrong_length_embedding.len(), 1);
        let error = report.check().unwrap_err().to_string();
        assert!(error.contains("\"blk.0.a.weight\": 4 values, expected 8"), "{error}");
        assert!(report.warnings()[0].contains("token_embd.weight"));
    }

    #[test]
    fn sizes_that_wrap_match_nothing() {
        let imatrix = imatrix(&[("w", entry(4, &[1]))]);
        let report = match_to_model(&imatrix, &[tensor("w", 1 << 63, 2, Need::Optional)], &EntryFilter::All, own_name);
        assert_eq!(report.wrong_length[0].expected, u64::MAX);
    }

    #[test]
    fn an_entry_without_tokens_is_no_data_where_data_are_needed() {
        let imatrix = imatrix(&[("a", entry(4, &[0, 0])), ("b", entry(4, &[0]))]);
        let report = match_to_model(
            &imatrix,
            &[tensor("a", 2, 2, Need::Required), tensor("b", 2, 2, Need::Optional)],
            &EntryFilter::All,
            own_name,
        );
        assert_eq!(report.missing_required, ["a"]);
        assert_eq!((report.used[0].tensor.as_str(), report.used[0].neutral_matrices), ("b", 2));
    }

    #[test]
    fn entries_of_another_form_serve_and_are_told() {
        let imatrix = imatrix(&[
            ("blk.0.attn_kv_b.weight", entry(16, &[1, 1])),
            ("blk.0.ffn_up.0.weight", entry(8, &[1])),
            ("blk.0.ffn_down_exps.weight", entry(16, &[1, 0])),
        ]);
        let tensors = [
            tensor("blk.0.attn_v_b.weight", 8, 4, Need::Required),
            tensor("blk.0.attn_k_b.weight", 4, 4, Need::Required),
            tensor("blk.0.ffn_up_exps.weight", 8, 2, Need::Required),
            tensor("blk.0.ffn_down.0.weight", 8, 1, Need::Required),
        ];
        let report = match_to_model(&imatrix, &tensors, &EntryFilter::All, own_name);
        assert_eq!(report.served.len(), 3, "{report:?}");
        assert_eq!(report.unknown_names, Vec::<String>::new());
        assert_eq!(report.missing_required, ["blk.0.attn_k_b.weight"]);
        assert_eq!(report.without_data(), ["blk.0.attn_k_b.weight"]);
        assert_eq!(report.with_gaps(), ["blk.0.attn_k_b.weight", "blk.0.ffn_up_exps.weight"]);
        let error = report.check().unwrap_err().to_string();
        assert!(error.contains("another input than attn_kv_b") && error.contains("--missing-importance"), "{error}");
        let warnings = report.warnings().join("\n");
        for part in ["attn_v_b.weight\" by \"blk.0.attn_kv_b.weight", "by those of its experts", "by matrix 0 of"] {
            assert!(warnings.contains(part), "{part}: {warnings}");
        }
        let values = report.used[0].data(&imatrix).unwrap().importance().values;
        assert_eq!(values, [1.0; 32]);
    }

    #[test]
    fn filters_work_on_parts_of_names() {
        let imatrix = imatrix(&[
            ("blk.0.attn_q.weight", entry(4, &[1])),
            ("blk.0.attn_v.weight", entry(4, &[1])),
            ("blk.0.ffn_up.weight", entry(4, &[1])),
        ]);
        let tensors: Vec<_> = imatrix.entries.keys().map(|name| tensor(name, 4, 1, Need::Optional)).collect();
        let parts = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        let missing = |filter: EntryFilter| {
            let report = match_to_model(&imatrix, &tensors, &filter, own_name);
            assert_eq!(report.entries + report.filtered_out, 3);
            (report.missing_optional, report.entries)
        };
        let include = EntryFilter::new(&parts(&["attn_v", "ffn"]), &[]).unwrap();
        assert_eq!(missing(include), (parts(&["blk.0.attn_q.weight"]), 2));
        let exclude = EntryFilter::new(&[], &parts(&["attn_v", "ffn"])).unwrap();
        assert_eq!(missing(exclude), (parts(&["blk.0.attn_v.weight", "blk.0.ffn_up.weight"]), 1));
        assert_eq!(EntryFilter::new(&parts(&["a"]), &parts(&["b"])), Err(MatchError::BothFilters));
        assert_eq!(EntryFilter::new(&[], &[]), Ok(EntryFilter::All));
    }

    #[test]
    fn a_filter_that_leaves_nothing_is_refused() {
        let imatrix = imatrix(&[("blk.0.attn_q.weight", entry(4, &[1]))]);
        let filter = EntryFilter::Include(vec!["atn_q".into()]);
        let report = match_to_model(&imatrix, &[], &filter, own_name);
        assert_eq!(report.check(), Err(MatchError::NothingLeft(1)));
    }

    #[test]
    fn what_was_odd_in_the_file_is_said_again() {
        let mut imatrix = imatrix(&[("blk.0.attn_q.weight", entry(4, &[1]))]);
        imatrix.warnings.push(Warning::NoCalls { entries: 1, first: "blk.0.attn_q.weight".into() });
        let tensors = [tensor("blk.0.attn_q.weight", 4, 1, Need::Optional)];
        let warnings = match_to_model(&imatrix, &tensors, &EntryFilter::All, own_name).warnings();
        assert!(warnings.len() == 1 && warnings[0].starts_with("imatrix: 1 entries have a call count of 0"));
    }

    #[test]
    fn renumbered_layers_find_their_old_entries() {
        let imatrix = imatrix(&[("blk.1.a.weight", entry(4, &[1])), ("blk.2.a.weight", entry(4, &[1]))]);
        let tensors = [tensor("blk.1.a.weight", 4, 1, Need::Optional)];
        let old_name = |name: &str| Cow::Owned(name.replace("blk.1.", "blk.2."));
        let report = match_to_model(&imatrix, &tensors, &EntryFilter::All, old_name);
        assert_eq!(report.used[0].entry, "blk.2.a.weight");
        assert_eq!(report.unknown_names, ["blk.1.a.weight"]);
    }

    #[test]
    fn long_lists_are_counted() {
        let names: Vec<String> = (0..100).map(|i| format!("blk.{i}.a.weight")).collect();
        let error = MatchError::MissingRequired(names).to_string();
        assert!(error.starts_with("100 tensors have no imatrix data") && error.contains("and 92 more"), "{error}");
    }
}
