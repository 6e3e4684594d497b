//! Fast operations against clear ones, on random shapes.

use std::cell::Cell;

use candle_core::{DType, Device, Result, Tensor};
use proptest::prelude::*;

use super::*;
use crate::{golden::noise, weights::Matrix};

/// The next values of a sequence that every test draws from its start, with deviation `scale`.
fn random(shape: &[usize], scale: f64) -> Tensor {
    thread_local!(static DRAWN: Cell<u64> = const { Cell::new(0) });
    let seed = DRAWN.replace(DRAWN.get() + 1);
    (noise(shape, seed) * (scale * 3f64.sqrt())).unwrap()
}

/// The largest difference, relative to the largest value.
fn off(a: &Tensor, b: &Tensor) -> f32 {
    apart(a, b, b)
}

/// The largest difference, relative to the largest value of `reach`.
fn apart(a: &Tensor, b: &Tensor, reach: &Tensor) -> f32 {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    let values = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (values(a), values(b));
    let most = values(reach).iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    a.iter().zip(&b).fold(0f32, |m, (a, b)| if (a - b).abs() <= m * most { m } else { (a - b).abs() / most })
}

/// f32 against f32: only the order of additions and the last place of exponentials differ.
const NEAR: f32 = 2e-6;

const ACTIVATIONS: [Activation; 6] = [
    Activation::None,
    Activation::GeluTanh,
    Activation::GeluErf,
    Activation::QuickGelu,
    Activation::Silu,
    Activation::Relu,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_layer_equals_the_clear_one(
        rows in 0usize..40, inp in 1usize..70, second in 0usize..30, out in 1usize..70,
        activation in prop::sample::select(&ACTIVATIONS[..]), bias: bool, residual: bool, gate: bool,
    ) {
        let (x0, x1) = (random(&[rows, inp], 1.0), random(&[rows, second], 1.0));
        let xs: Vec<&Tensor> = if second > 0 { vec![&x0, &x1] } else { vec![&x0] };
        let weight = Matrix::new(&random(&[out, inp + second], 0.3)).unwrap();
        let bias = bias.then(|| random(&[out], 1.0));
        let (r, g) = (random(&[rows, out], 1.0), random(&[out], 1.0));
        let gate = residual.then_some(Gate { residual: &r, gate: gate.then_some(&g) });
        let fast = linear(&xs, &weight, bias.as_ref(), activation, gate).unwrap();
        prop_assert!(rows == 0 || off(&fast, &linear_clear(&xs, &weight, bias.as_ref(), activation, gate).unwrap()) < NEAR);
    }

    #[test]
    fn norms_equal_the_clear_ones(lines in 1usize..30, width in 1usize..200, magnitude in 1e-3f64..30.0) {
        let x = (random(&[lines, width], magnitude) + magnitude).unwrap();
        let (weight, bias) = (random(&[width], 1.0), random(&[width], 1.0));
        let clear = layer_norm_clear(&x, &weight, &bias, 1e-6).unwrap();
        prop_assert!(off(&layer_norm(&x, &weight, &bias, 1e-6).unwrap(), &clear) < 2e-5);
        prop_assert!(off(&rms_norm(&x, &weight, 1e-6).unwrap(), &rms_norm_clear(&x, &weight, 1e-6).unwrap()) < NEAR);
    }

    #[test]
    fn heads_equal_the_clear_ones(length in 1usize..30, count in 1usize..4, half in 1usize..20, turn: bool) {
        let d = 2 * half;
        let qkv = random(&[length, 3 * count * d], 1.0);
        let (q, k) = (random(&[d], 1.0), random(&[d], 1.0));
        let angles = random(&[length + 3, half], 3.0);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let turn = turn.then_some((&cos, &sin));
        let fast = heads(&qkv, [&q, &k], 1e-6, turn).unwrap();
        let clear = heads_clear(&qkv, [&q, &k], 1e-6, turn).unwrap();
        prop_assert!(off(&fast.q, &clear.q) < NEAR && off(&fast.k, &clear.k) < NEAR && off(&fast.v, &clear.v) == 0.0);
    }

    #[test]
    fn attention_equals_the_clear_one(
        batch in 1usize..3, count in 1usize..4, queries in 1usize..200, keys in 1usize..1300,
        d in 1usize..40, dv in 1usize..40, mask in 0usize..4,
    ) {
        let q = random(&[batch, count, queries, d], 1.0);
        let (k, v) = (random(&[batch, count, keys, d], 1.0), random(&[batch, count, keys, dv], 1.0));
        // As in the networks: scores of about 1, whose own rounding is small beside the exponential's.
        let scale = (d as f64).powf(-0.5);
        let shape = [[0; 3], [1, 1, keys], [batch, 1, keys], [1, queries, keys]][mask];
        // Key 0 is always seen.
        let mask = (mask > 0).then(|| {
            let hidden = Tensor::rand(0f32, 1.0, &shape, &Device::Cpu).unwrap().ge(0.5).unwrap();
            let first = Tensor::arange(0u32, keys as u32, &Device::Cpu).unwrap().gt(0u32).unwrap();
            let hidden = hidden.broadcast_mul(&first).unwrap();
            let off = Tensor::full(f32::NEG_INFINITY, &shape, &Device::Cpu).unwrap();
            hidden.where_cond(&off, &off.zeros_like().unwrap()).unwrap()
        });
        let fast = attention(&q, &k, &v, scale, mask.as_ref()).unwrap();
        let clear = attention_clear(&q, &k, &v, scale, mask.as_ref()).unwrap();
        // Values of both signs cancel in the sum, and its rounding does not: that follows the sum of their sizes.
        let reach = attention_clear(&q, &k, &v.abs().unwrap(), scale, mask.as_ref()).unwrap();
        prop_assert!(apart(&fast, &clear, &reach) < NEAR);
    }

    /// A row depends on its own input alone, so tokens can be taken in any portions.
    #[test]
    fn tokens_in_portions_give_what_all_together_give(rows in 2usize..60, portion in 1usize..60, queries in 2usize..200) {
        let x = random(&[rows, 48], 1.0);
        let weight = Matrix::new(&random(&[40, 48], 0.3)).unwrap();
        let layer = |x: &Tensor| linear(&[x], &weight, None, Activation::GeluTanh, None).unwrap();
        let parts: Vec<Tensor> = (0..rows)
            .step_by(portion)
            .map(|at| layer(&x.narrow(0, at, portion.min(rows - at)).unwrap()))
            .collect();
        prop_assert!(off(&Tensor::cat(&parts, 0).unwrap(), &layer(&x)) < 1e-6);

        let (q, k, v) = (random(&[1, 2, queries, 8], 1.0), random(&[1, 2, 70, 8], 1.0), random(&[1, 2, 70, 8], 1.0));
        let parts: Vec<Tensor> = (0..queries)
            .step_by(portion)
            .map(|at| attention(&q.narrow(2, at, portion.min(queries - at)).unwrap(), &k, &v, 0.3, None).unwrap())
            .collect();
        prop_assert!(off(&Tensor::cat(&parts, 2).unwrap(), &attention(&q, &k, &v, 0.3, None).unwrap()) < 1e-6);
    }
}

