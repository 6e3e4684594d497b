//! The transformer against the reference's own tensors, each at its case's tolerance.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, IndexOp, Tensor};
use serde_json::Value;

use super::*;

struct Case {
    config: Value,
    weights: Weights,
    inputs: HashMap<String, Tensor>,
    outputs: HashMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name);
        let read = |file: &str| candle_core::safetensors::load(folder.join(file), &Device::Cpu);
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let weights = read("weights.safetensors").unwrap_or_default();
        Self {
            config,
            weights: Weights::from_tensors(weights, DType::F32, &Device::Cpu),
            inputs: read("inputs.safetensors").unwrap(),
            outputs: read("outputs.safetensors").unwrap(),
        }
    }

    fn size(&self, name: &str) -> usize {
        self.config[name].as_u64().unwrap() as usize
    }

    /// Item `b` of an input.
    fn input(&self, name: &str, b: usize) -> Tensor {
        self.inputs[name].i(b).unwrap()
    }

    fn numbers(&self, name: &str, b: usize) -> Vec<f32> {
        let item = self.input(name, b).to_dtype(DType::F32).unwrap();
        item.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn mask(&self, name: &str, b: usize) -> Vec<i64> {
        self.input(name, b).to_vec1().unwrap()
    }

    fn check(&self, name: &str, got: &Tensor, want: &Tensor) {
        let tolerance = self.config["tolerance_max_rel"].as_f64().unwrap() as f32;
        assert_eq!(got.dims(), want.dims(), "{name}");
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (got, want) = (values(got), values(want));
        let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
        let (mut worst, mut at) = (0f32, 0);
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let difference = (g - w).abs();
            if difference > worst || difference.is_nan() {
                (worst, at) = (difference, i);
            }
        }
        println!("{name}: {:.1e} of {tolerance:.0e}", worst / largest);
        assert!(
            worst <= tolerance * largest,
            "{name}: off by {worst} of {largest} at {at}: {} for {}",
            got[at],
            want[at]
        );
    }

    /// Compares with item `b` of an output.
    fn holds(&self, name: &str, b: usize, got: &Tensor) {
        self.check(name, got, &self.outputs[name].i(b).unwrap());
    }
}

fn transformer(case: &Case) -> Transformer {
    let config: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let transformer = Transformer::load(&case.weights, &config).unwrap();
    case.weights.refuse_unused(|_| false).unwrap();
    transformer
}

fn conditioning<'a>(case: &Case, b: usize, mask: &'a [i64]) -> Conditioning<'a> {
    Conditioning {
        reference_latents: case.input("ref_latents", b),
        face_mask: case.input("face_mask", b),
        text_states: case.input("text_states", b),
        text_mask: mask,
        pooled: case.input("text_states_2", b),
        audio: case.input("audio_prompts", b),
        fps: case.numbers("fps", b)[0],
        motion_exp: case.numbers("motion_exp", b).try_into().unwrap(),
        motion_pose: case.numbers("motion_pose", b).try_into().unwrap(),
    }
}

fn the_whole_pass_and_its_taps(name: &str) {
    let case = Case::open(name);
    let transformer = transformer(&case);
    for b in 0..case.inputs["x"].dim(0).unwrap() {
        let mask = case.mask("text_mask", b);
        let valid = mask.iter().sum::<i64>() as usize;
        let given = conditioning(&case, b, &mask);
        let mut tapped = 0;
        let mut tap = |name: &str, got: &Tensor| {
            let name = format!("tap.{name}");
            let Some(want) = case.outputs.get(&name) else { return };
            tapped += 1;
            // The reference gives the four motion vectors of all items as rows.
            let rows = want.dim(0).unwrap() / case.inputs["x"].dim(0).unwrap();
            let want = if name.starts_with("tap.motion") { want.narrow(0, b * rows, rows) } else { want.i(b) };
            // Rows beyond the valid text are padding that the blocks leave out.
            let want = want.and_then(|w| w.narrow(0, 0, got.dim(0)?)).unwrap();
            case.check(&name, got, &want);
        };
        let t = case.numbers("t", b)[0];
        let pass = transformer.predict_with_taps(&case.input("x", b), t, &given, &mut tap).unwrap();
        assert_eq!(tapped, case.outputs.keys().filter(|k| k.starts_with("tap.")).count());
        case.holds("out", b, &pass.velocity);
        if let Some(want) = case.outputs.get("cache_out") {
            let features = pass.features.unwrap();
            let got = Tensor::cat(&[&features.reference, &features.image, &features.text], 0).unwrap();
            let want = want.i(b).unwrap().narrow(0, 0, got.dim(0).unwrap()).unwrap();
            assert_eq!(features.text.dim(0).unwrap(), valid);
            case.check("cache_out", &got, &want);
            let t = case.config["t_cached_step"][b].as_f64().unwrap() as f32;
            case.holds("out_cached_step", b, &transformer.predict_cached(&features, t, &given).unwrap());
        }
    }
}

