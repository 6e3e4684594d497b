use std::path::{Path, PathBuf};

use candle_core::DType;

use super::*;
use crate::{
    audio::AudioEncoder,
    checkpoint::{Choice, Setup},
    diffusion::DiffusionStage,
    synth::{self, Depth, Options, Size},
    text::TextEncoder,
    weights::Weights,
};

fn open(models: &Path, stages: &[Stage]) -> Vec<Source> {
    stages.iter().map(|stage| Source::open(models, *stage, Choice::Auto).unwrap()).collect()
}

/// Converts into a new folder.
fn converted(models: &Path, stages: &[Stage], storage: Storage) -> (tempfile::TempDir, Vec<(Stage, Vec<Converted>)>) {
    let out = tempfile::tempdir().unwrap();
    let results = super::stages(&open(models, stages), storage, out.path(), &mut |_| ()).unwrap();
    (out, results)
}

fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    synth::tiny(folder.path(), 3).unwrap();
    folder
}

/// Every tensor's encoding and values.
fn values(weights: &Weights) -> BTreeMap<String, (Encoding, Vec<f32>)> {
    weights
        .list()
        .into_iter()
        .map(|listed| {
            let tensor = weights.get_as(&listed.shape, &listed.name, DType::F32).unwrap();
            (listed.name, (listed.encoding, tensor.flatten_all().unwrap().to_vec1().unwrap()))
        })
        .collect()
}

/// Largest difference, by the largest magnitude of what stands in one scale: a row of int8, a block of GGUF's, or
/// the tensor.
fn error(encoding: Encoding, before: &[f32], after: &[f32], columns: usize) -> f32 {
    let piece = match encoding {
        Encoding::I8 => columns,
        Encoding::F8E4M3 => before.len(),
        other => other.block().0,
    };
    // Below its normal numbers, half precision counts in steps of 2^-24.
    let free = if encoding == Encoding::F16 { 2f32.powi(-25) } else { 0.0 };
    let worst = |(before, after): (&[f32], &[f32])| {
        let scale = before.iter().fold(0f32, |m, v| m.max(v.abs()));
        let difference = before.iter().zip(after).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        if difference <= free { 0.0 } else { difference / scale }
    };
    before.chunks(piece).zip(after.chunks(piece)).map(worst).fold(0.0, f32::max)
}

/// How far a value may move, by the largest value beside it: half a step of the encoding where nothing else is said,
/// with what the rounding of scales adds.
fn bound(encoding: Encoding) -> f32 {
    match encoding {
        Encoding::F32 => 0.0,
        Encoding::F16 => 1.0 / 2048.0,
        Encoding::Bf16 => 1.0 / 256.0,
        // 16 of 448 for the byte, and a bf16's rounding of the product.
        Encoding::F8E4M3 => 1.0 / 25.0,
        // 1 of 254, and half precision's rounding of the scale.
        Encoding::I8 | Encoding::Q8_0 => 1.0 / 220.0,
        // The scales are chosen for the least squared error, so a value at an end may be a whole step away: 2 of 15,
        // and what the rounding of scale and minimum to 6 bits adds.
        Encoding::Q4K => 1.0 / 6.0,
        other => panic!("{} is not written", other.name()),
    }
}

#[test]
fn every_precision_keeps_the_values_within_its_step() {
    let models = tiny();
    let before = open(models.path(), &Stage::ALL);
    for storage in Storage::ALL {
        let (out, results) = converted(models.path(), &Stage::ALL, storage);
        let after = open(out.path(), &Stage::ALL);
        for ((before, after), (stage, results)) in before.iter().zip(&after).zip(&results) {
            for ((before, after), result) in before.parts.iter().zip(&after.parts).zip(results) {
                assert_eq!(inspect::structure(after), []);
                assert_eq!(inspect::values(after), []);
                let (old, new) = (values(&before.weights), values(&after.weights));
                assert_eq!(new.len(), result.tensors, "{}", stage.name());
                let mut quantised = 0;
                for (name, (encoding, after_values)) in &new {
                    let (own, before_values) = &old[name];
                    let shape = before.weights.shape(name).unwrap();
                    let columns = shape.last().copied().unwrap_or(1);
                    let target = storage.target(result.network, name, &shape, *own);
                    assert_eq!(target.encoding, *encoding, "{name}");
                    quantised += usize::from(!matches!(encoding, Encoding::F32 | Encoding::F16 | Encoding::Bf16));
                    // bf16 goes into f32 and bf16 without loss; f32 into f32.
                    let lossless = own == encoding || *encoding == Encoding::F32;
                    let allowed = if lossless { 0.0 } else { bound(*encoding) };
                    let found = error(*encoding, before_values, after_values, columns);
                    assert!(found <= allowed, "{storage}: {name}: {found}, the limit is {allowed}");
                }
                let large = result.network == Network::Transformer || result.network == Network::Llava;
                assert_eq!(quantised > 0, large && !storage.is_plain(), "{storage}: {}", result.network.name());
            }
        }
    }
}

