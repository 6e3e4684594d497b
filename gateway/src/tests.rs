//! Whole generations against fake stages.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use planner::plan::Choice;
use proto::v1::{
    DecodeLatentsHeader, FaceBox, Generation, GenerationDefaults, GenerationEvent, GenerationSpec, GenerationState,
    Parity, PassMode, PredictHeader, Stage,
};
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::{
    Gateway, Options,
    config::{DefaultDeadline, TierOptions},
    fakes::{self, Script},
    fault::{Fault, Kind},
    intake::{Order, Upload},
    runner::prepare::Prepared,
    store::{artifacts::Artifact, life},
    validate,
    webhook::{self, WebhookOptions},
};

mod plans;

fn upload(spec: GenerationSpec, frames: u32) -> Upload {
    let mut picture = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(64, 64, image::Rgb([90, 120, 150]))
        .write_to(&mut picture, image::ImageFormat::Png)
        .unwrap();
    let mut audio = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data".to_vec();
    let samples = 640 * frames;
    audio[4..8].copy_from_slice(&(36 + 2 * samples).to_le_bytes());
    audio.extend((2 * samples).to_le_bytes());
    audio.extend((0..samples).flat_map(|i| ((i % 100) as i16 * 90).to_le_bytes()));
    let spec = GenerationSpec { size: Some(64), guidance_scale: Some(7.5), flow_shift: Some(5.0), ..spec };
    Upload { spec, picture: picture.into_inner(), audio, order: Order::default() }
}

fn keyed(key: &str) -> Order {
    Order { idempotency_key: key.into(), ..Order::default() }
}

/// A gateway on fake stages, with a data folder that goes with it.
struct Desk {
    gateway: Gateway,
    folder: tempfile::TempDir,
}

impl Desk {
    async fn new(script: &Arc<Script>) -> Self {
        Self::with(script, Options::default()).await
    }

    async fn with(script: &Arc<Script>, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { data_dir: folder.path().to_owned(), ..options };
        Self { gateway: Gateway::new(&options, fakes::start(script)).await.unwrap(), folder }
    }

    async fn accept(&self, upload: Upload) -> Result<Uuid, Fault> {
        let place = self.gateway.admit(&upload.order).await?;
        let generation = self.gateway.accept(upload, place, false).await?;
        Ok(Uuid::try_parse(&generation.generation_id).unwrap())
    }

    async fn ended(&self, id: Uuid) -> Generation {
        tokio::time::timeout(Duration::from_secs(120), self.gateway.store().wait_end(id)).await.unwrap().unwrap()
    }

    /// A completed video.
    async fn video(&self, id: Uuid) -> (Artifact, Vec<u8>) {
        let content = self.gateway.store().video(&id.to_string()).await.unwrap();
        let artifact = content.artifact.clone();
        let read: Vec<bytes::Bytes> = content.stream(0..u64::MAX).map(Result::unwrap).collect().await;
        (artifact, read.concat())
    }

    async fn events(&self, id: Uuid) -> Vec<GenerationEvent> {
        self.gateway.store().events(id, 1).map(Result::unwrap).collect().await
    }

    /// Stops the gateway without letting anything end, and starts one on the same folder.
    async fn restart(self, script: &Arc<Script>) -> Self {
        self.restart_with(script, Options::default()).await
    }

