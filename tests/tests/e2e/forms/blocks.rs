//! Transformer and Llama in GGUF's block forms, in networks so wide that their rows are whole blocks of 256.

use std::{fs, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use model::blueprint::{LlavaSizes, Network, Spec, TransformerSizes};
use tempfile::TempDir;

use super::{
    official::{json, native, save},
    output,
    outputs::{drift, text, velocity},
    sheet::{Plain, Sheet, read, write},
};

/// The forms, and twice the drifts that were measured of velocity and text states.
const FORMS: [(GgmlDType, [f64; 2]); 5] = [
    (GgmlDType::Q8_0, [2.3e-3, 2.3e-2]),
    (GgmlDType::Q6K, [7.8e-3, 7.8e-2]),
    (GgmlDType::Q5K, [1.6e-2, 1.6e-1]),
    (GgmlDType::Q4K, [3.2e-2, 3.1e-1]),
    (GgmlDType::Q4_0, [3.9e-2, 3.8e-1]),
];

/// The tiny checkpoint with a wider transformer and a wider Llama, in bf16.
fn wide() -> TempDir {
    let models = native();
    let diffusion = models.path().join("diffusion");
    let sizes = TransformerSizes {
        hidden: 256,
        head: 32,
        inner: 512,
        double: 2,
        single: 3,
        refiner_inner: 512,
        text: 64,
        pooled: 64,
        audio: 10 * 5 * 64,
        audio_inner: 64,
        adapters: 1,
        adapter: 64,
        ..TransformerSizes::PUBLISHED
    };
    write(&diffusion.join("model.safetensors"), &sheet(&sizes.tensors()));
    let mut config = json(&diffusion.join("config.json"));
    config["hidden_size"] = 256.into();
    config["num_heads"] = 8.into();
    save(&diffusion.join("config.json"), &config);

    let llava = models.path().join("text-encoder/llava/model.safetensors");
    let words = read(&llava)["language_model.model.embed_tokens.weight"].shape[0];
    let sizes = LlavaSizes {
        vision: 64,
        vision_inner: 128,
        vision_layers: 4,
        vision_positions: 17,
        projector: 64,
        words,
        width: 256,
        keys: 128,
        inner: 512,
        layers: 5,
        ..LlavaSizes::PUBLISHED
    };
    write(&llava, &sheet(&sizes.tensors()));
    models
}

fn sheet(specs: &[Spec]) -> Sheet {
    let plain = |spec: &Spec| Plain::bf16(&spec.shape, &model::synth::values_of(spec, 1));
    specs.iter().map(|spec| (spec.name.clone(), plain(spec))).collect()
}

/// Writes a network's tensors with its large layers in a block form and everything else as it was.
pub fn write_gguf(file: &Path, network: Network, sheet: &Sheet, form: GgmlDType) {
    let stored = |(name, plain): (&String, &Plain)| {
        let tensor = Tensor::from_vec(plain.values(), plain.shape.as_slice(), &Device::Cpu).unwrap();
        let form = if network.quantises(name, &plain.shape) { form } else { GgmlDType::F32 };
        (name.clone(), QTensor::quantize(&tensor, form).unwrap())
    };
    let tensors: Vec<(String, QTensor)> = sheet.iter().map(stored).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let architecture = Value::String("hyvid".to_owned());
    let mut out = fs::File::create(file).unwrap();
    gguf_file::write(&mut out, &[("general.architecture", &architecture)], &named).unwrap();
}

/// The files are written by another implementation of the format.
#[test]
fn transformer_and_llama_in_every_block_form_of_gguf_stay_near() {
    let models = wide();
    let runs = [velocity, text];
    let exact = runs.map(|run| output(run, models.path()));
    let networks =
        [("diffusion", Network::Transformer), ("text-encoder/llava", Network::Llava)].map(|(folder, network)| {
            let folder = models.path().join(folder);
            let sheet = read(&folder.join("model.safetensors"));
            fs::remove_file(folder.join("model.safetensors")).unwrap();
            (folder.join("model.gguf"), network, sheet)
        });
    for (form, bounds) in FORMS {
        for (file, network, sheet) in &networks {
            write_gguf(file, *network, sheet, form);
        }
        for ((run, exact), bound) in runs.iter().zip(&exact).zip(bounds) {
            let drift = drift(&output(*run, models.path()), exact);
            println!("{form:?}: {drift:.2e} of {bound:.1e}");
            assert!(drift > 0.0 && drift < bound, "{form:?}: {drift:e}, expected up to {bound:e}");
        }
    }
}
