//! Stages that lose what they had, stand still or stay away.

use super::*;

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

/// Three steps with workers that are taken for stuck early: after 50 ms where a pace is known, 3 s in a first call.
async fn watched(script: &Arc<Script>, options: Options) -> (Desk, Uuid) {
    let options = Options { stuck_after: Duration::from_millis(50), previews: 0, ..options };
    let desk = Desk::with(script, options).await;
    let spec = GenerationSpec { steps: Some(3), ..Default::default() };
    let id = desk.accept(upload(spec, 5)).await.unwrap();
    (desk, id)
}

async fn told(desk: &Desk, id: Uuid) -> Vec<String> {
    desk.events(id).await.into_iter().map(|event| event.message).collect()
}

/// The transformer's first call opens the session; the others are passes.
#[tokio::test]
async fn a_worker_that_stands_still_in_any_call_is_suspected_and_the_call_is_begun_again() {
    let undisturbed = Arc::new(Script::default());
    let (desk, id) = watched(&undisturbed, Options::default()).await;
    desk.ended(id).await;
    let stuck = |script: Script, name: &'static str| {
        let (script, undisturbed) = (Arc::new(script), undisturbed.clone());
        async move {
            let (desk, id) = watched(&script, Options::default()).await;
            let generation = desk.ended(id).await;
            assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
            let said = told(&desk, id).await;
            let suspected = format!("{name} is suspected to be stuck");
            assert!(said.iter().any(|message| message.contains(&suspected)), "{suspected}: {said:?}");
            let latents = script.decoded.lock().unwrap().last().cloned();
            assert!(latents == undisturbed.decoded.lock().unwrap().last().cloned(), "the latents are the same");
        }
    };
    let late = Script { stalls_late: AtomicUsize::new(1), ..Script::default() };
    let calls = [
        (Stage::AudioEncoder, 0, "audio-encoder"),
        (Stage::TextEncoder, 0, "text-encoder"),
        (Stage::ImageEncoder, 0, "image-encoder"),
        (Stage::Diffusion, 0, "diffusion"),
        (Stage::Diffusion, 1, "diffusion"),
        (Stage::Diffusion, 2, "diffusion"),
        (Stage::VaeDecode, 0, "vae-decode"),
    ];
    let calls = calls.map(|(stage, call, name)| (Script { stalls: vec![(stage, call)], ..Script::default() }, name));
    let all = calls.into_iter().chain([(late, "vae-decode")]).map(|(script, name)| stuck(script, name));
    futures::future::join_all(all).await;
}

#[tokio::test]
async fn a_worker_that_is_slow_and_gets_through_layers_is_waited_for() {
    let script = Arc::new(Script { beside_time: Duration::from_secs(5), gets_on: true, ..Script::default() });
    let (desk, id) = watched(&script, Options::default()).await;
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let said = told(&desk, id).await;
    assert!(!said.iter().any(|message| message.contains("suspected")), "{said:?}");
    for stage in ["audio-encoder", "text-encoder", "image-encoder", "vae-decode"] {
        let message = format!("{stage} has taken 3 s for a call, longer than was foreseen; it gets on");
        let times = said.iter().filter(|said| said.contains(&message)).count();
        assert_eq!(times, 1, "{message}: {said:?}");
    }
    assert_eq!((script.encoded.load(Ordering::SeqCst), script.decodes.lock().unwrap().len()), (3, 1));
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
