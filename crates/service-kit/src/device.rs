//! One thread owns a device; a bounded queue leads to it.
//!
//! Stages that share a device share its [`DeviceWorker`], so their work runs one after the other.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{ServiceError, hardware::DeviceConfig, memory::Budget};

/// Asks a task whether its caller still waits.
#[derive(Debug, Clone)]
pub struct CancelToken(CancellationToken);

impl CancelToken {
    /// Whether the caller has gone.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }

    /// An error when the caller has gone, for `?` between two items of work.
    pub fn check(&self) -> Result<(), ServiceError> {
        if self.is_cancelled() { Err(ServiceError::cancelled("the caller went away")) } else { Ok(()) }
    }
}

/// The right to compute on a device; held by one task at a time.
type Turn = Arc<Mutex<()>>;

/// A task, and the turns that it needs.
struct Job {
    turns: Vec<Turn>,
    run: Box<dyn FnOnce() + Send>,
}

/// A stage on a device, as the others on it see it. Everything is asked on the device's thread.
pub(crate) trait Tenant: Send + Sync {
    /// The stage's name.
    fn name(&self) -> &'static str;

    /// Whether a generation has something on the device.
    fn serves(&self) -> bool;

    /// Gives back what nobody has asked for in a long time.
    fn tidy(&self);

    /// Gives back what can be had again: caches, and the weights where no generation needs them now.
    fn relieve(&self) -> Relieved;
}

/// What a stage gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Relieved {
    /// Bytes of caches.
    pub(crate) cache_bytes: u64,
    /// Whether the weights went.
    pub(crate) unloaded: bool,
}

struct Shared {
    jobs: SyncSender<Job>,
    turn: Turn,
    budget: Arc<Budget>,
    /// Tells this device from those of other processes.
    id: String,
    tenants: Mutex<Vec<Weak<dyn Tenant>>>,
    /// Stages that were unloaded to make room.
    unloaded: AtomicU64,
    /// How often a stage gave its caches back to make room.
    emptied: AtomicU64,
    capacity: usize,
    waiting: AtomicUsize,
    /// Milliseconds of a task, smoothed.
    pace_ms: AtomicU64,
    /// Why nothing can be computed on it any more.
    lost: OnceLock<String>,
}

/// The way to a device's thread. Clones lead to the same thread; it ends when the last is gone.
#[derive(Clone)]
pub struct DeviceWorker(Arc<Shared>);

impl DeviceWorker {
    /// Starts the device's thread, with room for `capacity` waiting tasks (at least 1) besides the running one.
    ///
    /// Errors: the system gives no thread.
    pub fn spawn(device: &DeviceConfig, capacity: usize) -> Result<Self, ServiceError> {
        Self::spawn_within(Budget::new(device.clone()), capacity)
    }

    /// As [`spawn`](Self::spawn), with a budget of the caller's.
    ///
    /// Errors: as there.
    pub fn spawn_within(budget: Budget, capacity: usize) -> Result<Self, ServiceError> {
        Self::start(budget, &Arc::default(), capacity)
    }

    /// Starts the threads of the devices of one process. As the processor is all of them, they work in turns.
    ///
    /// Errors: the system gives no thread.
    pub fn spawn_several(devices: &[DeviceConfig], capacity: usize) -> Result<Vec<Self>, ServiceError> {
        let processor: Turn = Arc::default();
        let start = |budget: Budget| match budget.device().name.card() {
            None => Self::start(budget, &processor, capacity),
            Some(_) => Self::start(budget, &Arc::default(), capacity),
        };
        Budget::several(devices).into_iter().map(start).collect()
    }