    async fn restart_with(self, script: &Arc<Script>, options: Options) -> Self {
        let Self { gateway, folder } = self;
        gateway.drain(Duration::ZERO).await;
        drop(gateway);
        let options = Options { data_dir: folder.path().to_owned(), ..options };
        // Clones that were in use by calls are dropped soon.
        let gateway = loop {
            match Gateway::new(&options, fakes::start(script)).await {
                Ok(gateway) => break gateway,
                Err(error) => assert!(error.to_string().contains("another process"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Self { gateway, folder }
    }

    /// Files that are kept, whatever they are.
    fn files(&self) -> usize {
        let shelves = std::fs::read_dir(self.folder.path().join("artifacts")).unwrap().map(Result::unwrap);
        shelves.map(|shelf| std::fs::read_dir(shelf.path()).unwrap().count()).sum()
    }
}

/// Waits for what another task does.
async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap();
}

async fn start(script: &Arc<Script>, steps: u32) -> (Desk, Uuid) {
    start_with(script, GenerationSpec { steps: Some(steps), ..Default::default() }, 5).await
}

async fn start_with(script: &Arc<Script>, spec: GenerationSpec, frames: u32) -> (Desk, Uuid) {
    let desk = Desk::new(script).await;
    let id = desk.accept(upload(spec, frames)).await.unwrap();
    (desk, id)
}

/// The settings of a generation under the reference's rules.
fn by_the_reference(steps: u32) -> GenerationSpec {
    GenerationSpec { steps: Some(steps), parity: Parity::Reference.into(), ..Default::default() }
}

#[tokio::test]
async fn quirk_fixed_k_makes_a_video_with_a_warning_about_the_missing_face() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 3).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let outcome = generation.outcome.unwrap();
    assert_eq!(outcome.stages.len(), 5);
    assert!(outcome.warnings[0].contains("No face was found"));
    let (kept, video) = desk.video(id).await;
    assert_eq!((video.len() as u64, crc32c::crc32c(&video)), (outcome.video_bytes, outcome.video_crc32c));
    assert_eq!(kept.bytes, outcome.video_bytes);
    assert!(script.sessions.lock().unwrap().is_empty());
    desk.gateway.store().remove(&id.to_string()).await.unwrap();
    // They go right after the record has changed.
    until(|| desk.files() == 0).await;
}

/// 18 steps: by the reference's literals the second phase begins at step 10 and steps 16 and 17 are cached; by ours
/// the phase begins at step 4 and no step is cached.
#[tokio::test]
async fn by_the_references_rules_short_speech_is_denoised_at_full_length_in_its_literal_steps() {
    let script = Arc::new(Script::default());
    let (desk, id) = start_with(&script, by_the_reference(18), 5).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((generation.frames, generation.heard_frames, generation.denoised_frames), (5, 5, 129));
    assert_eq!(generation.spec.as_ref().unwrap().parity(), Parity::Reference);
    assert_eq!(script.samples.load(Ordering::SeqCst), 30 * 16_000);
    assert_eq!(script.heard.load(Ordering::SeqCst), 5);
    let passes = script.passes.lock().unwrap();
    assert_eq!(passes.len(), 18);
    for (header, latents) in passes.iter() {
        assert_eq!(header.items.len(), 2);
        for item in &header.items {
            assert_eq!(item.latent_frames, (0..33).collect::<Vec<_>>());
            assert_eq!(item.audio_frames, (0..129).collect::<Vec<_>>());
            assert_eq!(item.face_mask_scale, if header.step < 10 { 0.6 } else { 1.0 });
        }
        assert_eq!(header.mode() == PassMode::Cached, header.step >= 16, "step {}", header.step);
        // The noise is f16; from the first step on a value has the 8 significant bits of a bf16.
        let values = latents.iter().flatten();
        assert!(values.clone().all(|x| header.step == 0 || x.to_bits() & 0xffff == 0), "step {}", header.step);
        assert!(values.clone().all(|x| x.to_bits() & 0x1fff == 0));
    }
}

#[tokio::test]
async fn by_the_references_rules_long_speech_is_cut_and_it_is_said_before_the_first_step() {
    let script = Arc::new(Script::default());
    let (desk, id) = start_with(&script, by_the_reference(1), 800).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((generation.frames, generation.heard_frames, generation.denoised_frames), (405, 400, 513));
    assert_eq!(script.samples.load(Ordering::SeqCst), 30 * 16_000, "the reference hears 30 s at most");
    assert_eq!(script.heard.load(Ordering::SeqCst), 400);
    let said = "The speech has 800 frames (32.00 s); with parity reference the first 400 (16.00 s) are heard";
    assert!(generation.outcome.unwrap().warnings[0].starts_with(said));
    let events = desk.events(id).await;
    let warned = events.iter().position(|event| event.warning && event.message.starts_with(said)).unwrap();
    let denoised = events.iter().position(|event| event.state() == GenerationState::Denoising).unwrap();
    assert!(warned < denoised);
    let video = desk.folder.path().join("video.mp4");
    std::fs::write(&video, desk.video(id).await.1).unwrap();
    let shown = std::process::Command::new("ffprobe")
        .args(["-v", "error", "-show_entries", "stream=duration", "-of", "csv=p=0"])
        .arg(&video)
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let lengths: Vec<f64> = shown.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!(lengths, [16.2, 16.2], "picture and sound end together");
}

#[tokio::test]
async fn without_parity_long_speech_is_heard_to_its_end() {
    let script = Arc::new(Script::default());
    let spec = GenerationSpec { steps: Some(1), ..Default::default() };
    let (desk, id) = start_with(&script, spec, 450).await;
    let generation = desk.ended(id).await;
    assert_eq!((generation.frames, generation.heard_frames), (450, 450), "{generation:?}");
    assert_eq!(script.samples.load(Ordering::SeqCst), 450 * 640);
}

#[tokio::test]
async fn several_faces_reach_the_caller_with_the_one_chosen_and_how_to_choose_another() {
    let face = |x: f64, side: f64| FaceBox { x, y: 4.0, width: side, height: side, score: Some(0.9) };
    let faces = vec![face(2.0, 30.0), face(40.0, 12.0)];
    let script = Arc::new(Script { faces: faces.clone(), ..Script::default() });
    let (desk, id) = start(&script, 1).await;
    let outcome = desk.ended(id).await.outcome.unwrap();
    assert_eq!((&outcome.faces, outcome.face), (&faces, Some(faces[0])));
    assert!(outcome.warnings[0].contains("--face X,Y,W,H"), "{:?}", outcome.warnings);
    let events = desk.events(id).await;
    let told = events.iter().find(|event| !event.faces.is_empty()).unwrap();
    assert!(told.warning && told.face == Some(faces[0]) && told.stage() == Stage::ImageEncoder);
}

#[tokio::test]
async fn survives_a_session_that_is_lost_again_and_again_in_one_step() {
    let script = Arc::new(Script { lose_session_at: vec![1, 2, 3, 5], ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!(script.opened.load(Ordering::SeqCst), 5);
    let steps: Vec<u32> = script.passes.lock().unwrap().iter().map(|(header, _)| header.step).collect();
    assert_eq!(steps, [0, 1, 2]);
}

/// 18 steps by the reference's literals: step 15 leaves the features that steps 16 and 17 use.
#[tokio::test]
async fn features_that_are_lost_twice_in_a_step_are_made_again_from_the_same_latents() {
    let plain = Arc::new(Script::default());
    let (desk, id) = start_with(&plain, by_the_reference(18), 5).await;
    desk.ended(id).await;
    // Call 16 is step 16; call 17 makes the features again, and is lost too.
    let script = Arc::new(Script { lose_session_at: vec![16, 17], ..Script::default() });
    let (desk, id) = start_with(&script, by_the_reference(18), 5).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let steps: Vec<u32> = script.passes.lock().unwrap().iter().map(|(header, _)| header.step).collect();
    assert_eq!(steps, [(0..16).collect::<Vec<_>>(), vec![15, 16, 17]].concat());
    assert_eq!(*script.decoded.lock().unwrap(), *plain.decoded.lock().unwrap());
}

#[tokio::test]
async fn a_worker_that_keeps_no_session_fails_the_generation_instead_of_running_for_ever() {
    let script = Arc::new(Script { lose_session_at: (0..1000).collect(), ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("NOT_FOUND", Stage::Diffusion));
}

#[tokio::test]
async fn a_finished_denoise_waits_for_the_decoder_as_long_as_that_has_no_room() {
    let script = Arc::new(Script { decoder_full: AtomicUsize::new(300), ..Script::default() });
    let (desk, id) = start(&script, 2).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!(script.passes.lock().unwrap().len(), 2);
}

/// A script in which calls of one stage find the device full.
fn full(stage: Stage, calls: impl IntoIterator<Item = usize>) -> Arc<Script> {
    Arc::new(Script { out_of_memory: calls.into_iter().map(|call| (stage, call)).collect(), ..Script::default() })
}

#[tokio::test]
async fn memory_that_ends_at_a_stages_first_call_is_made_free_and_the_call_repeated() {
    for stage in [Stage::AudioEncoder, Stage::TextEncoder, Stage::ImageEncoder, Stage::Diffusion, Stage::VaeDecode] {
        let script = full(stage, [0]);
        let (desk, id) = start(&script, 2).await;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{stage:?}: {generation:?}");
        assert_eq!(script.unloads.load(Ordering::SeqCst), 4, "{stage:?}: the other four are unloaded");
        assert_eq!(script.passes.lock().unwrap().len(), 2, "{stage:?}: no step is repeated");
        let events = desk.events(id).await;
        let told = events.iter().find(|event| event.message.contains("ran out of memory")).unwrap();
        assert!(told.stage() == stage && told.message.contains("unloaded") && !told.warning, "{told:?}");
    }
}

#[tokio::test]
async fn a_step_without_memory_goes_on_from_its_own_latents_with_one_pass_a_call() {
    let plain = Arc::new(Script::default());
    let (desk, id) = start(&plain, 4).await;
    desk.ended(id).await;
    // Call 0 opens the session; call 3 is step 2, and fails again after the other stages are gone.
    let script = full(Stage::Diffusion, [3, 4]);
    let (desk, id) = start(&script, 4).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let passes = script.passes.lock().unwrap();
    let seen: Vec<_> = passes.iter().map(|(header, _)| (header.step, header.items.len())).collect();
    assert_eq!(seen, [(0, 2), (1, 2), (2, 1), (2, 1), (3, 1), (3, 1)]);
    let values = |script: &Script| -> Vec<Vec<f32>> {
        script.passes.lock().unwrap().iter().flat_map(|(_, latents)| latents.clone()).collect()
    };
    drop(passes);
    assert_eq!(values(&script), values(&plain), "every step has the latents that it has without the fault");
}

/// 18 steps by the reference's literals: features are kept and reused at the end.
#[tokio::test]
async fn every_rung_is_taken_in_turn_and_the_last_one_runs_without_features() {
    let script = full(Stage::Diffusion, [17, 18, 19]);
    let (desk, id) = start_with(&script, by_the_reference(18), 5).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let passes = script.passes.lock().unwrap();
    let late: Vec<_> = passes.iter().filter(|(header, _)| header.step >= 16).collect();
    assert_eq!(late.len(), 4, "two steps of two passes, one a call");
    assert!(late.iter().all(|(header, _)| header.mode() == PassMode::Full && !header.keep_features));
    let warnings = generation.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("no features kept")), "{warnings:?}");
}

#[tokio::test]
async fn when_nothing_is_left_to_try_the_failure_lists_what_was_tried() {
    let script = full(Stage::Diffusion, 17..40);
    let (desk, id) = start_with(&script, by_the_reference(18), 5).await;
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::Diffusion));
    for part in ["900 bytes needed, 100 of 1000 free", "unloaded", "one pass a call", "no features kept"] {
        assert!(failure.message.contains(part), "{part} in {}", failure.message);
    }
    assert!(script.decodes.lock().unwrap().is_empty() && script.sessions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_decoder_without_memory_takes_smaller_tiles_and_never_repeats_a_step() {
    let script = full(Stage::VaeDecode, [0, 1, 2]);
    let (desk, id) = start(&script, 2).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let divisors: Vec<_> = script.decodes.lock().unwrap().iter().map(|header| header.tile_divisor).collect();
    assert_eq!(divisors, [1, 1, 2, 4]);
    assert_eq!(script.passes.lock().unwrap().len(), 2);
    let warnings = generation.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("tiles 4 times shorter")), "{warnings:?}");

    let script = full(Stage::VaeDecode, 0..20);
    let (desk, id) = start(&script, 2).await;
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::VaeDecode));
    assert!(failure.message.contains("tiles 2 times shorter; tiles 4 times shorter"), "{failure:?}");
    assert_eq!((script.passes.lock().unwrap().len(), script.decodes.lock().unwrap().len()), (2, 4));
}

