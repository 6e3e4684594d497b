use proptest::prelude::*;

use super::*;
use crate::{cost::work, tiers::Tiers};

fn planner(cards: &[&str]) -> Planner {
    let devices = cards.iter().enumerate().map(|(i, total)| Device::card(i, total.parse().unwrap())).collect();
    Planner {
        table: ModelTable::published().unwrap(),
        tiers: Tiers::default(),
        devices,
        placement: None,
        tier: Choice::Unlimited,
        precisions: vec![Precision::Bf16, Precision::Fp8, Precision::Q4K],
        allow_degrade: false,
    }
}

fn request(width: u32, height: u32, frames: u32, steps: u32) -> Request {
    Request {
        size: Some(PictureSize { width, height }),
        frames: Some(frames),
        steps: Some(steps),
        prompt_tokens: None,
        branches: None,
        no_feature_cache: false,
    }
}

fn cuda_fit(plan: &Plan, stage: Stage) -> cuda::Fit {
    match plan.stages.iter().find(|s| s.stage == stage).unwrap().fit {
        Fit::Cuda(fit) => fit,
        Fit::Cpu(_) => panic!("{stage} is on a CPU"),
    }
}

/// A promise holds for the largest picture of the tier's pixels, which is half as long again as it is wide and more.
#[test]
fn every_tier_fits_its_nominal_card_with_a_twentieth_to_spare() {
    for tier in Tiers::default().all() {
        let card = tier.nominal_card().unwrap();
        let pixels = tier.limits.pixels;
        let longest = crate::size::generation_size(pixels, 100, 173);
        let square = PictureSize { width: pixels, height: pixels };
        for size in [square, longest] {
            for frames in [tier.limits.frames, tier.limits.audio_seconds * FPS] {
                let planner = Planner {
                    devices: vec![Device::card(0, card)],
                    tier: Choice::Named(tier.name.clone()),
                    ..planner(&[])
                };
                let plan = planner.plan(&request(size.width, size.height, frames, tier.limits.steps)).unwrap();
                assert!(plan.degraded.is_empty());
                assert!(
                    plan.peak_bytes as f64 <= 0.95 * card.0 as f64,
                    "{}: {} of {card}",
                    tier.name,
                    Bytes(plan.peak_bytes)
                );
            }
        }
    }
}

/// With the precision of the published files alone, too: blocks are swapped then.
#[test]
fn every_tier_fits_its_nominal_card_without_another_precision() {
    for tier in Tiers::default().all() {
        let devices = vec![Device::card(0, tier.nominal_card().unwrap())];
        let tier = Choice::Named(tier.name.clone());
        let planner = Planner { devices, tier, precisions: vec![Precision::Bf16], ..planner(&[]) };
        let plan = planner.plan(&Request::default()).unwrap();
        assert_eq!(cuda_fit(&plan, Stage::Diffusion).precision, Precision::Bf16);
    }
}

#[test]
fn the_largest_card_keeps_everything_in_16_bits() {
    let plan = planner(&["80GiB"]).plan(&request(704, 768, 129, 50)).unwrap();
    let fit = cuda_fit(&plan, Stage::Diffusion);
    assert!(fit.resident() && fit.precision == Precision::Bf16 && !fit.branches_together);
    // 72,000 tokens, 8192 at a time.
    assert_eq!((fit.token_chunks, fit.query_chunk, fit.tile), (9, 128, [256, 64]));
    assert!(
        plan.reasons.iter().any(|r| r.contains("fit together in 76.00 GiB and stay loaded")),
        "{:#?}",
        plan.reasons
    );
    assert_eq!((plan.tier.as_str(), plan.limited, plan.rank), ("maximum", false, [0; 4]));
}

#[test]
fn sacrifices_come_in_their_order_as_memory_shrinks() {
    let at = |card: &str| planner(&[card]).plan(&request(704, 768, 129, 50)).unwrap();
    let fits: Vec<cuda::Fit> =
        ["48GiB", "32GiB", "24GiB", "16GiB", "8GiB"].iter().map(|c| cuda_fit(&at(c), Stage::Diffusion)).collect();
    // The text encoder goes before the transformer's precision, that before its blocks.
    assert!(fits[0].resident() && fits[0].precision == Precision::Bf16);
    assert!(fits[1].resident());
    assert!(fits[2].resident() && fits[2].precision == Precision::Fp8);
    assert!(fits[3].resident() && fits[3].precision == Precision::Q4K);
    assert!(!fits[4].resident() && fits[4].precision == Precision::Q4K);
    let reasons = at("24GiB").reasons.join("\n");
    assert!(reasons.contains("diffusion: ") && reasons.contains("does not fit beside text-encoder"), "{reasons}");
    assert!(reasons.contains("text-encoder runs first and is unloaded before diffusion"), "{reasons}");
    assert!(reasons.contains("at bf16 do not fit in 22.80 GiB, so its large layers are in fp8"), "{reasons}");
}

