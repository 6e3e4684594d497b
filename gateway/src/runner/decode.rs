//! Latents to frames to MP4, as the frames come.

use std::{io::Read as _, path::Path, time::Instant};

use proto::{
    tensor::HostTensor,
    v1::{DataType, DecodeLatentsHeader, Stage},
};

use super::{
    gate::FrameGate,
    ladder::climb_decoders,
    prepare::{Prepared, refused},
    run::Run,
};
use crate::{
    fault::{Fault, Kind},
    media::mp4,
    stages::Stages,
};

/// A finished video that is not kept yet.
#[derive(Debug)]
pub(crate) struct Video {
    /// The file; it goes with this.
    pub(crate) clip: mp4::Clip,
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// CRC32C of the file.
    pub(crate) crc32c: u32,
}

/// What writes the video.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The encoder program.
    pub(crate) ffmpeg: &'a Path,
    /// The folder for files in the making.
    pub(crate) directory: &'a Path,
}

/// Decodes `latents` (C, T, h, w), of which T latent frames are wanted, and writes the video.
pub(crate) async fn decode(
    run: &Run,
    prepared: &Prepared,
    latents: HostTensor,
    target: Target<'_>,
) -> Result<Video, Fault> {
    let began = run.stage_began(Stage::VaeDecode).await;
    let (clip, memory) = climb_decoders(run, |stages, tile_divisor| {
        let header =
            DecodeLatentsHeader { generation_id: run.id(), frame_limit: prepared.plan.frames as u32, tile_divisor };
        attempt((run, stages), prepared, (header, latents.clone()), target)
    })
    .await?;
    run.stage_ended(Stage::VaeDecode, began, memory).await;
    let path = clip.path();
    let (bytes, crc32c) = tokio::task::spawn_blocking(move || sum(&path))
        .await
        .map_err(|error| Fault::internal("the video cannot be read", &error))?
        .map_err(|error| Fault::internal("the video cannot be read", &error))?;
    Ok(Video { clip, bytes, crc32c })
}

async fn attempt(
    (run, stages): (&Run, Stages),
    prepared: &Prepared,
    (header, latents): (DecodeLatentsHeader, HostTensor),
    target: Target<'_>,
) -> Result<(mp4::Clip, proto::v1::MemoryReport), Fault> {
    let (width, height, wanted) = (prepared.size.width, prepared.size.height, prepared.plan.frames);
    let settings = mp4::Settings { program: target.ffmpeg, directory: target.directory, width, height };
    run.begins_anew(Stage::VaeDecode);
    let began = Instant::now();
    let (at, watchman) = ((&stages, Stage::VaeDecode), run.watchman());
    let mut pace = watchman.pace(Stage::VaeDecode);
    let call = async {
        let mut frames = stages.decode_latents(header, latents).await?;
        let first = frames.next().await?;
        Ok::<_, Fault>((frames, first))
    };
    let ((mut frames, mut next), mut took) = watchman.in_time(at, pace.limit(1), call).await?;
    let mut writer = mp4::Writer::start(settings, &prepared.audio.soundtrack).await.map_err(refused)?;
    let (mut done, mut gate) = (0, FrameGate::default());
    while let Some(tensor) = next {
        pace.learn(1, took);
        let fits = matches!(*tensor.shape(), [_, h, w, 3] if h == height as usize && w == width as usize);
        if !fits || tensor.dtype() != DataType::U8 || done + tensor.shape()[0] > wanted {
            let expected = format!("U8 [at most {}, {height}, {width}, 3]", wanted - done);
            return Err(Fault::new(Kind::Internal, tensor.mismatch(expected).to_string()).at(Stage::VaeDecode));
        }
        done += tensor.shape()[0];
        gate.push(tensor.data(), 3 * height as usize * width as usize)?;
        writer.push_frames(tensor.data()).await.map_err(refused)?;
        run.frames_done(done, wanted, began.elapsed().as_secs_f64() / done as f64).await;
        (next, took) = watchman.in_time(at, pace.limit(1), frames.next()).await?;
    }
    if done != wanted {
        let message = format!("vae-decode: {done} frames came, {wanted} were asked for");
        return Err(Fault::new(Kind::Internal, message).at(Stage::VaeDecode));
    }
    run.devices.add(frames.device_use());
    gate.finish()?;
    Ok((writer.finish().await.map_err(refused)?, frames.memory()))
}

/// Length and CRC32C of a file.
fn sum(path: &Path) -> std::io::Result<(u64, u32)> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let (mut bytes, mut crc) = (0, 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, crc)),
            n => {
                crc = crc32c::crc32c_append(crc, &buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}
