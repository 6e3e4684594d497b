use super::{Missing, Shapes, Sheet, Spec, shapes::MOST_BLOCKS};
use crate::vae::VaeConfig;

/// The two halves of the VAE, which are two stages' networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VaeHalf {
    /// Pictures to latents.
    Encoder,
    /// Latents to pictures.
    Decoder,
}

/// Sizes of the VAE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaeSizes {
    /// Channels after each block of the encoder.
    pub channels: Vec<usize>,
    /// Residual layers of each block of the encoder.
    pub resnets: usize,
    /// Channels of a latent.
    pub latent: usize,
    /// Which blocks of the encoder halve their input; those of the decoder with the same numbers double it.
    pub halves: Vec<bool>,
    /// Whether the middle block has an attention layer.
    pub attention: bool,
}

impl VaeSizes {
    /// The published VAE.
    #[must_use]
    pub fn published() -> Self {
        Self {
            channels: vec![128, 256, 512, 512],
            resnets: 2,
            latent: 16,
            halves: vec![true, true, true, false],
            attention: true,
        }
    }

    /// What the config says; the blocks' widths are those of the tensors.
    pub(super) fn of(found: &Shapes, config: &VaeConfig, half: VaeHalf) -> Result<Self, Missing> {
        let blocks = config.block_out_channels.len();
        for (name, count) in [("block_out_channels", blocks), ("layers_per_block", config.layers_per_block)] {
            if !(1..=MOST_BLOCKS).contains(&count) {
                let reason = format!("the config says {count}, allowed are 1 to {MOST_BLOCKS}");
                return Err(Missing { name: name.to_owned(), reason });
            }
        }
        let width = |i: usize, said: usize| {
            let block = match half {
                VaeHalf::Encoder => format!("encoder.down_blocks.{i}"),
                VaeHalf::Decoder => format!("decoder.up_blocks.{}", blocks - 1 - i),
            };
            found.side_or(&format!("{block}.resnets.0.conv1.conv.weight"), 0, said)
        };
        let said = config.block_out_channels.iter().enumerate();
        Ok(Self {
            channels: said.map(|(i, &said)| width(i, said)).collect::<Result<_, _>>()?,
            resnets: config.layers_per_block,
            latent: config.latent_channels,
            halves: (0..blocks).map(|i| config.scale_of_block(i) != [1; 3]).collect(),
            attention: config.mid_block_add_attention,
        })
    }

    /// The tensors of one half.
    #[must_use]
    pub fn tensors(&self, half: VaeHalf) -> Vec<Spec> {
        let mut sheet = Sheet::default();
        match half {
            VaeHalf::Encoder => self.encoder(&mut sheet),
            VaeHalf::Decoder => self.decoder(&mut sheet),
        }
        sheet.0
    }

    fn encoder(&self, sheet: &mut Sheet) {
        let deep = self.channels.last().copied().unwrap_or(0);
        let mut width = self.channels.first().copied().unwrap_or(0);
        conv(sheet, "encoder.conv_in", [width, 3], 1.5);
        for (i, &channels) in self.channels.iter().enumerate() {
            let block = format!("encoder.down_blocks.{i}");
            resnets(sheet, &block, self.resnets, [channels, width]);
            width = channels;
            if self.halves.get(i) == Some(&true) {
                conv(sheet, &format!("{block}.downsamplers.0.conv"), [width, width], 1.0);
            }
        }
        self.middle(sheet, "encoder.mid_block", deep);
        sheet.norm("encoder.conv_norm_out", deep);
        // SiLU more than halves the variance; the gain brings the latents near to 1 after scaling.
        conv(sheet, "encoder.conv_out", [2 * self.latent, deep], 3.0);
        sheet.layer("quant_conv", &[2 * self.latent, 2 * self.latent, 1, 1, 1], 1.0);
    }

    fn decoder(&self, sheet: &mut Sheet) {
        let mut width = self.channels.last().copied().unwrap_or(0);
        sheet.layer("post_quant_conv", &[self.latent, self.latent, 1, 1, 1], 1.0);
        conv(sheet, "decoder.conv_in", [width, self.latent], 1.0);
        self.middle(sheet, "decoder.mid_block", width);
        for (i, &channels) in self.channels.iter().rev().enumerate() {
            let block = format!("decoder.up_blocks.{i}");
            resnets(sheet, &block, self.resnets + 1, [channels, width]);
            width = channels;
            if self.halves.get(i) == Some(&true) {
                conv(sheet, &format!("{block}.upsamplers.0.conv"), [width, width], 1.0);
            }
        }
        sheet.norm("decoder.conv_norm_out", width);
        // Pixels are x/2 + 0.5: a deviation of about 0.4 fills the range and seldom leaves it.
        conv(sheet, "decoder.conv_out", [3, width], 0.7);
    }

    /// Residual block, attention, residual block.
    fn middle(&self, sheet: &mut Sheet, block: &str, deep: usize) {
        resnets(sheet, block, 2, [deep, deep]);
        if !self.attention {
            return;
        }
        let attention = format!("{block}.attentions.0");
        sheet.norm(&format!("{attention}.group_norm"), deep);
        for name in ["to_q", "to_k", "to_v", "to_out.0"] {
            sheet.layer(&format!("{attention}.{name}"), &[deep, deep], 1.0);
        }
    }
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
