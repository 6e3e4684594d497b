//! Takes in a request's specification and files, within the limits.

use std::ops::RangeInclusive;

use proto::v1::GenerationSpec;

use crate::{
    fault::{Fault, Kind, Violation},
    validate::{self, AUDIO_BYTES, PICTURE_BYTES},
};

/// A request that is all there. Its values are checked, its files are not read yet.
#[derive(Debug)]
pub struct Upload {
    /// What the caller asks for.
    pub spec: GenerationSpec,
    /// The picture's file.
    pub picture: Vec<u8>,
    /// The recording's file.
    pub audio: Vec<u8>,
    /// How it is to be served.
    pub order: Order,
}

/// How a request is to be served: who asks, how urgent it is, and how a repetition is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Order {
    /// Who asks, by a name of its own choice; callers take turns. Empty for none.
    pub caller: String,
    /// Higher ones come first.
    pub priority: i64,
    /// The caller's key for this request, so that sending it again makes no second generation; empty for none.
    pub idempotency_key: String,
    /// Whom to call back at the end; empty for nobody.
    pub webhook: String,
    /// The caller's own word for it, by which it can be listed; empty for none.
    pub label: String,
    /// Seconds in which it must have ended; without it there is the server's own limit, if any.
    pub deadline_seconds: Option<u64>,
}

impl Order {
    /// Checks the values that came.
    ///
    /// Errors: a name is too long or has other characters than visible ASCII, or the priority is none; all violations
    /// are reported together.
    pub fn read(caller: &str, priority: &str, idempotency_key: &str) -> Result<Self, Fault> {
        let level = if priority.is_empty() { Some(0) } else { priority.trim().parse().ok() };
        let level = level.filter(|level| PRIORITIES.contains(level));
        let no_level = || format!("{priority:?}; allowed are {} to {}", PRIORITIES.start(), PRIORITIES.end());
        let wrong: Vec<Violation> = [
            ("caller", visible(caller, CALLER_BYTES)),
            ("priority", if level.is_some() { None } else { Some(no_level()) }),
            ("idempotency_key", visible(idempotency_key, KEY_BYTES)),
        ]
        .into_iter()
        .filter_map(|(field, message)| Some(Violation { field: field.into(), message: message? }))
        .collect();
        match level {
            Some(priority) if wrong.is_empty() => {
                let (caller, idempotency_key) = (caller.to_owned(), idempotency_key.to_owned());
                Ok(Self { caller, priority, idempotency_key, ..Self::default() })
            }
            _ => Err(Fault::of_violations(Kind::Invalid, wrong)),
        }
    }
}

impl Order {
    /// The same with an address to call back, which is looked at where it is known who may be called.
    #[must_use]
    pub fn calling(self, webhook: &str) -> Self {
        Self { webhook: webhook.to_owned(), ..self }
    }

    /// The same with a label.
    ///
    /// Errors: it is too long or has other characters than visible ASCII.
    pub fn labelled(self, label: &str) -> Result<Self, Fault> {
        match visible(label, LABEL_BYTES) {
            Some(message) => Err(Fault::invalid("label", message)),
            None => Ok(Self { label: label.to_owned(), ..self }),
        }
    }

    /// The same with a deadline in seconds; an empty one is none.
    ///
    /// Errors: it is no number in the range.
    pub fn within(self, deadline: &str) -> Result<Self, Fault> {
        if deadline.is_empty() {
            return Ok(self);
        }
        let seconds = deadline.trim().parse::<u64>().ok().filter(|seconds| DEADLINE_SECONDS.contains(seconds));
        let (least, most) = (DEADLINE_SECONDS.start(), DEADLINE_SECONDS.end());
        let no_deadline = || Fault::invalid("deadline", format!("{deadline:?}; allowed are {least} to {most} seconds"));
        Ok(Self { deadline_seconds: Some(seconds.ok_or_else(no_deadline)?), ..self })
    }
}

/// What is wrong with a name that must be short and visible.
fn visible(name: &str, limit: usize) -> Option<String> {
    if name.len() > limit {
        return Some(format!("{} bytes; the limit is {limit}", name.len()));
    }
    let at = name.bytes().position(|byte| !byte.is_ascii_graphic())?;
    Some(format!("byte {at} is no visible ASCII character"))
}

/// Seconds that a caller can give a generation: up to 30 days.
const DEADLINE_SECONDS: RangeInclusive<u64> = 1..=2_592_000;
/// Priorities that a caller can give.
const PRIORITIES: RangeInclusive<i64> = -9..=9;
/// Most bytes of a caller's name.
const CALLER_BYTES: usize = 64;
/// Most bytes of a label.
const LABEL_BYTES: usize = 64;
/// Most bytes of a caller's key.
const KEY_BYTES: usize = 255;

/// One file of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum File {
    /// The picture.
    Picture,
    /// The recording.
    Audio,
}

impl File {
    /// The field's name in violations.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Picture => "picture",
            Self::Audio => "audio",
        }
    }

    /// Most bytes that are taken.
    #[must_use]
    pub fn limit(self) -> usize {
        match self {
            Self::Picture => PICTURE_BYTES,
            Self::Audio => AUDIO_BYTES,
        }
    }
}

