//! Cases of the networks. Batched cases run item by item: the product's functions have no batch.

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, IndexOp, Tensor};
use gateway::sampler::{FrameShape, Rounding, Sampler, Schedule, Setup, StepPlan};
use model::{
    audio::{WhisperEncoder, windows_per_frame},
    diffusion::{
        AudioAdapter, AudioProjection, Conditioning, Embedder, FinalLayer, Grid, Mlp, PatchEmbed, Rope, TimeEmbedder,
        TokenRefiner, Transformer, TransformerConfig, audio_norm, block_norm, grid_of, group_frames, qk_norm,
        refiner_norm, timestep_embedding, unpatchify,
    },
    text::{ClipConfig, ClipText, Llava, LlavaConfig},
    vae::{GroupNorm, VaeConfig, VaeDecoder, VaeEncoder},
    weights::Weights,
};
use planner::clip::{ClipPlan, frames_of};

use super::{Case, Outputs};

/// Results of the items of a batch, to be compared as one tensor.
#[derive(Default)]
struct Batch(std::collections::BTreeMap<String, Vec<Tensor>>);

impl Batch {
    fn add(&mut self, name: &str, item: Tensor) {
        self.0.entry(name.to_owned()).or_default().push(item);
    }

    /// Stacks the items on a new first axis and compares all of them.
    fn check(self, outputs: &mut Outputs<'_>) -> Result<()> {
        for (name, items) in self.0 {
            outputs.check(&name, &Tensor::stack(&items, 0)?)?;
        }
        Ok(())
    }
}

pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn four(tensor: &Tensor) -> Result<[f32; 4]> {
    let values = numbers(tensor)?;
    values.try_into().map_err(|v: Vec<f32>| anyhow!("{} motion values, expected 4", v.len()))
}

fn conditioning<'a>(case: &Case, item: usize, mask: &'a [i64]) -> Result<Conditioning<'a>> {
    let input = |name: &str| -> Result<Tensor> { Ok(case.input(name)?.i(item)?) };
    Ok(Conditioning {
        reference_latents: input("ref_latents")?,
        face_mask: input("face_mask")?,
        text_states: input("text_states")?,
        text_mask: mask,
        pooled: input("text_states_2")?,
        audio: input("audio_prompts")?,
        fps: numbers(&input("fps")?)?[0],
        motion_exp: four(&input("motion_exp")?)?,
        motion_pose: four(&input("motion_pose")?)?,
    })
}

pub(super) fn load_transformer(case: &Case) -> Result<Transformer> {
    let config: TransformerConfig = serde_json::from_value(case.config.clone()).context("config.json")?;
    let weights = case.weights()?;
    let transformer = Transformer::load(&weights, &config)?;
    weights.refuse_unused(|name| name.starts_with("vae."))?;
    Ok(transformer)
}

/// Fills `rows` up to `length` with zeros, to stand where the reference has padding rows that mean nothing.
fn padded(rows: &Tensor, length: usize) -> Result<Tensor> {
    Ok(rows.pad_with_zeros(0, 0, length.saturating_sub(rows.dim(0)?))?)
}

pub fn transformer(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let transformer = load_transformer(case)?;
    let items = case.input("x")?.dim(0)?;
    let (mut batch, mut motion, mut valid) = (Batch::default(), Batch::default(), Vec::new());
    for item in 0..items {
        let mask: Vec<i64> = case.input("text_mask")?.i(item)?.to_vec1()?;
        let given = conditioning(case, item, &mask)?;
        let x = case.input("x")?.i(item)?;
        valid.push(usize::try_from(mask.iter().sum::<i64>())?);
        let mut taps: Vec<(String, Tensor)> = Vec::new();
        let mut tap = |name: &str, got: &Tensor| taps.push((format!("tap.{name}"), got.clone()));
        let t = numbers(&case.input("t")?.i(item)?)?[0];
        let pass = transformer.predict_with_taps(&x, t, &given, &mut tap)?;
        for (name, got) in taps.into_iter().filter(|(name, _)| case.outputs.contains_key(name)) {
            let want = &case.outputs[&name];
            if name.starts_with("tap.motion") {
                motion.add(&name, got);
            } else {
                batch.add(&name, padded(&got, want.dim(1)?)?);
            }
        }
        batch.add("out", pass.velocity);
        if let Some(want) = case.outputs.get("cache_out") {
            let features = pass.features.ok_or_else(|| anyhow!("the pass kept no features"))?;
            let rows = Tensor::cat(&[&features.reference, &features.image, &features.text], 0)?;
            batch.add("cache_out", padded(&rows, want.dim(1)?)?);
            let t: Vec<f32> = case.get("t_cached_step")?;
            let t = *t.get(item).ok_or_else(|| anyhow!("t_cached_step has no item {item}"))?;
            batch.add("out_cached_step", transformer.predict_cached(&features, t, &given)?);
        }
    }
    for (name, rows) in motion.0 {
        outputs.check(&name, &Tensor::cat(&rows, 0)?)?;
    }
    let text_length = case.input("text_mask")?.dim(1)?;
    for (name, rows) in batch.0 {
        let got = Tensor::stack(&rows, 0)?;
        // Rows past the valid text are padding that the blocks leave out.
        let joint = name.starts_with("tap.single_blocks") || name == "cache_out";
        if joint || name.ends_with(".txt") {
            let before = if joint { got.dim(1)? - text_length } else { 0 };
            outputs.check_where(&name, &got, |index| index[1] < before + valid[index[0]])?;
        } else {
            outputs.check(&name, &got)?;
        }
    }
    Ok(())
}

