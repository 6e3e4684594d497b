//! Where a case's records and files are, and a clock that only the case moves.

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use futures::stream::{self, BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, memory::InMemory, path::Path as Name,
};
use sqlx::{Connection as _, PgConnection};

use super::*;
use crate::store::engine::{Access, Transaction, Value};

/// How long a lease of a case lasts.
pub(super) const LEASE_MS: u64 = 15_000;

/// A folder, a database if it is not a file in there, and a bucket if files are not in there.
pub(super) struct Home {
    dir: TempDir,
    database: Option<Database>,
    bucket: Option<Arc<Moody>>,
    now_ms: Arc<AtomicU64>,
    /// No space is left for records and files.
    full: Arc<AtomicBool>,
}

impl Home {
    pub(super) async fn on_a_file() -> Self {
        let now_ms = Arc::new(AtomicU64::new(unix_ms()));
        Self { dir: tempfile::tempdir().unwrap(), database: None, bucket: None, now_ms, full: Arc::default() }
    }

    /// Records in a file, and files in a bucket in memory.
    pub(super) async fn with_a_bucket() -> Self {
        Self { bucket: Some(Arc::default()), ..Self::on_a_file().await }
    }

    /// The object store, where the files are in one.
    pub(super) fn moody(&self) -> &Moody {
        self.bucket.as_ref().unwrap()
    }

    /// Fills the disk of records and files, or makes room on it.
    pub(super) fn fill(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    fn files(&self) -> Files {
        match self.bucket.clone() {
            None => Files::Folder(Arc::new(Filling(Arc::clone(&self.full)))),
            Some(store) => Files::Bucket(Bucket::new("memory", store, Name::from("avatar"))),
        }
    }

    /// A database of its own on the server.
    pub(super) async fn on_a_server(server: &Server) -> Self {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let name = format!("case_{}", MADE.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
        let statement = format!("CREATE DATABASE {name}");
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        Self { database: Some(Database::new(&server.url(&name), None).unwrap()), ..Self::on_a_file().await }
    }

    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn records(&self) -> Records {
        Records { database: self.database.clone(), ..Records::default() }
    }

    /// Lets time go on.
    pub(super) fn pass(&self, ms: u64) {
        self.now_ms.fetch_add(ms, Ordering::Relaxed);
    }

    /// The database as it is.
    pub(super) async fn engine(&self) -> Arc<dyn Engine> {
        let engine: Arc<dyn Engine> = match &self.database {
            None => Arc::new(Sqlite::open(&self.dir().join("avatar.db")).await.unwrap()),
            Some(database) => Arc::new(Postgres::open(database).await.unwrap()),
        };
        Arc::new(Clocked { engine, now_ms: Arc::clone(&self.now_ms), full: Arc::clone(&self.full) })
    }

    /// Runs one statement.
    pub(super) async fn run(&self, statement: &'static str, values: &[Value]) {
        let mut transaction = self.engine().await.begin(Access::Write).await.unwrap();
        transaction.execute(statement, values).await.unwrap();
        transaction.commit().await.unwrap();
    }

    /// One more process that uses the records.
    pub(super) async fn open(&self) -> Store {
        let lock = lock_folder(self.dir(), self.database.is_some()).unwrap();
        let engine = self.engine().await;
        schema::migrate(&*engine).await.unwrap();
        Store::with(self.dir(), lock, engine, self.files(), Duration::from_millis(LEASE_MS)).await.unwrap()
    }

    /// The first process after all others have ended.
    pub(super) async fn open_after_a_stop(&self) -> Store {
        self.pass(LEASE_MS);
        self.open().await
    }
}

/// A disk that may have no space left.
#[derive(Debug)]
struct Filling(Arc<AtomicBool>);

impl Filling {
    fn room(&self) -> io::Result<()> {
        if self.0.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Disk for Filling {
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.room().and_then(|()| Real.make_folder(path))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.room().and_then(|()| Real.write(path, bytes))
    }

    fn flush_file(&self, path: &Path) -> io::Result<()> {
        Real.flush_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.room().and_then(|()| Real.rename(from, to))
    }

    fn flush_folder(&self, path: &Path) -> io::Result<()> {
        Real.flush_folder(path)
    }
}

/// An object store in memory that may refuse everything.
#[derive(Debug, Default)]
pub(super) struct Moody {
    memory: InMemory,
    refuses: AtomicBool,
    refused: AtomicUsize,
}

impl Moody {
    /// Has it refuse everything, or nothing.
    pub(super) fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// What it refused so far.
    pub(super) fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    fn asked(&self) -> object_store::Result<&InMemory> {
        if !self.refuses.load(Ordering::SeqCst) {
            return Ok(&self.memory);
        }
        self.refused.fetch_add(1, Ordering::SeqCst);
        Err(object_store::Error::Generic { store: "moody", source: "503".into() })
    }
}

impl std::fmt::Display for Moody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("moody")
    }
}

#[tonic::async_trait]
impl ObjectStore for Moody {
    async fn put_opts(&self, at: &Name, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.asked()?.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Name,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.asked()?.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Name, options: GetOptions) -> object_store::Result<GetResult> {
        self.asked()?.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        names: BoxStream<'static, object_store::Result<Name>>,
    ) -> BoxStream<'static, object_store::Result<Name>> {
        match self.asked() {
            Ok(memory) => memory.delete_stream(names),
            Err(error) => Box::pin(stream::iter([Err(error)])),
        }
    }

    fn list(&self, prefix: Option<&Name>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.asked() {
            Ok(memory) => memory.list(prefix),
            Err(error) => Box::pin(stream::iter([Err(error)])),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Name>) -> object_store::Result<ListResult> {
        self.asked()?.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Name, to: &Name, options: CopyOptions) -> object_store::Result<()> {
        self.asked()?.copy_opts(from, to, options).await
    }
}

/// A database whose clock stands still until it is moved, and whose disk may be full.
#[derive(Debug)]
struct Clocked {
    engine: Arc<dyn Engine>,
    now_ms: Arc<AtomicU64>,
    full: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl Engine for Clocked {
    async fn begin(&self, access: Access) -> Result<Box<dyn Transaction>, SqlError> {
        if access == Access::Write && self.full.load(Ordering::SeqCst) {
            return Err(SqlError::Full("database or disk is full".to_owned()));
        }
        self.engine.begin(access).await
    }

    fn bytes_type(&self) -> &'static str {
        self.engine.bytes_type()
    }

    fn claim(&self) -> &'static str {
        self.engine.claim()
    }

    fn is_shared(&self) -> bool {
        self.engine.is_shared()
    }

    async fn now_ms(&self) -> Result<u64, SqlError> {
        // The real one must be readable too.
        let real = self.engine.now_ms().await?;
        assert!(real.abs_diff(unix_ms()) < 600_000, "{real} is not the time");
        Ok(self.now_ms.load(Ordering::Relaxed))
    }

    async fn name_files(&self, hashes: &[&str]) -> Result<Box<dyn Hold>, SqlError> {
        self.engine.name_files(hashes).await
    }

    async fn remove_file(&self, hash: &str) -> Result<Option<Box<dyn Hold>>, SqlError> {
        self.engine.remove_file(hash).await
    }
}
