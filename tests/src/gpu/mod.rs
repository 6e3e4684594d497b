//! The GPU suite: what can only be known on a card, asked there.
//!
//! Without a card it holds the reference cases on the processor, and counts everything else as skipped, by name.

mod full;
mod parts;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use service_kit::hardware::{Driver, Nvml, cards};

/// What came of one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is as it should be, or a figure was measured that nothing bounds.
    Holds,
    /// It is not.
    Fails,
    /// It was not asked.
    Skipped,
}

/// One row of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Which part of the suite.
    pub part: &'static str,
    /// What was asked.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Largest difference from what is right, relative to the largest value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// Median seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Most bytes held on the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Floating-point operations a second, in 10^12.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tera_operations: Option<f64>,
    /// Seconds over those of PyTorch for the same on the same card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_pytorch: Option<f64>,
    /// Why it fails or was skipped, or what else was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Row {
    fn new(part: &'static str, name: impl Into<String>, outcome: Outcome) -> Self {
        Self {
            part,
            name: name.into(),
            outcome,
            error: None,
            seconds: None,
            peak_bytes: None,
            tera_operations: None,
            of_pytorch: None,
            reason: None,
        }
    }

    fn failed(part: &'static str, name: impl Into<String>, reason: impl ToString) -> Self {
        Self { reason: Some(reason.to_string()), ..Self::new(part, name, Outcome::Fails) }
    }
}

/// One question of a part, which takes a card.
pub(crate) struct Question {
    part: &'static str,
    name: String,
    ask: Box<dyn FnOnce(&Device) -> Result<Row>>,
}

impl Question {
    pub(crate) fn new(
        part: &'static str,
        name: impl Into<String>,
        ask: impl FnOnce(&Device, Row) -> Result<Row> + 'static,
    ) -> Self {
        let name = name.into();
        let row = Row::new(part, name.clone(), Outcome::Holds);
        Self { part, name, ask: Box::new(move |device| ask(device, row)) }
    }
}

/// The card that answered.
#[derive(Debug, Clone, Serialize)]
pub struct Answering {
    /// Its name.
    pub name: String,
    /// The driver's version.
    pub driver: Option<String>,
    /// All of its memory.
    pub total_bytes: u64,
}

/// Everything that a run gave.
#[derive(Debug, Serialize)]
pub struct Results {
    /// The card; nothing where there is none.
    pub card: Option<Answering>,
    /// Why there is none.
    pub no_card: Option<String>,
    /// One row for each question.
    pub rows: Vec<Row>,
}

/// What a run is given.
#[derive(Debug)]
pub struct Setup {
    /// Folder of the reference cases.
    pub cases: PathBuf,
    /// Times of PyTorch, one JSON object a line with `name` and `seconds`.
    pub pytorch: Option<PathBuf>,
    /// The product's binary, for a whole generation.
    pub avatar: Option<PathBuf>,
    /// No question is begun after it.
    pub limit: Duration,
}

#[derive(Deserialize)]
struct Timed {
    name: String,
    seconds: f64,
}

/// Runs the suite, and shows each row when it is there.
///
/// Errors: no reference cases; times of PyTorch that cannot be read.
pub fn run(setup: &Setup, show: &mut dyn FnMut(&Row)) -> Result<Results> {
    let begin = Instant::now();
    let pytorch = setup.pytorch.as_deref().map(times).transpose()?.unwrap_or_default();
    let mut results = Results { card: None, no_card: None, rows: Vec::new() };
    let device = match Device::new_cuda_with_stream(0) {
        Ok(device) => {
            results.card = Some(answering());
            Some(device)
        }
        Err(error) => {
            let why = if cfg!(feature = "cuda") { "no CUDA devices" } else { "this build has no CUDA" };
            results.no_card = Some(format!("{why} ({})", error.to_string().lines().next().unwrap_or_default()));
            None
        }
    };
    let mut add = |row: Row| {
        show(&row);
        results.rows.push(row);
    };
    parts::processor(&setup.cases)?.into_iter().for_each(&mut add);
    for question in parts::questions(&setup.cases, setup.avatar.as_deref())? {
        let Question { part, name, ask } = question;
        let mut row = match &device {
            None => Row { reason: Some("no card".to_owned()), ..Row::new(part, name, Outcome::Skipped) },
            Some(_) if begin.elapsed() > setup.limit => {
                Row { reason: Some("no time was left".to_owned()), ..Row::new(part, name, Outcome::Skipped) }
            }
            Some(device) => ask(device).unwrap_or_else(|error| Row::failed(part, name, format!("{error:#}"))),
        };
        row.of_pytorch = row.seconds.zip(pytorch.get(&row.name)).map(|(own, theirs)| own / theirs);
        add(row);
    }
    Ok(results)
}

