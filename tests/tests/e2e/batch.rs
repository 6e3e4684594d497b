//! `avatar batch`: tables of videos, in one process and on a server.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    inputs::{portrait, tone},
    stack::{Stack, avatar, binary, text, tiny_models, video_stream},
};

/// A folder with a table of two good rows and some that are not.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        fs::create_dir(desk.0.path().join("in")).unwrap();
        fs::write(desk.path("in/portrait.png"), portrait()).unwrap();
        fs::write(desk.path("in/speech.wav"), tone(0.2, 16_000)).unwrap();
        fs::write(desk.path("in/noise.wav"), "no recording").unwrap();
        desk.table(&[
            "one,in/portrait.png,in/speech.wav,\"A person speaks, slowly\",25",
            "../../escape,in/portrait.png,in/speech.wav,,25",
            "bad-audio,in/portrait.png,in/noise.wav,,25",
            "gone,in/nobody.png,in/speech.wav,,25",
            "two,in/portrait.png,in/speech.wav,A person sings,25",
        ]);
        desk
    }

    fn table(&self, rows: &[&str]) {
        let text = format!("\u{feff}videoid,image,audio,prompt,fps\n{}\n", rows.join("\n"));
        fs::write(self.path("list.csv"), text).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// The batch's flags, without those that say who makes it.
    fn flags(&self) -> Vec<String> {
        let (csv, out) = (self.path("list.csv"), self.path("out"));
        ["batch", "--csv", &csv, "--out", &out, "--steps", "1", "--size", "64", "--json"].map(str::to_owned).into()
    }

    /// Runs the batch with --json; gives its exit code and its lines.
    fn run(&self, more: &[&str]) -> (Option<i32>, Vec<Value>) {
        let flags = self.flags();
        let done = avatar(&flags.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>());
        let lines = text(&done.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (done.status.code(), lines)
    }

    /// The state of each row in the summary.
    fn states(&self) -> Vec<String> {
        let summary = fs::read_to_string(self.path("out/summary.csv")).unwrap();
        summary.lines().skip(1).map(|line| line.split(',').nth(2).unwrap().to_owned()).collect()
    }
}

fn counts(lines: &[Value]) -> [u64; 4] {
    let last = lines.last().unwrap();
    ["completed", "kept", "failed", "missing"].map(|name| last[name].as_u64().unwrap())
}

#[test]
fn a_wrong_row_spoils_no_other_and_a_second_run_makes_what_is_missing() {
    let (desk, models) = (Desk::new(), tiny_models());
    let models = ["--models", models.to_str().unwrap()];
    let (code, lines) = desk.run(&models);
    assert_eq!((code, counts(&lines)), (Some(1), [2, 0, 3, 0]), "{lines:?}");
    assert_eq!(desk.states(), ["completed", "failed", "failed", "failed", "completed"]);
    let row = |videoid: &str| lines.iter().find(|line| line["event"] == "row" && line["videoid"] == videoid).unwrap();
    assert!(row("bad-audio")["message"].as_str().unwrap().starts_with("audio: "), "{lines:?}");
    assert!(row("gone")["message"].as_str().unwrap().starts_with("image: "), "{lines:?}");
    assert!(!desk.0.path().join("escape.mp4").exists());
    let (one, two) = (desk.0.path().join("out/one.mp4"), desk.0.path().join("out/two.mp4"));
    assert!(video_stream(&one) != video_stream(&two), "the prompts differ");
    let (first, made) = (fs::read(&one).unwrap(), fs::metadata(&one).unwrap().modified().unwrap());

    fs::write(desk.path("in/noise.wav"), tone(0.2, 16_000)).unwrap();
    fs::remove_file(&two).unwrap();
    desk.table(&[
        "one,in/portrait.png,in/speech.wav,\"A person speaks, slowly\",25",
        "bad-audio,in/portrait.png,in/noise.wav,,25",
        "two,in/portrait.png,in/speech.wav,A person sings,25",
    ]);
    let (code, lines) = desk.run(&models);
    assert_eq!((code, counts(&lines)), (Some(0), [3, 1, 0, 0]), "{lines:?}");
    assert_eq!(desk.states(), ["completed"; 3]);
    assert_eq!(fs::metadata(&one).unwrap().modified().unwrap(), made, "it was not made again");
    assert_eq!(fs::read(&one).unwrap(), first);
    assert!(two.exists() && !desk.0.path().join("out/.batch").exists());
    let (code, lines) = desk.run(&[&models[..], &["--seed", "9"]].concat());
    assert_eq!((code, counts(&lines)), (Some(0), [3, 0, 0, 0]), "another seed is another video: {lines:?}");
}

#[test]
fn a_batch_that_was_killed_goes_on_with_what_is_missing() {
    let names = ["one", "two", "three", "four"];
    let rows = names.map(|name| format!("{name},in/portrait.png,in/speech.wav,A person says {name},25"));
    let rows = rows.each_ref().map(String::as_str);
    let (desk, undisturbed, models) = (Desk::new(), Desk::new(), tiny_models());
    let models = ["--models", models.to_str().unwrap()];
    undisturbed.table(&rows);
    assert_eq!(undisturbed.run(&models).0, Some(0));

    desk.table(&rows);
    let video = |desk: &Desk, name: &str| desk.0.path().join(format!("out/{name}.mp4"));
    let there = || names.into_iter().filter(|name| video(&desk, name).exists()).collect::<Vec<_>>();
    let mut batch = Command::new(binary("avatar"));
    let mut killed = batch.args(desk.flags()).args(models).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while there().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(120), "there is no video");
        std::thread::sleep(Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let made: Vec<_> = there().into_iter().map(|name| (name, fs::read(video(&desk, name)).unwrap())).collect();
    assert!(made.len() < names.len(), "it was killed too late: all videos are there");
    let (code, lines) = desk.run(&models);
    // Whether the summary knew of the last one yet is chance.
    let [completed, kept, failed, missing] = counts(&lines);
    assert_eq!((code, completed, failed, missing), (Some(0), 4, 0, 0), "{lines:?}");
    assert!(kept <= made.len() as u64, "{lines:?}");
    assert_eq!(desk.states(), ["completed"; 4]);
    for (name, bytes) in made {
        assert!(fs::read(video(&desk, name)).unwrap() == bytes, "{name} is another one");
    }
    for name in names {
        assert!(video_stream(&video(&desk, name)) == video_stream(&video(&undisturbed, name)), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_makes_a_batch_and_a_run_that_lost_its_videos_finds_them_there() {
    let (desk, stack) = (Desk::new(), Stack::one(&tiny_models()));
    let server = stack.grpc();
    let (code, lines) = desk.run(&["--server", &server]);
    assert_eq!((code, counts(&lines)), (Some(1), [2, 0, 3, 0]), "{lines:?}");
    let made = |lines: &[Value]| {
        let one = lines.iter().find(|line| line["event"] == "row" && line["videoid"] == "one");
        one.unwrap()["generation_id"].as_str().unwrap().to_owned()
    };
    let first = made(&lines);
    fs::remove_dir_all(desk.path("out")).unwrap();
    let (_, lines) = desk.run(&["--server", &server]);
    assert_eq!(made(&lines), first, "the same generation, fetched again");
    assert!(!video_stream(&desk.0.path().join("out/one.mp4")).is_empty());
}

#[test]
fn a_table_or_a_flag_that_is_wrong_is_refused_before_any_work() {
    let desk = Desk::new();
    let models = tiny_models();
    let models = ["--models", models.to_str().unwrap()];
    let refused = |more: &[&str], field: &str| {
        let (code, lines) = desk.run(&[&models[..], more].concat());
        assert_eq!((code, &lines.last().unwrap()["field"]), (Some(2), &field.into()), "{lines:?}");
        assert!(!desk.0.path().join("out/.batch").exists());
    };
    refused(&["--guidance-scale", "21"], "guidance_scale");
    refused(&["--root", "/no/such/folder"], "root");
    fs::write(desk.path("list.csv"), "videoid;image;audio;prompt;fps\n").unwrap();
    refused(&[], "csv");
    fs::remove_file(desk.path("list.csv")).unwrap();
    refused(&[], "csv");
}
