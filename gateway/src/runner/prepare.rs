//! Reads a request's files and settles what is made of them.

use planner::{
    clip::{ClipPlan, REFERENCE_WINDOW, SAMPLES_PER_FRAME},
    size::{PictureSize, generation_size},
};
use proto::v1::{Generation, Progress};

use crate::{
    fault::{Fault, Kind},
    intake::Upload,
    media::{self, audio::Audio, picture::Picture},
    validate::{Settings, face_inside},
};

/// All that a generation starts from.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// What is asked for, all defaults resolved.
    pub(crate) settings: Settings,
    /// The upright picture.
    pub(crate) picture: Picture,
    /// The speech.
    pub(crate) audio: Audio,
    /// Size of the video.
    pub(crate) size: PictureSize,
    /// Frames, latent frames and windows.
    pub(crate) plan: ClipPlan,
}

impl Prepared {
    /// Decodes the files. Blocking.
    pub(crate) fn read(upload: Upload, settings: Settings, max_audio_seconds: u32) -> Result<Self, Fault> {
        let picture = media::picture::decode(&upload.picture).map_err(refused)?;
        if let Some(face) = &settings.face {
            face_inside(face, picture.width, picture.height)?;
        }
        let audio = media::audio::decode(upload.audio, f64::from(max_audio_seconds)).map_err(refused)?;
        let size = generation_size(settings.size, picture.width, picture.height);
        let frames = (audio.samples.len() / SAMPLES_PER_FRAME).max(1);
        let plan = ClipPlan::new(frames, settings.min_frames as usize, REFERENCE_WINDOW);
        Ok(Self { settings, picture, audio, size, plan })
    }

    /// The generation as it is before it starts.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            spec: Some(self.settings.to_spec()),
            width: self.size.width,
            height: self.size.height,
            frames: self.plan.frames as u32,
            progress: Some(Progress { steps: self.settings.steps, ..Progress::default() }),
            ..Generation::default()
        }
    }
}

/// What the media code refused, as the caller's fault where it is.
pub(crate) fn refused(error: media::Error) -> Fault {
    match error {
        media::Error::InvalidInput { field, reason } => Fault::in_field(Kind::UnusableMedia, field, reason),
        media::Error::Tool { .. } => Fault::new(Kind::Precondition, error.to_string()),
        media::Error::Io { .. } | media::Error::Frames(_) => Fault::internal("the video cannot be written", &error),
    }
}
