//! The text stage over a small checkpoint.

use super::*;

fn small() -> (tempfile::TempDir, TextEncoder) {
    let folder = tempfile::tempdir().unwrap();
    crate::synth::tiny(folder.path(), 3).unwrap();
    let encoder = TextEncoder::open(folder.path(), &Setup::default()).unwrap();
    (folder, encoder)
}

fn picture() -> Rgb8 {
    Rgb8::new(24, 32, (0..24 * 32 * 3).map(|i| (i * 7 % 251) as u8).collect()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn encodes_both_branches_and_says_how_long_the_prompt_is() -> Result<()> {
    let (_folder, encoder) = small();
    let states = encoder.encode("a person speaks", &picture(), 64, 96)?;
    // One token a byte.
    assert_eq!(states.prompt_tokens, QUALITY_PREFIX.len() + "a person speaks".len());
    for branch in [&states.positive, &states.negative] {
        assert_eq!(branch.states.dim(0)?, branch.mask.len());
        assert!(values(&branch.states).iter().chain(&values(&branch.pooled)).all(|v| v.is_finite()));
    }
    assert_ne!(values(&states.positive.pooled), values(&states.negative.pooled));
    // The sum of the mask is the number of valid rows; the rows behind them are padding, and all alike.
    let valid = states.positive.mask.iter().sum::<i64>() as usize;
    let rows = states.positive.states.to_vec2::<f32>()?;
    assert!(valid < rows.len() && rows[valid..].windows(2).all(|pair| pair[0] == pair[1]));
    assert_ne!(rows[valid - 1], rows[valid]);
    Ok(())
}

#[test]
fn layers_of_the_llama_that_come_and_go_are_held_two_at_a_time_and_change_no_bit() -> Result<()> {
    let (_folder, encoder) = small();
    let states = || -> Result<Vec<f32>> {
        let states = encoder.encode("a person speaks", &picture(), 64, 96)?;
        Ok([&states.positive.states, &states.negative.states].map(values).concat())
    };
    let all = states()?;
    let sizes = encoder.swap().sizes();
    let (layers, whole, most) = (sizes.len(), sizes.iter().sum::<u64>(), *sizes.iter().max().unwrap());
    assert!(layers >= 3 && most > 0, "{sizes:?}");
    assert_eq!(encoder.swap().held_bytes(), whole);
    for resident in [0, 1] {
        encoder.swap().keep(resident, || std::time::Duration::ZERO);
        assert!(states()? == all, "{resident} layers stay");
        let told = encoder.swap().told();
        assert_eq!((told.blocks, told.resident), (layers, resident));
        let stay: u64 = sizes.iter().rev().take(resident).sum();
        assert!(told.held_bytes <= stay + 2 * most, "{told:?} of {sizes:?}");
        // Of three layers one that stays and two that move are all.
        assert!(resident > 0 || told.held_bytes < whole, "{told:?} of {sizes:?}");
    }
    encoder.swap().keep(layers, || std::time::Duration::ZERO);
    assert!(states()? == all && encoder.unswapped_bytes() > 0);
    Ok(())
}

#[test]
fn a_prompts_tokens_are_counted_as_they_are_read() -> Result<()> {
    let (_folder, encoder) = small();
    let read = |prompt: &str| encoder.encode_cut(prompt, &picture(), 64, 96).map(|states| states.prompt_tokens_kept);
    let long = "waves ".repeat(400);
    for prompt in ["", "a person speaks", long.as_str()] {
        assert_eq!(encoder.prompt_tokens(prompt)?, read(prompt)?);
    }
    Ok(())
}

#[test]
fn a_prompt_is_refused_with_its_token_count_never_cut() -> Result<()> {
    let (_folder, encoder) = small();
    let limit = encoder.encode("", &picture(), 64, 64)?.prompt_token_limit;
    let longest = "a".repeat(limit - QUALITY_PREFIX.len());
    assert_eq!(encoder.encode(&longest, &picture(), 64, 64)?.prompt_tokens, limit);
    let error = encoder.encode(&format!("{longest}b"), &picture(), 64, 64).unwrap_err();
    assert_eq!(error.to_string(), format!("prompt: {} tokens, the limit is {limit}", limit + 1));
    let error = encoder.encode(&"a".repeat(10 << 20), &picture(), 64, 64).unwrap_err().to_string();
    assert!(error.starts_with("prompt: 10485817 bytes, the limit is "), "{error}");
    Ok(())
}

#[test]
fn a_prompt_may_not_spell_the_pictures_token() {
    let (_folder, encoder) = small();
    let error = encoder.encode("show <image> twice", &picture(), 64, 64).unwrap_err().to_string();
    assert_eq!(error, "prompt: it spells a token that stands for the picture or for padding");
}

#[test]
fn a_text_begins_with_one_bos_and_clip_keeps_its_end() -> Result<()> {
    let (_folder, encoder) = small();
    let tokens = encoder.llava_tokens.encode("hello")?;
    let bos = tokens.ids[0];
    assert_eq!(tokens.ids.iter().filter(|id| **id == bos).count(), 1);
    assert_eq!(tokens.ids.len(), tokens.mask.len());
    let long = encoder.clip_tokens.encode(&"x".repeat(300))?;
    let eot = *long.ids.last().unwrap();
    assert_eq!((long.ids.len(), long.ids[75], long.prompt), (77, i64::from(b'x'), 300));
    assert_eq!(long.ids.iter().filter(|id| **id == eot).count(), 1);
    let short = encoder.clip_tokens.encode("x")?;
    assert_eq!((short.mask.iter().sum::<i64>(), &short.ids[2..4]), (3, &[eot, eot][..]));
    Ok(())
}

#[test]
fn the_caller_who_says_nothing_gets_the_quality_words_alone() {
    assert_eq!(positive_prompt(" \n"), DEFAULT_PROMPT);
    assert_eq!(positive_prompt("a man"), format!("{QUALITY_PREFIX}a man"));
}

#[test]
fn sizes_of_nothing_are_refused() {
    let (_folder, encoder) = small();
    let error = encoder.encode("a", &picture(), 0, 64).unwrap_err().to_string();
    assert_eq!(error, "width: 0 pixels, expected 1 to 8192");
}

/// Prompts whose number of tokens is their number of bytes, as the small checkpoint has one token a byte.
const SCRIPTS: [&str; 9] = [
    "一个女人对着镜头平静地说话。",
    "امرأة تتحدث بهدوء إلى الكاميرا",
    "👩🏽\u{200d}🚀 speaks 🗣\u{fe0f}, 🇪🇪",
    "e\u{301}a\u{308}\u{323}o\u{304}\u{301} n\u{303}",
    "ก\u{e34}น\u{e4d}\u{e49}า ಕ\u{ccd}ಷ ক\u{9cd}ষ",
    "\u{202e}abc\u{202c} \u{200f}\u{feff}",
    "𝒜\u{10ffff}\u{fffd}\u{1}",
    "ﷺ ǅ İ ß ﬁ",
    "\u{1100}\u{1161}\u{11a8} 각",
];

#[test]
fn prompts_in_any_script_are_counted_and_cut_between_characters() -> Result<()> {
    let (_folder, encoder) = small();
    let limit = encoder.llava_tokens.limit();
    for words in SCRIPTS {
        let tokens = encoder.llava_tokens.encode(&positive_prompt(words))?;
        assert_eq!(tokens.prompt, QUALITY_PREFIX.len() + words.len(), "{words:?}");
        encoder.clip_tokens.encode(words)?;
        // Each start moves the limit to another place within a character.
        for start in ["", "a", "ab", "abc"] {
            let long = positive_prompt(&format!("{start}{}", words.repeat(limit / words.len() + 2)));
            let (kept, total) = encoder.llava_tokens.cut(&long)?;
            assert_eq!((total, long.starts_with(kept)), (long.len(), true), "{words:?}");
            let next = long[kept.len()..].chars().next().unwrap();
            assert!(kept.len() <= limit && kept.len() + next.len_utf8() > limit, "{words:?}: {}", kept.len());
            assert_eq!(encoder.llava_tokens.encode(kept)?.prompt, kept.len());
        }
    }
    Ok(())
}

#[test]
fn a_prompt_is_cut_only_when_asked_and_both_counts_are_given() -> Result<()> {
    let (_folder, encoder) = small();
    let limit = encoder.llava_tokens.limit();
    let words = "é".repeat(limit);
    let states = encoder.encode_cut(&words, &picture(), 64, 64)?;
    let total = QUALITY_PREFIX.len() + words.len();
    let kept = QUALITY_PREFIX.len() + (limit - QUALITY_PREFIX.len()) / 2 * 2;
    assert_eq!((states.prompt_tokens, states.prompt_tokens_kept, states.prompt_token_limit), (total, kept, limit));
    assert_eq!((states.clip_tokens, states.clip_tokens_kept), (kept, 75));
    let whole = encoder.encode_cut("a", &picture(), 64, 64)?;
    assert_eq!((whole.prompt_tokens, whole.prompt_tokens_kept), (QUALITY_PREFIX.len() + 1, QUALITY_PREFIX.len() + 1));
    assert_eq!(values(&whole.positive.states), values(&encoder.encode("a", &picture(), 64, 64)?.positive.states));
    let error = encoder.encode_cut("show <image> twice", &picture(), 64, 64).unwrap_err().to_string();
    assert!(error.starts_with("prompt: it spells a token"), "{error}");
    Ok(())
}

proptest::proptest! {
    #[test]
    fn any_text_is_cut_to_its_longest_beginning_that_fits(words in "\\PC{0,300}") {
        static ENCODER: std::sync::LazyLock<(tempfile::TempDir, TextEncoder)> = std::sync::LazyLock::new(small);
        let tokens = &ENCODER.1.llava_tokens;
        if let Ok((kept, total)) = tokens.cut(&words) {
            proptest::prop_assert!(words.starts_with(kept) && tokens.encode(kept).unwrap().prompt <= tokens.limit());
            proptest::prop_assert_eq!(total, words.len());
        }
    }
}
