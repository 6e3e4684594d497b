//! How a download's progress is shown: a bar, lines, JSON events, or not at all.

use std::{
    io::IsTerminal as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::{catalogue, plan::Wanted};
use crate::{
    failure::Failure,
    progress::{print_line, print_text},
};

/// Time between two lines about one file.
const LINES: Duration = Duration::from_secs(10);
/// Time between two JSON events about one file.
const EVENTS: Duration = Duration::from_secs(1);
/// A file whose hashing takes long enough to be told.
const LARGE: u64 = 64 << 20;

/// Shows progress on standard error, and the result on standard output.
pub struct Report {
    form: Form,
    quiet: bool,
    current: Option<Current>,
}

enum Form {
    Json,
    Bars,
    Lines,
}

/// The file that is being read or written.
struct Current {
    doing: &'static str,
    path: String,
    bytes: u64,
    done: u64,
    /// Where and when this began, for the pace.
    from: u64,
    since: Instant,
    shown: Instant,
    bar: Option<ProgressBar>,
}

/// What a finished download left in the folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fetched {
    /// The folder.
    pub path: PathBuf,
    /// Files that the stages need; all of them are there and have the right hash.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them were there before.
    pub files_present: usize,
    /// Bytes that came over the network.
    pub bytes_received: u64,
    /// Time for all of it.
    pub seconds: f64,
    /// What to do now.
    pub next: String,
}

