//! Stored weights as numbers.

use candle_core::{DType, Result, Tensor};

use super::launch::{File, Launch, Number, int, long, ready, suffix};
use crate::weights::Encoding;

const THREADS: u32 = 256;

/// Values of whole rows.
///
/// - `bytes`: of these rows, as their file has them
/// - `scales`: one, or one for each of these rows; not looked at for encodings that have their factors among the bytes
/// - returns: `(rows, columns)`
pub(crate) fn decode(
    encoding: Encoding,
    bytes: &Tensor,
    scales: &Tensor,
    [rows, columns]: [usize; 2],
    dtype: DType,
) -> Result<Tensor> {
    let (bytes, scales, suffix) = (ready(bytes)?, ready(scales)?, suffix(dtype)?);
    if encoding.bytes(rows * columns) != Some(bytes.elem_count()) || ![1, rows].contains(&scales.elem_count()) {
        candle_core::bail!(
            "{} bytes and {} scales for {rows} x {columns} values in {}",
            bytes.elem_count(),
            scales.elem_count(),
            encoding.name()
        );
    }
    let kernel = format!("decode_{}_{suffix}", encoding.name());
    let by_row = Number::Int(i32::from(scales.elem_count() == rows && rows != 1));
    let launch = match encoding {
        Encoding::F8E4M3 | Encoding::I8 => Launch {
            file: File::Decode,
            kernel,
            inputs: &[Some(&bytes), Some(&scales)],
            numbers: &[int(columns)?, by_row],
            grid: [rows, 1, 1],
            threads: THREADS,
            shared: 0,
        },
        Encoding::Q8_0 | Encoding::Q6K | Encoding::Q5K | Encoding::Q4K | Encoding::Q4_0 => Launch {
            file: File::Decode,
            kernel,
            inputs: &[Some(&bytes)],
            numbers: &[long(rows * columns)],
            grid: [(rows * columns).div_ceil(THREADS as usize), 1, 1],
            threads: THREADS,
            shared: 0,
        },
        Encoding::F32 | Encoding::F16 | Encoding::Bf16 | Encoding::Other(_) => {
            candle_core::bail!("values in {} are no packed ones", encoding.name())
        }
    };
    launch.run(&[rows, columns], dtype)
}
