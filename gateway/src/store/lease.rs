//! The right to drive a generation: whoever holds it adds the events, and nobody else.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use proto::v1::{
    DeviceUse, FaceBox, Generation, GenerationEvent, GenerationState, MemoryReport, Outcome, Preview, Progress, Stage,
};
use tokio::{sync::Mutex, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    BEATS, Store,
    artifacts::{Artifact, ArtifactError, Artifacts},
    blocking,
    engine::SqlError,
    identity,
    ledger::{Append, Row},
    life, lock, role, unix_ms,
};
use crate::fault::{Fault, Kind};

/// How often the clock of the day is looked at where a deadline is waited for.
const CLOCK: Duration = Duration::from_secs(5);
/// How long something waits before it is tried again, where the database or the object store refused it.
const AGAIN: Duration = Duration::from_secs(1);

/// Something that happened; what is left `None` stays as it was.
#[derive(Debug, Clone, Default)]
pub(crate) struct Change {
    /// The new state.
    pub(crate) state: Option<GenerationState>,
    /// How far it is now.
    pub(crate) progress: Option<Progress>,
    /// What it took of devices so far; empty where that is as before.
    pub(crate) devices: Vec<DeviceUse>,
    /// The stage that began or ended.
    pub(crate) stage: Stage,
    /// A sentence for people.
    pub(crate) message: String,
    /// The sentence is a warning.
    pub(crate) warning: bool,
    /// Faces that were found, or the one that was given.
    pub(crate) faces: Vec<FaceBox>,
    /// The face that is animated.
    pub(crate) face: Option<FaceBox>,
    /// A picture of how far it is, which is kept.
    pub(crate) preview: Option<Preview>,
    /// What the stage and its device hold.
    pub(crate) memory: Option<MemoryReport>,
    /// Why it failed.
    pub(crate) fault: Option<Fault>,
    /// What came out.
    pub(crate) outcome: Option<Outcome>,
}

impl Change {
    /// The end of a generation that did not end in time.
    pub(crate) fn late() -> Self {
        let fault = late();
        let (state, message) = (Some(GenerationState::Failed), fault.message.clone());
        Self { state, message, fault: Some(fault), ..Self::default() }
    }

    /// The end of a generation that its caller stopped.
    pub(crate) fn cancelled(message: &str) -> Self {
        Self { state: Some(GenerationState::Cancelled), message: message.into(), ..Self::default() }
    }
}

/// The fault of a generation that did not end in time.
fn late() -> Fault {
    Fault::new(Kind::Deadline, "the generation's deadline has passed")
}

/// Latents that a generation can go on with.
#[derive(Debug, Clone)]
pub(crate) struct Resume {
    /// The step that comes next.
    pub(crate) step: usize,
    /// The latents before it, (C, T, h, w).
    pub(crate) latents: Vec<f32>,
}

/// A generation that this process drives.
#[derive(Debug)]
pub(crate) struct Lease {
    store: Store,
    id: Uuid,
    number: i64,
    /// The generation as last stored, and the number of its last event.
    inside: Mutex<(Generation, u64)>,
    cancel: CancellationToken,
    lost: CancellationToken,
    resume: (u32, String),
}

impl Lease {
    /// The lease on a generation that was just taken.
    pub(super) fn new(store: Store, row: Row) -> Arc<Self> {
        let id = identity(&row.generation);
        let cancel = CancellationToken::new();
        if row.cancel {
            cancel.cancel();
        }
        lock(&store.inner.running).insert(id, cancel.clone());
        Arc::new(Self {
            store,
            id,
            number: row.lease,
            inside: Mutex::new((row.generation, row.last_event)),
            cancel,
            lost: CancellationToken::new(),
            resume: row.resume,
        })
    }

    /// The id.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Its number; a later lease on the same generation has a higher one.
    pub(crate) fn number(&self) -> i64 {
        self.number
    }

    /// Cancelled when the caller wants the generation stopped.
    pub(crate) fn cancel_token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Cancelled when somebody else may drive the generation, or it was removed: then nothing more is written.
    pub(crate) fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// The generation as last stored.
    pub(crate) async fn generation(&self) -> Generation {
        self.inside.lock().await.0.clone()
    }

    /// The warnings that were given before this process took the generation.
    pub(crate) async fn warned(&self) -> Vec<String> {
        let last = self.inside.lock().await.1;
        let last = i64::try_from(last).unwrap_or(i64::MAX);
        let events = patiently(|| self.store.inner.ledger.events(self.id, 1, last)).await;
        let events = events.unwrap_or_default().into_iter();
        events.filter(|event| event.warning).map(|event| event.message).collect()
    }

