//! The transformer over several devices, as the planner decides it.

use proptest::prelude::*;

use super::{
    tests::{cuda_fit, gib, planner, request, requests},
    *,
};
use crate::cost::{cpu::blocks, work};

const CPU: Cpu = Cpu { threads: 2, packs: true, value_bytes: 4 };

fn part(number: usize, free: Bytes) -> Device {
    Device {
        name: format!("cpu.{number}"),
        kind: DeviceKind::Cpu([CPU; 5]),
        total: free,
        free,
        rates: work::Rates::of_cores(2),
    }
}

fn on(parts: &[Bytes]) -> Planner {
    let devices = parts.iter().enumerate().map(|(i, free)| part(i, *free)).collect();
    Planner { devices, ..planner(&[]) }
}

fn transformer(plan: &Plan) -> &StagePlan {
    plan.stages.iter().find(|stage| stage.stage == Stage::Diffusion).unwrap()
}

fn cpu_fit(plan: &Plan) -> CpuFit {
    match transformer(plan).fit {
        Fit::Cpu(fit) => fit,
        Fit::Cuda(_) => panic!("it is on a card"),
    }
}

/// All blocks in their order, at least one a part, none twice.
fn check(plan: &Plan, devices: &[Device]) -> Result<(), TestCaseError> {
    for phase in &plan.phases {
        let device = devices.iter().find(|device| device.name == phase.device).unwrap();
        prop_assert!(phase.peak_bytes <= device.usable() && phase.usable_bytes == device.usable(), "{phase:?}");
    }
    let stage = transformer(plan);
    let Some(first) = stage.spread.first() else { return Ok(()) };
    prop_assert!(first.device == stage.device && first.peak_bytes == stage.peak_bytes && stage.spread.len() > 1);
    let (blocks, resident) = match stage.fit {
        Fit::Cuda(fit) => (fit.blocks, fit.resident_blocks),
        Fit::Cpu(fit) => (fit.blocks, fit.resident_blocks),
    };
    let mut next = 0;
    for part in &stage.spread {
        prop_assert!(part.first_block == next && part.blocks > 0 && part.resident_blocks <= part.blocks, "{part:?}");
        next += part.blocks;
        let phase = plan.phases.iter().find(|p| p.device == part.device && p.phase == Stage::Diffusion);
        prop_assert!(phase.is_some_and(|phase| phase.peak_bytes >= part.peak_bytes));
    }
    prop_assert_eq!(next, blocks);
    prop_assert_eq!(stage.spread.iter().map(|part| part.resident_blocks).sum::<u64>(), resident);
    Ok(())
}

#[test]
fn two_cards_keep_in_16_bits_what_one_of_them_keeps_in_8() {
    let at = |cards: &[&str]| planner(cards).plan(&request(704, 768, 129, 50)).unwrap();
    let (one, two) = (at(&["24GiB"]), at(&["24GiB", "24GiB"]));
    assert_eq!(cuda_fit(&one, Stage::Diffusion).precision, Precision::Fp8);
    let fit = cuda_fit(&two, Stage::Diffusion);
    assert!(fit.precision == Precision::Bf16 && fit.resident() && two.rank < one.rank, "{fit:?}");
    check(&two, &planner(&["24GiB", "24GiB"]).devices).unwrap();
    let spread = &transformer(&two).spread;
    assert_eq!((spread.len(), two.placement["diffusion"].as_str()), (2, "cuda:0"));
    let said = two.reasons.join("\n");
    assert!(said.contains("its blocks are spread (") && said.contains(" on cuda:1), which work one after"), "{said}");
    // Nothing is computed sooner: the tokens go from card to card on top.
    let whole = at(&["80GiB"]);
    let more = transformer(&two).seconds / transformer(&whole).seconds;
    assert!(more >= 1.0 && transformer(&whole).spread.is_empty(), "{more}");
}

#[test]
fn cards_that_do_not_hold_all_blocks_together_swap_fewer_of_them() {
    let at = |cards: &[&str]| planner(cards).plan(&request(704, 768, 129, 50)).unwrap();
    let (one, two) = (at(&["8GiB"]), at(&["8GiB", "8GiB"]));
    let stays = |plan: &Plan| cuda_fit(plan, Stage::Diffusion).resident_blocks;
    assert!(stays(&two) > stays(&one) && two.rank < one.rank, "{} and {}", stays(&two), stays(&one));
    check(&two, &planner(&["8GiB", "8GiB"]).devices).unwrap();
}

