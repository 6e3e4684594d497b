//! What the speech does: audio tokens, the adapters that mix them in, and the gate that keeps them to the face.

use candle_core::Tensor;

use super::norm::audio_norm;
use crate::{
    Error, Result,
    attention::attention,
    nn::{LayerNorm, Linear},
    ops::Activation,
    weights::Weights,
};

/// Audio features of a frame as a few tokens.
#[derive(Debug, Clone)]
pub struct AudioProjection {
    proj1: Linear,
    proj2: Linear,
    proj3: Linear,
    norm: LayerNorm,
    inp: usize,
    hidden: usize,
}

impl AudioProjection {
    /// Reads `proj1`, `proj2`, `proj3` and `norm`.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        let [_, inp] = weights.dims("proj1.weight")?;
        let proj1 = Linear::load(&weights.pp("proj1"), inp)?;
        let proj2 = Linear::load(&weights.pp("proj2"), proj1.out())?;
        let proj3 = Linear::load(&weights.pp("proj3"), proj2.out())?;
        if hidden == 0 || !proj3.out().is_multiple_of(hidden) {
            let reason = format!("{} outputs are not a number of tokens of width {hidden}", proj3.out());
            return Err(Error::input("audio_proj.proj3", reason));
        }
        Ok(Self { proj1, proj2, proj3, norm: audio_norm(&weights.pp("norm"), hidden)?, inp, hidden })
    }

    /// Values of one frame: window positions x layers x channels.
    #[must_use]
    pub fn inp(&self) -> usize {
        self.inp
    }

    /// - `audio`: `(A, window, layers, channels)`, one window for each frame
    /// - returns: `(A, 4, H)`
    ///
    /// Errors: a frame has another number of values than the projection takes.
    pub fn forward(&self, audio: &Tensor) -> Result<Tensor> {
        let values = audio.dims().iter().skip(1).product::<usize>();
        if audio.rank() != 4 || values != self.inp {
            let reason = format!("shape {:?}, expected (frames, ..) of {} values a frame", audio.dims(), self.inp);
            return Err(Error::input("audio", reason));
        }
        let frames = audio.dim(0)?;
        let x = self.proj1.forward_then(&audio.reshape((frames, self.inp))?, Activation::Relu)?;
        let x = self.proj3.forward(&self.proj2.forward_then(&x, Activation::Relu)?)?;
        Ok(self.norm.forward(&x.reshape((frames, x.dim(1)? / self.hidden, self.hidden))?)?)
    }
}

/// Groups the tokens of four frames for each latent frame.
///
/// Latent frame `τ` hears frames `4τ-3 ..= 4τ`; the first hears frame 0 four times, as it stands for that one alone.
///
/// - `tokens`: `(4T-3, n, H)`
/// - returns: `(T, 4n, H)`
///
/// Errors: the number of frames is not of the form `4T-3`.
pub fn group_frames(tokens: &Tensor) -> Result<Tensor> {
    let (frames, each, hidden) = tokens.dims3()?;
    if frames % 4 != 1 {
        return Err(Error::input("audio", format!("{frames} frames, expected 4T-3 for T latent frames")));
    }
    let first = tokens.narrow(0, 0, 1)?;
    let padded = Tensor::cat(&[&first, &first, &first, tokens], 0)?; // (4T, n, H)
    Ok(padded.reshape((frames.div_ceil(4), 4 * each, hidden))?)
}

/// The face mask at the tokens: each takes the latent at its upper left corner.
///
/// - `mask`: `(1, 1, h, w)`, h and w even
/// - returns: `(h/2·w/2, 1)`, the same for every frame
pub fn face_gate(mask: &Tensor) -> Result<Tensor> {
    match *mask.dims() {
        [1, 1, h, w] if h % 2 == 0 && w % 2 == 0 => {
            Ok(mask.reshape((h / 2, 2, w / 2, 2))?.narrow(1, 0, 1)?.narrow(3, 0, 1)?.reshape((h / 2 * (w / 2), 1))?)
        }
        _ => {
            let reason = format!("shape {:?}, expected (1, 1, h, w) with even h and w", mask.dims());
            Err(Error::input("face_mask", reason))
        }
    }
}

/// Lets image tokens listen to their frame's audio tokens, with one wide head.
#[derive(Debug, Clone)]
pub struct AudioAdapter {
    norm_audio: LayerNorm,
    norm_image: LayerNorm,
    to_q: Linear,
    to_kv: Linear,
    to_out: Linear,
    width: usize,
}

impl AudioAdapter {
    /// Reads `norm1`, `norm2`, `to_q`, `to_kv` and `to_out`.
    pub fn load(weights: &Weights, hidden: usize) -> Result<Self> {
        let [width, _] = weights.dims("to_q.weight")?;
        Ok(Self {
            norm_audio: audio_norm(&weights.pp("norm1"), hidden)?,
            norm_image: audio_norm(&weights.pp("norm2"), hidden)?,
            to_q: Linear::load_no_bias(&weights.pp("to_q"), hidden, width)?,
            to_kv: Linear::load_no_bias(&weights.pp("to_kv"), hidden, 2 * width)?,
            to_out: Linear::load_no_bias(&weights.pp("to_out"), width, hidden)?,
            width,
        })
    }

    /// - `audio`: `(T, n, H)`; `image`: `(T, R, H)`
    /// - returns: what is to be added, `(T, R, H)`
    pub fn forward(&self, audio: &Tensor, image: &Tensor) -> Result<Tensor> {
        let q = self.to_q.forward(&self.norm_image.forward(image)?)?.unsqueeze(1)?; //  (T, 1, R, width)
        let kv = self.to_kv.forward(&self.norm_audio.forward(audio)?)?.unsqueeze(1)?; // (T, 1, n, 2·width)
        let (k, v) = (kv.narrow(3, 0, self.width)?, kv.narrow(3, self.width, self.width)?);
        let heard = attention(&q, &k, &v, (self.width as f64).powf(-0.5), None)?.squeeze(1)?; // (T, R, width)
        Ok(self.to_out.forward(&heard)?)
    }
}
