//! `avatar weights fetch` against a hub on this machine.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    hub::{Answer, Hub, RESOLVE, Repo, TREE},
    stack::{binary, text},
};

const WHISPER: &str = "ckpts/whisper-tiny/pytorch_model.bin";
const WHISPER_CONFIG: &str = "ckpts/whisper-tiny/config.json";

/// A folder to fetch into.
struct Desk(TempDir);

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("models")
    }

    fn command(&self, hub: &Hub, more: &[&str]) -> Command {
        let mut command = Command::new(binary("avatar"));
        // What the machine has set must not reach the test.
        for name in ["HF_TOKEN", "AVATAR_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(name);
        }
        command.args(["weights", "fetch", "--endpoint", &hub.url, "--json", "--out"]).arg(self.out()).args(more);
        command.stdin(Stdio::null());
        command
    }

    /// Fetches what the audio encoder needs: one large file and one small.
    fn audio(&self, hub: &Hub, more: &[&str]) -> Done {
        let all = [&["--accept-licence", "--stages", "audio-encoder"], more].concat();
        Done::of(self.command(hub, &all).output().unwrap())
    }

    /// The files below the folder, but not the lock.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        walk(&self.out(), &self.out(), &mut found);
        found.retain(|path| path != ".avatar-fetch.lock");
        found.sort();
        found
    }

    fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.out().join(path)).unwrap()
    }
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            walk(root, &entry, found);
        } else {
            found.push(entry.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
        }
    }
}

/// A run that has ended.
struct Done {
    code: Option<i32>,
    events: Vec<Value>,
    all: String,
}

impl Done {
    fn of(output: Output) -> Self {
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        let events = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        Self { code: output.status.code(), events, all: stdout + &stderr }
    }

    fn last(&self) -> &Value {
        self.events.last().unwrap_or_else(|| panic!("{}", self.all))
    }

    fn succeeded(self) -> Self {
        assert_eq!((self.code, &self.last()["event"]), (Some(0), &json!("completed")), "{}", self.all);
        self
    }

    /// The message of a failure with this exit code and gRPC code.
    fn failed(&self, exit: i32, code: &str) -> &str {
        let last = self.last();
        assert_eq!((self.code, &last["event"], &last["code"]), (Some(exit), &"failed".into(), &code.into()), "{last}");
        last["message"].as_str().unwrap()
    }
}

#[test]
fn all_stages_get_their_files_and_nothing_else() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let hub = Hub::of(repo.clone());
    let done = Done::of(desk.command(&hub, &["--accept-licence"]).output().unwrap()).succeeded();
    let files = desk.files();
    for path in &files {
        assert!(desk.read(path) == repo.file(path), "{path}");
    }
    let wanted: Vec<&String> = repo
        .files
        .keys()
        .filter(|path| !["README", "detface", "_fp8", "text_encoder_2/pytorch"].iter().any(|part| path.contains(part)))
        .collect();
    assert_eq!(files.iter().collect::<Vec<_>>(), wanted);
    let bytes: usize = files.iter().map(|path| repo.file(path).len()).sum();
    assert_eq!((&done.last()["files"], &done.last()["bytes"]), (&json!(files.len()), &json!(bytes)));
    assert_eq!(done.last()["bytes_received"], json!(bytes));
    assert!(done.last()["next"].as_str().unwrap().starts_with("avatar generate --models"));
    let licence = &done.events[0];
    assert_eq!((&licence["event"], licence["excluded_regions"].as_array().unwrap().len()), (&json!("licence"), 3));
}

#[test]
fn stages_and_precision_choose_the_files() {
    let (hub, desk) = (Hub::of(Repo::whole()), Desk::new());
    desk.audio(&hub, &["--quiet"]).succeeded();
    assert_eq!(desk.files(), [WHISPER_CONFIG, WHISPER]);
    let more = ["--accept-licence", "--stages", "vae-decode,image-encoder,diffusion", "--precision", "fp8"];
    let desk = Desk::new();
    Done::of(desk.command(&hub, &more).output().unwrap()).succeeded();
    let names: Vec<String> = desk.files().iter().map(|path| path.rsplit('/').next().unwrap().to_owned()).collect();
    let fp8 = ["mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"];
    assert_eq!(names, [fp8[0], fp8[1], "config.json", "pytorch_model.pt"]);
}

