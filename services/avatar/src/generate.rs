//! `avatar generate`: one video, through the same gateway and stages that `avatar serve` runs.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use gateway::{TierOptions, api::video::parity_name};
use model::image::{Detector, unused_detector};
use proto::v1::{
    GenerateRequest, GenerationSpec, GenerationState, GetGenerationRequest, Outcome,
    avatar_service_client::AvatarServiceClient, generate_request, generate_response,
};
use service_kit::config::Mistakes;
use tonic::transport::Channel;

use crate::{
    InProcess, Setup,
    config::{GenerateFlags, LocalFlags, RequestFlags},
    failure::Failure,
    in_process,
    output::{Output, Part},
    plan,
    progress::{Completed, Progress, rounded},
    signals::Signals,
};

/// Bytes of a file in one message.
pub(crate) const CHUNK: usize = 1 << 20;
/// Time that a cancelled generation gets to stop its current step.
const STOP: Duration = Duration::from_secs(10);

/// Inputs that were checked and read.
struct Inputs {
    spec: GenerationSpec,
    picture: Vec<u8>,
    audio: Vec<u8>,
    output: Output,
}

/// How this process makes videos; checked, nothing started yet.
pub(crate) struct Local {
    models: PathBuf,
    setup: Setup,
    tier: TierOptions,
    /// Says that a face detector lies among the models that is not used.
    pub(crate) unused: Option<String>,
}

impl Local {
    /// Checks the flags; `finds_faces` where faces are looked for.
    ///
    /// Errors: a flag's value is wrong.
    pub(crate) fn read(flags: &LocalFlags, finds_faces: bool) -> Result<Self, Failure> {
        let models = models_folder(flags.models.as_deref())?;
        let detector =
            Detector::open(flags.face_model.as_deref()).map_err(|e| Failure::input("face_model", e.to_string()))?;
        let mut mistakes = Mistakes::default();
        let devices = flags.device.resolve_all(&mut mistakes).filter(|_| mistakes.is_empty());
        let devices = devices.ok_or_else(|| Failure::input("device", mistakes.sentences()))?;
        let unused = (flags.face_model.is_none() && finds_faces).then(|| unused_detector(&models)).flatten();
        let tier = plan::here(plan::tier_options(&flags.tier)?, &devices);
        let setup = Setup { compute: flags.compute, devices, weights: flags.weights, detector };
        Ok(Self { models, setup, tier, unused })
    }

    /// Starts the system, with the gateway's files in a folder.
    ///
    /// Errors: as [`in_process`].
    pub(crate) async fn start(&self, data_dir: &Path, options: gateway::Options) -> Result<InProcess, Failure> {
        let options = gateway::Options { data_dir: data_dir.to_owned(), tier: self.tier.clone(), ..options };
        in_process(&self.models, self.setup.clone(), &options).await
    }

    /// What was to be expected of a generation that has ended; nothing where no plan can be made any more.
    fn hindsight(
        &self,
        request: &planner::Request,
        placement: Option<planner::plan::Placement>,
    ) -> Option<planner::Plan> {
        plan::hindsight(&self.models, (&self.setup, placement), (request, &self.tier))
    }
}

/// Makes the video and shows its progress.
///
/// Errors: an input is wrong, the generation failed, or a signal came. No file is left in any of these cases.
pub async fn generate(flags: &GenerateFlags, progress: &mut Progress) -> Result<Completed, Failure> {
    let mut signals = Signals::catch()?;
    let inputs = read_inputs(flags)?;
    let local = Local::read(&flags.local, flags.request.face.is_none())?;
    if let Some(said) = &local.unused {
        progress.warn(said);
    }
    // The gateway's own files; gone with this function, whatever happens.
    let work = tempfile::Builder::new()
        .prefix("avatar-")
        .tempdir()
        .map_err(|e| Failure::local("cannot make a temporary folder", e))?;
    let options = gateway::Options { min_free_bytes: 0, ..gateway::Options::default() };
    let (system, unused) = (local.start(work.path(), options).await?, local.unused.clone());
    let result = tokio::select! {
        result = run(&system, inputs, progress) => result,
        () = signals.next() => Err(Failure::interrupted()),
    };
    let result = result.map(|mut done: Completed| {
        done.warnings.extend(unused);
        done
    });
    // A second signal does not wait for the current step.
    tokio::select! {
        () = system.stop(if result.is_ok() { Duration::ZERO } else { STOP }) => {}
        () = signals.next() => {}
    }
    let mut done = result?;
    let (request, placement) = (done.request(), system.placement());
    // Headers are read, and where it is not known yet, the machine's speed is measured.
    let expected = tokio::task::spawn_blocking(move || local.hindsight(&request, placement)).await;
    done.expected(expected.ok().flatten().as_ref());
    Ok(done)
}

/// Checks everything that can be checked on this side, before any work.
fn read_inputs(flags: &GenerateFlags) -> Result<Inputs, Failure> {
    let (picture, audio) = read_files(&flags.request)?;
    let output = Output::check(&flags.out, &[&flags.request.image, &flags.request.audio])?;
    Ok(Inputs { spec: flags.request.spec(), picture, audio, output })
}

/// Reads the picture and the recording.
///
/// Errors: a file is missing, unreadable or too large.
pub fn read_files(request: &RequestFlags) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let picture = read_file("picture", &request.image, gateway::validate::PICTURE_BYTES)?;
    Ok((picture, read_file("audio", &request.audio, gateway::validate::AUDIO_BYTES)?))
}

