//! Comparison of a tensor with its reference.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow, bail};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::Case;

/// Differing pairs that a row shows.
const PAIRS: usize = 4;

/// How one output tensor compares.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Name in the case.
    pub tensor: String,
    /// Whether the difference is within the tolerance.
    pub holds: bool,
    /// Largest absolute difference over the largest absolute reference value.
    pub relative: f64,
    /// Largest absolute difference.
    pub absolute: f64,
    /// Root mean square of the differences over that of the reference: how far a network drifts in 16 bits.
    pub drift: f64,
    /// The limit on `relative` (or on `absolute`, for 8-bit levels).
    pub tolerance: f64,
    /// Index of the largest difference.
    pub at: Vec<usize>,
    /// First pairs (index, got, reference) past the tolerance.
    pub pairs: Vec<(Vec<usize>, f64, f64)>,
    /// Why it could not be compared, if so.
    pub reason: Option<String>,
}

impl Comparison {
    fn failed(tensor: &str, reason: String) -> Self {
        Self {
            tensor: tensor.to_owned(),
            holds: false,
            relative: f64::NAN,
            absolute: f64::NAN,
            drift: f64::NAN,
            tolerance: f64::NAN,
            at: Vec::new(),
            pairs: Vec::new(),
            reason: Some(reason),
        }
    }
}

/// Collects a case's results and holds each against its reference.
pub struct Outputs<'a> {
    case: &'a Case,
    rows: BTreeMap<String, Comparison>,
}

impl<'a> Outputs<'a> {
    /// Nothing compared yet.
    #[must_use]
    pub fn new(case: &'a Case) -> Self {
        Self { case, rows: BTreeMap::new() }
    }

    /// Whether the case expects such a tensor.
    #[must_use]
    pub fn expects(&self, name: &str) -> bool {
        self.case.outputs.contains_key(name)
    }

    /// Compares all of a tensor.
    pub fn check(&mut self, name: &str, got: &Tensor) -> Result<()> {
        self.check_where(name, got, |_| true)
    }

    /// Compares the elements whose index `counts` (padding rows mean nothing, say).
    pub fn check_where(&mut self, name: &str, got: &Tensor, counts: impl Fn(&[usize]) -> bool) -> Result<()> {
        let want = self.case.outputs.get(name).ok_or_else(|| anyhow!("the case does not expect an output {name:?}"))?;
        let row = if want.dims() == got.dims() {
            self.compare(name, got, want, counts)?
        } else {
            Comparison::failed(name, format!("shape {:?}, the reference has {:?}", got.dims(), want.dims()))
        };
        if self.rows.insert(name.to_owned(), row).is_some() {
            bail!("output {name:?} was compared twice");
        }
        Ok(())
    }

    fn compare(
        &self,
        name: &str,
        got: &Tensor,
        want: &Tensor,
        counts: impl Fn(&[usize]) -> bool,
    ) -> Result<Comparison> {
        let levels: Option<f64> = self.case.find("max_abs_levels")?;
        let levels = levels.filter(|_| want.dtype() == DType::U8);
        let relative_limit: f64 = self.case.get("tolerance_max_rel")?;
        let flat = |t: &Tensor| -> Result<Vec<f64>> {
            Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let (got, want_values) = (flat(got)?, flat(want)?);
        let dims = want.dims();
        let (mut scale, mut worst) = (0.0f64, (0.0f64, 0usize));
        let (mut differences, mut references) = (0.0f64, 0.0f64);
        let counted: Vec<usize> = (0..want_values.len()).filter(|&i| counts(&index(i, dims))).collect();
        for &i in &counted {
            scale = scale.max(want_values[i].abs());
            let difference = (got[i] - want_values[i]).abs();
            // A NaN differs by more than anything.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            differences += difference * difference;
            references += want_values[i] * want_values[i];
            if difference > worst.0 {
                worst = (difference, i);
            }
        }
        let limit = levels.unwrap_or(relative_limit * scale);
        let holds = worst.0 <= limit && !counted.is_empty();
        let pairs = counted
            .iter()
            .filter(|&&i| !((got[i] - want_values[i]).abs() <= limit))
            .take(PAIRS)
            .map(|&i| (index(i, dims), got[i], want_values[i]))
            .collect();
        Ok(Comparison {
            tensor: name.to_owned(),
            holds,
            relative: if worst.0 == 0.0 { 0.0 } else { worst.0 / scale },
            absolute: worst.0,
            drift: if worst.0 == 0.0 { 0.0 } else { (differences / references).sqrt() },
            tolerance: levels.unwrap_or(relative_limit),
            at: index(worst.1, dims),
            pairs,
            reason: counted.is_empty().then(|| "nothing was compared".to_owned()),
        })
    }

    /// All rows; an output that the case expects and nothing computed is one that does not hold.
    #[must_use]
    pub fn finish(mut self) -> Vec<Comparison> {
        for name in self.case.outputs.keys() {
            self.rows
                .entry(name.clone())
                .or_insert_with(|| Comparison::failed(name, "the runner did not compute it".to_owned()));
        }
        self.rows.into_values().collect()
    }
}

fn index(mut flat: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (i, &d) in index.iter_mut().zip(dims).rev() {
        *i = flat % d;
        flat /= d;
    }
    index
}
