//! What is made of a request: the reference's rules, faces, tiers.

use super::*;

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
