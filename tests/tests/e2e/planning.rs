//! Tiers and plans, through every door.

use std::{fs, path::Path};

use proto::v1::{ListTiersRequest, PlanGenerationRequest, avatar_service_client::AvatarServiceClient};
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    inputs::{portrait, tone},
    stack::{Stack, avatar, text, tiny_models, web},
};

/// What a command printed last, and its exit code.
fn run(arguments: &[&str]) -> (Option<i32>, Value) {
    let done = avatar(arguments);
    let stdout = text(&done.stdout);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("{}", text(&done.stderr)));
    (done.status.code(), serde_json::from_str(last).unwrap())
}

#[test]
fn a_plan_of_every_card_is_sensible() {
    for (vram, tier) in [
        ("4GiB", "emergency"),
        ("6GiB", "ultra-minimal"),
        ("8188MiB", "ultra-low"),
        ("10GiB", "low"),
        ("12GiB", "low"),
        ("16GiB", "balanced"),
        ("24GiB", "maximum"),
        ("48GiB", "maximum"),
    ] {
        let (code, plan) = run(&["plan", "--vram", vram, "--json"]);
        assert_eq!((code, &plan["tier"]), (Some(0), &tier.into()), "{plan}");
        let card = planner::Bytes::as_gib(vram.parse().unwrap());
        let peak = plan["peak_bytes"].as_u64().unwrap() as f64 / (1u64 << 30) as f64;
        assert!(peak > 0.5 && peak <= 0.95 * card, "{vram}: {peak} GiB");
        assert!(plan["seconds"].as_f64().unwrap() > 0.0 && !plan["reasons"].as_array().unwrap().is_empty());
        assert_eq!(plan["placement"]["diffusion"], "cuda:0");
        let stages = plan["stages"].as_array().unwrap();
        assert_eq!(stages.len(), 5);
        for stage in stages {
            for key in ["stage", "device", "fit", "peak_bytes", "seconds"] {
                assert!(!stage[key].is_null(), "{key} in {stage}");
            }
        }
    }
    let (code, plan) = run(&["plan", "--vram", "8GiB,8GiB,12GiB", "--size", "384", "--frames", "33", "--json"]);
    assert_eq!((code, &plan["placement"]["diffusion"]), (Some(0), &"cuda:2".into()), "{plan}");
}

