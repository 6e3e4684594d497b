//! The budget counts the whole process's heap, so its tests have a process of their own each.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use proto::v1::Stage;
use service_kit::{
    ServiceError,
    config::{Compute, StageConfig},
    device::DeviceWorker,
    hardware::{DeviceConfig, DeviceName},
    memory::{Budget, Watch, current_bytes},
    stage::{StageHost, StageModel},
};
use tokio_util::sync::CancellationToken;

const MIB: usize = 1 << 20;

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
    WATCH.set(Some(watch));
    let result = work();
    WATCH.set(None);
    result
}

/// Holds so many MiB, as a layer does: asks first.
fn hold(mib: usize) -> Result<Vec<u8>, ServiceError> {
    let allowed = WATCH.with_borrow(|watch| watch.as_ref().is_none_or(|watch| watch.allows((mib * MIB) as u64)));
    if allowed { Ok(vec![1; mib * MIB]) } else { Err(ServiceError::internal("stopped")) }
}

/// A stage whose weights take 16 MiB, what its generations keep, and what nobody has asked for in a long time.
struct Model<const STAGE: usize> {
    _weights: Vec<u8>,
    kept: Vec<u8>,
    cached: Vec<u8>,
    forgotten: Vec<u8>,
}

impl<const N: usize> StageModel for Model<N> {
    type Options = ();

    const STAGE: Stage = if N == 0 { Stage::Diffusion } else { Stage::VaeDecode };
    const NAME: &'static str = if N == 0 { "diffusion" } else { "vae-decode" };

    fn open(_: &Path, _: (DeviceName, Compute), (): &()) -> Result<Self, ServiceError> {
        Ok(Self { _weights: hold(16)?, kept: Vec::new(), cached: Vec::new(), forgotten: Vec::new() })
    }

    fn files(_: &Path, (): &()) -> Vec<PathBuf> {
        Vec::new()
    }

    fn kept_bytes(&self) -> u64 {
        (self.kept.len() + self.cached.len() + self.forgotten.len()) as u64
    }

    fn trim(&mut self) {
        self.tidy();
        self.cached = Vec::new();
    }

    fn tidy(&mut self) {
        self.forgotten = Vec::new();
    }

    fn watched<R>(watch: Watch, work: impl FnOnce() -> R) -> R {
        watched(watch, work)
    }
}

type Host<const N: usize> = Arc<StageHost<Model<N>>>;

/// Two stages on one device with so much more than the process has already.
fn start(mib: usize, pressure_percent: u8) -> (Host<0>, Host<1>) {
    let budget_bytes = current_bytes() + (mib * MIB) as u64;
    let device = DeviceConfig { budget_bytes, pressure_percent, ..DeviceConfig::cpu() };
    let config = StageConfig { device, ..StageConfig::local("none") };
    let worker = DeviceWorker::spawn(&config.device, 4).unwrap();
    let first = StageHost::new(&config, (), worker.clone(), CancellationToken::new());
    (first, StageHost::new(&config, (), worker, CancellationToken::new()))
}

