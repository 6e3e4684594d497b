//! The service's settings: those of every stage, on a port of its own, and the form of its weights.

use clap::{Command, CommandFactory as _, Parser};
use model::checkpoint::Choice;
use service_kit::{
    config::{Mistakes, Settings, StageConfig, StageFlags},
    hardware::DeviceConfig,
};

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
    /// Devices besides the stage's first one that its blocks are spread over, in the order in which they work.
    pub others: Vec<DeviceConfig>,
    /// Blocks of the first device and each of the others; where nothing is said, they are divided so that as many as
    /// possible find room in what the devices may hold.
    pub blocks: Vec<u64>,
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
        let (stage, others) = self.stage.resolve_spread(mistakes).unzip();
        Some(Config { stage: stage?, others: others?, blocks: Vec::new(), weights: weights? })
    }
}
