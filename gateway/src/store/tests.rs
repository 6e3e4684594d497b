//! The store by itself: random lives, schemas of other programs, watchers, hostile ids.

use futures::StreamExt as _;
use proptest::prelude::*;

use super::*;

fn accepted(key: &str) -> Accepted {
    Accepted {
        generation: Generation::default(),
        picture: b"picture".to_vec(),
        audio: b"audio".to_vec(),
        order: Order { idempotency_key: key.to_owned(), ..Order::default() },
        request_hash: sha256(key.as_bytes()),
        attached: false,
    }
}

fn to(state: GenerationState) -> Change {
    Change { state: Some(state), ..Change::default() }
}

async fn open() -> (Store, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Store::open(dir.path()).await.unwrap(), dir)
}

/// A generation that this process drives.
async fn driven(store: &Store) -> (Uuid, Arc<Lease>) {
    let id = identity(&store.create(accepted("")).await.unwrap());
    (id, store.claim(id).await.unwrap().unwrap())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is asked for, in whatever order, with restarts in between: the events are numbered without gaps, each
    /// state may follow the one before, and the record says what the last event says.
    #[test]
    fn a_random_life_is_a_possible_one(asked in prop::collection::vec(0_i32..9, 1..24)) {
        runtime().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut store = Store::open(dir.path()).await.unwrap();
            let id = identity(&store.create(accepted("")).await.unwrap());
            let mut lease = store.claim(id).await.unwrap();
            for number in asked {
                if let (Ok(state), Some(lease)) = (GenerationState::try_from(number), &lease) {
                    lease.publish(to(state)).await;
                } else {
                    drop((lease.take(), store));
                    store = Store::open(dir.path()).await.unwrap();
                    lease = store.claim(id).await.unwrap();
                }
            }
            let generation = store.get(&id.to_string()).await.unwrap();
            let (events, ended) = store.look(id, 1).await.unwrap();
            let mut before = GenerationState::Unspecified;
            for (event, number) in events.iter().zip(1..) {
                assert_eq!(event.number, number);
                assert!(life::may_follow(before, event.state()), "{before:?} to {:?}", event.state());
                before = event.state();
            }
            assert_eq!(generation.state(), before);
            assert_eq!(life::is_terminal(before), ended);
            assert_eq!(generation.ended_unix_ms > 0, ended);
        });
    }
}

#[tokio::test]
async fn an_id_that_is_none_is_not_found() {
    let (store, _dir) = open().await;
    for id in ["", "../../etc/passwd", "\0", &"9".repeat(100_000), "0190163d-8694-739b-aea5-966c26f8ad91"] {
        assert_eq!(store.get(id).await.unwrap_err().kind, Kind::NotFound);
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let error = Store::open(Path::new("/dev/null/data")).await.unwrap_err();
    assert!(error.to_string().contains("/dev/null/data"), "{error}");
}

#[tokio::test]
async fn a_schema_of_a_newer_program_is_refused_with_a_sentence() {
    let (store, dir) = open().await;
    drop(store);
    let engine = Sqlite::open(&dir.path().join("avatar.db")).await.unwrap();
    let mut transaction = engine::Engine::begin(&engine, engine::Access::Write).await.unwrap();
    transaction.execute("UPDATE schema_version SET version = $1", &[99_i64.into()]).await.unwrap();
    transaction.commit().await.unwrap();
    drop(engine);
    let error = Store::open(dir.path()).await.unwrap_err().to_string();
    assert!(error.contains("its schema has version 99") && error.contains("use a newer program"), "{error}");
}

#[tokio::test]
async fn a_watcher_gets_every_event_once_and_the_rest_when_it_comes_back() {
    let (store, _dir) = open().await;
    let (id, lease) = driven(&store).await;
    let watcher = tokio::spawn(store.events(id, 0).map(Result::unwrap).collect::<Vec<_>>());
    for state in [GenerationState::Encoding, GenerationState::Denoising, GenerationState::Denoising] {
        lease.publish(to(state)).await;
        tokio::task::yield_now().await;
    }
    lease.publish(to(GenerationState::Failed)).await;
    lease.publish(to(GenerationState::Completed)).await;
    let numbers = |events: Vec<GenerationEvent>| events.iter().map(|event| event.number).collect::<Vec<_>>();
    assert_eq!(numbers(watcher.await.unwrap()), [1, 2, 3, 4, 5]);
    let rest = |from| store.events(id, from).map(Result::unwrap).collect::<Vec<_>>();
    assert_eq!(numbers(rest(4).await), [4, 5]);
    assert!(rest(6).await.is_empty() && rest(u64::MAX).await.is_empty());
    assert_eq!(rest(5).await[0].state(), GenerationState::Failed);
}

#[tokio::test]
async fn whoever_lost_the_lease_writes_nothing() {
    let (store, _dir) = open().await;
    let (id, late) = driven(&store).await;
    late.publish(to(GenerationState::Encoding)).await;
    // As if the holder had stood still for longer than its lease.
    store.inner.ledger.release_all().await.unwrap();
    lock(&store.inner.running).clear();
    let next = store.claim(id).await.unwrap().unwrap();
    late.publish(to(GenerationState::Failed)).await;
    assert!(late.lost().is_cancelled());
    late.checkpoint(1, "plan", &[1.0]).await.unwrap();
    assert!(next.read(role::LATENTS).await.is_err(), "its latents are not stored either");
    assert_eq!(store.inner.artifacts.hashes().unwrap().len(), 2, "nor does their file stay");
    next.publish(to(GenerationState::Denoising)).await;
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Denoising);
}

