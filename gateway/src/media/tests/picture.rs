use std::io::Cursor;

use image::{DynamicImage, ExtendedColorType, ImageBuffer, ImageEncoder, ImageFormat, Luma, LumaA, Rgb, Rgba};

use super::{ffmpeg, noise};
use crate::media::Error;
use crate::media::picture::{Picture, decode};

/// 80 x 64: red above left, green above right, blue below left, white below right.
fn quarters() -> ImageBuffer<Rgb<u8>, Vec<u8>> {
    ImageBuffer::from_fn(80, 64, |x, y| match (x < 40, y < 32) {
        (true, true) => Rgb([255, 0, 0]),
        (false, true) => Rgb([0, 255, 0]),
        (true, false) => Rgb([0, 0, 255]),
        (false, false) => Rgb([255, 255, 255]),
    })
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn refused(bytes: &[u8]) -> String {
    match decode(bytes) {
        Err(Error::InvalidInput { field: "picture", reason }) => reason,
        other => panic!("not refused: {:?}", other.map(|picture| (picture.width, picture.height))),
    }
}

fn pixel(picture: &Picture, x: u32, y: u32) -> [u8; 3] {
    let at = (y * picture.width + x) as usize * 3;
    [picture.rgb[at], picture.rgb[at + 1], picture.rgb[at + 2]]
}

/// The colours of the four corners' quarters: R, G, B or W; the encoder may be off a little.
fn corners(picture: &Picture) -> String {
    let (w, h) = (picture.width, picture.height);
    [(w / 5, h / 5), (w * 4 / 5, h / 5), (w / 5, h * 4 / 5), (w * 4 / 5, h * 4 / 5)]
        .map(|(x, y)| match pixel(picture, x, y).map(|v| v > 128) {
            [true, false, false] => 'R',
            [false, true, false] => 'G',
            [false, false, true] => 'B',
            [true, true, true] => 'W',
            _ => '?',
        })
        .iter()
        .collect()
}

/// A note of one entry, the orientation, in either byte order.
fn exif(orientation: u8, big_endian: bool) -> Vec<u8> {
    if big_endian {
        vec![b'M', b'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0]
    } else {
        vec![b'I', b'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0, 0, 0, 0, 0]
    }
}

fn with_exif(jpeg: &[u8], note: &[u8]) -> Vec<u8> {
    let length = (note.len() + 8) as u16;
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xe1];
    bytes.extend(length.to_be_bytes());
    bytes.extend(b"Exif\0\0");
    bytes.extend(note);
    bytes.extend(&jpeg[2..]);
    bytes
}

#[test]
fn lossless_formats_come_back_exactly() {
    let picture: DynamicImage = quarters().into();
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let decoded = decode(&encoded(&picture, format)).unwrap();
        assert_eq!((decoded.width, decoded.height), (80, 64));
        assert_eq!(decoded.rgb, quarters().into_raw(), "{format:?}");
    }
    let jpeg = decode(&encoded(&picture, ImageFormat::Jpeg)).unwrap();
    assert_eq!(corners(&jpeg), "RGBW");
}

#[test]
fn pictures_are_turned_upright() {
    let jpeg = encoded(&quarters().into(), ImageFormat::Jpeg);
    // The stored picture is R G above B W; what a viewer shows for each orientation.
    let shown = ["RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"];
    for (orientation, corners_shown) in (1..).zip(shown) {
        for big_endian in [false, true] {
            let picture = decode(&with_exif(&jpeg, &exif(orientation, big_endian))).unwrap();
            assert_eq!(corners(&picture), corners_shown, "orientation {orientation}");
            let expected = if orientation < 5 { (80, 64) } else { (64, 80) };
            assert_eq!((picture.width, picture.height), expected, "orientation {orientation}");
        }
    }
    // Notes that make no sense leave the picture as it is.
    for note in [&b""[..], b"II", b"II\x2a\0\xff\xff\xff\xff", &exif(99, false)] {
        assert_eq!(corners(&decode(&with_exif(&jpeg, note)).unwrap()), "RGBW");
    }
}

#[test]
fn transparent_parts_become_white() {
    let picture = ImageBuffer::from_fn(64, 64, |x, _| match x / 16 {
        0 => Rgba([0u8, 0, 0, 0]),
        1 => Rgba([200, 100, 0, 255]),
        2 => Rgba([255, 0, 0, 128]),
        _ => Rgba([0, 0, 0, 51]),
    });
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let decoded = decode(&encoded(&picture.clone().into(), format)).unwrap();
        assert_eq!(pixel(&decoded, 1, 1), [255, 255, 255]);
        assert_eq!(pixel(&decoded, 17, 1), [200, 100, 0]);
        assert_eq!(pixel(&decoded, 33, 1), [255, 127, 127]);
        assert_eq!(pixel(&decoded, 50, 1), [204, 204, 204]);
    }
}

