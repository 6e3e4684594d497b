//! Recordings in: any common format, rate and channel count to 16 kHz mono for the model, and a sound track for the
//! video.

use std::io::{Cursor, ErrorKind};
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};

use planner::clip::SAMPLES_PER_FRAME;
use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::well_known::CODEC_ID_OPUS;
use symphonia::core::codecs::audio::{AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error as Fault;
use symphonia::core::formats::{FormatReader, TrackType, probe::Hint};
use symphonia::core::io::MediaSourceStream;

use super::container::{Kind, ogg_is_whole, settle_wav_length};
use super::edits::{Presentation, presentation};
use super::resample::Resampler;
use super::{Error, Result};

/// Samples a second of what the model hears.
pub const MODEL_RATE: u32 = 16_000;
/// Lowest and highest rate of a recording, Hz.
pub const RATES: std::ops::RangeInclusive<u32> = 1_000..=384_000;
/// Most channels of a recording.
pub const MAX_CHANNELS: usize = 32;
/// Largest magnitude of a sample; full scale is 1. Floating-point files may pass full scale by this much (24 dB);
/// more means that their numbers are in another unit.
pub const MAX_MAGNITUDE: f32 = 16.0;

/// Rates that a sound track keeps; others become [`SOUNDTRACK_RATE`]. Every player takes these.
const SOUNDTRACK_RATES: [u32; 3] = [32_000, 44_100, 48_000];
/// Rate of a sound track whose recording has an unusual one.
const SOUNDTRACK_RATE: u32 = 48_000;
/// Samples by which an MPEG stream may fall short of its stated length: one frame, as some encoders count the frame
/// that holds the statement.
const FRAME_SLACK: u64 = 1_152;
/// No packet of any format decodes to more samples a channel.
const LARGEST_PACKET: u64 = 65_536;
const SUPPORTED: &str = "WAV, MP3, M4A (AAC-LC or ALAC), FLAC or Ogg Vorbis";

/// A decoded recording.
#[derive(Debug, Clone)]
pub struct Audio {
    /// The mean of all channels at 16 kHz; `round(source samples · 16000 / source_rate)` of them, at least 640.
    pub samples: Vec<f32>,
    /// Rate of the recording, Hz.
    pub source_rate: u32,
    /// Channels of the recording.
    pub source_channels: u32,
    /// Length of the recording at its own rate, without an encoder's priming and padding.
    pub seconds: f64,
    /// What the video plays.
    pub soundtrack: Soundtrack,
}

/// The recording as the video plays it.
#[derive(Debug, Clone)]
pub struct Soundtrack {
    /// 32000, 44100 or 48000 Hz: the recording's own rate where it is one of these.
    pub rate: u32,
    /// One, or two where the recording has exactly two. More channels are mixed to one.
    pub channels: u32,
    /// Interleaved samples, full scale 1.
    pub samples: Vec<f32>,
}

/// Decodes a whole recording.
///
/// Sample 0 is the first sample of the source: priming and padding of MP3 and M4A are removed where the file states
/// them. Refuses, with the reason: what is empty, no recording or of no supported codec; rates and channel counts
/// outside [`RATES`] and [`MAX_CHANNELS`]; samples that are not numbers or beyond [`MAX_MAGNITUDE`]; less than one
/// video frame (40 ms); more than `limit_seconds` (decoding stops there); a file that is damaged or ends too early.
///
/// What follows the end of the sound is ignored, as MP3 files carry tags there; only in FLAC it hides the last frame, and
/// the file counts as damaged. A frame lost inside an MP3 is noticed where the file states its length.
///
/// CPU-bound and blocking; memory is that of the decoded limit.
pub fn decode(mut bytes: Vec<u8>, limit_seconds: f64) -> Result<Audio> {
    if bytes.is_empty() {
        return Err(Error::audio("is empty (0 bytes)"));
    }
    let Some(kind) = Kind::of(&bytes) else {
        return Err(Error::audio(format!("is not a recording in a known format; send {SUPPORTED}")));
    };
    if kind == Kind::Wav {
        settle_wav_length(&mut bytes).map_err(|cut| {
            Error::audio(format!("is cut short: {} of {} bytes of samples are there", cut.present, cut.stated))
        })?;
    }
    if kind == Kind::Ogg && !ogg_is_whole(&bytes) {
        return Err(Error::audio("is cut short: its last page is not marked as the end"));
    }
    // The decoders promise not to panic; a file that finds an exception must not take the process with it.
    let recording = catch_unwind(AssertUnwindSafe(|| Decoding::new(kind, limit_seconds).run(&bytes)))
        .unwrap_or_else(|_| Err(Error::audio("is damaged: its decoder failed")))?;
    drop(bytes);
    finish(recording, limit_seconds)
}

/// Samples at the recording's own rate.
struct Recording {
    rate: NonZeroU32,
    source_channels: usize,
    /// Channels in `samples`: one or two.
    channels: usize,
    /// Interleaved.
    samples: Vec<f32>,
}

impl Recording {
    fn frames(&self) -> u64 {
        (self.samples.len() / self.channels) as u64
    }

    fn seconds(&self) -> f64 {
        self.frames() as f64 / f64::from(self.rate.get())
    }
}

/// The state of one decoding.
struct Decoding {
    kind: Kind,
    limit_seconds: f64,
    recording: Option<Recording>,
    presentation: Presentation,
    /// Samples a channel that the decoder gave so far, also those that are skipped.
    decoded: u64,
    scratch: Vec<f32>,
}

impl Decoding {
    fn new(kind: Kind, limit_seconds: f64) -> Self {
        let presentation = Presentation { skip: 0, length: None, length_tolerance: 0 };
        Self { kind, limit_seconds, recording: None, presentation, decoded: 0, scratch: Vec::new() }
    }

    fn run(mut self, bytes: &[u8]) -> Result<Recording> {
        let source = MediaSourceStream::new(Box::new(Cursor::new(bytes)), Default::default());
        let probe = symphonia::default::get_probe();
        let mut reader = probe
            .probe(&Hint::new(), source, Default::default(), Default::default())
            .map_err(|fault| Error::audio(format!("cannot be read: {fault}")))?;
        let Some(track) = reader.default_track(TrackType::Audio) else {
            return Err(Error::audio("has no sound in it"));
        };
        let (track_id, stated) = (track.id, track.num_frames);
        let scale = track.time_base;
        let Some(CodecParameters::Audio(parameters)) = &track.codec_params else {
            return Err(Error::audio(format!("has an unknown codec; send {SUPPORTED}")));
        };
        if parameters.codec == CODEC_ID_OPUS {
            return Err(Error::audio(format!("is Opus, which is not supported; send {SUPPORTED}")));
        }
        let options = AudioDecoderOptions::default().verify(true);
        let mut decoder = symphonia::default::get_codecs()
            .make_audio_decoder(parameters, &options)
            .map_err(|fault| Error::audio(format!("has a codec that is not supported ({fault}); send {SUPPORTED}")))?;
        let media_end = self.packets(bytes, reader.as_mut(), decoder.as_mut(), track_id)?;
        let Some(mut recording) = self.recording.take() else {
            return Err(Error::audio("has no samples"));
        };
        if self.kind == Kind::Mp4 {
            let rate = u128::from(recording.rate.get());
            // The last packet of a track often states how much of it counts.
            let end = media_end.zip(scale).map_or(self.decoded, |(end, scale)| {
                let samples = u128::from(end) * rate * u128::from(scale.numer.get());
                let denominator = u128::from(scale.denom.get());
                u64::try_from((samples + denominator / 2) / denominator).unwrap_or(u64::MAX).min(self.decoded)
            });
            let heard = heard(end, self.presentation).min(recording.frames());
            recording.samples.truncate(heard as usize * recording.channels);
        } else if let Some(stated) = stated {
            self.check_stated(stated, &mut recording)?;
        }
        if decoder.finalize().verify_ok == Some(false) {
            return Err(Error::audio("is damaged: its samples do not match their checksum"));
        }
        Ok(recording)
    }

    /// Decodes packet by packet; returns the end of the last packet in units of the track.
    fn packets(
        &mut self,
        bytes: &[u8],
        reader: &mut dyn FormatReader,
        decoder: &mut dyn AudioDecoder,
        track_id: u32,
    ) -> Result<Option<u64>> {
        let mut media_end = None;
        let mut undecodable = None;
        while !self.has_enough() {
            let packet = match reader.next_packet() {
                Ok(Some(packet)) if packet.track_id != track_id => continue,
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(Fault::IoError(fault)) if fault.kind() == ErrorKind::UnexpectedEof && self.kind != Kind::Mp4 => {
                    break;
                }
                Err(Fault::ResetRequired) => {
                    return Err(Error::audio("is several recordings one behind the other; send one"));
                }
                Err(fault) => return Err(self.damaged(&fault)),
            };
            match decoder.decode(&packet) {
                Ok(buffer) => {
                    // More sound behind what could not be decoded: that was no tag at the end.
                    if let Some(fault) = undecodable {
                        return Err(self.damaged(&fault));
                    }
                    let mut scratch = std::mem::take(&mut self.scratch);
                    buffer.copy_to_vec_interleaved(&mut scratch);
                    let (rate, channels) = (buffer.spec().rate(), buffer.spec().channels().count());
                    self.scratch = scratch;
                    self.accept(bytes, track_id, rate, channels)?;
                    media_end = u64::try_from(packet.pts.get()).ok().map(|pts| pts.saturating_add(packet.dur.get()));
                }
                Err(fault) if self.kind == Kind::Frames => undecodable = Some(fault),
                Err(fault) => return Err(self.damaged(&fault)),
            }
        }
        match undecodable {
            Some(fault) if self.decoded == 0 => Err(self.damaged(&fault)),
            _ => Ok(media_end),
        }
    }

    /// Takes the samples in `scratch`.
    fn accept(&mut self, bytes: &[u8], track_id: u32, rate: u32, channels: usize) -> Result<()> {
        if self.scratch.is_empty() {
            return Ok(());
        }
        let recording = match &mut self.recording {
            Some(recording) => recording,
            none => {
                let fresh = start(rate, channels)?;
                if self.kind == Kind::Mp4 {
                    self.presentation = presentation(bytes, track_id, rate).map_err(|_| {
                        Error::audio("is cut from several parts by an edit list; export it as one recording")
                    })?;
                }
                none.insert(fresh)
            }
        };
        if (rate, channels) != (recording.rate.get(), recording.source_channels) {
            return Err(Error::audio(format!(
                "changes from {} Hz and {} channels to {rate} Hz and {channels} channels on the way",
                recording.rate, recording.source_channels
            )));
        }
        let frames = self.scratch.len() / channels;
        let skipped = self.presentation.skip.saturating_sub(self.decoded).min(frames as u64) as usize;
        self.decoded += frames as u64;
        for frame in self.scratch.chunks_exact(channels).skip(skipped) {
            if let Some(value) = frame.iter().find(|value| !(value.abs() <= MAX_MAGNITUDE)) {
                return Err(Error::audio(format!(
                    "has the sample {value} at {:.3} s; samples are numbers from -{MAX_MAGNITUDE} to {MAX_MAGNITUDE}",
                    recording.seconds()
                )));
            }
            if recording.channels == channels {
                recording.samples.extend_from_slice(frame);
            } else {
                recording.samples.push(frame.iter().sum::<f32>() / channels as f32);
            }
        }
        // What lies past the limit may still be padding; a packet's worth of it is cut off at the end.
        if recording.frames().saturating_sub(LARGEST_PACKET) as f64 > self.limit_seconds * f64::from(rate) {
            return Err(too_long(self.limit_seconds, None));
        }
        Ok(())
    }

    /// True when all samples of the presentation are decoded.
    fn has_enough(&self) -> bool {
        let Presentation { skip, length, length_tolerance } = self.presentation;
        length.is_some_and(|length| self.decoded > skip.saturating_add(length).saturating_add(length_tolerance))
    }

    /// Compares with the length that the file states; cuts what is over, as ADPCM fills its last block.
    fn check_stated(&self, stated: u64, recording: &mut Recording) -> Result<()> {
        let found = recording.frames();
        let slack = if self.kind == Kind::Frames { FRAME_SLACK } else { 0 };
        if found + slack < stated {
            return Err(Error::audio(format!("is cut short or damaged: {found} of {stated} samples are there")));
        }
        if self.kind != Kind::Frames {
            recording.samples.truncate((stated as usize).saturating_mul(recording.channels));
        }
        Ok(())
    }

    fn damaged(&self, fault: &Fault) -> Error {
        let at = self.recording.as_ref().map_or(0.0, Recording::seconds);
        Error::audio(format!("is damaged at {at:.3} s: {fault}"))
    }
}

/// How many samples of an MP4 track are heard when its packets end at sample `end`.
///
/// Where the edit list means the same end, the packets say it exactly.
fn heard(end: u64, presentation: Presentation) -> u64 {
    let to_end = end.saturating_sub(presentation.skip);
    match presentation.length {
        Some(length) if to_end.abs_diff(length) > presentation.length_tolerance => length.min(to_end),
        Some(length) if presentation.length_tolerance == 0 => length,
        _ => to_end,
    }
}

/// Begins a recording, or refuses its rate or channels.
fn start(rate: u32, channels: usize) -> Result<Recording> {
    let rate = NonZeroU32::new(rate).filter(|rate| RATES.contains(&rate.get())).ok_or_else(|| {
        Error::audio(format!("has a rate of {rate} Hz; {} to {} Hz can be read", RATES.start(), RATES.end()))
    })?;
    if !(1..=MAX_CHANNELS).contains(&channels) {
        return Err(Error::audio(format!("has {channels} channels; 1 to {MAX_CHANNELS} can be read")));
    }
    let kept = if channels == 2 { 2 } else { 1 };
    Ok(Recording { rate, source_channels: channels, channels: kept, samples: Vec::new() })
}

fn too_long(limit_seconds: f64, seconds: Option<f64>) -> Error {
    let length = seconds.map_or_else(|| "is longer than".into(), |seconds| format!("is {seconds:.3} s long, over"));
    Error::audio(format!("{length} the limit of {limit_seconds} s"))
}

/// Checks the length and makes both versions of the recording.
fn finish(recording: Recording, limit_seconds: f64) -> Result<Audio> {
    const MODEL: NonZeroU32 = NonZeroU32::new(MODEL_RATE).unwrap();
    const PLAYED: NonZeroU32 = NonZeroU32::new(SOUNDTRACK_RATE).unwrap();

    let seconds = recording.seconds();
    if recording.samples.is_empty() {
        return Err(Error::audio("has no samples"));
    }
    if seconds > limit_seconds {
        return Err(too_long(limit_seconds, Some(seconds)));
    }
    let to_model = Resampler::new(recording.rate, MODEL);
    if to_model.output_len(recording.frames() as usize) < SAMPLES_PER_FRAME {
        return Err(Error::audio(format!("is {seconds:.4} s long; one frame of video needs 0.04 s")));
    }
    let samples = match recording.channels {
        2 => {
            let mono: Vec<f32> = recording.samples.chunks_exact(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            to_model.process(&mono)
        }
        _ => to_model.process(&recording.samples),
    };
    let source_rate = recording.rate.get();
    let source_channels = recording.source_channels as u32;
    let channels = recording.channels as u32;
    let soundtrack = if SOUNDTRACK_RATES.contains(&source_rate) {
        Soundtrack { rate: source_rate, channels, samples: recording.samples }
    } else {
        let to_played = Resampler::new(recording.rate, PLAYED);
        let samples = match recording.channels {
            2 => {
                let side = |at: usize| recording.samples.iter().skip(at).step_by(2).copied().collect::<Vec<f32>>();
                let (left, right) = (to_played.process(&side(0)), to_played.process(&side(1)));
                left.into_iter().zip(right).flat_map(|(left, right)| [left, right]).collect()
            }
            _ => to_played.process(&recording.samples),
        };
        Soundtrack { rate: SOUNDTRACK_RATE, channels, samples }
    };
    Ok(Audio { samples, source_rate, source_channels, seconds, soundtrack })
}
