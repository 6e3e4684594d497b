//! Loops that the compiler makes vector code of, for the instructions that the machine has.
//!
//! Each loop is written once, as plain code, and compiled for AVX-512, for AVX2 and for the baseline; which one runs
//! is found out at run time.

/// Defines `pub(super) fn $name` that runs `$body` compiled for the best instructions at hand.
///
/// The body sees `fma`, a function of three numbers that is one instruction where there is one.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) {
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512($($arg: $type),*) {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) {
                    body::<true>($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the machine has the instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body::<false>($($arg),*)
        }
    };
}
pub(super) use vectorised;

/// `a·b + c`; one rounding where the instruction is there.
#[inline(always)]
pub(super) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place; 0 below -87.3 and `e^88.7` above 88.7.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has few enough bits that its product with a whole number is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding it leaves the nearest whole number in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.7);
    let shifted = fma::<FMA>(clamped, LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = fma::<FMA>(whole, -LN2_HIGH, clamped);
    let r = fma::<FMA>(whole, -LN2_LOW, r);
    // Taylor's terms suffice: |r| is at most ln 2 / 2.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = fma::<FMA>(p, r, c);
    }
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let y = f32::from_bits((p.to_bits() as i32).wrapping_add(exponent.wrapping_shl(23)) as u32);
    if x < -87.3 { 0.0 } else { y }
}

/// The error function, within 1 unit in the last place or so: a polynomial about 0, `1 - e^q` further out.
///
/// The coefficients are N. Juffa's minimax ones.
#[inline(always)]
pub(super) fn erf<const FMA: bool>(a: f32) -> f32 {
    let (t, s) = (a.abs(), a * a);
    let far = {
        let r = fma::<FMA>(-1.728_534_7e-5, t, 3.831_971_3e-4);
        let u = fma::<FMA>(-3.883_964_4e-3, t, 2.425_462_2e-2);
        let r = fma::<FMA>(r, s, u);
        let r = fma::<FMA>(r, t, -1.067_778_8e-1);
        let r = fma::<FMA>(r, t, -6.348_468_7e-1);
        let r = fma::<FMA>(r, t, -1.287_175_1e-1);
        let r = fma::<FMA>(r, t, -t);
        (1.0 - exp::<FMA>(r)).copysign(a)
    };
    let near = {
        let r = fma::<FMA>(-5.967_617e-4, s, 4.991_194_2e-3);
        let r = fma::<FMA>(r, s, -2.676_813_5e-2);
        let r = fma::<FMA>(r, s, 1.128_199_3e-1);
        let r = fma::<FMA>(r, s, -3.761_253_4e-1);
        let r = fma::<FMA>(r, s, 1.283_791_7e-1);
        fma::<FMA>(r, a, a)
    };
    if t > 0.927_734_4 { far } else { near }
}

/// Sum of values, in an order of additions that vector code can follow.
#[inline(always)]
pub(super) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(*value);
        }
    }
    halved(lanes) + rest.iter().map(|v| f(*v)).sum::<f32>()
}

/// Replaces values, and gives the sum of the new ones in the order of [`sum`].
#[inline(always)]
pub(super) fn sum_changed(values: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *value = f(*value);
            *lane += *value;
        }
    }
    rest.iter_mut().for_each(|v| *v = f(*v));
    halved(lanes) + rest.iter().sum::<f32>()
}

const LANES: usize = 32;

#[inline(always)]
fn halved(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// The largest value; -inf of none.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m })
}