#[test]
fn blocks_that_do_not_stay_in_either_part_of_a_processor_stay_in_both() {
    let wanted = request(128, 128, 9, 10);
    let whole = on(&[gib(1024.0)]).plan(&wanted).unwrap();
    let (sizes, _) = blocks(&ModelTable::published().unwrap(), Stage::Diffusion, Precision::Bf16);
    let all = sizes.len() as u64;
    assert_eq!((cpu_fit(&whole).resident_blocks, transformer(&whole).spread.len()), (all, 0));
    let most = Bytes(whole.peak_bytes + sizes.iter().sum::<u64>() * 3 / 4);
    let one = on(&[most]).plan(&wanted).unwrap();
    assert!(cpu_fit(&one).resident_blocks < all && transformer(&one).spread.is_empty());
    let two = on(&[most, most]).plan(&wanted).unwrap();
    check(&two, &on(&[most, most]).devices).unwrap();
    assert_eq!((cpu_fit(&two).resident_blocks, transformer(&two).spread.len()), (all, 2));
    assert!(two.rank < one.rank && two.seconds <= one.seconds, "{:?} {:?}", two.rank, one.rank);
    // The same places, asked for.
    let numbers = transformer(&two).spread.iter().map(|part| (usize::from(part.device == "cpu.1"), part.blocks));
    let devices = two.stages.iter().map(|stage| usize::from(stage.device == "cpu.1")).collect::<Vec<_>>();
    let placement = Placement { devices: devices.try_into().unwrap(), spread: numbers.collect() };
    let again = Planner { placement: Some(placement.clone()), ..on(&[most, most]) }.plan(&wanted).unwrap();
    assert_eq!((&again.stages, &again.phases), (&two.stages, &two.phases));
    // They are held to their budgets there too.
    let tight = Bytes(whole.peak_bytes / 2);
    let refused = Planner { placement: Some(placement), ..on(&[tight, tight]) }.plan(&wanted).unwrap_err();
    assert!(matches!(refused, Refusal::Memory(_)), "{refused}");
}

#[test]
fn nothing_is_spread_where_one_device_has_room() {
    for devices in [&[gib(1024.0), gib(1024.0)][..], &[gib(8.0), gib(1024.0), gib(8.0)]] {
        let plan = on(devices).plan(&request(256, 256, 17, 10)).unwrap();
        assert!(transformer(&plan).spread.is_empty() && plan.rank[3] == 0, "{:?}", transformer(&plan));
    }
    let plan = planner(&["80GiB", "24GiB"]).plan(&request(704, 768, 129, 50)).unwrap();
    assert!(transformer(&plan).spread.is_empty());
}

/// Of what may use more devices, everything but the place among equals.
fn worth(plan: &Plan) -> [usize; 3] {
    [plan.rank[0], plan.rank[1], plan.rank[2]]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_plan_of_several_devices_takes_more_than_one_of_them_may_be_used(
        request in requests(),
        totals in prop::collection::vec(3f64..40.0, 2..5),
        on_cpu in any::<bool>(),
    ) {
        let card = |(i, total): (usize, &f64)| Device::card(i, gib(*total));
        let planner = match on_cpu {
            true => on(&totals.iter().map(|total| gib(*total)).collect::<Vec<_>>()),
            false => Planner { devices: totals.iter().enumerate().map(card).collect(), ..planner(&[]) },
        };
        if let Ok(plan) = planner.plan(&request) {
            check(&plan, &planner.devices)?;
        }
    }

    #[test]
    fn more_memory_of_any_device_and_another_device_never_give_a_worse_plan(
        request in requests(),
        totals in prop::collection::vec(3f64..24.0, 1..4),
        (which, more) in (0usize..4, 0.1f64..24.0),
        on_cpu in any::<bool>(),
    ) {
        let at = |totals: &[f64]| {
            let card = |(i, total): (usize, &f64)| Device::card(i, gib(*total));
            let planner = match on_cpu {
                true => on(&totals.iter().map(|total| gib(*total)).collect::<Vec<_>>()),
                false => Planner { devices: totals.iter().enumerate().map(card).collect(), ..planner(&[]) },
            };
            planner.plan(&request)
        };
        let mut larger = totals.clone();
        match larger.get_mut(which) {
            Some(total) => *total += more,
            None => larger.push(more.max(3.0)),
        }
        if let Ok(small) = at(&totals) {
            let large = at(&larger).unwrap();
            prop_assert!(worth(&large) <= worth(&small), "{:?} after {:?}", large.rank, small.rank);
        }
    }
}
