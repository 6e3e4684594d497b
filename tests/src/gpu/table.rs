//! The results as tables in Markdown.

use std::fmt::Write as _;

use super::{Outcome, Results, Row};

impl Results {
    /// The tables.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = match (&self.card, &self.no_card) {
            (Some(card), _) => {
                let driver = card.driver.as_deref().unwrap_or("unknown");
                let peak = card.peak_tera_operations;
                let peak =
                    peak.map_or_else(|| "unknown".to_owned(), |peak| format!("{peak:.0} x 10^12 operations/s in bf16"));
                format!("{}, driver {driver}, {:.1} GB, peak {peak}", card.name, card.total_bytes as f64 / 1e9)
            }
            (None, why) => format!("No card: {}", why.as_deref().unwrap_or("none was looked for")),
        };
        text.push_str(
            "\n\n| part | what | outcome | error | from PyTorch's | seconds | of predicted | peak MB | of predicted |",
        );
        text.push_str(" 10^12 operations/s | of the peak | of PyTorch's time |\n");
        text.push_str("|---|---|---|---|---|---|---|---|---|---|---|---|\n");
        self.rows.iter().for_each(|row| line(&mut text, row));
        let [holds, fails, skipped] = [Outcome::Holds, Outcome::Fails, Outcome::Skipped].map(|o| self.count(o));
        // Writing to a string does not fail.
        let _ = writeln!(text, "\n{holds} hold, {fails} fail, {skipped} skipped\n");
        text.push_str("| goal | at most | measured | |\n|---|---|---|---|\n");
        for goal in &self.goals {
            let measured = goal.measured.map_or_else(|| "not measured".to_owned(), figure);
            let met = match goal.met() {
                Some(true) => "met",
                Some(false) => "MISSED",
                None => "",
            };
            let _ = writeln!(text, "| {} | {} | {measured} | {met} |", goal.name, figure(goal.limit));
        }
        text
    }
}

fn figure(value: f64) -> String {
    if value >= 1e6 { format!("{value:.2e}") } else { format!("{}", (value * 1e4).round() / 1e4) }
}

fn line(text: &mut String, row: &Row) {
    let number = |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
    let small = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.1e}"));
    let ratio = |measured: Option<f64>, predicted: Option<f64>| number(measured.zip(predicted).map(|(m, p)| m / p), 2);
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
    let told = row.reason.as_deref().unwrap_or("").replace('\n', " ").replace('|', "/");
    let outcome = match (row.outcome, &row.reason) {
        (Outcome::Holds, None) => "holds".to_owned(),
        (Outcome::Holds, Some(_)) => format!("holds: {told}"),
        (Outcome::Fails, _) => format!("FAILS: {told}"),
        (Outcome::Skipped, _) => format!("skipped: {told}"),
    };
    let cells = [
        row.part.to_owned(),
        row.name.clone(),
        outcome,
        small(row.error),
        small(row.from_pytorch),
        number(row.seconds, 6),
        ratio(row.seconds, row.predicted_seconds),
        number(bytes(row.peak_bytes).map(|bytes| bytes / 1e6), 0),
        ratio(bytes(row.peak_bytes), bytes(row.predicted_bytes)),
        number(row.tera_operations, 1),
        number(row.of_peak, 2),
        number(row.of_pytorch, 2),
    ];
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}
