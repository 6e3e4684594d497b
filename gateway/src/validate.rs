//! Checks what a caller asks for, and resolves what it leaves open.

use std::{fmt::Display, ops::RangeInclusive};

use proto::v1::{FaceBox, GenerationDefaults, GenerationSpec, Parity, Stage};

use crate::fault::{Fault, Kind, Violation};

/// Most bytes of a prompt.
pub const PROMPT_BYTES: usize = 10_000;
/// Most bytes of a picture's file.
pub const PICTURE_BYTES: usize = 32 << 20;
/// Most bytes of a recording's file.
pub const AUDIO_BYTES: usize = 128 << 20;

/// Longest recording that any gateway takes, in seconds.
pub const MOST_AUDIO_SECONDS: u32 = 600;

const STEPS: RangeInclusive<u32> = 1..=200;
const SIZE: RangeInclusive<u32> = 64..=1280;
const GUIDANCE_SCALE: RangeInclusive<f32> = 1.0..=20.0;
const FLOW_SHIFT: RangeInclusive<f32> = 0.1..=20.0;
const MIN_FRAMES: RangeInclusive<u32> = 1..=400;

/// A specification whose every value is checked and set.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What the person does.
    pub prompt: String,
    /// Seeds the noise.
    pub seed: u64,
    /// Denoise steps.
    pub steps: u32,
    /// Shorter side in pixels, before rounding to the grid.
    pub size: u32,
    /// Guidance scale.
    pub guidance_scale: f32,
    /// Shift of the time grid.
    pub flow_shift: f32,
    /// Frames denoised at least; unused under the reference's rules.
    pub min_frames: u32,
    /// The caller's face box, in pixels of the upright picture.
    pub face: Option<FaceBox>,
    /// Whose rules hold.
    pub parity: Parity,
    /// Cut a prompt of too many tokens.
    pub truncate_prompt: bool,
    /// Run every step in full.
    pub no_feature_cache: bool,
}

impl Settings {
    /// The settings as the contract's message.
    #[must_use]
    pub fn to_spec(&self) -> GenerationSpec {
        GenerationSpec {
            prompt: self.prompt.clone(),
            seed: Some(self.seed),
            steps: Some(self.steps),
            size: Some(self.size),
            guidance_scale: Some(self.guidance_scale),
            flow_shift: Some(self.flow_shift),
            // Under the reference's rules it is no setting, and would be refused if it came back.
            min_frames: (self.parity != Parity::Reference).then_some(self.min_frames),
            face: self.face,
            parity: self.parity.into(),
            truncate_prompt: self.truncate_prompt,
            no_feature_cache: self.no_feature_cache,
        }
    }
}

/// Checks every value that the caller gave; all violations are reported together.
///
/// The face is checked against the picture later, by [`face_inside`].
pub fn check(spec: &GenerationSpec) -> Result<(), Fault> {
    let mut wrong = Vec::new();
    let mut note = |field: &str, message: Option<String>| {
        wrong.extend(message.map(|message| Violation { field: field.into(), message }));
    };
    note("prompt", prompt(&spec.prompt));
    note("steps", outside(spec.steps, &STEPS));
    note("size", outside(spec.size, &SIZE));
    note("guidance_scale", outside(spec.guidance_scale, &GUIDANCE_SCALE));
    note("flow_shift", outside(spec.flow_shift, &FLOW_SHIFT));
    note("min_frames", outside(spec.min_frames, &MIN_FRAMES));
    note("face", spec.face.as_ref().and_then(face_shape));
    match (Parity::try_from(spec.parity), spec.min_frames) {
        (Err(_), _) => note("parity", Some(format!("{} is no rule; accepted is PARITY_REFERENCE", spec.parity))),
        (Ok(Parity::Reference), Some(frames)) => {
            note("parity", Some("reference has its own rule for the frames that are denoised".into()));
            note("min_frames", Some(format!("{frames} together with parity reference; give one of them")));
        }
        (Ok(Parity::Reference | Parity::Unspecified), _) => {}
    }
    if wrong.is_empty() { Ok(()) } else { Err(Fault::of_violations(Kind::Invalid, wrong)) }
}

/// Whether the caller left a value open that a checkpoint may have an opinion on.
#[must_use]
pub fn needs_defaults(spec: &GenerationSpec) -> bool {
    spec.steps.is_none() || spec.size.is_none() || spec.guidance_scale.is_none() || spec.flow_shift.is_none()
}

/// Fills a checked specification's open values: from the checkpoint, else the contract's own.
///
/// Errors: the checkpoint asks for a value outside the allowed range.
pub fn resolve(spec: GenerationSpec, defaults: &GenerationDefaults) -> Result<Settings, Fault> {
    let bad = [
        ("steps", outside(defaults.steps, &STEPS)),
        ("size", outside(defaults.size, &SIZE)),
        ("guidance_scale", outside(defaults.guidance_scale, &GUIDANCE_SCALE)),
        ("flow_shift", outside(defaults.flow_shift, &FLOW_SHIFT)),
    ];
    if let Some((field, message)) = bad.into_iter().find_map(|(field, message)| Some((field, message?))) {
        let message = format!("the checkpoint's default for {field} is {message}");
        return Err(Fault::new(Kind::Precondition, message).at(Stage::Diffusion));
    }
    Ok(Settings {
        seed: spec.seed.unwrap_or(128),
        steps: spec.steps.or(defaults.steps).unwrap_or(50),
        size: spec.size.or(defaults.size).unwrap_or(704),
        guidance_scale: spec.guidance_scale.or(defaults.guidance_scale).unwrap_or(7.5),
        flow_shift: spec.flow_shift.or(defaults.flow_shift).unwrap_or(5.0),
        min_frames: spec.min_frames.unwrap_or(1),
        parity: spec.parity(),
        truncate_prompt: spec.truncate_prompt,
        no_feature_cache: spec.no_feature_cache,
        face: spec.face.map(|face| FaceBox { score: None, ..face }),
        prompt: spec.prompt,
    })
}

