//! The tables, and how an older file gets them.

use super::engine::{Access, Engine, SqlError};

/// Steps from nothing to the newest schema; a step that was released is never changed. `{bytes}` is a column of bytes.
const STEPS: [&str; 5] = [
    "
    CREATE TABLE generations (
        id TEXT PRIMARY KEY,
        state BIGINT NOT NULL,
        ended_ms BIGINT NOT NULL,
        last_event BIGINT NOT NULL,
        caller TEXT NOT NULL,
        priority BIGINT NOT NULL,
        idempotency_key TEXT NOT NULL,
        request_hash TEXT NOT NULL,
        attached BIGINT NOT NULL,
        cancel BIGINT NOT NULL,
        lease BIGINT NOT NULL,
        lease_until_ms BIGINT NOT NULL,
        resume_step BIGINT NOT NULL,
        resume_plan TEXT NOT NULL,
        body {bytes} NOT NULL
    );
    CREATE UNIQUE INDEX generations_key ON generations (caller, idempotency_key) WHERE idempotency_key <> '';
    CREATE INDEX generations_state ON generations (state, id);
    CREATE INDEX generations_ended ON generations (ended_ms, id);
    CREATE TABLE callers (
        caller TEXT PRIMARY KEY,
        served BIGINT NOT NULL
    );
    CREATE TABLE events (
        generation_id TEXT NOT NULL,
        number BIGINT NOT NULL,
        body {bytes} NOT NULL,
        PRIMARY KEY (generation_id, number)
    );
    CREATE TABLE artifacts (
        generation_id TEXT NOT NULL,
        role TEXT NOT NULL,
        hash TEXT NOT NULL,
        bytes BIGINT NOT NULL,
        PRIMARY KEY (generation_id, role)
    );
    CREATE INDEX artifacts_hash ON artifacts (hash);
    CREATE TABLE stage_outputs (
        key TEXT PRIMARY KEY,
        hash TEXT NOT NULL,
        bytes BIGINT NOT NULL,
        used_ms BIGINT NOT NULL
    );
    CREATE INDEX stage_outputs_hash ON stage_outputs (hash);
",
    "
    CREATE TABLE replicas (
        name TEXT PRIMARY KEY,
        until_ms BIGINT NOT NULL
    );
    ALTER TABLE generations ADD COLUMN replica TEXT NOT NULL DEFAULT '';
",
    "
    CREATE TABLE webhooks (
        generation_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,
        due_ms BIGINT NOT NULL,
        until_ms BIGINT NOT NULL,
        attempts BIGINT NOT NULL,
        body {bytes} NOT NULL
    );
    CREATE INDEX webhooks_due ON webhooks (due_ms);
",
    // Rows of before have the deadline in their body alone: 0 has that looked at.
    "
    ALTER TABLE generations ADD COLUMN deadline_ms BIGINT NOT NULL DEFAULT 0;
    CREATE TABLE marks (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    );
",
    "
    ALTER TABLE generations ADD COLUMN label TEXT NOT NULL DEFAULT '';
",
];

/// Why the tables cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SchemaError {
    /// A newer program made them.
    #[error("its schema has version {found}, and this program knows versions up to {known}: use a newer program")]
    Newer {
        /// The version found.
        found: i64,
        /// The newest version known here.
        known: i64,
    },
    /// The database refused.
    #[error("{0}")]
    Sql(#[from] SqlError),
}

/// Brings the tables to the newest version.
pub(crate) async fn migrate(engine: &dyn Engine) -> Result<(), SchemaError> {
    take(engine, &STEPS).await
}

/// Takes those of the steps that the tables have not taken yet.
async fn take(engine: &dyn Engine, steps: &[&str]) -> Result<(), SchemaError> {
    let known = steps.len() as i64;
    let mut transaction = engine.begin(Access::Schema).await?;
    transaction.script("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)".to_owned()).await?;
    let found = match transaction.rows("SELECT version FROM schema_version", &[]).await?.first() {
        Some(row) => row.int(0)?,
        None => {
            transaction.execute("INSERT INTO schema_version (version) VALUES (0)", &[]).await?;
            0
        }
    };
    if found > known {
        return Err(SchemaError::Newer { found, known });
    }
    for step in steps.iter().skip(usize::try_from(found).unwrap_or(0)) {
        transaction.script(step.replace("{bytes}", engine.bytes_type())).await?;
    }
    transaction.execute("UPDATE schema_version SET version = $1", &[known.into()]).await?;
    Ok(transaction.commit().await?)
}

/// Brings empty tables to the version that the first release had.
#[cfg(test)]
pub(super) async fn first(engine: &dyn Engine) -> Result<(), SchemaError> {
    take(engine, &STEPS[..1]).await
}
