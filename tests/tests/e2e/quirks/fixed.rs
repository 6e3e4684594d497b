use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use gateway::{
    media::{
        audio::Soundtrack,
        mp4::{Settings, Writer},
    },
    sampler::{Branch, Request, Sampler, StepPlan, noise},
};
use model::{
    audio::AudioEncoder,
    image::{
        ImageEncoder,
        face::{FaceBox, largest, largest_of_reference},
        resize_lanczos,
    },
    vae::VaeDecoder,
    weights::Weights,
};
use planner::{
    clip::{ClipPlan, FPS, REFERENCE_WINDOW},
    size::{generation_size, reference_size},
};

use super::{SHAPE, halves, schedule, smallest, text_encoder, values};
use crate::stack::{avatar, probe, text, video_stream};

/// What the command line says of options that the reference has and that are nothing here.
fn refusal(option: &[&str]) -> String {
    let done = avatar(&[&["generate", "--image", "a.png", "--audio", "a.wav", "--out", "a.mp4"], option].concat());
    assert_eq!(done.status.code(), Some(2), "{option:?}");
    text(&done.stderr)
}

#[test]
fn quirk_fixed_a_frame_rates_other_than_25_are_refused() {
    assert_eq!(FPS, 25);
    for rate in ["12.5", "25", "30"] {
        assert!(refusal(&["--fps", rate]).contains("--fps"));
    }
}

#[test]
fn quirk_fixed_b_a_long_prompt_is_refused_with_its_count_and_the_limit() {
    let encoder = text_encoder();
    let picture = halves(64, 64, 20, 200);
    let limit = encoder.encode("", &picture, 64, 64).unwrap().prompt_token_limit;
    let error = encoder.encode(&"a".repeat(limit), &picture, 64, 64).unwrap_err().to_string();
    assert!(error.starts_with("prompt: ") && error.contains(&limit.to_string()), "{error}");
}

