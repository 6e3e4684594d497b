//! Matrix products in f32: a kernel of our own for AVX-512, the `gemm` crate elsewhere.
//!
//! The crate's kernels stop at AVX2. Ours holds a tile of 12 x 32 sums in registers and reads both operands from
//! packed copies, so that it goes through memory in order.

/// Rows and columns of one tile of sums.
const MR: usize = 12;
const NR: usize = 32;

/// Depth that is multiplied before the next tile's turn: both operands' parts then stay in a core's caches.
const KC: usize = 512;

/// A matrix in memory: element `(i, j)` is at `i·row + j·column`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl<'a> View<'a> {
    /// Rows of `width` values, one after the other.
    pub(crate) fn rows(values: &'a [f32], width: usize) -> Self {
        Self { values, row: width, column: 1 }
    }

    /// The transpose of rows of `width` values.
    pub(crate) fn columns(values: &'a [f32], width: usize) -> Self {
        Self { values, row: 1, column: width }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// The left operand of products, laid out for the kernel.
pub(crate) struct Left<'a> {
    view: View<'a>,
    rows: usize,
    depth: usize,
    /// Blocks of 12 rows, each `depth` x 12; empty where the kernel is not to be had.
    packed: Vec<f32>,
}

/// Makes tests take the crate's path where the kernel could run.
#[cfg(test)]
pub(super) static PLAIN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Whether products have a kernel of our own here, which wants its operands laid out anew.
#[must_use]
pub fn has_kernel() -> bool {
    #[cfg(test)]
    if PLAIN.load(std::sync::atomic::Ordering::Relaxed) {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

impl<'a> Left<'a> {
    /// Lays out `rows` x `depth` values; `room` is memory to use again.
    pub(crate) fn new(view: View<'a>, rows: usize, depth: usize, mut room: Vec<f32>) -> Self {
        assert!(view.holds(rows, depth), "the left operand lies within its values");
        room.clear();
        if has_kernel() {
            room.resize(rows.div_ceil(MR) * MR * depth, 0.0);
            for (block, packed) in room.chunks_exact_mut((MR * depth).max(1)).enumerate() {
                pack_left(view, block * MR..rows.min((block + 1) * MR), depth, packed);
            }
        }
        Self { view, rows, depth, packed: room }
    }

    /// As [`new`](Self::new), on all threads.
    pub(crate) fn new_threaded(view: View<'a>, rows: usize, depth: usize) -> Self {
        use rayon::prelude::*;
        assert!(view.holds(rows, depth), "the left operand lies within its values");
        let mut packed = Vec::new();
        if has_kernel() {
            packed.resize(rows.div_ceil(MR) * MR * depth, 0.0);
            packed.par_chunks_exact_mut((MR * depth).max(1)).enumerate().for_each(|(block, packed)| {
                pack_left(view, block * MR..rows.min((block + 1) * MR), depth, packed);
            });
        }
        Self { view, rows, depth, packed }
    }

    /// The memory, to be used again.
    pub(crate) fn into_room(self) -> Vec<f32> {
        self.packed
    }

    /// `out = scale·self·right`, or that added to `out`, where `out` has `columns` columns and rows `stride` apart.
    ///
    /// # Safety
    /// `out` may be written for all its rows and columns, and nobody else touches these meanwhile.
    pub(crate) unsafe fn times(
        &self,
        right: View<'_>,
        columns: usize,
        (out, stride): (*mut f32, usize),
        (scale, add): (f32, bool),
        room: &mut Vec<f32>,
    ) {
        assert!(right.holds(self.depth, columns), "the right operand lies within its values");
        if self.packed.is_empty() || self.depth == 0 {
            // SAFETY: the operands lie within their values, and the caller answers for `out`.
            unsafe {
                gemm::gemm(
                    self.rows,
                    columns,
                    self.depth,
                    out,
                    1,
                    stride as isize,
                    add,
                    self.view.values.as_ptr(),
                    self.view.column as isize,
                    self.view.row as isize,
                    right.values.as_ptr(),
                    right.column as isize,
                    right.row as isize,
                    1.0,
                    scale,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
            return;
        }
        let length = self.depth * NR;
        if room.len() < length {
            room.resize(length, 0.0);
        }
        for first in (0..columns).step_by(NR) {
            let width = NR.min(columns - first);
            pack_right(right, first..first + width, &mut room[..length]);
            for depth in (0..self.depth).step_by(KC) {
                let deep = KC.min(self.depth - depth);
                for block in 0..self.rows.div_ceil(MR) {
                    let left = &self.packed[(block * self.depth + depth) * MR..][..deep * MR];
                    let mut sums = [[0f32; NR]; MR];
                    tile(left, &room[depth * NR..][..deep * NR], &mut sums);
                    let add = add || depth > 0;
                    for (i, sums) in sums.iter().enumerate().take(self.rows - block * MR) {
                        // SAFETY: a line of `out` that the caller gave, `width` columns of it.
                        let line = unsafe {
                            std::slice::from_raw_parts_mut(out.add((block * MR + i) * stride + first), width)
                        };
                        match add {
                            true => line.iter_mut().zip(sums).for_each(|(o, s)| *o += s * scale),
                            false => line.iter_mut().zip(sums).for_each(|(o, s)| *o = s * scale),
                        }
                    }
                }
            }
        }
    }
}

/// `depth` x 12 values of some rows; missing rows stay zero.
fn pack_left(view: View<'_>, rows: std::ops::Range<usize>, depth: usize, packed: &mut [f32]) {
    for (i, row) in rows.enumerate() {
        if view.column == 1 {
            let line = &view.values[row * view.row..][..depth];
            packed.as_chunks_mut::<MR>().0.iter_mut().zip(line).for_each(|(p, v)| p[i] = *v);
        } else {
            for (k, p) in packed.as_chunks_mut::<MR>().0.iter_mut().enumerate() {
                p[i] = view.values[row * view.row + k * view.column];
            }
        }
    }
}

/// As many steps of depth as there is room for, x 32 values of some columns; missing columns are zero.
fn pack_right(view: View<'_>, columns: std::ops::Range<usize>, packed: &mut [f32]) {
    let (first, width) = (columns.start, columns.len());
    let packed = packed.as_chunks_mut::<NR>().0;
    if view.column == 1 {
        for (k, p) in packed.iter_mut().enumerate() {
            p[..width].copy_from_slice(&view.values[k * view.row + first..][..width]);
            p[width..].fill(0.0);
        }
        return;
    }
    if width < NR {
        packed.iter_mut().for_each(|p| p[width..].fill(0.0));
    }
    // A few steps of depth for all columns: lines of the cache that are read and written stay in it.
    const STEP: usize = 16;
    for (at, packed) in packed.chunks_mut(STEP).enumerate() {
        for j in 0..width {
            let start = at * STEP * view.row + (first + j) * view.column;
            if view.row == 1 {
                let line = &view.values[start..][..packed.len()];
                packed.iter_mut().zip(line).for_each(|(p, v)| p[j] = *v);
            } else {
                packed.iter_mut().enumerate().for_each(|(k, p)| p[j] = view.values[start + k * view.row]);
            }
        }
    }
}

fn tile(left: &[f32], right: &[f32], sums: &mut [[f32; NR]; MR]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: operands are packed only where the instructions are there.
    unsafe {
        tile_avx512(left, right, sums);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("operands are packed only where the kernel is there: {} {} {}", left.len(), right.len(), sums.len());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn tile_avx512(left: &[f32], right: &[f32], sums: &mut [[f32; NR]; MR]) {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps};
    let mut tile = [[_mm512_setzero_ps(); 2]; MR];
    for (left, right) in left.as_chunks::<MR>().0.iter().zip(right.as_chunks::<NR>().0) {
        // SAFETY: 16 values from 0 and from 16 on, of 32.
        let (low, high) = unsafe { (_mm512_loadu_ps(right.as_ptr()), _mm512_loadu_ps(right.as_ptr().add(16))) };
        for (tile, left) in tile.iter_mut().zip(left) {
            let left = _mm512_set1_ps(*left);
            tile[0] = _mm512_fmadd_ps(left, low, tile[0]);
            tile[1] = _mm512_fmadd_ps(left, high, tile[1]);
        }
    }
    for (sums, tile) in sums.iter_mut().zip(tile) {
        // SAFETY: 16 values from 0 and from 16 on, of 32.
        unsafe {
            _mm512_storeu_ps(sums.as_mut_ptr(), tile[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(16), tile[1]);
        }
    }
}
