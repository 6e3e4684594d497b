//! A video file that appears whole or not at all.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::failure::Failure;

/// Where the video goes; checked, nothing written yet.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    folder: PathBuf,
}

/// The video while it arrives, under a temporary name in the same folder; dropping it removes it.
pub struct Part {
    file: NamedTempFile,
    path: PathBuf,
    folder: PathBuf,
    bytes: u64,
    crc32c: u32,
}

impl Output {
    /// Checks, before any work, that the video can be written.
    ///
    /// Errors: the folder is missing or not writable, `path` is a folder, or it is one of the `inputs`.
    pub fn check(path: &Path, inputs: &[&Path]) -> Result<Self, Failure> {
        let wrong = |reason: &str| Failure::input("out", format!("{}: {reason}", path.display()));
        if path.file_name().is_none() || path.is_dir() {
            return Err(wrong("this is a folder; name a file in it"));
        }
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        if !folder.is_dir() {
            return Err(wrong(&format!("the folder {} does not exist; make it first", folder.display())));
        }
        let target = path.canonicalize().ok();
        if target.is_some() && inputs.iter().any(|input| input.canonicalize().ok() == target) {
            return Err(wrong("this is one of the inputs; name another file"));
        }
        // A file without a name shows whether the folder takes files, and leaves none.
        tempfile::tempfile_in(&folder)
            .map_err(|e| wrong(&format!("cannot write to the folder {}: {e}", folder.display())))?;
        Ok(Self { path: path.to_owned(), folder })
    }

    /// The path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the temporary file.
    pub fn begin(&self) -> Result<Part, Failure> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".avatar-").suffix(".part");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            // What any new file gets; the process's umask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(&self.folder).map_err(|e| Failure::local(self.folder.display(), e))?;
        Ok(Part { file, path: self.path.clone(), folder: self.folder.clone(), bytes: 0, crc32c: 0 })
    }
}

impl Part {
    /// Appends bytes.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Failure> {
        self.file.write_all(data).map_err(|e| Failure::local(self.path.display(), e))?;
        self.bytes += data.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, data);
        Ok(())
    }

    /// Gives the file its name, once it is whole and on the disk.
    ///
    /// Errors: it has not `bytes` bytes with this checksum, or the disk refuses; then nothing remains.
    pub fn finish(self, bytes: u64, crc32c: u32) -> Result<(), Failure> {
        if (self.bytes, self.crc32c) != (bytes, crc32c) {
            let reason = format!("the video arrived damaged: {} of {bytes} bytes", self.bytes);
            return Err(Failure::local(self.path.display(), reason));
        }
        let refused = |e: std::io::Error| Failure::local(self.path.display(), e);
        self.file.as_file().sync_all().map_err(refused)?;
        self.file.persist(&self.path).map_err(|e| Failure::local(self.path.display(), e.error))?;
        // The new name is on the disk once its folder is; a filesystem that cannot sync folders keeps the file.
        if let Ok(folder) = File::open(&self.folder) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_video_replaces_the_old_one_only_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.mp4");
        std::fs::write(&path, "old").unwrap();
        let output = Output::check(&path, &[]).unwrap();
        let mut part = output.begin().unwrap();
        part.write(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert!(part.finish(4, 0).is_err());
        assert_eq!(names(folder.path()), ["v.mp4"]);
        let mut part = output.begin().unwrap();
        part.write(b"ne").unwrap();
        part.write(b"w").unwrap();
        part.finish(3, crc32c::crc32c(b"new")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["v.mp4"]);
    }

    #[test]
    fn a_bad_target_is_refused_before_work_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let input = folder.path().join("face.png");
        std::fs::write(&input, "x").unwrap();
        for wrong in [folder.path().join("none/v.mp4"), folder.path().to_owned(), input.clone()] {
            let failure = Output::check(&wrong, &[&input]).unwrap_err();
            assert_eq!(failure.field.as_deref(), Some("out"), "{failure}");
        }
        assert_eq!(names(folder.path()), ["face.png"]);
    }
}
