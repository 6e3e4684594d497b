use candle_core::{Device, Tensor};
use rayon::prelude::*;

#[cfg(any(feature = "cuda", test))]
use crate::cuda;
use crate::{
    Error, Result, memory,
    ops::{
        host,
        product::{Left, Right, View},
    },
    weights::Weights,
};

/// Positions of one product: enough that a weight that was fetched is used often, few enough that the unfolded part
/// of the input stays in a core's cache.
const POSITIONS: usize = 256;

/// What happens around a convolution, without a copy of the whole tensor for each.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Nearest upsampling of the input before the convolution (time, rows, columns). In time the first frame is
    /// not repeated.
    pub upsample: [usize; 3],
    /// Added to the output, in its shape.
    pub residual: Option<&'a Tensor>,
}

impl Default for Step<'_> {
    fn default() -> Self {
        Self { upsample: [1; 3], residual: None }
    }
}

/// A convolution over time, rows and columns that repeats the edge, in time in front only.
#[derive(Debug, Clone)]
pub struct CausalConv3d {
    weight: Tensor, // (O, C·k·k·k), on a card (O, k·k·k·C)
    bias: Tensor,   // (O)
    inp: usize,
    out: usize,
    kernel: usize,
    stride: [usize; 3],
}

impl CausalConv3d {
    /// Reads `weight` `(O, inp, k, k, k)` and `bias` `(O)`; the width and the odd kernel size are the tensor's own.
    pub fn load(weights: &Weights, inp: usize, stride: [usize; 3]) -> Result<Self> {
        let [out, _, _, _, kernel] = weights.dims("weight")?;
        if kernel % 2 == 0 {
            return Err(Error::input("vae weights", format!("a kernel of {kernel}, an odd one is needed")));
        }
        let weight = weights.get(&[out, inp, kernel, kernel, kernel], "weight")?;
        let weight = match on_card(&weight) {
            // There a tap's channels are read one after the other.
            true => weight.reshape((out, inp, kernel.pow(3)))?.transpose(1, 2)?.contiguous()?,
            false => weight,
        };
        let weight = weight.reshape((out, inp * kernel.pow(3)))?;
        Ok(Self { weight, bias: weights.get(&[out], "bias")?, inp, out, kernel, stride })
    }

    /// Output channels.
    #[must_use]
    pub fn out(&self) -> usize {
        self.out
    }

