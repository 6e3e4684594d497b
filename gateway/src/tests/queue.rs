//! Who may come in, whose turn it is, and cancels.

use super::*;

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
async fn the_delay_of_a_refusal_is_what_is_left_of_the_one_that_runs_where_that_is_known() {
    let script = Arc::new(Script { predict_time: Duration::from_millis(200), ..Script::default() });
    let desk = Desk::with(&script, Options { queue: 0, concurrent: 1, ..Options::default() }).await;
    let request = |steps| upload(GenerationSpec { steps: Some(steps), ..Default::default() }, 2);
    let id = desk.accept(request(100)).await.unwrap();
    steps_done(&desk, id, 1).await;
    let Kind::Busy { retry_after } = desk.accept(request(1)).await.unwrap_err().kind else { panic!("it was taken") };
    assert!(retry_after > Duration::from_secs(15), "99 steps of 0.2 s and more: {retry_after:?}");
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
