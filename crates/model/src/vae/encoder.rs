use candle_core::{DType, Tensor};

use super::{
    CausalConv3d, GroupNorm, MidBlock, Resnet, Tap, VaeConfig,
    tiling::{Tiling, spatial, temporal},
};
use crate::{Error, Result, weights::Weights};

/// The distribution of latents that the encoder gives: normal, independent.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Means `(B, C, T, h, w)`.
    pub mean: Tensor,
    /// Logarithms of the variances `(B, C, T, h, w)`, within -30..20.
    pub logvar: Tensor,
}

impl Moments {
    fn new(moments: &Tensor) -> Result<Self> {
        let halves = moments.chunk(2, 1)?;
        Ok(Self { mean: halves[0].contiguous()?, logvar: halves[1].clamp(-30f32, 20f32)? })
    }

    /// Standard deviations `(B, C, T, h, w)`.
    pub fn std(&self) -> Result<Tensor> {
        Ok((&self.logvar * 0.5)?.exp()?)
    }
}

#[derive(Debug, Clone)]
struct DownBlock {
    resnets: Vec<Resnet>,
    downsample: Option<CausalConv3d>,
}

/// Pictures to latents.
#[derive(Debug, Clone)]
pub struct VaeEncoder {
    conv_in: CausalConv3d,
    blocks: Vec<DownBlock>,
    mid: MidBlock,
    norm: GroupNorm,
    conv_out: CausalConv3d,
    quant: CausalConv3d,
    tiling: Tiling,
    dtype: DType,
}

impl VaeEncoder {
    /// Reads `encoder.*` and `quant_conv`.
    pub fn load(weights: &Weights, config: &VaeConfig) -> Result<Self> {
        config.validate()?;
        let encoder = weights.pp("encoder");
        let [_, pixels, ..] = encoder.dims::<5>("conv_in.conv.weight")?;
        let conv_in = CausalConv3d::load(&encoder.pp("conv_in.conv"), pixels, [1; 3])?;
        let mut blocks = Vec::with_capacity(config.block_out_channels.len());
        for i in 0..config.block_out_channels.len() {
            let block = encoder.pp(format!("down_blocks.{i}"));
            let resnets = (0..config.layers_per_block)
                .map(|j| Resnet::load(&block.pp(format!("resnets.{j}")), config.norm_num_groups))
                .collect::<Result<Vec<_>>>()?;
            let width = resnets.last().map_or(0, Resnet::out);
            let downsample = match config.scale_of_block(i) {
                [1, 1, 1] => None,
                stride => Some(CausalConv3d::load(&block.pp("downsamplers.0.conv.conv"), width, stride)?),
            };
            blocks.push(DownBlock { resnets, downsample });
        }
        let mid = MidBlock::load(&encoder.pp("mid_block"), config)?;
        let norm = GroupNorm::load(&encoder.pp("conv_norm_out"), config.norm_num_groups)?;
        let conv_out = CausalConv3d::load(&encoder.pp("conv_out.conv"), norm.channels(), [1; 3])?;
        let quant = CausalConv3d::load(&weights.pp("quant_conv"), conv_out.out(), [1; 3])?;
        if quant.out() != 2 * config.latent_channels {
            let reason = format!("{}, but quant_conv gives {} channels", config.latent_channels, quant.out());
            return Err(Error::input("latent_channels", reason));
        }
        Ok(Self { conv_in, blocks, mid, norm, conv_out, quant, tiling: Tiling::encode(config), dtype: weights.dtype() })
    }

    /// Encodes in one piece.
    ///
    /// - `x`: `(B, 3, F, H, W)`, -1..1
    /// - returns: moments `(B, C, T, h, w)`, `T = (F - 1) / 4 + 1`, in the weights' type
    pub fn encode(&self, x: &Tensor) -> Result<Moments> {
        self.encode_tapped(x, &mut |_, _| ())
    }

    /// As [`encode`](Self::encode); the tap sees `conv_in`, `down_blocks.N`, `mid_attn_tokens`, `mid_block`.
    pub fn encode_tapped(&self, x: &Tensor, tap: Tap<'_>) -> Result<Moments> {
        Moments::new(&self.moments(x, tap)?)
    }

    /// Encodes in overlapping tiles where the input is longer or larger than one, and blends their moments.
    ///
    /// Shapes as in [`encode`](Self::encode).
    pub fn encode_tiled(&self, x: &Tensor) -> Result<Moments> {
        x.dims5()?;
        let mut plain = |x: &Tensor| self.moments(x, &mut |_, _| ());
        let mut whole_frames = |x: &Tensor| match self.tiling.splits_space(x)? {
            true => spatial(x, &self.tiling.space, &mut plain),
            false => plain(x),
        };
        if !self.tiling.splits_time(x)? {
            return Moments::new(&whole_frames(x)?);
        }
        let mut pieces = Vec::new();
        temporal(x, &self.tiling.time, &mut whole_frames, &mut |piece| {
            pieces.push(piece);
            Ok(())
        })?;
        Moments::new(&Tensor::cat(&pieces, 2)?)
    }

    fn moments(&self, x: &Tensor, tap: Tap<'_>) -> Result<Tensor> {
        let mut x = self.conv_in.forward(&x.to_dtype(self.dtype)?)?;
        tap("conv_in", &x);
        for (i, block) in self.blocks.iter().enumerate() {
            for resnet in &block.resnets {
                x = resnet.forward(x)?;
            }
            if let Some(downsample) = &block.downsample {
                x = downsample.forward(&x)?;
            }
            tap(&format!("down_blocks.{i}"), &x);
        }
        let x = self.mid.forward(x, tap)?;
        let x = self.conv_out.forward(&self.norm.forward_silu(&x)?)?;
        self.quant.forward(&x)
    }
}
