//! Files by the SHA-256 of their content, in a folder or in a bucket of an object store: a name that exists holds exactly
//! these bytes, or reading says so.

mod bucket;
mod disk;
mod folder;
pub mod place;
#[cfg(test)]
mod power_loss;
#[cfg(test)]
pub(super) mod tests;

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    ops::Range,
    path::Path,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::Either, stream};
use ring::digest;
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use self::bucket::Whole;
pub(super) use self::disk::{Disk, Real};
pub(crate) use self::{bucket::Bucket, folder::Folder};

/// Bytes that are hashed at a time.
const BUFFER: usize = 1 << 20;
/// Bytes of a file that are handed out at a time.
const CHUNK: usize = 256 << 10;

/// A file that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// SHA-256 of its bytes, in hexadecimal.
    pub hash: String,
    /// How many bytes it has.
    pub bytes: u64,
}

/// Why a file cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// No space is left for it.
    #[error("no space is left in the data folder: {0}")]
    Full(String),
    /// The object store does not do it now; the same may well be done later.
    #[error("the object store does not do it: {0}")]
    Away(String),
    /// There is no such file.
    #[error("the file {0} is gone")]
    Gone(String),
    /// It has other bytes than those that were kept.
    #[error("the file {0} is damaged: its bytes have another SHA-256")]
    Damaged(String),
    /// The name is none of a file.
    #[error("{0:?} is no SHA-256")]
    NoHash(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<io::Error> for ArtifactError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::Full(error.to_string()),
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<tokio::task::JoinError> for ArtifactError {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::Other(error.to_string())
    }
}

/// All files.
#[derive(Debug, Clone)]
pub(crate) enum Artifacts {
    /// In a folder of this machine, or one that it shares.
    Folder(Folder),
    /// In an object store.
    Bucket(Bucket),
}

impl Artifacts {
    /// Keeps bytes under their hash, which the caller knows.
    pub(crate) async fn put(&self, bytes: Bytes, artifact: &Artifact) -> Result<(), ArtifactError> {
        match self {
            Self::Folder(folder) => {
                let artifact = artifact.clone();
                blocking(folder, move |folder| folder.put(&bytes, &artifact)).await
            }
            Self::Bucket(bucket) => bucket.put(Whole::Bytes(bytes), artifact).await,
        }
    }

    /// Keeps a file of the folder for work that was weighed; it may be moved.
    pub(crate) async fn adopt(&self, path: &Path, artifact: &Artifact) -> Result<(), ArtifactError> {
        match self {
            Self::Folder(folder) => {
                let (path, artifact) = (path.to_owned(), artifact.clone());
                blocking(folder, move |folder| folder.adopt(&path, &artifact)).await
            }
            Self::Bucket(bucket) => bucket.put(Whole::File(tokio::fs::File::open(path).await?), artifact).await,
        }
    }

    /// Reads a whole file. Errors: it is missing, or its bytes are not those that were kept.
    pub(crate) async fn read(&self, artifact: &Artifact) -> Result<Vec<u8>, ArtifactError> {
        match self {
            Self::Folder(folder) => {
                let artifact = artifact.clone();
                blocking(folder, move |folder| folder.read(&artifact)).await
            }
            Self::Bucket(bucket) => bucket.read(artifact).await,
        }
    }

    /// Opens a file. What a folder holds is compared with its hash now; what a bucket holds, while all of it is read.
    pub(crate) async fn open(&self, artifact: &Artifact) -> Result<Content, ArtifactError> {
        let source = match self {
            Self::Folder(folder) => {
                let artifact = artifact.clone();
                Source::File(blocking(folder, move |folder| folder.open_file(&artifact)).await?)
            }
            Self::Bucket(bucket) => {
                bucket.look(artifact).await?;
                Source::Bucket(bucket.clone())
            }
        };
        Ok(Content { artifact: artifact.clone(), source })
    }

    /// Removes a file, if it is there.
    pub(crate) async fn remove(&self, hash: &str) -> Result<(), ArtifactError> {
        match self {
            Self::Folder(folder) => {
                let hash = hash.to_owned();
                blocking(folder, move |folder| folder.remove(&hash)).await
            }
            Self::Bucket(bucket) => bucket.remove(hash).await,
        }
    }

