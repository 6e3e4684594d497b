//! The store by itself, on every database: random lives, schemas of other programs, watchers, leases, hostile ids.

mod home;
mod replicas;

use bytes::Bytes;
use futures::StreamExt as _;
use postgres_server::Server;
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use proto::v1::GenerationEvent;

use self::home::{Home, LEASE_MS};
use super::{
    artifacts::sha256,
    engine::{Hold, SqlError},
    *,
};
use crate::intake::Order;

/// Runs the same cases on a file, with the files in a folder and in a bucket, each as a test of its own, and one after
/// the other on one PostgreSQL.
macro_rules! on_every_database {
    ($($case:ident,)*) => {
        mod on_a_file {
            $(
                #[tokio::test]
                async fn $case() {
                    super::$case(&super::Home::on_a_file().await).await;
                }
            )*
        }

        mod on_a_file_with_a_bucket {
            $(
                #[tokio::test]
                async fn $case() {
                    super::$case(&super::Home::with_a_bucket().await).await;
                }
            )*
        }

        #[tokio::test(flavor = "multi_thread")]
        async fn every_case_holds_on_postgresql() {
            let server = Server::start().unwrap();
            $(
                eprintln!("on PostgreSQL: {}", stringify!($case));
                $case(&Home::on_a_server(&server).await).await;
            )*
        }
    };
}

on_every_database! {
    an_id_that_is_none_is_not_found,
    random_lives_are_possible_ones,
    a_schema_of_a_newer_program_is_refused_with_a_sentence,
    records_of_the_first_release_are_taken_over,
    late_is_what_waits_and_has_a_deadline_that_has_passed,
    a_watcher_gets_every_event_once_and_the_rest_when_it_comes_back,
    whoever_lost_the_lease_writes_nothing,
    a_lease_ends_once_its_holder_gives_no_sign_of_life_for_that_long,
    a_change_that_was_stored_without_an_answer_is_stored_once,
    everything_that_waits_is_taken_once_however_many_take_at_once,
    what_no_record_names_is_removed_at_the_start,
    a_sweep_finds_files_without_records_and_records_without_files_while_all_goes_on,
    while_the_disk_is_full_nothing_is_accepted_what_runs_waits_and_then_all_goes_on,
    a_stages_output_whose_file_is_gone_is_forgotten_at_the_start,
    damaged_latents_are_not_gone_on_with,
    files_that_two_generations_share_stay_until_both_are_gone,
    a_file_that_is_about_to_be_named_is_not_removed,
    calls_of_an_ended_process_are_not_gone_on_with,
    lists_go_by_state_and_time_page_by_page,
    what_is_kept_longer_or_is_more_than_wanted_goes_the_longest_ended_first,
    what_ended_in_one_state_goes_by_its_own_limits_alone,
    stage_outputs_that_nobody_used_lately_go_first_and_those_in_use_keep_their_file,
}

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

