//! How fast a card is: measured once, with the networks' own parts, and kept.

use std::{
    path::PathBuf,
    sync::LazyLock,
    time::{Duration, Instant},
};

use model::speed::{self, Load};
use planner::cost::work::Rates;
use service_kit::hardware::Card;

use super::rates::{BUILD, file_of, keep, read};

/// Which measures they are; another number wherever operations or their measures change.
const MEASURES: u32 = 1;

/// The rates of a card: those that were kept, or measured now; assumed ones where it cannot be measured.
pub(super) fn rates(card: &Card, driver: Option<&str>) -> Rates {
    kept(card, driver).or_else(|| measured_now(card, driver)).unwrap_or_else(|| {
        tracing::warn!("the speed of cuda:{} could not be measured; predicted seconds are another's", card.index);
        Rates::CUDA
    })
}

/// The rates that were kept.
pub(crate) fn kept(card: &Card, driver: Option<&str>) -> Option<Rates> {
    read(&kept_in(card, driver)?)
}

/// Measures the rates, which takes a few seconds, and keeps them instead of those that were; nothing where that fails, as
/// in a build without CUDA.
pub(crate) fn measured_now(card: &Card, driver: Option<&str>) -> Option<Rates> {
    let rates = measure(card.index)
        .inspect_err(|reason| tracing::warn!("cuda:{} was not measured: {reason}", card.index))
        .ok()
        .filter(Rates::usable)?;
    if let Some(file) = kept_in(card, driver) {
        keep(&file, &rates);
    }
    Some(rates)
}

/// Where the rates of this card, this driver and this build are kept, in the user's folder for such things.
fn kept_in(card: &Card, driver: Option<&str>) -> Option<PathBuf> {
    file_of("cuda", &format!("{}|{}|{BUILD}|{MEASURES}", card.uuid, driver.unwrap_or_default()))
}

fn measure(index: u32) -> Result<Rates, String> {
    let device = model::device(Some(index)).map_err(|e| e.to_string())?;
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    speed::rates(&device, &Load::CARD, folder.path(), clock).map_err(|e| e.to_string())
}

fn clock() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(uuid: &str) -> Card {
        Card {
            // No machine has so many.
            index: 1 << 20,
            name: "Card X".into(),
            uuid: uuid.into(),
            total_bytes: 4 << 30,
            free_bytes: 1 << 30,
            used_by_others_bytes: 0,
            temperature_celsius: None,
            throttled: Vec::new(),
            ecc_errors: None,
        }
    }

    #[test]
    fn rates_are_kept_for_the_card_and_its_driver() {
        let file = |uuid: &str, driver| kept_in(&card(uuid), driver).unwrap();
        let own = file("GPU-1", Some("580.1"));
        assert_eq!(own, file("GPU-1", Some("580.1")));
        assert!(
            own != file("GPU-2", Some("580.1")) && own != file("GPU-1", Some("580.2")) && own != file("GPU-1", None)
        );
    }

    #[test]
    fn a_card_that_cannot_be_measured_has_assumed_rates_that_say_so() {
        let rates = rates(&card("a card of a test that nobody measured"), Some("580.1"));
        assert_eq!(rates, Rates::CUDA);
        assert!(!rates.measured);
    }
}
