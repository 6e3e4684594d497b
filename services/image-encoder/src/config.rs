//! The service's settings: those of every stage, on a port of its own, and what finds faces.

use std::path::PathBuf;

use clap::{Command, CommandFactory as _, Parser};
use model::image::Detector;
use service_kit::config::{Mistakes, Settings, StageConfig, StageFlags};

/// Where the service listens unless told otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:50053";

/// The image encoder: picture to reference latents and face mask.
#[derive(Debug, Parser)]
#[command(name = "image-encoder", version)]
pub struct Flags {
    #[command(flatten)]
    stage: StageFlags,
    /// Face detector to use instead of the built-in one: an ONNX file of UltraFace, YuNet, SCRFD or YOLO-face.
    #[arg(long, env = "AVATAR_FACE_MODEL", value_name = "FILE")]
    face_model: Option<PathBuf>,
}

/// What [`Flags`] say.
#[derive(Debug, Clone)]
pub struct Config {
    /// What every stage has.
    pub stage: StageConfig,
    /// What finds faces.
    pub detector: Detector,
}

impl Settings for Flags {
    type Config = Config;

    fn with_defaults() -> Command {
        Self::command().mut_arg("listen", |listen| listen.default_value(DEFAULT_LISTEN))
    }

    fn resolve(self, mistakes: &mut Mistakes) -> Option<Config> {
        let detector = Detector::open(self.face_model.as_deref());
        if let Err(error) = &detector {
            mistakes.note(format!("--face-model: {error}"));
        }
        Some(Config { stage: self.stage.resolve(mistakes)?, detector: detector.ok()? })
    }
}
