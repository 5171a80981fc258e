//! What becomes of each tensor of a folder: quantized, copied, or routed around what groups do not fit.

use std::collections::{HashMap, HashSet};

use super::ExportError;
use super::draft::{Content, Item, KeptTensor, Module, OddTensor};
use super::names::{self, Role};
use super::request::{Odd, Request};
use super::scheme::SchemeRow;
use crate::convert::source::{Matrix, ModelFolder};
use crate::rounding::grid::{Grid, Groups};

/// Why a linear layer keeps its 16 bits.
fn reason(role: Role) -> &'static str {
    match role {
        Role::Head => "output matrix",
        Role::Router => "router",
        Role::Narrow => "decay and step of a delta net",
        Role::NextTokens => "predicts further tokens",
        Role::Tower => "image or sound part",
        Role::Linear | Role::Other => "ignored",
    }
}

/// What is decided tensor by tensor.
pub(super) struct Decision<'a> {
    request: &'a Request,
    row: &'static SchemeRow,
    source: &'a ModelFolder,
    /// Groups of the configuration: the scheme's, then those of odd matrices.
    pub(super) groups: Vec<Groups>,
    pub(super) items: Vec<Item>,
    pub(super) kept: Vec<KeptTensor>,
    pub(super) odd: Vec<OddTensor>,
    pub(super) warnings: Vec<String>,
    layers: Option<u64>,
}

