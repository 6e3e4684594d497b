use candle_core::{DType, Tensor};

use super::{
    CausalConv3d, GroupNorm, MidBlock, Resnet, Step, Tap, VaeConfig,
    tiling::{Tiling, spatial, temporal},
};
use crate::{Error, Result, weights::Weights};

#[derive(Debug, Clone)]
struct UpBlock {
    resnets: Vec<Resnet>,
    upsample: Option<([usize; 3], CausalConv3d)>,
}

/// Latents to pictures.
#[derive(Debug, Clone)]
pub struct VaeDecoder {
    post_quant: CausalConv3d,
    conv_in: CausalConv3d,
    mid: MidBlock,
    blocks: Vec<UpBlock>,
    norm: GroupNorm,
    conv_out: CausalConv3d,
    tiling: Tiling,
    latent_channels: usize,
    dtype: DType,
}

impl VaeDecoder {
    /// Reads `decoder.*` and `post_quant_conv`.
    pub fn load(weights: &Weights, config: &VaeConfig) -> Result<Self> {
        config.validate()?;
        let decoder = weights.pp("decoder");
        let latent_channels = config.latent_channels;
        let post_quant = CausalConv3d::load(&weights.pp("post_quant_conv"), latent_channels, [1; 3])?;
        let conv_in = CausalConv3d::load(&decoder.pp("conv_in.conv"), post_quant.out(), [1; 3])?;
        let mid = MidBlock::load(&decoder.pp("mid_block"), config)?;
        let mut blocks = Vec::with_capacity(config.block_out_channels.len());
        for i in 0..config.block_out_channels.len() {
            let block = decoder.pp(format!("up_blocks.{i}"));
            let resnets = (0..=config.layers_per_block)
                .map(|j| Resnet::load(&block.pp(format!("resnets.{j}")), config.norm_num_groups))
                .collect::<Result<Vec<_>>>()?;
            let width = resnets.last().map_or(0, Resnet::out);
            let upsample = match config.scale_of_block(i) {
                [1, 1, 1] => None,
                factors => Some((factors, CausalConv3d::load(&block.pp("upsamplers.0.conv.conv"), width, [1; 3])?)),
            };
            blocks.push(UpBlock { resnets, upsample });
        }
        let norm = GroupNorm::load(&decoder.pp("conv_norm_out"), config.norm_num_groups)?;
        let conv_out = CausalConv3d::load(&decoder.pp("conv_out.conv"), norm.channels(), [1; 3])?;
        let tiling = Tiling::decode(config);
        Ok(Self { post_quant, conv_in, mid, blocks, norm, conv_out, tiling, latent_channels, dtype: weights.dtype() })
    }

    /// The same decoder with tiles `divisor` times shorter along each side and in time, at least 4 latents.
    ///
    /// It needs less memory. Pictures of more than one tile differ slightly, as each tile is normalised for itself.
    #[must_use]
    pub fn with_smaller_tiles(&self, config: &VaeConfig, divisor: usize) -> Self {
        Self { tiling: Tiling::decode_smaller(config, divisor), ..self.clone() }
    }

    /// Decodes in one piece.
    ///
    /// - `z`: `(B, C, T, h, w)`, not scaled
    /// - returns: `(B, 3, 4T - 3, 8h, 8w)`, about -1..1, in the weights' type
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        self.decode_tapped(z, &mut |_, _| ())
    }

    /// As [`decode`](Self::decode); the tap sees `conv_in`, `mid_attn_tokens`, `mid_block`, `up_blocks.N`.
    pub fn decode_tapped(&self, z: &Tensor, tap: Tap<'_>) -> Result<Tensor> {
        self.check(z)?;
        let mut x = self.conv_in.forward(&self.post_quant.forward(&z.to_dtype(self.dtype)?)?)?;
        tap("conv_in", &x);
        x = self.mid.forward(x, tap)?;
        for (i, block) in self.blocks.iter().enumerate() {
            for resnet in &block.resnets {
                x = resnet.forward(x)?;
            }
            if let Some((factors, conv)) = &block.upsample {
                x = conv.forward_step(&x, Step { upsample: *factors, residual: None })?;
            }
            tap(&format!("up_blocks.{i}"), &x);
        }
        let normed = self.norm.forward_silu(&x)?;
        drop(x);
        self.conv_out.forward(&normed)
    }

    /// Decodes in overlapping tiles where the latents are longer or larger than one, and blends the pictures.
    ///
    /// Shapes as in [`decode`](Self::decode).
    pub fn decode_tiled(&self, z: &Tensor) -> Result<Tensor> {
        let mut pieces = Vec::new();
        self.decode_tiled_each(z, &mut |piece| {
            pieces.push(piece);
            Ok(())
        })?;
        Ok(if pieces.len() == 1 { pieces.remove(0) } else { Tensor::cat(&pieces, 2)? })
    }

    /// As [`decode_tiled`](Self::decode_tiled), handing on each run of finished frames `(B, 3, n, H, W)` in order,
    /// so that no more than one tile in time is held.
    ///
    /// Errors: those of `emit` end the decoding.
    pub fn decode_tiled_each(&self, z: &Tensor, emit: &mut dyn FnMut(Tensor) -> Result<()>) -> Result<()> {
        self.check(z)?;
        let mut plain = |z: &Tensor| self.decode(z);
        let mut whole_frames = |z: &Tensor| match self.tiling.splits_space(z)? {
            true => spatial(z, &self.tiling.space, &mut plain),
            false => plain(z),
        };
        match self.tiling.splits_time(z)? {
            true => temporal(z, &self.tiling.time, &mut whole_frames, emit),
            false => emit(whole_frames(z)?),
        }
    }

    fn check(&self, z: &Tensor) -> Result<()> {
        match *z.dims() {
            [b, c, t, h, w] if c == self.latent_channels && b * t * h * w > 0 => Ok(()),
            ref dims => {
                let reason = format!("shape {dims:?}, expected (B, {}, T, h, w), no side 0", self.latent_channels);
                Err(Error::input("latents", reason))
            }
        }
    }
}
