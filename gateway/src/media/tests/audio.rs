use std::fs;
use std::num::NonZeroU32;

use super::{ffmpeg, noise};
use crate::media::Error;
use crate::media::audio::{Audio, decode};
use crate::media::resample::Resampler;

/// Something like speech: noise below 1.5 kHz, louder and softer four times a second. Interleaved; every channel differs.
fn speech(rate: u32, channels: usize, frames: usize) -> Vec<f32> {
    let smoothing = (1500.0 * std::f32::consts::TAU / rate as f32).min(1.0);
    let mut state = vec![[0f32; 2]; channels];
    let mut noise = noise(7 + channels as u32);
    let mut samples = Vec::with_capacity(frames * channels);
    for i in 0..frames {
        let level = 0.25 + 0.2 * libm::sinf(i as f32 / rate as f32 * 8.0 * std::f32::consts::PI);
        for [first, second] in &mut state {
            *first += smoothing * (noise.next().unwrap() - *first);
            *second += smoothing * (*first - *second);
            samples.push((*second * level * 2.0).clamp(-0.9, 0.9));
        }
    }
    samples
}

fn mono(samples: &[f32], channels: usize) -> Vec<f32> {
    samples.chunks_exact(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect()
}

fn resampled(samples: &[f32], rate: u32) -> Vec<f32> {
    Resampler::new(NonZeroU32::new(rate).unwrap(), NonZeroU32::new(16_000).unwrap()).process(samples)
}

/// Encodes interleaved samples with `ffmpeg`; the file is seekable, as MP4 needs it.
fn encode(samples: &[f32], rate: u32, channels: usize, name: &str, options: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    let bytes: Vec<u8> = samples.iter().flat_map(|v| v.to_le_bytes()).collect();
    let (rate, channels) = (rate.to_string(), channels.to_string());
    let mut arguments = vec!["-f", "f32le", "-ar", &rate, "-ac", &channels, "-i", "pipe:0"];
    arguments.extend(options);
    arguments.push(path.to_str().unwrap());
    ffmpeg(&arguments, &bytes);
    fs::read(path).unwrap()
}

/// What `ffmpeg` makes of the same file, interleaved.
fn decoded_by_ffmpeg(name: &str, bytes: &[u8]) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    let raw = ffmpeg(&["-i", path.to_str().unwrap(), "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"], &[]);
    raw.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect()
}

fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let (mut ab, mut aa, mut bb) = (0.0, 1e-12, 1e-12);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    ab / (aa * bb).sqrt()
}

/// The lag of `found` behind `expected` at which they agree best, and how well.
fn best_lag(expected: &[f32], found: &[f32]) -> (isize, f64) {
    (-60isize..=60)
        .map(|lag| {
            let (a, b) = if lag >= 0 { (0, lag as usize) } else { (lag.unsigned_abs(), 0) };
            (lag, correlation(&expected[a.min(expected.len())..], &found[b.min(found.len())..]))
        })
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap()
}

/// Checks length, delay and likeness of what comes back of a recording.
fn assert_same(name: &str, source: &[f32], rate: u32, channels: usize, audio: &Audio, likeness: f64) {
    let frames = source.len() / channels;
    assert_eq!(audio.source_rate, rate, "{name}");
    assert_eq!(audio.source_channels as usize, channels, "{name}");
    let found = (audio.seconds * f64::from(rate)).round() as usize;
    assert_eq!(found, frames, "{name}: samples at {rate} Hz with {channels} channels");
    let expected = resampled(&mono(source, channels), rate);
    assert_eq!(audio.samples.len(), expected.len(), "{name}");
    let (lag, alike) = best_lag(&expected, &audio.samples);
    assert_eq!(lag, 0, "{name} at {rate} Hz with {channels} channels");
    assert!(alike > likeness, "{name} at {rate} Hz with {channels} channels: correlation {alike}");

    let track = &audio.soundtrack;
    assert_eq!(track.channels, if channels == 2 { 2 } else { 1 }, "{name}");
    assert!([32_000, 44_100, 48_000].contains(&track.rate), "{name}");
    if track.rate == rate {
        let whole = if channels == 2 { source.to_vec() } else { mono(source, channels) };
        assert_eq!(track.samples.len(), whole.len(), "{name}");
        let (lag, alike) =
            best_lag(&mono(&whole, track.channels as usize), &mono(&track.samples, track.channels as usize));
        assert_eq!(lag, 0, "{name}: sound track");
        assert!(alike > likeness, "{name}: sound track, correlation {alike}");
    } else {
        let seconds = track.samples.len() as f64 / f64::from(track.rate * track.channels);
        assert!(
            (seconds - audio.seconds).abs() < 0.5 / f64::from(track.rate) + 1e-9,
            "{name}: sound track of {seconds} s"
        );
    }
}

