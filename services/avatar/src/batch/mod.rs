//! `avatar batch`: a video for each row of a table.

mod flags;
mod summary;
mod table;
mod work;

use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::task::JoinSet;

pub use self::flags::BatchFlags;
use self::{
    summary::{Line, State},
    table::Row,
    work::{Desk, check_folder},
};
use crate::{
    InProcess,
    client::connect_to,
    failure::{FAILED, Failure},
    generate::Local,
    progress::{print_line, print_text},
    signals::Signals,
};

/// The folder of work in progress, in the folder of the videos.
const WORK: &str = ".batch";

/// How the rows ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    completed: usize,
    /// Of these, those whose video was there before.
    kept: usize,
    failed: usize,
    missing: usize,
}

/// Makes the videos of a table and shows how it went; gives the exit code.
///
/// Errors: a flag is wrong, the table or an earlier summary cannot be read, the folder cannot be written, or a signal
/// came. What was finished by then is in the summary.
pub async fn batch(flags: &BatchFlags) -> Result<u8, Failure> {
    let mut signals = Signals::catch()?;
    let spec = flags.settings.spec(String::new());
    gateway::validate::check(&spec).map_err(|fault| Failure::of_status(&fault.to_status()))?;
    let rows = table::read(&flags.csv, flags.root.as_deref())?;
    check_folder(&flags.out)?;
    let earlier = summary::read(&flags.out)?;
    let (system, client) = match &flags.server {
        Some(server) => (None, connect_to(server)?),
        None => {
            let system = start(flags).await?;
            let client = system.client();
            (Some(system), client)
        }
    };
    let desk = Desk {
        client,
        alone: system.is_some(),
        settings: flags.settings.clone(),
        order: flags.order.clone(),
        folder: flags.out.clone(),
        json: flags.json,
        quiet: flags.quiet,
        closed: AtomicBool::new(false),
    };
    let ended = tokio::select! {
        ended = run(Arc::new(desk), rows, earlier, flags.at_once.into()) => ended,
        () = signals.next() => {
            let message = "interrupted; the same command goes on with what is missing".to_owned();
            Err(Failure { message, ..Failure::interrupted() })
        }
    };
    if let Some(system) = system {
        // What is in work goes on in the next run from where it is.
        system.stop(Duration::ZERO).await;
        drop(system);
        if matches!(ended, Ok(counts) if counts.failed + counts.missing == 0) {
            remove(&flags.out.join(WORK))?;
        }
    }
    let counts = ended?;
    show(flags, counts);
    Ok(if counts.failed + counts.missing == 0 { 0 } else { FAILED })
}

/// Starts the system that makes the videos in this process.
async fn start(flags: &BatchFlags) -> Result<InProcess, Failure> {
    let local = Local::read(&flags.local, true)?;
    if let Some(said) = local.unused.as_ref().filter(|_| !flags.quiet) {
        eprintln!("warning: {said}");
    }
    let at_once = usize::from(flags.at_once);
    let options =
        gateway::Options { min_free_bytes: 0, queue: at_once, concurrent: at_once, ..gateway::Options::default() };
    local.start(&flags.out.join(WORK), options).await
}

/// Works on the rows, some at a time; the summary is up to date after each.
async fn run(
    desk: Arc<Desk>,
    rows: Vec<Row>,
    mut earlier: HashMap<String, Line>,
    at_once: usize,
) -> Result<Counts, Failure> {
    let line = |(row, number): (&Row, usize)| Line { row: number, videoid: row.videoid.clone(), ..Line::default() };
    let mut lines: Vec<Line> = rows.iter().zip(1..).map(line).collect();
    let (mut counts, mut working) = (Counts::default(), JoinSet::new());
    let mut wanted = Vec::new();
    for (at, row) in rows.into_iter().enumerate() {
        match row.wanted {
            Ok(row) => wanted.push((at, row)),
            Err(failure) => {
                lines[at] = lines[at].clone().failed(&failure);
                say(&desk, &lines[at], false);
            }
        }
    }
    summary::write(&desk.folder, &with_earlier(&lines, &earlier))?;
    let mut wanted = wanted.into_iter();
    loop {
        while working.len() < at_once && !desk.closed.load(Ordering::Relaxed) {
            let Some((at, row)) = wanted.next() else { break };
            let (desk, line, known) = (Arc::clone(&desk), lines[at].clone(), earlier.get(&row.videoid).cloned());
            working.spawn(async move { (at, desk.make(line, row, known).await) });
        }
        let Some(ended) = working.join_next().await else { break };
        let (at, (done, kept)) = ended.map_err(|error| Failure::local("a row's work ended", error))?;
        counts.kept += usize::from(kept);
        say(&desk, &done, kept);
        earlier.remove(&done.videoid);
        lines[at] = done;
        summary::write(&desk.folder, &with_earlier(&lines, &earlier))?;
    }
    summary::write(&desk.folder, &lines)?;
    let of = |state| lines.iter().filter(|line| line.state == state).count();
    counts.completed = of(State::Completed);
    (counts.failed, counts.missing) = (of(State::Failed), of(State::Missing));
    Ok(counts)
}

/// The lines with what an earlier run knows of rows whose turn has not come, so that a run that is stopped forgets
/// nothing.
fn with_earlier(lines: &[Line], earlier: &HashMap<String, Line>) -> Vec<Line> {
    let known = |line: &Line| earlier.get(&line.videoid).filter(|_| line.state == State::Missing).cloned();
    lines.iter().map(|line| known(line).map_or(line.clone(), |known| Line { row: line.row, ..known })).collect()
}

/// Says how a row ended.
fn say(desk: &Desk, line: &Line, kept: bool) {
    if desk.quiet {
        return;
    }
    if desk.json {
        let mut value = json!(line);
        value["event"] = json!("row");
        value["kept"] = json!(kept);
        return print_line(&value);
    }
    match line.state {
        State::Completed if kept => eprintln!("{}: {} is there", line.videoid, line.video),
        State::Completed => {
            eprintln!("{}: {}, {} frames, made in {:.1} s", line.videoid, line.video, line.frames, line.seconds)
        }
        State::Failed | State::Missing => eprintln!("error: row {} ({}): {}", line.row, line.videoid, line.message),
    }
}

/// Shows how the batch went: the last thing on standard output.
fn show(flags: &BatchFlags, counts: Counts) {
    let path = flags.out.join(summary::NAME);
    let Counts { completed, kept, failed, missing } = counts;
    if flags.json {
        let event = if failed + missing == 0 { "completed" } else { "failed" };
        let counts = json!({ "event": event, "completed": completed, "kept": kept, "failed": failed, "missing": missing, "summary": path });
        return print_line(&counts);
    }
    if failed + missing > 0 {
        eprintln!("error: {failed} rows failed and {missing} were not begun; {completed} videos are there");
    }
    if !flags.quiet {
        eprintln!("{completed} videos are there, {kept} of them from before");
        print_text(&path.display().to_string());
    }
}

/// Removes the folder of work in progress.
fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Failure::local(folder.display(), error)),
        _ => Ok(()),
    }
}
