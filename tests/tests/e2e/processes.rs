//! One process and six give the same video, through every door.

use std::{fs, path::Path, time::Duration};

use proto::v1::{
    GenerateRequest, GenerationSpec, avatar_service_client::AvatarServiceClient, generate_request, generate_response,
};
use serde_json::Value;
use tonic::transport::Channel;

use crate::{
    inputs::{portrait, tone},
    stack::{Stack, avatar, probe, text, tiny_models, video_stream, web},
};

/// Settings that all three doors get.
pub fn spec() -> GenerationSpec {
    GenerationSpec {
        prompt: "A person speaks.".into(),
        seed: Some(7),
        steps: Some(2),
        size: Some(64),
        ..GenerationSpec::default()
    }
}

/// Connects to the public gRPC door.
pub async fn client(url: &str) -> AvatarServiceClient<Channel> {
    let channel = Channel::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
    AvatarServiceClient::new(channel).max_decoding_message_size(8 << 20)
}

/// The messages of one Generate call: spec, then both files in chunks.
pub fn requests(spec: GenerationSpec, picture: &[u8], audio: &[u8]) -> Vec<GenerateRequest> {
    use generate_request::Body;
    let mut bodies = vec![Body::Spec(spec)];
    bodies.extend(picture.chunks(1 << 20).map(|c| Body::PictureChunk(c.to_vec())));
    bodies.extend(audio.chunks(1 << 20).map(|c| Body::AudioChunk(c.to_vec())));
    bodies.into_iter().map(|body| GenerateRequest { body: Some(body) }).collect()
}

async fn generate_over_grpc(url: &str, audio: &[u8]) -> Vec<u8> {
    let stream = tokio_stream::iter(requests(spec(), &portrait(), audio));
    let mut answers = client(url).await.generate(stream).await.unwrap().into_inner();
    let (mut video, mut numbers) = (Vec::new(), Vec::new());
    while let Some(answer) = answers.message().await.unwrap() {
        match answer.body.unwrap() {
            generate_response::Body::Event(event) => numbers.push(event.number),
            generate_response::Body::VideoChunk(bytes) => video.extend(bytes),
        }
    }
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "events are numbered from 1 without gaps");
    video
}

async fn generate_over_rest(url: &str, audio: &[u8]) -> Vec<u8> {
    let part = |bytes: &[u8], name: &str| reqwest::multipart::Part::bytes(bytes.to_vec()).file_name(name.to_owned());
    let form = reqwest::multipart::Form::new()
        .text("prompt", spec().prompt)
        .text("seed", "7")
        .text("steps", "2")
        .text("size", "64")
        .part("input_reference", part(&portrait(), "portrait.png"))
        .part("audio", part(audio, "speech.wav"));
    let http = web();
    let created = http.post(format!("{url}/v1/videos")).multipart(form).send().await.unwrap();
    assert!(created.status().is_success(), "{}", created.text().await.unwrap());
    let video: Value = created.json().await.unwrap();
    assert_eq!(video["object"], "video");
    let one = format!("{url}/v1/videos/{}", video["id"].as_str().unwrap());
    let finished = poll(&http, &one).await;
    assert_eq!((&finished["status"], &finished["progress"]), (&"completed".into(), &100.into()), "{finished}");
    let content = http.get(format!("{one}/content")).send().await.unwrap();
    assert_eq!(content.headers()["content-type"], "video/mp4");
    let bytes = content.bytes().await.unwrap().to_vec();
    let deleted: Value = http.delete(&one).send().await.unwrap().json().await.unwrap();
    assert_eq!(deleted["deleted"], true);
    assert_eq!(http.get(&one).send().await.unwrap().status(), 404);
    bytes
}

