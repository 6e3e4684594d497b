//! `avatar serve`: gateway and stages in one process, on two ports.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use gateway::{Listeners, Options, config::OptionFlags};
use model::image::Detector;
use service_kit::{
    config::{CommonConfig, CommonFlags, DeviceFlags, Mistakes, parse_listen},
    server,
};

use crate::{Setup, failure::Failure, generate::models_folder, in_process, plan};

/// The flags of `avatar serve`.
#[derive(Debug, Args)]
pub struct ServeFlags {
    /// Folder of the models: one subfolder a stage, or the official download. `avatar weights synth` makes a small one.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Type to compute in: f32, bf16 or f16; or by stage, as in `diffusion=bf16,vae-decode=f16`. Sums are f32 in any case.
    #[arg(long, env = "AVATAR_COMPUTE", value_name = "TYPE|STAGE=TYPE,...", default_value = "f32")]
    pub compute: String,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub device: DeviceFlags,
    /// Form in which the transformer's weights are taken, where the official download has several: bf16, fp8, int8,
    /// or auto for the most exact that is there. Another form than the chosen one is refused.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    pub weights: String,
    /// Face detector to use instead of the built-in one: an ONNX file of UltraFace, YuNet, SCRFD or YOLO-face.
    #[arg(long, env = "AVATAR_FACE_MODEL", value_name = "FILE")]
    pub face_model: Option<PathBuf>,
    /// Address and port to serve gRPC on; port 0 takes a free one.
    #[arg(long, env = "AVATAR_GRPC", value_name = "ADDR:PORT", default_value = "127.0.0.1:50050")]
    pub grpc: String,
    /// Address and port to serve REST on; port 0 takes a free one.
    #[arg(long, env = "AVATAR_HTTP", value_name = "ADDR:PORT", default_value = "127.0.0.1:7860")]
    pub http: String,
    #[allow(missing_docs)] // A doc comment would replace the description of the command in --help.
    #[command(flatten)]
    pub options: OptionFlags,
    #[allow(missing_docs)]
    #[command(flatten)]
    pub common: CommonFlags,
}

/// What [`ServeFlags`] say.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Folder of the models.
    pub models: PathBuf,
    /// How the stages compute.
    pub setup: Setup,
    /// Where to serve gRPC.
    pub grpc: SocketAddr,
    /// Where to serve REST.
    pub http: SocketAddr,
    /// About generations.
    pub options: Options,
    /// Log and drain time.
    pub common: CommonConfig,
}

impl ServeFlags {
    /// Gives the values their types.
    ///
    /// Errors: everything that is wrong, together.
    pub fn check(self) -> Result<ServeConfig, Mistakes> {
        let mut mistakes = Mistakes::default();
        let models = models_folder(self.models.as_deref());
        if let Err(failure) = &models {
            let advice = failure.advice.unwrap_or_default();
            mistakes.note(format!("--models: {failure}; {advice}"));
        }
        let compute = mistakes.check("--compute", &self.compute, str::parse);
        let devices = self.device.resolve_all(&mut mistakes);
        let weights = mistakes.check("--weights", &self.weights, str::parse);
        let detector = Detector::open(self.face_model.as_deref());
        if let Err(error) = &detector {
            mistakes.note(format!("--face-model: {error}"));
        }
        let grpc = mistakes.check("--grpc", &self.grpc, parse_listen);
        let http = mistakes.check("--http", &self.http, parse_listen);
        let options = self.options.resolve(&mut mistakes);
        let common = self.common.resolve(&mut mistakes);
        match (models, compute, devices, weights, detector, grpc, http, options, common) {
            (
                Ok(models),
                Some(compute),
                Some(devices),
                Some(weights),
                Ok(detector),
                Some(grpc),
                Some(http),
                Some(options),
                Some(common),
            ) if mistakes.is_empty() => {
                let options = Options { tier: plan::here(options.tier, &devices), ..options };
                let setup = Setup { compute, devices, weights, detector };
                Ok(ServeConfig { models, setup, grpc, http, options, common })
            }
            _ => Err(mistakes),
        }
    }
}

/// Serves until SIGTERM or SIGINT, or until nothing works on the device any more, then drains.
///
/// Errors: an address cannot be bound, the system cannot be started, a server fails, or the device is lost.
pub async fn serve(config: ServeConfig) -> Result<(), Failure> {
    let failed = |what: &'static str| move |e: service_kit::ServiceError| Failure::local(what, e);
    let shutdown = server::shutdown_signal().map_err(failed("cannot catch signals"))?;
    let (grpc, grpc_address) = server::bind(config.grpc).await.map_err(failed("--grpc"))?;
    let (http, http_address) = server::bind(config.http).await.map_err(failed("--http"))?;
    let system = in_process(&config.models, config.setup, &config.options).await?;
    // Both sockets listen: whoever connects now is answered.
    server::announce(&[("grpc", grpc_address), ("http", http_address)]);
    let listeners = Listeners { grpc, http };
    let stopped = system.stopped();
    let end = async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = stopped => {}
        }
    };
    gateway::serve(system.gateway().clone(), listeners, config.common.drain_timeout, end)
        .await
        .map_err(|e| Failure::local("the server failed", e))?;
    system.works()
}
