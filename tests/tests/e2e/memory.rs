//! Promises about memory, kept by real processes: budgets, what is given back, and what is said when it ends.

use std::{fs, path::Path};

use gateway::{Stages, stages::Whose};
use proto::{
    tensor::HostTensor,
    v1::{
        Branch, DecodeLatentsHeader, DecodeLatentsRequest, DescribeRequest, LoadRequest, MemoryReport,
        OpenSessionHeader, PassMode, PredictHeader, PredictItem, PromptKind, Stage, UnloadRequest,
        decode_latents_request, decode_latents_response, stage_service_client::StageServiceClient,
        vae_decode_service_client::VaeDecodeServiceClient,
    },
};
use serde_json::Value;
use service_kit::ServiceError;
use tonic::transport::Channel;

use crate::{
    inputs::{portrait, tone},
    stack::{Process, STAGES, avatar, text, tiny_models},
};

const MIB: u64 = 1 << 20;

fn start(name: &str, device: &str) -> Process {
    let models = tiny_models();
    let models = models.to_str().unwrap();
    Process::start(name, &["--listen", "127.0.0.1:0", "--models", models, "--device", device])
}

async fn channel(process: &Process) -> Channel {
    Channel::from_shared(format!("http://{}", process.address("grpc"))).unwrap().connect().await.unwrap()
}

/// Decodes latents `(16, 3, side, side)`: checksum of the frames, and the stage's memory.
async fn decode(channel: Channel, side: usize, tile_divisor: u32) -> Result<(u32, MemoryReport), ServiceError> {
    let values: Vec<f32> = (0..16 * 3 * side * side).map(|i| (i as f32 * 0.37).sin()).collect();
    let latents = HostTensor::from_f32("latents", &[16, 3, side, side], &values).unwrap();
    let header = DecodeLatentsHeader { generation_id: "test".into(), frame_limit: 0, tile_divisor };
    let body = |body| DecodeLatentsRequest { body: Some(body) };
    let messages: Vec<_> = std::iter::once(body(decode_latents_request::Body::Header(header)))
        .chain(latents.parts().map(|p| body(decode_latents_request::Body::Part(p))))
        .collect();
    let mut client = VaeDecodeServiceClient::new(channel);
    let mut answers = client.decode_latents(tokio_stream::iter(messages)).await?.into_inner();
    let mut frames = Vec::new();
    while let Some(answer) = answers.message().await? {
        match answer.body.unwrap() {
            decode_latents_response::Body::Part(part) => frames.push(part),
            decode_latents_response::Body::Summary(summary) => {
                let bytes: Vec<u8> = frames.iter().flat_map(prost::Message::encode_to_vec).collect();
                return Ok((crate::inputs::crc32(&bytes), summary.memory.unwrap()));
            }
        }
    }
    panic!("the answer has no end")
}

