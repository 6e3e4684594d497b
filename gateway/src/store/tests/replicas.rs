//! Several processes on one PostgreSQL and one folder of files.

use std::collections::BTreeSet;

use super::*;

/// A case for several processes.
macro_rules! on_one_server {
    ($($case:ident,)*) => {
        #[tokio::test(flavor = "multi_thread")]
        async fn every_case_of_several_processes_holds() {
            let mut server = Server::start().unwrap();
            $(
                eprintln!("{}", stringify!($case));
                $case(&Home::on_a_server(&server).await).await;
            )*
            what_happens_while_the_server_is_away_is_stored_once_it_is_back(&mut server).await;
        }
    };
}

on_one_server! {
    two_that_start_together_make_the_tables_once,
    each_generation_is_taken_by_one_and_what_an_ended_one_had_by_another,
    one_that_stood_still_and_comes_back_writes_nothing,
    a_watcher_and_a_cancel_reach_what_runs_elsewhere,
    a_start_leaves_alone_what_others_are_at,
    a_file_that_another_is_about_to_name_is_not_removed,
    a_session_that_stands_still_in_a_transaction_does_not_stop_the_others,
    a_commit_is_on_the_disk_before_it_is_answered_whatever_the_database_is_set_to,
}

async fn two_that_start_together_make_the_tables_once(home: &Home) {
    let opened = futures::future::join_all((0..4).map(|_| home.open())).await;
    let id = opened[0].create(accepted("")).await.unwrap().generation_id;
    for store in &opened {
        assert!(store.get(&id).await.is_ok());
    }
}

async fn each_generation_is_taken_by_one_and_what_an_ended_one_had_by_another(home: &Home) {
    let (first, second) = (home.open().await, home.open().await);
    let mut created = BTreeSet::new();
    for _ in 0..20 {
        created.insert(identity(&first.create(accepted("")).await.unwrap()));
    }
    let take = |store: &Store| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut taken = Vec::new();
            while let Some(lease) = store.claim_next().await.unwrap() {
                taken.push(lease);
            }
            taken
        })
    };
    let takers = [take(&first), take(&second), take(&first), take(&second)];
    let taken: Vec<_> = futures::future::join_all(takers).await.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(taken.iter().map(|lease| lease.id()).collect::<BTreeSet<_>>(), created);
    assert_eq!(taken.len(), created.len(), "none is taken twice");

    // The first one is gone, the second one gives signs of life.
    home.pass(LEASE_MS / 2);
    let (lost, held): (Vec<_>, Vec<_>) = taken.into_iter().partition(|lease| lease.is_of(&first));
    for lease in &held {
        assert_eq!(lease.renew().await.unwrap(), Some(false));
    }
    let lost: BTreeSet<Uuid> = lost.iter().map(|lease| lease.id()).collect();
    drop(first);
    assert!(second.claim_next().await.unwrap().is_none());
    home.pass(LEASE_MS / 2);
    let mut next = Vec::new();
    while let Some(lease) = second.claim_next().await.unwrap() {
        assert_eq!(lease.number(), 2);
        next.push(lease);
    }
    assert_eq!(next.iter().map(|lease| lease.id()).collect::<BTreeSet<_>>(), lost);
}

async fn one_that_stood_still_and_comes_back_writes_nothing(home: &Home) {
    let (paused, other) = (home.open().await, home.open().await);
    let (id, late) = driven(&paused).await;
    late.publish(to(GenerationState::Encoding)).await;
    late.checkpoint(1, "plan", &[1.0]).await.unwrap();
    home.pass(LEASE_MS);
    let next = other.claim_next().await.unwrap().unwrap();
    assert_eq!(next.resume("plan").await.unwrap().latents, [1.0]);
    // Its next sign of life tells it; whatever it does before is refused.
    late.checkpoint(2, "plan", &[2.0]).await.unwrap();
    late.publish(to(GenerationState::Failed)).await;
    assert!(late.lost().is_cancelled());
    let video = paused.work_dir().join("late.mp4");
    fs::write(&video, b"late video").unwrap();
    late.complete(video, to(GenerationState::Completed)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), late.keep_alive()).await.unwrap();
    for state in [GenerationState::Denoising, GenerationState::Decoding] {
        next.publish(to(state)).await;
    }
    let video = other.work_dir().join("video.mp4");
    fs::write(&video, b"video").unwrap();
    next.complete(video, to(GenerationState::Completed)).await.unwrap();
    let (events, ended) = paused.look(id, 1).await.unwrap();
    let states: Vec<GenerationState> = events.iter().map(GenerationEvent::state).collect();
    use GenerationState::{Completed, Decoding, Denoising, Encoding, Queued};
    assert_eq!((states, ended), (vec![Queued, Encoding, Denoising, Decoding, Completed], true));
    assert_eq!(paused.video(&id.to_string()).await.unwrap().artifact.hash, sha256(b"video"));
}

