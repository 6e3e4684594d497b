//! Whole generations against fake stages.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use proto::v1::{GenerationSpec, GenerationState, Stage};

use crate::{
    Gateway, Options,
    fakes::{self, Script},
    fault::Kind,
    intake::Upload,
    store::Record,
};

fn upload(steps: u32) -> Upload {
    let mut picture = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(64, 64, image::Rgb([90, 120, 150]))
        .write_to(&mut picture, image::ImageFormat::Png)
        .unwrap();
    let mut audio = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data".to_vec();
    let samples = 3200u32; // 5 frames
    audio[4..8].copy_from_slice(&(36 + 2 * samples).to_le_bytes());
    audio.extend((2 * samples).to_le_bytes());
    audio.extend((0..samples).flat_map(|i| ((i % 100) as i16 * 90).to_le_bytes()));
    let spec = GenerationSpec {
        steps: Some(steps),
        size: Some(64),
        guidance_scale: Some(7.5),
        flow_shift: Some(5.0),
        ..Default::default()
    };
    Upload { spec, picture: picture.into_inner(), audio }
}

async fn start(script: &Arc<Script>, steps: u32) -> (Gateway, Arc<Record>) {
    let gateway = Gateway::new(&Options::default(), fakes::start(script)).unwrap();
    let place = gateway.admit().unwrap();
    let record = gateway.accept(upload(steps), place).await.unwrap();
    (gateway, record)
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

#[tokio::test]
async fn survives_a_lost_session() {
    let script = Arc::new(Script { lose_session_at: Some(1), ..Script::default() });
    let (_gateway, record) = start(&script, 3).await;
    assert_eq!(ended(&record).await.state(), GenerationState::Completed);
    assert_eq!(script.opened.load(Ordering::SeqCst), 2);
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
