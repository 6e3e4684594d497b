//! `avatar weights synth`: a random checkpoint.

use std::path::{Path, PathBuf};

use crate::{
    config::{SynthFlags, SynthSize},
    failure::Failure,
};

/// Writes a random checkpoint, whole or not at all, and says how large it is.
///
/// Errors: the folder is not empty, or cannot be written.
pub fn synth(flags: &SynthFlags) -> Result<String, Failure> {
    let SynthSize::Tiny = flags.size;
    let out = &flags.out;
    let wrong = |reason: String| Failure::input("out", format!("{}: {reason}", out.display()));
    match std::fs::read_dir(out) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(wrong("the folder is not empty; name a new one".to_owned()));
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(wrong(e.to_string())),
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    std::fs::create_dir_all(&parent).map_err(|e| wrong(e.to_string()))?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".avatar-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // What any new folder gets; the process's umask still applies.
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    let made = builder.tempdir_in(&parent).map_err(|e| wrong(e.to_string()))?;
    model::synth::tiny(made.path(), flags.seed).map_err(|e| Failure::local("cannot write the checkpoint", e))?;
    let bytes = folder_bytes(made.path()).map_err(|e| Failure::local(out.display(), e))?;
    // Renaming onto an empty folder replaces it.
    std::fs::rename(made.path(), out).map_err(|e| wrong(e.to_string()))?;
    Ok(format!("{}: tiny checkpoint, seed {}, {:.1} MB", out.display(), flags.seed, bytes as f64 / 1e6))
}

fn folder_bytes(folder: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(folder)?.try_fold(0, |sum, entry| {
        let entry = entry?;
        let kind = entry.metadata()?;
        Ok(sum + if kind.is_dir() { folder_bytes(&entry.path())? } else { kind.len() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_something_in_it_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mine"), "x").unwrap();
        let flags = SynthFlags { size: SynthSize::Tiny, seed: 1, out: folder.path().to_owned() };
        assert_eq!(synth(&flags).unwrap_err().exit, crate::failure::WRONG_INPUT);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_or_missing_folder_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        for out in [folder.path().join("a/b"), folder.path().join("c")] {
            if out.ends_with("c") {
                std::fs::create_dir(&out).unwrap();
            }
            synth(&SynthFlags { size: SynthSize::Tiny, seed: 1, out: out.clone() }).unwrap();
            assert!(out.join("diffusion/model.safetensors").is_file());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