pub fn rope(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let dims: [usize; 3] = case.get("rope_dim_list")?;
    let grids: Vec<[usize; 3]> = case.get("grids")?;
    for (n, [frames, rows, columns]) in grids.into_iter().enumerate() {
        // The tables of a plain grid: no reference frame before it.
        let rope = Rope::new(Grid { frames, rows, columns }, dims, case.get("theta")?, 0, &case.device)?;
        let (cos, sin) = rope.tables()?;
        outputs.check(&format!("cos{n}"), &cos)?;
        outputs.check(&format!("sin{n}"), &sin)?;
        for name in ["q", "k"] {
            let x = case.input(&format!("{name}{n}"))?.squeeze(0)?.transpose(0, 1)?; // (heads, L, d)
            let turned = rope.rotate(&x)?.transpose(0, 1)?.unsqueeze(0)?;
            outputs.check(&format!("{name}_rot{n}"), &turned)?;
        }
    }
    Ok(())
}

pub fn embeddings(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (weights, hidden) = (case.weights()?, case.get("hidden")?);
    let t = numbers(case.input("t")?)?;
    let width = case.outputs["temb"].dim(1)?;
    outputs.check("temb", &timestep_embedding(&t, width, &case.device)?)?;
    outputs.check("time", &TimeEmbedder::load(&weights.pp("time"))?.forward(&t)?)?;
    let embedder = Embedder::load(&weights.pp("vec"), "in_layer", "out_layer")?;
    outputs.check("vec", &embedder.forward(case.input("vec_in")?)?)?;
    let patch = PatchEmbed::load(&weights.pp("patch"))?;
    let norm = qk_norm(&weights.pp("rms"), hidden)?;
    let mlp = Mlp::load(&weights.pp("mlp"), hidden)?;
    let last = FinalLayer::load(&weights.pp("final"), hidden)?;
    let mut batch = Batch::default();
    for item in 0..case.input("x")?.dim(0)? {
        let (x, hid) = (case.input("x")?.i(item)?, case.input("hid")?.i(item)?);
        let vec = case.input("vec")?.narrow(0, item, 1)?;
        batch.add("tokens", patch.forward(&x)?);
        batch.add("rms", norm.forward(&hid)?);
        batch.add("mlp", mlp.forward(&hid)?);
        let patches = last.forward(&hid, &vec)?;
        batch.add("unpatchified", unpatchify(&patches, grid_of(&x)?)?);
        batch.add("final", patches);
    }
    batch.check(outputs)
}

pub fn norms(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (weights, hidden) = (case.weights()?, case.get("hidden")?);
    let mut batch = Batch::default();
    for item in 0..case.input("x")?.dim(0)? {
        let x = case.input("x")?.i(item)?;
        for name in ["double_img_norm1", "double_txt_norm2", "single_pre_norm"] {
            batch.add(name, block_norm(&x)?);
        }
        for name in ["refiner_norm1", "refiner_norm2"] {
            batch.add(name, refiner_norm(&weights.pp(name), hidden)?.forward(&x)?);
        }
        for name in ["audio_proj_norm", "adapter_norm1", "adapter_norm2"] {
            batch.add(name, audio_norm(&weights.pp(name), hidden)?.forward(&x)?);
        }
        batch.add("rms", qk_norm(&weights.pp("rms"), hidden)?.forward(&x)?);
        let last = FinalLayer::load(&weights.pp("final"), hidden)?;
        batch.add("final", last.forward(&x, &case.input("vec")?.narrow(0, item, 1)?)?);
    }
    batch.check(outputs)?;
    vae_norms(case, &weights, outputs)
}

