//! A stage over several devices: each is charged with what is there, and watched. The heap is counted, so these tests
//! have a process of their own each.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use proto::v1::Stage;
use service_kit::{
    ServiceError,
    config::{Compute, StageConfig},
    device::DeviceWorker,
    hardware::{DeviceConfig, DeviceName},
    memory::{Watch, WeightsReport, current_bytes},
    stage::{StageHost, StageModel},
};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Holds so many MiB, as a layer does: asks first.
fn hold(mib: usize) -> Result<Vec<u8>, ServiceError> {
    let allowed = WATCH.with_borrow(|watch| watch.as_ref().is_none_or(|watch| watch.allows((mib * MIB) as u64)));
    if allowed { Ok(vec![1; mib * MIB]) } else { Err(ServiceError::internal("stopped")) }
}

/// Goes to another device, with so many MiB.
fn go(device: usize, mib: usize) {
    WATCH.with_borrow(|watch| watch.as_ref().unwrap().moves(device, (mib * MIB) as u64));
}

/// A stage of two parts, whose tables take 4 MiB on the first device and 8 on the second.
struct Spread {
    _tables: [Vec<u8>; 2],
    kept: Vec<u8>,
}

impl StageModel for Spread {
    type Options = ();

    const STAGE: Stage = Stage::Diffusion;
    const NAME: &'static str = "diffusion";

    fn open(_: &Path, _: (DeviceName, Compute), (): &()) -> Result<Self, ServiceError> {
        let first = hold(4)?;
        go(1, 0);
        let second = hold(8)?;
        go(0, 0);
        Ok(Self { _tables: [first, second], kept: Vec::new() })
    }

    fn files(_: &Path, (): &()) -> Vec<PathBuf> {
        Vec::new()
    }

    fn kept_bytes(&self) -> u64 {
        self.kept.len() as u64
    }

    fn trim(&mut self) {
        self.kept = Vec::new();
    }

    fn weights(&self) -> Vec<WeightsReport> {
        let part = |blocks: u32, resident_blocks: u32| WeightsReport { blocks, resident_blocks, ..Default::default() };
        vec![part(3, 2), part(5, 5)]
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        WATCH.set(Some(watch));
        let result = work();
        WATCH.set(None);
        result
    }
}

/// A stage on one device.
struct Whole;

impl StageModel for Whole {
    type Options = ();

    const STAGE: Stage = Stage::VaeDecode;
    const NAME: &'static str = "vae-decode";

    fn open(_: &Path, _: (DeviceName, Compute), (): &()) -> Result<Self, ServiceError> {
        Ok(Self)
    }

    fn files(_: &Path, (): &()) -> Vec<PathBuf> {
        Vec::new()
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        WATCH.set(Some(watch));
        let result = work();
        WATCH.set(None);
        result
    }
}

fn devices(mib: [usize; 2]) -> Vec<DeviceWorker> {
    let device = |number: usize, bytes: u64| DeviceConfig {
        number: Some(number),
        budget_bytes: bytes,
        pressure_percent: 100,
        ..DeviceConfig::cpu()
    };
    // The first one has the rest of the process too.
    let first = current_bytes() + (mib[0] * MIB) as u64;
    DeviceWorker::spawn_several(&[device(0, first), device(1, (mib[1] * MIB) as u64)], 4).unwrap()
}

fn spread(workers: &[DeviceWorker], order: [usize; 2]) -> Arc<StageHost<Spread>> {
    let [first, second] = order.map(|number| workers[number].clone());
    StageHost::over(&StageConfig::local("none"), (), (first, vec![second]), CancellationToken::new())
}

/// Takes 10 MiB on the first device, goes to the second with 6 of them, takes 20 there, and comes back with 1.
fn pass(model: &mut Spread, keeps: bool) -> Result<(), ServiceError> {
    let (stays, goes) = (hold(4)?, hold(6)?);
    go(1, 6);
    let there = hold(20)?;
    drop((there, goes));
    let result = hold(1)?;
    go(0, 1);
    drop(stays);
    if keeps {
        model.kept = result;
    }
    Ok(())
}

fn near(bytes: u64, mib: u64) -> bool {
    bytes.abs_diff(mib << 20) < 1 << 20
}

#[tokio::test]
async fn each_device_is_charged_with_what_is_there() {
    let workers = devices([64, 64]);
    let host = spread(&workers, [0, 1]);
    host.submit(|model, _| pass(model, true)).unwrap().await.unwrap();
    let memory = host.memory();
    let [first, second] = &memory.parts[..] else { panic!("{memory:?}") };
    assert!(near(first.resident_bytes, 4) && near(second.resident_bytes, 8), "{memory:?}");
    // Tables and 10; tables, what came, and 20.
    assert!(near(first.peak_bytes, 14) && near(second.peak_bytes, 34), "{memory:?}");
    assert!(near(second.device_peak_bytes, 34) && near(second.device_bytes, 8), "{memory:?}");
    assert_eq!((first.peak_bytes, memory.peak_bytes), (memory.peak_bytes, first.peak_bytes));
    assert_eq!((first.device.as_str(), second.device.as_str()), ("cpu.0", "cpu.1"));
    let blocks = [first, second].map(|part| (part.first_block, part.blocks, part.resident_blocks));
    assert_eq!((blocks, memory.weight_blocks, memory.resident_weight_blocks), ([(0, 3, 2), (3, 5, 5)], 8, 7));
    // What is kept came back to the first one; together they are the heap.
    assert!(near(workers[1].budget().held_bytes(), 8));
    let all: u64 = workers.iter().map(|worker| worker.budget().held_bytes()).sum();
    assert!(all.abs_diff(current_bytes()) < 1 << 20);
    host.submit(|model, _| pass(model, false)).unwrap().await.unwrap();
    assert!(near(host.memory().parts[0].peak_bytes, 15) && near(host.memory().parts[1].peak_bytes, 34));
}

