//! Detectors from ONNX files, on networks whose answers are known; `tests/vectors/make_face_onnx.py` made them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{face::largest, *};

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors").join(name)
}

const RED: [u8; 3] = [255, 0, 0];

/// Black, with boxes `(x, y, width, height)` of a colour.
fn picture(width: usize, height: usize, boxes: &[([usize; 4], [u8; 3])]) -> Rgb8 {
    let mut data = vec![0; width * height * 3];
    for ([x, y, w, h], colour) in boxes {
        for (row, column) in (*y..y + h).flat_map(|row| (*x..x + w).map(move |column| (row, column))) {
            data[(row * width + column) * 3..][..3].copy_from_slice(colour);
        }
    }
    Rgb8::new(width, height, data).unwrap()
}

fn found(name: &str, picture: &Rgb8) -> Vec<[f64; 4]> {
    let faces = FaceNetwork::open(&vector(name)).unwrap().detect(picture).unwrap();
    faces.iter().map(|f| [f.x, f.y, f.width, f.height].map(|v| (v * 100.0).round() / 100.0)).collect()
}

fn refusal(file: &Path) -> String {
    FaceNetwork::open(file).unwrap_err().to_string()
}

#[test]
fn an_ultraface_network_finds_faces_in_parts_of_the_picture() {
    let seen = picture(64, 48, &[([32, 16, 16, 16], RED), ([0, 0, 16, 16], RED), ([16, 32, 16, 16], [0, 0, 255])]);
    assert_eq!(found("face_ultraface.onnx", &seen), [[0.0, 0.0, 32.0, 32.0], [32.0, 16.0, 16.0, 16.0]]);
    // The aspect is not kept, and the boxes follow the picture's sides.
    let wide = picture(128, 48, &[([64, 16, 32, 16], RED)]);
    assert_eq!(found("face_ultraface.onnx", &wide), [[64.0, 16.0, 32.0, 16.0]]);
    assert!(found("face_ultraface.onnx", &picture(64, 48, &[([0, 0, 64, 48], [255; 3])])).is_empty());
}

#[test]
fn a_yunet_network_finds_faces_at_its_strides_and_keeps_the_aspect() {
    let seen = picture(64, 64, &[([32, 16, 16, 16], RED), ([0, 48, 16, 16], [0, 0, 255])]);
    assert_eq!(found("face_yunet.onnx", &seen), [[28.0, 16.0, 24.0, 16.0]]);
    // Shown at half its size, in the upper left.
    let wide = picture(128, 64, &[([64, 32, 32, 32], RED)]);
    assert_eq!(found("face_yunet.onnx", &wide), [[56.0, 32.0, 48.0, 32.0]]);
}

#[test]
fn an_scrfd_network_of_any_size_sees_the_picture_in_640_pixels() {
    let seen = picture(320, 160, &[([40, 24, 8, 8], RED), ([80, 80, 8, 8], [0, 255, 0])]);
    let network = FaceNetwork::open(&vector("face_scrfd.onnx")).unwrap();
    let faces = network.detect(&seen).unwrap();
    let [face] = &faces[..] else { panic!("{faces:?}") };
    assert_eq!([face.x, face.y, face.width, face.height].map(f64::round), [38.0, 21.0, 12.0, 14.0]);
    // The better of the two candidates of the cell; the larger picture is blurred at the square's edge.
    assert!((0.85..0.95).contains(&face.score.unwrap()), "{face:?}");
}