/// At the first call of every stage while others are busy, at every step, and in the decoder after frames have left:
/// nothing but the call that failed is made again.
#[tokio::test]
async fn memory_that_ends_anywhere_costs_no_more_than_the_call_it_ended_in() {
    let plain = Arc::new(Script::default());
    let (desk, id) = start(&plain, 3).await;
    desk.ended(id).await;
    let latents = plain.decoded.lock().unwrap().clone();
    let encoders = [Stage::AudioEncoder, Stage::TextEncoder, Stage::ImageEncoder];
    let first = encoders.map(|stage| Script { busy: true, out_of_memory: vec![(stage, 0)], ..Script::default() });
    let steps = (0..=3).map(|call| Script { out_of_memory: vec![(Stage::Diffusion, call)], ..Script::default() });
    let late = (1..=3).map(|times| Script { out_of_memory_late: AtomicUsize::new(times), ..Script::default() });
    for script in first.into_iter().chain(steps).chain(late) {
        let script = Arc::new(script);
        let (desk, id) = start(&script, 3).await;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        assert_eq!(script.passes.lock().unwrap().len(), 3, "no step is repeated");
        assert_eq!(script.decoded.lock().unwrap().last(), latents.last(), "the latents are those without a fault");
        let events = desk.events(id).await;
        assert!(events.iter().any(|event| event.message.contains("ran out of memory")), "{events:?}");
    }
}

/// While generations have sessions on the other stages, what costs nobody anything comes first: a call with one pass.
#[tokio::test]
async fn other_generations_sessions_go_only_when_one_pass_a_call_does_not_help() {
    for (calls, unloads) in [(vec![3], 0), (vec![3, 4], 4)] {
        let out_of_memory = calls.into_iter().map(|call| (Stage::Diffusion, call)).collect();
        let script = Arc::new(Script { busy: true, out_of_memory, ..Script::default() });
        let (desk, id) = start(&script, 4).await;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        assert_eq!(script.unloads.load(Ordering::SeqCst), unloads);
        let late = |(header, _): &&(PredictHeader, Vec<Vec<f32>>)| header.step >= 2;
        assert!(script.passes.lock().unwrap().iter().filter(late).all(|(header, _)| header.items.len() == 1));
    }
}

#[tokio::test]
async fn while_its_device_is_nearly_full_a_denoise_takes_one_pass_a_call_and_says_so() {
    let plain = Arc::new(Script::default());
    let (desk, id) = start(&plain, 5).await;
    desk.ended(id).await;
    // Full after the first step, and with room again after the last pass of the third.
    let script = Arc::new(Script { pressed: vec![0, 1, 2, 3], ..Script::default() });
    let (desk, id) = start(&script, 5).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let size = |(header, _): &(PredictHeader, _)| (header.step, header.items.len());
    let seen: Vec<_> = script.passes.lock().unwrap().iter().map(size).collect();
    assert_eq!(seen, [(0, 2), (1, 1), (1, 1), (2, 1), (2, 1), (3, 2), (4, 2)]);
    assert_eq!(*script.decoded.lock().unwrap(), *plain.decoded.lock().unwrap(), "the result is the same");
    let events = desk.events(id).await;
    for part in ["from step 2 on each call holds one pass", "from step 4 on calls hold all passes"] {
        assert_eq!(events.iter().filter(|event| event.message.contains(part)).count(), 1, "{part}");
    }
    let reports = generation.outcome.unwrap().stages;
    let report = reports.iter().find(|report| report.stage() == Stage::Diffusion).unwrap();
    assert_eq!(report.eased, 1, "{report:?}");
}

/// Tile divisors of calls, each as often as it was changed to: calls that unload other stages keep it.
fn rungs<'a>(decodes: impl Iterator<Item = &'a DecodeLatentsHeader>) -> Vec<u32> {
    let mut divisors: Vec<u32> = decodes.map(|header| header.tile_divisor).collect();
    divisors.dedup();
    divisors
}

/// Each of them finds the decoder out of memory with whole tiles, before and after the other stages are unloaded, and with
/// tiles half as long.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_of_a_hundred_generations_finish_after_their_decoder_ran_out_of_memory_with_no_step_repeated() {
    const GENERATIONS: usize = 100;
    let script = Arc::new(Script { tiles_that_fit: 4, ..Script::default() });
    let desk = Desk::with(&script, Options { queue: GENERATIONS, concurrent: 4, ..Options::default() }).await;
    let mut ids = Vec::new();
    for seed in 0..GENERATIONS as u64 {
        let spec = GenerationSpec { steps: Some(2), seed: Some(seed), ..Default::default() };
        ids.push(desk.accept(upload(spec, 1)).await.unwrap());
    }
    for id in &ids {
        let generation = desk.ended(*id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    }
    let (passes, decodes) = (script.passes.lock().unwrap(), script.decodes.lock().unwrap());
    for id in ids.iter().map(Uuid::to_string) {
        let own = passes.iter().filter(|(header, _)| header.session_id.starts_with(&id));
        assert_eq!(own.map(|(header, _)| header.step).collect::<Vec<_>>(), [0, 1], "{id}");
        let own = decodes.iter().filter(|header| header.generation_id == id);
        assert_eq!(rungs(own), [1, 2, 4], "{id}");
    }
    assert_eq!(passes.len(), 2 * GENERATIONS);
    assert_eq!(script.decoded.lock().unwrap().len(), GENERATIONS);
}

/// A desk whose generations have previews.
async fn with_previews(script: &Arc<Script>, previews: usize) -> Desk {
    Desk::with(script, Options { previews, ..Options::default() }).await
}

/// Waits for an event about a preview.
async fn preview_told(desk: &Desk, id: Uuid) -> GenerationEvent {
    let events = desk.gateway.store().events(id, 1).map(Result::unwrap);
    let mut told = events.filter(|event| std::future::ready(event.preview.is_some())).boxed();
    let told = tokio::time::timeout(Duration::from_secs(120), told.next()).await.unwrap();
    told.expect("it ended without a preview")
}

#[tokio::test]
async fn a_preview_is_told_of_while_the_steps_go_on_and_can_be_fetched_until_the_generation_is_removed() {
    let plain = Arc::new(Script::default());
    let spec = || GenerationSpec { steps: Some(4), ..Default::default() };
    let (desk, id) = start_with(&plain, spec(), 5).await;
    desk.ended(id).await;

    // The only preview is that after step 2.
    let script = Arc::new(Script { hold: Mutex::new(Some(2)), ..Script::default() });
    let desk = with_previews(&script, 1).await;
    let id = desk.accept(upload(spec(), 5)).await.unwrap();
    let event = preview_told(&desk, id).await;
    let preview = event.preview.clone().unwrap();
    assert_eq!((preview.step, preview.width, preview.height), (2, 64, 64));
    assert_eq!((event.state(), event.stage()), (GenerationState::Denoising, Stage::VaeDecode));
    let path = format!("/v1/videos/{id}/previews/2");
    let (status, headers, file) = rest(&desk, &path, &[]).await;
    assert_eq!((status, headers["content-type"].to_str().unwrap()), (200, "image/jpeg"));
    assert_eq!(
        (file.len() as u64, headers["etag"].to_str().unwrap()),
        (preview.bytes, &*format!("\"{}\"", preview.sha256))
    );
    let picture = image::load_from_memory_with_format(&file, image::ImageFormat::Jpeg).unwrap();
    assert_eq!((picture.width(), picture.height()), (64, 64));
    let tag = headers["etag"].to_str().unwrap();
    assert_eq!(rest(&desk, &path, &[("if-none-match", tag)]).await.0, 304);
    for none in ["1", "3", "x", "-1"] {
        assert_eq!(rest(&desk, &format!("/v1/videos/{id}/previews/{none}"), &[]).await.0, 404, "{none}");
    }

    *script.hold.lock().unwrap() = None;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let decodes = script.decodes.lock().unwrap().clone();
    let asked: Vec<_> = decodes.iter().map(|header| (header.frame_limit, header.tile_divisor)).collect();
    assert_eq!(asked, [(1, 2), (5, 1)], "one frame in small tiles, then the video");
    let decoded = script.decoded.lock().unwrap().clone();
    assert_eq!(decoded[0].len(), 2 * 8 * 8, "one latent frame");
    assert!(decoded[1] == plain.decoded.lock().unwrap()[0], "the video's latents are those without a preview");
    let events = String::from_utf8(rest(&desk, &format!("/v1/videos/{id}/events"), &[]).await.2).unwrap();
    assert!(events.contains(&format!("\"url\":\"{path}\"")), "{events}");
    assert_eq!(rest(&desk, &path, &[]).await.0, 200, "it stays with the video");
    desk.gateway.store().remove(&id.to_string()).await.unwrap();
    assert_eq!(rest(&desk, &path, &[]).await.0, 404);
    until(|| desk.files() == 0).await;
}

