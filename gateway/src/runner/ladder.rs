//! What is tried when a stage's device is out of memory, in order.
//!
//! Every rung needs less memory than the one before. Whoever climbs repeats only the call that failed: a step from its
//! own latents, or the decoding of latents that are finished.

use std::{collections::VecDeque, future::Future};

use proto::v1::Stage;

use tokio::sync::Mutex;

use super::run::Run;
use crate::{
    fault::{Fault, Kind, stage_name},
    stages::{Stages, Whose},
};

/// Most that the decoder's tiles are shrunk by.
const TILE_DIVISORS: [u32; 2] = [2, 4];

/// One way to need less memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rung {
    /// The other stages of the device that no generation has a session on give theirs back.
    UnloadOthers,
    /// Each call holds one pass: window and branches one after the other.
    OnePass,
    /// All other stages of the device give theirs back; other generations have to open their sessions again.
    UnloadBusy,
    /// No features are kept: steps that would reuse them run in full.
    NoFeatures,
    /// The decoder's tiles are so many times shorter.
    SmallerTiles(u32),
}

impl Rung {
    fn said(self) -> String {
        match self {
            Self::UnloadOthers | Self::UnloadBusy => "the other stages of its device unloaded".into(),
            Self::OnePass => "one pass a call".into(),
            Self::NoFeatures => "no features kept between steps".into(),
            Self::SmallerTiles(divisor) => format!("tiles {divisor} times shorter"),
        }
    }
}

/// The rungs of one stage that are left.
#[derive(Debug)]
pub(crate) struct Ladder {
    stages: Stages,
    stage: Stage,
    left: VecDeque<Rung>,
    tried: Vec<String>,
}

impl Ladder {
    /// The ladder of one of the stages; `features` where the steps keep some.
    pub(crate) fn of(stages: &Stages, stage: Stage, features: bool) -> Self {
        let mut left = VecDeque::from([Rung::UnloadOthers]);
        match stage {
            Stage::Diffusion => {
                left.extend([Rung::OnePass, Rung::UnloadBusy]);
                left.extend(features.then_some(Rung::NoFeatures));
            }
            Stage::VaeDecode => {
                left.push_back(Rung::UnloadBusy);
                left.extend(TILE_DIVISORS.map(Rung::SmallerTiles));
            }
            Stage::Unspecified | Stage::AudioEncoder | Stage::TextEncoder | Stage::ImageEncoder => {
                left.push_back(Rung::UnloadBusy);
            }
        }
        Self { stages: stages.clone(), stage, left, tried: Vec::new() }
    }

    /// Lets the other stages be unloaded again: since the last time, other generations may have loaded them.
    pub(crate) fn renew(&mut self) {
        let one_pass = self.left.contains(&Rung::OnePass).then_some(Rung::OnePass);
        let unloads = [Some(Rung::UnloadOthers), one_pass, Some(Rung::UnloadBusy)].into_iter().flatten();
        let others = self.left.iter().copied().filter(|rung| matches!(rung, Rung::NoFeatures | Rung::SmallerTiles(_)));
        self.left = unloads.chain(others).collect();
    }

    /// The rung to take after `fault`, which the run tells of; unloading is done already.
    ///
    /// Errors: `fault` itself where it is of another kind, or with what was tried where nothing is left.
    pub(crate) async fn next(&mut self, run: &Run, fault: Fault) -> Result<Rung, Fault> {
        if fault.kind != Kind::OutOfMemory {
            return Err(fault);
        }
        while let Some(rung) = self.left.pop_front() {
            let mut said = rung.said();
            let whose = match rung {
                Rung::UnloadOthers => Some(Whose::Nobodys),
                Rung::UnloadBusy => Some(Whose::Anybodys),
                Rung::OnePass | Rung::NoFeatures | Rung::SmallerTiles(_) => None,
            };
            if let Some(whose) = whose {
                let unloaded = self.stages.unload_beside(self.stage, whose).await;
                if unloaded.is_empty() {
                    continue;
                }
                said = format!("{} unloaded", unloaded.join(", "));
            }
            self.tell(run, rung, &fault, &said).await;
            if !self.tried.contains(&said) {
                self.tried.push(said);
            }
            return Ok(rung);
        }
        let tried =
            if self.tried.is_empty() { "nothing, as nothing is left to free".into() } else { self.tried.join("; ") };
        Err(Fault { message: format!("{fault}. Tried: {tried}"), ..fault })
    }

    async fn tell(&self, run: &Run, rung: Rung, fault: &Fault, said: &str) {
        tracing::warn!(stage = stage_name(self.stage), %fault, "out of memory; tried again with {said}");
        let sentence = sentence(self.stage, said);
        match rung {
            // The pictures may not be quite the same.
            Rung::NoFeatures | Rung::SmallerTiles(_) => run.warn(self.stage, sentence).await,
            Rung::UnloadOthers | Rung::OnePass | Rung::UnloadBusy => run.note(self.stage, sentence).await,
        }
    }
}

