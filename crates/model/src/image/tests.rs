//! What holds beyond the reference cases and the vectors of Pillow.

use super::{face::FaceBox, *};

fn face_of(values: &[f64]) -> FaceBox {
    FaceBox { x: values[0], y: values[1], width: values[2], height: values[3], score: None }
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

/// Channels are alike, so changing their order before or after is the same.
#[test]
fn no_channel_reads_another() {
    let swapped = |picture: Rgb8| {
        let data = picture.data.as_chunks::<3>().0.iter().flat_map(|[r, g, b]| [*b, *r, *g]).collect();
        Rgb8 { data, ..picture }
    };
    let picture = gradient(37, 23);
    for resize in [resize_lanczos, resize_bilinear, resize_cv2_linear] {
        assert_eq!(resize(&swapped(picture.clone()), 17, 41), swapped(resize(&picture, 17, 41)));
    }
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
    use crate::{golden::Golden, vae::VaeConfig};

    fn open(models: &std::path::Path) -> ImageEncoder {
        let folder = models.join("image-encoder");
        std::fs::create_dir(&folder).unwrap();
        let case = Golden::open("vae_causal_attn");
        std::fs::copy(case.weights_file(), folder.join("model.safetensors")).unwrap();
        let config: VaeConfig = serde_json::from_value(case.config).unwrap();
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
