//! Random tensors that depend on nothing but seed, name and position.

use std::{collections::BTreeMap, path::Path};

use half::bf16;
use safetensors::{Dtype, tensor::TensorView};

use crate::{Error, Result};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser: a bijection that spreads every input bit over the output.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A source of values; each name opens its own stream.
#[derive(Clone, Copy)]
pub(super) struct Values(u64);

impl Values {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)))
    }

    /// The source for one part, independent of all others.
    pub(super) fn part(self, name: &str) -> Self {
        // FNV-1a, so that names which share letters still differ.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(mix(self.0 ^ hash))
    }

    /// Value `index`, uniform in -1..1 with 24 bits.
    fn at(self, index: u64) -> f32 {
        let bits = mix(self.0.wrapping_add((index + 1).wrapping_mul(GOLDEN))) >> 40;
        bits as f32 / (1 << 23) as f32 - 1.0
    }
}

/// The tensors of one file.
pub(super) struct Sheet {
    values: Values,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Sheet {
    pub(super) fn new(values: &Values) -> Self {
        Self { values: *values, tensors: BTreeMap::new() }
    }

    fn put(&mut self, name: String, shape: &[usize], mean: f32, deviation: f32) {
        let source = self.values.part(&name);
        // A uniform value in -1..1 has the standard deviation 1/sqrt(3).
        let scale = deviation * 3f32.sqrt();
        let count: usize = shape.iter().product();
        let data = (0..count as u64).map(|i| mean + scale * source.at(i)).collect();
        self.tensors.insert(name, (shape.to_vec(), data));
    }

    /// A table of embeddings or positions.
    pub(super) fn table(&mut self, name: &str, shape: &[usize], deviation: f32) {
        self.put(name.to_owned(), shape, 0.0, deviation);
    }

    /// The weight `(out, in, ..)` of a layer that keeps the scale of its input, times `gain`.
    pub(super) fn weight(&mut self, name: &str, shape: &[usize], gain: f32) {
        let fan_in: usize = shape[1..].iter().product();
        self.put(format!("{name}.weight"), shape, 0.0, gain / (fan_in as f32).sqrt());
    }

    /// Weight and bias of a layer.
    pub(super) fn layer(&mut self, name: &str, shape: &[usize], gain: f32) {
        self.weight(name, shape, gain);
        self.put(format!("{name}.bias"), &shape[..1], 0.0, 0.02);
    }

    /// The weight of a normalisation.
    pub(super) fn scale(&mut self, name: &str, width: usize) {
        self.put(format!("{name}.weight"), &[width], 1.0, 0.02);
    }

    /// Weight and bias of a normalisation.
    pub(super) fn norm(&mut self, name: &str, width: usize) {
        self.scale(name, width);
        self.put(format!("{name}.bias"), &[width], 0.0, 0.02);
    }

    /// Writes the tensors as f32 or bf16.
    pub(super) fn save(self, path: &Path, dtype: Dtype) -> Result<()> {
        let encoded: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .tensors
            .into_iter()
            .map(|(name, (shape, data))| {
                let bytes = match dtype {
                    Dtype::BF16 => data.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
                    _ => data.iter().flat_map(|v| v.to_le_bytes()).collect(),
                };
                (name, shape, bytes)
            })
            .collect();
        let stored = if dtype == Dtype::BF16 { Dtype::BF16 } else { Dtype::F32 };
        let mut views = Vec::with_capacity(encoded.len());
        for (name, shape, bytes) in &encoded {
            let view = TensorView::new(stored, shape.clone(), bytes).map_err(|e| Error::file(path, e))?;
            views.push((name.as_str(), view));
        }
        safetensors::serialize_to_file(views, None, path).map_err(|e| Error::file(path, e))
    }
}
