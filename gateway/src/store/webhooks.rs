//! Callbacks that are still to be made.

use super::{
    Store,
    engine::{SqlError, Transaction},
    ledger::Ledger,
    unix_ms,
};
use crate::{fault::Fault, webhook};

/// A callback whose time has come; nobody else makes it for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Due {
    /// The generation that has ended.
    pub(crate) generation_id: String,
    /// Whom to call.
    pub(crate) url: String,
    /// What to say.
    pub(crate) body: Vec<u8>,
    /// Attempts, this one among them.
    pub(crate) attempts: u64,
    /// Unix time in milliseconds from which on it is not tried any more.
    pub(crate) until_ms: u64,
    /// Until when nobody else makes it; it tells this attempt from a later one.
    held_ms: u64,
}

/// Notes that a new generation's end is to be told to `url`.
pub(super) async fn expect(transaction: &mut dyn Transaction, id: &str, url: &str) -> Result<(), SqlError> {
    let statement = "INSERT INTO webhooks (generation_id, url, due_ms, until_ms, attempts, body) \
                     VALUES ($1, $2, 0, 0, 0, $3)";
    transaction.execute(statement, &[id.into(), url.into(), Vec::new().into()]).await.map(drop)
}

/// Makes the callback due, if one is expected, with what is to be said.
pub(super) async fn ended(
    transaction: &mut dyn Transaction,
    generation: &proto::v1::Generation,
) -> Result<(), SqlError> {
    let now = generation.ended_unix_ms;
    let until = now + webhook::TRIED_FOR.as_millis() as u64;
    let statement = "UPDATE webhooks SET due_ms = $1, until_ms = $2, body = $3 \
                     WHERE generation_id = $4 AND until_ms = 0";
    let id = generation.generation_id.as_str();
    transaction
        .execute(statement, &[now.into(), until.into(), webhook::body(generation).into(), id.into()])
        .await
        .map(drop)
}

/// Forgets the callback of a generation that is removed before its end.
pub(super) async fn removed(transaction: &mut dyn Transaction, id: &str) -> Result<(), SqlError> {
    let statement = "DELETE FROM webhooks WHERE generation_id = $1 AND until_ms = 0";
    transaction.execute(statement, &[id.into()]).await.map(drop)
}

impl Ledger {
    /// Takes the callback that has been due for longest, until `held_ms`.
    async fn claim_webhook(&self, now_ms: u64, held_ms: u64) -> Result<Option<Due>, SqlError> {
        let due = self
            .read(
                "SELECT generation_id, url, body, attempts, until_ms, due_ms FROM webhooks \
                 WHERE until_ms > 0 AND due_ms <= $1 ORDER BY due_ms, generation_id LIMIT 1",
                &[now_ms.into()],
            )
            .await?;
        let Some(row) = due.first() else { return Ok(None) };
        let id = row.text(0)?;
        let taken = self
            .write(
                "UPDATE webhooks SET due_ms = $1, attempts = attempts + 1 WHERE generation_id = $2 AND due_ms = $3",
                &[held_ms.into(), id.into(), row.int(5)?.into()],
            )
            .await?;
        if taken == 0 {
            return Ok(None);
        }
        Ok(Some(Due {
            generation_id: id.to_owned(),
            url: row.text(1)?.to_owned(),
            body: row.bytes(2)?.to_vec(),
            attempts: row.count(3)? + 1,
            until_ms: row.count(4)?,
            held_ms,
        }))
    }
}

impl Store {
    /// Takes the next callback that is due, if there is one.
    pub(crate) async fn due_webhook(&self) -> Result<Option<Due>, Fault> {
        let now = unix_ms();
        Ok(self.inner.ledger.claim_webhook(now, now + webhook::SENDING.as_millis() as u64).await?)
    }

    /// Resolves once a generation ends after this call.
    pub(crate) fn webhook_stored(&self) -> tokio::sync::futures::Notified<'_> {
        self.inner.ends.notified()
    }

    /// Puts a callback off.
    pub(crate) async fn retry_webhook(&self, due: &Due, next_ms: u64) -> Result<(), Fault> {
        let statement = "UPDATE webhooks SET due_ms = $1 WHERE generation_id = $2 AND due_ms = $3";
        let values = [next_ms.into(), due.generation_id.as_str().into(), due.held_ms.into()];
        Ok(self.inner.ledger.write(statement, &values).await.map(drop)?)
    }

    /// Forgets a callback that was made, or never will be.
    pub(crate) async fn forget_webhook(&self, due: &Due) -> Result<(), Fault> {
        let statement = "DELETE FROM webhooks WHERE generation_id = $1";
        Ok(self.inner.ledger.write(statement, &[due.generation_id.as_str().into()]).await.map(drop)?)
    }

    /// Callbacks that are expected or still to be made.
    #[cfg(test)]
    pub(crate) async fn webhooks(&self) -> usize {
        self.inner.ledger.read("SELECT generation_id FROM webhooks", &[]).await.unwrap().len()
    }
}
