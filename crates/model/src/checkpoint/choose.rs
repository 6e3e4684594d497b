//! Which files of an official folder hold its tensors.

use std::path::{Path, PathBuf};

use super::Choice;
use crate::{Error, Result, weights::Weights};

const BF16: &str = "mp_rank_00_model_states.pt";
const FP8: &str = "mp_rank_00_model_states_fp8.pt";
const FP8_MAP: &str = "mp_rank_00_model_states_fp8_map.pt";
/// The same weights as others redistribute them.
const SAFETENSORS_BF16: &str = "hunyuan_video_avatar_720_bf16.safetensors";
const SAFETENSORS_INT8: &str = "hunyuan_video_avatar_720_quanto_bf16_int8.safetensors";

/// The transformer's files.
///
/// Errors: none of the accepted ones is there, or the fp8 weights lack their map of scales.
pub(super) fn transformer(folder: &Path, choice: Choice) -> Result<Vec<PathBuf>> {
    let accepted: &[&str] = match choice {
        Choice::Auto => &[BF16, FP8, SAFETENSORS_BF16, SAFETENSORS_INT8],
        Choice::Bf16 => &[BF16, SAFETENSORS_BF16],
        Choice::Fp8 => &[FP8],
        Choice::Int8 => &[SAFETENSORS_INT8],
    };
    let Some(name) = accepted.iter().find(|name| folder.join(name).is_file()) else {
        return Err(Error::file(folder, format!("none of its files is there: looked for {}", accepted.join(", "))));
    };
    let mut files = vec![folder.join(name)];
    if *name == FP8 {
        let map = folder.join(FP8_MAP);
        if !map.is_file() {
            return Err(Error::file(&map, format!("it is missing, and {FP8} needs its scales")));
        }
        files.push(map);
    }
    Ok(files)
}

/// The files of a folder that may hold the same tensors several times, as a repository of models does.
///
/// Safetensors come before pickles, whole files before others of the same form, an index before both.
pub(super) fn one_form(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
    let mut paths: Vec<PathBuf> =
        listing.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| p.is_file()).collect();
    paths.sort();
    for (index, whole, endings) in [
        ("model.safetensors.index.json", "model.safetensors", &["safetensors"][..]),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", &["bin", "pt", "pth"]),
    ] {
        let named = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        if let Some(index) = named(index) {
            return Weights::files_of_index(&index);
        }
        if let Some(whole) = named(whole) {
            return Ok(vec![whole]);
        }
        let of_form: Vec<PathBuf> = paths
            .iter()
            .filter(|path| path.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending)))
            .cloned()
            .collect();
        if !of_form.is_empty() {
            return Ok(of_form);
        }
    }
    Weights::files_of(folder)
}
