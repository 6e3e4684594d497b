//! SQLite: one file, one process.

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::{
    engine::{Access, Engine, Hold, SqlError, Transaction, transaction},
    unix_ms,
};

/// `SQLITE_FULL`.
const FULL: &str = "13";
/// `SQLITE_BUSY`.
const BUSY_CODE: &str = "5";
/// How long a statement waits for a reader or a checkpoint of the log.
const BUSY: Duration = Duration::from_secs(30);
/// Readers that look at the same time; they do not wait for the writer.
const READERS: u32 = 4;

/// A file of records.
#[derive(Debug)]
pub(crate) struct Sqlite {
    /// One connection: SQLite has one writer, and here they wait in order.
    writer: SqlitePool,
    readers: SqlitePool,
    /// Held for reading from before a file is kept until a record names it, and for writing while a file is removed
    /// that no record names. All who do so are in this process.
    naming: Arc<RwLock<()>>,
}

impl Sqlite {
    /// Opens the file, made if missing.
    pub(crate) async fn open(file: &Path) -> Result<Self, SqlError> {
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // Each commit is on the disk before it is acknowledged.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY);
        let pool = |connections| SqlitePoolOptions::new().max_connections(connections);
        let writer = pool(1).connect_with(options.clone()).await.map_err(failed)?;
        let readers = pool(READERS).connect_with(options).await.map_err(failed)?;
        Ok(Self { writer, readers, naming: Arc::default() })
    }
}

#[tonic::async_trait]
impl Engine for Sqlite {
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError> {
        let begun = match access {
            Access::Read => self.readers.begin().await,
            // Taken at once: a reader that turns writer in the middle can be refused.
            Access::Write | Access::Schema => self.writer.begin_with("BEGIN IMMEDIATE").await,
        };
        Ok(Box::new(Open(begun.map_err(failed)?)))
    }

    fn bytes_type(&self) -> &'static str {
        "BLOB"
    }

    fn claim(&self) -> &'static str {
        "UPDATE generations SET lease = lease + 1, lease_until_ms = $1 \
         WHERE id = $2 AND state < $3 AND lease_until_ms <= $4"
    }

    fn is_shared(&self) -> bool {
        false
    }

    async fn now_ms(&self) -> Result<u64, SqlError> {
        Ok(unix_ms())
    }

    async fn name_files(&self, _: &[&str]) -> Result<Box<dyn Hold>, SqlError> {
        Ok(Box::new(Arc::clone(&self.naming).read_owned().await))
    }

    async fn remove_file(&self, _: &str) -> Result<Option<Box<dyn Hold>>, SqlError> {
        Ok(Some(Box::new(Arc::clone(&self.naming).write_owned().await)))
    }
}

#[tonic::async_trait]
impl Hold for OwnedRwLockReadGuard<()> {
    async fn release(self: Box<Self>) {}
}

#[tonic::async_trait]
impl Hold for OwnedRwLockWriteGuard<()> {
    async fn release(self: Box<Self>) {}
}

fn is_away(code: &str) -> bool {
    code == BUSY_CODE
}

transaction!(sqlx::Sqlite, sqlx::sqlite::SqliteRow, sqlx::sqlite::SqliteArguments);