async fn memory(channel: &Channel) -> MemoryReport {
    let said = StageServiceClient::new(channel.clone()).describe(DescribeRequest {}).await.unwrap();
    said.into_inner().memory.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_keeps_within_its_budget_or_says_what_is_missing_and_lives_on() {
    let process = start("vae-decode", "cpu:2GiB");
    let (frames, unbound) = decode(channel(&process).await, 16, 1).await.unwrap();
    assert_eq!(unbound.budget_bytes, 2048 * MIB);
    // What the process holds besides the stage's own.
    let rest = unbound.process_bytes - unbound.resident_bytes;
    let whole = rest + unbound.peak_bytes;
    let (mut failed, mut done) = (0, 0);
    for percent in [20, 40, 60, 80, 120] {
        let budget = whole * percent / 100;
        let process = start("vae-decode", &format!("cpu:{budget}"));
        let channel = channel(&process).await;
        match decode(channel.clone(), 16, 1).await {
            Ok((same, _)) => {
                assert_eq!(same, frames, "{percent} %: a budget changes no frame");
                done += 1;
            }
            Err(ServiceError::DeviceMemory { stage, needed_bytes, free_bytes, budget_bytes, .. }) => {
                assert_eq!((stage.as_str(), budget_bytes), ("vae-decode", budget));
                assert!(needed_bytes > free_bytes && free_bytes < budget, "{percent} %");
                failed += 1;
            }
            Err(other) => panic!("{percent} %: {other:?}"),
        }
        // One layer's working set: what lies between two questions.
        let held = memory(&channel).await;
        assert!(rest + held.peak_bytes <= budget + whole / 8, "{percent} %: {held:?} of {budget}");
        if percent >= 40 {
            decode(channel, 2, 1).await.unwrap();
        }
    }
    assert!(failed >= 2 && done >= 1, "{failed} failed, {done} were decoded");
}

#[tokio::test(flavor = "multi_thread")]
async fn smaller_tiles_need_less_memory() {
    let mut peaks = Vec::new();
    for divisor in [1, 2, 4] {
        let process = start("vae-decode", "cpu");
        peaks.push(decode(channel(&process).await, 32, divisor).await.unwrap().1.peak_bytes);
    }
    assert!(peaks[2] < peaks[1] && peaks[1] < peaks[0], "{peaks:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unloading_gives_the_memory_back_a_hundred_times_in_a_row() {
    for name in STAGES {
        let process = start(name, "cpu");
        let mut client = StageServiceClient::new(channel(&process).await);
        let mut counted = Vec::new();
        let mut resident = Vec::new();
        for round in 0..105 {
            let loaded = client.load(LoadRequest {}).await.unwrap().into_inner().memory.unwrap();
            assert!(loaded.resident_bytes > 0, "{name}");
            let memory = client.unload(UnloadRequest::default()).await.unwrap().into_inner().memory.unwrap();
            assert_eq!(memory.resident_bytes, 0, "{name}");
            // The first rounds also start threads and read what is read once.
            if round >= 5 {
                counted.push(memory.process_bytes);
                resident.push(process.resident_bytes());
            }
        }
        let most = counted.iter().max().unwrap();
        assert!(most - counted[0] < MIB, "{name}: {} bytes, then up to {most}", counted[0]);
        let (early, late) = (resident[..20].iter().max().unwrap(), resident[80..].iter().min().unwrap());
        assert!(late.saturating_sub(*early) < 4 * MIB, "{name}: {early} bytes resident, then {late}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_stages_of_one_device_are_unloaded_for_each_other() {
    let processes = STAGES.map(|name| start(name, "cpu"));
    let mut channels = Vec::new();
    for process in &processes {
        let channel = channel(process).await;
        StageServiceClient::new(channel.clone()).load(LoadRequest {}).await.unwrap();
        channels.push(channel);
    }
    let [audio_encoder, text_encoder, image_encoder, diffusion, vae_decode] = channels.try_into().unwrap();
    let stages =
        Stages { audio_encoder, text_encoder, image_encoder, diffusion, vae_decode, spare_decoders: Vec::new() };
    // Each process is a device of its own, so nobody's memory helps another.
    assert_eq!(stages.unload_beside(Stage::VaeDecode, Whose::Anybodys).await, Vec::<&str>::new());
    assert!(memory(&stages.diffusion).await.resident_bytes > 0);
}

fn wave(name: &str, shape: &[usize], pace: f32) -> HostTensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i as f32 * pace).sin()).collect();
    HostTensor::from_f32(name, shape, &values).unwrap()
}

/// Velocities of a full step that keeps features and of a cached one, in two windows that overlap and two branches,
/// sent `at_once` passes a call.
async fn velocities(stages: &Stages, session_id: &str, at_once: usize) -> Vec<Vec<u8>> {
    let mut tensors = vec![
        wave("features", &[20, 5, 64], 0.11),
        wave("reference_latents", &[16, 1, 8, 8], 0.3),
        HostTensor::from_f32("face_mask", &[1, 1, 8, 8], &[1.0; 64]).unwrap(),
    ];
    for (side, pace) in [("positive", 0.7), ("negative", 0.6)] {
        tensors.push(wave(&format!("{side}.states"), &[12, 64], pace));
        tensors.push(HostTensor::from_i64(format!("{side}.mask"), &[12], &[1; 12]).unwrap());
        tensors.push(wave(&format!("{side}.pooled"), &[64], pace / 2.0));
    }
    let (session_id, generation_id) = (session_id.to_owned(), "test".to_owned());
    let header = OpenSessionHeader { session_id: session_id.clone(), generation_id, audio_frames: 9, fps: 25.0 };
    stages.open_session(header, tensors).await.unwrap();
    let sides = [(Branch::Conditional, PromptKind::Positive), (Branch::Unconditional, PromptKind::Negative)];
    let item = |window: u32, (branch, prompt): (Branch, PromptKind)| PredictItem {
        branch: branch.into(),
        prompt: prompt.into(),
        silent: branch == Branch::Unconditional,
        face_mask_scale: 1.0,
        latent_frames: vec![window, window + 1],
        audio_frames: (4 * window..4 * window + 5).collect(),
    };
    let items: Vec<PredictItem> = [0, 1].into_iter().flat_map(|window| sides.map(|side| item(window, side))).collect();
    let mut velocities = Vec::new();
    for (step, mode) in [(0, PassMode::Full), (1, PassMode::Cached)] {
        for (call, items) in items.chunks(at_once).enumerate() {
            let latents =
                |i: usize| wave(&format!("latents.{i}"), &[16, 2, 8, 8], 0.9 / (call * at_once + i + 1) as f32);
            let latents = (0..items.len()).map(latents).collect();
            let header = PredictHeader {
                session_id: session_id.clone(),
                step,
                timestep: 900.0 - 10.0 * step as f32,
                mode: mode.into(),
                keep_features: mode == PassMode::Full,
                items: items.to_vec(),
            };
            let mut answer = stages.predict(header, latents).await.unwrap();
            for i in 0..items.len() {
                velocities.push(answer.take(&format!("velocity.{i}"), Stage::Diffusion).unwrap().data().to_vec());
            }
        }
    }
    velocities
}

/// Windows and branches go one after the other: four take the memory of one, and their results beside it.
#[tokio::test(flavor = "multi_thread")]
async fn one_pass_a_call_gives_the_bits_of_all_passes_in_one_call_and_these_take_the_memory_of_one() {
    let mut seen = Vec::new();
    for at_once in [4, 1] {
        let process = start("diffusion", "cpu");
        let channel = channel(&process).await;
        let [audio_encoder, text_encoder, image_encoder, diffusion, vae_decode] =
            std::array::from_fn(|_| channel.clone());
        let stages =
            Stages { audio_encoder, text_encoder, image_encoder, diffusion, vae_decode, spare_decoders: Vec::new() };
        let velocities = velocities(&stages, "one", at_once).await;
        seen.push((velocities, memory(&channel).await.peak_bytes));
    }
    let [(all, four), (same, one)] = &seen[..] else { panic!() };
    assert_eq!(all.len(), 8);
    assert!(all == same);
    // Latents and velocities of three more, several times on their way.
    let beside = 3 * 4 * 16 * 2 * 8 * 8 * 8;
    assert!(*four <= one + one / 20 + beside, "{four} bytes for four passes, {one} for one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_with_a_session_is_not_unloaded_for_others_unless_all_are() {
    let process = start("diffusion", "cpu");
    let channel = channel(&process).await;
    let [audio_encoder, text_encoder, image_encoder, diffusion, vae_decode] = std::array::from_fn(|_| channel.clone());
    let stages =
        Stages { audio_encoder, text_encoder, image_encoder, diffusion, vae_decode, spare_decoders: Vec::new() };
    let first = velocities(&stages, "one", 4).await;
    let mut client = StageServiceClient::new(channel.clone());
    let kept = client.unload(UnloadRequest { idle_only: true }).await.unwrap().into_inner();
    assert!(kept.busy && kept.memory.unwrap().resident_bytes > 0, "{kept:?}");
    assert!(velocities(&stages, "one", 4).await == first);
    stages.close_session("one".into()).await.unwrap();
    let gone = client.unload(UnloadRequest { idle_only: true }).await.unwrap().into_inner();
    assert!(!gone.busy && gone.memory.unwrap().resident_bytes == 0, "{gone:?}");
    assert!(velocities(&stages, "two", 4).await == first, "what was unloaded comes back as it was");
    let held = memory(&channel).await;
    let gone = client.unload(UnloadRequest::default()).await.unwrap().into_inner();
    let left = gone.memory.unwrap();
    assert!(!gone.busy && left.resident_bytes == 0, "{gone:?}");
    assert!(left.process_bytes + held.resident_bytes <= held.process_bytes, "{left:?} after {held:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mark_of_a_running_stage_is_shown_and_changed() {
    let process = start("vae-decode", "cpu:2GiB");
    let address = process.address("grpc");
    let said = |more: &[&str]| avatar(&[&["pressure", "--stage", &address, "--json"], more].concat());
    let value = |more: &[&str]| -> Value { serde_json::from_slice(&said(more).stdout).unwrap() };
    assert_eq!((&value(&[])["pressure_percent"], &value(&[])["budget_bytes"]), (&85.into(), &(2048 * MIB).into()));
    assert_eq!(value(&["--percent", "60"])["pressure_percent"], 60);
    assert_eq!(value(&[])["pressure_percent"], 60);
    assert_eq!(said(&["--percent", "101"]).status.code(), Some(2));
}

fn generate(folder: &Path, device: &str) -> (Option<i32>, Vec<Value>) {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    fs::write(path("portrait.png"), portrait()).unwrap();
    fs::write(path("speech.wav"), tone(0.2, 16_000)).unwrap();
    let (image, audio, out, models) = (path("portrait.png"), path("speech.wav"), path("out.mp4"), tiny_models());
    let models = models.to_str().unwrap();
    let inputs = ["generate", "--image", &image, "--audio", &audio, "--out", &out, "--models", models];
    let done = avatar(&[&inputs[..], &["--steps", "2", "--size", "64", "--device", device, "--json"]].concat());
    let lines = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (done.status.code(), lines)
}

#[test]
fn a_generation_runs_within_a_generous_budget_and_says_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let (code, lines) = generate(folder.path(), "cpu:2GiB");
    assert_eq!(code, Some(0), "{lines:?}");
    let said: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
    for stage in STAGES {
        let took = said.iter().find(|line| line.starts_with(&format!("{stage} took"))).unwrap();
        assert!(took.contains("of 2.00 GiB (") && took.contains("its peak"), "{took}");
    }
    let stepped = lines.iter().find(|line| line["step"] == 1 && line["stage"] == "diffusion").unwrap();
    assert!(stepped["message"].as_str().unwrap().contains("of 2.00 GiB ("), "{stepped}");
    let last = lines.last().unwrap();
    assert!(STAGES.iter().all(|stage| last["peak_bytes"][stage].as_u64().unwrap() > 0), "{last}");
}

#[test]
fn a_budget_that_holds_no_part_of_it_is_refused_before_any_stage_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let (code, lines) = generate(folder.path(), "cpu:1MiB");
    assert_eq!(code, Some(1), "{lines:?}");
    let [last] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((&last["event"], &last["code"]), (&"failed".into(), &"RESOURCE_EXHAUSTED".into()), "{last}");
    let message = last["message"].as_str().unwrap();
    assert!(STAGES.iter().any(|stage| message.contains(&format!("{stage} needs at least"))), "{message}");
    assert!(message.contains(" on cpu, of which 1.05 MiB may be used"), "{message}");
    assert!(!folder.path().join("out.mp4").exists());
}

#[test]
fn a_device_that_is_none_is_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    for (device, part) in [("cuda:0", "this build has no CUDA"), ("cpu:lots", "lots"), ("gpu", "not a device")] {
        let (code, lines) = generate(folder.path(), device);
        let last = lines.last().unwrap();
        assert_eq!((code, &last["field"]), (Some(2), &"device".into()), "{last}");
        assert!(last["message"].as_str().unwrap().contains(part), "{last}");
    }
}

#[test]
fn the_devices_of_the_machine_are_listed() {
    let shown = avatar(&["devices", "--json"]);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let value: Value = serde_json::from_slice(&shown.stdout).unwrap();
    let cpu = &value["devices"][0];
    assert_eq!((&cpu["device"], &cpu["usable"]), (&"cpu".into(), &true.into()));
    assert!(cpu["total_bytes"].as_u64().unwrap() >= cpu["free_bytes"].as_u64().unwrap());
    assert!(text(&avatar(&["devices"]).stdout).starts_with("cpu "));
}
