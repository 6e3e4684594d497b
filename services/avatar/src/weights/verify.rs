//! `avatar weights verify`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use clap::Args;
use model::{
    audio::AudioEncoder,
    checkpoint::{Choice, Setup, Stage, locate},
    convert::{Part, Source},
    diffusion::DiffusionStage,
    image::ImageEncoder,
    inspect,
    text::TextEncoder,
    vae::VaeStage,
    weights::Listed,
};
use serde::Serialize;
use serde_json::json;

use super::{
    checksums::{self, Sums},
    convert::{or_all, stage},
    report::{Report, encodings, size, table},
};
use crate::{
    failure::Failure,
    progress::{print_line, print_text},
};

/// The flags of `avatar weights verify`.
#[derive(Debug, Args)]
pub struct VerifyFlags {
    /// Folder of the models: the official tree as downloaded, or one subfolder a stage.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: PathBuf,
    /// Form in which the transformer's weights are taken, where the official download has several: bf16, fp8, int8,
    /// or auto for the most exact that is there. Another form than the chosen one is refused.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    pub weights: Choice,
    /// Stages to check, with commas between. Default: all.
    #[arg(long, value_name = "STAGE,..", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<Stage>,
    /// Compare with this list of SHA-256 sums, as `sha256sum` writes it; names are those within the models' folder.
    #[arg(long, value_name = "FILE")]
    pub checksums: Option<PathBuf>,
    /// Write such a list, if nothing is wrong.
    #[arg(long, value_name = "FILE")]
    pub write_checksums: Option<PathBuf>,
    /// Print one JSON object a line on standard output: progress, and last the result.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but what is wrong; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
}

/// A file of tensors, or one that goes with them, as it was found.
#[derive(Debug, Default, Serialize)]
struct FoundFile {
    /// Stages that it is of.
    stages: BTreeSet<&'static str>,
    form: &'static str,
    /// Tensors in each encoding.
    encodings: BTreeMap<&'static str, usize>,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    sha256: String,
}

/// Something that is wrong.
#[derive(Debug, Serialize)]
struct Fault {
    stage: Option<&'static str>,
    file: Option<PathBuf>,
    tensor: Option<String>,
    reason: String,
}

/// Checks a checkpoint and shows what was found; everything that is wrong is listed.
///
/// - returns: whether nothing is wrong
///
/// Errors: a list of checksums cannot be read or written.
pub fn verify(flags: &VerifyFlags) -> Result<bool, Failure> {
    let listed = flags.checksums.as_deref().map(read_sums).transpose()?;
    let mut report = Report::new(flags.json, flags.quiet);
    let mut files: BTreeMap<PathBuf, FoundFile> = BTreeMap::new();
    let mut faults = Vec::new();
    for stage in or_all(&flags.stages) {
        report.say(stage.name(), "checking names, shapes and values");
        check((&flags.models, flags.weights), stage, &mut files, &mut faults);
    }
    let bytes: u64 = files.values().map(|file| file.bytes).sum();
    report.say("checksums", &format!("{} files, {}", files.len(), size(bytes)));
    let sums = hash(&flags.models, &mut files, &mut faults);
    if let Some(listed) = &listed {
        compare(listed, &sums, flags.stages.is_empty(), &mut faults);
    }
    report.end();
    show(flags, &files, &faults, report.seconds());
    if let (true, Some(path)) = (faults.is_empty(), &flags.write_checksums) {
        std::fs::write(path, checksums::render(&sums))
            .map_err(|e| Failure::input("write_checksums", format!("{}: {e}", path.display())))?;
    }
    Ok(faults.is_empty())
}

