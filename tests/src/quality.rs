//! What the demo's model makes, measured: whether the mouth follows the voice, and whether the rest stays.
//!
//! A folder of clips holds, for each, `NN.png` (the portrait), `NN.wav` (the speech), `NN.json` (the mouth's box, and how
//! far it is open in each frame that was drawn for this speech) and `NN.still.png` (white where those frames stand
//! still); `models/demo/train/held_out.py` draws them. The videos are `NN-own.mp4`, with the clip's speech, and
//! `NN-MM.mp4`, with that of clip MM, in a folder of theirs.
//!
//! With another clip's speech the mouth should not move as it was drawn for the clip's own. But any two sentences have
//! something in common: both begin and end with a closed mouth. So this is looked at in the frames in which both
//! speak; there two drawn mouths have nothing in common, and a figure of 0 is that of a mouth which knows nothing of the
//! speech that it does not hear. That of the whole clips, and those of the two drawn mouths, stand beside it.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Frames by which the mouth is looked for early and late.
pub const LAGS: i32 = 3;
/// Columns on each side of the mouth's middle that are looked at.
const HALF: usize = 8;
/// Rows at the bottom of the mouth's box that are skin.
const SKIN_ROWS: usize = 3;
/// Share of its range above which a mouth is open.
const OPEN: f64 = 0.05;

/// What is known of a clip.
#[derive(Debug, Clone, Deserialize)]
struct Truth {
    /// Left, top, right, bottom, in pixels; the right column and the bottom row are outside.
    mouth_box: [usize; 4],
    /// How far the drawn mouth is open, frame by frame, as [`opening`] measures it.
    opening: Vec<f64>,
}

/// Frames of one size, RGB, 8 bits.
#[derive(Debug)]
struct Frames {
    width: usize,
    height: usize,
    data: Vec<Vec<u8>>,
}

/// The figures of one clip.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The clip.
    pub clip: String,
    /// Frames that were compared.
    pub frames: usize,
    /// Correlation of the mouth's opening with the drawn one.
    pub correlation: f64,
    /// Frames by which the video is late where the correlation is highest.
    pub best_lag: i32,
    /// The same clip with other clips' speech; nothing without such videos.
    pub others: Vec<Other>,
    /// PSNR in dB of what stands still, against the portrait.
    pub still_psnr: f64,
    /// Mean change from frame to frame of what stands still, in levels of 255.
    pub flicker: f64,
    /// Mean change of the whole frame at the borders of windows, by that elsewhere; nothing in a single window.
    pub seam: Option<f64>,
}

/// A clip with another clip's speech: correlations of mouths' openings.
#[derive(Debug, Clone, Serialize)]
pub struct Other {
    /// The clip whose speech it is.
    pub heard: String,
    /// With the clip's own drawn mouth, in the frames in which both clips speak.
    pub own: f64,
    /// Of the two drawn mouths in the same frames.
    pub drawn: f64,
    /// As `own`, in all frames.
    pub own_everywhere: f64,
    /// As `drawn`, in all frames.
    pub drawn_everywhere: f64,
    /// With the mouth that was drawn for the speech, in all frames.
    pub followed: f64,
}

/// Medians over clips.
#[derive(Debug, Clone, Serialize)]
pub struct Medians {
    /// See [`Row::correlation`].
    pub correlation: f64,
    /// See [`Row::best_lag`].
    pub best_lag: f64,
    /// Of all videos with other speech, see [`Other`].
    pub others: Option<OtherMedians>,
    /// See [`Row::still_psnr`].
    pub still_psnr: f64,
    /// See [`Row::flicker`].
    pub flicker: f64,
    /// See [`Row::seam`].
    pub seam: Option<f64>,
}

/// Medians over videos with other speech, see [`Other`].
#[derive(Debug, Clone, Copy, Serialize)]
pub struct OtherMedians {
    /// Videos.
    pub videos: usize,
    /// See [`Other::own`].
    pub own: f64,
    /// See [`Other::drawn`].
    pub drawn: f64,
    /// See [`Other::own_everywhere`].
    pub own_everywhere: f64,
    /// See [`Other::drawn_everywhere`].
    pub drawn_everywhere: f64,
    /// See [`Other::followed`].
    pub followed: f64,
}

/// How the videos are made.
#[derive(Debug, Clone)]
pub struct Make {
    /// The program.
    pub avatar: PathBuf,
    /// Its models.
    pub models: PathBuf,
    /// More flags of `avatar generate`.
    pub flags: Vec<String>,
    /// Other clips whose speech each clip gets too.
    pub others: usize,
}

