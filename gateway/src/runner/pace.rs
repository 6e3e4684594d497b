//! How long a call of the transformer takes, by those before it.

use std::time::Duration;

/// How many times its prediction a call may take.
const TIMES: u32 = 5;

/// What the calls of one session taught so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Generations that may share the worker; each waits for the calls of the others.
    sharing: u32,
    /// The shortest time after which a call is taken for stuck.
    least: Duration,
    /// The longest that a pass has taken.
    pass: Option<Duration>,
}

impl Pace {
    /// A pace that is not known yet.
    pub(crate) fn new(sharing: usize, least: Duration) -> Self {
        Self { sharing: u32::try_from(sharing).unwrap_or(u32::MAX), least, pass: None }
    }

    /// Notes that a call of some passes took so long.
    pub(crate) fn learn(&mut self, passes: usize, took: Duration) {
        let each = took / u32::try_from(passes.max(1)).unwrap_or(u32::MAX);
        self.pass = self.pass.max(Some(each));
    }

    /// How long a call of some passes may take; nothing is known before the first.
    pub(crate) fn limit(&self, passes: usize) -> Option<Duration> {
        let passes = u32::try_from(passes).unwrap_or(u32::MAX);
        let predicted = self.pass?.saturating_mul(passes).saturating_mul(self.sharing);
        Some(predicted.saturating_mul(TIMES).max(self.least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_may_take_five_times_what_the_slowest_one_took_for_all_that_share_the_worker() {
        let mut pace = Pace::new(2, Duration::from_secs(60));
        assert_eq!(pace.limit(4), None);
        pace.learn(4, Duration::from_secs(40));
        pace.learn(4, Duration::from_secs(20));
        assert_eq!(pace.limit(4), Some(Duration::from_secs(400)));
        assert_eq!(pace.limit(1), Some(Duration::from_secs(100)));
        pace.learn(1, Duration::from_millis(1));
        assert_eq!(pace.limit(1), Some(Duration::from_secs(100)));
        let mut quick = Pace::new(2, Duration::from_secs(60));
        quick.learn(8, Duration::from_millis(80));
        assert_eq!(quick.limit(8), Some(Duration::from_secs(60)), "a short prediction is no measure");
    }
}
