//! Whole generations against fake stages.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt as _;
use proto::v1::{FaceBox, GenerationSpec, GenerationState, Parity, PassMode, Stage};

use crate::{
    Gateway, Options,
    fakes::{self, Script},
    fault::Kind,
    intake::Upload,
    store::Record,
};

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
    Upload { spec, picture: picture.into_inner(), audio }
}

async fn start(script: &Arc<Script>, steps: u32) -> (Gateway, Arc<Record>) {
    start_with(script, GenerationSpec { steps: Some(steps), ..Default::default() }, 5).await
}

async fn start_with(script: &Arc<Script>, spec: GenerationSpec, frames: u32) -> (Gateway, Arc<Record>) {
    let gateway = Gateway::new(&Options::default(), fakes::start(script)).unwrap();
    let place = gateway.admit().unwrap();
    let record = gateway.accept(upload(spec, frames), place).await.unwrap();
    (gateway, record)
}

/// The settings of a generation under the reference's rules.
fn by_the_reference(steps: u32) -> GenerationSpec {
    GenerationSpec { steps: Some(steps), parity: Parity::Reference.into(), ..Default::default() }
}

async fn ended(record: &Record) -> proto::v1::Generation {
    tokio::time::timeout(Duration::from_secs(60), record.wait_end()).await.unwrap();
    record.generation()
}

#[tokio::test]
async fn quirk_fixed_k_makes_a_video_with_a_warning_about_the_missing_face() {
    let script = Arc::new(Script::default());
    let (gateway, record) = start(&script, 3).await;
    let generation = ended(&record).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let outcome = generation.outcome.unwrap();
    assert_eq!(outcome.stages.len(), 5);
    assert!(outcome.warnings[0].contains("No face was found"));
    let video = std::fs::read(gateway.store().video_path(record.id())).unwrap();
    assert_eq!((video.len() as u64, crc32c::crc32c(&video)), (outcome.video_bytes, outcome.video_crc32c));
    assert!(script.sessions.lock().unwrap().is_empty());
    gateway.store().remove(&record.id().to_string()).await.unwrap();
    assert_eq!(std::fs::read_dir(gateway.store().dir()).unwrap().count(), 0);
}

/// 18 steps: by the reference's literals the second phase begins at step 10 and steps 16 and 17 are cached; by ours
/// the phase begins at step 4 and no step is cached.
#[tokio::test]
async fn by_the_references_rules_short_speech_is_denoised_at_full_length_in_its_literal_steps() {
    let script = Arc::new(Script::default());
    let (_gateway, record) = start_with(&script, by_the_reference(18), 5).await;
    let generation = ended(&record).await;
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
    let (gateway, record) = start_with(&script, by_the_reference(1), 800).await;
    let generation = ended(&record).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    assert_eq!((generation.frames, generation.heard_frames, generation.denoised_frames), (405, 400, 513));
    assert_eq!(script.samples.load(Ordering::SeqCst), 30 * 16_000, "the reference hears 30 s at most");
    assert_eq!(script.heard.load(Ordering::SeqCst), 400);
    let said = "The speech has 800 frames (32.00 s); with parity reference the first 400 (16.00 s) are heard";
    assert!(generation.outcome.unwrap().warnings[0].starts_with(said));
    let events: Vec<_> = Arc::clone(&record).events(1).collect().await;
    let warned = events.iter().position(|event| event.warning && event.message.starts_with(said)).unwrap();
    let denoised = events.iter().position(|event| event.state() == GenerationState::Denoising).unwrap();
    assert!(warned < denoised);
    let shown = std::process::Command::new("ffprobe")
        .args(["-v", "error", "-show_entries", "stream=duration", "-of", "csv=p=0"])
        .arg(gateway.store().video_path(record.id()))
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
    let (_gateway, record) = start_with(&script, spec, 450).await;
    let generation = ended(&record).await;
    assert_eq!((generation.frames, generation.heard_frames), (450, 450), "{generation:?}");
    assert_eq!(script.samples.load(Ordering::SeqCst), 450 * 640);
}

#[tokio::test]
async fn several_faces_reach_the_caller_with_the_one_chosen_and_how_to_choose_another() {
    let face = |x: f64, side: f64| FaceBox { x, y: 4.0, width: side, height: side, score: Some(0.9) };
    let faces = vec![face(2.0, 30.0), face(40.0, 12.0)];
    let script = Arc::new(Script { faces: faces.clone(), ..Script::default() });
    let (_gateway, record) = start(&script, 1).await;
    let outcome = ended(&record).await.outcome.unwrap();
    assert_eq!((&outcome.faces, outcome.face), (&faces, Some(faces[0])));
    assert!(outcome.warnings[0].contains("--face X,Y,W,H"), "{:?}", outcome.warnings);
    let events: Vec<_> = Arc::clone(&record).events(1).collect().await;
    let told = events.iter().find(|event| !event.faces.is_empty()).unwrap();
    assert!(told.warning && told.face == Some(faces[0]) && told.stage() == Stage::ImageEncoder);
}

#[tokio::test]
async fn survives_a_lost_session() {
    let script = Arc::new(Script { lose_session_at: Some(1), ..Script::default() });
    let (_gateway, record) = start(&script, 3).await;
    assert_eq!(ended(&record).await.state(), GenerationState::Completed);
    assert_eq!(script.opened.load(Ordering::SeqCst), 2);
}