/// A generation that this process drives.
async fn driven(store: &Store) -> (Uuid, Arc<Lease>) {
    let id = identity(&store.create(accepted("")).await.unwrap());
    (id, store.claim(id).await.unwrap().unwrap())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn wishes() -> impl Strategy<Value = Vec<i32>> {
    prop::collection::vec(0_i32..9, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_random_life_is_a_possible_one(asked in wishes()) {
        runtime().block_on(async { live(&Home::on_a_file().await, asked).await });
    }
}

async fn random_lives_are_possible_ones(home: &Home) {
    let mut runner = TestRunner::deterministic();
    for _ in 0..4 {
        live(home, wishes().new_tree(&mut runner).unwrap().current()).await;
    }
}

/// Whatever is asked for, in whatever order, with restarts in between: the events are numbered without gaps, each
/// state may follow the one before, and the record says what the last event says.
async fn live(home: &Home, asked: Vec<i32>) {
    let mut store = home.open().await;
    let id = identity(&store.create(accepted("")).await.unwrap());
    let mut lease = store.claim(id).await.unwrap();
    for number in asked {
        if let (Ok(state), Some(lease)) = (GenerationState::try_from(number), &lease) {
            lease.publish(to(state)).await;
        } else {
            drop((lease.take(), store));
            store = home.open_after_a_stop().await;
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
}

async fn an_id_that_is_none_is_not_found(home: &Home) {
    let store = home.open().await;
    for id in ["", "../../etc/passwd", "\0", &"9".repeat(100_000), "0190163d-8694-739b-aea5-966c26f8ad91"] {
        assert_eq!(store.get(id).await.unwrap_err().kind, Kind::NotFound);
    }
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let error = Store::open(Path::new("/dev/null/data"), &Records::default()).await.unwrap_err();
    assert!(error.to_string().contains("/dev/null/data"), "{error}");
}

async fn a_schema_of_a_newer_program_is_refused_with_a_sentence(home: &Home) {
    drop(home.open().await);
    home.run("UPDATE schema_version SET version = $1", &[99_i64.into()]).await;
    let error = Store::open(home.dir(), &home.records()).await.unwrap_err().to_string();
    assert!(error.contains("its schema has version 99") && error.contains("use a newer program"), "{error}");
    assert!(error.contains("avatar.db") || error.contains("postgres://avatar@127.0.0.1"), "{error}");
}

async fn records_of_the_first_release_are_taken_over(home: &Home) {
    let engine = home.engine().await;
    schema::first(&*engine).await.unwrap();
    let id = Uuid::now_v7();
    let generation = Generation {
        generation_id: id.to_string(),
        state: GenerationState::Queued.into(),
        deadline_unix_ms: Some(1),
        ..Generation::default()
    };
    let body = prost::Message::encode_to_vec(&generation);
    home.run(
        "INSERT INTO generations (id, state, ended_ms, last_event, caller, priority, idempotency_key, request_hash, \
         attached, cancel, lease, lease_until_ms, resume_step, resume_plan, body) \
         VALUES ($1, 1, 0, 1, '', 0, '', '', 0, 0, 7, 0, 0, '', $2)",
        &[id.to_string().into(), body.into()],
    )
    .await;
    drop(engine);
    let store = home.open().await;
    assert_eq!(store.inner.ledger.late(2).await.unwrap(), [id]);
    let lease = store.claim(id).await.unwrap().unwrap();
    assert_eq!((lease.id(), lease.number()), (id, 8));
    lease.publish(to(GenerationState::Encoding)).await;
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Encoding);
}

async fn late_is_what_waits_and_has_a_deadline_that_has_passed(home: &Home) {
    let store = home.open().await;
    let order = |seconds| Order { deadline_seconds: seconds, ..Order::default() };
    let create =
        async |seconds| identity(&store.create(Accepted { order: order(seconds), ..accepted("") }).await.unwrap());
    create(None).await;
    create(Some(86_400)).await;
    let soon = create(Some(3_600)).await;
    let ledger = &store.inner.ledger;
    assert!(ledger.late(unix_ms()).await.unwrap().is_empty());
    let later = unix_ms() + 7_200_000;
    assert_eq!(ledger.late(later).await.unwrap(), [soon]);
    let lease = store.claim(soon).await.unwrap().unwrap();
    assert!(ledger.late(later).await.unwrap().contains(&soon), "whoever drove it is gone by then");
    lease.publish(to(GenerationState::Failed)).await;
    assert!(ledger.late(later).await.unwrap().is_empty());
}

async fn a_watcher_gets_every_event_once_and_the_rest_when_it_comes_back(home: &Home) {
    let store = home.open().await;
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

async fn whoever_lost_the_lease_writes_nothing(home: &Home) {
    let store = home.open().await;
    let (id, late) = driven(&store).await;
    late.publish(to(GenerationState::Encoding)).await;
    // As if the holder had stood still for longer than its lease.
    home.pass(LEASE_MS);
    lock(&store.inner.running).clear();
    let next = store.claim(id).await.unwrap().unwrap();
    assert_eq!(next.number(), late.number() + 1);
    late.publish(to(GenerationState::Failed)).await;
    assert!(late.lost().is_cancelled());
    late.checkpoint(1, "plan", &[1.0]).await.unwrap();
    assert!(next.read(role::LATENTS).await.is_err(), "its latents are not stored either");
    late.keep_stage_output(role::FEATURES, "key", b"late".to_vec()).await.unwrap();
    assert!(next.read(role::FEATURES).await.is_err(), "nor what it got from a stage");
    assert!(next.stage_output(role::FEATURES, "key").await.is_none());
    next.keep_stage_output(role::FEATURES, "key", b"next".to_vec()).await.unwrap();
    assert!(late.stage_output(role::TEXT_STATES, "key").await.is_none());
    assert!(next.read(role::TEXT_STATES).await.is_err());
    let video = store.work_dir().join("late.mp4");
    fs::write(&video, b"late video").unwrap();
    late.complete(video, to(GenerationState::Completed)).await.unwrap();
    late.release().await;
    assert!(!next.lost().is_cancelled() && store.claim_next().await.unwrap().is_none());
    next.publish(to(GenerationState::Denoising)).await;
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Denoising);
    next.publish(to(GenerationState::Cancelled)).await;
    drop((late, next, store));
    let store = home.open().await;
    assert_eq!(store.inner.artifacts.hashes().await.unwrap(), [sha256(b"next")], "its files do not stay");
}

async fn a_lease_ends_once_its_holder_gives_no_sign_of_life_for_that_long(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    // Another holder would be in another process.
    lock(&store.inner.running).clear();
    home.pass(LEASE_MS - 5_000);
    assert!(store.claim(id).await.unwrap().is_none() && store.claim_next().await.unwrap().is_none());
    assert_eq!(lease.renew().await.unwrap(), Some(false));
    home.pass(LEASE_MS - 5_000);
    assert!(store.claim(id).await.unwrap().is_none() && store.claim_next().await.unwrap().is_none());
    home.pass(5_000);
    let next = store.claim_next().await.unwrap().unwrap();
    assert_eq!((next.id(), next.number()), (id, 2));
    assert_eq!(lease.renew().await.unwrap(), None, "what was lost is not got back");
    lease.release().await;
    lock(&store.inner.running).clear();
    assert!(store.claim(id).await.unwrap().is_none(), "nor can the late holder give it away");
}

async fn a_change_that_was_stored_without_an_answer_is_stored_once(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    let generation = store.get(&id.to_string()).await.unwrap();
    let event = GenerationEvent { number: 2, state: generation.state, ..GenerationEvent::default() };
    let append = || ledger::Append { generation: &generation, event: &event, keep: &[], drop: &[] };
    assert!(store.inner.ledger.append(lease.number(), append()).await.unwrap());
    assert!(store.inner.ledger.append(lease.number(), append()).await.unwrap());
    assert!(!store.inner.ledger.append(lease.number() + 1, append()).await.unwrap());
    let numbers: Vec<u64> = store.look(id, 1).await.unwrap().0.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2]);
}

async fn everything_that_waits_is_taken_once_however_many_take_at_once(home: &Home) {
    let store = home.open().await;
    let mut created = Vec::new();
    for _ in 0..24 {
        created.push(identity(&store.create(accepted("")).await.unwrap()));
    }
    let takers = (0..6).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut taken = Vec::new();
            while let Some(lease) = store.claim_next().await.unwrap() {
                assert_eq!(lease.number(), 1);
                taken.push(lease);
            }
            taken
        })
    });
    let taken: Vec<_> = futures::future::join_all(takers).await.into_iter().flat_map(Result::unwrap).collect();
    let mut ids: Vec<Uuid> = taken.iter().map(|lease| lease.id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, created);
}

