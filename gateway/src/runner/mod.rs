//! Drives one generation from its inputs to its video.

mod allowance;
mod decode;
mod denoise;
mod devices;
mod encode;
mod followed;
mod gate;
mod kept;
mod ladder;
mod pace;
mod patience;
pub(crate) mod prepare;
mod preview;
mod run;
mod session;

use std::{panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Duration};

use futures::FutureExt as _;
use proto::v1::{Generation, GenerationDefaults, GenerationState, OpenSessionHeader, Outcome, Stage};
use tokio_util::sync::CancellationToken;

pub(crate) use self::{allowance::Allowance, pace::Pace, preview::Previews};
use self::{
    decode::{Target, Video},
    denoise::Denoise,
    encode::{Conditions, Told},
    patience::Patience,
    prepare::Prepared,
    preview::Viewer,
    run::Run,
    session::Session,
};
use crate::{
    config::TierOptions,
    fault::{Fault, Kind},
    intake::{Order, Upload},
    planning::{FleetSource, foresee},
    stages::Stages,
    store::{Change, Lease, role},
    validate,
};

/// What a generation's work is done with.
#[derive(Debug, Clone)]
pub(crate) struct Workshop {
    /// The stages.
    pub(crate) stages: Stages,
    /// The program that writes the video.
    pub(crate) ffmpeg: PathBuf,
    /// The folder for files in the making.
    pub(crate) directory: PathBuf,
    /// How long a stage may stay away before the generation fails.
    pub(crate) patience: Duration,
    /// What is known of the pace of a stage before its first call, from which it is told whether a call is stuck.
    pub(crate) pace: Pace,
    /// What the tiers are, by which stages compute.
    pub(crate) tier: TierOptions,
    /// Who knows the checkpoint and the devices, if anybody does.
    pub(crate) fleet: Option<FleetSource>,
    /// How long a generation may be worked on that has no deadline of its caller, if that is limited.
    pub(crate) allowance: Option<Allowance>,
    /// How the denoise is shown meanwhile.
    pub(crate) previews: Previews,
    /// Cancelled when this process stops; the generation can be gone on with then.
    pub(crate) stopping: CancellationToken,
}

/// How a run came to its end.
enum End {
    Done(Video, Box<Outcome>),
    Failed(Fault),
    /// The generation is somebody else's, or goes on later.
    LetGo,
}

/// Runs a generation to its end and records how it ended, or lets go of it as it is when the process stops. Neither a
/// fault nor a panic leaves this function.
pub(crate) async fn run(lease: Arc<Lease>, workshop: Workshop) {
    if lease.generation().await.state() != GenerationState::Queued {
        let message = "goes on: the process that ran it has ended".to_owned();
        lease.publish(Change { state: Some(GenerationState::Queued), message, ..Change::default() }).await;
    }
    let patience = Patience::new(Arc::clone(&lease), workshop.patience);
    let run =
        Run::begin(Arc::clone(&lease), workshop.stages.clone(), (patience, workshop.pace, workshop.allowance)).await;
    let driven = AssertUnwindSafe(drive(&run, &workshop)).catch_unwind();
    let end = tokio::select! {
        biased;
        () = lease.lost().cancelled() => End::LetGo,
        () = lease.cancel_token().cancelled() => {
            End::Failed(Fault::new(Kind::Cancelled, "the generation was cancelled"))
        }
        () = workshop.stopping.cancelled() => End::LetGo,
        () = lease.keep_alive() => End::LetGo,
        fault = lease.deadline() => End::Failed(fault),
        fault = run.overdue() => End::Failed(fault),
        ended = driven => match ended {
            Ok(Ok((video, outcome))) => End::Done(video, Box::new(outcome)),
            Ok(Err(fault)) => End::Failed(fault),
            Err(_) => End::Failed(Fault::internal("the generation failed", &"a panic")),
        },
    };
    if !matches!(end, End::Done(..)) {
        // Calls in flight are gone with the future that made them; the session may still be there.
        Session::close(&workshop.stages, run.session_id()).await;
    }
    conclude(&run, end).await;
}

