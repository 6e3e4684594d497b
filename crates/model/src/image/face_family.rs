//! The families of face detectors that are told apart by what their files give.

use super::{
    Rgb8,
    face::{self, Postprocess},
    resize_cv2_linear,
};
use crate::onnx::{Array, Value};

/// Values of a candidate as [`face::postprocess`] takes it.
const COLUMNS: usize = 16;

/// Most candidates of one picture.
const CANDIDATES: usize = 1 << 20;

/// What is expected of a file, for its errors.
pub(super) const EXPECTED: &str = "expected is one input (1, 3, height, width) of f32 and the outputs of one of: UltraFace \
    (scores (1, N, 2), boxes (1, N, 4)), YuNet (cls_S, obj_S (1, N, 1) and bbox_S (1, N, 4) of the strides 8, 16, 32), SCRFD \
    (scores (N, 1) of all strides, then boxes (N, 4), then points (N, 10)), YOLO-face as the reference has it (1, N, 16)";

/// A family: how its networks see a picture, and what they say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// RGB, `(v - 127) / 128`; the boxes' corners as parts of the sides.
    UltraFace,
    /// BGR, 0..255; at every stride an offset from the cell's corner, logarithms of the sides, and two scores.
    YuNet,
    /// RGB, `(v - 127.5) / 128`; at every stride the distances to the four edges, in strides.
    Scrfd {
        /// How many strides, from 8 on.
        strides: usize,
        /// Candidates of one cell.
        anchors: usize,
    },
    /// RGB, 0..1; centre, size, objectness, points and class score, in pixels.
    YoloFace,
}

/// A picture as a network sees it.
pub(super) struct Seen {
    /// `(1, 3, height, width)`.
    pub(super) pixels: Array<f32>,
    /// Width and height of the part that shows the picture, in the upper left.
    pub(super) shown: (usize, usize),
}

fn rows(value: &Value, columns: usize) -> Option<usize> {
    match *value.shape() {
        [n, k] | [1, n, k] if k == columns && n <= CANDIDATES && matches!(value, Value::Floats(_)) => Some(n),
        _ => None,
    }
}

fn named<'a>(outputs: &'a [(String, Value)], name: &str) -> Option<&'a Value> {
    outputs.iter().find(|(other, _)| other == name).map(|(_, value)| value)
}

/// The one output with so many columns.
fn only(outputs: &[(String, Value)], columns: usize) -> Option<&[f32]> {
    let mut found = outputs.iter().filter(|(_, value)| rows(value, columns).is_some());
    let (_, value) = found.next()?;
    found.next().is_none().then(|| floats(value)).flatten()
}

fn floats(value: &Value) -> Option<&[f32]> {
    match value {
        Value::Floats(array) => Some(&array.values),
        Value::Ints(_) => None,
    }
}

/// Cells of a picture at a stride.
fn cells((width, height): (usize, usize), stride: usize) -> usize {
    width.div_ceil(stride) * height.div_ceil(stride)
}

impl Family {
    /// The family whose outputs these are, of a picture of `size` (width and height).
    pub(super) fn of(outputs: &[(String, Value)], size: (usize, usize)) -> Option<Self> {
        let found = [
            Self::YuNet,
            Self::UltraFace,
            Self::YoloFace,
            Self::Scrfd { strides: 3, anchors: 2 },
            Self::Scrfd { strides: 5, anchors: 1 },
            Self::Scrfd { strides: 3, anchors: 1 },
        ];
        found.into_iter().find(|family| family.candidates(outputs, size).is_some())
    }

    /// Width and height to show a picture in, where the file leaves both open.
    pub(super) fn size(self, picture: &Rgb8) -> (usize, usize) {
        match self {
            Self::UltraFace => (320, 240),
            Self::YoloFace => face::network_size(picture.width, picture.height),
            Self::Scrfd { .. } => (640, 640),
            Self::YuNet => {
                let shrink = (640.0 / picture.width.max(picture.height) as f64).min(1.0);
                let side = |side: usize| ((side as f64 * shrink) as usize).max(1).next_multiple_of(32);
                (side(picture.width), side(picture.height))
            }
        }
    }

    /// Shows a picture to the network: SCRFD and YuNet keep its aspect and see black beside it, the others do not.
    pub(super) fn see(self, picture: &Rgb8, (width, height): (usize, usize)) -> Seen {
        let shown = match self {
            Self::UltraFace | Self::YoloFace => (width, height),
            Self::YuNet | Self::Scrfd { .. } => {
                let shrink = (width as f64 / picture.width as f64).min(height as f64 / picture.height as f64);
                // YuNet is not shown more than there is; SCRFD fills its picture.
                let shrink = if self == Self::YuNet { shrink.min(1.0) } else { shrink };
                let side = |side: usize, most: usize| ((side as f64 * shrink).round() as usize).clamp(1, most);
                (side(picture.width, width), side(picture.height, height))
            }
        };
        let small = resize_cv2_linear(picture, shown.0, shown.1);
        let (channels, centre, scale) = match self {
            Self::UltraFace => ([0, 1, 2], 127.0, 128.0),
            Self::YuNet => ([2, 1, 0], 0.0, 1.0),
            Self::Scrfd { .. } => ([0, 1, 2], 127.5, 128.0),
            Self::YoloFace => ([0, 1, 2], 0.0, 255.0),
        };
        let mut values = vec![(0.0 - centre) / scale; 3 * width * height];
        for (plane, channel) in values.chunks_exact_mut(width * height).zip(channels) {
            for (line, row) in plane.chunks_exact_mut(width).zip(small.data.chunks_exact(shown.0 * 3)) {
                for (value, pixel) in line.iter_mut().zip(row.as_chunks::<3>().0) {
                    *value = (f32::from(pixel[channel]) - centre) / scale;
                }
            }
        }
        Seen { pixels: Array { shape: vec![1, 3, height, width], values }, shown }
    }

