//! The product on a card, from a picture and a sound to a video.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use model::synth;

/// Runs the product on a model, a picture and a sound that are made here; its seconds.
pub(super) fn generated(avatar: &Path) -> Result<f64> {
    let folder = std::env::temp_dir().join(format!("gpu-suite-generation-{}", std::process::id()));
    let outcome = generate(avatar, &folder);
    // What is left of it matters to nobody.
    let _ = std::fs::remove_dir_all(&folder);
    outcome
}

fn generate(avatar: &Path, folder: &Path) -> Result<f64> {
    let models = folder.join("models");
    synth::tiny(&models, 1)?;
    let (picture, sound, out) = (folder.join("picture.ppm"), folder.join("sound.wav"), folder.join("out.mp4"));
    std::fs::write(&picture, [b"P6 256 256 255\n".as_slice(), &[128; 256 * 256 * 3]].concat())?;
    std::fs::write(&sound, silence())?;
    let begin = Instant::now();
    let given = [("--models", &models), ("--image", &picture), ("--audio", &sound), ("--out", &out)];
    let done = Command::new(avatar)
        .arg("generate")
        .args(given.iter().flat_map(|(flag, path): &(&str, &PathBuf)| [(*flag).as_ref(), path.as_os_str()]))
        .args(["--device", "cuda:0", "--compute", "bf16", "--tier", "maximum", "--steps", "2", "--prompt", "A person."])
        .output()
        .with_context(|| avatar.display().to_string())?;
    if !done.status.success() || !out.is_file() {
        bail!("{}: {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(begin.elapsed().as_secs_f64())
}

/// One second of it, 16 kHz, 16 bits, one channel.
fn silence() -> Vec<u8> {
    const RATE: u32 = 16_000;
    let mut wav = b"RIFF".to_vec();
    wav.extend((36 + 2 * RATE).to_le_bytes());
    wav.extend(b"WAVEfmt ");
    wav.extend(16u32.to_le_bytes());
    wav.extend([1u16, 1].map(u16::to_le_bytes).concat());
    wav.extend([RATE, 2 * RATE].map(u32::to_le_bytes).concat());
    wav.extend([2u16, 16].map(u16::to_le_bytes).concat());
    wav.extend(b"data");
    wav.extend((2 * RATE).to_le_bytes());
    wav.resize(wav.len() + 2 * RATE as usize, 0);
    wav
}
