//! What kind of file a recording is, and the lengths that streamed WAV files leave open.

/// The kinds of recording that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// RIFF WAVE.
    Wav,
    /// FLAC on its own.
    Flac,
    /// Ogg (Vorbis or FLAC).
    Ogg,
    /// MP4 family: M4A, MP4, MOV.
    Mp4,
    /// MPEG audio or ADTS: bare frames one after the other, with no mark of the end.
    Frames,
}

/// Data lengths from here on are what programs write that cannot seek back to fill in the true one.
const OPEN_LENGTH: u32 = 0x7fff_0000;

impl Kind {
    /// Tells the kind from the first bytes. A search further in would find MPEG frames in any picture.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => Some(Self::Wav),
            [b'f', b'L', b'a', b'C', ..] => Some(Self::Flac),
            [b'O', b'g', b'g', b'S', ..] => Some(Self::Ogg),
            [_, _, _, _, b'f', b't', b'y', b'p', ..] => Some(Self::Mp4),
            [b'I', b'D', b'3', _, _, _, a, b, c, d, rest @ ..] => {
                // The tag's length, seven bits a byte. FLAC files are found behind such a tag too.
                let tag = [a, b, c, d].iter().fold(0usize, |sum, byte| sum << 7 | usize::from(**byte & 0x7f));
                match rest.get(tag..) {
                    Some([b'f', b'L', b'a', b'C', ..]) => Some(Self::Flac),
                    _ => Some(Self::Frames),
                }
            }
            // Eleven set bits begin a frame; then version (not 01), and for MPEG audio the bit rate (not 15) and sample
            // rate (not 3).
            [0xff, second, third, ..]
                if second & 0xe0 == 0xe0 && second & 0x18 != 0x08 && third & 0xf0 != 0xf0 && third & 0x0c != 0x0c =>
            {
                Some(Self::Frames)
            }
            _ => None,
        }
    }
}

/// The samples of a WAV file are fewer bytes than its header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CutShort {
    /// Bytes of samples that the header states.
    pub(super) stated: u32,
    /// Bytes that follow.
    pub(super) present: usize,
}

/// Writes the true length of the samples into a WAV file that was streamed, so that its end is read to the last
/// sample; refuses one whose stated length is not there.
pub(super) fn settle_wav_length(bytes: &mut [u8]) -> Result<(), CutShort> {
    let mut at = 12;
    while let Some(&[a, b, c, d, e, f, g, h]) = bytes.get(at..at + 8).and_then(|header| header.first_chunk()) {
        let stated = u32::from_le_bytes([e, f, g, h]);
        let present = bytes.len() - at - 8;
        if [a, b, c, d] != *b"data" {
            // Chunks are padded to even lengths.
            at = (at + 8).saturating_add(stated as usize).saturating_add(stated as usize & 1);
            if at > bytes.len() {
                break;
            }
        } else if stated as usize <= present {
            return Ok(());
        } else if stated >= OPEN_LENGTH {
            let present = u32::try_from(present).unwrap_or(u32::MAX - 1);
            bytes[at + 4..at + 8].copy_from_slice(&present.to_le_bytes());
            return Ok(());
        } else {
            return Err(CutShort { stated, present });
        }
    }
    Ok(())
}

/// Tells whether the last page of an Ogg file is all there and marked as the end of its stream.
pub(super) fn ogg_is_whole(bytes: &[u8]) -> bool {
    let Some(page) = bytes.windows(4).rposition(|part| part == b"OggS").and_then(|at| bytes.get(at..)) else {
        return false;
    };
    // 27 bytes, the last of them the number of segments; then one length for each.
    let (Some(flags), Some(count)) = (page.get(5), page.get(26)) else { return false };
    let segments = page.get(27..27 + usize::from(*count));
    let body = segments.map(|lengths| lengths.iter().map(|length| usize::from(*length)).sum::<usize>());
    let length = body.map(|body| 27 + usize::from(*count) + body);
    flags & 4 != 0 && length.is_some_and(|length| length <= page.len())
}
