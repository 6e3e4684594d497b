//! When a failed request is tried again.

use std::time::Duration;

use super::failed;
use crate::failure::Failure;

/// The wait before the first new attempt; it doubles with each.
const FIRST: Duration = Duration::from_millis(250);
/// The longest wait, also where the server asks for more.
const LONGEST: Duration = Duration::from_secs(60);

/// Why a request did not do its work.
#[derive(Debug)]
pub enum Trouble {
    /// It may work the next time; with the time that the server asks to wait.
    Passing {
        /// What went wrong.
        reason: String,
        /// `Retry-After`.
        wait: Option<Duration>,
    },
    /// It will not.
    Final(Failure),
}

impl Trouble {
    /// Something that may pass.
    pub fn passing(reason: impl Into<String>) -> Self {
        Self::Passing { reason: reason.into(), wait: None }
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Final(failure)
    }
}

/// Counts failures in a row.
#[derive(Debug)]
pub struct Retries {
    limit: u32,
    failed: u32,
}

impl Retries {
    /// Allows `limit` new attempts.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self { limit, failed: 0 }
    }

    /// Forgets earlier failures: the work went on since.
    pub fn reset(&mut self) {
        self.failed = 0;
    }

    /// How long to wait before the next attempt, and the reason.
    ///
    /// Errors: the trouble is final, or there were too many failures in a row.
    pub fn after(&mut self, trouble: Trouble, what: &str) -> Result<(Duration, String), Failure> {
        let (reason, wait) = match trouble {
            Trouble::Final(failure) => return Err(failure),
            Trouble::Passing { reason, wait } => (reason, wait),
        };
        if self.failed >= self.limit {
            let message = format!("{what}: {reason} (attempt {} of {})", self.failed + 1, u64::from(self.limit) + 1);
            let advice = Some("run the same command again: it goes on where it stopped");
            return Err(Failure { advice, ..failed("UNAVAILABLE", message) });
        }
        let wait = wait.unwrap_or_else(|| FIRST.saturating_mul(1 << self.failed.min(8))).min(LONGEST);
        self.failed += 1;
        Ok((wait, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_until_the_limit_and_begin_anew_after_progress() {
        let mut retries = Retries::new(3);
        let next = |retries: &mut Retries| retries.after(Trouble::passing("cut"), "file").map(|(wait, _)| wait);
        for factor in [1, 2, 4] {
            assert_eq!(next(&mut retries).unwrap(), FIRST * factor);
        }
        let failure = next(&mut retries).unwrap_err();
        assert_eq!((failure.code, failure.message.as_str()), ("UNAVAILABLE", "file: cut (attempt 4 of 4)"));
        retries.reset();
        assert_eq!(next(&mut retries).unwrap(), FIRST);
    }

    #[test]
    fn a_server_cannot_ask_to_wait_for_hours() {
        let trouble = Trouble::Passing { reason: "503".into(), wait: Some(Duration::from_secs(86_400)) };
        assert_eq!(Retries::new(1).after(trouble, "").unwrap().0, LONGEST);
    }
}
