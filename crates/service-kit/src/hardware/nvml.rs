//! CUDA devices, as NVIDIA's management library reports them: cards, or the slices that they are cut into.

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
    /// The same in every container and after a restart: of the card, or of the slice.
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

    /// Memory of a card, or of a slice of one, that nobody holds; nothing where it does not answer.
    #[cfg(feature = "cuda")]
    pub(crate) fn free_bytes(&self, uuid: &str) -> Option<u64> {
        Some(self.0.device_by_uuid(uuid).ok()?.memory_info().ok()?.free)
    }

    fn board(&self, index: u32) -> Result<Board, NvmlError> {
        /// As the library has it.
        const ENABLED: u32 = 1;
        let device = self.0.device_by_index(index)?;
        let whole = card(&device, None)?;
        if device.mig_mode().map_or(0, |mode| mode.current) != ENABLED {
            return Ok(Board::Whole(whole));
        }
        // Places for slices that are empty have no device.
        let slices = (0..device.mig_device_count()?).filter_map(|slice| device.mig_device_by_index(slice).ok());
        Ok(Board::Cut(slices.map(|slice| card(&slice, Some(&whole))).collect::<Result<_, _>>()?))
    }
}

/// A card in the machine: as a whole, or the slices that it is cut into (MIG), which are devices of their own.
#[derive(Debug, Clone)]
enum Board {
    Whole(Card),
    Cut(Vec<Card>),
}

/// The devices of some cards, numbered as CUDA numbers them.
///
/// - `visible`: the ends of the UUIDs of the devices that CUDA shows to this process, in its order, which a container or
///   the environment may limit; nothing where CUDA was not asked
fn numbered(boards: Vec<Board>, visible: Option<&[String]>) -> Vec<Card> {
    let devices: Vec<Card> = boards
        .into_iter()
        .flat_map(|board| match board {
            Board::Whole(card) => vec![card],
            Board::Cut(slices) => slices,
        })
        .collect();
    let chosen: Vec<Card> = match visible {
        None => devices,
        Some(ids) => {
            ids.iter().filter_map(|id| devices.iter().find(|d| d.uuid.ends_with(id.as_str())).cloned()).collect()
        }
    };
    (0..).zip(chosen).map(|(index, card)| Card { index, ..card }).collect()
}

/// The ends of the UUIDs of the devices that CUDA shows to this process, in its order; nothing where it does not answer.
#[cfg(feature = "cuda")]
fn visible() -> Option<Vec<String>> {
    use candle_core::cuda_backend::cudarc::driver::result::{device, init};
    init().ok()?;
    let one = |index| {
        let hex: Vec<String> =
            device::get_uuid(device::get(index).ok()?).ok()?.bytes.map(|b| format!("{:02x}", b as u8)).into();
        let part = |range: std::ops::Range<usize>| hex.get(range).unwrap_or_default().concat();
        Some([0..4, 4..6, 6..8, 8..10, 10..16].map(part).join("-"))
    };
    (0..device::get_count().ok()?).map(one).collect()
}

#[cfg(not(feature = "cuda"))]
fn visible() -> Option<Vec<String>> {
    None
}

/// What the library says of a card, or of a slice of `whole`, which shares its heat and its faults.
fn card(device: &nvml_wrapper::Device<'_>, whole: Option<&Card>) -> Result<Card, NvmlError> {
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
        index: 0,
        name: device.name()?,
        uuid: device.uuid()?,
        total_bytes: memory.total,
        free_bytes: memory.free,
        used_by_others_bytes: memory.used.saturating_sub(ours),
        temperature_celsius: match whole {
            Some(whole) => whole.temperature_celsius,
            None => device.temperature(TemperatureSensor::Gpu).ok(),
        },
        throttled: match whole {
            Some(whole) => whole.throttled.clone(),
            None => device.current_throttle_reasons().map(reasons).unwrap_or_default(),
        },
        ecc_errors: match whole {
            Some(whole) => whole.ecc_errors,
            None => device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
        },
    })
}

impl Driver for Nvml {
    fn version(&self) -> Option<String> {
        self.0.sys_driver_version().ok()
    }

    fn cards(&self) -> Result<Vec<Card>, String> {
        let count = self.0.device_count().map_err(|e| format!("the driver does not count its devices: {e}"))?;
        let board = |index| self.board(index).map_err(|e| format!("card {index} does not answer: {e}"));
        Ok(numbered((0..count).map(board).collect::<Result<_, _>>()?, visible().as_deref()))
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
    fn that_there_is_no_driver_is_said_once() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let file = std::sync::Arc::new(log.reopen().unwrap());
        let writer = tracing_subscriber::fmt().with_writer(file).finish();
        let found = tracing::subscriber::with_default(writer, || [(); 3].map(|()| Nvml::load().is_some()));
        let said = std::fs::read_to_string(log.path()).unwrap();
        let times = said.matches("no CUDA devices: no driver answers").count();
        // Where there is a driver, there is nothing to say.
        assert_eq!(times, usize::from(!found[0]), "{found:?}: {said}");
    }

    fn named(uuid: &str, gib: u64) -> Card {
        Card {
            index: 0,
            name: "Card X".into(),
            uuid: uuid.into(),
            total_bytes: gib << 30,
            free_bytes: gib << 30,
            used_by_others_bytes: 0,
            temperature_celsius: Some(50),
            throttled: Vec::new(),
            ecc_errors: None,
        }
    }

    #[test]
    fn slices_of_a_card_are_devices_with_their_own_memory_and_names_instead_of_the_card() {
        let boards = || {
            let slices = vec![named("MIG-a-1", 10), named("MIG-a-2", 20)];
            vec![Board::Whole(named("GPU-b-0", 80)), Board::Cut(slices), Board::Cut(Vec::new())]
        };
        let seen = |visible: Option<&[&str]>| -> Vec<(u32, String, u64)> {
            let visible: Option<Vec<String>> = visible.map(|ids| ids.iter().map(|id| (*id).to_owned()).collect());
            let cards = numbered(boards(), visible.as_deref());
            cards.into_iter().map(|card| (card.index, card.uuid, card.total_bytes >> 30)).collect()
        };
        let is = |index: u32, uuid: &str, gib: u64| (index, uuid.to_owned(), gib);
        assert_eq!(seen(None), [is(0, "GPU-b-0", 80), is(1, "MIG-a-1", 10), is(2, "MIG-a-2", 20)]);
        // A container is shown one slice, and the environment may turn the order round.
        assert_eq!(seen(Some(&["a-2"])), [is(0, "MIG-a-2", 20)]);
        assert_eq!(seen(Some(&["a-1", "b-0"])), [is(0, "MIG-a-1", 10), is(1, "GPU-b-0", 80)]);
        assert!(seen(Some(&[])).is_empty());
    }

    #[test]
    fn a_card_that_sleeps_is_not_slowed_down_and_a_hot_one_is() {
        assert!(reasons(ThrottleReasons::GPU_IDLE).is_empty());
        let hot = ThrottleReasons::SW_THERMAL_SLOWDOWN | ThrottleReasons::SW_POWER_CAP;
        assert_eq!(reasons(hot), ["power limit", "temperature"]);
    }
}
