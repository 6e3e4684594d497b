//! The GPU suite: what can only be known on a card, asked there.
//!
//! Without a card it holds the reference cases on the processor, and counts everything else as skipped, by name.

mod card;
mod full;
mod generation;
mod goals;
mod memory;
mod parts;
mod predicted;
mod pytorch;
mod table;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use planner::cost::work::Rates;
use serde::Serialize;

pub use self::{card::Answering, goals::Goal};
use self::{full::Files, pytorch::Theirs};

/// What came of one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is as it should be, or a figure was measured that nothing bounds.
    Holds,
    /// It is not.
    Fails,
    /// It was not asked, or stopped before its answer.
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
    /// The same from PyTorch's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_pytorch: Option<f64>,
    /// Median seconds; of a whole pass those of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Seconds that the planner says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_seconds: Option<f64>,
    /// Most bytes held on the card, as its allocator counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Bytes that the planner says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_bytes: Option<u64>,
    /// Floating-point operations a second, in 10^12.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tera_operations: Option<f64>,
    /// The same over the card's peak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_peak: Option<f64>,
    /// Seconds over those of PyTorch for the same on the same card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_pytorch: Option<f64>,
    /// Share of the time that is on top of the same with weights that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead: Option<f64>,
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
            from_pytorch: None,
            seconds: None,
            predicted_seconds: None,
            peak_bytes: None,
            predicted_bytes: None,
            tera_operations: None,
            of_peak: None,
            of_pytorch: None,
            overhead: None,
            reason: None,
        }
    }

    fn failed(part: &'static str, name: impl Into<String>, reason: impl ToString) -> Self {
        Self { reason: Some(reason.to_string()), ..Self::new(part, name, Outcome::Fails) }
    }

    fn skipped(part: &'static str, name: impl Into<String>, reason: impl ToString) -> Self {
        Self { reason: Some(reason.to_string()), ..Self::new(part, name, Outcome::Skipped) }
    }

    /// With the figures of a computation that took so many seconds for so many operations.
    fn timed(self, seconds: f64, operations: f64, asked: &Asked<'_>) -> Self {
        let tera = operations / seconds / 1e12;
        let of_peak = asked.shared.peak.map(|peak| tera / peak);
        Self { seconds: Some(seconds), tera_operations: Some(tera), of_peak, ..self }
    }

    /// With what PyTorch took and gave, where it was asked; a result that is another fails.
    fn beside_pytorch(self, out: &Tensor, asked: &Asked<'_>) -> Result<Self> {
        let Some(theirs) = asked.shared.pytorch.get(&self.name) else { return Ok(self) };
        let apart = theirs.apart(out)?;
        let row = Self {
            from_pytorch: Some(apart),
            of_pytorch: self.seconds.map(|seconds| seconds / theirs.seconds),
            ..self
        };
        Ok(match apart <= pytorch::APART {
            true => row,
            false => Self {
                outcome: Outcome::Fails,
                reason: Some(format!("{apart:.1e} from PyTorch's result, allowed are {:.1e}", pytorch::APART)),
                ..row
            },
        })
    }
}

/// What all questions of a run have in common.
#[derive(Default)]
pub(crate) struct Shared {
    pytorch: BTreeMap<String, Theirs>,
    /// The card's peak, 10^12 operations a second.
    peak: Option<f64>,
    /// All of its memory.
    total_bytes: u64,
    /// How fast the card was measured to be, since that was asked.
    rates: Cell<Option<Rates>>,
    /// The whole transformer in 8 bits, since it was written.
    files: RefCell<Option<Files>>,
    /// Seconds of passes whose weights stay, by size.
    resident: RefCell<BTreeMap<&'static str, f64>>,
}

/// A question as it is put to a card.
pub(crate) struct Asked<'a> {
    device: &'a Device,
    row: Row,
    shared: &'a Shared,
    /// When it has to be answered.
    until: Instant,
}

