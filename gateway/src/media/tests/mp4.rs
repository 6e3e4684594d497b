use std::path::Path;
use std::process::Command;

use super::{ffmpeg, noise};
use crate::media::Error;
use crate::media::audio::Soundtrack;
use crate::media::mp4::{Clip, Settings, Writer, version};

const WIDTH: u32 = 96;
const HEIGHT: u32 = 64;

/// A moving gradient with some grain.
fn frames(count: usize) -> Vec<u8> {
    let mut grain = noise(21);
    let mut rgb = Vec::with_capacity(count * (WIDTH * HEIGHT * 3) as usize);
    for t in 0..count as u32 {
        for y in 0..HEIGHT {
            for x in 0..WIDTH {
                let grain = (grain.next().unwrap() * 4.0) as i32;
                let colour = [x * 2 + t, y * 3, 128 + t].map(|v| (v as i32 % 240 + grain).clamp(0, 255) as u8);
                rgb.extend(colour);
            }
        }
    }
    rgb
}

fn sound(rate: u32, channels: u32, frames: usize) -> Soundtrack {
    let step = 440.0 * std::f32::consts::TAU / rate as f32;
    let samples = (0..frames * channels as usize).map(|i| 0.4 * libm::sinf(step * (i / channels as usize) as f32));
    Soundtrack { rate, channels, samples: samples.collect() }
}

fn settings(directory: &Path) -> Settings<'_> {
    Settings { program: Path::new("ffmpeg"), directory, width: WIDTH, height: HEIGHT }
}

async fn written(directory: &Path, rgb: &[u8], sound: &Soundtrack) -> Clip {
    let mut writer = Writer::start(settings(directory), sound).await.unwrap();
    for part in rgb.chunks((WIDTH * HEIGHT * 3) as usize * 5) {
        writer.push_frames(part).await.unwrap();
    }
    writer.finish().await.unwrap()
}

/// One line per stream and one for the file, as `ffprobe` prints them.
fn probe(path: &Path, entries: &str) -> Vec<String> {
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-of", "compact=p=0:nk=1", "-show_entries", entries])
        .arg(path)
        .output()
        .expect("ffprobe is installed");
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).filter(|line| !line.is_empty()).collect()
}

#[tokio::test]
async fn a_clip_has_one_h264_and_one_aac_stream_of_exact_length() {
    let folder = tempfile::tempdir().unwrap();
    for (rate, channels, samples) in [(48_000, 2, 48_000 + 31), (44_100, 1, 44_100 + 5), (32_000, 1, 32_000)] {
        let count = (samples * 25usize).div_ceil(rate as usize);
        let clip = written(folder.path(), &frames(count), &sound(rate, channels, samples)).await;
        assert_eq!(clip.frames, count as u64);
        let path = folder.path().join("out.mp4");
        let bytes = clip.bytes;
        std::fs::rename(clip.path(), &path).unwrap();
        drop(clip);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the video is left");

        let streams = probe(
            &path,
            "stream=codec_type,codec_name,width,height,pix_fmt,r_frame_rate,nb_frames,color_range,color_space",
        );
        assert_eq!(streams.len(), 2, "{streams:?}");
        assert_eq!(streams[0], format!("h264|video|{WIDTH}|{HEIGHT}|yuv420p|tv|bt709|25/1|{count}"));
        assert!(streams[1].starts_with("aac|audio"), "{streams:?}");
        let durations = probe(&path, "stream=start_time,duration");
        let fields: Vec<f64> = durations.iter().flat_map(|line| line.split('|')).map(|v| v.parse().unwrap()).collect();
        let (seconds, video_seconds) = (samples as f64 / f64::from(rate), count as f64 / 25.0);
        assert_eq!((fields[0], fields[2]), (0.0, 0.0), "both begin at 0");
        assert!((fields[1] - video_seconds).abs() < 1e-5, "video {} of {video_seconds}", fields[1]);
        assert!((fields[3] - seconds).abs() < 1e-5, "sound {} of {seconds}", fields[3]);

        let file = std::fs::read(&path).unwrap();
        let place = |kind: &[u8]| file.windows(4).position(|part| part == kind).unwrap();
        assert!(place(b"moov") < place(b"mdat"), "the index comes first");
        assert!(!file.windows(4).any(|part| part == b"Lavf"), "no version of the program");
    }
}

