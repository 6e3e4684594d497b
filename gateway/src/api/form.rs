//! Reads the form of `POST /v1/videos`.

use axum::extract::multipart::{Field, Multipart, MultipartError};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::StatusCode;
use proto::v1::{FaceBox, GenerationSpec, Parity};

use super::video::{MODEL, REFERENCE};
use crate::{
    fault::{Fault, Kind, Violation},
    intake::{File, Intake, Order, Upload, too_large},
    validate::{AUDIO_BYTES, PROMPT_BYTES},
};

/// The fields of the form.
const FIELDS: [&str; 15] = [
    "prompt",
    "input_reference",
    "audio",
    "seed",
    "steps",
    "size",
    "guidance_scale",
    "flow_shift",
    "min_frames",
    "face",
    "parity",
    "truncate_prompt",
    "no_feature_cache",
    "model",
    "seconds",
];
/// Most bytes of a field that is a number or a name.
const SHORT_BYTES: usize = 256;
/// Most bytes of the recording as base64 in a data URL.
const DATA_URL_BYTES: usize = AUDIO_BYTES / 3 * 4 + 256;

/// Collects the form's parts. Files and specification may come in any order here.
#[derive(Debug, Default)]
struct Form {
    spec: GenerationSpec,
    picture: Vec<u8>,
    audio: Vec<u8>,
    seen: Vec<String>,
    wrong: Vec<Violation>,
}

/// Reads the whole form. Wrong values are reported together, once all has come.
pub(crate) async fn read(mut parts: Multipart, order: Order) -> Result<Upload, Fault> {
    let mut form = Form::default();
    while let Some(part) = parts.next_field().await.map_err(|error| broken(&error))? {
        form.take(part).await?;
    }
    if !form.wrong.is_empty() {
        return Err(Fault::of_violations(Kind::Invalid, form.wrong));
    }
    let mut intake = Intake::default();
    intake.spec(form.spec)?;
    intake.bytes(File::Picture, &form.picture)?;
    intake.bytes(File::Audio, &form.audio)?;
    intake.finish(order)
}

impl Form {
    async fn take(&mut self, part: Field<'_>) -> Result<(), Fault> {
        let name: String = part.name().unwrap_or_default().chars().take(64).collect();
        if self.seen.contains(&name) {
            return Err(Fault::invalid(&name, "came twice"));
        }
        if !FIELDS.contains(&name.as_str()) {
            return Err(Fault::invalid(&name, format!("no such field; the fields are {}", FIELDS.join(", "))));
        }
        self.seen.push(name.clone());
        match name.as_str() {
            "input_reference" => {
                media_type(&part, "picture", &["image"])?;
                self.picture = bytes(part, File::Picture.limit()).await?.ok_or_else(|| too_large(File::Picture))?;
            }
            "audio" if part.file_name().is_some() => {
                media_type(&part, "audio", &["audio", "video"])?;
                self.audio = bytes(part, File::Audio.limit()).await?.ok_or_else(|| too_large(File::Audio))?;
            }
            "audio" => {
                let url = bytes(part, DATA_URL_BYTES).await?.ok_or_else(|| too_large(File::Audio))?;
                self.audio = data_url(&url)?;
            }
            "prompt" => match bytes(part, PROMPT_BYTES).await? {
                None => self.note("prompt", format!("more than {PROMPT_BYTES} bytes, the limit")),
                Some(text) => match String::from_utf8(text) {
                    Ok(text) => self.spec.prompt = text,
                    Err(_) => self.note("prompt", "is not valid UTF-8".into()),
                },
            },
            _ => match bytes(part, SHORT_BYTES).await?.map(String::from_utf8) {
                Some(Ok(text)) => self.set(&name, text.trim()),
                Some(Err(_)) => self.note(&name, "is not valid UTF-8".into()),
                None => self.note(&name, format!("more than {SHORT_BYTES} bytes, the limit")),
            },
        }
        Ok(())
    }

    /// Sets a field that is a number or a name.
    fn set(&mut self, name: &str, text: &str) {
        let result = match name {
            "seed" => whole(text).map(|value| self.spec.seed = Some(value)),
            "steps" => whole(text).map(|value| self.spec.steps = Some(value)),
            "min_frames" => whole(text).map(|value| self.spec.min_frames = Some(value)),
            "size" => size(text).map(|value| self.spec.size = Some(value)),
            "guidance_scale" => number(text).map(|value| self.spec.guidance_scale = Some(value)),
            "flow_shift" => number(text).map(|value| self.spec.flow_shift = Some(value)),
            "face" => face(text).map(|value| self.spec.face = Some(value)),
            "parity" if text == REFERENCE => {
                self.spec.set_parity(Parity::Reference);
                Ok(())
            }
            "parity" => Err(format!("{text:?} is no rule; accepted is {REFERENCE}")),
            "truncate_prompt" => truth(text).map(|value| self.spec.truncate_prompt = value),
            "no_feature_cache" => truth(text).map(|value| self.spec.no_feature_cache = value),
            "model" if text == MODEL => Ok(()),
            "model" => Err(format!("{text:?}; accepted is {MODEL}")),
            _ => Err("is not taken: the length follows the speech".into()),
        };
        if let Err(message) = result {
            self.note(name, message);
        }
    }

