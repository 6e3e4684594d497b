//! Small pictures of how far a denoise is: one latent frame, decoded beside the steps.
//!
//! A preview is a guest. It changes no latent, nothing waits for it, and whatever goes wrong with it costs the picture
//! alone. The decoder gets one latent frame in small tiles, and only where its device has room to spare.

use std::{io::Cursor, sync::Arc};

use image::{DynamicImage, RgbImage, codecs::jpeg::JpegEncoder};
use proto::{
    tensor::HostTensor,
    v1::{DataType, DecodeLatentsHeader, DescribeResponse, Preview, Stage},
};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::{devices::Devices, run::Run};
use crate::{
    fault::{Fault, Kind},
    stages::Stages,
    store::{Change, Lease},
};

/// Longest side of a preview in pixels.
const SIDE: u32 = 256;
const JPEG_QUALITY: u8 = 80;
/// What the decoder's tiles are shrunk by: half as long a side needs a quarter of the memory.
const TILE_DIVISOR: u32 = 2;
/// Share of a device's budget that must be free: what the transformer keeps there must not have to go for a preview.
const FREE_SHARE: u64 = 4;

/// How many previews a generation has, and whose turn it is.
#[derive(Debug, Clone)]
pub(crate) struct Previews {
    /// Previews of a generation.
    count: usize,
    /// One at a time in the whole gateway; who finds it taken does without.
    turn: Arc<Semaphore>,
}

/// The previews of one generation; what is being made is given up with this.
#[derive(Debug)]
pub(crate) struct Viewer<'a> {
    previews: &'a Previews,
    making: Option<AbortOnDropHandle<()>>,
}

impl Previews {
    /// `count` previews of each generation.
    pub(crate) fn new(count: usize) -> Self {
        Self { count, turn: Arc::new(Semaphore::new(1)) }
    }

    /// Whether there is one after step `done` of `steps`: they are spread evenly, and the last step, which the video
    /// follows, has none.
    fn wanted(&self, done: usize, steps: usize) -> bool {
        let parts = self.count + 1;
        let nearest = |part: usize| (2 * part * steps + parts) / (2 * parts);
        (1..steps).contains(&done) && (1..=self.count).any(|part| nearest(part) == done)
    }

    /// For one generation.
    pub(crate) fn viewer(&self) -> Viewer<'_> {
        Viewer { previews: self, making: None }
    }
}

impl Viewer<'_> {
    /// Whether a preview is wanted after a step.
    pub(crate) fn wanted(&self, done: usize, steps: usize) -> bool {
        self.previews.wanted(done, steps)
    }

    /// Begins the preview after step `done` of a latent frame (C, 1, h, w); returns at once.
    pub(crate) fn show(&mut self, run: &Run, done: usize, shape: [usize; 4], latents: &[f32]) {
        let id = run.id();
        let Ok(turn) = Arc::clone(&self.previews.turn).try_acquire_owned() else {
            return tracing::debug!(generation_id = id, step = done, "no preview: another one is being made");
        };
        let latents = match HostTensor::from_f32("latents", &shape, latents) {
            Ok(latents) => latents,
            Err(error) => return tracing::warn!(generation_id = id, step = done, %error, "no preview"),
        };
        let (lease, stages, devices) = (Arc::clone(&run.lease), run.stages.clone(), Arc::clone(&run.devices));
        let making = tokio::spawn(async move {
            if let Err(fault) = make(&lease, (&stages, &devices), done as u32, latents).await {
                tracing::info!(generation_id = %lease.id(), step = done, %fault, "no preview");
            }
            drop(turn);
        });
        self.making = Some(AbortOnDropHandle::new(making));
    }
}

