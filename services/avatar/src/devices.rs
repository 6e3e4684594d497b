//! `avatar devices`: what this machine can compute on.

use std::fmt::Write as _;

use planner::cost::work::Rates;
use serde_json::{Value, json};
use service_kit::hardware::{Card, Driver, HAS_CUDA, HostMemory, Nvml, cards, host_memory};

use crate::{
    config::DevicesFlags,
    plan::{card, rates},
    progress::{print_line, print_text},
};

/// Prints the devices on standard output.
pub fn show(flags: &DevicesFlags) {
    let driver = Nvml::load();
    let driver: Option<&dyn Driver> = driver.as_ref().map(|driver| driver as &dyn Driver);
    let (host, cards) = (host_memory(), cards(driver));
    let version = driver.and_then(Driver::version);
    let rates = if flags.measure { rates::measured_now() } else { rates::kept() };
    let of_card = |card: Card| {
        let measured = flags.measure && HAS_CUDA;
        let rates = if measured { card::measured_now } else { card::kept }(&card, version.as_deref());
        (card, rates)
    };
    let cards: Vec<(Card, Option<Rates>)> = cards.into_iter().map(of_card).collect();
    if flags.json {
        print_line(&as_json(&host, &cards, version.as_deref(), rates.as_ref()));
    } else {
        print_text(as_text(&host, &cards, version.as_deref(), rates.as_ref()).trim_end());
    }
}

fn as_json(host: &HostMemory, cards: &[(Card, Option<Rates>)], driver: Option<&str>, rates: Option<&Rates>) -> Value {
    let cpu = json!({
        "device": "cpu",
        "usable": true,
        "total_bytes": host.total_bytes,
        "free_bytes": host.free_bytes,
        "limit_bytes": host.limit_bytes,
        "rates": rates,
    });
    let cards = cards.iter().map(|(card, rates)| {
        json!({
            "device": format!("cuda:{}", card.index),
            "usable": HAS_CUDA,
            "name": card.name,
            "uuid": card.uuid,
            "total_bytes": card.total_bytes,
            "free_bytes": card.free_bytes,
            "used_by_others_bytes": card.used_by_others_bytes,
            "temperature_celsius": card.temperature_celsius,
            "throttled": card.throttled,
            "ecc_errors": card.ecc_errors,
            "rates": rates,
        })
    });
    json!({ "devices": std::iter::once(cpu).chain(cards).collect::<Vec<_>>(), "cuda_driver": driver })
}

fn as_text(host: &HostMemory, cards: &[(Card, Option<Rates>)], driver: Option<&str>, rates: Option<&Rates>) -> String {
    let mut text = format!("cpu     {} of {} free", gib(host.free_bytes), gib(host.total_bytes));
    if host.limit_bytes.is_some() {
        text.push_str(", the container's limit");
    }
    if let Some(rates) = rates {
        let [products, convolutions] = [rates.products, rates.convolutions].map(|rate| rate / 1e9);
        // Writing to a string does not fail.
        let _ = write!(text, "; measured: {products:.0} GFLOP/s in products, {convolutions:.0} in convolutions");
    }
    text.push('\n');
    for (card, rates) in cards {
        let (free, total) = (gib(card.free_bytes), gib(card.total_bytes));
        let others = gib(card.used_by_others_bytes);
        // Writing to a string does not fail.
        let _ = write!(text, "cuda:{}  {free} of {total} free, others hold {others}; {}", card.index, card.name);
        let _ = write!(text, ", {}", card.uuid);
        if let Some(degrees) = card.temperature_celsius {
            let _ = write!(text, ", {degrees} degrees Celsius");
        }
        if !card.throttled.is_empty() {
            let _ = write!(text, ", slowed down ({})", card.throttled.join(", "));
        }
        if let Some(errors) = card.ecc_errors.filter(|&errors| errors > 0) {
            let _ = write!(text, ", {errors} memory errors that could not be mended");
        }
        if let Some(rates) = rates {
            let [products, attention, convolutions] =
                [rates.products, rates.attention, rates.convolutions].map(|rate| rate / 1e12);
            let _ = write!(text, "; measured: {products:.0} TFLOP/s in layers, {attention:.0} in attention, ");
            let _ = write!(text, "{convolutions:.0} in convolutions, {:.0} GB/s of weights", rates.weights / 1e9);
        }
        text.push('\n');
    }
    match driver {
        None if cards.is_empty() => text.push_str("No NVIDIA driver answers, so there are no CUDA devices.\n"),
        _ if !cards.is_empty() && !HAS_CUDA => text.push_str("This build has no CUDA: it computes on cpu only.\n"),
        _ => {}
    }
    text
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostMemory = HostMemory { total_bytes: 8 << 30, free_bytes: 6 << 30, limit_bytes: Some(8 << 30) };

    struct OneCard;

    impl Driver for OneCard {
        fn version(&self) -> Option<String> {
            Some("570.1".to_owned())
        }

        fn cards(&self) -> Result<Vec<Card>, String> {
            Ok(vec![Card {
                index: 0,
                name: "Card X".into(),
                uuid: "GPU-1".into(),
                total_bytes: 4 << 30,
                free_bytes: 1 << 30,
                used_by_others_bytes: 3 << 30,
                temperature_celsius: Some(81),
                throttled: vec!["temperature"],
                ecc_errors: Some(2),
            }])
        }
    }

    fn one(rates: Option<Rates>) -> Vec<(Card, Option<Rates>)> {
        cards(Some(&OneCard)).into_iter().map(|card| (card, rates)).collect()
    }

    #[test]
    fn people_read_everything_that_is_wrong_with_a_card() {
        let text = as_text(&HOST, &one(None), OneCard.version().as_deref(), None);
        for part in ["6.0 GiB of 8.0 GiB free, the container's limit", "cuda:0", "1.0 GiB of 4.0 GiB free", "Card X"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        for part in ["GPU-1", "others hold 3.0 GiB", "81 degrees", "slowed down (temperature)", "2 memory errors"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(text.contains("no CUDA: it computes on cpu only"), !HAS_CUDA, "{text}");
        let text = as_text(&HOST, &[], None, Some(&Rates { products: 65.4e9, ..Rates::of_cores(2) }));
        assert!(text.contains("measured: 65 GFLOP/s in products, 50 in convolutions"), "{text}");
        let text = as_text(&HOST, &one(Some(Rates::CUDA)), Some("570.1"), None);
        let told = "measured: 60 TFLOP/s in layers, 40 in attention, 25 in convolutions, 12 GB/s of weights";
        assert!(text.contains(told), "{text}");
        assert!(as_text(&HOST, &[], None, None).contains("No NVIDIA driver answers"));
    }

    #[test]
    fn programs_read_bytes() {
        let value = as_json(&HOST, &one(Some(Rates::CUDA)), Some("570.1"), None);
        assert_eq!(
            value["devices"][0],
            json!({
                "device": "cpu",
                "usable": true,
                "total_bytes": 8u64 << 30,
                "free_bytes": 6u64 << 30,
                "limit_bytes": 8u64 << 30,
                "rates": null,
            })
        );
        assert_eq!((&value["devices"][1]["uuid"], &value["devices"][1]["ecc_errors"]), (&json!("GPU-1"), &json!(2)));
        assert_eq!(value["devices"][1]["rates"]["attention"], json!(40e12));
        assert_eq!(value["devices"][1]["used_by_others_bytes"], json!(3u64 << 30));
        assert_eq!(value["cuda_driver"], json!("570.1"));
    }
}
