//! The user's folder: who writes to it, what is there, and how much still fits.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

use super::plan::Wanted;
use crate::{failure::Failure, weights::place::check_space};

/// Held while files are written. The file stays: removing it would let two processes hold one each.
const LOCK: &str = ".avatar-fetch.lock";

/// The folder, held by this process alone until it is dropped.
pub struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes the folder if it is missing, and takes its lock.
    ///
    /// Errors: it cannot be written to, or another process fetches into it.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let wrong = |e: std::io::Error| Failure::input("out", format!("{}: {e}", path.display()));
        std::fs::create_dir_all(path).map_err(wrong)?;
        let lock = File::options().write(true).create(true).truncate(false).open(path.join(LOCK)).map_err(wrong)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let reason = "another `avatar weights fetch` is writing to this folder; wait for it, or name another";
                let failure = Failure::input("out", format!("{}: {reason}", path.display()));
                return Err(Failure { code: "ABORTED", exit: crate::failure::FAILED, ..failure });
            }
            // A filesystem without locks: two runs at once are then the user's to avoid.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(wrong(e)),
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where a file belongs.
    #[must_use]
    pub fn target(&self, file: &Wanted) -> PathBuf {
        self.path.join(&file.path)
    }

    /// Where a file grows. Its name holds the hash, so that no other version of it is ever continued.
    #[must_use]
    pub fn part(&self, file: &Wanted) -> PathBuf {
        self.path.join(format!("{}.{:.12}.part", file.path, file.digest.hex()))
    }

    /// Removes what was begun of other versions of a file.
    pub fn drop_other_parts(&self, file: &Wanted) -> std::io::Result<()> {
        let (target, part) = (self.target(file), self.part(file));
        let (Some(folder), Some(name)) = (target.parent(), target.file_name().and_then(|n| n.to_str())) else {
            return Ok(());
        };
        let entries = match std::fs::read_dir(folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let entry = entry?.path();
            let middle = entry.file_name().and_then(|n| n.to_str()?.strip_prefix(name)?.strip_suffix(".part"));
            let middle = middle.and_then(|m| m.strip_prefix('.')).unwrap_or_default();
            if middle.len() == 12 && middle.bytes().all(|b| b.is_ascii_hexdigit()) && entry != part {
                std::fs::remove_file(entry)?;
            }
        }
        Ok(())
    }

    /// Checks that what is still to come fits.
    ///
    /// Errors: it does not; the sentence has both numbers of bytes.
    pub fn check_space(&self, files: &[&Wanted]) -> Result<(), Failure> {
        let left = |file: &&Wanted| {
            let begun = std::fs::metadata(self.part(file)).map_or(0, |info| info.len());
            file.bytes.saturating_sub(begun)
        };
        let needed = files.iter().map(left).fold(0, u64::saturating_add);
        check_space(&self.path, &self.path, needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::fetch::digest::Digest;

    fn wanted(hex: &str) -> Wanted {
        Wanted { path: "ckpts/m.pt".into(), bytes: u64::MAX, digest: Digest::Sha256(hex.repeat(64)) }
    }

    #[test]
    fn one_process_at_a_time() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Folder::open(temporary.path()).unwrap();
        let refused = Folder::open(temporary.path()).err().unwrap();
        assert!(refused.sentence().contains("another `avatar weights fetch`"), "{refused}");
        drop(folder);
        Folder::open(temporary.path()).unwrap();
    }

    #[test]
    fn only_parts_of_the_same_file_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = Folder::open(temporary.path()).unwrap();
        let ckpts = temporary.path().join("ckpts");
        std::fs::create_dir(&ckpts).unwrap();
        let (mine, old) = (folder.part(&wanted("a")), folder.part(&wanted("b")));
        let kept = [mine, ckpts.join("m.pt"), ckpts.join("m.pt.mine.part"), ckpts.join("n.pt.bbbbbbbbbbbb.part")];
        for path in kept.iter().chain([&old]) {
            std::fs::write(path, "x").unwrap();
        }
        folder.drop_other_parts(&wanted("a")).unwrap();
        assert!(kept.iter().all(|path| path.exists()) && !old.exists());
    }

    #[test]
    fn too_little_space_names_both_numbers() {
        let temporary = tempfile::tempdir().unwrap();
        let refused = Folder::open(temporary.path()).unwrap().check_space(&[&wanted("a")]).unwrap_err();
        assert!(refused.message.contains(&u64::MAX.to_string()) && refused.message.contains("are free"), "{refused}");
    }
}
