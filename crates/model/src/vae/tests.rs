//! What holds beyond the reference cases.

use candle_core::{DType, Device, Tensor};

use super::*;
pub(super) use crate::golden::{noise, worst};
use crate::{Error, golden::Golden};

fn config(case: &Golden) -> VaeConfig {
    serde_json::from_value(case.config.clone()).unwrap()
}

fn networks(name: &str) -> (VaeEncoder, VaeDecoder) {
    let case = Golden::open(name);
    let (weights, config) = (case.weights(), config(&case));
    (VaeEncoder::load(&weights, &config).unwrap(), VaeDecoder::load(&weights, &config).unwrap())
}

#[test]
fn tiled_equals_untiled_where_one_tile_covers_the_input() {
    let (encoder, decoder) = networks("vae_tiled");
    let (x, z) = (noise(&[1, 3, 13, 32, 24], 1), noise(&[1, 4, 4, 4, 3], 2));
    assert_eq!(worst(&encoder.encode_tiled(&x).unwrap().mean, &encoder.encode(&x).unwrap().mean), 0.0);
    assert_eq!(worst(&decoder.decode_tiled(&z).unwrap(), &decoder.decode(&z).unwrap()), 0.0);
}

/// f32: only the order of additions differs.
#[test]
fn one_frame_encodes_as_every_frame_of_the_still_clip() {
    for name in ["vae_causal_attn", "vae_plain_attn"] {
        let (encoder, _) = networks(name);
        let picture = noise(&[1, 3, 1, 40, 56], 3);
        let one = encoder.encode_tiled(&picture).unwrap();
        let clip = encoder.encode_tiled(&picture.repeat((1, 1, 33, 1, 1)).unwrap()).unwrap();
        for frame in 0..clip.mean.dim(2).unwrap() {
            let difference = worst(&clip.mean.narrow(2, frame, 1).unwrap(), &one.mean);
            assert!(difference < 2e-5, "{name}: frame {frame} differs by {difference}");
        }
    }
}

#[test]
fn every_length_decodes_to_its_number_of_frames() {
    let (_, decoder) = networks("vae_tiled");
    for t in 1..=11 {
        let (mut frames, mut runs) = (0, Vec::new());
        let z = noise(&[1, 4, t, 2, 5], 4);
        decoder
            .decode_tiled_each(&z, &mut |run| {
                frames += run.dim(2)?;
                runs.push(run);
                Ok(())
            })
            .unwrap();
        assert_eq!(frames, 4 * t - 3);
        assert_eq!(worst(&Tensor::cat(&runs, 2).unwrap(), &decoder.decode_tiled(&z).unwrap()), 0.0);
    }
}

#[test]
fn smaller_tiles_give_every_frame_in_its_place() {
    let case = Golden::open("vae_tiled");
    let (_, decoder) = networks("vae_tiled");
    let config = VaeConfig { tile_latent: Some(8), tile_latent_t: Some(8), ..config(&case) };
    let z = noise(&[1, 4, 6, 5, 9], 6);
    let whole = decoder.with_smaller_tiles(&config, 1).decode_tiled(&z).unwrap();
    for divisor in [2, 8] {
        let cut = decoder.with_smaller_tiles(&config, divisor).decode_tiled(&z).unwrap();
        assert_eq!(cut.dims(), whole.dims());
        let difference = worst(&cut, &whole);
        assert!(difference > 0.0 && difference.is_finite(), "{divisor}: differs by {difference}");
        let small = noise(&[1, 4, 4, 4, 3], 7);
        let (one, same) = (decoder.decode(&small), decoder.with_smaller_tiles(&config, divisor).decode_tiled(&small));
        assert_eq!(worst(&one.unwrap(), &same.unwrap()), 0.0, "what fits into one tile of {divisor} stays the same");
    }
}

