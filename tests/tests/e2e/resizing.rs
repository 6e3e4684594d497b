//! Pictures resized by Pillow and OpenCV (`tests/vectors/make_pillow.py`), against ours.

use std::{collections::BTreeMap, path::Path};

use model::image::{Rgb8, resize_bilinear, resize_cv2_linear, resize_lanczos};
use safetensors::SafeTensors;

type Resize = fn(&Rgb8, usize, usize) -> Rgb8;

/// How many results there are, and the largest difference in levels of any of them, with its name.
fn worst(filter: &str, resize: Resize) -> (usize, u8, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/pillow.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let pictures: BTreeMap<String, Rgb8> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let &[height, width, 3] = view.shape() else { panic!("{name}: {:?}", view.shape()) };
            (name, Rgb8::new(width, height, view.data().to_vec()).unwrap())
        })
        .collect();
    let (mut count, mut worst) = (0, (0, String::new()));
    for (name, wanted) in pictures.iter().filter(|(name, _)| name.split('/').nth(1) == Some(filter)) {
        let source = &pictures[name.split('/').next().unwrap()];
        let got = resize(source, wanted.width, wanted.height);
        assert_eq!((got.width, got.height, got.data.len()), (wanted.width, wanted.height, wanted.data.len()), "{name}");
        let levels = got.data.iter().zip(&wanted.data).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        count += 1;
        if levels >= worst.0 {
            worst = (levels, name.clone());
        }
    }
    (count, worst.0, worst.1)
}

#[test]
fn lanczos_equals_pillow_to_the_bit() {
    let (count, levels, name) = worst("lanczos", resize_lanczos);
    assert_eq!((count, levels), (37, 0), "{name}");
}

#[test]
fn bilinear_equals_pillow_to_the_bit() {
    let (count, levels, name) = worst("bilinear", resize_bilinear);
    assert_eq!((count, levels), (37, 0), "{name}");
}

/// OpenCV's own versions differ by a level.
#[test]
fn linear_is_within_a_level_of_opencv() {
    let (count, levels, name) = worst("cv2_linear", resize_cv2_linear);
    assert_eq!(count, 22);
    assert!(levels <= 1, "{name}: {levels} levels");
}
