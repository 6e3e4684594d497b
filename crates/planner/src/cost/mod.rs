//! What a stage needs: bytes and seconds.

pub mod cpu;
pub mod cuda;
pub mod work;

use crate::{
    clip::{ClipPlan, FPS, frames_of},
    size::PictureSize,
    steps,
};

/// Rows of the text that enter the transformer's blocks, where no prompt is known: about 130 tokens and the picture's.
const TEXT_ROWS: u64 = 610;
/// Most of anything that a job may have, so that sums stay numbers.
const MOST_TOKENS: u64 = 1 << 28;

/// The work of one generation, in the networks' own units.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Job {
    /// The video's size.
    pub size: PictureSize,
    /// Frames of the video.
    pub frames: u64,
    /// Latent frames of one window.
    pub window: u64,
    /// Windows of one step.
    pub windows: u64,
    /// Latent frames of the clip that are denoised.
    pub latent_frames: u64,
    /// Of these, the latent frames that are decoded.
    pub kept_latent_frames: u64,
    /// Denoise steps.
    pub steps: u64,
    /// Branches of each step: two with guidance.
    pub branches: u64,
    /// Seconds of speech.
    pub seconds: f64,
    /// Tokens of the prompt without its template; nothing where no prompt is known.
    pub prompt_tokens: Option<u64>,
    /// Every step runs in full.
    pub no_feature_cache: bool,
}

/// A job that is larger than can be counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{width}x{height} pixels and a window of {window} latent frames are {tokens} tokens, the limit is {MOST_TOKENS}"
)]
pub struct TooLarge {
    width: u32,
    height: u32,
    window: u64,
    tokens: u64,
}

impl Job {
    /// The job of a clip.
    ///
    /// Errors: a pass has more tokens than can be counted.
    pub fn new(size: PictureSize, clip: &ClipPlan, steps: u32, branches: u64) -> Result<Self, TooLarge> {
        let job = Self {
            size,
            frames: clip.frames as u64,
            window: clip.window as u64,
            windows: clip.starts().count() as u64,
            latent_frames: clip.latent_frames as u64,
            kept_latent_frames: clip.kept_latent_frames as u64,
            steps: u64::from(steps),
            branches,
            seconds: clip.frames as f64 / f64::from(FPS),
            prompt_tokens: None,
            no_feature_cache: false,
        };
        let (width, height) = (size.width, size.height);
        let tokens = u64::from(width).saturating_mul(u64::from(height)).saturating_mul(clip.window as u64 + 1) / 256;
        match tokens <= MOST_TOKENS && clip.latent_frames as u64 <= MOST_TOKENS {
            true => Ok(job),
            false => Err(TooLarge { width, height, window: clip.window as u64, tokens }),
        }
    }

    /// Rows and columns of the latents.
    #[must_use]
    pub fn latent(&self) -> (u64, u64) {
        (u64::from(self.size.height) / 8, u64::from(self.size.width) / 8)
    }

    /// Tokens of one latent frame.
    #[must_use]
    pub fn frame_tokens(&self) -> u64 {
        let (h, w) = self.latent();
        (h / 2) * (w / 2)
    }

    /// Image tokens of one pass, with those of the reference frame.
    #[must_use]
    pub fn image_tokens(&self) -> u64 {
        (self.window + 1) * self.frame_tokens()
    }

    /// Text tokens of one pass: the prompt's after the template, the rest of the template, the picture's.
    #[must_use]
    pub fn text_tokens(&self, llava: &crate::table::Llava) -> u64 {
        match self.prompt_tokens {
            Some(tokens) => llava.rows(tokens),
            None => TEXT_ROWS.min(llava.states().max(1)),
        }
    }

    /// All tokens of one pass.
    #[must_use]
    pub fn tokens(&self, llava: &crate::table::Llava) -> u64 {
        self.image_tokens() + self.text_tokens(llava)
    }

    /// Parts in which the transformer's wide layers take the tokens of one pass.
    #[must_use]
    pub fn token_chunks(&self, llava: &crate::table::Llava) -> u64 {
        self.tokens(llava).div_ceil(cpu::TOKENS_AT_ONCE).max(1)
    }

    /// Frames of one window.
    #[must_use]
    pub fn window_frames(&self) -> u64 {
        frames_of(self.window as usize) as u64
    }

    /// Full and cached passes of the whole run.
    #[must_use]
    pub fn passes(&self) -> (u64, u64) {
        let (full, cached) = self.steps_of_each_kind();
        let each = self.windows * self.branches;
        (full as u64 * each, cached as u64 * each)
    }

    /// Whether features of full passes are kept for cached ones.
    #[must_use]
    pub fn caches(&self) -> bool {
        self.steps_of_each_kind().1 > 0
    }

    fn steps_of_each_kind(&self) -> (usize, usize) {
        match self.no_feature_cache {
            true => (self.steps as usize, 0),
            false => steps::count(self.steps as usize),
        }
    }
}
