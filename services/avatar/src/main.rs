//! `avatar`: the whole system in one process.

use std::{process::ExitCode, time::Duration};

use avatar::{
    batch::{BatchFlags, batch},
    client::{self, flags::WatchFlags},
    config::{Cli, Command, GenerateFlags, WeightsCommand},
    devices,
    failure::{FAILED, Failure, WRONG_INPUT},
    generate::generate,
    plan, pressure,
    progress::Progress,
    serve,
    weights::{
        self,
        fetch::{FetchFlags, Report, fetch},
    },
};
use clap::Parser as _;
use service_kit::{
    config::{LogConfig, LogFormat},
    telemetry,
};
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Generate(flags) => run_generate(&flags),
        Command::Serve(flags) => run_serve(*flags),
        Command::Submit(flags) => call(flags.server.json, client::submit(&flags)),
        Command::Status(flags) => call(flags.server.json, client::status(&flags)),
        Command::Watch(flags) => run_watch(&flags),
        Command::List(flags) => call(flags.server.json, client::list(&flags)),
        Command::Cancel(flags) => call(flags.server.json, client::cancel(&flags)),
        Command::Delete(flags) => call(flags.server.json, client::delete(&flags)),
        Command::Download(flags) => call(flags.server.json, client::download(&flags)),
        Command::Batch(flags) => run_batch(&flags),
        Command::Devices(flags) => {
            telemetry::init(&LogConfig { filter: "warn".to_owned(), format: LogFormat::Text });
            devices::show(&flags);
            ExitCode::SUCCESS
        }
        Command::Pressure(flags) => call(flags.json, pressure::pressure(&flags)),
        Command::Plan(flags) => end(flags.json, plan::plan(&flags)),
        Command::Tiers(flags) => end(flags.json, plan::tiers(&flags)),
        Command::Weights(WeightsCommand::Fetch(flags)) => run_fetch(&flags),
        Command::Weights(WeightsCommand::Synth(flags)) => end(flags.json, weights::synth::synth(&flags)),
        Command::Weights(WeightsCommand::Convert(flags)) => end(flags.json, weights::convert::convert(&flags)),
        Command::Weights(WeightsCommand::Verify(flags)) => {
            let result = weights::verify::verify(&flags);
            if matches!(result, Ok(false)) {
                return ExitCode::from(FAILED);
            }
            end(flags.json, result.map(drop))
        }
    }
}

fn run_generate(flags: &GenerateFlags) -> ExitCode {
    telemetry::init(&LogConfig { filter: flags.log.clone(), format: LogFormat::Text });
    let mut progress = Progress::new(flags.json, flags.quiet);
    let result = start().and_then(|runtime| {
        let result = runtime.block_on(generate(flags, &mut progress));
        // The device's thread may be in the middle of a step that nobody waits for.
        runtime.shutdown_timeout(Duration::from_millis(200));
        result
    });
    match result {
        Ok(done) => {
            progress.completed(&done);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let exit = failure.exit;
            progress.failed(&failure);
            ExitCode::from(exit)
        }
    }
}

fn run_batch(flags: &BatchFlags) -> ExitCode {
    telemetry::init(&LogConfig { filter: flags.log.clone(), format: LogFormat::Text });
    let result = start().and_then(|runtime| {
        let result = runtime.block_on(batch(flags));
        // The device's thread may be in the middle of a step that nobody waits for.
        runtime.shutdown_timeout(Duration::from_millis(200));
        result
    });
    match result {
        Ok(exit) => ExitCode::from(exit),
        Err(failure) => end(flags.json, Err(failure)),
    }
}

fn run_fetch(flags: &FetchFlags) -> ExitCode {
    let mut report = Report::new(flags.json, flags.quiet);
    let result = start().and_then(|runtime| {
        let result = runtime.block_on(fetch(flags, &mut report));
        runtime.shutdown_timeout(Duration::from_millis(200));
        result
    });
    match result {
        Ok(done) => {
            report.completed(&done);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let exit = failure.exit;
            report.failed(&failure);
            ExitCode::from(exit)
        }
    }
}

fn run_serve(flags: serve::ServeFlags) -> ExitCode {
    let config = match flags.check() {
        Ok(config) => config,
        Err(mistakes) => {
            eprint!("{mistakes}");
            return ExitCode::from(WRONG_INPUT);
        }
    };
    telemetry::init(&config.common.log);
    let result = start().and_then(|runtime| {
        let result = runtime.block_on(serve::serve(config));
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure),
    }
}

fn start() -> Result<Runtime, Failure> {
    Runtime::new().map_err(|e| Failure { exit: FAILED, ..Failure::local("cannot start the runtime", e) })
}

/// Runs a command that talks to a server.
fn call(json: bool, command: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    end(json, start().and_then(|runtime| runtime.block_on(command)))
}

fn run_watch(flags: &WatchFlags) -> ExitCode {
    match start().and_then(|runtime| runtime.block_on(client::watch(flags))) {
        Ok(exit) => ExitCode::from(exit),
        Err(failure) => end(flags.server.json, Err(failure)),
    }
}

/// The end of a command that has shown its result.
fn end(json: bool, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            weights::failed(json, &failure);
            ExitCode::from(failure.exit)
        }
    }
}

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("{}", failure.sentence());
    ExitCode::from(failure.exit)
}
