//! One row of a batch: handed in, followed, fetched.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use proto::v1::{DeleteGenerationRequest, Generation, GenerationEvent, GenerationSpec, GenerationState, Stage};
use ring::digest::{Context, SHA256};
use serde_json::json;
use service_kit::ServiceError;
use tonic::Status;

use super::{
    summary::{Line, State},
    table::Wanted,
};
use crate::{
    client::{self, Client, flags::OrderFlags},
    config::SettingFlags,
    failure::Failure,
    generate::read_file,
    output::Output,
    progress::{event_json, print_line},
};

/// Shortest and longest wait for a place in the queue.
const LEAST_WAIT: Duration = Duration::from_millis(100);
const MOST_WAIT: Duration = Duration::from_secs(60);
/// How often a row whose generation failed in earlier runs is handed in.
const ATTEMPTS: u32 = 1000;

/// What all rows share.
#[derive(Debug)]
pub(super) struct Desk {
    /// Whoever makes the videos.
    pub(super) client: Client,
    /// Remove generations once their video is fetched: nobody else asks for them.
    pub(super) alone: bool,
    /// How the videos are made.
    pub(super) settings: SettingFlags,
    /// How they are served.
    pub(super) order: OrderFlags,
    /// Where the videos go.
    pub(super) folder: PathBuf,
    /// Show events as JSON; without it as lines.
    pub(super) json: bool,
    /// Show none.
    pub(super) quiet: bool,
    /// Nothing can be handed in any more, so no other row is begun.
    pub(super) closed: AtomicBool,
}

/// A row's inputs, read.
struct Inputs {
    spec: GenerationSpec,
    picture: Vec<u8>,
    audio: Vec<u8>,
    hash: String,
}

impl Desk {
    /// Makes the video of a row, unless `earlier` says that it is there; gives the row's line, and whether it was.
    pub(super) async fn make(&self, line: Line, wanted: Wanted, earlier: Option<Line>) -> (Line, bool) {
        let video = format!("{}.mp4", wanted.videoid);
        let line = Line { video, ..line };
        let spec = self.settings.spec(wanted.prompt.clone());
        let (folder, row) = (self.folder.clone(), line.row);
        let read = tokio::task::spawn_blocking(move || {
            let inputs = read(spec, &wanted)?;
            let same = earlier.filter(|earlier| earlier.inputs_sha256 == inputs.hash && earlier.is_there(&folder));
            Ok::<_, Failure>((inputs, same))
        });
        let inputs = match read.await {
            Ok(Ok((_, Some(kept)))) => return (Line { row, ..kept }, true),
            Ok(Ok((inputs, None))) => inputs,
            Ok(Err(failure)) => return (line.failed(&failure), false),
            Err(error) => return (line.failed(&Failure::local("the files could not be read", error)), false),
        };
        let line = Line { inputs_sha256: inputs.hash.clone(), ..line };
        let generation = match self.hand_in(&inputs, &line.videoid).await {
            Ok(generation) => generation,
            Err(failure) => return (line.failed(&failure), false),
        };
        drop(inputs);
        let line = Line { generation_id: generation.generation_id, frames: generation.frames, ..line };
        match self.finish(line.clone()).await {
            Ok(done) => (done, false),
            Err(failure) => (line.failed(&failure), false),
        }
    }

    /// Hands a row in, or finds the generation that an earlier run handed in; a full queue is waited for.
    async fn hand_in(&self, inputs: &Inputs, videoid: &str) -> Result<Generation, Failure> {
        let (mut attempt, mut away, mut told) = (1, None, false);
        loop {
            // What failed in an earlier run keeps its key, so this is the next one's.
            let key = format!("batch-{}-{attempt}", inputs.hash);
            let files = (inputs.picture.as_slice(), inputs.audio.as_slice());
            let request = client::creation(inputs.spec.clone(), files, (&key, &self.order))?;
            let status = match self.client.clone().create_generation(request).await {
                Ok(answer) => {
                    let generation = answer.into_inner().generation.unwrap_or_default();
                    let over = matches!(generation.state(), GenerationState::Failed | GenerationState::Cancelled);
                    if !over || attempt == ATTEMPTS {
                        return Ok(generation);
                    }
                    attempt += 1;
                    continue;
                }
                Err(status) => status,
            };
            match room_after(&status) {
                Some(delay) => {
                    if !told && !self.quiet && !self.json {
                        eprintln!("{videoid}: waits for a place in the queue");
                    }
                    told = true;
                    tokio::time::sleep(delay.clamp(LEAST_WAIT, MOST_WAIT)).await;
                }
                None => client::wait(&status, &mut away).await.inspect_err(|_| {
                    if away.is_some() {
                        self.closed.store(true, Ordering::Relaxed);
                    }
                })?,
            }
        }
    }

