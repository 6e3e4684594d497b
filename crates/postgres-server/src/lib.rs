//! A PostgreSQL server for one test: in a temporary folder, on a free port of this host, gone when it is dropped.
//!
//! PostgreSQL does not run as root. A test that does starts it as another user, who then owns the folder.

mod programs;

use std::{
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

/// Id of the user and of the group `nobody`, who own nothing.
const NOBODY: u32 = 65_534;
/// The name and the password of the one who may do everything.
const OWNER: &str = "avatar";
const PASSWORD: &str = "only-for-tests";
/// How long a server may take until it answers, on a machine that does much else.
const READY: Duration = Duration::from_secs(60);
/// How often it is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(20);
/// Ports that are tried: between the choice of a free one and its use another process may take it.
const PORTS: usize = 5;
/// A kill leaves what was written to the system, so nothing need wait for the disk here; few clients, little memory.
const SETTINGS: [&str; 6] = [
    "fsync=off",
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "dynamic_shared_memory_type=mmap",
    "shared_buffers=16MB",
    "max_connections=150",
];

/// A running server. Dropping it ends it, and removes all that it kept.
#[derive(Debug)]
pub struct Server {
    folder: TempDir,
    programs: PathBuf,
    port: u16,
    process: Option<Child>,
}

impl Server {
    /// Starts a server without a database of its own but `postgres`.
    ///
    /// Errors: PostgreSQL is not installed, or does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("postgres-").tempdir()?;
        let programs = programs::find(folder.path(), user().is_some())?;
        let mut server = Self { folder, programs, port: 0, process: None };
        server.make()?;
        for left in (0..PORTS).rev() {
            server.port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            match server.resume() {
                Err(error) if left == 0 => return Err(error),
                Err(_) => {}
                Ok(()) => break,
            }
        }
        Ok(server)
    }

    /// The URL of a database, with its password.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{OWNER}:{PASSWORD}@127.0.0.1:{}/{database}", self.port)
    }

    /// Kills the server at once, as a fault of the machine would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts a killed server again at the same address, and waits until it answers.
    ///
    /// Errors: it does not start in time; the end of its log is told.
    pub fn resume(&mut self) -> Result<()> {
        let began = Instant::now();
        let mut starts = 0;
        while began.elapsed() < READY {
            let mut process = self.launch()?;
            starts += 1;
            while process.try_wait()?.is_none() {
                if self.is_ready(process.id()) {
                    self.process = Some(process);
                    return Ok(());
                }
                if began.elapsed() > READY {
                    let _ = process.kill();
                    let _ = process.wait();
                    break;
                }
                sleep(LOOK);
            }
            // What a killed server left may still be ending; a port that is taken stays so.
            if starts > 1 && self.log().contains("could not bind") {
                break;
            }
            sleep(LOOK);
        }
        bail!("PostgreSQL did not start: {}", self.log())
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> String {
        let log = fs::read(self.folder.path().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").current_dir(self.folder.path());
        if let Some(user) = user() {
            command.uid(user).gid(user);
        }
        command
    }

    /// Makes the data folder.
    fn make(&self) -> Result<()> {
        let password = self.folder.path().join("password");
        fs::write(&password, PASSWORD)?;
        own(&password)?;
        own(self.folder.path())?;
        let mut command = self.program("initdb");
        command.args(["--username", OWNER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]);
        let made = command.arg("--pwfile").arg(&password).arg("--pgdata").arg(self.data()).output();
        let made = made.with_context(|| format!("{}", self.programs.display()))?;
        ensure!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        Ok(())
    }

    fn launch(&self) -> Result<Child> {
        let log = File::create(self.folder.path().join("log"))?;
        let mut command = self.program("postgres");
        command.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for setting in SETTINGS {
            command.args(["-c", setting]);
        }
        let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        started.with_context(|| format!("{}", self.programs.display()))
    }

    /// The server notes its process, and on the eighth line how far it is.
    fn is_ready(&self, process: u32) -> bool {
        let noted = fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
        let lines: Vec<&str> = noted.lines().map(str::trim).collect();
        lines.first() == Some(&process.to_string().as_str()) && lines.get(7) == Some(&"ready")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // At once, but so that its processes end before the folder goes.
            let _ = Command::new("kill").args(["-QUIT", &process.id().to_string()]).status();
            let _ = process.wait();
        }
    }
}

/// The user that the server runs as, where it is not this one.
fn user() -> Option<u32> {
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    root.then_some(NOBODY)
}

/// Gives a file to the server's user.
fn own(path: &Path) -> Result<()> {
    if let Some(user) = user() {
        chown(path, Some(user), Some(user))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}
