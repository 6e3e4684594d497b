//! The bundled model: a mouth that follows the voice proves every hop as no random checkpoint can.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use e2e::{
    parity,
    quality::{self, Make, Row},
};
use serde_json::Value;

use crate::stack::{Stack, avatar, binary, text, video_stream};

/// How long a generation may take on a slow machine.
const LONG: Duration = Duration::from_secs(240);

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo").join(name)
}

fn arguments<'a>(parts: &[&'a str], paths: &[(&'a str, &'a Path)]) -> Vec<&'a str> {
    let paths = paths.iter().flat_map(|(flag, path)| [*flag, path.to_str().unwrap()]);
    parts.iter().copied().chain(paths).collect()
}

/// The figures of bundled clips with these models.
fn figures(models: &Path, names: &[String]) -> Vec<Row> {
    let videos = tempfile::tempdir().unwrap();
    let make = Make { avatar: binary("avatar"), models: models.to_owned(), flags: Vec::new(), others: 1 };
    quality::make(&make, &demo("held-out"), names, videos.path()).unwrap();
    quality::measure(&demo("held-out"), names, videos.path(), 129).unwrap()
}

/// Bounds a little below what these clips gave; docs/benchmarks/demo-model.md has the figures of 20.
#[test]
fn the_mouth_follows_the_voice_and_the_rest_stays_with_weights_of_8_bits_too() {
    let names = quality::clips(&demo("held-out")).unwrap();
    let rows = figures(&demo("weights"), &names);
    let (of, table) = (quality::medians(&rows), quality::table(&rows));
    assert!(of.correlation >= 0.75, "{table}");
    assert!(of.best_lag.abs() <= 1.0, "{table}");
    let others = of.others.unwrap();
    assert!(others.own < 0.2 && others.videos == names.len(), "{table}");
    assert!(others.followed >= 0.75, "{table}");
    assert!(of.still_psnr >= 28.0, "{table}");
    assert!(of.flicker <= 0.5, "{table}");

    let folder = tempfile::tempdir().unwrap();
    let (from, out) = (demo("weights"), folder.path().join("models"));
    let paths = [("--models", from.as_path()), ("--out", &out)];
    let made = avatar(&arguments(&["weights", "convert", "--precision", "q8_0", "--quiet"], &paths));
    assert!(made.status.success(), "{}", text(&made.stderr));
    let eight = figures(&out, &names[..1]);
    let table = format!("{table}{}", quality::table(&eight));
    assert!((rows[0].correlation - eight[0].correlation).abs() <= 0.05, "{table}");
    assert!((rows[0].still_psnr - eight[0].still_psnr).abs() <= 1.0, "{table}");
}

#[test]
fn six_processes_one_of_them_killed_make_the_same_video_as_one() {
    let (models, folder) = (demo("weights"), tempfile::tempdir().unwrap());
    let (image, audio) = (demo("held-out/01.png"), demo("held-out/01.wav"));
    let (alone, far) = (folder.path().join("alone.mp4"), folder.path().join("far.mp4"));
    let inputs = [("--image", image.as_path()), ("--audio", &audio)];
    let paths = [&inputs[..], &[("--models", &models), ("--out", &alone)]].concat();
    let made = avatar(&arguments(&["generate", "--quiet", "--steps", "6"], &paths));
    assert!(made.status.success(), "{}", text(&made.stderr));

    let mut stack = Stack::six(&models);
    let server = stack.grpc();
    let made = avatar(&arguments(&["submit", "--json", "--steps", "6", "--server", &server], &inputs));
    let id = serde_json::from_slice::<Value>(&made.stdout).unwrap();
    let id = id["generation_id"].as_str().unwrap_or_else(|| panic!("{id}"));
    let began = Instant::now();
    loop {
        let status = avatar(&["status", id, "--json", "--server", &server]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        if status["step"].as_u64().is_some_and(|step| step >= 2) {
            break;
        }
        assert!(began.elapsed() < LONG, "{status}");
        std::thread::sleep(Duration::from_millis(50));
    }
    stack.kill_and_restart();
    let server = stack.grpc();
    let watched = avatar(&["watch", id, "--json", "--server", &server]);
    assert!(watched.status.success(), "{}", text(&watched.stderr));
    let loaded = avatar(&arguments(&["download", id, "--server", &server], &[("--out", &far)]));
    assert!(loaded.status.success(), "{}", text(&loaded.stderr));
    assert!(video_stream(&alone) == video_stream(&far), "another video");
}

#[test]
fn an_independent_implementations_pass_is_met() {
    let cases = parity::find(&demo("cases")).unwrap();
    assert_eq!(cases.len(), 1);
    let report = parity::run(&cases[0]);
    assert!(report.holds(), "{report:?}");
}

#[test]
fn the_bundled_files_are_small_and_whole() {
    let models = demo("weights");
    let sums = fs::read_to_string(models.join("SHA256SUMS")).unwrap();
    let mut all = 0;
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        let bytes = fs::read(models.join(name)).unwrap();
        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
        let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, sum, "{name}");
        assert!(bytes.len() < 16_000_000, "{name}: {} bytes", bytes.len());
        all += bytes.len();
    }
    assert!(all > 0 && all < 40_000_000, "{all} bytes");
    let verified = avatar(&arguments(&["weights", "verify"], &[("--models", &models)]));
    assert!(verified.status.success(), "{}", text(&verified.stdout));
}
