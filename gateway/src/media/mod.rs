//! Pictures and recordings in, MP4 out.
//!
//! What a caller sends is decoded by memory-safe code in this process; `ffmpeg` runs as a child process and only
//! ever sees frames and samples that we made.

pub mod audio;
mod container;
mod edits;
pub mod mp4;
pub mod picture;
pub mod resample;
#[cfg(test)]
mod tests;

use std::io;

/// Result of the media functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a picture or recording was refused, or a video could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What the caller sent cannot be used. Sending the same again fails again.
    #[error("{field}: {reason}")]
    InvalidInput {
        /// The request's field: `picture` or `audio`.
        field: &'static str,
        /// What is wrong with it, with the value and the limit; continues a sentence that begins with the field.
        reason: String,
    },
    /// `ffmpeg` is missing or failed.
    #[error("{program}: {reason}")]
    Tool {
        /// The program as it was called.
        program: String,
        /// What to install, or how it ended with the last lines that it printed.
        reason: String,
    },
    /// A temporary file could not be written or read.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The frames do not fit the video; a fault of the code that makes them.
    #[error("video frames: {0}")]
    Frames(String),
}

impl Error {
    /// Refuses the recording.
    fn audio(reason: impl Into<String>) -> Self {
        Self::InvalidInput { field: "audio", reason: reason.into() }
    }

    /// Refuses the picture.
    fn picture(reason: impl Into<String>) -> Self {
        Self::InvalidInput { field: "picture", reason: reason.into() }
    }

    /// Names what was tried when a file operation failed.
    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}