/// Names of the clips in a folder, in order.
///
/// Errors: there is none.
pub fn clips(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".json").map(str::to_owned));
    }
    names.sort();
    ensure!(!names.is_empty(), "{}: there is no clip (NN.json) in this folder", folder.display());
    Ok(names)
}

/// The other clips whose speech a clip gets: so many, as far apart as there are clips.
fn others(clip: usize, clips: usize, wanted: usize) -> Vec<usize> {
    let wanted = wanted.min(clips.saturating_sub(1));
    (0..wanted).map(|i| (clip + 1 + i * (clips - 1) / wanted) % clips).collect()
}

/// Makes the videos that are missing: of each clip with its speech, and with that of other clips.
///
/// Errors: a program fails.
pub fn make(make: &Make, folder: &Path, names: &[String], videos: &Path) -> Result<()> {
    fs::create_dir_all(videos)?;
    for (number, name) in names.iter().enumerate() {
        let others = others(number, names.len(), make.others).into_iter().map(|other| (&names[other], &names[other]));
        for (speech, kind) in std::iter::once((name, &"own".to_owned())).chain(others) {
            let out = videos.join(format!("{name}-{kind}.mp4"));
            if out.exists() {
                continue;
            }
            let done = Command::new(&make.avatar)
                .args(["generate", "--quiet", "--prompt", "A person speaks.", "--models"])
                .arg(&make.models)
                .arg("--image")
                .arg(folder.join(format!("{name}.png")))
                .arg("--audio")
                .arg(folder.join(format!("{speech}.wav")))
                .arg("--out")
                .arg(&out)
                .args(&make.flags)
                .output()
                .with_context(|| make.avatar.display().to_string())?;
            ensure!(done.status.success(), "{}: {}", out.display(), String::from_utf8_lossy(&done.stderr));
        }
    }
    Ok(())
}

/// Measures the videos of these clips; those that are not there are left out. `window` is the number of frames of a
/// window, for the seams.
///
/// Errors: a file cannot be read, has another size than its portrait, or no clip has a video.
pub fn measure(folder: &Path, names: &[String], videos: &Path, window: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for name in names {
        let own = videos.join(format!("{name}-own.mp4"));
        if own.exists() {
            rows.push(row(folder, (name, names), videos, window).with_context(|| own.display().to_string())?);
        }
    }
    ensure!(!rows.is_empty(), "{}: there is no video (NN-own.mp4) of a clip", videos.display());
    Ok(rows)
}

fn row(folder: &Path, (name, names): (&str, &[String]), videos: &Path, window: usize) -> Result<Row> {
    let truth = Truth::read(&folder.join(format!("{name}.json")))?;
    let portrait = Frames::read(&folder.join(format!("{name}.png")), None)?;
    let size = Some((portrait.width, portrait.height));
    let still = Frames::read(&folder.join(format!("{name}.still.png")), size)?;
    let own = Frames::read(&videos.join(format!("{name}-own.mp4")), size)?;
    let measured = opening(&own, truth.mouth_box)?;
    let by_lag: Vec<f64> = (-LAGS..=LAGS).map(|lag| correlation(&measured, &truth.opening, lag)).collect();
    let best = (0..by_lag.len()).max_by(|&a, &b| by_lag[a].total_cmp(&by_lag[b])).unwrap_or_default();
    let mut others = Vec::new();
    for heard in names {
        let video = videos.join(format!("{name}-{heard}.mp4"));
        if heard != name && video.exists() {
            let mouth = opening(&Frames::read(&video, size)?, truth.mouth_box)?;
            let other = Truth::read(&folder.join(format!("{heard}.json")))?;
            others.push(Other::of(heard, &mouth, (&truth.opening, &other.opening)));
        }
    }
    let (Some(portrait), Some(still)) = (portrait.data.first(), still.data.first()) else { bail!("no picture") };
    let still: Vec<bool> = still.iter().map(|&level| level > 127).collect();
    let everywhere = vec![true; still.len()];
    let changes: Vec<f64> = own.data.windows(2).map(|pair| change(&pair[0], &pair[1], &everywhere)).collect();
    let flicker = own.data.windows(2).map(|pair| change(&pair[0], &pair[1], &still)).sum::<f64>();
    Ok(Row {
        clip: name.to_owned(),
        frames: measured.len().min(truth.opening.len()),
        correlation: by_lag[LAGS as usize],
        best_lag: best as i32 - LAGS,
        others,
        still_psnr: psnr(&own.data, portrait, &still),
        flicker: flicker / changes.len().max(1) as f64,
        seam: seam(&changes, window),
    })
}

