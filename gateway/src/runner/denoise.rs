//! The denoise loop over the wire: the sampler says which passes it needs, the transformer runs them.

use std::{sync::Arc, time::Instant};

use proto::{
    tensor::HostTensor,
    v1::{self, Parity, PassMode, PredictItem, PromptKind, Stage},
};

use super::{
    followed::Followed,
    gate::check_latents,
    ladder::{Ladder, Rung, still_without_features},
    prepare::Prepared,
    preview::Viewer,
    run::Run,
    session::{Session, StepPasses},
};
use crate::{
    fault::{Fault, Kind},
    sampler::{Branch, FrameShape, Prompt, Request, Rounding, Sampler, SamplerError, Schedule, Setup, StepPlan, noise},
    stages::Identity,
    store::Resume,
};

/// Stands for the hash of a plan with latents that were rejected.
const REJECTED_PLAN: &str = "rejected";

/// A clip between two steps, and what it follows.
#[derive(Debug)]
pub(crate) struct Denoise {
    sampler: Sampler,
    followed: Followed,
    /// (channels, rows, columns) of a latent frame.
    shape: FrameShape,
}

impl Denoise {
    /// Begins with noise, or goes on with latents that were stored for the same video.
    ///
    /// `models` are the stages that give what it is conditioned on and the velocities.
    pub(crate) async fn begin(
        run: &Run,
        prepared: &Prepared,
        channels: usize,
        models: [Identity; 4],
    ) -> Result<Self, Fault> {
        let (shape, setup) = setup(prepared, channels);
        let Setup { plan, clip, rounding, .. } = &setup;
        let [checkpoints, manners] =
            [models.each_ref().map(|one| &one.checkpoint), models.each_ref().map(|one| &one.manner)];
        let what = format!("{:?} {clip:?} {shape:?} {rounding:?} {plan:?} {checkpoints:?}", prepared.settings);
        let begun = Followed::new(&what, &format!("{manners:?}"));
        let stored = run.lease.stored_plan();
        match Followed::parse(stored).and_then(|before| begun.after(&before)) {
            // What an earlier process decided for want of memory holds, or the rest would be that of no single run.
            Some(followed) => {
                if let Some(resume) = run.lease.resume(stored).await
                    && let Some(sampler) = go_on(run, setup.clone(), (&followed, resume)).await
                {
                    return Ok(Self { sampler, followed, shape });
                }
            }
            None if stored.is_empty() => {}
            None => {
                let sentence = "The denoise begins again: what was done before is of another checkpoint. The video is \
                                not the one that would have been made without an interruption.";
                run.warn(Stage::Diffusion, sentence.into()).await;
            }
        }
        run.begins_anew(Stage::Diffusion);
        let start = noise(prepared.settings.seed, shape.values(setup.clip.latent_frames));
        let sampler = Sampler::new(setup, start).map_err(|error| wrong(0, &error))?;
        Ok(Self { sampler, followed: begun, shape })
    }

    /// The clip after its last step, if an earlier process came that far: a finished denoise is never repeated, whatever
    /// the stages are by now.
    pub(crate) async fn finished(run: &Run, prepared: &Prepared) -> Option<Self> {
        let stored = run.lease.stored_plan();
        let followed =
            Followed::parse(stored).filter(|_| run.lease.stored_step() == prepared.settings.steps as usize)?;
        let resume = run.lease.resume(stored).await?;
        let (rows, columns) = prepared.size.latent();
        let of_a_channel = prepared.plan.latent_frames * rows * columns;
        let (shape, setup) = setup(prepared, resume.latents.len() / of_a_channel.max(1));
        let sampler = go_on(run, setup, (&followed, resume)).await?;
        Some(Self { sampler, followed, shape })
    }