    /// Whether a store gave it.
    #[cfg(test)]
    pub(super) fn is_of(&self, store: &Store) -> bool {
        Arc::ptr_eq(&self.store.inner, &store.inner)
    }

    /// Stores a change and tells those who watch; what may not follow the state is left out.
    ///
    /// It waits while the database cannot take the change, and is whole even if nobody waits for it.
    pub(crate) async fn publish(self: &Arc<Self>, change: Change) {
        let lease = Arc::clone(self);
        let stored = tokio::spawn(async move {
            let unused = lease.store_change(change, None).await;
            drop_files(&lease.store, unused).await;
        });
        if let Err(error) = stored.await {
            tracing::error!(generation_id = %self.id, %error, "an event was not stored");
        }
    }

    /// Keeps the finished video, which lies in the store's folder for work and may be moved, and stores the end. It waits
    /// while an object store refuses the video, or the disk is full.
    ///
    /// Errors: the video cannot be kept, or it was cancelled or too late before it was.
    pub(crate) async fn complete(self: &Arc<Self>, video: PathBuf, change: Change) -> Result<(), Fault> {
        let lease = Arc::clone(self);
        let stored = tokio::spawn(async move {
            let weighed = video.clone();
            let kept = blocking(move || Artifact::weigh(&weighed)).await?;
            let hashes = [kept.hash.as_str()];
            let naming = patiently(|| lease.store.inner.ledger.name_files(&hashes)).await?;
            if let Err(ended) = lease.adopt(&video, &kept).await {
                naming.release().await;
                drop_files(&lease.store, vec![kept.hash]).await;
                return ended;
            }
            let unused = lease.store_change(change, Some((role::VIDEO.to_owned(), kept))).await;
            naming.release().await;
            drop_files(&lease.store, unused).await;
            Ok(())
        });
        stored.await.unwrap_or_else(|error| Err(Fault::internal("the video cannot be kept", &error)))
    }

    /// Keeps the file of the video; else gives how that ended.
    async fn adopt(&self, video: &Path, kept: &Artifact) -> Result<(), Result<(), Fault>> {
        let artifacts = &self.store.inner.artifacts;
        let adopted = match artifacts {
            // It is only moved; while the disk has no room for that, it is tried again.
            Artifacts::Folder(_) => loop {
                match artifacts.adopt(video, kept).await {
                    Err(error) if error.passes() => {
                        tracing::warn!(generation_id = %self.id, %error, "the video waits to be kept");
                        tokio::select! {
                            () = tokio::time::sleep(AGAIN) => {}
                            ended = self.called_off() => return Err(ended),
                        }
                    }
                    done => break done,
                }
            },
            Artifacts::Bucket(_) => tokio::select! {
                biased;
                adopted = patiently(|| artifacts.adopt(video, kept)) => adopted,
                ended = self.called_off() => return Err(ended),
            },
        };
        adopted.map_err(|error| Err(error.into()))
    }

    /// Resolves once the generation is somebody else's, or is to be ended as the fault says.
    async fn called_off(&self) -> Result<(), Fault> {
        tokio::select! {
            () = self.keep_alive() => Ok(()),
            () = self.cancel.cancelled() => Err(Fault::new(Kind::Cancelled, "the generation was cancelled")),
            fault = self.deadline() => Err(fault),
        }
    }

    /// Keeps the JPEG file of a preview, and tells of it; where the generation has ended meanwhile, neither is done.
    pub(crate) async fn keep_preview(
        self: &Arc<Self>,
        file: Vec<u8>,
        preview: Preview,
        change: Change,
    ) -> Result<(), Fault> {
        let lease = Arc::clone(self);
        // Whole even where the preview is given up: else a file would stay that no record names.
        let stored = tokio::spawn(async move {
            let ([kept], naming) = lease.store.keep([file]).await?;
            let Artifact { hash, bytes } = kept.clone();
            let role = role::preview(preview.step);
            let mut unused = vec![hash.clone()];
            unused.extend(lease.artifact(&role).await.map(|before| before.hash));
            let change = Change { preview: Some(Preview { bytes, sha256: hash, ..preview }), ..change };
            unused.extend(lease.store_change(change, Some((role, kept))).await);
            naming.release().await;
            drop_files(&lease.store, unused).await;
            Ok(())
        });
        stored.await.unwrap_or_else(|error| Err(Fault::internal("the preview cannot be kept", &error)))
    }

