//! The meter counts the whole process's heap, so its test has a process of its own.

use service_kit::memory::StageMeter;

const MIB: u64 = 1 << 20;
/// What the test harness may allocate meanwhile.
const NOISE: u64 = 8 * MIB;

fn near(value: u64, expected: u64) {
    assert!(value.abs_diff(expected) < NOISE, "{value}, expected about {expected}");
}

#[test]
fn a_stage_is_its_weights_plus_what_its_largest_request_needed() {
    let meter = StageMeter::default();
    let weights = meter.load(|| Ok::<_, ()>(vec![1u8; 64 * MIB as usize])).unwrap();
    meter.measure(|| std::hint::black_box(vec![1u8; 100 * MIB as usize]).len());
    meter.measure(|| std::hint::black_box(vec![1u8; 32 * MIB as usize]).len());
    let report = meter.report();
    near(report.resident_bytes, 64 * MIB);
    near(report.peak_bytes, 164 * MIB);
    assert!(report.process_bytes >= 64 * MIB);
    drop(weights);
    meter.unloaded();
    assert_eq!(meter.report().resident_bytes, 0);
    near(meter.report().peak_bytes, 164 * MIB);
}