#[test]
fn without_the_licence_accepted_files_are_listed_and_nothing_is_touched() {
    let (hub, desk) = (Hub::of(Repo::whole()), Desk::new());
    let done = Done::of(desk.command(&hub, &["--stages", "audio-encoder"]).output().unwrap());
    let message = done.failed(2, "FAILED_PRECONDITION");
    for part in ["Tencent Hunyuan Community License", "European Union", "United Kingdom", "South Korea"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(done.last()["field"], "accept_licence");
    let listed = done.events.iter().find(|event| event["event"] == "listed").unwrap();
    assert_eq!(
        (&listed["files"], &listed["bytes"]),
        (&json!(2), &json!(1000 * (WHISPER.len() + WHISPER_CONFIG.len())))
    );
    let asked: Vec<String> = hub.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(asked, [format!("{TREE}?recursive=true")]);
    assert!(!desk.out().exists());
}

#[test]
fn people_are_told_how_to_go_on() {
    let (hub, desk) = (Hub::of(Repo::whole()), Desk::new());
    let arguments = ["weights", "fetch", "--stages", "audio-encoder", "--endpoint", &hub.url, "--out"];
    let run =
        |more: &[&str]| Command::new(binary("avatar")).args(arguments).arg(desk.out()).args(more).output().unwrap();
    let refused = run(&[]);
    let shown = text(&refused.stderr);
    for part in [WHISPER, "--accept-licence", "excluded", "not needed"].map(|p| p.replace("excluded", "South Korea")) {
        assert!(shown.contains(&part), "{part}: {shown}");
    }
    let done = run(&["--accept-licence"]);
    assert_eq!(text(&done.stdout).trim(), desk.out().to_str().unwrap());
    assert!(text(&done.stderr).contains("next: fetch the other stages too"), "{}", text(&done.stderr));
}

#[test]
fn a_second_run_downloads_nothing_and_a_spoilt_file_is_replaced() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let hub = Hub::of(repo.clone());
    desk.audio(&hub, &[]).succeeded();
    let first = hub.files().len();
    let done = desk.audio(&hub, &[]).succeeded();
    assert_eq!((&done.last()["files_present"], &done.last()["bytes_received"]), (&json!(2), &json!(0)));
    assert_eq!(hub.files().len(), first);
    let mut spoilt = repo.file(WHISPER).to_vec();
    spoilt[7] ^= 1;
    fs::write(desk.out().join(WHISPER), spoilt).unwrap();
    desk.audio(&hub, &[]).succeeded();
    assert!(desk.read(WHISPER) == repo.file(WHISPER));
    assert_eq!(hub.files().len(), first + 1);
}

#[test]
fn a_lost_connection_goes_on_where_it_was() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let served = repo.clone();
    let hub = Hub::start(move |request, earlier| match served.answer(request) {
        answer if request.path.ends_with(WHISPER) && earlier == 0 => answer.cut(),
        answer => answer,
    });
    let done = desk.audio(&hub, &[]).succeeded();
    let half = repo.file(WHISPER).len() / 2;
    assert_eq!(hub.files()[..2], [(WHISPER.to_owned(), None), (WHISPER.to_owned(), Some(half))]);
    assert!(done.events.iter().any(|event| event["event"] == "retry"), "{}", done.all);
    assert!(desk.read(WHISPER) == repo.file(WHISPER));
}

#[test]
fn the_next_run_goes_on_where_the_last_one_ended() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let served = repo.clone();
    let hub = Hub::start(move |request, earlier| match served.answer(request) {
        answer if request.path.ends_with(WHISPER) && earlier == 0 => answer.cut(),
        answer => answer,
    });
    let failure = desk.audio(&hub, &["--retries", "0"]);
    assert!(failure.failed(1, "UNAVAILABLE").contains("(attempt 1 of 1)"), "{}", failure.all);
    assert!(desk.files().iter().all(|path| path.ends_with(".part")), "{:?}", desk.files());
    let half = repo.file(WHISPER).len() / 2;
    let done = desk.audio(&hub, &[]).succeeded();
    assert_eq!(hub.files()[1], (WHISPER.to_owned(), Some(half)));
    let received = repo.file(WHISPER).len() - half + repo.file(WHISPER_CONFIG).len();
    assert_eq!(done.last()["bytes_received"], json!(received));
    assert_eq!(desk.files(), [WHISPER_CONFIG, WHISPER]);
}

