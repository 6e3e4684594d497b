//! Whole generations against fake stages.

mod deadlines;
mod decoders;
mod doors;
mod memory;
mod output;
mod plans;
mod previews;
mod queue;
mod resume;
mod settings;
mod stages;
mod webhooks;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use planner::plan::Choice;
use proto::v1::{
    DecodeLatentsHeader, FaceBox, Generation, GenerationDefaults, GenerationEvent, GenerationSpec, GenerationState,
    Parity, PassMode, PredictHeader, Stage,
};
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::{
    Gateway, Options,
    config::{DefaultDeadline, TierOptions},
    fakes::{self, Script},
    fault::{Fault, Kind},
    intake::{Order, Upload},
    runner::prepare::Prepared,
    store::{artifacts::Artifact, life},
    validate,
    webhook::{self, WebhookOptions},
};

fn upload(spec: GenerationSpec, frames: u32) -> Upload {
    let mut picture = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(64, 64, image::Rgb([90, 120, 150]))
        .write_to(&mut picture, image::ImageFormat::Png)
        .unwrap();
    let mut audio = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x80\x3e\0\0\0\x7d\0\0\x02\0\x10\0data".to_vec();
    let samples = 640 * frames;
    audio[4..8].copy_from_slice(&(36 + 2 * samples).to_le_bytes());
    audio.extend((2 * samples).to_le_bytes());
    audio.extend((0..samples).flat_map(|i| ((i % 100) as i16 * 90).to_le_bytes()));
    let spec = GenerationSpec { size: Some(64), guidance_scale: Some(7.5), flow_shift: Some(5.0), ..spec };
    Upload { spec, picture: picture.into_inner(), audio, order: Order::default() }
}

fn keyed(key: &str) -> Order {
    Order { idempotency_key: key.into(), ..Order::default() }
}

/// A gateway on fake stages, with a data folder that goes with it.
struct Desk {
    gateway: Gateway,
    folder: tempfile::TempDir,
}

impl Desk {
    async fn new(script: &Arc<Script>) -> Self {
        Self::with(script, Options::default()).await
    }

    async fn with(script: &Arc<Script>, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options { data_dir: folder.path().to_owned(), ..options };
        Self { gateway: Gateway::new(&options, fakes::start(script)).await.unwrap(), folder }
    }

    async fn accept(&self, upload: Upload) -> Result<Uuid, Fault> {
        let place = self.gateway.admit(&upload.order).await?;
        let generation = self.gateway.accept(upload, place, false).await?;
        Ok(Uuid::try_parse(&generation.generation_id).unwrap())
    }

    async fn ended(&self, id: Uuid) -> Generation {
        tokio::time::timeout(Duration::from_secs(120), self.gateway.store().wait_end(id)).await.unwrap().unwrap()
    }

    /// A completed video.
    async fn video(&self, id: Uuid) -> (Artifact, Vec<u8>) {
        let content = self.gateway.store().video(&id.to_string()).await.unwrap();
        let artifact = content.artifact.clone();
        let read: Vec<bytes::Bytes> = content.stream(0..u64::MAX).map(Result::unwrap).collect().await;
        (artifact, read.concat())
    }

    async fn events(&self, id: Uuid) -> Vec<GenerationEvent> {
        self.gateway.store().events(id, 1).map(Result::unwrap).collect().await
    }

    /// Stops the gateway without letting anything end, and starts one on the same folder.
    async fn restart(self, script: &Arc<Script>) -> Self {
        self.restart_with(script, Options::default()).await
    }

    async fn restart_with(self, script: &Arc<Script>, options: Options) -> Self {
        let Self { gateway, folder } = self;
        gateway.drain(Duration::ZERO).await;
        drop(gateway);
        let options = Options { data_dir: folder.path().to_owned(), ..options };
        // Clones that were in use by calls are dropped soon.
        let gateway = loop {
            match Gateway::new(&options, fakes::start(script)).await {
                Ok(gateway) => break gateway,
                Err(error) => assert!(error.to_string().contains("another process"), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Self { gateway, folder }
    }

    /// Files that are kept, whatever they are.
    fn files(&self) -> usize {
        let shelves = std::fs::read_dir(self.folder.path().join("artifacts")).unwrap().map(Result::unwrap);
        shelves.map(|shelf| std::fs::read_dir(shelf.path()).unwrap().count()).sum()
    }
}

/// Waits for what another task does.
async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap();
}

async fn start(script: &Arc<Script>, steps: u32) -> (Desk, Uuid) {
    start_with(script, GenerationSpec { steps: Some(steps), ..Default::default() }, 5).await
}

async fn start_with(script: &Arc<Script>, spec: GenerationSpec, frames: u32) -> (Desk, Uuid) {
    let desk = Desk::new(script).await;
    let id = desk.accept(upload(spec, frames)).await.unwrap();
    (desk, id)
}

/// The settings of a generation under the reference's rules.
fn by_the_reference(steps: u32) -> GenerationSpec {
    GenerationSpec { steps: Some(steps), parity: Parity::Reference.into(), ..Default::default() }
}

/// Waits until a generation has taken so many steps, each stored.
async fn steps_done(desk: &Desk, id: Uuid, steps: u32) {
    let waiting = async {
        while desk.gateway.store().get(&id.to_string()).await.unwrap().progress.unwrap().step < steps {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap();
}

/// One call of the REST interface: status, headers and body.
async fn rest(desk: &Desk, path: &str, headers: &[(&str, &str)]) -> (u16, http::HeaderMap, Vec<u8>) {
    let mut request = http::Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(axum::body::Body::empty()).unwrap();
    let (head, body) = desk.gateway.http_router().oneshot(request).await.unwrap().into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    (head.status.as_u16(), head.headers, body.to_vec())
}

async fn json(desk: &Desk, path: &str) -> serde_json::Value {
    let (status, _, body) = rest(desk, path, &[]).await;
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

/// Tile divisors of calls, each as often as it was changed to: calls that unload other stages keep it.
fn rungs<'a>(decodes: impl Iterator<Item = &'a DecodeLatentsHeader>) -> Vec<u32> {
    let mut divisors: Vec<u32> = decodes.map(|header| header.tile_divisor).collect();
    divisors.dedup();
    divisors
}
