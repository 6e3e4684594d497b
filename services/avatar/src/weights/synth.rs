//! `avatar weights synth`.

use model::synth::{self, Depth, Options, Size};
use serde_json::json;

use super::{
    convert::{failure, or_all},
    place::{Place, folder_bytes},
    report::{self, Report},
};
use crate::{
    config::{SynthFlags, SynthSize},
    failure::Failure,
};

/// Writes a random checkpoint, whole or not at all, and says how large it is.
///
/// Errors: the folder is not empty, cannot be written or has no room; more blocks than the model has.
pub fn synth(flags: &SynthFlags) -> Result<(), Failure> {
    let size = size(flags)?;
    let place = Place::begin(&flags.out)?;
    let options = Options { size, storage: flags.precision, stages: or_all(&flags.stages), seed: flags.seed };
    place.check_space(synth::bytes(&options))?;
    let mut report = Report::new(flags.json, flags.quiet || flags.size == SynthSize::Tiny);
    let results = synth::write(&options, place.path(), &mut |p| report.tell(p)).map_err(failure)?;
    report.end();
    let bytes = folder_bytes(place.path()).map_err(|e| Failure::local(flags.out.display(), e))?;
    place.finish()?;
    let values: u64 = results.iter().flat_map(|(_, all)| all).map(|one| one.parameters).sum();
    let seconds = report.seconds();
    let rate = values as f64 / seconds.max(1e-3);
    let out = flags.out.display();
    let (name, seed) = (flags.size.name(), flags.seed);
    let extra = json!({
        "path": flags.out, "size": name, "seed": seed, "precision": flags.precision.name(), "bytes": bytes,
        "seconds": (seconds * 1000.0).round() / 1000.0, "peak_bytes": service_kit::memory::peak_bytes(),
    });
    match (flags.size, flags.json || flags.quiet) {
        (SynthSize::Tiny, false) => {
            crate::progress::print_text(&format!("{out}: tiny checkpoint, seed {seed}, {:.1} MB", bytes as f64 / 1e6));
        }
        _ => {
            let sentence = format!(
                "{out}: {name} checkpoint, seed {seed}, {} in {seconds:.1} s ({:.0} million values a second)",
                report::size(bytes),
                rate / 1e6,
            );
            report::written(flags.json, flags.quiet, &results, extra, &sentence);
        }
    }
    Ok(())
}

fn size(flags: &SynthFlags) -> Result<Size, Failure> {
    let most = Depth::default();
    let count = |name: &str, said: Option<usize>, least: usize, most: usize| match said {
        Some(count) if flags.size == SynthSize::Tiny => {
            Err(Failure::input(name, format!("{count}; the tiny size has its own depth")))
        }
        Some(count) if !(least..=most).contains(&count) => {
            Err(Failure::input(name, format!("{count}; allowed are {least} to {most}")))
        }
        said => Ok(said.unwrap_or(most)),
    };
    let depth = Depth {
        double_blocks: count("double_blocks", flags.double_blocks, 1, most.double_blocks)?,
        single_blocks: count("single_blocks", flags.single_blocks, 1, most.single_blocks)?,
        llama_layers: count("llama_layers", flags.llama_layers, 3, most.llama_layers)?,
    };
    Ok(match flags.size {
        SynthSize::Tiny => Size::Tiny,
        SynthSize::Full => Size::Full(depth),
    })
}

#[cfg(test)]
mod tests {
    use model::convert::Storage;

    use super::*;

    fn tiny(out: &std::path::Path) -> SynthFlags {
        SynthFlags {
            size: SynthSize::Tiny,
            precision: Storage::Bf16,
            seed: 1,
            out: out.to_owned(),
            stages: Vec::new(),
            double_blocks: None,
            single_blocks: None,
            llama_layers: None,
            json: false,
            quiet: true,
        }
    }

    #[test]
    fn a_folder_with_something_in_it_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mine"), "x").unwrap();
        assert_eq!(synth(&tiny(folder.path())).unwrap_err().exit, crate::failure::WRONG_INPUT);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_or_missing_folder_is_filled() {
        let folder = tempfile::tempdir().unwrap();
        for out in [folder.path().join("a/b"), folder.path().join("c")] {
            if out.ends_with("c") {
                std::fs::create_dir(&out).unwrap();
            }
            synth(&tiny(&out)).unwrap();
            assert!(out.join("diffusion/model.safetensors").is_file());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_depth_that_the_model_has_not_is_refused_by_its_flag() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let full = || SynthFlags { size: SynthSize::Full, ..tiny(&out) };
        for (flags, field) in [
            (SynthFlags { double_blocks: Some(21), ..full() }, "double_blocks"),
            (SynthFlags { single_blocks: Some(0), ..full() }, "single_blocks"),
            (SynthFlags { llama_layers: Some(2), ..full() }, "llama_layers"),
            (SynthFlags { llama_layers: Some(5), ..tiny(&out) }, "llama_layers"),
        ] {
            assert_eq!(synth(&flags).unwrap_err().field.as_deref(), Some(field));
        }
    }
}
