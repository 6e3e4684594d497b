//! How much is kept of what has ended.

use std::time::Duration;

use proto::v1::GenerationState;

/// A limit for each state in which a generation can have ended; without one there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByEnd<T> {
    /// Of those that were completed.
    pub completed: Option<T>,
    /// Of those that failed.
    pub failed: Option<T>,
    /// Of those that were cancelled.
    pub cancelled: Option<T>,
}

impl<T> Default for ByEnd<T> {
    fn default() -> Self {
        Self { completed: None, failed: None, cancelled: None }
    }
}

impl<T: Copy> ByEnd<T> {
    /// The same limit for every state that has none of its own.
    #[must_use]
    pub fn or(self, limit: Option<T>) -> Self {
        let Self { completed, failed, cancelled } = self;
        Self { completed: completed.or(limit), failed: failed.or(limit), cancelled: cancelled.or(limit) }
    }

    /// The limits there are, by state.
    pub(super) fn limits(&self) -> impl Iterator<Item = (GenerationState, T)> + use<T> {
        let all = [
            (GenerationState::Completed, self.completed),
            (GenerationState::Failed, self.failed),
            (GenerationState::Cancelled, self.cancelled),
        ];
        all.into_iter().filter_map(|(state, limit)| Some((state, limit?)))
    }
}

/// How much is kept of what has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// How long a generation is kept after its end; without it until it is deleted.
    pub age: ByEnd<Duration>,
    /// How many bytes the files of all generations may have; the generations that ended first go first.
    pub bytes: Option<u64>,
    /// How many bytes the files of those may have that ended in one state; a file of several of them counts once.
    pub bytes_by_end: ByEnd<u64>,
    /// How many bytes the encoders' answers may have that are kept for other generations.
    pub stage_output_bytes: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { age: ByEnd::default(), bytes: None, bytes_by_end: ByEnd::default(), stage_output_bytes: 4 << 30 }
    }
}
