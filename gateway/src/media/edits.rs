//! Where the speech begins and ends among the decoded samples of an MP4 file.
//!
//! An AAC encoder puts silence ("priming") before the first sample and fills up the last packet. The file says how
//! much, in its edit list or in the `iTunSMPB` note; the reader does not look at either.

/// What the file says about one track.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Presentation {
    /// Samples before the first that is heard.
    pub(super) skip: u64,
    /// Samples that are heard; none: all to the end.
    pub(super) length: Option<u64>,
    /// By how many samples `length` may be wrong: edit lists count in units that are often a millisecond.
    pub(super) length_tolerance: u64,
}

/// Why an edit list is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SeveralParts;

const EVERYTHING: Presentation = Presentation { skip: 0, length: None, length_tolerance: 0 };

/// Reads how track `track_id` is to be presented, in samples at `rate` Hz.
///
/// A missing or broken statement means that everything is heard, which is what a player does. The note counts in
/// samples and goes before the edit list. Silence before the first part of an edit list is not added.
pub(super) fn presentation(file: &[u8], track_id: u32, rate: u32) -> Result<Presentation, SeveralParts> {
    let Some(movie) = child(file, b"moov") else { return Ok(EVERYTHING) };
    if let Some(note) = gapless_note(movie) {
        return Ok(note);
    }
    let track = boxes(movie)
        .filter(|(kind, _)| kind == b"trak")
        .map(|(_, body)| body)
        .find(|body| child(body, b"tkhd").and_then(|header| versioned(header, 12, 20)) == Some(track_id));
    let Some(track) = track else { return Ok(EVERYTHING) };
    let edits = edits(track);
    let scales = movie_and_media_scale(movie, track);
    match (edits.as_slice(), scales) {
        ([], _) | (_, None) => Ok(EVERYTHING),
        ([edit], Some((movie_scale, media_scale))) => Ok(Presentation {
            skip: rescale(edit.start, media_scale, rate),
            // Zero means to the end, as files written piece by piece have it.
            length: (edit.length > 0).then(|| rescale(edit.length, movie_scale, rate)),
            length_tolerance: u64::from(rate.div_ceil(movie_scale)) + 1,
        }),
        _ => Err(SeveralParts),
    }
}

/// One part of the edit list.
struct Edit {
    /// First unit of the media, in the media's scale.
    start: u64,
    /// Length in the movie's scale.
    length: u64,
}

/// The parts of a track's edit list that show media.
fn edits(track: &[u8]) -> Vec<Edit> {
    let Some(list) = child(track, b"edts").and_then(|body| child(body, b"elst")) else { return Vec::new() };
    let Some(count) = u32_at(list, 4) else { return Vec::new() };
    let wide = list.first() == Some(&1);
    let size = if wide { 20 } else { 12 };
    let entries = list.get(8..).unwrap_or_default().chunks_exact(size);
    entries
        .take(count as usize)
        .filter_map(|entry| {
            let (length, start) = if wide {
                (u64_at(entry, 0)?, u64_at(entry, 8)? as i64)
            } else {
                (u64::from(u32_at(entry, 0)?), i64::from(u32_at(entry, 4)? as i32))
            };
            // A negative start is silence.
            Some(Edit { start: u64::try_from(start).ok()?, length })
        })
        .collect()
}

/// Units a second of the movie and of the track's media.
fn movie_and_media_scale(movie: &[u8], track: &[u8]) -> Option<(u32, u32)> {
    let movie_scale = child(movie, b"mvhd").and_then(|header| versioned(header, 12, 20))?;
    let media_scale =
        child(track, b"mdia").and_then(|media| child(media, b"mdhd")).and_then(|header| versioned(header, 12, 20))?;
    (movie_scale > 0 && media_scale > 0).then_some((movie_scale, media_scale))
}

/// The `iTunSMPB` note: ` 00000000 PRIMING PADDING LENGTH …` in hexadecimal samples.
fn gapless_note(movie: &[u8]) -> Option<Presentation> {
    let meta = child(movie, b"udta").and_then(|data| child(data, b"meta"))?;
    let list = child(meta.get(4..)?, b"ilst")?;
    let text = boxes(list).filter(|(kind, _)| kind == b"----").find_map(|(_, item)| {
        let name = child(item, b"name")?.get(4..)?;
        if name == b"iTunSMPB" { std::str::from_utf8(child(item, b"data")?.get(8..)?).ok() } else { None }
    })?;
    let mut fields = text.split_whitespace().skip(1).map(|field| u64::from_str_radix(field, 16).ok());
    let (skip, _padding, length) = (fields.next()??, fields.next()??, fields.next()??);
    (length > 0).then_some(Presentation { skip, length: Some(length), length_tolerance: 0 })
}

/// `value` in units of `from` a second, as samples at `rate`, to nearest.
fn rescale(value: u64, from: u32, rate: u32) -> u64 {
    let exact = (u128::from(value) * u128::from(rate) * 2 + u128::from(from)) / (u128::from(from) * 2);
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// A 32-bit field whose place depends on the header's version.
fn versioned(header: &[u8], at_version_0: usize, at_version_1: usize) -> Option<u32> {
    u32_at(header, if header.first()? == &1 { at_version_1 } else { at_version_0 })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The body of the first box of a kind.
fn child<'a>(bytes: &'a [u8], kind: &[u8; 4]) -> Option<&'a [u8]> {
    boxes(bytes).find(|(found, _)| found == kind).map(|(_, body)| body)
}

/// The boxes side by side in `bytes`: kind and body. Ends at the first that does not fit.
fn boxes(mut bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    std::iter::from_fn(move || {
        let kind = *bytes.get(4..)?.first_chunk()?;
        let (header, size) = match u32_at(bytes, 0)? {
            0 => (8, bytes.len()),
            1 => (16, usize::try_from(u64_at(bytes, 8)?).ok()?),
            size => (8, size as usize),
        };
        let body = bytes.get(header..size)?;
        bytes = &bytes[size..];
        Some((kind, body))
    })
}
