//! The statements of the store, written once for every engine.

use std::{
    collections::{HashMap, HashSet},
    ops::RangeInclusive,
    sync::Arc,
};

use prost::Message as _;
use proto::v1::{Generation, GenerationEvent, GenerationState};
use uuid::Uuid;

use super::{
    artifacts::Artifact,
    engine::{Access, Cells, Engine, Hold, SqlError},
    life,
    turns::{Waiting, in_turn},
    webhooks,
};
use crate::intake::Order;

/// The first state that is an end; those of the contract are numbered so.
const FIRST_END: i64 = 5;

/// A generation as it is kept.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// What callers see.
    pub(crate) generation: Generation,
    /// Number of its last event.
    pub(crate) last_event: u64,
    /// Its caller wants it stopped.
    pub(crate) cancel: bool,
    /// Number of the lease under which it was changed last.
    pub(crate) lease: i64,
    /// The step that can be gone on with, 0 for none, and the hash of the plan that the latents belong to.
    pub(crate) resume: (u32, String),
}

/// A generation that is to be kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRow<'a> {
    /// What callers see.
    pub(crate) generation: &'a Generation,
    /// Its first event.
    pub(crate) event: &'a GenerationEvent,
    /// How it was asked for.
    pub(crate) order: &'a Order,
    /// Hash of what was asked for.
    pub(crate) request_hash: &'a str,
    /// The gateway's process that accepts it.
    pub(crate) replica: &'a str,
    /// It belongs to a call, and goes with that process.
    pub(crate) attached: bool,
    /// Its files.
    pub(crate) artifacts: &'a [(&'static str, Artifact)],
}

/// What became of a generation that was to be kept.
#[derive(Debug)]
pub(crate) enum Inserted {
    /// It is kept.
    New,
    /// The key is that of another generation, made from a request of this hash.
    Known(Box<Generation>, String),
}

/// Which generations are listed. Ids grow with the time of creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    /// Only ids above this one.
    pub(crate) after_id: Uuid,
    /// Only ids below this one.
    pub(crate) before_id: Uuid,
    /// Only those in one of these states; empty for all.
    pub(crate) states: Vec<GenerationState>,
    /// Only those of this caller; empty for all.
    pub(crate) caller: String,
    /// Only those with this label; empty for all.
    pub(crate) label: String,
    /// The oldest first.
    pub(crate) oldest_first: bool,
    /// How many at most.
    pub(crate) limit: usize,
}

/// One more event of a generation.
#[derive(Debug)]
pub(crate) struct Append<'a> {
    /// The generation after it.
    pub(crate) generation: &'a Generation,
    /// The event; its number must be the next one.
    pub(crate) event: &'a GenerationEvent,
    /// Files that it has from now on.
    pub(crate) keep: &'a [(String, Artifact)],
    /// Roles of files that it no longer has.
    pub(crate) drop: &'a [&'static str],
}

/// The tables.
#[derive(Debug, Clone)]
pub(crate) struct Ledger {
    engine: Arc<dyn Engine>,
}