fn read_sums(path: &Path) -> Result<Sums, Failure> {
    let wrong = |reason: String| Failure::input("checksums", format!("{}: {reason}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(e.to_string()))?;
    checksums::parse(&text).map_err(wrong)
}

/// Checks one stage: what its headers say, then its values, then whether the networks open.
fn check(
    (models, choice): (&Path, Choice),
    stage: Stage,
    files: &mut BTreeMap<PathBuf, FoundFile>,
    faults: &mut Vec<Fault>,
) {
    let name = Some(stage.name());
    let before = faults.len();
    if let Ok(located) = locate(models, stage, choice) {
        for path in located.files() {
            let file = files.entry(path.clone()).or_default();
            file.stages.insert(stage.name());
            file.form = form(&path);
            file.bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        }
    }
    let source = match Source::open(models, stage, choice) {
        Ok(source) => source,
        Err(error) => {
            faults.push(Fault { stage: name, file: None, tensor: None, reason: error.to_string() });
            return;
        }
    };
    for part in &source.parts {
        count(part, stage, files);
        let mut found = inspect::structure(part);
        if found.is_empty() {
            found = inspect::values(part);
        }
        faults.extend(found.into_iter().map(|fault| Fault {
            stage: name,
            file: Some(fault.file),
            tensor: fault.tensor,
            reason: fault.reason,
        }));
    }
    if faults.len() > before {
        return;
    }
    let setup = Setup { choice, ..Setup::default() };
    let opened = match stage {
        Stage::AudioEncoder => AudioEncoder::open(models, &setup).map(drop),
        Stage::TextEncoder => TextEncoder::open(models, &setup).map(drop),
        Stage::ImageEncoder => ImageEncoder::open(models, &setup).map(drop),
        Stage::Diffusion => DiffusionStage::open(models, &setup).map(drop),
        Stage::VaeDecode => VaeStage::open(models, &setup).map(drop),
    };
    if let Err(error) = opened {
        faults.push(Fault { stage: name, file: None, tensor: None, reason: error.to_string() });
    }
}

/// Adds a network's tensors to the files that they are in. A file that two stages share is counted once.
fn count(part: &Part, stage: Stage, files: &mut BTreeMap<PathBuf, FoundFile>) {
    let mut of_file: BTreeMap<PathBuf, Vec<Listed>> = BTreeMap::new();
    for tensor in part.weights.list() {
        of_file.entry(tensor.file.clone()).or_default().push(tensor);
    }
    for (path, tensors) in of_file {
        let file = files.entry(path).or_default();
        file.stages.insert(stage.name());
        if file.tensors > 0 {
            continue;
        }
        file.tensors = tensors.len();
        for tensor in tensors {
            file.parameters += tensor.shape.iter().fold(1u64, |all, side| all.saturating_mul(*side as u64));
            *file.encodings.entry(tensor.encoding.name()).or_default() += 1;
        }
    }
}

/// The form of a file, by its first bytes.
fn form(path: &Path) -> &'static str {
    let mut start = [0; 4];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
    match (read, &start, path.extension().and_then(|e| e.to_str())) {
        (Ok(()), b"GGUF", _) => "gguf",
        (Ok(()), b"PK\x03\x04", _) => "pytorch",
        (_, _, Some("safetensors")) => "safetensors",
        (_, _, Some("json")) => "json",
        _ => "other",
    }
}

/// The checksum of every file, by its name within the models' folder.
fn hash(models: &Path, files: &mut BTreeMap<PathBuf, FoundFile>, faults: &mut Vec<Fault>) -> Sums {
    let paths: Vec<PathBuf> = files.keys().cloned().collect();
    let mut sums = Sums::new();
    for ((path, file), sum) in files.iter_mut().zip(checksums::of_files(&paths)) {
        match sum {
            Ok(sum) => {
                sums.insert(within(models, path), sum.clone());
                file.sha256 = sum;
            }
            Err(e) => {
                let file = Some(path.clone());
                faults.push(Fault { stage: None, file, tensor: None, reason: format!("it cannot be read: {e}") });
            }
        }
    }
    sums
}

fn within(models: &Path, path: &Path) -> String {
    path.strip_prefix(models).unwrap_or(path).display().to_string()
}

/// Files whose sums differ, or that only one side has; `whole` where all stages were looked at.
fn compare(listed: &Sums, found: &Sums, whole: bool, faults: &mut Vec<Fault>) {
    let mut fault = |name: &str, reason: String| {
        faults.push(Fault { stage: None, file: Some(name.into()), tensor: None, reason });
    };
    for (name, sum) in found {
        match listed.get(name) {
            Some(expected) if expected == sum => {}
            Some(expected) => fault(name, format!("sha256 {sum}, expected {expected}")),
            None => fault(name, "the list of checksums does not have it".to_owned()),
        }
    }
    if whole {
        listed.keys().filter(|name| !found.contains_key(*name)).for_each(|name| {
            fault(name, "the list of checksums has it, and it is no file of a stage".to_owned());
        });
    }
}

fn show(flags: &VerifyFlags, files: &BTreeMap<PathBuf, FoundFile>, faults: &[Fault], seconds: f64) {
    let name = |path: &Path| within(&flags.models, path);
    if flags.json {
        let files: Vec<_> = files
            .iter()
            .map(|(path, file)| {
                let mut line = json!(file);
                if let Some(line) = line.as_object_mut() {
                    line.insert("file".to_owned(), json!(name(path)));
                }
                line
            })
            .collect();
        let event = if faults.is_empty() { "completed" } else { "failed" };
        let seconds = (seconds * 1000.0).round() / 1000.0;
        print_line(&json!({ "event": event, "files": files, "faults": faults, "seconds": seconds }));
        return;
    }
    if !flags.quiet {
        let rows: Vec<Vec<String>> = files
            .iter()
            .map(|(path, file)| {
                vec![
                    file.stages.iter().copied().collect::<Vec<_>>().join(","),
                    name(path),
                    file.form.to_owned(),
                    if file.tensors == 0 { "-".to_owned() } else { encodings(&file.encodings) },
                    file.tensors.to_string(),
                    file.parameters.to_string(),
                    file.bytes.to_string(),
                    file.sha256.clone(),
                ]
            })
            .collect();
        let head = ["stage", "file", "form", "stored as", "tensors", "parameters", "bytes", "sha256"];
        print_text(&table(&head, &rows));
    }
    for Fault { stage, file, tensor, reason } in faults {
        let tensor = tensor.as_ref().map(|tensor| format!("tensor {tensor:?} in ")).unwrap_or_default();
        let file = file.as_ref().map(|file| format!("{tensor}{}: ", name(file))).unwrap_or_default();
        let stage = stage.map(|stage| format!("{stage}: ")).unwrap_or_default();
        eprintln!("wrong: {stage}{file}{reason}");
    }
    if !faults.is_empty() {
        eprintln!("error: {} faults in {}", faults.len(), flags.models.display());
    } else if !flags.quiet {
        let networks = files.values().filter(|file| file.tensors > 0).count();
        let bytes: u64 = files.values().map(|file| file.bytes).sum();
        print_text(&format!("nothing is wrong: {networks} files of tensors, {}, {seconds:.1} s", size(bytes)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(models: &Path) -> VerifyFlags {
        VerifyFlags {
            models: models.to_owned(),
            weights: Choice::Auto,
            stages: Vec::new(),
            checksums: None,
            write_checksums: None,
            json: false,
            quiet: true,
        }
    }

    fn tiny() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        model::synth::tiny(&folder.path().join("models"), 1).unwrap();
        folder
    }

    #[test]
    fn a_whole_checkpoint_is_found_good_and_its_checksums_hold() {
        let folder = tiny();
        let (models, sums) = (folder.path().join("models"), folder.path().join("SHA256SUMS"));
        verify(&VerifyFlags { write_checksums: Some(sums.clone()), ..flags(&models) }).unwrap();
        // Six networks, five configs, two tokenizers.
        assert_eq!(std::fs::read_to_string(&sums).unwrap().lines().count(), 13);
        let compared = VerifyFlags { checksums: Some(sums), ..flags(&models) };
        assert!(verify(&compared).unwrap());
        std::fs::write(models.join("audio-encoder/config.json"), "{ \"heads\":  4 }").unwrap();
        assert!(!verify(&compared).unwrap());
    }

    #[test]
    fn every_fault_is_counted() {
        let folder = tiny();
        let models = folder.path().join("models");
        std::fs::remove_file(models.join("vae-decode/model.safetensors")).unwrap();
        std::fs::write(models.join("audio-encoder/config.json"), "{ \"heads\": 7 }").unwrap();
        let mut files = BTreeMap::new();
        let mut faults = Vec::new();
        for stage in Stage::ALL {
            check((&models, Choice::Auto), stage, &mut files, &mut faults);
        }
        let of: Vec<_> = faults.iter().filter_map(|fault| fault.stage).collect();
        assert_eq!(of, ["audio-encoder", "vae-decode"], "{faults:?}");
        assert!(!verify(&flags(&models)).unwrap());
    }
}
