//! What stays the same for one generation, checked once.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use model::{
    audio::windows_per_frame,
    diffusion::{Conditioning, FeatureCache, MOTION_EXP, MOTION_POSE, Widths},
};
use planner::cost::cpu::Pass;
use proto::{
    tensor::HostTensor,
    v1::{Branch, DataType, OpenSessionHeader, PredictItem, PromptKind},
};
use service_kit::ServiceError;

/// The tensors of `OpenSession`, in the order in which [`Session::new`] takes them.
pub(crate) const TENSORS: [&str; 9] = [
    "features",
    "reference_latents",
    "face_mask",
    "positive.states",
    "positive.mask",
    "positive.pooled",
    "negative.states",
    "negative.mask",
    "negative.pooled",
];
/// A session that nobody has used for so long may be dropped.
const IDLE: Duration = Duration::from_secs(30 * 60);

struct Prompt {
    states: Tensor,
    mask: Vec<i64>,
    pooled: Tensor,
}

/// One generation's conditioning, and the features that its full passes left behind.
pub(crate) struct Session {
    features: Tensor,
    reference_latents: Tensor,
    face_mask: Tensor,
    prompts: [Prompt; 2],
    audio_frames: usize,
    fps: f32,
    caches: [FeatureCache; 2],
    cached: HashSet<(usize, usize)>,
    /// Bytes that the tokens of one latent frame take.
    token_bytes: u64,
    bytes: u64,
    used: Instant,
}

fn wrong(tensor: &HostTensor, expected: impl Into<String>) -> ServiceError {
    tensor.mismatch(expected).into()
}

/// A finite F32 tensor whose shape `fits`, on the device.
fn floats(tensor: &HostTensor, expected: &str, fits: impl Fn(&[usize]) -> bool) -> Result<Tensor, ServiceError> {
    if tensor.dtype() != DataType::F32 || !fits(tensor.shape()) {
        return Err(wrong(tensor, format!("F32 {expected}")));
    }
    let values = tensor.to_f32()?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(ServiceError::invalid(tensor.name(), format!("{} at element {at} is not finite", values[at])));
    }
    Tensor::from_vec(values, tensor.shape(), &Device::Cpu).map_err(ServiceError::internal)
}

fn prompt(states: &HostTensor, mask: &HostTensor, pooled: &HostTensor, widths: Widths) -> Result<Prompt, ServiceError> {
    let (text, pool) = (widths.text, widths.pooled);
    let tensor = floats(states, &format!("(L, {text})"), |s| matches!(*s, [_, d] if d == text))?;
    let rows = states.shape()[0];
    if mask.dtype() != DataType::I64 || mask.shape() != [rows] {
        return Err(wrong(mask, format!("I64 ({rows})")));
    }
    let values = mask.to_i64()?;
    if values.iter().any(|v| !(0..=1).contains(v)) || !values.contains(&1) {
        return Err(ServiceError::invalid(mask.name(), "expected 0 and 1, and at least one 1"));
    }
    let pooled = floats(pooled, &format!("({pool})"), |s| s == [pool])?;
    Ok(Prompt { states: tensor, mask: values, pooled })
}

impl Session {
    /// Checks the tensors of [`TENSORS`] against each other and the checkpoint's widths.
    pub(crate) fn new(
        header: &OpenSessionHeader,
        tensors: &[HostTensor; 9],
        widths: Widths,
    ) -> Result<Self, ServiceError> {
        let [features, latents, face, states, mask, pooled, states_n, mask_n, pooled_n] = tensors;
        let (channels, audio) = (widths.channels, widths.audio);
        let expected = format!("(S, states, width) with 10 x states x width = {audio}");
        let heard = floats(
            features,
            &expected,
            |s| matches!(*s, [_, n, c] if n.saturating_mul(c).saturating_mul(10) == audio),
        )?;
        let expected = format!("({channels}, 1, h, w) with even h and w");
        let reference_latents =
            floats(latents, &expected, |s| matches!(*s, [c, 1, h, w] if c == channels && h % 2 == 0 && w % 2 == 0))?;
        let (h, w) = (latents.shape()[2], latents.shape()[3]);
        let face_mask = floats(face, &format!("(1, 1, {h}, {w})"), |s| s == [1, 1, h, w])?;
        let prompts = [prompt(states, mask, pooled, widths)?, prompt(states_n, mask_n, pooled_n, widths)?];
        Ok(Self {
            features: heard,
            reference_latents,
            face_mask,
            prompts,
            audio_frames: header.audio_frames as usize,
            fps: header.fps,
            caches: [FeatureCache::new(), FeatureCache::new()],
            cached: HashSet::new(),
            token_bytes: 0,
            bytes: tensors.iter().map(|t| t.data().len() as u64).sum(),
            used: Instant::now(),
        })
    }