#[test]
fn quirk_fixed_c_the_pictures_latents_are_the_mean() {
    let stage = ImageEncoder::open(&crate::stack::tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let picture = halves(50, 70, 20, 200);
    let latents = values(&stage.encode(&picture, 32, 48, None).unwrap().latents);
    assert_eq!(latents, values(&stage.encode(&picture, 32, 48, None).unwrap().latents));
    let small = resize_lanczos(&picture, 32, 48);
    let planes = (0..3).flat_map(|c| small.data.iter().skip(c).step_by(3).map(|v| f32::from(*v) / 127.5 - 1.0));
    let pixels = Tensor::from_vec(planes.collect::<Vec<_>>(), (1, 3, 1, 48, 32), &Device::Cpu).unwrap();
    let mean = (stage.encoder.encode_tiled(&pixels).unwrap().mean * stage.config.scaling_factor).unwrap();
    assert_eq!(latents, values(&mean));
}

/// The two passes of a window have the picture in common; the reference encodes a blank one too, and drops it.
#[test]
fn quirk_fixed_d_there_is_no_second_picture() {
    let sampler = Sampler::new(smallest(StepPlan::scaled(schedule(50)), false), vec![0.5; SHAPE.values(1)]).unwrap();
    let [conditional, unconditional] = &sampler.requests()[..] else { panic!("two passes") };
    let of_the_other = Request {
        index: unconditional.index,
        branch: Branch::Unconditional,
        prompt: unconditional.prompt,
        silent: true,
        ..conditional.clone()
    };
    assert_eq!(*unconditional, of_the_other);
}

#[test]
fn quirk_fixed_e_one_frame_of_the_still_picture_is_encoded() {
    let stage = ImageEncoder::open(&crate::stack::tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let reference = stage.encode(&halves(50, 70, 20, 200), 32, 48, None).unwrap();
    assert_eq!(reference.latents.dims(), [16, 1, 6, 4]);
}

#[test]
fn quirk_fixed_f_there_is_no_output_type_to_crash_on() {
    assert!(refusal(&["--output-type", "latent"]).contains("--output-type"));
}

#[test]
fn quirk_fixed_g_the_steps_that_reuse_scale_with_their_number() {
    for steps in 1..=200 {
        let plan = StepPlan::scaled(schedule(steps));
        let cached: Vec<usize> = (0..steps).filter(|&i| plan.steps()[i].cached).collect();
        assert_eq!(cached.is_empty(), steps < 30, "{steps} steps");
        assert!(cached.iter().all(|&i| 10 * i >= 3 * steps && 100 * i < 82 * steps && i % 5 != 0), "{steps} steps");
    }
    assert_eq!(StepPlan::scaled(schedule(50)), StepPlan::reference(schedule(50)));
}

#[test]
fn quirk_fixed_h_options_without_effect_are_refused() {
    assert!(refusal(&["--use-deepcache", "1"]).contains("--use-deepcache"));
    assert!(refusal(&["--sample-n-frames", "129"]).contains("--sample-n-frames"));
}

#[test]
fn quirk_fixed_i_every_size_has_an_area_limit_and_small_ones_are_met() {
    for size in [96, 128, 300, 320, 448, 640, 1024] {
        for (width, height) in [(1000, 1000), (1920, 1080), (600, 2400)] {
            let made = generation_size(size, width, height);
            // Rounding to 64 may pass the limit by half a grid on each side.
            let limit = 1.5 * f64::from(size).powi(2);
            let (w, h) = (f64::from(made.width), f64::from(made.height));
            assert!((w - 32.0) * (h - 32.0) <= limit, "{size} of {width}x{height}: {made}");
            assert!(made.width.is_multiple_of(16) && made.height.is_multiple_of(16));
        }
    }
    assert_eq!((generation_size(96, 500, 500).width, reference_size(96, 500, 500).width), (96, 128));
}

/// The sound is longer than the last frame, and in a folder whose name a shell would run.
async fn clip_in_a_hostile_folder() -> (tempfile::TempDir, serde_json::Value) {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("it's \"quoted\"; touch $(ls) `ls` -y");
    std::fs::create_dir(&folder).unwrap();
    let settings = Settings { program: Path::new("ffmpeg"), directory: &folder, width: 32, height: 16 };
    let samples = (0..7000).map(|i| (i as f32 * 0.1).sin() * 0.3).collect();
    let sound = Soundtrack { rate: 16_000, channels: 1, samples };
    let mut writer = Writer::start(settings, &sound).await.unwrap();
    writer.push_frames(&[90; 32 * 16 * 3 * 10]).await.unwrap();
    let video = folder.join("-o \"a'b\".mp4");
    std::fs::rename(writer.finish().await.unwrap().path(), &video).unwrap();
    let shown = probe(&video);
    assert!(!video_stream(&video).is_empty());
    (outside, shown)
}

#[tokio::test]
async fn quirk_fixed_j_the_sound_is_not_cut_to_the_video() {
    let (_folder, shown) = clip_in_a_hostile_folder().await;
    let stream = |kind: &str| {
        let found = shown["streams"].as_array().unwrap().iter().find(|s| s["codec_type"] == kind).unwrap();
        (found["duration"].as_str().unwrap().parse::<f64>().unwrap(), found["nb_read_frames"].clone())
    };
    assert_eq!(stream("video").1, "10");
    let seconds = stream("audio").0;
    assert!((seconds - 7000.0 / 16_000.0).abs() < 1e-3, "{seconds} s of 0.4375; the video has 0.4");
}

#[test]
fn quirk_fixed_k_the_largest_face_is_the_largest() {
    let faces = [2.0, 5.0, 3.0].map(|side| FaceBox { x: 0.0, y: 0.0, width: side, height: side, score: None });
    assert_eq!(largest(&faces).unwrap().width, 5.0);
    assert_eq!(largest_of_reference(&faces).unwrap().width, 3.0);
}

#[test]
fn quirk_fixed_l_a_missing_or_unknown_tensor_is_named() {
    let file = crate::stack::tiny_models().join("vae-decode").join("model.safetensors");
    let config = std::fs::read(crate::stack::tiny_models().join("vae-decode").join("config.json")).unwrap();
    let config = serde_json::from_slice(&config).unwrap();
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let open = |tensors: HashMap<String, Tensor>| {
        let weights = Weights::from_tensors(tensors, DType::F32, &Device::Cpu);
        VaeDecoder::load(&weights, &config).and_then(|_| weights.refuse_unused(|_| false)).map_err(|e| e.to_string())
    };
    assert_eq!(open(tensors.clone()), Ok(()));
    let mut less = tensors.clone();
    less.remove("decoder.conv_in.conv.weight").unwrap();
    assert!(open(less).unwrap_err().contains("decoder.conv_in.conv.weight"));
    let mut more = tensors;
    more.insert("surprise".into(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    assert!(open(more).unwrap_err().contains("surprise"));
}

#[tokio::test]
async fn quirk_fixed_m_names_reach_the_encoder_as_they_are() {
    let (outside, shown) = clip_in_a_hostile_folder().await;
    assert_eq!(shown["streams"].as_array().unwrap().len(), 2);
    let left: Vec<_> = std::fs::read_dir(outside.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 1, "nothing was run: {left:?}");
    assert_eq!(std::fs::read_dir(&left[0]).unwrap().count(), 1);
}

/// Computed by another implementation of the generator.
#[test]
fn quirk_fixed_o_a_seed_means_the_same_noise_everywhere() {
    let bits: Vec<u32> = noise(128, 4).iter().map(|v| v.to_bits()).collect();
    assert_eq!(bits, [0xbabd_310a, 0x3f9b_95d2, 0x3fcf_1d0b, 0xbff0_d8a7]);
}

#[test]
fn quirk_fixed_p_speech_past_30_seconds_is_heard() {
    let encoder = AudioEncoder::open(&crate::stack::tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let speech: Vec<f32> = (0..31 * 16_000).map(|i| (i as f32 * 0.05).sin() * 0.3).collect();
    let features = encoder.encode(&speech).unwrap();
    assert_eq!(features.dim(0).unwrap(), 31 * 50);
    let last = encoder.encode(&speech[30 * 16_000..]).unwrap();
    assert_eq!(values(&features.narrow(0, 1500, 50).unwrap()), values(&last));
    // And past 400 frames, each has its place.
    let plan = ClipPlan::new(1000, 1, REFERENCE_WINDOW);
    assert_eq!((plan.frames, plan.kept_latent_frames), (1000, 251));
}

/// In bf16 the two velocities are the same number.
#[test]
fn quirk_fixed_q_guidance_is_computed_in_f32() {
    let plan = StepPlan::scaled(schedule(50));
    let step = plan.steps()[0];
    let mut sampler = Sampler::new(smallest(plan, false), vec![0.0; SHAPE.values(1)]).unwrap();
    let (with, without) = (1.0 + 2f32.powi(-12), 1.0);
    sampler.accept(0, vec![with; SHAPE.values(1)]).unwrap();
    sampler.accept(1, vec![without; SHAPE.values(1)]).unwrap();
    sampler.advance().unwrap();
    let velocity = without + step.guidance.unwrap().scale * (with - without);
    assert!(velocity > 1.001);
    assert!(sampler.latents().iter().all(|v| *v == velocity * step.sigma_change), "{:?}", sampler.latents());
}
