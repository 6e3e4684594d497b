//! What callers are told where the disk, the database or the object store does not do it.

use std::{io, time::Duration};

use super::{artifacts::ArtifactError, engine::SqlError};
use crate::fault::{Fault, Kind};

/// When to try again after the disk was full.
pub(crate) const SPACE_RETRY: Duration = Duration::from_secs(60);

/// Does what waits for the disk where that holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Fault> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) if error.kind() == io::ErrorKind::StorageFull => Err(full(&error.to_string())),
        Ok(Err(error)) => Err(Fault::internal("a file of the data folder cannot be used", &error)),
        Err(error) => Err(Fault::internal("a file of the data folder cannot be used", &error)),
    }
}

impl From<ArtifactError> for Fault {
    fn from(error: ArtifactError) -> Self {
        match error {
            ArtifactError::Full(detail) => full(&detail),
            ArtifactError::Away(detail) => {
                tracing::error!(detail, "the object store does not do it");
                Self::new(Kind::Unavailable, "the object store of the files cannot be used now; try again")
            }
            _ => Self::internal("a file cannot be used", &error),
        }
    }
}

impl From<SqlError> for Fault {
    fn from(error: SqlError) -> Self {
        match error {
            SqlError::Full(detail) => full(&detail),
            SqlError::Away(detail) => {
                tracing::error!(detail, "the database does not answer");
                Self::new(Kind::Unavailable, "the records cannot be reached now; try again")
            }
            SqlError::Unique | SqlError::Other(_) => Fault::internal("the records cannot be used", &error),
        }
    }
}

fn full(detail: &str) -> Fault {
    let message = format!("no space is left for the gateway's files and records: {detail}");
    Fault::new(Kind::Busy { retry_after: SPACE_RETRY }, message)
}
