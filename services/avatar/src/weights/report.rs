//! How long work on weights is shown: a bar, lines, JSON events, or not at all.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use model::{
    checkpoint::Stage,
    convert::{Converted, Progress},
};
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    progress::{print_line, print_text},
};

/// Time between two JSON events of one stage.
const PAUSE: Duration = Duration::from_millis(500);

/// Shows how far the work is.
pub(super) struct Report {
    form: Form,
    since: Instant,
    told: Option<Instant>,
    stage: String,
}

enum Form {
    Silent,
    Json,
    Bar(ProgressBar),
    Lines,
}

impl Report {
    pub(super) fn new(json: bool, quiet: bool) -> Self {
        let form = match (json, quiet) {
            (_, true) => Form::Silent,
            (true, _) => Form::Json,
            _ if std::io::stderr().is_terminal() => Form::Bar(bar()),
            _ => Form::Lines,
        };
        Self { form, since: Instant::now(), told: None, stage: String::new() }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    pub(super) fn tell(&mut self, progress: Progress<'_>) {
        let Progress { stage, tensor, tensors, tensors_total, bytes, bytes_total } = progress;
        let new = self.stage != stage;
        if new {
            stage.clone_into(&mut self.stage);
        }
        match &self.form {
            Form::Silent => {}
            Form::Bar(bar) => {
                bar.set_length(bytes_total);
                bar.set_position(bytes);
                bar.set_message(format!("{stage}: {tensors} of {tensors_total} tensors"));
            }
            Form::Lines if new => eprintln!("{stage}: {} of {}", size(bytes), size(bytes_total)),
            Form::Lines => {}
            Form::Json => {
                if new || bytes == bytes_total || self.told.is_none_or(|told| told.elapsed() >= PAUSE) {
                    self.told = Some(Instant::now());
                    print_line(&json!({
                        "event": "progress", "stage": stage, "tensor": tensor,
                        "tensors": tensors, "tensors_total": tensors_total,
                        "bytes": bytes, "bytes_total": bytes_total,
                    }));
                }
            }
        }
    }

    /// Says what is done now, where nothing can be counted.
    pub(super) fn say(&mut self, stage: &str, what: &str) {
        match &self.form {
            Form::Silent => {}
            Form::Bar(bar) => {
                bar.enable_steady_tick(Duration::from_millis(200));
                bar.set_style(
                    ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()),
                );
                bar.set_message(format!("{stage}: {what}"));
            }
            Form::Lines => eprintln!("{stage}: {what}"),
            Form::Json => print_line(&json!({ "event": "progress", "stage": stage, "message": what })),
        }
    }

    pub(super) fn end(&self) {
        if let Form::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left  {msg}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows a failure: for programs on standard output, for people on standard error.
pub fn failed(json: bool, failure: &Failure) {
    if json {
        let Failure { code, message, field, .. } = failure;
        print_line(&json!({ "event": "failed", "code": code, "message": message, "field": field }));
    } else {
        eprintln!("{}", failure.sentence());
    }
}

/// Bytes as people read them.
pub(super) fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        _ => format!("{:.2} MB", bytes / 1e6),
    }
}

/// A table with its columns under each other; columns of numbers are on the right.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let number = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
    let widths: Vec<usize> = (0..head.len())
        .map(|i| rows.iter().map(|row| row[i].chars().count()).chain([head[i].len()]).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String], right: &dyn Fn(usize) -> bool| {
        let cells =
            cells.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| {
                if right(i) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let right: Vec<bool> = (0..head.len()).map(|i| rows.iter().all(|row| number(&row[i]))).collect();
    let heads: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let lines = rows.iter().map(|row| line(row, &|i| right[i]));
    [line(&heads, &|i| right[i])].into_iter().chain(lines).collect::<Vec<_>>().join("\n")
}

/// How many tensors are stored in each encoding.
pub(super) fn encodings<'a>(counts: impl IntoIterator<Item = (&'a &'static str, &'a usize)>) -> String {
    counts.into_iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

/// Shows what was written: the last thing on standard output.
pub(super) fn written(json: bool, quiet: bool, results: &[(Stage, Vec<Converted>)], extra: Value, sentence: &str) {
    let all = || results.iter().flat_map(|(stage, all)| all.iter().map(move |one| (stage, one)));
    if json {
        let networks: Vec<Value> = all()
            .map(|(stage, one)| {
                json!({
                    "stage": stage.name(), "network": one.network.name(), "tensors": one.tensors,
                    "parameters": one.parameters, "bytes_before": one.bytes_before, "bytes": one.bytes,
                    "encodings": one.encodings, "left_out": one.left_out,
                    "fallbacks": one.fallbacks.iter().map(|(n, e)| json!({ "tensor": n, "encoding": e })).collect::<Vec<_>>(),
                })
            })
            .collect();
        let mut line = json!({ "event": "completed", "networks": networks });
        if let (Some(line), Value::Object(extra)) = (line.as_object_mut(), extra) {
            line.extend(extra);
        }
        print_line(&line);
        return;
    }
    if quiet {
        return;
    }
    let converted = all().any(|(_, one)| one.bytes_before > 0);
    let rows: Vec<Vec<String>> = all()
        .map(|(stage, one)| {
            let mut row = vec![
                stage.name().to_owned(),
                one.network.name().to_owned(),
                one.tensors.to_string(),
                one.parameters.to_string(),
                size(one.bytes),
                encodings(&one.encodings),
            ];
            if converted {
                row.insert(4, size(one.bytes_before));
            }
            row
        })
        .collect();
    let head = match converted {
        true => &["stage", "network", "tensors", "parameters", "before", "after", "stored as"][..],
        false => &["stage", "network", "tensors", "parameters", "bytes", "stored as"][..],
    };
    print_text(&table(head, &rows));
    for (stage, one) in all() {
        if let Some((name, encoding)) = one.fallbacks.first() {
            let count = one.fallbacks.len();
            print_text(&format!(
                "{}: {count} tensors in {encoding} for their rows fit no other, as {name}",
                stage.name()
            ));
        }
        if let Some(name) = one.left_out.first() {
            print_text(&format!(
                "{}: {} tensors left out that are never read, as {name}",
                stage.name(),
                one.left_out.len()
            ));
        }
    }
    print_text(sentence);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_its_numbers_on_the_right() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["bcd".to_owned(), "2345".to_owned()]];
        assert_eq!(table(&["name", "count"], &rows), "name  count\na         1\nbcd    2345");
    }
}
