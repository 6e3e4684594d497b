use std::path::Path;

use candle_core::{DType, Device, Tensor};
use e2e::parity::Case;
use gateway::sampler::{Prompt, Sampler, StepPlan, reference_clip};
use model::{
    audio::AudioEncoder,
    diffusion::{AudioAdapter, AudioProjection, MOTION_EXP, MOTION_POSE, TokenRefiner, group_frames},
    image::{llava_pixels, resize_bilinear},
    text::{LlavaConfig, TextConfig, tokens::PromptTokenizer},
    vae::VaeStage,
};
use planner::clip::{ClipPlan, REFERENCE_WINDOW};

use super::{SHAPE, halves, schedule, smallest, text_encoder, values};

fn golden(name: &str) -> Case {
    Case::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name), DType::F32).unwrap()
}

/// The picture's ones are put behind the filling's zeros, though its rows come before the filling's.
#[test]
fn quirk_kept_the_text_mask_has_its_filling_before_the_picture() {
    let states = text_encoder().encode("hi", &halves(64, 64, 20, 200), 64, 64).unwrap().positive;
    let first_zero = states.mask.iter().position(|m| *m == 0).unwrap();
    let last_zero = states.mask.iter().rposition(|m| *m == 0).unwrap();
    assert!(states.mask[first_zero..=last_zero].iter().all(|m| *m == 0));
    assert!(last_zero + 1 < states.mask.len(), "the mask ends in ones");
    // The rows that the zeros stand for are at the end, and what stands under the zeros is none of them.
    let rows = states.states.to_vec2::<f32>().unwrap();
    let valid = states.mask.iter().sum::<i64>() as usize;
    assert_eq!(valid, rows.len() - (last_zero + 1 - first_zero));
    assert!(first_zero < valid && rows[first_zero] != rows[valid]);
    assert!(rows[valid..].iter().all(|row| *row == rows[valid]));
}

#[test]
fn quirk_kept_the_refiner_goes_by_the_masks_positions() {
    let case = golden("token_refiner");
    let refiner = TokenRefiner::load(&case.weights().unwrap(), case.get("heads").unwrap()).unwrap();
    let x = case.input("x").unwrap().get(0).unwrap();
    let length = x.dim(0).unwrap();
    let zeros_at = |from: usize| (0..length).map(|i| i64::from(!(from..from + 2).contains(&i))).collect::<Vec<_>>();
    let refine = |mask: &[i64]| values(&refiner.forward(&x, 500.0, Some(mask)).unwrap());
    assert_ne!(refine(&zeros_at(1)), refine(&zeros_at(length - 2)));
}

#[test]
fn quirk_kept_the_vision_tower_sees_a_squashed_picture() {
    let wide = halves(96, 24, 10, 240);
    let side = 28;
    let seen = values(&llava_pixels(&wide, side).unwrap());
    assert_eq!(seen, values(&llava_pixels(&resize_bilinear(&wide, side, side), side).unwrap()));
    // Neither cut nor padded: both halves fill every row, from corner to corner.
    for row in seen.chunks(side).take(side) {
        assert!((row[0] - seen[0]).abs() < 1e-6 && (row[side - 1] - seen[side - 1]).abs() < 1e-6);
        assert!(row[side - 1] > row[0] + 3.0, "{} {}", row[0], row[side - 1]);
    }
}

#[test]
fn quirk_kept_the_negative_prompt_sees_the_same_picture() {
    let encoder = text_encoder();
    let negative = |left: u8| encoder.encode("hi", &halves(64, 64, left, 200), 64, 64).unwrap().negative;
    let (one, other) = (negative(20), negative(190));
    assert_ne!(values(&one.states), values(&other.states));
    assert_eq!(values(&one.pooled), values(&other.pooled), "CLIP reads the words alone");
}

#[test]
fn quirk_kept_in_phase_two_both_passes_read_the_positive_prompt() {
    let plan = StepPlan::reference(schedule(50));
    let noise = vec![0.5; SHAPE.values(1)];
    for (step, unconditional) in [(9, Prompt::Negative), (10, Prompt::Positive)] {
        let sampler = Sampler::resume(smallest(plan.clone(), false), step, noise.clone()).unwrap();
        let prompts: Vec<Prompt> = sampler.requests().iter().map(|r| r.prompt).collect();
        assert_eq!(prompts, [Prompt::Positive, unconditional], "step {step}");
    }
}

