//! Tensors of checkpoints in memory, to write them in another form.

use std::{collections::BTreeMap, fs, path::Path};

use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// One tensor as a file holds it.
#[derive(Debug, Clone)]
pub struct Plain {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Plain {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    pub fn bf16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        Self { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    }

    /// The values of a bf16 or f32 tensor.
    pub fn values(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::BF16 => self.bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F32 => self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            other => panic!("{other:?}"),
        }
    }

    /// One signed byte a value and one scale a row.
    pub fn int8(&self) -> (Self, Vec<f32>) {
        let (values, columns) = (self.values(), self.shape[1]);
        let scales: Vec<f32> = values.chunks(columns).map(|row| largest(row) / 127.0).collect();
        let rows = values.chunks(columns).zip(&scales);
        let bytes = rows.flat_map(|(row, s)| row.iter().map(move |v| (v / s).round() as i8 as u8)).collect();
        (Self { dtype: Dtype::I8, shape: self.shape.clone(), bytes }, scales)
    }

    /// One e4m3 byte a value and one scale for all.
    pub fn fp8(&self) -> (Self, f32) {
        let values = self.values();
        let scale = bf16::from_f32(largest(&values) / 448.0).to_f32();
        // Positive numbers ascend with their byte; 0x7f is no number.
        let table: Vec<f32> = (0..0x7f).map(model::weights::fp8::e4m3_to_f32).collect();
        let byte = |v: &f32| {
            let wanted = v.abs() / scale;
            let above = table.partition_point(|t| *t < wanted).min(table.len() - 1);
            let below = above.saturating_sub(1);
            let nearest = if wanted - table[below] < table[above] - wanted { below } else { above };
            nearest as u8 | if *v < 0.0 { 0x80 } else { 0 }
        };
        let bytes = values.iter().map(byte).collect();
        (Self { dtype: Dtype::F8_E4M3, shape: self.shape.clone(), bytes }, scale)
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()))
}

/// Tensors by name.
pub type Sheet = BTreeMap<String, Plain>;

pub fn read(file: &Path) -> Sheet {
    let bytes = fs::read(file).unwrap();
    let plain =
        |view: TensorView<'_>| Plain { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
    SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(|(name, view)| (name, plain(view))).collect()
}

pub fn write(file: &Path, sheet: &Sheet) {
    let views = sheet
        .iter()
        .map(|(name, plain)| (name.as_str(), TensorView::new(plain.dtype, plain.shape.clone(), &plain.bytes).unwrap()));
    let about = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(about), file).unwrap();
}

/// The same tensors under other names.
pub fn renamed(sheet: &Sheet, name: impl Fn(&str) -> String) -> Sheet {
    sheet.iter().map(|(old, plain)| (name(old), plain.clone())).collect()
}

/// Whether it is one of the transformer's weights that quantised checkpoints quantise.
pub fn quantised(name: &str, plain: &Plain) -> bool {
    model::blueprint::Network::Transformer.quantises(name, &plain.shape)
}