async fn what_no_record_names_is_removed_at_the_start(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    let orphan = Artifact::of(b"written, and then the power went");
    store.inner.artifacts.put(Bytes::from_static(b"written, and then the power went"), &orphan).await.unwrap();
    lease.checkpoint(1, "plan", &[1.0, -2.0]).await.unwrap();
    drop((lease, store));
    let store = home.open_after_a_stop().await;
    assert!(store.inner.artifacts.read(&orphan).await.is_err());
    let lease = store.claim(id).await.unwrap().unwrap();
    let resumed = lease.resume("plan").await.unwrap();
    assert_eq!((resumed.step, resumed.latents), (1, vec![1.0, -2.0]));
    assert!(lease.resume("another").await.is_none());
    assert_eq!(lease.read(role::PICTURE).await.unwrap(), b"picture");
    lease.release().await;
    drop(lease);
    store.remove(&id.to_string()).await.unwrap();
    assert!(store.inner.artifacts.hashes().await.unwrap().is_empty());
}

async fn a_sweep_finds_files_without_records_and_records_without_files_while_all_goes_on(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    let orphan = Artifact::of(b"of a process that was killed");
    store.inner.artifacts.put(Bytes::from_static(b"of a process that was killed"), &orphan).await.unwrap();
    lease.keep_stage_output(role::FEATURES, "key", b"features".to_vec()).await.unwrap();
    lease.keep_stage_output(role::TEXT_STATES, "other key", b"states".to_vec()).await.unwrap();
    store.inner.artifacts.remove(&sha256(b"features")).await.unwrap();
    store.sweep().await.unwrap();
    assert!(!store.inner.artifacts.has(&orphan.hash).await.unwrap());
    assert!(lease.stage_output(role::FEATURES, "key").await.is_none(), "it is asked for again");
    assert_eq!(lease.stage_output(role::TEXT_STATES, "other key").await.unwrap(), b"states");
    assert_eq!(lease.read(role::PICTURE).await.unwrap(), b"picture");
    assert_eq!(store.inner.ledger.users_of(&sha256(b"picture")).await.unwrap(), [id.to_string()]);
    store.sweep().await.unwrap();
    assert_eq!(store.inner.artifacts.hashes().await.unwrap().len(), 3, "picture, recording and states");
}