    /// Follows the generation of a line to its end, and fetches the video.
    async fn finish(&self, line: Line) -> Result<Line, Failure> {
        let (id, mut client) = (line.generation_id.clone(), self.client.clone());
        let mut step = 0;
        let show = |event: &GenerationEvent| self.show(&line.videoid, event, &mut step);
        let ended = client::follow(client.clone(), &id, &mut 1, show).await?;
        let outcome = ended.outcome.unwrap_or_default();
        let output = Output::check(&self.folder.join(&line.video), &[])?;
        client::fetch(&mut client, &id, output.begin()?, &outcome).await?;
        if self.alone {
            let request = DeleteGenerationRequest { generation_id: id };
            client.delete_generation(request).await.map_err(|status| client::refused(&status))?;
        }
        Ok(Line {
            state: State::Completed,
            seconds: outcome.stages.iter().map(|stage| stage.seconds).sum(),
            video_bytes: outcome.video_bytes,
            video_crc32c: outcome.video_crc32c,
            ..line
        })
    }

    /// Shows one event of a row; `shown` is the last step that was shown.
    fn show(&self, videoid: &str, event: &GenerationEvent, shown: &mut u32) {
        if self.quiet {
            return;
        }
        if self.json {
            let mut line = event_json(event);
            line["videoid"] = json!(videoid);
            return print_line(&line);
        }
        let (step, steps) = event.progress.as_ref().map_or((0, 0), |progress| (progress.step, progress.steps));
        if event.warning {
            eprintln!("{videoid}: warning: {}", event.message);
        } else if event.stage() == Stage::Diffusion && step > *shown {
            eprintln!("{videoid}: step {step} of {steps}");
        }
        *shown = step.max(*shown);
    }
}

/// Reads a row's files.
fn read(spec: GenerationSpec, wanted: &Wanted) -> Result<Inputs, Failure> {
    let picture = read_file("image", &wanted.image, gateway::validate::PICTURE_BYTES)?;
    let audio = read_file("audio", &wanted.audio, gateway::validate::AUDIO_BYTES)?;
    let hash = hash(&spec, &wanted.videoid, [&picture, &audio]);
    Ok(Inputs { spec, picture, audio, hash })
}

/// SHA-256 of all that makes a row's video what it is.
fn hash(spec: &GenerationSpec, videoid: &str, files: [&[u8]; 2]) -> String {
    let mut context = Context::new(&SHA256);
    let spec = format!("{spec:?}");
    for part in [spec.as_bytes(), videoid.as_bytes(), files[0], files[1]] {
        // Lengths keep apart what would be the same in one piece.
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// When there may be room, where the answer is that there is none now.
fn room_after(status: &Status) -> Option<Duration> {
    match ServiceError::from_status(status) {
        ServiceError::ResourceExhausted { retry_after, .. } => retry_after,
        _ => None,
    }
}

/// Makes the folder of the videos if it is missing.
///
/// Errors: it cannot be made or written.
pub(super) fn check_folder(folder: &Path) -> Result<(), Failure> {
    let wrong = |error: std::io::Error| Failure::input("out", format!("{}: {error}", folder.display()));
    std::fs::create_dir_all(folder).map_err(wrong)?;
    tempfile::tempfile_in(folder).map(drop).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_changes_a_video_changes_its_hash() {
        let spec = GenerationSpec { prompt: "a".into(), seed: Some(1), ..GenerationSpec::default() };
        let known = hash(&spec, "v", [b"p", b"ab"]);
        assert_eq!(known, hash(&spec, "v", [b"p", b"ab"]));
        assert_eq!(known.len(), 64);
        let others = [
            hash(&GenerationSpec { seed: Some(2), ..spec.clone() }, "v", [b"p", b"ab"]),
            hash(&GenerationSpec { prompt: "b".into(), ..spec.clone() }, "v", [b"p", b"ab"]),
            hash(&spec, "w", [b"p", b"ab"]),
            hash(&spec, "v", [b"pa", b"b"]),
        ];
        assert!(!others.contains(&known));
    }

    #[test]
    fn only_an_answer_with_a_delay_is_waited_for() {
        let full = ServiceError::ResourceExhausted { message: "full".into(), retry_after: Some(LEAST_WAIT) };
        assert_eq!(room_after(&full.into()), Some(LEAST_WAIT));
        assert_eq!(room_after(&Status::resource_exhausted("needs 9 GB")), None);
        assert_eq!(room_after(&Status::unavailable("gone")), None);
    }
}
