//! Generations and their videos: records in memory, files in one folder.
//!
//! Callers use only the methods here, so that a durable store can take this one's place.

mod record;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tempfile::TempDir;
use uuid::Uuid;

use crate::fault::{Fault, Kind};

pub use record::{Change, Record, is_terminal, unix_ms};

/// The folder for videos cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the data folder {path}: {source}")]
pub struct StoreError {
    path: String,
    source: io::Error,
}

/// All generations of one gateway.
#[derive(Debug)]
pub struct Store {
    records: Mutex<HashMap<Uuid, Arc<Record>>>,
    dir: PathBuf,
    /// Removes the folder when the store goes, if it was a temporary one.
    _temporary: Option<TempDir>,
}

impl Store {
    /// Opens the store on a folder, made if missing; without one, on a temporary folder that goes with the store.
    pub fn open(dir: Option<&Path>) -> Result<Self, StoreError> {
        let records = Mutex::default();
        let Some(dir) = dir else {
            let made = tempfile::Builder::new().prefix("avatar-gateway-").tempdir();
            let made = made.map_err(|source| StoreError { path: "(temporary)".into(), source })?;
            return Ok(Self { records, dir: made.path().to_path_buf(), _temporary: Some(made) });
        };
        let failed = |source| StoreError { path: dir.display().to_string(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        // A file that cannot be made now would fail only after an hour of denoising.
        tempfile::tempfile_in(dir).map_err(failed)?;
        remove_unfinished(dir).map_err(failed)?;
        Ok(Self { records, dir: dir.to_path_buf(), _temporary: None })
    }

    /// Keeps a new generation.
    pub fn insert(&self, record: Arc<Record>) {
        self.lock().insert(record.id(), record);
    }

    /// The generation with an id as it came over the wire.
    pub fn get(&self, id: &str) -> Result<Arc<Record>, Fault> {
        let known = Uuid::try_parse(id).ok().and_then(|id| self.lock().get(&id).cloned());
        known.ok_or_else(|| {
            let shown: String = id.chars().take(64).collect();
            Fault::new(Kind::NotFound, format!("no generation has the id {shown:?}"))
        })
    }

    /// Cancels a generation if it still runs, and removes record and video.
    pub async fn remove(&self, id: &str) -> Result<(), Fault> {
        let record = self.get(id)?;
        self.forget(&record);
        // A run that is just ending removes its video itself, when it sees that nobody wants it.
        self.remove_video(record.id()).await
    }

    /// Cancels a generation and removes its record; the video goes with the run, or with [`Store::remove_video`].
    pub fn forget(&self, record: &Record) {
        self.lock().remove(&record.id());
        record.mark_removed();
        record.cancel_token().cancel();
    }

    /// Removes a generation's video, if there is one.
    pub async fn remove_video(&self, id: Uuid) -> Result<(), Fault> {
        match tokio::fs::remove_file(self.video_path(id)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Fault::internal("the video cannot be removed", &error))
            }
            _ => Ok(()),
        }
    }

    /// Where a completed generation's video is.
    #[must_use]
    pub fn video_path(&self, id: Uuid) -> PathBuf {
        self.dir.join(format!("{id}.mp4"))
    }

    /// The folder of the videos.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Generations that have not ended.
    #[must_use]
    pub fn running(&self) -> Vec<Arc<Record>> {
        self.lock().values().filter(|record| !record.ended()).cloned().collect()
    }

    /// The map holds whole records only, so it is sound even after a panic of a holder.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Arc<Record>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the folders in which an earlier process was still writing videos when it ended.
fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name().to_string_lossy().starts_with(".clip-") {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_is_none_is_not_found() {
        let store = Store::open(None).unwrap();
        for id in ["", "../../etc/passwd", "\0", &"9".repeat(100_000), "0190163d-8694-739b-aea5-966c26f8ad91"] {
            assert_eq!(store.get(id).unwrap_err().kind, Kind::NotFound);
        }
    }

    #[test]
    fn only_what_was_being_written_is_removed_at_start() {
        let dir = tempfile::tempdir().unwrap();
        let unfinished = dir.path().join(".clip-x1y2");
        std::fs::create_dir(&unfinished).unwrap();
        std::fs::write(unfinished.join("video.mp4"), b"x").unwrap();
        let kept = dir.path().join(format!("{}.mp4", Uuid::now_v7()));
        std::fs::write(&kept, b"x").unwrap();
        Store::open(Some(dir.path())).unwrap();
        assert!(!unfinished.exists());
        assert!(kept.exists());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = Store::open(Some(Path::new("/dev/null/videos"))).unwrap_err();
        assert!(error.to_string().contains("/dev/null/videos"), "{error}");
    }
}