fn refused(bytes: Vec<u8>, limit_seconds: f64) -> String {
    match decode(bytes, limit_seconds) {
        Err(Error::InvalidInput { field: "audio", reason }) => reason,
        other => panic!("not refused: {:?}", other.map(|audio| audio.seconds)),
    }
}

#[test]
fn lossless_formats_come_back_exactly() {
    let cases: &[(&str, &[&str], &[u32], &[usize])] = &[
        ("a.wav", &["-c:a", "pcm_s16le"], &[8000, 11025, 16000, 22050, 44100, 48000, 96000], &[1, 2, 6]),
        ("a.wav", &["-c:a", "pcm_s24le"], &[48000], &[2]),
        ("a.wav", &["-c:a", "pcm_f32le"], &[1000, 44100, 47952, 384_000], &[1, 8]),
        ("a.wav", &["-c:a", "pcm_f64le"], &[16000], &[1]),
        ("a.flac", &["-sample_fmt", "s16"], &[8000, 44100, 96000], &[1, 2, 6]),
        ("a.flac", &["-sample_fmt", "s32"], &[48000], &[2]),
        ("a.ogg", &["-c:a", "flac"], &[44100], &[2]),
        ("a.m4a", &["-c:a", "alac"], &[44100, 48000], &[1, 2]),
    ];
    for (name, options, rates, channel_counts) in cases {
        for &rate in *rates {
            for &channels in *channel_counts {
                let source = speech(rate, channels, rate as usize * 7 / 10 + 13);
                let bytes = encode(&source, rate, channels, name, options);
                let label = format!("{name} {options:?}");
                let audio = decode(bytes, 60.0).unwrap_or_else(|fault| panic!("{label} {rate} x{channels}: {fault}"));
                assert_same(&label, &source, rate, channels, &audio, 0.9999);
                let expected = resampled(&mono(&source, channels), rate);
                let worst = expected.iter().zip(&audio.samples).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 6e-5, "{label} {rate} x{channels}: off by {worst}");
            }
        }
    }
}

#[test]
fn lossy_formats_keep_length_and_place() {
    let cases: &[(&str, &[&str], &[u32], &[usize])] = &[
        ("a.mp3", &["-b:a", "128k"], &[32000, 44100, 48000], &[1, 2]),
        ("a.mp3", &["-b:a", "64k"], &[16000, 22050, 24000], &[1, 2]),
        ("a.mp3", &["-b:a", "48k"], &[8000, 11025, 12000], &[1]),
        ("a.mp3", &["-q:a", "2", "-id3v2_version", "3", "-write_id3v1", "1", "-metadata", "title=x"], &[44100], &[2]),
        ("a.m4a", &["-c:a", "aac", "-b:a", "128k"], &[16000, 22050, 44100, 48000, 96000], &[1, 2]),
        ("a.m4a", &["-c:a", "aac", "-b:a", "48k"], &[8000, 11025], &[1]),
        ("a.m4a", &["-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart"], &[44100], &[2]),
        ("a.mov", &["-c:a", "aac", "-b:a", "128k"], &[48000], &[2]),
        ("a.ogg", &["-c:a", "libvorbis", "-q:a", "6"], &[8000, 16000, 44100, 48000, 96000], &[1, 2]),
        ("a.ogg", &["-c:a", "libvorbis", "-q:a", "6"], &[48000], &[6]),
    ];
    for (name, options, rates, channel_counts) in cases {
        for &rate in *rates {
            for &channels in *channel_counts {
                let source = speech(rate, channels, rate as usize * 7 / 10 + 13);
                let bytes = encode(&source, rate, channels, name, options);
                let label = format!("{name} {options:?}");
                let audio =
                    decode(bytes.clone(), 60.0).unwrap_or_else(|fault| panic!("{label} {rate} x{channels}: {fault}"));
                // How much the codec itself loses is its own affair: another decoder loses the same.
                assert_same(&label, &source, rate, channels, &audio, 0.9);
                let other = resampled(&mono(&decoded_by_ffmpeg(name, &bytes), channels), rate);
                let alike = correlation(&other, &audio.samples);
                assert!(alike > 0.9995, "{label} {rate} x{channels}: correlation with ffmpeg's decoder {alike}");
            }
        }
    }
}

