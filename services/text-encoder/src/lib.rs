//! The text encoder: prompt and picture to text states. One gRPC service around the networks of crate `model`.

use std::io;

use proto::v1::text_encoder_service_server::TextEncoderServiceServer;
use service_kit::{
    ServiceError,
    config::StageConfig,
    device::DeviceWorker,
    server::{self, Connection, Lifetime},
    stage::StageHost,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

pub mod config;
mod service;

/// Full names of the gRPC services.
pub const SERVICES: [&str; 2] = ["avatar.v1.TextEncoderService", "avatar.v1.StageService"];

/// Serves on a device of its own until `shutdown`, then as long as calls in flight take, at most the drain time.
///
/// Errors: the device's thread does not start, or the server fails.
pub async fn serve<I, C>(config: StageConfig, incoming: I, shutdown: CancellationToken) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let device = DeviceWorker::spawn(&config.device, config.queue)?;
    serve_on(config, device, incoming, shutdown).await
}

/// As [`serve`], on a device that other stages use too. Ends by itself when nothing works on the device any more.
///
/// Errors: the server fails, or the device is lost.
pub async fn serve_on<I, C>(
    config: StageConfig,
    device: DeviceWorker,
    incoming: I,
    shutdown: CancellationToken,
) -> Result<(), ServiceError>
where
    I: Stream<Item = Result<C, io::Error>>,
    C: Connection,
{
    let host = StageHost::new(&config, (), device, shutdown.clone());
    let service = service::Service::new(host.clone(), config.max_tensor_bytes);
    let routes = Routes::new(host.stage_service()).add_service(TextEncoderServiceServer::new(service));
    server::serve(routes, &SERVICES, incoming, Lifetime { shutdown, drain: config.common.drain_timeout }).await?;
    host.ended()
}
