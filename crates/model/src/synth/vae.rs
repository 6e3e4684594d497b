//! The two halves of the VAE.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::{
    LATENT,
    values::{Sheet, Values},
    write_json,
};
use crate::Result;

const CHANNELS: [usize; 4] = [16, 32, 32, 32];
const DEEP: usize = CHANNELS[3];
const RESNETS: usize = 2;

fn config() -> Value {
    json!({
        "block_out_channels": CHANNELS, "layers_per_block": RESNETS, "latent_channels": LATENT,
        "norm_num_groups": 8, "sample_size": 256, "sample_tsize": 64, "scaling_factor": 0.476986,
        "time_compression_ratio": 4, "spatial_compression_ratio": 8,
        "mid_block_add_attention": true, "mid_block_causal_attn": true,
    })
}

pub(super) fn encoder(values: &Values, out: &Path) -> Result<()> {
    let mut sheet = Sheet::new(values);
    conv(&mut sheet, "encoder.conv_in", [CHANNELS[0], 3], 1.5);
    let mut width = CHANNELS[0];
    for (i, channels) in CHANNELS.into_iter().enumerate() {
        let block = format!("encoder.down_blocks.{i}");
        resnets(&mut sheet, &block, RESNETS, [channels, width]);
        width = channels;
        if i + 1 < CHANNELS.len() {
            conv(&mut sheet, &format!("{block}.downsamplers.0.conv"), [width, width], 1.0);
        }
    }
    middle(&mut sheet, "encoder.mid_block");
    sheet.norm("encoder.conv_norm_out", DEEP);
    // SiLU more than halves the variance; the gain brings the latents near to 1 after scaling.
    conv(&mut sheet, "encoder.conv_out", [2 * LATENT, DEEP], 3.0);
    sheet.layer("quant_conv", &[2 * LATENT, 2 * LATENT, 1, 1, 1], 1.0);
    finish(sheet, out)
}

pub(super) fn decoder(values: &Values, out: &Path) -> Result<()> {
    let mut sheet = Sheet::new(values);
    sheet.layer("post_quant_conv", &[LATENT, LATENT, 1, 1, 1], 1.0);
    conv(&mut sheet, "decoder.conv_in", [DEEP, LATENT], 1.0);
    middle(&mut sheet, "decoder.mid_block");
    let mut width = DEEP;
    for (i, channels) in CHANNELS.into_iter().rev().enumerate() {
        let block = format!("decoder.up_blocks.{i}");
        resnets(&mut sheet, &block, RESNETS + 1, [channels, width]);
        width = channels;
        if i + 1 < CHANNELS.len() {
            conv(&mut sheet, &format!("{block}.upsamplers.0.conv"), [width, width], 1.0);
        }
    }
    sheet.norm("decoder.conv_norm_out", width);
    // Pixels are x/2 + 0.5: a deviation of about 0.4 fills the range and seldom leaves it.
    conv(&mut sheet, "decoder.conv_out", [3, width], 0.7);
    finish(sheet, out)
}

fn finish(sheet: Sheet, out: &Path) -> Result<()> {
    sheet.save(&out.join("model.safetensors"), Dtype::F32)?;
    write_json(&out.join("config.json"), &config())
}

/// A 3x3x3 convolution; `widths` are out and in.
fn conv(sheet: &mut Sheet, name: &str, [out, inp]: [usize; 2], gain: f32) {
    sheet.layer(&format!("{name}.conv"), &[out, inp, 3, 3, 3], gain);
}

/// `count` residual blocks, of which the first changes the width.
fn resnets(sheet: &mut Sheet, block: &str, count: usize, [out, inp]: [usize; 2]) {
    for i in 0..count {
        let width = if i == 0 { inp } else { out };
        let name = format!("{block}.resnets.{i}");
        sheet.norm(&format!("{name}.norm1"), width);
        conv(sheet, &format!("{name}.conv1"), [out, width], 1.0);
        sheet.norm(&format!("{name}.norm2"), out);
        conv(sheet, &format!("{name}.conv2"), [out, out], 1.0);
        if width != out {
            sheet.layer(&format!("{name}.conv_shortcut.conv"), &[out, width, 1, 1, 1], 1.0);
        }
    }
}

/// Residual block, attention, residual block.
fn middle(sheet: &mut Sheet, block: &str) {
    resnets(sheet, block, 2, [DEEP, DEEP]);
    let attention = format!("{block}.attentions.0");
    sheet.norm(&format!("{attention}.group_norm"), DEEP);
    for name in ["to_q", "to_k", "to_v", "to_out.0"] {
        sheet.layer(&format!("{attention}.{name}"), &[DEEP, DEEP], 1.0);
    }
}
