//! Listing, page by page.

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use proto::v1::GenerationState;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::video::{ErrorBody, Video};
use crate::{
    fault::Fault,
    scheduler::Gateway,
    service::{MOST_PAGE, PAGE},
    store::Listing,
};

/// Which generations are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wanted {
    /// Generations of one page, 1 to 100. Default 20.
    limit: Option<usize>,
    /// The last id of the page before.
    after: Option<String>,
    /// `desc`, the newest first, or `asc`. Default `desc`.
    order: Option<String>,
    /// Only those with one of these statuses, with commas between.
    status: Option<String>,
    /// Only those of the caller of this name.
    caller: Option<String>,
    /// Only those with this label.
    label: Option<String>,
    /// Only those created at this Unix time in seconds or later.
    created_from: Option<u64>,
    /// Only those created before this Unix time in seconds.
    created_before: Option<u64>,
}

/// One page of generations.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VideoList {
    /// Always `list`.
    object: &'static str,
    /// The generations.
    data: Vec<Video>,
    /// The first id of the page.
    first_id: Option<String>,
    /// The last id of the page; `after` for the next one.
    last_id: Option<String>,
    /// Whether there is a next page.
    has_more: bool,
}

/// Lists generations.
#[utoipa::path(
    get, path = "/v1/videos", tag = "videos", params(Wanted),
    responses((status = 200, body = VideoList), (status = 400, description = "A parameter is wrong.", body = ErrorBody))
)]
pub(crate) async fn list(
    State(gateway): State<Gateway>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<VideoList>, Fault> {
    let Query(wanted) = wanted.map_err(|error| Fault::invalid("query", error.body_text()))?;
    let (generations, next) = gateway.list(&wanted.listing()?).await?;
    let data: Vec<Video> = generations.iter().map(Video::from).collect();
    let id = |video: Option<&Video>| video.map(|video| video.id.clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    Ok(Json(VideoList { object: "list", data, first_id, last_id, has_more: next.is_some() }))
}

impl Wanted {
    fn listing(&self) -> Result<Listing, Fault> {
        let limit = self.limit.unwrap_or(PAGE);
        if !(1..=MOST_PAGE).contains(&limit) {
            return Err(Fault::invalid("limit", format!("{limit}; allowed are 1 to {MOST_PAGE}")));
        }
        let oldest_first = match self.order.as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(order) => return Err(Fault::invalid("order", format!("{order:?}; accepted are asc and desc"))),
        };
        let after = self.after.as_deref().map(Uuid::try_parse).transpose();
        let after = after.map_err(|_| Fault::invalid("after", "it is no id of a video"))?;
        let mut states = Vec::new();
        for status in self.status.iter().flat_map(|all| all.split(',')) {
            states.extend_from_slice(states_of(status.trim())?);
        }
        let milliseconds = |seconds: Option<u64>| seconds.unwrap_or_default().saturating_mul(1000);
        let (created_from_ms, created_before_ms) = (milliseconds(self.created_from), milliseconds(self.created_before));
        let text = |wanted: &Option<String>| wanted.clone().unwrap_or_default();
        let (caller, label) = (text(&self.caller), text(&self.label));
        Ok(Listing { states, caller, label, created_from_ms, created_before_ms, oldest_first, after, limit })
    }
}

/// The states of a status.
fn states_of(status: &str) -> Result<&'static [GenerationState], Fault> {
    Ok(match status {
        "queued" => &[GenerationState::Queued],
        "in_progress" => &[GenerationState::Encoding, GenerationState::Denoising, GenerationState::Decoding],
        "completed" => &[GenerationState::Completed],
        "failed" => &[GenerationState::Failed],
        "cancelled" => &[GenerationState::Cancelled],
        _ => {
            let known = "queued, in_progress, completed, failed and cancelled";
            return Err(Fault::invalid("status", format!("{status:?} is none; they are {known}")));
        }
    })
}
