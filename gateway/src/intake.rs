//! Takes in a request's specification and files, within the limits.

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
    /// The caller's key for this request, so that sending it again makes no second generation; empty for none.
    pub idempotency_key: String,
}

/// Checks a caller's key for a request.
///
/// Errors: it has more than 255 characters, or others than visible ASCII.
pub fn check_key(key: &str) -> Result<(), Fault> {
    let problem = if key.len() > KEY_BYTES {
        format!("{} bytes; the limit is {KEY_BYTES}", key.len())
    } else if let Some(at) = key.bytes().position(|byte| !byte.is_ascii_graphic()) {
        format!("byte {at} is no visible ASCII character")
    } else {
        return Ok(());
    };
    Err(Fault::invalid("idempotency_key", problem))
}

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

    /// Ends the upload, which the caller named by a key (empty for none).
    ///
    /// Errors: the specification or a file is missing; both missing files are reported together.
    pub fn finish(self, idempotency_key: String) -> Result<Upload, Fault> {
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
        Ok(Upload { spec, picture: self.picture, audio: self.audio, idempotency_key })
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
    fn a_key_is_short_and_visible() {
        for key in ["", "a", "0190163d-8694-739b-aea5-966c26f8ad91", &"k".repeat(255)] {
            check_key(key).unwrap();
        }
        for key in ["a b", "é", "\n", &"k".repeat(256)] {
            assert_eq!(check_key(key).unwrap_err().field(), Some("idempotency_key"), "{key:?}");
        }
    }

    #[test]
    fn order_and_completeness_are_checked() {
        assert!(Intake::default().bytes(File::Audio, b"x").is_err(), "bytes before the specification");
        assert!(Intake::default().finish(String::new()).is_err(), "nothing at all");
        let mut intake = Intake::default();
        intake.spec(GenerationSpec::default()).unwrap();
        assert!(intake.spec(GenerationSpec::default()).is_err(), "twice");
        let fault = intake.finish(String::new()).unwrap_err();
        assert_eq!(fault.violations.len(), 2);
    }
}
