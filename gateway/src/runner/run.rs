//! What the parts of one run share: progress, times and memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use proto::v1::{FaceBox, Generation, GenerationState, MemoryReport, Progress, Stage, StagePart, StageReport};

use super::{
    allowance::Allowance,
    devices::Devices,
    pace::{Pace, Watchman},
    patience::Patience,
    session::Eased,
};
use crate::{
    fault::{Fault, Kind, stage_name},
    planning::Foreseen,
    stages::Stages,
    store::{Change, Lease},
};

/// How much of the work, in percent, is done when encoding and denoising are.
const ENCODED_PERCENT: f32 = 5.0;
const DENOISED_PERCENT: f32 = 90.0;
/// How often it is looked whether a generation is worked on for too long.
const LOOK: Duration = Duration::from_secs(1);

/// One generation that runs.
#[derive(Debug)]
pub(crate) struct Run {
    /// The right to drive it.
    pub(crate) lease: Arc<Lease>,
    /// The stages that it uses.
    pub(crate) stages: Stages,
    /// How they are waited for.
    pub(crate) patience: Patience,
    /// What is known of the pace of a stage before its first call.
    pace: Pace,
    /// What it took of devices.
    pub(crate) devices: Arc<Devices>,
    /// How long it may be worked on, if that is limited.
    allowance: Option<Allowance>,
    /// What is expected of it, where anybody knows.
    foreseen: OnceLock<Foreseen>,
    began: Instant,
    /// Seconds that earlier processes worked on it.
    earlier_seconds: f64,
    /// Warnings that its events tell of already.
    warned: Vec<String>,
    inside: Mutex<Inside>,
}

#[derive(Debug)]
struct Inside {
    progress: Progress,
    /// Seconds of work up to which it may go on by what is foreseen of it, until its own pace says better.
    foreseen_until: Option<f64>,
    reports: BTreeMap<i32, StageReport>,
    warnings: Vec<String>,
    /// By stage, as it said last: whether its device is nearly full, and how many stages had to go or to give back
    /// their caches.
    pressure: BTreeMap<i32, (bool, [u64; 2])>,
    /// How often steps came to need less because their device was nearly full.
    eased: u32,
    /// What was waited for stages already lets it take longer.
    waited: Duration,
}

impl Run {
    /// Begins the run of a generation, or goes on with it.
    pub(crate) async fn begin(
        lease: Arc<Lease>,
        stages: Stages,
        (patience, pace, allowance): (Patience, Pace, Option<Allowance>),
    ) -> Self {
        let Generation { progress, deadline_unix_ms, devices, .. } = lease.generation().await;
        let allowance = allowance.filter(|_| deadline_unix_ms.is_none());
        let mut progress = progress.unwrap_or_default();
        progress.allowed_seconds = progress.allowed_seconds.filter(|_| allowance.is_some());
        let warned = lease.warned().await;
        let (reports, pressure) = (BTreeMap::new(), BTreeMap::new());
        let devices = Arc::new(Devices::new(devices));
        let (warnings, waited) = (Vec::new(), Duration::ZERO);
        let earlier_seconds = progress.elapsed_seconds;
        let inside =
            Mutex::new(Inside { progress, foreseen_until: None, reports, warnings, pressure, eased: 0, waited });
        let (began, foreseen) = (Instant::now(), OnceLock::new());
        Self { lease, stages, patience, pace, devices, allowance, foreseen, began, earlier_seconds, warned, inside }
    }

    /// Takes what is expected of the generation; the first to say it.
    pub(crate) fn foresee(&self, foreseen: Foreseen) {
        let until = self.allowance.map(|allowance| allowance.until(self.earlier_seconds, foreseen.total()));
        self.lock().foreseen_until = until;
        // It is said once, where the run begins.
        let _ = self.foreseen.set(foreseen);
    }

    /// Who tells that stages are stuck.
    pub(crate) fn watchman(&self) -> Watchman {
        Watchman::new(self.patience.clone(), self.pace, self.foreseen.get().cloned())
    }

    /// The id for headers.
    pub(crate) fn id(&self) -> String {
        self.lease.id().to_string()
    }