#[test]
fn dit_full_holds_with_every_tap_and_the_cached_step() {
    the_whole_pass_and_its_taps("dit_full");
}

#[test]
fn dit_single_item_holds() {
    the_whole_pass_and_its_taps("dit_single_item");
}

#[test]
fn rope_holds() {
    let case = Case::open("rope");
    let dims: [usize; 3] = serde_json::from_value(case.config["rope_dim_list"].clone()).unwrap();
    let grids: Vec<[usize; 3]> = serde_json::from_value(case.config["grids"].clone()).unwrap();
    for (n, [frames, rows, columns]) in grids.into_iter().enumerate() {
        let theta = case.config["theta"].as_f64().unwrap();
        let rope = Rope::new(Grid { frames, rows, columns }, dims, theta, 0, &Device::Cpu).unwrap();
        let (cos, sin) = rope.tables().unwrap();
        case.check("cos", &cos, &case.outputs[&format!("cos{n}")]);
        case.check("sin", &sin, &case.outputs[&format!("sin{n}")]);
        for name in ["q", "k"] {
            let x = case.inputs[&format!("{name}{n}")].squeeze(0).unwrap().transpose(0, 1).unwrap(); // (heads, L, d)
            let turned = rope.rotate(&x).unwrap().transpose(0, 1).unwrap().unsqueeze(0).unwrap();
            case.check(name, &turned, &case.outputs[&format!("{name}_rot{n}")]);
        }
    }
}

#[test]
fn embeddings_hold() {
    let case = Case::open("embeddings");
    let hidden = case.size("hidden");
    let t = case.inputs["t"].to_vec1::<f32>().unwrap();
    let width = case.outputs["temb"].dim(1).unwrap();
    case.check("temb", &timestep_embedding(&t, width, &Device::Cpu).unwrap(), &case.outputs["temb"]);
    let time = TimeEmbedder::load(&case.weights.pp("time")).unwrap();
    case.check("time", &time.forward(&t).unwrap(), &case.outputs["time"]);
    let vec = Embedder::load(&case.weights.pp("vec"), "in_layer", "out_layer").unwrap();
    case.check("vec", &vec.forward(&case.inputs["vec_in"]).unwrap(), &case.outputs["vec"]);
    let x = case.input("x", 0);
    case.holds("tokens", 0, &PatchEmbed::load(&case.weights.pp("patch")).unwrap().forward(&x).unwrap());
    let hid = case.input("hid", 0);
    case.holds("rms", 0, &qk_norm(&case.weights.pp("rms"), hidden).unwrap().forward(&hid).unwrap());
    case.holds("mlp", 0, &Mlp::load(&case.weights.pp("mlp"), hidden).unwrap().forward(&hid).unwrap());
    let last = FinalLayer::load(&case.weights.pp("final"), hidden).unwrap();
    let patches = last.forward(&hid, &case.inputs["vec"]).unwrap();
    case.holds("final", 0, &patches);
    case.holds("unpatchified", 0, &unpatchify(&patches, grid_of(&x).unwrap()).unwrap());
}

#[test]
fn every_norm_has_the_epsilon_of_its_place() {
    let case = Case::open("norm_eps");
    let hidden = case.size("hidden");
    let x = case.input("x", 0);
    for name in ["double_img_norm1", "double_txt_norm2", "single_pre_norm"] {
        case.holds(name, 0, &block_norm(&x).unwrap());
    }
    for name in ["refiner_norm1", "refiner_norm2"] {
        case.holds(name, 0, &refiner_norm(&case.weights.pp(name), hidden).unwrap().forward(&x).unwrap());
    }
    for name in ["audio_proj_norm", "adapter_norm1", "adapter_norm2"] {
        case.holds(name, 0, &audio_norm(&case.weights.pp(name), hidden).unwrap().forward(&x).unwrap());
    }
    case.holds("rms", 0, &qk_norm(&case.weights.pp("rms"), hidden).unwrap().forward(&x).unwrap());
    let last = FinalLayer::load(&case.weights.pp("final"), hidden).unwrap();
    case.holds("final", 0, &last.forward(&x, &case.inputs["vec"]).unwrap());
}

