//! The command line as a user meets it.

use std::{fs, process::Command, time::Duration};

use serde_json::Value;

use crate::{
    inputs::{portrait, tone},
    stack::{avatar, binary, probe, text, tiny_models, video_stream},
};

struct Desk {
    folder: tempfile::TempDir,
    models: String,
}

impl Desk {
    fn new(seconds: f32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("portrait.png"), portrait()).unwrap();
        fs::write(folder.path().join("speech.wav"), tone(seconds, 16_000)).unwrap();
        Self { folder, models: tiny_models().to_str().unwrap().to_owned() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["generate", "--image", &self.path("portrait.png"), "--audio", &self.path("speech.wav"), "--models"]
                .map(str::to_owned)
                .to_vec();
        arguments.push(self.models.clone());
        arguments.extend(["--size", "64"].map(str::to_owned));
        arguments.extend(more.iter().map(|&s| s.to_owned()));
        arguments
    }

    fn generate(&self, more: &[&str]) -> std::process::Output {
        let arguments = self.arguments(more);
        avatar(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

#[test]
fn the_same_seed_gives_the_same_video_and_another_does_not() {
    let desk = Desk::new(0.3);
    for (name, seed) in [("a", "1"), ("b", "1"), ("c", "2")] {
        let out = desk.path(&format!("{name}.mp4"));
        let done = desk.generate(&["--steps", "2", "--seed", seed, "--out", &out]);
        assert!(done.status.success(), "{}", text(&done.stderr));
    }
    let stream = |name: &str| video_stream(&desk.folder.path().join(name));
    assert!(stream("a.mp4") == stream("b.mp4"));
    assert!(stream("a.mp4") != stream("c.mp4"));
}

#[test]
fn the_frames_are_not_black_and_not_flat() {
    let desk = Desk::new(0.3);
    let out = desk.path("a.mp4");
    assert!(desk.generate(&["--steps", "2", "--out", &out]).status.success());
    let raw =
        Command::new("ffmpeg").args(["-v", "error", "-i", &out, "-f", "rawvideo", "-pix_fmt", "gray", "-"]).output();
    let raw = raw.unwrap().stdout;
    let mean = raw.iter().map(|&v| f64::from(v)).sum::<f64>() / raw.len() as f64;
    let deviation = (raw.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / raw.len() as f64).sqrt();
    assert!((16.0..240.0).contains(&mean) && deviation > 4.0, "mean {mean}, deviation {deviation}");
}

#[test]
fn speech_past_one_window_makes_more_windows_and_every_frame() {
    let desk = Desk::new(6.0);
    let out = desk.path("long.mp4");
    let done = desk.generate(&["--steps", "1", "--guidance-scale", "1", "--out", &out, "--json"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let shown = probe(&desk.folder.path().join("long.mp4"));
    let video = shown["streams"].as_array().unwrap().iter().find(|s| s["codec_name"] == "h264").unwrap();
    assert_eq!(video["nb_read_frames"], "150");
}

#[test]
fn min_frames_denoises_more_and_keeps_what_the_speech_needs() {
    let desk = Desk::new(0.2);
    let (short, padded) = (desk.path("short.mp4"), desk.path("padded.mp4"));
    assert!(desk.generate(&["--steps", "1", "--out", &short]).status.success());
    assert!(desk.generate(&["--steps", "1", "--min-frames", "21", "--out", &padded]).status.success());
    let frames = |name: &str| probe(&desk.folder.path().join(name))["streams"][0]["nb_read_frames"].clone();
    assert_eq!(frames("short.mp4"), "5");
    assert_eq!(frames("padded.mp4"), "5");
    assert!(video_stream(short.as_ref()) != video_stream(padded.as_ref()), "min_frames changed nothing");
}

#[test]
fn by_the_references_rules_129_frames_are_denoised_and_those_of_the_speech_kept() {
    let desk = Desk::new(0.2);
    let out = desk.path("parity.mp4");
    let done =
        desk.generate(&["--steps", "1", "--guidance-scale", "1", "--parity", "reference", "--out", &out, "--json"]);
    let stdout = text(&done.stdout);
    assert!(done.status.success(), "{stdout}{}", text(&done.stderr));
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&last["frames"], &last["denoised_frames"], &last["heard_frames"]), (&5.into(), &129.into(), &5.into()));
    assert_eq!(last["parity"], "reference");
    assert_eq!(probe(&desk.folder.path().join("parity.mp4"))["streams"][0]["nb_read_frames"], "5");
}

#[test]
fn a_prompt_of_too_many_tokens_is_cut_when_asked_and_the_counts_are_told() {
    let desk = Desk::new(0.2);
    let out = desk.path("cut.mp4");
    let prompt = "说".repeat(1_000);
    let refused = desk.generate(&["--steps", "1", "--prompt", &prompt, "--out", &out, "--json"]);
    assert_eq!(refused.status.code(), Some(2));
    let done = desk.generate(&["--steps", "1", "--prompt", &prompt, "--truncate-prompt", "--out", &out, "--json"]);
    let stdout = text(&done.stdout);
    assert!(done.status.success(), "{stdout}{}", text(&done.stderr));
    let events: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = events.last().unwrap();
    let (kept, tokens) = (last["prompt_tokens_kept"].as_u64().unwrap(), last["prompt_tokens"].as_u64().unwrap());
    assert!(kept < tokens && tokens > 3_000, "{last}");
    assert_eq!(last["clip_tokens_kept"], 75);
    let said = format!("the first {kept} of its {tokens} tokens");
    let warned = |event: &Value| event["warning"] == true && event["message"].as_str().unwrap().contains(&said);
    assert!(events.iter().any(warned), "{stdout}");
    assert!(last["warnings"].as_array().unwrap().iter().any(|w| w.as_str().unwrap().contains(&said)), "{last}");
}

#[test]
fn json_events_tell_every_step_and_end_with_the_outcome() {
    let desk = Desk::new(0.2);
    let out = desk.path("a.mp4");
    let done = desk.generate(&["--steps", "3", "--out", &out, "--json"]);
    let stdout = text(&done.stdout);
    let events: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<u64> =
        events.iter().filter(|e| e["event"] == "denoising").filter_map(|e| e["step"].as_u64()).collect();
    assert!([1, 2, 3].iter().all(|k| steps.contains(k)), "{stdout}");
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["path"]), (&"completed".into(), &out.as_str().into()));
    assert_eq!((&last["width"], &last["height"], &last["frames"]), (&64.into(), &64.into(), &5.into()));
}

#[test]
fn an_interrupt_leaves_nothing_behind() {
    let desk = Desk::new(3.0);
    let out = desk.path("a.mp4");
    let arguments = desk.arguments(&["--steps", "200", "--out", &out]);
    let mut child = Command::new(binary("avatar"))
        .args(&arguments)
        .arg("--json")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("\"denoising\"")));
    let asked = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(asked.success());
    let began = std::time::Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let left: Vec<_> = fs::read_dir(desk.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "only the inputs remain: {left:?}");
}

#[test]
fn a_missing_file_or_folder_is_named_before_any_work() {
    let desk = Desk::new(0.2);
    let missing = desk.path("missing.png");
    let refused =
        avatar(&["generate", "--image", &missing, "--audio", &desk.path("speech.wav"), "--models", &desk.models]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--image") && text(&refused.stderr).contains("missing.png"));
    let refused = desk.generate(&["--out", &desk.path("no/such/folder/a.mp4")]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--out"), "{}", text(&refused.stderr));
}
