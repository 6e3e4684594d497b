//! Operators on pictures `(N, C, H, W)`.

use rayon::prelude::*;

use super::{
    super::{
        limits::{Budget, SIDE},
        value::{Array, Value, steps},
    },
    Call, Made, combine,
};

/// Most elements of the patches that are multiplied at once.
const PATCHES: usize = 1 << 20;

/// How a kernel moves over a picture: height first in every pair.
struct Window {
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Above and left.
    before: [usize; 2],
    /// Below and right.
    after: [usize; 2],
    /// Sides of what comes out.
    out: [usize; 2],
}

impl Window {
    fn of(call: &Call<'_>, kernel: [usize; 2], picture: [usize; 2]) -> Result<Self, String> {
        let list = |name: &str, count: usize, least: usize, otherwise: usize| -> Result<Vec<usize>, String> {
            let Some(values) = call.ints(name, usize::MAX)? else { return Ok(vec![otherwise; count]) };
            let values: Option<Vec<usize>> = values.iter().map(|v| usize::try_from(*v).ok()).collect();
            values
                .filter(|v| v.len() == count && v.iter().all(|v| (least..=SIDE).contains(v)))
                .ok_or_else(|| format!("{name}: {count} numbers of {least} to {SIDE} are needed"))
        };
        let pair = |name: &str| list(name, 2, 1, 1).map(|v| [v[0], v[1]]);
        let (stride, dilation) = (pair("strides")?, pair("dilations")?);
        if kernel.iter().any(|k| !(1..=SIDE).contains(k)) {
            return Err(format!("a kernel of {kernel:?}"));
        }
        let reach = [0, 1].map(|i| dilation[i].saturating_mul(kernel[i] - 1).saturating_add(1));
        let (mut before, mut after) = ([0; 2], [0; 2]);
        match call.text("auto_pad").unwrap_or("NOTSET") {
            "NOTSET" => {
                let pads = list("pads", 4, 0, 0)?;
                (before, after) = ([pads[0], pads[1]], [pads[2], pads[3]]);
            }
            "VALID" => {}
            same @ ("SAME_UPPER" | "SAME_LOWER") => {
                for i in 0..2 {
                    let out = picture[i].div_ceil(stride[i]);
                    let all = (out.saturating_sub(1) * stride[i]).saturating_add(reach[i]).saturating_sub(picture[i]);
                    let less = all / 2;
                    (before[i], after[i]) = if same == "SAME_UPPER" { (less, all - less) } else { (all - less, less) };
                }
            }
            other => return Err(format!("auto_pad {other:?}")),
        }
        let up = call.int("ceil_mode").unwrap_or(0) != 0;
        let mut out = [0; 2];
        for i in 0..2 {
            let room = picture[i].saturating_add(before[i]).saturating_add(after[i]);
            let Some(room) = room.checked_sub(reach[i]) else {
                return Err(format!("a kernel that reaches {} pixels on {picture:?}", reach[i]));
            };
            out[i] = if up { room.div_ceil(stride[i]) } else { room / stride[i] } + 1;
            // The last window starts within the picture.
            if up && (out[i] - 1) * stride[i] >= picture[i] + before[i] {
                out[i] -= 1;
            }
        }
        Ok(Self { kernel, stride, dilation, before, after, out })
    }

    /// The pixel along a side that place `k` of the kernel meets; `None` beside the picture.
    fn pixel(&self, side: usize, place: usize, k: usize, limit: usize) -> Option<usize> {
        let at = place * self.stride[side] + k * self.dilation[side];
        at.checked_sub(self.before[side]).filter(|at| *at < limit)
    }
}

fn four(array: &Array<f32>) -> Result<[usize; 4], String> {
    let shape = array.shape.as_slice().try_into();
    shape.map_err(|_| format!("shape {:?}, (N, C, H, W) is needed", array.shape))
}

