//! What holds of the transformer beyond the reference cases.

use candle_core::{Device, Tensor};

use super::*;
use crate::{
    golden::{Golden, noise, worst},
    image::face::token_gate,
    weights::Weights,
};

fn transformer(case: &Golden) -> Transformer {
    let config: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let weights = case.weights();
    let transformer = Transformer::load(&weights, &config).unwrap();
    weights.refuse_unused(|_| false).unwrap();
    transformer
}

fn mask(case: &Golden, b: usize) -> Vec<i64> {
    case.item("text_mask", b).to_vec1().unwrap()
}

pub(super) fn conditioning<'a>(case: &Golden, b: usize, mask: &'a [i64]) -> Conditioning<'a> {
    let four = |name: &str| {
        let values = case.item(name, b).to_dtype(candle_core::DType::F32).unwrap();
        values.to_vec1::<f32>().unwrap().try_into().unwrap()
    };
    Conditioning {
        reference_latents: case.item("ref_latents", b),
        face_mask: case.item("face_mask", b),
        text_states: case.item("text_states", b),
        text_mask: mask,
        pooled: case.item("text_states_2", b),
        audio: case.item("audio_prompts", b),
        fps: case.item("fps", b).to_dtype(candle_core::DType::F32).unwrap().to_scalar().unwrap(),
        motion_exp: four("motion_exp"),
        motion_pose: four("motion_pose"),
    }
}

/// The largest number of bytes that `work` asks for at once, and what it gives.
fn most_asked<R>(work: impl FnOnce() -> R) -> (u64, R) {
    let most = std::rc::Rc::new(std::cell::Cell::new(0));
    let seen = most.clone();
    let allows = move |bytes: u64| {
        seen.set(seen.get().max(bytes));
        true
    };
    let result = crate::memory::watched(allows, work);
    (most.get(), result)
}

/// f32: a product may add up in another order where it has fewer rows.
#[test]
fn blocks_give_the_same_in_pieces_of_a_few_tokens_and_hold_less() {
    let hidden = 64;
    let tensor = |dims: &[usize], seed: u64| (noise(dims, seed) * 0.2).unwrap();
    let weights = |names: &[(&str, &[usize])]| {
        let tensors = names.iter().zip(1..).map(|((name, dims), seed)| ((*name).to_owned(), tensor(dims, seed)));
        Weights::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
    };
    let grid = Grid { frames: 3, ..grid_of(&Tensor::zeros((4, 3, 8, 10), DType::F32, &Device::Cpu).unwrap()).unwrap() };
    let texts = 7;
    let rope = Rope::new(grid, [4, 6, 6], 256.0, texts, &Device::Cpu).unwrap();
    let images = grid.per_frame() + grid.tokens();
    let (vec, image, text) = (tensor(&[1, hidden], 90), tensor(&[images, hidden], 91), tensor(&[texts, hidden], 92));

    let single = SingleBlock::load(
        &weights(&[
            ("modulation.linear.weight", &[3 * hidden, hidden]),
            ("modulation.linear.bias", &[3 * hidden]),
            ("linear1.weight", &[7 * hidden, hidden]),
            ("linear1.bias", &[7 * hidden]),
            ("linear2.weight", &[hidden, 5 * hidden]),
            ("linear2.bias", &[hidden]),
            ("q_norm.weight", &[16]),
            ("k_norm.weight", &[16]),
        ]),
        hidden,
    )
    .unwrap();
    let x = Tensor::cat(&[&image, &text], 0).unwrap();
    let (whole_bytes, whole) = most_asked(|| single.forward(&x, &vec, &rope).unwrap());
    for chunk in [1, 5, 16] {
        let (bytes, pieces) = most_asked(|| single.forward_in(&x, &vec, &rope, chunk).unwrap());
        assert!(worst(&pieces, &whole) < 1e-6, "{chunk}: differs by {}", worst(&pieces, &whole));
        assert!(bytes < whole_bytes, "{chunk}: {bytes} of {whole_bytes}");
    }

    let mut names: Vec<(String, Vec<usize>)> = Vec::new();
    for stream in ["img", "txt"] {
        for (name, out, inp) in [
            ("mod.linear", 6 * hidden, hidden),
            ("attn_qkv", 3 * hidden, hidden),
            ("attn_proj", hidden, hidden),
            ("mlp.fc1", 4 * hidden, hidden),
            ("mlp.fc2", hidden, 4 * hidden),
        ] {
            names.push((format!("{stream}_{name}.weight"), vec![out, inp]));
            names.push((format!("{stream}_{name}.bias"), vec![out]));
        }
        names.extend(["q", "k"].map(|part| (format!("{stream}_attn_{part}_norm.weight"), vec![16])));
    }
    let named: Vec<(&str, &[usize])> = names.iter().map(|(name, dims)| (name.as_str(), dims.as_slice())).collect();
    let double = DoubleBlock::load(&weights(&named), hidden).unwrap();
    let image_rope = rope.first(images).unwrap();
    let (whole_bytes, (whole, whole_text)) = most_asked(|| double.forward(&image, &text, &vec, &image_rope).unwrap());
    for chunk in [3, 16] {
        let (bytes, (pieces, pieces_text)) =
            most_asked(|| double.forward_in((&image, &text), &vec, &image_rope, chunk).unwrap());
        let difference = worst(&pieces, &whole).max(worst(&pieces_text, &whole_text));
        assert!(difference < 1e-6, "{chunk}: differs by {difference}");
        assert!(bytes < whole_bytes, "{chunk}: {bytes} of {whole_bytes}");
    }
}