/// Records the end.
async fn conclude(run: &Run, end: End) {
    let generation_id = run.id();
    let fault = match end {
        End::LetGo => {
            tracing::info!(generation_id, "let go as it is");
            return run.lease.release().await;
        }
        End::Done(video, outcome) => {
            let completed = Change {
                state: Some(GenerationState::Completed),
                progress: Some(run.last_progress(true)),
                devices: run.devices.list(),
                outcome: Some(*outcome),
                ..Change::default()
            };
            match run.lease.complete(video.clip.path(), completed).await {
                Ok(()) => return tracing::info!(generation_id, "completed"),
                Err(fault) => fault,
            }
        }
        End::Failed(fault) => fault,
    };
    let (progress, devices) = (Some(run.last_progress(false)), run.devices.list());
    if fault.kind == Kind::Cancelled {
        tracing::info!(generation_id, "cancelled");
        run.lease.publish(Change { progress, devices, ..Change::cancelled(&fault.message) }).await;
        return;
    }
    tracing::error!(generation_id, %fault, "failed");
    let failed = Change {
        state: Some(GenerationState::Failed),
        progress,
        devices,
        stage: fault.stage,
        message: fault.message.clone(),
        fault: Some(fault),
        ..Change::default()
    };
    run.lease.publish(failed).await;
}

/// Reads a generation's inputs again, as they were when it was accepted.
async fn inputs(lease: &Lease) -> Result<Prepared, Fault> {
    let Generation { spec, tier: held, .. } = lease.generation().await;
    let spec = spec.unwrap_or_default();
    let settings = validate::resolve(spec.clone(), &GenerationDefaults::default())?;
    let (picture, audio) = (lease.read(role::PICTURE).await?, lease.read(role::AUDIO).await?);
    let upload = Upload { spec, picture, audio, order: Order::default() };
    tokio::task::spawn_blocking(move || Prepared::again(&upload, settings, held))
        .await
        .map_err(|error| Fault::internal("the files could not be read", &error))?
}

async fn drive(run: &Run, workshop: &Workshop) -> Result<(Video, Outcome), Fault> {
    run.enter(GenerationState::Encoding).await;
    let prepared = inputs(&run.lease).await?;
    if let Some(fleet) = workshop.fleet.clone() {
        let (wanted, tier) = (prepared.request(), workshop.tier.clone());
        let foreseen = tokio::task::spawn_blocking(move || foresee(&wanted, &tier, &fleet)).await;
        if let Some(foreseen) = foreseen.map_err(|error| Fault::internal("nothing could be foreseen", &error))? {
            run.foresee(foreseen);
        }
    }
    for warning in &prepared.warnings {
        run.warn(Stage::Unspecified, warning.clone()).await;
    }
    // The last one may still be made while the video is.
    let mut viewer = workshop.previews.viewer();
    let (denoise, told) = match Denoise::finished(run, &prepared).await {
        // Nobody but the decoder is needed any more, whatever became of the other stages.
        Some(finished) => (finished, encode::told_before(run, &prepared).await),
        None => denoised(run, &prepared, &mut viewer).await?,
    };

    run.enter(GenerationState::Decoding).await;
    let target = Target { ffmpeg: &workshop.ffmpeg, directory: &workshop.directory };
    let video = decode::decode(run, &prepared, denoise.latents(&prepared)?, target).await?;
    let outcome = Outcome {
        video_bytes: video.bytes,
        video_crc32c: video.crc32c,
        warnings: run.warnings(),
        stages: run.reports(),
        faces: told.faces,
        face: told.face,
        prompt_tokens: told.prompt.prompt_tokens,
        prompt_tokens_kept: told.prompt.prompt_tokens_kept,
        clip_tokens: told.prompt.clip_tokens,
        clip_tokens_kept: told.prompt.clip_tokens_kept,
    };
    Ok((video, outcome))
}

/// Encodes the inputs and takes the denoise steps that are left.
async fn denoised(run: &Run, prepared: &Prepared, viewer: &mut Viewer<'_>) -> Result<(Denoise, Told), Fault> {
    let Conditions { tensors, channels, models: [heard, read, seen], told } = encode::encode(run, prepared).await?;
    let transformer = run.patience.call(|| run.stages.identity(Stage::Diffusion)).await?;
    let mut denoise = Denoise::begin(run, prepared, channels, [heard, read, seen, transformer]).await?;
    run.enter(GenerationState::Denoising).await;
    let began = run.stage_began(Stage::Diffusion).await;
    let header = OpenSessionHeader {
        session_id: run.session_id(),
        generation_id: run.id(),
        audio_frames: prepared.heard as u32,
        fps: planner::clip::FPS as f32,
    };
    if run.goes_on() {
        // What an earlier process left open holds memory that opening it again may need.
        Session::close(&run.stages, run.earlier_session_id()).await;
    }
    let mut session =
        Session::new(run.stages.clone(), (run.patience.clone(), run.watchman()), (header, &run.devices), tensors);
    denoise.run(run, prepared, (&mut session, viewer)).await?;
    run.stage_ended(Stage::Diffusion, began, session.memory()).await;
    drop(session);
    Session::close(&run.stages, run.session_id()).await;
    Ok((denoise, told))
}
