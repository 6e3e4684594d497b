//! The service's settings: those of every stage, on a port of its own, and the form of its weights.

use clap::{Command, CommandFactory as _, Parser};
use model::checkpoint::Choice;
use service_kit::config::{Mistakes, Settings, StageConfig, StageFlags};

/// Where the service listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:50054";

/// The diffusion service: noisy latents to velocities.
#[derive(Debug, Parser)]
#[command(name = "diffusion", version)]
pub struct Flags {
    #[command(flatten)]
    stage: StageFlags,
    /// Form in which the transformer's weights are taken, where the official download has several: `bf16`, `fp8`,
    /// `int8`, or `auto` for the most exact that is there. Another form than the chosen one is refused.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    weights: String,
}

/// What [`Flags`] say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What every stage has.
    pub stage: StageConfig,
    /// The form of the transformer's weights.
    pub weights: Choice,
}

impl Settings for Flags {
    type Config = Config;

    fn with_defaults() -> Command {
        Self::command().mut_arg("listen", |listen| listen.default_value(DEFAULT_LISTEN))
    }

    fn resolve(self, mistakes: &mut Mistakes) -> Option<Config> {
        let weights = mistakes.check("--weights", &self.weights, str::parse);
        let stage = self.stage.resolve(mistakes);
        Some(Config { stage: stage?, weights: weights? })
    }
}
