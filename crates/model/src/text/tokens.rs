//! Words to tokens, by the checkpoint's own `tokenizer.json`, or CLIP's older files.

use std::{
    panic::catch_unwind,
    path::{Path, PathBuf},
};

use tokenizers::{Tokenizer, models::ModelWrapper};

use super::{clip_bpe, config::LlavaConfig};
use crate::{Error, Result};

/// Bytes of the longest token of a vocabulary: runs of spaces are the longest.
const TOKEN_BYTES: usize = 128;

/// Tokens of one text.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Tokens, padded on the right.
    pub ids: Vec<i64>,
    /// 1 for tokens, then 0 for filling.
    pub mask: Vec<i64>,
    /// Tokens of the prompt alone.
    pub prompt: usize,
}

/// Puts a prompt into LLaVA's template and turns it into tokens.
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    before: String,
    after: String,
    crop: usize,
    limit: usize,
    length: usize,
    bos: i64,
    image: u32,
    pad: u32,
}

impl PromptTokenizer {
    /// Opens `tokenizer.json` of a folder.
    ///
    /// Errors: a template without exactly one `{}` or one image token behind it, or as long as the text may be; a
    /// token past the `vocabulary` that has embeddings.
    pub fn open(folder: &Path, config: &LlavaConfig, vocabulary: usize) -> Result<Self> {
        let file = folder.join(TOKENIZER);
        let tokenizer = plain(read(&file)?, &file, vocabulary)?;
        let fault = |reason: String| Error::file(&file, reason);
        let halves = config.template.split_once("{}").filter(|(_, after)| !after.contains("{}"));
        let Some((before, after)) = halves else {
            return Err(fault(format!("the template {:?} has not exactly one {{}}", config.template)));
        };
        let (head, tail) = (ids(&tokenizer, before)?, ids(&tokenizer, after)?);
        let images = |ids: &[u32]| ids.iter().filter(|id| **id == config.image_token).count();
        if images(&head) != 0 || images(&tail) != 1 {
            let reason = format!("the template needs image token {} once, behind the prompt", config.image_token);
            return Err(fault(reason));
        }
        let Some(limit) = config.prompt_tokens.checked_sub(tail.len()) else {
            let reason = format!("{} tokens after the prompt, {} in all", tail.len(), config.prompt_tokens);
            return Err(fault(reason));
        };
        let crop = 1 + head.len();
        Ok(Self {
            before: before.to_owned(),
            after: after.to_owned(),
            crop,
            limit,
            length: crop + config.prompt_tokens,
            bos: i64::from(config.bos_token),
            image: config.image_token,
            pad: config.pad_token,
            tokenizer,
        })
    }

    /// Tokens of the template before the prompt, with the one that begins the text: 95 in the published model.
    #[must_use]
    pub fn crop(&self) -> usize {
        self.crop
    }

    /// Tokens of the longest prompt: 249 in the published model.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Turns a prompt into tokens; it is never cut.
    ///
    /// Errors: a prompt that is too long (with its number of tokens), or that spells the picture's or the padding's
    /// token.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        self.check(prompt)?;
        let text = ids(&self.tokenizer, &self.text(prompt))?;
        let count = self.count(text.len());
        if count > self.limit {
            return Err(Error::input("prompt", format!("{count} tokens, the limit is {}", self.limit)));
        }
        let mut ids: Vec<i64> = Vec::with_capacity(self.length);
        ids.push(self.bos);
        ids.extend(text.iter().map(|id| i64::from(*id)));
        let mut mask = vec![1; ids.len()];
        ids.resize(self.length, i64::from(self.pad));
        mask.resize(self.length, 0);
        Ok(Tokens { ids, mask, prompt: count })
    }

    /// The longest beginning of a prompt that [`encode`](Self::encode) takes, and the tokens of the whole prompt.
    ///
    /// The cut lies between two tokens and between two characters: of a character that takes several tokens all are
    /// kept or none.
    ///
    /// Errors: as [`encode`](Self::encode), but for the number of tokens.
    pub fn cut<'a>(&self, prompt: &'a str) -> Result<(&'a str, usize)> {
        self.check(prompt)?;
        let text = self.text(prompt);
        let encoded = self.tokenizer.encode(text, false).map_err(|e| Error::input("prompt", e.to_string()))?;
        let total = self.count(encoded.len());
        if total <= self.limit {
            return Ok((prompt, total));
        }
        // Offsets are bytes of the text; a token inside a character has that of the character.
        let starts = encoded.get_offsets().iter().map(|(start, _)| start.saturating_sub(self.before.len()));
        let starts: Vec<usize> = starts.skip(self.crop - 1).take(self.limit + 1).collect();
        let mut end = prompt.len();
        for start in starts.into_iter().rev().filter(|start| prompt.is_char_boundary(*start)) {
            if start >= end {
                continue;
            }
            end = start;
            // What is left can have more tokens than it had: white space at its end is now split otherwise.
            let kept = &prompt[..end];
            if self.count(ids(&self.tokenizer, &self.text(kept))?.len()) <= self.limit {
                return Ok((kept, total));
            }
        }
        Ok(("", total))
    }

    /// Errors: a prompt that is far too long to be turned into tokens, or that spells a token of ours.
    fn check(&self, prompt: &str) -> Result<()> {
        let bytes = self.limit * TOKEN_BYTES;
        if prompt.len() > bytes {
            let reason = format!("{} bytes, the limit is {bytes} ({} tokens)", prompt.len(), self.limit);
            return Err(Error::input("prompt", reason));
        }
        let words = ids(&self.tokenizer, prompt)?;
        if words.contains(&self.image) || words.contains(&self.pad) {
            return Err(Error::input("prompt", "it spells a token that stands for the picture or for padding"));
        }
        Ok(())
    }

    /// The prompt in the template. It becomes tokens in one go, as the reference does it: where a prompt begins with
    /// white space, its first token merges with the template's last.
    fn text(&self, prompt: &str) -> String {
        format!("{}{prompt}{}", self.before, self.after)
    }

    /// Tokens of the prompt in a text of `tokens` tokens without the first.
    fn count(&self, tokens: usize) -> usize {
        let around = self.crop - 1 + (self.length - self.crop - self.limit);
        tokens.saturating_sub(around)
    }
}

