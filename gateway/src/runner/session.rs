//! A session of the transformer that survives the loss of its worker.

use std::{sync::Arc, time::Duration};

use proto::{
    tensor::HostTensor,
    v1::{MemoryReport, OpenSessionHeader, PassMode, PredictHeader, PredictItem, Stage},
};

use super::{
    devices::Devices,
    gate::rejected,
    ladder::Rung,
    pace::{Pace, Watchman},
    patience::Patience,
};
use crate::{
    fault::{Fault, Kind},
    stages::Stages,
};

/// Items of one call. A step of a long clip is several calls, so that none holds the device or the queue for long.
const ITEMS_PER_CALL: usize = 8;
/// How often a worker may lose a session, or its features, in one step. Another generation that runs out of memory may
/// have the worker unloaded again and again while it tries what helps.
const LOSSES_PER_STEP: usize = 8;
/// How long the end of a generation waits for the worker to free its session.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What changes at a step because of the memory of the worker's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Eased {
    /// Each call holds one pass.
    OnePass,
    /// Calls hold several passes again.
    AllPasses,
}

/// The passes of one denoise step.
#[derive(Debug, Clone)]
pub(crate) struct StepPasses {
    /// Denoise step, from 0.
    pub(crate) step: u32,
    /// Flow time, 0..1000.
    pub(crate) timestep: f32,
    /// How much of the transformer runs.
    pub(crate) mode: PassMode,
    /// Keep features for later cached passes.
    pub(crate) keep_features: bool,
    /// (C, T, h, w) of every item's latents.
    pub(crate) shape: [usize; 4],
    /// Windows and branches, each with its latents.
    pub(crate) items: Vec<(PredictItem, Vec<f32>)>,
}

/// One generation's session.
#[derive(Debug)]
pub(crate) struct Session {
    stages: Stages,
    patience: Patience,
    watchman: Watchman,
    pace: Pace,
    devices: Arc<Devices>,
    header: OpenSessionHeader,
    tensors: Vec<HostTensor>,
    /// The passes whose features a cached step needs; run again when a worker has lost them.
    last_kept: Option<Arc<StepPasses>>,
    memory: MemoryReport,
    /// Items of one call, as far as memory has ever sufficed.
    items_per_call: usize,
    /// Whether the worker's device is nearly full, so that each call holds one item.
    eased: bool,
    /// Whether steps may keep features and reuse them.
    features: bool,
}

impl Session {
    /// A session that is not open yet.
    pub(crate) fn new(
        stages: Stages,
        (patience, watchman): (Patience, Watchman),
        (header, devices): (OpenSessionHeader, &Arc<Devices>),
        tensors: Vec<HostTensor>,
    ) -> Self {
        let devices = Arc::clone(devices);
        let (memory, items_per_call) = (MemoryReport::default(), ITEMS_PER_CALL);
        let (last_kept, eased) = (None, false);
        let pace = watchman.pace(Stage::Diffusion);
        Self {
            stages,
            patience,
            watchman,
            pace,
            devices,
            header,
            tensors,
            last_kept,
            memory,
            items_per_call,
            eased,
            features: true,
        }
    }

    /// Whether steps may keep features and reuse them.
    pub(crate) fn keeps_features(&self) -> bool {
        self.features
    }

    /// Follows what the worker said last of its device: a step of so many items comes one a call while that is nearly
    /// full, and in larger calls again when it has room. Says what changes.
    pub(crate) fn ease(&mut self, items: usize) -> Option<Eased> {
        if self.memory.pressure == self.eased || self.items_per_call.min(items) <= 1 {
            return None;
        }
        self.eased = self.memory.pressure;
        Some(if self.eased { Eased::OnePass } else { Eased::AllPasses })
    }

    /// Needs less from now on.
    pub(crate) fn fit(&mut self, rung: Rung) {
        match rung {
            Rung::OnePass => self.items_per_call = 1,
            Rung::NoFeatures => {
                self.features = false;
                self.last_kept = None;
            }
            // What other stages hold is not the session's.
            Rung::UnloadOthers | Rung::UnloadBusy | Rung::SmallerTiles(_) => {}
        }
    }

    /// As [`predict`](Self::predict), after [`fit`](Self::fit): features that are not used any more are freed first.
    pub(crate) async fn retry(&mut self, passes: &Arc<StepPasses>) -> Result<Vec<Vec<f32>>, Fault> {
        if !self.features {
            Self::close(&self.stages, self.header.session_id.clone()).await;
            self.open().await?;
        }
        self.predict(passes).await
    }

    /// Opens it, or opens it again.
    pub(crate) async fn open(&mut self) -> Result<(), Fault> {
        let (header, tensors, stages) = (&self.header, &self.tensors, &self.stages);
        // It may load the weights, whatever the pace of passes is.
        let (limit, watchman) = (self.watchman.pace(Stage::Diffusion).limit(1), &self.watchman);
        let open = || {
            watchman.in_time((stages, Stage::Diffusion), limit, stages.open_session(header.clone(), tensors.clone()))
        };
        let ((memory, used), _) = self.patience.call(open).await?;
        self.memory = memory;
        self.devices.add(used);
        Ok(())
    }

