//! The REST interface, in the shape that OpenAI-style video clients speak. gRPC is in `service.rs`.

mod form;
mod openapi;
mod plan;
pub mod rest;
pub mod video;
