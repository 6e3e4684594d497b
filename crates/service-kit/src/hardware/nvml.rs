//! CUDA devices, as NVIDIA's management library reports them.

use std::{ffi::OsStr, sync::Once};

use nvml_wrapper::{
    bitmasks::device::ThrottleReasons,
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    enums::device::UsedGpuMemory,
    error::NvmlError,
};

/// The library's name where only the driver is installed; the name without a number comes with its headers.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// One CUDA device now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its number in `cuda:N`.
    pub index: u32,
    /// The product's name.
    pub name: String,
    /// The same in every container and after a restart.
    pub uuid: String,
    /// All of its memory.
    pub total_bytes: u64,
    /// Memory that nobody holds.
    pub free_bytes: u64,
    /// Memory that others than this process hold.
    pub used_by_others_bytes: u64,
    /// Of the chip, where it says so.
    pub temperature_celsius: Option<u32>,
    /// Why it runs slower than it could; empty where it does not.
    pub throttled: Vec<&'static str>,
    /// Memory errors since the driver was loaded that could not be mended; nothing where the card does not count.
    pub ecc_errors: Option<u64>,
}

/// Whoever knows the cards: the driver, or a test.
pub trait Driver {
    /// The driver's version, where it says so.
    fn version(&self) -> Option<String>;

    /// All cards, by number.
    ///
    /// Errors: a sentence about the card that does not answer.
    fn cards(&self) -> Result<Vec<Card>, String>;
}

/// NVIDIA's management library, loaded when it is asked for.
pub struct Nvml(nvml_wrapper::Nvml);

impl Nvml {
    /// Loads the library. Without a driver there are no cards; that is no fault and is logged once.
    #[must_use]
    pub fn load() -> Option<Self> {
        static SAID: Once = Once::new();
        let plain = nvml_wrapper::Nvml::init();
        let loaded = plain.or_else(|_| nvml_wrapper::Nvml::builder().lib_path(OsStr::new(LIBRARY)).init());
        loaded
            .map(Self)
            .inspect_err(|reason| SAID.call_once(|| tracing::info!("no CUDA devices: no driver answers ({reason})")))
            .ok()
    }

    /// Memory of a card that nobody holds; nothing where it does not answer.
    #[cfg(feature = "cuda")]
    pub(crate) fn free_bytes(&self, index: u32) -> Option<u64> {
        Some(self.0.device_by_index(index).ok()?.memory_info().ok()?.free)
    }

    fn card(&self, index: u32) -> Result<Card, NvmlError> {
        let device = self.0.device_by_index(index)?;
        let memory = device.memory_info()?;
        let own = std::process::id();
        let ours: u64 = device
            .running_compute_processes()
            .unwrap_or_default()
            .iter()
            .filter(|process| process.pid == own)
            .map(|process| match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => bytes,
                UsedGpuMemory::Unavailable => 0,
            })
            .sum();
        Ok(Card {
            index,
            name: device.name()?,
            uuid: device.uuid()?,
            total_bytes: memory.total,
            free_bytes: memory.free,
            used_by_others_bytes: memory.used.saturating_sub(ours),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            throttled: device.current_throttle_reasons().map(reasons).unwrap_or_default(),
            ecc_errors: device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
        })
    }
}

impl Driver for Nvml {
    fn version(&self) -> Option<String> {
        self.0.sys_driver_version().ok()
    }

    fn cards(&self) -> Result<Vec<Card>, String> {
        let count = self.0.device_count().map_err(|e| format!("the driver does not count its devices: {e}"))?;
        (0..count).map(|index| self.card(index).map_err(|e| format!("cuda:{index} does not answer: {e}"))).collect()
    }
}

/// What slows a card down; an idle card that sleeps is not slowed down.
fn reasons(found: ThrottleReasons) -> Vec<&'static str> {
    [
        (ThrottleReasons::SW_POWER_CAP, "power limit"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "temperature"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "temperature, by the hardware"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power supply"),
        (ThrottleReasons::SYNC_BOOST, "another card of its group"),
    ]
    .into_iter()
    .filter_map(|(reason, name)| found.contains(reason).then_some(name))
    .collect()
}

/// The cards that a driver knows, where there is one. A card that does not answer is logged, and then none is listed.
#[must_use]
pub fn cards(driver: Option<&dyn Driver>) -> Vec<Card> {
    let Some(driver) = driver else { return Vec::new() };
    driver.cards().unwrap_or_else(|reason| {
        tracing::warn!("no CUDA devices: {reason}");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;

    impl Driver for Broken {
        fn version(&self) -> Option<String> {
            None
        }

        fn cards(&self) -> Result<Vec<Card>, String> {
            Err("cuda:0 does not answer: it fell off the bus".to_owned())
        }
    }

    #[test]
    fn without_a_driver_or_with_a_broken_one_there_are_no_cards() {
        assert_eq!(cards(None), []);
        assert_eq!(cards(Some(&Broken)), []);
    }

    #[test]
    fn a_card_that_sleeps_is_not_slowed_down_and_a_hot_one_is() {
        assert!(reasons(ThrottleReasons::GPU_IDLE).is_empty());
        let hot = ThrottleReasons::SW_THERMAL_SLOWDOWN | ThrottleReasons::SW_POWER_CAP;
        assert_eq!(reasons(hot), ["power limit", "temperature"]);
    }
}
