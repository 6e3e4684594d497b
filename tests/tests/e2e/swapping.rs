//! Blocks of weights that come and go: what it changes, and what not.

use std::{fs, path::Path, sync::LazyLock, time::Instant};

use candle_core::{Device, Tensor};
use model::{
    checkpoint::Setup,
    diffusion::{Conditioning, DiffusionStage, MOTION_EXP, MOTION_POSE},
};
use serde_json::Value;

use crate::{
    inputs::{portrait, tone},
    stack::{avatar, text, tiny_models, video_stream},
};

fn clock() -> std::time::Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

fn noise(shape: &[usize], seed: f32) -> Tensor {
    let count = shape.iter().product::<usize>();
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.61 + seed).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Bytes of a mapped file that this process has in memory.
fn in_memory(file: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let name = file.to_str().unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(name));
    let resident = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
    1024 * resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

#[test]
fn blocks_that_come_and_go_take_less_memory_and_give_the_same_bits() {
    let models = tiny_models();
    let stage = DiffusionStage::open(&models, &Setup::default()).unwrap();
    let transformer = &stage.transformer;
    let swap = transformer.swaps().next().unwrap();
    let widths = transformer.widths();
    let mask = [1; 20];
    let given = Conditioning {
        reference_latents: noise(&[widths.channels, 1, 8, 8], 0.1),
        face_mask: noise(&[1, 1, 8, 8], 0.2),
        text_states: noise(&[mask.len(), widths.text], 0.3),
        text_mask: &mask,
        pooled: noise(&[widths.pooled], 0.4),
        audio: noise(&[5, 10, 5, widths.audio / 50], 0.5),
        fps: 25.0,
        motion_exp: MOTION_EXP,
        motion_pose: MOTION_POSE,
    };
    let latents = noise(&[widths.channels, 2, 8, 8], 0.6);
    let pass = || {
        let velocity = transformer.predict(&latents, 700.0, &given, false).unwrap().velocity;
        velocity.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let file = models.join("diffusion/model.safetensors").canonicalize().unwrap();
    let (all, held) = (pass(), in_memory(&file));
    let sizes = swap.sizes();
    let (whole, most) = (sizes.iter().sum::<u64>(), *sizes.iter().max().unwrap());
    for resident in [0, 2] {
        swap.keep(resident, clock);
        for _ in 0..2 {
            assert!(pass() == all, "{resident} blocks stay");
        }
        let told = swap.told();
        let stay: u64 = sizes.iter().rev().take(resident).sum();
        assert_eq!((told.blocks, told.resident), (sizes.len(), resident));
        assert!(told.held_bytes <= stay + 2 * most && told.held_bytes < whole, "{told:?} of {sizes:?}");
        // One block is there for the next pass; pages are shared at edges.
        let gone = whole - stay - most;
        let left = in_memory(&file);
        assert!(left + gone / 2 < held, "{resident} blocks stay: {left} of {held} bytes, {gone} should be gone");
    }
}

fn generate(device: &str) -> Value {
    generate_video(device).0
}

/// What was told last, and the video stream.
fn generate_video(device: &str) -> (Value, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, audio, out, models) = (path("portrait.png"), path("speech.wav"), path("a.mp4"), tiny_models());
    fs::write(&image, portrait()).unwrap();
    fs::write(&audio, tone(0.2, 16_000)).unwrap();
    let inputs = ["generate", "--image", &image, "--audio", &audio, "--out", &out, "--json", "--size", "64"];
    let more = ["--steps", "2", "--models", models.to_str().unwrap(), "--device", device];
    let done = avatar(&[&inputs[..], &more].concat());
    let stdout = text(&done.stdout);
    let told = stdout.lines().last().unwrap_or_else(|| panic!("{}", text(&done.stderr)));
    (serde_json::from_str(told).unwrap(), video_stream(Path::new(&out)))
}

#[test]
fn stages_on_two_devices_make_the_same_video_and_keep_to_both_budgets() {
    let (one, video) = generate_video("cpu");
    let (two, same) = generate_video("cpu:640MiB,cpu:512MiB");
    assert!(video == same, "{one} and {two}");
    let predicted = &two["predicted"];
    let placement = predicted["placement"].as_object().unwrap();
    for (name, budget) in [("cpu.0", 640u64 << 20), ("cpu.1", 512 << 20)] {
        assert!(placement.values().any(|device| device == name), "{two}");
        let (measured, expected) = (&two["device_peak_bytes"][name], &predicted["device_peak_bytes"][name]);
        assert!(measured.as_u64().is_some_and(|most| most > 0 && most <= budget), "{name}: {measured} in {two}");
        assert!(expected.as_u64().is_some_and(|most| most > 0 && most <= budget), "{name}: {expected} in {two}");
    }
}

#[test]
fn devices_that_hold_no_request_and_devices_that_are_none_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, audio, out, models) = (path("portrait.png"), path("speech.wav"), path("a.mp4"), tiny_models());
    fs::write(&image, portrait()).unwrap();
    fs::write(&audio, tone(0.2, 16_000)).unwrap();
    let told = |device: &str| {
        let inputs = ["generate", "--image", &image, "--audio", &audio, "--out", &out, "--size", "64"];
        let done = avatar(&[&inputs[..], &["--models", models.to_str().unwrap(), "--device", device]].concat());
        (done.status.code(), text(&done.stderr))
    };
    let (code, said) = told("cpu:1MiB,cpu:1MiB");
    assert!(code == Some(1) && said.contains(" on cpu.") && said.contains("needs at least"), "{said}");
    for wrong in ["cpu:1x", "cpu:1GiB,cpu:1x"] {
        let (code, said) = told(wrong);
        assert_eq!((code, said.matches("--device").count(), said.matches("1x").count()), (Some(2), 1, 1), "{said}");
    }
    let (code, said) = told("cpu:1GiB,cpu");
    assert!(code == Some(2) && said.contains("each of several devices needs its bytes"), "{said}");
    assert!(!Path::new(&out).exists());
}

/// The heap needs less for the transformer than for the decoder, so a budget that is just enough for that leaves room
/// for some blocks.
#[test]
fn a_budget_says_how_many_blocks_stay_and_the_result_tells_what_was_predicted() {
    let free = generate("cpu");
    let (blocks, peaks) = (free["weights"]["blocks"].as_u64().unwrap(), &free["peak_bytes"]);
    assert_eq!((blocks, &free["weights"]["resident_blocks"]), (5, &5.into()), "{free}");
    assert!(free["weights"]["waited_seconds"].is_f64() && free["weights"]["hidden_seconds"].is_f64(), "{free}");
    let predicted = &free["predicted"];
    let ratio = predicted["peak_ratio"].as_f64().unwrap();
    assert!((ratio - 1.0).abs() <= 0.05, "{free}");
    assert!(
        predicted["seconds_ratio"].as_f64().unwrap() > 0.0 && free["elapsed_seconds"].as_f64().unwrap() > 0.0,
        "{free}"
    );
    assert_eq!(predicted["peak_bytes"].as_object().unwrap().len(), peaks.as_object().unwrap().len());
    // Other stages hold about 7 MB, and buffers of the wire a little.
    let budget = peaks["vae-decode"].as_u64().unwrap() + (10 << 20);
    let tight = generate(&format!("cpu:{budget}"));
    let resident = tight["weights"]["resident_blocks"].as_u64().unwrap();
    assert!(tight["event"] == "completed" && resident < blocks, "{tight}");
}