#[test]
fn converted_stages_open_and_what_no_network_reads_is_left_out() {
    let models = tiny();
    for storage in [Storage::F16, Storage::Fp8, Storage::Int8, Storage::Q8_0] {
        let (out, results) = converted(models.path(), &Stage::ALL, storage);
        let setup = Setup::default();
        DiffusionStage::open(out.path(), &setup).unwrap();
        AudioEncoder::open(out.path(), &setup).unwrap();
        TextEncoder::open(out.path(), &setup).unwrap();
        crate::vae::VaeStage::open(out.path(), &setup).unwrap();
        crate::image::ImageEncoder::open(out.path(), &setup).unwrap();
        let (_, text) = results.iter().find(|(stage, _)| *stage == Stage::TextEncoder).unwrap();
        let left = &text[0].left_out;
        for name in [
            "language_model.lm_head.weight",
            "language_model.model.norm.weight",
            "language_model.model.layers.4.mlp.up_proj.weight",
            "vision_tower.vision_model.post_layernorm.bias",
            "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        ] {
            assert!(left.iter().any(|n| n == name), "{storage}: {name}");
        }
        assert!(!left.iter().any(|n| n.contains(".layers.2.")), "{left:?}");
    }
}

/// The text states of LLaVA count layers from the end, and the last ones are gone.
#[test]
fn a_converted_text_encoder_gives_the_same_states() {
    let models = tiny();
    let (out, _) = converted(models.path(), &[Stage::TextEncoder], Storage::F32);
    let picture = crate::image::Rgb8::new(8, 8, vec![90; 8 * 8 * 3]).unwrap();
    let states = |models: &Path| {
        let encoder = TextEncoder::open(models, &Setup::default()).unwrap();
        let states = encoder.encode("A person speaks.", &picture, 64, 64).unwrap().positive.states;
        states.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(states(models.path()), states(out.path()));
}

#[test]
fn what_is_in_the_precision_already_is_copied_to_the_bit() {
    let models = tiny();
    for storage in Storage::ALL {
        let (once, _) = converted(models.path(), &[Stage::Diffusion], storage);
        let (again, _) = converted(once.path(), &[Stage::Diffusion], storage);
        let file = Path::new("diffusion").join(storage.form(Network::Transformer).file_name());
        let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(&file)).unwrap();
        assert!(read(&once) == read(&again), "{storage}");
    }
}

/// Rows of 128 are no blocks of 256.
#[test]
fn rows_that_are_no_whole_blocks_fall_back_and_are_reported() {
    let models = tiny();
    let (_out, results) = converted(models.path(), &[Stage::Diffusion], Storage::Q4K);
    let result = &results[0].1[0];
    let fallback = |name: &str| result.fallbacks.iter().find(|(n, _)| n == name).map(|(_, encoding)| *encoding);
    assert_eq!(fallback("double_blocks.0.img_attn_qkv.weight"), Some("q8_0"));
    assert_eq!(fallback("double_blocks.0.img_mlp.fc2.weight"), None);
    assert_eq!(result.encodings["q4_k"] + result.encodings["q8_0"], 2 * 2 * 5 + 3 * 3);
}

#[test]
fn progress_ends_at_the_promised_totals() {
    let models = tiny();
    let out = tempfile::tempdir().unwrap();
    let (mut last, mut stages) = ((0, 0, 0, 0), Vec::new());
    let results = super::stages(&open(models.path(), &Stage::ALL), Storage::Int8, out.path(), &mut |p| {
        last = (p.tensors, p.tensors_total, p.bytes, p.bytes_total);
        if stages.last() != Some(&p.stage.to_owned()) {
            stages.push(p.stage.to_owned());
        }
    })
    .unwrap();
    assert_eq!((last.0, last.2), (last.1, last.3));
    assert_eq!(stages, Stage::ALL.map(Stage::name));
    let written: u64 = results.iter().flat_map(|(_, r)| r).map(|r| r.bytes).sum();
    assert_eq!(written, last.3);
}

fn tensors_file(models: &Path) -> PathBuf {
    models.join("diffusion/model.safetensors")
}

/// Rewrites the transformer's file with some of its tensors changed.
fn rewrite(models: &Path, change: impl Fn(&mut Vec<Job<Given>>)) {
    let source = Source::open(models, Stage::Diffusion, Choice::Auto).unwrap();
    let weights = &source.parts[0].weights;
    let mut jobs: Vec<Job<Given>> = weights
        .list()
        .into_iter()
        .map(|listed| {
            let tensor = weights.get_as(&listed.shape, &listed.name, DType::F32).unwrap();
            let rows = Given(tensor.flatten_all().unwrap().to_vec1().unwrap());
            Job { name: listed.name, shape: listed.shape, encoding: Encoding::F32, rows }
        })
        .collect();
    change(&mut jobs);
    let new = models.join("new");
    stream::write(Form::Safetensors, &new, &jobs, &mut |_, _| ()).unwrap();
    std::fs::rename(new, tensors_file(models)).unwrap();
}

