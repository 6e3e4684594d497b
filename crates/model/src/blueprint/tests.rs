use std::path::Path;

use candle_core::{DType, Device};

use super::*;
use crate::convert::{Storage, stored_bytes};

fn count(tensors: &[Spec]) -> (usize, usize) {
    (tensors.len(), tensors.iter().map(Spec::parameters).sum())
}

fn vae() -> Vec<Spec> {
    let sizes = VaeSizes::published();
    [sizes.tensors(VaeHalf::Encoder), sizes.tensors(VaeHalf::Decoder)].concat()
}

/// The counts that the published networks have when they are built without values.
#[test]
fn the_published_networks_have_their_tensors_and_parameters() {
    for (name, tensors, counts) in [
        ("transformer", TransformerSizes::PUBLISHED.tensors(), (946, 12_991_493_184)),
        ("vae", vae(), (248, 246_478_803)),
        ("whisper", WhisperSizes::PUBLISHED.tensors(), (67, 8_208_384)),
        ("clip", ClipSizes::PUBLISHED.tensors(), (196, 123_060_480)),
        ("llava", LlavaSizes::PUBLISHED.tensors(), (686, 8_355_272_704)),
    ] {
        assert_eq!(count(&tensors), counts, "{name}");
    }
    // 30 layers without head and final normalisation; the vision tower whole.
    let llama = LlavaSizes { vision_layers: 24, ..LlavaSizes::NEEDED }.tensors();
    let norm = 2 * 1024;
    assert_eq!(count(&llama).1 + norm, 7_393_445_888);
    assert_eq!(count(&LlavaSizes::NEEDED.tensors()).1, 7_380_847_616);
}

#[test]
fn parts_of_the_transformer_have_their_parameters() {
    let tensors = TransformerSizes::PUBLISHED.tensors();
    let part = |prefix: &str| -> usize {
        tensors.iter().filter(|spec| spec.name.starts_with(prefix)).map(Spec::parameters).sum()
    };
    for (prefix, parameters) in [
        ("double_blocks.", 6_796_625_920),
        ("double_blocks.7.", 339_831_296),
        ("single_blocks.", 5_663_672_320),
        ("single_blocks.39.", 141_591_808),
        ("txt_in.", 309_175_296),
        ("audio_adapter_blocks.", 125_952_000),
        ("audio_proj.", 33_312_768),
        ("final_layer.", 19_077_184),
        ("vector_in.", 11_802_624),
        ("time_in.", 10_229_760),
        ("fps_proj.", 10_229_760),
        ("before_proj.", 9_440_256),
        ("motion_exp.", 787_968),
        ("img_in.", 199_680),
    ] {
        assert_eq!(part(prefix), parameters, "{prefix}");
    }
    let large: Vec<&Spec> =
        tensors.iter().filter(|spec| Network::Transformer.quantises(&spec.name, &spec.shape)).collect();
    let parameters: usize = large.iter().map(|spec| spec.parameters()).sum();
    assert_eq!((large.len(), parameters), (320, 12_457_082_880));
    let vae: Vec<Spec> = vae();
    let half =
        |prefix: &str| -> usize { vae.iter().filter(|spec| spec.name.starts_with(prefix)).map(Spec::parameters).sum() };
    let halves = [half("encoder."), half("decoder."), half("quant_conv."), half("post_quant_conv.")];
    assert_eq!(halves, [100_341_408, 146_136_067, 1_056, 272]);
}

/// GB (1e9 bytes) of a network in a precision.
fn gigabytes(storage: Storage, network: Network, tensors: &[Spec]) -> f64 {
    let bytes = |spec: &Spec| {
        let target = storage.target(network, &spec.name, &spec.shape, crate::weights::Encoding::Bf16);
        assert!(!target.fallback, "{} in {storage}", spec.name);
        stored_bytes(target.encoding, &spec.shape)
    };
    tensors.iter().map(bytes).sum::<u64>() as f64 / 1e9
}

