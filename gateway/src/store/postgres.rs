//! PostgreSQL: one database for several gateways.

use std::{fmt, str::FromStr, time::Duration};

use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::engine::{Access, Cells, Engine, Hold, SqlError, Transaction, Value, transaction};

/// `disk_full`.
const FULL: &str = "53100";
/// What a session may not wait between two statements of a transaction: a gateway that stands still there must not
/// keep rows from the others.
const STANDSTILL: &str = "10s";
/// Nor may the removal of a file keep others from naming one with the same content for longer than this. What names a
/// file keeps nobody waiting, however long it takes.
const BRIEF_REMOVAL: &str = "SET LOCAL idle_in_transaction_session_timeout = '60s'";
/// How a session ends whose gateway's machine is gone.
const KEEPALIVES: [(&str, &str); 3] =
    [("tcp_keepalives_idle", "5"), ("tcp_keepalives_interval", "2"), ("tcp_keepalives_count", "3")];
/// How long a statement waits for a connection, also while the server starts.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections for statements, and for the holds on files, whose holders need one of the former besides.
const CONNECTIONS: u32 = 16;
/// Which of a database's advisory locks is that on the tables.
const TABLES: i64 = 0x6176_6174_6172;

/// Where a PostgreSQL database is. Shown without its password.
#[derive(Clone, PartialEq, Eq)]
pub struct Database {
    url: String,
    password: Option<String>,
}

impl Database {
    /// Reads a URL as in `postgres://USER:PASSWORD@HOST:PORT/NAME`; `password` replaces that in it.
    ///
    /// Errors: what is wrong, without the URL.
    pub fn new(url: &str, password: Option<String>) -> Result<Self, String> {
        if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err("it does not begin with postgres://".to_owned());
        }
        PgConnectOptions::from_str(url).map_err(|error| error.to_string())?;
        Ok(Self { url: url.to_owned(), password })
    }

    fn options(&self) -> Result<PgConnectOptions, SqlError> {
        let options = PgConnectOptions::from_str(&self.url).map_err(failed)?.application_name("avatar-gateway");
        // What is answered must outlive the server's crash, whatever the database is set to.
        let options = options.options(KEEPALIVES).options([("synchronous_commit", "on")]);
        Ok(self.password.iter().fold(options, |options, password| options.password(password)))
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(options) = PgConnectOptions::from_str(&self.url) else { return f.write_str("postgres") };
        let host = options.get_socket().map_or_else(|| options.get_host().into(), |path| path.to_string_lossy());
        let name = options.get_database().unwrap_or(options.get_username());
        write!(f, "postgres://{}@{host}:{}/{name}", options.get_username(), options.get_port())
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({self})")
    }
}

/// A database of records.
#[derive(Debug)]
pub(crate) struct Postgres {
    statements: PgPool,
    holds: PgPool,
}

impl Postgres {
    /// Connects.
    pub(crate) async fn open(database: &Database) -> Result<Self, SqlError> {
        let options = database.options()?;
        let brief = options.clone().options([("idle_in_transaction_session_timeout", STANDSTILL)]);
        let pool = || PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
        let statements = pool().connect_with(brief).await.map_err(failed)?;
        Ok(Self { statements, holds: pool().connect_lazy_with(options) })
    }

    async fn hold(&self) -> Result<Open, SqlError> {
        Ok(Open(self.holds.begin().await.map_err(failed)?))
    }
}

#[tonic::async_trait]
impl Engine for Postgres {
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError> {
        let begun = match access {
            Access::Read => self.statements.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await,
            // Each statement sees what others have committed: rows are changed under conditions that are tested anew
            // once a row is free.
            Access::Write | Access::Schema => self.statements.begin().await,
        };
        let mut open = Open(begun.map_err(failed)?);
        if access == Access::Schema {
            open.execute("SELECT pg_advisory_xact_lock($1)", &[TABLES.into()]).await?;
        }
        Ok(Box::new(open))
    }

    fn bytes_type(&self) -> &'static str {
        "BYTEA"
    }

    fn claim(&self) -> &'static str {
        "UPDATE generations SET lease = lease + 1, lease_until_ms = $1 WHERE id = \
         (SELECT id FROM generations WHERE id = $2 AND state < $3 AND lease_until_ms <= $4 FOR UPDATE SKIP LOCKED)"
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn now_ms(&self) -> Result<u64, SqlError> {
        let query = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
        let row = sqlx::query(query).fetch_one(&self.statements).await.map_err(failed)?;
        cells(&row)?.count(0)
    }

    async fn name_files(&self, hashes: &[&str]) -> Result<Box<dyn Hold>, SqlError> {
        let mut open = self.hold().await?;
        for hash in hashes {
            open.execute("SELECT pg_advisory_xact_lock_shared($1)", &[lock_of(hash)]).await?;
        }
        Ok(Box::new(open))
    }

    async fn remove_file(&self, hash: &str) -> Result<Option<Box<dyn Hold>>, SqlError> {
        let mut open = self.hold().await?;
        open.execute(BRIEF_REMOVAL, &[]).await?;
        let query = "SELECT CAST(CASE WHEN pg_try_advisory_xact_lock($1) THEN 1 ELSE 0 END AS BIGINT)";
        let rows = open.rows(query, &[lock_of(hash)]).await?;
        let alone = rows.first().map_or(Ok(0), |row: &Cells| row.int(0))? == 1;
        Ok(if alone { Some(Box::new(open)) } else { None })
    }
}

#[tonic::async_trait]
impl Hold for Open {
    async fn release(self: Box<Self>) {
        // A connection that is lost has released it already.
        if let Err(error) = self.0.rollback().await {
            tracing::debug!(%error, "a hold on files ended with its connection");
        }
    }
}

/// The advisory lock of a file. Two hashes may share one, which only makes one of them wait.
fn lock_of(hash: &str) -> Value {
    let bits = hash.get(..16).and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0);
    Value::Int(bits.cast_signed())
}

/// Lost and refused connections, shutdown, too many connections, and transactions that stood in each other's way.
fn is_away(code: &str) -> bool {
    ["08", "57P", "40", "53300", "25P03"].iter().any(|begin| code.starts_with(begin))
}

transaction!(
    sqlx::Postgres,
    sqlx::Transaction<'static, sqlx::Postgres>,
    sqlx::postgres::PgRow,
    sqlx::postgres::PgArguments
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_shown_without_its_password() {
        let database = Database::new("postgres://me:first@db.example:5433/avatar", Some("second".into())).unwrap();
        let shown = format!("{database} {database:?}");
        assert!(shown.contains("postgres://me@db.example:5433/avatar"), "{shown}");
        assert!(!shown.contains("first") && !shown.contains("second"), "{shown}");
        let socket = Database::new("postgres://me@%2Frun%2Fpostgresql/avatar", None).unwrap();
        assert!(socket.to_string().contains("/run/postgresql"), "{socket}");
    }

    #[test]
    fn a_url_that_is_none_of_postgresql_is_refused_without_being_repeated() {
        for url in ["mysql://me:first@host/db", "postgres://me:first@host:port/db", "first"] {
            let refused = Database::new(url, None).unwrap_err();
            assert!(!refused.contains("first"), "{refused}");
        }
    }
}
