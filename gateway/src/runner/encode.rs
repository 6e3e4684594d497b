//! Speech, prompt and picture to what the transformer is conditioned on, side by side.

use std::future::Future;

use prost::Message as _;
use proto::{
    tensor::HostTensor,
    v1::{
        EncodeAudioHeader, EncodePromptHeader, EncodePromptSummary, EncodeReferenceHeader, EncodeReferenceSummary,
        FaceBox, MemoryReport, Stage,
    },
};

use super::{kept, ladder::climb, prepare::Prepared, run::Run};
use crate::{
    fault::{Fault, Kind, stage_name},
    stages::{Encoded, Identity},
    store::{artifacts::sha256, role},
};

/// Faces besides the largest whose boxes a sentence names.
const SHOWN_FACES: usize = 8;
const TEXT_STATES: [&str; 6] =
    ["positive.states", "positive.mask", "positive.pooled", "negative.states", "negative.mask", "negative.pooled"];

/// What the encoders gave.
#[derive(Debug)]
pub(crate) struct Conditions {
    /// The tensors of a session, by the names that it wants.
    pub(crate) tensors: Vec<HostTensor>,
    /// Channels of the latents.
    pub(crate) channels: usize,
    /// What the encoders are.
    pub(crate) models: [Identity; 3],
    /// What the caller is told.
    pub(crate) told: Told,
}

/// What the encoders say of the inputs.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// How much of the prompt was read.
    pub(crate) prompt: EncodePromptSummary,
    /// Faces that were found, the largest first, or the one that was given.
    pub(crate) faces: Vec<FaceBox>,
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
        let header = EncodeAudioHeader { generation_id: run.id() };
        let call = || run.stages.encode_audio(header.clone(), samples.clone());
        let question = [samples.data()];
        let (mut encoded, _, model) =
            ask(run, (Stage::AudioEncoder, role::FEATURES), &question, call, |summary| summary.memory.clone()).await?;
        Ok::<_, Fault>((encoded.take("features", Stage::AudioEncoder)?, model))
    };
    let side = [picture.width.to_le_bytes(), size.width.to_le_bytes(), size.height.to_le_bytes()].concat();
    let text = async {
        let prompt = prepared.settings.prompt.clone();
        let truncate_prompt = prepared.settings.truncate_prompt;
        let (width, height) = (size.width, size.height);
        let header = EncodePromptHeader { generation_id: run.id(), prompt, width, height, truncate_prompt };
        let call = || run.stages.encode_prompt(header.clone(), pixels.clone());
        let cut: &[u8] = if truncate_prompt { b"cut" } else { b"whole" };
        let question = [side.as_slice(), header.prompt.as_bytes(), cut, pixels.data()];
        let (mut encoded, summary, model) =
            ask(run, (Stage::TextEncoder, role::TEXT_STATES), &question, call, |summary| summary.memory.clone())
                .await?;
        let states = TEXT_STATES.iter().map(|name| encoded.take(name, Stage::TextEncoder));
        Ok::<_, Fault>((states.collect::<Result<Vec<_>, Fault>>()?, summary, model))
    };
    let reference = async {
        let face = prepared.settings.face;
        let header = EncodeReferenceHeader { generation_id: run.id(), width: size.width, height: size.height, face };
        let call = || run.stages.encode_reference(header.clone(), pixels.clone());
        let face = face.map(|face| face.encode_to_vec()).unwrap_or_default();
        let question = [side.as_slice(), face.as_slice(), pixels.data()];
        let (mut encoded, summary, model) =
            ask(run, (Stage::ImageEncoder, role::REFERENCE), &question, call, |summary| summary.memory.clone()).await?;
        let latents = encoded.take("reference_latents", Stage::ImageEncoder)?;
        Ok::<_, Fault>((latents, encoded.take("face_mask", Stage::ImageEncoder)?, summary, model))
    };
    let ((features, heard_by), (states, prompt, read_by), (latents, mask, summary, seen_by)) =
        tokio::try_join!(audio, text, reference)?;

    let (height, width) = size.latent();
    let channels = match *latents.shape() {
        [channels, 1, h, w] if h == height && w == width => channels,
        _ => return Err(malformed(latents.mismatch(format!("F32 [C, 1, {height}, {width}]"))).at(Stage::ImageEncoder)),
    };
    let mut tensors = vec![features, latents, mask];
    tensors.extend(states);
    let told = tell(run, prepared, prompt, Some(summary)).await;
    Ok(Conditions { tensors, channels, models: [heard_by, read_by, seen_by], told })
}

/// What the encoders said when they were asked for this generation; nothing of what was not kept.
pub(crate) async fn told_before(run: &Run, prepared: &Prepared) -> Told {
    let prompt = run.lease.kept(role::TEXT_STATES).await;
    let prompt = prompt.and_then(|bytes| kept::from_bytes(&bytes)).map(|(_, summary)| summary);
    let reference = run.lease.kept(role::REFERENCE).await;
    let reference = reference.and_then(|bytes| kept::from_bytes(&bytes)).map(|(_, summary)| summary);
    tell(run, prepared, prompt.unwrap_or_default(), reference).await
}