    fn note(&mut self, field: &str, message: String) {
        self.wrong.push(Violation { field: field.into(), message });
    }
}

/// Refuses a part that says it is of a kind that is not decoded. Unnamed kinds are looked at later.
fn media_type(part: &Field<'_>, field: &str, kinds: &[&str]) -> Result<(), Fault> {
    let Some(named) = part.content_type() else { return Ok(()) };
    let kind = named.split('/').next().unwrap_or_default().trim().to_ascii_lowercase();
    let fits = kinds.contains(&kind.as_str()) || matches!(named, "application/octet-stream" | "application/ogg");
    if fits {
        return Ok(());
    }
    let message = format!("{named} is not decoded; the type must be {}/…", kinds.join("/… or "));
    Err(Fault::in_field(Kind::UnsupportedMedia, field, message))
}

/// A part's bytes; `None` when there are more than `limit`.
async fn bytes(mut part: Field<'_>, limit: usize) -> Result<Option<Vec<u8>>, Fault> {
    let mut all = Vec::new();
    while let Some(chunk) = part.chunk().await.map_err(|error| broken(&error))? {
        if all.len() + chunk.len() > limit {
            return Ok(None);
        }
        all.extend_from_slice(&chunk);
    }
    Ok(Some(all))
}

/// A form that cannot be read.
fn broken(error: &MultipartError) -> Fault {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Fault::new(Kind::TooLarge, "the request has more bytes than allowed"),
        _ => Fault::new(Kind::Invalid, format!("the form cannot be read: {}", error.body_text())),
    }
}

fn data_url(url: &[u8]) -> Result<Vec<u8>, Fault> {
    let wrong = |message: &str| Fault::invalid("audio", message);
    let text = std::str::from_utf8(url).map_err(|_| wrong("text that is not UTF-8; send a file or a data URL"))?;
    let (head, data) = text
        .trim()
        .strip_prefix("data:")
        .and_then(|rest| rest.split_once(','))
        .ok_or_else(|| wrong("text that is no data URL; send a file, or data:audio/…;base64,…"))?;
    let kind = head.strip_suffix(";base64").ok_or_else(|| wrong("the data URL must be base64"))?;
    if !(kind.is_empty()
        || kind.starts_with("audio/")
        || kind.starts_with("video/")
        || kind.starts_with("application/"))
    {
        let kind: String = kind.chars().take(64).collect();
        let message = format!("{kind} is not decoded; the data URL's type must be audio/…");
        return Err(Fault::in_field(Kind::UnsupportedMedia, "audio", message));
    }
    STANDARD.decode(data).map_err(|error| wrong(&format!("the data URL's base64 is damaged: {error}")))
}

fn whole<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is not a whole number within the limits"))
}

fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
}

fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

/// The shorter side: a number, or the shorter one of `WxH`. The longer side follows the picture.
fn size(text: &str) -> Result<u32, String> {
    let parsed = match text.split_once('x') {
        None => text.parse().ok(),
        Some((width, height)) => width.parse().ok().zip(height.parse().ok()).map(|(w, h): (u32, u32)| w.min(h)),
    };
    parsed.ok_or_else(|| format!("{text:?} is no size; it is the shorter side, such as 704, or a size such as 704x768"))
}

/// A face box `x,y,w,h`.
fn face(text: &str) -> Result<FaceBox, String> {
    let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[x, y, width, height]) => Ok(FaceBox { x, y, width, height, score: None }),
        _ => Err(format!("{text:?} is no box; it is x,y,width,height in pixels of the upright picture")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_the_shorter_side() {
        assert_eq!(size("704"), Ok(704));
        assert_eq!(size("1280x720"), Ok(720));
        for wrong in ["", "x", "704x", "-1", "7e2", "1x2x3"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_face_is_four_numbers() {
        assert_eq!(face("1, 2.5,30,40").unwrap().y, 2.5);
        for wrong in ["", "1,2,3", "1,2,3,4,5", "a,b,c,d"] {
            assert!(face(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_recording_comes_as_a_data_url_too() {
        assert_eq!(data_url(b"data:audio/wav;base64,AQID").unwrap(), [1, 2, 3]);
        assert_eq!(data_url(b"data:text/html;base64,AQID").unwrap_err().kind, Kind::UnsupportedMedia);
        for wrong in [&b"AQID"[..], b"data:audio/wav,abc", b"data:audio/wav;base64,%%%", b"\xff"] {
            assert_eq!(data_url(wrong).unwrap_err().field(), Some("audio"));
        }
    }

    #[test]
    fn wrong_values_are_collected() {
        let mut form = Form::default();
        for (name, text) in [("steps", "many"), ("seed", "-1"), ("model", "sora-2"), ("seconds", "4"), ("size", "64")] {
            form.set(name, text);
        }
        form.set("parity", "ours");
        form.set("parity", "reference");
        form.set("truncate_prompt", "yes");
        form.set("truncate_prompt", "true");
        form.set("no_feature_cache", "true");
        assert_eq!(
            form.wrong.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(),
            ["steps", "seed", "model", "seconds", "parity", "truncate_prompt"]
        );
        assert!(form.wrong[2].message.contains(MODEL));
        assert_eq!((form.spec.size, form.spec.parity()), (Some(64), Parity::Reference));
        assert!(form.spec.truncate_prompt && form.spec.no_feature_cache);
    }
}
