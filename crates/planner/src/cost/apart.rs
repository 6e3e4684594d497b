//! Rates of two kinds of work that always come together.

/// What one operation did of two kinds of work, and its seconds.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Of the one kind and of the other.
    pub work: [f64; 2],
    /// For both.
    pub seconds: f64,
}

/// Rates of two kinds of work, of which two operations did different parts. Where times do not tell them apart, all of the
/// time is the first one's.
#[must_use]
pub fn apart(long: Run, short: Run) -> (f64, f64) {
    /// A rate at which work takes no time that counts.
    const FREE: f64 = 1e18;
    let ([a, b], [c, d]) = (long.work, short.work);
    let whole = a * d - b * c;
    let first = (long.seconds * d - short.seconds * b) / whole;
    let second = (a * short.seconds - c * long.seconds) / whole;
    match first.is_finite() && second.is_finite() && first > 0.0 && second > 0.0 {
        true => (1.0 / first, 1.0 / second),
        false => (a / long.seconds.max(1e-9), FREE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_kinds_of_work_are_told_apart_by_two_operations() {
        let run = |work: [f64; 2]| Run { work, seconds: work[0] / 100.0 + work[1] / 5.0 };
        let (first, second) = apart(run([1000.0, 10.0]), run([100.0, 10.0]));
        assert!((first - 100.0).abs() < 1e-9 && (second - 5.0).abs() < 1e-9, "{first} {second}");
        let same = Run { work: [1000.0, 10.0], seconds: 2.0 };
        assert_eq!(apart(same, same), (500.0, 1e18));
    }
}
