//! The video transformer: noisy latents of one window, and everything that conditions them, to a velocity.
//!
//! One item at a time, without a batch dimension. Image tokens are the reference frame's, then the window's latent
//! frames'; text tokens come after them. Of the text only the valid rows enter the blocks: in the reference the
//! other rows are a segment of attention of their own, which nothing else sees.

mod audio;
mod blocks;
mod cache;
mod config;
mod embed;
mod load;
mod norm;
mod parts;
mod refiner;
mod rope;
mod stage;

#[cfg(test)]
mod parts_tests;
#[cfg(test)]
mod tests;

use candle_core::{DType, Device, Tensor};

pub use audio::{AudioAdapter, AudioProjection, face_gate, group_frames};
pub use blocks::{DoubleBlock, FinalLayer, Mlp, SingleBlock, TOKENS_AT_ONCE};
pub use cache::{FeatureCache, Features};
pub use config::{Defaults, TransformerConfig};
pub use embed::{Embedder, PatchEmbed, TimeEmbedder, grid_of, timestep_embedding, unpatchify};
pub use norm::{audio_norm, block_norm, modulated_norm, qk_norm, refiner_norm};
pub use parts::Part;
pub use refiner::TokenRefiner;
pub use rope::{Grid, Rope};
pub use stage::DiffusionStage;

use self::parts::{Place, Span, bytes};
use crate::{Error, Result, nn::Linear, weights::Swap};

/// Everything that conditions one window, apart from the flow time.
#[derive(Debug, Clone)]
pub struct Conditioning<'a> {
    /// The picture, `(C, 1, h, w)` for all latent frames or `(C, T, h, w)`; its first frame is the reference frame.
    pub reference_latents: Tensor,
    /// `(1, 1, h, w)`: how much of the audio reaches each place.
    pub face_mask: Tensor,
    /// `(L, D)`, padding rows included.
    pub text_states: Tensor,
    /// L values of 0 and 1. Their positions steer the text refiner; their sum is the number of valid rows, from the
    /// first.
    pub text_mask: &'a [i64],
    /// `(P)`.
    pub pooled: Tensor,
    /// `(4T-3, window, layers, channels)`: one window of audio features for each frame.
    pub audio: Tensor,
    /// Frames a second.
    pub fps: f32,
    /// Strength of facial motion; 30 four times in the reference.
    pub motion_exp: [f32; 4],
    /// Strength of head motion; 25 four times in the reference.
    pub motion_pose: [f32; 4],
}

/// Strength of facial motion that the reference always asks for.
pub const MOTION_EXP: [f32; 4] = [30.0; 4];
/// Strength of head motion that the reference always asks for.
pub const MOTION_POSE: [f32; 4] = [25.0; 4];

/// Result of one full pass.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Flow velocity, `(C, T, h, w)`, f32.
    pub velocity: Tensor,
    /// What a cached pass needs, where it was asked for.
    pub features: Option<Features>,
}

/// Widths of the inputs, for whoever checks them before a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Channels of the latents.
    pub channels: usize,
    /// Width of a text state.
    pub text: usize,
    /// Width of the pooled text state.
    pub pooled: usize,
    /// Audio values of one frame: window positions x layers x channels.
    pub audio: usize,
    /// Width of a token.
    pub hidden: usize,
}

/// Receives intermediate tensors by the reference's module names, without the batch dimension.
pub type Tap<'a> = dyn FnMut(&str, &Tensor) + 'a;

/// A tap, or none: then not even the names are made.
struct Taps<'a, 'b>(Option<&'a mut Tap<'b>>);

impl Taps<'_, '_> {
    fn give(&mut self, tensor: &Tensor, name: std::fmt::Arguments<'_>) {
        if let Some(tap) = &mut self.0 {
            tap(&name.to_string(), tensor);
        }
    }
}

