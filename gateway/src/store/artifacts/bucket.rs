//! A bucket of an object store, or all that is below a prefix in it.
//!
//! An object appears when all of it has come, so a name that exists is whole. Files go there and come from there in pieces,
//! each by a call of its own: memory holds one piece, and a slow reader keeps no connection open.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use object_store::{GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt as _, PutPayload};
use ring::digest;
use tokio::io::AsyncReadExt as _;

use super::{Artifact, ArtifactError, checked, hex, is_hash};

/// Bytes of a piece. A larger file is sent in several; S3 takes no part below 5 MiB, and 10,000 parts.
pub(super) const PIECE: usize = 8 << 20;
/// The object that says whose files these are.
const OWNER: &str = "owner";
/// Most bytes of it that are read.
const OWNER_BYTES: u64 = 1 << 10;
/// The object that is written and removed where it is to be known whether the store takes any.
const PROBE: &str = "probe";
/// How long that may take: somebody waits for it.
const PROBE_TIME: Duration = Duration::from_secs(5);

/// All files below a prefix. Clones are the same bucket.
#[derive(Clone)]
pub(crate) struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: object_store::path::Path,
    /// Its URL.
    name: Arc<str>,
    /// The last call was refused.
    refusing: Arc<AtomicBool>,
}

/// What is kept.
#[derive(Debug)]
pub(super) enum Whole {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A file from where it stands.
    File(tokio::fs::File),
}

impl Whole {
    /// The next piece, which is shorter than others only at the end; nothing then.
    async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        let piece = match self {
            Self::Bytes(bytes) => bytes.split_to(bytes.len().min(PIECE)),
            Self::File(file) => {
                let mut piece = BytesMut::with_capacity(PIECE);
                let mut rest = file.take(PIECE as u64);
                while rest.read_buf(&mut piece).await? > 0 {}
                piece.freeze()
            }
        };
        Ok((!piece.is_empty()).then_some(piece))
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The store's own form may tell more than others should know.
        f.debug_tuple("Bucket").field(&self.name).finish()
    }
}

impl Bucket {
    /// What is below a prefix of an object store.
    pub(crate) fn new(name: &str, store: Arc<dyn ObjectStore>, prefix: object_store::path::Path) -> Self {
        Self { store, prefix, name: name.into(), refusing: Arc::default() }
    }

    /// Its URL.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Says whose files these are, by the name of the records that name them.
    ///
    /// Errors: they are those of other records, whose files would be taken for nobody's.
    pub(crate) async fn belong_to(&self, records: &str) -> Result<(), ArtifactError> {
        let owner = self.prefix.clone().join(OWNER);
        let range = GetRange::Bounded(0..OWNER_BYTES);
        for _ in 0..2 {
            let found = self.store.get_opts(&owner, GetOptions::new().with_range(Some(range.clone()))).await;
            let found = match found {
                Ok(found) => found.bytes().await,
                Err(error) => Err(error),
            };
            match self.told(found) {
                Ok(found) if found == records.as_bytes() => return Ok(()),
                Ok(_) => break,
                Err(object_store::Error::NotFound { .. }) => {
                    let payload = PutPayload::from(Bytes::copy_from_slice(records.as_bytes()));
                    self.told(self.store.put(&owner, payload).await).map_err(away)?;
                }
                Err(error) => return Err(away(error)),
            }
        }
        let owner = owner.to_string();
        Err(ArtifactError::Other(format!(
            "its files belong to other records, as the object {owner:?} says; give each gateway with records of its own a \
             prefix of its own, or remove the object if those records are gone"
        )))
    }

    /// Whether the store takes files, if there is reason to doubt it.
    pub(crate) async fn check(&self) -> Result<(), ArtifactError> {
        if !self.refusing.load(Ordering::Relaxed) {
            return Ok(());
        }
        let probe = self.prefix.clone().join(PROBE);
        let probed = async {
            self.told(self.store.put(&probe, PutPayload::from_static(b"probe")).await).map_err(away)?;
            match self.told(self.store.delete(&probe).await) {
                Err(error) if !matches!(error, object_store::Error::NotFound { .. }) => Err(away(error)),
                _ => Ok(()),
            }
        };
        let probed = tokio::time::timeout(PROBE_TIME, probed).await;
        probed.unwrap_or_else(|_| Err(ArtifactError::Away(format!("no answer in {} s", PROBE_TIME.as_secs()))))
    }

    /// Keeps bytes or a file under their hash. A large one is sent in parts; it appears with the last one, or not at all.
    pub(super) async fn put(&self, mut whole: Whole, artifact: &Artifact) -> Result<(), ArtifactError> {
        let path = self.path(&artifact.hash)?;
        let first = whole.next().await?.unwrap_or_default();
        let Some(second) = whole.next().await? else {
            return self.told(self.store.put(&path, first.into()).await).map(drop).map_err(away);
        };
        let mut upload = self.told(self.store.put_multipart(&path).await).map_err(away)?;
        let sent = async {
            let mut begun = [first, second].into_iter();
            loop {
                let piece = match begun.next() {
                    Some(piece) => piece,
                    None => match whole.next().await? {
                        Some(piece) => piece,
                        None => return self.told(upload.complete().await).map(drop).map_err(away),
                    },
                };
                self.told(upload.put_part(piece.into()).await).map_err(away)?;
            }
        };
        let sent = sent.await;
        if sent.is_err() {
            // What stays if this fails too is nothing that anybody sees; the store's own rules remove it.
            let _ = upload.abort().await;
        }
        sent
    }