/// The published figures are rounded to two digits, those of the text encoder to one.
#[test]
fn weights_take_the_published_number_of_bytes() {
    let transformer = TransformerSizes::PUBLISHED.tensors();
    for (storage, expected) in
        [(Storage::Bf16, 25.98), (Storage::Fp8, 13.53), (Storage::Int8, 13.53), (Storage::Q4K, 8.08)]
    {
        let found = gigabytes(storage, Network::Transformer, &transformer);
        assert!((found - expected).abs() < 0.01, "{storage}: {found} GB, expected {expected}");
    }
    // The published figures have the vision tower's products in 8 and 4 bits too; here they stay in 16.
    let llava = LlavaSizes { vision_layers: 24, ..LlavaSizes::NEEDED }.tensors();
    let vision = 24.0 * (4 * 1024 * 1024 + 2 * 4096 * 1024) as f64 / 1e9;
    for (storage, bits, expected) in
        [(Storage::Bf16, 16.0, 14.79), (Storage::Fp8, 8.0, 7.9), (Storage::Int8, 8.0, 7.9), (Storage::Q4K, 4.5, 4.9)]
    {
        let found = gigabytes(storage, Network::Llava, &llava) - vision * (16.0 - bits) / 8.0;
        assert!((found - expected).abs() < 0.06, "{storage}: {found} GB, expected {expected}");
    }
    let (vae, clip, whisper) = (vae(), ClipSizes::PUBLISHED.tensors(), WhisperSizes::PUBLISHED.tensors());
    for (storage, network, tensors, expected) in [
        (Storage::Bf16, Network::VaeDecoder, &vae, 0.49),
        (Storage::F32, Network::VaeDecoder, &vae, 0.99),
        (Storage::Bf16, Network::Clip, &clip, 0.25),
        (Storage::F16, Network::Whisper, &whisper, 0.016),
        (Storage::F32, Network::Whisper, &whisper, 0.033),
    ] {
        let found = gigabytes(storage, network, tensors);
        assert!((found - expected).abs() < 0.005, "{storage}: {found} GB, expected {expected}");
    }
}

/// The reference's own instances, of other widths and depths.
#[test]
fn a_checkpoint_of_any_size_is_described_by_its_own_tensors() {
    let text = LlavaConfig { layers: None, vision_layers: None, ..LlavaConfig::default() };
    for (case, config, skipped) in [
        ("dit_full", Config::Transformer(TransformerConfig::default()), 0),
        ("whisper_encoder", Config::Whisper(AudioConfig::default()), 0),
        ("clip_text", Config::Clip(ClipConfig::default()), 0),
        ("llava_text", Config::Llava(Box::new(text)), 37),
    ] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(case);
        let file = folder.join("weights.safetensors");
        let named = |name: &str| Some(name.to_owned());
        let weights = crate::weights::Weights::open_files(&folder, &[file], &named, DType::F32, &Device::Cpu).unwrap();
        let found: Shapes = weights.list().into_iter().map(|t| (t.name, t.shape)).collect();
        let expected = config.expected(&found).unwrap();
        for spec in &expected {
            assert_eq!(found.get(&spec.name), Some(&spec.shape[..]), "{case}: {}", spec.name);
        }
        let rest: Vec<&str> =
            found.iter().map(|(name, _)| name).filter(|name| expected.iter().all(|spec| spec.name != *name)).collect();
        assert!(rest.iter().all(|name| config.network().may_skip(name)), "{case}: {rest:?}");
        assert_eq!(rest.len(), skipped, "{case}: {rest:?}");
    }
}

#[test]
fn a_block_with_an_absurd_number_costs_nothing() {
    let found: Shapes = [("double_blocks.4000000000.x".to_owned(), vec![1]), ("double_blocks.2.x".to_owned(), vec![1])]
        .into_iter()
        .collect();
    assert_eq!(found.blocks("double_blocks"), 3);
    assert!(found.depth("double_blocks", Some(usize::MAX)).is_err());
}
