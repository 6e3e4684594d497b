//! Arithmetic that gateway and stages must agree on: picture sizes, frames, windows, steps; what a generation needs of a
//! device in bytes and seconds; and which plan fits the devices that there are. No I/O, no candle, no clock.

pub mod bytes;
pub mod clip;
pub mod cost;
pub mod plan;
pub mod precision;
pub mod size;
pub mod stage;
pub mod steps;
pub mod table;
pub mod tiers;

pub use bytes::Bytes;
pub use plan::{Device, DeviceKind, Outcome, Plan, Planner, Refusal, Request};
pub use precision::Precision;
pub use stage::Stage;
pub use table::ModelTable;
pub use tiers::{Limits, Tier, Tiers};
