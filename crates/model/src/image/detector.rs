use std::{path::Path, sync::Arc};

use rustface::{ImageData, create_detector_with_model, read_model};

use super::{FaceNetwork, Rgb8, face::FaceBox, resize_bilinear};
use crate::Result;

/// What finds faces in a picture.
#[derive(Debug, Clone, Default)]
pub enum Detector {
    /// The one that is compiled in: [`detect`].
    #[default]
    BuiltIn,
    /// A network from a file.
    Network(Arc<FaceNetwork>),
}

impl Detector {
    /// Opens a network's file; without one it is the built-in detector.
    ///
    /// Errors: as [`FaceNetwork::open`].
    pub fn open(file: Option<&Path>) -> Result<Self> {
        file.map_or(Ok(Self::BuiltIn), |file| Ok(Self::Network(Arc::new(FaceNetwork::open(file)?))))
    }

    /// The network's file; none for the built-in one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::BuiltIn => None,
            Self::Network(network) => Some(network.file()),
        }
    }

    /// Finds faces.
    ///
    /// - returns: boxes in pixels of the picture, the largest first
    ///
    /// Errors: as [`FaceNetwork::detect`]; the built-in detector has none.
    pub fn detect(&self, picture: &Rgb8) -> Result<Vec<FaceBox>> {
        match self {
            Self::BuiltIn => Ok(detect(picture)),
            Self::Network(network) => network.detect(picture),
        }
    }
}

/// The detector's own data, out of the `rustface` package.
const MODEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/seeta_fd_frontal_v1.0.bin"));

/// Longer side of what the detector sees: its time grows with the area, and a face that drives a video is not small.
const LONGER_SIDE: usize = 640;

/// Side of the smallest face, as a part of the picture's shorter side.
const SMALLEST: f64 = 0.06;

/// The detector's window, which no face may be smaller than.
const WINDOW: usize = 40;

/// Least score of a face, on the detector's scale.
const SCORE: f64 = 2.0;

/// Finds frontal faces.
///
/// - returns: boxes in pixels of the picture, the largest first; none in a picture with a side under 40 pixels
#[must_use]
pub fn detect(picture: &Rgb8) -> Vec<FaceBox> {
    let (width, height) = (picture.width, picture.height);
    let shrink = (LONGER_SIDE as f64 / width.max(height) as f64).min(1.0);
    let side = |size: usize| ((size as f64 * shrink).round() as usize).max(1);
    let small = resize_bilinear(picture, side(width), side(height));
    let shorter = small.width.min(small.height);
    if shorter < WINDOW {
        return Vec::new();
    }
    let model = match read_model(MODEL) {
        Ok(model) => model,
        Err(error) => {
            tracing::error!(%error, "the built-in face detector does not load");
            return Vec::new();
        }
    };
    let mut detector = create_detector_with_model(model);
    detector.set_min_face_size(((shorter as f64 * SMALLEST) as usize).max(WINDOW / 2) as u32);
    detector.set_window_size(WINDOW as u32);
    detector.set_score_thresh(SCORE);
    detector.set_pyramid_scale_factor(0.8);
    detector.set_slide_window_step(4, 4);
    let grey: Vec<u8> = small.data.as_chunks::<3>().0.iter().map(luma).collect();
    let found = detector.detect(&ImageData::new(&grey, small.width as u32, small.height as u32));
    let (x, y) = (width as f64 / small.width as f64, height as f64 / small.height as f64);
    let mut faces: Vec<FaceBox> = found
        .iter()
        .map(|face| {
            let area = face.bbox();
            let face = FaceBox {
                x: f64::from(area.x()),
                y: f64::from(area.y()),
                width: f64::from(area.width()),
                height: f64::from(area.height()),
                score: Some(face.score()),
            };
            face.scaled(x, y)
        })
        .collect();
    faces.sort_by(|a, b| b.area().total_cmp(&a.area()));
    faces
}

/// Brightness as ITU-R BT.601 weighs the channels.
fn luma(rgb: &[u8; 3]) -> u8 {
    let [r, g, b] = rgb.map(u32::from);
    ((r * 299 + g * 587 + b * 114 + 500) / 1000) as u8
}