/// Tells the caller what the encoders said of prompt and picture.
async fn tell(
    run: &Run,
    prepared: &Prepared,
    prompt: EncodePromptSummary,
    reference: Option<EncodeReferenceSummary>,
) -> Told {
    for warning in prompt_warnings(&prompt) {
        run.warn(Stage::TextEncoder, warning).await;
    }
    let Some(EncodeReferenceSummary { faces, face, .. }) = reference else {
        return Told { prompt, ..Told::default() };
    };
    if let Some(said) = said_of_faces(&faces, prepared.settings.face.is_some()) {
        run.faces_found(&faces, face, said).await;
    }
    Told { prompt, faces, face }
}

/// What a stage gives for inputs, and what the stage is: kept from before where it was asked the same, else asked and kept.
async fn ask<S, F>(
    run: &Run,
    (stage, role): (Stage, &'static str),
    question: &[&[u8]],
    call: impl FnMut() -> F,
    memory: impl Fn(&S) -> Option<MemoryReport>,
) -> Result<(Encoded, S, Identity), Fault>
where
    S: prost::Message + Default,
    F: Future<Output = Result<(Encoded, S), Fault>>,
{
    let identity = run.patience.call(|| run.stages.identity(stage)).await?;
    let key = key(stage, &identity, question);
    // A stage that cannot say what it is may be another one next time.
    let known = !identity.checkpoint.is_empty();
    if known && let Some(bytes) = run.lease.stage_output(role, &key).await {
        if let Some((tensors, summary)) = kept::from_bytes::<S>(&bytes) {
            let memory = memory(&summary).unwrap_or_default();
            run.stage_kept(stage, memory.clone()).await;
            return Ok((Encoded::kept(tensors, memory), summary, identity));
        }
        tracing::warn!(generation_id = run.id(), role, "what was kept of a stage cannot be read; it is asked again");
    }
    let began = run.stage_began(stage).await;
    let (mut encoded, summary) = climb(run, stage, call).await?;
    run.devices.add(encoded.device_use.take());
    if known {
        let bytes = kept::to_bytes(&encoded.sorted(), &summary);
        if let Err(fault) = run.lease.keep_stage_output(role, &key, bytes).await {
            tracing::warn!(generation_id = run.id(), role, %fault, "what the stage gave was not kept");
        }
    }
    run.stage_ended(stage, began, encoded.memory.clone()).await;
    Ok((encoded, summary, identity))
}

/// Names what a stage gives: its own identity and all that it is asked, each with its length.
fn key(stage: Stage, identity: &Identity, question: &[&[u8]]) -> String {
    let Identity { checkpoint, manner } = identity;
    let (identity, mut parts) = (format!("{checkpoint} {manner}"), Vec::new());
    for part in [stage_name(stage).as_bytes(), identity.as_bytes()].iter().chain(question) {
        parts.extend((part.len() as u64).to_le_bytes());
        parts.extend_from_slice(part);
    }
    sha256(&parts)
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

/// What to say about the faces that were found, the largest first, and whether it is a warning; nothing about a given
/// one.
fn said_of_faces(faces: &[FaceBox], given: bool) -> Option<(String, bool)> {
    let boxed = |face: &FaceBox| format!("{:.0},{:.0},{:.0},{:.0}", face.x, face.y, face.width, face.height);
    match faces {
        _ if given => None,
        [] => {
            let said = "No face was found; the whole picture is animated. Give --face X,Y,W,H (`face` in a request) to \
                name one.";
            Some((said.into(), true))
        }
        [face] => Some((format!("image-encoder found one face, at {}", boxed(face)), false)),
        [largest, others @ ..] => {
            let shown: Vec<String> = others.iter().take(SHOWN_FACES).map(boxed).collect();
            let more = others.len().saturating_sub(SHOWN_FACES);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let said = format!(
                "{} faces were found. The largest, at {}, is animated; the others are at {}{more}. Give --face X,Y,W,H \
                (`face` in a request) to animate another.",
                faces.len(),
                boxed(largest),
                shown.join("; "),
            );
            Some((said, true))
        }
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
    fn faces_are_told_with_their_boxes_and_how_to_choose_another() {
        let face = |side: f64| FaceBox { x: 10.4, y: 20.0, width: side, height: side, score: Some(0.9) };
        let said = |faces: &[FaceBox]| said_of_faces(faces, false).unwrap();
        assert!(said(&[]).0.contains("No face was found") && said(&[]).1);
        assert_eq!(said(&[face(30.0)]), ("image-encoder found one face, at 10,20,30,30".into(), false));
        let (several, warning) = said(&[face(30.0), face(20.0), face(5.0)]);
        assert!(warning && several.starts_with("3 faces were found. The largest, at 10,20,30,30, is"), "{several}");
        assert!(several.contains("at 10,20,20,20; 10,20,5,5. Give --face X,Y,W,H"), "{several}");
        assert!(said(&[face(9.0); 20]).0.contains(" and 11 more."));
        assert_eq!(said_of_faces(&[face(1.0)], true), None);
    }
}
