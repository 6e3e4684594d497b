//! What is removed: what nobody waits for, what was kept long enough, and files that nobody names.

use std::{collections::HashSet, ops::RangeInclusive, sync::Arc, time::Duration};

use proto::v1::GenerationState;

use super::{Retention, Store, artifacts::ArtifactError, lock, stay_present, unix_ms};
use crate::fault::Fault;

/// How long the removal of a file may take: less than others are kept from naming one with the same content.
const REMOVAL: Duration = Duration::from_secs(30);

impl Store {
    /// Tidies up after processes that have ended, with the hashes of all files as they were a moment ago.
    pub(super) async fn recover(&self, files: Vec<String>) -> Result<(), Fault> {
        let ledger = &self.inner.ledger;
        if ledger.is_shared() {
            self.show_presence().await?;
            tokio::spawn(stay_present(Arc::downgrade(&self.inner)));
        } else {
            ledger.release_all().await?;
            ledger.forget_replicas().await?;
            ledger.present(&self.inner.replica, u64::MAX).await?;
        }
        self.remove_abandoned().await?;
        self.compare(files).await
    }

    /// Looks for files that no record names, which are removed, and for records whose files are gone: the encoders'
    /// answers among these are forgotten, and generations are named in the log.
    pub(crate) async fn sweep(&self) -> Result<(), Fault> {
        self.check_files().await?;
        let files = self.inner.artifacts.hashes().await?;
        self.compare(files).await
    }

    /// Holds the files of a moment ago against what the records name now.
    async fn compare(&self, files: Vec<String>) -> Result<(), Fault> {
        let ledger = &self.inner.ledger;
        let (files, used): (HashSet<String>, _) = (files.into_iter().collect(), ledger.used_files().await?);
        for hash in used.difference(&files) {
            // It may have been kept, or removed with the last record that named it, meanwhile.
            if self.inner.artifacts.has(hash).await? || !ledger.is_used(hash).await? {
                continue;
            }
            let (encoded, generations) = (ledger.forget_file(hash).await?, ledger.users_of(hash).await?);
            tracing::error!(hash, encoded, ?generations, "a file that the records name is gone");
        }
        // Most are used; each of the others is looked at again while nobody can name it.
        self.remove_unused(files.difference(&used).cloned().collect()).await
    }

    /// Removes what is kept longer or is more than wanted, and what nobody waits for.
    pub(crate) async fn tidy(&self, keep: &Retention) -> Result<(), Fault> {
        self.remove_abandoned().await?;
        self.remove_leftovers().await?;
        let forgotten = self.inner.ledger.forget_stage_outputs(keep.stage_output_bytes).await?;
        self.remove_unused(forgotten).await?;
        for (state, age) in keep.age.limits() {
            let before = unix_ms().saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
            while self.remove_ended(state..=state, before, 64).await? {}
        }
        for (state, bytes) in keep.bytes_by_end.limits() {
            while self.inner.ledger.artifact_bytes_of(state).await? > bytes
                && self.remove_ended(state..=state, u64::MAX, 1).await?
            {}
        }
        if let Some(bytes) = keep.bytes {
            let any = GenerationState::Completed..=GenerationState::Cancelled;
            while self.inner.ledger.artifact_bytes().await? > bytes
                && self.remove_ended(any.clone(), u64::MAX, 1).await?
            {}
        }
        Ok(())
    }

    /// Removes the generations of calls whose process has ended.
    async fn remove_abandoned(&self) -> Result<(), Fault> {
        let ledger = &self.inner.ledger;
        for id in ledger.abandoned(ledger.now_ms().await?).await? {
            tracing::info!(generation_id = %id, "removed: the process of the call that asked for it has ended");
            self.delete(id).await?;
        }
        Ok(())
    }

    /// Removes up to `limit` generations that ended in one of these states before a time; false when there are none.
    async fn remove_ended(
        &self,
        states: RangeInclusive<GenerationState>,
        before_ms: u64,
        limit: i64,
    ) -> Result<bool, Fault> {
        let ended = self.inner.ledger.ended_before(states, before_ms, limit).await?;
        for id in &ended {
            tracing::info!(generation_id = %id, "removed: it was kept as long as was wanted");
            self.delete(*id).await?;
        }
        Ok(!ended.is_empty())
    }

    /// Removes files that an object store did not remove when it should have.
    async fn remove_leftovers(&self) -> Result<(), Fault> {
        if lock(&self.inner.leftovers).is_empty() {
            return Ok(());
        }
        self.check_files().await?;
        let left = std::mem::take(&mut *lock(&self.inner.leftovers));
        self.remove_unused(left.into_iter().collect()).await
    }

    /// Removes those files that belong to no generation and are no stage's output; later where an object store does not
    /// do it now.
    pub(super) async fn remove_unused(&self, hashes: Vec<String>) -> Result<(), Fault> {
        for hash in hashes {
            let Some(alone) = self.inner.ledger.remove_file(&hash).await? else { continue };
            match tokio::time::timeout(REMOVAL, self.inner.artifacts.remove(&hash)).await {
                Ok(Err(ArtifactError::Away(reason))) => {
                    tracing::warn!(hash, reason, "a file that nobody needs is removed later");
                    lock(&self.inner.leftovers).insert(hash);
                }
                Ok(removed) => removed?,
                Err(_) => {
                    tracing::warn!(hash, "a file that nobody needs was not removed in time; it is tried again");
                    lock(&self.inner.leftovers).insert(hash);
                    continue;
                }
            }
            alone.release().await;
        }
        Ok(())
    }
}
