//! What is no video: latents and frames that only a fault leaves behind.
//!
//! It looks and changes nothing. The bounds stand far from all that a sound run leaves, whatever the checkpoint, so that
//! what they refuse is broken and not merely ugly; docs/generations.md says why each is where it is.

use std::ops::RangeInclusive;

use proto::v1::Stage;

use crate::fault::{Fault, Kind};

/// Standard deviation of latents. Noise has 1, and so have a trained model's latents, about.
const DEVIATION: RangeInclusive<f64> = 0.01..=100.0;
/// Of a video's values, the share that must be something else than black, and than the two ends of the range.
const LEAST_SHARE: f64 = 0.001;
/// The brightest value that is black.
const BLACK: u8 = 8;
/// Frames in a row that may be the same, bit by bit: 1 s.
const SAME_FRAMES: usize = planner::clip::FPS as usize;

/// Refuses latents that no sound step leaves; `when` says which they are.
pub(super) fn check_latents(latents: &[f32], when: &str) -> Result<(), Fault> {
    if let Some(at) = latents.iter().position(|value| !value.is_finite()) {
        return Err(rejected(Stage::Diffusion, format!("{when}: latent {at} is {}", latents[at])));
    }
    let deviation = deviation(latents);
    if DEVIATION.contains(&deviation) {
        return Ok(());
    }
    let (least, most) = (DEVIATION.start(), DEVIATION.end());
    let message = format!("{when}: the latents' standard deviation is {deviation:.4}; sound are {least} to {most}");
    Err(rejected(Stage::Diffusion, message))
}

/// A fault for output that is no video.
pub(super) fn rejected(stage: Stage, what: String) -> Fault {
    Fault::new(Kind::Rejected, format!("output_rejected: {what}")).at(stage)
}

fn deviation(values: &[f32]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
    (values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// Looks at a video's frames as they come.
#[derive(Debug, Default)]
pub(super) struct FrameGate {
    /// Frames seen.
    frames: usize,
    /// Values seen, of these brighter than black, and of these neither 0 nor 255.
    values: u64,
    lit: u64,
    between: u64,
    last: Vec<u8>,
    /// Frames at the end that are the same as the one before them.
    same: usize,
}

impl FrameGate {
    /// Takes frames of `frame_bytes` bytes each.
    ///
    /// Errors: nothing has moved for too long.
    pub(super) fn push(&mut self, frames: &[u8], frame_bytes: usize) -> Result<(), Fault> {
        for frame in frames.chunks_exact(frame_bytes.max(1)) {
            self.frames += 1;
            self.values += frame.len() as u64;
            self.lit += frame.iter().filter(|&&value| value > BLACK).count() as u64;
            self.between += frame.iter().filter(|&&value| value.wrapping_sub(1) < 254).count() as u64;
            self.same = if self.last == frame { self.same + 1 } else { 0 };
            if self.same >= SAME_FRAMES {
                let message = format!(
                    "frame {}: it and the {SAME_FRAMES} before it are the same, bit by bit: the video is frozen",
                    self.frames
                );
                return Err(rejected(Stage::VaeDecode, message));
            }
            self.last.clear();
            self.last.extend_from_slice(frame);
        }
        Ok(())
    }

    /// Looks at the whole.
    ///
    /// Errors: all of it is black, or at the ends of the range.
    pub(super) fn finish(&self) -> Result<(), Fault> {
        let share = |count: u64| count as f64 / self.values.max(1) as f64;
        let refuse = |what: &str, share: f64| {
            let message = format!(
                "after decoding {} frames: only {:.4} % of their values are {what}; {} % at least are in a video",
                self.frames,
                100.0 * share,
                100.0 * LEAST_SHARE,
            );
            Err(rejected(Stage::VaeDecode, message))
        };
        match (share(self.lit), share(self.between)) {
            (lit, _) if lit < LEAST_SHARE => refuse(&format!("above {BLACK} of 255: it is black"), lit),
            (_, between) if between < LEAST_SHARE => refuse("neither 0 nor 255: it is saturated", between),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::noise;

    fn told(result: Result<(), Fault>) -> String {
        let fault = result.unwrap_err();
        assert_eq!(fault.kind, Kind::Rejected);
        fault.message
    }

    #[test]
    fn noise_and_what_a_model_leaves_pass() {
        let latents = noise(7, 10_000);
        for scale in [0.03_f32, 0.2, 1.0, 3.0, 30.0] {
            let scaled: Vec<f32> = latents.iter().map(|value| 5.0 + value * scale).collect();
            check_latents(&scaled, "step 1 of 2").unwrap();
        }
    }

    #[test]
    fn latents_that_are_no_numbers_or_have_run_away_or_collapsed_are_named_with_the_figure() {
        let latents = noise(7, 10_000);
        for (wrong, part) in [(f32::NAN, "latent 77 is NaN"), (f32::NEG_INFINITY, "latent 77 is -inf")] {
            let mut latents = latents.clone();
            latents[77] = wrong;
            let message = told(check_latents(&latents, "step 3 of 50"));
            assert!(message.starts_with("output_rejected: step 3 of 50: ") && message.ends_with(part), "{message}");
        }
        for (scale, figure) in [(205.0_f32, "standard deviation is 20"), (0.001, "standard deviation is 0.0010")] {
            let scaled: Vec<f32> = latents.iter().map(|value| value * scale).collect();
            let message = told(check_latents(&scaled, "step 3 of 50"));
            assert!(message.contains(figure) && message.contains("0.01 to 100"), "{message}");
        }
        assert!(told(check_latents(&[f32::MAX, -f32::MAX], "step 1 of 1")).contains("standard deviation"));
    }

    /// Frames of 30 by 10 values; each is made of its number.
    fn video(frames: usize, value: impl Fn(usize, usize) -> u8) -> Result<(), Fault> {
        let mut gate = FrameGate::default();
        let bytes: Vec<u8> =
            (0..frames).flat_map(|n| (0..300).map(move |i| (n, i))).map(|(n, i)| value(n, i)).collect();
        // In pieces of two frames, as a decoder may send them.
        for piece in bytes.chunks(600) {
            gate.push(piece, 300)?;
        }
        gate.finish()
    }

    #[test]
    fn pictures_pass_if_they_are_noise_or_nearly_still_or_dark_or_a_drawing_in_black_and_white() {
        video(60, |n, i| (n * 31 + i * 17) as u8).unwrap();
        // One value of a frame moves, by one.
        video(60, |n, i| if i == 0 { 100 + (n % 2) as u8 } else { i as u8 }).unwrap();
        video(60, |n, i| if i == 3 { 30 + (n % 3) as u8 } else { 2 }).unwrap();
        video(60, |n, i| if i == n % 30 { 90 } else { 255 * (i % 2) as u8 }).unwrap();
        video(SAME_FRAMES, |_, i| i as u8).unwrap();
        video(1, |_, _| 128).unwrap();
    }

    #[test]
    fn black_saturated_and_frozen_pictures_are_named_with_the_figure() {
        let black = told(video(30, |n, i| ((n + i) % 9) as u8));
        assert!(black.contains("after decoding 30 frames: only 0.0000 % of their values are above 8"), "{black}");
        let white = told(video(30, |n, i| if (n + i) % 5 == 0 { 0 } else { 255 }));
        assert!(white.contains("neither 0 nor 255"), "{white}");
        let frozen = told(video(80, |n, i| if n < 10 { n as u8 } else { i as u8 }));
        assert!(frozen.contains("frame 36: it and the 25 before it"), "{frozen}");
    }
}
