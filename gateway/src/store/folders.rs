//! The data folder of a process, and its folder for files in the making.

use std::{fs, io, path::Path};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

/// Locks a data folder for this process alone, or together with others that share the records.
pub(super) fn lock_folder(dir: &Path, shared: bool) -> Result<fs::File, String> {
    let lock = fs::File::create(dir.join("lock")).map_err(|error| error.to_string())?;
    let (how, advice) = if shared {
        (FlockOperation::NonBlockingLockShared, "whose records are in a file of it")
    } else {
        (FlockOperation::NonBlockingLockExclusive, "give each gateway a folder of its own, or --database to all")
    };
    flock(&lock, how).map_err(|_| format!("another process uses it; {advice}"))?;
    Ok(lock)
}

/// Makes this process's folder for work, locked as long as the process lives, and removes those of processes that have
/// ended.
pub(super) fn own_folder(work: &Path) -> io::Result<(TempDir, fs::File)> {
    const MARK: &str = "lock";
    fs::create_dir_all(work)?;
    // One process at a time looks: a folder that is not locked is nobody's then.
    let door = fs::File::create(work.join(MARK))?;
    flock(&door, FlockOperation::LockExclusive)?;
    for folder in fs::read_dir(work)? {
        let folder = folder?.path();
        let free = match fs::File::open(folder.join(MARK)) {
            Ok(mark) => flock(&mark, FlockOperation::NonBlockingLockExclusive).is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if free
            && folder.is_dir()
            && let Err(error) = fs::remove_dir_all(&folder)
        {
            // An encoder of the ended process may still be ending in there.
            tracing::warn!(%error, "unfinished files stay behind in {}", folder.display());
        }
    }
    let own = tempfile::Builder::new().prefix("run-").tempdir_in(work)?;
    let mark = fs::File::create(own.path().join(MARK))?;
    flock(&mark, FlockOperation::LockExclusive)?;
    Ok((own, mark))
}
