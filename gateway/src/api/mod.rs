//! The REST interface, in the shape that OpenAI-style video clients speak. gRPC is in `service.rs`.

mod content;
mod events;
mod form;
mod list;
mod openapi;
mod plan;
mod preview;
pub mod rest;
pub mod video;
