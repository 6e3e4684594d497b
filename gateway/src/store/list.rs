//! Lists, page by page.

use proto::v1::{Generation, GenerationState};
use uuid::Uuid;

use super::{Store, identity, ledger::Page};
use crate::fault::Fault;

/// Which generations a caller wants to see.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listing {
    /// Only those in one of these states; empty for all.
    pub(crate) states: Vec<GenerationState>,
    /// Only those of this caller; empty for all.
    pub(crate) caller: String,
    /// Only those with this label; empty for all.
    pub(crate) label: String,
    /// Only those created from this time on.
    pub(crate) created_from_ms: u64,
    /// Only those created before this time; 0 for no limit.
    pub(crate) created_before_ms: u64,
    /// The oldest first.
    pub(crate) oldest_first: bool,
    /// Only those behind this one.
    pub(crate) after: Option<Uuid>,
    /// How many at most.
    pub(crate) limit: usize,
}

impl Store {
    /// Generations in the order of their creation, page by page; gives the token of the next page, if there is one.
    ///
    /// Errors: the token is none that a page gave.
    pub(crate) async fn list(&self, wanted: &Listing) -> Result<(Vec<Generation>, Option<Uuid>), Fault> {
        let mut page = Page {
            // An id begins with the milliseconds of its time, so the first of a time is above the last one before it.
            after_id: first_of(wanted.created_from_ms),
            before_id: if wanted.created_before_ms == 0 { Uuid::max() } else { first_of(wanted.created_before_ms) },
            states: wanted.states.clone(),
            caller: wanted.caller.clone(),
            label: wanted.label.clone(),
            oldest_first: wanted.oldest_first,
            limit: wanted.limit + 1,
        };
        if let Some(last) = wanted.after {
            if wanted.oldest_first {
                page.after_id = page.after_id.max(last);
            } else {
                page.before_id = page.before_id.min(last);
            }
        }
        let mut generations = self.inner.ledger.list(&page).await?;
        let more = generations.len() > wanted.limit;
        generations.truncate(wanted.limit);
        let next = generations.last().filter(|_| more).map(identity);
        Ok((generations, next))
    }
}

/// The first id of a millisecond; below all that are made from then on.
fn first_of(unix_ms: u64) -> Uuid {
    Uuid::from_u128(u128::from(unix_ms.min((1 << 48) - 1)) << 80)
}
