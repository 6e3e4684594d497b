//! Nothing accepted is lost: processes are killed at chosen moments, and the videos are those of undisturbed runs.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use proto::v1::{
    self, CreateGenerationRequest, Generation, GenerationEvent, GenerationSpec, GenerationState,
    WatchGenerationRequest, create_generation_request::Body,
};

use crate::{
    inputs::{portrait, tone},
    processes::client,
    stack::{Stack, avatar, binary, text, tiny_models, video_stream},
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

/// Creates a generation of six steps.
pub async fn create(stack: &Stack, key: &str) -> Result<Generation, tonic::Status> {
    let bodies = [Body::Spec(spec()), Body::PictureChunk(portrait()), Body::AudioChunk(tone(0.4, 16_000))];
    let mut messages = bodies.map(|body| CreateGenerationRequest { body: Some(body), idempotency_key: String::new() });
    messages[0].idempotency_key = key.to_owned();
    let created = client(&stack.grpc()).await.create_generation(tokio_stream::iter(messages)).await?;
    Ok(created.into_inner().generation.unwrap())
}

/// Reads events from a number on, up to the first that `enough` holds for; gives them.
pub async fn watch(
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
            // A slow machine may be silent so long that it says it is still there.
            let Some(event) = answer.event else { continue };
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

/// The picture of a completed generation's video, as it is encoded.
pub async fn video(stack: &Stack, id: &str, folder: &Path) -> Vec<u8> {
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

/// The step that an event tells of.
pub fn step(event: &GenerationEvent) -> u32 {
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

#[tokio::test(flavor = "multi_thread")]
async fn previews_come_from_the_real_decoder_and_change_no_bit_of_the_video() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let plain = Stack::one_with(&models, &["--previews", "0"]);
    let id = create(&plain, "").await.unwrap().generation_id;
    let events = watch(&plain, &id, 0, |_| false).await;
    assert!(events.iter().all(|event| event.preview.is_none()));
    let wanted = video(&plain, &id, folder.path()).await;
    drop(plain);

    let stack = Stack::one_with(&models, &["--previews", "3"]);
    let Generation { generation_id: id, width, height, .. } = create(&stack, "").await.unwrap();
    let events = watch(&stack, &id, 0, |_| false).await;
    let previews: Vec<_> = events.iter().filter_map(|event| event.preview.clone()).collect();
    // The device takes them in turn with the steps, so the first one is there long before the end.
    assert!(!previews.is_empty(), "{events:?}");
    for preview in previews {
        assert!([2, 3, 5].contains(&preview.step) && (preview.width, preview.height) == (width, height), "{preview:?}");
        let request = v1::GetPreviewRequest { generation_id: id.clone(), step: preview.step };
        let answer = client(&stack.grpc()).await.get_preview(request).await.unwrap().into_inner();
        assert_eq!((answer.data.len() as u64, answer.sha256), (preview.bytes, preview.sha256));
        assert!(answer.data.starts_with(&[0xff, 0xd8]) && answer.data.ends_with(&[0xff, 0xd9]), "a whole JPEG file");
    }
    let none = v1::GetPreviewRequest { generation_id: id.clone(), step: 1 };
    assert_eq!(client(&stack.grpc()).await.get_preview(none).await.unwrap_err().code(), tonic::Code::NotFound);
    assert!(video(&stack, &id, folder.path()).await == wanted, "another video");
}

/// Runs a client command against a stack with --json; gives its exit code and the lines that it printed.
fn ask(stack: &Stack, arguments: &[&str]) -> (Option<i32>, Vec<serde_json::Value>) {
    let server = stack.grpc();
    let done = avatar(&[arguments, &["--server", &server, "--json"][..]].concat());
    let lines = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (done.status.code(), lines)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_hands_in_follows_lists_fetches_and_removes() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let stack = Stack::one(&models);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("portrait.png"), portrait()).unwrap();
    fs::write(path("speech.wav"), tone(0.3, 16_000)).unwrap();
    let (picture, speech, out) = (path("portrait.png"), path("speech.wav"), path("talk.mp4"));
    let submit = ["submit", "--image", &picture, "--audio", &speech, "--steps", "2", "--size", "64"];
    let (code, first) =
        ask(&stack, &[&submit[..], &["--idempotency-key", "k1", "--caller", "desk", "--label", "scene-7"]].concat());
    assert_eq!(code, Some(0), "{first:?}");
    let id = first[0]["generation_id"].as_str().unwrap();
    let (_, again) = ask(&stack, &[&submit[..], &["--idempotency-key", "k1", "--caller", "desk"]].concat());
    assert_eq!(again[0]["generation_id"], id);

    let pictures = path("previews");
    let (code, events) = ask(&stack, &["watch", id, "--previews", &pictures]);
    assert_eq!((code, &events.last().unwrap()["event"]), (Some(0), &"completed".into()), "{events:?}");
    let step = events.iter().find(|event| event["step"] == 1 && event["stage"] == "diffusion").unwrap();
    let (held, budget) = (&step["memory"]["device_bytes"], &step["memory"]["budget_bytes"]);
    assert!(held.as_u64() > Some(0) && held.as_u64() < budget.as_u64(), "{step}");
    let previews: Vec<_> = events.iter().filter_map(|event| event.get("preview")).collect();
    // One is left out where the decoder is slower than the steps, and never asked for twice.
    assert!(previews.len() <= 1, "two steps have one preview: {previews:?}");
    for preview in previews {
        let file = fs::read(folder.path().join("previews/step-001.jpg")).unwrap();
        assert_eq!((&preview["step"], &preview["bytes"]), (&1.into(), &file.len().into()));
        assert!(file.starts_with(&[0xff, 0xd8]) && file.ends_with(&[0xff, 0xd9]), "a whole JPEG file");
    }
    let (_, status) = ask(&stack, &["status", id]);
    assert_eq!((&status[0]["state"], &status[0]["step"]), (&"completed".into(), &2.into()));
    let devices = status[0]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 1, "one process has one device: {devices:?}");
    assert!(devices[0]["device"] == "cpu" && devices[0]["seconds"].as_f64().unwrap() > 0.0, "{devices:?}");
    let (_, listed) = ask(&stack, &["list", "--state", "completed"]);
    assert_eq!(listed.iter().map(|one| one["generation_id"].clone()).collect::<Vec<_>>(), [id]);
    for (filter, found) in [
        (["--caller", "desk"], 1),
        (["--label", "scene-7"], 1),
        (["--label", "scene-8"], 0),
        (["--created-from", "1"], 1),
        (["--created-before", "1"], 0),
    ] {
        assert_eq!(ask(&stack, &[&["list"][..], &filter].concat()).1.len(), found, "{filter:?}");
    }
    let (code, fetched) = ask(&stack, &["download", id, "--out", &out]);
    assert_eq!(code, Some(0), "{fetched:?}");
    assert!(!video_stream(Path::new(&out)).is_empty());
    let (_, cancelled) = ask(&stack, &["cancel", id]);
    assert_eq!(cancelled[0]["state"], "completed", "what has ended is shown as it is");
    assert_eq!(ask(&stack, &["delete", id]).0, Some(0));
    let (code, gone) = ask(&stack, &["status", id]);
    assert_eq!((code, &gone[0]["code"]), (Some(1), &"NOT_FOUND".into()), "{gone:?}");
    let (code, wrong) = ask(&stack, &[&submit[..], &["--priority", "10"]].concat());
    assert_eq!((code, &wrong[0]["field"]), (Some(2), &"priority".into()), "{wrong:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_watch_leaves_the_generation_running_and_says_how_to_return_and_a_delete_ends_it() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let stack = Stack::one(&models);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("portrait.png"), portrait()).unwrap();
    fs::write(path("speech.wav"), tone(3.0, 16_000)).unwrap();
    let (picture, speech) = (path("portrait.png"), path("speech.wav"));
    let submit = ["submit", "--image", &picture, "--audio", &speech, "--steps", "200", "--size", "64"];
    let (code, handed_in) = ask(&stack, &submit);
    assert_eq!(code, Some(0), "{handed_in:?}");
    let id = handed_in[0]["generation_id"].as_str().unwrap();
    let mut watching = Command::new(binary("avatar"))
        .args(["watch", id, "--server", &stack.grpc(), "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("\"denoising\"")));
    assert!(Command::new("kill").args(["-INT", &watching.id().to_string()]).status().unwrap().success());
    let last = lines.last().unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(130));
    let back = format!("avatar watch {id} --server {} --from ", stack.grpc());
    assert!(last.contains("the generation goes on") && last.contains(&back), "{last}");
    let (_, status) = ask(&stack, &["status", id]);
    assert_eq!(status[0]["state"], "denoising", "{status:?}");
    assert_eq!(ask(&stack, &["delete", id]).0, Some(0));
    let (code, gone) = ask(&stack, &["status", id]);
    assert_eq!((code, &gone[0]["code"]), (Some(1), &"NOT_FOUND".into()), "{gone:?}");
}
