//! What a card's faults mean to a stage, told in the driver's words by a model that has no card.

use std::{path::Path, path::PathBuf, sync::Arc};

use proto::v1::Stage;
use service_kit::{
    ServiceError,
    config::{Compute, StageConfig},
    device::DeviceWorker,
    hardware::DeviceName,
    memory::Watch,
    stage::{StageHost, StageModel},
};
use tokio_util::sync::CancellationToken;

struct Model;

impl StageModel for Model {
    const STAGE: Stage = Stage::VaeDecode;
    const NAME: &'static str = "vae-decode";
    /// What opening it fails with.
    type Options = Option<&'static str>;

    fn open(_: &Path, _: (DeviceName, Compute), fails: &Self::Options) -> Result<Self, ServiceError> {
        fails.map_or(Ok(Self), |fails| Err(ServiceError::failed_precondition(fails)))
    }

    fn watched<R>(_: Watch, work: impl FnOnce() -> R) -> R {
        work()
    }

    fn files(_: &Path, _: &Self::Options) -> Vec<PathBuf> {
        Vec::new()
    }
}

const REFUSED: &str = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
const BROKEN: &str = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")";

fn start(fails: Option<&'static str>) -> (Arc<StageHost<Model>>, CancellationToken) {
    let (config, shutdown) = (StageConfig::local("models"), CancellationToken::new());
    let device = DeviceWorker::spawn(&config.device, 2).unwrap();
    (StageHost::new(&config, fails, device, shutdown.clone()), shutdown)
}

fn is_memory(error: &ServiceError) -> bool {
    matches!(error, ServiceError::DeviceMemory { stage, needed_bytes, free_bytes, .. }
        if stage == "vae-decode" && needed_bytes > free_bytes)
}

#[tokio::test]
async fn an_allocation_that_a_card_refuses_is_out_of_memory_and_the_worker_goes_on() {
    let (host, shutdown) = start(None);
    let error = host.submit(|_, _| Err::<(), _>(ServiceError::internal(REFUSED))).unwrap().await.unwrap_err();
    assert!(is_memory(&error), "{error:?}");
    assert_eq!(host.submit(|_, _| Ok(2)).unwrap().await, Ok(2));
    assert_eq!((host.ended(), shutdown.is_cancelled()), (Ok(()), false));
}

#[tokio::test]
async fn weights_that_a_card_has_no_room_for_are_out_of_memory() {
    let (host, _) = start(Some(REFUSED));
    let error = host.submit(|_, _| Ok(())).unwrap().await.unwrap_err();
    assert!(is_memory(&error), "{error:?}");
}

#[tokio::test]
async fn a_card_that_broke_takes_no_more_work_and_ends_its_server() {
    let (host, shutdown) = start(None);
    let error = host.submit(|_, _| Err::<(), _>(ServiceError::internal(BROKEN))).unwrap().await.unwrap_err();
    assert_eq!(error.code_name(), "UNAVAILABLE");
    assert!(error.to_string().contains("cpu is lost") && error.to_string().contains("ILLEGAL_ADDRESS"), "{error}");
    let Err(error) = host.submit(|_, _| Ok(())) else { panic!("it took work") };
    assert_eq!(error.code_name(), "UNAVAILABLE");
    assert!(shutdown.is_cancelled() && host.ended().is_err());
}
