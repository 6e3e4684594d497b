//! The transformer's blocks over several devices, by real processes: the same bits, and every device kept to its budget.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use gateway::{Stages, fault::Kind};
use model::{
    blueprint::{TransformerSizes, transformer_table},
    checkpoint::Choice,
    synth::values_of,
};
use proto::v1::{DescribeRequest, stage_service_client::StageServiceClient};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{
    inputs::{portrait, tone},
    memory::{channel, memory, start, try_velocities},
    stack::{avatar, own_models, text, tiny_models, video_stream},
};

const MIB: u64 = 1 << 20;
const HIDDEN: usize = 768;

/// The tiny checkpoint with a transformer whose blocks are most of it: six blocks of some 160 MiB.
fn wide_models() -> TempDir {
    let models = own_models();
    let (tiny, _) = transformer_table(models.path(), Choice::Auto).unwrap();
    let of_tiny = |value: u64| value as usize;
    let sizes = TransformerSizes {
        hidden: HIDDEN,
        head: of_tiny(tiny.head),
        inner: 4 * HIDDEN,
        double: 2,
        single: 4,
        refiner: 1,
        refiner_inner: HIDDEN,
        latent: of_tiny(tiny.latent),
        text: of_tiny(tiny.text),
        pooled: of_tiny(tiny.pooled),
        sinusoids: 256,
        audio: of_tiny(tiny.audio),
        audio_inner: of_tiny(tiny.audio_inner),
        audio_tokens: of_tiny(tiny.audio_tokens),
        adapters: 1,
        adapter: of_tiny(tiny.adapter),
    };
    let folder = models.path().join("diffusion");
    let written = |spec: model::blueprint::Spec| {
        let values = Tensor::from_vec(values_of(&spec, 3), spec.shape.as_slice(), &Device::Cpu).unwrap();
        (spec.name, values.to_dtype(DType::BF16).unwrap())
    };
    let tensors: HashMap<String, Tensor> = sizes.tensors().into_iter().map(written).collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hidden_size"] = json!(HIDDEN);
    config["num_heads"] = json!(HIDDEN / sizes.head);
    config["depth_double_blocks"] = json!(sizes.double);
    config["depth_single_blocks"] = json!(sizes.single);
    fs::write(&path, config.to_string()).unwrap();
    models
}

/// What `avatar generate` told last, and the video stream.
fn generate(models: &Path, device: &str, more: &[&str]) -> (Value, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, audio, out, models) =
        (path("portrait.png"), path("speech.wav"), path("a.mp4"), models.to_str().unwrap());
    fs::write(&image, portrait()).unwrap();
    fs::write(&audio, tone(0.2, 16_000)).unwrap();
    let inputs = ["generate", "--image", &image, "--audio", &audio, "--out", &out, "--json", "--size", "64"];
    let done = avatar(&[&inputs[..], &["--models", models, "--device", device], more].concat());
    let stdout = text(&done.stdout);
    let told: Value = serde_json::from_str(stdout.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("{stdout}{}", text(&done.stderr)));
    assert_eq!(told["event"], "completed", "{told}");
    (told, video_stream(Path::new(&out)))
}

#[test]
fn blocks_that_stay_on_neither_of_two_devices_stay_on_both_and_make_the_same_video() {
    let models = wide_models();
    let steps = ["--steps", "2"];
    let (one, video) = generate(models.path(), "cpu", &steps);
    let all = one["weights"]["blocks"].as_u64().unwrap();
    assert_eq!((all, &one["weights"]["resident_blocks"], one.get("spread")), (6, &all.into(), None), "{one}");
    let budget = 180 * MIB;
    let (alone, same) = generate(models.path(), &format!("cpu:{budget}"), &steps);
    let stayed = alone["weights"]["resident_blocks"].as_u64().unwrap();
    assert!(stayed < all && alone.get("spread").is_none() && same == video, "{alone}");

    let (two, same) = generate(models.path(), &format!("cpu:{budget},cpu:{budget}"), &steps);
    assert!(video == same, "{one} and {two}");
    assert_eq!(two["weights"]["resident_blocks"], all, "{two}");
    let (spread, predicted) = (two["spread"].as_array().unwrap(), &two["predicted"]);
    let planned = predicted["spread"].as_array().unwrap();
    assert_eq!((spread.len(), planned.len()), (2, 2), "{two}");
    assert_eq!(predicted["placement"]["diffusion"], spread[0]["device"], "{two}");
    let mut next = 0;
    for (held, planned) in spread.iter().zip(planned) {
        for key in ["device", "first_block", "blocks", "resident_blocks"] {
            assert_eq!(held[key], planned[key], "{key} in {two}");
        }
        assert_eq!((&held["first_block"], &held["resident_blocks"]), (&next.into(), &held["blocks"]), "{two}");
        next += held["blocks"].as_u64().unwrap();
        let (measured, expected) = (held["peak_bytes"].as_f64().unwrap(), planned["peak_bytes"].as_f64().unwrap());
        assert!((measured / expected - 1.0).abs() <= 0.05, "{measured} bytes, {expected} predicted: {held}");
        let name = held["device"].as_str().unwrap();
        let on_device = two["device_peak_bytes"][name].as_u64().unwrap();
        assert!(on_device as f64 >= measured && on_device <= budget, "{name}: {two}");
        assert!(predicted["device_peak_bytes"][name].as_u64().is_some_and(|most| most <= budget), "{name}: {two}");
    }
    assert_eq!(next, all);
    let reasons = predicted["reasons"].to_string();
    assert!(reasons.contains("its blocks are spread ("), "{reasons}");
}

