//! An object store that speaks S3, for one test: in a temporary folder, on free ports of this host, gone when it is
//! dropped.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

/// Where `scripts/setup test` puts SeaweedFS.
const VENV: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/venv/bin");
/// Its program.
const PROGRAM: &str = "weed";
/// The only one who may do anything.
const KEY: &str = "avatar";
const SECRET: &str = "only-for-tests";
/// The bucket that there is.
const BUCKET: &str = "films";
/// How long a server may take until it answers, on a machine that does much else.
const READY: Duration = Duration::from_secs(120);
/// How often it is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(50);
/// How long one question may take.
const ANSWER: Duration = Duration::from_secs(10);
/// Times that free ports are looked for: between the choice and the use another process may take one.
const TRIES: usize = 5;
/// Flags with a port each. The last one is that of S3.
const PORTS: [&str; 8] = [
    "-master.port",
    "-master.port.grpc",
    "-volume.port",
    "-volume.port.grpc",
    "-filer.port",
    "-filer.port.grpc",
    "-s3.port.grpc",
    "-s3.port",
];
/// Nothing that a test does not need, no word to anybody, and room for a little.
const FLAGS: [&str; 10] = [
    "server",
    "-s3",
    "-ip=127.0.0.1",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=64",
    "-volume.max=64",
    "-volume.minFreeSpace=1MiB",
    "-volume.preStopSeconds=0",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
];

/// A running server with an empty bucket. Dropping it ends it, and removes all that it kept.
#[derive(Debug)]
pub struct Server {
    folder: TempDir,
    program: PathBuf,
    ports: Vec<u16>,
    url: String,
    process: Option<Child>,
}

impl Server {
    /// Starts a server.
    ///
    /// Errors: SeaweedFS is not installed, or does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("s3-").tempdir()?;
        let mut server = Self { folder, program: find()?, ports: Vec::new(), url: String::new(), process: None };
        let who = format!(
            r#"{{"identities": [{{"name": "avatar", "credentials": [{{"accessKey": "{KEY}", "secretKey": "{SECRET}"}}], "actions": ["Admin"]}}]}}"#
        );
        fs::write(server.path("s3.json"), who)?;
        fs::create_dir_all(server.path("data"))?;
        for left in (0..TRIES).rev() {
            // All are held until all are chosen.
            let free: Vec<TcpListener> =
                PORTS.iter().map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
            let ports = free.iter().map(|port| Ok(port.local_addr()?.port()));
            server.ports = ports.collect::<Result<_>>()?;
            drop(free);
            server.url = format!("http://127.0.0.1:{}", server.port());
            match server.resume() {
                Err(error) if left == 0 => return Err(error),
                Err(_) => {}
                Ok(()) => break,
            }
        }
        Ok(server)
    }

    /// The URL of its S3 interface.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The name of its bucket.
    #[must_use]
    pub fn bucket(&self) -> &'static str {
        BUCKET
    }

    /// A file of credentials, as AWS has them.
    #[must_use]
    pub fn credentials(&self) -> String {
        format!("[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    }

    /// Names of the objects below a prefix of the bucket, at most 1,000.
    ///
    /// Errors: the server does not answer.
    pub fn objects(&self, prefix: &str) -> Result<Vec<String>> {
        let folder = format!("/buckets/{BUCKET}/{prefix}/");
        let answer = ask(self.ports[4], &format!("{folder}?limit=1000"))?;
        let names = answer.split("\"FullPath\"").skip(1).filter_map(|rest| rest.split('"').nth(1));
        Ok(names.filter_map(|name| name.strip_prefix(&folder)).map(str::to_owned).collect())
    }

    /// Kills the server at once, as a fault of the machine would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts a killed server again at the same address, and waits until it answers and has its bucket.
    ///
    /// Errors: it does not start in time; the end of its log is told.
    pub fn resume(&mut self) -> Result<()> {
        self.process = Some(self.launch()?);
        let began = Instant::now();
        while began.elapsed() < READY {
            let ended = self.process.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() {
                break;
            }
            if self.is_ready() && self.make_bucket().is_ok() {
                return Ok(());
            }
            sleep(LOOK);
        }
        self.kill();
        bail!("SeaweedFS did not start: {}", self.log())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn port(&self) -> u16 {
        self.ports.last().copied().unwrap_or_default()
    }

    fn launch(&self) -> Result<Child> {
        let log = File::create(self.path("log"))?;
        let mut command = Command::new(&self.program);
        command.args(FLAGS).current_dir(self.folder.path()).env_clear().env("HOME", self.folder.path());
        command.env("PATH", "/usr/bin:/bin").env("TMPDIR", self.folder.path());
        for (flag, path) in [("-dir", "data"), ("-s3.config", "s3.json")] {
            command.arg(format!("{flag}={}", self.path(path).display()));
        }
        for (flag, path) in [("-filer.localSocket", "filer.sock"), ("-s3.localSocket", "s3.sock")] {
            command.arg(format!("{flag}={}", self.path(path).display()));
        }
        for (flag, port) in PORTS.iter().zip(&self.ports) {
            command.arg(format!("{flag}={port}"));
        }
        let started = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        started.with_context(|| format!("{}", self.program.display()))
    }

    /// Whether its S3 interface takes requests, and a part of the server has room for what they bring.
    fn is_ready(&self) -> bool {
        // Who asks is not known, which only a server that is there can say.
        ask(self.port(), "/").is_ok_and(|answer| answer.contains(" 403 "))
            && ask(self.ports[0], "/dir/assign").is_ok_and(|answer| answer.contains("\"fid\""))
    }

    /// Makes the bucket by the server's own door, which needs no signature.
    fn make_bucket(&self) -> Result<()> {
        let mut shell = Command::new(&self.program)
            .args(["shell", &format!("-master=127.0.0.1:{}.{}", self.ports[0], self.ports[1])])
            .env_clear()
            .env("HOME", self.folder.path())
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut commands = shell.stdin.take().context("the shell has no input")?;
        commands.write_all(format!("s3.bucket.create -name {BUCKET}\ns3.bucket.list\n").as_bytes())?;
        drop(commands);
        let told = shell.wait_with_output()?;
        let told = String::from_utf8_lossy(&told.stdout);
        // The list of what there is then comes last.
        let listed = told.lines().any(|line| line.split_whitespace().next() == Some(BUCKET));
        ensure!(listed, "the bucket could not be made: {told}");
        Ok(())
    }

    fn log(&self) -> String {
        let log = fs::read(self.path("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Asks one of the server's parts.
fn ask(port: u16, path: &str) -> Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nAccept: application/json\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.take(1 << 16).read_to_string(&mut answer)?;
    Ok(answer)
}

/// The program of `scripts/setup test`, or else that of the system.
fn find() -> Result<PathBuf> {
    let own = Path::new(VENV).join(PROGRAM);
    let system = ["/usr/local/bin", "/usr/bin"].map(|folder| Path::new(folder).join(PROGRAM));
    let found = std::iter::once(own).chain(system).find(|program| program.exists());
    found.context("SeaweedFS is not installed: run `scripts/setup test`")
}
