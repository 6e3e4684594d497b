//! Video out: frames and a sound track to H.264 + AAC in MP4, by an `ffmpeg` child process.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use planner::clip::FPS;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};
use tokio::task::JoinHandle;

use super::audio::Soundtrack;
use super::{Error, Result};

/// Threads of the video encoder. Fixed, because x264's output depends on their number and on nothing else.
const ENCODER_THREADS: &str = "4";
/// What the encoder says where its disk is full: the system's words, which it never has translated.
const NO_SPACE: &str = "No space left on device";
/// What of the encoder's messages is kept for an error, bytes.
const KEPT_MESSAGES: usize = 4096;

/// What a video is made of.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// The program: `ffmpeg`, or a path to it.
    pub program: &'a Path,
    /// Where the video will be needed. A hidden folder is made here for it, so that moving it out is one rename.
    pub directory: &'a Path,
    /// Pixels in a row; even.
    pub width: u32,
    /// Rows; even.
    pub height: u32,
}

/// Encodes one clip while its frames are made.
///
/// Dropping it ends the encoder and removes its files.
#[derive(Debug)]
pub struct Writer {
    child: Child,
    frames_in: ChildStdin,
    messages: JoinHandle<Vec<u8>>,
    program: String,
    frame_bytes: usize,
    frames: u64,
    directory: TempDir,
}

/// A finished video in a temporary file, which goes when this is dropped.
#[derive(Debug)]
pub struct Clip {
    /// Frames, 25 a second.
    pub frames: u64,
    /// Size of the file.
    pub bytes: u64,
    directory: TempDir,
}

impl Clip {
    /// Where the video lies.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join(VIDEO)
    }

    /// Reads the video into memory and removes the file.
    pub async fn read(self) -> Result<Vec<u8>> {
        tokio::fs::read(self.path()).await.map_err(Error::io("reading the video"))
    }
}

const VIDEO: &str = "video.mp4";
const SOUND: &str = "sound.f32";

