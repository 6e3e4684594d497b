//! One pass of a whole transformer from its files, and some of its blocks against another checkpoint's.

use std::{collections::BTreeMap, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use model::{
    diffusion::{
        Conditioning, DoubleBlock, Grid, MOTION_EXP, MOTION_POSE, Rope, SingleBlock, Transformer, TransformerConfig,
    },
    weights::Weights,
};
use serde::Serialize;
use service_kit::memory::{peak_bytes, reset_peak};

use super::made::random;

/// What a pass took.
#[derive(Debug, Serialize)]
pub struct Pass {
    /// Tokens of the pass: reference frame, latent frames and text.
    pub tokens: usize,
    /// Bytes of the checkpoint's tensors.
    pub weight_bytes: u64,
    /// Seconds to open the checkpoint, which reads all of it once to look for values that are no numbers.
    pub open_seconds: f64,
    /// Seconds of one pass.
    pub seconds: f64,
    /// Most bytes on the process's heap during the pass, inputs and shown tensors included; pages of the mapped files
    /// are the system's to keep or drop.
    pub peak_bytes: u64,
    /// Blocks that were run again on the same input with the other checkpoint's weights, in f32: the largest
    /// difference of their output over its largest value.
    pub differences: BTreeMap<String, f64>,
}

/// Runs one pass of the transformer in `folder` over latents of `frames` x `side` x `side`, and four of its blocks
/// again with the weights in `against`.
///
/// The four are the first and the last of each kind whose input is another block's output as it left it.
pub fn pass(folder: &Path, against: Option<&Path>, frames: usize, side: usize) -> Result<Pass> {
    let config = match folder.join("config.json") {
        path if path.is_file() => TransformerConfig::open(&path)?,
        _ => TransformerConfig::default(),
    };
    let begin = Instant::now();
    let weights = Weights::open(folder, DType::F32, &Device::Cpu)?;
    let transformer = Transformer::load(&weights, &config)?;
    let open_seconds = begin.elapsed().as_secs_f64();
    let weight_bytes = weights.list().iter().map(|t| t.bytes as u64).sum();
    let widths = transformer.widths();
    let valid = super::TEXT.min(831);
    let mask: Vec<i64> = (0..831).map(|i| i64::from(i < valid)).collect();
    let given = Conditioning {
        reference_latents: random(&[widths.channels, 1, side, side], 1)?,
        face_mask: Tensor::ones((1, 1, side, side), DType::F32, &Device::Cpu)?,
        text_states: random(&[mask.len(), widths.text], 2)?,
        text_mask: &mask,
        pooled: random(&[widths.pooled], 3)?,
        audio: random(&[4 * frames - 3, 1, 1, widths.audio], 4)?,
        fps: 25.0,
        motion_exp: MOTION_EXP,
        motion_pose: MOTION_POSE,
    };
    let latents = random(&[widths.channels, frames, side, side], 5)?;
    let mut taps = BTreeMap::new();
    reset_peak();
    let begin = Instant::now();
    let velocity = transformer.predict_with_taps(&latents, 900.0, &given, &mut |name, x| {
        taps.insert(name.to_owned(), x.clone());
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let largest = velocity.velocity.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(largest.is_finite(), "the velocity is not finite");
    let peak_bytes = peak_bytes();
    let grid = Grid { frames, rows: side / 2, columns: side / 2 };
    let tokens = grid.per_frame() + grid.tokens() + valid;
    let mut differences = BTreeMap::new();
    if let Some(against) = against {
        let exact = Weights::open(against, DType::F32, &Device::Cpu)?;
        let rope = Rope::new(grid, config.rope_dim_list, config.rope_theta, valid, &Device::Cpu)?;
        let again = Again { taps: &taps, exact: &exact, hidden: widths.hidden, rope: &rope, images: tokens - valid };
        let count = |prefix: &str, tensor: &str| weights.count(prefix, tensor);
        let doubles = count("double_blocks", "img_attn_qkv.weight");
        // An adapter's share is added to what leaves an odd block, so an odd one's input is an even one's output.
        let last_odd = (doubles.saturating_sub(1)).saturating_sub(usize::from(doubles % 2 == 1));
        for i in [1, last_odd] {
            if i > 0 && i < doubles {
                differences.insert(format!("double_blocks.{i}"), again.double(i)?);
            }
        }
        let singles = count("single_blocks", "linear1.weight");
        for i in [1, singles.saturating_sub(1)] {
            if i > 0 && i < singles {
                differences.insert(format!("single_blocks.{i}"), again.single(i)?);
            }
        }
    }
    Ok(Pass { tokens, weight_bytes, open_seconds, seconds, peak_bytes, differences })
}

struct Again<'a> {
    taps: &'a BTreeMap<String, Tensor>,
    exact: &'a Weights,
    hidden: usize,
    rope: &'a Rope,
    images: usize,
}

impl Again<'_> {
    fn tap(&self, name: &str) -> Result<&Tensor> {
        self.taps.get(name).with_context(|| format!("the pass has shown no {name}"))
    }

    /// The conditioning vector, put together of its parts as the network does it.
    fn vec(&self) -> Result<Tensor> {
        let row = |name: &str| -> Result<Tensor> { Ok(self.tap(name)?.reshape((1, self.hidden))?) };
        let vec = ((row("time_in")? + row("motion_exp")?)? + row("motion_pose")?)?;
        Ok(((vec + row("fps_proj")?)? + row("vector_in")?)?)
    }

    fn double(&self, i: usize) -> Result<f64> {
        let block = DoubleBlock::load(&self.exact.pp(format!("double_blocks.{i}")), self.hidden)?;
        let (before, now) = (format!("double_blocks.{}", i - 1), format!("double_blocks.{i}"));
        let rope = self.rope.first(self.images)?;
        let (image, text) = (self.tap(&format!("{before}.img"))?, self.tap(&format!("{before}.txt"))?);
        let (image, text) = block.forward(image, text, &self.vec()?, &rope)?;
        let both = (self.tap(&format!("{now}.img"))?, self.tap(&format!("{now}.txt"))?);
        Ok(off(both.0, &image)?.max(off(both.1, &text)?))
    }

    fn single(&self, i: usize) -> Result<f64> {
        let block = SingleBlock::load(&self.exact.pp(format!("single_blocks.{i}")), self.hidden)?;
        let x = self.tap(&format!("single_blocks.{}", i - 1))?;
        off(self.tap(&format!("single_blocks.{i}"))?, &block.forward(x, &self.vec()?, self.rope)?)
    }
}

/// The largest difference over the largest value.
fn off(got: &Tensor, exact: &Tensor) -> Result<f64> {
    let largest = |x: Tensor| -> Result<f64> { Ok(f64::from(x.abs()?.max_all()?.to_scalar::<f32>()?)) };
    Ok(largest((got - exact)?)? / largest(exact.clone())?)
}
