//! Metadata values by the architecture's name, checked for range.

use super::super::error::ModelError;
use crate::gguf::{Metadata, ValueType};

/// `LLAMA_MAX_LAYERS` of llama.cpp b10605.
pub(super) const MAX_LAYERS: u64 = 512;
/// `LLAMA_MAX_EXPERTS` of llama.cpp b10605.
pub(super) const MAX_EXPERTS: u64 = 512;
/// Upper bound of widths and counts; keeps all products of two far from overflow.
pub(super) const MAX_WIDTH: u64 = 1 << 28;

/// The keys behind an architecture's name.
pub(super) struct Keys<'a> {
    pub metadata: &'a Metadata,
    pub arch: &'static str,
}

impl Keys<'_> {
    pub(super) fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.arch)
    }

    pub(super) fn missing(&self, suffix: &str) -> ModelError {
        ModelError::MissingKey { key: self.name(suffix) }
    }

    pub(super) fn bad(&self, suffix: &str, found: impl ToString, expected: impl ToString) -> ModelError {
        ModelError::BadValue { key: self.name(suffix), found: found.to_string(), expected: expected.to_string() }
    }

    pub(super) fn bool(&self, suffix: &str) -> Result<Option<bool>, ModelError> {
        Ok(self.metadata.bool(&self.name(suffix))?)
    }

    pub(super) fn count(&self, suffix: &str, limit: u64) -> Result<Option<usize>, ModelError> {
        match self.metadata.u64(&self.name(suffix))? {
            None => Ok(None),
            Some(value) if value <= limit => Ok(Some(value as usize)),
            Some(value) => Err(self.bad(suffix, value, format!("at most {limit}"))),
        }
    }

    pub(super) fn required_count(&self, suffix: &str, limit: u64) -> Result<usize, ModelError> {
        match self.count(suffix, limit)? {
            None => Err(self.missing(suffix)),
            Some(0) => Err(self.bad(suffix, 0, "at least 1")),
            Some(value) => Ok(value),
        }
    }

    pub(super) fn optional_positive(&self, suffix: &str, limit: u64) -> Result<Option<usize>, ModelError> {
        match self.count(suffix, limit)? {
            Some(0) => Err(self.bad(suffix, 0, "at least 1")),
            value => Ok(value),
        }
    }

    /// One value for all layers or an array with one value per layer; arrays may go on to the blocks behind the layers.
    pub(super) fn per_layer(&self, suffix: &str, layers: Layers) -> Result<Option<Vec<usize>>, ModelError> {
        if let Ok(Some(array)) = self.metadata.array(&self.name(suffix)) {
            self.check_length(suffix, array.len(), layers)?;
            let values = array.to_i64_vec()?;
            let values = values.iter().take(layers.run).map(|&v| match u64::try_from(v) {
                Ok(v) if v <= MAX_WIDTH => Ok(v as usize),
                _ => Err(self.bad(suffix, v, format!("values from 0 to {MAX_WIDTH}"))),
            });
            return values.collect::<Result<Vec<_>, _>>().map(Some);
        }
        Ok(self.count(suffix, MAX_WIDTH)?.map(|value| vec![value; layers.run]))
    }

    /// An array with one flag per layer.
    pub(super) fn flags(&self, suffix: &str, layers: Layers) -> Result<Option<Vec<bool>>, ModelError> {
        let Ok(Some(array)) = self.metadata.array(&self.name(suffix)) else { return Ok(None) };
        self.check_length(suffix, array.len(), layers)?;
        let mut flags: Vec<bool> = match array.elem_type() {
            ValueType::Bool => array.to_bool_vec()?,
            _ => array.to_i64_vec()?.iter().map(|&v| v != 0).collect(),
        };
        flags.truncate(layers.run);
        Ok(Some(flags))
    }

    /// One number for all layers or an array with one number per layer.
    pub(super) fn numbers(&self, suffix: &str, layers: Layers) -> Result<Option<Vec<f32>>, ModelError> {
        if let Ok(Some(array)) = self.metadata.array(&self.name(suffix)) {
            self.check_length(suffix, array.len(), layers)?;
            let mut numbers = array.to_f32_vec()?;
            numbers.truncate(layers.run);
            if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
                return Err(self.bad(suffix, number, "finite numbers"));
            }
            return Ok(Some(numbers));
        }
        Ok(self.finite(suffix)?.map(|number| vec![number; layers.run]))
    }

    fn check_length(&self, suffix: &str, len: u64, layers: Layers) -> Result<(), ModelError> {
        if len == layers.run as u64 || len == layers.all as u64 {
            return Ok(());
        }
        Err(self.bad(suffix, format!("an array of {len}"), format!("one value per layer, {}", layers.run)))
    }

    pub(super) fn finite(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.metadata.f32(&self.name(suffix))? {
            Some(value) if !value.is_finite() => Err(self.bad(suffix, value, "a finite number")),
            value => Ok(value),
        }
    }

    pub(super) fn non_negative(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.finite(suffix)? {
            Some(value) if value < 0.0 => Err(self.bad(suffix, value, "zero or more")),
            value => Ok(value),
        }
    }

    pub(super) fn positive(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        match self.finite(suffix)? {
            Some(value) if value <= 0.0 => Err(self.bad(suffix, value, "more than zero")),
            value => Ok(value),
        }
    }
}

/// Numbers of layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layers {
    /// Those that a pass runs.
    pub run: usize,
    /// With the blocks behind them that predict further tokens.
    pub all: usize,
}