/// The transformer.
#[derive(Debug)]
pub struct Transformer {
    img_in: PatchEmbed,
    ref_in: PatchEmbed,
    before_proj: Linear,
    txt_in: TokenRefiner,
    time_in: TimeEmbedder,
    motion_exp: TimeEmbedder,
    motion_pose: TimeEmbedder,
    fps_proj: TimeEmbedder,
    vector_in: Embedder,
    audio_proj: AudioProjection,
    double_blocks: Vec<DoubleBlock>,
    /// `adapters[j]` follows double block `adapted[j]`.
    adapters: Vec<AudioAdapter>,
    adapted: Vec<usize>,
    single_blocks: Vec<SingleBlock>,
    final_layer: FinalLayer,
    rope_dims: [usize; 3],
    rope_theta: f64,
    /// The blocks by device, double ones first.
    spans: Vec<Span>,
    /// Bytes of all other weights in their files, by device.
    unswapped: Vec<u64>,
    dtype: DType,
    /// The first part's.
    device: Device,
}

/// What does not change with the latents and the flow time.
struct Prepared {
    grid: Grid,
    reference: Tensor, // (R, H)
    added: Tensor,     // (1 or T, R, H)
    audio: Tensor,     // (T, 16, H)
    gate: Tensor,      // (R, 1)
}

impl Transformer {
    /// Widths of the inputs.
    #[must_use]
    pub fn widths(&self) -> Widths {
        Widths {
            channels: self.img_in.channels(),
            text: self.txt_in.inp(),
            pooled: self.vector_in.inp(),
            audio: self.audio_proj.inp(),
            hidden: self.img_in.hidden(),
        }
    }

    /// The blocks' weights by part, which may stay in memory or come and go.
    pub fn swaps(&self) -> impl Iterator<Item = &Swap> {
        self.spans.iter().map(|span| &span.swap)
    }

    /// Bytes in their files of all weights of each part that are in no block.
    #[must_use]
    pub fn unswapped_bytes(&self) -> &[u64] {
        &self.unswapped
    }

    /// Runs every block.
    ///
    /// - `latents`: `(C, T, h, w)`, noisy; `timestep`: flow time, 0..1000
    /// - `keep`: also give the features that a cached pass needs
    ///
    /// Errors: an input's shape does not fit the others or the checkpoint.
    pub fn predict(&self, latents: &Tensor, timestep: f32, given: &Conditioning<'_>, keep: bool) -> Result<Pass> {
        self.run(latents, timestep, given, (keep, Taps(None)))
    }

    /// As [`predict`](Self::predict), and shows intermediate tensors on the way.
    ///
    /// Names and shapes: `time_in`, `fps_proj`, `vector_in` `(H)`; `motion_exp`, `motion_pose` `(4, H/4)`;
    /// `audio_proj` `(4T-3, 4, H)`; `before_proj` `(1 or T · R, H)`; `txt_in` `(L, H)`; `double_blocks.{i}.img`
    /// `((T+1)·R, H)`, `.txt` `(valid, H)`; `audio_adapter_blocks.{j}` `(T, R, H)`; `single_blocks.{i}`
    /// `((T+1)·R + valid, H)`; `final_layer` `(T·R, C·4)`.
    pub fn predict_with_taps(
        &self,
        latents: &Tensor,
        timestep: f32,
        given: &Conditioning<'_>,
        tap: &mut Tap<'_>,
    ) -> Result<Pass> {
        self.run(latents, timestep, given, (true, Taps(Some(tap))))
    }

    /// Runs the last single block and the final layer on features of an earlier full pass.
    ///
    /// - `timestep`: of this pass; the conditioning vector is made anew
    ///
    /// Errors: the features are not those of `given`'s size.
    pub fn predict_cached(&self, features: &Features, timestep: f32, given: &Conditioning<'_>) -> Result<Tensor> {
        let grid = Grid { frames: 0, ..grid_of(&given.reference_latents)? };
        let (each, hidden) = (grid.per_frame(), self.img_in.hidden());
        let (images, texts) = (features.image.dim(0)?, features.text.dim(0)?);
        let grid = Grid { frames: images / each, ..grid };
        let wrong = |what: &Tensor, rows: usize| what.dims() != [rows, hidden];
        if grid.frames == 0
            || wrong(&features.image, grid.tokens())
            || wrong(&features.reference, each)
            || wrong(&features.text, texts)
        {
            let reason = format!(
                "image {:?}, reference {:?}, text {:?}; expected {each} tokens a frame of width {hidden}",
                features.image.dims(),
                features.reference.dims(),
                features.text.dims(),
            );
            return Err(Error::input("features", reason));
        }
        let vec = self.vector(timestep, given, &mut Taps(None))?;
        let rope = |device: &Device| Rope::new(grid, self.rope_dims, self.rope_theta, texts, device);
        let mut place = Place::last(&self.spans, &vec, rope)?;
        let x = Tensor::cat(&[&features.reference, &features.image, &features.text], 0)?;
        let last = &self.single_blocks[self.single_blocks.len() - 1];
        let number = self.double_blocks.len() + self.single_blocks.len() - 1;
        let [x] = place.enter(number, [x])?;
        let x = last.forward(&x, &place.vec, &place.rope)?;
        place.leave(number);
        let velocity = self.finish(&x, &place.vec, grid, &mut Taps(None))?;
        drop(x);
        place.end(bytes(&velocity));
        Ok(velocity)
    }

