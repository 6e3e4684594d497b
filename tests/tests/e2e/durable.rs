//! Nothing accepted is lost: processes are killed at chosen moments, and the videos are those of undisturbed runs.

use std::{fs, path::Path, time::Duration};

use proto::v1::{
    self, CreateGenerationRequest, Generation, GenerationEvent, GenerationSpec, GenerationState,
    WatchGenerationRequest, create_generation_request::Body,
};

use crate::{
    inputs::{portrait, tone},
    processes::client,
    stack::{Stack, tiny_models, video_stream},
};

/// How long a generation may take on a slow machine.
const LONG: Duration = Duration::from_secs(240);

fn spec() -> GenerationSpec {
    GenerationSpec {
        prompt: "A person speaks.".into(),
        seed: Some(11),
        steps: Some(6),
        size: Some(64),
        ..GenerationSpec::default()
    }
}

async fn create(stack: &Stack, key: &str) -> Result<Generation, tonic::Status> {
    let bodies = [Body::Spec(spec()), Body::PictureChunk(portrait()), Body::AudioChunk(tone(0.4, 16_000))];
    let mut messages = bodies.map(|body| CreateGenerationRequest { body: Some(body), idempotency_key: String::new() });
    messages[0].idempotency_key = key.to_owned();
    let created = client(&stack.grpc()).await.create_generation(tokio_stream::iter(messages)).await?;
    Ok(created.into_inner().generation.unwrap())
}

/// Reads events from a number on, up to the first that `enough` holds for; gives them.
async fn watch(
    stack: &Stack,
    id: &str,
    from_number: u64,
    enough: impl Fn(&GenerationEvent) -> bool,
) -> Vec<GenerationEvent> {
    let request = WatchGenerationRequest { generation_id: id.to_owned(), from_number };
    let reading = async {
        let mut events = Vec::new();
        let mut answers = client(&stack.grpc()).await.watch_generation(request).await.unwrap().into_inner();
        while let Some(answer) = answers.message().await.unwrap() {
            let event = answer.event.unwrap();
            let last = enough(&event);
            events.push(event);
            if last {
                break;
            }
        }
        events
    };
    tokio::time::timeout(LONG, reading).await.unwrap()
}

async fn video(stack: &Stack, id: &str, folder: &Path) -> Vec<u8> {
    let request = v1::DownloadVideoRequest { generation_id: id.to_owned(), offset: 0 };
    let mut answers = client(&stack.grpc()).await.download_video(request).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        bytes.extend(answer.data);
    }
    let path = folder.join("video.mp4");
    fs::write(&path, bytes).unwrap();
    video_stream(&path)
}

fn step(event: &GenerationEvent) -> u32 {
    event.progress.map_or(0, |progress| progress.step)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_goes_on_by_itself_and_its_video_is_bit_identical() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let mut stack = Stack::one(&models);
    let undisturbed = create(&stack, "").await.unwrap().generation_id;
    watch(&stack, &undisturbed, 0, |_| false).await;
    let wanted = video(&stack, &undisturbed, folder.path()).await;

    let moments: [(&str, fn(&GenerationEvent) -> bool); 4] = [
        ("the answer to Create", |_| true),
        ("two steps", |event| step(event) >= 2),
        ("the last step", |event| step(event) >= 6),
        ("the beginning of the decoding", |event| event.state() == GenerationState::Decoding),
    ];
    for (moment, come) in moments {
        let id = create(&stack, moment.split(' ').next_back().unwrap()).await.unwrap().generation_id;
        let before = watch(&stack, &id, 0, come).await;
        stack.kill_and_restart();
        let after = watch(&stack, &id, before.len() as u64 + 1, |_| false).await;
        let numbers: Vec<u64> = before.iter().chain(&after).map(|event| event.number).collect();
        assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "killed after {moment}");
        assert_eq!(after.last().unwrap().state(), GenerationState::Completed, "killed after {moment}: {after:?}");
        assert!(video(&stack, &id, folder.path()).await == wanted, "killed after {moment}: another video");
    }
    // A retry of a creation that was answered before the kill.
    let again = create(&stack, "decoding").await.unwrap();
    assert_eq!(again.state(), GenerationState::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_stages_that_come_back_are_gone_on_with_and_the_video_is_bit_identical() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let mut stack = Stack::six(&models);
    let undisturbed = create(&stack, "").await.unwrap().generation_id;
    watch(&stack, &undisturbed, 0, |_| false).await;
    let wanted = video(&stack, &undisturbed, folder.path()).await;
    let id = create(&stack, "").await.unwrap().generation_id;
    watch(&stack, &id, 0, |event| step(event) >= 2).await;
    stack.kill_and_restart_stage("diffusion", &models);
    watch(&stack, &id, 0, |event| event.state() == GenerationState::Decoding).await;
    stack.kill_and_restart_stage("vae-decode", &models);
    let events = watch(&stack, &id, 0, |_| false).await;
    assert_eq!(events.last().unwrap().state(), GenerationState::Completed, "{events:?}");
    assert!(video(&stack, &id, folder.path()).await == wanted);
}