#[test]
fn a_second_card_takes_the_stages_that_would_be_unloaded() {
    let one = planner(&["24GiB"]).plan(&request(704, 768, 129, 50)).unwrap();
    let two = planner(&["12GiB", "24GiB", "24GiB"]).plan(&request(704, 768, 129, 50)).unwrap();
    assert!(two.rank < one.rank, "{:?} {:?}", two.rank, one.rank);
    assert_eq!(two.placement["diffusion"], "cuda:1");
    assert_eq!(two.placement["text-encoder"], "cuda:2");
    assert!(two.phases.iter().all(|phase| phase.peak_bytes <= phase.usable_bytes));
}

#[test]
fn what_cannot_fit_is_refused_with_the_device_the_phase_the_bytes_and_what_would_fit() {
    let told = planner(&["4GiB"]).plan(&request(1024, 1536, 129, 50)).unwrap_err();
    let Refusal::Memory(shortage) = &told else { panic!("{told}") };
    assert_eq!((shortage.device.as_str(), shortage.free), ("cuda:0", Bytes((4 << 30) / 100 * 95)));
    assert!(shortage.needed > shortage.free);
    let text = told.to_string();
    assert!(text.contains("needs at least") && text.contains("on cuda:0, of which 3.80 GiB may be used"), "{text}");
    assert!(text.contains("frames would fit"), "{text}");
    let lowered = Planner { allow_degrade: true, ..planner(&["4GiB"]) };
    let plan = lowered.plan(&request(1024, 1536, 129, 50)).unwrap();
    assert!(plan.degraded[0].contains("lowered to") && plan.outcome.steps == 50, "{:?}", plan.degraded);
    let none = planner(&["1GiB"]).plan(&request(64, 64, 5, 10)).unwrap_err().to_string();
    assert!(none.contains("needs at least") && !none.contains("would fit"), "{none}");
}

#[test]
fn a_tier_that_was_asked_for_limits_and_lowers() {
    let limited = Planner { tier: Choice::Named("low".into()), ..planner(&["24GiB"]) };
    let Refusal::Limits(told) = limited.plan(&request(704, 768, 129, 50)).unwrap_err() else { panic!() };
    assert_eq!(told.iter().map(|e| e.field).collect::<Vec<_>>(), ["size", "steps"]);
    let lowered = Planner { allow_degrade: true, ..limited }.plan(&request(704, 768, 129, 50)).unwrap();
    assert_eq!((lowered.outcome.width, lowered.outcome.height), (384, 448));
    assert_eq!((lowered.outcome.steps, lowered.outcome.window_frames), (25, 33));
    assert_eq!(lowered.degraded[0], "tier low: size was lowered from 704 to 384 pixels");
    let unknown = Planner { tier: Choice::Named("big".into()), ..planner(&["24GiB"]) };
    assert!(unknown.plan(&Request::default()).unwrap_err().to_string().contains("the tiers are emergency"));
    let auto = Planner { tier: Choice::Auto, ..planner(&["8188MiB"]) }.plan(&Request::default()).unwrap();
    assert_eq!((auto.tier.as_str(), auto.outcome.width, auto.outcome.window_frames), ("ultra-low", 256, 17));
    assert!(matches!(planner(&[]).plan(&Request::default()), Err(Refusal::NoDevice)));
}

#[test]
fn a_checkpoint_has_one_precision_whatever_is_allowed() {
    let mut planner = planner(&["24GiB"]);
    planner.table.stored = vec![(Stage::Diffusion, Precision::Int8)];
    let plan = planner.plan(&request(256, 256, 17, 10)).unwrap();
    assert_eq!(cuda_fit(&plan, Stage::Diffusion).precision, Precision::Int8);
}

/// The model on this machine's processor.
fn on_cpu(free: Bytes) -> Planner {
    let cpu = crate::cost::cpu::Cpu { threads: 2, packs: true, value_bytes: 4 };
    let kind = DeviceKind::Cpu([cpu; 5]);
    let device = Device { name: "cpu".into(), kind, total: free, free, rates: work::Rates::of_cores(2) };
    Planner { devices: vec![device], ..planner(&[]) }
}

fn cpu_fit(plan: &Plan, stage: Stage) -> CpuFit {
    match plan.stages.iter().find(|s| s.stage == stage).unwrap().fit {
        Fit::Cpu(fit) => fit,
        Fit::Cuda(_) => panic!("{stage} is on a card"),
    }
}