/// Turns a prompt into CLIP's tokens.
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    eot: u32,
    length: usize,
}

impl ClipTokenizer {
    /// Opens `tokenizer.json` of a folder, or `vocab.json` and `merges.txt` where there is none, for texts of `length`
    /// tokens that end with `eot`.
    ///
    /// Errors: no such files; a tokenizer that does not end its texts so; a token past the `vocabulary` that has embeddings.
    pub fn open(folder: &Path, eot: u32, (length, vocabulary): (usize, usize)) -> Result<Self> {
        let (whole, vocab, merges) = (folder.join(TOKENIZER), folder.join("vocab.json"), folder.join("merges.txt"));
        let (tokenizer, file) = match (whole.exists(), vocab.exists() || merges.exists()) {
            (true, _) => (read(&whole)?, whole),
            (false, true) => (clip_bpe::open(&vocab, &merges)?, vocab),
            (false, false) => {
                let reason = "there is no tokenizer.json, and no vocab.json with merges.txt in its place";
                return Err(Error::file(folder, reason));
            }
        };
        let tokenizer = plain(tokenizer, &file, vocabulary)?;
        let empty = tokenizer.encode_fast("", true).map_err(|e| Error::file(&file, e))?;
        if empty.get_ids().last() != Some(&eot) {
            return Err(Error::file(&file, format!("a text ends in {:?}, expected token {eot}", empty.get_ids())));
        }
        Ok(Self { tokenizer, eot, length })
    }

    /// Tokens of the longest prompt that is read to its end: 75 in the published model.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.length.saturating_sub(2)
    }

    /// Turns a prompt into tokens.
    ///
    /// A prompt of more tokens than CLIP takes (77 with the two around it) is cut, as CLIP's own tokenizer does it,
    /// and ends with its end token all the same. CLIP gives one vector for the prompt's gist; the words themselves
    /// reach the transformer through LLaVA, which refuses what it cannot take.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let encoded = self.tokenizer.encode_fast(prompt, true).map_err(|e| Error::input("prompt", e.to_string()))?;
        let mut ids: Vec<i64> = encoded.get_ids().iter().map(|id| i64::from(*id)).collect();
        let prompt = ids.len().saturating_sub(2);
        if ids.len() > self.length {
            ids.truncate(self.length.saturating_sub(1));
            ids.push(i64::from(self.eot));
        }
        let mut mask = vec![1; ids.len()];
        ids.resize(self.length, i64::from(self.eot));
        mask.resize(self.length, 0);
        Ok(Tokens { ids, mask, prompt })
    }
}

const TOKENIZER: &str = "tokenizer.json";

/// Errors: the file is missing or malformed.
fn read(file: &PathBuf) -> Result<Tokenizer> {
    // The library panics over a merge that is longer than every token.
    let opened = catch_unwind(|| Tokenizer::from_file(file));
    opened.map_err(|_| Error::file(file, "its merges do not fit its tokens"))?.map_err(|e| Error::file(file, e))
}

/// A tokenizer that neither fills nor cuts, and keeps nothing of what it has read: the library does that by thread, also
/// for tokenizers that are gone.
///
/// Errors: a token past the `vocabulary` that has embeddings.
fn plain(mut tokenizer: Tokenizer, file: &Path, vocabulary: usize) -> Result<Tokenizer> {
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| Error::file(file, e))?;
    let forgetful = match tokenizer.get_model() {
        ModelWrapper::BPE(pairs) => Some(pairs.clone()),
        _ => None,
    };
    if let Some(mut pairs) = forgetful {
        pairs.resize_cache(0);
        tokenizer.with_model(pairs);
    }
    match tokenizer.get_vocab(true).into_iter().find(|(_, id)| *id as usize >= vocabulary) {
        None => Ok(tokenizer),
        Some((token, id)) => {
            Err(Error::file(file, format!("token {token:?} is {id}, there are {vocabulary} embeddings")))
        }
    }
}

/// Tokens of a text, without those that the tokenizer puts around it: the one in front is put there by us, once.
fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoded = tokenizer.encode_fast(text, false).map_err(|e| Error::input("prompt", e.to_string()))?;
    Ok(encoded.get_ids().to_vec())
}
