//! How long a generation may take, and what it took.

use planner::{Bytes, Device, ModelTable, cost::work::Rates};

use super::*;
use crate::planning::{Fleet, FleetSource};

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

/// A fleet whose devices take no time, as far as anybody foresees.
fn at_once() -> FleetSource {
    let rates =
        Rates { products: 1e30, attention: 1e30, convolutions: 1e30, weights: 1e30, files: 1e30, ..Rates::CUDA };
    let device = Device { rates, ..Device::card(0, Bytes(1 << 40)) };
    let ask = move |_| Ok(Fleet { table: ModelTable::published()?, devices: vec![device.clone()], placement: None });
    FleetSource::new(ask)
}

#[tokio::test]
async fn a_first_call_that_takes_much_longer_than_foreseen_is_too_late_even_while_its_worker_gets_on() {
    let stalls = vec![(Stage::TextEncoder, 0)];
    let script = Arc::new(Script { stalls, gets_on: true, ..Script::default() });
    let mut desk = Desk::with(&script, allowing(2)).await;
    desk.gateway = desk.gateway.planning_for(at_once());
    let id = desk.accept(upload(GenerationSpec { steps: Some(2), ..Default::default() }, 5)).await.unwrap();
    let failure = desk.ended(id).await.failure.unwrap();
    assert_eq!(failure.code, "DEADLINE_EXCEEDED", "{failure:?}");
    assert_eq!(script.opened.load(Ordering::SeqCst), 0);
}
