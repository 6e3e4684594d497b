//! `avatar generate`: one video, through the same gateway and stages that `avatar serve` runs.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use gateway::api::video::parity_name;
use model::image::{Detector, unused_detector};
use proto::v1::{
    GenerateRequest, GenerationSpec, GenerationState, GetGenerationRequest, Outcome,
    avatar_service_client::AvatarServiceClient, generate_request, generate_response,
};
use service_kit::config::Mistakes;
use tonic::transport::Channel;

use crate::{
    InProcess, Setup,
    config::GenerateFlags,
    failure::Failure,
    in_process,
    output::{Output, Part},
    plan,
    progress::{Completed, Progress},
    signals::Signals,
};

/// Bytes of a file in one message.
const CHUNK: usize = 1 << 20;
/// Time that a cancelled generation gets to stop its current step.
const STOP: Duration = Duration::from_secs(10);

/// Inputs that were checked and read.
struct Inputs {
    spec: GenerationSpec,
    picture: Vec<u8>,
    audio: Vec<u8>,
    output: Output,
    models: PathBuf,
    detector: Detector,
}

/// Makes the video and shows its progress.
///
/// Errors: an input is wrong, the generation failed, or a signal came. No file is left in any of these cases.
pub async fn generate(flags: &GenerateFlags, progress: &mut Progress) -> Result<Completed, Failure> {
    let mut signals = Signals::catch()?;
    let inputs = read_inputs(flags)?;
    let mut mistakes = Mistakes::default();
    let device = flags.device.resolve(&mut mistakes).filter(|_| mistakes.is_empty());
    let device = device.ok_or_else(|| Failure::input("device", mistakes.to_string().trim_end().to_owned()))?;
    let unused = flags.face_model.is_none() && flags.face.is_none();
    let unused = unused.then(|| unused_detector(&inputs.models)).flatten();
    if let Some(said) = &unused {
        progress.warn(said);
    }
    // The gateway's own files; gone with this function, whatever happens.
    let work = tempfile::Builder::new()
        .prefix("avatar-")
        .tempdir()
        .map_err(|e| Failure::local("cannot make a temporary folder", e))?;
    let tier = plan::here(plan::tier_options(&flags.tier)?, &device);
    let data_dir = Some(work.path().to_owned());
    let options = gateway::Options { data_dir, tier: tier.clone(), ..gateway::Options::default() };
    let (models, device_name) = (inputs.models.clone(), device.name);
    let setup = Setup { compute: flags.compute, device, weights: flags.weights, detector: inputs.detector.clone() };
    let system = in_process(&inputs.models, setup, &options).await?;
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
    let made = plan::Made { request: done.request(), tier };
    let how = (flags.compute, flags.weights);
    // Headers are read, and where it is not known yet, the machine's speed is measured.
    let expected = tokio::task::spawn_blocking(move || plan::hindsight(&models, how, device_name, &made)).await;
    done.expected(expected.ok().flatten().as_ref());
    Ok(done)
}

/// Checks everything that can be checked on this side, before any work.
fn read_inputs(flags: &GenerateFlags) -> Result<Inputs, Failure> {
    let picture = read_file("picture", &flags.image, gateway::validate::PICTURE_BYTES)?;
    let audio = read_file("audio", &flags.audio, gateway::validate::AUDIO_BYTES)?;
    let output = Output::check(&flags.out, &[&flags.image, &flags.audio])?;
    let models = models_folder(flags.models.as_deref())?;
    let detector =
        Detector::open(flags.face_model.as_deref()).map_err(|e| Failure::input("face_model", e.to_string()))?;
    Ok(Inputs { spec: flags.spec(), picture, audio, output, models, detector })
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

fn read_file(field: &str, path: &Path, limit: usize) -> Result<Vec<u8>, Failure> {
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
}

async fn run(system: &InProcess, inputs: Inputs, progress: &mut Progress) -> Result<Completed, Failure> {
    let Inputs { spec, picture, audio, output, .. } = inputs;
    let mut client = system.client();
    let mut answers = client
        .generate(tokio_stream::iter(requests(spec, picture, audio)))
        .await
        .map_err(|status| Failure::of_status(&status))?
        .into_inner();
    let (mut facts, mut outcome, mut part) = (None, None, None::<Part>);
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
    Ok(completed(output.path(), facts.unwrap_or_default(), &outcome))
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
    })
}

fn completed(path: &Path, facts: Facts, outcome: &Outcome) -> Completed {
    let Facts { frames, width, height, steps, seed, heard_frames, denoised_frames, parity, guidance_scale } = facts;
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
        branches: if guidance_scale > 1.0 { 2 } else { 1 },
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