    fn start(budget: Budget, turn: &Turn, capacity: usize) -> Result<Self, ServiceError> {
        let capacity = capacity.max(1);
        let (jobs, queue): (SyncSender<Job>, Receiver<Job>) = sync_channel(capacity);
        let label = budget.device().label();
        let work = move || {
            for Job { turns, run } in queue {
                let _held: Vec<_> =
                    turns.iter().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner)).collect();
                run();
            }
        };
        thread::Builder::new()
            .name(format!("device-{label}"))
            .spawn(work)
            .map_err(|e| ServiceError::internal(format!("the thread for {label} did not start: {e}")))?;
        Ok(Self(Arc::new(Shared {
            jobs,
            turn: turn.clone(),
            budget: Arc::new(budget),
            id: uuid::Uuid::new_v4().to_string(),
            tenants: Mutex::default(),
            unloaded: AtomicU64::new(0),
            emptied: AtomicU64::new(0),
            capacity,
            waiting: AtomicUsize::new(0),
            pace_ms: AtomicU64::new(1000),
            lost: OnceLock::new(),
        })))
    }

    /// The device's budget.
    #[must_use]
    pub fn budget(&self) -> &Arc<Budget> {
        &self.0.budget
    }

    /// The same for all stages on this device, and another for every other device.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Stages that were unloaded to make room, since the start.
    #[must_use]
    pub fn unloaded(&self) -> u64 {
        self.0.unloaded.load(Relaxed)
    }

    /// How often a stage gave its caches back to make room, since the start.
    #[must_use]
    pub fn emptied(&self) -> u64 {
        self.0.emptied.load(Relaxed)
    }

    /// Gives the device up: from now on it takes no work.
    pub(crate) fn lose(&self, reason: &str) {
        if self.0.lost.set(reason.to_owned()).is_ok() {
            tracing::error!(device = %self.0.budget.device().name, "the device is lost, so its process ends: {reason}");
        }
    }

    /// Whether the device still computes.
    ///
    /// Errors: [`ServiceError::Unavailable`] after a fault that only another process can get over.
    pub fn works(&self) -> Result<(), ServiceError> {
        match self.0.lost.get() {
            None => Ok(()),
            Some(reason) => {
                Err(ServiceError::unavailable(format!("{} is lost: {reason}", self.0.budget.device().name)))
            }
        }
    }

    pub(crate) fn settle(&self, tenant: Weak<dyn Tenant>) {
        self.tenants().push(tenant);
    }

    fn tenants(&self) -> MutexGuard<'_, Vec<Weak<dyn Tenant>>> {
        self.0.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the device is nearly full, frees what the stages besides `own` can have again, and what `own` keeps for nobody.
    /// To be called on the device's thread.
    ///
    /// Errors: `new_work` is to begin, and the device is still nearly full while a generation holds something on it;
    /// when that has ended there is room again.
    pub(crate) fn make_room(&self, own: &'static str, new_work: bool) -> Result<(), ServiceError> {
        if !self.0.budget.pressed() {
            return Ok(());
        }
        let tenants = self.settled();
        for tenant in &tenants {
            if tenant.name() == own {
                tenant.tidy();
            } else {
                self.relieve(tenant.as_ref(), "its device is nearly full");
            }
        }
        if new_work && self.0.budget.pressed() && tenants.iter().any(|tenant| tenant.serves()) {
            let (device, percent) = (self.0.budget.device().label(), self.0.budget.pressure_percent());
            self.0.budget.refuse();
            tracing::warn!(stage = own, %device, percent, "new work has to wait, as the device is nearly full");
            return Err(ServiceError::ResourceExhausted {
                message: format!("{own}: {device} is above {percent} % of its memory"),
                retry_after: Some(self.retry_after()),
            });
        }
        Ok(())
    }

    fn settled(&self) -> Vec<Arc<dyn Tenant>> {
        self.tenants().iter().filter_map(Weak::upgrade).collect()
    }

    /// Lets a stage give back what it can have again, and says so.
    fn relieve(&self, tenant: &dyn Tenant, why: &str) {
        let Relieved { cache_bytes, unloaded } = tenant.relieve();
        if cache_bytes > 0 {
            self.0.emptied.fetch_add(1, Relaxed);
            tracing::warn!(stage = tenant.name(), cache_bytes, "caches freed, as {why}");
        }
        if unloaded {
            self.0.unloaded.fetch_add(1, Relaxed);
            tracing::warn!(stage = tenant.name(), "unloaded, as {why}");
        }
    }

    /// Bytes of the device that may still be held. Where these are fewer than `wanted`, stages besides `own` that no
    /// generation needs are unloaded first, one after the other. To be called on the device's thread.
    pub(crate) fn free_for(&self, own: &'static str, wanted: u64) -> u64 {
        for tenant in self.settled() {
            if self.0.budget.free_now() >= wanted {
                break;
            }
            if tenant.name() != own && !tenant.serves() {
                self.relieve(tenant.as_ref(), &format!("{own} needs its memory"));
            }
        }
        self.0.budget.free_now()
    }

    /// Hands a task to the thread.
    ///
    /// The task sees the current tracing span. Dropping what comes back cancels it: a task that waits is skipped, one
    /// that runs finds out through its [`CancelToken`]. A panic in it ends it with [`ServiceError::Internal`].
    ///
    /// Errors: [`ServiceError::ResourceExhausted`] at once when the queue is full; as [`works`](Self::works).
    pub fn try_submit<R, F>(&self, work: F) -> Result<Pending<R>, ServiceError>
    where
        R: Send + 'static,
        F: FnOnce(&CancelToken) -> Result<R, ServiceError> + Send + 'static,
    {
        self.try_submit_over(&[], work)
    }

    /// As [`try_submit`](Self::try_submit), for a task that computes on other devices too: nobody else does meanwhile.
    ///
    /// Errors: as there, of any of the devices.
    pub fn try_submit_over<R, F>(&self, others: &[Self], work: F) -> Result<Pending<R>, ServiceError>
    where
        R: Send + 'static,
        F: FnOnce(&CancelToken) -> Result<R, ServiceError> + Send + 'static,
    {
        self.works()?;
        others.iter().try_for_each(Self::works)?;
        let (answer, result) = oneshot::channel();
        let token = CancellationToken::new();
        let cancel = CancelToken(token.clone());
        let span = tracing::Span::current();
        // A task that holds the worker itself would keep its own thread alive.
        let shared = Arc::downgrade(&self.0);
        let job = move || {
            if let Some(shared) = shared.upgrade() {
                shared.waiting.fetch_sub(1, Relaxed);
                shared.budget.advance();
            }
            let _entered = span.enter();
            let begin = Instant::now();
            let outcome = cancel.check().and_then(|()| {
                catch_unwind(AssertUnwindSafe(|| work(&cancel))).unwrap_or_else(|panic| {
                    Err(ServiceError::internal(format!("a task panicked: {}", panic_text(panic.as_ref()))))
                })
            });
            if let Some(shared) = shared.upgrade() {
                shared.budget.advance();
                let now = begin.elapsed().as_millis().min(u128::from(u64::MAX)) as u64;
                let before = shared.pace_ms.load(Relaxed);
                shared.pace_ms.store(before - before / 4 + now / 4, Relaxed);
            }
            // Nobody may wait any more.
            let _ = answer.send((outcome, begin.elapsed()));
        };
        // Counted before it is sent, as the thread may take it at once.
        self.0.waiting.fetch_add(1, Relaxed);
        match self.0.jobs.try_send(Job { turns: self.turns(others), run: Box::new(job) }) {
            Ok(()) => Ok(Pending { result, _cancel: token.drop_guard() }),
            Err(reason) => {
                self.0.waiting.fetch_sub(1, Relaxed);
                Err(match reason {
                    TrySendError::Full(_) => ServiceError::ResourceExhausted {
                        message: format!("the device's queue is full: {} requests wait", self.0.capacity),
                        retry_after: Some(self.retry_after()),
                    },
                    TrySendError::Disconnected(_) => ServiceError::unavailable("the device's thread has ended"),
                })
            }
        }
    }

    /// The turns of some devices, each once, in an order that all tasks keep to: so none waits for one that waits for it.
    fn turns(&self, others: &[Self]) -> Vec<Turn> {
        let mut turns: Vec<Turn> = std::iter::once(self).chain(others).map(|worker| worker.0.turn.clone()).collect();
        turns.sort_by_key(Arc::as_ptr);
        turns.dedup_by(|a, b| Arc::ptr_eq(a, b));
        turns
    }

    fn retry_after(&self) -> Duration {
        Duration::from_millis(self.0.pace_ms.load(Relaxed)).clamp(Duration::from_millis(100), Duration::from_secs(60))
    }

    /// Tasks that wait now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.load(Relaxed).min(self.0.capacity)
    }

    /// Tasks that may wait.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// The result of a task, to be awaited. Dropping it cancels the task.