async fn while_the_disk_is_full_nothing_is_accepted_what_runs_waits_and_then_all_goes_on(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    home.fill(true);
    let refused = store.create(accepted("")).await.unwrap_err();
    assert_eq!((refused.code(), refused.retryable()), (tonic::Code::ResourceExhausted, true), "{refused}");
    assert!(refused.message.contains("no space is left"), "{refused}");
    assert!(lease.checkpoint(1, "plan", &[1.0]).await.is_err());
    let video = store.work_dir().join("video.mp4");
    fs::write(&video, b"video").unwrap();
    let waiting = tokio::spawn({
        let lease = Arc::clone(&lease);
        async move {
            for state in [GenerationState::Encoding, GenerationState::Denoising, GenerationState::Decoding] {
                lease.publish(to(state)).await;
            }
            lease.complete(video, to(GenerationState::Completed)).await
        }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Queued);
    home.fill(false);
    while store.get(&id.to_string()).await.unwrap().state() != GenerationState::Decoding {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    home.fill(true);
    tokio::time::sleep(Duration::from_millis(20)).await;
    home.fill(false);
    tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap().unwrap().unwrap();
    let numbers: Vec<u64> = store.look(id, 1).await.unwrap().0.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5], "each is stored once");
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Completed);
    let kept = store.inner.ledger.artifact(id, role::VIDEO).await.unwrap().unwrap();
    assert_eq!(store.inner.artifacts.read(&kept).await.unwrap(), b"video");
    store.create(accepted("")).await.unwrap();
    store.sweep().await.unwrap();
    assert_eq!(store.inner.artifacts.hashes().await.unwrap().len(), 3, "nothing stays of what was refused");
}

async fn a_stages_output_whose_file_is_gone_is_forgotten_at_the_start(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    lease.keep_stage_output(role::FEATURES, "key", b"features".to_vec()).await.unwrap();
    lease.keep_stage_output(role::TEXT_STATES, "other key", b"states".to_vec()).await.unwrap();
    store.inner.artifacts.remove(&sha256(b"features")).await.unwrap();
    drop((lease, store));
    let store = home.open_after_a_stop().await;
    let lease = store.claim(id).await.unwrap().unwrap();
    assert!(lease.stage_output(role::FEATURES, "key").await.is_none());
    assert_eq!(lease.stage_output(role::TEXT_STATES, "other key").await.unwrap(), b"states");
}

async fn damaged_latents_are_not_gone_on_with(home: &Home) {
    let store = home.open().await;
    let (_, lease) = driven(&store).await;
    lease.checkpoint(1, "plan", &[1.0, -2.0]).await.unwrap();
    let (id, latents) = (lease.id(), store.inner.ledger.artifact(lease.id(), role::LATENTS).await.unwrap().unwrap());
    store.inner.artifacts.put(Bytes::from_static(&[0; 8]), &latents).await.unwrap();
    drop((lease, store));
    let store = home.open_after_a_stop().await;
    assert!(store.claim(id).await.unwrap().unwrap().resume("plan").await.is_none());
}

