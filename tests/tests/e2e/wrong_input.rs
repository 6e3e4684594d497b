//! Every wrong input is refused with its field, value and limit, through each public door, and leaves nothing behind.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, process::Command};

use proto::v1::{GenerateResponse, GenerationSpec};
use serde_json::Value;
use tonic::{Code, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    inputs::{bad_pictures, bad_recordings, portrait, tone},
    processes::{client, requests, spec},
    stack::{Stack, avatar, binary, text, tiny_models, web},
};

/// What the command line says of a picture and a recording.
fn on_the_command_line(picture: &[u8], audio: &[u8], more: &[&str]) -> (Option<i32>, Value, usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("picture"), picture).unwrap();
    fs::write(path("audio"), audio).unwrap();
    let models = tiny_models();
    let (image, sound, out) = (path("picture"), path("audio"), path("out.mp4"));
    let mut arguments = vec!["generate", "--image", &image, "--audio", &sound, "--out", &out, "--json", "--models"];
    arguments.push(models.to_str().unwrap());
    arguments.extend(more);
    let done = avatar(&arguments);
    let stdout = text(&done.stdout);
    let last = stdout.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).unwrap());
    let left = fs::read_dir(folder.path()).unwrap().count() - 2;
    (done.status.code(), last, left)
}

#[test]
fn bad_files_are_refused_on_the_command_line() {
    let good = (portrait(), tone(0.2, 16_000));
    let pictures = bad_pictures().into_iter().map(|(what, bytes)| ("picture", what, bytes, good.1.clone()));
    let recordings = bad_recordings().into_iter().map(|(what, bytes)| ("audio", what, good.0.clone(), bytes));
    for (field, what, picture, audio) in pictures.chain(recordings) {
        let (code, last, left) = on_the_command_line(&picture, &audio, &[]);
        assert_eq!((code, left), (Some(2), 0), "{what}: {last}");
        assert_eq!((&last["event"], &last["code"]), (&"failed".into(), &"INVALID_ARGUMENT".into()), "{what}: {last}");
        assert_eq!(last["field"], field, "{what}: {last}");
        assert!(last["message"].as_str().unwrap().len() > 10, "{what}: {last}");
    }
}

#[test]
fn settings_out_of_range_are_refused_on_the_command_line() {
    for (flag, value, field) in [
        ("--steps", "0", "steps"),
        ("--steps", "10000", "steps"),
        ("--size", "63", "size"),
        ("--size", "5000", "size"),
        ("--guidance-scale", "0", "guidance_scale"),
        ("--guidance-scale", "NaN", "guidance_scale"),
        ("--min-frames", "401", "min_frames"),
        ("--face", "500,500,900,900", "face"),
    ] {
        let (code, last, left) = on_the_command_line(&portrait(), &tone(0.2, 16_000), &[flag, value]);
        assert_eq!((code, left), (Some(2), 0), "{flag} {value}: {last}");
        assert_eq!(last["field"], field, "{flag} {value}: {last}");
    }
    for (flag, value) in [("--steps", "many"), ("--face", "1,2,3"), ("--seed", "-1"), ("--nonsense", "1")] {
        let (code, _, left) = on_the_command_line(&portrait(), &tone(0.2, 16_000), &[flag, value]);
        assert_eq!((code, left), (Some(2), 0), "{flag} {value}");
    }
}

#[test]
fn a_prompt_that_is_no_text_is_refused_on_the_command_line() {
    let refused = Command::new(binary("avatar"))
        .args(["generate", "--image", "a", "--audio", "b", "--prompt"])
        .arg(OsString::from_vec(vec![b'a', 0xff, 0xfe]))
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--prompt"), "{}", text(&refused.stderr));
}

