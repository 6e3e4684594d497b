//! The reference's own rules for the length of a clip, which [`ClipPlan::new`] replaces with better ones.

use planner::clip::{ClipPlan, REFERENCE_WINDOW, frames_of};

/// Frames that the reference denoises at least, whatever the length of the speech.
pub const FEWEST_FRAMES: usize = 129;
/// Frames of speech that the reference hears at most: 16 s.
pub const MOST_HEARD_FRAMES: usize = 400;
/// Silent frames that the reference appends to longer speech.
const APPENDED_FRAMES: usize = 5;

/// What the reference makes of speech.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceSpeech {
    /// Frames of speech that are heard, from the first.
    pub heard: usize,
    /// Frames with the silent ones that the reference adds.
    pub padded: usize,
    /// Windows, and the frames of the video: those of the speech, at most 405.
    pub clip: ClipPlan,
}

impl ReferenceSpeech {
    /// Applies the rules to speech of `frames` frames: it is cut at 400, filled with silence up to 129 or else by 5
    /// frames, and denoised in the windows of [`reference_clip`].
    #[must_use]
    pub fn new(frames: usize) -> Self {
        let heard = frames.min(MOST_HEARD_FRAMES);
        let padded = if heard <= FEWEST_FRAMES { FEWEST_FRAMES } else { heard + APPENDED_FRAMES };
        let infer_length = (padded / 128 + 1) * 32 + 1;
        let clip = reference_clip(padded, infer_length);
        let frames = frames.min(clip.frames);
        Self { heard, padded, clip: ClipPlan { frames, ..clip } }
    }
}

/// The reference's windows for speech of `padded_frames` frames, its own padding included, when `infer_length` latent
/// frames are denoised: up to 131 frames one window of 33, otherwise windows that move by 10.
#[must_use]
pub fn reference_clip(padded_frames: usize, infer_length: usize) -> ClipPlan {
    let video_length = padded_frames / 4 + 1;
    let short = video_length == REFERENCE_WINDOW || infer_length == REFERENCE_WINDOW;
    let latent_frames = if short { REFERENCE_WINDOW } else { infer_length };
    let kept = video_length.min(latent_frames);
    ClipPlan {
        frames: frames_of(kept),
        latent_frames,
        kept_latent_frames: kept,
        window: REFERENCE_WINDOW,
        shift: if short { 0 } else { 10 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_keeps_short_speech_in_one_window() {
        for padded in [129, 131] {
            let clip = reference_clip(padded, 65);
            assert_eq!((clip.latent_frames, clip.kept_latent_frames, clip.shift), (33, 33, 0));
            assert_eq!(clip.window_audio_frames(0, 0), (0..129).collect::<Vec<_>>());
        }
        assert_eq!(reference_clip(405, 129).kept_latent_frames, 102);
    }

    #[test]
    fn speech_of_every_length_follows_the_reference() {
        // frames -> heard, padded, denoised and kept latent frames, frames of the video
        for (frames, heard, padded, denoised, kept, video) in [
            (1, 1, 129, 33, 33, 1),
            (129, 129, 129, 33, 33, 129),
            (130, 130, 135, 65, 34, 130),
            (250, 250, 255, 65, 64, 250),
            (251, 251, 256, 97, 65, 251),
            (379, 379, 384, 129, 97, 379),
            (400, 400, 405, 129, 102, 400),
            (403, 400, 405, 129, 102, 403),
            (15_000, 400, 405, 129, 102, 405),
        ] {
            let speech = ReferenceSpeech::new(frames);
            let clip = &speech.clip;
            let seen = (speech.heard, speech.padded, clip.latent_frames, clip.kept_latent_frames, clip.frames);
            assert_eq!(seen, (heard, padded, denoised, kept, video), "{frames}");
        }
    }
}
