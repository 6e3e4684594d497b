//! What a denoise follows, so that stored latents are gone on with where they belong.

use std::fmt;

use crate::store::artifacts::sha256;

/// What decides latents besides the inputs, which a generation never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Followed {
    /// Hash of the settings, the steps and the checkpoints: latents of others are of another video.
    what: String,
    /// Hash of how the stages compute: latents of another manner differ in the last place.
    manner: String,
    /// Steps that are done already were computed in another manner.
    pub(super) mixed: bool,
    /// All steps that are left run in full, because features found no memory.
    pub(super) full: bool,
}

impl Followed {
    /// A denoise that begins.
    pub(super) fn new(what: &str, manner: &str) -> Self {
        let (what, manner) = (sha256(what.as_bytes()), sha256(manner.as_bytes()));
        Self { what, manner, mixed: false, full: false }
    }

    /// Reads what was stored with latents; nothing where that is something else.
    pub(super) fn parse(stored: &str) -> Option<Self> {
        let mut words = stored.split(' ');
        let (what, manner) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut read = Self { what, manner, mixed: false, full: false };
        for word in words {
            match word {
                "mixed" => read.mixed = true,
                "full" => read.full = true,
                _ => return None,
            }
        }
        Some(read)
    }

    /// What is followed from latents on that `before` led to; nothing where they are of another video.
    pub(super) fn after(&self, before: &Self) -> Option<Self> {
        let mixed = before.mixed || before.manner != self.manner;
        (before.what == self.what).then(|| Self { mixed, full: before.full, ..self.clone() })
    }
}

impl fmt::Display for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, manner, mixed, full } = self;
        let word = |holds: bool, word| if holds { word } else { "" };
        write!(f, "{what} {manner}{}{}", word(*mixed, " mixed"), word(*full, " full"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_again_and_what_else_was_stored_is_nothing() {
        let plain = Followed::new("settings", "cpu f32");
        for (mixed, full) in [(false, false), (true, false), (false, true), (true, true)] {
            let followed = Followed { mixed, full, ..plain.clone() };
            assert_eq!(Followed::parse(&followed.to_string()), Some(followed));
        }
        for other in ["", "rejected", &sha256(b"of an earlier release"), "a b c"] {
            assert_eq!(Followed::parse(other), None, "{other}");
        }
    }

    #[test]
    fn latents_of_another_manner_are_gone_on_with_and_remembered_and_those_of_another_video_are_not() {
        let (cpu, cuda) = (Followed::new("settings", "cpu"), Followed::new("settings", "cuda:0"));
        assert_eq!(cpu.after(&cpu), Some(cpu.clone()));
        let moved = cpu.after(&cuda).unwrap();
        assert!(moved.mixed && !moved.full);
        assert_eq!(cpu.after(&moved), Some(moved.clone()), "what is mixed stays so");
        assert!(cpu.after(&Followed { full: true, ..cuda }).unwrap().full);
        assert_eq!(Followed::new("other settings", "cpu").after(&cpu), None);
    }
}