/// A script in which calls of one stage find the device full.
fn full(stage: Stage, calls: impl IntoIterator<Item = usize>) -> Arc<Script> {
    Arc::new(Script { out_of_memory: calls.into_iter().map(|call| (stage, call)).collect(), ..Script::default() })
}

#[tokio::test]
async fn memory_that_ends_at_a_stages_first_call_is_made_free_and_the_call_repeated() {
    for stage in [Stage::AudioEncoder, Stage::TextEncoder, Stage::ImageEncoder, Stage::Diffusion, Stage::VaeDecode] {
        let script = full(stage, [0]);
        let (_gateway, record) = start(&script, 2).await;
        let generation = ended(&record).await;
        assert_eq!(generation.state(), GenerationState::Completed, "{stage:?}: {generation:?}");
        assert_eq!(script.unloads.load(Ordering::SeqCst), 4, "{stage:?}: the other four are unloaded");
        assert_eq!(script.passes.lock().unwrap().len(), 2, "{stage:?}: no step is repeated");
        let events: Vec<_> = Arc::clone(&record).events(1).collect().await;
        let told = events.iter().find(|event| event.message.contains("ran out of memory")).unwrap();
        assert!(told.stage() == stage && told.message.contains("unloaded") && !told.warning, "{told:?}");
    }
}

#[tokio::test]
async fn a_step_without_memory_goes_on_from_its_own_latents_with_one_pass_a_call() {
    let plain = Arc::new(Script::default());
    let (_gateway, record) = start(&plain, 4).await;
    ended(&record).await;
    // Call 0 opens the session; call 3 is step 2, and fails again after the other stages are gone.
    let script = full(Stage::Diffusion, [3, 4]);
    let (_gateway, record) = start(&script, 4).await;
    let generation = ended(&record).await;
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
    let (_gateway, record) = start_with(&script, by_the_reference(18), 5).await;
    let generation = ended(&record).await;
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
    let (_gateway, record) = start_with(&script, by_the_reference(18), 5).await;
    let failure = ended(&record).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::Diffusion));
    for part in ["900 bytes needed, 100 of 1000 free", "unloaded", "one pass a call", "no features kept"] {
        assert!(failure.message.contains(part), "{part} in {}", failure.message);
    }
    assert!(script.decodes.lock().unwrap().is_empty() && script.sessions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_decoder_without_memory_takes_smaller_tiles_and_never_repeats_a_step() {
    let script = full(Stage::VaeDecode, [0, 1, 2]);
    let (_gateway, record) = start(&script, 2).await;
    let generation = ended(&record).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let divisors: Vec<_> = script.decodes.lock().unwrap().iter().map(|header| header.tile_divisor).collect();
    assert_eq!(divisors, [1, 1, 2, 4]);
    assert_eq!(script.passes.lock().unwrap().len(), 2);
    let warnings = generation.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("tiles 4 times shorter")), "{warnings:?}");

    let script = full(Stage::VaeDecode, 0..20);
    let (_gateway, record) = start(&script, 2).await;
    let failure = ended(&record).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("RESOURCE_EXHAUSTED", Stage::VaeDecode));
    assert!(failure.message.contains("tiles 2 times shorter; tiles 4 times shorter"), "{failure:?}");
    assert_eq!((script.passes.lock().unwrap().len(), script.decodes.lock().unwrap().len()), (2, 4));
}

#[tokio::test]
async fn a_stage_that_refuses_the_prompt_fails_the_generation_with_the_field() {
    let script = Arc::new(Script { refuse_prompt: true, ..Script::default() });
    let (_gateway, record) = start(&script, 3).await;
    let failure = ended(&record).await.failure.unwrap();
    assert_eq!((failure.code.as_str(), failure.stage()), ("INVALID_ARGUMENT", Stage::TextEncoder));
    assert_eq!(record.fault().unwrap().field(), Some("prompt"));
}

#[tokio::test]
async fn a_velocity_that_is_not_finite_fails_with_the_step_and_frees_the_session() {
    let script = Arc::new(Script { not_finite_at: Some(1), ..Script::default() });
    let (_gateway, record) = start(&script, 3).await;
    let failure = ended(&record).await.failure.unwrap();
    assert!(failure.message.contains("step 2"), "{failure:?}");
    assert!(script.sessions.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_cancelled_generation_stops_in_the_middle_of_a_step() {
    let script = Arc::new(Script { predict_time: Duration::from_secs(30), ..Script::default() });
    let (gateway, record) = start(&script, 3).await;
    while script.opened.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    record.cancel_token().cancel();
    assert_eq!(ended(&record).await.state(), GenerationState::Cancelled);
    assert!(script.sessions.lock().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(gateway.store().dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_with_a_delay() {
    let options = Options { queue: 0, ..Options::default() };
    let gateway = Gateway::new(&options, fakes::start(&Arc::new(Script::default()))).unwrap();
    let place = gateway.admit().unwrap();
    assert!(matches!(gateway.admit().unwrap_err().kind, Kind::Busy { .. }));
    drop(place);
    assert!(gateway.admit().is_ok());
}
