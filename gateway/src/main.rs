//! The life of the gateway's process.

use std::process::ExitCode;

use gateway::{Gateway, Listeners, Stages, config::Flags};
use service_kit::{ServiceError, config, server, telemetry};

fn main() -> ExitCode {
    let config = config::parse_or_exit::<Flags>();
    telemetry::init(&config.common.log);
    server::run_process(|| async {
        let (grpc, grpc_address) = server::bind(config.grpc).await?;
        let (http, http_address) = server::bind(config.http).await?;
        let stages = Stages::connect(&config.stages)?;
        let gateway = Gateway::new(&config.options, stages)
            .await
            .map_err(|error| ServiceError::failed_precondition(error.to_string()))?;
        let shutdown = server::shutdown_signal()?;
        // The sockets take connections from here on.
        server::announce(&[("grpc", grpc_address), ("http", http_address)]);
        let listeners = Listeners { grpc, http };
        gateway::serve(gateway, listeners, config.common.drain_timeout, shutdown.cancelled_owned()).await
    })
}