/// Asks the program for its version, so that a missing one is noticed before work is spent on a clip.
///
/// Returns the first line, like `ffmpeg version 7.1.1 …`.
pub async fn version(program: &Path) -> Result<String> {
    let mut command = Command::new(program);
    command.args(["-hide_banner", "-version"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|fault| not_started(program, &fault))?;
    if !output.status.success() {
        return Err(failed(&program.to_string_lossy(), output.status, &output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

impl Writer {
    /// Starts the encoder.
    ///
    /// Same frames and sound give the same file with the same build of the program. The sound keeps its own length,
    /// to the sample; the video ends where its last frame does. Samples beyond full scale are limited to it.
    pub async fn start(settings: Settings<'_>, sound: &Soundtrack) -> Result<Self> {
        let Settings { program, directory, width, height } = settings;
        if width == 0 || height == 0 || width % 2 == 1 || height % 2 == 1 {
            return Err(Error::Frames(format!("{width} x {height} pixels; both sides must be even")));
        }
        let directory = tempfile::Builder::new()
            .prefix(".clip-")
            .tempdir_in(directory)
            .map_err(Error::io("making a folder for the video"))?;
        let samples: Vec<u8> = sound.samples.iter().flat_map(|value| value.clamp(-1.0, 1.0).to_le_bytes()).collect();
        tokio::fs::write(directory.path().join(SOUND), samples).await.map_err(Error::io("writing the sound"))?;

        // The encoder runs in the folder, so that no name can be taken for an option or a protocol; a relative path to
        // the program is still meant from here.
        let called = match program.components().count() {
            1 => program.to_owned(),
            _ => std::path::absolute(program).map_err(Error::io("finding the video encoder"))?,
        };
        let mut child = Command::new(called)
            .args(arguments(width, height, sound))
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|fault| not_started(program, &fault))?;
        let program = program.to_string_lossy().into_owned();
        let (Some(frames_in), Some(messages)) = (child.stdin.take(), child.stderr.take()) else {
            return Err(Error::Tool { program, reason: "started without its pipes".into() });
        };
        let frame_bytes = width as usize * height as usize * 3;
        let messages = tokio::spawn(last_messages(messages));
        Ok(Self { child, frames_in, messages, program, frame_bytes, frames: 0, directory })
    }

    /// Adds whole frames: `n · height · width · 3` bytes, RGB. Waits while the encoder is behind.
    pub async fn push_frames(&mut self, rgb: &[u8]) -> Result<()> {
        if !rgb.len().is_multiple_of(self.frame_bytes) {
            return Err(Error::Frames(format!("{} bytes are no whole frames of {}", rgb.len(), self.frame_bytes)));
        }
        if let Err(fault) = self.frames_in.write_all(rgb).await {
            return Err(self.explain(fault).await);
        }
        self.frames += (rgb.len() / self.frame_bytes) as u64;
        Ok(())
    }

    /// Frames added so far.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The encoder's process id, while it runs.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends the video and waits for the encoder.
    pub async fn finish(mut self) -> Result<Clip> {
        if self.frames == 0 {
            return Err(Error::Frames("none were made".into()));
        }
        if let Err(fault) = self.frames_in.shutdown().await {
            return Err(self.explain(fault).await);
        }
        // The pipe closes when its handle goes.
        drop(self.frames_in);
        let status = self.child.wait().await.map_err(Error::io("waiting for the video encoder"))?;
        let messages = self.messages.await.unwrap_or_default();
        if !status.success() {
            return Err(failed(&self.program, status, &messages));
        }
        let directory = self.directory;
        let video =
            tokio::fs::metadata(directory.path().join(VIDEO)).await.map_err(Error::io("looking for the video"))?;
        tokio::fs::remove_file(directory.path().join(SOUND)).await.map_err(Error::io("removing the sound"))?;
        Ok(Clip { frames: self.frames, bytes: video.len(), directory })
    }

    /// Says why the encoder stopped taking frames.
    async fn explain(&mut self, fault: io::Error) -> Error {
        if fault.kind() != io::ErrorKind::BrokenPipe {
            return Error::Io { action: "sending frames to the video encoder", source: fault };
        }
        match self.child.wait().await {
            Ok(status) => failed(&self.program, status, &(&mut self.messages).await.unwrap_or_default()),
            Err(source) => Error::Io { action: "waiting for the video encoder", source },
        }
    }
}

/// The encoder's arguments; file names are relative to its folder.
fn arguments(width: u32, height: u32, sound: &Soundtrack) -> Vec<String> {
    let size = format!("{width}x{height}");
    let fps = FPS.to_string();
    let rate = sound.rate.to_string();
    let channels = sound.channels.to_string();
    let mut arguments: Vec<&str> = vec!["-nostdin", "-hide_banner", "-loglevel", "error", "-y"];
    arguments.extend(["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", &size, "-framerate", &fps]);
    arguments.extend(["-i", "pipe:0"]);
    arguments.extend(["-f", "f32le", "-ar", &rate, "-ac", &channels, "-i", SOUND]);
    arguments.extend(["-map", "0:v:0", "-map", "1:a:0", "-map_metadata", "-1"]);
    // Full-range RGB to limited-range BT.709, said in the stream, so that players show the colours that were made.
    arguments.extend(["-filter_threads", "1", "-sws_flags", "bicubic+accurate_rnd+full_chroma_int+bitexact"]);
    arguments.extend(["-vf", "scale=in_range=full:out_range=limited:out_color_matrix=bt709,format=yuv420p"]);
    arguments.extend(["-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709"]);
    arguments.extend(["-color_trc", "bt709"]);
    arguments.extend(["-c:v", "libx264", "-preset", "medium", "-crf", "17", "-threads:v", ENCODER_THREADS]);
    arguments.extend(["-c:a", "aac", "-b:a", "128k"]);
    // No versions, dates or random numbers in the file.
    arguments.extend(["-flags:v", "+bitexact", "-flags:a", "+bitexact", "-fflags", "+bitexact"]);
    // The default scale of a millisecond would round the end of the sound.
    arguments.extend(["-movie_timescale", &rate, "-movflags", "+faststart", "-f", "mp4", VIDEO]);
    arguments.into_iter().map(str::to_owned).collect()
}

/// Reads all that the encoder says and keeps the end.
async fn last_messages(mut pipe: ChildStderr) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut part = [0; 1024];
    while let Ok(count @ 1..) = pipe.read(&mut part).await {
        kept.extend_from_slice(&part[..count]);
        kept.drain(..kept.len().saturating_sub(KEPT_MESSAGES));
    }
    kept
}

fn not_started(program: &Path, fault: &io::Error) -> Error {
    let reason = match fault.kind() {
        io::ErrorKind::NotFound => {
            "is not installed; it writes the video (Debian, Ubuntu: `apt-get install ffmpeg`)".into()
        }
        _ => format!("did not start: {fault}"),
    };
    Error::Tool { program: program.to_string_lossy().into_owned(), reason }
}

fn failed(program: &str, status: ExitStatus, messages: &[u8]) -> Error {
    let messages = String::from_utf8_lossy(messages);
    let messages = messages.trim();
    if messages.contains(NO_SPACE) {
        let source = io::Error::new(io::ErrorKind::StorageFull, format!("{program}: {messages}"));
        return Error::Io { action: "writing the video", source };
    }
    let said = if messages.is_empty() { "said nothing" } else { messages };
    Error::Tool { program: program.to_owned(), reason: format!("ended with {status}: {said}") }
}