    /// Least score, and most overlap with a better face, as the family's own code has them.
    pub(super) fn rule(self, shown: (usize, usize), picture: &Rgb8) -> Postprocess {
        let (confidence, overlap) = match self {
            Self::UltraFace => (0.7, 0.3),
            Self::YuNet => (0.9, 0.3),
            Self::Scrfd { .. } => (0.5, 0.4),
            Self::YoloFace => (0.5, 0.45),
        };
        Postprocess { confidence, overlap, network: shown, picture: (picture.width, picture.height) }
    }

    /// The candidates `(N, 16)` in pixels of the network, as [`face::postprocess`] takes them.
    ///
    /// - returns: `None` where the outputs are not this family's
    pub(super) fn candidates(self, outputs: &[(String, Value)], size: (usize, usize)) -> Option<Vec<f32>> {
        match self {
            Self::UltraFace => ultra_face(outputs, size),
            Self::YuNet => yunet(outputs, size),
            Self::Scrfd { strides, anchors } => scrfd(outputs, size, strides, anchors),
            Self::YoloFace => only(outputs, COLUMNS).map(<[f32]>::to_vec),
        }
    }
}

fn ultra_face(outputs: &[(String, Value)], (width, height): (usize, usize)) -> Option<Vec<f32>> {
    if outputs.len() != 2 {
        return None;
    }
    let (scores, boxes) = (only(outputs, 2)?.as_chunks::<2>().0, only(outputs, 4)?.as_chunks::<4>().0);
    let (w, h) = (width as f32, height as f32);
    let row =
        |([_, score], [x1, y1, x2, y2]): (&[f32; 2], &[f32; 4])| candidate([x1 * w, y1 * h, x2 * w, y2 * h], *score);
    (scores.len() == boxes.len()).then(|| scores.iter().zip(boxes).flat_map(row).collect())
}

fn yunet(outputs: &[(String, Value)], size: (usize, usize)) -> Option<Vec<f32>> {
    let mut all = Vec::new();
    for stride in [8usize, 16, 32] {
        let part = |name: &str, columns: usize| {
            let value = named(outputs, &format!("{name}_{stride}"))?;
            (rows(value, columns)? == cells(size, stride)).then(|| floats(value)).flatten()
        };
        let (class, object) = (part("cls", 1)?, part("obj", 1)?);
        let across = size.0.div_ceil(stride);
        for (i, [x, y, w, h]) in part("bbox", 4)?.as_chunks::<4>().0.iter().enumerate() {
            let step = stride as f32;
            let (x, y) = (((i % across) as f32 + x) * step, ((i / across) as f32 + y) * step);
            let (w, h) = (w.exp() * step, h.exp() * step);
            let score = (class[i].clamp(0.0, 1.0) * object[i].clamp(0.0, 1.0)).sqrt();
            all.extend(candidate([x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0], score));
        }
    }
    Some(all)
}

/// All scores stand before all boxes, and those before all points, each from the finest stride on.
fn scrfd(outputs: &[(String, Value)], size: (usize, usize), strides: usize, anchors: usize) -> Option<Vec<f32>> {
    let with = |columns: usize| outputs.iter().filter(move |(_, value)| rows(value, columns).is_some());
    let points = with(10).count();
    if ![0, strides].contains(&points) || outputs.len() != 2 * strides + points {
        return None;
    }
    let (scores, boxes): (Vec<_>, Vec<_>) = (with(1).collect(), with(4).collect());
    if scores.len() != strides || boxes.len() != strides {
        return None;
    }
    let mut all = Vec::new();
    for (level, ((_, scores), (_, boxes))) in scores.iter().zip(&boxes).enumerate() {
        let stride = 8usize << level;
        let count = cells(size, stride) * anchors;
        if rows(scores, 1)? != count || rows(boxes, 4)? != count {
            return None;
        }
        let across = size.0.div_ceil(stride);
        for (i, (score, edges)) in floats(scores)?.iter().zip(floats(boxes)?.as_chunks::<4>().0).enumerate() {
            let cell = i / anchors;
            let (x, y) = ((cell % across * stride) as f32, (cell / across * stride) as f32);
            let [left, up, right, down] = edges.map(|distance| distance * stride as f32);
            all.extend(candidate([x - left, y - up, x + right, y + down], *score));
        }
    }
    Some(all)
}

/// A candidate without points, which nothing here reads.
fn candidate([x1, y1, x2, y2]: [f32; 4], score: f32) -> [f32; COLUMNS] {
    let mut row = [0.0; COLUMNS];
    row[..5].copy_from_slice(&[(x1 + x2) / 2.0, (y1 + y2) / 2.0, x2 - x1, y2 - y1, score]);
    row[15] = 1.0;
    row
}
