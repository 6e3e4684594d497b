//! What each denoise step asks of the network.

/// How a clip is to be sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Denoise steps; 0 leaves the noise as it is.
    pub steps: usize,
    /// Shift of the time grid towards noise; 5 in the reference.
    pub flow_shift: f32,
    /// Guidance scale at the first step; at or below 1 there is one pass a step and no guidance.
    pub guidance_scale: f32,
}

/// Whose text states a pass uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prompt {
    /// The caller's.
    Positive,
    /// The fixed one that names what is not wanted.
    Negative,
}

/// Guidance of one step: `v = v_u + scale·(v_c - v_u)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// Weight of the difference.
    pub scale: f32,
    /// Text states of the unconditional pass.
    pub prompt: Prompt,
}

/// One denoise step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Flow time that the network is told, 0..1000.
    pub timestep: f32,
    /// What the velocity is multiplied by; negative.
    pub sigma_change: f32,
    /// Nothing where guidance is off.
    pub guidance: Option<Guidance>,
    /// The face mask is multiplied by this, in both passes.
    pub face_mask_scale: f32,
    /// Only the last block runs, on features of the last full step.
    pub cached: bool,
    /// A full step whose features the next step needs.
    pub keep_features: bool,
}

/// The steps of one clip.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPlan {
    steps: Vec<Step>,
    sigmas: Vec<f32>,
}

/// First step of the reference's second guidance phase, whatever the number of steps.
const REFERENCE_SWITCH: usize = 10;

impl StepPlan {
    /// The reference's literal rules: the second guidance phase begins at step 10 and the cached steps are those of
    /// a run of 50 (with more, every step from 50 on is cached).
    #[must_use]
    pub fn reference(schedule: Schedule) -> Self {
        let full = |i: usize| i < 15 || (i <= 40 && i.is_multiple_of(5)) || (41..50).contains(&i);
        Self::new(schedule, REFERENCE_SWITCH, |i| !full(i))
    }

    /// The reference's rules of 50 steps as fractions of the run: the second guidance phase begins at a fifth; cached
    /// are the steps from 30 % up to 82 % except every fifth one, and none in a run of fewer than 30 steps.
    #[must_use]
    pub fn scaled(schedule: Schedule) -> Self {
        let n = schedule.steps;
        // Rounded to the nearest, halves up: n/5.
        Self::new(schedule, (2 * n + 5) / 10, |i| planner::steps::is_cached(i, n))
    }

    fn new(schedule: Schedule, switch: usize, cached: impl Fn(usize) -> bool) -> Self {
        let n = schedule.steps;
        let sigmas = sigmas(n, schedule.flow_shift);
        let steps = (0..n)
            .map(|i| {
                let left = 1.0 - i as f64 / n as f64;
                let early = i < switch;
                let guidance = (schedule.guidance_scale > 1.0).then(|| {
                    let scale =
                        if early { left * (f64::from(schedule.guidance_scale) - 2.0) + 2.0 } else { left * 3.0 + 3.5 };
                    Guidance { scale: scale as f32, prompt: if early { Prompt::Negative } else { Prompt::Positive } }
                });
                Step {
                    timestep: sigmas[i] * 1000.0,
                    sigma_change: sigmas[i + 1] - sigmas[i],
                    face_mask_scale: if early && guidance.is_some() { 0.6 } else { 1.0 },
                    guidance,
                    cached: cached(i),
                    keep_features: !cached(i) && i + 1 < n && cached(i + 1),
                }
            })
            .collect();
        Self { steps, sigmas }
    }

    /// The same plan with every step a full one, for a transformer that has no memory for features.
    #[must_use]
    pub fn without_features(&self) -> Self {
        let mut plan = self.clone();
        for step in &mut plan.steps {
            (step.cached, step.keep_features) = (false, false);
        }
        plan
    }

    /// The steps, first to last.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Noise levels before each step and after the last one, 1 to 0.
    #[must_use]
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Passes of the whole run for one window.
    #[must_use]
    pub fn passes(&self) -> usize {
        self.steps.iter().map(|step| if step.guidance.is_some() { 2 } else { 1 }).sum()
    }

    /// Whether the latents before step `i` are all that the rest of the run needs.
    ///
    /// A full step's windows cover every latent frame, in every branch that later steps use, so each full step
    /// replaces all kept features. Hence a run can begin at a full step, or after the last step, but never at a
    /// cached one: that needs features of a step before it.
    #[must_use]
    pub fn resumable(&self, i: usize) -> bool {
        i == self.steps.len() || self.steps.get(i).is_some_and(|step| !step.cached)
    }
}