/// The status that ends a Generate call.
async fn refusal(url: &str, spec: GenerationSpec, picture: &[u8], audio: &[u8]) -> tonic::Status {
    match client(url).await.generate(tokio_stream::iter(requests(spec, picture, audio))).await {
        Err(status) => status,
        Ok(answers) => {
            let mut answers = answers.into_inner();
            loop {
                match answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("it was accepted"),
                    Err(status) => break status,
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_inputs_are_refused_over_grpc_with_field_violations() {
    let stack = Stack::one(&tiny_models());
    let good = (portrait(), tone(0.2, 16_000));
    let mut rows: Vec<(&str, &str, GenerationSpec, Vec<u8>, Vec<u8>)> = Vec::new();
    for (what, bytes) in bad_pictures() {
        rows.push(("picture", what, spec(), bytes, good.1.clone()));
    }
    for (what, bytes) in bad_recordings() {
        rows.push(("audio", what, spec(), good.0.clone(), bytes));
    }
    for (field, what, wrong) in [
        ("steps", "no steps", GenerationSpec { steps: Some(0), ..spec() }),
        ("steps", "10000 steps", GenerationSpec { steps: Some(10_000), ..spec() }),
        ("prompt", "a prompt of 3 MB", GenerationSpec { prompt: "a".repeat(3 << 20), ..spec() }),
        ("prompt", "too many tokens", GenerationSpec { prompt: "word ".repeat(1_500), ..spec() }),
        ("size", "no size", GenerationSpec { size: Some(0), ..spec() }),
        ("guidance_scale", "not a number", GenerationSpec { guidance_scale: Some(f32::NAN), ..spec() }),
        ("flow_shift", "negative", GenerationSpec { flow_shift: Some(-1.0), ..spec() }),
    ] {
        rows.push((field, what, wrong, good.0.clone(), good.1.clone()));
    }
    for (field, what, spec, picture, audio) in rows {
        let status = refusal(&stack.grpc(), spec, &picture, &audio).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        let details = status.get_details_bad_request().unwrap_or_else(|| panic!("{what}: no violations: {status:?}"));
        assert_eq!(details.field_violations[0].field, field, "{what}: {details:?}");
    }
    let huge = GenerationSpec { prompt: "a".repeat(10 << 20), ..spec() };
    let status = refusal(&stack.grpc(), huge, &good.0, &good.1).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("10485760 bytes; the limit is 10000"), "{status:?}");
}

/// A spec as a client sends it that does not check its strings.
#[derive(Clone, PartialEq, prost::Message)]
struct RawSpec {
    #[prost(bytes = "vec", tag = "1")]
    prompt: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RawRequest {
    #[prost(message, optional, tag = "1")]
    spec: Option<RawSpec>,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_is_no_text_is_refused_over_grpc() {
    let stack = Stack::one(&tiny_models());
    let channel = Channel::from_shared(stack.grpc()).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let messages = tokio_stream::iter([RawRequest { spec: Some(RawSpec { prompt: vec![b'a', 0xff, 0xfe] }) }]);
    let path = PathAndQuery::from_static("/avatar.v1.AvatarService/Generate");
    let codec = tonic_prost::ProstCodec::<RawRequest, GenerateResponse>::default();
    let status = match grpc.streaming(tonic::Request::new(messages), path, codec).await {
        Err(status) => status,
        Ok(mut answers) => answers.get_mut().message().await.expect_err("it was accepted"),
    };
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_details_bad_request().unwrap_or_else(|| panic!("no violations: {status:?}"));
    assert_eq!(details.field_violations[0].field, "prompt", "{details:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_inputs_are_refused_over_rest() {
    let stack = Stack::one(&tiny_models());
    let url = format!("{}/v1/videos", stack.http());
    let http = web();
    let post = async |fields: Vec<(&'static str, Vec<u8>)>, picture: Vec<u8>, audio: Vec<u8>| -> (u16, Value) {
        use reqwest::multipart::{Form, Part};
        let mut form = Form::new()
            .part("input_reference", Part::bytes(picture).file_name("a.png"))
            .part("audio", Part::bytes(audio).file_name("a.wav"));
        for (name, value) in fields {
            form = form.part(name, Part::bytes(value));
        }
        let answer = http.post(&url).multipart(form).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    };
    let good = (portrait(), tone(0.2, 16_000));
    for (what, bytes) in bad_pictures() {
        let (status, body) = post(vec![], bytes, good.1.clone()).await;
        assert!([400, 415, 422].contains(&status), "{what}: {status} {body}");
        assert_eq!(body["error"]["param"], "input_reference", "{what}: {body}");
    }
    for (what, bytes) in bad_recordings() {
        let (status, body) = post(vec![], good.0.clone(), bytes).await;
        assert!([400, 415, 422].contains(&status), "{what}: {status} {body}");
        assert_eq!(body["error"]["param"], "audio", "{what}: {body}");
    }
    for (param, value) in [
        ("steps", b"0".to_vec()),
        ("steps", b"10000".to_vec()),
        ("steps", b"many".to_vec()),
        ("prompt", vec![b'a', 0xff, 0xfe]),
        ("size", b"12x".to_vec()),
        ("face", b"1,2".to_vec()),
        ("colour", b"red".to_vec()),
    ] {
        let (status, body) = post(vec![(param, value.clone())], good.0.clone(), good.1.clone()).await;
        assert_eq!(status, 400, "{param}={}: {body}", text(&value));
        assert_eq!(body["error"]["param"], param, "{body}");
        assert!(body["error"]["message"].as_str().unwrap().len() > 10, "{body}");
    }
    let (status, body) = post(vec![("prompt", vec![b'a'; 10 << 20])], good.0.clone(), good.1.clone()).await;
    assert!([400, 413].contains(&status), "{status} {body}");
    let answer = http.post(&url).body("no form").send().await.unwrap();
    assert_eq!(answer.status(), 415);
    assert_eq!(http.get(format!("{url}/..%2f..")).send().await.unwrap().status(), 404);
    assert_eq!(http.get(format!("{url}/0190")).send().await.unwrap().status(), 404);
}
