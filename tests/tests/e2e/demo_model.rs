//! The demo's model, and the case that its trainer's own implementation made.

use std::path::Path;

use e2e::parity;

#[test]
fn an_independent_implementations_pass_is_met() {
    let cases = parity::find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/cases")).unwrap();
    assert_eq!(cases.len(), 1);
    let report = parity::run(&cases[0]);
    assert!(report.holds(), "{report:?}");
}