pub fn token_refiner(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let refiner = TokenRefiner::load(&case.weights()?, case.get("heads")?)?;
    let mut batch = Batch::default();
    for item in 0..case.input("x")?.dim(0)? {
        let x = case.input("x")?.i(item)?;
        let t = numbers(&case.input("t")?.i(item)?)?[0];
        let mask: Vec<i64> = case.input("mask")?.i(item)?.to_vec1()?;
        batch.add("out", refiner.forward(&x, t, Some(&mask))?);
        batch.add("out_nomask", refiner.forward(&x, t, None)?);
    }
    batch.check(outputs)
}

pub fn audio_modules(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (weights, hidden) = (case.weights()?, case.get("dim")?);
    let projection = AudioProjection::load(&weights.pp("proj"), hidden)?;
    let adapter = AudioAdapter::load(&weights.pp("ca"), hidden)?;
    let mut batch = Batch::default();
    for item in 0..case.input("audio")?.dim(0)? {
        let tokens = projection.forward(&case.input("audio")?.i(item)?)?;
        let grouped = group_frames(&tokens)?;
        batch.add("adapter", adapter.forward(&grouped, &case.input("latents")?.i(item)?)?);
        batch.add("feats", tokens);
        batch.add("grouped", grouped);
    }
    batch.check(outputs)
}

/// The norms of the VAE that a case of norms may hold.
fn vae_norms(case: &Case, weights: &Weights, outputs: &mut Outputs<'_>) -> Result<()> {
    let groups = case.get("vae_groups")?;
    let v = case.input("v")?;
    let norm = GroupNorm::load(&weights.pp("vae_mid.resnets.0.norm1"), groups)?;
    outputs.check("vae_resnet_norm1", &norm.forward(v)?)?;
    // The attention flattens time and space before the same norm.
    let norm = GroupNorm::load(&weights.pp("vae_mid.attentions.0.group_norm"), groups)?;
    outputs.check("vae_attn_group_norm", &norm.forward(v)?.flatten_from(2)?)
}