    /// Stores a change, with a file in its role; gives the hashes of files that the generation no longer has.
    async fn store_change(&self, change: Change, file: Option<(String, Artifact)>) -> Vec<String> {
        let mut inside = self.inside.lock().await;
        let before = inside.0.state();
        let state = change.state.unwrap_or(before);
        if self.lost.is_cancelled() || !life::may_follow(before, state) {
            return Vec::new();
        }
        let (generation, event) = after(&inside.0, inside.1 + 1, state, change);
        let keep: Vec<(String, Artifact)> = file.into_iter().collect();
        // What a failure was made from stays, so that it can be looked into.
        let done = matches!(state, GenerationState::Completed | GenerationState::Cancelled);
        let drop: &[&'static str] = if done { &role::MATERIAL } else { &[] };
        let mut unused = Vec::new();
        for role in drop {
            unused.extend(self.artifact(role).await.map(|artifact| artifact.hash));
        }
        loop {
            let append = Append { generation: &generation, event: &event, keep: &keep, drop };
            match self.store.inner.ledger.append(self.number, append).await {
                Ok(true) => break,
                Ok(false) => {
                    tracing::warn!(generation_id = %self.id, "the lease is lost; nothing more is written");
                    self.lost.cancel();
                    return Vec::new();
                }
                Err(error) => {
                    tracing::error!(generation_id = %self.id, %error, "an event waits to be stored");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        *inside = (generation, event.number);
        self.store.ring(self.id);
        if life::is_terminal(state) {
            self.store.inner.ends.notify_waiters();
        }
        unused
    }

    /// A file of the generation.
    async fn artifact(&self, role: &str) -> Option<Artifact> {
        patiently(|| self.store.inner.ledger.artifact(self.id, role)).await.ok().flatten()
    }

    /// The bytes of a file that the generation was made with; an object store that does not answer is waited for.
    pub(crate) async fn read(&self, role: &'static str) -> Result<Vec<u8>, Fault> {
        let artifact = patiently(|| self.store.inner.ledger.artifact(self.id, role)).await?;
        let artifact = artifact.ok_or_else(|| Fault::internal("a file of the generation is gone", &role))?;
        Ok(patiently(|| self.store.inner.artifacts.read(&artifact)).await?)
    }

    /// Stores latents that the generation can go on with: those before step `step` of the plan.
    pub(crate) async fn checkpoint(&self, step: usize, plan: &str, latents: &[f32]) -> Result<(), Fault> {
        let bytes: Vec<u8> = latents.iter().flat_map(|value| value.to_le_bytes()).collect();
        let before = self.artifact(role::LATENTS).await;
        let ([kept], naming) = self.store.keep([bytes]).await?;
        let step = u32::try_from(step).unwrap_or(u32::MAX);
        let ledger = &self.store.inner.ledger;
        let held = patiently(|| ledger.checkpoint((self.id, self.number), (step, plan), (role::LATENTS, &kept))).await;
        naming.release().await;
        if held == Ok(false) {
            self.lost.cancel();
        }
        let unused = if held == Ok(true) { before.filter(|before| *before != kept) } else { Some(kept) };
        drop_files(&self.store, unused.map(|file| file.hash).into_iter().collect()).await;
        Ok(held.map(drop)?)
    }

    /// The plan whose latents an earlier process stored last; empty where it stored none.
    pub(crate) fn stored_plan(&self) -> &str {
        &self.resume.1
    }

    /// The step that those latents are before; 0 where there are none.
    pub(crate) fn stored_step(&self) -> usize {
        self.resume.0 as usize
    }

    /// The bytes of a file of the generation, if it has one in this role that can be read.
    pub(crate) async fn kept(&self, role: &str) -> Option<Vec<u8>> {
        let artifact = self.artifact(role).await?;
        patiently(|| self.store.inner.artifacts.read(&artifact)).await.ok()
    }

    /// The latents to go on with, if there are any of this plan that are whole.
    pub(crate) async fn resume(&self, plan: &str) -> Option<Resume> {
        let (step, of) = &self.resume;
        if *step == 0 {
            return None;
        }
        if of != plan {
            tracing::warn!(generation_id = %self.id, "the stored latents are of another plan; they are not used");
            return None;
        }
        match self.read(role::LATENTS).await {
            Ok(bytes) => {
                let latents = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                Some(Resume { step: *step as usize, latents })
            }
            Err(fault) => {
                tracing::warn!(generation_id = %self.id, %fault, "the stored latents cannot be used");
                None
            }
        }
    }

    /// What a stage gave before for the same inputs and the same model; it is the generation's in `role` then.
    pub(crate) async fn stage_output(&self, role: &'static str, key: &str) -> Option<Vec<u8>> {
        let (ledger, who) = (&self.store.inner.ledger, (self.id, self.number, role));
        let known = patiently(|| ledger.use_stage_output(who, key, unix_ms())).await;
        let artifact = known.ok().flatten()?;
        patiently(|| self.store.inner.artifacts.read(&artifact)).await.ok()
    }

    /// Keeps what a stage gave.
    pub(crate) async fn keep_stage_output(&self, role: &'static str, key: &str, output: Vec<u8>) -> Result<(), Fault> {
        let ([kept], naming) = self.store.keep([output]).await?;
        let (ledger, who) = (&self.store.inner.ledger, (self.id, self.number, role));
        let held = patiently(|| ledger.keep_stage_output(who, (key, &kept), unix_ms())).await;
        naming.release().await;
        if held == Ok(false) {
            self.lost.cancel();
        }
        if held != Ok(true) {
            drop_files(&self.store, vec![kept.hash]).await;
        }
        Ok(held.map(drop)?)
    }

    /// Resolves once the deadline that the caller gave has passed; never without one.
    pub(crate) async fn deadline(&self) -> Fault {
        let deadline = self.generation().await.deadline_unix_ms;
        let Some(deadline) = deadline else { return std::future::pending().await };
        // In pieces: the clock of the day may be set meanwhile.
        while let Some(left) = deadline.checked_sub(unix_ms()).filter(|left| *left > 0) {
            tokio::time::sleep(Duration::from_millis(left).min(CLOCK)).await;
        }
        late()
    }

    /// Gives signs of life until the lease is lost.
    pub(crate) async fn keep_alive(&self) {
        let mut beat = tokio::time::interval(self.store.inner.lease / BEATS);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            beat.tick().await;
            match self.renew().await {
                Ok(Some(true)) => self.cancel.cancel(),
                Ok(Some(false)) => {}
                Ok(None) => return self.lost.cancel(),
                Err(error) => tracing::error!(generation_id = %self.id, %error, "the lease was not renewed"),
            }
        }
    }

    /// Prolongs the lease; `None` when it is lost, else whether the caller wants the generation stopped.
    pub(super) async fn renew(&self) -> Result<Option<bool>, SqlError> {
        let ledger = &self.store.inner.ledger;
        let until = ledger.now_ms().await?.saturating_add(self.store.lease_ms());
        ledger.renew(self.id, self.number, until).await
    }

    /// Gives the generation back as it is, so that somebody can go on with it.
    pub(crate) async fn release(&self) {
        if let Err(error) = self.store.inner.ledger.renew(self.id, self.number, 0).await {
            tracing::warn!(generation_id = %self.id, %error, "the lease was not given back; it ends by itself");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.store.inner.running).remove(&self.id);
    }
}

/// An error that may be gone when the same is done again.
pub(super) trait Passing: std::error::Error {
    /// Whether it is worth waiting.
    fn passes(&self) -> bool;
}

impl Passing for SqlError {
    fn passes(&self) -> bool {
        matches!(self, Self::Away(_))
    }
}

impl Passing for ArtifactError {
    fn passes(&self) -> bool {
        matches!(self, Self::Away(_) | Self::Full(_))
    }
}

/// Does it again while the database or the object store does not answer: what runs waits, and does not fail.
pub(super) async fn patiently<T, E, F>(mut work: impl FnMut() -> F) -> Result<T, E>
where
    E: Passing,
    F: Future<Output = Result<T, E>>,
{
    loop {
        match work().await {
            Err(error) if error.passes() => {
                tracing::warn!(%error, "it is waited for");
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

async fn drop_files(store: &Store, hashes: Vec<String>) {
    if let Err(fault) = store.remove_unused(hashes).await {
        tracing::warn!(%fault, "a file that nobody needs stays behind");
    }
}

/// The generation after a change, and the event that tells of it.
fn after(before: &Generation, number: u64, state: GenerationState, change: Change) -> (Generation, GenerationEvent) {
    let unix_ms = unix_ms();
    let failure = change.fault.as_ref().map(Fault::to_failure);
    let mut generation = before.clone();
    generation.state = state.into();
    if life::is_terminal(state) {
        generation.ended_unix_ms = unix_ms;
    }
    if change.progress.is_some() {
        generation.progress = change.progress;
    }
    if !change.devices.is_empty() {
        generation.devices = change.devices;
    }
    generation.failure.clone_from(&failure);
    generation.outcome.clone_from(&change.outcome);
    let event = GenerationEvent {
        generation_id: generation.generation_id.clone(),
        number,
        unix_ms,
        state: state.into(),
        progress: generation.progress,
        stage: change.stage.into(),
        message: change.message,
        failure,
        outcome: change.outcome,
        warning: change.warning,
        faces: change.faces,
        face: change.face,
        preview: change.preview,
        memory: change.memory,
    };
    (generation, event)
}
