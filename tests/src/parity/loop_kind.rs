//! Cases of the whole denoise loop: the gateway's sampler driving the transformer.

use std::collections::HashMap;

use anyhow::{Result, anyhow};
use candle_core::{Device, IndexOp, Tensor};
use gateway::sampler::{
    Branch, FrameShape, Prompt, Request, Rounding, Sampler, Schedule, Setup, StepPlan, reference_clip,
};
use model::{
    diffusion::{Conditioning, FeatureCache, MOTION_EXP, MOTION_POSE, Transformer},
    vae::VaeDecoder,
};

use super::{
    Case, Outputs,
    network_kinds::{load_transformer, numbers, vae_config},
};

/// Frames a second that every loop case is told.
const FPS: f32 = 25.0;

pub fn denoise_loop(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let transformer = load_transformer(case)?;
    let noise = case.input("noise")?.i(0)?; // (C, infer_length, h, w)
    let (channels, _, rows, columns) = noise.dims4()?;
    let clip = reference_clip(case.input("audio_prompts")?.dim(1)?, case.get("infer_length")?);
    let schedule = Schedule {
        steps: case.get("steps")?,
        flow_shift: case.get("flow_shift")?,
        guidance_scale: case.get("cfg_scale")?,
    };
    let setup = Setup {
        plan: StepPlan::reference(schedule),
        clip: clip.clone(),
        shape: FrameShape { channels, rows, columns },
        rounding: if case.get("round_latents_to_bf16")? { Rounding::Windows } else { Rounding::Nowhere },
    };
    let pass = Passes::new(case, &transformer, 4 * clip.latent_frames)?;
    let mut caches: HashMap<Branch, FeatureCache> = HashMap::new();
    let mut sampler = Sampler::new(setup, numbers(&noise.narrow(1, 0, clip.latent_frames)?)?)?;
    while sampler.current().is_some() {
        for request in sampler.requests() {
            let velocity = pass.run(&request, caches.entry(request.branch).or_default(), (rows, columns))?;
            sampler.accept(request.index, numbers(&velocity)?)?;
        }
        sampler.advance()?;
    }
    let tensor =
        |values: &[f32], frames: usize| Tensor::from_slice(values, (1, channels, frames, rows, columns), &Device::Cpu);
    let kept = tensor(&sampler.kept_latents(), clip.kept_latent_frames)?;
    outputs.check("latents", &kept)?;
    outputs.check("latents_full", &tensor(sampler.latents(), clip.latent_frames)?)?;
    if outputs.expects("video") {
        let config = case.config.get("vae").ok_or_else(|| anyhow!("config.json has no \"vae\""))?;
        let config = vae_config(config)?;
        let decoder = VaeDecoder::load(&case.weights()?.pp("vae"), &config)?;
        let decoded = decoder.decode_tiled(&(kept / config.scaling_factor)?.to_device(&case.device)?)?;
        outputs.check("video", &((decoded / 2.0)? + 0.5)?.clamp(0f32, 1f32)?)?;
    }
    Ok(())
}

/// The case's conditioning, of which each request takes its part.
struct Passes<'a> {
    transformer: &'a Transformer,
    reference_latents: Tensor,
    face_mask: Tensor,
    audio: Tensor,
    texts: [(Tensor, Vec<i64>, Tensor); 2],
}

impl<'a> Passes<'a> {
    fn new(case: &Case, transformer: &'a Transformer, audio_frames: usize) -> Result<Self> {
        let input = |name: &str| -> Result<Tensor> { Ok(case.input(name)?.i(0)?) };
        let text = |kind: &str| -> Result<_> {
            let mask = input(&format!("{kind}_mask"))?.to_vec1()?;
            Ok((input(&format!("{kind}_embeds"))?, mask, input(&format!("{kind}_embeds_2"))?))
        };
        let audio = input("audio_prompts")?;
        let silence = audio_frames.saturating_sub(audio.dim(0)?);
        Ok(Self {
            transformer,
            reference_latents: input("ref_latents")?,
            face_mask: input("face_mask")?,
            audio: audio.pad_with_zeros(0, 0, silence)?,
            texts: [text("pos")?, text("neg")?],
        })
    }

    fn run(&self, request: &Request, cache: &mut FeatureCache, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let (states, mask, pooled) = &self.texts[usize::from(request.prompt == Prompt::Negative)];
        let frames: Vec<u32> = request.audio_frames.iter().map(|&f| f as u32).collect();
        let audio = self.audio.index_select(&Tensor::new(frames, self.audio.device())?, 0)?;
        let given = Conditioning {
            reference_latents: self.reference_latents.clone(),
            face_mask: (&self.face_mask * f64::from(request.face_mask_scale))?,
            text_states: states.clone(),
            text_mask: mask,
            pooled: pooled.clone(),
            audio: if request.silent { audio.zeros_like()? } else { audio },
            fps: FPS,
            motion_exp: MOTION_EXP,
            motion_pose: MOTION_POSE,
        };
        if request.cached {
            let features = cache.get(&request.latent_frames).ok_or_else(|| anyhow!("a cached step has no features"))?;
            return Ok(self.transformer.predict_cached(&features, request.timestep, &given)?);
        }
        let window = request.latent_frames.len();
        let channels = request.latents.len() / (window * rows * columns);
        let latents = Tensor::from_slice(&request.latents, (channels, window, rows, columns), &Device::Cpu)?;
        let pass = self.transformer.predict(&latents, request.timestep, &given, request.keep_features)?;
        if let Some(features) = pass.features {
            cache.store(&request.latent_frames, features)?;
        }
        Ok(pass.velocity)
    }
}
