//! Taking in new generations.

use bytes::Bytes;
use proto::v1::{Generation, GenerationEvent, GenerationState};
use uuid::Uuid;

use super::{
    Store,
    artifacts::{Artifact, sha256},
    blocking,
    engine::{Hold, SqlError},
    lease::patiently,
    ledger::{Inserted, NewRow},
    role, unix_ms,
};
use crate::{
    fault::{Fault, Kind},
    intake::Order,
};

/// A request whose files are read and whose values are settled.
#[derive(Debug)]
pub(crate) struct Accepted {
    /// What is made; id, state and times are set by the store.
    pub(crate) generation: Generation,
    /// The picture's file.
    pub(crate) picture: Vec<u8>,
    /// The recording's file.
    pub(crate) audio: Vec<u8>,
    /// How it is to be served.
    pub(crate) order: Order,
    /// Hash of what was asked for, as it was asked.
    pub(crate) request_hash: String,
    /// It belongs to a call: it does not outlive this process.
    pub(crate) attached: bool,
}

impl Store {
    /// Keeps files; they are not removed before a record names them, as long as the hold is not released.
    pub(super) async fn keep<const N: usize>(
        &self,
        files: [Vec<u8>; N],
    ) -> Result<([Artifact; N], Box<dyn Hold>), Fault> {
        let files = files.map(Bytes::from);
        let weigh = move || {
            let kept = files.each_ref().map(|bytes| Artifact::of(bytes));
            Ok((files, kept))
        };
        let (files, kept) = blocking(weigh).await?;
        let hashes = kept.each_ref().map(|file| file.hash.as_str());
        let naming = patiently(|| self.inner.ledger.name_files(&hashes)).await?;
        for (bytes, file) in files.into_iter().zip(&kept) {
            self.inner.artifacts.put(bytes, file).await?;
        }
        Ok((kept, naming))
    }

    /// Keeps a new generation; once this has returned, it will be run, whatever happens to the process.
    ///
    /// Errors: its key is that of another request, or there is no room.
    pub(crate) async fn create(&self, accepted: Accepted) -> Result<Generation, Fault> {
        let Accepted { generation, picture, audio, order, request_hash, attached } = accepted;
        let now = unix_ms();
        let generation = Generation {
            generation_id: Uuid::now_v7().to_string(),
            state: GenerationState::Queued.into(),
            created_unix_ms: now,
            ended_unix_ms: 0,
            caller: order.caller.clone(),
            label: order.label.clone(),
            deadline_unix_ms: order.deadline_seconds.map(|seconds| now + 1000 * seconds),
            ..generation
        };
        let event = GenerationEvent {
            generation_id: generation.generation_id.clone(),
            number: 1,
            unix_ms: now,
            state: generation.state,
            progress: generation.progress,
            ..GenerationEvent::default()
        };
        let ([picture, audio], naming) = self.keep([picture, audio]).await?;
        let files = [(role::PICTURE, picture), (role::AUDIO, audio)];
        let new = NewRow {
            generation: &generation,
            event: &event,
            order: &order,
            request_hash: &request_hash,
            replica: &self.inner.replica,
            attached,
            artifacts: &files,
        };
        let inserted = match self.inner.ledger.insert(new).await {
            // Somebody else was quicker with the same key; now it is known.
            Err(SqlError::Unique) => self.inner.ledger.insert(new).await,
            other => other,
        };
        naming.release().await;
        match inserted {
            Ok(Inserted::New) => {
                self.inner.arrivals.notify_waiters();
                Ok(generation)
            }
            refused => {
                self.remove_unused(files.into_iter().map(|(_, file)| file.hash).collect()).await?;
                match refused? {
                    Inserted::Known(known, hash) if hash == request_hash => Ok(*known),
                    Inserted::Known(known, _) => Err(Fault::new(
                        Kind::Conflict,
                        format!(
                            "the idempotency key {:?} is that of the generation {}, which was asked for with other values \
                             or files",
                            order.idempotency_key, known.generation_id
                        ),
                    )),
                    Inserted::New => Ok(generation),
                }
            }
        }
    }
}

/// Hash of a request: of its values as they came, and of both files.
pub(crate) fn request_hash(spec: &proto::v1::GenerationSpec, picture: &[u8], audio: &[u8]) -> String {
    use prost::Message as _;
    let parts = [sha256(&spec.encode_to_vec()), sha256(picture), sha256(audio)];
    sha256(parts.concat().as_bytes())
}
