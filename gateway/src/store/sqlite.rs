//! SQLite: one file, one process.

use std::{path::Path, time::Duration};

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::engine::{Access, Engine, SqlError, Transaction, transaction};

/// `SQLITE_FULL`.
const FULL: &str = "13";
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
        Ok(Self { writer, readers })
    }
}

#[tonic::async_trait]
impl Engine for Sqlite {
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError> {
        let begun = match access {
            Access::Read => self.readers.begin().await,
            // Taken at once: a reader that turns writer in the middle can be refused.
            Access::Write => self.writer.begin_with("BEGIN IMMEDIATE").await,
        };
        Ok(Box::new(Open(begun.map_err(failed)?)))
    }

    fn bytes_type(&self) -> &'static str {
        "BLOB"
    }
}

transaction!(sqlx::Sqlite, sqlx::sqlite::SqliteRow, sqlx::sqlite::SqliteArguments);
