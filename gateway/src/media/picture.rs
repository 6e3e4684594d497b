//! Pictures in: PNG, JPEG or WebP to upright 8-bit RGB.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::error::ImageError;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{Error, Result};

/// Shortest and longest side of a picture, pixels.
pub const SIDES: std::ops::RangeInclusive<u32> = 64..=12_000;
/// Most pixels of a picture.
pub const MAX_PIXELS: u64 = 50_000_000;
/// Most bytes that a decoder may hold: a picture of [`MAX_PIXELS`] in four channels of 16 bits, and its rows again.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// An upright picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `height · width · 3` bytes, rows from the top, RGB.
    pub rgb: Vec<u8>,
}

/// Decodes a picture, told by its content and not by its name.
///
/// The orientation that a camera noted is applied. Transparent parts become white: the colour that lies under them is
/// whatever a drawing program left there, often black. Of an animation the first frame is taken. Sixteen bits, grey,
/// palettes and CMYK become 8-bit RGB; colour profiles are not applied, as in the reference.
///
/// Refuses, with the reason: what is empty, no picture, of another format, truncated or damaged, and sides or sizes
/// outside [`SIDES`] and [`MAX_PIXELS`]. Those are read from the header, before memory is taken for pixels.
///
/// CPU-bound and blocking.
pub fn decode(bytes: &[u8]) -> Result<Picture> {
    if bytes.is_empty() {
        return Err(Error::picture("is empty (0 bytes)"));
    }
    // The decoders promise not to panic; a file that finds an exception must not take the process with it.
    let upright = catch_unwind(AssertUnwindSafe(|| decode_upright(bytes)))
        .unwrap_or_else(|_| Err(Error::picture("is damaged: its decoder failed")))?;
    let (width, height) = (upright.width(), upright.height());
    Ok(Picture { width, height, rgb: on_white(upright) })
}

fn decode_upright(bytes: &[u8]) -> Result<DynamicImage> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        Ok(other) => return Err(Error::picture(format!("is {other:?}; send PNG, JPEG or WebP"))),
        Err(_) => return Err(Error::picture("is not a picture in a known format; send PNG, JPEG or WebP")),
    };
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(unreadable)?;
    check_size(decoder.dimensions())?;
    if format == ImageFormat::Jpeg && !jpeg_is_whole(bytes) {
        // The decoder would fill the missing part with grey.
        return Err(Error::picture("is cut short: the JPEG has no end mark"));
    }
    decoder.set_limits(limits).map_err(unreadable)?;
    // A broken orientation note is no reason to refuse the picture.
    let orientation = decoder.orientation().ok();
    let mut picture = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
    if let Some(orientation) = orientation {
        picture.apply_orientation(orientation);
    }
    Ok(picture)
}

fn check_size((width, height): (u32, u32)) -> Result<()> {
    let (shortest, longest) = (SIDES.start(), SIDES.end());
    if !SIDES.contains(&width) || !SIDES.contains(&height) {
        return Err(Error::picture(format!(
            "is {width} x {height} pixels; each side must have {shortest} to {longest}"
        )));
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        return Err(Error::picture(format!("is {width} x {height} = {pixels} pixels; at most {MAX_PIXELS} are read")));
    }
    Ok(())
}

fn unreadable(fault: ImageError) -> Error {
    match fault {
        ImageError::IoError(_) => Error::picture("is cut short"),
        ImageError::Limits(fault) => Error::picture(format!("is too large: {fault}")),
        fault => Error::picture(format!("is damaged: {fault}")),
    }
}

/// Walks the JPEG's segments and tells whether the end mark is reached. What follows it does not matter.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    // Behind the start mark.
    let mut at = 2;
    loop {
        // To the next marker: coded data lies between, in which 0xff is followed by 0, or by a restart mark.
        let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == 0xff)) else {
            return false;
        };
        at += found + 1;
        match bytes.get(at) {
            None => return false,
            // The end.
            Some(0xd9) => return true,
            // Fill bytes: the next may be the marker.
            Some(0xff) => {}
            // Coded data, and markers without a body.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at += 1,
            Some(_) => match bytes.get(at + 1..at + 3) {
                Some(&[high, low]) => at += 1 + usize::from(u16::from_be_bytes([high, low])).max(2),
                _ => return false,
            },
        }
    }
}

/// The picture in 8-bit RGB, laid on white.
fn on_white(picture: DynamicImage) -> Vec<u8> {
    if !picture.color().has_alpha() {
        return picture.into_rgb8().into_raw();
    }
    let rgba = picture.into_rgba8().into_raw();
    let blend = |colour: u8, alpha: u8| {
        let alpha = u32::from(alpha);
        ((u32::from(colour) * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    rgba.chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect()
}