pub fn vae(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let (weights, config) = (case.weights()?, vae_config(&case.config)?);
    let (encoder, decoder) = (VaeEncoder::load(&weights, &config)?, VaeDecoder::load(&weights, &config)?);
    weights.refuse_unused(|_| false)?;
    let (x, z) = (case.input("x")?, case.input("z")?);
    let tiled = case.find::<bool>("tiling")?.unwrap_or(true);
    let mut taps: Vec<(String, Tensor)> = Vec::new();
    let (moments, decoded) = if tiled {
        (encoder.encode_tiled(x)?, decoder.decode_tiled(z)?)
    } else {
        let moments = encoder.encode_tapped(x, &mut |name, got| taps.push((format!("tap.enc.{name}"), got.clone())))?;
        let decoded = decoder.decode_tapped(z, &mut |name, got| taps.push((format!("tap.dec.{name}"), got.clone())))?;
        (moments, decoded)
    };
    for (name, got) in taps.iter().filter(|(name, _)| case.outputs.contains_key(name)) {
        outputs.check(name, got)?;
    }
    outputs.check("decoded", &decoded)?;
    let first = x.narrow(2, 0, 1)?;
    type Compute<'a> = &'a dyn Fn() -> Result<Tensor>;
    let others: [(&str, Compute<'_>); 6] = [
        ("mean", &|| Ok(moments.mean.clone())),
        ("logvar", &|| Ok(moments.logvar.clone())),
        ("std", &|| Ok(moments.std()?)),
        ("image_mean", &|| Ok(encoder.encode(&first)?.mean)),
        ("image_decoded", &|| Ok(decoder.decode(&z.narrow(2, 0, 1)?)?)),
        ("static_mean", &|| Ok(encoder.encode(&first.repeat((1, 1, x.dim(2)?, 1, 1))?)?.mean)),
    ];
    for (name, compute) in others {
        if outputs.expects(name) {
            outputs.check(name, &compute()?)?;
        }
    }
    Ok(())
}

pub(super) fn vae_config(config: &serde_json::Value) -> Result<VaeConfig> {
    serde_json::from_value(config.clone()).context("the VAE's config")
}

pub fn clip_text(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    // The reference pools at the largest id, which in CLIP's vocabulary is the end token.
    let (ids, mask) = (case.input("input_ids")?, case.input("attention_mask")?);
    let largest = ids.flatten_all()?.to_vec1::<i64>()?.into_iter().max().unwrap_or(0);
    let config = ClipConfig { heads: case.get("heads")?, eot_token: u32::try_from(largest)?, layers: None };
    let weights = case.weights()?;
    let clip = ClipText::load(&weights, &config)?;
    let (last, pooled) = clip.forward(ids, mask)?;
    outputs.check("last_hidden_state", &last)?;
    outputs.check("pooler_output", &pooled)
}

pub fn llava(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let config = LlavaConfig {
        heads: case.get("heads")?,
        kv_heads: case.get("kv")?,
        layers: case.find("layers")?,
        hidden_state_index: case.get("hidden_state_index")?,
        rope_theta: case.get("rope_theta")?,
        rms_eps: case.get("rms_eps")?,
        vision_heads: case.get("vheads")?,
        vision_layers: case.find("vlayers")?,
        image_token: case.get("image_token")?,
        pad_token: case.get("pad_token")?,
        ..LlavaConfig::default()
    };
    let weights = case.weights()?;
    let llava = Llava::load(&weights, &config)?;
    weights.refuse_unused(|name| llava.may_skip(name))?;
    let mut batch = Batch::default();
    for item in 0..case.input("input_ids")?.dim(0)? {
        let ids: Vec<i64> = case.input("input_ids")?.i(item)?.to_vec1()?;
        let mask: Vec<i64> = case.input("attention_mask")?.i(item)?.to_vec1()?;
        let pixels = case.input("pixel_values")?.i(item)?;
        let embeds = llava.encode_ids(&ids, &mask, &pixels, case.get("crop")?)?;
        batch.add("prompt_embeds", embeds.states);
        batch.add("prompt_mask", Tensor::new(embeds.mask, &Device::Cpu)?);
        batch.add("vision_hidden", llava.vision().forward(&pixels)?);
        batch.add("image_features", llava.image_features(&pixels)?);
    }
    batch.check(outputs)
}

pub fn whisper(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let encoder = WhisperEncoder::load(&case.weights()?, case.get("heads")?)?;
    let features = encoder.hidden_states(case.input("mel")?)?; // (S, 5, d)
    let rows: Vec<u32> = case.get("hidden_rows_index")?;
    outputs.check("hidden_rows", &features.index_select(&Tensor::new(rows, &case.device)?, 0)?)?;
    for (name, stride) in [("prompts_fps25", 1), ("prompts_fps12_5", 2)] {
        if let Some(want) = case.outputs.get(name) {
            let frames: Vec<usize> = (0..want.dim(1)?).collect();
            outputs.check(name, &windows_per_frame(&features, &frames, stride)?.unsqueeze(0)?)?;
        }
    }
    Ok(())
}

pub fn schedule(case: &Case, outputs: &mut Outputs<'_>) -> Result<()> {
    let sets: Vec<(usize, f32)> = case.get("sets")?;
    for (n, (steps, flow_shift)) in sets.into_iter().enumerate() {
        let plan = StepPlan::reference(Schedule { steps, flow_shift, guidance_scale: 1.0 });
        let timesteps: Vec<f32> = plan.steps().iter().map(|step| step.timestep).collect();
        outputs.check(&format!("sigmas{n}"), &Tensor::new(plan.sigmas(), &Device::Cpu)?)?;
        outputs.check(&format!("timesteps{n}"), &Tensor::new(timesteps, &Device::Cpu)?)?;
        let (x, v) = (case.input(&format!("x{n}"))?, case.input(&format!("v{n}"))?);
        let (items, channels, frames, rows, columns) = x.dims5()?;
        let mut ends = Vec::new();
        for item in 0..items {
            let clip = ClipPlan {
                frames: frames_of(frames),
                latent_frames: frames,
                kept_latent_frames: frames,
                window: frames,
                shift: 0,
            };
            let shape = FrameShape { channels, rows, columns };
            let setup = Setup { plan: plan.clone(), clip, shape, rounding: Rounding::Nowhere };
            let mut sampler = Sampler::new(setup, numbers(&x.i(item)?)?)?;
            for step in 0..steps {
                sampler.accept(0, numbers(&v.i((step, item))?)?)?;
                sampler.advance()?;
            }
            ends.push(Tensor::from_slice(sampler.latents(), (channels, frames, rows, columns), &Device::Cpu)?);
        }
        outputs.check(&format!("final{n}"), &Tensor::stack(&ends, 0)?)?;
    }
    Ok(())
}