    /// - `x`: `(B, C, T, H, W)`
    /// - returns: `(B, O, T', H', W')`, each side `(n - 1) / stride + 1`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_step(x, Step::default())
    }

    /// As [`forward`](Self::forward), with upsampling before and an addition after.
    pub fn forward_step(&self, x: &Tensor, step: Step<'_>) -> Result<Tensor> {
        let (batch, channels, t, h, w) = x.dims5()?;
        if channels != self.inp || t * h * w == 0 {
            let reason = format!("shape {:?}, expected (B, {}, T, H, W), no side 0", x.dims(), self.inp);
            return Err(Error::input("vae tensor", reason));
        }
        let axes = Axes::new([t, h, w], self.kernel, self.stride, step.upsample);
        let [to, ho, wo] = axes.out;
        if let Some(residual) = step.residual
            && residual.dims() != [batch, self.out, to, ho, wo]
        {
            let reason = format!("{:?}, expected {:?}", residual.dims(), [batch, self.out, to, ho, wo]);
            return Err(Error::input("vae residual", reason));
        }
        if !host::here(x) {
            #[cfg(feature = "cuda")]
            if cuda::here(x) {
                return self.forward_on_card(x, step);
            }
            return self.forward_portable(x, step);
        }
        memory::room_for(x.dtype(), x.elem_count(), batch * self.out * to * ho * wo)?;
        let mut y = vec![0f32; batch * self.out * to * ho * wo];
        let bias = host::with_values(&self.bias, <[f32]>::to_vec)?;
        let add = |y: &mut [f32], residual: Option<&[f32]>| add_bias(y, &bias, residual, to * ho * wo);
        for (b, y) in y.chunks_mut(self.out * to * ho * wo).enumerate() {
            host::with_values(&x.get(b)?, |x| {
                host::with_values(&self.weight, |weight| self.convolve(x, weight, &axes, y))
            })??;
            match step.residual {
                Some(residual) => host::with_values(&residual.get(b)?, |r| add(y, Some(r)))?,
                None => add(y, None),
            }
        }
        Ok(host::tensor(y, &[batch, self.out, to, ho, wo], x.dtype())?)
    }

    /// The same by a kernel of a card.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn forward_on_card(&self, x: &Tensor, step: Step<'_>) -> Result<Tensor> {
        let (_, _, t, h, w) = x.dims5()?;
        let axes = Axes::new([t, h, w], self.kernel, self.stride, step.upsample);
        let taps = self.kernel.pow(3);
        let weight = match on_card(&self.weight) {
            true => self.weight.reshape((self.out, taps, self.inp))?,
            false => self.weight.reshape((self.out, self.inp, taps))?.transpose(1, 2)?,
        };
        let given = cuda::Convolution {
            weight: &weight,
            bias: &self.bias,
            residual: step.residual,
            kernel: self.kernel,
            sources: &axes.sources.iter().flatten().map(|&at| at as u32).collect::<Vec<_>>(),
            out: axes.out,
        };
        Ok(cuda::convolve(x, &given)?)
    }

    /// Unfolds the input some positions at a time while it is multiplied: `x` `(C, T, H, W)` to `y` `(O, T', H', W')`.
    ///
    /// Every tile is one thread's, and its arithmetic does not depend on the number of threads.
    fn convolve(&self, x: &[f32], weight: &[f32], axes: &Axes, y: &mut [f32]) {
        let depth = self.inp * self.kernel.pow(3);
        let [to, ho, wo] = axes.out;
        let volume = to * ho * wo;
        assert!(y.len() == self.out * volume && weight.len() == self.out * depth, "sizes are checked by the caller");
        let tiles: Vec<usize> = (0..volume).step_by(POSITIONS).collect();
        let y = Shared(y.as_mut_ptr());
        let left = Left::new_threaded(View::rows(weight, depth), self.out, depth);
        tiles.into_par_iter().for_each_init(Vec::new, |room, first| {
            let last = (first + POSITIONS).min(volume);
            let y: &Shared = &y;
            // SAFETY: columns `first ..` of the `out` lines of `y`, which lie within it; no two tiles have a column in
            // common.
            unsafe {
                let to = (y.0.add(first), volume);
                let unfolded = Right::Lines(&|k, line| axes.unfold(x, k, first..last, line));
                left.times(unfolded, last - first, to, (1.0, false), room);
            }
        });
    }

    /// The same with candle's operations only, on any device and in any type: one two-dimensional convolution
    /// for each frame of the kernel.
    pub fn forward_portable(&self, x: &Tensor, step: Step<'_>) -> Result<Tensor> {
        let x = upsample(x, step.upsample)?;
        let (batch, channels, t, _, _) = x.dims5()?;
        let (k, [st, sh, sw]) = (self.kernel, self.stride);
        let x = x.pad_with_same(2, k - 1, 0)?.pad_with_same(3, k / 2, k / 2)?.pad_with_same(4, k / 2, k / 2)?;
        let (h, w) = (x.dim(3)?, x.dim(4)?);
        let weight = match on_card(&self.weight) {
            true => self.weight.reshape((self.out, k.pow(3), self.inp))?.transpose(1, 2)?.contiguous()?,
            false => self.weight.clone(),
        };
        let weight = weight.reshape((self.out, self.inp, k, k, k))?;
        let mut frames = Vec::new();
        for start in (0..t).step_by(st) {
            let mut sum: Option<Tensor> = None;
            for i in 0..k {
                let frame = x.narrow(2, start + i, 1)?.reshape((batch, channels, h, w))?;
                // A stride of its own for each side is not to be had: take every position, then every other one.
                let y = frame.conv2d(&weight.narrow(2, i, 1)?.squeeze(2)?.contiguous()?, 0, 1, 1, 1)?;
                sum = Some(match sum {
                    Some(sum) => (sum + y)?,
                    None => y,
                });
            }
            if let Some(sum) = sum {
                frames.push(every(&every(&sum, 2, sh)?, 3, sw)?);
            }
        }
        let y = Tensor::stack(&frames, 2)?.broadcast_add(&self.bias.reshape((1, self.out, 1, 1, 1))?)?;
        Ok(match step.residual {
            Some(residual) => (y + residual)?,
            None => y,
        })
    }
}

