//! A folder of files.
//!
//! A file is written in the folder for work, flushed, renamed, and its new folder is flushed, before anyone is told its
//! hash. So a loss of power at any moment leaves either the whole file or none.

use std::{
    fs::{self, File},
    io::{self, Seek as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Artifact, ArtifactError, checked,
    disk::{Disk, make_folders},
    is_hash, sha256, sum,
};

/// The folder of all files. Its functions block.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    dir: PathBuf,
    /// Where files are that are not whole yet; this process's alone.
    work: PathBuf,
    disk: Arc<dyn Disk>,
    /// Files that were begun in there.
    begun: Arc<AtomicU64>,
}

impl Folder {
    /// Opens the folder, made if missing. `work` is a folder of the same file system that no other process uses.
    pub(in crate::store) fn open(disk: Arc<dyn Disk>, dir: &Path, work: &Path) -> io::Result<Self> {
        make_folders(&*disk, dir)?;
        Ok(Self { dir: dir.to_owned(), work: work.to_owned(), disk, begun: Arc::default() })
    }

    /// Keeps bytes under their hash, which the caller knows.
    pub(super) fn put(&self, bytes: &[u8], artifact: &Artifact) -> Result<(), ArtifactError> {
        let part = self.work.join(format!("part-{}", self.begun.fetch_add(1, Ordering::Relaxed)));
        let written = self.disk.write(&part, bytes).and_then(|()| self.disk.flush_file(&part));
        let placed = written.map_err(ArtifactError::from).and_then(|()| self.adopt(&part, artifact));
        if placed.is_err() {
            // A full disk has the more need of it.
            let _ = fs::remove_file(&part);
        }
        placed
    }

    /// Keeps a file of the same file system that was weighed; it is moved.
    pub(super) fn adopt(&self, path: &Path, artifact: &Artifact) -> Result<(), ArtifactError> {
        let target = self.path(&artifact.hash)?;
        let shelf = target.parent().unwrap_or(&self.dir);
        make_folders(&*self.disk, shelf)?;
        // Another process may have made it just now.
        self.disk.flush_folder(&self.dir)?;
        self.disk.rename(path, &target)?;
        Ok(self.disk.flush_folder(shelf)?)
    }

    /// Reads a whole file. Errors: it is missing, or its bytes are not those that were kept.
    pub(super) fn read(&self, artifact: &Artifact) -> Result<Vec<u8>, ArtifactError> {
        let bytes = fs::read(self.path(&artifact.hash)?).map_err(|error| unreadable(error, &artifact.hash))?;
        if sha256(&bytes) != artifact.hash {
            return Err(ArtifactError::Damaged(artifact.hash.clone()));
        }
        Ok(bytes)
    }

    /// Opens a file at its start, once its bytes have been compared with its hash. Errors as [`Folder::read`].
    pub(super) fn open_file(&self, artifact: &Artifact) -> Result<File, ArtifactError> {
        let opened = File::open(self.path(&artifact.hash)?);
        let mut file = opened.map_err(|error| unreadable(error, &artifact.hash))?;
        if sum(&mut file)?.0 != artifact.hash {
            return Err(ArtifactError::Damaged(artifact.hash.clone()));
        }
        file.rewind()?;
        Ok(file)
    }

    /// Removes a file, if it is there.
    pub(super) fn remove(&self, hash: &str) -> Result<(), ArtifactError> {
        match fs::remove_file(self.path(hash)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Hashes of all files.
    pub(super) fn hashes(&self) -> Result<Vec<String>, ArtifactError> {
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

    pub(super) fn path(&self, hash: &str) -> Result<PathBuf, ArtifactError> {
        let hash = checked(hash)?;
        Ok(self.dir.join(&hash[..2]).join(hash))
    }
}

fn unreadable(error: io::Error, hash: &str) -> ArtifactError {
    match error.kind() {
        io::ErrorKind::NotFound => ArtifactError::Gone(hash.to_owned()),
        _ => error.into(),
    }
}
