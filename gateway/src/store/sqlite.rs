//! SQLite: one file, one process.

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    sync::Arc,
    time::Duration,
};

use sqlx::{
    ConnectOptions as _, SqlSafeStr as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous, SqliteTransactionManager},
};
use sqlx_core::transaction::TransactionManager as _;
use tokio::sync::{
    Mutex, OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, OwnedSemaphorePermit, RwLock, Semaphore,
};

use super::{
    engine::{Access, Engine, Hold, SqlError, Transaction, transaction},
    unix_ms,
};

/// `SQLITE_FULL`.
const FULL: &str = "13";
/// `SQLITE_BUSY`, and what it is waited for: a recovery, or another's newer state.
const BUSY_CODES: [&str; 3] = ["5", "261", "517"];
/// How long a statement waits for a reader or a checkpoint of the log, and a transaction for a connection.
const PATIENCE: Duration = Duration::from_secs(30);
/// Readers that look at the same time; they do not wait for the writer.
const READERS: usize = 4;

/// A file of records.
#[derive(Debug)]
pub(crate) struct Sqlite {
    /// One connection: SQLite has one writer, and here they wait in order.
    writer: Lines,
    readers: Lines,
    /// Held for reading from before a file is kept until a record names it, and for writing while a file is removed
    /// that no record names. All who do so are in this process.
    naming: Arc<RwLock<()>>,
}

/// Connections to the file, each for one at a time.
///
/// Not a pool of sqlx: that gives a connection back by a task of its own, so that a runtime without a free thread keeps
/// the only writer from everybody.
#[derive(Debug)]
struct Lines {
    options: SqliteConnectOptions,
    free: Arc<Semaphore>,
    connections: Vec<Arc<Mutex<SqliteConnection>>>,
}

/// A connection with a transaction; dropping it undoes that, and gives the connection back at once.
struct Line {
    // Given back before the permit for it.
    connection: OwnedMutexGuard<SqliteConnection>,
    _permit: OwnedSemaphorePermit,
    committed: bool,
}

impl Lines {
    async fn open(options: &SqliteConnectOptions, at_once: usize) -> Result<Self, sqlx::Error> {
        let mut connections = Vec::with_capacity(at_once);
        for _ in 0..at_once {
            connections.push(Arc::new(Mutex::new(options.connect().await?)));
        }
        Ok(Self { options: options.clone(), free: Arc::new(Semaphore::new(at_once)), connections })
    }

    async fn begin(&self, statement: &'static str) -> Result<Line, sqlx::Error> {
        let taken = tokio::time::timeout(PATIENCE, Arc::clone(&self.free).acquire_owned()).await;
        let permit = taken.map_err(|_| sqlx::Error::PoolTimedOut)?.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.connections.iter().find_map(|one| Arc::clone(one).try_lock_owned().ok());
        // There are as many permits as connections.
        let mut connection = idle.ok_or(sqlx::Error::PoolTimedOut)?;
        let begin = || Some(statement.into_sql_str());
        match SqliteTransactionManager::begin(&mut connection, begin()).await {
            // Its thread has ended, as it does after a rollback that failed.
            Err(sqlx::Error::WorkerCrashed) => {
                *connection = self.options.connect().await?;
                SqliteTransactionManager::begin(&mut connection, begin()).await?;
            }
            begun => begun?,
        }
        Ok(Line { connection, _permit: permit, committed: false })
    }
}

impl Deref for Line {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for Line {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

impl Line {
    async fn commit(mut self) -> Result<(), sqlx::Error> {
        SqliteTransactionManager::commit(&mut self.connection).await?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.committed {
            // Before whatever the next holder asks of the connection's own thread.
            SqliteTransactionManager::start_rollback(&mut self.connection);
        }
    }
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
            .busy_timeout(PATIENCE);
        // The file is there, and has its log, before the readers open it.
        let writer = Lines::open(&options, 1).await.map_err(failed)?;
        let readers = Lines::open(&options, READERS).await.map_err(failed)?;
        Ok(Self { writer, readers, naming: Arc::default() })
    }
}

/// Taken at once: a reader that turns writer in the middle can be refused.
const WRITE: &str = "BEGIN IMMEDIATE";

#[tonic::async_trait]
impl Engine for Sqlite {
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError> {
        let begun = match access {
            Access::Read => self.readers.begin("BEGIN").await,
            Access::Write | Access::Schema => self.writer.begin(WRITE).await,
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
    BUSY_CODES.contains(&code)
}

transaction!(sqlx::Sqlite, Line, sqlx::sqlite::SqliteRow, sqlx::sqlite::SqliteArguments);