    fn run(
        &self,
        latents: &Tensor,
        timestep: f32,
        given: &Conditioning<'_>,
        (keep, mut taps): (bool, Taps<'_, '_>),
    ) -> Result<Pass> {
        let prepared = self.prepare(latents, given, &mut taps)?;
        let grid = prepared.grid;
        let (each, hidden) = (grid.per_frame(), self.img_in.hidden());
        let vec = self.vector(timestep, given, &mut taps)?;

        let mut text = self.txt_in.forward(&self.own(&given.text_states)?, timestep, Some(given.text_mask))?;
        taps.give(&text, format_args!("txt_in"));
        let valid = given.text_mask.iter().filter(|&&m| m == 1).count();
        text = text.narrow(0, 0, valid)?;

        let mut noisy = self.img_in.forward(&self.own(latents)?)?.reshape((grid.frames, each, hidden))?;
        noisy = noisy.broadcast_add(&prepared.added)?.reshape((grid.tokens(), hidden))?;
        let mut image = Tensor::cat(&[&prepared.reference, &noisy], 0)?; // ((T+1)·R, H)
        drop(noisy);

        let rope = Rope::new(grid, self.rope_dims, self.rope_theta, valid, &self.device)?;
        let mut place = Place::first(&self.spans, (vec, rope), &prepared)?;
        for (i, block) in self.double_blocks.iter().enumerate() {
            [image, text] = place.enter(i, [image, text])?;
            let image_rope = place.rope.first(each + grid.tokens())?;
            (image, text) = block.forward(&image, &text, &place.vec, &image_rope)?;
            place.leave(i);
            taps.give(&image, format_args!("double_blocks.{i}.img"));
            taps.give(&text, format_args!("double_blocks.{i}.txt"));
            if let (Ok(j), Some((audio, gate))) = (self.adapted.binary_search(&i), &place.heard) {
                let frames = image.narrow(0, each, grid.tokens())?.reshape((grid.frames, each, hidden))?;
                let heard = self.adapters[j].forward(audio, &frames)?;
                taps.give(&heard, format_args!("audio_adapter_blocks.{j}"));
                let frames = (frames + heard.broadcast_mul(gate)?)?.reshape((grid.tokens(), hidden))?;
                image = Tensor::cat(&[&image.narrow(0, 0, each)?, &frames], 0)?;
            }
        }

        let mut x = Tensor::cat(&[&image, &text], 0)?; // ((T+1)·R + valid, H)
        drop((image, text));
        let mut features = None;
        for (i, block) in self.single_blocks.iter().enumerate() {
            let number = self.double_blocks.len() + i;
            [x] = place.enter(number, [x])?;
            if keep && i + 1 == self.single_blocks.len() {
                features = Some(Features {
                    reference: x.narrow(0, 0, each)?,
                    image: x.narrow(0, each, grid.tokens())?,
                    text: x.narrow(0, each + grid.tokens(), valid)?,
                });
            }
            x = block.forward(&x, &place.vec, &place.rope)?;
            place.leave(number);
            taps.give(&x, format_args!("single_blocks.{i}"));
        }
        let velocity = self.finish(&x, &place.vec, grid, &mut taps)?;
        // The features are views of the last block's input.
        let kept = if features.is_some() { bytes(&x) } else { 0 };
        drop(x);
        place.end(bytes(&velocity) + kept);
        Ok(Pass { velocity, features })
    }

