//! Byte-level tokenizers: one token a byte, and the special tokens that the prompts need.

use serde_json::{Map, Value, json};

/// A special token and its id.
pub(super) type Special = (&'static str, usize);

/// Special tokens of the small LLaVA's tokenizer; texts start with the first.
pub(super) const LLAVA: [Special; 6] = [
    ("<|begin_of_text|>", 256),
    ("<|start_header_id|>", 257),
    ("<|end_header_id|>", 258),
    ("<|eot_id|>", 259),
    ("<image>", 260),
    ("<pad>", 261),
];
/// Special tokens of the small CLIP's tokenizer; the end is the padding too.
pub(super) const CLIP: [Special; 2] = [("<|startoftext|>", 256), ("<|endoftext|>", 257)];
/// As [`LLAVA`], with the published ids.
pub(super) const PUBLISHED_LLAVA: [Special; 6] = [
    ("<|begin_of_text|>", 128_000),
    ("<|start_header_id|>", 128_006),
    ("<|end_header_id|>", 128_007),
    ("<|eot_id|>", 128_009),
    ("<image>", 128_257),
    ("<pad>", 128_258),
];
/// As [`CLIP`], with the published ids.
pub(super) const PUBLISHED_CLIP: [Special; 2] = [("<|startoftext|>", 49_406), ("<|endoftext|>", 49_407)];

/// Tokens of a vocabulary of bytes and special tokens without a gap.
pub(super) const fn vocabulary(special: &[Special]) -> usize {
    256 + special.len()
}

/// Id of a special token.
pub(super) fn id(special: &[Special], token: &str) -> usize {
    special.iter().find(|(name, _)| *name == token).map_or(256, |(_, id)| *id)
}

/// A `tokenizer.json` whose id of a byte is the byte; texts start with the first special token, and end with
/// number `end` where that is given.
pub(super) fn byte_level(special: &[Special], end: Option<usize>) -> Value {
    let mut vocab: Map<String, Value> = (0..=255u8).map(|b| (letter(b).to_string(), json!(b))).collect();
    // Ids past a gap hold only for tokens of the vocabulary.
    vocab.extend(special.iter().map(|(name, id)| ((*name).to_owned(), json!(id))));
    let added: Vec<Value> = special
        .iter()
        .map(|(name, id)| {
            json!({
                "id": id, "content": name, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    let (start, first) = special[0];
    let mut single = vec![token(start, 0), sequence("A", 0)];
    let mut pair = vec![token(start, 0), sequence("A", 0), sequence("B", 1)];
    let mut used = Map::new();
    used.insert(start.to_owned(), json!({ "id": start, "ids": [first], "tokens": [start] }));
    if let Some((end, last)) = end.map(|index| special[index]) {
        single.push(token(end, 0));
        pair.push(token(end, 1));
        used.insert(end.to_owned(), json!({ "id": end, "ids": [last], "tokens": [end] }));
    }
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": { "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used },
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
}

fn token(id: &str, kind: u32) -> Value {
    json!({ "SpecialToken": { "id": id, "type_id": kind } })
}

fn sequence(id: &str, kind: u32) -> Value {
    json!({ "Sequence": { "id": id, "type_id": kind } })
}

/// The letter that stands for a byte in byte-level vocabularies: itself where it prints, else the next free
/// one from U+0100.
fn letter(byte: u8) -> char {
    let prints = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if prints(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !prints(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}