/// Asks until the generation has ended.
pub async fn poll(http: &reqwest::Client, url: &str) -> Value {
    let ended = async {
        let mut pace = tokio::time::interval(Duration::from_millis(100));
        loop {
            pace.tick().await;
            let video: Value = http.get(url).send().await.unwrap().json().await.unwrap();
            if !["queued", "in_progress"].contains(&video["status"].as_str().unwrap()) {
                return video;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(240), ended).await.unwrap()
}

fn generate_on_the_command_line(models: &Path, folder: &Path, audio: &[u8]) -> Vec<u8> {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    fs::write(path("portrait.png"), portrait()).unwrap();
    fs::write(path("speech.wav"), audio).unwrap();
    let done = avatar(&[
        "generate",
        "--image",
        &path("portrait.png"),
        "--audio",
        &path("speech.wav"),
        "--prompt",
        &spec().prompt,
        "--seed",
        "7",
        "--steps",
        "2",
        "--size",
        "64",
        "--models",
        models.to_str().unwrap(),
        "--out",
        &path("cli.mp4"),
        "--json",
    ]);
    assert!(done.status.success(), "{}\n{}", text(&done.stdout), text(&done.stderr));
    let stdout = text(&done.stdout);
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "completed");
    assert_eq!((&last["steps"], &last["seed"], &last["fps"]), (&2.into(), &7.into(), &25.into()), "{last}");
    for stage in ["audio-encoder", "text-encoder", "image-encoder", "diffusion", "vae-decode"] {
        assert!(last["peak_bytes"][stage].as_u64().unwrap() > 0, "{last}");
        assert!(last["seconds"][stage].as_f64().unwrap() >= 0.0, "{last}");
    }
    fs::read(path("cli.mp4")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn six_processes_and_one_give_the_same_video_through_every_door() {
    let (models, folder, audio) = (tiny_models(), tempfile::tempdir().unwrap(), tone(0.6, 22_050));
    let six = Stack::six(&models);
    let videos = [
        ("grpc", generate_over_grpc(&six.grpc(), &audio).await),
        ("rest", generate_over_rest(&six.http(), &audio).await),
        ("one-process", generate_on_the_command_line(&models, folder.path(), &audio)),
    ];
    let streams: Vec<Vec<u8>> = videos
        .iter()
        .map(|(door, video)| {
            let path = folder.path().join(format!("{door}.mp4"));
            fs::write(&path, video).unwrap();
            video_stream(&path)
        })
        .collect();
    assert!(streams[0] == streams[2], "gRPC on six processes and the command line differ");
    assert!(streams[1] == streams[2], "REST on six processes and the command line differ");

    let shown = probe(&folder.path().join("grpc.mp4"));
    let streams = shown["streams"].as_array().unwrap();
    let of = |kind: &str| streams.iter().filter(|s| s["codec_name"] == kind).collect::<Vec<_>>();
    assert_eq!((streams.len(), of("h264").len(), of("aac").len()), (2, 1, 1));
    assert_eq!(of("h264")[0]["nb_read_frames"], "15");
    assert_eq!(of("h264")[0]["r_frame_rate"], "25/1");
    let seconds: f64 = shown["format"]["duration"].as_str().unwrap().parse().unwrap();
    assert!((seconds - 0.6).abs() <= 0.04, "{seconds}");

    for (name, process) in six.stages {
        assert_eq!(process.terminate(), Some(0), "{name} ends cleanly when asked");
    }
    assert_eq!(six.gateway.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_stage_that_stays_away_fails_the_generation_and_not_the_gateway() {
    let models = tiny_models();
    let mut six = Stack::six_with(&models, &["--stage-patience", "2"]);
    let diffusion = six.stages.iter_mut().find(|(name, _)| *name == "diffusion").unwrap();
    diffusion.1.kill();
    let stream = tokio_stream::iter(requests(spec(), &portrait(), &tone(0.2, 16_000)));
    let mut client = client(&six.grpc()).await;
    let outcome = match client.generate(stream).await {
        Err(status) => status,
        Ok(answers) => {
            let mut answers = answers.into_inner();
            loop {
                match answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the generation ended well without a diffusion worker"),
                    Err(status) => break status,
                }
            }
        }
    };
    assert_eq!(outcome.code(), tonic::Code::Unavailable, "{outcome:?}");
    assert!(outcome.message().contains("diffusion"), "{outcome:?}");
    let health = web().get(format!("{}/healthz", six.http())).send().await.unwrap();
    assert!(health.status().is_success());
}
