//! The operations by which the folder of files changes: few, so that a loss of power after any of them can be played.

use std::{
    fmt::Debug,
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

/// What changes a disk. Nothing is on it for certain before it is flushed.
pub(in crate::store) trait Disk: Debug + Send + Sync {
    /// Makes a folder in one that is there.
    fn make_folder(&self, path: &Path) -> io::Result<()>;

    /// Writes a new file.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Flushes a file's bytes.
    fn flush_file(&self, path: &Path) -> io::Result<()>;

    /// Moves a file, over another one if that is there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Flushes which names a folder has.
    fn flush_folder(&self, path: &Path) -> io::Result<()>;
}

/// Makes a folder, and those that it is in, as far as they are missing. What was made is on the disk then.
pub(super) fn make_folders(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_folders(disk, parent)?;
    disk.make_folder(dir)?;
    disk.flush_folder(parent)
}

/// The one that there is.
#[derive(Debug)]
pub(in crate::store) struct Real;

impl Disk for Real {
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            // Another process was quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            made => made,
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        File::create_new(path)?.write_all(bytes)
    }

    fn flush_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn flush_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}
