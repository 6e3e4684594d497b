//! How long a generation may be worked on, by what is predicted of it.

use crate::config::DefaultDeadline;

/// What the operator allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance {
    times: f64,
    least_seconds: f64,
}

impl Allowance {
    /// The allowance of generations of which so many may share a worker; none where there is no default deadline.
    pub(crate) fn new(deadline: DefaultDeadline, sharing: usize) -> Option<Self> {
        let DefaultDeadline { times, least } = deadline;
        let times = f64::from(times) * sharing as f64;
        (times > 0.0).then_some(Self { times, least_seconds: least.as_secs_f64() })
    }

    /// Seconds of work up to which a stage may go on that has been predicted to need `remaining` more after `elapsed`.
    pub(crate) fn until(self, elapsed: f64, remaining: f64) -> f64 {
        elapsed + (self.times * remaining).max(self.least_seconds)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_stage_may_take_so_many_times_its_prediction_for_all_that_share_the_worker_and_never_less_than_the_floor() {
        let deadline = DefaultDeadline { times: 4, ..DefaultDeadline::default() };
        assert_eq!(deadline.least, Duration::from_secs(600));
        let allowance = Allowance::new(deadline, 2).unwrap();
        assert_eq!(allowance.until(10.0, 1000.0), 8010.0);
        assert_eq!(allowance.until(10.0, 1.0), 610.0);
        assert!(Allowance::new(DefaultDeadline { times: 0, ..deadline }, 2).is_none());
    }
}
