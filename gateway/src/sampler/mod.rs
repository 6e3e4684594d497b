//! The denoise loop: from noise to a clip's latents, one velocity at a time.
//!
//! Pure arithmetic, driven by its owner: [`Sampler::requests`] says which passes the current step needs, the owner
//! has them run wherever it likes and hands each velocity to [`Sampler::accept`] as it comes, [`Sampler::advance`]
//! takes the step. The result does not depend on the order of arrival, to the bit.
//!
//! Latents are `(C, T, h, w)` f32, row-major. Within a step the windows do not read each other: each takes the step
//! on its own frames, and frames that two windows share become the plain average.

mod noise;
mod plan;
mod reference;

#[cfg(test)]
mod tests;

use std::mem;

use half::{bf16, f16};
use planner::clip::ClipPlan;

pub use noise::noise;
pub use plan::{Guidance, Prompt, Schedule, Step, StepPlan};
pub use reference::{FEWEST_FRAMES, MOST_HEARD_FRAMES, ReferenceSpeech, reference_clip};

/// What the sampler does not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SamplerError {
    /// Latents of another size than the clip's.
    #[error("latents: {got} values, expected {expected}")]
    Latents {
        /// Values given.
        got: usize,
        /// Values of the clip.
        expected: usize,
    },
    /// The run cannot begin there: the step needs features of an earlier one.
    #[error("step {step}: a run of {steps} steps cannot be resumed there from latents alone")]
    NotResumable {
        /// The step asked for.
        step: usize,
        /// Steps of the run.
        steps: usize,
    },
    /// A velocity that the current step has not asked for, or has already.
    #[error("velocity {index}: the step asked for {requests} and each is given once")]
    Unasked {
        /// Number of the request.
        index: usize,
        /// Requests of the step.
        requests: usize,
    },
    /// A velocity of another size than the request's latents.
    #[error("velocity {index}: {got} values, expected {expected}")]
    Velocity {
        /// Number of the request.
        index: usize,
        /// Values given.
        got: usize,
        /// Values of the request's latents.
        expected: usize,
    },
    /// A velocity with a value that is infinite or not a number.
    #[error("velocity {index}: value {at} is not finite")]
    NotFinite {
        /// Number of the request.
        index: usize,
        /// Place of the first such value.
        at: usize,
    },
    /// The step was to be taken before all its velocities were there.
    #[error("step {step}: {missing} of its velocities are missing")]
    Missing {
        /// The step.
        step: usize,
        /// Velocities not given yet.
        missing: usize,
    },
}

/// Size of one latent frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameShape {
    /// Channels.
    pub channels: usize,
    /// Rows, an eighth of the picture's.
    pub rows: usize,
    /// Columns, an eighth of the picture's.
    pub columns: usize,
}

impl FrameShape {
    fn plane(self) -> usize {
        self.rows * self.columns
    }

    /// Values of `frames` latent frames.
    #[must_use]
    pub fn values(self, frames: usize) -> usize {
        self.channels * frames * self.plane()
    }

    /// The first `kept` of the `frames` latent frames in `(C, frames, h, w)`; all when there are no more.
    #[must_use]
    pub fn first_frames(self, latents: &[f32], frames: usize, kept: usize) -> Vec<f32> {
        let kept = kept.min(frames);
        latents
            .chunks_exact((frames * self.plane()).max(1))
            .flat_map(|channel| &channel[..kept * self.plane()])
            .copied()
            .collect()
    }
}

/// Which of the two guidance passes a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Branch {
    /// With the speech.
    Conditional,
    /// Without.
    Unconditional,
}

/// One pass of the network that the current step needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Number within the step; windows ascending, of each the conditional pass first. Where windows share a frame,
    /// the features of the higher number are those that later cached steps use.
    pub index: usize,
    /// Guidance branch; features are kept apart by it.
    pub branch: Branch,
    /// Whose text states.
    pub prompt: Prompt,
    /// The audio features are all zero.
    pub silent: bool,
    /// The face mask is multiplied by this.
    pub face_mask_scale: f32,
    /// Flow time, 0..1000.
    pub timestep: f32,
    /// Only the last block runs, on kept features.
    pub cached: bool,
    /// Keep the features of this full pass.
    pub keep_features: bool,
    /// The clip's latent frame at each of the window's T positions.
    pub latent_frames: Vec<usize>,
    /// The clip's frame at each of the 4T-3 audio positions; past the speech there is silence.
    pub audio_frames: Vec<usize>,
    /// The window's noisy latents, `(C, T, h, w)`.
    pub latents: Vec<f32>,
}

