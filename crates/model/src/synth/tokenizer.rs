//! Byte-level tokenizers: one token a byte, and the special tokens that the prompts need.

use serde_json::{Map, Value, json};

/// Special tokens of the LLaVA tokenizer, from id 256.
pub(super) const LLAVA: [&str; 6] =
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"];
/// Special tokens of the CLIP tokenizer, from id 256; the end is the padding too.
pub(super) const CLIP: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// Tokens of a vocabulary with these special tokens.
pub(super) fn vocabulary(special: &[&str]) -> usize {
    256 + special.len()
}

/// Id of a special token.
pub(super) fn id(special: &[&str], token: &str) -> usize {
    256 + special.iter().position(|t| *t == token).unwrap_or(0)
}

/// A `tokenizer.json` whose id of a byte is the byte; texts start with `start` and end with `end`.
pub(super) fn byte_level(special: &[&str], start: &str, end: Option<&str>) -> Value {
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (letter(b).to_string(), json!(b))).collect();
    let added: Vec<Value> = special
        .iter()
        .map(|token| {
            json!({
                "id": id(special, token), "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    let mut single = vec![token(start, 0), sequence("A", 0)];
    let mut pair = vec![token(start, 0), sequence("A", 0), sequence("B", 1)];
    let mut used = Map::new();
    used.insert(start.to_owned(), json!({ "id": start, "ids": [id(special, start)], "tokens": [start] }));
    if let Some(end) = end {
        single.push(token(end, 0));
        pair.push(token(end, 1));
        used.insert(end.to_owned(), json!({ "id": end, "ids": [id(special, end)], "tokens": [end] }));
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