/// All five stages of a gateway at one channel, of which one is asked alone.
fn stages(channel: &Channel) -> Stages {
    let [audio_encoder, text_encoder, image_encoder, diffusion, vae_decode] = std::array::from_fn(|_| channel.clone());
    Stages { audio_encoder, text_encoder, image_encoder, diffusion, vae_decode, spare_decoders: Vec::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_diffusion_stage_spreads_over_the_devices_that_it_is_given_and_answers_the_same() {
    let whole = start("diffusion", "cpu");
    let expected = try_velocities(&stages(&channel(&whole).await), "one", 4).await.unwrap();
    let identity = stages(&channel(&whole).await).identity(proto::v1::Stage::Diffusion).await.unwrap();
    let process = start("diffusion", "cpu:1GiB,cpu:2GiB,cpu:1GiB");
    let channel = channel(&process).await;
    let told = stages(&channel);
    for at_once in [4, 1] {
        assert!(try_velocities(&told, "one", at_once).await.unwrap() == expected, "{at_once} passes a call");
    }
    assert_eq!(told.identity(proto::v1::Stage::Diffusion).await.unwrap(), identity, "it changes no result");
    let memory = memory(&channel).await;
    let names: Vec<&str> = memory.parts.iter().map(|part| part.device.as_str()).collect();
    assert_eq!((names, memory.weight_blocks, memory.resident_weight_blocks), (vec!["cpu.0", "cpu.1", "cpu.2"], 5, 5));
    assert_eq!(memory.parts.iter().map(|part| part.blocks).sum::<u32>(), 5, "{memory:?}");
    for (part, budget) in memory.parts.iter().zip([1024 * MIB, 2048 * MIB, 1024 * MIB]) {
        assert!(part.blocks > 0 && part.resident_bytes > 0 && part.budget_bytes == budget, "{part:?}");
        assert!(part.peak_bytes > part.resident_bytes && part.device_peak_bytes >= part.peak_bytes, "{part:?}");
    }
    assert_eq!(memory.parts[0].peak_bytes, memory.peak_bytes);
    let said = StageServiceClient::new(channel).describe(DescribeRequest {}).await.unwrap().into_inner();
    assert_eq!((said.device.as_str(), &said.device_id), ("cpu.0", &memory.parts[0].device_id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_device_that_is_too_small_is_named_and_the_stage_lives_on() {
    let process = start("diffusion", "cpu:1GiB,cpu:64KiB");
    let channel = channel(&process).await;
    for _ in 0..2 {
        let fault = try_velocities(&stages(&channel), "one", 1).await.unwrap_err();
        assert_eq!(fault.kind, Kind::OutOfMemory, "{fault}");
        assert!(fault.message.contains("on cpu.1") && fault.message.contains("of 65536 free"), "{fault}");
    }
    assert!(memory(&channel).await.parts[1].device_bytes <= 64 << 10);
}

#[test]
fn stages_that_cannot_be_spread_say_so() {
    let models = tiny_models();
    let told = |name: &str, device: &str| {
        let done = std::process::Command::new(crate::stack::binary(name))
            .args(["--listen", "127.0.0.1:0", "--models", models.to_str().unwrap(), "--device", device])
            .output()
            .unwrap();
        (done.status.code(), text(&done.stderr))
    };
    let (code, said) = told("vae-decode", "cpu:1GiB,cpu:1GiB");
    assert!(code == Some(64) && said.contains("this stage has one device; only diffusion is spread"), "{said}");
    let (code, said) = told("diffusion", "cpu:1GiB,cpu");
    assert!(code == Some(64) && said.contains("each of several devices needs its bytes"), "{said}");
}
