//! The denoise loop over the wire: the sampler says which passes it needs, the transformer runs them.

use std::{sync::Arc, time::Instant};

use proto::{
    tensor::HostTensor,
    v1::{self, Parity, PassMode, PredictItem, PromptKind, Stage},
};

use super::{
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
    store::{Resume, artifacts::sha256},
};

/// Stands for the hash of a plan with latents that were rejected.
const REJECTED_PLAN: &str = "rejected";

/// A clip between two steps, and the hash of the plan that it follows.
#[derive(Debug)]
pub(crate) struct Denoise {
    sampler: Sampler,
    plan: String,
    /// The hash of what is left of the plan when all steps run in full, because features find no memory.
    full_plan: String,
    /// Whether the steps that are left are of the full plan already.
    full: bool,
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
        let plan = if settings.no_feature_cache { plan.without_features() } else { plan };
        // All that decides the latents, besides the inputs, which a generation never changes.
        let followed = format!("{settings:?} {clip:?} {shape:?} {rounding:?} {plan:?} {models}");
        let hash = sha256(followed.as_bytes());
        let full_hash = sha256(format!("{followed} without features").as_bytes());
        // What an earlier process decided for want of memory holds, or the rest would be that of no single run.
        let full = run.lease.stored_plan() == full_hash;
        let followed = if full { &full_hash } else { &hash };
        let stored = run.lease.resume(followed).await;
        let setup = Setup { plan, clip: clip.clone(), shape, rounding };
        if let Some(Resume { step, latents }) = stored {
            let plan = if full { setup.plan.without_features() } else { setup.plan.clone() };
            match Sampler::resume(Setup { plan, ..setup.clone() }, step, latents) {
                Ok(sampler) => {
                    run.resumed(step as u32).await;
                    if full {
                        still_without_features(run).await;
                    }
                    return Ok(Self { sampler, plan: hash, full_plan: full_hash, full, shape });
                }
                Err(error) => tracing::warn!(generation_id = run.id(), %error, "the stored latents cannot be used"),
            }
        }
        let before = run.lease.stored_plan();
        if !before.is_empty() && before != followed.as_str() {
            let sentence = "The denoise begins again: what was done before is of another checkpoint, device or type of \
                            numbers. The video may differ in the last place from one that nothing interrupted.";
            run.warn(Stage::Diffusion, sentence.into()).await;
        }
        run.begins_anew();
        let start = noise(settings.seed, shape.values(clip.latent_frames));
        let sampler = Sampler::new(setup, start).map_err(|error| wrong(0, &error))?;
        Ok(Self { sampler, plan: hash, full_plan: full_hash, full: false, shape })
    }

    /// Whether all steps are done.
    pub(crate) fn is_done(&self) -> bool {
        self.sampler.current().is_none()
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
        if self.full {
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
            self.full = !session.keeps_features();
            // Where no features are kept, every step can be begun from its latents.
            if self.full || self.sampler.plan().resumable(done) {
                let plan = if self.full { &self.full_plan } else { &self.plan };
                let stored = run.lease.checkpoint(done, plan, self.sampler.latents()).await;
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