#[tokio::test]
async fn a_decoder_that_is_away_full_or_out_of_memory_costs_the_preview_alone_and_is_not_asked_again() {
    let scripts = [
        Script { decoder_away: AtomicUsize::new(1), ..Script::default() },
        Script { decoder_full: AtomicUsize::new(1), ..Script::default() },
        Script { out_of_memory: vec![(Stage::VaeDecode, 0)], ..Script::default() },
    ];
    for script in scripts {
        let script = Arc::new(Script { hold: Mutex::new(Some(1)), ..script });
        let spec = GenerationSpec { steps: Some(2), ..Default::default() };
        let desk = with_previews(&script, 1).await;
        let id = desk.accept(upload(spec, 5)).await.unwrap();
        let refused = || {
            script.decoder_away.load(Ordering::SeqCst) + script.decoder_full.load(Ordering::SeqCst) == 0
                && (script.out_of_memory.is_empty() || script.calls.lock().unwrap().contains_key(&Stage::VaeDecode))
        };
        until(refused).await;
        *script.hold.lock().unwrap() = None;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        let events = desk.events(id).await;
        assert!(events.iter().all(|event| event.preview.is_none() && !event.message.contains("ran out of memory")));
        assert_eq!(script.passes.lock().unwrap().len(), 2, "no step is repeated");
        assert_eq!(script.decoded.lock().unwrap().len(), 1, "the video alone");
        assert_eq!(script.unloads.load(Ordering::SeqCst), 0, "nobody is unloaded for a preview");
    }
}

#[tokio::test]
async fn without_previews_the_decoder_is_asked_for_the_video_alone() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 6).await;
    desk.ended(id).await;
    assert_eq!(script.decodes.lock().unwrap().len(), 1);
    assert!(desk.events(id).await.iter().all(|event| event.preview.is_none()));
}

/// A desk with two decoders: the first one is the script's, the second one that of `spare`.
async fn with_spare_decoder(script: &Arc<Script>, spare: &Arc<Script>) -> Desk {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { data_dir: folder.path().to_owned(), ..Options::default() };
    let mut stages = fakes::start(script);
    stages.spare_decoders = vec![fakes::start(spare).vae_decode];
    Desk { gateway: Gateway::new(&options, stages).await.unwrap(), folder }
}

#[tokio::test]
async fn a_decoder_that_never_has_memory_is_left_for_the_next_one_and_no_step_is_repeated() {
    let (script, spare) =
        (Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() }), Arc::new(Script::default()));
    let desk = with_spare_decoder(&script, &spare).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let tried = |script: &Script| rungs(script.decodes.lock().unwrap().iter());
    assert_eq!((tried(&script), tried(&spare)), (vec![1, 2, 4], vec![1]), "the whole ladder comes first");
    assert_eq!(script.passes.lock().unwrap().len(), 2);
    let events = desk.events(id).await;
    let told = events.iter().find(|event| event.message.contains("vae-decode 1 of 2 ran out of memory")).unwrap();
    assert!(told.stage() == Stage::VaeDecode && told.message.contains("2 of 2 is tried"), "{told:?}");
}

#[tokio::test]
async fn a_decoder_that_is_away_or_full_is_not_waited_for_where_another_is_free() {
    for first in [
        Script { decoder_away: AtomicUsize::new(usize::MAX), ..Script::default() },
        Script { decoder_full: AtomicUsize::new(usize::MAX), ..Script::default() },
    ] {
        let (script, spare) = (Arc::new(first), Arc::new(Script::default()));
        let desk = with_spare_decoder(&script, &spare).await;
        let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        let left = script.decoder_away.load(Ordering::SeqCst).max(script.decoder_full.load(Ordering::SeqCst));
        assert_eq!((usize::MAX - left, spare.decodes.lock().unwrap().len()), (1, 1), "each is asked once");
    }
}

#[tokio::test]
async fn while_one_decoder_has_no_memory_another_one_that_is_away_is_waited_for() {
    let script = Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() });
    let spare = Arc::new(Script { decoder_away: AtomicUsize::new(2), ..Script::default() });
    let desk = with_spare_decoder(&script, &spare).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!(rungs(script.decodes.lock().unwrap().iter()), [1, 2, 4], "what was tried in vain is not tried again");

    let full = || Arc::new(Script { tiles_that_fit: u32::MAX, ..Script::default() });
    let (script, spare) = (full(), full());
    let desk = with_spare_decoder(&script, &spare).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::VaeDecode));
    assert!(failure.message.contains("tiles 4 times shorter"), "{failure:?}");
}