/// The state of one clip between two steps.
#[derive(Debug, Clone)]
pub struct Sampler {
    plan: StepPlan,
    clip: ClipPlan,
    shape: FrameShape,
    rounding: Rounding,
    step: usize,
    latents: Vec<f32>,
    velocities: Vec<Option<Vec<f32>>>,
}

/// What a sampler is made of, besides its latents.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The steps.
    pub plan: StepPlan,
    /// The windows.
    pub clip: ClipPlan,
    /// Size of a latent frame.
    pub shape: FrameShape,
    /// Where accuracy is given up.
    pub rounding: Rounding,
}

/// Where latents are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Nowhere: they are f32 throughout.
    Nowhere,
    /// Each window to bf16 after each step; sums and averages are f32.
    Windows,
    /// As the reference: each window to bf16 after each step; the noise, the sums over windows and their averages to f16.
    Reference,
}

impl Rounding {
    /// A window's value after a step.
    fn moved(self, value: f32) -> f32 {
        match self {
            Self::Nowhere => value,
            Self::Windows | Self::Reference => bf16::from_f32(value).to_f32(),
        }
    }

    /// A value of the clip's latents, or of a sum on the way to them.
    fn kept(self, value: f32) -> f32 {
        match self {
            Self::Nowhere | Self::Windows => value,
            Self::Reference => f16::from_f32(value).to_f32(),
        }
    }
}

impl Sampler {
    /// Begins with noise `(C, T, h, w)` of the clip's `latent_frames`.
    pub fn new(setup: Setup, mut noise: Vec<f32>) -> Result<Self, SamplerError> {
        noise.iter_mut().for_each(|value| *value = setup.rounding.kept(*value));
        Self::resume(setup, 0, noise)
    }

    /// Goes on with the latents as they were before step `step`.
    ///
    /// Errors: the latents have another size; the step needs features of an earlier one ([`StepPlan::resumable`]).
    pub fn resume(setup: Setup, step: usize, latents: Vec<f32>) -> Result<Self, SamplerError> {
        let Setup { plan, clip, shape, rounding } = setup;
        let expected = shape.values(clip.latent_frames);
        if latents.len() != expected {
            return Err(SamplerError::Latents { got: latents.len(), expected });
        }
        if !plan.resumable(step) {
            return Err(SamplerError::NotResumable { step, steps: plan.steps().len() });
        }
        let mut sampler = Self { plan, clip, shape, rounding, step, latents, velocities: Vec::new() };
        sampler.await_velocities();
        Ok(sampler)
    }

    fn await_velocities(&mut self) {
        let requests = self.current().map_or(0, |step| self.clip.starts().count() * branches(step));
        self.velocities.clear();
        self.velocities.resize(requests, None);
    }

    /// The step to be taken next; nothing when all are.
    #[must_use]
    pub fn current(&self) -> Option<&Step> {
        self.plan.steps().get(self.step)
    }

    /// Number of the step to be taken next, from 0; the number of steps when all are taken.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }

    /// The steps.
    #[must_use]
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// The latents before the step to be taken next, `(C, T, h, w)`.
    #[must_use]
    pub fn latents(&self) -> &[f32] {
        &self.latents
    }

    /// The latents that are to be decoded, `(C, kept, h, w)`.
    #[must_use]
    pub fn kept_latents(&self) -> Vec<f32> {
        self.shape.first_frames(&self.latents, self.clip.latent_frames, self.clip.kept_latent_frames)
    }

    /// The first latent frame, `(C, 1, h, w)`.
    #[must_use]
    pub fn first_frame(&self) -> Vec<f32> {
        self.gather(&[0])
    }

    /// The first latent frame without its noise, as far as it can be foreseen: where its last step would end if it went
    /// on straight. `before` is what [`first_frame`](Self::first_frame) gave before that step; nothing before the first.
    ///
    /// With flow matching `x = (1 - σ)·x0 + σ·noise`, and the velocity is `noise - x0`; so `x0 = x - σ·velocity`.
    #[must_use]
    pub fn foreseen_first_frame(&self, before: &[f32]) -> Option<Vec<f32>> {
        let sigmas = self.plan.sigmas();
        let (earlier, now) = (sigmas.get(self.step.checked_sub(1)?)?, sigmas.get(self.step)?);
        // The step's own velocity, over both branches and all windows, by what it did.
        let foreseen = |(x, before): (f32, &f32)| x - now * (x - before) / (now - earlier);
        Some(self.first_frame().into_iter().zip(before).map(foreseen).collect())
    }