#[tokio::test]
async fn colours_and_sound_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let colours = [[200, 30, 60], [20, 180, 90], [255, 255, 255], [0, 0, 0], [128, 128, 128]];
    let source = sound(48_000, 1, 48_000);
    for colour in colours {
        let rgb = colour.repeat((WIDTH * HEIGHT) as usize * 25);
        let clip = written(folder.path(), &rgb, &source).await;
        let path = clip.path();
        let path = path.to_str().unwrap();
        let back = ffmpeg(
            &["-i", path, "-vf", "scale=in_color_matrix=bt709", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
            b"",
        );
        assert_eq!(back.len(), rgb.len());
        for (expected, found) in colour.iter().zip(&back[back.len() / 2..]) {
            assert!(expected.abs_diff(*found) <= 3, "{colour:?}: {:?}", &back[back.len() / 2..back.len() / 2 + 3]);
        }
        let heard = ffmpeg(&["-i", path, "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"], b"");
        let heard: Vec<f32> = heard.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        // 440 Hz at 48 kHz: a shift by a tenth of a period, 11 samples, would differ by 0.25.
        let worst =
            source.samples[4_000..44_000].iter().zip(&heard[4_000..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.02, "sound off by {worst}");
    }
}

#[tokio::test]
async fn same_frames_and_sound_give_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let (rgb, sound) = (frames(30), sound(44_100, 2, 52_920));
    let first = written(folder.path(), &rgb, &sound).await.read().await.unwrap();
    let second = written(folder.path(), &rgb, &sound).await.read().await.unwrap();
    assert!(first == second);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
}

#[tokio::test]
async fn a_missing_program_says_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { program: Path::new("no-such-ffmpeg"), ..settings(folder.path()) };
    let fault = Writer::start(settings, &sound(48_000, 1, 480)).await.unwrap_err();
    assert!(matches!(&fault, Error::Tool { reason, .. } if reason.contains("apt-get install ffmpeg")), "{fault}");
    assert_eq!(version(Path::new("no-such-ffmpeg")).await.unwrap_err().to_string(), fault.to_string());
    assert!(version(Path::new("ffmpeg")).await.unwrap().starts_with("ffmpeg version"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
}

#[tokio::test]
async fn a_failing_program_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    // A rate that the encoder does not take ends it.
    let sound = Soundtrack { rate: 0, channels: 1, samples: vec![0.0; 7] };
    let mut writer = Writer::start(settings(folder.path()), &sound).await.unwrap();
    let rgb = frames(25);
    let fault = loop {
        if let Err(fault) = writer.push_frames(&rgb).await {
            break fault;
        }
        assert!(writer.frames() < 1_000, "the encoder took everything");
    };
    let Error::Tool { reason, .. } = &fault else { panic!("{fault}") };
    assert!(reason.contains("ended with exit status") && reason.len() > 40, "{fault}");
}

#[tokio::test]
async fn frames_must_be_whole() {
    let folder = tempfile::tempdir().unwrap();
    let sound = sound(48_000, 1, 4_800);
    let mut writer = Writer::start(settings(folder.path()), &sound).await.unwrap();
    assert!(matches!(writer.push_frames(&[0; 100]).await, Err(Error::Frames(_))));
    assert!(matches!(writer.finish().await, Err(Error::Frames(_))));
    let odd = Settings { width: 95, ..settings(folder.path()) };
    assert!(matches!(Writer::start(odd, &sound).await, Err(Error::Frames(_))));
}

#[tokio::test]
async fn dropping_the_writer_ends_the_program_and_removes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::start(settings(folder.path()), &sound(48_000, 1, 48_000)).await.unwrap();
    writer.push_frames(&frames(5)).await.unwrap();
    let process = writer.process().unwrap();
    drop(writer);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    for _ in 0..500 {
        // Gone, or ended and not yet collected.
        match std::fs::read_to_string(format!("/proc/{process}/stat")) {
            Ok(stat) if !stat.contains(") Z ") => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            _ => return,
        }
    }
    panic!("the program still runs");
}