#[test]
fn block_codecs_and_streams_without_length_are_read_to_the_last_sample() {
    let source = speech(22050, 1, 20_000);
    let adpcm = decode(encode(&source, 22050, 1, "a.wav", &["-c:a", "adpcm_ms"]), 60.0).unwrap();
    assert!(best_lag(&resampled(&source, 22050), &adpcm.samples).1 > 0.98);
    let law = decode(encode(&source, 22050, 1, "a.wav", &["-c:a", "pcm_mulaw"]), 60.0).unwrap();
    assert_same("mu-law", &source, 22050, 1, &law, 0.99);

    // Through a pipe, ffmpeg cannot write the length.
    let bytes: Vec<u8> = source.iter().flat_map(|v| v.to_le_bytes()).collect();
    let piped = ffmpeg(&["-f", "f32le", "-ar", "22050", "-ac", "1", "-i", "pipe:0", "-f", "wav", "pipe:1"], &bytes);
    assert!(piped.windows(8).any(|part| part == b"data\xff\xff\xff\xff"));
    assert_same("piped", &source, 22050, 1, &decode(piped, 60.0).unwrap(), 0.999);
}

#[test]
fn the_sound_of_a_video_is_taken() {
    let source = speech(48000, 2, 48_000);
    let options =
        ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=25:duration=1", "-c:a", "aac", "-b:a", "128k", "-shortest"];
    let audio = decode(encode(&source, 48000, 2, "a.mp4", &options), 60.0).unwrap();
    let (lag, alike) = best_lag(&resampled(&mono(&source, 2), 48000), &audio.samples);
    assert_eq!(lag, 0);
    assert!(alike > 0.97, "{alike}");
}

#[test]
fn what_is_no_recording_is_refused() {
    assert_eq!(refused(Vec::new(), 9.0), "is empty (0 bytes)");
    assert!(refused(b"hello, I am text".repeat(1000), 9.0).contains("not a recording"));
    let mut picture = b"\x89PNG\r\n\x1a\n".to_vec();
    picture.extend(noise(1).take(300_000).map(|v| (v * 127.0) as i8 as u8));
    assert!(refused(picture, 9.0).contains("not a recording"));
    // The mark of every kind, then nonsense.
    for head in [
        &b"RIFF\xff\xff\0\0WAVE"[..],
        b"fLaC",
        b"OggS",
        b"\0\0\0\x20ftypM4A ",
        b"ID3\x04\0\0\0\0\0\0",
        b"\xff\xfb\x90\x64",
    ] {
        let mut bytes = head.to_vec();
        bytes.extend(noise(2).take(50_000).map(|v| (v * 127.0) as i8 as u8));
        refused(bytes, 9.0);
        refused(head.to_vec(), 9.0);
    }
    let opus = encode(&speech(48000, 1, 48_000), 48000, 1, "a.ogg", &["-c:a", "libopus"]);
    assert!(refused(opus, 9.0).contains("Opus"));
    let surround = encode(&speech(48000, 6, 48_000), 48000, 6, "a.m4a", &["-c:a", "aac"]);
    assert!(refused(surround, 9.0).contains("codec that is not supported"));
    let silent_film = {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.mp4");
        ffmpeg(&["-f", "lavfi", "-i", "testsrc=size=64x64:duration=1", path.to_str().unwrap()], b"");
        fs::read(path).unwrap()
    };
    assert_eq!(refused(silent_film, 9.0), "has no sound in it");
}

#[test]
fn lengths_are_held_to_their_limits() {
    let wav = |frames: usize| encode(&speech(16000, 1, frames), 16000, 1, "a.wav", &["-c:a", "pcm_s16le"]);
    assert_eq!(refused(wav(0), 9.0), "has no samples");
    assert_eq!(refused(wav(639), 9.0), "is 0.0399 s long; one frame of video needs 0.04 s");
    assert_eq!(decode(wav(640), 9.0).unwrap().samples.len(), 640);
    assert_eq!(decode(wav(16_000), 1.0).unwrap().samples.len(), 16_000);
    assert_eq!(refused(wav(16_160), 1.0), "is 1.010 s long, over the limit of 1 s");
}