type Ask = Box<dyn FnOnce(Asked<'_>) -> Result<Row>>;

/// One question of a part, which takes a card.
pub(crate) struct Question {
    part: &'static str,
    name: String,
    /// The time that it may take.
    budget: Duration,
    ask: Ask,
}

impl Question {
    /// Seconds that a question may take where nothing else is said.
    const BUDGET: u64 = 20;

    pub(crate) fn new(
        part: &'static str,
        name: impl Into<String>,
        ask: impl FnOnce(Asked<'_>) -> Result<Row> + 'static,
    ) -> Self {
        Self { part, name: name.into(), budget: Duration::from_secs(Self::BUDGET), ask: Box::new(ask) }
    }

    /// May take so many seconds.
    pub(crate) fn within(self, seconds: u64) -> Self {
        Self { budget: Duration::from_secs(seconds), ..self }
    }

    /// Puts the question. Networks ask for every layer whether they may go on, so past its time it ends within a layer;
    /// whatever asks nobody is not stopped.
    fn put(self, device: &Device, shared: &Shared, end: Instant) -> Row {
        let Self { part, name, budget, ask } = self;
        let begin = Instant::now();
        let until = end.min(begin + budget);
        let asked = Asked { device, row: Row::new(part, name.clone(), Outcome::Holds), shared, until };
        let answer =
            catch_unwind(AssertUnwindSafe(|| model::memory::watched(move |_| Instant::now() < until, || ask(asked))));
        match answer.unwrap_or_else(|_| Err(anyhow!("a panic, which is above"))) {
            Ok(row) => row,
            Err(_) if Instant::now() >= until => {
                Row::skipped(part, name, format!("stopped after {:.0} s", begin.elapsed().as_secs_f64()))
            }
            Err(error) => Row::failed(part, name, format!("{error:#}")),
        }
    }
}

/// Everything that a run gave, or has given so far.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Whether every question was put; a run that was ended leaves what it had.
    pub complete: bool,
    /// The card; nothing where there is none.
    pub card: Option<Answering>,
    /// Why there is none.
    pub no_card: Option<String>,
    /// What the shapes of some questions were drawn with.
    pub seed: u64,
    /// What a card is to reach.
    pub goals: Vec<Goal>,
    /// One row for each question.
    pub rows: Vec<Row>,
}

/// What a run is given.
#[derive(Debug)]
pub struct Setup {
    /// Folder of the reference cases.
    pub cases: PathBuf,
    /// What PyTorch took and gave, as `gpu_pytorch.py` prints it.
    pub pytorch: Option<PathBuf>,
    /// The product's binary, for a whole generation.
    pub avatar: Option<PathBuf>,
    /// When all has to be answered.
    pub limit: Duration,
    /// Draws the shapes of some questions.
    pub seed: u64,
}

/// Runs the suite; `show` sees the results as they are after each new row.
///
/// Errors: no reference cases; a file of PyTorch's that cannot be read; `show`'s.
pub fn run(setup: &Setup, show: &mut dyn FnMut(&Results) -> Result<()>) -> Result<Results> {
    let end = Instant::now() + setup.limit;
    let mut shared = Shared {
        pytorch: setup.pytorch.as_deref().map(pytorch::read).transpose()?.unwrap_or_default(),
        ..Shared::default()
    };
    let mut results = Results {
        complete: false,
        card: None,
        no_card: None,
        seed: setup.seed,
        goals: goals::of(&[]),
        rows: Vec::new(),
    };
    let device = match Device::new_cuda_with_stream(0) {
        Ok(device) => {
            let card = Answering::on(&device);
            (shared.peak, shared.total_bytes) = (card.peak_tera_operations, card.total_bytes);
            results.card = Some(card);
            Some(device)
        }
        Err(error) => {
            let why = if cfg!(feature = "cuda") { "no CUDA devices" } else { "this build has no CUDA" };
            results.no_card = Some(format!("{why} ({})", error.to_string().lines().next().unwrap_or_default()));
            None
        }
    };
    let mut add = |row: Row, results: &mut Results| {
        results.rows.push(row);
        results.goals = goals::of(&results.rows);
        show(results)
    };
    for row in parts::processor(&setup.cases)? {
        add(row, &mut results)?;
    }
    for question in questions(setup)? {
        let row = match &device {
            None => Row::skipped(question.part, question.name, "no card"),
            Some(_) if Instant::now() >= end => Row::skipped(question.part, question.name, "no time was left"),
            Some(device) => question.put(device, &shared, end),
        };
        add(row, &mut results)?;
    }
    results.complete = true;
    Ok(results)
}

/// All that takes a card: what is right first, then how fast, then what fills the card.
fn questions(setup: &Setup) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    parts::questions(&setup.cases, setup.seed, &mut questions)?;
    full::questions(setup.avatar.as_deref(), &mut questions);
    memory::questions(&setup.cases, &mut questions)?;
    Ok(questions)
}

