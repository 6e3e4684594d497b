#![allow(missing_docs)]
use super::stored::Found;
pub struct Archive {
    pub tensors: Vec<Found>,
    pub numbers: std::collections::BTreeMap<String, f64>,
}
pub fn is_zip(_: &[u8]) -> bool {
    false
}
pub fn read(_: &std::path::Path, _: &[u8]) -> crate::Result<Archive> {
    Ok(Archive { tensors: vec![], numbers: Default::default() })
}