    /// The name of this run's session on the transformer's worker. A run that goes on elsewhere has another, so that
    /// two never share features, even while the earlier holder of the lease does not know yet that it lost it.
    pub(crate) fn session_id(&self) -> String {
        session_id(&self.lease, self.lease.number())
    }

    /// The name of the session that the run before this one had.
    pub(crate) fn earlier_session_id(&self) -> String {
        session_id(&self.lease, self.lease.number() - 1)
    }

    /// Says that a state begins.
    pub(crate) async fn enter(&self, state: GenerationState) {
        let percent = match state {
            GenerationState::Denoising => ENCODED_PERCENT,
            GenerationState::Decoding => DENOISED_PERCENT,
            _ => 0.0,
        };
        let progress = self.progress(|progress| progress.percent = percent.max(progress.percent));
        self.lease.publish(Change { state: Some(state), progress: Some(progress), ..Change::default() }).await;
    }

    /// Says that a stage begins; the answer is for [`Run::stage_ended`].
    pub(crate) async fn stage_began(&self, stage: Stage) -> Instant {
        self.note(stage, format!("{} began", stage_name(stage))).await;
        // What its first call frees is told by what was free of it before.
        if let Ok(said) = self.stages.describe(stage).await {
            let gone = gone(&said.memory.unwrap_or_default());
            self.lock().pressure.entry(stage.into()).or_insert((false, gone));
        }
        Instant::now()
    }

    /// Says that a stage is done, and keeps its time and peak.
    pub(crate) async fn stage_ended(&self, stage: Stage, began: Instant, memory: MemoryReport) {
        let seconds = began.elapsed().as_secs_f64();
        let report = StageReport {
            stage: stage.into(),
            seconds,
            eased: if stage == Stage::Diffusion { self.lock().eased } else { 0 },
            peak_bytes: memory.peak_bytes,
            device_peak_bytes: memory.device_peak_bytes,
            weight_blocks: memory.weight_blocks,
            resident_weight_blocks: memory.resident_weight_blocks,
            weights_waited_seconds: memory.weights_waited_ms as f64 / 1000.0,
            weights_hidden_seconds: memory.weights_hidden_ms as f64 / 1000.0,
            parts: memory.parts.clone(),
        };
        self.lock().reports.insert(stage.into(), report);
        self.watch_pressure(stage, &memory).await;
        let held = said_of_memory(&memory).map(|said| format!(", {said}")).unwrap_or_default();
        let message = format!("{} took {seconds:.1} s{held}", stage_name(stage));
        self.tell(Change { stage, message, memory: told_of(memory), ..Change::default() }).await;
    }

    /// Says what the caller should know, now and in the outcome.
    pub(crate) async fn warn(&self, stage: Stage, sentence: String) {
        tracing::info!(generation_id = %self.lease.id(), "warning: {sentence}");
        let progress = self.progress(|_| {});
        self.lock().warnings.push(sentence.clone());
        if self.warned.contains(&sentence) {
            return;
        }
        let change = Change { progress: Some(progress), stage, message: sentence, ..Change::default() };
        self.lease.publish(Change { warning: true, ..change }).await;
    }

    /// Says which faces were found, and which is animated; `warning` where the caller should choose.
    pub(crate) async fn faces_found(
        &self,
        faces: &[FaceBox],
        face: Option<FaceBox>,
        (message, warning): (String, bool),
    ) {
        let progress = self.progress(|_| {});
        if warning {
            self.lock().warnings.push(message.clone());
        }
        if self.warned.contains(&message) {
            return;
        }
        let change = Change { faces: faces.to_vec(), face, message, warning, ..Change::default() };
        self.lease.publish(Change { progress: Some(progress), stage: Stage::ImageEncoder, ..change }).await;
    }

    /// Says that the denoise goes on where an earlier process left it.
    pub(crate) async fn resumed(&self, done: u32) {
        let progress = self.progress(|progress| progress.step = done);
        let message = format!("goes on after step {done} of {}", progress.steps);
        let change = Change { progress: Some(progress), stage: Stage::Diffusion, message, ..Change::default() };
        self.lease.publish(change).await;
    }

