//! Reads a request's files and settles what is made of them.

use planner::{
    clip::{ClipPlan, FPS, REFERENCE_WINDOW, SAMPLES_PER_FRAME, frames_of},
    size::{PictureSize, generation_size, reference_size},
};
use proto::v1::{Generation, Parity, Progress};

use crate::{
    fault::{Fault, Kind},
    intake::Upload,
    media::{
        self,
        audio::{Audio, MODEL_RATE},
        picture::Picture,
    },
    sampler::{MOST_HEARD_FRAMES, ReferenceSpeech},
    validate::{Settings, face_inside},
};

/// Samples that the reference's audio encoder takes: 30 s, filled with silence. Features past the end of the speech
/// are then those of silence, and not zero.
const REFERENCE_SAMPLES: usize = 30 * MODEL_RATE as usize;

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
    /// Frames of the speech that are heard, from the first.
    pub(crate) heard: usize,
    /// What the caller should know, in sentences.
    pub(crate) warnings: Vec<String>,
}

impl Prepared {
    /// Decodes the files. Blocking.
    pub(crate) fn read(upload: &Upload, settings: Settings, max_audio_seconds: u32) -> Result<Self, Fault> {
        let picture = media::picture::decode(&upload.picture).map_err(refused)?;
        if let Some(face) = &settings.face {
            face_inside(face, picture.width, picture.height)?;
        }
        let audio = media::audio::decode(upload.audio.clone(), f64::from(max_audio_seconds)).map_err(refused)?;
        let frames = (audio.samples.len() / SAMPLES_PER_FRAME).max(1);
        if settings.parity == Parity::Reference {
            return Ok(Self::by_the_reference(settings, picture, audio, frames));
        }
        let size = generation_size(settings.size, picture.width, picture.height);
        let plan = ClipPlan::new(frames, settings.min_frames as usize, REFERENCE_WINDOW);
        Ok(Self { settings, picture, audio, size, plan, heard: frames, warnings: Vec::new() })
    }

    /// Follows the reference's rules for the size and for speech of `frames` frames; says what they cut.
    fn by_the_reference(settings: Settings, picture: Picture, mut audio: Audio, frames: usize) -> Self {
        let size = reference_size(settings.size, picture.width, picture.height);
        let ReferenceSpeech { heard, clip: plan, .. } = ReferenceSpeech::new(frames);
        audio.samples.resize(REFERENCE_SAMPLES, 0.0);
        let seconds = |frames: usize| frames as f64 / f64::from(FPS);
        let mut warnings = Vec::new();
        if heard < frames {
            warnings.push(format!(
                "The speech has {frames} frames ({:.2} s); with parity reference the first {MOST_HEARD_FRAMES} \
                ({:.2} s) are heard, and the video has {} frames ({:.2} s). Leave parity out to keep all of it.",
                seconds(frames),
                seconds(heard),
                plan.frames,
                seconds(plan.frames),
            ));
        }
        if plan.frames < frames {
            let track = &mut audio.soundtrack;
            let samples = plan.frames * track.rate as usize / FPS as usize;
            track.samples.truncate(samples * track.channels as usize);
        }
        Self { settings, picture, audio, size, plan, heard, warnings }
    }

    /// The generation as it is before it starts.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            spec: Some(self.settings.to_spec()),
            width: self.size.width,
            height: self.size.height,
            frames: self.plan.frames as u32,
            heard_frames: self.heard as u32,
            denoised_frames: frames_of(self.plan.latent_frames) as u32,
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
