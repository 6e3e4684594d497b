#![allow(missing_docs)]
pub fn dequantise(b: &[u8], s: f32, o: &mut [f32]) {
    o.iter_mut().zip(b).for_each(|(o, b)| *o = (*b as i8) as f32 * s)
}