/// `s·u / (1 + (s-1)·u)` over `u` = 1 to 0 in `steps` equal parts, all in f32.
fn sigmas(steps: usize, shift: f32) -> Vec<f32> {
    // From both ends, as the reference's linspace rounds.
    let part = -1.0 / steps as f32;
    (0..=steps)
        .map(|i| {
            let u = if 2 * i < steps + 1 { 1.0 + part * i as f32 } else { -part * (steps - i) as f32 };
            if steps == 0 { 1.0 } else { shift * u / (1.0 + (shift - 1.0) * u) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(steps: usize, flow_shift: f32) -> Schedule {
        Schedule { steps, flow_shift, guidance_scale: 7.5 }
    }

    /// Values of the reference's scheduler.
    #[test]
    fn the_time_grid_is_the_references() {
        let near = |a: f32, b: f32| assert!((a - b).abs() <= 2e-7 * b.abs().max(1e-3), "{a} for {b}");
        #[allow(clippy::excessive_precision)] // As the reference prints them.
        for (steps, shift, first, last) in [
            (50, 5.0, [1.0, 0.995_934_96, 0.991_735_46, 0.987_394_87], [0.172_413_79, 0.092_592_58, 0.0]),
            (10, 5.0, [1.0, 0.978_260_87, 0.952_381_04, 0.921_052_63], [0.555_555_6, 0.357_142_87, 0.0]),
            (25, 7.0, [1.0, 0.994_082_87, 0.987_730_1, 0.980_891_76], [0.378_378_36, 0.225_806_44, 0.0]),
        ] {
            let plan = StepPlan::reference(of(steps, shift));
            assert_eq!((plan.steps().len(), plan.sigmas().len()), (steps, steps + 1));
            first.iter().zip(plan.sigmas()).for_each(|(want, got)| near(*got, *want));
            last.iter().zip(&plan.sigmas()[steps - 2..]).for_each(|(want, got)| near(*got, *want));
            near(plan.steps()[1].timestep, first[1] * 1000.0);
        }
    }

    #[test]
    fn at_50_steps_both_rules_are_the_same() {
        let plan = StepPlan::reference(of(50, 5.0));
        assert_eq!(plan, StepPlan::scaled(of(50, 5.0)));
        assert_eq!(plan.steps().iter().filter(|s| s.cached).count(), 20);
        let guidance = |i: usize| plan.steps()[i].guidance.unwrap();
        assert_eq!(guidance(0), Guidance { scale: 7.5, prompt: Prompt::Negative });
        assert!((guidance(9).scale - 6.51).abs() < 1e-6 && guidance(9).prompt == Prompt::Negative);
        assert!((guidance(10).scale - 5.9).abs() < 1e-6 && guidance(10).prompt == Prompt::Positive);
        assert!((guidance(49).scale - 3.56).abs() < 1e-6);
        assert_eq!((plan.steps()[9].face_mask_scale, plan.steps()[10].face_mask_scale), (0.6, 1.0));
        assert_eq!(plan.passes(), 100);
    }

    #[test]
    fn past_50_steps_the_reference_caches_and_we_scale() {
        assert!(StepPlan::reference(of(60, 5.0)).steps()[50..].iter().all(|s| s.cached));
        let ours = StepPlan::scaled(of(60, 5.0));
        assert!(ours.steps()[50..].iter().all(|s| !s.cached) && ours.steps()[19].cached);
        assert!(StepPlan::scaled(of(29, 5.0)).steps().iter().all(|s| !s.cached));
        assert_eq!(StepPlan::scaled(of(8, 5.0)).steps().iter().filter(|s| s.face_mask_scale < 1.0).count(), 2);
    }

    #[test]
    fn a_scale_of_1_turns_guidance_off() {
        let plan = StepPlan::scaled(Schedule { guidance_scale: 1.0, ..of(10, 5.0) });
        assert!(plan.steps().iter().all(|s| s.guidance.is_none() && s.face_mask_scale == 1.0));
        assert_eq!(plan.passes(), 10);
    }

    /// Checked against the definition: no cached step may lack a full one between the start and itself.
    #[test]
    fn a_run_resumes_where_no_later_step_needs_an_earlier_one() {
        for plan in [StepPlan::reference(of(50, 5.0)), StepPlan::reference(of(70, 5.0)), StepPlan::scaled(of(33, 5.0))]
        {
            let steps = plan.steps();
            for start in 0..=steps.len() {
                let mut full = false;
                let mut lacks = false;
                for step in &steps[start..] {
                    lacks |= step.cached && !full;
                    full |= !step.cached;
                }
                assert_eq!(plan.resumable(start), !lacks, "{start}");
            }
            assert!(!plan.resumable(steps.len() + 1));
            for pair in steps.windows(2) {
                assert_eq!(pair[0].keep_features, !pair[0].cached && pair[1].cached);
            }
        }
    }

    #[test]
    fn time_runs_from_1_to_0_without_turning_back() {
        for steps in 1..=200 {
            for shift in [0.1, 1.0, 5.0, 7.0, 20.0] {
                let plan = StepPlan::scaled(of(steps, shift));
                // In f32 a shift of 0.1 begins at 0.99999976, as the reference's formula does.
                let (first, last) = (plan.sigmas()[0], plan.sigmas()[steps]);
                assert!((first - 1.0).abs() < 1e-6 && last == 0.0, "{steps} steps, shift {shift}: {first} to {last}");
                assert!(plan.steps().iter().all(|s| s.sigma_change < 0.0), "{steps} steps, shift {shift}");
                let whole: f64 = plan.steps().iter().map(|s| f64::from(s.sigma_change)).sum();
                assert!((whole + 1.0).abs() < 1e-6, "{steps} steps, shift {shift}: {whole}");
                assert!(plan.steps().windows(2).all(|s| s[0].timestep > s[1].timestep));
            }
        }
    }

    #[test]
    fn no_steps_is_no_work() {
        let plan = StepPlan::scaled(of(0, 5.0));
        assert!(plan.steps().is_empty() && plan.resumable(0));
    }
}