impl Truth {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }
}

impl Other {
    /// What a mouth that heard clip `heard` has in common with the two drawn ones.
    fn of(heard: &str, mouth: &[f64], (own, other): (&[f64], &[f64])) -> Self {
        let both = {
            let (own, other) = (speaks(own), speaks(other));
            own.start.max(other.start)..own.end.min(other.end)
        };
        let within = |values: &[f64]| values.get(both.clone()).map(<[f64]>::to_vec).unwrap_or_default();
        let while_both_speak = |a: &[f64], b: &[f64]| correlation(&within(a), &within(b), 0);
        Self {
            heard: heard.to_owned(),
            own: while_both_speak(mouth, own),
            drawn: while_both_speak(other, own),
            own_everywhere: correlation(mouth, own, 0),
            drawn_everywhere: correlation(other, own, 0),
            followed: correlation(mouth, other, 0),
        }
    }
}

/// The frames from the first to the last one in which a mouth is open.
fn speaks(opening: &[f64]) -> std::ops::Range<usize> {
    let (least, most) = opening.iter().fold((f64::MAX, f64::MIN), |(least, most), &v| (least.min(v), most.max(v)));
    let open = |value: &&f64| **value > least + OPEN * (most - least);
    let first = opening.iter().position(|value| open(&value)).unwrap_or(0);
    let last = opening.iter().rposition(|value| open(&value)).map_or(first, |last| last + 1);
    first..last
}

impl Frames {
    /// Reads a picture or a video; its size must be `size`, if that is given.
    fn read(path: &Path, size: Option<(usize, usize)>) -> Result<Self> {
        let probe = Command::new("ffprobe")
            .args(["-v", "error", "-select_streams", "v:0", "-show_entries", "stream=width,height", "-of", "csv=p=0"])
            .arg(path)
            .output()
            .context("ffprobe")?;
        let told = String::from_utf8_lossy(&probe.stdout);
        let found = told.trim().split_once(',').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        let (width, height): (usize, usize) =
            found.with_context(|| format!("{}: {}", path.display(), String::from_utf8_lossy(&probe.stderr)))?;
        if let Some((w, h)) = size {
            ensure!((width, height) == (w, h), "{}: {width}x{height}, and not {w}x{h}", path.display());
        }
        let decoded = Command::new("ffmpeg")
            .args(["-v", "error", "-i"])
            .arg(path)
            .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
            .output()
            .context("ffmpeg")?;
        let bytes = width * height * 3;
        ensure!(decoded.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&decoded.stderr));
        ensure!(bytes > 0 && decoded.stdout.len() % bytes == 0, "{}: a frame is cut", path.display());
        Ok(Self { width, height, data: decoded.stdout.chunks_exact(bytes).map(<[u8]>::to_vec).collect() })
    }
}

/// How far the mouth is open in each frame, 0 to 1: how much darker in green and blue the middle of its box is than the
/// skin at the box's bottom.
fn opening(frames: &Frames, [left, top, right, bottom]: [usize; 4]) -> Result<Vec<f64>> {
    let middle = left.midpoint(right);
    let inside = middle >= HALF && middle + HALF <= frames.width && bottom <= frames.height;
    ensure!(inside && bottom >= top + SKIN_ROWS, "the mouth's box is outside the frame");
    let of_frame = |data: &Vec<u8>| {
        let dark = |y: usize, x: usize| {
            let at = (y * frames.width + x) * 3;
            (f64::from(data[at + 1]) + f64::from(data[at + 2])) / 2.0
        };
        let columns = middle - HALF..middle + HALF;
        let below = (bottom - SKIN_ROWS..bottom).flat_map(|y| columns.clone().map(move |x| (y, x)));
        let skin = median(below.map(|(y, x)| dark(y, x)).collect()).unwrap_or(1.0).max(1.0);
        let all = (top..bottom).flat_map(|y| columns.clone().map(move |x| (y, x)));
        let parts: Vec<f64> = all.map(|(y, x)| ((skin - dark(y, x)) / skin).clamp(0.0, 1.0)).collect();
        parts.iter().sum::<f64>() / parts.len() as f64
    };
    Ok(frames.data.iter().map(of_frame).collect())
}

