//! Which kind a case is of, by the names of its tensors.

use anyhow::{Result, bail};

use super::{Case, Outputs, loop_kind, media_kinds, network_kinds};

/// One kind of case and how it is run.
pub struct Kind {
    /// For people.
    pub name: &'static str,
    /// Names of tensors, inputs or outputs, that together only this kind has.
    marks: &'static [&'static str],
    /// Whether a network runs, and not only the processor's own arithmetic.
    pub network: bool,
    /// Runs it.
    pub run: fn(&Case, &mut Outputs<'_>) -> Result<()>,
}

const KINDS: [Kind; 19] = [
    Kind { name: "denoise loop", marks: &["latents_full"], network: true, run: loop_kind::denoise_loop },
    Kind { name: "transformer", marks: &["ref_latents", "out"], network: true, run: network_kinds::transformer },
    Kind { name: "rotary tables", marks: &["q_rot0"], network: true, run: network_kinds::rope },
    Kind { name: "embeddings", marks: &["temb"], network: true, run: network_kinds::embeddings },
    Kind { name: "norms", marks: &["double_img_norm1"], network: true, run: network_kinds::norms },
    Kind { name: "token refiner", marks: &["out_nomask"], network: true, run: network_kinds::token_refiner },
    Kind { name: "audio modules", marks: &["feats", "grouped"], network: true, run: network_kinds::audio_modules },
    Kind { name: "schedule", marks: &["sigmas0"], network: false, run: network_kinds::schedule },
    Kind { name: "VAE", marks: &["decoded"], network: true, run: network_kinds::vae },
    Kind { name: "CLIP text", marks: &["pooler_output"], network: true, run: network_kinds::clip_text },
    Kind { name: "LLaVA", marks: &["prompt_embeds"], network: true, run: network_kinds::llava },
    Kind { name: "Whisper encoder", marks: &["hidden_rows"], network: true, run: network_kinds::whisper },
    Kind { name: "log-mel", marks: &["wav", "mel"], network: false, run: media_kinds::log_mel },
    Kind { name: "face mask tokens", marks: &["tokens", "latent"], network: false, run: media_kinds::face_mask_tokens },
    Kind { name: "face mask box", marks: &["mask0"], network: false, run: media_kinds::face_mask_box },
    Kind { name: "face detection", marks: &["boxes_xywh"], network: false, run: media_kinds::face_detection },
    Kind { name: "picture size", marks: &["table"], network: false, run: media_kinds::picture_size },
    Kind { name: "picture resize", marks: &["lanczos0"], network: false, run: media_kinds::picture_resize },
    Kind { name: "float8 weights", marks: &["dequant"], network: false, run: media_kinds::float8 },
];

/// The kind whose marks the case has.
///
/// Errors: none, or more than one.
pub fn of(case: &Case) -> Result<&'static Kind> {
    let has = |mark: &&str| case.outputs.contains_key(*mark) || case.inputs.contains_key(*mark);
    let mut found = KINDS.iter().filter(|kind| kind.marks.iter().all(has));
    match (found.next(), found.next()) {
        (Some(kind), None) => Ok(kind),
        (None, _) => bail!("no kind of case has these outputs: {:?}", case.outputs.keys().collect::<Vec<_>>()),
        (Some(a), Some(b)) => bail!("the case could be {:?} or {:?}", a.name, b.name),
    }
}