#[tokio::test]
async fn whoever_waits_for_any_part_of_the_processor_sees_that_another_part_gets_on() {
    let workers = devices([64, 64]);
    let before = workers[1].budget().advances();
    workers[0].try_submit(|_| Ok(())).unwrap().await.unwrap();
    assert!(workers[1].budget().advances() >= before + 2);
}

#[tokio::test]
async fn a_device_that_is_full_is_named_whichever_it_is() {
    let full = |error: ServiceError, expected: &str| match error {
        ServiceError::DeviceMemory { stage, device, needed_bytes, free_bytes, budget_bytes } => {
            assert_eq!((stage.as_str(), device.as_str()), ("diffusion", expected));
            assert!(needed_bytes > free_bytes && free_bytes < budget_bytes, "{needed_bytes} of {free_bytes}");
        }
        other => panic!("{other:?}"),
    };
    let workers = devices([64, 28]);
    let host = spread(&workers, [0, 1]);
    // 8 of tables and 6 that came leave 14 for 20.
    full(host.submit(|model, _| pass(model, false)).unwrap().await.unwrap_err(), "cpu.1");
    full(host.submit(|_, _| hold(80).map(drop)).unwrap().await.unwrap_err(), "cpu.0");
    // Nothing is left behind by what failed.
    assert!(near(workers[1].budget().held_bytes(), 8), "{}", workers[1].budget().held_bytes());
    assert!(near(host.free_for(1, 0), 20), "{}", host.free_for(1, 0));
    let light = |_: &mut Spread| -> Result<usize, ServiceError> {
        go(1, 0);
        hold(16).map(|held| held.len())
    };
    assert_eq!(host.submit(move |model, _| light(model)).unwrap().await, Ok(16 << 20));
    // In the other order the small one is the first.
    let host = spread(&workers, [1, 0]);
    full(host.submit(|_, _| hold(30).map(drop)).unwrap().await.unwrap_err(), "cpu.1");
}

#[tokio::test]
async fn stages_that_share_a_device_work_in_turns_and_none_waits_for_ever() {
    static AT_WORK: AtomicUsize = AtomicUsize::new(0);
    fn alone() {
        assert_eq!(AT_WORK.fetch_add(1, Relaxed), 0, "another stage works");
        std::thread::sleep(std::time::Duration::from_millis(2));
        AT_WORK.fetch_sub(1, Relaxed);
    }
    let workers = devices([64, 64]);
    // Two spread stages whose parts are in opposite orders, and one on each device.
    let (one, other) = (spread(&workers, [0, 1]), spread(&workers, [1, 0]));
    let whole = |number: usize| -> Arc<StageHost<Whole>> {
        let shutdown = CancellationToken::new();
        StageHost::new(&StageConfig::local("none"), (), workers[number].clone(), shutdown)
    };
    let (left, right) = (whole(0), whole(1));
    let rounds = async {
        for _ in 0..20 {
            let spread = [&one, &other].map(|host| {
                host.submit(|_, _| {
                    alone();
                    Ok(())
                })
            });
            let whole = [&left, &right].map(|host| {
                host.submit(|_, _| {
                    alone();
                    Ok(())
                })
            });
            for pending in spread.into_iter().chain(whole) {
                pending.unwrap().await.unwrap();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), rounds).await.unwrap();
}

#[tokio::test]
async fn a_stage_of_any_of_its_devices_unloads_it_when_that_one_is_nearly_full() {
    let device = |number: usize, budget_bytes: u64| DeviceConfig {
        number: Some(number),
        budget_bytes,
        pressure_percent: 50,
        ..DeviceConfig::cpu()
    };
    // Its tables take 8 MiB of the second one.
    let workers = DeviceWorker::spawn_several(&[device(0, 1 << 40), device(1, 9 << 20)], 4).unwrap();
    let host = spread(&workers, [0, 1]);
    host.submit(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(host.memory().pressure && host.memory().parts[1].resident_bytes > 0, "{:?}", host.memory());
    let beside: Arc<StageHost<Whole>> =
        StageHost::new(&StageConfig::local("none"), (), workers[1].clone(), CancellationToken::new());
    beside.submit(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(host.memory().parts.iter().all(|part| part.resident_bytes == 0), "{:?}", host.memory());
    assert!(near(workers[1].budget().held_bytes(), 0) && beside.memory().unloaded_stages == 1);
}

#[tokio::test]
async fn a_lost_device_ends_the_stage_whichever_it_is_and_leaves_the_others_to_theirs() {
    const BROKEN: &str = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")";
    let workers = devices([64, 64]);
    let host = spread(&workers, [0, 1]);
    let breaks = |_: &mut Spread| -> Result<(), ServiceError> {
        go(1, 0);
        Err(ServiceError::internal(BROKEN))
    };
    let error = host.submit(move |model, _| breaks(model)).unwrap().await.unwrap_err();
    assert!(error.to_string().contains("is lost") && error.code_name() == "UNAVAILABLE", "{error}");
    let Err(error) = host.submit(|_, _| Ok(())) else { panic!("it took work") };
    assert_eq!(error.code_name(), "UNAVAILABLE");
    assert!(host.ended().is_err() && workers[1].works().is_err() && workers[0].works().is_ok());
}
