//! The diffusion service: noisy latents to velocities. One gRPC service around the networks of crate `model`.

use std::io;

use proto::v1::diffusion_service_server::DiffusionServiceServer;
use service_kit::{
    ServiceError,
    device::DeviceWorker,
    server::{self, Connection, Lifetime},
    stage::StageHost,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use config::Config;

pub mod config;
mod service;
mod session;

/// Full names of the gRPC services.
pub const SERVICES: [&str; 2] = ["avatar.v1.DiffusionService", "avatar.v1.StageService"];

/// Serves on a device of its own until `shutdown`, then as long as calls in flight take, at most the drain time.
///
/// Errors: the device's thread does not start, or the server fails.
pub async fn serve<I, C>(config: Config, incoming: I, shutdown: CancellationToken) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let device = DeviceWorker::spawn(&config.stage.device, config.stage.queue)?;
    serve_on(config, device, incoming, shutdown).await
}

/// As [`serve`], on a device that other stages use too. Ends by itself when nothing works on the device any more.
///
/// Errors: the server fails, or the device is lost.
pub async fn serve_on<I, C>(
    config: Config,
    device: DeviceWorker,
    incoming: I,
    shutdown: CancellationToken,
) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let Config { stage: config, weights } = config;
    let host = StageHost::new(&config, weights, device, shutdown.clone());
    let service = service::Service::new(host.clone(), config.max_tensor_bytes);
    let routes = Routes::new(host.stage_service()).add_service(DiffusionServiceServer::new(service));
    server::serve(routes, &SERVICES, incoming, Lifetime { shutdown, drain: config.common.drain_timeout }).await?;
    host.ended()
}
