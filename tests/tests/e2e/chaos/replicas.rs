//! Two gateways on one database and one folder, of which one stands still and is killed.

use std::{
    fmt,
    time::{Duration, Instant},
};

use postgres_server::Server;
use proto::v1::GenerationState;

use super::{
    calls::{Caller, Job, is_unfinished, until},
    rounds::undisturbed,
};
use crate::stack::{Stack, tiny_models};

/// Generations that wait or run when one gateway stops.
const AT_ONCE: u64 = 5;
const STEPS: u32 = 10;

/// What was done. That there is a report says that each generation was completed once, with the undisturbed video.
#[derive(Debug)]
pub struct Report {
    lease: Duration,
    paused: Duration,
    generations: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| two gateways on PostgreSQL, lease {} s | |", self.lease.as_secs())?;
        writeln!(f, "| --- | ---: |")?;
        writeln!(f, "| one stood still (SIGSTOP), s | {:.0} |", self.paused.as_secs_f64())?;
        writeln!(f, "| then it was killed | 1 |")?;
        writeln!(f, "| generations accepted | {} |", self.generations)?;
        writeln!(f, "| completed once, with the undisturbed video | {} |", self.generations)?;
        write!(f, "| lost, doubled or with other bits | 0 |")
    }
}

/// Stops one of the gateways for `pause` at least, and later kills it, while both have generations.
pub async fn run(lease: Duration, pause: Duration) -> Report {
    assert!(pause > lease, "a shorter pause takes nothing away");
    let (models, server) = (tiny_models(), Server::start().unwrap());
    let (database, seconds) = (server.url("postgres"), lease.as_secs().to_string());
    let stack = Stack::six_with(&models, &["--database", &database, "--lease", &seconds, "--concurrent", "2"]);
    let mut second = stack.another_gateway();
    let mut caller = Caller::connect(&stack.grpc()).await;
    let (mut made, mut paused) = (Vec::new(), Duration::ZERO);
    for killed in [false, true] {
        let first = made.len() as u64;
        for number in first..first + AT_ONCE {
            let job = Job { steps: STEPS, ..Job::new(number) };
            made.push((caller.try_create(&job, "").await.unwrap(), job));
        }
        // Two run in each, so the second one has at least one of them.
        until("both gateways drive something", async || {
            let all = caller.list().await;
            all.iter().filter(|one| is_unfinished(one) && one.state() != GenerationState::Queued).count() >= 3
        })
        .await;
        let stopped = Instant::now();
        if killed {
            second.kill();
        } else {
            second.signal("STOP");
        }
        for (id, _) in &made {
            assert_eq!(caller.ended(id).await.state(), GenerationState::Completed, "killed: {killed}");
        }
        if !killed {
            tokio::time::sleep(pause.saturating_sub(stopped.elapsed())).await;
            paused = stopped.elapsed();
            second.signal("CONT");
            // It answers again, and knows what the other one did meanwhile.
            let late = Caller::connect(&format!("http://{}", second.address("grpc"))).await;
            for (id, _) in &made {
                assert_eq!(late.ended(id).await.state(), GenerationState::Completed);
            }
        }
    }
    let jobs: Vec<Job> = made.iter().map(|(_, job)| *job).collect();
    let undisturbed = undisturbed(&models, &jobs).await;
    let folder = tempfile::tempdir().unwrap();
    for ((id, job), wanted) in made.iter().zip(undisturbed) {
        caller.check_events(id).await;
        assert!(caller.video(id, folder.path()).await == wanted, "another video of {job:?}");
    }
    assert_eq!(caller.list().await.len(), made.len());
    Report { lease, paused, generations: made.len() }
}
