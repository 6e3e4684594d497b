//! Every reference case in `tests/goldens` holds, through the same runner that anyone can point at other cases.

use std::path::Path;

use e2e::parity::{self, Drift};

#[test]
fn every_reference_case_holds() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    let cases = parity::find(&goldens).unwrap();
    assert_eq!(cases.len(), 28);
    let failures: Vec<String> = cases
        .iter()
        .map(|case| parity::run(case))
        .filter(|report| !report.holds())
        .map(|report| {
            let rows: Vec<_> = report.tensors.iter().filter(|t| !t.holds).collect();
            format!("{}: {:?} {rows:#?}", report.case, report.error)
        })
        .collect();
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}

/// The case itself allows 2e-4; with a transform in f64 it would be 7e-6.
#[test]
fn the_mel_spectrum_is_within_1e_6_of_the_reference() {
    let report = parity::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/whisper_logmel"));
    assert!(report.holds(), "{report:?}");
    let mel = report.tensors.iter().find(|t| t.tensor == "mel").unwrap();
    assert!(mel.relative <= 1e-6, "{mel:?}");
}

/// The table is measured by `parity --drift`; a drift that doubles is a defect, one that halves a table to be written anew.
#[test]
fn every_network_drifts_in_16_bits_as_the_documented_table_says() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = std::fs::read_to_string(tests.join("../docs/benchmarks/precision.md")).unwrap();
    let stated = Drift::read(&table).unwrap();
    let measured = Drift::measure(&parity::find(&tests.join("goldens")).unwrap()).unwrap();
    let names = |rows: &[Drift]| -> Vec<_> { rows.iter().map(|row| (row.case.clone(), row.tensor.clone())).collect() };
    assert_eq!(names(&measured), names(&stated));
    let near = |measured: f64, stated: f64| measured < 2.0 * stated && measured > stated / 2.0;
    let wrong: Vec<String> = measured
        .iter()
        .zip(&stated)
        .filter(|(measured, stated)| !(near(measured.bf16, stated.bf16) && near(measured.f16, stated.f16)))
        .map(|(measured, stated)| format!("{measured} measured, stated is {stated}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_folder_of_an_unknown_kind_counts_as_failed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"case":"surprise","tolerance_max_rel":0.1}"#).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/image_size_rule/outputs.safetensors");
    let bytes = std::fs::read(source).unwrap();
    // The same tensor under a name that no kind has.
    let renamed = String::from_utf8_lossy(&bytes[8..]).contains("\"table\"");
    assert!(renamed);
    let patched = replace(&bytes, b"\"table\"", b"\"tablx\"");
    std::fs::write(dir.path().join("outputs.safetensors"), patched).unwrap();
    let report = parity::run(dir.path());
    assert!(!report.holds());
    assert!(report.kind.is_none());
}

#[test]
fn a_wrong_value_is_shown_with_its_place() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "inputs.safetensors", "outputs.safetensors"] {
        std::fs::copy(goldens.join("scheduler").join(file), dir.path().join(file)).unwrap();
    }
    let path = dir.path().join("outputs.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40; // the exponent of one element
    std::fs::write(&path, bytes).unwrap();
    let report = parity::run(dir.path());
    let wrong: Vec<_> = report.tensors.iter().filter(|t| !t.holds).collect();
    assert_eq!(wrong.len(), 1, "{report:?}");
    assert_eq!(wrong[0].pairs.len(), 1);
    assert_eq!(wrong[0].pairs[0].0, wrong[0].at);
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}
