//! The card that answers, and how much it could compute.

use candle_core::Device;
use serde::Serialize;
use service_kit::hardware::{Driver, Nvml, cards};

/// The card that answered.
#[derive(Debug, Clone, Serialize)]
pub struct Answering {
    /// Its name.
    pub name: String,
    /// The driver's version.
    pub driver: Option<String>,
    /// All of its memory.
    pub total_bytes: u64,
    /// Floating-point operations a second of its tensor cores in bf16 at its highest clock, in 10^12; nothing where its
    /// generation is not known here.
    pub peak_tera_operations: Option<f64>,
}

impl Answering {
    pub(super) fn on(device: &Device) -> Self {
        let driver = Nvml::load();
        let driver = driver.as_ref().map(|driver| driver as &dyn Driver);
        let first = cards(driver).into_iter().next();
        Self {
            name: first.as_ref().map_or_else(|| "unknown".to_owned(), |card| card.name.clone()),
            driver: driver.and_then(Driver::version),
            total_bytes: first.map_or(0, |card| card.total_bytes),
            peak_tera_operations: Chip::of(device).and_then(Chip::peak),
        }
    }
}

/// What a card's peak is the product of.
#[derive(Debug, Clone, Copy)]
struct Chip {
    /// Compute capability, as in `[9, 0]`.
    capability: [i32; 2],
    multiprocessors: i32,
    kilohertz: i32,
}

impl Chip {
    #[cfg(feature = "cuda")]
    fn of(device: &Device) -> Option<Self> {
        use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
        let Device::Cuda(device) = device else { return None };
        let stream = device.cuda_stream();
        let get = |attribute| stream.context().attribute(attribute).ok();
        Some(Self {
            capability: [
                get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ],
            multiprocessors: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            kilohertz: get(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        })
    }

    /// No card answers a build without CUDA.
    #[cfg(not(feature = "cuda"))]
    fn of(_: &Device) -> Option<Self> {
        None
    }

    /// In 10^12 a second.
    fn peak(self) -> Option<f64> {
        // Operations in bf16, summed in f32, of one multiprocessor in one cycle.
        let each = match self.capability {
            [8, 0] => 2048.0,
            [8, 6] => 512.0,
            [8, 9] => 1024.0,
            [9, 0] => 4096.0,
            [10, _] => 8192.0,
            _ => return None,
        };
        (self.multiprocessors > 0 && self.kilohertz > 0)
            .then(|| each * f64::from(self.multiprocessors) * f64::from(self.kilohertz) * 1e3 / 1e12)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the cards' data sheets say, at the clock that they say it for.
    #[test]
    fn the_peak_is_that_of_the_data_sheets() {
        for (capability, multiprocessors, kilohertz, told) in [
            ([8, 0], 108, 1_410_000, 312.0),   // A100
            ([8, 6], 82, 1_695_000, 71.0),     // RTX 3090
            ([8, 9], 142, 2_490_000, 362.0),   // L40S
            ([9, 0], 132, 1_830_000, 989.0),   // H100 SXM
            ([10, 0], 148, 1_860_000, 2250.0), // B200
        ] {
            let peak = Chip { capability, multiprocessors, kilohertz }.peak().unwrap();
            assert!((peak / told - 1.0).abs() < 0.01, "{capability:?}: {peak}, the data sheet says {told}");
        }
        let unknown = Chip { capability: [99, 0], multiprocessors: 1, kilohertz: 1 };
        assert!(unknown.peak().is_none());
        assert!(Chip { capability: [9, 0], multiprocessors: 0, ..unknown }.peak().is_none());
    }
}