/// Waits until a generation has taken so many steps, each stored.
async fn steps_done(desk: &Desk, id: Uuid, steps: u32) {
    let waiting = async {
        while desk.gateway.store().get(&id.to_string()).await.unwrap().progress.unwrap().step < steps {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap();
}

#[tokio::test]
async fn a_denoise_that_gave_up_its_features_goes_on_without_them_after_a_restart() {
    let out_of_memory = [17, 18, 19].map(|call| (Stage::Diffusion, call)).to_vec();
    let script =
        Script { out_of_memory, hold: Mutex::new(Some(17)), identity: Mutex::new("m".into()), ..Script::default() };
    let script = Arc::new(script);
    let (desk, id) = start_with(&script, by_the_reference(18), 5).await;
    steps_done(&desk, id, 17).await;
    let again = Arc::new(Script { identity: Mutex::new("m".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let passes = again.passes.lock().unwrap();
    assert!(!passes.is_empty() && passes.iter().all(|(header, _)| header.step == 17), "no step is repeated");
    assert!(passes.iter().all(|(header, _)| header.mode() == PassMode::Full && !header.keep_features));
    let warnings = generation.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("no features kept")), "{warnings:?}");
}

#[tokio::test]
async fn without_the_feature_cache_every_step_runs_in_full() {
    for no_feature_cache in [false, true] {
        let script = Arc::new(Script::default());
        let spec = GenerationSpec { no_feature_cache, ..by_the_reference(18) };
        let (desk, id) = start_with(&script, spec, 5).await;
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        assert_eq!(generation.spec.unwrap().no_feature_cache, no_feature_cache);
        let passes = script.passes.lock().unwrap();
        let full = passes.iter().all(|(header, _)| header.mode() == PassMode::Full && !header.keep_features);
        assert_eq!(full, no_feature_cache);
    }
}

#[test]
fn what_a_tier_made_of_a_request_holds_whatever_tier_is_in_force_later() {
    let tier = TierOptions { choice: Choice::Named("emergency".into()), allow_degrade: true, ..TierOptions::default() };
    let seconds = tier.limit().unwrap().limits.audio_seconds;
    let upload = upload(GenerationSpec { steps: Some(200), ..Default::default() }, 25 * seconds + 40);
    let resolve = |spec| validate::resolve(spec, &GenerationDefaults::default()).unwrap();
    let first = Prepared::read(&upload, resolve(upload.spec.clone()), 600, &tier).unwrap();
    let Generation { spec, tier: held, .. } = first.generation();
    assert_eq!(held.as_ref().unwrap().speech_frames, Some(25 * seconds));
    let again = Prepared::again(&upload, resolve(spec.unwrap()), held).unwrap();
    assert_eq!((again.settings.steps, again.heard), (first.settings.steps, first.heard));
    assert_eq!(format!("{:?}", again.plan), format!("{:?}", first.plan));
    assert!(again.warnings == first.warnings && again.audio.samples == first.audio.samples);
    assert_eq!(again.audio.soundtrack.samples, first.audio.soundtrack.samples);
}

#[tokio::test]
async fn a_stage_that_refuses_the_prompt_fails_the_generation_with_the_field() {
    let script = Arc::new(Script { refuse_prompt: true, ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("INVALID_ARGUMENT", Stage::TextEncoder));
    assert_eq!(Fault::from_failure(&failure).field(), Some("prompt"));
}

/// Answers the requests that come with these statuses, one after the other; gives each as it came.
async fn receiver(statuses: &'static [&'static str]) -> (std::net::SocketAddr, Arc<Mutex<Vec<String>>>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
    let requests = Arc::clone(&seen);
    tokio::spawn(async move {
        for status in statuses {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            loop {
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).await.unwrap();
                request.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&request);
                let body = text.split_once("\r\n\r\n").map(|(_, body)| body.len());
                let length = header(&text, "content-length").and_then(|length| length.parse().ok());
                if n == 0 || body.is_some_and(|body| length.is_some_and(|length: usize| body >= length)) {
                    break;
                }
            }
            requests.lock().unwrap().push(String::from_utf8(request).unwrap());
            let head = format!("HTTP/1.1 {status}\r\nlocation: /elsewhere\r\n");
            let answer = format!("{head}content-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (address, seen)
}

/// The value of a header of a request as it came.
fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let lines = request.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(": "));
    lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
}

#[tokio::test]
async fn the_end_is_told_until_it_is_taken_also_by_the_next_process_and_signed() {
    use base64::Engine as _;
    let (script, folder) = (Arc::new(Script::default()), tempfile::tempdir().unwrap());
    let (address, seen) = receiver(&["302 Found", "503 Service Unavailable", "200 OK"]).await;
    let key = b"a key of twenty-five byte";
    let secret = format!("whsec_{}", base64::prelude::BASE64_STANDARD.encode(key));
    let secret = Some(webhook::Secret::parse(&secret).unwrap());
    let webhooks = WebhookOptions { secret, allow: vec![address.to_string()] };
    let options = Options { data_dir: folder.path().to_owned(), webhooks, ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&script)).await.unwrap();
    let desk = Desk { gateway, folder };
    let order = Order { webhook: format!("http://{address}/hook?x=1"), ..Order::default() };
    let spec = GenerationSpec { steps: Some(1), ..Default::default() };
    let id = desk.accept(Upload { order, ..upload(spec, 5) }).await.unwrap();
    until(|| seen.lock().unwrap().len() == 1).await;
    let Desk { gateway, folder } = desk;
    // It waits to be tried again; the record may go meanwhile.
    gateway.store().remove(&id.to_string()).await.unwrap();
    gateway.drain(Duration::ZERO).await;
    drop(gateway);
    let gateway = loop {
        match Gateway::new(&options, fakes::start(&script)).await {
            Ok(gateway) => break gateway,
            Err(error) => assert!(error.to_string().contains("another process"), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    until(|| seen.lock().unwrap().len() == 3).await;
    let requests = seen.lock().unwrap().clone();
    for request in &requests {
        assert!(request.starts_with("POST /hook?x=1 HTTP/1.1"), "no redirect is followed: {request}");
        assert_eq!(header(request, "webhook-id").unwrap(), format!("evt_{id}"));
        let body = request.split_once("\r\n\r\n").unwrap().1;
        let message: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&message["type"], &message["data"]["id"]), (&"video.completed".into(), &id.to_string().into()));
        let signed = format!("evt_{id}.{}.{body}", header(request, "webhook-timestamp").unwrap());
        let tag = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key), signed.as_bytes());
        let tag = base64::prelude::BASE64_STANDARD.encode(tag);
        assert_eq!(header(request, "webhook-signature").unwrap(), format!("v1,{tag}"));
    }
    let store = gateway.store().clone();
    let forgotten = async {
        while store.webhooks().await != 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), forgotten).await.unwrap();
    drop(folder);
}

#[tokio::test]
async fn an_address_that_is_not_called_is_refused_before_anything_is_read() {
    let script = Arc::new(Script::default());
    let secret = Some(webhook::Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap());
    let webhooks = WebhookOptions { secret, ..WebhookOptions::default() };
    let desk = Desk::with(&script, Options { webhooks, ..Options::default() }).await;
    for address in ["http://example.com/", "https://169.254.169.254/latest", "https://[::ffff:10.0.0.1]/"] {
        let order = Order { webhook: address.into(), ..Order::default() };
        let fault = desk.gateway.admit(&order).await.unwrap_err();
        assert_eq!((fault.kind, fault.field()), (Kind::Invalid, Some("webhook")), "{address}");
    }
}

#[tokio::test]
async fn a_worker_that_stands_still_is_suspected_and_the_step_is_begun_again() {
    let script = Arc::new(Script { stall_at: Some(1), ..Script::default() });
    let desk = Desk::with(&script, Options { stuck_after: Duration::from_secs(1), ..Options::default() }).await;
    let spec = GenerationSpec { steps: Some(3), ..Default::default() };
    let id = desk.accept(upload(spec.clone(), 5)).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let said: Vec<String> = desk.events(id).await.into_iter().map(|event| event.message).collect();
    assert!(said.iter().any(|message| message.contains("diffusion is suspected to be stuck")), "{said:?}");
    let undisturbed = Arc::new(Script::default());
    let (desk, id) = start_with(&undisturbed, spec, 5).await;
    desk.ended(id).await;
    assert!(*script.decoded.lock().unwrap() == *undisturbed.decoded.lock().unwrap(), "the latents are the same");
}

#[tokio::test]
async fn what_has_not_ended_by_its_deadline_fails_whether_it_runs_or_waits() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(600), ..Script::default() });
    let desk = Desk::with(&script, Options { concurrent: 1, ..Options::default() }).await;
    let late = || Upload {
        order: Order::default().within("1").unwrap(),
        ..upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)
    };
    let running = desk.accept(Upload { order: Order::default().within("20").unwrap(), ..late() }).await.unwrap();
    until(|| script.opened.load(Ordering::SeqCst) > 0).await;
    let waiting = desk.accept(late()).await.unwrap();
    for id in [waiting, running] {
        let generation = desk.ended(id).await;
        assert_eq!(generation.failure.as_ref().unwrap().code, "DEADLINE_EXCEEDED", "{generation:?}");
        assert!(generation.ended_unix_ms >= generation.deadline_unix_ms.unwrap());
    }
    assert_eq!(script.opened.load(Ordering::SeqCst), 1, "what waited was not begun");
    assert!(script.sessions.lock().unwrap().is_empty());
}

/// Options under which a stage may always take so many seconds, and little more if it is predicted to take less.
fn allowing(seconds: u64) -> Options {
    let default_deadline = DefaultDeadline { times: 4, least: Duration::from_secs(seconds) };
    Options { default_deadline, ..Options::default() }
}

#[tokio::test]
async fn without_a_deadline_of_the_caller_work_ends_that_takes_much_longer_than_predicted_and_its_latents_are_kept() {
    let script = Arc::new(Script { hold: Mutex::new(Some(1)), ..Script::default() });
    let desk = Desk::with(&script, allowing(1)).await;
    let request = |seed| upload(GenerationSpec { steps: Some(2), seed: Some(seed), ..Default::default() }, 5);
    let patient = Order::default().within("3600").unwrap();
    let patient = desk.accept(Upload { order: patient, ..request(1) }).await.unwrap();
    steps_done(&desk, patient, 1).await;
    let id = desk.accept(request(2)).await.unwrap();
    let generation = desk.ended(id).await;
    let failure = generation.failure.unwrap();
    assert_eq!(failure.code, "DEADLINE_EXCEEDED", "{failure:?}");
    assert!(failure.message.contains("predicted"), "{failure:?}");
    let progress = generation.progress.unwrap();
    assert!(progress.step == 1 && progress.elapsed_seconds >= progress.allowed_seconds.unwrap(), "{progress:?}");
    assert_eq!(generation.deadline_unix_ms, None);
    let told: Vec<f64> =
        desk.events(id).await.iter().filter_map(|event| event.progress.unwrap().allowed_seconds).collect();
    assert!(told.len() >= 2 && told.iter().all(|allowed| *allowed == told[0]), "it is settled once: {told:?}");
    // Picture and recording, which both have, and the latents of each.
    assert_eq!(desk.files(), 4);
    *script.hold.lock().unwrap() = None;
    let generation = desk.ended(patient).await;
    assert_eq!(generation.state(), GenerationState::Completed, "its own deadline holds: {generation:?}");
    assert_eq!(generation.progress.unwrap().allowed_seconds, None);
}