    /// Whether there is a file of this hash, whatever it holds.
    pub(crate) async fn has(&self, hash: &str) -> Result<bool, ArtifactError> {
        match self {
            Self::Folder(folder) => {
                let hash = hash.to_owned();
                blocking(folder, move |folder| Ok(folder.path(&hash)?.exists())).await
            }
            Self::Bucket(bucket) => bucket.has(hash).await,
        }
    }

    /// Hashes of all files.
    pub(crate) async fn hashes(&self) -> Result<Vec<String>, ArtifactError> {
        match self {
            Self::Folder(folder) => blocking(folder, Folder::hashes).await,
            Self::Bucket(bucket) => bucket.hashes().await,
        }
    }
}

/// Does what waits for the disk where that holds nobody up.
async fn blocking<T: Send + 'static>(
    folder: &Folder,
    work: impl FnOnce(&Folder) -> Result<T, ArtifactError> + Send + 'static,
) -> Result<T, ArtifactError> {
    let folder = folder.clone();
    tokio::task::spawn_blocking(move || work(&folder)).await?
}

/// A kept file that can be read, all of it or a part.
#[derive(Debug)]
pub struct Content {
    /// What it is.
    pub artifact: Artifact,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// Compared with its hash already; stays readable even if it is removed meanwhile.
    File(File),
    Bucket(Bucket),
}

impl Content {
    /// The bytes of a range, as they are read; what is past the end is left out.
    ///
    /// Errors: it cannot be read, or it is damaged. Then its last bytes do not come.
    pub fn stream(self, range: Range<u64>) -> impl Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static {
        let Self { artifact, source } = self;
        let range = range.start.min(artifact.bytes)..range.end.min(artifact.bytes);
        match source {
            Source::File(file) => Either::Left(part_of_file(file, range)),
            Source::Bucket(bucket) => Either::Right(bucket.pieces(artifact, range).flat_map(|piece| match piece {
                Ok(piece) => Either::Left(stream::iter(chunks(piece).map(Ok))),
                Err(error) => Either::Right(stream::iter([Err(error)])),
            })),
        }
    }
}

fn part_of_file(
    mut file: File,
    range: Range<u64>,
) -> impl Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static {
    let begun = file.seek(SeekFrom::Start(range.start));
    let length = range.end.saturating_sub(range.start);
    match begun {
        Ok(_) => Either::Left(
            ReaderStream::with_capacity(tokio::fs::File::from_std(file).take(length), CHUNK)
                .map(|read| read.map_err(ArtifactError::from)),
        ),
        Err(error) => Either::Right(stream::iter([Err(error.into())])),
    }
}

/// The parts of a piece, without copying it.
fn chunks(mut piece: Bytes) -> impl Iterator<Item = Bytes> + Send {
    std::iter::from_fn(move || (!piece.is_empty()).then(|| piece.split_to(piece.len().min(CHUNK))))
}

impl Artifact {
    /// What bytes are once they are kept.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { hash: sha256(bytes), bytes: bytes.len() as u64 }
    }

    /// Hash and length of a file, which is flushed. Blocks.
    pub(crate) fn weigh(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let (hash, bytes) = sum(&mut file)?;
        file.sync_all()?;
        Ok(Self { hash, bytes })
    }
}

/// Makes a folder, and those that it is in, as far as they are missing. What was made is on the disk then.
pub(crate) fn make_folders(dir: &Path) -> io::Result<()> {
    disk::make_folders(&disk::Real, dir)
}

/// The SHA-256 of bytes, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// The hash as it came, if it is one.
fn checked(hash: &str) -> Result<&str, ArtifactError> {
    if is_hash(hash) { Ok(hash) } else { Err(ArtifactError::NoHash(hash.chars().take(80).collect())) }
}

fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hash and length of a file from where it stands.
fn sum(file: &mut File) -> io::Result<(String, u64)> {
    let mut context = digest::Context::new(&digest::SHA256);
    let (mut buffer, mut bytes) = (vec![0; BUFFER], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hex(context.finish().as_ref()), bytes)),
            n => {
                context.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}
