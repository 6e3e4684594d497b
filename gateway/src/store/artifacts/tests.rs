//! Files in a folder, in memory and on a server that speaks S3: the same cases for each.

use futures::TryStreamExt as _;
use object_store::{ObjectStore, ObjectStoreExt as _, memory::InMemory, path::Path as Name};
use s3_server::Server;
use std::{io::Write as _, sync::Arc};
use tempfile::TempDir;

use super::{
    bucket::PIECE,
    place::{Access, Place},
    *,
};

/// Where a case's files are.
struct Shelf {
    artifacts: Artifacts,
    dir: TempDir,
}

impl Shelf {
    fn folder() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (files, work) = (dir.path().join("files"), dir.path().join("work"));
        std::fs::create_dir(&work).unwrap();
        Self { artifacts: Artifacts::Folder(Folder::open(Arc::new(Real), &files, &work).unwrap()), dir }
    }

    fn bucket(bucket: Bucket) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        Self { artifacts: Artifacts::Bucket(bucket), dir }
    }

    async fn keep(&self, bytes: &[u8]) -> Artifact {
        let artifact = Artifact::of(bytes);
        self.artifacts.put(Bytes::copy_from_slice(bytes), &artifact).await.unwrap();
        artifact
    }

    /// A file in the folder for work.
    fn file(&self, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.dir.path().join("work/video.mp4");
        File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    async fn part(&self, artifact: &Artifact, range: Range<u64>) -> Result<Vec<u8>, ArtifactError> {
        let content = self.artifacts.open(artifact).await?;
        let parts: Vec<Bytes> = content.stream(range).try_collect().await?;
        Ok(parts.concat())
    }
}

/// A bucket in memory, below a prefix, and what is in it.
pub(in crate::store) fn in_memory() -> (Bucket, Arc<InMemory>) {
    let memory = Arc::new(InMemory::new());
    let store: Arc<dyn ObjectStore> = memory.clone();
    (Bucket::new("memory", store, Name::from("avatar/one")), memory)
}

/// A bucket of a server, below a prefix.
fn on_server(server: &Server, prefix: &str) -> Bucket {
    let credentials = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(credentials.path(), server.credentials()).unwrap();
    let access = Access { endpoint: Some(server.url()), credentials: Some(credentials.path()), ..Access::default() };
    Place::new(&format!("s3://{}/{prefix}", server.bucket()), &access).unwrap().open().unwrap()
}

macro_rules! on_every_store {
    ($($case:ident,)*) => {
        mod in_a_folder {
            $(
                #[tokio::test]
                async fn $case() {
                    super::$case(&super::Shelf::folder()).await;
                }
            )*
        }

        mod in_a_bucket_in_memory {
            $(
                #[tokio::test]
                async fn $case() {
                    super::$case(&super::Shelf::bucket(super::in_memory().0)).await;
                }
            )*
        }

        #[tokio::test(flavor = "multi_thread")]
        async fn every_case_holds_in_a_bucket_of_a_server() {
            let server = Server::start().unwrap();
            $(
                eprintln!("on S3: {}", stringify!($case));
                $case(&Shelf::bucket(on_server(&server, stringify!($case)))).await;
            )*
        }
    };
}

on_every_store! {
    what_is_kept_is_read_again_under_its_sha_256,
    a_large_file_is_kept_in_pieces_and_any_part_of_it_is_read,
    a_damaged_file_is_never_given_whole,
    a_name_that_is_no_hash_reaches_nothing,
}

