//! What PyTorch took and gave for the same inputs and weights, as `gpu_pytorch.py` prints it.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use serde::Deserialize;

/// Rows of a sample, the first and the last among them, and the step from one of its columns to the next.
const ROWS: usize = 8;
const COLUMNS: usize = 8;
/// The largest difference from PyTorch's result that may be, relative to the largest value: both round to 8 bits, at
/// other places.
pub(super) const APART: f64 = 2e-2;

/// One line.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Theirs {
    name: String,
    /// Median seconds.
    pub(super) seconds: f64,
    /// Some values of the result.
    sample: Vec<f32>,
}

/// All lines, by name.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, Theirs>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let row = |line: &str| -> Result<(String, Theirs)> {
        let short: String = line.chars().take(80).collect();
        let theirs: Theirs = serde_json::from_str(line).with_context(|| format!("{}: {short}", path.display()))?;
        ensure!(theirs.seconds > 0.0, "{}: {} took {} s", path.display(), theirs.name, theirs.seconds);
        Ok((theirs.name.clone(), theirs))
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(row).collect()
}

/// Values of a result `(tokens, width)` at the places of PyTorch's sample.
fn sample(out: &Tensor) -> Result<Vec<f32>> {
    let (rows, _) = out.dims2()?;
    let mut values = Vec::new();
    for i in 0..ROWS {
        let row = out.get(i * (rows - 1) / (ROWS - 1))?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        values.extend(row.iter().step_by(COLUMNS));
    }
    Ok(values)
}

impl Theirs {
    /// The largest difference of a result from PyTorch's, relative to the largest value.
    ///
    /// Errors: it has another size; a value is no number.
    pub(super) fn apart(&self, out: &Tensor) -> Result<f64> {
        let own = sample(out)?;
        ensure!(
            own.len() == self.sample.len(),
            "a sample of {} values, PyTorch's has {}",
            own.len(),
            self.sample.len()
        );
        ensure!(own.iter().chain(&self.sample).all(|v| v.is_finite()), "a value is no number");
        let largest = self.sample.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
        let most = own.iter().zip(&self.sample).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        Ok(f64::from(most / largest))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_pytorch_says_is_read_line_by_line_and_nonsense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch.json");
        std::fs::write(
            &path,
            "{\"name\": \"a\", \"seconds\": 0.5, \"sample\": [1.0]}\n\n{\"name\": \"b\", \"seconds\": 2, \"sample\": []}\n",
        )
        .unwrap();
        let all = read(&path).unwrap();
        assert_eq!((all["a"].seconds, all["a"].sample.as_slice(), all["b"].seconds), (0.5, [1.0].as_slice(), 2.0));
        for wrong in ["{\"name\": \"a\", \"seconds\": 1}", "{\"name\": \"a\", \"seconds\": 0, \"sample\": []}", "a"] {
            std::fs::write(&path, wrong).unwrap();
            assert!(read(&path).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_result_is_held_against_the_same_places_of_pytorchs() {
        let out = Tensor::arange(0f32, 15.0 * 16.0, &Device::Cpu).unwrap().reshape((15, 16)).unwrap();
        // Rows 0, 2, 4, .. 14; columns 0 and 8.
        let sample: Vec<f32> = (0..8).flat_map(|i| [32.0 * i as f32, 32.0 * i as f32 + 8.0]).collect();
        let theirs = Theirs { name: String::new(), seconds: 1.0, sample };
        assert_eq!(theirs.apart(&out).unwrap(), 0.0);
        let other = (&out + 23.2).unwrap();
        assert!((theirs.apart(&other).unwrap() - 23.2 / 232.0).abs() < 1e-6);
        assert!(theirs.apart(&(out / 0.0).unwrap()).is_err(), "infinite");
        let small = Tensor::zeros((15, 8), DType::F32, &Device::Cpu).unwrap();
        assert!(theirs.apart(&small).is_err(), "another width");
    }
}
