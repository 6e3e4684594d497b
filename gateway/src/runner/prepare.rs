//! Reads a request's files and settles what is made of them.

use planner::{
    Request, Tier,
    clip::{ClipPlan, FPS, REFERENCE_WINDOW, SAMPLES_PER_FRAME, frames_of},
    size::{PictureSize, generation_size, reference_size},
    tiers::{Change, Wanted},
};
use proto::v1::{Generation, HeldTo, Parity, Progress};

use crate::{
    config::TierOptions,
    fault::{Fault, Kind},
    intake::Upload,
    media::{
        self,
        audio::{Audio, MODEL_RATE},
        picture::Picture,
    },
    planning::{Lowered, past_limits},
    sampler::{MOST_HEARD_FRAMES, ReferenceSpeech},
    validate::{MOST_AUDIO_SECONDS, Settings, face_inside},
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
    /// The tier's limits, where one was in force when it was accepted.
    pub(crate) held: Option<HeldTo>,
}

impl Prepared {
    /// Decodes the files, and holds the request to the tier's limits. Blocking.
    pub(crate) fn read(
        upload: &Upload,
        mut settings: Settings,
        max_audio_seconds: u32,
        tier: &TierOptions,
    ) -> Result<Self, Fault> {
        let (picture, mut audio) = decode(upload, &settings, max_audio_seconds)?;
        let held = match tier.limit() {
            Some(limit) => Some(within(limit, tier.allow_degrade, &mut settings, &mut audio)?),
            None => None,
        };
        Ok(Self::of(settings, picture, audio, held))
    }

    /// Decodes the files of a generation that was accepted; `held` is what it was held to then, whatever tier is in
    /// force now. Blocking.
    pub(crate) fn again(upload: &Upload, settings: Settings, held: Option<HeldTo>) -> Result<Self, Fault> {
        let (picture, mut audio) = decode(upload, &settings, MOST_AUDIO_SECONDS)?;
        if let Some(frames) = held.as_ref().and_then(|held| held.speech_frames) {
            cut_speech(&mut audio, frames as usize);
        }
        Ok(Self::of(settings, picture, audio, held))
    }

    fn of(settings: Settings, picture: Picture, audio: Audio, held: Option<HeldTo>) -> Self {
        let warnings = held.as_ref().map(|held| held.lowered.clone()).unwrap_or_default();
        let window = held.as_ref().map_or(REFERENCE_WINDOW, |held| held.window_latent_frames.max(2) as usize);
        let frames = (audio.samples.len() / SAMPLES_PER_FRAME).max(1);
        if settings.parity == Parity::Reference {
            let prepared = Self::by_the_reference(settings, picture, audio, frames);
            return Self { warnings: [warnings, prepared.warnings].concat(), held, ..prepared };
        }
        let size = generation_size(settings.size, picture.width, picture.height);
        let plan = ClipPlan::new(frames, settings.min_frames as usize, window);
        Self { settings, picture, audio, size, plan, heard: frames, warnings, held }
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
            cut_soundtrack(&mut audio, plan.frames);
        }
        Self { settings, picture, audio, size, plan, heard, warnings, held: None }
    }

    /// What is made, as the planner takes it.
    pub(crate) fn request(&self) -> Request {
        let (size, settings) = (self.size, &self.settings);
        // The reference denoises no fewer frames than one window has.
        let frames = match settings.parity {
            Parity::Reference => self.plan.frames.max(frames_of(REFERENCE_WINDOW)),
            Parity::Unspecified => self.plan.frames,
        };
        Request {
            size: Some(size),
            frames: u32::try_from(frames).ok(),
            steps: Some(settings.steps),
            prompt_tokens: None,
            branches: Some(if settings.guidance_scale > 1.0 { 2 } else { 1 }),
            no_feature_cache: settings.no_feature_cache,
        }
    }

    /// The same in a smaller size, or less of it, as memory does not hold more.
    pub(crate) fn lowered(self, to: Lowered) -> Self {
        let Self { mut settings, picture, mut audio, held, .. } = self;
        settings.size = settings.size.min(to.size);
        cut_speech(&mut audio, to.frames as usize);
        let window_latent_frames = REFERENCE_WINDOW as u32;
        let mut held = held.unwrap_or(HeldTo { window_latent_frames, ..HeldTo::default() });
        held.speech_frames = Some(held.speech_frames.map_or(to.frames, |frames| frames.min(to.frames)));
        held.lowered.push(to.said);
        Self::of(settings, picture, audio, Some(held))
    }

    /// The generation as it is before it starts.
    pub(crate) fn generation(&self) -> Generation {
        Generation {
            spec: Some(self.settings.to_spec()),
            tier: self.held.clone(),
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

fn decode(upload: &Upload, settings: &Settings, max_audio_seconds: u32) -> Result<(Picture, Audio), Fault> {
    let picture = media::picture::decode(&upload.picture).map_err(refused)?;
    if let Some(face) = &settings.face {
        face_inside(face, picture.width, picture.height)?;
    }
    let audio = media::audio::decode(upload.audio.clone(), f64::from(max_audio_seconds)).map_err(refused)?;
    Ok((picture, audio))
}

/// Leaves of the speech, and of the sound in the video, so many frames.
fn cut_speech(audio: &mut Audio, frames: usize) {
    audio.samples.truncate(frames * SAMPLES_PER_FRAME);
    cut_soundtrack(audio, frames);
}

/// Leaves of the sound that is heard in the video what goes with so many frames.
fn cut_soundtrack(audio: &mut Audio, frames: usize) {
    let track = &mut audio.soundtrack;
    let samples = frames * track.rate as usize / FPS as usize;
    track.samples.truncate(samples * track.channels as usize);
}

/// Holds a request to a tier's limits; says which they are, and what is lowered.
///
/// Errors: a value is past its limit and may not be lowered.
fn within(tier: &Tier, lower: bool, settings: &mut Settings, audio: &mut Audio) -> Result<HeldTo, Fault> {
    let wanted = Wanted {
        size: settings.size,
        steps: settings.steps,
        seconds: audio.samples.len() as f64 / f64::from(MODEL_RATE),
        window_frames: (settings.parity == Parity::Reference).then_some(frames_of(REFERENCE_WINDOW) as u32),
    };
    let excesses = tier.excesses(&wanted);
    if !excesses.is_empty() && !lower {
        return Err(past_limits(&excesses));
    }
    let (lowered, changes) = tier.lowered(&wanted).map_err(|excess| past_limits(&[excess]))?;
    settings.size = lowered.size;
    settings.steps = lowered.steps;
    let cut = changes.iter().any(|change: &Change| change.field == "audio");
    let speech_frames = cut.then_some((lowered.seconds * f64::from(FPS)) as u32);
    if let Some(frames) = speech_frames {
        cut_speech(audio, frames as usize);
    }
    let said: Vec<String> = changes.iter().map(|change| format!("Tier {}: {change}.", tier.name)).collect();
    for sentence in &said {
        tracing::warn!(tier = tier.name, "{sentence}");
    }
    let window_latent_frames = tier.limits.window() as u32;
    Ok(HeldTo { name: tier.name.clone(), window_latent_frames, speech_frames, lowered: said })
}

/// What the media code refused, as the caller's fault where it is.
pub(crate) fn refused(error: media::Error) -> Fault {
    match error {
        media::Error::InvalidInput { field, reason } => Fault::in_field(Kind::UnusableMedia, field, reason),
        media::Error::Tool { .. } => Fault::new(Kind::Precondition, error.to_string()),
        media::Error::Io { .. } | media::Error::Frames(_) => Fault::internal("the video cannot be written", &error),
    }
}
