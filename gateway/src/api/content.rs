//! The video's bytes: all of them, or a part.

use std::ops::Range;

use axum::{
    body::Body,
    extract::{Path, State},
    response::Response,
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{
        ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH, IF_RANGE, RANGE,
    },
};

use super::video::ErrorBody;
use crate::{
    fault::{Fault, Kind},
    scheduler::Gateway,
};

/// Gives the MP4, or one range of its bytes.
#[utoipa::path(
    get, path = "/v1/videos/{id}/content", tag = "videos",
    params(
        ("id" = String, Path, description = "The generation."),
        ("Range" = Option<String>, Header, description = "One range, as in `bytes=1000-`; several give the whole file."),
        ("If-Range" = Option<String>, Header, description = "The ETag of what is there already; with another one the whole file comes."),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what is there already."),
    ),
    responses(
        (status = 200, description = "The whole file; `ETag` is its SHA-256.", body = Vec<u8>, content_type = "video/mp4"),
        (status = 206, description = "The range.", body = Vec<u8>, content_type = "video/mp4"),
        (status = 304, description = "The caller has the file already."),
        (status = 404, description = "No generation has this id.", body = ErrorBody),
        (status = 409, description = "It is not completed.", body = ErrorBody),
        (status = 416, description = "The range begins past the end.", body = ErrorBody),
    )
)]
pub(crate) async fn content(
    State(gateway): State<Gateway>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let content = gateway.store().video(&id).await?;
    let video = content.artifact.clone();
    let tag = format!("\"{}\"", video.hash);
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let mut answer = Response::new(Body::empty());
    if is_known(&headers, &tag) {
        *answer.status_mut() = StatusCode::NOT_MODIFIED;
        answer.headers_mut().insert(ETAG, header(&tag)?);
        return Ok(answer);
    }
    let current = text(IF_RANGE).is_none_or(|known| known == tag);
    let part = match text(RANGE).filter(|_| current) {
        Some(range) => part(range, video.bytes)?,
        None => None,
    };
    let Range { start, end } = part.clone().unwrap_or(0..video.bytes);
    *answer.body_mut() = Body::from_stream(content.stream(start..end));
    let into = answer.headers_mut();
    into.insert(CONTENT_TYPE, HeaderValue::from_static("video/mp4"));
    into.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    into.insert(CONTENT_LENGTH, (end - start).into());
    into.insert(ETAG, header(&tag)?);
    if part.is_some() {
        into.insert(CONTENT_RANGE, header(&format!("bytes {start}-{}/{}", end.saturating_sub(1), video.bytes))?);
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(answer)
}

/// Whether the caller has what this tag names.
pub(super) fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let known = headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    known.is_some_and(|known| known == "*" || known.split(',').any(|one| one.trim() == tag))
}

pub(super) fn header(text: &str) -> Result<HeaderValue, Fault> {
    HeaderValue::from_str(text).map_err(|error| Fault::internal("the file cannot be described", &error))
}

/// The bytes of a `Range` header that asks for one range; nothing for one that is not understood, which HTTP ignores.
///
/// Errors: the range begins past the end.
fn part(range: &str, bytes: u64) -> Result<Option<Range<u64>>, Fault> {
    let Some((first, last)) = range.strip_prefix("bytes=").and_then(|spec| spec.trim().split_once('-')) else {
        return Ok(None);
    };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().unwrap_or(u64::MAX));
    let part = match (first, last) {
        ("", "") => return Ok(None),
        ("", length) => number(length).map(|length| bytes.saturating_sub(length)..bytes),
        (first, "") => number(first).map(|first| first..bytes),
        (first, last) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Some(first..last.saturating_add(1).min(bytes)),
            _ => None,
        },
    };
    match part {
        Some(part) if part.start >= bytes => {
            Err(Fault::new(Kind::OutOfRange, format!("{range} begins past the end; the video has {bytes} bytes")))
        }
        part => Ok(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_as_http_says_and_nonsense_is_ignored() {
        for (range, wanted) in [
            ("bytes=0-", Some(0..10)),
            ("bytes=3-", Some(3..10)),
            ("bytes=3-3", Some(3..4)),
            ("bytes=3-99", Some(3..10)),
            ("bytes=-4", Some(6..10)),
            ("bytes=-99", Some(0..10)),
            ("bytes=-", None),
            ("bytes=5-3", None),
            ("bytes=a-3", None),
            ("bytes=0-1,3-4", None),
            ("items=0-1", None),
            ("", None),
        ] {
            assert_eq!(part(range, 10).unwrap(), wanted, "{range}");
        }
        for range in ["bytes=10-", "bytes=99999999999999999999999-", "bytes=-0"] {
            assert_eq!(part(range, 10).unwrap_err().kind, Kind::OutOfRange, "{range}");
        }
    }
}
