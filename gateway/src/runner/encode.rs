//! Speech, prompt and picture to what the transformer is conditioned on, side by side.

use proto::{
    tensor::HostTensor,
    v1::{EncodeAudioHeader, EncodePromptHeader, EncodePromptSummary, EncodeReferenceHeader, FaceBox, Stage},
};

use super::{prepare::Prepared, run::Run};
use crate::{
    fault::{Fault, Kind},
    stages::with_retries,
};

const TEXT_STATES: [&str; 6] =
    ["positive.states", "positive.mask", "positive.pooled", "negative.states", "negative.mask", "negative.pooled"];

/// What the encoders gave.
#[derive(Debug)]
pub(crate) struct Conditions {
    /// The tensors of a session, by the names that it wants.
    pub(crate) tensors: Vec<HostTensor>,
    /// Channels of the latents.
    pub(crate) channels: usize,
    /// How much of the prompt was read.
    pub(crate) prompt: EncodePromptSummary,
    /// The face that is animated.
    pub(crate) face: Option<FaceBox>,
}

/// Runs the three encoders at once. When one fails, the calls to the others are dropped, which cancels them.
pub(crate) async fn encode(run: &Run, prepared: &Prepared) -> Result<Conditions, Fault> {
    let (picture, size) = (&prepared.picture, prepared.size);
    let shape = [picture.height as usize, picture.width as usize, 3];
    let pixels = HostTensor::from_u8("picture", &shape, picture.rgb.clone()).map_err(malformed)?;
    let samples = &prepared.audio.samples;
    let samples = HostTensor::from_f32("samples", &[samples.len()], samples).map_err(malformed)?;

    let audio = async {
        let began = run.stage_began(Stage::AudioEncoder);
        let header = EncodeAudioHeader { generation_id: run.id() };
        let mut encoded = with_retries(|| run.stages.encode_audio(header.clone(), samples.clone())).await?;
        run.stage_ended(Stage::AudioEncoder, began, encoded.memory);
        encoded.take("features", Stage::AudioEncoder)
    };
    let text = async {
        let began = run.stage_began(Stage::TextEncoder);
        let prompt = prepared.settings.prompt.clone();
        let truncate_prompt = prepared.settings.truncate_prompt;
        let (width, height) = (size.width, size.height);
        let header = EncodePromptHeader { generation_id: run.id(), prompt, width, height, truncate_prompt };
        let (mut encoded, summary) = with_retries(|| run.stages.encode_prompt(header.clone(), pixels.clone())).await?;
        run.stage_ended(Stage::TextEncoder, began, encoded.memory);
        let states = TEXT_STATES.iter().map(|name| encoded.take(name, Stage::TextEncoder));
        Ok((states.collect::<Result<Vec<_>, _>>()?, summary))
    };
    let reference = async {
        let began = run.stage_began(Stage::ImageEncoder);
        let face = prepared.settings.face;
        let header = EncodeReferenceHeader { generation_id: run.id(), width: size.width, height: size.height, face };
        let (mut encoded, summary) =
            with_retries(|| run.stages.encode_reference(header.clone(), pixels.clone())).await?;
        run.stage_ended(Stage::ImageEncoder, began, encoded.memory);
        let latents = encoded.take("reference_latents", Stage::ImageEncoder)?;
        Ok((latents, encoded.take("face_mask", Stage::ImageEncoder)?, summary))
    };
    let (features, (states, prompt), (latents, mask, summary)) = tokio::try_join!(audio, text, reference)?;

    let (height, width) = size.latent();
    let channels = match *latents.shape() {
        [channels, 1, h, w] if h == height && w == width => channels,
        _ => return Err(malformed(latents.mismatch(format!("F32 [C, 1, {height}, {width}]"))).at(Stage::ImageEncoder)),
    };
    for warning in prompt_warnings(&prompt) {
        run.warn(Stage::TextEncoder, warning);
    }
    for warning in face_warnings(summary.faces.len(), prepared.settings.face.is_some()) {
        run.warn(Stage::ImageEncoder, warning);
    }
    let mut tensors = vec![features, latents, mask];
    tensors.extend(states);
    Ok(Conditions { tensors, channels, prompt, face: summary.face })
}

/// What to say about a prompt that was not read to its end.
fn prompt_warnings(prompt: &EncodePromptSummary) -> Vec<String> {
    let mut warnings = Vec::new();
    if prompt.prompt_tokens_kept < prompt.prompt_tokens {
        warnings.push(format!(
            "The prompt was cut: the first {} of its {} tokens were kept, with the words put before it; the model takes {}.",
            prompt.prompt_tokens_kept, prompt.prompt_tokens, prompt.prompt_token_limit,
        ));
    }
    if prompt.clip_tokens_kept < prompt.clip_tokens {
        warnings.push(format!(
            "CLIP, which gives the prompt's gist, read the first {} of {} tokens; LLaVA read what was kept of the prompt.",
            prompt.clip_tokens_kept, prompt.clip_tokens,
        ));
    }
    warnings
}

/// What to say about the faces that were found.
fn face_warnings(faces: usize, given: bool) -> Vec<String> {
    match faces {
        _ if given => Vec::new(),
        0 => vec!["No face was found; the whole picture is animated. Give --face x,y,w,h to name one.".into()],
        1 => Vec::new(),
        n => vec![format!("{n} faces were found; one of them is animated. Give --face x,y,w,h to name another.")],
    }
}

fn malformed(error: proto::tensor::TensorError) -> Fault {
    Fault::new(Kind::Internal, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_was_not_read_to_its_end_is_worth_a_word() {
        let whole = EncodePromptSummary {
            prompt_tokens: 249,
            prompt_tokens_kept: 249,
            clip_tokens: 75,
            clip_tokens_kept: 75,
            ..Default::default()
        };
        assert!(prompt_warnings(&whole).is_empty());
        let cut = EncodePromptSummary { prompt_tokens: 300, clip_tokens: 90, ..whole };
        let said = prompt_warnings(&cut);
        assert!(said[0].contains("first 249 of its 300 tokens"), "{said:?}");
        assert!(said[1].contains("first 75 of 90 tokens"), "{said:?}");
    }

    #[test]
    fn only_a_face_that_was_looked_for_and_is_not_clear_is_worth_a_word() {
        assert!(face_warnings(0, false)[0].contains("No face was found"));
        assert!(face_warnings(1, false).is_empty());
        assert!(face_warnings(3, false)[0].starts_with("3 faces"));
        assert!(face_warnings(0, true).is_empty());
    }
}