    /// Says that `done` steps are done, the last of which began `pace_seconds` per step ago.
    pub(crate) async fn step_done(&self, memory: MemoryReport, done: u32, pace_seconds: f64) {
        self.watch_pressure(Stage::Diffusion, &memory).await;
        let progress = self.progress(|progress| {
            progress.step = done;
            let share = done as f32 / progress.steps.max(1) as f32;
            progress.percent = ENCODED_PERCENT + (DENOISED_PERCENT - ENCODED_PERCENT) * share;
            self.predicted(progress, pace_seconds * f64::from(progress.steps.saturating_sub(done)));
        });
        let change = Change {
            progress: Some(progress),
            devices: self.devices.list(),
            stage: Stage::Diffusion,
            message: said_of_memory(&memory).unwrap_or_default(),
            memory: told_of(memory),
            ..Change::default()
        };
        self.lease.publish(change).await;
    }

    /// Takes a prediction of what is left of a stage; how long that may take follows from its first one.
    fn predicted(&self, progress: &mut Progress, remaining_seconds: f64) {
        progress.remaining_seconds = Some(remaining_seconds);
        if let (None, Some(allowance)) = (progress.allowed_seconds, self.allowance) {
            progress.allowed_seconds = Some(allowance.until(progress.elapsed_seconds, remaining_seconds));
        }
    }

    /// Drops what followed from the pace so far: of what is begun now only that is known which was foreseen.
    pub(crate) fn begins_anew(&self, stage: Stage) {
        let elapsed = self.progress(|progress| progress.allowed_seconds = None).elapsed_seconds;
        let all = self.allowance.zip(self.foreseen.get());
        self.lock().foreseen_until = all.map(|(allowance, foreseen)| allowance.until(elapsed, foreseen.seconds(stage)));
    }

    /// Resolves once it has been worked on for longer than is allowed; never where that is not limited. Time in the
    /// queue, between two processes and in waits for stages that are away or have no room is no work.
    pub(crate) async fn overdue(&self) -> Fault {
        loop {
            let Progress { elapsed_seconds, allowed_seconds, .. } = self.progress(|_| {});
            let allowed = allowed_seconds.or(self.lock().foreseen_until);
            let left = allowed.map_or(f64::INFINITY, |allowed| allowed - elapsed_seconds);
            if left <= 0.0 {
                let message = format!(
                    "after {elapsed_seconds:.0} s of work a stage has taken longer than the server allows by what was \
                     predicted of it; a request with a deadline of its own may take as long as that says"
                );
                return Fault::new(Kind::Deadline, message);
            }
            tokio::time::sleep(Duration::from_secs_f64(left.min(LOOK.as_secs_f64()))).await;
        }
    }

    /// Says when a stage's device becomes nearly full, when it is so no more, and when idle stages had to go.
    async fn watch_pressure(&self, stage: Stage, memory: &MemoryReport) {
        let gone = gone(memory);
        let before = self.lock().pressure.insert(stage.into(), (memory.pressure, gone));
        let (pressed, [unloaded, emptied]) = before.unwrap_or((false, gone));
        let name = stage_name(stage);
        for (what, now, before) in
            [("idle stages unloaded", gone[0], unloaded), ("stages whose caches were freed", gone[1], emptied)]
        {
            if let Some(count) = now.checked_sub(before).filter(|&count| count > 0) {
                self.note(stage, format!("to make room on {name}'s device, {what}: {count}")).await;
            }
        }
        match (pressed, memory.pressure) {
            (false, true) => self.note(stage, format!("{name}'s device is nearly full; new work has to wait")).await,
            (true, false) => self.note(stage, format!("{name}'s device has room again")).await,
            _ => {}
        }
    }

    /// Says that steps need less memory, or more again, from one of them on.
    pub(crate) async fn eased(&self, eased: Eased, step: u32) {
        let message = match eased {
            Eased::OnePass => {
                self.lock().eased += 1;
                format!("diffusion's device is nearly full; from step {step} on each call holds one pass")
            }
            Eased::AllPasses => {
                format!("diffusion's device has room again; from step {step} on calls hold all passes")
            }
        };
        self.note(Stage::Diffusion, message).await;
    }