async fn a_watcher_and_a_cancel_reach_what_runs_elsewhere(home: &Home) {
    let (here, there) = (home.open().await, home.open().await);
    let (id, lease) = driven(&there).await;
    let watcher = tokio::spawn(here.events(id, 0).map(Result::unwrap).collect::<Vec<_>>());
    lease.publish(to(GenerationState::Encoding)).await;
    let cancelled = tokio::spawn({
        let (here, id) = (here.clone(), id.to_string());
        async move { here.cancel(&id).await.unwrap() }
    });
    let told = async {
        while lease.renew().await.unwrap() != Some(true) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), told).await.unwrap();
    lease.publish(to(GenerationState::Cancelled)).await;
    // On a machine that does much else the answer may come before the end; it is true either way.
    cancelled.await.unwrap();
    let numbers: Vec<u64> = watcher.await.unwrap().iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2, 3]);
}

async fn a_start_leaves_alone_what_others_are_at(home: &Home) {
    let first = home.open().await;
    let attached = first.create(Accepted { attached: true, ..accepted("call") }).await.unwrap().generation_id;
    let (id, lease) = driven(&first).await;
    let unfinished = first.work_dir().join("unfinished");
    fs::write(&unfinished, b"half a video").unwrap();
    let ([kept], naming) = first.keep([b"not named yet".to_vec()]).await.unwrap();
    let second = home.open().await;
    assert!(second.get(&attached).await.is_ok());
    assert!(second.claim(id).await.unwrap().is_none());
    assert!(unfinished.exists());
    assert!(second.inner.artifacts.read(&kept).await.is_ok());
    naming.release().await;
    lease.publish(to(GenerationState::Encoding)).await;
    assert!(!lease.lost().is_cancelled());
    // Alone is whoever keeps the records in the folder.
    let error = Store::open(home.dir(), &Records::default()).await.unwrap_err().to_string();
    assert!(error.contains("another process uses it"), "{error}");
}

async fn a_file_that_another_is_about_to_name_is_not_removed(home: &Home) {
    let (first, second) = (home.open().await, home.open().await);
    let (id, lease) = driven(&second).await;
    let ([mine], naming) = first.keep([b"the same bytes".to_vec()]).await.unwrap();
    naming.release().await;
    let ([kept], naming) = second.keep([b"the same bytes".to_vec()]).await.unwrap();
    // The first one needs it no more, the second one has not said yet that it does.
    first.remove_unused(vec![mine.hash.clone()]).await.unwrap();
    let key = (id, lease.number(), role::FEATURES);
    assert!(second.inner.ledger.keep_stage_output(key, ("key", &kept), unix_ms()).await.unwrap());
    naming.release().await;
    first.remove_unused(vec![mine.hash]).await.unwrap();
    assert_eq!(lease.read(role::FEATURES).await.unwrap(), b"the same bytes");
}

async fn a_session_that_stands_still_in_a_transaction_does_not_stop_the_others(home: &Home) {
    let store = home.open().await;
    let stuck = identity(&store.create(accepted("")).await.unwrap());
    let free = identity(&store.create(accepted("")).await.unwrap());
    let engine = home.engine().await;
    let mut standing = engine.begin(engine::Access::Write).await.unwrap();
    let change = "UPDATE generations SET priority = 0 WHERE id = $1";
    assert_eq!(standing.execute(change, &[stuck.to_string().into()]).await.unwrap(), 1);
    // The row is passed over.
    let lease = store.claim_next().await.unwrap().unwrap();
    assert_eq!(lease.id(), free);
    // The server ends the session, and with it what it kept from the others.
    let taken = async {
        loop {
            if let Some(lease) = store.claim_next().await.unwrap() {
                break lease.id();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(120), taken).await.unwrap(), stuck);
    assert!(matches!(standing.commit().await, Err(SqlError::Away(_))));
}

async fn a_commit_is_on_the_disk_before_it_is_answered_whatever_the_database_is_set_to(home: &Home) {
    home.run("ALTER ROLE CURRENT_USER SET synchronous_commit = off", &[]).await;
    let mut transaction = home.engine().await.begin(engine::Access::Read).await.unwrap();
    let shown = transaction.rows("SHOW synchronous_commit", &[]).await.unwrap();
    assert_eq!(shown[0].text(0).unwrap(), "on");
}

/// The server is killed, so that what was said to be stored must be there, and comes back.
async fn what_happens_while_the_server_is_away_is_stored_once_it_is_back(server: &mut Server) {
    let home = Home::on_a_server(server).await;
    let store = home.open().await;
    let (id, lease) = driven(&store).await;
    lease.publish(to(GenerationState::Encoding)).await;
    server.kill();
    let waiting = tokio::spawn({
        let lease = Arc::clone(&lease);
        async move {
            lease.checkpoint(3, "plan", &[3.0]).await.unwrap();
            lease.publish(to(GenerationState::Denoising)).await;
            lease.read(role::PICTURE).await.unwrap()
        }
    });
    let refused = store.get(&id.to_string()).await.unwrap_err();
    assert_eq!(refused.kind, Kind::Unavailable, "{refused}");
    server.resume().unwrap();
    assert_eq!(tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap().unwrap(), b"picture");
    let (events, _) = store.look(id, 1).await.unwrap();
    let numbers: Vec<u64> = events.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert_eq!(store.get(&id.to_string()).await.unwrap().state(), GenerationState::Denoising);
    drop((lease, store));
    let store = home.open_after_a_stop().await;
    assert_eq!(store.claim(id).await.unwrap().unwrap().resume("plan").await.unwrap().latents, [3.0]);
}