impl Ledger {
    /// The tables of a database that has been migrated.
    pub(crate) fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }

    /// Whether other processes may use the tables too.
    pub(crate) fn is_shared(&self) -> bool {
        self.engine.is_shared()
    }

    /// Milliseconds since 1970, by the one clock of all who use the tables.
    pub(crate) async fn now_ms(&self) -> Result<u64, SqlError> {
        self.engine.now_ms().await
    }

    /// Keeps files of these hashes from being removed before a record names them, until it is released.
    pub(crate) async fn name_files(&self, hashes: &[&str]) -> Result<Box<dyn Hold>, SqlError> {
        self.engine.name_files(hashes).await
    }

    /// Allows a file to be removed until it is released; `None` where it belongs to a generation, is a stage's output,
    /// or is about to become so.
    pub(crate) async fn remove_file(&self, hash: &str) -> Result<Option<Box<dyn Hold>>, SqlError> {
        let Some(alone) = self.engine.remove_file(hash).await? else { return Ok(None) };
        if self.is_used(hash).await? {
            alone.release().await;
            return Ok(None);
        }
        Ok(Some(alone))
    }

    /// Keeps a new generation with its first event, unless its key is known.
    pub(crate) async fn insert(&self, new: NewRow<'_>) -> Result<Inserted, SqlError> {
        let id = new.generation.generation_id.as_str();
        let mut transaction = self.engine.begin(Access::Write).await?;
        let Order { caller, priority, idempotency_key, webhook, label, .. } = new.order;
        if !idempotency_key.is_empty() {
            let known = transaction
                .rows(
                    "SELECT body, request_hash FROM generations WHERE caller = $1 AND idempotency_key = $2",
                    &[caller.as_str().into(), idempotency_key.as_str().into()],
                )
                .await?;
            if let Some(row) = known.first() {
                return Ok(Inserted::Known(Box::new(message(row.bytes(0)?)?), row.text(1)?.to_owned()));
            }
        }
        transaction
            .execute(
                "INSERT INTO generations (id, state, ended_ms, last_event, caller, priority, idempotency_key, request_hash, \
                 attached, cancel, lease, lease_until_ms, resume_step, resume_plan, body, replica, deadline_ms, label) \
                 VALUES ($1, $2, 0, $3, $4, $5, $6, $7, $8, 0, 0, 0, 0, '', $9, $10, $11, $12)",
                &[
                    id.into(),
                    i64::from(new.generation.state).into(),
                    new.event.number.into(),
                    caller.as_str().into(),
                    (*priority).into(),
                    idempotency_key.as_str().into(),
                    new.request_hash.into(),
                    i64::from(new.attached).into(),
                    new.generation.encode_to_vec().into(),
                    new.replica.into(),
                    new.generation.deadline_unix_ms.unwrap_or(u64::MAX).into(),
                    label.as_str().into(),
                ],
            )
            .await?;
        transaction
            .execute(
                "INSERT INTO events (generation_id, number, body) VALUES ($1, $2, $3)",
                &[id.into(), new.event.number.into(), new.event.encode_to_vec().into()],
            )
            .await?;
        for (role, artifact) in new.artifacts {
            transaction.execute(KEEP_ARTIFACT, &artifact_values(id, role, artifact)).await?;
        }
        if !webhook.is_empty() {
            webhooks::expect(&mut *transaction, id, webhook).await?;
        }
        transaction.commit().await?;
        Ok(Inserted::New)
    }

    /// The generation with an id.
    pub(crate) async fn get(&self, id: Uuid) -> Result<Option<Row>, SqlError> {
        let rows = self
            .read(
                "SELECT body, last_event, cancel, lease, resume_step, resume_plan FROM generations WHERE id = $1",
                &[id.to_string().into()],
            )
            .await?;
        rows.first().map(row).transpose()
    }

    /// Generations in order of their creation; see [`Page`].
    pub(crate) async fn list(&self, page: &Page) -> Result<Vec<Generation>, SqlError> {
        let query = if page.oldest_first { LIST_OLDEST_FIRST } else { LIST_NEWEST_FIRST };
        let states = page.states.iter().fold(0_i64, |mask, state| mask | (1 << (*state as i32)));
        let values = [
            page.after_id.to_string().into(),
            page.before_id.to_string().into(),
            if page.states.is_empty() { -1_i64 } else { states }.into(),
            (page.limit as u64).into(),
            page.caller.as_str().into(),
            page.label.as_str().into(),
        ];
        self.read(query, &values).await?.iter().map(|row| message(row.bytes(0)?)).collect()
    }

    /// Up to `limit` generations that ended in one of these states before a time, the longest ago first.
    pub(crate) async fn ended_before(
        &self,
        states: RangeInclusive<GenerationState>,
        ended_ms: u64,
        limit: i64,
    ) -> Result<Vec<Uuid>, SqlError> {
        let (first, last) = (*states.start() as i64, *states.end() as i64);
        let rows = self
            .read(
                "SELECT id FROM generations WHERE state >= $1 AND state <= $4 AND ended_ms < $2 \
                 ORDER BY ended_ms, id LIMIT $3",
                &[first.into(), ended_ms.into(), limit.into(), last.into()],
            )
            .await?;
        rows.iter().map(|row| identity(row.text(0)?)).collect()
    }

    /// Bytes of all files of generations; one that two share counts once.
    pub(crate) async fn artifact_bytes(&self) -> Result<u64, SqlError> {
        let query = "SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) \
                     FROM (SELECT DISTINCT hash, bytes FROM artifacts) AS files";
        self.read(query, &[]).await?.first().map_or(Ok(0), |row| row.count(0))
    }

    /// Bytes of all files of the generations in a state; one that two of them share counts once.
    pub(crate) async fn artifact_bytes_of(&self, state: GenerationState) -> Result<u64, SqlError> {
        let query = "SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM (SELECT DISTINCT hash, bytes FROM artifacts \
                     WHERE generation_id IN (SELECT id FROM generations WHERE state = $1)) AS files";
        self.read(query, &[(state as i64).into()]).await?.first().map_or(Ok(0), |row| row.count(0))
    }

    /// Forgets stages' outputs, those used longest ago first, until at most `limit_bytes` are left; gives the hashes
    /// of the files.
    pub(crate) async fn forget_stage_outputs(&self, limit_bytes: u64) -> Result<Vec<String>, SqlError> {
        let mut transaction = self.engine.begin(Access::Write).await?;
        let rows =
            transaction.rows("SELECT key, hash, bytes FROM stage_outputs ORDER BY used_ms DESC, key", &[]).await?;
        let (mut kept, mut forgotten) = (0_u64, Vec::new());
        for row in rows {
            kept = kept.saturating_add(row.count(2)?);
            if kept > limit_bytes {
                transaction.execute("DELETE FROM stage_outputs WHERE key = $1", &[row.text(0)?.into()]).await?;
                forgotten.push(row.text(1)?.to_owned());
            }
        }
        transaction.commit().await?;
        Ok(forgotten)
    }

    /// How many generations have not ended, and how many of these are a caller's.
    pub(crate) async fn unfinished(&self, caller: &str) -> Result<(u64, u64), SqlError> {
        let query = "SELECT COUNT(*), CAST(COALESCE(SUM(CASE WHEN caller = $2 THEN 1 ELSE 0 END), 0) AS BIGINT) \
                     FROM generations WHERE state < $1";
        let rows = self.read(query, &[FIRST_END.into(), caller.into()]).await?;
        rows.first().map_or(Ok((0, 0)), |row| Ok((row.count(0)?, row.count(1)?)))
    }

    /// Whether a caller's generation has this key.
    pub(crate) async fn has_key(&self, caller: &str, key: &str) -> Result<bool, SqlError> {
        let query = "SELECT id FROM generations WHERE caller = $1 AND idempotency_key = $2";
        Ok(!self.read(query, &[caller.into(), key.into()]).await?.is_empty())
    }

    /// What nobody drives, in the order in which it is begun.
    pub(crate) async fn waiting(&self, now_ms: u64) -> Result<Vec<Waiting>, SqlError> {
        let mut transaction = self.engine.begin(Access::Read).await?;
        let served = transaction.rows("SELECT caller, served FROM callers", &[]).await?;
        let served = served.iter().map(|row| Ok((row.text(0)?.to_owned(), row.int(1)?)));
        let served: HashMap<String, i64> = served.collect::<Result<_, SqlError>>()?;
        let rows = transaction
            .rows(
                "SELECT id, caller, priority, state FROM generations WHERE state < $1 AND lease_until_ms <= $2",
                &[FIRST_END.into(), now_ms.into()],
            )
            .await?;
        let waiting = rows.iter().map(|row| {
            let (id, caller) = (identity(row.text(0)?)?, row.text(1)?.to_owned());
            Ok(Waiting { id, caller, priority: row.int(2)?, begun: row.int(3)? != GenerationState::Queued as i64 })
        });
        Ok(in_turn(waiting.collect::<Result<_, SqlError>>()?, &served, now_ms))
    }

    /// The generations that are driven.
    pub(crate) async fn driven(&self, now_ms: u64) -> Result<Vec<Generation>, SqlError> {
        let query = "SELECT body FROM generations WHERE state < $1 AND lease_until_ms > $2";
        let rows = self.read(query, &[FIRST_END.into(), now_ms.into()]).await?;
        rows.iter().map(|row| message(row.bytes(0)?)).collect()
    }

    /// Up to `limit` events of a generation, from a number on.
    pub(crate) async fn events(&self, id: Uuid, from: u64, limit: i64) -> Result<Vec<GenerationEvent>, SqlError> {
        let rows = self
            .read(
                "SELECT body FROM events WHERE generation_id = $1 AND number >= $2 ORDER BY number LIMIT $3",
                &[id.to_string().into(), from.into(), limit.into()],
            )
            .await?;
        rows.iter().map(|row| message(row.bytes(0)?)).collect()
    }

    /// Ids of generations that nobody drives and whose deadline has passed.
    pub(crate) async fn late(&self, now_ms: u64) -> Result<Vec<Uuid>, SqlError> {
        let query = "SELECT body FROM generations WHERE state < $1 AND lease_until_ms <= $2 AND deadline_ms <= $2";
        let rows = self.read(query, &[FIRST_END.into(), now_ms.into()]).await?;
        let mut late = Vec::new();
        for row in rows {
            let generation: Generation = message(row.bytes(0)?)?;
            if generation.deadline_unix_ms.is_some_and(|deadline| deadline <= now_ms) {
                late.push(identity(&generation.generation_id)?);
            }
        }
        Ok(late)
    }

    /// Takes the next generation to run that is nobody's, for the holder of a lease until `until_ms`; `skip` says
    /// which are not to be taken.
    pub(crate) async fn claim_next(
        &self,
        now_ms: u64,
        until_ms: u64,
        skip: &(dyn Fn(Uuid) -> bool + Sync),
    ) -> Result<Option<Row>, SqlError> {
        for next in self.waiting(now_ms).await? {
            if skip(next.id) {
                continue;
            }
            if let Some(row) = self.claim(next.id, now_ms, until_ms).await? {
                if !next.begun {
                    self.write(SERVED, &[next.caller.into()]).await?;
                }
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    /// Takes one generation if it is nobody's and has not ended.
    pub(crate) async fn claim(&self, id: Uuid, now_ms: u64, until_ms: u64) -> Result<Option<Row>, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        let taken = transaction
            .execute(self.engine.claim(), &[until_ms.into(), id.as_str().into(), FIRST_END.into(), now_ms.into()])
            .await?;
        if taken == 0 {
            return Ok(None);
        }
        let rows = transaction
            .rows(
                "SELECT body, last_event, cancel, lease, resume_step, resume_plan FROM generations WHERE id = $1",
                &[id.into()],
            )
            .await?;
        let row = rows.first().map(row).transpose()?;
        transaction.commit().await?;
        Ok(row)
    }

    /// Prolongs a lease; `None` when it is lost, else whether the caller wants the generation stopped.
    pub(crate) async fn renew(&self, id: Uuid, lease: i64, until_ms: u64) -> Result<Option<bool>, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        let held = transaction
            .execute(
                "UPDATE generations SET lease_until_ms = $1 WHERE id = $2 AND lease = $3",
                &[until_ms.into(), id.as_str().into(), lease.into()],
            )
            .await?;
        if held == 0 {
            return Ok(None);
        }
        let rows = transaction.rows("SELECT cancel FROM generations WHERE id = $1", &[id.into()]).await?;
        let cancel = rows.first().map_or(Ok(0), |row| row.int(0))?;
        transaction.commit().await?;
        Ok(Some(cancel != 0))
    }

    /// Ends all leases, so that the generations can be taken. Only for a database that nobody else uses.
    pub(crate) async fn release_all(&self) -> Result<(), SqlError> {
        self.write("UPDATE generations SET lease_until_ms = 0", &[]).await.map(drop)
    }

    /// Notes that a gateway's process is there until a time, if it gives no other sign of life.
    pub(crate) async fn present(&self, replica: &str, until_ms: u64) -> Result<(), SqlError> {
        self.write(PRESENT, &[replica.into(), until_ms.into()]).await.map(drop)
    }

    /// Forgets all processes. Only for a database that nobody else uses.
    pub(crate) async fn forget_replicas(&self) -> Result<(), SqlError> {
        self.write("DELETE FROM replicas", &[]).await.map(drop)
    }

    /// Ids of the generations that belonged to a call of a process that is not there any more.
    pub(crate) async fn abandoned(&self, now_ms: u64) -> Result<Vec<Uuid>, SqlError> {
        let query = "SELECT id FROM generations WHERE attached = 1 \
                     AND replica NOT IN (SELECT name FROM replicas WHERE until_ms > $1)";
        let rows = self.read(query, &[now_ms.into()]).await?;
        rows.iter().map(|row| identity(row.text(0)?)).collect()
    }

    /// Adds an event and what it changed; false, and nothing is changed, when the lease is lost.
    pub(crate) async fn append(&self, lease: i64, append: Append<'_>) -> Result<bool, SqlError> {
        let Append { generation, event, keep, drop } = append;
        let id = generation.generation_id.as_str();
        let mut transaction = self.engine.begin(Access::Write).await?;
        let changed = transaction
            .execute(
                "UPDATE generations SET state = $1, last_event = $2, body = $3, ended_ms = $7 \
                 WHERE id = $4 AND lease = $5 AND last_event = $6",
                &[
                    i64::from(generation.state).into(),
                    event.number.into(),
                    generation.encode_to_vec().into(),
                    id.into(),
                    lease.into(),
                    event.number.saturating_sub(1).into(),
                    generation.ended_unix_ms.into(),
                ],
            )
            .await?;
        if changed == 0 {
            // Nobody else writes under this lease: a repetition of what was stored without an answer changes nothing.
            let query = "SELECT last_event FROM generations WHERE id = $1 AND lease = $2";
            let rows = transaction.rows(query, &[id.into(), lease.into()]).await?;
            return rows.first().map_or(Ok(false), |row| Ok(row.count(0)? == event.number));
        }
        transaction
            .execute(
                "INSERT INTO events (generation_id, number, body) VALUES ($1, $2, $3)",
                &[id.into(), event.number.into(), event.encode_to_vec().into()],
            )
            .await?;
        for (role, artifact) in keep {
            transaction.execute(KEEP_ARTIFACT, &artifact_values(id, role, artifact)).await?;
        }
        for role in drop {
            transaction.execute(DROP_ARTIFACT, &[id.into(), (*role).into()]).await?;
        }
        if life::is_terminal(generation.state()) {
            webhooks::ended(&mut *transaction, generation).await?;
        }
        transaction.commit().await?;
        Ok(true)
    }

    /// Notes that a generation can go on at a step with these latents; false when the lease is lost.
    pub(crate) async fn checkpoint(
        &self,
        (id, lease): (Uuid, i64),
        (step, plan): (u32, &str),
        (role, latents): (&'static str, &Artifact),
    ) -> Result<bool, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        let changed = transaction
            .execute(
                "UPDATE generations SET resume_step = $1, resume_plan = $2 WHERE id = $3 AND lease = $4",
                &[i64::from(step).into(), plan.into(), id.as_str().into(), lease.into()],
            )
            .await?;
        if changed == 0 {
            return Ok(false);
        }
        transaction.execute(KEEP_ARTIFACT, &artifact_values(&id, role, latents)).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Notes that the caller wants a generation stopped; false when there is none.
    pub(crate) async fn request_cancel(&self, id: Uuid) -> Result<bool, SqlError> {
        let changed = self.write("UPDATE generations SET cancel = 1 WHERE id = $1", &[id.to_string().into()]).await?;
        Ok(changed > 0)
    }

    /// Removes a generation with its events, and gives the hashes of its files; `None` when there is none.
    pub(crate) async fn delete(&self, id: Uuid) -> Result<Option<Vec<String>>, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        if transaction.execute("DELETE FROM generations WHERE id = $1", &[id.as_str().into()]).await? == 0 {
            return Ok(None);
        }
        let files =
            transaction.rows("SELECT hash FROM artifacts WHERE generation_id = $1", &[id.as_str().into()]).await?;
        transaction.execute("DELETE FROM events WHERE generation_id = $1", &[id.as_str().into()]).await?;
        webhooks::removed(&mut *transaction, &id).await?;
        transaction.execute("DELETE FROM artifacts WHERE generation_id = $1", &[id.into()]).await?;
        transaction.commit().await?;
        files.iter().map(|row| row.text(0).map(str::to_owned)).collect::<Result<_, _>>().map(Some)
    }

    /// A generation's file in a role.
    pub(crate) async fn artifact(&self, id: Uuid, role: &str) -> Result<Option<Artifact>, SqlError> {
        let rows = self
            .read(
                "SELECT hash, bytes FROM artifacts WHERE generation_id = $1 AND role = $2",
                &[id.to_string().into(), role.into()],
            )
            .await?;
        rows.first().map(artifact).transpose()
    }

    /// What a stage gave for the inputs and the model of a key; from now on also the generation's in the role, which
    /// only the holder of its lease can make it.
    pub(crate) async fn use_stage_output(
        &self,
        (id, lease, role): (Uuid, i64, &'static str),
        key: &str,
        now_ms: u64,
    ) -> Result<Option<Artifact>, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        if transaction.execute(HELD, &[id.as_str().into(), lease.into()]).await? == 0 {
            return Ok(None);
        }
        // Changed before it is read: nobody forgets it in between.
        let used = "UPDATE stage_outputs SET used_ms = $1 WHERE key = $2";
        transaction.execute(used, &[now_ms.into(), key.into()]).await?;
        let rows = transaction.rows("SELECT hash, bytes FROM stage_outputs WHERE key = $1", &[key.into()]).await?;
        let Some(artifact) = rows.first().map(artifact).transpose()? else { return Ok(None) };
        transaction.execute(KEEP_ARTIFACT, &artifact_values(&id, role, &artifact)).await?;
        transaction.commit().await?;
        Ok(Some(artifact))
    }

    /// Notes what a stage gave for the inputs and the model of a key; false, and nothing is noted, when the lease is
    /// lost.
    pub(crate) async fn keep_stage_output(
        &self,
        (id, lease, role): (Uuid, i64, &'static str),
        (key, output): (&str, &Artifact),
        now_ms: u64,
    ) -> Result<bool, SqlError> {
        let id = id.to_string();
        let mut transaction = self.engine.begin(Access::Write).await?;
        if transaction.execute(HELD, &[id.as_str().into(), lease.into()]).await? == 0 {
            return Ok(false);
        }
        transaction
            .execute(
                "INSERT INTO stage_outputs (key, hash, bytes, used_ms) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (key) DO UPDATE SET hash = excluded.hash, bytes = excluded.bytes, used_ms = excluded.used_ms",
                &[key.into(), output.hash.as_str().into(), output.bytes.into(), now_ms.into()],
            )
            .await?;
        transaction.execute(KEEP_ARTIFACT, &artifact_values(&id, role, output)).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Hashes of all files that belong to generations or are stages' outputs.
    pub(crate) async fn used_files(&self) -> Result<HashSet<String>, SqlError> {
        let rows = self.read("SELECT hash FROM artifacts UNION SELECT hash FROM stage_outputs", &[]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    }

    /// Forgets the stages' outputs that are in a file; gives whether there were any.
    pub(crate) async fn forget_file(&self, hash: &str) -> Result<bool, SqlError> {
        Ok(self.write("DELETE FROM stage_outputs WHERE hash = $1", &[hash.into()]).await? > 0)
    }

    /// The name of these records, which none other have; `made` if they have none yet.
    pub(crate) async fn name(&self, made: &str) -> Result<String, SqlError> {
        let statement = "INSERT INTO marks (name, value) VALUES ('records', $1) ON CONFLICT (name) DO NOTHING";
        self.write(statement, &[made.into()]).await?;
        let rows = self.read("SELECT value FROM marks WHERE name = 'records'", &[]).await?;
        let named = rows.first().ok_or_else(|| SqlError::Other("the records have no name".to_owned()))?;
        named.text(0).map(str::to_owned)
    }

    /// Ids of the generations that have a file.
    pub(crate) async fn users_of(&self, hash: &str) -> Result<Vec<String>, SqlError> {
        let rows = self.read("SELECT DISTINCT generation_id FROM artifacts WHERE hash = $1", &[hash.into()]).await?;
        rows.iter().map(|row| row.text(0).map(str::to_owned)).collect()
    }

    /// Whether a file belongs to a generation or is a stage's output.
    pub(crate) async fn is_used(&self, hash: &str) -> Result<bool, SqlError> {
        let rows = self
            .read(
                "SELECT hash FROM artifacts WHERE hash = $1 UNION ALL SELECT hash FROM stage_outputs WHERE hash = $1",
                &[hash.into()],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    pub(super) async fn read(
        &self,
        query: &'static str,
        values: &[super::engine::Value],
    ) -> Result<Vec<Cells>, SqlError> {
        self.engine.begin(Access::Read).await?.rows(query, values).await
    }

    pub(super) async fn write(
        &self,
        statement: &'static str,
        values: &[super::engine::Value],
    ) -> Result<u64, SqlError> {
        let mut transaction = self.engine.begin(Access::Write).await?;
        let changed = transaction.execute(statement, values).await?;
        transaction.commit().await?;
        Ok(changed)
    }
}

const LIST_NEWEST_FIRST: &str = "SELECT body FROM generations WHERE id > $1 AND id < $2 \
     AND ($3 >> CAST(state AS INTEGER)) & 1 = 1 AND ($5 = '' OR caller = $5) AND ($6 = '' OR label = $6) \
     ORDER BY id DESC LIMIT $4";
const LIST_OLDEST_FIRST: &str = "SELECT body FROM generations WHERE id > $1 AND id < $2 \
     AND ($3 >> CAST(state AS INTEGER)) & 1 = 1 AND ($5 = '' OR caller = $5) AND ($6 = '' OR label = $6) \
     ORDER BY id LIMIT $4";
/// Gives a caller the latest turn.
const SERVED: &str = "INSERT INTO callers (caller, served) \
     VALUES ($1, (SELECT COALESCE(MAX(served), 0) + 1 FROM callers)) \
     ON CONFLICT (caller) DO UPDATE SET served = excluded.served";
const KEEP_ARTIFACT: &str = "INSERT INTO artifacts (generation_id, role, hash, bytes) VALUES ($1, $2, $3, $4) \
     ON CONFLICT (generation_id, role) DO UPDATE SET hash = excluded.hash, bytes = excluded.bytes";
/// Changes nothing, and keeps others from changing the generation for the rest of the transaction, where the lease holds.
const HELD: &str = "UPDATE generations SET lease = lease WHERE id = $1 AND lease = $2";
const PRESENT: &str = "INSERT INTO replicas (name, until_ms) VALUES ($1, $2) \
     ON CONFLICT (name) DO UPDATE SET until_ms = excluded.until_ms";
const DROP_ARTIFACT: &str = "DELETE FROM artifacts WHERE generation_id = $1 AND role = $2";

fn artifact_values(id: &str, role: &str, artifact: &Artifact) -> [super::engine::Value; 4] {
    [id.into(), role.into(), artifact.hash.as_str().into(), artifact.bytes.into()]
}

fn artifact(row: &Cells) -> Result<Artifact, SqlError> {
    Ok(Artifact { hash: row.text(0)?.to_owned(), bytes: row.count(1)? })
}

fn row(cells: &Cells) -> Result<Row, SqlError> {
    let step = u32::try_from(cells.count(4)?).unwrap_or(0);
    Ok(Row {
        generation: message(cells.bytes(0)?)?,
        last_event: cells.count(1)?,
        cancel: cells.int(2)? != 0,
        lease: cells.int(3)?,
        resume: (step, cells.text(5)?.to_owned()),
    })
}

fn message<M: prost::Message + Default>(bytes: &[u8]) -> Result<M, SqlError> {
    M::decode(bytes).map_err(|error| SqlError::Other(format!("a record cannot be read: {error}")))
}

fn identity(text: &str) -> Result<Uuid, SqlError> {
    Uuid::try_parse(text).map_err(|error| SqlError::Other(format!("{text:?} is no id: {error}")))
}