#[test]
fn a_decoder_stops_with_an_error_wherever_its_memory_ends() {
    let (_, decoder) = networks("vae_causal_attn");
    let z = noise(&[1, 4, 2, 3, 2], 5);
    let asked = std::rc::Rc::new(std::cell::Cell::new(0));
    let run = |allowed: usize| {
        let count = asked.clone();
        count.set(0);
        let allows = move |bytes: u64| {
            count.set(count.get() + 1);
            bytes > 0 && count.get() <= allowed
        };
        crate::memory::watched(allows, || decoder.decode(&z))
    };
    run(usize::MAX).unwrap();
    let layers = asked.get();
    assert!(layers > 10, "{layers} questions");
    for allowed in 0..layers {
        assert!(matches!(run(allowed), Err(Error::Compute(_))), "{allowed} of {layers}");
    }
}

#[test]
fn a_batch_is_decoded_item_by_item() {
    let (_, decoder) = networks("vae_causal_attn");
    let z = noise(&[2, 4, 2, 3, 2], 5);
    let both = decoder.decode(&z).unwrap();
    for b in 0..2 {
        let one = decoder.decode(&z.narrow(0, b, 1).unwrap()).unwrap();
        let difference = worst(&both.narrow(0, b, 1).unwrap(), &one);
        assert!(difference < 2e-5, "item {b} differs by {difference}");
    }
}

fn stage(models: &std::path::Path) -> VaeStage {
    let folder = models.join("vae-decode");
    std::fs::create_dir(&folder).unwrap();
    let case = Golden::open("vae_causal_attn");
    std::fs::copy(case.weights_file(), folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), serde_json::to_vec(&config(&case)).unwrap()).unwrap();
    VaeStage::open(models, &crate::checkpoint::Setup::default()).unwrap()
}

#[test]
fn the_stage_gives_frames_of_bytes_up_to_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let stage = stage(folder.path());
    let latents = noise(&[4, 7, 2, 3], 6);
    let collect = |limit| {
        let (mut total, mut bytes) = (0, Vec::new());
        stage
            .decode_frames(&latents, limit, &mut |n, run: Vec<u8>| {
                assert_eq!(run.len(), n * 16 * 24 * 3);
                total += n;
                bytes.extend(run);
                Ok(())
            })
            .unwrap();
        (total, bytes)
    };
    let (all, bytes) = collect(None);
    assert_eq!(all, 25);
    let (some, start) = collect(Some(22));
    assert_eq!(some, 22);
    assert_eq!(start, bytes[..start.len()]);
    let z = (latents.unsqueeze(0).unwrap() / stage.config.scaling_factor).unwrap();
    let pixels = stage.decoder.decode_tiled(&z).unwrap().squeeze(0).unwrap().permute((1, 2, 3, 0)).unwrap();
    let values = pixels.contiguous().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let wanted: Vec<u8> = values.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8).collect();
    assert_eq!(bytes, wanted);
}

#[test]
fn the_stage_refuses_latents_of_another_shape_or_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    let stage = stage(folder.path());
    let mut emit = |_, _: Vec<u8>| Ok(());
    for dims in [vec![5, 1, 2, 2], vec![4, 1, 2], vec![4, 0, 2, 2]] {
        let latents = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let error = stage.decode_frames(&latents, None, &mut emit).unwrap_err();
        assert!(matches!(error, Error::Input { field: "latents", .. }), "{error}");
    }
    let latents = Tensor::full(f32::NAN, (4, 1, 2, 2), &Device::Cpu).unwrap();
    let error = stage.decode_frames(&latents, None, &mut emit).unwrap_err();
    assert!(error.to_string().contains("finite"), "{error}");
}

#[test]
fn a_config_that_no_network_can_have_is_refused() {
    let good = config(&Golden::open("vae_causal_attn"));
    good.validate().unwrap();
    for bad in [
        VaeConfig { block_out_channels: vec![], ..good.clone() },
        VaeConfig { norm_num_groups: 0, ..good.clone() },
        VaeConfig { time_compression_ratio: 3, ..good.clone() },
        VaeConfig { spatial_compression_ratio: 32, ..good.clone() },
        VaeConfig { tile_latent: Some(1), ..good.clone() },
        VaeConfig { scaling_factor: 0.0, ..good.clone() },
    ] {
        assert!(matches!(bad.validate(), Err(Error::Input { .. })), "{bad:?}");
    }
}
