//! Frames, latent frames and windows of one clip.
//!
//! One latent frame stands for four frames, the first for one alone: `T` latent frames are `4(T-1)+1` frames.

/// Frames a second of every clip.
pub const FPS: u32 = 25;
/// Samples of 16 kHz speech for one frame.
pub const SAMPLES_PER_FRAME: usize = 640;
/// Latent frames of the window that the model was trained on.
pub const REFERENCE_WINDOW: usize = 33;

/// What is denoised for a clip, and what of it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipPlan {
    /// Frames of the video.
    pub frames: usize,
    /// Latent frames that are denoised.
    pub latent_frames: usize,
    /// Of these, the latent frames that are decoded, from the first.
    pub kept_latent_frames: usize,
    /// Latent frames of one window.
    pub window: usize,
    /// Latent frames by which the windows move from step to step.
    pub shift: usize,
}

impl ClipPlan {
    /// Plans a clip of `frames` frames of speech with windows of at most `window` latent frames.
    ///
    /// Speech that fits one window gets just the latent frames it needs, at least those of `min_frames`; longer
    /// speech follows the reference: 5 frames are added, the windows' total is the next of `k(window-1)+1`, and
    /// what is not needed is dropped at the end. `frames` and `window` are at least 1 and 2.
    #[must_use]
    pub fn new(frames: usize, min_frames: usize, window: usize) -> Self {
        let window_frames = frames_of(window);
        let denoised = frames.max(min_frames);
        if denoised <= window_frames {
            let latent_frames = latent_frames_for(denoised);
            return Self { frames, latent_frames, kept_latent_frames: latent_frames, window: latent_frames, shift: 0 };
        }
        let padded = denoised + 5;
        let stride = window - 1;
        let latent_frames = (padded / (4 * stride) + 1) * stride + 1;
        Self {
            frames,
            latent_frames,
            kept_latent_frames: latent_frames_for(frames).min(latent_frames),
            window,
            // 10 of 33 in the reference.
            shift: ((10 * window + 16) / 33).max(1),
        }
    }

    /// First latent frames of the windows, before the shift.
    pub fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.latent_frames).step_by(self.window)
    }

    /// The clip's latent frame at each position of the window that begins at `start - shift`.
    #[must_use]
    pub fn window_latent_frames(&self, start: usize, shift: usize) -> Vec<usize> {
        let total = self.latent_frames;
        (0..self.window).map(|q| (start + q + total - shift % total) % total).collect()
    }

    /// The clip's frame at each audio position of that window: `4·window - 3` of them, cyclic over
    /// `4·latent_frames` positions.
    #[must_use]
    pub fn window_audio_frames(&self, start: usize, shift: usize) -> Vec<usize> {
        let total = 4 * self.latent_frames;
        (0..frames_of(self.window)).map(|q| (4 * start + q + total - (4 * shift) % total) % total).collect()
    }

    /// The shift at a step.
    #[must_use]
    pub fn shift_at(&self, step: usize) -> usize {
        if self.shift == 0 { 0 } else { (step * self.shift) % self.window }
    }
}

/// Frames that `latent_frames` latent frames decode to.
#[must_use]
pub fn frames_of(latent_frames: usize) -> usize {
    4 * latent_frames.saturating_sub(1) + 1
}

/// Latent frames that cover `frames` frames.
#[must_use]
pub fn latent_frames_for(frames: usize) -> usize {
    frames.saturating_sub(1).div_ceil(4) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_examples_hold() {
        // F (speech + 5) -> latent frames, windows
        for (frames, latent, windows) in
            [(130, 65, 2), (250, 65, 2), (251, 97, 3), (378, 97, 3), (379, 129, 4), (400, 129, 4)]
        {
            let plan = ClipPlan::new(frames, 1, REFERENCE_WINDOW);
            assert_eq!((plan.latent_frames, plan.starts().count(), plan.shift), (latent, windows, 10), "{frames}");
        }
        let plan = ClipPlan::new(129, 1, REFERENCE_WINDOW);
        assert_eq!((plan.latent_frames, plan.starts().count(), plan.shift), (33, 1, 0));
    }

    #[test]
    fn short_speech_makes_a_short_clip() {
        let plan = ClipPlan::new(30, 1, REFERENCE_WINDOW);
        assert_eq!((plan.latent_frames, plan.kept_latent_frames, plan.window), (9, 9, 9)); // 33 frames
        assert_eq!(plan.window_audio_frames(0, 0).len(), 33);
        let plan = ClipPlan::new(30, 129, REFERENCE_WINDOW);
        assert_eq!((plan.frames, plan.latent_frames), (30, 33));
    }

    #[test]
    fn every_window_position_is_a_frame_of_the_clip_and_all_are_covered() {
        for frames in [130, 333, 1500] {
            for window in [3, 9, 33] {
                let plan = ClipPlan::new(frames, 1, window);
                assert!(plan.kept_latent_frames <= plan.latent_frames);
                assert!(frames_of(plan.kept_latent_frames) >= frames);
                for step in 0..7 {
                    let mut seen = vec![false; plan.latent_frames];
                    for start in plan.starts() {
                        for frame in plan.window_latent_frames(start, plan.shift_at(step)) {
                            seen[frame] = true;
                        }
                    }
                    assert!(seen.iter().all(|&s| s));
                }
            }
        }
    }
}