#[test]
fn a_part_of_another_version_is_dropped() {
    let desk = Desk::new();
    let (old, mut new) = (Repo::whole(), Repo::whole());
    new.files.get_mut(WHISPER).unwrap()[0] ^= 1;
    let hub = Hub::start(move |request, _| match old.answer(request) {
        answer if request.path.ends_with(WHISPER) => answer.cut(),
        answer => answer,
    });
    assert_eq!(desk.audio(&hub, &["--retries", "0"]).code, Some(1));
    let hub = Hub::of(new.clone());
    desk.audio(&hub, &[]).succeeded();
    assert_eq!(hub.files()[0], (WHISPER.to_owned(), None));
    assert!(desk.read(WHISPER) == new.file(WHISPER));
    assert_eq!(desk.files(), [WHISPER_CONFIG, WHISPER]);
}

#[test]
fn a_server_without_ranges_is_asked_for_the_whole() {
    for wrong_range in [None, Some("bytes 0-9/10"), Some("nonsense")] {
        let (repo, desk) = (Repo::whole(), Desk::new());
        let served = repo.clone();
        let hub = Hub::start(move |request, earlier| {
            let mut whole = request.clone();
            whole.from = None;
            let answer = served.answer(&whole);
            match (earlier, wrong_range) {
                (0, _) if request.path.ends_with(WHISPER) => answer.cut(),
                (1, Some(range)) => Answer::new(206, "wrong").with("Content-Range", range.to_owned()),
                _ => answer,
            }
        });
        desk.audio(&hub, &[]).succeeded();
        assert!(desk.read(WHISPER) == repo.file(WHISPER), "{wrong_range:?}");
        assert_eq!(desk.files(), [WHISPER_CONFIG, WHISPER]);
    }
}

#[test]
fn a_wrong_hash_is_refused_and_the_file_is_gone() {
    for path in [WHISPER, WHISPER_CONFIG] {
        let (repo, desk) = (Repo::whole(), Desk::new());
        let hub = Hub::start(move |request, _| {
            let mut answer = repo.answer(request);
            if request.path.ends_with(path) {
                answer.body[5] ^= 1;
            }
            answer
        });
        let done = desk.audio(&hub, &[]);
        let message = done.failed(1, "DATA_LOSS");
        assert!(message.contains(path) && message.contains("SHA"), "{message}");
        assert!(!desk.files().iter().any(|found| found.contains(path)), "{:?}", desk.files());
    }
}

#[test]
fn more_or_fewer_bytes_than_listed_are_refused() {
    for announced in [true, false] {
        let (repo, desk) = (Repo::whole(), Desk::new());
        let hub = Hub::start(move |request, _| {
            let mut answer = repo.answer(request);
            if request.path.ends_with(WHISPER) {
                answer.body.extend([0; 1000]);
                answer.sent = answer.body.len();
                answer.announced = announced;
            }
            answer
        });
        let done = desk.audio(&hub, &["--retries", "0"]);
        assert!(done.failed(1, "DATA_LOSS").contains("promises"), "{}", done.all);
        let kept: u64 = desk.files().iter().map(|path| fs::metadata(desk.out().join(path)).unwrap().len()).sum();
        assert_eq!(kept, 0, "{:?}", desk.files());
    }
    let (repo, desk) = (Repo::whole(), Desk::new());
    let hub = Hub::start(move |request, _| match repo.answer(request) {
        mut answer if request.path.ends_with(WHISPER) => {
            answer.body.truncate(10);
            answer.sent = 10;
            answer
        }
        answer => answer,
    });
    let done = desk.audio(&hub, &["--retries", "1"]);
    assert!(done.failed(1, "UNAVAILABLE").contains("ended early"), "{}", done.all);
}

#[test]
fn a_listing_that_leads_out_of_the_folder_is_refused() {
    for path in ["../x.pt", "/tmp/x.pt", "ckpts/../../x.pt", "ckpts\\x.pt"] {
        let (repo, desk) = (Repo::whole(), Desk::new());
        let hub = Hub::start(move |_, _| {
            let mut entries = repo.entries();
            entries.push(json!({ "type": "file", "path": path, "size": 1, "oid": "0".repeat(40) }));
            Answer::new(200, json!(entries).to_string())
        });
        let done = desk.audio(&hub, &[]);
        assert!(done.failed(1, "DATA_LOSS").contains("does not stay inside"), "{path}");
        assert_eq!(hub.files(), []);
    }
}

