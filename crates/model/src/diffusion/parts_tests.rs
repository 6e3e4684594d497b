//! The transformer over several parts: the same bits, wherever it is split.

use std::{cell::RefCell, rc::Rc, time::Duration};

use candle_core::{DType, Device, Tensor};

use super::{Features, MOTION_EXP, MOTION_POSE, Part, Transformer, TransformerConfig, tests::conditioning};
use crate::{
    Error,
    checkpoint::{Setup, Stage},
    convert::Storage,
    diffusion::{Conditioning, DiffusionStage, Pass},
    golden::{Golden, noise},
    memory::watched_over,
    synth,
    weights::Weights,
};

fn parts(counts: &[usize]) -> Vec<Part> {
    counts.iter().map(|&blocks| Part { device: Device::Cpu, blocks }).collect()
}

/// Every way to split so many blocks in two or three.
fn splits(blocks: usize) -> Vec<Vec<usize>> {
    let two = (1..blocks).map(|first| vec![first, blocks - first]);
    let three = (1..blocks).flat_map(|a| (1..blocks - a).map(move |b| vec![a, b, blocks - a - b]));
    two.chain(three).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn all_of(pass: &Pass) -> Vec<Vec<f32>> {
    let Features { reference, image, text } = pass.features.as_ref().unwrap();
    [&pass.velocity, reference, image, text].map(values).to_vec()
}

#[test]
fn a_reference_case_gives_the_same_bits_wherever_it_is_split() {
    let case = Golden::open("dit_full");
    let config: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let files = [case.weights_file()];
    let weights =
        Weights::open_files(&files[0], &files, &|name| Some(name.to_owned()), DType::F32, &Device::Cpu).unwrap();
    let mask: Vec<i64> = case.item("text_mask", 0).to_vec1().unwrap();
    let given = conditioning(&case, 0, &mask);
    let x = case.item("x", 0);
    let whole = Transformer::load(&weights, &config).unwrap();
    let expected = whole.predict(&x, 700.0, &given, true).unwrap();
    let cached = whole.predict_cached(expected.features.as_ref().unwrap(), 650.0, &given).unwrap();
    let [blocks] = whole.swaps().map(|swap| swap.sizes().len()).collect::<Vec<_>>()[..] else { panic!() };
    let others: u64 = whole.unswapped_bytes().iter().sum();
    for counts in splits(blocks) {
        let split = Transformer::load_over(&weights, &config, &parts(&counts)).unwrap();
        assert_eq!(split.swaps().map(|swap| swap.sizes().len()).collect::<Vec<_>>(), counts);
        assert_eq!(split.unswapped_bytes().iter().sum::<u64>(), others);
        // All blocks of every second part come and go.
        split.swaps().step_by(2).for_each(|swap| swap.keep(0, || Duration::ZERO));
        for _ in 0..2 {
            let pass = split.predict(&x, 700.0, &given, true).unwrap();
            assert!(all_of(&pass) == all_of(&expected), "{counts:?}");
            let again = split.predict_cached(pass.features.as_ref().unwrap(), 650.0, &given).unwrap();
            assert!(values(&again) == values(&cached), "{counts:?}");
        }
        for (part, swap) in split.swaps().enumerate() {
            let (told, most) = (swap.told(), swap.sizes().iter().max().copied().unwrap());
            let held = if part % 2 == 0 { 2 * most } else { swap.sizes().iter().sum() };
            assert!(told.held_bytes <= held, "part {part} of {counts:?}: {told:?}");
        }
    }
}

/// A pass as its watch sees it: the part that works and the bytes that went there, and the bytes that were asked for
/// in each part.
fn watched<R>(work: impl FnOnce() -> R) -> (Vec<(usize, u64)>, R) {
    let moves = Rc::new(RefCell::new(Vec::new()));
    let seen = moves.clone();
    let result = watched_over(|_| true, move |part, bytes| seen.borrow_mut().push((part, bytes)), work);
    (moves.take(), result)
}

#[test]
fn the_tiny_model_gives_the_same_bits_wherever_it_is_split_and_says_where_it_works() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("models");
    let options =
        synth::Options { size: synth::Size::Tiny, storage: Storage::Bf16, stages: vec![Stage::Diffusion], seed: 7 };
    synth::write(&options, &models, &mut |_| ()).unwrap();
    let setup = Setup::default();
    let whole = DiffusionStage::open(&models, &setup).unwrap().transformer;
    let widths = whole.widths();
    let mask = [1, 1, 1, 1, 1, 1, 0, 0];
    let given = Conditioning {
        reference_latents: noise(&[widths.channels, 1, 8, 8], 1),
        face_mask: noise(&[1, 1, 8, 8], 2),
        text_states: noise(&[mask.len(), widths.text], 3),
        text_mask: &mask,
        pooled: noise(&[widths.pooled], 4),
        audio: noise(&[5, 10, 5, widths.audio / 50], 5),
        fps: 25.0,
        motion_exp: MOTION_EXP,
        motion_pose: MOTION_POSE,
    };
    let latents = noise(&[widths.channels, 2, 8, 8], 6);
    let (moves, expected) = watched(|| whole.predict(&latents, 700.0, &given, true).unwrap());
    assert!(moves.is_empty(), "one part moves nowhere: {moves:?}");
    let (blocks, _) = DiffusionStage::block_bytes(&models, &setup).unwrap();
    assert_eq!(whole.swaps().next().unwrap().sizes(), blocks);
    // 16 tokens a frame, of the picture and two frames, and six of text, in f32.
    let tokens = (3 * 16 + 6) * widths.hidden as u64 * 4;
    let velocity = latents.elem_count() as u64 * 4;
    for counts in splits(blocks.len()) {
        let over = parts(&counts);
        let (moves, split) = watched(|| DiffusionStage::open_over(&models, &setup, &over).unwrap().transformer);
        let forth: Vec<(usize, u64)> = (1..counts.len()).map(|part| (part, 0)).collect();
        assert_eq!(moves, [forth.clone(), vec![(0, 0)]].concat(), "loading {counts:?}");
        let (moves, pass) = watched(|| split.predict(&latents, 700.0, &given, true).unwrap());
        let hops: Vec<(usize, u64)> = (1..counts.len()).map(|part| (part, tokens)).collect();
        assert_eq!(moves, [hops, vec![(0, velocity + tokens)]].concat(), "{counts:?}");
        assert!(all_of(&pass) == all_of(&expected), "{counts:?}");
        let features = pass.features.unwrap();
        let (moves, _) = watched(|| split.predict_cached(&features, 650.0, &given).unwrap());
        assert_eq!(moves, [(counts.len() - 1, 0), (0, velocity)], "{counts:?}");
    }
}

#[test]
fn parts_that_do_not_have_all_blocks_are_refused() {
    let case = Golden::open("dit_full");
    let config: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let blocks: usize = Transformer::load(&case.weights(), &config).unwrap().swaps().map(|s| s.sizes().len()).sum();
    for counts in [vec![blocks - 1], vec![blocks, 1], vec![0, blocks], vec![1; blocks + 1]] {
        let refused = Transformer::load_over(&case.weights(), &config, &parts(&counts));
        assert!(matches!(refused, Err(Error::Input { field: "parts", .. })), "{counts:?}");
    }
}
