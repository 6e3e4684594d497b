//! Nothing accepted is lost: processes are killed, stopped and asked at random moments. `make chaos` does it for longer.

pub mod calls;
pub mod cancels;
pub mod rounds;

use std::{collections::BTreeSet, time::Duration};

use postgres_server::Server;
use proto::v1::GenerationState;

use self::{
    calls::{Caller, Job},
    rounds::Plan,
};
use crate::stack::{Stack, tiny_models};

/// How long the kills of a test may go on: as many of 25 rounds as a slow machine does in that time.
const TIME: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn killed_processes_cost_nothing_that_was_accepted() {
    let plan = Plan { rounds: 25, time: Some(TIME), seed: 1, on_postgresql: false };
    println!("{}", rounds::run(plan).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgresql_and_killed_processes_cost_nothing_that_was_accepted() {
    let plan = Plan { rounds: 25, time: Some(TIME), seed: 2, on_postgresql: true };
    println!("{}", rounds::run(plan).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancels_at_random_moments_leave_no_memory_behind() {
    println!("{}", cancels::run(20, Some(TIME / 2), 3).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_creations_of_one_key_from_fifty_connections_are_one_generation() {
    let stack = Stack::one_with(&tiny_models(), &["--queue", "2000"]);
    let url = stack.grpc();
    let callers = (0..50).map(|_| {
        let url = url.clone();
        tokio::spawn(async move {
            let mut caller = Caller::connect(&url).await;
            let mut ids = BTreeSet::new();
            for _ in 0..20 {
                ids.insert(caller.try_create(&Job::new(1), "the only key").await.unwrap());
            }
            ids
        })
    });
    let mut ids = BTreeSet::new();
    for caller in callers.collect::<Vec<_>>() {
        ids.extend(caller.await.unwrap());
    }
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(Caller::connect(&url).await.list().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_there_after_a_kill_at_once() {
    let mut stack = Stack::one(&tiny_models());
    let mut ids = Vec::new();
    for number in 0..5 {
        let mut caller = Caller::connect(&stack.grpc()).await;
        let id = caller.try_create(&Job::new(number), "").await.unwrap();
        stack.kill_and_restart();
        ids.push(id);
    }
    let caller = Caller::connect(&stack.grpc()).await;
    for id in &ids {
        assert_eq!(caller.ended(id).await.state(), GenerationState::Completed);
    }
    assert_eq!(caller.list().await.len(), ids.len());
}

/// Two gateways on one database and one folder: one is stopped and goes on later, then it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_or_killed_gateway_had_is_done_once_by_the_other() {
    let (models, server) = (tiny_models(), Server::start().unwrap());
    let database = server.url("postgres");
    let stack = Stack::six_with(&models, &["--database", &database, "--lease", "3", "--concurrent", "2"]);
    let mut second = stack.another_gateway();
    let mut caller = Caller::connect(&stack.grpc()).await;
    let mut made = Vec::new();
    for killed in [false, true] {
        let first = made.len() as u64;
        for number in first..first + 5 {
            let job = Job { steps: 10, ..Job::new(number) };
            made.push((caller.try_create(&job, "").await.unwrap(), job));
        }
        // Two run in each, so the second one has at least one of them.
        calls::until("both gateways drive something", async || {
            let states = caller.list().await.into_iter().map(|one| one.state());
            let ended = |state: &GenerationState| *state as i32 >= GenerationState::Completed as i32;
            let states: Vec<GenerationState> = states.collect();
            let running = states.iter().filter(|state| **state != GenerationState::Queued && !ended(state));
            running.count() >= 3
        })
        .await;
        if killed {
            second.kill();
        } else {
            second.signal("STOP");
        }
        for (id, _) in &made {
            assert_eq!(caller.ended(id).await.state(), GenerationState::Completed, "killed: {killed}");
        }
        if !killed {
            second.signal("CONT");
            // It answers again, and knows what the other one did meanwhile.
            let late = Caller::connect(&format!("http://{}", second.address("grpc"))).await;
            for (id, _) in &made {
                assert_eq!(late.ended(id).await.state(), GenerationState::Completed);
            }
        }
    }
    let jobs: Vec<Job> = made.iter().map(|(_, job)| *job).collect();
    let undisturbed = rounds::undisturbed(&models, &jobs).await;
    let folder = tempfile::tempdir().unwrap();
    for ((id, job), wanted) in made.iter().zip(undisturbed) {
        caller.check_events(id).await;
        assert!(caller.video(id, folder.path()).await == wanted, "another video of {job:?}");
    }
    assert_eq!(caller.list().await.len(), made.len());
}
