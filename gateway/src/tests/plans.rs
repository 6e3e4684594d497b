//! Generations held against the devices before they are accepted.

use std::sync::{Arc, atomic::Ordering};

use planner::{
    Bytes, Device, DeviceKind, ModelTable, Planner, Precision, Request, Tiers,
    cost::{cpu::Cpu, work::Rates},
    plan::Choice,
    size::PictureSize,
};
use proto::v1::{GenerationSpec, GenerationState};

use super::{Desk, upload};
use crate::{
    Options,
    config::TierOptions,
    fakes::Script,
    fault::Kind,
    planning::{Fleet, FleetSource},
};

/// A processor whose free bytes lie between what 65 frames of a size need and what 5 need.
fn middling() -> (FleetSource, Planner) {
    let device = |free: u64| Device {
        name: "cpu".into(),
        kind: DeviceKind::Cpu([Cpu { threads: 2, packs: true, value_bytes: 4 }; 5]),
        total: Bytes(free),
        free: Bytes(free),
        rates: Rates::of_cores(2),
    };
    let planner = |free: u64| Planner {
        table: ModelTable::published().unwrap(),
        tiers: Tiers::default(),
        devices: vec![device(free)],
        placement: None,
        tier: Choice::Unlimited,
        precisions: vec![Precision::Bf16],
        allow_degrade: false,
    };
    let size = Some(PictureSize { width: 256, height: 256 });
    let least = |frames: u32| {
        let request = Request { size, frames: Some(frames), steps: Some(2), ..Default::default() };
        let (mut no, mut yes) = (1u64 << 20, 1u64 << 40);
        while yes - no > 1 << 20 {
            let middle = no.midpoint(yes);
            if planner(middle).plan(&request).is_ok() { yes = middle } else { no = middle }
        }
        yes
    };
    let free = least(5).midpoint(least(65)) / 100 * 95;
    let ask = move |_| {
        let table = ModelTable::published()?;
        Ok(Fleet { table, devices: vec![device(free)], placement: None })
    };
    (FleetSource::new(ask), planner(free))
}

#[tokio::test]
async fn what_the_devices_cannot_hold_is_refused_before_any_stage_is_asked() {
    let script = Arc::new(Script::default());
    let (source, _) = middling();
    let mut desk = Desk::new(&script).await;
    desk.gateway = desk.gateway.planning_for(source);
    let wanted = |frames: u32| {
        let mut upload = upload(GenerationSpec { steps: Some(2), ..Default::default() }, frames);
        upload.spec.size = Some(256);
        upload
    };
    let fault = desk.accept(wanted(65)).await.unwrap_err();
    assert_eq!((fault.kind, fault.code()), (Kind::OutOfMemory, tonic::Code::ResourceExhausted), "{fault}");
    for part in ["needs at least", " on cpu, of which ", " would fit"] {
        assert!(fault.message.contains(part), "{part} in {fault}");
    }
    assert!(script.calls.lock().unwrap().is_empty() && script.encoded.load(Ordering::Relaxed) == 0);
    let id = desk.accept(wanted(5)).await.unwrap();
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
}

#[tokio::test]
async fn what_the_devices_cannot_hold_is_lowered_where_that_is_allowed_and_said() {
    let script = Arc::new(Script::default());
    let (source, planner) = middling();
    let tier = TierOptions { allow_degrade: true, ..TierOptions::default() };
    let mut desk = Desk::with(&script, Options { tier, ..Options::default() }).await;
    desk.gateway = desk.gateway.planning_for(source);
    let mut upload = upload(GenerationSpec { steps: Some(2), ..Default::default() }, 65);
    upload.spec.size = Some(256);
    let id = desk.accept(upload).await.unwrap();
    let generation = desk.ended(id).await;
    assert_eq!(generation.state(), GenerationState::Completed, "{generation:?}");
    let (size, frames) = ((generation.width, generation.height), generation.frames);
    assert!(size < (256, 256) || frames < 65, "{size:?}, {frames} frames");
    let warnings = generation.outcome.unwrap().warnings;
    assert!(warnings.iter().any(|said| said.contains("lowered to")), "{warnings:?}");
    let made = Request {
        size: Some(PictureSize { width: size.0, height: size.1 }),
        frames: Some(frames),
        steps: Some(2),
        ..Default::default()
    };
    let roomier = Planner {
        devices: planner.devices.iter().map(|d| Device { free: Bytes(d.free.0 / 100 * 106), ..d.clone() }).collect(),
        ..planner
    };
    assert!(roomier.plan(&made).is_ok(), "{made:?}");
    let left = script.heard.load(Ordering::Relaxed);
    assert_eq!(left, frames as usize, "the rest of the speech is not heard");
}

#[tokio::test]
async fn what_a_stages_first_call_frees_on_its_device_is_told_by_an_event() {
    let script = Arc::new(Script { relieved: [2, 1], ..Script::default() });
    let desk = Desk::new(&script).await;
    let id = desk.accept(upload(GenerationSpec { steps: Some(1), ..Default::default() }, 5)).await.unwrap();
    assert_eq!(desk.ended(id).await.state(), GenerationState::Completed);
    let events = desk.events(id).await;
    let device = "to make room on audio-encoder's device, ";
    for told in ["idle stages unloaded: 2", "stages whose caches were freed: 1"] {
        let said = events.iter().filter(|event| event.message == format!("{device}{told}")).count();
        assert_eq!(said, 1, "{told}");
    }
}
