//! Reference cases for the tests of the audio and text networks.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::weights::Weights;

/// One case of `tests/goldens`.
pub(crate) struct Golden {
    folder: PathBuf,
    pub(crate) config: Value,
    inputs: HashMap<String, Tensor>,
    outputs: HashMap<String, Tensor>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens")).join(name);
        let read = |file| candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap();
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        Self { config, inputs: read("inputs.safetensors"), outputs: read("outputs.safetensors"), folder }
    }

    pub(crate) fn tensors(&self) -> HashMap<String, Tensor> {
        candle_core::safetensors::load(self.folder.join("weights.safetensors"), &Device::Cpu).unwrap()
    }

    pub(crate) fn weights(&self) -> Weights {
        Weights::from_tensors(self.tensors(), DType::F32, &Device::Cpu)
    }

    pub(crate) fn input(&self, name: &str) -> Tensor {
        self.inputs[name].clone()
    }

    pub(crate) fn output(&self, name: &str) -> Tensor {
        self.outputs[name].clone()
    }

    pub(crate) fn number(&self, name: &str) -> usize {
        self.config[name].as_u64().unwrap() as usize
    }

    /// Asserts `max|got - expected| <= tolerance·max|expected|`, with the case's own tolerance.
    pub(crate) fn check(&self, name: &str, got: &Tensor) {
        self.check_within(name, got, self.config["tolerance_max_rel"].as_f64().unwrap());
    }

    pub(crate) fn check_within(&self, name: &str, got: &Tensor, tolerance: f64) {
        let expected = &self.outputs[name];
        assert_eq!(got.dims(), expected.dims(), "{name}: shape");
        let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (got, expected) = (values(got), values(expected));
        let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
        let (at, difference) = got
            .iter()
            .zip(&expected)
            .map(|(g, e)| (g - e).abs())
            .enumerate()
            .fold((0, 0f64), |worst, (i, d)| if d <= worst.1 { worst } else { (i, d) });
        let relative = difference / largest;
        println!("{name}: {relative:.2e} of {tolerance:.0e}");
        assert!(
            relative <= tolerance,
            "{name}: off by {difference:e} ({relative:e} of {largest}) at {at}: got {}, expected {}",
            got[at],
            expected[at],
        );
    }
}
