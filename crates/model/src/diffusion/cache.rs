//! Features of full passes, kept for cached ones.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Tokens that enter the last single block of one pass.
#[derive(Debug, Clone)]
pub struct Features {
    /// Tokens of the reference frame, `(R, H)`.
    pub reference: Tensor,
    /// Tokens of the window's latent frames, `(T·R, H)`.
    pub image: Tensor,
    /// Valid text tokens, `(L, H)`.
    pub text: Tensor,
}

impl Features {
    /// The same values on another device; on their own one nothing is copied.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |tokens: &Tensor| match tokens.device().same_device(device) {
            true => Ok(tokens.clone()),
            // A view would bring all that it is a part of.
            false => tokens.force_contiguous()?.to_device(device),
        };
        Ok(Self { reference: moved(&self.reference)?, image: moved(&self.image)?, text: moved(&self.text)? })
    }
}

/// What a whole window shares: kept once, however many of its frames are still its own.
#[derive(Debug)]
struct Window {
    reference: Tensor,
    text: Tensor,
}

#[derive(Debug)]
struct Frame {
    image: Tensor, // (R, H)
    window: Arc<Window>,
}

/// Features of one guidance branch of one clip, by the clip's latent frame.
///
/// Windows move from step to step, so a cached pass may need frames that different windows wrote. Each frame has the
/// image tokens of the window that wrote it last; reference and text tokens come from the window that last wrote the
/// first frame asked for.
#[derive(Debug, Default)]
pub struct FeatureCache {
    frames: BTreeMap<usize, Frame>,
}

impl FeatureCache {
    /// An empty cache.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps a pass's features; `latent_frames` are the clip's latent frames at the window's positions.
    ///
    /// Nothing is copied: the frames are views of the pass's own tokens.
    ///
    /// Errors: the image tokens do not divide into that many frames of the reference frame's size.
    pub fn store(&mut self, latent_frames: &[usize], features: Features) -> Result<()> {
        let each = features.reference.dim(0)?;
        if features.image.dim(0)? != each * latent_frames.len() {
            let reason =
                format!("{:?} image tokens, expected {} frames of {each}", features.image.dims(), latent_frames.len());
            return Err(Error::input("features", reason));
        }
        let window = Arc::new(Window { reference: features.reference, text: features.text });
        for (position, &frame) in latent_frames.iter().enumerate() {
            let image = features.image.narrow(0, position * each, each)?;
            self.frames.insert(frame, Frame { image, window: window.clone() });
        }
        Ok(())
    }

    /// The features of a window at these latent frames, or nothing when one of them was never stored, or was stored
    /// at another size than the rest.
    #[must_use]
    pub fn get(&self, latent_frames: &[usize]) -> Option<Features> {
        let frames = latent_frames.iter().map(|f| self.frames.get(f)).collect::<Option<Vec<_>>>()?;
        let window = &frames.first()?.window;
        let image = match frames.as_slice() {
            [only] => only.image.clone(),
            frames => Tensor::cat(&frames.iter().map(|f| &f.image).collect::<Vec<_>>(), 0).ok()?,
        };
        let sized = image.dim(0).ok()? == window.reference.dim(0).ok()? * latent_frames.len();
        sized.then(|| Features { reference: window.reference.clone(), image, text: window.text.clone() })
    }

    /// Whether a cached pass at these latent frames can run.
    #[must_use]
    pub fn holds(&self, latent_frames: &[usize]) -> bool {
        latent_frames.iter().all(|f| self.frames.contains_key(f))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.frames.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH: usize = 3;
    const WIDTH: usize = 2;

    fn tokens(count: usize, seed: f32) -> Tensor {
        Tensor::arange(0f32, (count * WIDTH) as f32, &Device::Cpu)
            .and_then(|t| (t + f64::from(seed))?.reshape((count, WIDTH)))
            .unwrap()
    }

    fn pass(frames: usize, seed: f32) -> Features {
        Features {
            reference: tokens(EACH, seed),
            image: tokens(frames * EACH, seed + 0.25),
            text: tokens(4, seed + 0.5),
        }
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The reference keeps picture and text tokens with every frame. That is the plain form of this cache.
    #[test]
    fn equals_a_store_that_keeps_everything_with_every_frame() -> Result<()> {
        let total = 11;
        let mut cache = FeatureCache::new();
        let mut plain: BTreeMap<usize, Features> = BTreeMap::new();
        let windows: [&[usize]; 4] = [&[0, 1, 2, 3, 4, 5, 6], &[7, 8, 9, 10, 0, 1, 2], &[9, 10, 0, 1], &[3, 4, 5]];
        for (n, window) in windows.iter().enumerate() {
            let features = pass(window.len(), 100.0 * n as f32);
            for (q, &frame) in window.iter().enumerate() {
                let image = features.image.narrow(0, q * EACH, EACH)?.force_contiguous()?;
                plain.insert(frame, Features { image, ..features.clone() });
            }
            cache.store(window, features)?;
        }
        for first in 0..total {
            for length in 1..=total {
                let window: Vec<usize> = (first..first + length).map(|f| f % total).collect();
                let got = cache.get(&window).unwrap();
                let image: Vec<f32> = window.iter().flat_map(|f| values(&plain[f].image)).collect();
                assert_eq!(values(&got.image), image);
                assert_eq!(values(&got.reference), values(&plain[&first].reference));
                assert_eq!(values(&got.text), values(&plain[&first].text));
            }
        }
        Ok(())
    }

    #[test]
    fn a_window_with_a_frame_that_was_never_stored_is_not_there() -> Result<()> {
        let mut cache = FeatureCache::new();
        assert!(cache.get(&[0]).is_none() && cache.get(&[]).is_none());
        cache.store(&[4, 5], pass(2, 0.0))?;
        assert!(cache.get(&[4, 5]).is_some() && cache.holds(&[5, 4]));
        assert!(cache.get(&[5, 6]).is_none() && !cache.holds(&[5, 6]));
        assert!(cache.store(&[1, 2, 3], pass(2, 0.0)).is_err());
        cache.clear();
        assert!(cache.get(&[4]).is_none());
        Ok(())
    }
}