#[test]
fn a_listing_without_end_is_refused() {
    let desk = Desk::new();
    let long = Hub::start(|_, _| Answer::new(200, vec![b' '; (16 << 20) + 1]));
    assert!(desk.audio(&long, &[]).failed(1, "OUT_OF_RANGE").contains("16777216 bytes"));
    let pages = Hub::start(|_, _| Answer::new(200, "[]").with("Link", format!("<{TREE}?x>; rel=\"next\"")));
    assert!(desk.audio(&pages, &[]).failed(1, "OUT_OF_RANGE").contains("100 pages"));
    let circle = Hub::start(|request, _| Answer::redirect(request.path.clone()));
    assert!(desk.audio(&circle, &[]).failed(1, "OUT_OF_RANGE").contains("10 redirects"));
}

#[test]
fn a_listing_in_pages_is_read_to_its_end() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let served = repo.clone();
    let hub = Hub::start(move |request, _| {
        let Some(query) = request.path.strip_prefix(TREE) else { return served.answer(request) };
        let number: usize = query.rsplit_once("cursor=").map_or(0, |(_, number)| number.parse().unwrap());
        let entries = served.entries();
        let pages: Vec<_> = entries.chunks(5).collect();
        let answer = Answer::new(200, json!(pages[number]).to_string());
        if number + 1 == pages.len() {
            return answer;
        }
        answer.with("Link", format!("<{TREE}?recursive=true&cursor={}>; rel=\"next\"", number + 1))
    });
    desk.audio(&hub, &[]).succeeded();
    assert_eq!(desk.files(), [WHISPER_CONFIG, WHISPER]);
    let pages = hub.requests().iter().filter(|request| request.path.starts_with(TREE)).count();
    assert_eq!(pages, repo.entries().len().div_ceil(5));
}

#[test]
fn refusals_are_explained() {
    for (status, code, part) in [
        (404, "NOT_FOUND", "no such repository"),
        (401, "UNAUTHENTICATED", "valid token"),
        (403, "PERMISSION_DENIED", "may not read"),
    ] {
        let hub = Hub::start(move |_, _| Answer::new(status, "<html>"));
        let done = Desk::new().audio(&hub, &[]);
        assert!(done.failed(1, code).contains(part), "{}", done.all);
        assert_eq!(hub.requests().len(), 1, "{status} is final");
    }
    let mut repo = Repo::whole();
    repo.files.remove(WHISPER_CONFIG);
    let done = Desk::new().audio(&Hub::of(repo), &[]);
    assert!(done.failed(1, "NOT_FOUND").contains("Whisper's configuration"), "{}", done.all);
}

#[test]
fn a_busy_server_is_asked_again_and_not_for_ever() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let hub = Hub::start(move |request, earlier| match earlier {
        0 => Answer::new(503, "busy").with("Retry-After", "0".to_owned()),
        1 => Answer::new(429, "slowly").with("Retry-After", "0".to_owned()),
        _ => repo.answer(request),
    });
    desk.audio(&hub, &[]).succeeded();
    let hub = Hub::start(|_, _| Answer::new(500, "").with("Retry-After", "0".to_owned()));
    let done = Desk::new().audio(&hub, &["--retries", "3"]);
    assert!(done.failed(1, "UNAVAILABLE").contains("(attempt 4 of 4)"), "{}", done.all);
    assert_eq!(hub.requests().len(), 4);
}

#[test]
fn the_token_goes_to_the_endpoint_alone_and_is_never_shown() {
    let repo = Repo::whole();
    let served = repo.clone();
    let store = Hub::start(move |request, _| served.answer(request));
    let target = store.url.clone();
    let hub = Hub::start(move |request, _| match request.path.strip_prefix(RESOLVE) {
        Some(path) => Answer::redirect(format!("{target}{RESOLVE}{path}")),
        None => repo.answer(request),
    });
    let seen = |hub: &Hub| hub.requests().into_iter().map(|r| r.authorization).collect::<Vec<_>>();
    let desk = Desk::new();
    let token = desk.0.path().join("token");
    fs::write(&token, "hf_from_file\n").unwrap();
    let more = ["--accept-licence", "--stages", "audio-encoder"];
    let from_env = Done::of(desk.command(&hub, &more).env("HF_TOKEN", "hf_from_env").output().unwrap()).succeeded();
    assert_eq!(seen(&hub), vec![Some("Bearer hf_from_env".to_owned()); 3]);
    assert_eq!(seen(&store), [None, None]);
    let desk = Desk::new();
    let more = [&more[..], &["--token-file", token.to_str().unwrap()]].concat();
    let from_file = Done::of(desk.command(&hub, &more).env("HF_TOKEN", "hf_from_env").output().unwrap()).succeeded();
    assert_eq!(seen(&hub)[3..], vec![Some("Bearer hf_from_file".to_owned()); 3]);
    assert_eq!(seen(&store), vec![None; 4]);
    let wrong = Done::of(desk.command(&hub, &[]).env("HF_TOKEN", "hf_from \u{e9}nv").output().unwrap());
    assert_eq!(wrong.code, Some(2));
    let help =
        Command::new(binary("avatar")).args(["weights", "fetch", "--help"]).env("HF_TOKEN", "hf_from_env").output();
    let shown = [from_env.all, from_file.all, wrong.all, text(&help.unwrap().stdout)];
    assert!(shown.iter().all(|text| !text.contains("hf_from")), "{shown:?}");
    assert!(shown[3].contains("HF_TOKEN") && !shown[3].contains("--token "), "{}", shown[3]);
}

