//! The two hashes by which a repository names its files.

use std::fmt;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// What a file's bytes must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256 of the bytes, 64 lower-case hexadecimal digits: large files.
    Sha256(String),
    /// SHA-1 of `blob LENGTH\0` and the bytes, 40 lower-case hexadecimal digits: git's own name of a small file.
    GitBlob(String),
}

impl Digest {
    /// Reads a SHA-256; a prefix `sha256:` may stand before it.
    #[must_use]
    pub fn sha256(text: &str) -> Option<Self> {
        hex(text.strip_prefix("sha256:").unwrap_or(text), 64).map(Self::Sha256)
    }

    /// Reads git's name of a file.
    #[must_use]
    pub fn git_blob(text: &str) -> Option<Self> {
        hex(text, 40).map(Self::GitBlob)
    }

    /// The hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// Whether an ETag speaks of the same bytes: `None` if it is no hash of this kind.
    #[must_use]
    pub fn agrees(&self, etag: &str) -> Option<bool> {
        let text = etag.trim().trim_start_matches("W/").trim_matches('"');
        hex(text, self.hex().len()).map(|other| other == self.hex())
    }

    /// Begins to hash a file of `bytes` bytes the same way.
    #[must_use]
    pub fn hasher(&self, bytes: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher { context: Context::new(&SHA256), sha256: true },
            Self::GitBlob(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {bytes}\0").as_bytes());
                Hasher { context, sha256: false }
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(f, "SHA-256 {hex}"),
            Self::GitBlob(hex) => write!(f, "git SHA-1 {hex}"),
        }
    }
}

fn hex(text: &str, digits: usize) -> Option<String> {
    (text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
}

/// Bytes on the way to a [`Digest`].
pub struct Hasher {
    context: Context,
    sha256: bool,
}

impl Hasher {
    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.context.update(data);
    }

    /// The hash of all bytes.
    #[must_use]
    pub fn finish(self) -> Digest {
        let hex = self.context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if self.sha256 { Digest::Sha256(hex) } else { Digest::GitBlob(hex) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `git hash-object` and `sha256sum`.
    #[test]
    fn hashes_are_those_of_git_and_of_sha256sum() {
        let of = |digest: &Digest| {
            let mut hasher = digest.hasher(6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            hasher.finish()
        };
        let git = Digest::git_blob("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        assert_eq!(of(&git), git);
        let sha = "5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03";
        let sha = Digest::sha256(&format!("sha256:{sha}")).unwrap();
        assert_eq!(of(&sha), sha);
    }

    #[test]
    fn only_a_hash_of_the_same_kind_is_compared() {
        let digest = Digest::git_blob(&"a".repeat(40)).unwrap();
        assert_eq!(digest.agrees(&format!("W/\"{}\"", "A".repeat(40))), Some(true));
        assert_eq!(digest.agrees(&"b".repeat(40)), Some(false));
        assert_eq!(digest.agrees("\"5f2c-17\""), None);
        assert!(Digest::sha256("12").is_none() && Digest::git_blob(&"g".repeat(40)).is_none());
    }
}
