//! `avatar`: the whole system in one process.

use std::{process::ExitCode, time::Duration};

use avatar::{
    config::{Cli, Command, GenerateFlags, WeightsCommand},
    failure::{FAILED, Failure},
    generate::generate,
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
        Command::Serve(flags) => run_serve(flags),
        Command::Weights(WeightsCommand::Fetch(flags)) => run_fetch(&flags),
        Command::Weights(WeightsCommand::Synth(flags)) => match weights::synth::synth(&flags) {
            Ok(summary) => {
                println!("{summary}");
                ExitCode::SUCCESS
            }
            Err(failure) => fail(&failure),
        },
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
            return ExitCode::from(serve::EXIT_SETTINGS);
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

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("{}", failure.sentence());
    ExitCode::from(failure.exit)
}