    /// The worker's memory as last reported.
    pub(crate) fn memory(&self) -> MemoryReport {
        self.memory.clone()
    }

    /// Runs a step's passes; the velocities come in the order of the items.
    ///
    /// A worker that has lost the session gets it again. Where it also lost features that this step needs, the step
    /// that left them is run again first, on the same latents: the result is that of a worker which lost nothing.
    pub(crate) async fn predict(&mut self, passes: &Arc<StepPasses>) -> Result<Vec<Vec<f32>>, Fault> {
        let mut passes = Arc::clone(passes);
        if !self.features && (passes.keep_features || passes.mode == PassMode::Cached) {
            passes = Arc::new(StepPasses { mode: PassMode::Full, keep_features: false, ..(*passes).clone() });
        }
        let cached = passes.mode == PassMode::Cached;
        let mut outcome = self.run(&passes).await;
        for _ in 0..LOSSES_PER_STEP {
            let session_lost = match &outcome {
                Err(fault) if fault.kind == Kind::NotFound => true,
                Err(fault) if fault.kind == Kind::Precondition && cached && self.last_kept.is_some() => false,
                _ => break,
            };
            let what = if session_lost { "session" } else { "features" };
            tracing::warn!(
                session_id = self.header.session_id,
                step = passes.step,
                what,
                "a worker lost what the step needs"
            );
            outcome = self.run_again(&passes, session_lost).await;
        }
        let velocities = outcome?;
        if passes.mode == PassMode::Full && passes.keep_features {
            self.last_kept = Some(passes);
        }
        Ok(velocities)
    }

    /// Runs a step's passes on a worker that has lost what they need.
    async fn run_again(&mut self, passes: &StepPasses, session_lost: bool) -> Result<Vec<Vec<f32>>, Fault> {
        if session_lost {
            self.open().await?;
        }
        if passes.mode == PassMode::Cached {
            self.rebuild_features().await?;
        }
        self.run(passes).await
    }

    async fn rebuild_features(&mut self) -> Result<(), Fault> {
        if let Some(kept) = self.last_kept.clone() {
            self.run(&kept).await?;
        }
        Ok(())
    }

    async fn run(&mut self, passes: &StepPasses) -> Result<Vec<Vec<f32>>, Fault> {
        let mut velocities = Vec::with_capacity(passes.items.len());
        let items_per_call = if self.eased { 1 } else { self.items_per_call };
        for items in passes.items.chunks(items_per_call) {
            let header = PredictHeader {
                session_id: self.header.session_id.clone(),
                step: passes.step,
                timestep: passes.timestep,
                mode: passes.mode.into(),
                keep_features: passes.keep_features,
                items: items.iter().map(|(item, _)| item.clone()).collect(),
            };
            let latents = items
                .iter()
                .enumerate()
                .map(|(i, (_, values))| HostTensor::from_f32(format!("latents.{i}"), &passes.shape, values))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| Fault::internal("the latents do not fit their window", &error))?;
            let (limit, at) = (self.pace.limit(items.len()), (&self.stages, Stage::Diffusion));
            let call = || self.watchman.in_time(at, limit, self.stages.predict(header.clone(), latents.clone()));
            let (mut answer, took) = self.patience.call(call).await?;
            self.pace.learn(items.len(), took);
            self.memory = answer.memory.clone();
            self.devices.add(answer.device_use.take());
            for i in 0..items.len() {
                let velocity = answer.take(&format!("velocity.{i}"), Stage::Diffusion)?;
                velocities.push(checked(&velocity, passes)?);
            }
        }
        Ok(velocities)
    }

    /// Frees the session on the worker. A worker that does not answer frees it by itself in time.
    pub(crate) async fn close(stages: &Stages, session_id: String) {
        match tokio::time::timeout(CLOSE_TIMEOUT, stages.close_session(session_id.clone())).await {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => tracing::warn!(session_id, %fault, "the session was not closed"),
            Err(_) => tracing::warn!(session_id, "closing the session took too long"),
        }
    }
}

/// The values of a velocity of the right shape, all finite.
fn checked(velocity: &HostTensor, passes: &StepPasses) -> Result<Vec<f32>, Fault> {
    let at = |message: String| Fault::new(Kind::Internal, format!("diffusion: step {}: {message}", passes.step + 1));
    if velocity.shape() != passes.shape {
        return Err(at(velocity.mismatch(format!("F32 {:?}", passes.shape)).to_string()).at(Stage::Diffusion));
    }
    let values = velocity.to_f32().map_err(|error| at(error.to_string()).at(Stage::Diffusion))?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(i) => {
            let what = format!("step {}: {} has the value {} at {i}", passes.step + 1, velocity.name(), values[i]);
            Err(rejected(Stage::Diffusion, what))
        }
    }
}
