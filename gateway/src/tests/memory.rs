//! Stages that run out of memory, and devices that are nearly full.

use super::*;

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