fn answering() -> Answering {
    let driver = Nvml::load();
    let driver = driver.as_ref().map(|driver| driver as &dyn Driver);
    let first = cards(driver).into_iter().next();
    Answering {
        name: first.as_ref().map_or_else(|| "unknown".to_owned(), |card| card.name.clone()),
        driver: driver.and_then(Driver::version),
        total_bytes: first.map_or(0, |card| card.total_bytes),
    }
}

fn times(path: &Path) -> Result<BTreeMap<String, f64>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let row = |line: &str| -> Result<(String, f64)> {
        let Timed { name, seconds } =
            serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
        if !(seconds > 0.0) {
            bail!("{}: {name} took {seconds} s", path.display());
        }
        Ok((name, seconds))
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(row).collect()
}

impl Results {
    /// Rows of an outcome.
    #[must_use]
    pub fn count(&self, outcome: Outcome) -> usize {
        self.rows.iter().filter(|row| row.outcome == outcome).count()
    }

    /// The table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = match (&self.card, &self.no_card) {
            (Some(card), _) => format!("{}, driver {}", card.name, card.driver.as_deref().unwrap_or("unknown")),
            (None, why) => format!("No card: {}", why.as_deref().unwrap_or("none was looked for")),
        };
        text.push_str(
            "\n\n| part | what | outcome | error | seconds | peak MB | 10^12 operations/s | of PyTorch's time |\n",
        );
        text.push_str("|---|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let number = |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
            let error = row.error.map_or(String::new(), |v| format!("{v:.1e}"));
            let outcome = match (row.outcome, &row.reason) {
                (Outcome::Holds, None) => "holds".to_owned(),
                (Outcome::Holds, Some(seen)) => format!("holds: {seen}"),
                (Outcome::Fails, reason) => format!("FAILS: {}", reason.as_deref().unwrap_or("")).replace('\n', " "),
                (Outcome::Skipped, reason) => format!("skipped: {}", reason.as_deref().unwrap_or("")),
            };
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "| {} | {} | {outcome} | {error} | {} | {} | {} | {} |",
                row.part,
                row.name,
                number(row.seconds, 6),
                number(row.peak_bytes.map(|bytes| bytes as f64 / 1e6), 0),
                number(row.tera_operations, 1),
                number(row.of_pytorch, 2),
            );
        }
        let [holds, fails, skipped] = [Outcome::Holds, Outcome::Fails, Outcome::Skipped].map(|o| self.count(o));
        let _ = writeln!(text, "\n{holds} hold, {fails} fail, {skipped} skipped");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test is of the build without CUDA; with it, the suite itself is run.
    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_a_card_cases_run_on_the_processor_and_the_rest_is_skipped_by_name() {
        let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/rope");
        let mut shown = 0;
        let setup = Setup { cases, pytorch: None, avatar: None, limit: Duration::from_secs(600) };
        let results = run(&setup, &mut |_| shown += 1).unwrap();
        assert_eq!((results.count(Outcome::Holds), results.count(Outcome::Fails)), (1, 0));
        assert_eq!(shown, results.rows.len());
        let skipped: Vec<&Row> = results.rows.iter().filter(|row| row.outcome == Outcome::Skipped).collect();
        assert!(skipped.iter().any(|row| row.part == "parity, card, f32" && row.name == "rope"), "{skipped:?}");
        assert!(skipped.iter().all(|row| row.reason.as_deref() == Some("no card")));
        let table = results.table();
        assert!(table.starts_with("No card: this build has no CUDA"), "{table}");
        assert!(table.contains(&format!("1 hold, 0 fail, {} skipped", skipped.len())), "{table}");
    }

    #[test]
    fn times_of_pytorch_are_read_line_by_line_and_nonsense_is_refused() {
        let folder = std::env::temp_dir().join(format!("gpu-suite-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("pytorch.json");
        std::fs::write(&path, "{\"name\": \"a\", \"seconds\": 0.5}\n\n{\"name\": \"b\", \"seconds\": 2, \"x\": 1}\n")
            .unwrap();
        assert_eq!(times(&path).unwrap(), BTreeMap::from([("a".to_owned(), 0.5), ("b".to_owned(), 2.0)]));
        for wrong in ["{\"name\": \"a\"}", "{\"name\": \"a\", \"seconds\": 0}", "a"] {
            std::fs::write(&path, wrong).unwrap();
            assert!(times(&path).is_err(), "{wrong}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
