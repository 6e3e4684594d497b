//! The REST calls about tiers and plans.

use axum::{
    Json,
    extract::{State, rejection::JsonRejection},
};
use planner::{Plan, Tier};
use proto::v1::PlanGenerationRequest;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::video::ErrorBody;
use crate::{
    fault::{Fault, Kind},
    scheduler::Gateway,
};

/// The tiers.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TierList {
    /// Always `list`.
    object: &'static str,
    /// The tiers, the smallest first: `name`, `from_gb` and `to_gb` (nominal sizes that it is for), and the limits
    /// `pixels`, `frames`, `audio_seconds` and `steps`.
    #[schema(value_type = Vec<Object>)]
    data: Vec<Tier>,
    /// The tier that generations are held to, if they are to one.
    in_force: Option<String>,
}

/// What a plan is asked for. Unknown fields are refused.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct PlanBody {
    /// Pixels, 64 to 4096, both or neither. Default: a square of the tier's pixels.
    width: Option<u32>,
    /// Pixels.
    height: Option<u32>,
    /// Frames of the video, 1 to 15000. Default: those that one pass of the tier holds.
    frames: Option<u32>,
    /// Denoise steps, 1 to 200. Default: the tier's.
    steps: Option<u32>,
    /// A tier whose limits hold, or `auto` for the largest device's. Default: no limits.
    tier: Option<String>,
    /// Lower what is past a limit or does not fit, and say so. Default false.
    allow_degrade: bool,
    /// Every step in full. Default false.
    no_feature_cache: bool,
    /// Bytes of each card to plan for, which need not be there; at most 16. Default: the devices that the gateway knows.
    vram_bytes: Vec<u64>,
}

/// Lists the tiers.
#[utoipa::path(get, path = "/v1/tiers", tag = "plans", responses((status = 200, body = TierList)))]
pub(crate) async fn tiers(State(gateway): State<Gateway>) -> Json<TierList> {
    let options = gateway.tiers();
    let in_force = options.limit().map(|tier| tier.name.clone());
    Json(TierList { object: "list", data: options.tiers.all().to_vec(), in_force })
}

/// Says what a generation would need, without making it.
#[utoipa::path(
    post, path = "/v1/plans", tag = "plans", request_body = PlanBody,
    responses(
        (
            status = 200, body = Object,
            description = "`tier`, `placement`, `stages` with `stage`, `device`, `fit`, `peak_bytes` and `seconds` (and \
                `spread` with `device`, `first_block`, `blocks`, `resident_blocks` and `peak_bytes`, where the blocks are \
                on several devices), \
                `phases`, `peak_bytes`, `seconds`, `degraded` and `reasons`.",
        ),
        (status = 400, description = "A value is wrong or past the tier's limits; `param` names it.", body = ErrorBody),
        (status = 409, description = "No device is known and no card is named.", body = ErrorBody),
        (status = 507, description = "Nothing fits; the message says what would.", body = ErrorBody),
    )
)]
pub(crate) async fn create(
    State(gateway): State<Gateway>,
    body: Result<Json<PlanBody>, JsonRejection>,
) -> Result<Json<Plan>, Fault> {
    let Json(body) = body.map_err(|wrong| Fault::new(Kind::Invalid, wrong.body_text()))?;
    let request = PlanGenerationRequest {
        width: body.width,
        height: body.height,
        frames: body.frames,
        steps: body.steps,
        tier: body.tier.unwrap_or_default(),
        allow_degrade: body.allow_degrade,
        no_feature_cache: body.no_feature_cache,
        vram_bytes: body.vram_bytes,
    };
    Ok(Json(gateway.plan(request).await?))
}
