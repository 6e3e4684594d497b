//! The states of a generation, and what may follow what.

use proto::v1::GenerationState;

/// Whether a generation in this state has ended.
#[must_use]
pub fn is_terminal(state: GenerationState) -> bool {
    match state {
        GenerationState::Completed | GenerationState::Failed | GenerationState::Cancelled => true,
        GenerationState::Unspecified
        | GenerationState::Queued
        | GenerationState::Encoding
        | GenerationState::Denoising
        | GenerationState::Decoding => false,
    }
}

/// Whether an event may lead from one state to another; the table in docs/generations.md says the same.
///
/// An event that changes no state keeps a generation that has not ended where it is. `Unspecified` is that of a
/// generation that does not exist yet.
#[must_use]
pub fn may_follow(from: GenerationState, to: GenerationState) -> bool {
    use GenerationState::{Cancelled, Completed, Decoding, Denoising, Encoding, Failed, Queued, Unspecified};
    match from {
        Unspecified => to == Queued,
        Queued => matches!(to, Queued | Encoding | Failed | Cancelled),
        Encoding => matches!(to, Queued | Encoding | Denoising | Decoding | Failed | Cancelled),
        Denoising => matches!(to, Queued | Denoising | Decoding | Failed | Cancelled),
        Decoding => matches!(to, Queued | Decoding | Completed | Failed | Cancelled),
        Completed | Failed | Cancelled => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [(&str, GenerationState); 8] = [
        ("(none)", GenerationState::Unspecified),
        ("queued", GenerationState::Queued),
        ("encoding", GenerationState::Encoding),
        ("denoising", GenerationState::Denoising),
        ("decoding", GenerationState::Decoding),
        ("completed", GenerationState::Completed),
        ("failed", GenerationState::Failed),
        ("cancelled", GenerationState::Cancelled),
    ];

    #[test]
    fn the_table_in_the_docs_says_what_the_code_does() {
        let docs = include_str!("../../../docs/generations.md");
        for (name, from) in STATES {
            let row = docs.lines().find(|line| line.starts_with(&format!("| {name} |")));
            let row = row.unwrap_or_else(|| panic!("no row for {name}"));
            let cells: Vec<&str> = row.split('|').map(str::trim).skip(2).take(STATES.len() - 1).collect();
            let allowed: Vec<bool> = STATES[1..].iter().map(|(_, to)| may_follow(from, *to)).collect();
            assert_eq!(cells.iter().map(|cell| *cell == "yes").collect::<Vec<_>>(), allowed, "{row}");
        }
    }

    #[test]
    fn nothing_follows_an_end_and_every_other_state_can_be_cancelled_once_it_is_there() {
        for (_, from) in STATES {
            let any = STATES.iter().any(|(_, to)| may_follow(from, *to));
            assert_eq!(any, !is_terminal(from), "{from:?}");
            let cancellable = !is_terminal(from) && from != GenerationState::Unspecified;
            assert_eq!(may_follow(from, GenerationState::Cancelled), cancellable, "{from:?}");
        }
    }
}
