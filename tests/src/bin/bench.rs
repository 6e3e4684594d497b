//! Times networks at their published widths, with random weights, and lends parts to scripts that measure them.

use std::{
    collections::HashMap,
    io::{Read, Write, stdin, stdout},
    num::NonZeroU32,
    time::Instant,
};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use clap::{Parser, Subcommand};
use gateway::media::{audio::MODEL_RATE, resample::Resampler};
use model::{
    vae::{VaeConfig, VaeDecoder},
    weights::Weights,
};

/// Times networks at their published widths, with random weights, and lends parts to scripts that measure them.
///
/// The number of threads is that of `RAYON_NUM_THREADS`, else all.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The VAE's decoder, widths 128, 256, 512, 512, untiled, f32.
    VaeDecode {
        /// Latent frames.
        #[arg(long, default_value_t = 3)]
        frames: usize,
        /// Rows and columns of the latents; the picture has eight times as many.
        #[arg(long, default_value_t = 16)]
        side: usize,
    },
    /// Resamples one channel from standard input to standard output, both little-endian f32 without a header.
    Resample {
        /// Rate of the input, Hz.
        #[arg(long)]
        from: NonZeroU32,
        /// Rate of the output, Hz; without it, the model's.
        #[arg(long)]
        to: Option<NonZeroU32>,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::VaeDecode { frames, side } => vae_decode(frames, side),
        Task::Resample { from, to } => resample(from, to),
    }
}

fn resample(from: NonZeroU32, to: Option<NonZeroU32>) -> Result<()> {
    let mut bytes = Vec::new();
    stdin().lock().read_to_end(&mut bytes)?;
    let (values, rest) = bytes.as_chunks::<4>();
    ensure!(rest.is_empty(), "the input has {} bytes, which is no whole number of f32", bytes.len());
    let input: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
    let to = match to {
        Some(to) => to,
        None => NonZeroU32::try_from(MODEL_RATE)?,
    };
    let output: Vec<u8> = Resampler::new(from, to).process(&input).into_iter().flat_map(f32::to_le_bytes).collect();
    stdout().lock().write_all(&output)?;
    Ok(())
}

fn vae_decode(frames: usize, side: usize) -> Result<()> {
    let config: VaeConfig = serde_json::from_value(serde_json::json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
        "norm_num_groups": 32, "sample_size": 256, "sample_tsize": 64, "scaling_factor": 0.476986,
        "mid_block_causal_attn": true,
    }))?;
    let decoder = VaeDecoder::load(&decoder_weights()?, &config)?;
    let z = random(&[1, 16, frames, side, side], 7)?;
    let begin = Instant::now();
    let mut last = begin;
    let decoded = decoder.decode_tapped(&z, &mut |name, x| {
        println!("{name:>16} {:?} {:.2} s", x.dims(), last.elapsed().as_secs_f64());
        last = Instant::now();
    })?;
    println!("{:?} in {:.2} s", decoded.dims(), begin.elapsed().as_secs_f64());
    Ok(())
}

/// Deterministic values in -1..1.
fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
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

/// Random weights of a decoder, scaled so that activations keep their size.
#[derive(Default)]
struct Made(HashMap<String, Tensor>);

impl Made {
    fn add(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        let fan: usize = shape[1..].iter().product();
        let weight = if shape.len() == 1 {
            Tensor::ones(shape, DType::F32, &Device::Cpu)?
        } else {
            (random(shape, self.0.len() as u64 + 1)? * (1.0 / (fan as f64).sqrt()))?
        };
        self.0.insert(format!("{name}.bias"), Tensor::zeros(shape[0], DType::F32, &Device::Cpu)?);
        self.0.insert(format!("{name}.weight"), weight);
        Ok(())
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
}

fn decoder_weights() -> Result<Weights> {
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
    Ok(Weights::from_tensors(made.0, DType::F32, &Device::Cpu))
}
