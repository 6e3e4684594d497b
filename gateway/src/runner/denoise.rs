//! The denoise loop over the wire: the sampler says which passes it needs, the transformer runs them.

use std::time::Instant;

use proto::{
    tensor::HostTensor,
    v1::{self, Parity, PassMode, PredictItem, PromptKind, Stage},
};

use super::{
    prepare::Prepared,
    run::Run,
    session::{Session, StepPasses},
};
use crate::{
    fault::{Fault, Kind},
    sampler::{Branch, FrameShape, Prompt, Request, Rounding, Sampler, SamplerError, Schedule, Setup, StepPlan, noise},
    store::{Resume, artifacts::sha256},
};

/// A clip between two steps, and the hash of the plan that it follows.
#[derive(Debug)]
pub(crate) struct Denoise {
    sampler: Sampler,
    plan: String,
    /// (channels, rows, columns) of a latent frame.
    shape: FrameShape,
}

impl Denoise {
    /// Begins with noise, or goes on with latents that were stored under the same plan.
    ///
    /// `models` says which checkpoints give what it is conditioned on and the velocities.
    pub(crate) async fn begin(run: &Run, prepared: &Prepared, channels: usize, models: &str) -> Result<Self, Fault> {
        let (clip, settings) = (&prepared.plan, &prepared.settings);
        let (rows, columns) = prepared.size.latent();
        let shape = FrameShape { channels, rows, columns };
        let schedule = Schedule {
            steps: settings.steps as usize,
            flow_shift: settings.flow_shift,
            guidance_scale: settings.guidance_scale,
        };
        let (plan, rounding) = match settings.parity {
            Parity::Unspecified => (StepPlan::scaled(schedule), Rounding::Nowhere),
            Parity::Reference => (StepPlan::reference(schedule), Rounding::Reference),
        };
        // All that decides the latents, besides the inputs, which a generation never changes.
        let followed = format!("{settings:?} {clip:?} {shape:?} {rounding:?} {plan:?} {models}");
        let hash = sha256(followed.as_bytes());
        let setup = Setup { plan, clip: clip.clone(), shape, rounding };
        if let Some(Resume { step, latents }) = run.lease.resume(&hash).await {
            match Sampler::resume(setup.clone(), step, latents) {
                Ok(sampler) => {
                    run.resumed(step as u32).await;
                    return Ok(Self { sampler, plan: hash, shape });
                }
                Err(error) => tracing::warn!(generation_id = run.id(), %error, "the stored latents cannot be used"),
            }
        }
        let start = noise(settings.seed, shape.values(clip.latent_frames));
        let sampler = Sampler::new(setup, start).map_err(|error| wrong(0, &error))?;
        Ok(Self { sampler, plan: hash, shape })
    }

    /// Whether all steps are done.
    pub(crate) fn is_done(&self) -> bool {
        self.sampler.current().is_none()
    }

    /// Takes the steps that are left. Latents that the rest can be gone on with are stored before each step, and
    /// after the last one.
    pub(crate) async fn run(&mut self, run: &Run, prepared: &Prepared, session: &mut Session) -> Result<(), Fault> {
        let FrameShape { channels, rows, columns } = self.shape;
        let (began, first) = (Instant::now(), self.sampler.step());
        while let Some(&step) = self.sampler.current() {
            let number = self.sampler.step();
            let passes = StepPasses {
                step: number as u32,
                timestep: step.timestep,
                mode: if step.cached { PassMode::Cached } else { PassMode::Full },
                keep_features: step.keep_features,
                shape: [channels, prepared.plan.window, rows, columns],
                items: self.sampler.requests().into_iter().map(item).collect(),
            };
            for (index, velocity) in session.predict(passes).await?.into_iter().enumerate() {
                self.sampler.accept(index, velocity).map_err(|error| wrong(number, &error))?;
            }
            self.sampler.advance().map_err(|error| wrong(number, &error))?;
            if self.sampler.latents().iter().any(|value| !value.is_finite()) {
                let message = format!("step {}: the latents are no longer finite numbers", number + 1);
                return Err(Fault::new(Kind::Internal, message).at(Stage::Diffusion));
            }
            let done = self.sampler.step();
            if self.sampler.plan().resumable(done) {
                let stored = run.lease.checkpoint(done, &self.plan, self.sampler.latents()).await;
                // A full disk costs what a later crash would repeat, and not what is done already.
                if let Err(fault) = stored {
                    tracing::warn!(generation_id = run.id(), step = done, %fault, "the latents were not stored");
                }
            }
            run.step_done(done as u32, began.elapsed().as_secs_f64() / (done - first) as f64).await;
        }
        Ok(())
    }

    /// The latent frames that are decoded, F32 (C, T, h, w).
    pub(crate) fn latents(&self, prepared: &Prepared) -> Result<HostTensor, Fault> {
        let FrameShape { channels, rows, columns } = self.shape;
        let shape = [channels, prepared.plan.kept_latent_frames, rows, columns];
        HostTensor::from_f32("latents", &shape, &self.sampler.kept_latents())
            .map_err(|error| Fault::internal("the latents cannot be sent", &error))
    }
}

/// A pass as the transformer takes it, with its latents.
fn item(request: Request) -> (PredictItem, Vec<f32>) {
    let branch = match request.branch {
        Branch::Conditional => v1::Branch::Conditional,
        Branch::Unconditional => v1::Branch::Unconditional,
    };
    let prompt = match request.prompt {
        Prompt::Positive => PromptKind::Positive,
        Prompt::Negative => PromptKind::Negative,
    };
    let item = PredictItem {
        branch: branch.into(),
        prompt: prompt.into(),
        silent: request.silent,
        face_mask_scale: request.face_mask_scale,
        latent_frames: request.latent_frames.iter().map(|&frame| frame as u32).collect(),
        audio_frames: request.audio_frames.iter().map(|&frame| frame as u32).collect(),
    };
    (item, request.latents)
}

fn wrong(step: usize, error: &SamplerError) -> Fault {
    Fault::new(Kind::Internal, format!("step {}: {error}", step + 1))
}
