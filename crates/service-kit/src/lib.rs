//! What every service needs and no model knows: settings, logs, errors, the device thread, servers and clients.

pub mod client;
pub mod config;
pub mod device;
pub mod error;
pub mod hardware;
pub mod memory;
mod places;
pub mod server;
pub mod stage;
pub mod telemetry;
pub mod tensors;

pub use error::{FieldViolation, ServiceError};