/// Values of one row.
struct Given(Vec<f32>);

impl stream::Rows for Given {
    fn sides(&self) -> (usize, usize) {
        (1, self.0.len())
    }

    fn fill(&self, _: std::ops::Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.0);
    }
}

#[test]
fn every_fault_of_a_checkpoint_is_found_and_none_is_converted() {
    let models = tiny();
    rewrite(models.path(), |jobs| {
        jobs.retain(|job| job.name != "single_blocks.1.linear2.bias");
        for job in jobs.iter_mut() {
            match job.name.as_str() {
                "before_proj.bias" => {
                    job.shape = vec![64];
                    job.rows.0.truncate(64);
                }
                "vector_in.in_layer.bias" => job.name = "surprise".to_owned(),
                _ => {}
            }
        }
    });
    let sources = open(models.path(), &[Stage::Diffusion]);
    let faults = inspect::structure(&sources[0].parts[0]);
    let names: Vec<&str> = faults.iter().filter_map(|f| f.tensor.as_deref()).collect();
    assert_eq!(names, ["before_proj.bias", "vector_in.in_layer.bias", "single_blocks.1.linear2.bias", "surprise"]);
    let out = tempfile::tempdir().unwrap();
    let refused = super::stages(&sources, Storage::Fp8, out.path(), &mut |_| ()).unwrap_err().to_string();
    assert!(refused.contains("before_proj.bias") && refused.contains("3 more"), "{refused}");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn a_value_that_the_new_precision_cannot_hold_is_refused_by_its_tensors_name() {
    let models = tiny();
    rewrite(models.path(), |jobs| {
        let job = jobs.iter_mut().find(|job| job.name == "single_blocks.0.linear1.weight").unwrap();
        job.rows.0[77] = 1e6;
    });
    let refused = |storage| {
        let out = tempfile::tempdir().unwrap();
        super::stages(&open(models.path(), &[Stage::Diffusion]), storage, out.path(), &mut |_| ())
            .map(drop)
            .map_err(|e| e.to_string())
    };
    let reason = refused(Storage::F16).unwrap_err();
    assert!(reason.contains("single_blocks.0.linear1.weight") && reason.contains("f16"), "{reason}");
    refused(Storage::Bf16).unwrap();
    let mut bytes = std::fs::read(tensors_file(models.path())).unwrap();
    let at = bytes.windows(4).position(|b| b == 1e6f32.to_le_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(tensors_file(models.path()), bytes).unwrap();
    let faults = inspect::values(&open(models.path(), &[Stage::Diffusion])[0].parts[0]);
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].tensor.as_deref(), Some("single_blocks.0.linear1.weight"));
    for storage in Storage::ALL {
        let reason = refused(storage).unwrap_err();
        assert!(reason.contains("single_blocks.0.linear1.weight") && reason.contains("not finite"), "{reason}");
    }
}

/// One double and one single block of the published widths: 1.0 billion values. Memory is held by a test of the
/// command; here the forms are.
#[test]
fn a_full_width_transformer_converts_and_loads() {
    let models = tempfile::tempdir().unwrap();
    let depth = Depth { double_blocks: 1, single_blocks: 1, llama_layers: 3 };
    let options = Options { size: Size::Full(depth), storage: Storage::Fp8, stages: vec![Stage::Diffusion], seed: 1 };
    let made = synth::write(&options, models.path(), &mut |_| ()).unwrap();
    assert_eq!(made[0].1[0].encodings["fp8"], 10 + 3);
    let (out, results) = converted(models.path(), &[Stage::Diffusion], Storage::Q4K);
    assert_eq!(results[0].1[0].encodings["q4_k"], 10 + 3);
    assert_eq!(results[0].1[0].fallbacks, []);
    let source = &open(out.path(), &[Stage::Diffusion])[0];
    assert_eq!(inspect::structure(&source.parts[0]), []);
    // One row, from fp8 to 16 levels.
    let name = "single_blocks.0.linear2.weight";
    let row = |models: &Path| {
        let source = &open(models, &[Stage::Diffusion])[0];
        let weights = &source.parts[0].weights;
        let matrix = weights.matrix(3072, 15_360, name).unwrap();
        matrix.panel(2000..2001, &mut Vec::new()).to_vec()
    };
    let found = error(Encoding::Q4K, &row(models.path()), &row(out.path()), 15_360);
    assert!(found < bound(Encoding::Q4K), "{found}");
}