/// Says again in this run that a denoise does without features, as an earlier process decided.
pub(crate) async fn still_without_features(run: &Run) {
    run.warn(Stage::Diffusion, sentence(Stage::Diffusion, &Rung::NoFeatures.said())).await;
}

fn sentence(stage: Stage, said: &str) -> String {
    format!("{} ran out of memory and goes on with {said}", stage_name(stage))
}

/// Calls a stage until it answers or its ladder ends.
pub(crate) async fn climb<T, F>(run: &Run, stage: Stage, mut call: impl FnMut() -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let mut ladder = Ladder::of(&run.stages, stage, false);
    // Each is a stage's first and only call of the run.
    let watchman = run.watchman();
    let limit = watchman.pace(stage).limit(1);
    loop {
        match run.patience.call(|| watchman.in_time((&run.stages, stage), limit, call())).await {
            Ok((value, _)) => return Ok(value),
            Err(fault) => ladder.next(run, fault).await?,
        };
    }
}

/// One of the decoders.
#[derive(Debug)]
struct Decoder {
    /// The stages, with this decoder as theirs.
    stages: Stages,
    ladder: Ladder,
    /// What its tiles are shrunk by.
    divisor: u32,
    /// Why it is not asked any more: its ladder has ended.
    ended: Option<Fault>,
    /// It was told of that the next one is tried.
    left: bool,
}

impl Decoder {
    /// Calls the decoder until it answers, fails otherwise than for want of memory, or its ladder ends.
    async fn climb<T, F>(&mut self, run: &Run, call: &impl Fn(Stages, u32) -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        if let Some(ended) = &self.ended {
            return Err(ended.clone());
        }
        loop {
            let fault = match call(self.stages.clone(), self.divisor).await {
                Err(fault) if fault.kind == Kind::OutOfMemory => fault,
                other => return other,
            };
            match self.ladder.next(run, fault).await {
                Ok(Rung::SmallerTiles(by)) => self.divisor = by,
                Ok(_) => {}
                Err(fault) => return Err(self.ended.insert(fault).clone()),
            }
        }
    }
}

/// Calls the first decoder that can take it; the call gets the stages with that decoder as theirs, and the divisor of its
/// tiles. Where none can, those whose ladder has not ended are waited for.
pub(crate) async fn climb_decoders<T, F>(run: &Run, call: impl Fn(Stages, u32) -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let decoder = |stages: Stages| Decoder {
        ladder: Ladder::of(&stages, Stage::VaeDecode, false),
        stages,
        divisor: 1,
        ended: None,
        left: false,
    };
    let decoders: Vec<Decoder> = run.stages.by_decoder().into_iter().map(decoder).collect();
    // What each has tried holds from one attempt to the next, of which there is one at a time.
    let decoders = Mutex::new(decoders);
    run.patience.call(|| try_decoders(run, &decoders, &call)).await
}

/// Tries each decoder once. Errors: that of the one that is worth being waited for, else that of the last.
async fn try_decoders<T, F>(
    run: &Run,
    decoders: &Mutex<Vec<Decoder>>,
    call: &impl Fn(Stages, u32) -> F,
) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let mut decoders = decoders.lock().await;
    let count = decoders.len();
    let mut worst = None;
    for (number, decoder) in (1..).zip(decoders.iter_mut()) {
        let fault = match decoder.climb(run, call).await {
            Err(fault) if may_pass_on(&fault) => fault,
            other => return other,
        };
        if number < count && !std::mem::replace(&mut decoder.left, true) {
            tell_next(run, &fault, (number, count)).await;
        }
        let waits = |fault: &Fault| fault.kind != Kind::OutOfMemory;
        if waits(&fault) || !worst.as_ref().is_some_and(waits) {
            worst = Some(fault);
        }
    }
    Err(worst.unwrap_or_else(|| Fault::new(Kind::Internal, "there is no decoder").at(Stage::VaeDecode)))
}

/// Whether another decoder may do what one did not.
fn may_pass_on(fault: &Fault) -> bool {
    // What the gateway itself has no room for, such as the video's file, no decoder changes.
    fault.stage == Stage::VaeDecode && matches!(fault.kind, Kind::OutOfMemory | Kind::Unavailable | Kind::Busy { .. })
}

async fn tell_next(run: &Run, fault: &Fault, (number, count): (usize, usize)) {
    let why = match fault.kind {
        Kind::OutOfMemory => "ran out of memory",
        Kind::Busy { .. } => "has no room",
        _ => "does not answer",
    };
    let next = number + 1;
    tracing::warn!(decoder = number, next, %fault, "another decoder is tried");
    let stage = Stage::VaeDecode;
    run.note(stage, format!("vae-decode {number} of {count} {why}; {next} of {count} is tried")).await;
}