#[test]
fn exponential_and_error_function_are_exact_to_a_few_units() {
    for i in -8700..8870 {
        let x = i as f32 * 0.01;
        for got in [simd::exp::<true>(x), simd::exp::<false>(x)] {
            let wanted = f64::from(x).exp();
            assert!((f64::from(got) / wanted - 1.0).abs() < 3e-7, "e^{x}: {got} for {wanted}");
        }
    }
    assert_eq!((simd::exp::<true>(f32::NEG_INFINITY), simd::exp::<true>(-88.0)), (0.0, 0.0));
    assert!(simd::exp::<true>(f32::NAN).is_nan() && simd::erf::<true>(f32::NAN).is_nan());
    // Values of the error function to ten digits.
    for (x, wanted) in [
        (0.0, 0.0),
        (0.1, 0.112_462_916),
        (0.5, 0.520_499_877_8),
        (1.0, 0.842_700_793),
        (2.0, 0.995_322_265),
        (4.0, 0.999_999_984_6),
    ] {
        for (x, wanted) in [(x, wanted), (-x, -wanted)] {
            let (x, wanted): (f32, f64) = (x, wanted);
            assert!((f64::from(simd::erf::<true>(x)) - wanted).abs() < 1.5e-7, "erf {x}");
        }
    }
}

#[test]
fn activations_equal_the_clear_ones_from_small_to_large() -> Result<()> {
    let values: Vec<f32> =
        (-4000..4000).map(|i| i as f32 * 0.01).chain([-1e30, -90.0, 0.0, 1e-30, 90.0, 1e30]).collect();
    let x = Tensor::from_vec(values.clone(), (1, values.len()), &Device::Cpu)?;
    for activation in ACTIVATIONS {
        let mut fast = values.clone();
        activation.apply(&mut fast);
        let clear = activation.clear(&x)?.flatten_all()?.to_vec1::<f32>()?;
        for ((x, fast), clear) in values.iter().zip(&fast).zip(&clear) {
            let tolerance = 4e-7 * (1.0 + x.abs().min(20.0)).max(clear.abs());
            assert!((fast - clear).abs() <= tolerance, "{activation:?} of {x}: {fast}, expected {clear}");
        }
    }
    Ok(())
}

/// The result of 16-bit tensors is that of their values in f32, rounded once.
#[test]
fn sixteen_bits_are_rounded_once() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let x = random(&[7, 33], 1.0).to_dtype(dtype)?;
        let weight = random(&[9, 33], 0.3).to_dtype(dtype)?;
        let wide = linear(
            &[&x.to_dtype(DType::F32)?],
            &Matrix::new(&weight.to_dtype(DType::F32)?)?,
            None,
            Activation::Silu,
            None,
        )?;
        let narrow = linear(&[&x], &Matrix::new(&weight)?, None, Activation::Silu, None)?;
        assert_eq!(off(&narrow, &wide.to_dtype(dtype)?), 0.0);
        let (q, k) = (x.reshape((1, 1, 7, 33))?, x.reshape((1, 1, 7, 33))?);
        let wide = attention(&q.to_dtype(DType::F32)?, &k.to_dtype(DType::F32)?, &k.to_dtype(DType::F32)?, 0.2, None)?;
        assert_eq!(off(&attention(&q, &k, &k, 0.2, None)?, &wide.to_dtype(dtype)?), 0.0);
    }
    Ok(())
}
