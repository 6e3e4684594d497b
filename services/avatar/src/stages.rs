//! The five stages and the gateway in this process, over in-memory connections.

use std::{future::Future, path::Path, time::Duration};

use gateway::{Gateway, Options, Stages};
use model::{checkpoint::Choice, image::Detector};
use planner::plan::Placement;
use proto::v1::avatar_service_client::AvatarServiceClient;
use service_kit::{
    ServiceError,
    client::{self, MemoryIncoming},
    config::StageConfig,
    device::DeviceWorker,
    hardware::DeviceConfig,
    server::{self, Lifetime},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{compute::ComputeByStage, failure::Failure, plan};

/// How the stages of one process compute.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Type to compute in, by stage.
    pub compute: ComputeByStage,
    /// Devices that the stages are placed on; at least one.
    pub devices: Vec<DeviceConfig>,
    /// The form of the transformer's weights.
    pub weights: Choice,
    /// What finds faces.
    pub detector: Detector,
}

/// A running system: the same servers as six processes, without sockets.
///
/// Dropping it stops the servers at once; [`stop`](Self::stop) lets generations end first.
pub struct InProcess {
    gateway: Gateway,
    channel: Channel,
    placement: Option<Placement>,
    shutdown: CancellationToken,
    devices: Vec<DeviceWorker>,
}

/// Starts the five stages on their devices, and the gateway before them.
///
/// Weights are read at the first request that needs them, so a folder that lacks some is noticed then; several devices
/// are planned for at once, from the checkpoint's headers. To be called
/// within a tokio runtime, which must live on as long as the system.
///
/// Errors: a device's thread or the gateway's folder cannot be made, or nothing fits on several devices.
pub async fn in_process(models: &Path, setup: Setup, options: &Options) -> Result<InProcess, Failure> {
    let asked = (models.to_owned(), setup.clone(), options.tier.clone());
    // Headers are read, and where it is not known yet, the machine's speed is measured.
    let placement = tokio::task::spawn_blocking(move || plan::placement(&asked.0, &asked.1, &asked.2))
        .await
        .map_err(|e| Failure::local("cannot place the stages", e))??;
    let fleet = plan::fleet(models, &setup, placement.clone());
    let Setup { compute, devices, weights, detector } = setup;
    let config = StageConfig::local(models);
    let of = |stage| StageConfig { compute: compute.of(stage), ..config.clone() };
    let failed = |e| Failure::local("cannot start the devices", e);
    let workers = DeviceWorker::spawn_several(&devices, config.queue).map_err(failed)?;
    let placed = placement.clone().unwrap_or_default();
    let places: Option<Vec<DeviceWorker>> = placed.devices.iter().map(|&number| workers.get(number).cloned()).collect();
    let places = places.and_then(|all| <[_; 5]>::try_from(all).ok());
    let [audio, text, image, transformer, decoder] =
        places.ok_or_else(|| Failure::local("cannot start the devices", "there is none"))?;
    let shutdown = CancellationToken::new();
    let stages = Stages {
        audio_encoder: stage("audio-encoder", |incoming| {
            audio_encoder::serve_on(of("audio-encoder"), audio, incoming, shutdown.clone())
        }),
        text_encoder: stage("text-encoder", |incoming| {
            text_encoder::serve_on(of("text-encoder"), text, incoming, shutdown.clone())
        }),
        image_encoder: stage("image-encoder", |incoming| {
            let config = image_encoder::config::Config { stage: of("image-encoder"), detector };
            image_encoder::serve_on(config, image, incoming, shutdown.clone())
        }),
        diffusion: stage("diffusion", |incoming| {
            let numbers = || placed.spread.iter().skip(1).map(|(number, _)| *number);
            let others: Vec<DeviceWorker> = numbers().filter_map(|number| workers.get(number).cloned()).collect();
            let config = diffusion::config::Config {
                stage: StageConfig { device: transformer.budget().device().clone(), ..of("diffusion") },
                others: others.iter().map(|worker| worker.budget().device().clone()).collect(),
                blocks: placed.spread.iter().map(|(_, blocks)| *blocks).collect(),
                weights,
            };
            diffusion::serve_on(config, (transformer, others), incoming, shutdown.clone())
        }),
        vae_decode: stage("vae-decode", |incoming| {
            vae_decode::serve_on(of("vae-decode"), decoder, incoming, shutdown.clone())
        }),
        spare_decoders: Vec::new(),
    };
    let gateway = Gateway::new(options, stages).await.map_err(|e| Failure::local("cannot start the gateway", e))?;
    let gateway = gateway.planning_for(fleet);
    let routes = gateway.grpc_routes();
    let lifetime = Lifetime { shutdown: shutdown.clone(), drain: config.common.drain_timeout };
    let channel =
        stage("gateway", |incoming| async move { server::serve(routes, &gateway::SERVICES, incoming, lifetime).await });
    Ok(InProcess { gateway, channel, placement, shutdown, devices: workers })
}

/// Runs a server on an in-memory connection, and gives the channel to it.
fn stage<F>(name: &'static str, serve: impl FnOnce(MemoryIncoming) -> F) -> Channel
where
    F: Future<Output = Result<(), ServiceError>> + Send + 'static,
{
    let (channel, incoming) = client::in_memory();
    let serving = serve(incoming);
    tokio::spawn(async move {
        if let Err(reason) = serving.await {
            tracing::error!("{name} ended: {reason}");
        }
    });
    channel
}

impl InProcess {
    /// The gateway, to serve it on sockets too.
    #[must_use]
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Where the stages are, where there are several devices.
    #[must_use]
    pub fn placement(&self) -> Option<Placement> {
        self.placement.clone()
    }

    /// Waits until the system has stopped: it was told to, or nothing works on its device any more.
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        self.shutdown.clone().cancelled_owned()
    }

    /// Whether its devices still compute.
    ///
    /// Errors: as [`DeviceWorker::works`].
    pub fn works(&self) -> Result<(), Failure> {
        self.devices.iter().try_for_each(DeviceWorker::works).map_err(|e| Failure::local("a device failed", e))
    }

    /// A client of the public service, over the in-memory connection.
    #[must_use]
    pub fn client(&self) -> AvatarServiceClient<Channel> {
        AvatarServiceClient::new(self.channel.clone())
    }

    /// Takes no more generations, waits up to `grace` for those accepted, cancels the rest and stops the servers.
    pub async fn stop(&self, grace: Duration) {
        self.gateway.drain(grace).await;
        self.shutdown.cancel();
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
