//! `avatar pressure`: how full a running stage's device is, and from where on that is too full.

use clap::Args;
use planner::Bytes;
use proto::v1::{DescribeRequest, MemoryReport, SetPressureRequest, stage_service_client::StageServiceClient};
use serde_json::{Value, json};

use crate::{
    client::refused,
    failure::Failure,
    progress::{print_line, print_text},
};

/// The flags of `avatar pressure`.
#[derive(Debug, Args)]
pub struct PressureFlags {
    /// Address of the running stage, as in `127.0.0.1:50051`.
    #[arg(long, value_name = "HOST:PORT")]
    pub stage: String,
    /// Percent of the device's memory above which it is nearly full from now on, until the stage's process ends (20 to
    /// 100; 100 is never). Ten less ends it.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(20..=100))]
    pub percent: Option<u32>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Changes what is to be changed, and prints the device's memory.
///
/// Errors: no address, or the stage does not answer.
pub async fn pressure(flags: &PressureFlags) -> Result<(), Failure> {
    let channel = service_kit::client::connect(&flags.stage);
    let channel = channel.map_err(|error| Failure::input("stage", error.to_string()))?;
    let mut client = StageServiceClient::new(channel);
    if let Some(percent) = flags.percent {
        client.set_pressure(SetPressureRequest { percent }).await.map_err(|status| refused(&status))?;
    }
    let said = client.describe(DescribeRequest {}).await.map_err(|status| refused(&status))?.into_inner();
    let memory = said.memory.unwrap_or_default();
    match flags.json {
        true => print_line(&as_json(&said.device, &memory)),
        false => print_text(&as_text(&said.device, &memory)),
    }
    Ok(())
}

fn as_json(device: &str, memory: &MemoryReport) -> Value {
    json!({
        "device": device,
        "budget_bytes": memory.budget_bytes,
        "free_bytes": memory.free_bytes,
        "pressure": memory.pressure,
        "pressure_percent": memory.pressure_percent,
        "pressure_count": memory.pressure_count,
        "pressure_refusals": memory.pressure_refusals,
        "unloaded_stages": memory.unloaded_stages,
        "emptied_caches": memory.emptied_caches,
    })
}

fn as_text(device: &str, memory: &MemoryReport) -> String {
    let state = if memory.pressure { "nearly full" } else { "not nearly full" };
    format!(
        "{device}: {} of {} free, {state} (from {} % on); so far nearly full {} times, {} stages unloaded and {} caches \
         freed for it, {} calls had to wait",
        Bytes(memory.free_bytes),
        Bytes(memory.budget_bytes),
        memory.pressure_percent,
        memory.pressure_count,
        memory.unloaded_stages,
        memory.emptied_caches,
        memory.pressure_refusals,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_and_programs_read_the_same_numbers() {
        let memory = MemoryReport {
            budget_bytes: 4 << 30,
            free_bytes: 1 << 29,
            pressure: true,
            pressure_percent: 85,
            pressure_count: 3,
            pressure_refusals: 7,
            unloaded_stages: 2,
            emptied_caches: 4,
            ..MemoryReport::default()
        };
        let text = as_text("cpu", &memory);
        for part in
            ["cpu: 512 MiB of 4 GiB free, nearly full (from 85 % on)", "3 times", "2 stages", "4 caches", "7 calls"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
        let value = as_json("cpu", &memory);
        assert_eq!((&value["free_bytes"], &value["pressure_count"]), (&json!(1u64 << 29), &json!(3)));
    }
}
