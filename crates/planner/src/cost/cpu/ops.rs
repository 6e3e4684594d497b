//! What a CPU does over a stage's work, by what its time goes with.

use serde::{Deserialize, Serialize};

use crate::{cost::Job, stage::Stage};

/// How fast a CPU is at all that is not long arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pace {
    /// Scores of attention a second that become weights, beside the products around them.
    pub scores: f64,
    /// Values a second that convolutions unfold, beside their products.
    pub unfolded: f64,
    /// Bytes a second that an operation reads or writes.
    pub moved: f64,
    /// Seconds of an operation on next to nothing.
    pub call_seconds: f64,
    /// Seconds until 30 s of speech are a spectrum.
    pub spectrum_seconds: f64,
    /// Pixels a second in which faces are looked for.
    pub looked: f64,
}

impl Pace {
    /// One core of a CPU that nobody measured.
    pub(crate) const CORE: Self =
        Self { scores: 3e8, unfolded: 8e8, moved: 1.5e9, call_seconds: 2e-5, spectrum_seconds: 0.1, looked: 2e6 };

    /// So many cores; what one thread does alone stays as it is.
    pub(crate) fn of_cores(cores: f64) -> Self {
        let one = Self::CORE;
        Self { scores: one.scores * cores, unfolded: one.unfolded * cores, moved: one.moved * cores.min(2.0), ..one }
    }

    /// Whether every number can be reckoned with.
    #[must_use]
    pub fn usable(&self) -> bool {
        let rates = [self.scores, self.unfolded, self.moved, self.looked];
        rates.iter().all(|rate| rate.is_finite() && *rate >= 1.0)
            && [self.call_seconds, self.spectrum_seconds].iter().all(|s| s.is_finite() && (0.0..=60.0).contains(s))
    }
}

/// Operations, counted where the networks do them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ops {
    /// Operations, however small.
    pub calls: f64,
    /// FLOP of matrix products, in whole tiles.
    pub products: f64,
    /// FLOP of the products of attention, in whole tiles.
    pub attention: f64,
    /// Scores of attention.
    pub scores: f64,
    /// FLOP of convolutions, in whole tiles.
    pub convolutions: f64,
    /// Values that convolutions unfold.
    pub unfolded: f64,
    /// Bytes that are read or written.
    pub moved: f64,
    /// Pieces of 30 s of speech that become a spectrum.
    pub spectra: f64,
    /// Pixels in which faces are looked for.
    pub looked: f64,
}

impl Ops {
    /// Seconds of it all.
    #[must_use]
    pub fn seconds(&self, rates: &crate::cost::work::Rates, pace: &Pace) -> f64 {
        self.products / rates.products
            + self.attention / rates.attention
            + self.scores / pace.scores
            + self.convolutions / rates.convolutions
            + self.unfolded / pace.unfolded
            + self.moved / pace.moved
            + self.calls * pace.call_seconds
            + self.spectra * pace.spectrum_seconds
            + self.looked / pace.looked
    }

    pub(super) fn times(self, times: f64) -> Self {
        Self {
            calls: self.calls * times,
            products: self.products * times,
            attention: self.attention * times,
            scores: self.scores * times,
            convolutions: self.convolutions * times,
            unfolded: self.unfolded * times,
            moved: self.moved * times,
            spectra: self.spectra * times,
            looked: self.looked * times,
        }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            products: self.products + other.products,
            attention: self.attention + other.attention,
            scores: self.scores + other.scores,
            convolutions: self.convolutions + other.convolutions,
            unfolded: self.unfolded + other.unfolded,
            moved: self.moved + other.moved,
            spectra: self.spectra + other.spectra,
            looked: self.looked + other.looked,
        }
    }
}

