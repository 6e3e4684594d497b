//! Matrix products in f32: a kernel of our own for AVX-512, the `gemm` crate elsewhere.
//!
//! The crate's kernels stop at AVX2. Ours holds a tile of 12 x 32 sums in registers and reads both operands from
//! packed copies, so that it goes through memory in order.

/// Rows and columns of one tile of sums.
const MR: usize = 12;
const NR: usize = 32;

/// Depth that is multiplied before the sums go to memory: the left tile's part (f32: 18 KiB) then stays in a core's
/// first cache.
const KC: usize = 384;

/// Depth up to which it is the right tile's part that stays in the first cache (f32: 16 KiB) while the left ones pass by.
const SHALLOW: usize = 128;

/// Steps of depth that operands are asked for ahead of their turn. The right one comes from the second cache, as all its
/// tiles of a part pass by for each left tile; without asking, the sums wait a quarter of the time.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 24;

/// Columns of the right operand that one call should be given: as many as make a part of it (f32: 384 KiB) stay in a
/// core's second cache, so that the left operand is read seldom.
pub(crate) const COLUMNS: usize = 256;

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

    /// What is left below row `first`.
    fn below(&self, first: usize) -> Self {
        Self { values: self.values.get(first * self.row..).unwrap_or_default(), ..*self }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    View(View<'a>),
    /// Writes a row of the operand, of as many columns as the line has. Rows are asked for in order, once.
    Lines(&'a dyn Fn(usize, &mut [f32])),
}

impl<'a> From<View<'a>> for Right<'a> {
    fn from(view: View<'a>) -> Self {
        Self::View(view)
    }
}

/// The left operand of products, laid out for the kernel.
pub(crate) struct Left<'a> {
    view: View<'a>,
    rows: usize,
    depth: usize,
    /// Blocks of 12 rows, each `depth` x 12; empty where the operand is read in place, or the kernel is not to be had.
    packed: Vec<f32>,
    /// Whether the kernel reads the values where they are.
    in_place: bool,
}

/// Twelve rows of the left operand: element `(i, k)` is at `i·row + k·step`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    row: usize,
    step: usize,
}

