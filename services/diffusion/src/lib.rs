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

/// Serves on devices of its own until `shutdown`, then as long as calls in flight take, at most the drain time.
///
/// Errors: a device's thread does not start, or the server fails.
pub async fn serve<I, C>(config: Config, incoming: I, shutdown: CancellationToken) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let all: Vec<_> = std::iter::once(&config.stage.device).chain(&config.others).cloned().collect();
    let mut others = DeviceWorker::spawn_several(&all, config.stage.queue)?;
    let device = others.remove(0);
    serve_on(config, (device, others), incoming, shutdown).await
}

/// As [`serve`], on devices that other stages use too: the first and the others of the config. Ends by itself when
/// nothing works on one of them any more.
///
/// Errors: the server fails, or a device is lost.
pub async fn serve_on<I, C>(
    config: Config,
    devices: (DeviceWorker, Vec<DeviceWorker>),
    incoming: I,
    shutdown: CancellationToken,
) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let Config { stage: config, others, blocks, weights } = config;
    let options = service::Options { weights, devices: [vec![config.device.clone()], others].concat(), blocks };
    let host = StageHost::over(&config, options, devices, shutdown.clone());
    let service = service::Service::new(host.clone(), config.max_tensor_bytes);
    let routes = Routes::new(host.stage_service()).add_service(DiffusionServiceServer::new(service));
    server::serve(routes, &SERVICES, incoming, Lifetime { shutdown, drain: config.common.drain_timeout }).await?;
    host.ended()
}
