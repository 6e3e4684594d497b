//! Kernels held against their clear twins, on shapes that are no multiples of anything: some that are always the same, and
//! some that are drawn.
//!
//! The twin computes in f32 on the processor, from the values that the kernel gets. In this crate's tests kernels run on
//! the emulation; the GPU suite runs the same checks on a card.

mod kinds;

use candle_core::{DType, Device, Result, Tensor};

use self::kinds::{Hidden, Shape};
use crate::{ops::Activation, weights::Encoding};

/// One kernel in one type.
pub struct Check {
    /// What is checked.
    pub name: String,
    /// The largest difference that may be, relative to the largest value.
    pub tolerance: f32,
    run: Box<dyn Fn(&Device) -> Result<f32>>,
}

impl Check {
    /// Runs the kernel on `device` and gives the largest difference, relative to the largest value.
    ///
    /// Errors: the device's.
    pub fn run(&self, device: &Device) -> Result<f32> {
        (self.run)(device)
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

const ACTIVATIONS: [Activation; 6] = [
    Activation::None,
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::QuickGelu,
    Activation::Silu,
    Activation::Relu,
];
/// Forms of packed weights, and whether their files have scales beside them.
const ENCODINGS: [(Encoding, bool); 7] = [
    (Encoding::F8E4M3, true),
    (Encoding::I8, true),
    (Encoding::Q8_0, false),
    (Encoding::Q6K, false),
    (Encoding::Q5K, false),
    (Encoding::Q4K, false),
    (Encoding::Q4_0, false),
];

/// Types that layers are checked in.
fn layer_types() -> &'static [DType] {
    // The processor has no product in bf16, so the emulation leaves that to the card.
    if cfg!(feature = "cuda") { &TYPES } else { &[DType::F32, DType::F16] }
}

/// All checks on the shapes that are always the same.
#[must_use]
pub fn all() -> Vec<Check> {
    let mut checks = Vec::new();
    for dtype in TYPES {
        for width in [37, 3072] {
            kinds::norms(&mut checks, dtype, 3, width);
        }
        // More than one slice for each group.
        kinds::group_norms(&mut checks, dtype, [2, 2, 3, 67, 101]);
        for (d, turned) in [(16, true), (70, true), (128, true), (128, false)] {
            kinds::heads_of(&mut checks, dtype, [11, 3, d], turned);
        }
        kinds::turns(&mut checks, dtype, [3, 7, 18]);
        let sizes = [[1, 2, 130, 100], [2, 2, 33, 65], [1, 1, 5, 1], [1, 1, 128, 64]];
        for d in [32, 64, 128, 512, 1024] {
            for ([b, h, q, k], hide) in
                sizes.into_iter().zip([Hidden::Nothing, Hidden::Each, Hidden::Nothing, Hidden::Keys])
            {
                if d <= 128 || q <= 100 {
                    kinds::attends(&mut checks, dtype, [b, h, q, k, d], hide);
                }
            }
        }
        for (inp, out, kernel, stride, upsample, residual) in [
            (5, 7, 3, [1, 1, 1], [1, 1, 1], true),
            (33, 9, 3, [1, 1, 1], [2, 2, 2], false),
            (32, 130, 3, [2, 2, 2], [1, 1, 1], false),
            (16, 3, 1, [1, 1, 1], [1, 1, 1], true),
            (8, 4, 5, [1, 2, 2], [1, 2, 2], false),
        ] {
            let shape = Shape { channels: [inp, out], kernel, stride, upsample, residual, sides: [2, 5, 7] };
            kinds::convolution(&mut checks, dtype, shape);
        }
        for (encoding, scaled) in ENCODINGS {
            let sides = if scaled { [7, 37] } else { [3, 512] };
            kinds::packed(&mut checks, dtype, encoding, sides, false);
            if scaled {
                kinds::packed(&mut checks, dtype, encoding, sides, true);
            }
        }
    }
    for &dtype in layer_types() {
        for (i, activation) in ACTIVATIONS.into_iter().enumerate() {
            // One width of whole packs, and one that is none.
            let out = if i % 2 == 0 { 37 } else { 64 };
            for gated in [false, true] {
                kinds::layer(&mut checks, dtype, [5, 24, out], activation, gated);
            }
        }
        // No kernel is for this width, and there are too many queries for one piece: cuBLAS, some queries at a time.
        kinds::attends(&mut checks, dtype, [1, 1, 8200, 2100, 20], Hidden::Nothing);
    }
    for dtype in [DType::BF16, DType::F16] {
        for inp in [37, 256] {
            kinds::thin(&mut checks, dtype, [2, inp, 19]);
        }
    }
    checks
}

/// Checks on shapes that are drawn, the same for the same seed.
#[must_use]
pub fn drawn(seed: u64) -> Vec<Check> {
    /// Shapes for each kernel and type.
    const ROUNDS: usize = 3;
    let mut state = seed;
    let mut below = |least: usize, most: usize| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        least + ((x ^ (x >> 31)) % (most - least) as u64) as usize
    };
    let mut checks = Vec::new();
    for _ in 0..ROUNDS {
        for dtype in TYPES {
            kinds::norms(&mut checks, dtype, below(1, 9), below(1, 1200));
            kinds::group_norms(&mut checks, dtype, [below(1, 3), below(1, 5), below(1, 4), below(1, 40), below(1, 90)]);
            kinds::heads_of(&mut checks, dtype, [below(1, 40), below(1, 7), 2 * below(1, 65)], below(0, 2) > 0);
            kinds::turns(&mut checks, dtype, [below(1, 5), below(1, 60), 2 * below(1, 65)]);
            let d = [32, 64, 128, 512, 1024][below(0, 5)];
            let hide = [Hidden::Nothing, Hidden::Keys, Hidden::Each][below(0, 3)];
            let most = if d > 128 { 24 } else { 150 };
            kinds::attends(&mut checks, dtype, [below(1, 3), below(1, 4), below(1, most), below(1, 150), d], hide);
            let ones = |many: bool| if many { [1, 2, 2] } else { [1; 3] };
            let (stride, upsample) = (ones(below(0, 3) == 0), ones(below(0, 3) == 0));
            let shape = Shape {
                channels: [below(1, 40), below(1, 70)],
                kernel: [1, 3][below(0, 2)],
                stride,
                upsample,
                residual: below(0, 2) > 0,
                sides: [below(1, 4), below(2, 9), below(2, 12)],
            };
            kinds::convolution(&mut checks, dtype, shape);
            let (encoding, scaled) = ENCODINGS[below(0, ENCODINGS.len())];
            let columns = if scaled { below(1, 300) } else { 256 * below(1, 4) };
            kinds::packed(&mut checks, dtype, encoding, [below(2, 20), columns], scaled && below(0, 2) > 0);
        }
        for &dtype in layer_types() {
            let activation = ACTIVATIONS[below(0, ACTIVATIONS.len())];
            kinds::layer(&mut checks, dtype, [below(1, 40), below(1, 90), below(1, 200)], activation, below(0, 2) > 0);
        }
        kinds::thin(&mut checks, DType::BF16, [below(1, 16), below(1, 300), below(1, 90)]);
    }
    checks
}