    /// The conditioning vector `(1, H)`, f32: what shifts, scales and gates every token is not rounded.
    fn vector(&self, timestep: f32, given: &Conditioning<'_>, taps: &mut Taps<'_, '_>) -> Result<Tensor> {
        let (hidden, pooled) = (self.img_in.hidden(), self.vector_in.inp());
        if given.pooled.dims() != [pooled] {
            return Err(Error::input("pooled", format!("shape {:?}, expected ({pooled})", given.pooled.dims())));
        }
        let time = self.time_in.forward(&[timestep])?; // (1, H)
        let exp = self.motion_exp.forward(&given.motion_exp)?; // (4, H/4)
        let pose = self.motion_pose.forward(&given.motion_pose)?; // (4, H/4)
        let fps = self.fps_proj.forward(&[given.fps])?; // (1, H)
        let pooled = given.pooled.to_device(&self.device)?.to_dtype(DType::F32)?;
        let text = self.vector_in.forward(&pooled.unsqueeze(0)?)?; // (1, H)
        taps.give(&time.squeeze(0)?, format_args!("time_in"));
        taps.give(&exp, format_args!("motion_exp"));
        taps.give(&pose, format_args!("motion_pose"));
        taps.give(&fps.squeeze(0)?, format_args!("fps_proj"));
        taps.give(&text.squeeze(0)?, format_args!("vector_in"));
        let vec = ((time + exp.reshape((1, hidden))?)? + pose.reshape((1, hidden))?)?;
        Ok(((vec + fps)? + text)?)
    }

    /// Checks the inputs and computes what stays the same over the steps.
    fn prepare(&self, latents: &Tensor, given: &Conditioning<'_>, taps: &mut Taps<'_, '_>) -> Result<Prepared> {
        let grid = grid_of(latents)?;
        let widths = self.widths();
        let dims = latents.dims();
        if dims[0] != widths.channels {
            let reason = format!("shape {dims:?}, expected {} channels", widths.channels);
            return Err(Error::input("latents", reason));
        }
        let picture = given.reference_latents.dims();
        if picture != dims && picture != [dims[0], 1, dims[2], dims[3]] {
            return Err(Error::input("reference_latents", format!("shape {picture:?} does not go with {dims:?}")));
        }
        if given.face_mask.dims() != [1, 1, dims[2], dims[3]] {
            let reason = format!("shape {:?}, expected (1, 1, {}, {})", given.face_mask.dims(), dims[2], dims[3]);
            return Err(Error::input("face_mask", reason));
        }
        let states = given.text_states.dims();
        if states != [given.text_mask.len(), widths.text] {
            let reason = format!("shape {states:?}, expected ({}, {})", given.text_mask.len(), widths.text);
            return Err(Error::input("text_states", reason));
        }
        let frames = given.audio.dims().first().copied().unwrap_or(0);
        if frames != 4 * grid.frames - 3 {
            let reason = format!("{frames} frames, expected {} for {} latent ones", 4 * grid.frames - 3, grid.frames);
            return Err(Error::input("audio", reason));
        }

        let picture = self.own(&given.reference_latents)?;
        let added = self.before_proj.forward(&self.ref_in.forward(&picture)?)?;
        taps.give(&added, format_args!("before_proj"));
        let audio = self.audio_proj.forward(&self.own(&given.audio)?)?;
        taps.give(&audio, format_args!("audio_proj"));
        Ok(Prepared {
            grid,
            reference: self.img_in.forward(&picture.narrow(1, 0, 1)?)?,
            added: added.reshape((picture.dim(1)?, grid.per_frame(), widths.hidden))?,
            audio: group_frames(&audio)?,
            gate: face_gate(&self.own(&given.face_mask)?)?,
        })
    }

    /// - `x`: `((T+1)·R + valid, H)` after the last single block
    /// - returns: `(C, T, h, w)`, f32
    fn finish(&self, x: &Tensor, vec: &Tensor, grid: Grid, taps: &mut Taps<'_, '_>) -> Result<Tensor> {
        let frames = x.narrow(0, grid.per_frame(), grid.tokens())?;
        // The last layer gives the result itself, which is f32.
        let patches = self.final_layer.forward(&frames.to_dtype(DType::F32)?, vec)?;
        taps.give(&patches, format_args!("final_layer"));
        Ok(unpatchify(&patches, grid)?)
    }

    fn own(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        tensor.to_device(&self.device)?.to_dtype(self.dtype)
    }
}
