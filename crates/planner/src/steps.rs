//! Which denoise steps run the whole transformer.

/// Below this many steps every step is a full one: the reuse was measured on 50.
const FEWEST_TO_CACHE: usize = 30;

/// Whether step `step` of `steps` runs the last block alone, on features of a full step before it.
///
/// The reference's choice for 50 steps as fractions of the run: from 30 % up to 82 %, except every fifth step; none in
/// a run of fewer than 30 steps.
#[must_use]
pub fn is_cached(step: usize, steps: usize) -> bool {
    steps >= FEWEST_TO_CACHE && 10 * step >= 3 * steps && 100 * step < 82 * steps && !step.is_multiple_of(5)
}

/// Full steps and cached steps of a run.
#[must_use]
pub fn count(steps: usize) -> (usize, usize) {
    let cached = (0..steps).filter(|step| is_cached(*step, steps)).count();
    (steps - cached, cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_50_has_the_references_20_cached_steps() {
        assert_eq!(count(50), (30, 20));
        assert_eq!((count(29), count(0)), ((29, 0), (0, 0)));
        assert!(!is_cached(14, 50) && !is_cached(15, 50) && is_cached(16, 50) && !is_cached(41, 50));
    }
}
