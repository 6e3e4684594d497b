//! The gateway: takes requests over gRPC and REST, drives generations through the five stages, keeps what came out.

pub mod api;
pub mod config;
#[cfg(test)]
mod fakes;
pub mod fault;
pub mod intake;
pub mod media;
pub mod planning;
mod runner;
pub mod sampler;
mod scheduler;
mod service;
pub mod stages;
pub mod store;
#[cfg(test)]
mod tests;
pub mod validate;
pub mod webhook;

use std::{future::Future, time::Duration};

use axum::serve::ListenerExt as _;
use service_kit::{
    ServiceError,
    server::{self, Lifetime},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use config::{Config, Options, TierOptions};
pub use scheduler::Gateway;
pub use stages::Stages;

/// Names of the gRPC services, for health.
pub const SERVICES: [&str; 1] = ["avatar.v1.AvatarService"];

/// How long the servers may go on after the last generation, so that callers can fetch what came out.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// The bound sockets of a gateway.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC.
    pub grpc: TcpListener,
    /// For REST.
    pub http: TcpListener,
}

/// Serves a gateway on both listeners until `shutdown` resolves and what was accepted has ended.
///
/// After `shutdown` no generation is accepted, those accepted may go on for `drain`, then they are cancelled. Reading
/// goes on until then.
///
/// Errors: a server fails.
pub async fn serve(
    gateway: Gateway,
    listeners: Listeners,
    drain: Duration,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServiceError> {
    let stop = CancellationToken::new();
    let lifetime = Lifetime { shutdown: stop.clone(), drain: LAST_CALLS };
    let grpc = server::serve(gateway.grpc_routes(), &SERVICES, server::tcp(listeners.grpc), lifetime);
    let http = async {
        let stopped = stop.clone().cancelled_owned();
        // Events are small, and wait for no acknowledgement of those before.
        let listener = listeners.http.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "answers of a connection may be held back");
            }
        });
        let serving = axum::serve(listener, gateway.http_router()).with_graceful_shutdown(stopped);
        tokio::select! {
            ended = serving => ended.map_err(|error| ServiceError::internal(format!("the REST server failed: {error}"))),
            () = async { stop.cancelled().await; tokio::time::sleep(LAST_CALLS).await } => Ok(()),
        }
    };
    let ending = async {
        shutdown.await;
        gateway.drain(drain).await;
        stop.cancel();
        Ok::<_, ServiceError>(())
    };
    tokio::try_join!(grpc, http, ending).map(|_| ())
}
