//! CLIP's tokenizer from the two files that it came with first: `vocab.json` and `merges.txt`.

use std::{collections::HashMap, fs::File, io::Read, path::Path};

use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    processors::template::TemplateProcessing,
};

use crate::{Error, Result};

/// Most bytes of either file: the published ones have 1 MB and half of that.
const FILE_BYTES: u64 = 16 << 20;
/// How CLIP cuts a text: contractions, runs of letters, single digits, runs of anything else but white space.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Marks the last piece of a word.
const LAST: &str = "</w>";
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// Builds CLIP's tokenizer: composed Unicode in lower case with single spaces, cut into words, their bytes joined in the
/// order of the merges, between a start and an end token.
///
/// Errors: a file that is missing, too large or no such file; a merge of tokens that the vocabulary has not.
pub(super) fn open(vocab: &Path, merges: &Path) -> Result<Tokenizer> {
    let tokens: HashMap<String, u32> =
        serde_json::from_str(&read(vocab)?).map_err(|e| Error::file(vocab, format!("no table of tokens: {e}")))?;
    let special = |token: &str| {
        let id = tokens.get(token).copied();
        id.ok_or_else(|| Error::file(vocab, format!("the token {token:?} is missing")))
    };
    let (start, end) = (special(START)?, special(END)?);
    let pairs = pairs(&read(merges)?, &tokens).map_err(|reason| Error::file(merges, reason))?;
    let bpe = BPE::builder()
        .vocab_and_merges(tokens.into_iter().collect::<Vocab>(), pairs)
        .unk_token(END.to_owned())
        .end_of_word_suffix(LAST.to_owned())
        .build()
        .map_err(|e| Error::file(merges, e))?;
    build(bpe, (start, end)).map_err(|e| Error::file(vocab, e))
}

fn build(bpe: BPE, (start, end): (u32, u32)) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(bpe);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ])))?;
    let words = Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Removed, true)?;
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
    ])));
    let around = TemplateProcessing::builder()
        .try_single(format!("{START} $A {END}"))?
        .special_tokens(vec![(START, start), (END, end)])
        .build()?;
    tokenizer.with_post_processor(Some(around));
    tokenizer.add_special_tokens([START, END].map(|token| AddedToken::from(token, true)))?;
    Ok(tokenizer)
}

/// The lines of `merges.txt`, each two tokens that join to a third.
///
/// All three are looked for here: the library trusts that they are in the vocabulary, and panics where a joined one
/// is longer than its longest token.
fn pairs(text: &str, tokens: &HashMap<String, u32>) -> Result<Vec<(String, String)>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    lines
        .map(|(number, line)| {
            let at = number + 1;
            let halves = line.split_once(' ').filter(|(_, right)| !right.contains(' '));
            let Some((left, right)) = halves else {
                return Err(format!("line {at}: not two tokens with a space between"));
            };
            let joined = format!("{left}{right}");
            let missing = [left, right, &joined].into_iter().find(|token| !tokens.contains_key(*token));
            match missing {
                None => Ok((left.to_owned(), right.to_owned())),
                Some(token) => Err(format!("line {at}: the vocabulary has no token {token:?}")),
            }
        })
        .collect()
}

fn read(file: &Path) -> Result<String> {
    let mut text = String::new();
    let open = File::open(file).map_err(|e| Error::file(file, e))?;
    let bytes = open.take(FILE_BYTES + 1).read_to_string(&mut text).map_err(|e| Error::file(file, e))?;
    if bytes as u64 > FILE_BYTES {
        return Err(Error::file(file, format!("more than {FILE_BYTES} bytes, the limit")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::Value;

    use super::*;
    use crate::text::tokens::ClipTokenizer;

    /// Made by `tests/vectors/make_clip_bpe.py`, without the library.
    fn vectors() -> Value {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/clip_bpe.json");
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    }

    fn folder(vocab: &str, merges: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("vocab.json"), vocab).unwrap();
        std::fs::write(folder.path().join("merges.txt"), merges).unwrap();
        folder
    }

    fn merges(vectors: &Value) -> String {
        let lines = vectors["merges"].as_array().unwrap().iter().map(|line| line.as_str().unwrap());
        std::iter::once("#version: 0.2").chain(lines).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn tokens_are_those_of_an_independent_tokenizer() {
        let vectors = vectors();
        let folder = folder(&vectors["vocab"].to_string(), &merges(&vectors));
        let vocab = vectors["vocab"].as_object().unwrap();
        let end = vocab[END].as_u64().unwrap() as u32;
        let tokenizer = ClipTokenizer::open(folder.path(), end, (77, vocab.len())).unwrap();
        for case in vectors["cases"].as_array().unwrap() {
            let tokens = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
            let wanted: Vec<i64> = case["ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
            assert_eq!(tokens.ids[..wanted.len()], wanted, "{}", case["text"]);
            assert_eq!((tokens.ids.len(), tokens.prompt), (77, wanted.len() - 2), "{}", case["text"]);
            assert_eq!(tokens.mask.iter().sum::<i64>() as usize, wanted.len(), "{}", case["text"]);
        }
    }

    #[test]
    fn files_that_do_not_fit_each_other_are_refused_by_name() {
        let vocab = format!(r#"{{"a": 0, "b</w>": 1, "ab</w>": 2, "{START}": 3, "{END}": 4}}"#);
        let error = |vocab: &str, merges: &str| {
            let folder = folder(vocab, merges);
            let opened = ClipTokenizer::open(folder.path(), 4, (77, 5));
            opened.err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(error(&vocab, "#version: 0.2\na b</w>\n"), "");
        for (vocab, merges, wanted) in [
            ("[]", "", "vocab.json: no table of tokens"),
            (r#"{"a": -1}"#, "", "vocab.json: no table of tokens"),
            (r#"{"a": 1}"#, "", r#"vocab.json: the token "<|startoftext|>" is missing"#),
            (vocab.as_str(), "a b</w> c", "merges.txt: line 1: not two tokens"),
            (vocab.as_str(), "\n\nab", "merges.txt: line 3: not two tokens"),
            // The library would panic here: the joined token is longer than all others.
            (vocab.as_str(), "<|startoftext|> <|endoftext|>", "merges.txt: line 1: the vocabulary has no token"),
            (&vocab.replace("\"a\": 0", "\"a\": 900"), "", "token \"a\" is 900, there are 5 embeddings"),
        ] {
            let error = error(vocab, merges);
            assert!(error.contains(wanted), "{error}");
        }
        let empty = tempfile::tempdir().unwrap();
        let error = ClipTokenizer::open(empty.path(), 4, (77, 5)).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("merges.txt"), "{error}");
    }

    #[test]
    fn a_tokenizer_json_that_would_crash_the_library_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let model = serde_json::json!({"type": "BPE", "vocab": {"aa": 0, "bb": 1}, "merges": [["aa", "bb"]]});
        let text = serde_json::json!({"version": "1.0", "model": model}).to_string();
        std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
        let error = ClipTokenizer::open(folder.path(), 0, (77, 5)).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json: "), "{error}");
    }
}