/// Three hours, as a file of 43 MB and of 260 kB.
#[test]
fn three_hours_are_refused_quickly() {
    for arguments in [
        &["-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono", "-t", "10800", "-c:a", "pcm_u8", "-f", "wav", "pipe:1"][..],
        &["-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono", "-t", "10800", "-c:a", "flac", "-f", "flac", "pipe:1"],
    ] {
        let bytes = ffmpeg(arguments, b"");
        let before = std::time::Instant::now();
        assert_eq!(refused(bytes, 120.0), "is longer than the limit of 120 s");
        assert!(before.elapsed().as_secs_f64() < 2.0, "{:?}", before.elapsed());
    }
}

#[test]
fn samples_that_are_no_numbers_are_refused() {
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf"), (20_000.0, "20000")]
    {
        let mut samples = speech(16000, 1, 16_000);
        samples[8_000] = value;
        // ffmpeg passes the samples on as they are.
        let reason = refused(encode(&samples, 16000, 1, "a.wav", &["-c:a", "pcm_f32le"]), 9.0);
        assert!(reason.starts_with(&format!("has the sample {shown} at 0.500 s")), "{reason}");
    }
}

#[test]
fn damage_in_the_middle_and_missing_ends_are_noticed() {
    let source = speech(44100, 2, 88_200);
    let files: &[(&str, &[&str])] = &[
        ("a.wav", &["-c:a", "pcm_s16le"]),
        ("a.flac", &[]),
        ("a.mp3", &["-b:a", "128k"]),
        ("a.ogg", &["-c:a", "libvorbis"]),
        ("a.m4a", &["-c:a", "aac", "-movflags", "+faststart"]),
        ("a.m4a", &["-c:a", "alac"]),
    ];
    for (name, options) in files {
        let whole = encode(&source, 44100, 2, name, options);
        for part in [0.2, 0.5, 0.9] {
            let cut = whole[..(whole.len() as f64 * part) as usize].to_vec();
            println!("{name} {options:?}, {part} of it");
            refused(cut, 60.0);
        }
        if *name != "a.wav" {
            let mut damaged = whole.clone();
            for (byte, value) in damaged[whole.len() / 2..whole.len() / 2 + 3000].iter_mut().zip(noise(3)) {
                *byte = (value * 127.0) as i8 as u8;
            }
            // FLAC and Ogg have checksums. Elsewhere damage may decode to noise; then at least nothing is missing.
            match decode(damaged, 60.0) {
                Err(Error::InvalidInput { field: "audio", .. }) => {}
                Ok(audio) if !["a.flac", "a.ogg"].contains(name) && audio.seconds == 2.0 => {}
                other => panic!("{name} {options:?}: {:?}", other.map(|audio| audio.seconds)),
            }
        }
        // Anything may follow the end; in FLAC it hides where the last frame ends.
        let mut longer = whole;
        if *name == "a.flac" {
            continue;
        }
        longer.extend(b"APETAGEX and a note of whoever had the file before".repeat(20));
        let audio = decode(longer, 60.0).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        assert_same(name, &source, 44100, 2, &audio, 0.97);
    }
}

/// Thousands of small changes; whatever comes of it, it is no panic and not a long wait.
#[test]
fn hostile_files_end_in_an_answer() {
    let source = speech(16000, 1, 4_000);
    for (name, options) in [
        ("a.wav", &["-c:a", "pcm_s16le"][..]),
        ("a.wav", &["-c:a", "adpcm_ima_wav"]),
        ("a.flac", &[]),
        ("a.mp3", &[]),
        ("a.ogg", &["-c:a", "libvorbis"]),
        ("a.m4a", &["-c:a", "aac"]),
    ] {
        let whole = encode(&source, 16000, 1, name, options);
        let mut random = noise(11).map(|v| ((v + 1.0) * 0.499_999 * 65_536.0) as usize);
        let mut next = move || random.next().unwrap();
        for round in 0..300 {
            let mut bytes = whole.clone();
            for _ in 0..1 + round % 5 {
                // Mostly headers: they hold the lengths.
                let end = if round % 3 == 0 { bytes.len() } else { bytes.len().min(600) };
                let at = (next() * 65_536 + next()) % end;
                bytes[at] = [next() as u8, 0, 0xff, 0x80][next() % 4];
            }
            let _ = decode(bytes, 5.0);
        }
    }
}
