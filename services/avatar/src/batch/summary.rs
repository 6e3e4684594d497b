//! The summary of a batch: a line for each row, and what a later run need not make again.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::failure::Failure;

/// Its name in the folder of the videos.
pub(super) const NAME: &str = "summary.csv";
/// Largest summary that is read.
const BYTES: u64 = 256 << 20;

/// How far a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Its video is there.
    Completed,
    /// It cannot be made, or its generation failed.
    Failed,
    /// It has not been made yet.
    #[default]
    Missing,
}

/// One row's line.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Line {
    /// Number of the row in the table, from 1.
    pub(super) row: usize,
    /// As the table writes it.
    pub(super) videoid: String,
    /// How far it is.
    pub(super) state: State,
    /// The video's file in the summary's folder.
    pub(super) video: String,
    /// Frames of the video.
    pub(super) frames: u32,
    /// Seconds that its stages took.
    pub(super) seconds: f64,
    /// The generation that made it.
    pub(super) generation_id: String,
    /// Hash of what was asked for: another one means another video.
    pub(super) inputs_sha256: String,
    /// Bytes of the video.
    pub(super) video_bytes: u64,
    /// CRC32C of the video.
    pub(super) video_crc32c: u32,
    /// A gRPC code by name, where it failed.
    pub(super) code: String,
    /// What was wrong.
    pub(super) message: String,
}

impl Line {
    /// The line of a row that failed.
    pub(super) fn failed(self, failure: &Failure) -> Self {
        let message = match failure.field.as_deref() {
            // The contract's name; the table's column is another.
            Some("picture") => format!("image: {}", failure.message),
            Some(field) if !failure.message.starts_with(field) => format!("{field}: {}", failure.message),
            _ => failure.message.clone(),
        };
        Self { state: State::Failed, code: failure.code.to_owned(), message, ..self }
    }

    /// Whether the video that it tells of is in the folder, whole.
    pub(super) fn is_there(&self, folder: &Path) -> bool {
        let same = sum(&folder.join(&self.video));
        self.state == State::Completed && same.is_ok_and(|found| found == (self.video_bytes, self.video_crc32c))
    }
}

/// The lines of an earlier run by videoid; none where there was none.
///
/// Errors: the file is no summary, so that writing one would lose what it is.
pub(super) fn read(folder: &Path) -> Result<HashMap<String, Line>, Failure> {
    let path = folder.join(NAME);
    let wrong = |reason: String| Failure::input("out", format!("{}: {reason}", path.display()));
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(wrong(error.to_string())),
        Ok(found) if found.len() > BYTES => return Err(wrong(format!("{} bytes; the limit is {BYTES}", found.len()))),
        Ok(_) => {}
    }
    let mut reader = csv::Reader::from_path(&path).map_err(|error| wrong(error.to_string()))?;
    let lines = reader.deserialize().map(|line: Result<Line, _>| {
        let line = line.map_err(|error| wrong(format!("this is no summary of a batch: {error}")))?;
        Ok((line.videoid.clone(), line))
    });
    lines.collect()
}

/// Replaces the summary by these lines, whole or not at all.
pub(super) fn write(folder: &Path, lines: &[Line]) -> Result<(), Failure> {
    let refused = |error: io::Error| Failure::local(folder.join(NAME).display(), error);
    let file = NamedTempFile::new_in(folder).map_err(refused)?;
    let mut writer = csv::Writer::from_writer(file);
    for line in lines {
        writer.serialize(line).map_err(|error| refused(error.into()))?;
    }
    let file = writer.into_inner().map_err(|error| refused(error.into_error()))?;
    file.as_file().sync_all().map_err(refused)?;
    file.persist(folder.join(NAME)).map(drop).map_err(|error| refused(error.error))
}

/// Length and CRC32C of a file.
fn sum(path: &Path) -> io::Result<(u64, u32)> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; 1 << 20]);
    let (mut bytes, mut crc) = (0, 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, crc)),
            n => {
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written_and_a_video_that_changed_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap().is_empty());
        fs::write(folder.path().join("a.mp4"), "video").unwrap();
        let done = Line {
            row: 1,
            videoid: "a".into(),
            state: State::Completed,
            video: "a.mp4".into(),
            video_bytes: 5,
            video_crc32c: crc32c::crc32c(b"video"),
            seconds: 1.5,
            ..Line::default()
        };
        let failure = Failure::input("picture", "of 3 bytes,\n\"no\" picture");
        let failed = Line { row: 2, videoid: "=b".into(), ..Line::default() }.failed(&failure);
        write(folder.path(), &[done.clone(), failed.clone()]).unwrap();
        let lines = read(folder.path()).unwrap();
        assert_eq!((&lines["a"], &lines["=b"]), (&done, &failed));
        assert!(failed.message.starts_with("image: of 3 bytes"), "{failed:?}");
        assert!(lines["a"].is_there(folder.path()) && !lines["=b"].is_there(folder.path()));
        fs::write(folder.path().join("a.mp4"), "other").unwrap();
        assert!(!lines["a"].is_there(folder.path()));
    }

    #[test]
    fn a_file_that_is_no_summary_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(NAME), "month,sum\nMay,3\n").unwrap();
        assert!(read(folder.path()).unwrap_err().message.contains("no summary of a batch"));
    }
}
