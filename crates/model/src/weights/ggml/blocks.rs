//! A loop over pairs of blocks, compiled for each width of vectors and chosen when it runs.

/// One block to another.
///
/// A trait and no closure, because [`block`](Self::block) must be marked `#[inline(always)]`: only what is inlined gets
/// the wider vectors.
pub trait Convert<A, B, const N: usize, const M: usize> {
    /// Fills `to` from `from`.
    fn block(&self, from: &[A; N], to: &mut [B; M]);
}

/// Converts each block of `from` into the block of `to` at its place; rests that fill no block are left.
pub fn for_each_block<A, B, const N: usize, const M: usize>(
    from: &[A],
    to: &mut [B],
    convert: impl Convert<A, B, N, M>,
) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the processor has both; the former implies the foundation.
            return unsafe { with_avx512(from, to, convert) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { with_avx2(from, to, convert) };
        }
    }
    plain(from, to, convert);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn with_avx512<A, B, const N: usize, const M: usize>(from: &[A], to: &mut [B], convert: impl Convert<A, B, N, M>) {
    plain(from, to, convert);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<A, B, const N: usize, const M: usize>(from: &[A], to: &mut [B], convert: impl Convert<A, B, N, M>) {
    plain(from, to, convert);
}

#[inline(always)]
fn plain<A, B, const N: usize, const M: usize>(from: &[A], to: &mut [B], convert: impl Convert<A, B, N, M>) {
    for (from, to) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
        convert.block(from, to);
    }
}
