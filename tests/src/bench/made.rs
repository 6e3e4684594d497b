//! Random weights at published widths, scaled so that activations keep their size.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use model::weights::Weights;

/// Deterministic values in -1..1.
pub(super) fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

#[derive(Default)]
struct Made(HashMap<String, Tensor>);

impl Made {
    fn put(&mut self, name: String, shape: &[usize]) -> Result<()> {
        let fan: usize = shape[1..].iter().product();
        let value = match shape.len() {
            1 => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
            _ => (random(shape, self.0.len() as u64 + 1)? * (1.0 / (fan as f64).sqrt()))?,
        };
        self.0.insert(name, value);
        Ok(())
    }

    /// A layer's weight, and a bias of zeros.
    fn add(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        self.0.insert(format!("{name}.bias"), Tensor::zeros(shape[0], DType::F32, &Device::Cpu)?);
        self.put(format!("{name}.weight"), shape)
    }

    fn resnet(&mut self, name: &str, inp: usize, out: usize) -> Result<()> {
        self.add(&format!("{name}.norm1"), &[inp])?;
        self.add(&format!("{name}.norm2"), &[out])?;
        self.add(&format!("{name}.conv1.conv"), &[out, inp, 3, 3, 3])?;
        self.add(&format!("{name}.conv2.conv"), &[out, out, 3, 3, 3])?;
        if inp != out {
            self.add(&format!("{name}.conv_shortcut.conv"), &[out, inp, 1, 1, 1])?;
        }
        Ok(())
    }

    fn into_weights(self) -> Weights {
        Weights::from_tensors(self.0, DType::F32, &Device::Cpu)
    }
}

pub(super) fn double_block(hidden: usize) -> Result<Weights> {
    let mut made = Made::default();
    for stream in ["img", "txt"] {
        made.add(&format!("{stream}_mod.linear"), &[6 * hidden, hidden])?;
        made.add(&format!("{stream}_attn_qkv"), &[3 * hidden, hidden])?;
        made.put(format!("{stream}_attn_q_norm.weight"), &[128])?;
        made.put(format!("{stream}_attn_k_norm.weight"), &[128])?;
        made.add(&format!("{stream}_attn_proj"), &[hidden, hidden])?;
        made.add(&format!("{stream}_mlp.fc1"), &[4 * hidden, hidden])?;
        made.add(&format!("{stream}_mlp.fc2"), &[hidden, 4 * hidden])?;
    }
    Ok(made.into_weights())
}

pub(super) fn single_block(hidden: usize) -> Result<Weights> {
    let mut made = Made::default();
    made.add("linear1", &[7 * hidden, hidden])?;
    made.add("linear2", &[hidden, 5 * hidden])?;
    made.put("q_norm.weight".to_owned(), &[128])?;
    made.put("k_norm.weight".to_owned(), &[128])?;
    made.add("modulation.linear", &[3 * hidden, hidden])?;
    Ok(made.into_weights())
}

pub(super) fn whisper() -> Result<Weights> {
    let mut made = Made::default();
    made.add("encoder.conv1", &[384, 80, 3])?;
    made.add("encoder.conv2", &[384, 384, 3])?;
    made.put("encoder.embed_positions.weight".to_owned(), &[1500, 384])?;
    for i in 0..4 {
        let layer = format!("encoder.layers.{i}");
        for name in ["q_proj", "v_proj", "out_proj"] {
            made.add(&format!("{layer}.self_attn.{name}"), &[384, 384])?;
        }
        made.put(format!("{layer}.self_attn.k_proj.weight"), &[384, 384])?;
        made.add(&format!("{layer}.self_attn_layer_norm"), &[384])?;
        made.add(&format!("{layer}.fc1"), &[1536, 384])?;
        made.add(&format!("{layer}.fc2"), &[384, 1536])?;
        made.add(&format!("{layer}.final_layer_norm"), &[384])?;
    }
    made.add("encoder.layer_norm", &[384])?;
    Ok(made.into_weights())
}

pub(super) fn vae_decoder() -> Result<Weights> {
    let mut made = Made::default();
    made.add("post_quant_conv", &[16, 16, 1, 1, 1])?;
    made.add("decoder.conv_in.conv", &[512, 16, 3, 3, 3])?;
    made.resnet("decoder.mid_block.resnets.0", 512, 512)?;
    made.resnet("decoder.mid_block.resnets.1", 512, 512)?;
    made.add("decoder.mid_block.attentions.0.group_norm", &[512])?;
    for name in ["to_q", "to_k", "to_v", "to_out.0"] {
        made.add(&format!("decoder.mid_block.attentions.0.{name}"), &[512, 512])?;
    }
    let mut inp = 512;
    for (i, out) in [512, 512, 256, 128].into_iter().enumerate() {
        for j in 0..3 {
            made.resnet(&format!("decoder.up_blocks.{i}.resnets.{j}"), inp, out)?;
            inp = out;
        }
        if i < 3 {
            made.add(&format!("decoder.up_blocks.{i}.upsamplers.0.conv.conv"), &[out, out, 3, 3, 3])?;
        }
    }
    made.add("decoder.conv_norm_out", &[128])?;
    made.add("decoder.conv_out.conv", &[3, 128, 3, 3, 3])?;
    Ok(made.into_weights())
}