#[test]
fn quirk_kept_the_reference_plan_switches_at_step_10_of_any_number() {
    for steps in [11, 14, 25, 50, 100, 200] {
        let plan = StepPlan::reference(schedule(steps));
        let early = |i: usize| plan.steps()[i].guidance.unwrap().prompt == Prompt::Negative;
        assert!((0..steps).all(|i| early(i) == (i < 10)), "{steps} steps");
    }
}

#[test]
fn quirk_kept_face_mask_is_weakened_to_0_6_in_phase_one() {
    let plan = StepPlan::reference(schedule(50));
    for (step, scale) in [(0, 0.6), (9, 0.6), (10, 1.0), (15, 1.0)] {
        let sampler = Sampler::resume(smallest(plan.clone(), false), step, vec![0.5; SHAPE.values(1)]).unwrap();
        assert!(sampler.requests().iter().all(|r| r.face_mask_scale == scale), "step {step}: both passes");
    }
}

/// Features of zero are what "without the speech" means, and yet move the picture: biases and norms see to that.
#[test]
fn quirk_kept_features_of_zero_are_neither_silence_nor_nothing() {
    let encoder = AudioEncoder::open(&crate::stack::tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let silence = values(&encoder.encode(&[0.0; 3200]).unwrap());
    assert!(silence.iter().map(|v| v.abs()).fold(0.0, f32::max) > 0.1, "silence has features");

    let case = golden("audio_modules");
    let (weights, hidden) = (case.weights().unwrap(), case.get("dim").unwrap());
    let audio = case.input("audio").unwrap().get(0).unwrap().zeros_like().unwrap();
    let tokens = AudioProjection::load(&weights.pp("proj"), hidden).unwrap().forward(&audio).unwrap();
    let image = case.input("latents").unwrap().get(0).unwrap();
    let adapter = AudioAdapter::load(&weights.pp("ca"), hidden).unwrap();
    let added = values(&adapter.forward(&group_frames(&tokens).unwrap(), &image).unwrap());
    assert!(added.iter().map(|v| v.abs()).fold(0.0, f32::max) > 1e-3, "and features of zero are heard");
}

#[test]
fn quirk_kept_windows_move_by_10_and_the_last_frame_neighbours_the_first() {
    let clip = reference_clip(185, 65);
    assert_eq!(clip.starts().collect::<Vec<_>>(), [0, 33]);
    assert_eq!(clip.window_latent_frames(33, 0), (33..65).chain([0]).collect::<Vec<_>>());
    let shifts: Vec<usize> = (0..6).map(|step| clip.shift_at(step)).collect();
    assert_eq!(shifts, [0, 10, 20, 30, 7, 17]);
    assert_eq!(clip.window_latent_frames(0, 10), (55..65).chain(0..23).collect::<Vec<_>>());
    assert_eq!(clip.window_audio_frames(0, 10), (220..260).chain(0..89).collect::<Vec<_>>());
}

#[test]
fn quirk_kept_of_50_steps_these_20_reuse_the_last_block() {
    let plan = StepPlan::reference(schedule(50));
    let full: Vec<usize> = (0..50).filter(|&i| !plan.steps()[i].cached).collect();
    assert_eq!(full, (0..15).chain([15, 20, 25, 30, 35, 40]).chain(41..50).collect::<Vec<_>>());
    // Past the list there is nothing but reuse.
    assert!(StepPlan::reference(schedule(70)).steps()[50..].iter().all(|step| step.cached));
}

#[test]
fn quirk_kept_latents_can_be_rounded_to_bf16_after_each_step() {
    let plan = StepPlan::reference(schedule(4));
    let after = |round| {
        let mut sampler = Sampler::new(smallest(plan.clone(), round), vec![0.123_456_7; SHAPE.values(1)]).unwrap();
        for index in 0..2 {
            sampler.accept(index, vec![0.765_432_1; SHAPE.values(1)]).unwrap();
        }
        sampler.advance().unwrap();
        sampler.latents().to_vec()
    };
    assert!(after(true).iter().all(|v| v.to_bits() & 0xffff == 0));
    assert!(after(false).iter().all(|v| v.to_bits() & 0xffff != 0));
}

/// The five frames count where the number of windows is decided.
#[test]
fn quirk_kept_five_silent_frames_follow_long_speech() {
    let latent_frames = |frames| ClipPlan::new(frames, 1, REFERENCE_WINDOW).latent_frames;
    assert_eq!((latent_frames(250), latent_frames(251)), (65, 97)); // 255 and 256 frames with them
    assert_eq!((latent_frames(378), latent_frames(379)), (97, 129));
    assert_eq!(latent_frames(129), 33, "none follow what fits one window");
}

#[test]
fn quirk_kept_pixels_are_cut_off_not_rounded() {
    let stage = VaeStage::open(&crate::stack::tiny_models(), &model::checkpoint::Setup::default()).unwrap();
    let noise = gateway::sampler::noise(3, 16 * 2 * 4);
    let latents = Tensor::from_vec(noise, (16, 1, 2, 4), &Device::Cpu).unwrap();
    let mut bytes = Vec::new();
    stage
        .decode_frames(&latents, None, &mut |_, frames| {
            bytes.extend(frames);
            Ok(())
        })
        .unwrap();
    let z = (latents.unsqueeze(0).unwrap() / stage.config.scaling_factor).unwrap();
    let pixels = stage.decoder.decode_tiled(&z).unwrap().squeeze(0).unwrap().permute((1, 2, 3, 0)).unwrap();
    let levels = values(&pixels.contiguous().unwrap()).into_iter().map(|v| (v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0);
    let levels: Vec<f32> = levels.collect();
    assert_eq!(bytes, levels.iter().map(|v| v.floor() as u8).collect::<Vec<_>>());
    assert_ne!(bytes, levels.iter().map(|v| v.round() as u8).collect::<Vec<_>>());
}

/// 95 with the published vocabulary, which is not here; the rule is BOS and the template up to the prompt.
#[test]
fn quirk_kept_the_template_before_the_prompt_is_cropped_with_its_bos() {
    let published = LlavaConfig::default();
    let (before, after) = published.template.split_once("{}").unwrap();
    assert!(before.starts_with("<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the "));
    assert!(before.ends_with("used in the video:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"));
    assert_eq!(after, "<|eot_id|>\nThe person looks like<image>");
    assert_eq!((published.prompt_tokens, published.hidden_state_index), (256, -3));

    let folder = crate::stack::tiny_models().join("text-encoder");
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: TextConfig = serde_json::from_slice(&config).unwrap();
    let tokens = PromptTokenizer::open(&folder.join("llava"), &config.llava, usize::MAX).unwrap();
    // One token a byte, and one for each of the five special ones.
    let before = config.llava.template.split("{}").next().unwrap();
    let special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"];
    let count = special.iter().fold(before.to_owned(), |text, token| text.replace(token, "#")).len();
    assert_eq!(tokens.crop(), 1 + count);
    let text = tokens.encode("prompt").unwrap();
    assert_eq!(text.ids[tokens.crop()..][..6], *b"prompt".map(i64::from).as_slice());
}

#[test]
fn quirk_kept_filling_rows_have_states_and_are_all_alike() {
    let states = text_encoder().encode("hi", &halves(64, 64, 20, 200), 64, 64).unwrap().positive;
    let valid = states.mask.iter().sum::<i64>() as usize;
    let rows = states.states.to_vec2::<f32>().unwrap();
    assert!(rows.len() > valid + 1);
    assert!(rows[valid..].iter().all(|row| *row == rows[valid]));
    assert!(rows[valid].iter().map(|v| v.abs()).fold(0.0, f32::max) > 1e-3, "they are not zero");
}

#[test]
fn quirk_kept_motion_is_always_30_and_25() {
    assert_eq!((MOTION_EXP, MOTION_POSE), ([30.0; 4], [25.0; 4]));
}