#[test]
fn a_text_mask_that_shows_nothing_is_refused() {
    let case = Golden::open("token_refiner");
    let refiner = TokenRefiner::load(&case.weights(), case.number("heads")).unwrap();
    let x = case.item("x", 0);
    let refused = refiner.forward(&x, 500.0, Some(&vec![0; x.dim(0).unwrap()]));
    assert!(matches!(refused, Err(Error::Input { field: "text_mask", .. })));
}

/// The image stage's plain form of the same rule.
#[test]
fn the_face_gate_takes_every_second_latent() {
    let (rows, columns) = (6, 10);
    let mask: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
    let wanted = token_gate(&mask, columns, rows, 1);
    let gate = face_gate(&Tensor::from_vec(mask, (1, 1, rows, columns), &Device::Cpu).unwrap()).unwrap();
    assert_eq!(gate.flatten_all().unwrap().to_vec1::<f32>().unwrap(), wanted);
}

/// The last block sees the very same numbers, so the result is the same to the bit.
#[test]
fn a_cached_pass_at_the_same_time_equals_the_full_one() {
    let case = Golden::open("dit_full");
    let transformer = transformer(&case);
    let mask = mask(&case, 0);
    let given = conditioning(&case, 0, &mask);
    let pass = transformer.predict(&case.item("x", 0), 700.0, &given, true).unwrap();
    let mut cache = FeatureCache::new();
    cache.store(&[5, 6, 0], pass.features.unwrap()).unwrap();
    let cached = transformer.predict_cached(&cache.get(&[5, 6, 0]).unwrap(), 700.0, &given).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&cached), values(&pass.velocity));
}

#[test]
fn one_reference_frame_equals_the_same_frame_repeated() {
    let case = Golden::open("dit_full");
    let transformer = transformer(&case);
    let mask = mask(&case, 1);
    let mut given = conditioning(&case, 1, &mask);
    given.reference_latents = given.reference_latents.narrow(1, 0, 1).unwrap();
    let x = case.item("x", 1);
    let one = transformer.predict(&x, 500.0, &given, false).unwrap();
    assert!(one.features.is_none());
    given.reference_latents = given.reference_latents.repeat((1, x.dim(1).unwrap(), 1, 1)).unwrap();
    let repeated = transformer.predict(&x, 500.0, &given, false).unwrap();
    let difference = worst(&one.velocity, &repeated.velocity);
    assert!(difference < 2e-5, "{difference}");
}

#[test]
fn inputs_of_another_size_are_refused_by_name() {
    let case = Golden::open("dit_full");
    let transformer = transformer(&case);
    let mask = mask(&case, 0);
    let given = conditioning(&case, 0, &mask);
    let x = case.item("x", 0);
    let refused = |given: &Conditioning<'_>, x: &Tensor| match transformer.predict(x, 500.0, given, false) {
        Err(Error::Input { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let cut = |t: &Tensor, dim: usize| t.narrow(dim, 0, t.dim(dim).unwrap() - 1).unwrap();
    assert_eq!(refused(&given, &cut(&x, 0)), "latents");
    assert_eq!(refused(&given, &cut(&x, 3)), "latents");
    assert_eq!(refused(&given, &cut(&x, 1)), "reference_latents");
    assert_eq!(refused(&Conditioning { audio: cut(&given.audio, 0), ..given.clone() }, &x), "audio");
    assert_eq!(refused(&Conditioning { audio: cut(&given.audio, 3), ..given.clone() }, &x), "audio");
    assert_eq!(refused(&Conditioning { face_mask: cut(&given.face_mask, 3), ..given.clone() }, &x), "face_mask");
    assert_eq!(refused(&Conditioning { text_states: cut(&given.text_states, 0), ..given.clone() }, &x), "text_states");
    assert_eq!(refused(&Conditioning { pooled: cut(&given.pooled, 0), ..given.clone() }, &x), "pooled");
    let empty = vec![0; mask.len()];
    assert_eq!(refused(&Conditioning { text_mask: &empty, ..given.clone() }, &x), "text_mask");
}

#[test]
fn a_config_that_the_tensors_contradict_is_refused_by_name() {
    let case = Golden::open("dit_full");
    let right: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let refused = |config: TransformerConfig| match Transformer::load(&case.weights(), &config) {
        Err(Error::Input { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(TransformerConfig { hidden_size: Some(65), ..right.clone() }), "hidden_size");
    assert_eq!(refused(TransformerConfig { num_heads: Some(3), ..right.clone() }), "num_heads");
    assert_eq!(refused(TransformerConfig { rope_dim_list: [4, 4, 6], ..right.clone() }), "rope_dim_list");
    assert_eq!(
        refused(TransformerConfig { audio_double_blocks: Some(vec![3]), ..right.clone() }),
        "audio_double_blocks"
    );
    // Nothing but the rope is needed.
    let least = TransformerConfig { rope_dim_list: right.rope_dim_list, ..TransformerConfig::default() };
    assert!(Transformer::load(&case.weights(), &least).is_ok());
}
