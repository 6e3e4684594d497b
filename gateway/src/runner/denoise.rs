//! The denoise loop over the wire: the sampler says which passes it needs, the transformer runs them.

use std::{sync::Arc, time::Instant};

use proto::{
    tensor::HostTensor,
    v1::{self, Parity, PassMode, PredictItem, PromptKind, Stage},
};

use super::{
    ladder::Ladder,
    prepare::Prepared,
    run::Run,
    session::{Session, StepPasses},
};
use crate::{
    fault::{Fault, Kind},
    sampler::{Branch, FrameShape, Prompt, Request, Rounding, Sampler, SamplerError, Schedule, Setup, StepPlan, noise},
};

/// Denoises a clip; gives the latent frames that are decoded, F32 (C, T, h, w).
pub(crate) async fn denoise(
    run: &Run,
    prepared: &Prepared,
    session: &mut Session,
    channels: usize,
) -> Result<HostTensor, Fault> {
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
    let features = plan.steps().iter().any(|step| step.keep_features);
    let mut ladder = Ladder::of(Stage::Diffusion, features);
    while let Err(fault) = session.open().await {
        session.fit(ladder.next(run, fault).await?);
    }
    let setup = Setup { plan, clip: clip.clone(), shape, rounding };
    let start = noise(settings.seed, shape.values(clip.latent_frames));
    let mut sampler = Sampler::new(setup, start).map_err(|error| wrong(0, &error))?;
    let began = Instant::now();
    while let Some(&step) = sampler.current() {
        let number = sampler.step();
        let passes = StepPasses {
            step: number as u32,
            timestep: step.timestep,
            mode: if step.cached { PassMode::Cached } else { PassMode::Full },
            keep_features: step.keep_features,
            shape: [channels, clip.window, rows, columns],
            items: sampler.requests().into_iter().map(item).collect(),
        };
        for (index, velocity) in predict(run, session, &mut ladder, passes).await?.into_iter().enumerate() {
            sampler.accept(index, velocity).map_err(|error| wrong(number, &error))?;
        }
        sampler.advance().map_err(|error| wrong(number, &error))?;
        if sampler.latents().iter().any(|value| !value.is_finite()) {
            let message = format!("step {}: the latents are no longer finite numbers", number + 1);
            return Err(Fault::new(Kind::Internal, message).at(Stage::Diffusion));
        }
        let done = sampler.step();
        run.step_done(session.memory(), done as u32, began.elapsed().as_secs_f64() / done as f64);
    }
    HostTensor::from_f32("latents", &[channels, clip.kept_latent_frames, rows, columns], &sampler.kept_latents())
        .map_err(|error| Fault::internal("the latents cannot be sent", &error))
}

/// Runs a step's passes; where memory ends, with less and from the same latents.
async fn predict(
    run: &Run,
    session: &mut Session,
    ladder: &mut Ladder,
    passes: StepPasses,
) -> Result<Vec<Vec<f32>>, Fault> {
    ladder.renew();
    let passes = Arc::new(passes);
    let mut outcome = session.predict(&passes).await;
    loop {
        match outcome {
            Ok(velocities) => return Ok(velocities),
            Err(fault) => {
                session.fit(ladder.next(run, fault).await?);
                outcome = session.retry(&passes).await;
            }
        }
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
