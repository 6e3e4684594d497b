//! An access token: sent to the endpoint, shown to nobody.

use std::{ffi::OsString, fmt, io::Read as _, path::Path};

use reqwest::header::HeaderValue;

use crate::failure::Failure;

/// Bytes of the longest token.
const LENGTH: u64 = 4096;

/// An access token. It has no `Display`, and its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// Takes any text: a refusal while the command line is read would show the value.
impl From<OsString> for Token {
    fn from(value: OsString) -> Self {
        Self(value.to_string_lossy().trim().to_owned())
    }
}

impl Token {
    /// Reads a token from a file that holds nothing else.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |reason: String| Failure::input("token_file", format!("{}: {reason}", path.display()));
        let file = std::fs::File::open(path).map_err(|e| wrong(e.to_string()))?;
        let mut text = String::new();
        file.take(LENGTH + 1).read_to_string(&mut text).map_err(|e| wrong(e.to_string()))?;
        if text.len() as u64 > LENGTH {
            return Err(wrong(format!("more than {LENGTH} bytes; a token is shorter")));
        }
        if text.trim().is_empty() {
            return Err(wrong("it is empty".to_owned()));
        }
        Ok(Self(text.trim().to_owned()))
    }

    /// Whether there is nothing to send: a variable that is set and empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of `Authorization`.
    pub fn header(&self) -> Result<HeaderValue, Failure> {
        let wrong = || Failure::input("token_file", "the token (or HF_TOKEN) holds characters that no token has");
        if !self.0.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong());
        }
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0)).map_err(|_| wrong())?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::from(OsString::from(" hf_secret\n"));
        let header = token.header().unwrap();
        assert_eq!(header.to_str().unwrap(), "Bearer hf_secret");
        assert!(!format!("{token:?} {header:?}").contains("secret"));
        let refused = Token::from(OsString::from("hf_sec\u{e9}ret x")).header().unwrap_err();
        assert!(!refused.sentence().contains("sec"), "{refused}");
    }
}
