//! The JSON objects of the REST interface.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::header::RETRY_AFTER;
use proto::v1::{DeviceUse, FaceBox, Failure, Generation, GenerationState, Parity};
use serde::Serialize;
use utoipa::ToSchema;

use crate::fault::{Fault, Kind};

/// The one model, by the name that requests may carry.
pub const MODEL: &str = "hunyuan-video-avatar";

/// The name of the reference's rules.
pub const REFERENCE: &str = "reference";

/// One generation.
#[derive(Debug, Serialize, ToSchema)]
pub struct Video {
    /// For the other calls; a UUID.
    pub id: String,
    /// Always `video`.
    pub object: &'static str,
    /// Always `hunyuan-video-avatar`.
    pub model: &'static str,
    /// Who asked for it, where a name was given.
    pub caller: Option<String>,
    /// The caller's own word for it, where one was given.
    pub label: Option<String>,
    /// `queued`, `in_progress`, `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    /// 0 to 100.
    pub progress: u32,
    /// Unix time in seconds.
    pub created_at: u64,
    /// Unix time in seconds, once it has ended well.
    pub completed_at: Option<u64>,
    /// Its place while it is queued, 1 for the next one.
    pub queue_position: Option<u32>,
    /// Unix time in seconds when it will begin, by how long the last generations took.
    pub estimated_start_at: Option<u64>,
    /// Length of the video.
    pub seconds: String,
    /// Width x height in pixels.
    pub size: String,
    /// What the person does.
    pub prompt: String,
    /// Why it failed.
    pub error: Option<VideoError>,
    /// What the caller should know, in sentences.
    pub warnings: Vec<String>,
    /// Denoise steps.
    pub steps: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// Pictures of the video.
    pub frames: u32,
    /// Pictures a second.
    pub fps: u32,
    /// Pictures' worth of the speech that the model hears.
    pub heard_frames: u32,
    /// Pictures that the model denoises, of which those of the video are kept.
    pub denoised_frames: u32,
    /// `reference` where the reference's rules were asked for.
    pub parity: Option<&'static str>,
    /// Tokens of the prompt with the quality words put before it, once completed.
    pub prompt_tokens: Option<u32>,
    /// Of these, those that LLaVA read; fewer only where `truncate_prompt` cut the prompt.
    pub prompt_tokens_kept: Option<u32>,
    /// CLIP's tokens of what was kept, once completed.
    pub clip_tokens: Option<u32>,
    /// Of these, those that CLIP read: it takes 75 at most.
    pub clip_tokens_kept: Option<u32>,
    /// Faces that were found, the largest first, or the one that was given; empty until completed.
    pub faces: Vec<Face>,
    /// The face that was animated: of those found the largest. `face` in a request names another.
    pub face: Option<Face>,
    /// Seconds that it took of each device so far.
    pub devices: Vec<DeviceSeconds>,
}

/// What a generation took of a device.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeviceSeconds {
    /// The device's name in its process, such as `cpu`.
    pub device: String,
    /// Tells it from all other devices; another one after the process was started again.
    pub device_id: String,
    /// Seconds of work, without waits for the device.
    pub seconds: f64,
}

impl From<&DeviceUse> for DeviceSeconds {
    fn from(used: &DeviceUse) -> Self {
        Self { device: used.device.clone(), device_id: used.device_id.clone(), seconds: used.seconds }
    }
}

/// A face's box in pixels of the upright picture, from its top left corner.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Face {
    /// Left edge.
    pub x: f64,
    /// Upper edge.
    pub y: f64,
    /// Columns.
    pub width: f64,
    /// Rows.
    pub height: f64,
    /// How sure the detector is, on its own scale; null for a box that was given.
    pub score: Option<f64>,
}

impl From<&FaceBox> for Face {
    fn from(face: &FaceBox) -> Self {
        Self { x: face.x, y: face.y, width: face.width, height: face.height, score: face.score }
    }
}

/// Why a generation failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct VideoError {
    /// A code such as `invalid_argument`.
    pub code: String,
    /// A sentence.
    pub message: String,
    /// The input at fault, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// The answer to a removal.