/// Whether products have a kernel of our own here, which wants its operands laid out anew.
#[must_use]
pub fn has_kernel() -> bool {
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
    pub(crate) fn new(view: View<'a>, rows: usize, depth: usize, room: Vec<f32>) -> Self {
        Self::laid_out(view, rows, depth, room, has_kernel())
    }

    /// For our kernel or, without a layout of its own, for the crate's.
    fn laid_out(view: View<'a>, rows: usize, depth: usize, mut room: Vec<f32>, kernel: bool) -> Self {
        assert!(view.holds(rows, depth), "the left operand lies within its values");
        // What is left of an earlier operand is written over.
        room.resize(if kernel { rows.div_ceil(MR) * MR * depth } else { 0 }, 0.0);
        for (block, packed) in room.chunks_exact_mut((MR * depth).max(1)).enumerate() {
            pack_left(view, block * MR..rows.min((block + 1) * MR), depth, packed);
        }
        Self { view, rows, depth, packed: room, in_place: false }
    }

    /// So many rows as whole tiles have.
    pub(crate) fn whole_tiles(rows: usize) -> usize {
        rows.next_multiple_of(MR)
    }

    /// An operand that is read where it is, as one is better that is used once. It lies in rows, as many
    /// as [`whole_tiles`](Self::whole_tiles) have: what follows the last one may be anything.
    pub(crate) fn in_place(view: View<'a>, rows: usize, depth: usize) -> Self {
        assert!(view.column == 1 && view.holds(Self::whole_tiles(rows), depth), "whole tiles of the left operand");
        Self { view, rows, depth, packed: Vec::new(), in_place: has_kernel() }
    }

    /// As [`new`](Self::new), on all threads.
    pub(crate) fn new_threaded(view: View<'a>, rows: usize, depth: usize) -> Self {
        use rayon::prelude::*;
        assert!(view.holds(rows, depth), "the left operand lies within its values");
        let mut packed = vec![0f32; if has_kernel() { rows.div_ceil(MR) * MR * depth } else { 0 }];
        packed.par_chunks_exact_mut((MR * depth).max(1)).enumerate().for_each(|(block, packed)| {
            pack_left(view, block * MR..rows.min((block + 1) * MR), depth, packed);
        });
        Self { view, rows, depth, packed, in_place: false }
    }

    /// The memory, to be used again.
    pub(crate) fn into_room(self) -> Vec<f32> {
        self.packed
    }

    /// `out = scale·self·right`, or that added to `out`, where `out` has `columns` columns and rows `stride` apart.
    ///
    /// # Safety
    /// `out` may be written for all its rows and columns, and nobody else touches these meanwhile.
    pub(crate) unsafe fn times<'r>(
        &self,
        right: impl Into<Right<'r>>,
        columns: usize,
        (out, stride): (*mut f32, usize),
        (scale, add): (f32, bool),
        room: &mut Vec<f32>,
    ) {
        let right = right.into();
        if let Right::View(view) = right {
            assert!(view.holds(self.depth, columns), "the right operand lies within its values");
        }
        if (self.packed.is_empty() && !self.in_place) || self.depth == 0 {
            let view = match right {
                Right::View(view) => view,
                Right::Lines(write) => {
                    room.resize(self.depth * columns, 0.0);
                    room.chunks_exact_mut(columns.max(1)).enumerate().for_each(|(row, line)| write(row, line));
                    View::rows(room, columns)
                }
            };
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
                    view.values.as_ptr(),
                    view.column as isize,
                    view.row as isize,
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
        let groups = columns.div_ceil(NR);
        let length = groups * NR * KC.min(self.depth);
        // Past the packed part, a line of the operand before it is packed.
        room.resize(room.len().max(length + columns), 0.0);
        let (room, line) = room.split_at_mut(length);
        let line = &mut line[..columns];
        for first in (0..self.depth).step_by(KC) {
            let deep = KC.min(self.depth - first);
            match right {
                Right::View(view) => {
                    for (group, packed) in room.chunks_exact_mut(deep * NR).enumerate().take(groups) {
                        let range = group * NR..columns.min((group + 1) * NR);
                        pack_right(view.below(first), range, packed);
                    }
                }
                Right::Lines(write) => {
                    for k in 0..deep {
                        write(first + k, line);
                        for (group, part) in line.chunks(NR).enumerate() {
                            let to = &mut room[(group * deep + k) * NR..][..NR];
                            to[..part.len()].copy_from_slice(part);
                            to[part.len()..].fill(0.0);
                        }
                    }
                }
            }
            let multiply = |block: usize, group: usize| {
                let left = self.tile_rows(block, first, deep);
                let right = &room[group * deep * NR..][..deep * NR];
                let (rows, width) = (MR.min(self.rows - block * MR), NR.min(columns - group * NR));
                // SAFETY: `rows` lines of `out` that the caller gave, `width` columns of each.
                unsafe {
                    let out = out.add(block * MR * stride + group * NR);
                    tile(left, right, (out, stride), [rows, width], (scale, add || first > 0));
                }
            };
            let blocks = self.rows.div_ceil(MR);
            if deep <= SHALLOW {
                (0..groups).for_each(|group| (0..blocks).for_each(|block| multiply(block, group)));
            } else {
                (0..blocks).for_each(|block| (0..groups).for_each(|group| multiply(block, group)));
            }
        }
    }

    /// A block's rows, `deep` steps from `first` on.
    fn tile_rows(&self, block: usize, first: usize, deep: usize) -> Rows<'_> {
        if self.in_place {
            let values = &self.view.values[block * MR * self.view.row + first..][..(MR - 1) * self.view.row + deep];
            Rows { values, row: self.view.row, step: 1 }
        } else {
            let values = &self.packed[(block * self.depth + first) * MR..][..deep * MR];
            Rows { values, row: 1, step: MR }
        }
    }
}

