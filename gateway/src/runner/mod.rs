//! Drives one generation from its inputs to its video.

mod decode;
mod denoise;
mod encode;
mod ladder;
pub(crate) mod prepare;
mod run;
mod session;

use std::{panic::AssertUnwindSafe, path::PathBuf, sync::Arc};

use futures::FutureExt as _;
use proto::v1::{GenerationState, OpenSessionHeader, Outcome, Stage};

use self::{decode::Target, prepare::Prepared, run::Run, session::Session};
use crate::{
    fault::{Fault, Kind},
    stages::Stages,
    store::{Change, Record},
};

/// Where a generation's work is done.
#[derive(Debug)]
pub(crate) struct Workshop {
    /// The stages.
    pub(crate) stages: Stages,
    /// The program that writes the video.
    pub(crate) ffmpeg: PathBuf,
    /// The folder for files in the making.
    pub(crate) directory: PathBuf,
    /// The finished video.
    pub(crate) file: PathBuf,
}

/// Runs a generation to its end and records how it ended. Neither a fault nor a panic leaves this function.
pub(crate) async fn run(record: Arc<Record>, prepared: Prepared, workshop: Workshop) {
    let run = Run::begin(Arc::clone(&record), workshop.stages.clone(), prepared.settings.steps);
    let session_id = run.id();
    let driven = AssertUnwindSafe(drive(&run, prepared, &workshop)).catch_unwind();
    let ended = tokio::select! {
        biased;
        () = record.cancel_token().cancelled() => Err(Fault::new(Kind::Cancelled, "the generation was cancelled")),
        ended = driven => ended.unwrap_or_else(|_| Err(Fault::internal("the generation failed", &"a panic"))),
    };
    if ended.is_err() {
        // Calls in flight are gone with the future that made them; the session may still be there.
        Session::close(&workshop.stages, session_id).await;
    }
    conclude(&run, ended);
}

/// Records the end.
fn conclude(run: &Run, ended: Result<Outcome, Fault>) {
    let generation_id = run.id();
    let change = match ended {
        Ok(outcome) => {
            tracing::info!(generation_id, "completed");
            Change {
                state: Some(GenerationState::Completed),
                progress: Some(run.last_progress(true)),
                outcome: Some(outcome),
                ..Change::default()
            }
        }
        Err(fault) if fault.kind == Kind::Cancelled => {
            tracing::info!(generation_id, "cancelled");
            Change {
                state: Some(GenerationState::Cancelled),
                progress: Some(run.last_progress(false)),
                message: fault.message,
                ..Change::default()
            }
        }
        Err(fault) => {
            tracing::error!(generation_id, %fault, "failed");
            Change {
                state: Some(GenerationState::Failed),
                progress: Some(run.last_progress(false)),
                stage: fault.stage,
                message: fault.message.clone(),
                fault: Some(fault),
                ..Change::default()
            }
        }
    };
    run.record.publish(change);
}

async fn drive(run: &Run, prepared: Prepared, workshop: &Workshop) -> Result<Outcome, Fault> {
    run.enter(GenerationState::Encoding);
    for warning in &prepared.warnings {
        run.warn(Stage::Unspecified, warning.clone());
    }
    let conditions = encode::encode(run, &prepared).await?;

    run.enter(GenerationState::Denoising);
    let began = run.stage_began(Stage::Diffusion);
    let header = OpenSessionHeader {
        session_id: run.id(),
        generation_id: run.id(),
        audio_frames: prepared.heard as u32,
        fps: planner::clip::FPS as f32,
    };
    let mut session = Session::new(run.stages.clone(), header, conditions.tensors);
    let latents = denoise::denoise(run, &prepared, &mut session, conditions.channels).await?;
    run.stage_ended(Stage::Diffusion, began, session.memory());
    drop(session);
    Session::close(&run.stages, run.id()).await;

    run.enter(GenerationState::Decoding);
    let target = Target { ffmpeg: &workshop.ffmpeg, directory: &workshop.directory, file: &workshop.file };
    let video = decode::decode(run, &prepared, latents, target).await?;
    Ok(Outcome {
        video_bytes: video.bytes,
        video_crc32c: video.crc32c,
        warnings: run.warnings(),
        stages: run.reports(),
        faces: conditions.faces,
        face: conditions.face,
        prompt_tokens: conditions.prompt.prompt_tokens,
        prompt_tokens_kept: conditions.prompt.prompt_tokens_kept,
        clip_tokens: conditions.prompt.clip_tokens,
        clip_tokens_kept: conditions.prompt.clip_tokens_kept,
    })
}