/// Whether a weight is on a card, where kernels of our own read it.
fn on_card(weight: &Tensor) -> bool {
    matches!(weight.device(), Device::Cuda(_))
}

/// Output that several threads write, each its own part.
struct Shared(*mut f32);

// SAFETY: whoever writes through it keeps to elements that no other thread touches.
unsafe impl Sync for Shared {}

fn add_bias(y: &mut [f32], bias: &[f32], residual: Option<&[f32]>, volume: usize) {
    y.par_chunks_mut(volume).enumerate().for_each(|(o, y)| {
        let bias = bias[o];
        match residual {
            Some(residual) => {
                let residual = &residual[o * volume..][..volume];
                y.iter_mut().zip(residual).for_each(|(y, r)| *y += bias + r);
            }
            None => y.iter_mut().for_each(|y| *y += bias),
        }
    });
}

fn every(x: &Tensor, dim: usize, stride: usize) -> candle_core::Result<Tensor> {
    if stride == 1 {
        return Ok(x.clone());
    }
    let indices: Vec<u32> = (0..x.dim(dim)? as u32).step_by(stride).collect();
    x.contiguous()?.index_select(&Tensor::new(indices, x.device())?, dim)
}

/// Repeats every element along time, rows and columns; the first frame stays single.
fn upsample(x: &Tensor, factors: [usize; 3]) -> candle_core::Result<Tensor> {
    let mut x = x.contiguous()?;
    for (i, factor) in factors.into_iter().enumerate().filter(|(_, factor)| *factor > 1) {
        let axis = Axis { size: x.dim(2 + i)?, factor, time: i == 0 };
        let indices: Vec<u32> = (0..axis.grown()).map(|v| axis.source(v) as u32).collect();
        x = x.index_select(&Tensor::new(indices, x.device())?, 2 + i)?;
    }
    Ok(x)
}

/// One side of the input, seen through nearest upsampling.
struct Axis {
    size: usize,
    factor: usize,
    time: bool,
}

impl Axis {
    fn grown(&self) -> usize {
        if self.time { 1 + (self.size - 1) * self.factor } else { self.size * self.factor }
    }

    fn source(&self, grown: usize) -> usize {
        if self.time { grown.div_ceil(self.factor) } else { grown / self.factor }
    }
}

/// Which input element each kernel offset reads for each output position, along each side.
struct Axes {
    size: [usize; 3],
    out: [usize; 3],
    kernel: usize,
    /// `[side][offset · out + position]`
    sources: [Vec<usize>; 3],
    /// Whether columns are read one after the other, edges aside.
    plain: bool,
}

impl Axes {
    fn new(size: [usize; 3], kernel: usize, stride: [usize; 3], factors: [usize; 3]) -> Self {
        let mut out = [0; 3];
        let sources = std::array::from_fn(|i| {
            let axis = Axis { size: size[i], factor: factors[i], time: i == 0 };
            let front = if axis.time { kernel - 1 } else { kernel / 2 };
            let last = axis.grown() - 1;
            out[i] = last / stride[i] + 1;
            (0..kernel)
                .flat_map(|offset| (0..out[i]).map(move |position| (offset, position)))
                .map(|(offset, position)| axis.source((position * stride[i] + offset).saturating_sub(front).min(last)))
                .collect()
        });
        Self { size, out, kernel, sources, plain: stride[2] == 1 && factors[2] == 1 }
    }

