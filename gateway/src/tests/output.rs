//! What comes out and is no video.

use super::*;

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
