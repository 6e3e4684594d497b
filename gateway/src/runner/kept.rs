//! What a stage gave, as bytes that can be kept: its summary, then its tensors as on the wire.

use std::collections::HashMap;

use prost::Message;
use proto::{
    tensor::{HostTensor, TensorReader},
    v1::TensorPart,
};

/// Most bytes of one kept tensor, and of all of one stage.
const TENSOR_BYTES: u64 = 4 << 30;

/// The bytes of a stage's answer; the same answer gives the same bytes.
pub(super) fn to_bytes<S: Message>(tensors: &[HostTensor], summary: &S) -> Vec<u8> {
    let mut bytes = summary.encode_length_delimited_to_vec();
    for part in tensors.iter().cloned().flat_map(HostTensor::parts) {
        bytes.extend(part.encode_length_delimited_to_vec());
    }
    bytes
}

/// Reads kept bytes; nothing if they are not such an answer.
pub(super) fn from_bytes<S: Message + Default>(mut bytes: &[u8]) -> Option<(HashMap<String, HostTensor>, S)> {
    let summary = S::decode_length_delimited(&mut bytes).ok()?;
    let mut reader = TensorReader::new(TENSOR_BYTES, 4 * TENSOR_BYTES);
    let mut tensors = HashMap::new();
    while !bytes.is_empty() {
        let part = TensorPart::decode_length_delimited(&mut bytes).ok()?;
        if let Some(tensor) = reader.push(part).ok()? {
            tensors.insert(tensor.name().to_owned(), tensor);
        }
    }
    reader.finish().ok()?;
    Some((tensors, summary))
}

#[cfg(test)]
mod tests {
    use proto::v1::EncodePromptSummary;

    use super::*;

    #[test]
    fn an_answer_is_read_as_it_was_and_a_part_of_it_is_none() {
        let tensors = [
            HostTensor::from_f32("states", &[2, 3], &[1.0, -2.5, 0.0, f32::MIN_POSITIVE, 7.0, 1e30]).unwrap(),
            HostTensor::from_i64("mask", &[2], &[1, 0]).unwrap(),
        ];
        let summary = EncodePromptSummary { prompt_tokens: 7, ..Default::default() };
        let bytes = to_bytes(&tensors, &summary);
        let (read, told) = from_bytes::<EncodePromptSummary>(&bytes).unwrap();
        assert_eq!(told, summary);
        assert!(tensors.iter().all(|tensor| read[tensor.name()] == *tensor) && read.len() == 2);
        let whole = |cut: usize| from_bytes::<EncodePromptSummary>(&bytes[..cut]).is_some_and(|(t, _)| t.len() == 2);
        assert!((0..bytes.len()).all(|cut| !whole(cut)));
    }
}