#[test]
fn token_refiner_holds_with_its_shifted_mask_and_without_one() {
    let case = Case::open("token_refiner");
    let refiner = TokenRefiner::load(&case.weights, case.size("heads")).unwrap();
    for b in 0..case.inputs["x"].dim(0).unwrap() {
        let (x, t) = (case.input("x", b), case.numbers("t", b)[0]);
        case.holds("out", b, &refiner.forward(&x, t, Some(&case.mask("mask", b))).unwrap());
        case.holds("out_nomask", b, &refiner.forward(&x, t, None).unwrap());
        let refused = refiner.forward(&x, t, Some(&vec![0; x.dim(0).unwrap()]));
        assert!(matches!(refused, Err(Error::Input { field: "text_mask", .. })));
    }
}

#[test]
fn audio_modules_hold() {
    let case = Case::open("audio_modules");
    let hidden = case.size("dim");
    let projection = AudioProjection::load(&case.weights.pp("proj"), hidden).unwrap();
    let adapter = AudioAdapter::load(&case.weights.pp("ca"), hidden).unwrap();
    for b in 0..case.inputs["audio"].dim(0).unwrap() {
        let tokens = projection.forward(&case.input("audio", b)).unwrap();
        case.holds("feats", b, &tokens);
        let grouped = group_frames(&tokens).unwrap();
        case.holds("grouped", b, &grouped);
        case.holds("adapter", b, &adapter.forward(&grouped, &case.input("latents", b)).unwrap());
    }
}

#[test]
fn face_gate_takes_every_second_latent() {
    let case = Case::open("face_mask_tokens");
    let gate = face_gate(&case.outputs["latent"].squeeze(1).unwrap()).unwrap();
    let frames = vec![gate; case.size("ot")];
    case.holds("tokens", 0, &Tensor::cat(&frames, 0).unwrap());
}

/// The last block sees the very same numbers, so the result is the same to the bit.
#[test]
fn a_cached_pass_at_the_same_time_equals_the_full_one() {
    let case = Case::open("dit_full");
    let transformer = transformer(&case);
    let mask = case.mask("text_mask", 0);
    let given = conditioning(&case, 0, &mask);
    let pass = transformer.predict(&case.input("x", 0), 700.0, &given, true).unwrap();
    let mut cache = FeatureCache::new();
    cache.store(&[5, 6, 0], pass.features.unwrap()).unwrap();
    let cached = transformer.predict_cached(&cache.get(&[5, 6, 0]).unwrap(), 700.0, &given).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&cached), values(&pass.velocity));
}

#[test]
fn one_reference_frame_equals_the_same_frame_repeated() {
    let case = Case::open("dit_full");
    let transformer = transformer(&case);
    let mask = case.mask("text_mask", 1);
    let mut given = conditioning(&case, 1, &mask);
    given.reference_latents = given.reference_latents.narrow(1, 0, 1).unwrap();
    let x = case.input("x", 1);
    let one = transformer.predict(&x, 500.0, &given, false).unwrap();
    assert!(one.features.is_none());
    given.reference_latents = given.reference_latents.repeat((1, x.dim(1).unwrap(), 1, 1)).unwrap();
    let repeated = transformer.predict(&x, 500.0, &given, false).unwrap();
    case.check("velocity", &one.velocity, &repeated.velocity);
}

#[test]
fn inputs_of_another_size_are_refused_by_name() {
    let case = Case::open("dit_full");
    let transformer = transformer(&case);
    let mask = case.mask("text_mask", 0);
    let given = conditioning(&case, 0, &mask);
    let x = case.input("x", 0);
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
    let case = Case::open("dit_full");
    let right: TransformerConfig = serde_json::from_value(case.config.clone()).unwrap();
    let refused = |config: TransformerConfig| match Transformer::load(&case.weights, &config) {
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
    assert!(Transformer::load(&case.weights, &least).is_ok());
}
