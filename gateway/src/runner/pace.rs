//! How long calls of stages may take: by what was foreseen of them, and by those before.

use std::{
    future::Future,
    pin::pin,
    time::{Duration, Instant},
};

use proto::v1::Stage;

use super::patience::Patience;
use crate::{
    fault::{Fault, Kind, stage_name},
    planning::Foreseen,
    stages::Stages,
};

/// How many times its prediction a call may take.
const TIMES: u32 = 5;
/// How many times the shortest limit a stage's first call has: it may have to read the weights first.
const FIRST_TIMES: u32 = 10;
/// The same, where nobody foresees how long it takes.
const UNFORESEEN_TIMES: u32 = 60;

/// What the calls of one stage in one run taught so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Generations that may share the worker; each waits for the calls of the others.
    sharing: u32,
    /// The shortest time after which a call is taken for stuck.
    least: Duration,
    /// What is foreseen of the first call.
    first: Option<Duration>,
    /// The longest that one piece of work, such as a pass, has taken.
    piece: Option<Duration>,
}

impl Pace {
    /// A pace that is not known yet.
    pub(crate) fn new(sharing: usize, least: Duration) -> Self {
        Self { sharing: u32::try_from(sharing).unwrap_or(u32::MAX), least, first: None, piece: None }
    }

    /// The same, of a stage's calls of which the first is foreseen to take so long.
    pub(crate) fn foreseeing(self, first: Option<Duration>) -> Self {
        Self { first, ..self }
    }

    /// Notes that so many pieces of work took so long.
    pub(crate) fn learn(&mut self, pieces: usize, took: Duration) {
        let each = took / u32::try_from(pieces.max(1)).unwrap_or(u32::MAX);
        self.piece = self.piece.max(Some(each));
    }

    /// How long a call of so many pieces of work may take before its worker is asked whether it gets on.
    pub(crate) fn limit(&self, pieces: usize) -> Duration {
        let pieces = u32::try_from(pieces).unwrap_or(u32::MAX);
        let times = TIMES.saturating_mul(self.sharing);
        match (self.piece, self.first) {
            (Some(piece), _) => piece.saturating_mul(pieces).saturating_mul(times).max(self.least),
            (None, Some(first)) => first.saturating_mul(times).max(self.least.saturating_mul(FIRST_TIMES)),
            (None, None) => self.least.saturating_mul(UNFORESEEN_TIMES),
        }
    }
}

/// What a generation's calls are watched by.
#[derive(Debug, Clone)]
pub(crate) struct Watchman {
    /// Where events go.
    patience: Patience,
    pace: Pace,
    foreseen: Option<Foreseen>,
}

impl Watchman {
    /// Watches calls by `pace` and, the first ones, by what is foreseen of the generation.
    pub(crate) fn new(patience: Patience, pace: Pace, foreseen: Option<Foreseen>) -> Self {
        Self { patience, pace, foreseen }
    }

    /// The pace of a stage before its first call.
    pub(crate) fn pace(&self, stage: Stage) -> Pace {
        let first = |foreseen: &Foreseen| Duration::try_from_secs_f64(foreseen.first_call(stage)).ok();
        self.pace.foreseeing(self.foreseen.as_ref().and_then(first))
    }

    /// A call's answer, and how long it took. One that takes longer than `limit` is waited for as long as its worker
    /// finishes layers for anybody; where it stands still, the call is dropped and the worker suspected.
    ///
    /// Errors: the call's; `UNAVAILABLE` from a worker that stands still.
    pub(crate) async fn in_time<T>(
        &self,
        (stages, stage): (&Stages, Stage),
        limit: Duration,
        call: impl Future<Output = Result<T, Fault>>,
    ) -> Result<(T, Duration), Fault> {
        let (began, mut call) = (Instant::now(), pin!(call));
        let (mut before, mut said) = (None, false);
        loop {
            // Looked at twice by the limit, so that what it has done meanwhile is known then.
            let look = async {
                tokio::time::sleep(limit / 2).await;
                stages.describe(stage).await.ok().map(|said| said.advances)
            };
            let advances = tokio::select! {
                biased;
                answer = &mut call => return Ok((answer?, began.elapsed())),
                advances = look => advances,
            };
            let late = began.elapsed() >= limit;
            if late && advances == before {
                return Err(self.suspected(stage, began.elapsed()).await);
            }
            if late && !std::mem::replace(&mut said, true) {
                let fault = Fault::new(Kind::Unavailable, String::new()).at(stage);
                let seconds = limit.as_secs_f64();
                let what = format!(
                    "has taken {seconds:.0} s for a call, longer than was foreseen; it gets on, so it is waited for"
                );
                self.patience.say(&fault, what).await;
            }
            before = advances;
        }
    }

    async fn suspected(&self, stage: Stage, after: Duration) -> Fault {
        let what = format!(
            "is suspected to be stuck: a call has taken {:.0} s, and its worker finishes no layer any more",
            after.as_secs_f64()
        );
        let fault = Fault::new(Kind::Unavailable, format!("{} {what}", stage_name(stage))).at(stage);
        self.patience.say(&fault, format!("{what}; it is begun again")).await;
        fault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_call_may_take_five_times_what_the_slowest_one_took_for_all_that_share_the_worker() {
        let mut pace = Pace::new(2, 60 * SECOND);
        pace.learn(4, 40 * SECOND);
        pace.learn(4, 20 * SECOND);
        assert_eq!(pace.limit(4), 400 * SECOND);
        assert_eq!(pace.limit(1), 100 * SECOND);
        pace.learn(1, Duration::from_millis(1));
        assert_eq!(pace.limit(1), 100 * SECOND);
        let mut quick = Pace::new(2, 60 * SECOND);
        quick.learn(8, Duration::from_millis(80));
        assert_eq!(quick.limit(8), 60 * SECOND, "a short prediction is no measure");
    }

    #[test]
    fn a_first_call_may_take_five_times_what_was_foreseen_of_it_and_an_hour_where_nothing_was() {
        let pace = Pace::new(2, 60 * SECOND);
        assert_eq!(pace.limit(8), 3600 * SECOND);
        assert_eq!(pace.foreseeing(Some(200 * SECOND)).limit(8), 2000 * SECOND);
        assert_eq!(pace.foreseeing(Some(SECOND)).limit(8), 600 * SECOND, "the weights may have to be read");
        let mut known = pace.foreseeing(Some(200 * SECOND));
        known.learn(2, 20 * SECOND);
        assert_eq!(known.limit(2), 200 * SECOND, "what was measured is nearer");
    }
}
