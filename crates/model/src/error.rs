use std::path::PathBuf;

/// What can go wrong in a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A checkpoint's tensor is missing, has the wrong shape or type, or bears values that are not finite.
    #[error("weights: tensor {tensor:?} in {file}: {reason}")]
    Tensor {
        /// Full name in the checkpoint.
        tensor: String,
        /// File (or folder, when no file has the tensor).
        file: String,
        /// What is wrong, with what was expected.
        reason: String,
    },
    /// A checkpoint's file is missing, truncated or malformed.
    #[error("weights: {}: {reason}", file.display())]
    File {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An input is not one the network takes.
    #[error("{field}: {reason}")]
    Input {
        /// Name of the input.
        field: &'static str,
        /// What is wrong: the value and the limit.
        reason: String,
    },
    /// A fault in the computation itself.
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}

/// Result of a network.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An input that the network does not take.
    pub fn input(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Input { field, reason: reason.into() }
    }

    /// A file that cannot be used.
    pub fn file(file: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::File { file: file.into(), reason: reason.to_string() }
    }
}