/// Convolution, as products of patches with the kernels.
pub(super) fn conv(call: &Call<'_>, budget: &mut Budget) -> Made {
    let (x, weight) = (call.floats(0)?, call.floats(1)?);
    let ([n, c, h, w], [m, depth, kh, kw]) = (four(x)?, four(weight)?);
    let groups = usize::try_from(call.int("group").unwrap_or(1)).unwrap_or(0);
    if groups == 0 || !c.is_multiple_of(groups) || c / groups != depth || !m.is_multiple_of(groups) {
        return Err(format!("{:?} with kernels {:?} in {groups} groups", x.shape, weight.shape));
    }
    let bias = call.optional(2).map(Value::floats).transpose()?;
    if bias.is_some_and(|bias| bias.values.len() != m) {
        return Err(format!("a bias that has not {m} values"));
    }
    let window = Window::of(call, [kh, kw], [h, w])?;
    let [oh, ow] = window.out;
    let patch = depth.saturating_mul(kh).saturating_mul(kw);
    budget.ask(&[n, m, oh, ow], patch.saturating_add(1))?;
    // The patches of one row of the output at least.
    budget.ask(&[patch, ow], 1)?;
    let shape = vec![n, m, oh, ow];
    let mut values = vec![0.0f32; n * m * oh * ow];
    if values.is_empty() || patch == 0 {
        return Ok(Value::Floats(Array { shape, values }));
    }
    let (each, rows) = (m / groups, (PATCHES / (patch * ow)).clamp(1, oh));
    for (image, group) in (0..n).flat_map(|image| (0..groups).map(move |group| (image, group))) {
        let kernels = &weight.values[group * each * patch..(group + 1) * each * patch];
        for top in (0..oh).step_by(rows) {
            let rows = rows.min(oh - top);
            let mut patches = vec![0.0f32; patch * rows * ow];
            patches.par_chunks_mut(rows * ow).enumerate().for_each(|(at, out)| {
                let (plane, ky, kx) = (at / (kh * kw), at / kw % kh, at % kw);
                let plane = (image * c + group * depth + plane) * h * w;
                for (i, out) in out.chunks_mut(ow).enumerate() {
                    let Some(y) = window.pixel(0, top + i, ky, h) else { continue };
                    let row = &x.values[plane + y * w..plane + (y + 1) * w];
                    for (j, out) in out.iter_mut().enumerate() {
                        if let Some(x) = window.pixel(1, j, kx, w) {
                            *out = row[x];
                        }
                    }
                }
            });
            let made = combine::matrices(kernels, &patches, [each, patch, rows * ow])?;
            for (i, row) in made.chunks(rows * ow).enumerate() {
                let plane = group * each + i;
                let more = bias.map_or(0.0, |bias| bias.values[plane]);
                let start = ((image * m + plane) * oh + top) * ow;
                for (out, value) in values[start..start + rows * ow].iter_mut().zip(row) {
                    *out = value + more;
                }
            }
        }
    }
    Ok(Value::Floats(Array { shape, values }))
}

/// The largest, or the mean, of every window.
pub(super) fn pool(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    let [n, c, h, w] = four(x)?;
    let kernel = match call.ints("kernel_shape", usize::MAX)? {
        Some(&[height, width]) => [height, width].map(|side| usize::try_from(side).unwrap_or(0)),
        _ => return Err("kernel_shape: 2 numbers are needed".to_owned()),
    };
    let window = Window::of(call, kernel, [h, w])?;
    let [oh, ow] = window.out;
    budget.ask(&[n, c, oh, ow], 2usize.saturating_mul(kernel[0]).saturating_mul(kernel[1]))?;
    let largest = call.node.kind == "MaxPool";
    let beside = call.int("count_include_pad").unwrap_or(0) != 0;
    let mut values = vec![0.0f32; n * c * oh * ow];
    if !values.is_empty() {
        values.par_chunks_mut(oh * ow).enumerate().for_each(|(plane, out)| {
            for (at, out) in out.iter_mut().enumerate() {
                let (oy, ox) = (at / ow, at % ow);
                let (mut most, mut sum, mut count) = (f32::NEG_INFINITY, 0.0, 0usize);
                for ky in 0..kernel[0] {
                    let Some(y) = window.pixel(0, oy, ky, h) else { continue };
                    for kx in 0..kernel[1] {
                        let Some(x_at) = window.pixel(1, ox, kx, w) else { continue };
                        let value = x.values[(plane * h + y) * w + x_at];
                        (most, sum, count) = (most.max(value), sum + value, count + 1);
                    }
                }
                let count = if beside { window.counted(oy, ox, [h, w]) } else { count };
                *out = if largest { most } else { sum / count as f32 };
            }
        });
    }
    Ok(Value::Floats(Array { shape: vec![n, c, oh, ow], values }))
}

