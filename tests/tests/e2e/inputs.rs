//! Pictures and recordings for the tests, good and bad, made here byte by byte.

use std::f32::consts::TAU;

/// A PNG that says what size it is, with no picture behind it.
pub fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]); // 8 bits, RGB
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    for chunk in [header, b"IDAT\x78\x9c".to_vec(), b"IEND".to_vec()] {
        png.extend((chunk.len() as u32 - 4).to_be_bytes());
        png.extend(&chunk);
        png.extend(crc32(&chunk).to_be_bytes());
    }
    png
}

/// The demo portrait.
pub fn portrait() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo/portrait.png")).unwrap()
}

/// A tone that swells and fades, as 16-bit mono WAV.
pub fn tone(seconds: f32, rate: u32) -> Vec<u8> {
    let samples = (0..(seconds * rate as f32) as usize).map(|i| {
        let t = i as f32 / rate as f32;
        ((t * 220.0 * TAU).sin() * (t * 3.0 * TAU).sin().abs() * 16_000.0) as i16
    });
    let data: Vec<u8> = samples.flat_map(i16::to_le_bytes).collect();
    wav(1, 16, rate, &data)
}

/// A WAV file: format 1 is integer, 3 is float.
pub fn wav(format: u16, bits: u16, rate: u32, data: &[u8]) -> Vec<u8> {
    let block = bits / 8;
    let mut wav = b"RIFF".to_vec();
    wav.extend((36 + data.len() as u32).to_le_bytes());
    wav.extend(b"WAVEfmt ");
    wav.extend(16u32.to_le_bytes());
    wav.extend(format.to_le_bytes());
    wav.extend(1u16.to_le_bytes());
    wav.extend(rate.to_le_bytes());
    wav.extend((rate * u32::from(block)).to_le_bytes());
    wav.extend(block.to_le_bytes());
    wav.extend(bits.to_le_bytes());
    wav.extend(b"data");
    wav.extend((data.len() as u32).to_le_bytes());
    wav.extend(data);
    wav
}

/// What a bad picture is called, and its bytes.
pub fn bad_pictures() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("not a picture", b"just some text that is no picture at all".to_vec()),
        ("nothing", Vec::new()),
        ("1x1", png_of_size(1, 1)),
        ("20000x20000", png_of_size(20_000, 20_000)),
        ("a bomb", png_of_size(11_999, 11_999)),
        ("cut in half", portrait()[..4000].to_vec()),
    ]
}

/// What a bad recording is called, and its bytes.
pub fn bad_recordings() -> Vec<(&'static str, Vec<u8>)> {
    let nan: Vec<u8> = (0..16_000).flat_map(|i| if i == 9_000 { f32::NAN } else { 0.1f32 }.to_le_bytes()).collect();
    vec![
        ("not audio", b"just some text that is no recording at all".to_vec()),
        ("nothing", Vec::new()),
        ("no samples", wav(1, 16, 16_000, &[])),
        ("not a number", wav(3, 32, 16_000, &nan)),
        ("three hours", wav(1, 8, 2_000, &vec![128; 3 * 3600 * 2_000])),
    ]
}

/// CRC-32 as PNG and zip have it.
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
    })
}