#[test]
fn the_references_family_sees_the_references_size_and_gives_the_faces_largest_first() {
    // 208x224 is seen at 416x448, and 640x416 where the file fixes it; the third candidate scores too little.
    let seen = |colour| picture(208, 224, &[([0, 0, 208, 224], colour)]);
    assert_eq!(found("face_any_size.onnx", &seen([0; 3])), [[40.0, 90.0, 20.0, 20.0], [145.0, 55.0, 10.0, 10.0]]);
    assert_eq!(found("face_any_size.onnx", &seen(RED))[0], [25.0, 90.0, 50.0, 20.0]);
    let fixed = found("face_fixed_size.onnx", &seen([0; 3]));
    let expected = [100.0 - 20.0, 200.0 - 20.0, 40.0, 40.0];
    let scale = [208.0 / 640.0, 224.0 / 416.0, 208.0 / 640.0, 224.0 / 416.0];
    for i in 0..4 {
        assert!((fixed[0][i] - expected[i] * scale[i]).abs() < 0.01, "{fixed:?}");
    }
}

#[test]
fn the_largest_face_of_a_network_is_chosen_and_all_are_given() {
    let seen = picture(64, 48, &[([32, 16, 16, 16], RED), ([0, 0, 16, 16], RED)]);
    let detector = Detector::open(Some(&vector("face_ultraface.onnx"))).unwrap();
    let faces = detector.detect(&seen).unwrap();
    assert_eq!((faces.len(), largest(&faces).unwrap().width), (2, 32.0));
}

#[test]
fn a_network_of_another_form_is_refused_with_what_was_found_and_what_is_expected() {
    let other = refusal(&vector("face_other_output.onnx"));
    for part in
        ["face_other_output.onnx", "\"picture\" [1, 3, ?, ?]", "\"faces\" [1, 3, 15]", "UltraFace", "YuNet", "SCRFD"]
    {
        assert!(other.contains(part), "{part}: {other}");
    }
    let two = refusal(&vector("face_two_inputs.onnx"));
    assert!(two.contains("\"picture\" [1, 3, ?, ?], \"grid\" [1, 1, 2, 2]") && two.contains("one input"), "{two}");
}

#[test]
fn a_pytorch_file_is_known_and_the_way_out_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let torch = folder.path().join("det_align/detface.pt");
    assert_eq!(unused_detector(folder.path()), None);
    fs::create_dir(folder.path().join("det_align")).unwrap();
    for start in [&b"PK\x03\x04 and more"[..], b"\x80\x02}q\x00"] {
        fs::write(&torch, start).unwrap();
        for path in [torch.as_path(), folder.path()] {
            let error = refusal(path);
            for way in ["detface.pt", "export it to ONNX", "--face-model", "--face X,Y,W,H", "built-in detector"] {
                assert!(error.contains(way), "{error}");
            }
        }
    }
    assert!(unused_detector(folder.path()).unwrap().contains("detface.pt is a PyTorch file"));
}

#[test]
fn no_file_and_no_onnx_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("face.onnx");
    assert!(refusal(&file).contains("face.onnx"));
    assert!(refusal(folder.path()).contains("this is a folder"));
    assert!(refusal(Path::new("/dev/zero")).contains("no regular file"));
    for nonsense in [&b""[..], b"not a network", b"\x89PNG\r\n\x1a\n", &[0xff; 100], &[0; 4096]] {
        fs::write(&file, nonsense).unwrap();
        assert!(refusal(&file).contains("it is no ONNX file"), "{}", refusal(&file));
    }
    // As long as is said, with nothing in it.
    fs::File::create(&file).unwrap().set_len((256 << 20) + 1).unwrap();
    assert!(refusal(&file).contains("the limit"), "{}", refusal(&file));
}

#[test]
fn files_that_are_cut_or_spoilt_anywhere_are_refused_or_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("face.onnx");
    let seen = picture(32, 32, &[]);
    for name in ["face_ultraface.onnx", "face_yunet.onnx"] {
        let good = fs::read(vector(name)).unwrap();
        for at in (0..good.len()).step_by(3) {
            let mut spoilt = good.clone();
            spoilt[at] ^= 0x7f;
            for bytes in [&good[..at], &spoilt] {
                fs::write(&file, bytes).unwrap();
                if let Ok(network) = FaceNetwork::open(&file) {
                    let _ = network.detect(&seen);
                }
            }
        }
    }
}