    /// Takes the steps that are left. Latents that the rest can be gone on with are stored before each step, and
    /// after the last one.
    pub(crate) async fn run(
        &mut self,
        run: &Run,
        prepared: &Prepared,
        (session, viewer): (&mut Session, &mut Viewer<'_>),
    ) -> Result<(), Fault> {
        let FrameShape { channels, rows, columns } = self.shape;
        if self.followed.full {
            session.fit(Rung::NoFeatures);
        }
        let features = self.sampler.plan().steps().iter().any(|step| step.keep_features);
        let mut ladder = Ladder::of(&run.stages, Stage::Diffusion, features);
        while let Err(fault) = session.open().await {
            session.fit(ladder.next(run, fault).await?);
        }
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
            if let Some(eased) = session.ease(passes.items.len()) {
                run.eased(eased, passes.step + 1).await;
            }
            for (index, velocity) in predict(run, session, &mut ladder, passes).await?.into_iter().enumerate() {
                self.sampler.accept(index, velocity).map_err(|error| wrong(number, &error))?;
            }
            let steps = self.sampler.plan().steps().len();
            let shown = viewer.wanted(number + 1, steps).then(|| self.sampler.first_frame());
            self.sampler.advance().map_err(|error| wrong(number, &error))?;
            let done = self.sampler.step();
            let when = format!("step {done} of {steps}");
            if let Err(fault) = check_latents(self.sampler.latents(), &when) {
                // To be looked into; no plan has this hash, so nothing goes on with them.
                if let Err(fault) = run.lease.checkpoint(done, REJECTED_PLAN, self.sampler.latents()).await {
                    tracing::warn!(generation_id = run.id(), step = done, %fault, "the latents were not stored");
                }
                return Err(fault);
            }
            self.followed.full = !session.keeps_features();
            // Where no features are kept, every step can be begun from its latents.
            if self.followed.full || self.sampler.plan().resumable(done) {
                let followed = self.followed.to_string();
                let stored = run.lease.checkpoint(done, &followed, self.sampler.latents()).await;
                // A full disk costs what a later crash would repeat, and not what is done already.
                if let Err(fault) = stored {
                    tracing::warn!(generation_id = run.id(), step = done, %fault, "the latents were not stored");
                }
            }
            if let Some(foreseen) = shown.and_then(|before| self.sampler.foreseen_first_frame(&before)) {
                viewer.show(run, done, [channels, 1, rows, columns], &foreseen);
            }
            run.step_done(session.memory(), done as u32, began.elapsed().as_secs_f64() / (done - first) as f64).await;
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

/// How the steps of a request are taken; the number of channels is the model's.
fn setup(prepared: &Prepared, channels: usize) -> (FrameShape, Setup) {
    let settings = &prepared.settings;
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
    let plan = if settings.no_feature_cache { plan.without_features() } else { plan };
    (shape, Setup { plan, clip: prepared.plan.clone(), shape, rounding })
}

/// The clip with the latents that were stored, if they can be used; says so, and what is not as it would have been.
async fn go_on(run: &Run, setup: Setup, (followed, resume): (&Followed, Resume)) -> Option<Sampler> {
    let Resume { step, latents } = resume;
    let plan = if followed.full { setup.plan.without_features() } else { setup.plan.clone() };
    match Sampler::resume(Setup { plan, ..setup }, step, latents) {
        Ok(sampler) => {
            run.resumed(step as u32).await;
            warn(run, followed).await;
            Some(sampler)
        }
        Err(error) => {
            tracing::warn!(generation_id = run.id(), %error, "the stored latents cannot be used");
            None
        }
    }
}

/// Says what is not as it would have been without an interruption.
async fn warn(run: &Run, followed: &Followed) {
    if followed.mixed {
        let sentence = "Steps of the denoise were done with another device, type of numbers or version than the rest. The \
                        video may differ in the last place from one that nothing interrupted.";
        run.warn(Stage::Diffusion, sentence.into()).await;
    }
    if followed.full {
        still_without_features(run).await;
    }
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