#[test]
fn a_redirect_says_what_the_content_hashes_to() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let served = repo.clone();
    let hub = Hub::start(move |request, _| match request.path.strip_prefix(RESOLVE) {
        Some(path) if !request.path.ends_with("?moved") => {
            Answer::redirect(format!("{RESOLVE}{path}?moved")).with("X-Linked-ETag", format!("\"{}\"", "a".repeat(64)))
        }
        _ => {
            let mut request = request.clone();
            request.path = request.path.trim_end_matches("?moved").to_owned();
            served.answer(&request)
        }
    });
    let done = desk.audio(&hub, &[]);
    assert!(done.failed(1, "ABORTED").contains("another file"), "{}", done.all);
}

#[test]
fn a_file_that_cannot_fit_is_refused_before_it_is_begun() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let hub = Hub::start(move |_, _| {
        let mut entries = repo.entries();
        let large = entries.iter_mut().find(|entry| entry["path"] == WHISPER).unwrap();
        large["lfs"]["size"] = json!(1u64 << 60);
        Answer::new(200, json!(entries).to_string())
    });
    let done = desk.audio(&hub, &[]);
    let message = done.failed(1, "RESOURCE_EXHAUSTED");
    assert!(message.contains("1152921504606") && message.contains("are free"), "{message}");
    assert_eq!(hub.files(), []);
}

#[test]
fn two_runs_at_once_are_refused_and_an_interrupt_exits_with_130() {
    let (repo, desk) = (Repo::whole(), Desk::new());
    let served = repo.clone();
    let silent = Arc::new(Mutex::new(true));
    let still = silent.clone();
    let hub = Hub::start(move |request, _| {
        let mut answer = served.answer(request);
        if request.path.ends_with(WHISPER) && *still.lock().unwrap() {
            answer = answer.cut();
            answer.hold = true;
        }
        answer
    });
    let more = ["--accept-licence", "--stages", "audio-encoder"];
    let mut first = desk.command(&hub, &more).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"downloading\"")));
    let second = desk.audio(&hub, &[]);
    assert!(second.failed(1, "ABORTED").contains("another `avatar weights fetch`"), "{}", second.all);
    assert!(Command::new("kill").args(["-INT", &first.id().to_string()]).status().unwrap().success());
    assert_eq!(first.wait().unwrap().code(), Some(130));
    let last: Value = serde_json::from_str(&lines.map(Result::unwrap).last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["code"]), (&json!("failed"), &json!("CANCELLED")));
    *silent.lock().unwrap() = false;
    desk.audio(&hub, &[]).succeeded();
    assert!(desk.read(WHISPER) == repo.file(WHISPER));
}

#[test]
fn wrong_flags_are_refused_before_any_request() {
    let (hub, desk) = (Hub::of(Repo::whole()), Desk::new());
    for (flag, value) in [("repo", "a"), ("revision", "../x"), ("token-file", "/no/such/file"), ("endpoint", "ftp://x")]
    {
        let done = Done::of(desk.command(&hub, &[&format!("--{flag}"), value][..]).output().unwrap());
        // A second --endpoint is clap's to refuse.
        assert_eq!(done.code, Some(2), "{flag}: {}", done.all);
    }
    fs::write(desk.out(), "a file").unwrap();
    assert_eq!(desk.audio(&hub, &[]).last()["field"], "out");
    assert_eq!(hub.requests(), []);
}