/// Pearson's correlation where the video, `measured`, is late by `lag` frames; 0 where one of both does not change.
fn correlation(measured: &[f64], truth: &[f64], lag: i32) -> f64 {
    let (late, early) = (lag.max(0) as usize, (-lag).max(0) as usize);
    let pairs: Vec<(f64, f64)> =
        measured.iter().skip(late).zip(truth.iter().skip(early)).map(|(&a, &b)| (a, b)).collect();
    let n = pairs.len().max(1) as f64;
    let (a, b) = pairs.iter().fold((0.0, 0.0), |(a, b), pair| (a + pair.0 / n, b + pair.1 / n));
    let sums = pairs.iter().fold((0.0, 0.0, 0.0), |(ab, aa, bb), pair| {
        let (da, db) = (pair.0 - a, pair.1 - b);
        (ab + da * db, aa + da * da, bb + db * db)
    });
    // Of what does not change, rounding is left.
    if sums.1.min(sums.2) < 1e-12 { 0.0 } else { sums.0 / (sums.1 * sums.2).sqrt() }
}

/// PSNR in dB of the frames against one picture, where `wanted`, byte by byte.
fn psnr(frames: &[Vec<u8>], picture: &[u8], wanted: &[bool]) -> f64 {
    let bytes = frames.iter().flat_map(|frame| frame.iter().zip(picture).zip(wanted));
    let wanted = bytes.filter(|(_, wanted)| **wanted).map(|((a, b), _)| f64::from(a.abs_diff(*b)).powi(2));
    let (sum, count) = wanted.fold((0.0, 0.0), |(sum, count), square| (sum + square, count + 1.0));
    10.0 * (255.0 * 255.0 / (sum / f64::max(count, 1.0)).max(1e-9)).log10()
}

/// Mean change from one frame to the next, where `wanted`, in levels.
fn change(a: &[u8], b: &[u8], wanted: &[bool]) -> f64 {
    let pairs = a.iter().zip(b).zip(wanted).filter(|(_, wanted)| **wanted);
    let (sum, count) = pairs.fold((0.0, 0.0), |(sum, n), ((a, b), _)| (sum + f64::from(a.abs_diff(*b)), n + 1.0));
    sum / f64::max(count, 1.0)
}

/// The mean change at borders of windows of so many frames, by that elsewhere; nothing where there is no border.
fn seam(changes: &[f64], window: usize) -> Option<f64> {
    let mean = |border: bool| {
        let of =
            changes.iter().enumerate().filter(|(i, _)| ((i + 1) % window == 0) == border).map(|(_, change)| *change);
        let all: Vec<f64> = of.collect();
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    };
    Some(mean(true)? / mean(false)?.max(1e-9))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(values[middle - 1].midpoint(values[middle])),
    }
}

/// Medians of rows.
#[must_use]
pub fn medians(rows: &[Row]) -> Medians {
    let of = |figure: &dyn Fn(&Row) -> Option<f64>| median(rows.iter().filter_map(figure).collect());
    let of_others = |figure: fn(&Other) -> f64| median(rows.iter().flat_map(|row| &row.others).map(figure).collect());
    let others = || {
        Some(OtherMedians {
            videos: rows.iter().map(|row| row.others.len()).sum(),
            own: of_others(|other| other.own)?,
            drawn: of_others(|other| other.drawn)?,
            own_everywhere: of_others(|other| other.own_everywhere)?,
            drawn_everywhere: of_others(|other| other.drawn_everywhere)?,
            followed: of_others(|other| other.followed)?,
        })
    };
    Medians {
        correlation: of(&|row| Some(row.correlation)).unwrap_or_default(),
        best_lag: of(&|row| Some(f64::from(row.best_lag))).unwrap_or_default(),
        others: others(),
        still_psnr: of(&|row| Some(row.still_psnr)).unwrap_or_default(),
        flicker: of(&|row| Some(row.flicker)).unwrap_or_default(),
        seam: of(&|row| row.seam),
    }
}

/// A table of rows and their medians, as Markdown.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = "| clip | frames | correlation | best lag | other speech | of drawn mouths | all frames | of drawn mouths | follows it | \
                    still, dB | flicker | seam |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
    let mut line = |name: &str, frames: String, figures: &Medians| {
        let Medians { correlation, best_lag, others, still_psnr, flicker, seam } = figures;
        let of_others: [fn(&OtherMedians) -> f64; 5] =
            [|all| all.own, |all| all.drawn, |all| all.own_everywhere, |all| all.drawn_everywhere, |all| all.followed];
        let others = of_others.map(|figure| shown(others.as_ref().map(figure))).join(" | ");
        let seam = shown(*seam);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| {name} | {frames} | {correlation:.2} | {best_lag} | {others} | {still_psnr:.1} | {flicker:.2} | {seam} |"
        );
    };
    for row in rows {
        line(&row.clip, row.frames.to_string(), &medians(std::slice::from_ref(row)));
    }
    line("median", String::new(), &medians(rows));
    text
}