    /// Writes line `k` (channel and kernel offset) of the unfolded input for the given positions.
    fn unfold(&self, x: &[f32], k: usize, positions: std::ops::Range<usize>, mut line: &mut [f32]) {
        let ([t, h, w], [to, ho, wo], n) = (self.size, self.out, self.kernel);
        let (c, kt, kh, kw) = (k / (n * n * n), k / (n * n) % n, k / n % n, k % n);
        let times = &self.sources[0][kt * to..][..to];
        let heights = &self.sources[1][kh * ho..][..ho];
        let widths = &self.sources[2][kw * wo..][..wo];
        let (mut row, mut from) = (positions.start / wo, positions.start % wo);
        while !line.is_empty() {
            let (part, rest) = line.split_at_mut(line.len().min(wo - from));
            let source = &x[((c * t + times[row / ho]) * h + heights[row % ho]) * w..][..w];
            if self.plain {
                // Position `p` reads `p + kw - n / 2`; past an edge that is repeated.
                let before = (n / 2).saturating_sub(kw).saturating_sub(from).min(part.len());
                let start = (from + before + kw).saturating_sub(n / 2).min(w);
                let middle = (w - start).min(part.len() - before);
                part[..before].fill(source[0]);
                part[before..before + middle].copy_from_slice(&source[start..start + middle]);
                part[before + middle..].fill(source[w - 1]);
            } else {
                part.iter_mut().zip(&widths[from..]).for_each(|(value, &i)| *value = source[i]);
            }
            (row, from, line) = (row + 1, 0, rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::DType;
    use proptest::prelude::*;

    use super::*;
    use crate::vae::tests::{noise, worst};

    /// The weights of a layer that no checkpoint has.
    pub(super) fn layer(out: usize, inp: usize, kernel: usize, stride: [usize; 3]) -> CausalConv3d {
        let weight = noise(&[out, inp, kernel, kernel, kernel], 1);
        let tensors = HashMap::from([("weight".to_owned(), weight), ("bias".to_owned(), noise(&[out], 2))]);
        CausalConv3d::load(&Weights::from_tensors(tensors, DType::F32, &Device::Cpu), inp, stride).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Only the order of additions differs.
        #[test]
        fn the_fast_convolution_equals_the_portable_one(
            sizes in (1usize..3, 1usize..4, 1usize..5, 1usize..7, 1usize..7),
            kernel in prop::sample::select(vec![1usize, 3, 5]),
            strides in (1usize..3, 1usize..3),
            factors in (1usize..3, 1usize..3),
            residual: bool,
        ) {
            let (batch, channels, t, h, w) = sizes;
            let conv = layer(3, channels, kernel, [strides.0, strides.1, strides.1]);
            let x = noise(&[batch, channels, t, h, w], 3);
            let upsample = [factors.0, factors.1, factors.1];
            let clear = conv.forward_portable(&x, Step { upsample, residual: None }).unwrap();
            let addend = noise(clear.dims(), 4);
            let step = Step { upsample, residual: residual.then_some(&addend) };
            let clear = conv.forward_portable(&x, step).unwrap();
            let fast = conv.forward_step(&x, step).unwrap();
            prop_assert_eq!(clear.dims(), fast.dims());
            prop_assert!(worst(&fast, &clear) < 2e-6, "differs by {}", worst(&fast, &clear));
        }
    }

    #[test]
    fn tiles_of_rows_join_without_a_seam() {
        // 27 · 24 · 200 values in a row: more than one tile.
        let conv = layer(2, 24, 3, [1; 3]);
        let x = noise(&[1, 24, 3, 21, 200], 5);
        let (fast, clear) = (conv.forward(&x).unwrap(), conv.forward_portable(&x, Step::default()).unwrap());
        assert!(worst(&fast, &clear) < 5e-6, "differs by {}", worst(&fast, &clear));
    }

    #[test]
    fn a_first_frame_is_not_repeated_in_time() {
        let x = Tensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap().reshape((1, 1, 3, 1, 1)).unwrap();
        let y = upsample(&x, [2, 1, 1]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y, [1., 2., 2., 3., 3.]);
    }
}
