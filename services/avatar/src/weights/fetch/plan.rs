//! From what the stages need and what the repository holds to the list of files.

use super::{
    catalogue::{Need, Precision, Stage, needs},
    digest::Digest,
    listing::Listing,
};

/// A file to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Where it lies, in the repository and below the folder; one of the catalogue's own paths.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub digest: Digest,
}

/// The files that the stages need, each once, in the order of the stages.
///
/// Errors: the repository lacks something; the sentence names all of it.
pub fn plan(listing: &Listing, stages: &[Stage], precision: Precision) -> Result<Vec<Wanted>, String> {
    let (mut files, mut missing) = (Vec::<Wanted>::new(), Vec::new());
    for need in stages.iter().flat_map(|&stage| needs(stage, precision)) {
        let form = need.forms.iter().find(|form| form.iter().all(|name| listing.get(&path(&need, name)).is_some()));
        let Some(form) = form else {
            let sentence = lacks(&need);
            if need.required && !missing.contains(&sentence) {
                missing.push(sentence);
            }
            continue;
        };
        for name in *form {
            let path = path(&need, name);
            if files.iter().any(|file| file.path == path) {
                continue;
            }
            let Some(listed) = listing.get(&path) else { continue };
            let digest = listed.digest.clone().ok_or_else(|| format!("the listing gives no hash of {path}"))?;
            files.push(Wanted { path, bytes: listed.bytes, digest });
        }
    }
    if !missing.is_empty() {
        return Err(format!("it lacks {}", missing.join("; ")));
    }
    if files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.bytes)).is_none() {
        return Err("the listing's sizes add up to more than 2^64 bytes".to_owned());
    }
    Ok(files)
}

fn path(need: &Need, name: &str) -> String {
    format!("{}/{name}", need.folder)
}

fn lacks(need: &Need) -> String {
    let forms: Vec<String> = need.forms.iter().map(|form| form.join(" with ")).collect();
    format!("{} ({}/: {})", need.what, need.folder, forms.join(", or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(paths: &[&str]) -> Listing {
        let entry = |p: &&str| format!(r#"{{"type":"file","path":"{p}","size":3,"oid":"{}"}}"#, "0".repeat(40));
        let mut listing = Listing::default();
        listing.add(format!("[{}]", paths.iter().map(entry).collect::<Vec<_>>().join(",")).as_bytes()).unwrap();
        listing
    }

    fn names(files: &[Wanted]) -> Vec<&str> {
        files.iter().map(|file| file.path.rsplit('/').next().unwrap()).collect()
    }

    #[test]
    fn safetensors_go_before_pickles_and_shared_files_come_once() {
        let vae = ["ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt", "ckpts/hunyuan-video-t2v-720p/vae/config.json"];
        let whisper = ["model.safetensors", "pytorch_model.bin", "config.json"].map(|n| format!("{WHISPER}/{n}"));
        const WHISPER: &str = "ckpts/whisper-tiny";
        let all: Vec<&str> = vae.into_iter().chain(whisper.iter().map(String::as_str)).collect();
        let stages = [Stage::AudioEncoder, Stage::ImageEncoder, Stage::VaeDecode];
        let files = plan(&listing(&all), &stages, Precision::Bf16).unwrap();
        assert_eq!(names(&files), ["model.safetensors", "config.json", "pytorch_model.pt", "config.json"]);
    }

    #[test]
    fn the_precision_picks_the_transformers_file() {
        let folder = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states";
        let all = [".pt", "_fp8.pt", "_fp8_map.pt"].map(|end| format!("{folder}{end}"));
        let listing = listing(&all.each_ref().map(String::as_str));
        let of = |precision| plan(&listing, &[Stage::Diffusion], precision).unwrap();
        assert_eq!(names(&of(Precision::Bf16)), ["mp_rank_00_model_states.pt"]);
        let fp8 = ["mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"];
        assert_eq!(names(&of(Precision::Fp8)), fp8);
    }

    #[test]
    fn everything_that_is_missing_is_named() {
        let stages = [Stage::AudioEncoder, Stage::TextEncoder];
        let refused = plan(&listing(&["ckpts/whisper-tiny/config.json"]), &stages, Precision::Bf16).unwrap_err();
        for part in ["model.safetensors, or pytorch_model.bin", "LLaVA's weights", "vocab.json with merges.txt"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(!refused.contains("Whisper's configuration"), "{refused}");
    }
}
