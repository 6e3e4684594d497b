//! The devices of this machine, and the budgets that stages compute within.

mod fault;
mod host;
mod nvml;
#[cfg(feature = "cuda")]
pub(crate) mod pool;

use std::{fmt, str::FromStr};

pub use host::{HostMemory, host_memory};
pub use nvml::{Card, Driver, Nvml, cards};

pub(crate) use fault::CardFault;

use crate::config::parse_bytes;

/// Whether this build computes on CUDA devices.
pub const HAS_CUDA: bool = cfg!(feature = "cuda");

/// A device as the command line names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// This machine's processor; with a budget, it behaves like a card of that many bytes.
    Cpu {
        /// Most bytes of the process's heap; nothing is what the machine or the container has.
        budget_bytes: Option<u64>,
    },
    /// A CUDA device, counted from 0.
    Cuda {
        /// Its number.
        index: u32,
    },
}

impl DeviceName {
    /// The card's number; nothing for the processor.
    #[must_use]
    pub fn card(self) -> Option<u32> {
        match self {
            Self::Cpu { .. } => None,
            Self::Cuda { index } => Some(index),
        }
    }
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not the name of a device.
    #[error("not a device; accepted are cpu, cpu:BYTES as in cpu:4GiB, and cuda:N where the build has CUDA")]
    Unknown,
    /// The budget is no number of bytes.
    #[error("the budget is {reason}")]
    Budget {
        /// What is wrong with it.
        reason: String,
    },
    /// A CUDA device, which this build cannot compute on.
    #[error("this build has no CUDA, so it cannot compute on cuda:{index}; accepted are cpu and cpu:BYTES")]
    NoCuda {
        /// The device's number.
        index: u32,
    },
    /// A CUDA device that this machine does not have.
    #[error("no CUDA device cuda:{index}; this machine has {count} of them")]
    NoCard {
        /// The device's number.
        index: u32,
        /// Devices that the driver knows; 0 where there is no driver.
        count: usize,
    },
}

impl FromStr for DeviceName {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu { budget_bytes: None }),
            Some(("cpu", budget)) => match parse_bytes(budget) {
                Ok(bytes) => Ok(Self::Cpu { budget_bytes: Some(bytes) }),
                Err(reason) => Err(DeviceError::Budget { reason }),
            },
            Some(("cuda", index)) => index.parse().map(|index| Self::Cuda { index }).map_err(|_| DeviceError::Unknown),
            _ => Err(DeviceError::Unknown),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu { budget_bytes: None } => f.write_str("cpu"),
            Self::Cpu { budget_bytes: Some(bytes) } => write!(f, "cpu:{bytes}"),
            Self::Cuda { index } => write!(f, "cuda:{index}"),
        }
    }
}

/// The device that stages compute on, and when it counts as nearly full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// As the command line named it.
    pub name: DeviceName,
    /// Which of the process's devices it is, from 0, where there are several.
    pub number: Option<usize>,
    /// Most bytes that may be held on it.
    pub budget_bytes: u64,
    /// Percent of the budget above which memory is freed and no new work is taken; ten less ends that.
    pub pressure_percent: u8,
}

/// Percent of a device's budget above which it counts as nearly full, unless told otherwise.
pub const PRESSURE_PERCENT: u8 = 85;
/// Percentages from which on a device may count as nearly full; the last one is never.
pub const PRESSURE_PERCENTS: std::ops::RangeInclusive<u8> = 20..=100;

impl DeviceConfig {
    /// A device of this build, with its budget.
    ///
    /// Errors: the build cannot compute on it, or it is not there.
    pub fn new(name: DeviceName, pressure_percent: u8) -> Result<Self, DeviceError> {
        match name {
            DeviceName::Cpu { budget_bytes } => {
                let budget_bytes = budget_bytes.unwrap_or_else(|| host_memory().total_bytes);
                Ok(Self { name, number: None, budget_bytes, pressure_percent })
            }
            DeviceName::Cuda { index } if !HAS_CUDA => Err(DeviceError::NoCuda { index }),
            DeviceName::Cuda { index } => {
                let cards = cards(Nvml::load().as_ref().map(|driver| driver as &dyn Driver));
                let card = cards.iter().find(|card| card.index == index);
                let budget_bytes = card.ok_or(DeviceError::NoCard { index, count: cards.len() })?.total_bytes;
                Ok(Self { name, number: None, budget_bytes, pressure_percent })
            }
        }
    }

    /// The processor, with all memory that the machine or the container has.
    #[must_use]
    pub fn cpu() -> Self {
        let budget_bytes = host_memory().total_bytes;
        let name = DeviceName::Cpu { budget_bytes: None };
        Self { name, number: None, budget_bytes, pressure_percent: PRESSURE_PERCENT }
    }

    /// What tells it from the process's other devices: its name, or `cpu.1` where the second of several is the processor.
    #[must_use]
    pub fn label(&self) -> String {
        match (self.name, self.number) {
            (DeviceName::Cpu { .. }, Some(number)) => format!("cpu.{number}"),
            (name, _) => name.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_cpu_with_or_without_a_budget_or_cuda_with_a_number() {
        assert_eq!("cpu".parse(), Ok(DeviceName::Cpu { budget_bytes: None }));
        assert_eq!("cpu:4GiB".parse(), Ok(DeviceName::Cpu { budget_bytes: Some(4 << 30) }));
        assert_eq!("cuda:1".parse(), Ok(DeviceName::Cuda { index: 1 }));
        assert_eq!(["cpu", "cuda:1"].map(|name| name.parse::<DeviceName>().unwrap().card()), [None, Some(1)]);
        for wrong in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:4294967296"] {
            assert_eq!(wrong.parse::<DeviceName>(), Err(DeviceError::Unknown), "{wrong}");
        }
        for wrong in ["cpu:", "cpu:0", "cpu:lots", "cpu:4 GB", "cpu:99999999999GiB"] {
            let error = wrong.parse::<DeviceName>().unwrap_err();
            assert!(matches!(&error, DeviceError::Budget { .. }), "{error:?}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_refuses_a_card_with_a_sentence() {
        let error = DeviceConfig::new(DeviceName::Cuda { index: 2 }, 85).unwrap_err();
        assert_eq!(error, DeviceError::NoCuda { index: 2 });
        assert!(error.to_string().contains("no CUDA") && error.to_string().contains("cuda:2"), "{error}");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_card_that_is_not_there_is_refused_with_how_many_there_are() {
        let error = DeviceConfig::new(DeviceName::Cuda { index: 99 }, 85).unwrap_err();
        assert!(matches!(error, DeviceError::NoCard { index: 99, .. }), "{error:?}");
    }

    #[test]
    fn a_budget_is_the_devices_and_without_one_the_machines() {
        let config = |text: &str| DeviceConfig::new(text.parse().unwrap(), 85).unwrap();
        assert_eq!(config("cpu:64MiB").budget_bytes, 64 << 20);
        assert_eq!(config("cpu").budget_bytes, host_memory().total_bytes);
        assert_eq!(config("cpu"), DeviceConfig::cpu());
    }
}