/// `depth` x 12 values of some rows; missing rows are zero.
fn pack_left(view: View<'_>, rows: std::ops::Range<usize>, depth: usize, packed: &mut [f32]) {
    let first = view.below(rows.start);
    if view.column == 1 {
        interleave::<MR>(first.values, view.row, rows.len(), packed);
        return;
    }
    for (k, p) in packed.as_chunks_mut::<MR>().0.iter_mut().enumerate().take(depth) {
        for (i, p) in p.iter_mut().enumerate() {
            *p = if i < rows.len() { first.values[i * view.row + k * view.column] } else { 0.0 };
        }
    }
}

/// As many steps of depth as there is room for, x 32 values of some columns; missing columns are zero.
fn pack_right(view: View<'_>, columns: std::ops::Range<usize>, packed: &mut [f32]) {
    let (first, width) = (columns.start, columns.len());
    if view.row == 1 {
        interleave::<NR>(&view.values[first * view.column..], view.column, width, packed);
        return;
    }
    for (k, p) in packed.as_chunks_mut::<NR>().0.iter_mut().enumerate() {
        let line = &view.values[k * view.row..];
        if view.column == 1 {
            p[..width].copy_from_slice(&line[first..][..width]);
        } else {
            p[..width].iter_mut().enumerate().for_each(|(j, p)| *p = line[(first + j) * view.column]);
        }
        p[width..].fill(0.0);
    }
}

/// Puts element `k` of each of `count` lines, which begin `stride` apart, beside each other, `W` wide: line `j` goes to
/// `packed[k * W + j]`. Missing lines are zero. As many elements as there is room for.
fn interleave<const W: usize>(lines: &[f32], stride: usize, count: usize, packed: &mut [f32]) {
    let depth = packed.len() / W;
    assert!(count <= W && (count == 0 || (count - 1) * stride + depth <= lines.len()), "lines of the operand");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: operands are packed only where the instructions are there; the lines and the room were measured.
    unsafe {
        interleave_avx512::<W>(lines, stride, count, packed);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("operands are packed only where the kernel is there");
}

/// 16 x 16 values at a time, turned in registers.
///
/// # Safety
/// `count` is at most `W`, and `packed.len() / W` values from each line's begin lie within `lines`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn interleave_avx512<const W: usize>(lines: &[f32], stride: usize, count: usize, packed: &mut [f32]) {
    use std::arch::x86_64::{_mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps};
    const SIDE: usize = 16;
    let depth = packed.len() / W;
    for at in (0..W).step_by(SIDE) {
        let wide = low_bits(W - at);
        for k in (0..depth).step_by(SIDE) {
            let deep = SIDE.min(depth - k);
            let mut square = [_mm512_setzero_ps(); SIDE];
            for (j, row) in square.iter_mut().enumerate().take(count.saturating_sub(at)) {
                // SAFETY: `deep` values of a line; those that the mask hides are not read.
                *row = unsafe { _mm512_maskz_loadu_ps(low_bits(deep), lines.as_ptr().add((at + j) * stride + k)) };
            }
            for (i, row) in turn(square).into_iter().enumerate().take(deep) {
                // SAFETY: columns `at ..` of step `k + i` of the room; those that the mask hides are not written.
                unsafe { _mm512_mask_storeu_ps(packed.as_mut_ptr().add((k + i) * W + at), wide, row) };
            }
        }
    }
}