    /// The passes that the current step needs, in order of `index`; empty when all steps are taken.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        let Some(step) = self.current() else { return Vec::new() };
        let shift = self.clip.shift_at(self.step);
        let mut requests = Vec::with_capacity(self.velocities.len());
        for start in self.clip.starts() {
            let latent_frames = self.clip.window_latent_frames(start, shift);
            let conditional = Request {
                index: requests.len(),
                branch: Branch::Conditional,
                prompt: Prompt::Positive,
                silent: false,
                face_mask_scale: step.face_mask_scale,
                timestep: step.timestep,
                cached: step.cached,
                keep_features: step.keep_features,
                latents: self.gather(&latent_frames),
                audio_frames: self.clip.window_audio_frames(start, shift),
                latent_frames,
            };
            let unconditional = step.guidance.map(|guidance| Request {
                index: requests.len() + 1,
                branch: Branch::Unconditional,
                prompt: guidance.prompt,
                silent: true,
                ..conditional.clone()
            });
            requests.push(conditional);
            requests.extend(unconditional);
        }
        requests
    }

    /// `(C, frames.len(), h, w)` of the clip's latents.
    fn gather(&self, frames: &[usize]) -> Vec<f32> {
        let plane = self.shape.plane();
        let mut window = Vec::with_capacity(self.shape.values(frames.len()));
        for channel in 0..self.shape.channels {
            for &frame in frames {
                let at = (channel * self.clip.latent_frames + frame) * plane;
                window.extend_from_slice(&self.latents[at..at + plane]);
            }
        }
        window
    }

    /// Takes the velocity `(C, T, h, w)` of one request of the current step, in any order.
    ///
    /// Errors: it was not asked for, came already, has the wrong size, or bears a value that is not finite; the
    /// sampler is as before then.
    pub fn accept(&mut self, index: usize, velocity: Vec<f32>) -> Result<(), SamplerError> {
        let requests = self.velocities.len();
        let expected = self.shape.values(self.clip.window);
        let slot = match self.velocities.get_mut(index) {
            Some(slot @ None) => slot,
            _ => return Err(SamplerError::Unasked { index, requests }),
        };
        if velocity.len() != expected {
            return Err(SamplerError::Velocity { index, got: velocity.len(), expected });
        }
        if let Some(at) = velocity.iter().position(|v| !v.is_finite()) {
            return Err(SamplerError::NotFinite { index, at });
        }
        *slot = Some(velocity);
        Ok(())
    }

    /// Velocities that the current step still waits for.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.velocities.iter().filter(|v| v.is_none()).count()
    }

    /// Takes the current step; does nothing when all are taken.
    ///
    /// Errors: a velocity is missing; the sampler is as before then.
    pub fn advance(&mut self) -> Result<(), SamplerError> {
        let Some(&step) = self.current() else { return Ok(()) };
        let missing = self.missing();
        if missing > 0 {
            return Err(SamplerError::Missing { step: self.step, missing });
        }
        let velocities: Vec<Vec<f32>> = mem::take(&mut self.velocities).into_iter().flatten().collect();
        let (plane, frames) = (self.shape.plane(), self.clip.latent_frames);
        let shift = self.clip.shift_at(self.step);
        let mut sum = vec![0f32; self.latents.len()];
        let mut count = vec![0f32; frames];
        // Window after window, whatever the order of arrival: additions in f32 do not commute over three windows.
        for (start, passes) in self.clip.starts().zip(velocities.chunks(branches(&step))) {
            let window = self.clip.window_latent_frames(start, shift);
            for &frame in &window {
                count[frame] += 1.0;
            }
            for channel in 0..self.shape.channels {
                for (position, &frame) in window.iter().enumerate() {
                    let from = (channel * window.len() + position) * plane;
                    let to = (channel * frames + frame) * plane;
                    for i in 0..plane {
                        let conditional = passes[0][from + i];
                        let velocity = match (step.guidance, passes.get(1)) {
                            (Some(guidance), Some(unconditional)) => {
                                let base = unconditional[from + i];
                                base + guidance.scale * (conditional - base)
                            }
                            _ => conditional,
                        };
                        let moved = self.latents[to + i] + velocity * step.sigma_change;
                        sum[to + i] = self.rounding.kept(sum[to + i] + self.rounding.moved(moved));
                    }
                }
            }
        }
        for (at, frame) in sum.chunks_exact_mut(plane.max(1)).enumerate() {
            let count = count[at % frames];
            frame.iter_mut().for_each(|value| *value = self.rounding.kept(*value / count));
        }
        self.latents = sum;
        self.step += 1;
        self.await_velocities();
        Ok(())
    }
}

fn branches(step: &Step) -> usize {
    if step.guidance.is_some() { 2 } else { 1 }
}