impl Window {
    /// Places of a window in the picture and its padding.
    fn counted(&self, oy: usize, ox: usize, picture: [usize; 2]) -> usize {
        let within = |side: usize, place: usize| {
            let room = picture[side] + self.before[side] + self.after[side];
            (0..self.kernel[side]).filter(|k| place * self.stride[side] + k * self.dilation[side] < room).count()
        };
        within(0, oy) * within(1, ox)
    }
}

/// The mean of every plane.
pub(super) fn global_average(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    let [n, c, h, w] = four(x)?;
    budget.ask(&x.shape, 1)?;
    budget.ask(&[n, c, 1, 1], 1)?;
    let mean = |i: usize| {
        let plane = &x.values[i * h * w..(i + 1) * h * w];
        (plane.iter().map(|v| f64::from(*v)).sum::<f64>() / plane.len() as f64) as f32
    };
    Ok(Value::Floats(Array { shape: vec![n, c, 1, 1], values: (0..n * c).map(mean).collect() }))
}

/// Scales and shifts every channel by what was measured in training.
pub(super) fn batch_norm(call: &Call<'_>, budget: &mut Budget) -> Made {
    let x = call.floats(0)?;
    budget.ask(&x.shape, 2)?;
    let channels = *x.shape.get(1).ok_or("(N, C, ...) is needed")?;
    let [scale, shift, mean, variance] = [1, 2, 3, 4].map(|i| call.floats(i).map(|a| a.values.as_slice()));
    let (scale, shift, mean, variance) = (scale?, shift?, mean?, variance?);
    if [scale, shift, mean, variance].iter().any(|values| values.len() != channels) {
        return Err(format!("constants that have not {channels} values"));
    }
    let epsilon = call.float("epsilon").unwrap_or(1e-5);
    let plane = x.shape[2..].iter().product::<usize>().max(1);
    let mut values = x.values.clone();
    for (i, values) in values.chunks_mut(plane).enumerate() {
        let c = i % channels;
        let factor = scale[c] / (variance[c] + epsilon).sqrt();
        values.iter_mut().for_each(|v| *v = (*v - mean[c]) * factor + shift[c]);
    }
    Ok(Value::Floats(Array { shape: x.shape.clone(), values }))
}

