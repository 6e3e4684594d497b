//! Files that lie about themselves, in each form: refused at once, and without memory for what they claim.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use candle_core::quantized::GgmlDType;
use model::{blueprint::Network, checkpoint::Setup, diffusion::DiffusionStage};
use service_kit::memory;

use super::{
    blocks::write_gguf,
    official::{native, stage},
    pickles,
    sheet::{Plain, Sheet, write},
};

const TIME: Duration = Duration::from_secs(1);
/// The files have 3 MB, the longest claims 2^60.
const HEAP: u64 = 16 << 20;

const SAFETENSORS: &str = "model.safetensors";
const PYTORCH: &str = "model.pt";
const GGUF: &str = "model.gguf";

/// A sound file of tensors.
fn sound(folder: &Path, name: &str, sheet: &Sheet) -> Vec<u8> {
    let file = folder.join(name);
    match name {
        SAFETENSORS => write(&file, sheet),
        PYTORCH => pickles::write(&file, None, sheet),
        _ => write_gguf(&file, Network::Transformer, sheet, GgmlDType::Q8_0),
    }
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    bytes
}

/// Puts `new` so many bytes behind the start of every header of this kind.
fn patched(mut file: Vec<u8>, signature: &[u8], behind: usize, new: &[u8]) -> Vec<u8> {
    let starts: Vec<usize> =
        file.windows(signature.len()).enumerate().filter(|(_, bytes)| *bytes == signature).map(|(at, _)| at).collect();
    assert!(!starts.is_empty());
    for start in starts {
        file[start + behind..][..new.len()].copy_from_slice(new);
    }
    file
}

/// What is wrong, the file, its bytes, and what the refusal says.
type Hostile = (&'static str, &'static str, Vec<u8>, &'static str);

fn hostile(folder: &Path) -> Vec<Hostile> {
    let good = stage(folder.parent().unwrap(), "diffusion");
    fs::remove_file(folder.join(SAFETENSORS)).unwrap();
    let mut spoilt = good.clone();
    let bias = spoilt.get_mut("img_in.proj.bias").unwrap();
    *bias = Plain::f32(&bias.shape.clone(), &vec![f32::NAN; bias.shape[0]]);
    let of = |name: &str| sound(folder, name, &good);
    let half = |name: &str| {
        let mut file = of(name);
        file.truncate(file.len() / 2);
        file
    };
    let code = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints/hostile_os_system.pt")).unwrap();
    let huge = (1u64 << 60).to_le_bytes();
    let central = b"PK\x01\x02";
    vec![
        ("truncated", SAFETENSORS, half(SAFETENSORS), "not fully covered"),
        ("truncated", PYTORCH, half(PYTORCH), "truncated"),
        ("truncated", GGUF, half(GGUF), "the file ends at"),
        ("another magic", SAFETENSORS, [&b"\x7fELF\x02\x01\x01\0"[..], &of(SAFETENSORS)[8..]].concat(), "too large"),
        ("another magic", PYTORCH, [&b"\x7fELF"[..], &of(PYTORCH)[4..]].concat(), "neither"),
        ("another magic", GGUF, [&b"\x7fELF"[..], &of(GGUF)[4..]].concat(), "neither"),
        ("a header of 2^60 bytes", SAFETENSORS, [&huge[..], &of(SAFETENSORS)[8..]].concat(), "too large"),
        ("2^60 tensors", GGUF, patched(of(GGUF), b"GGUF", 8, &huge), "room for"),
        ("2^60 entries", GGUF, patched(of(GGUF), b"GGUF", 16, &huge), "room for"),
        ("a key of 2^60 bytes", GGUF, patched(of(GGUF), b"GGUF", 24, &huge), "room for"),
        ("a zip bomb of compressed records", PYTORCH, patched(of(PYTORCH), central, 10, &[8, 0]), "compressed"),
        ("a zip bomb of records of 4 GiB", PYTORCH, patched(of(PYTORCH), central, 20, &[0xfe; 8]), "past the end"),
        ("a zip bomb of one record many times", PYTORCH, patched(of(PYTORCH), central, 42, &[0; 4]), "overlaps"),
        ("a pickle that runs a command", PYTORCH, code, "refuses global"),
        ("no number", SAFETENSORS, sound(folder, SAFETENSORS, &spoilt), "not finite"),
        ("no number", PYTORCH, sound(folder, PYTORCH, &spoilt), "not finite"),
        ("no number", GGUF, sound(folder, GGUF, &spoilt), "not finite"),
    ]
}

#[test]
fn hostile_files_of_each_form_are_refused_at_once_and_in_bounded_memory() {
    let models = native();
    let folder = models.path().join("diffusion");
    for (what, name, bytes, part) in hostile(&folder) {
        let file = folder.join(name);
        fs::write(&file, &bytes).unwrap();
        drop(bytes);
        let before = memory::current_bytes();
        memory::reset_peak();
        let begin = Instant::now();
        let refused = DiffusionStage::open(models.path(), &Setup::default()).err();
        let (took, grown) = (begin.elapsed(), memory::peak_bytes().saturating_sub(before));
        let reason = refused.unwrap_or_else(|| panic!("{name}: {what}: it was opened")).to_string();
        println!("{name}: {what}: {took:?}, {grown} bytes: {reason}");
        assert!(reason.contains(part) && reason.contains(name), "{name}: {what}: {reason}");
        assert!(took < TIME && grown < HEAP, "{name}: {what}: {took:?}, {grown} bytes");
        fs::remove_file(&file).unwrap();
    }
}