async fn files_that_two_generations_share_stay_until_both_are_gone(home: &Home) {
    let store = home.open().await;
    let first = store.create(accepted("")).await.unwrap().generation_id;
    let second = store.create(accepted("")).await.unwrap().generation_id;
    assert_eq!(store.inner.artifacts.hashes().await.unwrap().len(), 2);
    store.remove(&first).await.unwrap();
    assert_eq!(store.inner.artifacts.hashes().await.unwrap().len(), 2);
    store.remove(&second).await.unwrap();
    assert!(store.inner.artifacts.hashes().await.unwrap().is_empty());
}

async fn a_file_that_is_about_to_be_named_is_not_removed(home: &Home) {
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    let ([kept], naming) = store.keep([b"soon".to_vec()]).await.unwrap();
    let (other, hash) = (store.clone(), kept.hash.clone());
    let removal = tokio::spawn(async move { other.remove_unused(vec![hash]).await.unwrap() });
    tokio::task::yield_now().await;
    let key = (id, lease.number(), role::FEATURES);
    assert!(store.inner.ledger.keep_stage_output(key, ("key", &kept), unix_ms()).await.unwrap());
    naming.release().await;
    removal.await.unwrap();
    assert_eq!(lease.read(role::FEATURES).await.unwrap(), b"soon");
}

async fn calls_of_an_ended_process_are_not_gone_on_with(home: &Home) {
    let store = home.open().await;
    let attached = store.create(Accepted { attached: true, ..accepted("call") }).await.unwrap().generation_id;
    let on_its_own = store.create(accepted("job")).await.unwrap().generation_id;
    store.tidy(&Retention::default()).await.unwrap();
    assert!(store.get(&attached).await.is_ok(), "its process lives");
    drop(store);
    let store = home.open_after_a_stop().await;
    assert_eq!(store.get(&attached).await.unwrap_err().kind, Kind::NotFound);
    assert!(store.get(&on_its_own).await.is_ok());
}

async fn lists_go_by_state_and_time_page_by_page(home: &Home) {
    let store = home.open().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        let (id, lease) = driven(&store).await;
        lease.publish(to(GenerationState::Encoding)).await;
        lease.release().await;
        ids.push(id.to_string());
    }
    store.cancel(&ids[2]).await.unwrap();
    let page = |states: &[GenerationState], oldest_first, after| Listing {
        states: states.to_vec(),
        oldest_first,
        after,
        limit: 2,
        ..Listing::default()
    };
    let names = |listed: &[Generation]| listed.iter().map(|one| one.generation_id.clone()).collect::<Vec<_>>();
    let (first, next) = store.list(&page(&[], true, None)).await.unwrap();
    assert_eq!(names(&first), ids[..2]);
    let (second, _) = store.list(&page(&[], true, next)).await.unwrap();
    assert_eq!(names(&second), ids[2..4]);
    let (running, next) = store.list(&page(&[GenerationState::Encoding], false, None)).await.unwrap();
    assert_eq!(names(&running), [ids[4].clone(), ids[3].clone()]);
    let (rest, end) = store.list(&page(&[GenerationState::Encoding], false, next)).await.unwrap();
    assert_eq!((names(&rest), end), (vec![ids[1].clone(), ids[0].clone()], None));
    let ended = [GenerationState::Cancelled, GenerationState::Failed];
    assert_eq!(names(&store.list(&page(&ended, true, None)).await.unwrap().0), [ids[2].clone()]);
    assert_eq!(store.unfinished("").await.unwrap(), (4, 4));
    let late = Listing { created_from_ms: unix_ms() + 60_000, limit: 2, ..Listing::default() };
    assert!(store.list(&late).await.unwrap().0.is_empty());
}

async fn what_is_kept_longer_or_is_more_than_wanted_goes_the_longest_ended_first(home: &Home) {
    let store = home.open().await;
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
    let ages = |age| ByEnd::default().or(Some(age));
    let all = Retention { age: ages(Duration::from_secs(3600)), bytes: Some(1 << 20), ..Retention::default() };
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
    store.tidy(&Retention { age: ages(Duration::ZERO), ..Retention::default() }).await.unwrap();
    assert_eq!(store.get(&id.to_string()).await.unwrap_err().kind, Kind::NotFound);
}

