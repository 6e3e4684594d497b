//! The databases behind the store, behind one small interface: transactions of plain statements.
//!
//! Statements are written once, for every engine: parameters are `$1`, `$2`, …, columns are integers (`BIGINT`),
//! texts and bytes, and nothing is NULL.

use std::fmt::Debug;

/// What a transaction may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read a consistent state.
    Read,
    /// Change it; what is committed outlives a loss of power.
    Write,
    /// Change the tables; nobody else does so meanwhile.
    Schema,
}

/// A parameter, or a column of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// `BIGINT`.
    Int(i64),
    /// `TEXT`.
    Text(String),
    /// `BLOB` or `BYTEA`.
    Bytes(Vec<u8>),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u64> for Value {
    /// Numbers past what a column holds are times and sizes that no machine has.
    fn from(value: u64) -> Self {
        Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Vec<u8>> for Value {
    fn from(value: Vec<u8>) -> Self {
        Self::Bytes(value)
    }
}

/// Why the database did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SqlError {
    /// No space is left for it.
    #[error("the database's disk is full: {0}")]
    Full(String),
    /// A row with this key is there already.
    #[error("a row with this key is there already")]
    Unique,
    /// It does not answer now, or cannot do it now; the same may well be done later.
    #[error("the database does not answer: {0}")]
    Away(String),
    /// Anything else.
    #[error("the database: {0}")]
    Other(String),
}

/// One row of an answer.
#[derive(Debug)]
pub(crate) struct Cells(pub(crate) Vec<Value>);

impl Cells {
    /// The integer in a column.
    pub(crate) fn int(&self, column: usize) -> Result<i64, SqlError> {
        match self.0.get(column) {
            Some(Value::Int(value)) => Ok(*value),
            other => Err(unexpected(column, "an integer", other)),
        }
    }

    /// The integer in a column that is never negative.
    pub(crate) fn count(&self, column: usize) -> Result<u64, SqlError> {
        let value = self.int(column)?;
        u64::try_from(value).map_err(|_| SqlError::Other(format!("column {column} is {value}; it cannot be negative")))
    }

    /// The text in a column.
    pub(crate) fn text(&self, column: usize) -> Result<&str, SqlError> {
        match self.0.get(column) {
            Some(Value::Text(value)) => Ok(value),
            other => Err(unexpected(column, "a text", other)),
        }
    }

    /// The bytes in a column.
    pub(crate) fn bytes(&self, column: usize) -> Result<&[u8], SqlError> {
        match self.0.get(column) {
            Some(Value::Bytes(value)) => Ok(value),
            other => Err(unexpected(column, "bytes", other)),
        }
    }
}

fn unexpected(column: usize, wanted: &str, found: Option<&Value>) -> SqlError {
    let found = match found {
        None => "missing",
        Some(Value::Int(_)) => "an integer",
        Some(Value::Text(_)) => "a text",
        Some(Value::Bytes(_)) => "bytes",
    };
    SqlError::Other(format!("column {column} is {found}, not {wanted}"))
}

/// A database.
#[tonic::async_trait]
pub(crate) trait Engine: Debug + Send + Sync {
    /// Begins a transaction. Dropping it undoes it.
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError>;

    /// What this database calls a column of bytes.
    fn bytes_type(&self) -> &'static str;

    /// The statement that takes a generation for the holder of a lease until `$1`: the one with the id `$2`, if its
    /// state is below `$3` and its lease ended by `$4`. One that somebody is just changing is left alone.
    fn claim(&self) -> &'static str;

    /// Whether other processes may use the database too.
    fn is_shared(&self) -> bool;

    /// Milliseconds since 1970, by the one clock of all who use the database.
    async fn now_ms(&self) -> Result<u64, SqlError>;

    /// From the answer on until it is released nobody removes files of these hashes.
    async fn name_files(&self, hashes: &[&str]) -> Result<Box<dyn Hold>, SqlError>;

    /// From the answer on until it is released nobody names a file of this hash; `None` while somebody is about to.
    async fn remove_file(&self, hash: &str) -> Result<Option<Box<dyn Hold>>, SqlError>;
}

/// Keeps others away from files. Dropping it releases it too, a little later.
#[tonic::async_trait]
pub(crate) trait Hold: Send {
    /// Lets the others go on.
    async fn release(self: Box<Self>);
}

/// Statements that take effect together, or not at all.
#[tonic::async_trait]
pub(crate) trait Transaction: Send {
    /// Runs a statement; gives the number of rows that it changed.
    async fn execute(&mut self, statement: &'static str, values: &[Value]) -> Result<u64, SqlError>;

    /// Runs a query.
    async fn rows(&mut self, query: &'static str, values: &[Value]) -> Result<Vec<Cells>, SqlError>;

    /// Runs several statements without parameters, such as a change of the schema.
    async fn script(&mut self, statements: String) -> Result<(), SqlError>;

    /// Makes it so.
    async fn commit(self: Box<Self>) -> Result<(), SqlError>;
}

/// Implements [`Transaction`] for a database of sqlx; the modules differ only in what they connect to.
macro_rules! transaction {
    ($database:ty, $row:ty, $arguments:ty) => {
        use sqlx::{Column as _, Executor as _, Row as _, TypeInfo as _};

        struct Open(sqlx::Transaction<'static, $database>);

        fn query(
            statement: &'static str,
            values: &[$crate::store::engine::Value],
        ) -> sqlx::query::Query<'static, $database, $arguments> {
            use $crate::store::engine::Value;
            values.iter().fold(sqlx::query(statement), |query, value| match value {
                Value::Int(value) => query.bind(*value),
                Value::Text(value) => query.bind(value.clone()),
                Value::Bytes(value) => query.bind(value.clone()),
            })
        }

        fn cells(row: &$row) -> Result<$crate::store::engine::Cells, $crate::store::engine::SqlError> {
            use $crate::store::engine::{Cells, Value};
            let read = |i: usize| match row.column(i).type_info().name() {
                "TEXT" => row.try_get(i).map(Value::Text),
                "BLOB" | "BYTEA" => row.try_get(i).map(Value::Bytes),
                _ => row.try_get(i).map(Value::Int),
            };
            (0..row.len()).map(read).collect::<Result<_, _>>().map(Cells).map_err(failed)
        }

        #[tonic::async_trait]
        impl $crate::store::engine::Transaction for Open {
            async fn execute(
                &mut self,
                statement: &'static str,
                values: &[$crate::store::engine::Value],
            ) -> Result<u64, $crate::store::engine::SqlError> {
                let done = query(statement, values).execute(&mut *self.0).await.map_err(failed)?;
                Ok(done.rows_affected())
            }

            async fn rows(
                &mut self,
                statement: &'static str,
                values: &[$crate::store::engine::Value],
            ) -> Result<Vec<$crate::store::engine::Cells>, $crate::store::engine::SqlError> {
                let rows = query(statement, values).fetch_all(&mut *self.0).await.map_err(failed)?;
                rows.iter().map(cells).collect()
            }

            async fn script(&mut self, statements: String) -> Result<(), $crate::store::engine::SqlError> {
                // Made of constants of `schema.rs` alone.
                self.0.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(statements))).await.map(drop).map_err(failed)
            }

            async fn commit(self: Box<Self>) -> Result<(), $crate::store::engine::SqlError> {
                self.0.commit().await.map_err(failed)
            }
        }

        fn failed(error: sqlx::Error) -> $crate::store::engine::SqlError {
            use $crate::store::engine::SqlError;
            match &error {
                sqlx::Error::Database(fault) if fault.is_unique_violation() => SqlError::Unique,
                sqlx::Error::Database(fault) => match fault.code() {
                    Some(code) if code == FULL => SqlError::Full(fault.message().to_owned()),
                    Some(code) if is_away(&code) => SqlError::Away(fault.message().to_owned()),
                    _ => SqlError::Other(error.to_string()),
                },
                sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => {
                    SqlError::Away(error.to_string())
                }
                _ => SqlError::Other(error.to_string()),
            }
        }
    };
}

pub(crate) use transaction;
