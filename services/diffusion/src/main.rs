//! The process: settings, log, address, then serving until SIGTERM.

use std::process::ExitCode;

use diffusion::config::Flags;
use service_kit::{config, server, telemetry};

fn main() -> ExitCode {
    let config = config::parse_or_exit::<Flags>();
    telemetry::init(&config.stage.common.log);
    server::run_process(|| async {
        let shutdown = server::shutdown_signal()?;
        let (listener, address) = server::bind(config.stage.listen).await?;
        server::announce(&[("grpc", address)]);
        diffusion::serve(config, server::tcp(listener), shutdown).await
    })
}
