//! A face detector from an ONNX file, at every door that takes one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    inputs::tone,
    processes::{client, requests, spec},
    stack::{Process, avatar, binary, own_models, text, tiny_models},
};

/// Made by `tests/vectors/make_face_onnx.py`: a red cell of 16 pixels is a face, 24 wide and 16 high around its middle.
fn detector() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/face_yunet.onnx").to_str().unwrap().to_owned()
}

/// Black, 64 by 64 pixels, with a red cell at (32, 16); no person would see a face in it.
fn picture(folder: &Path) -> PathBuf {
    let (raw, png) = (folder.join("square.raw"), folder.join("square.png"));
    let pixel =
        |i: usize| if (32..48).contains(&(i % 64)) && (16..32).contains(&(i / 64)) { [255, 0, 0] } else { [0; 3] };
    fs::write(&raw, (0..64 * 64).flat_map(pixel).collect::<Vec<u8>>()).unwrap();
    let made = Command::new("ffmpeg")
        .args(["-y", "-v", "error", "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", "64x64", "-i"])
        .arg(&raw)
        .args(["-pix_fmt", "rgb24"])
        .arg(&png)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    png
}

/// The exit status and the events of one generation from the tiny models.
fn generate(folder: &Path, more: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, Vec<Value>) {
    generate_from(&tiny_models(), folder, more, environment)
}

fn generate_from(
    models: &Path,
    folder: &Path,
    more: &[&str],
    environment: &[(&str, &str)],
) -> (Option<i32>, Vec<Value>) {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    fs::write(path("speech.wav"), tone(0.2, 16_000)).unwrap();
    let done = Command::new(binary("avatar"))
        .args(["generate", "--image", picture(folder).to_str().unwrap(), "--audio", &path("speech.wav"), "--json"])
        .args(["--models", models.to_str().unwrap(), "--size", "64", "--steps", "1", "--out", &path("a.mp4")])
        .args(more)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let events = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (done.status.code(), events)
}

fn face(events: &[Value]) -> Option<&Value> {
    events.iter().map(|event| &event["face"]).find(|face| face.is_object())
}

#[test]
fn the_network_of_the_flag_or_of_the_environment_finds_the_face_and_the_built_in_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = detector();
    let by_flag = generate(folder.path(), &["--face-model", &file], &[]);
    let by_environment = generate(folder.path(), &[], &[("AVATAR_FACE_MODEL", file.as_str())]);
    for (code, events) in [by_flag, by_environment] {
        assert_eq!(code, Some(0), "{events:?}");
        let face = face(&events).unwrap_or_else(|| panic!("{events:?}"));
        let side = |name: &str| face[name].as_f64().unwrap().round();
        assert_eq!(["x", "y", "width", "height"].map(side), [28.0, 16.0, 24.0, 16.0]);
    }
    let (code, events) = generate(folder.path(), &[], &[]);
    assert_eq!((code, face(&events)), (Some(0), None), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_finds_faces_with_its_network() {
    use proto::v1::generate_response::Body;
    let folder = tempfile::tempdir().unwrap();
    let models = tiny_models();
    let data = folder.path().join("data");
    let doors = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()];
    let file = detector();
    let served = [&["serve", "--models", models.to_str().unwrap(), "--face-model", &file][..], &doors].concat();
    let process = Process::start("avatar", &served);
    let picture = fs::read(picture(folder.path())).unwrap();
    let stream = tokio_stream::iter(requests(spec(), &picture, &tone(0.2, 16_000)));
    let url = format!("http://{}", process.address("grpc"));
    let mut answers = client(&url).await.generate(stream).await.unwrap().into_inner();
    let mut found = None;
    while let Some(answer) = answers.message().await.unwrap() {
        if let Some(Body::Event(event)) = answer.body {
            found = found.or(event.face);
        }
    }
    let face = found.unwrap();
    assert_eq!([face.x, face.y, face.width, face.height].map(f64::round), [28.0, 16.0, 24.0, 16.0]);
}

#[test]
fn a_wrong_file_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let torch = folder.path().join("detface.pt");
    fs::write(&torch, b"PK\x03\x04 and more").unwrap();
    let torch = torch.to_str().unwrap();
    let (code, events) = generate(folder.path(), &["--face-model", torch], &[]);
    let last = events.last().unwrap();
    assert_eq!((code, &last["field"]), (Some(2), &"face_model".into()), "{last}");
    assert!(last["message"].as_str().unwrap().contains("built-in detector"), "{last}");
    let models = tiny_models();
    let models = models.to_str().unwrap();
    let stage = |file: &str| {
        let listen = ["--listen", "127.0.0.1:0", "--models", models, "--face-model", file];
        Command::new(binary("image-encoder")).args(listen).output().unwrap()
    };
    let serve = |file: &str| avatar(&["serve", "--models", models, "--face-model", file]);
    for (file, reason) in [(torch, "export it to ONNX"), ("/no/such.onnx", "/no/such.onnx")] {
        for (done, code) in [(stage(file), 64), (serve(file), 2)] {
            let said = text(&done.stderr);
            assert_eq!(done.status.code(), Some(code), "{said}");
            assert!(said.contains("--face-model") && said.contains(reason), "{said}");
        }
    }
}

#[test]
fn the_references_detector_in_the_folder_of_models_is_said_to_be_unused() {
    let (folder, models) = (tempfile::tempdir().unwrap(), own_models());
    fs::create_dir(models.path().join("det_align")).unwrap();
    fs::write(models.path().join("det_align/detface.pt"), b"PK\x03\x04").unwrap();
    let said = |more: &[&str]| {
        let (code, events) = generate_from(models.path(), folder.path(), more, &[]);
        assert_eq!(code, Some(0), "{events:?}");
        events.iter().any(|event| event["message"].as_str().is_some_and(|m| m.contains("detface.pt is a PyTorch file")))
    };
    assert!(said(&[]));
    assert!(!said(&["--face-model", &detector()]));
}