#[test]
fn a_plan_that_cannot_be_is_refused_before_any_weight_is_read() {
    let large = ["plan", "--vram", "4GiB", "--size", "1024x1536", "--frames", "129", "--json"];
    let (code, told) = run(&large);
    assert_eq!((code, &told["code"]), (Some(1), &"RESOURCE_EXHAUSTED".into()), "{told}");
    let message = told["message"].as_str().unwrap();
    assert!(
        message.contains("cuda:0") && message.contains("needs at least") && message.contains("would fit"),
        "{told}"
    );
    let (code, lowered) = run(&[&large[..], &["--allow-degrade"]].concat());
    assert_eq!((code, lowered["degraded"].as_array().unwrap().len()), (Some(0), 1), "{lowered}");
    let (code, told) = run(&["plan", "--vram", "24GiB", "--tier", "low", "--size", "512", "--json"]);
    assert_eq!((code, &told["field"]), (Some(2), &"size".into()), "{told}");
    let (code, told) = run(&["plan", "--vram", "24GiB", "--tier", "medium", "--json"]);
    assert!(code == Some(2) && told["message"].as_str().unwrap().contains("the tiers are emergency"), "{told}");
    for wrong in [["--vram", "much"], ["--vram", "8GB/s"], ["--size", "7"], ["--precision", "int3"]] {
        assert_eq!(avatar(&[&["plan"][..], &wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn the_tiers_are_listed_with_an_operators_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiers.toml");
    let name = file.to_str().unwrap();
    fs::write(&file, "[low]\nsteps = 7\n").unwrap();
    let (code, listed) = run(&["tiers", "--tiers", name, "--json"]);
    let tiers = listed["tiers"].as_array().unwrap();
    assert_eq!((code, tiers.len()), (Some(0), 7));
    let low = json!({
        "name": "low", "from_gb": 9, "to_gb": 12, "pixels": 384, "frames": 32, "audio_seconds": 30, "steps": 7
    });
    assert_eq!(tiers[3], low);
    fs::write(&file, "[low]\nstep = 7\npixels = 0\n[high]\nto_gb = 99\n").unwrap();
    let (code, told) = run(&["tiers", "--tiers", name, "--json"]);
    let message = told["message"].as_str().unwrap();
    assert_eq!((code, &told["field"]), (Some(2), &"tiers".into()));
    for part in ["unknown key \"step\"", "pixels = 0", "maximum: 24 GB and more overlaps high: 17 to 99 GB"] {
        assert!(message.contains(part), "{part} in {message}");
    }
}

fn generate(folder: &Path, more: &[&str]) -> (Option<i32>, Vec<Value>) {
    fs::write(folder.join("portrait.png"), portrait()).unwrap();
    fs::write(folder.join("speech.wav"), tone(0.3, 16_000)).unwrap();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (image, audio, out, models) = (path("portrait.png"), path("speech.wav"), path("a.mp4"), tiny_models());
    let mut arguments = vec!["generate", "--image", &image, "--audio", &audio, "--out", &out, "--json", "--models"];
    arguments.push(models.to_str().unwrap());
    arguments.extend(more);
    let done = avatar(&arguments);
    let lines = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (done.status.code(), lines)
}

#[test]
fn a_request_past_its_tier_is_refused_or_lowered_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let past = ["--size", "128", "--steps", "2", "--force-emergency"];
    let (code, lines) = generate(folder.path(), &past);
    let last = lines.last().unwrap();
    assert_eq!((code, &last["field"]), (Some(2), &"size".into()), "{last}");
    let message = last["message"].as_str().unwrap();
    assert!(message.contains("tier emergency allows size of at most 96 pixels, 128 were asked for"), "{last}");

    let (code, lines) = generate(folder.path(), &[&past[..], &["--allow-degrade"]].concat());
    let last = lines.last().unwrap();
    assert_eq!((code, &last["width"]), (Some(0), &96.into()), "{last}");
    let warnings = last["warnings"].as_array().unwrap();
    assert!(warnings.iter().any(|w| w == "Tier emergency: size was lowered from 128 to 96 pixels."), "{last}");
}

#[test]
fn a_tiers_window_holds_its_frames() {
    let folder = tempfile::tempdir().unwrap();
    let (code, lines) = generate(folder.path(), &["--size", "64", "--steps", "1", "--tier", "emergency"]);
    let last = lines.last().unwrap();
    // 7 frames in windows of 5: 2 latent frames each, one shared.
    assert_eq!((code, &last["frames"], &last["denoised_frames"]), (Some(0), &7.into(), &17.into()), "{last}");
}

#[tokio::test]
async fn the_gateway_answers_from_the_same_planner() {
    let stack = Stack::one(&tiny_models());
    let mut client = AvatarServiceClient::connect(stack.grpc()).await.unwrap();
    let tiers = client.list_tiers(ListTiersRequest {}).await.unwrap().into_inner();
    assert_eq!((tiers.tiers.len(), tiers.in_force.as_str()), (7, ""));
    let request = PlanGenerationRequest { vram_bytes: vec![8 << 30], ..Default::default() };
    let plan = client.plan_generation(request).await.unwrap().into_inner().plan.unwrap();
    assert_eq!((plan.tier.as_str(), plan.stages.len()), ("ultra-low", 5));
    let own = PlanGenerationRequest { width: Some(64), height: Some(64), frames: Some(5), ..Default::default() };
    let plan = client.plan_generation(own).await.unwrap().into_inner().plan.unwrap();
    assert!(plan.stages.iter().all(|stage| stage.device == "cpu") && plan.rates_measured, "{plan:?}");
    let much = PlanGenerationRequest { vram_bytes: vec![1 << 27], ..Default::default() };
    assert_eq!(client.plan_generation(much).await.unwrap_err().code(), Code::ResourceExhausted);

    let (http, web) = (stack.http(), web());
    let listed: Value = web.get(format!("{http}/v1/tiers")).send().await.unwrap().json().await.unwrap();
    assert_eq!((&listed["object"], listed["data"].as_array().unwrap().len()), (&"list".into(), 7), "{listed}");
    let post = |body: Value| web.post(format!("{http}/v1/plans")).json(&body).send();
    let plan: Value = post(json!({ "vram_bytes": [12u64 << 30] })).await.unwrap().json().await.unwrap();
    assert_eq!((&plan["tier"], &plan["placement"]["diffusion"]), (&"low".into(), &"cuda:0".into()), "{plan}");
    let wrong = post(json!({ "vram": 8 })).await.unwrap();
    assert_eq!(wrong.status().as_u16(), 400);
    let much = post(json!({ "vram_bytes": [1u64 << 27] })).await.unwrap();
    assert_eq!(much.status().as_u16(), 507, "as the description of the call says");
    let past = post(json!({ "vram_bytes": [12u64 << 30], "tier": "low", "steps": 50 })).await.unwrap();
    assert_eq!(past.status().as_u16(), 400);
    let told: Value = past.json().await.unwrap();
    assert_eq!(told["error"]["param"], "steps", "{told}");
}

#[test]
fn the_document_of_tiers_is_the_one_that_is_generated() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks/tiers.md");
    let kept = fs::read_to_string(file).unwrap();
    let made = e2e::tiers::document().unwrap();
    assert!(kept == made, "run `cargo run -p e2e --bin tiers > docs/benchmarks/tiers.md`");
}
