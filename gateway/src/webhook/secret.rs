//! The key that webhooks are signed with.

use std::{fmt, fs, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ring::hmac;

/// What the text of a secret begins with.
const PREFIX: &str = "whsec_";
/// Bytes of a key.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Largest file that is read.
const FILE_BYTES: u64 = 4096;

/// A key for HMAC-SHA256; it is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Secret {
    /// Reads the secret from a file.
    ///
    /// Errors: it cannot be read, or holds no secret; what it holds is not said.
    pub(crate) fn read(file: &Path) -> Result<Self, String> {
        let length = fs::metadata(file).map_err(|error| error.to_string())?.len();
        if length > FILE_BYTES {
            return Err(format!("{length} bytes; the limit is {FILE_BYTES}"));
        }
        Self::parse(&fs::read_to_string(file).map_err(|error| error.to_string())?)
    }

    /// Reads `whsec_` and the key in Base64.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let key = text.trim().strip_prefix(PREFIX).and_then(|key| BASE64_STANDARD.decode(key).ok());
        let key = key.ok_or_else(|| format!("it is not {PREFIX} with a key in Base64 after it"))?;
        if !KEY_BYTES.contains(&key.len()) {
            let (least, most) = (KEY_BYTES.start(), KEY_BYTES.end());
            return Err(format!("the key has {} bytes; allowed are {least} to {most}", key.len()));
        }
        Ok(Self(key))
    }

    /// The value of `webhook-signature`, as the Standard Webhooks specification 1.0 has it.
    pub(super) fn sign(&self, id: &str, unix_seconds: u64, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.0));
        context.update(format!("{id}.{unix_seconds}.").as_bytes());
        context.update(body);
        format!("v1,{}", BASE64_STANDARD.encode(context.sign()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's reference libraries.
    #[test]
    fn the_signature_is_that_of_the_published_example() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n").unwrap();
        let signed = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_is_not_shown_and_a_wrong_one_is_refused_without_its_text() {
        let text = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        assert_eq!(format!("{:?}", Secret::parse(text).unwrap()), "***");
        for wrong in ["", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_!!", "whsec_QUJD"] {
            let error = Secret::parse(wrong).unwrap_err();
            assert!(!error.contains("MfKQ") && !error.contains("QUJD"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        fs::write(&file, text).unwrap();
        assert_eq!(Secret::read(&file), Secret::parse(text));
        assert!(Secret::read(&folder.path().join("none")).is_err());
    }
}