impl Results {
    /// Rows of an outcome.
    #[must_use]
    pub fn count(&self, outcome: Outcome) -> usize {
        self.rows.iter().filter(|row| row.outcome == outcome).count()
    }

    /// Goals that were measured and not reached.
    #[must_use]
    pub fn missed(&self) -> usize {
        self.goals.iter().filter(|goal| goal.met() == Some(false)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test is of the build without CUDA; with it, the suite itself is run.
    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_a_card_cases_run_on_the_processor_and_the_rest_is_skipped_by_name() {
        let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/rope");
        let mut shown = 0;
        let setup = Setup { cases, pytorch: None, avatar: None, limit: Duration::from_secs(600), seed: 1 };
        let results = run(&setup, &mut |results| {
            shown += 1;
            assert!(!results.complete && results.rows.len() == shown);
            Ok(())
        });
        let results = results.unwrap();
        assert_eq!((results.count(Outcome::Holds), results.count(Outcome::Fails)), (1, 0));
        assert!(results.complete && shown == results.rows.len());
        let skipped: Vec<&Row> = results.rows.iter().filter(|row| row.outcome == Outcome::Skipped).collect();
        assert!(skipped.iter().any(|row| row.part == "parity, card, f32" && row.name == "rope"), "{skipped:?}");
        assert!(skipped.iter().all(|row| row.reason.as_deref() == Some("no card")));
        let table = results.table();
        assert!(table.starts_with("No card: this build has no CUDA"), "{table}");
        assert!(table.contains(&format!("1 hold, 0 fail, {} skipped", skipped.len())), "{table}");
        assert!(table.contains("attention, times PyTorch's time | 1.3 | not measured"), "{table}");
    }

    fn put(budget: u64, ask: impl FnOnce(Asked<'_>) -> Result<Row> + 'static) -> Row {
        let question = Question::new("part", "name", ask).within(budget);
        question.put(&Device::Cpu, &Shared::default(), Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn a_question_that_takes_too_long_is_stopped_at_its_next_layer_and_counts_as_skipped() {
        let layers = |asked: Asked<'_>| {
            let x = Tensor::zeros((4, 4), candle_core::DType::F32, &Device::Cpu)?;
            let one = Tensor::ones(4, candle_core::DType::F32, &Device::Cpu)?;
            for _ in 0..3 {
                model::ops::rms_norm(&x, &one, 1e-6)?;
            }
            Ok(asked.row)
        };
        let stopped = put(0, layers);
        assert_eq!((stopped.outcome, stopped.reason.as_deref()), (Outcome::Skipped, Some("stopped after 0 s")));
        assert_eq!(put(60, layers).outcome, Outcome::Holds);
    }

    #[test]
    fn an_error_or_a_panic_fails_one_question_alone() {
        let failed = put(60, |_| Err(anyhow!("so it is")));
        assert_eq!((failed.outcome, failed.reason.as_deref()), (Outcome::Fails, Some("so it is")));
        let panicked = put(60, |_| panic!("boom"));
        assert_eq!((panicked.outcome, panicked.reason.as_deref()), (Outcome::Fails, Some("a panic, which is above")));
    }

    #[test]
    fn a_result_that_is_not_pytorchs_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pytorch.json");
        std::fs::write(&path, format!("{{\"name\": \"name\", \"seconds\": 2, \"sample\": {:?}}}", [1.0; 8])).unwrap();
        let shared = Shared { pytorch: pytorch::read(&path).unwrap(), peak: Some(100.0), ..Shared::default() };
        let asked = |value: f64| {
            let row = Row::new("part", "name", Outcome::Holds);
            let asked = Asked { device: &Device::Cpu, row: row.clone(), shared: &shared, until: Instant::now() };
            let out = (Tensor::ones((8, 8), candle_core::DType::F32, &Device::Cpu).unwrap() * value).unwrap();
            row.timed(3.0, 6e12, &asked).beside_pytorch(&out, &asked).unwrap()
        };
        let same = asked(1.0);
        assert_eq!((same.outcome, same.from_pytorch, same.of_pytorch), (Outcome::Holds, Some(0.0), Some(1.5)));
        assert_eq!((same.tera_operations, same.of_peak), (Some(2.0), Some(0.02)));
        assert_eq!(asked(1.5).outcome, Outcome::Fails);
    }
}
