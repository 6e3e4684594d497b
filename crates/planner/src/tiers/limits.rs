//! What a tier lets a request ask for.

use std::fmt;

use serde::Serialize;

use super::Tier;
use crate::clip::{FPS, REFERENCE_WINDOW, frames_of, latent_frames_for};

/// The limits of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// The shorter side of the video, in pixels.
    pub pixels: u32,
    /// Frames that one pass holds. A longer clip is made of several windows.
    pub frames: u32,
    /// Seconds of speech.
    pub audio_seconds: u32,
    /// Denoise steps.
    pub steps: u32,
}

/// What a request asks for, as far as a tier limits it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    /// The shorter side of the video, in pixels.
    pub size: u32,
    /// Denoise steps.
    pub steps: u32,
    /// Seconds of speech.
    pub seconds: f64,
    /// Frames of one window that the request's own rules fix, as the reference's do.
    pub window_frames: Option<u32>,
}

/// A value of a request that is past a tier's limit.
#[derive(Debug, Clone, PartialEq)]
pub struct Excess {
    /// The tier.
    pub tier: String,
    /// The request's field.
    pub field: &'static str,
    /// What was asked for.
    pub value: f64,
    /// What the tier allows.
    pub limit: f64,
    /// Of what.
    pub unit: &'static str,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tier, field, value, limit, unit } = self;
        write!(f, "tier {tier} allows {field} of at most {limit} {unit}, {value} were asked for")
    }
}

/// A value that was lowered to a tier's limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The request's field.
    pub field: &'static str,
    /// What was asked for.
    pub from: f64,
    /// What is done.
    pub to: f64,
    /// Of what.
    pub unit: &'static str,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was lowered from {} to {} {}", self.field, self.from, self.to, self.unit)
    }
}

impl Limits {
    /// Latent frames of one window: the frames rounded up to 4k+1, at most those that the model was trained on, at
    /// least the two that overlapping windows need.
    #[must_use]
    pub fn window(&self) -> usize {
        latent_frames_for(self.frames as usize).clamp(2, REFERENCE_WINDOW)
    }
}

impl Tier {
    /// Values of a request that are past the limits, all of them.
    #[must_use]
    pub fn excesses(&self, wanted: &Wanted) -> Vec<Excess> {
        let Limits { pixels, audio_seconds, steps, .. } = self.limits;
        let window = frames_of(self.limits.window()) as u32;
        // A frame's worth of speech more is no second more.
        let seconds_limit = f64::from(audio_seconds) + 1.0 / f64::from(FPS);
        [
            (wanted.size > pixels, "size", f64::from(wanted.size), f64::from(pixels), "pixels"),
            (wanted.steps > steps, "steps", f64::from(wanted.steps), f64::from(steps), "steps"),
            (!(wanted.seconds <= seconds_limit), "audio", wanted.seconds, f64::from(audio_seconds), "seconds"),
            (
                wanted.window_frames.is_some_and(|frames| frames > window),
                "parity",
                f64::from(wanted.window_frames.unwrap_or_default()),
                f64::from(window),
                "frames a window",
            ),
        ]
        .into_iter()
        .filter(|(past, ..)| *past)
        .map(|(_, field, value, limit, unit)| Excess {
            tier: self.name.clone(),
            field,
            value: (value * 100.0).round() / 100.0,
            limit,
            unit,
        })
        .collect()
    }

    /// The request within the limits, and what was lowered for it.
    ///
    /// Errors: what cannot be lowered, since it is not a number of the caller's: a window that the rules fix.
    pub fn lowered(&self, wanted: &Wanted) -> Result<(Wanted, Vec<Change>), Excess> {
        let mut lowered = *wanted;
        let mut changes = Vec::new();
        for excess in self.excesses(wanted) {
            match excess.field {
                "size" => lowered.size = self.limits.pixels,
                "steps" => lowered.steps = self.limits.steps,
                "audio" => lowered.seconds = f64::from(self.limits.audio_seconds),
                _ => return Err(excess),
            }
            changes.push(Change { field: excess.field, from: excess.value, to: excess.limit, unit: excess.unit });
        }
        Ok((lowered, changes))
    }
}