/// Has a frame decoded and kept, and tells of it.
async fn make(
    lease: &Arc<Lease>,
    (stages, devices): (&Stages, &Devices),
    step: u32,
    latents: HostTensor,
) -> Result<(), Fault> {
    let wrong = |what: String| Fault::new(Kind::Internal, what).at(Stage::VaeDecode);
    let decoder = stages.describe(Stage::VaeDecode).await?;
    if !has_room(&decoder) {
        let message = "the decoder is busy, or its device has no room to spare";
        return Err(Fault::new(Kind::Unavailable, message).at(Stage::VaeDecode));
    }
    let header =
        DecodeLatentsHeader { generation_id: lease.id().to_string(), frame_limit: 1, tile_divisor: TILE_DIVISOR };
    let mut frames = stages.decode_latents(header, latents).await?;
    let frame = frames.next().await?.ok_or_else(|| wrong("the decoder gave no frame".into()))?;
    while frames.next().await?.is_some() {}
    devices.add(frames.device_use());
    let (rows, columns) = match *frame.shape() {
        [1, rows, columns, 3] if frame.dtype() == DataType::U8 => (rows as u32, columns as u32),
        _ => return Err(wrong(frame.mismatch("U8 [1, H, W, 3]").to_string())),
    };
    let encoded = tokio::task::spawn_blocking(move || encode(columns, rows, frame.data().to_vec())).await;
    let (width, height, file) = encoded.map_err(|error| wrong(error.to_string()))?.map_err(wrong)?;
    let preview = Preview { step, width, height, ..Preview::default() };
    let message = format!("a preview after step {step}");
    lease.keep_preview(file, preview, Change { stage: Stage::VaeDecode, message, ..Change::default() }).await
}

/// Whether a decoder can take a frame without keeping others from their work.
fn has_room(decoder: &DescribeResponse) -> bool {
    let memory = decoder.memory.clone().unwrap_or_default();
    let busy = u64::from(decoder.queued) * 2 > u64::from(decoder.queue_capacity);
    !busy && !memory.pressure && memory.free_bytes >= memory.budget_bytes / FREE_SHARE
}

/// Width, height and JPEG file of a picture (H, W, 3), made smaller where it is larger than a preview.
fn encode(width: u32, height: u32, rgb: Vec<u8>) -> Result<(u32, u32, Vec<u8>), String> {
    let picture = RgbImage::from_raw(width, height, rgb).ok_or("the frame has another size")?;
    let small = match width.max(height) {
        longest if longest > SIDE => DynamicImage::ImageRgb8(picture).thumbnail(SIDE, SIDE).into_rgb8(),
        _ => picture,
    };
    let mut file = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut file, JPEG_QUALITY).encode_image(&small).map_err(|error| error.to_string())?;
    Ok((small.width(), small.height(), file.into_inner()))
}

#[cfg(test)]
mod tests {
    use proto::v1::MemoryReport;

    use super::*;

    fn chosen(count: usize, steps: usize) -> Vec<usize> {
        let previews = Previews::new(count);
        (0..=steps).filter(|&done| previews.wanted(done, steps)).collect()
    }

    #[test]
    fn previews_are_spread_evenly_and_the_last_step_has_none() {
        assert_eq!(chosen(5, 50), [8, 17, 25, 33, 42]);
        assert_eq!(chosen(1, 50), [25]);
        assert_eq!(chosen(3, 4), [1, 2, 3]);
        assert_eq!(chosen(5, 3), [1, 2], "never two after one step, and none before the first");
        assert_eq!(chosen(100, 5), [1, 2, 3, 4]);
        assert!(chosen(0, 50).is_empty() && chosen(5, 1).is_empty() && chosen(5, 0).is_empty());
    }

    #[test]
    fn a_large_frame_is_made_small_with_its_shape_and_a_small_one_stays() {
        for (size, wanted) in [((704, 768), (235, 256)), ((1280, 64), (256, 13)), ((64, 128), (64, 128))] {
            let rgb = vec![90; size.0 as usize * size.1 as usize * 3];
            let (width, height, file) = encode(size.0, size.1, rgb).unwrap();
            assert_eq!((width, height), wanted);
            let read = image::load_from_memory_with_format(&file, image::ImageFormat::Jpeg).unwrap().into_rgb8();
            assert_eq!(read.dimensions(), wanted);
            assert!(read.pixels().all(|pixel| pixel.0.iter().all(|value| value.abs_diff(90) < 3)));
        }
        assert!(encode(2, 2, vec![0; 11]).is_err());
    }

    #[test]
    fn a_decoder_is_left_alone_where_it_is_busy_or_its_device_is_filled() {
        let decoder = |queued, free_bytes, pressure| DescribeResponse {
            queued,
            queue_capacity: 8,
            memory: Some(MemoryReport { free_bytes, budget_bytes: 1000, pressure, ..MemoryReport::default() }),
            ..DescribeResponse::default()
        };
        assert!(has_room(&decoder(4, 250, false)));
        assert!(!has_room(&decoder(5, 1000, false)), "its queue is more than half full");
        assert!(!has_room(&decoder(0, 249, false)), "less than a quarter is free");
        assert!(!has_room(&decoder(0, 0, false)));
        assert!(!has_room(&decoder(0, 1000, true)));
    }
}
