//! The reference cases, and what holds beyond them.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::{
    face::{FaceBox, Postprocess},
    *,
};

struct Case {
    json: Value,
    inputs: HashMap<String, Tensor>,
    outputs: HashMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name);
        let load = |file: &str| candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap();
        let json = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        Self { json, inputs: load("inputs.safetensors"), outputs: load("outputs.safetensors") }
    }

    fn size(&self, key: &str) -> usize {
        self.json[key].as_u64().unwrap() as usize
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let tensor = &self.outputs[name];
        tensor.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn holds(&self, name: &str, got: &[f64]) {
        let wanted = self.values(name);
        assert_eq!(got.len(), wanted.len(), "{name}");
        let tolerance = self.json["tolerance_max_rel"].as_f64().unwrap();
        let limit = tolerance * wanted.iter().fold(0f64, |max, v| max.max(v.abs()));
        for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            assert!((got - wanted).abs() <= limit, "{name}[{i}]: {got}, not {wanted}");
        }
    }

    /// Pixels, and the largest difference in levels.
    fn levels(&self, name: &str, got: &Rgb8) -> f64 {
        assert_eq!(self.outputs[name].dims(), [got.height, got.width, 3], "{name}");
        let wanted = self.values(name);
        got.data.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn pair(value: &Value) -> (usize, usize) {
    (value[0].as_u64().unwrap() as usize, value[1].as_u64().unwrap() as usize)
}

fn face_of(values: &[f64]) -> FaceBox {
    FaceBox { x: values[0], y: values[1], width: values[2], height: values[3], score: None }
}

#[test]
fn the_case_of_picture_operations_holds_to_the_bit() {
    let case = Case::open("image_ops");
    let pixels = case.inputs["image"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let picture = Rgb8::new(case.size("w"), case.size("h"), pixels).unwrap();
    for (i, size) in case.json["lanczos_wh"].as_array().unwrap().iter().enumerate() {
        let (w, h) = pair(size);
        assert_eq!(case.levels(&format!("lanczos{i}"), &resize_lanczos(&picture, w, h)), 0.0);
    }
    let (w, h) = pair(&case.json["bilinear_wh"]);
    assert_eq!(case.levels("bilinear", &resize_bilinear(&picture, w, h)), 0.0);
    let llava = llava_pixels(&picture, w).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    case.holds("llava_pixels", &wide(&llava));
    let (w, h) = pair(&case.json["cv2_wh"]);
    let levels = case.levels("cv2_linear", &resize_cv2_linear(&picture, w, h));
    assert!(levels <= case.json["max_abs_levels"].as_f64().unwrap(), "{levels} levels");
}

#[test]
fn the_case_of_face_boxes_holds() {
    let case = Case::open("face_mask_box");
    for (name, tensor) in &case.inputs {
        let values = tensor.to_vec1::<f64>().unwrap();
        let face = values.iter().any(|v| *v != -1.0).then(|| face_of(&values));
        let mask = face::mask(face.as_ref(), case.size("W"), case.size("H"));
        case.holds(&name.replace("box", "mask"), &wide(&mask));
    }
}

#[test]
fn the_case_of_face_tokens_holds() {
    let case = Case::open("face_mask_tokens");
    let (width, height) = (case.size("W"), case.size("H"));
    let mask = case.inputs["mask"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let latent = face::latent_mask(&mask, width, height);
    case.holds("latent", &wide(&latent));
    case.holds("tokens", &wide(&face::token_gate(&latent, width / 8, height / 8, case.size("ot"))));
}

#[test]
fn the_case_of_face_detection_holds() {
    let case = Case::open("face_detect_post");
    let candidates = case.inputs["pred"].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let network = &case.json["net_input_shape"];
    let rule = Postprocess {
        confidence: case.json["conf"].as_f64().unwrap() as f32,
        overlap: case.json["iou"].as_f64().unwrap() as f32,
        network: pair(&serde_json::json!([network[3], network[2]])),
        picture: (case.size("W"), case.size("H")),
    };
    assert_eq!(face::network_size(case.size("W"), case.size("H")), rule.network);
    let found = face::postprocess(&candidates, &rule);
    let corners = |face: &FaceBox| [face.x, face.y, face.width, face.height];
    let faces: Vec<FaceBox> = found.iter().map(|d| d.face).collect();
    case.holds("boxes_xywh", &faces.iter().flat_map(corners).collect::<Vec<_>>());
    case.holds("scores", &faces.iter().filter_map(|f| f.score).collect::<Vec<_>>());
    let points: Vec<f64> = found.iter().flat_map(|d| d.landmarks.as_flattened().to_vec()).collect();
    case.holds("landmarks", &points);
    case.holds("largest", &corners(face::largest_of_reference(&faces).unwrap()));
}

/// The reference compares with the first face only and so can miss the largest of three; the product does not.
#[test]
fn the_largest_face_is_chosen_by_true_area() {
    let faces = [2.0, 5.0, 3.0].map(|side| face_of(&[0.0, 0.0, side, side]));
    assert_eq!(face::largest(&faces).unwrap().width, 5.0);
    assert_eq!(face::largest_of_reference(&faces).unwrap().width, 3.0);
    assert_eq!(face::largest_of_reference(&faces[..2]).unwrap().width, 5.0);
    assert!(face::largest(&[]).is_none() && face::largest_of_reference(&[]).is_none());
}

#[test]
fn a_resize_to_the_same_size_changes_nothing() {
    let picture = gradient(37, 23);
    assert_eq!(resize_lanczos(&picture, 37, 23), picture);
    assert_eq!(resize_bilinear(&picture, 37, 23), picture);
    assert_eq!(resize_cv2_linear(&picture, 37, 23), picture);
}

#[test]
fn a_flat_picture_stays_flat_at_every_size() {
    let picture = Rgb8::new(19, 31, [7, 131, 255].repeat(19 * 31)).unwrap();
    for (w, h) in [(1, 1), (2, 64), (97, 3), (300, 500), (18, 32)] {
        for resized in
            [resize_lanczos(&picture, w, h), resize_bilinear(&picture, w, h), resize_cv2_linear(&picture, w, h)]
        {
            assert_eq!(resized.data, [7, 131, 255].repeat(w * h), "{w}x{h}");
        }
    }
}

#[test]
fn pixels_of_another_number_are_refused() {
    assert!(Rgb8::new(2, 2, vec![0; 11]).is_err());
    assert!(Rgb8::new(0, 2, vec![]).is_err());
    assert!(Rgb8::new(usize::MAX, 3, vec![0; 3]).is_err());
}

fn gradient(width: usize, height: usize) -> Rgb8 {
    let data = (0..width * height).flat_map(|i| [i % width * 255 / width, i / width * 255 / height, i % 256]);
    Rgb8::new(width, height, data.map(|v| v as u8).collect()).unwrap()
}

#[test]
fn pictures_without_a_face_have_none() {
    for (w, h) in [(1, 1), (30, 2000), (64, 64), (200, 150)] {
        assert_eq!(face::detect(&gradient(w, h)), []);
    }
}

mod stage {
    use super::*;
    use crate::vae::VaeConfig;

    fn open(models: &std::path::Path) -> ImageEncoder {
        let folder = models.join("image-encoder");
        std::fs::create_dir(&folder).unwrap();
        let case = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/vae_causal_attn");
        std::fs::copy(case.join("weights.safetensors"), folder.join("model.safetensors")).unwrap();
        let config: VaeConfig = serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
        std::fs::write(folder.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        ImageEncoder::open(models, &crate::checkpoint::Setup::default()).unwrap()
    }

    #[test]
    fn a_given_face_is_kept_and_moves_its_part_of_the_picture() {
        let folder = tempfile::tempdir().unwrap();
        let stage = open(folder.path());
        let face = face_of(&[10.0, 10.0, 20.0, 20.0]);
        let reference = stage.encode(&gradient(200, 300), 64, 96, Some(face)).unwrap();
        assert_eq!(reference.latents.dims(), [4, 1, 12, 8]);
        assert_eq!(reference.face_mask.dims(), [1, 1, 12, 8]);
        assert_eq!(reference.face, Some(face));
        assert!(reference.faces.is_empty());
        let mask = reference.face_mask.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((mask[0], mask[95]), (1.0, 0.0));
        let latents = reference.latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(latents.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn without_a_face_all_of_the_picture_moves() {
        let folder = tempfile::tempdir().unwrap();
        let reference = open(folder.path()).encode(&gradient(80, 80), 32, 32, None).unwrap();
        assert_eq!(reference.face, None);
        assert_eq!(reference.face_mask.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.0; 16]);
    }

    #[test]
    fn sizes_and_faces_that_do_not_fit_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let stage = open(folder.path());
        let picture = gradient(80, 80);
        for (w, h) in [(0, 32), (40, 32), (32, 8)] {
            assert!(matches!(stage.encode(&picture, w, h, None), Err(Error::Input { field: "width" | "height", .. })));
        }
        for face in [[0., 0., 0., 5.], [90., 0., 5., 5.], [f64::NAN, 0., 5., 5.], [-9., 0., 5., 5.]] {
            let result = stage.encode(&picture, 32, 32, Some(face_of(&face)));
            assert!(matches!(result, Err(Error::Input { field: "face", .. })), "{face:?}");
        }
    }
}
