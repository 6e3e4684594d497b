//! The service's settings: those of every stage, on a port of its own.

use clap::{Command, CommandFactory as _, Parser};
use service_kit::config::{Mistakes, Settings, StageConfig, StageFlags};

/// Where the service listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:50051";

/// The audio encoder: speech to features.
#[derive(Debug, Parser)]
#[command(name = "audio-encoder", version)]
pub struct Flags {
    #[command(flatten)]
    stage: StageFlags,
}

impl Settings for Flags {
    type Config = StageConfig;

    fn with_defaults() -> Command {
        Self::command().mut_arg("listen", |listen| listen.default_value(DEFAULT_LISTEN))
    }

    fn resolve(self, mistakes: &mut Mistakes) -> Option<StageConfig> {
        self.stage.resolve(mistakes)
    }
}
