//! In which type each stage computes.

use std::str::FromStr;

use service_kit::config::{Compute, parse_compute};

/// The stages, as the flag names them.
const STAGES: [&str; 5] = ["audio-encoder", "text-encoder", "image-encoder", "diffusion", "vae-decode"];

/// The type of each stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ComputeByStage([Compute; 5]);

impl ComputeByStage {
    /// The type of the stage of that name; f32 for a name that no stage has.
    #[must_use]
    pub fn of(&self, stage: &str) -> Compute {
        STAGES.iter().position(|name| *name == stage).map_or(Compute::F32, |at| self.0[at])
    }
}

impl FromStr for ComputeByStage {
    type Err = String;

    /// Reads `TYPE` for all stages, or `STAGE=TYPE,...`, where the stages left out compute in f32.
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('=') {
            return Ok(Self([parse_compute(text).map_err(|e| format!("{e}, or STAGE=TYPE with commas between"))?; 5]));
        }
        let mut types = [None; 5];
        for part in text.split(',') {
            let (name, kind) =
                part.split_once('=').ok_or_else(|| format!("{part:?} is not STAGE=TYPE, as in diffusion=bf16"))?;
            let at = STAGES.iter().position(|stage| *stage == name.trim());
            let at = at.ok_or_else(|| format!("{name:?} is no stage; the stages are {}", STAGES.join(", ")))?;
            let kind = parse_compute(kind.trim()).map_err(|e| format!("{kind:?} is {e}"))?;
            if types[at].replace(kind).is_some() {
                return Err(format!("{} is named twice", STAGES[at]));
            }
        }
        Ok(Self(types.map(Option::unwrap_or_default)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_type_is_for_all_and_a_list_is_for_the_stages_that_it_names() {
        let all: ComputeByStage = "bf16".parse().unwrap();
        assert!(STAGES.iter().all(|stage| all.of(stage) == Compute::Bf16));
        let some: ComputeByStage = "diffusion=bf16, vae-decode=f16".parse().unwrap();
        let types = STAGES.map(|stage| some.of(stage));
        assert_eq!(types, [Compute::F32, Compute::F32, Compute::F32, Compute::Bf16, Compute::F16]);
    }

    #[test]
    fn what_is_not_understood_is_refused_with_what_is_allowed() {
        for (text, part) in [
            ("", "f32, bf16 and f16"),
            ("int8", "f32, bf16 and f16"),
            ("diffusion=int8", "f32, bf16 and f16"),
            ("decoder=bf16", "audio-encoder, text-encoder, image-encoder, diffusion, vae-decode"),
            ("diffusion=bf16,f32", "STAGE=TYPE"),
            ("diffusion=bf16,diffusion=f32", "named twice"),
        ] {
            let error = text.parse::<ComputeByStage>().unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
