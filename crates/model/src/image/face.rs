//! Where the face is, and which latents and tokens the speech may move.

use serde::{Deserialize, Serialize};

use super::Rgb8;

pub use super::detector::detect;

/// Pixels of one latent, along each side.
const LATENT: usize = 8;

/// How much larger than the face the moved area is, along each side.
const AREA: f64 = 3.0;

/// A face in a picture, in pixels from the top left.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FaceBox {
    /// Left edge.
    pub x: f64,
    /// Upper edge.
    pub y: f64,
    /// Columns.
    pub width: f64,
    /// Rows.
    pub height: f64,
    /// How sure the detector is (its own scale); `None` for a box that the caller gave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

impl FaceBox {
    /// Pixels inside.
    #[must_use]
    pub fn area(&self) -> f64 {
        self.width * self.height
    }

    /// The same box in a picture that is `x` times as wide and `y` times as high.
    #[must_use]
    pub fn scaled(&self, x: f64, y: f64) -> Self {
        Self { x: self.x * x, y: self.y * y, width: self.width * x, height: self.height * y, score: self.score }
    }
}

impl FaceBox {
    /// Whether it is a box at all, and some of it lies in the picture.
    #[must_use]
    pub(super) fn overlaps(&self, picture: &Rgb8) -> bool {
        let finite = [self.x, self.y, self.width, self.height].iter().all(|v| v.is_finite());
        let Self { x, y, width, height, .. } = self.within(picture);
        finite && x >= 0.0 && y >= 0.0 && width > 0.0 && height > 0.0
    }

    /// The part of it that lies in the picture.
    #[must_use]
    pub(super) fn within(&self, picture: &Rgb8) -> Self {
        let span = |start: f64, size: f64, limit: usize| {
            let begin = start.max(0.0);
            (begin, (start + size).min(limit as f64) - begin)
        };
        let ((x, width), (y, height)) =
            (span(self.x, self.width, picture.width), span(self.y, self.height, picture.height));
        Self { x, y, width, height, score: self.score }
    }
}

/// The face of the largest area; of equals the first.
#[must_use]
pub fn largest(faces: &[FaceBox]) -> Option<&FaceBox> {
    faces.iter().reduce(|best, face| if face.area() > best.area() { face } else { best })
}

/// The face that the reference takes: the last one larger than the *first*, which with up to two is the largest.
#[must_use]
pub fn largest_of_reference(faces: &[FaceBox]) -> Option<&FaceBox> {
    let first = faces.first()?;
    Some(faces.iter().rfind(|face| face.area() > first.area()).unwrap_or(first))
}

/// Marks the area that the speech may move: three times the face along each side, or all without a face.
///
/// - returns: `height · width` values, rows from the top, 1 inside and 0 outside
#[must_use]
pub fn mask(face: Option<&FaceBox>, width: usize, height: usize) -> Vec<f32> {
    let Some(face) = face else {
        return vec![1.0; width * height];
    };
    let span = |start: f64, size: f64, limit: usize| {
        let centre = ((start + (start + size)) / 2.0).floor();
        let half = (size * AREA / 2.0).floor();
        // Casts cut off the fraction; a value that is not a number becomes 0.
        ((centre - half).max(0.0) as usize, (centre + half).min(limit as f64) as usize)
    };
    let (left, right) = span(face.x, face.width, width);
    let (top, bottom) = span(face.y, face.height, height);
    (0..height)
        .flat_map(|y| (0..width).map(move |x| (y, x)))
        .map(|(y, x)| f32::from((top..bottom).contains(&y) && (left..right).contains(&x)))
        .collect()
}

/// Shrinks a mask to latents, linearly between the two middle pixels of each along both sides, not antialiased.
///
/// - `mask`: `height · width`; pixels that are missing count as 0
/// - returns: `(height / 8) · (width / 8)`
#[must_use]
pub fn latent_mask(mask: &[f32], width: usize, height: usize) -> Vec<f32> {
    let at = |y: usize, x: usize| mask.get(y * width + x).copied().unwrap_or(0.0);
    let middle = |i: usize| (i * LATENT + LATENT / 2 - 1, i * LATENT + LATENT / 2);
    (0..height / LATENT)
        .flat_map(|y| (0..width / LATENT).map(move |x| (middle(y), middle(x))))
        .map(|((top, bottom), (left, right))| {
            let row = |y| 0.5 * at(y, left) + 0.5 * at(y, right);
            0.5 * row(top) + 0.5 * row(bottom)
        })
        .collect()
}