#[tokio::test]
async fn a_restart_gives_no_more_time_than_there_was_and_takes_none() {
    let script = Arc::new(Script { hold: Mutex::new(Some(1)), identity: Mutex::new("m".into()), ..Script::default() });
    let desk = Desk::with(&script, allowing(20)).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    steps_done(&desk, id, 1).await;
    let before = desk.gateway.store().get(&id.to_string()).await.unwrap().progress.unwrap();
    let again = Arc::new(Script { hold: Mutex::new(Some(1)), identity: Mutex::new("m".into()), ..Script::default() });
    // A prediction of its own would allow this one an hour.
    let desk = desk.restart_with(&again, allowing(3600)).await;
    until(|| again.opened.load(Ordering::SeqCst) > 0).await;
    let after = desk.gateway.store().get(&id.to_string()).await.unwrap().progress.unwrap();
    assert_eq!(after.allowed_seconds, before.allowed_seconds);
    assert!(after.elapsed_seconds >= before.elapsed_seconds, "{after:?}");
    *again.hold.lock().unwrap() = None;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert!(again.passes.lock().unwrap().iter().all(|(header, _)| header.step == 1));
}

#[tokio::test]
async fn waits_for_a_stage_that_is_away_are_no_work() {
    // Waits of 0.1, 0.25, 0.5, 1 and 2 s.
    let script = Arc::new(Script { away_at: Some((1, 5)), ..Script::default() });
    let desk = Desk::with(&script, allowing(2)).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert!(generation.progress.unwrap().elapsed_seconds > 3.85);
}