#[tokio::test]
async fn what_no_record_names_is_removed_at_the_start() {
    let (store, dir) = open().await;
    let (id, lease) = driven(&store).await;
    let orphan = store.inner.artifacts.put(b"written, and then the power went").unwrap();
    lease.checkpoint(1, "plan", &[1.0, -2.0]).await.unwrap();
    drop((lease, store));
    let store = Store::open(dir.path()).await.unwrap();
    assert!(store.inner.artifacts.read(&orphan).is_err());
    let lease = store.claim(id).await.unwrap().unwrap();
    let resumed = lease.resume("plan").await.unwrap();
    assert_eq!((resumed.step, resumed.latents), (1, vec![1.0, -2.0]));
    assert!(lease.resume("another").await.is_none());
    assert_eq!(lease.read(role::PICTURE).await.unwrap(), b"picture");
    lease.release().await;
    drop(lease);
    store.remove(&id.to_string()).await.unwrap();
    assert!(store.inner.artifacts.hashes().unwrap().is_empty());
}

#[tokio::test]
async fn damaged_latents_are_not_gone_on_with() {
    let (store, dir) = open().await;
    let (_, lease) = driven(&store).await;
    lease.checkpoint(1, "plan", &[1.0, -2.0]).await.unwrap();
    let (id, hash) = (lease.id(), store.inner.ledger.artifact(lease.id(), role::LATENTS).await.unwrap().unwrap().hash);
    drop((lease, store));
    fs::write(dir.path().join("artifacts").join(&hash[..2]).join(&hash), [0; 8]).unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    assert!(store.claim(id).await.unwrap().unwrap().resume("plan").await.is_none());
}

#[tokio::test]
async fn files_that_two_generations_share_stay_until_both_are_gone() {
    let (store, _dir) = open().await;
    let first = store.create(accepted("")).await.unwrap().generation_id;
    let second = store.create(accepted("")).await.unwrap().generation_id;
    assert_eq!(store.inner.artifacts.hashes().unwrap().len(), 2);
    store.remove(&first).await.unwrap();
    assert_eq!(store.inner.artifacts.hashes().unwrap().len(), 2);
    store.remove(&second).await.unwrap();
    assert!(store.inner.artifacts.hashes().unwrap().is_empty());
}

#[tokio::test]
async fn what_is_kept_longer_or_is_more_than_wanted_goes_the_longest_ended_first() {
    let (store, _dir) = open().await;
    let mut ended = Vec::new();
    for _ in 0..3 {
        let (id, lease) = driven(&store).await;
        lease.publish(to(GenerationState::Failed)).await;
        // Times differ, so that there is an order.
        while store.get(&id.to_string()).await.unwrap().ended_unix_ms == unix_ms() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ended.push(id.to_string());
    }
    let running = driven(&store).await.0.to_string();
    let all = Retention { age: Some(Duration::from_secs(3600)), bytes: Some(1 << 20), ..Retention::default() };
    store.tidy(&all).await.unwrap();
    assert!(store.get(&ended[0]).await.is_ok(), "nothing is old, and it is not much");
    // All share the files of 12 bytes, so only the last one's end makes room: what runs is never removed.
    store.tidy(&Retention { bytes: Some(11), ..Retention::default() }).await.unwrap();
    assert_eq!(store.get(&ended[2]).await.unwrap_err().kind, Kind::NotFound);
    assert!(store.get(&running).await.is_ok());
    let (id, lease) = driven(&store).await;
    lease.publish(to(GenerationState::Cancelled)).await;
    let old = store.get(&id.to_string()).await.unwrap().ended_unix_ms;
    while unix_ms() == old {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    store.tidy(&Retention { age: Some(Duration::ZERO), ..Retention::default() }).await.unwrap();
    assert_eq!(store.get(&id.to_string()).await.unwrap_err().kind, Kind::NotFound);
}

#[tokio::test]
async fn stage_outputs_that_nobody_used_lately_go_first_and_those_in_use_keep_their_file() {
    let (store, _dir) = open().await;
    let (_, lease) = driven(&store).await;
    lease.keep_stage_output(role::FEATURES, "old", b"0123456789".to_vec()).await.unwrap();
    let kept = unix_ms();
    while unix_ms() == kept {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    lease.keep_stage_output(role::TEXT_STATES, "new", b"abcdefghij".to_vec()).await.unwrap();
    store.tidy(&Retention { stage_output_bytes: 15, ..Retention::default() }).await.unwrap();
    assert!(lease.stage_output(role::FEATURES, "old").await.is_none());
    assert_eq!(lease.stage_output(role::TEXT_STATES, "new").await.unwrap(), b"abcdefghij");
    assert_eq!(lease.read(role::FEATURES).await.unwrap(), b"0123456789", "the generation still has it");
}