#[test]
fn other_pixel_kinds_become_8_bit_rgb() {
    let grey = DynamicImage::from(ImageBuffer::from_pixel(64, 64, Luma([77u8])));
    assert_eq!(pixel(&decode(&encoded(&grey, ImageFormat::Png)).unwrap(), 5, 5), [77, 77, 77]);
    assert_eq!(pixel(&decode(&encoded(&grey, ImageFormat::Jpeg)).unwrap(), 5, 5), [77, 77, 77]);
    let grey_alpha = DynamicImage::from(ImageBuffer::from_pixel(64, 64, LumaA([0u8, 0])));
    assert_eq!(pixel(&decode(&encoded(&grey_alpha, ImageFormat::Png)).unwrap(), 5, 5), [255, 255, 255]);
    let deep = DynamicImage::from(ImageBuffer::from_pixel(64, 64, Rgb([65_535u16, 32_896, 0])));
    assert_eq!(pixel(&decode(&encoded(&deep, ImageFormat::Png)).unwrap(), 5, 5), [255, 128, 0]);
    let deep_alpha = DynamicImage::from(ImageBuffer::from_pixel(64, 64, Rgba([0u16, 0, 0, 65_535])));
    assert_eq!(pixel(&decode(&encoded(&deep_alpha, ImageFormat::Png)).unwrap(), 5, 5), [0, 0, 0]);
    let palette = ffmpeg(
        &[
            "-f",
            "lavfi",
            "-i",
            "color=red:size=64x64",
            "-frames:v",
            "1",
            "-pix_fmt",
            "pal8",
            "-f",
            "image2pipe",
            "-c:v",
            "png",
            "pipe:1",
        ],
        b"",
    );
    let red = pixel(&decode(&palette).unwrap(), 5, 5);
    assert!(red[0] > 250 && red[1] < 6 && red[2] < 6, "{red:?}");
}

#[test]
fn of_an_animation_the_first_frame_is_taken() {
    // Red, then blue.
    let source = "color=red:size=64x64:rate=1:duration=1[a];color=blue:size=64x64:rate=1:duration=1[b];[a][b]concat";
    for (codec, format) in [("apng", "apng"), ("libwebp_anim", "webp")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let filter = ["-filter_complex", source, "-c:v", codec, "-f", format, path.to_str().unwrap()];
        ffmpeg(&filter, b"");
        let [r, g, b] = pixel(&decode(&std::fs::read(path).unwrap()).unwrap(), 9, 9);
        assert!(r > 230 && g < 25 && b < 25, "{codec}: {r} {g} {b}");
    }
}

#[test]
fn what_is_no_picture_is_refused() {
    assert_eq!(refused(b""), "is empty (0 bytes)");
    assert!(refused(&b"hello, I am text".repeat(99)).contains("not a picture"));
    assert!(refused(b"GIF89a\x40\0\x40\0\0\0\0").contains("send PNG, JPEG or WebP"));
    for head in [&b"\x89PNG\r\n\x1a\n"[..], b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\x10WEBPVP8 "] {
        refused(head);
        let mut bytes = head.to_vec();
        bytes.extend(noise(5).take(5_000).map(|v| (v * 127.0) as i8 as u8));
        refused(&bytes);
    }
}

#[test]
fn sizes_are_held_to_their_limits() {
    let png = |width: u32, height: u32| encoded(&DynamicImage::new_luma8(width, height), ImageFormat::Png);
    assert_eq!(refused(&png(1, 1)), "is 1 x 1 pixels; each side must have 64 to 12000");
    assert_eq!(refused(&png(63, 64)), "is 63 x 64 pixels; each side must have 64 to 12000");
    assert!(decode(&png(64, 64)).is_ok());
    assert_eq!(refused(&png(12_001, 64)), "is 12001 x 64 pixels; each side must have 64 to 12000");
    assert!(decode(&png(12_000, 64)).is_ok());
    assert_eq!(refused(&png(7_072, 7_072)), "is 7072 x 7072 = 50013184 pixels; at most 50000000 are read");
}

/// Headers of huge pictures in front of almost nothing: refused from the header, in no time.
#[test]
fn bombs_are_refused_from_their_header() {
    let mut png = encoded(&DynamicImage::new_rgb8(64, 64), ImageFormat::Png);
    png[16..20].copy_from_slice(&20_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&20_000u32.to_be_bytes());
    let checksum = crc(&png[12..29]);
    png[29..33].copy_from_slice(&checksum.to_be_bytes());
    assert_eq!(refused(&png), "is 20000 x 20000 pixels; each side must have 64 to 12000");

    let mut jpeg = encoded(&DynamicImage::new_rgb8(64, 64), ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xff, 0xff, 0xff]);
    assert_eq!(refused(&jpeg), "is 65535 x 65535 pixels; each side must have 64 to 12000");
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn truncated_pictures_are_refused() {
    let pixels: Vec<u8> = noise(9).take(200 * 150 * 3).map(|v| (v * 127.0) as i8 as u8).collect();
    let picture: DynamicImage = ImageBuffer::<Rgb<u8>, _>::from_raw(200, 150, pixels.clone()).unwrap().into();
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        let whole = encoded(&picture, format);
        for part in [0.01, 0.3, 0.6, 0.95] {
            refused(&whole[..(whole.len() as f64 * part) as usize]);
        }
        // Phones put films behind their pictures.
        let mut longer = whole.clone();
        longer.extend([7; 5000]);
        assert!(decode(&longer).is_ok(), "{format:?}");
    }
    let mut lossy = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut lossy, 30)
        .write_image(&pixels, 200, 150, ExtendedColorType::Rgb8)
        .unwrap();
    assert_eq!(refused(&lossy[..lossy.len() - 2]), "is cut short: the JPEG has no end mark");
}

/// Thousands of small changes; whatever comes of it, it is no panic and not a long wait.
#[test]
fn hostile_files_end_in_an_answer() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        let whole = encoded(&quarters().into(), format);
        let mut random = noise(13).map(|v| ((v + 1.0) * 0.499_999 * 65_536.0) as usize);
        let mut next = move || random.next().unwrap();
        for round in 0..500 {
            let mut bytes = whole.clone();
            for _ in 0..1 + round % 4 {
                let at = next() % bytes.len();
                bytes[at] = [next() as u8, 0, 0xff, 0x80][next() % 4];
            }
            let _ = decode(&bytes);
        }
    }
}
