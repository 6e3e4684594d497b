//! Rounds of kills under four generations at once.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    time::{Duration, Instant},
};

use postgres_server::Server;
use proto::v1::GenerationState;

use super::calls::{Caller, Job, advance, is_unfinished, until};
use crate::stack::{Stack, tiny_models};

/// Generations at once.
const AT_ONCE: usize = 4;
/// Before a kill they advance by up to so many steps and changes of the state, all together; each has eight.
const ADVANCES: u64 = 12;
/// Up to so long after that, the kill comes: in the middle of whatever is done then.
const WITHIN_MS: u64 = 60;
const GATEWAY: &str = "gateway";
const POSTGRESQL: &str = "postgresql";
const VICTIMS: [&str; 5] = [GATEWAY, "diffusion", "vae-decode", "audio-encoder", POSTGRESQL];

/// What is done.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Kills.
    pub rounds: usize,
    /// Decides whom it hits, and when.
    pub seed: u64,
    /// The records are in PostgreSQL, which is killed too.
    pub on_postgresql: bool,
}

/// What was done. That there is a report says that nothing was lost, and that each video was the undisturbed one.
#[derive(Debug)]
pub struct Report {
    plan: Plan,
    kills: BTreeMap<&'static str, usize>,
    generations: usize,
    seconds: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let records = if self.plan.on_postgresql { "PostgreSQL" } else { "SQLite" };
        writeln!(f, "| records in {records}, seed {} | count |", self.plan.seed)?;
        writeln!(f, "| --- | ---: |")?;
        for (victim, times) in &self.kills {
            writeln!(f, "| {victim} killed | {times} |")?;
        }
        writeln!(f, "| generations accepted | {} |", self.generations)?;
        writeln!(f, "| completed once, with the undisturbed video | {} |", self.generations)?;
        writeln!(f, "| lost, doubled or with other bits | 0 |")?;
        write!(f, "| seconds | {} |", self.seconds)
    }
}

/// SplitMix64: the same seed throws the same numbers.
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below a limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// Kills, waits for all that was accepted, and holds it against undisturbed runs.
pub async fn run(plan: Plan) -> Report {
    let (began, models, folder) = (Instant::now(), tiny_models(), tempfile::tempdir().unwrap());
    let mut server = plan.on_postgresql.then(|| Server::start().unwrap());
    let mut flags = vec!["--concurrent", "4", "--lease", "3"];
    let url = server.as_ref().map(|server| server.url("postgres"));
    flags.extend(url.iter().flat_map(|url| ["--database", url]));
    let mut stack = Stack::six_with(&models, &flags);
    let victims = if plan.on_postgresql { &VICTIMS[..] } else { &VICTIMS[..4] };

    let (mut dice, mut deck) = (Dice(plan.seed), Vec::new());
    let (mut kills, mut made) = (BTreeMap::new(), Vec::new());
    for _ in 0..plan.rounds {
        let caller = Caller::connect(&stack.grpc()).await;
        fill(&caller, &mut made).await;
        random_moment(&caller, &made, &mut dice).await;
        if deck.is_empty() {
            deck = victims.to_vec();
        }
        let victim = deck.swap_remove(dice.below(deck.len() as u64) as usize);
        match (victim, &mut server) {
            (GATEWAY, _) => stack.kill_and_restart(),
            (POSTGRESQL, Some(server)) => {
                server.kill();
                server.resume().unwrap();
            }
            (stage, _) => stack.kill_and_restart_stage(stage, &models),
        }
        *kills.entry(victim).or_default() += 1;
    }

    let caller = Caller::connect(&stack.grpc()).await;
    for (id, job) in &made {
        let ended = caller.ended(id).await;
        assert_eq!(ended.state(), GenerationState::Completed, "{job:?}: {ended:?}");
        caller.check_events(id).await;
    }
    assert_eq!(caller.list().await.len(), made.len(), "a generation is lost or doubled");
    let jobs: Vec<Job> = made.iter().map(|(_, job)| *job).collect();
    for ((id, job), wanted) in made.iter().zip(undisturbed(&models, &jobs).await) {
        assert!(caller.video(id, folder.path()).await == wanted, "another video of {job:?}");
    }
    Report { plan, kills, generations: made.len(), seconds: began.elapsed().as_secs() }
}

/// Asks for more until enough run at once.
async fn fill(caller: &Caller, made: &mut Vec<(String, Job)>) {
    let mut unfinished = caller.list().await.iter().filter(|one| is_unfinished(one)).count();
    while unfinished < AT_ONCE {
        let job = Job::new(made.len() as u64);
        made.push((caller.create(&job, &format!("job-{}", job.number)).await, job));
        unfinished += 1;
    }
}

/// Waits for a moment of the work, so that a quick machine and a slow one are hit in the same places.
async fn random_moment(caller: &Caller, made: &[(String, Job)], dice: &mut Dice) {
    let latest = &made[made.len().saturating_sub(2 * AT_ONCE)..];
    let at = async || {
        let mut sum = 0;
        for (id, _) in latest {
            sum += advance(&caller.get(id).await);
        }
        sum
    };
    let wanted = at().await + dice.below(ADVANCES);
    until("the generations have advanced", async || {
        let mut unfinished = false;
        for (id, _) in latest {
            unfinished |= is_unfinished(&caller.get(id).await);
        }
        !unfinished || at().await >= wanted
    })
    .await;
    tokio::time::sleep(Duration::from_millis(dice.below(WITHIN_MS))).await;
}

/// The videos of the same jobs by a process that nothing happens to.
pub async fn undisturbed(models: &Path, jobs: &[Job]) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let stack = Stack::one_with(models, &["--queue", "10000"]);
    let caller = Caller::connect(&stack.grpc()).await;
    let mut ids = Vec::new();
    for job in jobs {
        ids.push(caller.create(job, "").await);
    }
    let mut videos = Vec::new();
    for id in ids {
        assert_eq!(caller.ended(&id).await.state(), GenerationState::Completed);
        videos.push(caller.video(&id, folder.path()).await);
    }
    videos
}