#[test]
fn on_a_cpu_blocks_then_tiles_then_features_are_given_up_as_memory_shrinks() {
    let asked = request(384, 384, 33, 50);
    let at = |free: u64| on_cpu(Bytes(free)).plan(&asked);
    let roomy = at(1 << 40).unwrap();
    let (diffusion, text) = (cpu_fit(&roomy, Stage::Diffusion), cpu_fit(&roomy, Stage::TextEncoder));
    assert_eq!((diffusion.resident_blocks, diffusion.blocks, diffusion.prefetch), (60, 60, 0));
    assert_eq!((text.resident_blocks, text.blocks, text.prefetch), (30, 30, 0));
    let less = at(20 << 30).unwrap();
    let (diffusion, text) = (cpu_fit(&less, Stage::Diffusion), cpu_fit(&less, Stage::TextEncoder));
    assert!(diffusion.resident_blocks < 60 && diffusion.prefetch == 1, "{diffusion:?}");
    assert!(text.resident_blocks == 30 || text.prefetch == 1, "{text:?}");
    assert!(less.seconds >= roomy.seconds && less.reasons.iter().any(|r| r.contains("stay in memory and")));
    assert_eq!(cpu_fit(&less, Stage::VaeDecode).tile, [256, 64]);
    let small = at(roomy.phases[4].peak_bytes - 1).unwrap();
    assert_eq!(cpu_fit(&small, Stage::VaeDecode).tile, [128, 32]);
    assert!(small.reasons.iter().any(|r| r.contains("tiles of 128 pixels and 32 frames")), "{:?}", small.reasons);
    // Without features the transformer needs less than with them.
    let kept = on_cpu(Bytes(1 << 40)).plan(&Request { no_feature_cache: true, ..asked }).unwrap();
    assert!(kept.phases[3].peak_bytes < roomy.phases[3].peak_bytes);
    let without = at(roomy.phases[3].peak_bytes - 1).unwrap();
    assert!(without.degraded[0].contains("every step runs in full"), "{:?}", without.degraded);
    assert!(without.phases.iter().all(|phase| phase.peak_bytes <= phase.usable_bytes));
}

fn sizes() -> impl Strategy<Value = PictureSize> {
    (4u32..80, 4u32..80).prop_map(|(w, h)| PictureSize { width: 16 * w, height: 16 * h })
}

fn requests() -> impl Strategy<Value = Request> {
    (sizes(), 1u32..500, 1u32..60).prop_map(|(size, frames, steps)| Request {
        size: Some(size),
        frames: Some(frames),
        steps: Some(steps),
        prompt_tokens: None,
        branches: None,
        no_feature_cache: false,
    })
}

fn gib(at: f64) -> Bytes {
    Bytes((at * (1u64 << 30) as f64) as u64)
}

