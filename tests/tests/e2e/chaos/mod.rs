//! Nothing accepted is lost: processes are killed, stopped and asked at random moments. `make chaos` does it for longer.

pub mod calls;
pub mod cancels;
pub mod replicas;
pub mod rounds;

use std::{collections::BTreeSet, time::Duration};

use proto::v1::GenerationState;

use self::{
    calls::{Caller, Job},
    rounds::Plan,
};
use crate::stack::{Stack, tiny_models};

/// How long cancels may go on: as many of 20 as a slow machine does in that time.
const TIME: Duration = Duration::from_secs(15);

/// With the next test these are 25 rounds.
#[tokio::test(flavor = "multi_thread")]
async fn killed_processes_cost_nothing_that_was_accepted() {
    println!("{}", rounds::run(Plan { rounds: 12, seed: 1, on_postgresql: false }).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_postgresql_and_killed_processes_cost_nothing_that_was_accepted() {
    println!("{}", rounds::run(Plan { rounds: 13, seed: 2, on_postgresql: true }).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancels_at_random_moments_leave_no_memory_behind() {
    println!("{}", cancels::run(20, Some(TIME), 3).await);
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
                ids.insert(caller.try_create(&Job::new(1), "the-only-key").await.unwrap());
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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_or_killed_gateway_had_is_done_once_by_the_other() {
    println!("{}", replicas::run(Duration::from_secs(3), Duration::from_secs(8)).await);
}