#[tokio::test]
async fn a_request_that_passes_the_budget_fails_with_its_numbers_and_the_next_one_runs() {
    let (host, _) = start(64, 100);
    let error = host.submit(|_, _| hold(100).map(drop)).unwrap().await.unwrap_err();
    let ServiceError::DeviceMemory { stage, needed_bytes, free_bytes, budget_bytes, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!((stage.as_str(), *needed_bytes), ("diffusion", 100 << 20));
    assert!((32 << 20..=48 << 20).contains(free_bytes), "{error}");
    assert!(*budget_bytes >= 64 << 20, "{error}");
    assert_eq!(host.submit(|_, _| hold(30).map(|held| held.len())).unwrap().await, Ok(30 << 20));
    let report = host.memory();
    assert_eq!(report.budget_bytes, *budget_bytes);
    assert!(report.peak_bytes < 64 << 20, "{report:?}");
}

#[tokio::test]
async fn weights_that_do_not_fit_are_out_of_memory_and_not_a_broken_checkpoint() {
    let (host, _) = start(8, 100);
    let error = host.submit(|_, _| Ok(())).unwrap().await.unwrap_err();
    assert!(matches!(error, ServiceError::DeviceMemory { needed_bytes, .. } if needed_bytes == 16 << 20), "{error:?}");
}

#[tokio::test]
async fn above_the_mark_idle_stages_go_and_below_it_nothing_does() {
    let (first, second) = start(64, 85);
    first.submit(|_, _| Ok(())).unwrap().await.unwrap();
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(first.memory().resident_bytes > 0 && !first.memory().pressure);
    // The heap's rest counts too, so the mark is passed by a generation's own features.
    let budget = first.memory().budget_bytes as usize;
    let fill = (budget / 100 * 90).saturating_sub(current_bytes() as usize) / MIB;
    second.submit(move |model, _| hold(fill).map(|kept| model.kept = kept)).unwrap().await.unwrap();
    assert!(second.memory().pressure && second.memory().unloaded_stages == 0);
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    assert_eq!((first.memory().resident_bytes, second.memory().unloaded_stages), (0, 1));
}

#[tokio::test]
async fn new_work_waits_while_a_generation_fills_the_device_and_begins_when_it_has_ended() {
    let (first, second) = start(64, 60);
    let budget = first.memory().budget_bytes as usize;
    let fill = (budget / 100 * 80).saturating_sub(current_bytes() as usize + 16 * MIB) / MIB;
    second.submit(move |model, _| hold(fill).map(|kept| model.kept = kept)).unwrap().await.unwrap();
    let error = first.submit_new(|_, _| Ok(())).unwrap().await.unwrap_err();
    assert!(matches!(error, ServiceError::ResourceExhausted { retry_after: Some(_), .. }), "{error:?}");
    // What a generation that is under way needs is not refused.
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    second
        .submit(|model, _| {
            model.kept = Vec::new();
            Ok(())
        })
        .unwrap()
        .await
        .unwrap();
    first.submit_new(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(!first.memory().pressure);
}

#[tokio::test]
async fn a_stage_gives_back_what_itself_keeps_for_nobody() {
    let (host, _) = start(64, 85);
    let budget = host.memory().budget_bytes as usize;
    let fill = (budget / 100 * 90).saturating_sub(current_bytes() as usize + 16 * MIB) / MIB;
    host.submit(move |model, _| hold(fill).map(|all| model.forgotten = all)).unwrap().await.unwrap();
    assert!(host.memory().pressure);
    // Nothing else is left on the device, so what begins does not wait.
    host.submit_new(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(!host.memory().pressure && host.memory().pressure_refusals == 0);
}

#[tokio::test]
async fn above_the_mark_caches_of_busy_stages_are_freed_and_counted() {
    let (first, second) = start(64, 60);
    let budget = first.memory().budget_bytes as usize;
    first
        .submit(|model, _| {
            model.kept = hold(1)?;
            hold(12).map(|cached| model.cached = cached)
        })
        .unwrap()
        .await
        .unwrap();
    let fill = (budget / 100 * 80).saturating_sub(current_bytes() as usize + 16 * MIB) / MIB;
    second.submit(move |model, _| hold(fill).map(|kept| model.kept = kept)).unwrap().await.unwrap();
    assert!(second.memory().pressure && second.memory().emptied_caches == 0, "{:?}", second.memory());
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    let told = second.memory();
    // A generation still has something there, so that the weights stay.
    assert_eq!((told.emptied_caches, told.unloaded_stages), (1, 0));
    assert!(first.memory().resident_bytes > 0);
    let left = first.submit(|model, _| Ok((model.kept.len(), model.cached.len()))).unwrap().await.unwrap();
    assert_eq!(left, (MIB, 0));
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    assert_eq!(second.memory().emptied_caches, 1, "what is empty is not emptied again");
}

/// On a card weights are in its memory, so that a stage that needs more of it comes before idle ones.
#[tokio::test]
async fn a_stage_on_a_card_that_needs_more_than_is_free_has_idle_stages_unloaded_first() {
    const TIB: u64 = 1 << 40;
    let left = Arc::new(AtomicU64::new(TIB / 2));
    let asked = Arc::clone(&left);
    let device = DeviceConfig { name: DeviceName::Cuda { index: 0 }, budget_bytes: TIB, ..DeviceConfig::cpu() };
    let config = StageConfig { device: device.clone(), ..StageConfig::local("none") };
    // What is unloaded is free after it.
    let budget = Budget::within(device, Duration::from_secs(3600), move || asked.fetch_add(TIB / 8, Relaxed));
    let worker = DeviceWorker::spawn_within(budget, 4).unwrap();
    let first: Host<0> = StageHost::new(&config, (), worker.clone(), CancellationToken::new());
    let second: Host<1> = StageHost::new(&config, (), worker, CancellationToken::new());
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    let free = |wanted: u64| {
        let host = first.clone();
        first.submit(move |_, _| Ok(host.free_for(0, wanted))).unwrap()
    };
    assert!(free(TIB / 4).await.unwrap() >= TIB / 2);
    assert_eq!((first.memory().unloaded_stages, second.memory().resident_bytes > 0), (0, true), "there is room");
    left.store(TIB / 2, Relaxed);
    assert!(free(TIB / 4 * 3).await.unwrap() > TIB / 2);
    assert_eq!((first.memory().unloaded_stages, second.memory().resident_bytes), (1, 0));
    // One that a generation needs stays.
    second.submit(|model, _| hold(1).map(|kept| model.kept = kept)).unwrap().await.unwrap();
    left.store(0, Relaxed);
    free(TIB).await.unwrap();
    assert_eq!((first.memory().unloaded_stages, second.memory().resident_bytes > 0), (1, true));
}

/// A memory of 1 TiB, of which another process takes and gives.
#[tokio::test]
async fn memory_that_another_process_takes_presses_fails_and_comes_back() {
    const TIB: u64 = 1 << 40;
    let left = Arc::new(AtomicU64::new(TIB));
    let asked = Arc::clone(&left);
    let device = DeviceConfig { budget_bytes: TIB, ..DeviceConfig::cpu() };
    let config = StageConfig { device: device.clone(), ..StageConfig::local("none") };
    let budget = Budget::within(device, Duration::ZERO, move || asked.load(Relaxed));
    let worker = DeviceWorker::spawn_within(budget, 4).unwrap();
    let first: Host<0> = StageHost::new(&config, (), worker.clone(), CancellationToken::new());
    let second: Host<1> = StageHost::new(&config, (), worker, CancellationToken::new());
    first.submit(|model, _| hold(1).map(|kept| model.kept = kept)).unwrap().await.unwrap();
    second.submit(|_, _| Ok(())).unwrap().await.unwrap();
    left.store(8 << 20, Relaxed);
    // Work that is under way unloads what is idle, and fails with numbers where that is not enough.
    let error = first.submit(|_, _| hold(16).map(drop)).unwrap().await.unwrap_err();
    let ServiceError::DeviceMemory { needed_bytes, free_bytes, .. } = error else { panic!("{error:?}") };
    assert_eq!((needed_bytes, free_bytes), (16 << 20, 8 << 20));
    assert_eq!((second.memory().resident_bytes, first.memory().unloaded_stages), (0, 1));
    let error = second.submit_new(|_, _| Ok(())).unwrap().await.unwrap_err();
    assert!(matches!(error, ServiceError::ResourceExhausted { .. }), "{error:?}");
    let told = first.memory();
    assert_eq!((told.pressure, told.pressure_count, told.pressure_refusals), (true, 1, 1));
    left.store(TIB, Relaxed);
    second.submit_new(|_, _| Ok(())).unwrap().await.unwrap();
    assert!(!first.memory().pressure);
}

#[tokio::test]
async fn a_device_that_works_counts_its_layers_and_one_that_stands_still_does_not() {
    let config = StageConfig::local("none");
    let worker = DeviceWorker::spawn(&config.device, 4).unwrap();
    let first: Host<0> = StageHost::new(&config, (), worker.clone(), CancellationToken::new());
    let second: Host<1> = StageHost::new(&config, (), worker.clone(), CancellationToken::new());
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (started, standing) = tokio::sync::oneshot::channel();
    let work = first.submit(move |_, _| {
        hold(1)?;
        started.send(()).unwrap();
        let _ = held.recv();
        hold(1).map(drop)
    });
    standing.await.unwrap();
    let budget = worker.budget();
    let before = budget.advances();
    assert!(before >= 2, "a task began and went through a layer: {before}");
    let waiting = second.submit(|_, _| Ok(())).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(budget.advances(), before, "whoever only waits gets nobody on");
    drop(release);
    work.unwrap().await.unwrap();
    waiting.await.unwrap();
    // A layer, two ends and a beginning.
    assert!(budget.advances() >= before + 4, "{before}, then {}", budget.advances());
}

#[tokio::test]
async fn a_caller_that_is_gone_stops_the_work_at_the_next_layer() {
    let (host, _) = start(64, 100);
    let (began, begun) = tokio::sync::oneshot::channel();
    let (told, tell) = tokio::sync::oneshot::channel();
    let pending = host
        .submit(move |_, _| {
            began.send(()).unwrap();
            let refused = loop {
                if let Err(refused) = hold(1) {
                    break refused;
                }
            };
            told.send(refused.to_string()).unwrap();
            Ok(())
        })
        .unwrap();
    begun.await.unwrap();
    drop(pending);
    tokio::time::timeout(std::time::Duration::from_secs(20), tell).await.unwrap().unwrap();
}

#[tokio::test]
async fn each_of_two_devices_bounds_what_its_own_stages_hold_and_is_named_where_it_is_full() {
    let device = |number: usize, budget_bytes: u64| DeviceConfig {
        number: Some(number),
        budget_bytes,
        pressure_percent: 100,
        ..DeviceConfig::cpu()
    };
    // The first one has the rest of the process too.
    let devices = [device(0, current_bytes() + 64 * MIB as u64), device(1, 128 * MIB as u64)];
    let workers = DeviceWorker::spawn_several(&devices, 4).unwrap();
    let config = StageConfig::local("models");
    let small: Arc<StageHost<Model<0>>> = StageHost::new(&config, (), workers[0].clone(), CancellationToken::new());
    let large: Arc<StageHost<Model<1>>> = StageHost::new(&config, (), workers[1].clone(), CancellationToken::new());

    assert_eq!(large.submit(|_, _| hold(100).map(|held| held.len())).unwrap().await, Ok(100 << 20));
    let error = large.submit(|_, _| hold(120).map(drop)).unwrap().await.unwrap_err();
    let named = |error: &ServiceError, expected: &str| matches!(error, ServiceError::DeviceMemory { device, .. } if device == expected);
    assert!(named(&error, "cpu.1") && error.to_string().contains("on cpu.1"), "{error}");
    let error = small.submit(|_, _| hold(60).map(drop)).unwrap().await.unwrap_err();
    assert!(named(&error, "cpu.0"), "{error}");
    assert_eq!(small.submit(|_, _| hold(40).map(|held| held.len())).unwrap().await, Ok(40 << 20));

    let near = |bytes: u64, mib: u64| bytes.abs_diff(mib << 20) < 2 << 20;
    assert!(near(workers[1].budget().held_bytes(), 16), "{}", workers[1].budget().held_bytes());
    assert!(near(small.memory().free_bytes, 48) && near(large.memory().free_bytes, 112), "{:?}", small.memory());
    // Together they are the heap.
    let all: u64 = workers.iter().map(|worker| worker.budget().held_bytes()).sum();
    assert!(all.abs_diff(current_bytes()) < 1 << 20);
    assert!(
        near(large.memory().device_peak_bytes, 116) && near(large.memory().device_bytes, 16),
        "{:?}",
        large.memory()
    );
}

#[tokio::test]
async fn a_device_that_is_nearly_full_keeps_new_work_from_itself_alone() {
    let device = |number: usize, mib: u64| DeviceConfig {
        number: Some(number),
        budget_bytes: current_bytes() + (mib << 20),
        pressure_percent: 60,
        ..DeviceConfig::cpu()
    };
    let workers = DeviceWorker::spawn_several(&[device(0, 64), device(1, 128)], 4).unwrap();
    let config = StageConfig::local("models");
    let small: Arc<StageHost<Model<0>>> = StageHost::new(&config, (), workers[0].clone(), CancellationToken::new());
    let large: Arc<StageHost<Model<1>>> = StageHost::new(&config, (), workers[1].clone(), CancellationToken::new());
    large.submit(|model, _| hold(80).map(|held| model.kept = held)).unwrap().await.unwrap();

    assert!(large.memory().pressure && !small.memory().pressure, "{:?}", (large.memory(), small.memory()));
    small.submit_new(|_, _| Ok(())).unwrap().await.unwrap();
    let error = large.submit_new(|_, _| Ok(())).unwrap().await.unwrap_err();
    assert!(error.to_string().contains("cpu.1 is above 60 %"), "{error}");
    assert_eq!((large.memory().pressure_refusals, small.memory().pressure_refusals), (1, 0));

    large.submit(|model, _| hold(0).map(|held| model.kept = held)).unwrap().await.unwrap();
    assert!(!large.memory().pressure, "{:?}", large.memory());
    large.submit_new(|_, _| Ok(())).unwrap().await.unwrap();
}
