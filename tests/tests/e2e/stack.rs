//! Real processes of the product, on free ports, that end with the test.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, UNIX_EPOCH},
};

use tempfile::TempDir;

/// How long a process may take to say that it is ready.
const READY: Duration = Duration::from_secs(60);

/// The stages, in the order of the gateway's flags.
pub const STAGES: [&str; 5] = ["audio-encoder", "text-encoder", "image-encoder", "diffusion", "vae-decode"];

/// Path of a binary of the workspace.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace --bins` first", path.display());
    path
}

/// A tiny checkpoint, made once per build and shared by all tests.
pub fn tiny_models() -> PathBuf {
    let avatar = binary("avatar");
    let built = fs::metadata(&avatar).and_then(|m| m.modified()).unwrap();
    let stamp = built.duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let models = shared.join(format!("tiny-{stamp}"));
    if !models.exists() {
        let mine = tempfile::tempdir_in(shared).unwrap();
        let out = mine.path().join("models");
        let made = Command::new(avatar)
            .args(["weights", "synth", "--size", "tiny", "--seed", "1", "--out"])
            .arg(&out)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", text(&made.stderr));
        // Another test may have been quicker; its checkpoint is the same.
        let _ = fs::rename(&out, &models);
    }
    models
}

/// A copy of the tiny checkpoint that a test may spoil.
pub fn own_models() -> TempDir {
    let copy = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    copy_tree(&tiny_models(), copy.path());
    copy
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), &target).map(drop).unwrap()
        }
    }
}

/// One running process; it is killed when dropped.
pub struct Process {
    child: Child,
    /// The line that it printed when it was ready.
    pub ready: String,
}

impl Process {
    /// Starts a binary and waits for its `ready` line.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary(name))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.starts_with("ready ") {
                    let _ = send.send(line);
                }
            }
        });
        match receive.recv_timeout(READY) {
            Ok(ready) => Self { child, ready },
            Err(error) => {
                let _ = child.kill();
                panic!("{name} is not ready: {error}");
            }
        }
    }

    /// The address after `key=` in the ready line.
    pub fn address(&self, key: &str) -> String {
        let found = self.ready.split_whitespace().find_map(|word| word.strip_prefix(&format!("{key}=")));
        found.unwrap_or_else(|| panic!("no {key} in {:?}", self.ready)).to_owned()
    }

    /// Bytes of it that the system holds in memory, mapped files included.
    pub fn resident_bytes(&self) -> u64 {
        let pages = fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// Asks the process to end, and gives its exit status.
    pub fn terminate(mut self) -> Option<i32> {
        self.signal("TERM");
        self.child.wait().unwrap().code()
    }

    /// Sends the process a signal, such as `STOP` or `CONT`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Kills the process at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts one stage.
pub fn stage(name: &str, models: &Path) -> Process {
    Process::start(name, &["--listen", "127.0.0.1:0", "--models", models.to_str().unwrap()])
}

/// A gateway and whatever it needs.
pub struct Stack {
    /// The gateway, or the one process that is everything.
    pub gateway: Process,
    /// The stages by name, where they are processes of their own.
    pub stages: Vec<(&'static str, Process)>,
    /// How the gateway was started.
    command: (&'static str, Vec<String>),
    /// What the gateway keeps.
    _data: TempDir,
}

impl Stack {
    /// Six processes.
    pub fn six(models: &Path) -> Self {
        Self::six_with(models, &[])
    }

    /// Six processes, the gateway with more flags.
    pub fn six_with(models: &Path, flags: &[&str]) -> Self {
        let stages: Vec<_> = STAGES.iter().map(|name| (*name, stage(name, models))).collect();
        let mut arguments: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        for (name, process) in &stages {
            arguments.extend([format!("--{name}"), format!("http://{}", process.address("grpc"))]);
        }
        Self::start("gateway", arguments, stages)
    }

    /// Everything in one process.
    pub fn one(models: &Path) -> Self {
        Self::one_with(models, &[])
    }

    /// Everything in one process, with more flags.
    pub fn one_with(models: &Path, flags: &[&str]) -> Self {
        let arguments = [&["serve", "--models", models.to_str().unwrap()], flags].concat();
        Self::start("avatar", arguments.into_iter().map(str::to_owned).collect(), Vec::new())
    }

    fn start(name: &'static str, mut arguments: Vec<String>, stages: Vec<(&'static str, Process)>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let ports = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir", data.path().to_str().unwrap()];
        arguments.extend(ports.map(str::to_owned));
        Self { gateway: run(name, &arguments), stages, command: (name, arguments), _data: data }
    }

    /// Kills the gateway at once, and starts it again on the same data.
    pub fn kill_and_restart(&mut self) {
        self.gateway.kill();
        let (name, arguments) = &self.command;
        self.gateway = run(name, arguments);
    }

    /// One more gateway on the same stages and the same data.
    pub fn another_gateway(&self) -> Process {
        run(self.command.0, &self.command.1)
    }

    /// One more gateway on the same stages, with data of its own.
    pub fn another_gateway_in(&self, data: &Path) -> Process {
        let mut arguments = self.command.1.clone();
        let at = arguments.iter().position(|flag| flag == "--data-dir").unwrap();
        arguments[at + 1] = data.to_str().unwrap().to_owned();
        run(self.command.0, &arguments)
    }

    /// Kills a stage at once, and starts it again at the same address.
    pub fn kill_and_restart_stage(&mut self, name: &str, models: &Path) {
        let (known, process) = self.stages.iter_mut().find(|(known, _)| *known == name).unwrap();
        let address = process.address("grpc");
        process.kill();
        *process = Process::start(known, &["--listen", &address, "--models", models.to_str().unwrap()]);
    }

    /// URL of the public gRPC door.
    pub fn grpc(&self) -> String {
        format!("http://{}", self.gateway.address("grpc"))
    }

    /// URL of the REST door.
    pub fn http(&self) -> String {
        format!("http://{}", self.gateway.address("http"))
    }
}

fn run(name: &str, arguments: &[String]) -> Process {
    Process::start(name, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A client for the REST door. It has no root certificates, for a test machine need not have any.
pub fn web() -> reqwest::Client {
    // Refused if there is one already, which then is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().tls_certs_only([]).build().unwrap()
}

/// Runs `avatar` to its end.
pub fn avatar(arguments: &[&str]) -> Output {
    Command::new(binary("avatar")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Bytes as text, for messages.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The bytes of the first video stream of an MP4, and what ffprobe says of the file.
pub fn video_stream(mp4: &Path) -> Vec<u8> {
    let mp4 = mp4.to_str().unwrap();
    let copied = Command::new("ffmpeg")
        .args(["-v", "error", "-i", mp4, "-map", "0:v:0", "-c", "copy", "-f", "h264", "-"])
        .output()
        .unwrap();
    assert!(copied.status.success(), "{}", text(&copied.stderr));
    assert!(!copied.stdout.is_empty());
    copied.stdout
}

/// What ffprobe says of a file.
pub fn probe(mp4: &Path) -> serde_json::Value {
    let mp4 = mp4.to_str().unwrap();
    let shown = Command::new("ffprobe")
        .args(["-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", mp4])
        .output()
        .unwrap();
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    serde_json::from_slice(&shown.stdout).unwrap()
}
