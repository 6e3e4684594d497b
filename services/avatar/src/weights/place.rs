//! A folder that appears whole or not at all.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::failure::Failure;

/// A new folder while it is filled, under a temporary name beside its place; dropping it removes it.
pub(super) struct Place {
    made: TempDir,
    out: PathBuf,
}

impl Place {
    /// Checks that the folder can be made, and opens the temporary one.
    ///
    /// Errors: there is something in the folder, or it cannot be written.
    pub(super) fn begin(out: &Path) -> Result<Self, Failure> {
        match std::fs::read_dir(out) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(wrong(out, "the folder is not empty; name a new one"));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(wrong(out, e)),
        }
        let parent = match out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        std::fs::create_dir_all(&parent).map_err(|e| wrong(out, e))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".avatar-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            // What any new folder gets; the process's umask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o777));
        }
        let made = builder.tempdir_in(&parent).map_err(|e| wrong(out, e))?;
        Ok(Self { made, out: out.to_owned() })
    }

    /// Where to write.
    pub(super) fn path(&self) -> &Path {
        self.made.path()
    }

    /// Checks that as many bytes can be written.
    ///
    /// Errors: as [`check_space`].
    pub(super) fn check_space(&self, needed: u64) -> Result<(), Failure> {
        check_space(self.made.path(), &self.out, needed)
    }

    /// Gives the folder its name.
    pub(super) fn finish(self) -> Result<(), Failure> {
        // Renaming onto an empty folder replaces it.
        std::fs::rename(self.made.path(), &self.out).map_err(|e| wrong(&self.out, e))?;
        // What the name stood for is gone, and nothing is left to remove.
        let _ = self.made.keep();
        Ok(())
    }
}

fn wrong(out: &Path, reason: impl std::fmt::Display) -> Failure {
    Failure::input("out", format!("{}: {reason}", out.display()))
}

/// Checks that so many bytes can be written to a folder; `named` is what the user calls it.
///
/// Errors: they cannot; the sentence has both numbers of bytes.
pub(super) fn check_space(folder: &Path, named: &Path, needed: u64) -> Result<(), Failure> {
    // A filesystem that does not tell is tried.
    let Ok(space) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if needed <= free {
        return Ok(());
    }
    let message = format!("{}: {needed} bytes are needed and {free} are free", named.display());
    let advice = Some("free some space, name another --out, or take fewer --stages");
    Err(Failure { code: "RESOURCE_EXHAUSTED", message, field: None, exit: crate::failure::FAILED, advice })
}

/// Bytes of all files below a folder.
pub(super) fn folder_bytes(folder: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(folder)?.try_fold(0, |sum, entry| {
        let entry = entry?;
        let kind = entry.metadata()?;
        Ok(sum + if kind.is_dir() { folder_bytes(&entry.path())? } else { kind.len() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_the_folder_and_both_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let place = Place::begin(&out).unwrap();
        place.check_space(1).unwrap();
        let refused = place.check_space(u64::MAX).unwrap_err();
        assert_eq!((refused.code, refused.exit), ("RESOURCE_EXHAUSTED", crate::failure::FAILED));
        let named = format!("{}: {} bytes are needed and ", out.display(), u64::MAX);
        assert!(refused.message.starts_with(&named) && refused.message.ends_with(" are free"), "{refused}");
    }
}