/// Seconds until a stage's files are open and its answer is with the gateway.
const STAGE_SECONDS: f64 = 0.025;
/// Seconds of a denoise step outside of its passes: messages, sums, and latents that are stored.
const STEP_SECONDS: f64 = 0.005;
/// Seconds until the video's encoder has started and ended, and pixels a second that it takes.
const VIDEO_SECONDS: f64 = 0.15;
const VIDEO_PIXELS: f64 = 20e6;

/// Seconds of a stage in which its network does nothing.
#[must_use]
pub fn around(stage: Stage, job: &Job) -> f64 {
    let more = match stage {
        Stage::Diffusion => STEP_SECONDS * job.steps as f64,
        Stage::VaeDecode => {
            let pixels = job.frames as f64 * f64::from(job.size.width) * f64::from(job.size.height);
            VIDEO_SECONDS + pixels / VIDEO_PIXELS
        }
        Stage::AudioEncoder | Stage::TextEncoder | Stage::ImageEncoder => 0.0,
    };
    STAGE_SECONDS + more
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clip::ClipPlan,
        cost::{
            cpu::{Cpu, ops},
            work::{self, Rates},
        },
        size::PictureSize,
        table::ModelTable,
    };

    fn job(steps: u32) -> Job {
        Job::new(PictureSize { width: 256, height: 256 }, &ClipPlan::new(33, 1, 33), steps, 2).unwrap()
    }

    /// Two counts of the same work: by formulas of the layers, and by following the code. The code's attention in the
    /// VAE leaves out what comes later, and its convolutions count what enters them.
    #[test]
    fn what_the_code_does_is_the_work_of_its_layers() {
        let table = ModelTable::published().unwrap();
        let cpu = Cpu { threads: 1, packs: false, value_bytes: 4 };
        for steps in [10, 50] {
            for stage in Stage::ALL {
                let (done, work) = (ops(&table, stage, &job(steps), cpu), work::stage(&table, stage, &job(steps)));
                let all = done.products + done.attention + done.convolutions;
                let ratio = all / work.total();
                assert!((0.9..1.1).contains(&ratio), "{stage}, {steps} steps: {ratio}");
            }
        }
    }

    #[test]
    fn whole_tiles_and_idle_threads_take_time() {
        let table = ModelTable::published().unwrap();
        let of = |cpu: Cpu| ops(&table, Stage::VaeDecode, &job(1), cpu);
        let plain = of(Cpu { threads: 1, packs: false, value_bytes: 4 });
        let tiled = of(Cpu { threads: 1, packs: true, value_bytes: 4 });
        let uneven = of(Cpu { threads: 64, packs: true, value_bytes: 4 });
        assert!(plain.convolutions < tiled.convolutions && tiled.convolutions < uneven.convolutions);
        assert_eq!(plain.calls, uneven.calls);
    }

    #[test]
    fn every_kind_of_operation_takes_time() {
        let rates = Rates::of_cores(2);
        let pace = rates.pace.unwrap();
        let table = ModelTable::published().unwrap();
        let cpu = Cpu { threads: 2, packs: true, value_bytes: 4 };
        let all = Stage::ALL.iter().map(|stage| ops(&table, *stage, &job(2), cpu)).fold(Ops::default(), Ops::plus);
        let seconds = all.seconds(&rates, &pace);
        for slower in [
            Pace { scores: pace.scores / 2.0, ..pace },
            Pace { unfolded: pace.unfolded / 2.0, ..pace },
            Pace { moved: pace.moved / 2.0, ..pace },
            Pace { call_seconds: pace.call_seconds * 2.0, ..pace },
            Pace { spectrum_seconds: pace.spectrum_seconds * 2.0, ..pace },
            Pace { looked: pace.looked / 2.0, ..pace },
        ] {
            assert!(slower.usable() && all.seconds(&rates, &slower) > seconds, "{slower:?}");
        }
        assert!(!Pace { call_seconds: -1.0, ..pace }.usable() && !Pace { looked: f64::NAN, ..pace }.usable());
    }
}
