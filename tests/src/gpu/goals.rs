//! What a card is to reach, judged by the rows of a run.

use serde::Serialize;

use super::{Outcome, Row};

/// A goal and what was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    /// In words.
    pub name: &'static str,
    /// At most this.
    pub limit: f64,
    /// The worst that was measured; nothing where nothing was.
    pub measured: Option<f64>,
}

impl Goal {
    /// Whether it is reached; nothing where nothing was measured.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.measured.map(|measured| measured <= self.limit)
    }
}

/// The size that goals speak of.
pub(super) const LARGE: &str = "704x768x129";
/// Parts of the suite that goals look at.
pub(super) const ATTENTION: &str = "attention";
pub(super) const BLOCKS: &str = "blocks";
pub(super) const SWAP: &str = "swap";
/// The question whether generations leave something, and how often it is to be asked.
pub(super) const LEAK: &str = "rounds of the networks leave nothing";
pub(super) const ROUNDS: u32 = 50;

/// All goals.
pub(super) fn of(rows: &[Row]) -> Vec<Goal> {
    let worst = |figure: &dyn Fn(&Row) -> Option<f64>| {
        rows.iter().filter(|row| row.outcome != Outcome::Skipped).filter_map(figure).reduce(f64::max)
    };
    let of_part =
        |part: &'static str, figure: fn(&Row) -> Option<f64>| worst(&|row| figure(row).filter(|_| row.part == part));
    let large = |figure: fn(&Row) -> Option<f64>| {
        worst(&|row| figure(row).filter(|_| row.part == SWAP && row.name.contains(LARGE)))
    };
    let off = |measured: Option<f64>, predicted: Option<f64>| measured.zip(predicted).map(|(m, p)| (m / p - 1.0).abs());
    // A round that left something is a row that fails; one that was not asked often enough says nothing.
    let leaks = rows.iter().find(|row| row.name.contains(LEAK)).and_then(|row| match row.outcome {
        Outcome::Holds if row.name.starts_with(&format!("{ROUNDS} ")) && row.reason.is_none() => Some(0.0),
        Outcome::Fails => Some(1.0),
        _ => None,
    });
    let goal = |name, limit, measured| Goal { name, limit, measured };
    vec![
        goal("attention, times PyTorch's time", 1.3, of_part(ATTENTION, |row| row.of_pytorch)),
        goal("a block, times PyTorch's time", 1.15, of_part(BLOCKS, |row| row.of_pytorch)),
        goal("weights that come and go at 704x768x129, share of the time on top", 0.02, large(|row| row.overhead)),
        goal("peak at 704x768x129 with them, bytes", 8e9, large(|row| row.peak_bytes.map(|bytes| bytes as f64))),
        goal(
            "predicted bytes, share they are off",
            0.05,
            worst(&|row| off(row.peak_bytes.map(|b| b as f64), row.predicted_bytes.map(|b| b as f64))),
        ),
        goal("predicted seconds, share they are off", 0.10, worst(&|row| off(row.seconds, row.predicted_seconds))),
        goal("50 generations that leave something", 0.0, leaks),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(part: &'static str, name: &str) -> Row {
        Row::new(part, name, Outcome::Holds)
    }

    fn measured(rows: &[Row]) -> Vec<Option<f64>> {
        of(rows).iter().map(|goal| goal.measured).collect()
    }

    #[test]
    fn without_a_row_nothing_is_measured_and_no_goal_is_met() {
        let skipped = Row { of_pytorch: Some(0.5), outcome: Outcome::Skipped, ..row(ATTENTION, "a") };
        assert_eq!(measured(&[skipped]), [None; 7]);
        assert!(of(&[]).iter().all(|goal| goal.met().is_none()));
    }

    #[test]
    fn the_worst_row_counts_and_only_those_that_a_goal_is_about() {
        let rows = [
            Row { of_pytorch: Some(1.1), ..row(ATTENTION, "a") },
            Row { of_pytorch: Some(1.31), ..row(ATTENTION, "b") },
            Row { of_pytorch: Some(1.15), ..row(BLOCKS, "c") },
            Row { overhead: Some(0.5), ..row(SWAP, "256x256x129") },
            Row { overhead: Some(0.02), peak_bytes: Some(8_000_000_001), ..row(SWAP, LARGE) },
            Row { seconds: Some(9.0), predicted_seconds: Some(10.0), ..row("full", "d") },
            Row { peak_bytes: Some(106), predicted_bytes: Some(100), ..row("full", "e") },
        ];
        let goals = of(&rows);
        let met: Vec<_> = goals.iter().map(Goal::met).collect();
        assert_eq!(met, [Some(false), Some(true), Some(true), Some(false), Some(false), Some(true), None]);
        assert_eq!((goals[0].measured, goals[2].measured), (Some(1.31), Some(0.02)));
    }

    #[test]
    fn a_leak_is_judged_by_all_rounds_or_by_one_that_left_something() {
        let asked = |name: &str| row("memory", name);
        let all = asked(&format!("{ROUNDS} {LEAK}"));
        assert_eq!(measured(std::slice::from_ref(&all))[6], Some(0.0));
        let fewer = Row { reason: Some("7 rounds in its time".to_owned()), ..all.clone() };
        assert_eq!(measured(&[fewer])[6], None);
        assert_eq!(measured(&[Row { outcome: Outcome::Fails, ..all }])[6], Some(1.0));
    }
}