/// Deterministic values in -1..1: the same for the same seed.
pub(crate) fn noise(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let value = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// A tensor for a kernel, and the same values in f32 for its twin.
struct Both {
    kernel: Tensor,
    clear: Tensor,
}

fn both(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Both> {
    let narrow = noise(shape, seed)?.to_dtype(dtype)?;
    Ok(Both { kernel: narrow.to_device(device)?, clear: narrow.to_dtype(DType::F32)? })
}

/// The largest difference, relative to the largest value of the twin.
fn off(kernel: &Tensor, clear: &Tensor) -> Result<f32> {
    if kernel.dims() != clear.dims() {
        candle_core::bail!("a result of {:?}, expected {:?}", kernel.dims(), clear.dims());
    }
    let values = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (kernel, clear) = (values(kernel)?, values(clear)?);
    let most = clear.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
    // Not `max`, which would pass over a NaN.
    Ok(kernel.iter().zip(&clear).map(|(k, c)| (k - c).abs() / most).fold(0.0, |m, d| if d <= m { m } else { d }))
}

/// Half a unit of the last place of a result, and in f32 what another order of additions does.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 5e-4,
        _ => 5e-6,
    }
}

fn add(checks: &mut Vec<Check>, what: impl Into<String>, dtype: DType, run: impl Fn(&Device) -> Result<f32> + 'static) {
    let name = format!("{}, {}", what.into(), dtype.as_str());
    checks.push(Check { name, tolerance: tolerance(dtype), run: Box::new(run) });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the emulation, which runs what a card would run.
    #[cfg(not(feature = "cuda"))]
    #[test]
    fn every_kernel_equals_its_clear_twin() {
        hold(all());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn every_kernel_equals_its_clear_twin_on_shapes_that_are_drawn() {
        hold(drawn(1));
    }

    #[test]
    fn the_same_shapes_are_drawn_for_the_same_seed_alone() {
        let names = |seed: u64| drawn(seed).into_iter().map(|check| check.name).collect::<Vec<_>>();
        assert_eq!(names(1), names(1));
        assert_ne!(names(1), names(2));
    }

    #[cfg(not(feature = "cuda"))]
    fn hold(checks: Vec<Check>) {
        let (mut wrong, all) = (Vec::new(), checks.len());
        for check in checks {
            match check.run(&Device::Cpu) {
                Ok(off) if off <= check.tolerance => {}
                Ok(off) => wrong.push(format!("{}: {off:.1e}, allowed {:.1e}", check.name, check.tolerance)),
                Err(error) => wrong.push(format!("{}: {error}", check.name)),
            }
        }
        assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all, wrong.join("\n"));
    }
}
