//! A generation's events, as they happen.

use std::{convert::Infallible, time::Duration};

use axum::{
    extract::{Path, Query, State, rejection::QueryRejection},
    response::sse::{Event, KeepAlive, Sse},
};
use futures::{Stream, StreamExt as _};
use http::HeaderMap;
use proto::v1::{GenerationEvent, GenerationState, Stage};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::video::{ErrorBody, VideoError, status_name};
use crate::{
    fault::{Fault, stage_name},
    scheduler::Gateway,
};

/// How long a watcher hears nothing at most.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Where to begin.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wanted {
    /// Number of the first event wanted; 0 and 1 mean all. The header `Last-Event-ID` has the number before it.
    from: Option<u64>,
}

/// One thing that happened to a generation.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VideoEvent {
    /// From 1, without gaps.
    number: u64,
    /// Unix time in milliseconds.
    unix_ms: u64,
    /// As in the video.
    status: &'static str,
    /// `queued`, `encoding`, `denoising`, `decoding`, `completed`, `failed` or `cancelled`.
    state: &'static str,
    /// Steps that are done, and how many there are.
    step: u32,
    /// Steps in all.
    steps: u32,
    /// 0 to 100.
    progress: f32,
    /// Seconds that were worked on it.
    elapsed_seconds: f64,
    /// Seconds that are left, by the pace so far.
    remaining_seconds: Option<f64>,
    /// The stage that began or ended.
    stage: Option<&'static str>,
    /// A sentence for people.
    message: Option<String>,
    /// The sentence is a warning.
    warning: bool,
    /// Why it failed.
    error: Option<VideoError>,
    /// A picture of how far it is.
    preview: Option<VideoPreview>,
    /// What the stage and its device hold.
    memory: Option<VideoMemory>,
}

/// Memory of a stage after a step or at its end, in bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VideoMemory {
    /// The stage's loaded weights.
    resident_bytes: u64,
    /// The most that the stage held at once since it started.
    peak_bytes: u64,
    /// What is held on the stage's device now, by all its stages.
    device_bytes: u64,
    /// What may be held on the device.
    budget_bytes: u64,
}

/// What the video's first frame would be, as foreseen after a step. It may be told of after later steps; where the
/// decoder has no room or time for it, it is left out.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VideoPreview {
    /// The step after which it was foreseen, from 1.
    step: u32,
    /// Pixels; the longer side is 256 at most.
    width: u32,
    /// Pixels.
    height: u32,
    /// Bytes of the JPEG file.
    bytes: u64,
    /// Path of the JPEG file on this server.
    url: String,
}

/// Streams a generation's events up to the last one, and a comment every 15 seconds.
#[utoipa::path(
    get, path = "/v1/videos/{id}/events", tag = "videos",
    params(("id" = String, Path, description = "The generation."), Wanted),
    responses(
        (status = 200, description = "Server-sent events; each has its number as its id.", body = VideoEvent,
            content_type = "text/event-stream"),
        (status = 400, description = "The number is none.", body = ErrorBody),
        (status = 404, description = "No generation has this id.", body = ErrorBody),
    )
)]
pub(crate) async fn events(
    State(gateway): State<Gateway>,
    Path(id): Path<String>,
    wanted: Result<Query<Wanted>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Fault> {
    let Query(Wanted { from }) = wanted.map_err(|error| Fault::invalid("query", error.body_text()))?;
    // A browser that connects again names the last event that it saw.
    let seen = match headers.get("last-event-id") {
        None => None,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            let wrong = || Fault::invalid("last-event-id", "it is no number of an event");
            Some(number.ok_or_else(wrong)?.saturating_add(1))
        }
    };
    let id = gateway.store().id(&id).await?;
    let events = gateway.store().events(id, seen.or(from).unwrap_or_default());
    // A generation that is removed while it is watched ends the stream, as its last event does.
    let events = events.take_while(|event| std::future::ready(event.is_ok())).filter_map(|event| async {
        let event = VideoEvent::from(&event.ok()?);
        Event::default().id(event.number.to_string()).json_data(event).ok().map(Ok)
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT)))
}

impl From<&GenerationEvent> for VideoEvent {
    fn from(event: &GenerationEvent) -> Self {
        let progress = event.progress.unwrap_or_default();
        Self {
            number: event.number,
            unix_ms: event.unix_ms,
            status: status_name(event.state()),
            state: state_name(event.state()),
            step: progress.step,
            steps: progress.steps,
            progress: progress.percent,
            elapsed_seconds: progress.elapsed_seconds,
            remaining_seconds: progress.remaining_seconds,
            stage: Some(event.stage()).filter(|stage| *stage != Stage::Unspecified).map(stage_name),
            message: Some(event.message.clone()).filter(|message| !message.is_empty()),
            warning: event.warning,
            error: event.failure.as_ref().map(VideoError::from),
            preview: event.preview.as_ref().map(|preview| VideoPreview {
                step: preview.step,
                width: preview.width,
                height: preview.height,
                bytes: preview.bytes,
                url: format!("/v1/videos/{}/previews/{}", event.generation_id, preview.step),
            }),
            memory: event.memory.as_ref().map(|memory| VideoMemory {
                resident_bytes: memory.resident_bytes,
                peak_bytes: memory.peak_bytes,
                device_bytes: memory.device_bytes,
                budget_bytes: memory.budget_bytes,
            }),
        }
    }
}

/// A state by its name.
fn state_name(state: GenerationState) -> &'static str {
    match state {
        GenerationState::Encoding => "encoding",
        GenerationState::Denoising => "denoising",
        GenerationState::Decoding => "decoding",
        other => status_name(other),
    }
}