    /// Reads a whole file.
    pub(super) async fn read(&self, artifact: &Artifact) -> Result<Vec<u8>, ArtifactError> {
        // A range of an object that is too short for it is an error like any other.
        self.look(artifact).await?;
        let mut pieces = std::pin::pin!(self.clone().pieces(artifact.clone(), 0..artifact.bytes));
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.try_next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// Makes sure that a file is there and has its length.
    pub(super) async fn look(&self, artifact: &Artifact) -> Result<(), ArtifactError> {
        let found = self.told(self.store.head(&self.path(&artifact.hash)?).await);
        let found = found.map_err(|error| gone_or_away(error, &artifact.hash))?;
        if found.size == artifact.bytes { Ok(()) } else { Err(ArtifactError::Damaged(artifact.hash.clone())) }
    }

    /// Whether there is a file of this hash.
    pub(super) async fn has(&self, hash: &str) -> Result<bool, ArtifactError> {
        match self.told(self.store.head(&self.path(hash)?).await) {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(away(error)),
        }
    }

    /// A range of a file, piece by piece. Where it is all of the file, its hash is compared before the last piece is
    /// given.
    pub(super) fn pieces(
        self,
        artifact: Artifact,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static {
        let whole = (range == (0..artifact.bytes)).then(|| digest::Context::new(&digest::SHA256));
        stream::try_unfold((self, artifact, range.start, whole), move |(bucket, artifact, at, mut whole)| async move {
            if at >= range.end {
                return Ok(None);
            }
            let end = range.end.min(at.saturating_add(PIECE as u64));
            let piece = bucket.piece(&artifact, at..end).await?;
            if let Some(hashed) = &mut whole {
                hashed.update(&piece);
            }
            if end == artifact.bytes
                && let Some(hashed) = whole.take()
                && hex(hashed.finish().as_ref()) != artifact.hash
            {
                return Err(ArtifactError::Damaged(artifact.hash));
            }
            Ok(Some((piece, (bucket, artifact, end, whole))))
        })
    }

    async fn piece(&self, artifact: &Artifact, range: Range<u64>) -> Result<Bytes, ArtifactError> {
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
        let found = self.told(self.store.get_opts(&self.path(&artifact.hash)?, options).await);
        let found = match found {
            Ok(found) if found.meta.size == artifact.bytes && found.range == range => found,
            Ok(_) => return Err(ArtifactError::Damaged(artifact.hash.clone())),
            Err(error) => return Err(gone_or_away(error, &artifact.hash)),
        };
        let bytes = self.told(found.bytes().await).map_err(away)?;
        let right = bytes.len() as u64 == range.end - range.start;
        if right { Ok(bytes) } else { Err(ArtifactError::Damaged(artifact.hash.clone())) }
    }

    /// Removes a file, if it is there.
    pub(super) async fn remove(&self, hash: &str) -> Result<(), ArtifactError> {
        match self.told(self.store.delete(&self.path(hash)?).await) {
            Err(object_store::Error::NotFound { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(away(error)),
        }
    }

    /// Hashes of all files.
    pub(super) async fn hashes(&self) -> Result<Vec<String>, ArtifactError> {
        let listed = self.store.list(Some(&self.prefix)).map(|one| self.told(one).map_err(away));
        let own = listed.try_filter_map(|one| {
            let name = one.location.filename().filter(|name| is_hash(name));
            // Nothing that lies deeper is ours.
            let own = name.filter(|name| one.location == self.prefix.clone().join(*name));
            std::future::ready(Ok(own.map(str::to_owned)))
        });
        own.try_collect().await
    }

    fn path(&self, hash: &str) -> Result<object_store::path::Path, ArtifactError> {
        Ok(self.prefix.clone().join(checked(hash)?))
    }

    /// The answer as it is; whether it was a refusal is noted.
    fn told<T>(&self, answer: object_store::Result<T>) -> object_store::Result<T> {
        let refused = matches!(&answer, Err(error) if !matches!(error, object_store::Error::NotFound { .. }));
        if self.refusing.swap(refused, Ordering::Relaxed) != refused {
            match &answer {
                Err(error) => tracing::error!(%error, "the files {} cannot be used; what needs them waits", self.name),
                Ok(_) => tracing::info!("the files {} can be used again", self.name),
            }
        }
        answer
    }
}

/// Credentials expire, networks part, quotas fill: all of it passes, or an operator sees to it.
fn away(error: object_store::Error) -> ArtifactError {
    ArtifactError::Away(error.to_string())
}

fn gone_or_away(error: object_store::Error, hash: &str) -> ArtifactError {
    match error {
        object_store::Error::NotFound { .. } => ArtifactError::Gone(hash.to_owned()),
        error => away(error),
    }
}
