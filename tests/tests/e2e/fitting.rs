//! Ways to fit: each takes less memory, as the process's allocator counts it, and changes nothing of the result.

use std::fs;

use candle_core::{DType, Device, Tensor};
use model::{
    ops::{Activation, attention, linear, linear_clear},
    vae::VaeStage,
    weights::{Encoding, Matrix, Weights, ggml, gguf},
};
use service_kit::memory::{current_bytes, peak_bytes, reset_peak};

use crate::stack::tiny_models;

/// What `work` gives, and the most bytes that it held on top of what was there.
fn measured<R>(work: impl FnOnce() -> R) -> (R, u64) {
    let before = current_bytes();
    reset_peak();
    let result = work();
    (result, peak_bytes() - before)
}

fn noise(shape: &[usize], seed: f32) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.61 + seed).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn off(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a.to_dtype(DType::F32).unwrap() - b.to_dtype(DType::F32).unwrap()).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Scores as a whole would be 64 MiB a head here.
#[test]
fn attention_never_holds_tokens_times_tokens_and_gives_what_all_scores_give() {
    const LENGTH: usize = 4096;
    let [q, k, v] = [0.1, 0.2, 0.3].map(|seed| noise(&[1, 1, LENGTH, 32], seed));
    let plainly = || {
        let scores = (q.matmul(&k.transpose(2, 3).unwrap().contiguous().unwrap()).unwrap() * 0.2).unwrap();
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(3).unwrap()).unwrap().exp().unwrap();
        let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(3).unwrap()).unwrap();
        weights.matmul(&v).unwrap()
    };
    let streamed = || attention(&q, &k, &v, 0.2, None).unwrap();
    drop(streamed());
    let (whole, most) = measured(plainly);
    let (tiles, few) = measured(streamed);
    assert!(off(&whole, &tiles) < 1e-5, "{}", off(&whole, &tiles));
    let scores = (LENGTH * LENGTH * 4) as u64;
    assert!(most >= scores && few < scores / 8, "{few} bytes in tiles, {most} at once");
}

/// A weight of 8192 x 2048 values, in GGUF's blocks of 8 and of 4 bits: some rows at a time are widened.
#[test]
fn weights_of_8_and_4_bits_are_widened_block_by_block_and_give_what_the_whole_gives() {
    const ROWS: usize = 8192;
    const COLUMNS: usize = 2048;
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..ROWS * COLUMNS).map(|i| ((i * 7919 % 10007) as f32 - 5000.0) / 50000.0).collect();
    let x = noise(&[3, COLUMNS], 0.4);
    for encoding in [Encoding::Q8_0, Encoding::Q4K] {
        let place = folder.path().join(encoding.name());
        fs::create_dir(&place).unwrap();
        let mut bytes = Vec::new();
        ggml::quantise(encoding, &values, &mut bytes);
        let metadata = [("general.architecture", "test")];
        let tensors = [("w".to_owned(), vec![ROWS, COLUMNS], encoding)];
        let mut writer = gguf::Writer::create(&place.join("w.gguf"), &metadata, &tensors).unwrap();
        writer.append(&bytes).unwrap();
        writer.finish().unwrap();
        let weight = Weights::open(&place, DType::F32, &Device::Cpu).unwrap().matrix(ROWS, COLUMNS, "w").unwrap();
        let blocks = |weight: &Matrix| linear(&[&x], weight, None, Activation::None, None).unwrap();
        drop(blocks(&weight));
        let (result, few) = measured(|| blocks(&weight));
        let (same, most) = measured(|| linear_clear(&[&x], &weight, None, Activation::None, None).unwrap());
        let whole = (ROWS * COLUMNS * 4) as u64;
        let reach = same.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        let difference = off(&result, &same) / reach;
        assert!(difference < 1e-5, "{}: differs by {difference}", encoding.name());
        assert!(most >= whole && few < whole / 8, "{}: {few} bytes by blocks, {most} at once", encoding.name());
    }
}

/// Frames leave while later ones are still latents.
#[test]
fn a_video_that_is_decoded_in_parts_of_its_time_holds_one_of_them_and_has_the_same_frames() {
    let stage = VaeStage::open(&tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let z = noise(&[1, stage.config.latent_channels, 41, 8, 8], 0.5);
    let decoder = &stage.decoder;
    let parts = || {
        let (mut frames, mut sum) = (0, 0f64);
        decoder
            .decode_tiled_each(&z, &mut |run| {
                frames += run.dim(2)?;
                sum += run.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                Ok(())
            })
            .unwrap();
        (frames, sum)
    };
    parts();
    let ((frames, _), few) = measured(parts);
    let (whole, most) = measured(|| decoder.decode_tiled(&z).unwrap());
    assert_eq!((frames, whole.dim(2).unwrap()), (161, 161));
    let mut at = 0;
    decoder
        .decode_tiled_each(&z, &mut |run| {
            let count = run.dim(2)?;
            assert_eq!(off(&run, &whole.narrow(2, at, count)?), 0.0, "from frame {at} on");
            at += count;
            Ok(())
        })
        .unwrap();
    assert!(few < most, "{few} bytes in parts, {most} at once");
}

/// What fits into one smaller tile is the same; what does not is told of, as each tile is normalised for itself.
#[test]
fn smaller_tiles_take_less_and_leave_what_fits_into_one_as_it_is() {
    let stage = VaeStage::open(&tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let channels = stage.config.latent_channels;
    let side = stage.config.tile_latent_side();
    let smaller = stage.decoder.with_smaller_tiles(&stage.config, 2);
    let large = noise(&[1, channels, 1, side, side], 0.6);
    drop(stage.decoder.decode_tiled(&large).unwrap());
    let (whole, most) = measured(|| stage.decoder.decode_tiled(&large).unwrap());
    let (cut, few) = measured(|| smaller.decode_tiled(&large).unwrap());
    assert_eq!(cut.dims(), whole.dims());
    assert!(few < most, "{few} bytes in smaller tiles, {most} in one");
    let small = noise(&[1, channels, 2, side / 2, side / 2], 0.7);
    assert_eq!(off(&stage.decoder.decode_tiled(&small).unwrap(), &smaller.decode_tiled(&small).unwrap()), 0.0);
}