#[derive(Debug, Serialize, ToSchema)]
pub struct Deleted {
    /// What was removed.
    pub id: String,
    /// Always `video.deleted`.
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

/// The body of every error.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorObject,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorObject {
    /// Names the value and the limit.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field at fault, if one is.
    pub param: Option<String>,
    /// A code such as `invalid_argument`.
    pub code: String,
}

impl From<&Generation> for Video {
    fn from(generation: &Generation) -> Self {
        let spec = generation.spec.clone().unwrap_or_default();
        let state = generation.state();
        let failure = generation.failure.as_ref();
        let percent = generation.progress.map_or(0.0, |progress| progress.percent);
        let parity = parity_name(spec.parity());
        let outcome = generation.outcome.as_ref();
        Self {
            id: generation.generation_id.clone(),
            object: "video",
            model: MODEL,
            caller: Some(generation.caller.clone()).filter(|caller| !caller.is_empty()),
            label: Some(generation.label.clone()).filter(|label| !label.is_empty()),
            status: status_name(state),
            progress: percent.clamp(0.0, 100.0) as u32,
            created_at: generation.created_unix_ms / 1000,
            completed_at: (state == GenerationState::Completed).then_some(generation.ended_unix_ms / 1000),
            queue_position: Some(generation.queue_position).filter(|position| *position > 0),
            estimated_start_at: generation.estimated_start_unix_ms.map(|unix_ms| unix_ms / 1000),
            seconds: format!("{:.2}", f64::from(generation.frames) / f64::from(planner::clip::FPS)),
            size: format!("{}x{}", generation.width, generation.height),
            prompt: spec.prompt,
            error: failure.map(VideoError::from),
            warnings: outcome.map(|outcome| outcome.warnings.clone()).unwrap_or_default(),
            steps: spec.steps.unwrap_or_default(),
            seed: spec.seed.unwrap_or_default(),
            frames: generation.frames,
            fps: planner::clip::FPS,
            heard_frames: generation.heard_frames,
            denoised_frames: generation.denoised_frames,
            parity,
            prompt_tokens: outcome.map(|outcome| outcome.prompt_tokens),
            prompt_tokens_kept: outcome.map(|outcome| outcome.prompt_tokens_kept),
            clip_tokens: outcome.map(|outcome| outcome.clip_tokens),
            clip_tokens_kept: outcome.map(|outcome| outcome.clip_tokens_kept),
            faces: outcome.map(|outcome| outcome.faces.iter().map(Face::from).collect()).unwrap_or_default(),
            face: outcome.and_then(|outcome| outcome.face.as_ref()).map(Face::from),
            devices: generation.devices.iter().map(DeviceSeconds::from).collect(),
        }
    }
}

impl From<&Failure> for VideoError {
    fn from(failure: &Failure) -> Self {
        Self {
            code: failure.code.to_lowercase(),
            message: failure.message.clone(),
            field: Some(rest_name(&failure.field).to_owned()).filter(|field| !field.is_empty()),
        }
    }
}

/// The form's name of a field: the picture has the one that video clients use.
fn rest_name(field: &str) -> &str {
    if field == "picture" { "input_reference" } else { field }
}

/// Whose rules hold, where they are not ours.
#[must_use]
pub fn parity_name(parity: Parity) -> Option<&'static str> {
    match parity {
        Parity::Unspecified => None,
        Parity::Reference => Some(REFERENCE),
    }
}

/// A state in the words of the REST interface.
#[must_use]
pub fn status_name(state: GenerationState) -> &'static str {
    match state {
        GenerationState::Unspecified | GenerationState::Queued => "queued",
        GenerationState::Encoding | GenerationState::Denoising | GenerationState::Decoding => "in_progress",
        GenerationState::Completed => "completed",
        GenerationState::Failed => "failed",
        GenerationState::Cancelled => "cancelled",
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = self.http_status();
        let kind = match self.kind {
            Kind::Busy { .. } => "rate_limit_error",
            _ if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        let error = ErrorObject {
            message: self.message.clone(),
            kind,
            param: self.field().map(|field| rest_name(field).to_owned()),
            code: self.name().to_lowercase(),
        };
        let mut response = (status, Json(ErrorBody { error })).into_response();
        if let Kind::Busy { retry_after } = self.kind {
            response.headers_mut().insert(RETRY_AFTER, (retry_after.as_secs_f64().ceil() as u64).max(1).into());
        }
        response
    }
}