/// The same as JSON.
#[must_use]
pub fn json(rows: &[Row]) -> serde_json::Value {
    let median = serde_json::json!(medians(rows));
    serde_json::json!(BTreeMap::from([("clips", serde_json::json!(rows)), ("median", median)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_video_that_is_late_correlates_best_at_its_lag() {
        let truth: Vec<f64> = (0..60).map(|i| (f64::from(i) * 0.7).sin()).collect();
        let late: Vec<f64> = [0.0, 0.0].into_iter().chain(truth.iter().copied()).collect();
        let by_lag: Vec<f64> = (-LAGS..=LAGS).map(|lag| correlation(&late, &truth, lag)).collect();
        assert!((by_lag[5] - 1.0).abs() < 1e-9 && by_lag.iter().enumerate().all(|(i, c)| i == 5 || *c < 0.95));
        assert_eq!(correlation(&[1.0; 9], &truth, 0), 0.0);
        assert!((correlation(&truth.iter().map(|v| -v).collect::<Vec<_>>(), &truth, 0) + 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_two_mouths_have_in_common_by_being_closed_at_the_ends_is_left_out() {
        // Closed for 10 frames, open for 40 in which each follows a wave of its own, closed for 10.
        let speech = |pace: f64| -> Vec<f64> {
            let open = |i: i32| (10..50).contains(&i);
            (0..60).map(|i| if open(i) { 0.6 + 0.3 * (f64::from(i - 10) * pace).sin() } else { 0.1 }).collect()
        };
        let turn = std::f64::consts::TAU / 40.0;
        let (own, other) = (speech(4.0 * turn), speech(5.0 * turn));
        assert_eq!(speaks(&own), 10..50);
        assert_eq!(speaks(&[0.3; 9]), 0..0);
        let deaf = Other::of("01", &own, (&own, &other));
        assert!(deaf.own > 0.99 && deaf.drawn.abs() < 0.01 && deaf.drawn_everywhere > 0.4, "{deaf:?}");
        let hears = Other::of("01", &other, (&own, &other));
        assert!(hears.own.abs() < 0.01 && hears.followed > 0.99 && hears.own_everywhere > 0.4, "{hears:?}");
        let apart = Other::of("01", &own, (&own[..5], &other));
        assert_eq!((apart.own, apart.drawn), (0.0, 0.0), "they never speak at once");
    }

    #[test]
    fn each_clip_gets_other_clips_speech_and_never_its_own() {
        assert_eq!(others(0, 20, 1), [1]);
        assert_eq!(others(19, 20, 3), [0, 6, 12]);
        assert_eq!(others(1, 3, 9), [2, 0]);
        assert!(others(0, 1, 3).is_empty() && others(0, 3, 0).is_empty());
    }

    #[test]
    fn an_open_mouth_is_dark_and_a_closed_one_is_not() {
        let (width, height) = (32, 32);
        let frame = |open: bool| {
            let mut data = vec![200; width * height * 3];
            for y in 12..16 {
                (8..24).for_each(|x| data[(y * width + x) * 3..][..3].fill(if open { 20 } else { 200 }));
            }
            data
        };
        let frames = Frames { width, height, data: vec![frame(false), frame(true)] };
        let measured = opening(&frames, [8, 10, 24, 20]).unwrap();
        assert!(measured[0].abs() < 1e-9 && (measured[1] - 0.36).abs() < 1e-9, "{measured:?}");
        assert!(opening(&frames, [8, 10, 24, 40]).is_err());
    }

    #[test]
    fn noise_and_seams_are_found_where_they_are() {
        let picture = vec![100; 300];
        let frames = vec![vec![110; 300]; 2];
        let half: Vec<bool> = (0..300).map(|i| i < 150).collect();
        assert!((psnr(&frames, &picture, &half) - 28.13).abs() < 0.01);
        assert_eq!(change(&frames[0], &picture, &half), 10.0);
        let mut changes = vec![1.0; 11];
        changes[3] = 4.0;
        changes[7] = 4.0;
        assert_eq!(seam(&changes, 4), Some(4.0));
        assert_eq!(seam(&changes, 50), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0, 10.0]), Some(2.5));
    }
}