async fn what_ended_in_one_state_goes_by_its_own_limits_alone(home: &Home) {
    let store = home.open().await;
    let mut ended = Vec::new();
    for state in [GenerationState::Cancelled, GenerationState::Failed, GenerationState::Failed] {
        let (id, lease) = driven(&store).await;
        // What a failure was made from stays: 12 bytes that both share, and 4 of its own.
        lease.checkpoint(1, "plan", &[ended.len() as f32]).await.unwrap();
        lease.publish(to(state)).await;
        while store.get(&id.to_string()).await.unwrap().ended_unix_ms == unix_ms() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ended.push(id.to_string());
    }
    let there = async || {
        let mut there = Vec::new();
        for id in &ended {
            there.push(store.get(id).await.is_ok());
        }
        there
    };
    let limits = ByEnd { failed: Some(20), completed: Some(0), cancelled: Some(0) };
    store.tidy(&Retention { bytes_by_end: limits, ..Retention::default() }).await.unwrap();
    assert_eq!(there().await, [true; 3], "nobody has more than may be");
    let limits = ByEnd { failed: Some(19), ..ByEnd::default() };
    store.tidy(&Retention { bytes_by_end: limits, ..Retention::default() }).await.unwrap();
    assert_eq!(there().await, [true, false, true], "the failure that is longest ago");
    let ages = ByEnd { failed: Some(Duration::ZERO), completed: Some(Duration::ZERO), cancelled: None };
    store.tidy(&Retention { age: ages, ..Retention::default() }).await.unwrap();
    assert_eq!(there().await, [true, false, false]);
}

async fn stage_outputs_that_nobody_used_lately_go_first_and_those_in_use_keep_their_file(home: &Home) {
    let store = home.open().await;
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

#[tokio::test]
async fn while_the_object_store_refuses_nothing_is_accepted_what_runs_waits_and_then_all_goes_on() {
    let home = Home::with_a_bucket().await;
    let store = home.open().await;
    let (ended, lease) = driven(&store).await;
    lease.checkpoint(1, "plan", &[9.0]).await.unwrap();
    lease.publish(to(GenerationState::Failed)).await;
    let (id, lease) = driven(&store).await;
    for state in [GenerationState::Encoding, GenerationState::Denoising, GenerationState::Decoding] {
        lease.publish(to(state)).await;
    }
    store.check_files().await.unwrap();
    home.moody().refuse(true);
    let refused = store.create(accepted("")).await.unwrap_err();
    assert!(refused.kind == Kind::Unavailable && refused.message.contains("object store"), "{refused}");
    assert_eq!(store.check_files().await.unwrap_err().kind, Kind::Unavailable);
    assert_eq!(lease.checkpoint(2, "plan", &[2.0]).await.unwrap_err().kind, Kind::Unavailable);
    store.remove(&ended.to_string()).await.unwrap();
    assert_eq!(store.tidy(&Retention::default()).await.unwrap_err().kind, Kind::Unavailable);
    let video = store.work_dir().join("video.mp4");
    fs::write(&video, b"video").unwrap();
    let before = home.moody().refused();
    let waiting = tokio::spawn({
        let lease = Arc::clone(&lease);
        async move {
            let picture = lease.read(role::PICTURE).await.unwrap();
            lease.complete(video, to(GenerationState::Completed)).await.unwrap();
            picture
        }
    });
    while home.moody().refused() == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!waiting.is_finished());
    home.moody().refuse(false);
    let picture = tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap().unwrap();
    assert_eq!(picture, b"picture");
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Completed);
    store.check_files().await.unwrap();
    store.tidy(&Retention::default()).await.unwrap();
    assert_eq!(store.inner.artifacts.hashes().await.unwrap(), [sha256(b"video")], "what was left is removed");
}

#[tokio::test]
async fn whoever_waits_for_the_object_store_can_be_cancelled() {
    let home = Home::with_a_bucket().await;
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    home.moody().refuse(true);
    let video = store.work_dir().join("video.mp4");
    fs::write(&video, b"video").unwrap();
    let waiting = tokio::spawn({
        let lease = Arc::clone(&lease);
        async move { lease.complete(video, to(GenerationState::Completed)).await }
    });
    while home.moody().refused() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    lease.cancel_token().cancel();
    let ended = tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap().unwrap();
    assert_eq!(ended.unwrap_err().kind, Kind::Cancelled);
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Queued);
}