/// Pretended seconds: 1 of each encoder, 0.25 of a session's opening, 0.5 of a step, 2 of the decoder.
#[tokio::test]
async fn a_record_says_what_it_took_of_each_device_also_over_a_restart_and_when_it_is_cancelled() {
    let seconds = |generation: &Generation| {
        generation.devices.iter().map(|used| (used.device.clone(), used.seconds)).collect::<Vec<_>>()
    };
    let script = Arc::new(Script { hold: Mutex::new(Some(1)), identity: Mutex::new("m".into()), ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    steps_done(&desk, id, 1).await;
    let again = Arc::new(Script { hold: Mutex::new(Some(2)), identity: Mutex::new("m".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    steps_done(&desk, id, 2).await;
    // Nothing of the encoders, whose answers were kept; another session.
    assert_eq!(seconds(&desk.gateway.store().get(&id.to_string()).await.unwrap()), [("cpu".to_owned(), 4.5)]);
    let cancelled = desk.gateway.store().cancel(&id.to_string()).await.unwrap();
    assert_eq!((cancelled.state(), seconds(&cancelled)), (GenerationState::Cancelled, vec![("cpu".to_owned(), 4.5)]));
    let (desk, id) = start(&Arc::new(Script::default()), 3).await;
    assert_eq!(seconds(&desk.ended(id).await), [("cpu".to_owned(), 6.75)]);
    let shown = json(&desk, &format!("/v1/videos/{id}")).await;
    assert_eq!(shown["devices"][0]["seconds"], 6.75);
}

#[tokio::test]
async fn a_velocity_that_is_not_finite_fails_with_the_step_and_frees_the_session() {
    let script = Arc::new(Script { not_finite_at: Some(1), ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    let failure = desk.ended(id).await.failure.unwrap();
    assert!(failure.message.contains("step 2"), "{failure:?}");
    assert_eq!(failure.code, "OUTPUT_REJECTED");
    assert!(script.sessions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn latents_that_run_away_stop_the_generation_at_their_step_and_are_kept() {
    let script = Arc::new(Script { loudness: Some(1e5), ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    let generation = desk.ended(id).await;
    let failure = generation.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("OUTPUT_REJECTED", Stage::Diffusion));
    let said = "output_rejected: step 1 of 3: the latents' standard deviation is ";
    assert!(failure.message.starts_with(said), "{failure:?}");
    assert_eq!(script.predicted.load(Ordering::SeqCst), 1, "no step after it is done");
    assert!(script.sessions.lock().unwrap().is_empty() && script.decodes.lock().unwrap().is_empty());
    // Picture, recording and latents.
    assert_eq!(desk.files(), 3);
}

#[tokio::test]
async fn frames_that_are_no_video_fail_the_generation_and_what_it_was_made_from_is_kept() {
    for (value, frames, part) in [(0, 5, "it is black"), (255, 5, "it is saturated"), (99, 30, "the video is frozen")] {
        let script = Arc::new(Script { flat_frames: Some(value), ..Script::default() });
        let spec = GenerationSpec { steps: Some(1), ..Default::default() };
        let (desk, id) = start_with(&script, spec, frames).await;
        let failure = desk.ended(id).await.failure.unwrap();
        assert_eq!((failure.code.as_str(), failure.stage()), ("OUTPUT_REJECTED", Stage::VaeDecode), "{failure:?}");
        assert!(failure.message.contains(part), "{failure:?}");
        assert_eq!(script.decodes.lock().unwrap().len(), 1, "it is not tried again");
        assert_eq!(desk.files(), 3);
    }
}

#[tokio::test]
async fn a_cancelled_generation_stops_in_the_middle_of_a_step() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(30), ..Script::default() });
    let (desk, id) = start(&script, 3).await;
    until(|| script.opened.load(Ordering::SeqCst) > 0).await;
    let cancelled = desk.gateway.store().cancel(&id.to_string()).await.unwrap();
    assert_eq!(cancelled.state(), GenerationState::Cancelled);
    assert!(script.sessions.lock().unwrap().is_empty());
    // They go right after the record has changed.
    until(|| desk.files() == 0).await;
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_with_a_delay_unless_the_request_was_accepted_before() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(600), ..Script::default() });
    let desk = Desk::with(&script, Options { queue: 0, concurrent: 1, ..Options::default() }).await;
    let place = desk.gateway.admit(&Order::default()).await.unwrap();
    assert!(matches!(desk.gateway.admit(&Order::default()).await.unwrap_err().kind, Kind::Busy { .. }));
    drop(place);
    let request = || Upload { order: keyed("k"), ..upload(GenerationSpec::default(), 5) };
    let id = desk.accept(request()).await.unwrap();
    assert!(matches!(desk.accept(upload(GenerationSpec::default(), 5)).await.unwrap_err().kind, Kind::Busy { .. }));
    assert_eq!(desk.accept(request()).await.unwrap(), id);
}

#[tokio::test]
async fn the_delay_of_a_refusal_is_that_of_the_generations_before() {
    let took = Duration::from_millis(1500);
    let script = Arc::new(Script { predict_time: took, ..Script::default() });
    let desk = Desk::with(&script, Options { queue: 0, concurrent: 1, ..Options::default() }).await;
    let request = || upload(GenerationSpec { steps: Some(1), ..Default::default() }, 2);
    let began = std::time::Instant::now();
    let first = desk.accept(request()).await.unwrap();
    desk.ended(first).await;
    *script.hold.lock().unwrap() = Some(0);
    desk.accept(request()).await.unwrap();
    // Begun only once the first one's time is known.
    until(|| script.opened.load(Ordering::SeqCst) == 2).await;
    let bound = began.elapsed();
    let Kind::Busy { retry_after } = desk.accept(request()).await.unwrap_err().kind else { panic!("it was taken") };
    assert!((took..=bound).contains(&retry_after), "{retry_after:?} of {bound:?}");
}

#[tokio::test]
async fn the_same_key_gives_the_same_generation_and_another_request_under_it_is_refused() {
    let script = Arc::new(Script::default());
    let desk = Desk::new(&script).await;
    let request = |seed| {
        let spec = GenerationSpec { steps: Some(1), seed: Some(seed), ..Default::default() };
        Upload { order: keyed("order-7"), ..upload(spec, 5) }
    };
    let id = desk.accept(request(1)).await.unwrap();
    assert_eq!(desk.accept(request(1)).await.unwrap(), id);
    let fault = desk.accept(request(2)).await.unwrap_err();
    assert_eq!((fault.kind, fault.code()), (Kind::Conflict, tonic::Code::AlreadyExists));
    assert!(fault.message.contains(&id.to_string()), "{fault}");
    desk.ended(id).await;
    let desk = desk.restart(&script).await;
    assert_eq!(desk.accept(request(1)).await.unwrap(), id, "also when it has ended, and after a restart");
    desk.gateway.store().remove(&id.to_string()).await.unwrap();
    assert_ne!(desk.accept(request(2)).await.unwrap(), id, "once deleted the key is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_creations_of_one_key_at_once_make_one_generation() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(600), ..Script::default() });
    let desk = Arc::new(Desk::with(&script, Options { queue: 100, ..Options::default() }).await);
    let creations = (0..50).map(|_| {
        let desk = Arc::clone(&desk);
        tokio::spawn(async move {
            let request = || Upload { order: keyed("one"), ..upload(GenerationSpec::default(), 2) };
            desk.accept(request()).await.unwrap()
        })
    });
    let ids: HashSet<Uuid> = futures::future::join_all(creations).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(desk.gateway.store().unfinished("").await.unwrap(), (1, 1));
}

/// The video of a run that is stopped before a step is that of a run that is not, and no step is taken twice.
#[tokio::test]
async fn a_generation_goes_on_after_a_restart_where_it_was() {
    let spec = || GenerationSpec { steps: Some(4), ..Default::default() };
    let undisturbed = Arc::new(Script::default());
    let (desk, id) = start_with(&undisturbed, spec(), 5).await;
    desk.ended(id).await;

    let script =
        Arc::new(Script { away_at: Some((2, 1_000_000)), identity: Mutex::new("m".into()), ..Default::default() });
    let (desk, id) = start_with(&script, spec(), 5).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    assert_eq!(desk.gateway.store().get(&id.to_string()).await.unwrap().state(), GenerationState::Denoising);
    let again = Arc::new(Script { identity: Mutex::new("m".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!(again.encoded.load(Ordering::SeqCst), 0, "what the encoders gave was kept");
    let steps: Vec<u32> = again.passes.lock().unwrap().iter().map(|(header, _)| header.step).collect();
    assert_eq!(steps, [2, 3]);
    assert_eq!(*again.decoded.lock().unwrap(), *undisturbed.decoded.lock().unwrap());
    let events = desk.events(id).await;
    assert_eq!(
        events.iter().map(|event| event.number).collect::<Vec<_>>(),
        (1..=events.len() as u64).collect::<Vec<_>>()
    );
    for pair in events.windows(2) {
        assert!(life::may_follow(pair[0].state(), pair[1].state()), "{pair:?}");
    }
}

#[tokio::test]
async fn a_finished_denoise_is_not_repeated_for_the_decoder() {
    let script = Arc::new(Script { decoder_away: AtomicUsize::new(usize::MAX), ..Script::default() });
    let (desk, id) = start(&script, 2).await;
    until(|| script.decoder_away.load(Ordering::SeqCst) < usize::MAX).await;
    let again = Arc::new(Script { decoder_away: AtomicUsize::new(2), ..Script::default() });
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!(again.predicted.load(Ordering::SeqCst), 0);
    assert_eq!(again.opened.load(Ordering::SeqCst), 0);
    assert_eq!(again.decoded.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn latents_of_another_model_are_not_gone_on_with() {
    let script =
        Arc::new(Script { away_at: Some((2, 1_000_000)), identity: Mutex::new("old".into()), ..Default::default() });
    let (desk, id) = start(&script, 3).await;
    until(|| script.predicted.load(Ordering::SeqCst) > 2).await;
    let again = Arc::new(Script { identity: Mutex::new("new".into()), ..Script::default() });
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    assert_eq!((again.encoded.load(Ordering::SeqCst), again.predicted.load(Ordering::SeqCst)), (3, 3));
    let warnings = desk.ended(id).await.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("may differ in the last place")), "{warnings:?}");
}

#[tokio::test]
async fn the_same_inputs_are_encoded_once() {
    let script = Arc::new(Script { identity: Mutex::new("m".into()), ..Script::default() });
    let desk = Desk::new(&script).await;
    for (seed, prompt, encoded) in [(1, "a", 3), (2, "a", 3), (3, "b", 4)] {
        let spec = GenerationSpec { seed: Some(seed), steps: Some(1), prompt: prompt.into(), ..Default::default() };
        let id = desk.accept(upload(spec, 5)).await.unwrap();
        let generation = desk.ended(id).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
        assert_eq!(script.encoded.load(Ordering::SeqCst), encoded);
        assert_eq!(generation.outcome.unwrap().stages.len(), 5);
    }
}

#[tokio::test]
async fn a_stage_that_comes_back_is_waited_for_and_one_that_does_not_fails_the_generation() {
    let script = Arc::new(Script { away_at: Some((1, 3)), ..Script::default() });
    let (desk, id) = start(&script, 2).await;
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    let events = desk.events(id).await;
    let waits = events.iter().filter(|event| event.message.contains("diffusion does not answer")).count();
    assert_eq!(waits, 1);

    let script = Arc::new(Script { away_at: Some((0, usize::MAX)), ..Script::default() });
    let options = Options { stage_patience: Duration::ZERO, ..Options::default() };
    let desk = Desk::with(&script, options).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("UNAVAILABLE", Stage::Diffusion));
    assert!(failure.retryable && failure.message.contains("waited for"), "{failure:?}");
}

#[tokio::test]
async fn what_waits_and_what_was_cancelled_is_so_after_a_restart() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(600), ..Script::default() });
    let desk = Desk::with(&script, Options { concurrent: 1, ..Options::default() }).await;
    let running = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    until(|| script.opened.load(Ordering::SeqCst) > 0).await;
    let spec = || GenerationSpec { steps: Some(1), ..Default::default() };
    let waiting = desk.accept(upload(spec(), 5)).await.unwrap();
    let cancelled = desk.accept(upload(spec(), 5)).await.unwrap();
    let ended = desk.gateway.store().cancel(&cancelled.to_string()).await.unwrap();
    assert_eq!(ended.state(), GenerationState::Cancelled);
    let place = desk.gateway.admit(&Order::default()).await.unwrap();
    let attached = desk.gateway.accept(upload(spec(), 5), place, true).await.unwrap().generation_id;
    let again = Arc::new(Script::default());
    let desk = desk.restart(&again).await;
    assert_eq!(desk.ended(running).await.state(), GenerationState::Completed);
    assert_eq!(desk.ended(waiting).await.state(), GenerationState::Completed);
    assert_eq!(desk.ended(cancelled).await.state(), GenerationState::Cancelled);
    let gone = desk.gateway.store().get(&attached).await.unwrap_err();
    assert_eq!(gone.kind, Kind::NotFound, "it went with the call that it belonged to");
}

#[tokio::test]
async fn two_gateways_do_not_share_a_folder() {
    let desk = Desk::new(&Arc::new(Script::default())).await;
    let options = Options { data_dir: desk.folder.path().to_owned(), ..Options::default() };
    let error = Gateway::new(&options, fakes::start(&Arc::new(Script::default()))).await.unwrap_err();
    assert!(error.to_string().contains("another process uses it"), "{error}");
}

/// One call of the REST interface: status, headers and body.
async fn rest(desk: &Desk, path: &str, headers: &[(&str, &str)]) -> (u16, http::HeaderMap, Vec<u8>) {
    let mut request = http::Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(axum::body::Body::empty()).unwrap();
    let (head, body) = desk.gateway.http_router().oneshot(request).await.unwrap().into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    (head.status.as_u16(), head.headers, body.to_vec())
}

async fn json(desk: &Desk, path: &str) -> serde_json::Value {
    let (status, _, body) = rest(desk, path, &[]).await;
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

#[tokio::test]
async fn a_download_goes_on_where_it_stopped_and_only_if_the_file_is_the_same() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 1).await;
    desk.ended(id).await;
    let path = format!("/v1/videos/{id}/content");
    let (status, headers, whole) = rest(&desk, &path, &[]).await;
    let tag = headers["etag"].to_str().unwrap().to_owned();
    assert_eq!((status, &headers["accept-ranges"]), (200, &http::HeaderValue::from_static("bytes")));
    let (status, headers, rest_of_it) = rest(&desk, &path, &[("range", "bytes=100-"), ("if-range", &tag)]).await;
    assert_eq!((status, &rest_of_it[..]), (206, &whole[100..]));
    let wanted = format!("bytes 100-{}/{}", whole.len() - 1, whole.len());
    assert_eq!(headers["content-range"].to_str().unwrap(), wanted);
    let (status, _, again) = rest(&desk, &path, &[("range", "bytes=100-"), ("if-range", "\"another\"")]).await;
    assert_eq!((status, again.len()), (200, whole.len()));
    assert_eq!(rest(&desk, &path, &[("if-none-match", &tag)]).await.0, 304);
    assert_eq!(rest(&desk, &path, &[("range", &format!("bytes={}-", whole.len()))]).await.0, 416);
}

#[tokio::test]
async fn pages_of_a_list_have_each_generation_once_whatever_is_created_meanwhile() {
    let script = Arc::new(Script::default());
    let desk = Desk::new(&script).await;
    let mut ids = Vec::new();
    for steps in [1, 1, 1, 1, 1] {
        let spec = GenerationSpec { steps: Some(steps), ..Default::default() };
        let id = desk.accept(upload(spec, 2)).await.unwrap();
        desk.ended(id).await;
        ids.push(id.to_string());
    }
    let (mut seen, mut path) = (Vec::new(), "/v1/videos?limit=2&status=completed".to_owned());
    loop {
        let page = json(&desk, &path).await;
        seen.extend(page["data"].as_array().unwrap().iter().map(|video| video["id"].as_str().unwrap().to_owned()));
        if page["has_more"] == false {
            break;
        }
        path = format!("/v1/videos?limit=2&status=completed&after={}", page["last_id"].as_str().unwrap());
        desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 2)).await.unwrap();
    }
    seen.reverse();
    assert_eq!(seen, ids);
    let oldest = json(&desk, "/v1/videos?limit=1&order=asc").await;
    assert_eq!(oldest["data"][0]["id"], ids[0].as_str());
    assert_eq!(json(&desk, "/v1/videos?status=failed,cancelled").await["data"].as_array().unwrap().len(), 0);
    assert_eq!(json(&desk, "/v1/videos?created_before=1").await["data"].as_array().unwrap().len(), 0);
    let spec = GenerationSpec { steps: Some(1), ..Default::default() };
    let order = Order { caller: "studio".into(), ..Order::default() }.labelled("scene-7").unwrap();
    let labelled = desk.accept(Upload { order, ..upload(spec, 2) }).await.unwrap().to_string();
    for query in ["caller=studio", "label=scene-7", "caller=studio&label=scene-7&limit=1"] {
        let page = json(&desk, &format!("/v1/videos?{query}")).await;
        assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (1, &false.into()), "{query}");
        let shown = [&page["data"][0]["id"], &page["data"][0]["caller"], &page["data"][0]["label"]];
        assert_eq!(shown, [labelled.as_str(), "studio", "scene-7"], "{query}");
    }
    assert_eq!(json(&desk, "/v1/videos?caller=studio&label=scene-8").await["data"].as_array().unwrap().len(), 0);
    for wrong in ["limit=0", "limit=101", "after=x", "order=up", "status=lost", "page=2"] {
        assert_eq!(rest(&desk, &format!("/v1/videos?{wrong}"), &[]).await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn server_sent_events_come_once_each_and_go_on_after_the_last_one_seen() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 2).await;
    let path = format!("/v1/videos/{id}/events");
    let events = |body: Vec<u8>| {
        let text = String::from_utf8(body).unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let all = events(rest(&desk, &path, &[]).await.2);
    let numbers: Vec<u64> = all.iter().map(|event| event["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=all.len() as u64).collect::<Vec<_>>());
    assert_eq!(all.last().unwrap()["state"], "completed");
    let last = (all.len() - 2).to_string();
    assert_eq!(events(rest(&desk, &path, &[("last-event-id", &last)]).await.2), all[all.len() - 2..]);
    assert_eq!(events(rest(&desk, &format!("{path}?from={last}"), &[]).await.2), all[all.len() - 3..]);
    assert_eq!(rest(&desk, &path, &[("last-event-id", "x")]).await.0, 400);
    assert_eq!(rest(&desk, "/v1/videos/x/events", &[]).await.0, 404);
}

#[tokio::test]
async fn a_nearly_full_disk_refuses_with_the_reason_and_what_runs_goes_on() {
    let script = Arc::new(Script::default());
    let (desk, id) = start(&script, 1).await;
    desk.ended(id).await;
    let Desk { gateway, folder } = desk;
    gateway.drain(Duration::ZERO).await;
    drop(gateway);
    let options = Options { data_dir: folder.path().to_owned(), min_free_bytes: u64::MAX, ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&script)).await.unwrap();
    let fault = gateway.admit(&Order::default()).await.unwrap_err();
    assert_eq!(fault.code(), tonic::Code::ResourceExhausted);
    assert!(fault.message.contains("disk of the data folder is full") && fault.retryable(), "{fault}");
    gateway.store().video(&id.to_string()).await.unwrap();
}

#[tokio::test]
async fn the_queue_serves_callers_in_turn_and_says_who_is_when_and_how_many_are_allowed() {
    let script = Arc::new(Script::default());
    let options = Options { concurrent: 1, queue_per_caller: Some(3), ..Options::default() };
    let desk = Desk::with(&script, options).await;
    let order = |caller: &str, priority| Order { caller: caller.into(), priority, ..Order::default() };
    let request = |order| Upload { order, ..upload(GenerationSpec { steps: Some(1), ..Default::default() }, 2) };
    // From then on the time of a generation is known.
    let first = desk.accept(request(order("z", 0))).await.unwrap();
    desk.ended(first).await;
    *script.hold.lock().unwrap() = Some(0);
    let mut ids = Vec::new();
    for (caller, priority) in [("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 1)] {
        ids.push(desk.accept(request(order(caller, priority))).await.unwrap());
        if ids.len() == 1 {
            until(|| script.opened.load(Ordering::SeqCst) > 1).await;
        }
    }
    let full = desk.gateway.admit(&order("a", 9)).await.unwrap_err();
    assert!(matches!(full.kind, Kind::Busy { .. }) && full.message.contains("3 are allowed"), "{full}");
    assert!(desk.gateway.admit(&order("d", 0)).await.is_ok());
    for (id, place) in ids.iter().zip([0, 3, 4, 2, 1]) {
        let generation = desk.gateway.get(&id.to_string()).await.unwrap();
        assert_eq!(generation.queue_position, place, "{generation:?}");
        assert_eq!(generation.estimated_start_unix_ms.is_some(), place > 0);
    }
    *script.hold.lock().unwrap() = None;
    let mut began = Vec::new();
    for id in &ids {
        desk.ended(*id).await;
        let events = desk.events(*id).await;
        let first = events.iter().find(|event| event.state() == GenerationState::Encoding).unwrap();
        began.push((first.unix_ms, *id));
    }
    began.sort();
    let order: Vec<usize> = began.iter().map(|(_, id)| ids.iter().position(|one| one == id).unwrap()).collect();
    assert_eq!(order, [0, 4, 3, 1, 2]);
}

#[tokio::test]
async fn a_short_generation_does_not_wait_for_a_long_one() {
    let script = Arc::new(Script { hold: Mutex::new(Some(1)), ..Script::default() });
    let desk = Desk::new(&script).await;
    let long = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 2)).await.unwrap();
    until(|| script.predicted.load(Ordering::SeqCst) > 0).await;
    let short = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 2)).await.unwrap();
    assert_eq!(desk.ended(short).await.state(), GenerationState::Completed);
    let running = desk.gateway.get(&long.to_string()).await.unwrap();
    assert!(!life::is_terminal(running.state()), "{running:?}");
}