    /// Says that `done` of `frames` frames are decoded.
    pub(crate) async fn frames_done(&self, done: usize, frames: usize, pace_seconds: f64) {
        let progress = self.progress(|progress| {
            let share = done as f32 / frames.max(1) as f32;
            progress.percent = DENOISED_PERCENT + (99.0 - DENOISED_PERCENT) * share.min(1.0);
            self.predicted(progress, pace_seconds * frames.saturating_sub(done) as f64);
        });
        let message = format!("{done} of {frames} frames decoded");
        let change = Change { progress: Some(progress), stage: Stage::VaeDecode, message, ..Change::default() };
        self.lease.publish(change).await;
    }

    /// Says that a stage need not be asked, for what it gave before was kept.
    pub(crate) async fn stage_kept(&self, stage: Stage, memory: MemoryReport) {
        let MemoryReport { peak_bytes, device_peak_bytes, parts, .. } = memory;
        let report =
            StageReport { stage: stage.into(), peak_bytes, device_peak_bytes, parts, ..StageReport::default() };
        self.lock().reports.insert(stage.into(), report);
        self.note(stage, format!("{}: kept from before", stage_name(stage))).await;
    }

    /// Times and peaks of the stages so far.
    pub(crate) fn reports(&self) -> Vec<StageReport> {
        self.lock().reports.values().cloned().collect()
    }

    /// What the caller was told to know so far.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.lock().warnings.clone()
    }

    /// The progress at the end.
    pub(crate) fn last_progress(&self, completed: bool) -> Progress {
        self.progress(|progress| {
            if completed {
                progress.percent = 100.0;
                progress.remaining_seconds = Some(0.0);
            } else {
                progress.remaining_seconds = None;
            }
        })
    }

    /// Whether an earlier process worked on it.
    pub(crate) fn goes_on(&self) -> bool {
        self.earlier_seconds > 0.0
    }

    /// Says something that the caller need not act on.
    pub(crate) async fn note(&self, stage: Stage, message: String) {
        self.tell(Change { stage, message, ..Change::default() }).await;
    }

    async fn tell(&self, change: Change) {
        tracing::info!(generation_id = %self.lease.id(), "{}", change.message);
        let (progress, devices) = (Some(self.progress(|_| {})), self.devices.list());
        self.lease.publish(Change { progress, devices, ..change }).await;
    }

    fn progress(&self, change: impl FnOnce(&mut Progress)) -> Progress {
        let mut inside = self.lock();
        let elapsed = self.earlier_seconds + self.began.elapsed().as_secs_f64();
        let waited = self.patience.waited();
        let more = waited.saturating_sub(std::mem::replace(&mut inside.waited, waited)).as_secs_f64();
        inside.progress.elapsed_seconds = elapsed;
        inside.progress.allowed_seconds = inside.progress.allowed_seconds.map(|allowed| allowed + more);
        inside.foreseen_until = inside.foreseen_until.map(|until| until + more);
        change(&mut inside.progress);
        inside.progress
    }

    /// Only whole values are written under the lock, so it is sound even after a panic of a holder.
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many stages of a device had to go, and how many to give back their caches.
fn gone(memory: &MemoryReport) -> [u64; 2] {
    [memory.unloaded_stages, memory.emptied_caches]
}

fn session_id(lease: &Lease, number: i64) -> String {
    format!("{}-{number}", lease.id())
}

/// What a stage told of its memory, if it did.
fn told_of(memory: MemoryReport) -> Option<MemoryReport> {
    (memory != MemoryReport::default()).then_some(memory)
}

/// What a stage and its device hold; nothing of a stage that does not tell.
fn said_of_memory(memory: &MemoryReport) -> Option<String> {
    if memory.budget_bytes == 0 {
        return None;
    }
    let percent = memory.device_bytes as f64 * 100.0 / memory.budget_bytes as f64;
    let (now, budget, peak) = (gib(memory.device_bytes), gib(memory.budget_bytes), gib(memory.peak_bytes));
    let first = format!("holds {now} of {budget} ({percent:.0} %), its peak {peak}");
    let part = |part: &StagePart| {
        let percent = part.device_bytes as f64 * 100.0 / part.budget_bytes.max(1) as f64;
        let (device, now, budget, peak) =
            (&part.device, gib(part.device_bytes), gib(part.budget_bytes), gib(part.peak_bytes));
        format!("; on {device} {now} of {budget} ({percent:.0} %), its peak {peak}")
    };
    Some(std::iter::once(first).chain(memory.parts.iter().skip(1).map(part)).collect())
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1u32 << 30))
}