#[test]
fn stages_spread_over_parts_of_a_cpu_that_do_not_hold_them_together() {
    let cpu = crate::cost::cpu::Cpu { threads: 2, packs: true, value_bytes: 4 };
    let part = |number: usize, free: Bytes| Device {
        name: format!("cpu.{number}"),
        kind: DeviceKind::Cpu([cpu; 5]),
        total: free,
        free,
        rates: work::Rates::of_cores(2),
    };
    let on = |parts: &[Bytes], placement: Option<[usize; 5]>| {
        let devices = parts.iter().enumerate().map(|(i, free)| part(i, *free)).collect();
        Planner { devices, placement, ..planner(&[]) }.plan(&request(128, 128, 9, 10))
    };
    // The least that holds all stages in the smallest way there is, and a byte less.
    let (mut no, mut yes) = (0u64, 1u64 << 40);
    while yes - no > 1 {
        let middle = no.midpoint(yes);
        if on(&[Bytes(middle)], None).is_ok() { yes = middle } else { no = middle }
    }
    let less = Bytes(no);
    assert!(matches!(on(&[less], None), Err(Refusal::Memory(_))), "{less:?} holds all stages");
    let spread = on(&[less, less], None).unwrap();
    assert!(spread.phases.iter().all(|phase| phase.peak_bytes <= less.0), "{:?}", spread.phases);
    assert!(["cpu.0", "cpu.1"].iter().all(|name| spread.stages.iter().any(|stage| stage.device == *name)));
    let placed = on(&[gib(1024.0), gib(1024.0)], Some([1, 0, 1, 0, 1])).unwrap();
    let names: Vec<&str> = placed.stages.iter().map(|stage| stage.device.as_str()).collect();
    assert_eq!(names, ["cpu.1", "cpu.0", "cpu.1", "cpu.0", "cpu.1"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_plan_takes_more_than_is_free(
        request in requests(),
        cards in prop::collection::vec(2f64..40.0, 1..4),
        used in 0f64..0.5,
    ) {
        let devices = cards.iter().enumerate().map(|(i, total)| {
            let card = Device::card(i, gib(*total));
            Device { free: gib(*total * (1.0 - used)), ..card }
        }).collect();
        let planner = Planner { devices, ..planner(&[]) };
        if let Ok(plan) = planner.plan(&request) {
            for phase in &plan.phases {
                let device = planner.devices.iter().find(|d| d.name == phase.device).unwrap();
                prop_assert!(phase.peak_bytes <= device.free.0, "{phase:?}");
            }
        }
    }

    #[test]
    fn more_memory_never_gives_a_worse_plan(request in requests(), less in 2f64..40.0, more in 0f64..40.0) {
        let at = |total: f64| Planner { devices: vec![Device::card(0, gib(total))], ..planner(&[]) }.plan(&request);
        if let Ok(small) = at(less) {
            let large = at(less + more).unwrap();
            prop_assert!(large.rank <= small.rank, "{:?} after {:?}", large.rank, small.rank);
        }
    }

    #[test]
    fn on_a_cpu_too_no_plan_takes_more_than_is_free_and_more_memory_never_gives_a_worse_plan(
        request in requests(), less in 0.5f64..24.0, more in 0f64..24.0,
    ) {
        if let Ok(small) = on_cpu(gib(less)).plan(&request) {
            for phase in &small.phases {
                prop_assert!(phase.peak_bytes <= gib(less).0, "{phase:?}");
            }
            let large = on_cpu(gib(less + more)).plan(&request).unwrap();
            prop_assert!(large.degraded.len() < small.degraded.len() || large.rank <= small.rank, "{large:?} after {small:?}");
        }
    }

    #[test]
    fn another_card_never_gives_a_worse_plan(request in requests(), first in 2f64..24.0, second in 2f64..24.0) {
        let at = |cards: &[f64]| {
            let devices = cards.iter().enumerate().map(|(i, total)| Device::card(i, gib(*total))).collect();
            Planner { devices, ..planner(&[]) }.plan(&request)
        };
        if let Ok(one) = at(&[first]) {
            let two = at(&[first, second]).unwrap();
            prop_assert!(two.rank <= one.rank, "{:?} after {:?}", two.rank, one.rank);
        }
    }

    #[test]
    fn more_pixels_frames_or_steps_never_need_less(
        request in requests(),
        (wider, taller, longer, slower) in (0u32..8, 0u32..8, 0u32..100, 0u32..20),
    ) {
        let table = ModelTable::published().unwrap();
        let tiers = Tiers::default();
        let tier = tiers.named("maximum").unwrap();
        let size = request.size.unwrap();
        let more = Request {
            size: Some(PictureSize { width: size.width + 16 * wider, height: size.height + 16 * taller }),
            frames: request.frames.map(|f| f + longer),
            steps: request.steps.map(|s| s + slower),
            prompt_tokens: None, branches: None, no_feature_cache: false,
        };
        let (small, large) = (request.job(tier, 33).unwrap(), more.job(tier, 33).unwrap());
        let cpu = Cpu { threads: 2, packs: true, value_bytes: 4 };
        for stage in Stage::ALL {
            for fit in ladder::fits(&table, stage, &small, &[Precision::Bf16, Precision::Q4K]) {
                let of = |job: &Job| cuda::activations(&table, stage, job, &fit);
                prop_assert!(of(&small) <= of(&large), "{stage} {fit:?}");
            }
            // Tiles of rows of the convolutions fit some widths better than others.
            let need = |job: &Job| crate::cost::cpu::need(&table, stage, job, cpu).peak() as f64;
            prop_assert!(need(&small) <= 1.02 * need(&large), "{stage} on a CPU");
            let work = |job: &Job| work::stage(&table, stage, job).total();
            // A run past 29 steps begins to reuse features, so more steps may be less work there.
            if (request.steps.unwrap() < 30) == (more.steps.unwrap() < 30) || stage != Stage::Diffusion {
                prop_assert!(work(&small) <= 1.001 * work(&large) || small.windows != large.windows, "{stage}");
            }
        }
    }

    #[test]
    fn what_is_larger_fits_only_where_what_is_smaller_does(request in requests(), total in 2f64..12.0, wider in 1u32..9) {
        let planner = Planner { devices: vec![Device::card(0, gib(total))], ..planner(&[]) };
        let size = request.size.unwrap();
        let larger = Request {
            size: Some(PictureSize { width: size.width + 16 * wider, ..size }),
            ..request
        };
        if let Ok(large) = planner.plan(&larger) {
            let small = planner.plan(&request).unwrap();
            prop_assert!(small.rank <= large.rank);
        }
    }
}
