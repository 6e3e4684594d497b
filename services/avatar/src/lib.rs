//! The whole system in one process: the five stages and the gateway over in-memory connections, and the command
//! line around them.

pub mod batch;
pub mod client;
pub mod compute;
pub mod config;
pub mod devices;
pub mod failure;
pub mod generate;
pub mod output;
pub mod plan;
pub mod pressure;
pub mod progress;
pub mod serve;
pub mod signals;
pub mod weights;

mod stages;

pub use stages::{InProcess, Setup, in_process};