pub struct Pending<R> {
    result: oneshot::Receiver<(Result<R, ServiceError>, Duration)>,
    _cancel: DropGuard,
}

impl<R> Pending<R> {
    /// The result, and how long the device was at it: without the wait for its turn.
    ///
    /// Errors: as the task.
    pub async fn timed(mut self) -> Result<(R, Duration), ServiceError> {
        let (result, took) = (&mut self.result).await.map_err(|_| thread_ended())?;
        Ok((result?, took))
    }
}

fn thread_ended() -> ServiceError {
    ServiceError::unavailable("the device's thread has ended")
}

impl<R> Future for Pending<R> {
    type Output = Result<R, ServiceError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.result)
            .poll(context)
            .map(|answer| answer.map_err(|_| thread_ended()).and_then(|(result, _)| result))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Keeps the worker's thread busy until the sender is dropped; returns when it is.
    async fn block(worker: &DeviceWorker) -> (mpsc::Sender<()>, Pending<()>) {
        let (release, held) = mpsc::channel::<()>();
        let (started, running) = oneshot::channel();
        let pending = worker
            .try_submit(move |_| {
                started.send(()).unwrap();
                let _ = held.recv();
                Ok(())
            })
            .unwrap();
        running.await.unwrap();
        (release, pending)
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_with_a_delay_and_takes_again_later() {
        let worker = DeviceWorker::spawn(&DeviceConfig::cpu(), 2).unwrap();
        let (release, running) = block(&worker).await;
        let waiting: Vec<_> = (0..2).map(|i| worker.try_submit(move |_| Ok(i)).unwrap()).collect();
        assert_eq!((worker.waiting(), worker.capacity()), (2, 2));
        let Err(error) = worker.try_submit(|_| Ok(())) else { panic!("there was room") };
        assert_eq!(error.code_name(), "RESOURCE_EXHAUSTED");
        assert!(error.is_retryable() && error.retry_after().is_some(), "{error:?}");
        drop(release);
        running.await.unwrap();
        for (i, pending) in waiting.into_iter().enumerate() {
            assert_eq!(pending.await, Ok(i));
        }
        assert_eq!(worker.try_submit(|_| Ok(7)).unwrap().await, Ok(7));
        assert_eq!(worker.waiting(), 0);
    }

    #[tokio::test]
    async fn a_tasks_time_is_that_on_the_device_without_the_wait_for_its_turn() {
        let worker = DeviceWorker::spawn(&DeviceConfig::cpu(), 2).unwrap();
        let (release, running) = block(&worker).await;
        let waits = Instant::now();
        let pending = worker.try_submit(|_| Ok(())).unwrap();
        let wait = Duration::from_millis(50);
        while waits.elapsed() < wait {
            thread::yield_now();
        }
        drop(release);
        let ((), took) = pending.timed().await.unwrap();
        assert!(took + wait <= waits.elapsed(), "{took:?}");
        let ((), held) = running.timed().await.unwrap();
        assert!(held >= wait, "{held:?}");
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_and_the_thread_lives_on() {
        let worker = DeviceWorker::spawn(&DeviceConfig::cpu(), 2).unwrap();
        let error = worker.try_submit(|_| -> Result<(), _> { panic!("boom {}", 3) }).unwrap().await.unwrap_err();
        assert_eq!(error.code_name(), "INTERNAL");
        assert!(error.to_string().contains("boom 3"), "{error}");
        assert_eq!(worker.try_submit(|_| Ok(1)).unwrap().await, Ok(1));
    }

    #[tokio::test]
    async fn a_running_task_learns_that_its_caller_is_gone() {
        let worker = DeviceWorker::spawn(&DeviceConfig::cpu(), 2).unwrap();
        let (began, begun) = oneshot::channel();
        let (told, tell) = oneshot::channel();
        let pending = worker
            .try_submit(move |cancel| {
                began.send(()).unwrap();
                while cancel.check().is_ok() {
                    thread::yield_now();
                }
                told.send(()).unwrap();
                cancel.check()
            })
            .unwrap();
        begun.await.unwrap();
        drop(pending);
        tokio::time::timeout(Duration::from_secs(20), tell).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_waiting_task_whose_caller_is_gone_never_runs() {
        let worker = DeviceWorker::spawn(&DeviceConfig::cpu(), 2).unwrap();
        let (release, running) = block(&worker).await;
        let (ran, witness) = mpsc::channel();
        let task = move |_: &CancelToken| {
            ran.send(()).unwrap();
            Ok(())
        };
        drop(worker.try_submit(task).unwrap());
        drop(release);
        running.await.unwrap();
        worker.try_submit(|_| Ok(())).unwrap().await.unwrap();
        assert!(witness.try_recv().is_err());
    }
}