/// Checks that a face box lies inside the upright picture of `width` x `height` pixels.
pub fn face_inside(face: &FaceBox, width: u32, height: u32) -> Result<(), Fault> {
    let inside = face.x >= 0.0
        && face.y >= 0.0
        && face.x + face.width <= f64::from(width)
        && face.y + face.height <= f64::from(height);
    if inside {
        return Ok(());
    }
    Err(Fault::invalid(
        "face",
        format!(
            "{},{},{},{} (x,y,width,height) leaves the picture of {width}x{height} pixels",
            face.x, face.y, face.width, face.height
        ),
    ))
}

fn prompt(prompt: &str) -> Option<String> {
    if prompt.len() > PROMPT_BYTES {
        return Some(format!("{} bytes; the limit is {PROMPT_BYTES}", prompt.len()));
    }
    prompt.find('\0').map(|at| format!("has a NUL character at byte {at}"))
}

/// What is wrong with a value that must lie in a range; NaN lies in none.
fn outside<T: PartialOrd + Display>(value: Option<T>, range: &RangeInclusive<T>) -> Option<String> {
    value
        .filter(|value| !range.contains(value))
        .map(|value| format!("{value}; allowed are {} to {}", range.start(), range.end()))
}

fn face_shape(face: &FaceBox) -> Option<String> {
    let numbers = [("x", face.x), ("y", face.y), ("width", face.width), ("height", face.height)];
    if let Some((name, value)) = numbers.into_iter().find(|(_, value)| !value.is_finite()) {
        return Some(format!("{name} is {value}; it must be a finite number of pixels"));
    }
    numbers[2..]
        .iter()
        .find(|(_, value)| *value <= 0.0)
        .map(|(name, value)| format!("{name} is {value}; it must be more than 0 pixels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(spec: &GenerationSpec) -> Vec<String> {
        check(spec).err().map(|f| f.violations.into_iter().map(|v| v.field).collect()).unwrap_or_default()
    }

    #[test]
    fn every_wrong_value_is_named_at_once() {
        let spec = GenerationSpec {
            prompt: "x".repeat(PROMPT_BYTES + 1),
            steps: Some(0),
            size: Some(63),
            guidance_scale: Some(f32::NAN),
            flow_shift: Some(20.5),
            min_frames: Some(401),
            face: Some(FaceBox { x: 1.0, y: 1.0, width: 0.0, height: 5.0, score: None }),
            ..Default::default()
        };
        assert_eq!(fields(&spec), ["prompt", "steps", "size", "guidance_scale", "flow_shift", "min_frames", "face"]);
        let message = check(&spec).unwrap_err().message;
        assert!(message.contains("steps: 0; allowed are 1 to 200"), "{message}");
        assert!(message.contains("prompt: 10001 bytes; the limit is 10000"), "{message}");
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        for (steps, size, guidance, shift, frames) in [(1, 64, 1.0, 0.1, 1), (200, 1280, 20.0, 20.0, 400)] {
            let spec = GenerationSpec {
                prompt: "é".repeat(PROMPT_BYTES / 2),
                steps: Some(steps),
                size: Some(size),
                guidance_scale: Some(guidance),
                flow_shift: Some(shift),
                min_frames: Some(frames),
                ..Default::default()
            };
            assert!(fields(&spec).is_empty(), "{spec:?}");
        }
    }

    #[test]
    fn a_callers_value_wins_over_the_checkpoints_and_that_over_ours() {
        let defaults = GenerationDefaults { size: Some(96), steps: Some(6), ..Default::default() };
        let spec = GenerationSpec { steps: Some(9), ..Default::default() };
        let settings = resolve(spec, &defaults).unwrap();
        assert_eq!((settings.steps, settings.size, settings.guidance_scale, settings.seed), (9, 96, 7.5, 128));
    }

    #[test]
    fn a_face_outside_the_picture_is_refused_with_its_size() {
        let face = FaceBox { x: 90.0, y: 0.0, width: 20.0, height: 20.0, score: None };
        let fault = face_inside(&face, 100, 100).unwrap_err();
        assert!(fault.message.contains("100x100"), "{fault}");
        assert!(face_inside(&face, 110, 100).is_ok());
    }

    #[test]
    fn the_references_rules_leave_no_choice_of_frames() {
        let spec = GenerationSpec { parity: Parity::Reference.into(), ..Default::default() };
        assert!(fields(&spec).is_empty());
        let echoed = resolve(spec.clone(), &GenerationDefaults::default()).unwrap().to_spec();
        assert!(echoed.parity() == Parity::Reference && fields(&echoed).is_empty(), "{echoed:?}");
        let both = GenerationSpec { min_frames: Some(129), ..spec };
        assert_eq!(fields(&both), ["parity", "min_frames"]);
        let message = check(&both).unwrap_err().message;
        assert!(message.contains("min_frames: 129 together with parity reference"), "{message}");
        assert_eq!(fields(&GenerationSpec { parity: 7, ..Default::default() }), ["parity"]);
    }

    #[test]
    fn a_nul_or_a_number_that_is_none_is_refused() {
        assert_eq!(fields(&GenerationSpec { prompt: "a\0b".into(), ..Default::default() }), ["prompt"]);
        let face = FaceBox { x: f64::INFINITY, y: 0.0, width: 1.0, height: 1.0, score: None };
        assert_eq!(fields(&GenerationSpec { face: Some(face), ..Default::default() }), ["face"]);
    }
}
