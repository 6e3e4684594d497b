//! Cancels at random moments, and what the stages hold afterwards.

use std::{
    fmt,
    time::{Duration, Instant},
};

use proto::v1::{DescribeRequest, GenerationState, stage_service_client::StageServiceClient};
use tonic::transport::Channel;

use super::{
    calls::{Caller, Job, advance, is_unfinished, until},
    rounds::Dice,
};
use crate::stack::{Stack, tiny_models};

/// What a stage may count more than when it was idle before; what each cancel left behind would be more in the end.
const SLACK_BYTES: u64 = 1 << 20;
/// Generations, some of them cancelled, after which every part of a stage has been used.
const WARM: u64 = 6;
/// A generation of ten steps advances so often.
const ADVANCES: u64 = 14;
const STEPS: u32 = 10;
/// Up to so long after the last advance the cancel comes.
const WITHIN_MS: u64 = 30;
/// How much later than after one step the stages must be idle.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// What was done. That there is a report says that the stages were idle again after each cancel.
#[derive(Debug)]
pub struct Report {
    cancelled: usize,
    too_late: usize,
    longest: Duration,
    most_bytes: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| cancels at random moments | |")?;
        writeln!(f, "| --- | ---: |")?;
        writeln!(f, "| cancelled | {} |", self.cancelled)?;
        writeln!(f, "| completed before the cancel came | {} |", self.too_late)?;
        writeln!(f, "| longest time until all stages were idle, ms | {} |", self.longest.as_millis())?;
        write!(f, "| most bytes that a stage counted more than before | {} |", self.most_bytes)
    }
}

/// Cancels generations one after the other, up to `count` and for up to `time`.
pub async fn run(count: usize, time: Option<Duration>, seed: u64) -> Report {
    let stack = Stack::six(&tiny_models());
    let caller = Caller::connect(&stack.grpc()).await;
    let mut stages = Vec::new();
    for (_, process) in &stack.stages {
        let url = format!("http://{}", process.address("grpc"));
        stages.push(StageServiceClient::new(Channel::from_shared(url).unwrap().connect().await.unwrap()));
    }
    let (mut dice, mut step) = (Dice(seed), Duration::ZERO);
    for number in 0..WARM {
        let (id, _) = one(&caller, number, (number > 1).then_some(&mut dice)).await;
        step = step.max(caller.longest_step(&id).await);
    }
    let idle = counted(&stages).await;
    let (mut report, began) =
        (Report { cancelled: 0, too_late: 0, longest: Duration::ZERO, most_bytes: 0 }, Instant::now());
    for number in 0..count {
        if number > 2 && time.is_some_and(|time| began.elapsed() > time) {
            break;
        }
        let (id, cancelled) = one(&caller, WARM + number as u64, Some(&mut dice)).await;
        until("the stages hold no more than before", async || {
            let now = counted(&stages).await;
            now.iter().zip(&idle).all(|(now, idle)| now.saturating_sub(*idle) <= SLACK_BYTES)
        })
        .await;
        let took = cancelled.elapsed();
        step = step.max(caller.longest_step(&id).await);
        assert!(took <= step + IDLE_AFTER, "{took:?} after a cancel, where a step takes {step:?}");
        report.longest = report.longest.max(took);
        match caller.get(&id).await.state() {
            GenerationState::Cancelled => report.cancelled += 1,
            GenerationState::Completed => report.too_late += 1,
            other => panic!("{other:?} after a cancel"),
        }
    }
    let now = counted(&stages).await;
    report.most_bytes = now.iter().zip(&idle).map(|(now, idle)| now.saturating_sub(*idle)).max().unwrap_or(0);
    report
}

/// One generation, which is cancelled if there are dice; gives its id and when it was to end.
async fn one(caller: &Caller, number: u64, dice: Option<&mut Dice>) -> (String, Instant) {
    let id = caller.create(&Job { steps: STEPS, ..Job::new(number) }, "").await;
    let mut asked = Instant::now();
    if let Some(dice) = dice {
        let wanted = 1 + dice.below(ADVANCES);
        until("a generation has advanced", async || {
            let generation = caller.get(&id).await;
            advance(&generation) >= wanted || !is_unfinished(&generation)
        })
        .await;
        tokio::time::sleep(Duration::from_millis(dice.below(WITHIN_MS))).await;
        asked = Instant::now();
        caller.cancel(&id).await;
    }
    caller.ended(&id).await;
    (id, asked)
}

/// Bytes that each stage's process counts.
async fn counted(stages: &[StageServiceClient<Channel>]) -> Vec<u64> {
    let mut bytes = Vec::new();
    for stage in stages {
        let said = stage.clone().describe(DescribeRequest {}).await.unwrap();
        bytes.push(said.into_inner().memory.unwrap().process_bytes);
    }
    bytes
}