impl<'a> Decision<'a> {
    pub(super) fn new(request: &'a Request, row: &'static SchemeRow, source: &'a ModelFolder) -> Decision<'a> {
        let groups = request.group_size.map_or(row.groups, Groups::from);
        Decision {
            request,
            row,
            source,
            groups: vec![groups],
            items: Vec::new(),
            kept: Vec::new(),
            odd: Vec::new(),
            warnings: source.warnings().to_vec(),
            layers: source.count("num_hidden_layers"),
        }
    }

    pub(super) fn weight(&mut self, weight: usize) -> Result<(), ExportError> {
        let name = self.source.name(weight).to_owned();
        let role = self.role(&name);
        let numeric = self.source.is_numeric(weight);
        if let Some(module) = names::module_of(&name)
            && let Some(matrix) = self.source.matrix(weight)
            && numeric
        {
            let is_ignored = self.request.ignore.iter().any(|pattern| pattern.is_match(module));
            if role == Role::Linear && !is_ignored {
                self.module(module.to_owned(), matrix);
                return Ok(());
            }
            if role.is_linear_layer() {
                self.keep(module, if is_ignored { "ignored" } else { reason(role) }, false);
            }
        } else if self.source.shape(weight).len() == 3 && numeric && name.contains("experts") {
            return self.stack(weight, &name);
        }
        self.copy(weight, &name)
    }

    fn role(&self, name: &str) -> Role {
        if self.source.is_other_tower(name) {
            return Role::Tower;
        }
        names::module_of(name).map_or(Role::Other, |module| names::role_of(module, self.layers))
    }

    fn module(&mut self, name: String, matrix: Matrix) {
        let module = Module { name: name.clone(), matrix, group: 0 };
        self.items.push(Item { name, content: Content::Module(module) });
    }

    fn keep(&mut self, module: &str, reason: &'static str, odd: bool) {
        self.kept.push(KeptTensor { module: module.to_owned(), reason, odd });
    }

    /// All experts in one tensor: single matrices where the class has names for them.
    fn stack(&mut self, weight: usize, name: &str) -> Result<(), ExportError> {
        let module = names::module_of(name).unwrap_or(name);
        let is_ignored = self.request.ignore.iter().any(|pattern| pattern.is_match(module));
        let role = names::role_of(module, self.layers);
        let experts = if role == Role::Linear && !is_ignored { self.source.experts(weight) } else { None };
        if let Some(experts) = experts {
            experts.into_iter().for_each(|expert| self.module(expert.module, expert.matrix));
            return Ok(());
        }
        if role == Role::Linear && !is_ignored {
            self.warnings.push(format!(
                "{name} holds all experts in a layout that is not known for {}; it stays in 16 bits",
                self.source.class()
            ));
        }
        // Loaders know the stack as one module with experts in it.
        let stack = module.rsplit_once('.').map_or(module, |(stack, _)| stack);
        if !self.kept.iter().any(|kept| kept.module == stack) {
            self.keep(stack, "experts in one tensor", false);
        }
        self.copy(weight, name)
    }

    /// A tensor that is not quantized.
    fn copy(&mut self, weight: usize, name: &str) -> Result<(), ExportError> {
        let shape = self.source.shape(weight).to_vec();
        let content = match self.source.stored_type(weight) {
            Some(dtype) => Content::Stored { weight, dtype, bytes: self.source.stored_bytes(weight), shape },
            None => {
                let columns = shape.last().copied().unwrap_or(1);
                let rows = shape.iter().rev().skip(1).product();
                let matrix = self.source.rows_of(weight, rows, columns);
                Content::Decoded { matrix, dtype: self.source.model_type(), shape }
            }
        };
        self.items.push(Item { name: name.to_owned(), content });
        Ok(())
    }

    /// Finds matrices that the groups do not fit, with all that loaders put into one with them, and gives them another way.
    pub(super) fn route_odd(&mut self) {
        let problems: HashMap<String, String> = self
            .items
            .iter()
            .filter_map(Item::module)
            .filter_map(|module| Some((module.name.clone(), self.problem(module)?)))
            .collect();
        if problems.is_empty() {
            return;
        }
        let key = |name: &str| names::fused_of(name).map_or_else(|| name.to_owned(), |(key, ..)| key);
        let keys: HashSet<String> = problems.keys().map(|name| key(name)).collect();
        let (mut kept, mut weights) = (Vec::new(), Vec::new());
        for index in 0..self.items.len() {
            let Some(module) = self.items[index].module().filter(|module| keys.contains(&key(&module.name))) else {
                continue;
            };
            let (name, matrix) = (module.name.clone(), module.matrix.clone());
            let groups = self.way_out(&matrix);
            let problem = problems.get(&name).cloned().unwrap_or_else(|| "goes with one that does not fit".to_owned());
            let becomes = match groups {
                None => "stays in 16 bits".to_owned(),
                Some(Groups::Channel) => "gets a scale for each row".to_owned(),
                Some(_) => "gets groups of 32".to_owned(),
            };
            self.odd.push(OddTensor { module: name.clone(), problem, becomes });
            match groups {
                None => {
                    kept.push(name);
                    weights.push(index);
                }
                Some(groups) => {
                    let group = self.groups.iter().position(|known| *known == groups).unwrap_or(self.groups.len());
                    if group == self.groups.len() {
                        self.groups.push(groups);
                    }
                    if let Content::Module(module) = &mut self.items[index].content {
                        module.group = group;
                    }
                }
            }
        }
        for (name, index) in kept.into_iter().zip(weights) {
            self.keep(&name, "no whole groups", true);
            let item = &mut self.items[index];
            if let Content::Module(module) = &item.content {
                let content = self.source.unquantized(&module.matrix);
                item.name = format!("{name}.weight");
                item.content = content.map_or_else(
                    || Content::Decoded {
                        matrix: module.matrix.clone(),
                        dtype: self.source.model_type(),
                        shape: vec![module.matrix.rows, module.matrix.columns],
                    },
                    |(weight, dtype)| Content::Stored {
                        weight,
                        dtype,
                        bytes: self.source.stored_bytes(weight),
                        shape: self.source.shape(weight).to_vec(),
                    },
                );
            }
        }
    }

    /// Why the scheme's groups do not fit a matrix.
    fn problem(&self, module: &Module) -> Option<String> {
        let Matrix { rows, columns, .. } = module.matrix;
        match self.groups[0] {
            Groups::Columns(size) if !columns.is_multiple_of(size as u64) => {
                Some(format!("its rows of {columns} weights are no whole groups of {size}"))
            }
            Groups::Blocks { columns: wide, .. } if !columns.is_multiple_of(wide as u64) => Some(format!(
                "its rows of {columns} weights are no whole groups of {wide}, in which its inputs are rounded"
            )),
            Groups::Blocks { rows: tall, .. } => {
                let (_, _, is_last) = names::fused_of(&module.name)?;
                (!is_last && !rows.is_multiple_of(tall as u64)).then(|| {
                    format!(
                        "its {rows} rows are no whole blocks of {tall}, which vLLM needs where it puts several into one"
                    )
                })
            }
            _ => None,
        }
    }

    fn way_out(&self, matrix: &Matrix) -> Option<Groups> {
        let is_integer = matches!(self.row.grid, Grid::Int { .. });
        match self.request.odd {
            Odd::Keep => None,
            Odd::Channel => (is_integer || self.row.grid == Grid::Fp8).then_some(Groups::Channel),
            Odd::G32 => (is_integer && matrix.columns.is_multiple_of(32)).then_some(Groups::Columns(32)),
        }
    }
}