/// How much of the speech each token takes: every second latent of the mask along each side, for every frame.
///
/// - `mask`: `height · width` latents; those that are missing count as 0
/// - returns: `frames · (height / 2) · (width / 2)`
#[must_use]
pub fn token_gate(mask: &[f32], width: usize, height: usize, frames: usize) -> Vec<f32> {
    let frame: Vec<f32> = (0..height / 2)
        .flat_map(|y| (0..width / 2).map(move |x| 2 * y * width + 2 * x))
        .map(|i| mask.get(i).copied().unwrap_or(0.0))
        .collect();
    frame.repeat(frames)
}

/// How the raw output of the reference's detector network becomes faces.
#[derive(Debug, Clone, PartialEq)]
pub struct Postprocess {
    /// Least objectness, and least objectness times class score.
    pub confidence: f32,
    /// Most overlap (intersection over union) with a better face.
    pub overlap: f32,
    /// Width and height of what the network saw.
    pub network: (usize, usize),
    /// Width and height of the picture.
    pub picture: (usize, usize),
}

/// A face with the five points that the reference's detector gives: eyes, nose, corners of the mouth.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// Where, with its score.
    pub face: FaceBox,
    /// `(x, y)` of each point.
    pub landmarks: [[f64; 2]; 5],
}

/// Values of one candidate: centre, size, objectness, five points, class score.
const CANDIDATE: usize = 16;

/// Most candidates, of the best, that are held against each other.
const MOST_CANDIDATES: usize = 4096;

/// Filters the candidates of the reference's detector network, best first.
///
/// - `candidates`: `(N, 16)`: centre x and y, width, height, objectness, five points, class score, in network pixels
/// - returns: faces in pixels of the picture
#[must_use]
pub fn postprocess(candidates: &[f32], rule: &Postprocess) -> Vec<Detection> {
    struct Candidate<'a> {
        corners: [f32; 4],
        score: f32,
        points: &'a [f32],
    }
    let mut found: Vec<Candidate<'_>> = candidates
        .as_chunks::<CANDIDATE>()
        .0
        .iter()
        .filter(|c| c[4] > rule.confidence)
        .map(|c| {
            let [x, y, w, h] = [c[0], c[1], c[2], c[3]];
            let corners = [x - w / 2.0, y - h / 2.0, x + w / 2.0, y + h / 2.0];
            Candidate { corners, score: c[15] * c[4], points: &c[5..15] }
        })
        .filter(|c| c.score > rule.confidence)
        .collect();
    found.sort_by(|a, b| b.score.total_cmp(&a.score));
    // No picture has so many faces, and the work below grows with the square.
    found.truncate(MOST_CANDIDATES);
    let mut kept: Vec<Candidate<'_>> = Vec::new();
    for candidate in found {
        if kept.iter().all(|better| overlap(&better.corners, &candidate.corners) <= rule.overlap) {
            kept.push(candidate);
        }
    }
    let x_scale = rule.picture.0 as f64 / rule.network.0 as f64;
    let y_scale = rule.picture.1 as f64 / rule.network.1 as f64;
    let detections = kept.iter().map(|c| {
        let [x1, y1, x2, y2] = c.corners.map(f64::from);
        let face = FaceBox { x: x1, y: y1, width: x2 - x1, height: y2 - y1, score: Some(f64::from(c.score)) };
        let mut landmarks = [[0.0; 2]; 5];
        for (point, xy) in landmarks.iter_mut().zip(c.points.as_chunks::<2>().0) {
            *point = [f64::from(xy[0]) * x_scale, f64::from(xy[1]) * y_scale];
        }
        Detection { face: face.scaled(x_scale, y_scale), landmarks }
    });
    detections.collect()
}

/// Intersection over union of two boxes `(left, top, right, bottom)`.
fn overlap(a: &[f32; 4], b: &[f32; 4]) -> f32 {
    let area = |c: &[f32; 4]| (c[2] - c[0]) * (c[3] - c[1]);
    let shared = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0) * (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    shared / (area(a) + area(b) - shared)
}

/// Size of what the reference's detector network sees: the shorter side about 416, both multiples of 32.
///
/// - returns: `(width, height)`
#[must_use]
pub fn network_size(width: usize, height: usize) -> (usize, usize) {
    let ratio = 416.0 / width.min(height).max(1) as f64;
    let side = |size: usize| (size as f64 * ratio + 31.0) as usize / 32 * 32;
    (side(width), side(height))
}