/// Another size, by the nearest pixel or between two along each side.
pub(super) fn resize(call: &Call<'_>, budget: &mut Budget) -> Made {
    let mut x = call.floats(0)?.clone();
    let old = call.node.kind == "Upsample" || call.opset < 11;
    let numbers = |i: usize| call.optional(i).map(Value::floats).transpose().map(|a| a.map(|a| a.values.clone()));
    let scales = match call.node.attributes.get("scales") {
        Some(super::Attribute::Floats(scales)) => Some(scales.clone()),
        _ => numbers(if old { 1 } else { 2 })?.filter(|scales| !scales.is_empty()),
    };
    let sizes = if old { None } else { call.optional(3).map(Value::ints).transpose()? };
    let rank = x.shape.len();
    let sides: Vec<(usize, f64)> = match (&scales, sizes) {
        (_, Some(sizes)) if sizes.len() == rank => {
            let side = |(size, old): (&i64, &usize)| {
                let size = usize::try_from(*size).unwrap_or(usize::MAX);
                (size, size as f64 / (*old).max(1) as f64)
            };
            sizes.iter().zip(&x.shape).map(side).collect()
        }
        (Some(scales), None) if scales.len() == rank => {
            let side = |(scale, old): (&f32, &usize)| {
                // A cast keeps what is too large at the largest, and makes 0 of what is no number.
                ((f64::from(*scale) * *old as f64).floor() as usize, f64::from(*scale))
            };
            scales.iter().zip(&x.shape).map(side).collect()
        }
        _ => return Err(format!("sizes or scales of {rank} sides are needed")),
    };
    let linear = match call.text("mode").unwrap_or("nearest") {
        "nearest" => false,
        "linear" => true,
        other => return Err(format!("mode {other:?}, nearest or linear is needed")),
    };
    let rule = if old { "asymmetric" } else { call.text("coordinate_transformation_mode").unwrap_or("half_pixel") };
    let round = if old { "floor" } else { call.text("nearest_mode").unwrap_or("round_prefer_floor") };
    for (at, (size, scale)) in sides.iter().enumerate() {
        if *size == x.shape[at] && *scale == 1.0 {
            continue;
        }
        let mut shape = x.shape.clone();
        shape[at] = *size;
        budget.ask(&shape, 4)?;
        let last = x.shape[at].checked_sub(1).ok_or("a side of 0")?;
        let places: Vec<f64> = (0..*size)
            .map(|i| {
                let i = i as f64;
                Ok(match rule {
                    "asymmetric" => i / scale,
                    "half_pixel" => (i + 0.5) / scale - 0.5,
                    "pytorch_half_pixel" if *size > 1 => (i + 0.5) / scale - 0.5,
                    "pytorch_half_pixel" => 0.0,
                    "align_corners" if *size > 1 => i * last as f64 / (*size - 1) as f64,
                    "align_corners" => 0.0,
                    other => return Err(format!("coordinate_transformation_mode {other:?}")),
                })
            })
            .collect::<Result<_, String>>()?;
        x = along(&x, at, &places, linear, round)?;
    }
    Ok(Value::Floats(x))
}

/// Takes the given places, in pixels, along one side.
fn along(x: &Array<f32>, at: usize, places: &[f64], linear: bool, round: &str) -> Result<Array<f32>, String> {
    let last = x.shape[at] - 1;
    let taps: Vec<(usize, usize, f32)> = places
        .iter()
        .map(|place| {
            let place = place.clamp(0.0, last as f64);
            if linear {
                let low = place.floor() as usize;
                return Ok((low, (low + 1).min(last), (place - place.floor()) as f32));
            }
            let near = match round {
                "floor" => place.floor(),
                "ceil" => place.ceil(),
                "round_prefer_ceil" => (place + 0.5).floor(),
                "round_prefer_floor" => (place - 0.5).ceil(),
                other => return Err(format!("nearest_mode {other:?}")),
            };
            let near = (near as usize).min(last);
            Ok((near, near, 0.0))
        })
        .collect::<Result<_, String>>()?;
    let mut shape = x.shape.clone();
    shape[at] = places.len();
    let step = steps(&x.shape)[at] as usize;
    let outer: usize = x.shape[..at].iter().product();
    let mut values = Vec::with_capacity(outer * places.len() * step);
    for block in 0..outer {
        let start = block * x.shape[at] * step;
        for (low, high, share) in &taps {
            let (low, high) = (&x.values[start + low * step..][..step], &x.values[start + high * step..][..step]);
            values.extend(low.iter().zip(high).map(|(low, high)| low + (high - low) * share));
        }
    }
    Ok(Array { shape, values })
}