impl Report {
    /// A bar where standard error is a terminal, lines elsewhere, JSON where asked for.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let form = if json {
            Form::Json
        } else if std::io::stderr().is_terminal() && !quiet {
            Form::Bars
        } else {
            Form::Lines
        };
        Self { form, quiet, current: None }
    }

    /// Names the licence, before anything else.
    pub fn licence(&mut self, page: &str) {
        let (name, excludes) = (super::LICENCE, super::EXCLUDED);
        let value = json!({ "event": "licence", "name": name, "excluded_regions": excludes, "page": page });
        let excludes = excludes.join(", ");
        self.say(&value, &format!("licence: {name}, not granted in: {excludes}\nlicence: its text is at {page}"));
    }

    /// Names the files that the stages need.
    pub fn plan(&mut self, files: &[Wanted]) {
        for Wanted { path, bytes, .. } in files {
            let value = json!({ "event": "file", "path": path, "bytes": bytes });
            self.say(&value, &format!("{:>10}  {path}", DecimalBytes(*bytes).to_string()));
        }
        let (count, bytes) = (files.len(), total(files));
        let value = json!({ "event": "listed", "files": count, "bytes": bytes });
        let never = catalogue::NEVER;
        let all = DecimalBytes(bytes);
        self.say(&value, &format!("{count} files, {bytes} bytes ({all}); {never} is not needed"));
    }

    /// Says something in passing.
    pub fn note(&mut self, message: &str) {
        self.say(&json!({ "event": "note", "message": message }), message);
    }

    /// A file is being hashed.
    pub fn checking(&mut self, path: &str, bytes: u64) {
        self.begin("checking", path, bytes, 0);
        if bytes >= LARGE {
            let value = json!({ "event": "checking", "path": path, "bytes": bytes });
            self.say(&value, &format!("{path}: checking the {} that are there", DecimalBytes(bytes)));
        }
    }

    /// A file is being downloaded, from byte `have` on.
    pub fn downloading(&mut self, path: &str, bytes: u64, have: u64) {
        self.begin("downloading", path, bytes, have);
        let value = json!({ "event": "downloading", "path": path, "bytes": bytes, "done": have });
        let of = DecimalBytes(bytes);
        match have {
            0 => self.say(&value, &format!("{path}: downloading {of}")),
            _ => self.say(&value, &format!("{path}: downloading on after {} of {of}", DecimalBytes(have))),
        }
    }

    /// More bytes of the current file are done.
    pub fn advance(&mut self, bytes: u64) {
        let Some(current) = &mut self.current else { return };
        current.done += bytes;
        if let Some(bar) = &current.bar {
            bar.set_position(current.done);
        }
        let pause = if matches!(self.form, Form::Json) { EVENTS } else { LINES };
        if current.shown.elapsed() < pause || matches!(self.form, Form::Bars) {
            return;
        }
        current.shown = Instant::now();
        let (value, line) = current.describe();
        self.say(&value, &line);
    }

    /// A failed request will be sent again.
    pub fn retry(&mut self, path: &str, reason: &str, wait: Duration) {
        let seconds = wait.as_secs_f64();
        let value = json!({ "event": "retry", "path": path, "reason": reason, "wait_seconds": seconds });
        self.say(&value, &format!("{path}: {reason}; trying again in {seconds:.1} s"));
    }

    /// A file was there already.
    pub fn present(&mut self, path: &str, bytes: u64) {
        self.end();
        self.say(
            &json!({ "event": "present", "path": path, "bytes": bytes }),
            &format!("{path}: is there, hash right"),
        );
    }

    /// A file has arrived and has the right hash.
    pub fn fetched(&mut self, path: &str, bytes: u64) {
        self.end();
        self.say(&json!({ "event": "fetched", "path": path, "bytes": bytes }), &format!("{path}: done, hash right"));
    }

    /// Shows the result: the last thing on standard output.
    pub fn completed(mut self, result: &Fetched) {
        self.end();
        match self.form {
            Form::Json => {
                let mut value = json!(result);
                if let Some(fields) = value.as_object_mut() {
                    fields.insert("event".to_owned(), json!("completed"));
                }
                print_line(&value);
            }
            Form::Bars | Form::Lines if self.quiet => {}
            Form::Bars | Form::Lines => {
                let Fetched { files, bytes, files_present, bytes_received, seconds, next, path } = result;
                let (all, received) = (DecimalBytes(*bytes), DecimalBytes(*bytes_received));
                eprintln!("{files} files, {all}; {files_present} were there, {received} received in {seconds:.1} s");
                eprintln!("next: {next}");
                print_text(&path.display().to_string());
            }
        }
    }

    /// Shows the failure: for programs on standard output, for people on standard error.
    pub fn failed(mut self, failure: &Failure) {
        self.end();
        match self.form {
            Form::Json => {
                let Failure { code, message, field, .. } = failure;
                print_line(&json!({ "event": "failed", "code": code, "message": message, "field": field }));
            }
            Form::Bars | Form::Lines => eprintln!("{}", failure.sentence()),
        }
    }

    fn begin(&mut self, doing: &'static str, path: &str, bytes: u64, from: u64) {
        self.end();
        let now = Instant::now();
        let bar = (matches!(self.form, Form::Bars) && !self.quiet).then(|| bar(doing, path, bytes, from));
        self.current =
            Some(Current { doing, path: path.to_owned(), bytes, done: from, from, since: now, shown: now, bar });
    }

    fn end(&mut self) {
        if let Some(bar) = self.current.take().and_then(|current| current.bar) {
            bar.finish_and_clear();
        }
    }

    fn say(&mut self, value: &Value, line: &str) {
        if self.quiet {
            return;
        }
        let bar = self.current.as_ref().and_then(|current| current.bar.as_ref());
        match (&self.form, bar) {
            (Form::Json, _) => print_line(value),
            // Above the bar, which stays the last line.
            (_, Some(bar)) => bar.suspend(|| eprintln!("{line}")),
            (_, None) => eprintln!("{line}"),
        }
    }
}

impl Current {
    fn describe(&self) -> (Value, String) {
        let Self { doing, path, bytes, done, .. } = self;
        let pace = (done - self.from) as f64 / self.since.elapsed().as_secs_f64().max(1e-3);
        let left = bytes.saturating_sub(*done) as f64 / pace.max(1.0);
        let value = json!({
            "event": doing, "path": path, "bytes": bytes, "done": done,
            "bytes_per_second": pace.round(), "remaining_seconds": left.round(),
        });
        let (have, of, pace) = (DecimalBytes(*done), DecimalBytes(*bytes), DecimalBytes(pace as u64));
        (value, format!("{path}: {doing}, {have} of {of}, {pace} a second, {left:.0} s left"))
    }
}

/// Bytes of all files; the plan has checked that they add up.
pub fn total(files: &[Wanted]) -> u64 {
    files.iter().map(|file| file.bytes).fold(0, u64::saturating_add)
}

fn bar(doing: &'static str, path: &str, bytes: u64, from: u64) -> ProgressBar {
    let template = "{prefix:<12} {bar:24} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let name = path.rsplit('/').next().unwrap_or(path).to_owned();
    let bar = ProgressBar::new(bytes).with_style(style).with_prefix(doing).with_message(name).with_position(from);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