/// A mask of the first `count` of 16 lanes.
#[cfg(target_arch = "x86_64")]
fn low_bits(count: usize) -> u16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// The transpose of 16 x 16 values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn turn(rows: [std::arch::x86_64::__m512; 16]) -> [std::arch::x86_64::__m512; 16] {
    use std::arch::x86_64::{
        _mm512_castpd_ps, _mm512_castps_pd, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
        _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };
    // Pairs of rows, then fours: each register holds four columns' part of four rows, in its four quarters.
    let mut fours = [_mm512_setzero_ps(); 16];
    for (rows, fours) in rows.as_chunks::<4>().0.iter().zip(fours.as_chunks_mut::<4>().0) {
        let low =
            [_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpacklo_ps(rows[2], rows[3])].map(|v| _mm512_castps_pd(v));
        let high =
            [_mm512_unpackhi_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[2], rows[3])].map(|v| _mm512_castps_pd(v));
        fours[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
        fours[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
        fours[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
        fours[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
    }
    // Quarters of the same columns come together.
    let mut out = [_mm512_setzero_ps(); 16];
    for i in 0..4 {
        let (a, b, c, d) = (fours[i], fours[4 + i], fours[8 + i], fours[12 + i]);
        let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
        out[i] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
        out[4 + i] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
        out[8 + i] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
        out[12 + i] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
    }
    out
}

/// One tile of sums, times `scale`, to `out` or added to it: the first `rows` lines, `stride` apart, and `width` columns.
///
/// # Safety
/// These parts of `out` may be written.
unsafe fn tile(
    left: Rows<'_>,
    right: &[f32],
    out: (*mut f32, usize),
    [rows, width]: [usize; 2],
    (scale, add): (f32, bool),
) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: operands are packed only where the instructions are there; the caller answers for `out`.
    unsafe {
        match left.step {
            1 => tile_avx512::<false>(left, right, out, [rows, width], (scale, add)),
            _ => tile_avx512::<true>(left, right, out, [rows, width], (scale, add)),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!(
        "operands are packed only where the kernel is there: {} {right:?} {out:?} {rows} {width} {scale} {add}",
        left.row + left.step + left.values.len()
    );
}

/// `PACKED` where the rows' values of one step stand beside each other, else those of one row do.
///
/// # Safety
/// As [`tile`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const PACKED: bool>(
    left: Rows<'_>,
    right: &[f32],
    (out, stride): (*mut f32, usize),
    [rows, width]: [usize; 2],
    (scale, add): (f32, bool),
) {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
        _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
    };
    let mut tile = [[_mm512_setzero_ps(); 2]; MR];
    for i in 0..rows {
        // A line of 32 sums lies on two or three of the cache's.
        _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * stride).cast());
        _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(i * stride + 16).cast());
    }
    let steps = right.len() / NR;
    let needed = if PACKED { steps * MR } else { (MR - 1) * left.row + steps };
    assert!(left.values.len() >= needed, "a step of the left operand for each of the right one");
    // Three rows from each: more pointers than these do not stay in registers.
    let mut quarters = [0, 3, 6, 9].map(|i| left.values.as_ptr().wrapping_add(i * if PACKED { 1 } else { left.row }));
    for right in right.as_chunks::<NR>().0 {
        _mm_prefetch::<_MM_HINT_T0>(right.as_ptr().wrapping_add(AHEAD * NR).cast());
        _mm_prefetch::<_MM_HINT_T0>(right.as_ptr().wrapping_add(AHEAD * NR + 16).cast());
        if PACKED {
            _mm_prefetch::<_MM_HINT_T0>(quarters[0].wrapping_add(AHEAD * MR).cast());
        }
        // SAFETY: 16 values from 0 and from 16 on, of 32.
        let (low, high) = unsafe { (_mm512_loadu_ps(right.as_ptr()), _mm512_loadu_ps(right.as_ptr().add(16))) };
        for (quarter, three) in quarters.iter().zip(tile.as_chunks_mut::<3>().0) {
            let next = if PACKED { 1 } else { left.row };
            // SAFETY: the values of these rows and steps were measured above.
            let values = unsafe { [*quarter.add(0), *quarter.add(next), *quarter.add(2 * next)] };
            for (tile, value) in three.iter_mut().zip(values) {
                let value = _mm512_set1_ps(value);
                tile[0] = _mm512_fmadd_ps(value, low, tile[0]);
                tile[1] = _mm512_fmadd_ps(value, high, tile[1]);
            }
        }
        quarters = quarters.map(|quarter| quarter.wrapping_add(if PACKED { MR } else { 1 }));
    }
    let scale = _mm512_set1_ps(scale);
    let masks = [low_bits(width), low_bits(width.saturating_sub(16))];
    for (i, tile) in tile.into_iter().enumerate().take(rows) {
        for ((half, sums), mask) in tile.into_iter().enumerate().zip(masks) {
            // SAFETY: a line that the caller gave; columns that the mask hides are neither read nor written.
            unsafe {
                let to = out.wrapping_add(i * stride + half * 16);
                let sums = match add {
                    true => _mm512_fmadd_ps(sums, scale, _mm512_maskz_loadu_ps(mask, to)),
                    false => _mm512_mul_ps(sums, scale),
                };
                _mm512_mask_storeu_ps(to, mask, sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use proptest::prelude::*;

    use super::*;
    use crate::golden::noise;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        noise(&[count], seed).to_vec1().unwrap()
    }

    /// The product as it is defined, in f64, and the sum of its terms' sizes.
    fn clear(left: View<'_>, right: View<'_>, [rows, depth, columns]: [usize; 3]) -> Vec<(f64, f64)> {
        let at = |v: View<'_>, i: usize, j: usize| f64::from(v.values[i * v.row + j * v.column]);
        (0..rows * columns)
            .map(|n| {
                let terms = (0..depth).map(|k| at(left, n / columns, k) * at(right, k, n % columns));
                terms.fold((0.0, 0.0), |(sum, sizes), term| (sum + term, sizes + term.abs()))
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// However the operands lie, by our kernel (where it can run) and by the crate's.
        #[test]
        fn a_product_is_what_it_is_defined_as(
            rows in 1usize..40, depth in 1usize..900, columns in 1usize..100, turned in prop::array::uniform2(any::<bool>()),
            lines: bool, kernel: bool, in_place: bool, add: bool, scale in 0.1f32..2.0, used in 0usize..2000, seed: u64,
        ) {
            let in_place = in_place && !turned[0];
            // What follows the rows of an operand that is read in place may be anything.
            let behind = if in_place { rows.next_multiple_of(MR) - rows } else { 0 };
            let (mut a, b) = (values(rows * depth, seed), values(depth * columns, !seed));
            a.resize((rows + behind) * depth, f32::NAN);
            let left = if turned[0] { View::columns(&a, rows) } else { View::rows(&a, depth) };
            let right = if turned[1] { View::columns(&b, depth) } else { View::rows(&b, columns) };
            let before = values(rows * columns, seed / 2);
            let mut out = before.clone();
            // What an earlier operand left behind is no part of the product.
            let packed = match in_place {
                true => Left::in_place(left, rows, depth),
                false => Left::laid_out(left, rows, depth, values(used, seed / 3), kernel && has_kernel()),
            };
            let write = |k: usize, line: &mut [f32]| {
                line.iter_mut().enumerate().for_each(|(j, v)| *v = right.values[k * right.row + j * right.column]);
            };
            let given = if lines { Right::Lines(&write) } else { Right::View(right) };
            // SAFETY: `out` has `rows` lines of `columns` values.
            unsafe { packed.times(given, columns, (out.as_mut_ptr(), columns), (scale, add), &mut Vec::new()) };
            for ((got, (sum, sizes)), before) in out.iter().zip(clear(left, right, [rows, depth, columns])).zip(before) {
                let wanted = sum * f64::from(scale) + if add { f64::from(before) } else { 0.0 };
                // Roundings of both signs: they grow as the square root of their number.
                let near = f64::from(f32::EPSILON) * (depth as f64).sqrt() * (1.0 + sizes * f64::from(scale));
                prop_assert!((f64::from(*got) - wanted).abs() < near, "{got} for {wanted}");
            }
        }
    }

    /// What stands beside the sums in memory is another task's.
    #[test]
    fn nothing_beside_the_sums_is_written() {
        let (a, b) = (values(13 * 5, 1), values(5 * 33, 2));
        for kernel in [false, has_kernel()] {
            let mut out = vec![7f32; 13 * 40];
            let packed = Left::laid_out(View::rows(&a, 5), 13, 5, Vec::new(), kernel);
            // SAFETY: 13 lines, 40 apart, of which 33 columns from the fourth on are written.
            unsafe {
                packed.times(View::rows(&b, 33), 33, (out.as_mut_ptr().add(4), 40), (1.0, false), &mut Vec::new())
            };
            let untouched = Tensor::from_vec(out, (13, 40), &candle_core::Device::Cpu).unwrap();
            for (first, count) in [(0, 4), (37, 3)] {
                let beside = untouched.narrow(1, first, count).unwrap().flatten_all().unwrap();
                assert!(beside.to_vec1::<f32>().unwrap().iter().all(|v| *v == 7.0));
            }
        }
    }
}