async fn what_is_kept_is_read_again_under_its_sha_256(shelf: &Shelf) {
    let Shelf { artifacts, .. } = shelf;
    let kept = shelf.keep(b"abc").await;
    assert_eq!(kept.hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!((kept.bytes, artifacts.has(&kept.hash).await.unwrap()), (3, true));
    assert_eq!(artifacts.read(&kept).await.unwrap(), b"abc");
    // Once more, as a file.
    let moved = shelf.file(b"abc");
    assert_eq!(Artifact::weigh(&moved).unwrap(), kept);
    artifacts.adopt(&moved, &kept).await.unwrap();
    assert_eq!(artifacts.hashes().await.unwrap(), std::slice::from_ref(&kept.hash));
    assert_eq!(artifacts.read(&kept).await.unwrap(), b"abc");
    let empty = shelf.keep(b"").await;
    assert!(artifacts.read(&empty).await.unwrap().is_empty());
    for gone in [kept, empty] {
        artifacts.remove(&gone.hash).await.unwrap();
        artifacts.remove(&gone.hash).await.unwrap();
        assert!(!artifacts.has(&gone.hash).await.unwrap());
        assert!(matches!(artifacts.read(&gone).await, Err(ArtifactError::Gone(_))));
        assert!(matches!(artifacts.open(&gone).await, Err(ArtifactError::Gone(_))));
    }
    assert!(artifacts.hashes().await.unwrap().is_empty());
}

async fn a_large_file_is_kept_in_pieces_and_any_part_of_it_is_read(shelf: &Shelf) {
    let Shelf { artifacts, .. } = shelf;
    let bytes: Vec<u8> = (0..2 * PIECE + 5).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    let (end, piece) = (bytes.len() as u64, PIECE as u64);
    for whole in [&bytes[..PIECE], &bytes[1..=PIECE + 1], &bytes] {
        let path = shelf.file(whole);
        let kept = Artifact::weigh(&path).unwrap();
        artifacts.adopt(&path, &kept).await.unwrap();
        assert!(artifacts.read(&kept).await.unwrap() == whole, "{} bytes", whole.len());
        let again = shelf.keep(whole).await;
        assert_eq!(again, kept);
        assert!(shelf.part(&kept, 0..u64::MAX).await.unwrap() == whole);
    }
    let kept = Artifact::of(&bytes);
    let ranges = [0..1, end - 1..end, 5..5, piece - 1..piece + 1, 3..end - 3, piece..end, end..end, end + 7..end + 9];
    for range in ranges {
        let wanted = &bytes[range.start.min(end) as usize..range.end.min(end) as usize];
        assert!(shelf.part(&kept, range.clone()).await.unwrap() == wanted, "{range:?}");
    }
}

async fn a_damaged_file_is_never_given_whole(shelf: &Shelf) {
    let Shelf { artifacts, .. } = shelf;
    let kept = shelf.keep(b"what was kept").await;
    for spoilt in [&b"what was kepT"[..], b"what was", b"", b"what was kept and more"] {
        artifacts.put(Bytes::from_static(spoilt), &kept).await.unwrap();
        assert!(matches!(artifacts.read(&kept).await, Err(ArtifactError::Damaged(_))));
        assert!(matches!(shelf.part(&kept, 0..kept.bytes).await, Err(ArtifactError::Damaged(_))));
    }
    shelf.keep(b"what was kept").await;
    assert_eq!(artifacts.read(&kept).await.unwrap(), b"what was kept");
}

async fn a_name_that_is_no_hash_reaches_nothing(shelf: &Shelf) {
    std::fs::write(shelf.dir.path().join("secret"), b"x").unwrap();
    for hash in ["", "../secret", "é", &"A".repeat(64), &"0".repeat(63)] {
        let artifact = Artifact { hash: hash.to_owned(), bytes: 1 };
        assert!(matches!(shelf.artifacts.read(&artifact).await, Err(ArtifactError::NoHash(_))), "{hash}");
        assert!(matches!(shelf.artifacts.remove(hash).await, Err(ArtifactError::NoHash(_))), "{hash}");
        let put = shelf.artifacts.put(Bytes::from_static(b"x"), &artifact).await;
        assert!(matches!(put, Err(ArtifactError::NoHash(_))), "{hash}");
    }
}

/// A part of a damaged file cannot be told from that of a whole one, but all of a large one can, before its end comes.
#[tokio::test]
async fn of_a_large_damaged_object_the_last_piece_does_not_come() {
    let shelf = Shelf::bucket(in_memory().0);
    let mut bytes = vec![7; PIECE + 3];
    let kept = Artifact::of(&bytes);
    bytes[5] = 8;
    shelf.artifacts.put(bytes.into(), &kept).await.unwrap();
    let stream = shelf.artifacts.open(&kept).await.unwrap().stream(0..kept.bytes);
    let read: Vec<_> = stream.collect().await;
    assert!(matches!(read.last(), Some(Err(ArtifactError::Damaged(_)))));
    assert_eq!(read.iter().flatten().map(Bytes::len).sum::<usize>(), PIECE);
}

#[tokio::test]
async fn a_bucket_has_one_owner_and_what_others_have_in_it_is_left_alone() {
    let (bucket, memory) = in_memory();
    let hash = sha256(b"other");
    for name in [format!("avatar/{hash}"), format!("avatar/one/deeper/{hash}"), "avatar/one/notes".to_owned()] {
        memory.put(&Name::from(name), "other".into()).await.unwrap();
    }
    bucket.belong_to("ours").await.unwrap();
    bucket.belong_to("ours").await.unwrap();
    let refused = bucket.belong_to("theirs").await.unwrap_err().to_string();
    assert!(refused.contains("avatar/one/owner") && refused.contains("a prefix of its own"), "{refused}");
    assert!(bucket.hashes().await.unwrap().is_empty());
}