/// The models' folder, if one was given and is there.
///
/// Errors: neither flag nor environment name one, or it is no folder; the message says how to get one.
pub fn models_folder(models: Option<&Path>) -> Result<PathBuf, Failure> {
    let advice = "name the folder of the models (or set AVATAR_MODELS); \
        `avatar weights synth --out DIR` makes a small random one to try";
    let failure = |message: String| Failure { advice: Some(advice), ..Failure::input("models", message) };
    let Some(models) = models else {
        return Err(failure("no models were given".to_owned()));
    };
    if !models.is_dir() {
        return Err(failure(format!("{}: there is no such folder", models.display())));
    }
    Ok(models.to_owned())
}

pub(crate) fn read_file(field: &str, path: &Path, limit: usize) -> Result<Vec<u8>, Failure> {
    let wrong = |reason: String| Failure::input(field, format!("{}: {reason}", path.display()));
    let info = std::fs::metadata(path).map_err(|e| wrong(reason(&e)))?;
    if info.is_dir() {
        return Err(wrong("this is a folder; name a file".to_owned()));
    }
    if info.len() > limit as u64 {
        return Err(wrong(format!("{} bytes; the limit is {limit}", info.len())));
    }
    std::fs::read(path).map_err(|e| wrong(reason(&e)))
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => "this file may not be read".to_owned(),
        _ => error.to_string(),
    }
}

/// What is told before the generation ends, and needed after it.
#[derive(Default)]
struct Facts {
    frames: u32,
    width: u32,
    height: u32,
    steps: u32,
    seed: u64,
    heard_frames: u32,
    denoised_frames: u32,
    parity: Option<&'static str>,
    guidance_scale: f32,
    no_feature_cache: bool,
}

async fn run(system: &InProcess, inputs: Inputs, progress: &mut Progress) -> Result<Completed, Failure> {
    let Inputs { spec, picture, audio, output, .. } = inputs;
    let mut client = system.client();
    let mut answers = client
        .generate(tokio_stream::iter(requests(spec, picture, audio)))
        .await
        .map_err(|status| Failure::of_status(&status))?
        .into_inner();
    let (mut facts, mut outcome, mut elapsed_seconds, mut part) = (None, None, 0.0, None::<Part>);
    while let Some(answer) = answers.message().await.map_err(|status| Failure::of_status(&status))? {
        match answer.body {
            Some(generate_response::Body::Event(event)) => {
                match event.state() {
                    GenerationState::Denoising if facts.is_none() => {
                        // A generation that has failed meanwhile is gone; the stream says why.
                        facts = ask(system.client(), &event.generation_id).await.ok();
                    }
                    GenerationState::Completed => {
                        if facts.is_none() {
                            facts = Some(ask(system.client(), &event.generation_id).await?);
                        }
                        outcome = event.outcome.clone();
                        elapsed_seconds = event.progress.map_or(0.0, |progress| progress.elapsed_seconds);
                    }
                    _ => {}
                }
                if event.outcome.is_none() && event.failure.is_none() {
                    progress.event(&event);
                }
            }
            Some(generate_response::Body::VideoChunk(data)) => {
                let part = match &mut part {
                    Some(part) => part,
                    None => part.insert(output.begin()?),
                };
                part.write(&data)?;
            }
            None => {}
        }
    }
    let (Some(outcome), Some(part)) = (outcome, part) else {
        return Err(Failure::local("the gateway", "it ended the generation without a video"));
    };
    let (bytes, crc32c) = (outcome.video_bytes, outcome.video_crc32c);
    tokio::task::spawn_blocking(move || part.finish(bytes, crc32c))
        .await
        .map_err(|e| Failure::local("cannot write the video", e))??;
    let done = completed(output.path(), facts.unwrap_or_default(), &outcome);
    Ok(Completed { elapsed_seconds: rounded(elapsed_seconds), ..done })
}

/// Size and resolved settings of a generation that is being denoised.
async fn ask(mut client: AvatarServiceClient<Channel>, id: &str) -> Result<Facts, Failure> {
    let request = GetGenerationRequest { generation_id: id.to_owned() };
    let answer = client.get_generation(request).await.map_err(|status| Failure::of_status(&status))?.into_inner();
    let generation = answer.generation.unwrap_or_default();
    let spec = generation.spec.unwrap_or_default();
    Ok(Facts {
        frames: generation.frames,
        width: generation.width,
        height: generation.height,
        steps: spec.steps.unwrap_or_default(),
        seed: spec.seed.unwrap_or_default(),
        heard_frames: generation.heard_frames,
        denoised_frames: generation.denoised_frames,
        parity: parity_name(spec.parity()),
        guidance_scale: spec.guidance_scale.unwrap_or_default(),
        no_feature_cache: spec.no_feature_cache,
    })
}

fn completed(path: &Path, facts: Facts, outcome: &Outcome) -> Completed {
    let Facts { frames, width, height, steps, seed, heard_frames, denoised_frames, parity, .. } = facts;
    Completed {
        path: path.to_owned(),
        frames,
        fps: planner::clip::FPS,
        width,
        height,
        steps,
        seed,
        heard_frames,
        denoised_frames,
        parity,
        branches: if facts.guidance_scale > 1.0 { 2 } else { 1 },
        no_feature_cache: facts.no_feature_cache,
        ..Completed::default()
    }
    .with_outcome(outcome)
}

/// The call's messages: the specification, then both files in chunks.
fn requests(spec: GenerationSpec, picture: Vec<u8>, audio: Vec<u8>) -> Vec<GenerateRequest> {
    use generate_request::Body;
    let mut bodies = vec![Body::Spec(spec)];
    bodies.extend(picture.chunks(CHUNK).map(|data| Body::PictureChunk(data.to_vec())));
    bodies.extend(audio.chunks(CHUNK).map(|data| Body::AudioChunk(data.to_vec())));
    bodies.into_iter().map(|body| GenerateRequest { body: Some(body) }).collect()
}
