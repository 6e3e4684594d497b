//! Files by the SHA-256 of their content: a name that exists holds exactly these bytes, or reading says so.
//!
//! A file is written in the folder for work, flushed, renamed, and its new folder is flushed, before anyone is told its
//! hash. So a loss of power at any moment leaves either the whole file or none.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use ring::digest;
use tempfile::NamedTempFile;

/// Bytes that are hashed at a time.
const BUFFER: usize = 1 << 20;

/// A file that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// SHA-256 of its bytes, in hexadecimal.
    pub hash: String,
    /// How many bytes it has.
    pub bytes: u64,
}

/// The folder of all files. Its functions block.
#[derive(Debug, Clone)]
pub(crate) struct Artifacts {
    dir: PathBuf,
    /// Where files are that are not whole yet.
    work: PathBuf,
}

impl Artifacts {
    /// Opens the folder, made if missing. `work` is a folder of the same file system.
    pub(crate) fn open(dir: &Path, work: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), work: work.to_owned() })
    }

    /// Keeps bytes under their hash, which the caller knows.
    pub(crate) fn put(&self, bytes: &[u8], artifact: &Artifact) -> io::Result<()> {
        let mut file = NamedTempFile::new_in(&self.work)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        self.place(file, &artifact.hash)
    }

    /// Hash and length of a file, which is flushed.
    pub(crate) fn weigh(path: &Path) -> io::Result<Artifact> {
        let mut file = File::open(path)?;
        let (hash, bytes) = sum(&mut file)?;
        file.sync_all()?;
        Ok(Artifact { hash, bytes })
    }

    /// Keeps a file of the same file system that was weighed; it is moved.
    pub(crate) fn adopt(&self, path: &Path, artifact: &Artifact) -> io::Result<()> {
        let shelf = self.shelf(&artifact.hash)?;
        fs::rename(path, shelf.join(&artifact.hash))?;
        File::open(shelf)?.sync_all()
    }

    fn place(&self, file: NamedTempFile, hash: &str) -> io::Result<()> {
        let shelf = self.shelf(hash)?;
        file.persist(shelf.join(hash)).map_err(|error| error.error)?;
        File::open(shelf)?.sync_all()
    }

    /// The folder for a hash; made, and on the disk.
    fn shelf(&self, hash: &str) -> io::Result<PathBuf> {
        let shelf = self.dir.join(&hash[..2]);
        if !shelf.is_dir() {
            fs::create_dir_all(&shelf)?;
            File::open(&self.dir)?.sync_all()?;
        }
        Ok(shelf)
    }

    /// Reads a whole file. Errors: it is missing, or its bytes are not those that were kept.
    pub(crate) fn read(&self, artifact: &Artifact) -> io::Result<Vec<u8>> {
        let bytes = fs::read(self.path(&artifact.hash)?)?;
        if hex(digest::digest(&digest::SHA256, &bytes).as_ref()) != artifact.hash {
            return Err(damaged(&artifact.hash));
        }
        Ok(bytes)
    }

    /// Opens a file at its start, once its bytes have been compared with its hash. Errors as [`Artifacts::read`].
    pub(crate) fn open_file(&self, artifact: &Artifact) -> io::Result<File> {
        let mut file = File::open(self.path(&artifact.hash)?)?;
        if sum(&mut file)?.0 != artifact.hash {
            return Err(damaged(&artifact.hash));
        }
        file.rewind()?;
        Ok(file)
    }

    /// Removes a file, if it is there.
    pub(crate) fn remove(&self, hash: &str) -> io::Result<()> {
        match fs::remove_file(self.path(hash)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Hashes of all files.
    pub(crate) fn hashes(&self) -> io::Result<Vec<String>> {
        let mut hashes = Vec::new();
        for shelf in fs::read_dir(&self.dir)? {
            let shelf = shelf?.path();
            if shelf.is_dir() {
                for entry in fs::read_dir(shelf)? {
                    hashes.extend(entry?.file_name().into_string().ok().filter(|name| is_hash(name)));
                }
            }
        }
        Ok(hashes)
    }

    fn path(&self, hash: &str) -> io::Result<PathBuf> {
        if !is_hash(hash) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{hash:?} is no SHA-256")));
        }
        Ok(self.dir.join(&hash[..2]).join(hash))
    }
}

impl Artifact {
    /// What bytes are once they are kept.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { hash: sha256(bytes), bytes: bytes.len() as u64 }
    }
}

/// The SHA-256 of bytes, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn damaged(hash: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the file {hash} is damaged: its bytes have another SHA-256"))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Artifacts {
        let work = dir.join("work");
        fs::create_dir_all(&work).unwrap();
        Artifacts::open(&dir.join("files"), &work).unwrap()
    }

    fn keep(artifacts: &Artifacts, bytes: &[u8]) -> Artifact {
        let artifact = Artifact::of(bytes);
        artifacts.put(bytes, &artifact).unwrap();
        artifact
    }

    #[test]
    fn what_is_kept_is_read_again_under_its_sha_256() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = open(dir.path());
        let kept = keep(&artifacts, b"abc");
        assert_eq!(kept.hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(kept.bytes, 3);
        assert_eq!(artifacts.read(&kept).unwrap(), b"abc");
        let moved = dir.path().join("video.mp4");
        fs::write(&moved, b"abc").unwrap();
        assert_eq!(Artifacts::weigh(&moved).unwrap(), kept);
        artifacts.adopt(&moved, &kept).unwrap();
        assert!(!moved.exists());
        assert_eq!(artifacts.hashes().unwrap(), std::slice::from_ref(&kept.hash));
        artifacts.remove(&kept.hash).unwrap();
        artifacts.remove(&kept.hash).unwrap();
        assert_eq!(artifacts.read(&kept).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// A write that stops at any byte is a file in the folder for work; one that a disk damaged is a file of another
    /// hash. Neither is ever taken for the bytes.
    #[test]
    fn a_write_cut_at_any_byte_leaves_the_old_state_and_the_next_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        let hash = sha256(&bytes);
        let wanted = Artifact { hash: hash.clone(), bytes: 256 };
        for cut in 0..=bytes.len() {
            let artifacts = open(dir.path());
            fs::write(dir.path().join("work").join("unfinished"), &bytes[..cut]).unwrap();
            assert_eq!(artifacts.read(&wanted).unwrap_err().kind(), io::ErrorKind::NotFound, "cut at {cut}");
            assert!(artifacts.hashes().unwrap().is_empty(), "cut at {cut}");
            assert_eq!(keep(&artifacts, &bytes), wanted);
            let path = dir.path().join("files").join(&hash[..2]).join(&hash);
            if cut < bytes.len() {
                fs::write(&path, &bytes[..cut]).unwrap();
                assert_eq!(artifacts.read(&wanted).unwrap_err().kind(), io::ErrorKind::InvalidData, "cut at {cut}");
                assert_eq!(artifacts.open_file(&wanted).unwrap_err().kind(), io::ErrorKind::InvalidData);
            }
            assert_eq!(keep(&artifacts, &bytes), wanted);
            assert_eq!(artifacts.read(&wanted).unwrap(), bytes);
            artifacts.remove(&hash).unwrap();
        }
    }

    #[test]
    fn a_name_that_is_no_hash_reaches_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = open(dir.path());
        fs::write(dir.path().join("secret"), b"x").unwrap();
        for hash in ["", "../secret", "é", &"A".repeat(64), &"0".repeat(63)] {
            let error = artifacts.read(&Artifact { hash: hash.to_owned(), bytes: 1 }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{hash}");
        }
    }
}