/// Collects an upload piece by piece. Memory grows with what arrives, up to the limits.
#[derive(Debug, Default)]
pub struct Intake {
    spec: Option<GenerationSpec>,
    picture: Vec<u8>,
    audio: Vec<u8>,
}

impl Intake {
    /// Takes the specification and checks its values.
    ///
    /// Errors: it came before, or a value is not allowed.
    pub fn spec(&mut self, spec: GenerationSpec) -> Result<(), Fault> {
        if self.spec.is_some() {
            return Err(Fault::new(Kind::Invalid, "the specification came twice; it is sent once, first"));
        }
        validate::check(&spec)?;
        self.spec = Some(spec);
        Ok(())
    }

    /// Takes the next bytes of a file.
    ///
    /// Errors: the specification has not come yet, or the file passes its limit.
    pub fn bytes(&mut self, file: File, bytes: &[u8]) -> Result<(), Fault> {
        if self.spec.is_none() {
            return Err(Fault::new(Kind::Invalid, "the specification must come first, before the files' bytes"));
        }
        let into = match file {
            File::Picture => &mut self.picture,
            File::Audio => &mut self.audio,
        };
        if into.len() + bytes.len() > file.limit() {
            return Err(too_large(file));
        }
        into.extend_from_slice(bytes);
        Ok(())
    }

    /// Ends the upload, which is to be served so.
    ///
    /// Errors: the specification or a file is missing; both missing files are reported together.
    pub fn finish(self, order: Order) -> Result<Upload, Fault> {
        let Some(spec) = self.spec else {
            return Err(Fault::new(Kind::Invalid, "the request has no specification; it must be the first message"));
        };
        let empty: Vec<Violation> = [(File::Picture, &self.picture), (File::Audio, &self.audio)]
            .into_iter()
            .filter(|(_, bytes)| bytes.is_empty())
            .map(|(file, _)| Violation { field: file.field().into(), message: "0 bytes; a file is needed".into() })
            .collect();
        if !empty.is_empty() {
            return Err(Fault::of_violations(Kind::Invalid, empty));
        }
        Ok(Upload { spec, picture: self.picture, audio: self.audio, order })
    }
}

/// The refusal of a file over its limit.
#[must_use]
pub fn too_large(file: File) -> Fault {
    Fault::in_field(Kind::TooLarge, file.field(), format!("more than {} MiB, the limit", file.limit() >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_over_its_limit_is_refused_while_it_arrives() {
        let mut intake = Intake::default();
        intake.spec(GenerationSpec::default()).unwrap();
        let chunk = vec![0; 1 << 20];
        for _ in 0..32 {
            intake.bytes(File::Picture, &chunk).unwrap();
        }
        let fault = intake.bytes(File::Picture, &[0]).unwrap_err();
        assert_eq!((fault.kind, fault.field()), (Kind::TooLarge, Some("picture")));
        assert!(fault.message.contains("32 MiB"), "{fault}");
    }

    #[test]
    fn an_order_has_short_visible_names_and_a_small_priority() {
        for key in ["", "a", "0190163d-8694-739b-aea5-966c26f8ad91", &"k".repeat(255)] {
            assert_eq!(Order::read("", "", key).unwrap(), Order { idempotency_key: key.into(), ..Order::default() });
        }
        assert_eq!(Order::read("studio", "-9", "").unwrap().priority, -9);
        for key in ["a b", "é", "\n", &"k".repeat(256)] {
            assert_eq!(Order::read("", "", key).unwrap_err().field(), Some("idempotency_key"), "{key:?}");
        }
        let fault = Order::read(&"c".repeat(65), "10", "").unwrap_err();
        assert_eq!(fault.violations.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), ["caller", "priority"]);
        assert!(Order::read("", "high", "").is_err());
        assert_eq!(Order::default().labelled("scene-7").unwrap().label, "scene-7");
        for wrong in ["scene 7", &"l".repeat(65)] {
            assert_eq!(Order::default().labelled(wrong).unwrap_err().field(), Some("label"), "{wrong}");
        }
        assert_eq!(Order::default().within("90").unwrap().deadline_seconds, Some(90));
        for wrong in ["0", "-1", "2592001", "soon", "1e3"] {
            assert_eq!(Order::default().within(wrong).unwrap_err().field(), Some("deadline"), "{wrong}");
        }
    }

    #[test]
    fn order_and_completeness_are_checked() {
        assert!(Intake::default().bytes(File::Audio, b"x").is_err(), "bytes before the specification");
        assert!(Intake::default().finish(Order::default()).is_err(), "nothing at all");
        let mut intake = Intake::default();
        intake.spec(GenerationSpec::default()).unwrap();
        assert!(intake.spec(GenerationSpec::default()).is_err(), "twice");
        let fault = intake.finish(Order::default()).unwrap_err();
        assert_eq!(fault.violations.len(), 2);
    }
}