    /// Notes that somebody uses the session.
    pub(crate) fn touch(&mut self) {
        self.used = Instant::now();
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.used.elapsed() > IDLE
    }

    /// Drops the kept features; whoever needs them runs the passes that left them again.
    pub(crate) fn forget_features(&mut self) {
        self.caches.iter_mut().for_each(FeatureCache::clear);
        self.cached.clear();
    }

    /// Bytes of the conditioning and of the kept features.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes + self.cached.len() as u64 * self.token_bytes
    }

    /// The shape of an item's latents.
    pub(crate) fn latents_shape(&self, item: &PredictItem) -> [usize; 4] {
        let dims = self.reference_latents.dims();
        [dims[0], item.latent_frames.len(), dims[2], dims[3]]
    }

    /// An item's pass, as far as its memory depends on it.
    pub(crate) fn pass(&self, item: &PredictItem, keeps: bool) -> Pass {
        let prompt = &self.prompts[usize::from(item.prompt() == PromptKind::Negative)];
        let [_, window, rows, columns] = self.latents_shape(item).map(|side| side as u64);
        let valid = prompt.mask.iter().filter(|&&m| m == 1).count() as u64;
        let heard = self.features.dims().first().map_or(0, |rows| *rows as u64);
        Pass { window, latent: [rows, columns], text: [prompt.mask.len() as u64, valid], heard, keeps }
    }

    /// What conditions one item.
    pub(crate) fn conditioning(&self, item: &PredictItem) -> Result<Conditioning<'_>, ServiceError> {
        let prompt = &self.prompts[usize::from(item.prompt() == PromptKind::Negative)];
        // No feature lies at the last frame that can be counted, so its window is silence.
        let audible = |frame: &u32| (!item.silent && (*frame as usize) < self.audio_frames).then_some(*frame as usize);
        let frames: Vec<usize> = item.audio_frames.iter().map(|f| audible(f).unwrap_or(usize::MAX)).collect();
        let face_mask = (&self.face_mask * f64::from(item.face_mask_scale)).map_err(ServiceError::internal)?;
        Ok(Conditioning {
            reference_latents: self.reference_latents.clone(),
            face_mask,
            text_states: prompt.states.clone(),
            text_mask: &prompt.mask,
            pooled: prompt.pooled.clone(),
            audio: windows_per_frame(&self.features, &frames, 1).map_err(ServiceError::internal)?,
            fps: self.fps,
            motion_exp: MOTION_EXP,
            motion_pose: MOTION_POSE,
        })
    }

    /// The kept features of the item's branch.
    pub(crate) fn cache(&self, item: &PredictItem) -> &FeatureCache {
        &self.caches[slot(item)]
    }

    /// Keeps a full pass's features, in the type in which they were computed.
    pub(crate) fn keep(
        &mut self,
        item: &PredictItem,
        features: model::diffusion::Features,
    ) -> Result<(), ServiceError> {
        let frames = clip_frames(item);
        let size = features.reference.elem_count() * features.reference.dtype().size_in_bytes();
        self.token_bytes = size as u64;
        self.caches[slot(item)].store(&frames, features).map_err(ServiceError::internal)?;
        self.cached.extend(frames.into_iter().map(|frame| (slot(item), frame)));
        Ok(())
    }
}

fn slot(item: &PredictItem) -> usize {
    usize::from(item.branch() == Branch::Unconditional)
}

/// The clip's latent frames of an item.
pub(crate) fn clip_frames(item: &PredictItem) -> Vec<usize> {
    item.latent_frames.iter().map(|&f| f as usize).collect()
}
