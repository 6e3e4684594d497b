//! `avatar weights convert`.

use std::path::PathBuf;

use clap::Args;
use model::{
    checkpoint::{Choice, Stage},
    convert::{self, Source, Storage},
};
use serde_json::json;

use super::{
    place::Place,
    report::{self, Report},
};
use crate::failure::Failure;

/// The flags of `avatar weights convert`.
#[derive(Debug, Args)]
pub struct ConvertFlags {
    /// Folder of the models: the official tree as downloaded, or one subfolder a stage.
    #[arg(long, env = "AVATAR_MODELS", value_name = "DIR")]
    pub models: PathBuf,
    /// Form in which the transformer's weights are taken, where the official download has several: bf16, fp8, int8,
    /// or auto for the most exact that is there. Another form than the chosen one is refused.
    #[arg(long, env = "AVATAR_WEIGHTS", value_name = "FORM", default_value = "auto")]
    pub weights: Choice,
    /// Folder to write; made if missing, refused if it is not empty. It appears when it is whole.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// What the weights are stored in: bf16, f16 or f32 for all of them; fp8, int8, q8_0 or q4_k for the large
    /// layers of transformer and Llama, with the rest in 16 bits and the VAE and Whisper as they are.
    #[arg(long, value_name = "NAME")]
    pub precision: Storage,
    /// Stages to convert, with commas between. Default: all.
    #[arg(long, value_name = "STAGE,..", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<Stage>,
    /// Print one JSON object a line on standard output: progress, and last the result or the failure.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors; with --json, nothing but the last line.
    #[arg(long)]
    pub quiet: bool,
}

/// Converts a checkpoint, whole or not at all, and shows what became of it.
///
/// Errors: the folder to write is not empty, cannot be written or has no room; a stage's weights are missing or not complete.
pub fn convert(flags: &ConvertFlags) -> Result<(), Failure> {
    let place = Place::begin(&flags.out)?;
    let mut report = Report::new(flags.json, flags.quiet);
    let open = |stage: &Stage| Source::open(&flags.models, *stage, flags.weights);
    let sources: Vec<Source> = or_all(&flags.stages).iter().map(open).collect::<Result<_, _>>().map_err(failure)?;
    place.check_space(convert::bytes(&sources, flags.precision).map_err(failure)?)?;
    let results = convert::stages(&sources, flags.precision, place.path(), &mut |p| report.tell(p)).map_err(failure)?;
    report.end();
    place.finish()?;
    let bytes: u64 = results.iter().flat_map(|(_, all)| all).map(|one| one.bytes).sum();
    let seconds = report.seconds();
    let sentence = format!(
        "{}: {} as {}, {} in {seconds:.1} s",
        flags.out.display(),
        flags.models.display(),
        flags.precision,
        report::size(bytes),
    );
    let extra = json!({
        "path": flags.out, "precision": flags.precision.name(), "bytes": bytes,
        "seconds": (seconds * 1000.0).round() / 1000.0, "peak_bytes": service_kit::memory::peak_bytes(),
    });
    report::written(flags.json, flags.quiet, &results, extra, &sentence);
    Ok(())
}

/// The stages that were asked for, in order, or all of them.
pub(super) fn or_all(stages: &[Stage]) -> Vec<Stage> {
    Stage::ALL.into_iter().filter(|stage| stages.is_empty() || stages.contains(stage)).collect()
}

/// A stage by its name.
pub(crate) fn stage(text: &str) -> Result<Stage, String> {
    let names = || Stage::ALL.map(Stage::name).join(", ");
    Stage::ALL.into_iter().find(|stage| stage.name() == text).ok_or_else(|| format!("the stages are {}", names()))
}

pub(super) fn failure(error: model::Error) -> Failure {
    Failure { code: "FAILED_PRECONDITION", ..Failure::local("weights", error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(models: &std::path::Path, out: &std::path::Path) -> ConvertFlags {
        ConvertFlags {
            models: models.to_owned(),
            weights: Choice::Auto,
            out: out.to_owned(),
            precision: Storage::Fp8,
            stages: vec![Stage::Diffusion],
            json: false,
            quiet: true,
        }
    }

    #[test]
    fn a_failed_conversion_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (models, out) = (folder.path().join("models"), folder.path().join("out"));
        model::synth::tiny(&models, 1).unwrap();
        std::fs::remove_file(models.join("diffusion/model.safetensors")).unwrap();
        assert!(convert(&flags(&models, &out)).is_err());
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["models"]);
    }

    #[test]
    fn only_the_stages_asked_for_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let (models, out) = (folder.path().join("models"), folder.path().join("out"));
        model::synth::tiny(&models, 1).unwrap();
        convert(&flags(&models, &out)).unwrap();
        let names: Vec<_> = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["diffusion"]);
    }
}
