//! Small networks for tests of what holds beyond the reference cases. The cases themselves are compared by the
//! parity runner.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, IndexOp, Tensor};
use serde_json::Value;

use crate::weights::Weights;

/// The network and the inputs of one case of `tests/goldens`.
pub(crate) struct Golden {
    folder: PathBuf,
    pub(crate) config: Value,
    inputs: HashMap<String, Tensor>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens")).join(name);
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let inputs = candle_core::safetensors::load(folder.join("inputs.safetensors"), &Device::Cpu).unwrap();
        Self { folder, config, inputs }
    }

    /// The file of its weights, its own or that of the case that it names.
    pub(crate) fn weights_file(&self) -> PathBuf {
        let named = self.config["weights_from"].as_str().map(|name| self.folder.join("..").join(name));
        named.as_ref().unwrap_or(&self.folder).join("weights.safetensors")
    }

    pub(crate) fn tensors(&self) -> HashMap<String, Tensor> {
        candle_core::safetensors::load(self.weights_file(), &Device::Cpu).unwrap()
    }

    pub(crate) fn weights(&self) -> Weights {
        Weights::from_tensors(self.tensors(), DType::F32, &Device::Cpu)
    }

    pub(crate) fn input(&self, name: &str) -> Tensor {
        self.inputs[name].clone()
    }

    /// Item `b` of an input.
    pub(crate) fn item(&self, name: &str, b: usize) -> Tensor {
        self.inputs[name].i(b).unwrap()
    }

    pub(crate) fn number(&self, name: &str) -> usize {
        self.config[name].as_u64().unwrap() as usize
    }
}

/// Deterministic values in -1..1: the same for the same seed.
pub(crate) fn noise(shape: &[usize], seed: u64) -> Tensor {
    crate::cuda::checks::noise(shape, seed).unwrap()
}

/// Largest absolute difference over the largest absolute value.
pub(crate) fn worst(got: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(got.dims(), wanted.dims());
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    max((got - wanted).unwrap()) / max(wanted.clone()).max(1e-30)
}
