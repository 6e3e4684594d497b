//! A case's files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use model::weights::Weights;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// One reference case, read into memory.
pub struct Case {
    dir: PathBuf,
    compute: DType,
    /// Where its networks run, and where its inputs are.
    pub device: Device,
    /// `config.json`.
    pub config: Value,
    /// Inputs by name: f32, i64 or u8.
    pub inputs: BTreeMap<String, Tensor>,
    /// Expected outputs by name.
    pub outputs: BTreeMap<String, Tensor>,
}

impl Case {
    /// Reads a case's folder; its networks are to compute in `compute`, on the processor.
    pub fn open(dir: &Path, compute: DType) -> Result<Self> {
        Self::open_on(dir, compute, &Device::Cpu)
    }

    /// As [`open`](Self::open), for networks on another device.
    pub fn open_on(dir: &Path, compute: DType, device: &Device) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let config = serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
        let inputs = dir.join("inputs.safetensors");
        Ok(Self {
            dir: dir.to_owned(),
            compute,
            config,
            inputs: if inputs.exists() { read(&inputs, device)? } else { BTreeMap::new() },
            outputs: read(&dir.join("outputs.safetensors"), &Device::Cpu)?,
            device: device.clone(),
        })
    }

    /// An input.
    pub fn input(&self, name: &str) -> Result<&Tensor> {
        self.inputs.get(name).ok_or_else(|| anyhow!("the case has no input {name:?}"))
    }

    /// A setting of the config.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let value = self.config.get(key).ok_or_else(|| anyhow!("config.json has no {key:?}"))?;
        serde_json::from_value(value.clone()).with_context(|| format!("config.json: {key:?}"))
    }

    /// A setting of the config, if it is there.
    pub fn find<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.config.get(key).map(|_| self.get(key)).transpose()
    }

    /// The case's weights, its own or those of the sibling that it names, in the type that the networks
    /// compute in.
    pub fn weights(&self) -> Result<Weights> {
        let dir = match self.find::<String>("weights_from")? {
            Some(sibling) => self.dir.parent().unwrap_or(Path::new(".")).join(sibling),
            None => self.dir.clone(),
        };
        let tensors = read(&dir.join("weights.safetensors"), &Device::Cpu)?;
        Ok(Weights::from_tensors(tensors.into_iter().collect(), self.compute, &self.device))
    }
}

/// Every tensor of a file; types that candle lacks become the nearest wider one that it has.
fn read(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("reading {}", path.display()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let (shape, data) = (view.shape(), view.data());
        let raw = |dtype| Tensor::from_raw_buffer(data, dtype, shape, device);
        let tensor = match view.dtype() {
            Dtype::F32 => raw(DType::F32)?,
            Dtype::F64 => raw(DType::F64)?,
            Dtype::F16 => raw(DType::F16)?,
            Dtype::BF16 => raw(DType::BF16)?,
            Dtype::U8 => raw(DType::U8)?,
            Dtype::I64 => raw(DType::I64)?,
            Dtype::I32 => {
                let wide: Vec<i64> =
                    data.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect();
                Tensor::from_vec(wide, shape, device)?
            }
            Dtype::BOOL => raw(DType::U8)?,
            other => return Err(anyhow!("{}: tensor {name:?} has type {other:?}", path.display())),
        };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}
