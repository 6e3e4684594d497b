//! The description of the REST interface.

use axum::Json;
use utoipa::{OpenApi, ToSchema};

use super::{
    content,
    events::{self, VideoEvent, VideoMemory, VideoPreview},
    list::{self, VideoList},
    plan::{self, PlanBody, TierList},
    preview, rest,
    video::{Deleted, DeviceSeconds, ErrorBody, ErrorObject, Face, Video, VideoError},
};

/// The form of a new generation. Unknown fields are refused.
#[derive(Debug, ToSchema)]
#[allow(dead_code)] // Only its description is used; the form is read part by part.
pub(crate) struct CreateVideo {
    /// What the person does, and where; at most 10000 bytes, and as many tokens as the model takes.
    prompt: Option<String>,
    /// The picture's file: PNG, JPEG or WebP, at most 32 MiB and 50 megapixels, sides from 64 to 12000.
    #[schema(format = Binary, value_type = String)]
    input_reference: Vec<u8>,
    /// The recording: a file (WAV, MP3, M4A/AAC, FLAC or OGG, at most 128 MiB), or the same as text in a data URL
    /// `data:audio/…;base64,…`.
    #[schema(format = Binary, value_type = String)]
    audio: Vec<u8>,
    /// Seeds the noise. Default 128.
    seed: Option<u64>,
    /// Denoise steps, 1 to 200. Default: the checkpoint's, else 50.
    steps: Option<u32>,
    /// Shorter side in pixels, 64 to 1280, such as `704`; of a size such as `704x768` the shorter side is used. The
    /// longer side follows the picture. Default: the checkpoint's, else 704.
    size: Option<String>,
    /// How strongly prompt and speech are followed, 1 to 20. Default: the checkpoint's, else 7.5.
    guidance_scale: Option<f32>,
    /// Bends the time grid towards noise, 0.1 to 20. Default: the checkpoint's, else 5.
    flow_shift: Option<f32>,
    /// Denoise at least this many frames, 1 to 400. Default 1.
    min_frames: Option<u32>,
    /// The face to animate, `x,y,width,height` in pixels of the upright picture. Default: found.
    face: Option<String>,
    /// `reference` follows the reference implementation's rules for lengths, steps and rounding; without it ours hold.
    /// Refused together with `min_frames`.
    #[schema(pattern = "^reference$")]
    parity: Option<String>,
    /// Cut a prompt of too many tokens instead of refusing it; a warning says how many were kept. Default false.
    truncate_prompt: Option<bool>,
    /// Run every step in full, instead of reusing features of earlier steps in runs of 30 steps and more. Default false.
    no_feature_cache: Option<bool>,
    /// `hunyuan-video-avatar`, if given.
    model: Option<String>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Talking avatar videos",
        description = "A picture, a recording and a sentence become a talking video."
    ),
    paths(
        rest::create,
        list::list,
        rest::show,
        events::events,
        content::content,
        preview::preview,
        rest::remove,
        rest::cancel,
        rest::healthz,
        plan::create,
        plan::tiers
    ),
    components(schemas(
        CreateVideo,
        Video,
        VideoList,
        VideoEvent,
        VideoMemory,
        VideoPreview,
        VideoError,
        DeviceSeconds,
        Face,
        Deleted,
        ErrorBody,
        ErrorObject,
        PlanBody,
        TierList
    ))
)]
struct Api;

/// Gives the document.
pub(crate) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Api::openapi())
}
