//! Why a command did not do its work, for people, for programs and for the shell.

use std::fmt::Display;

use service_kit::ServiceError;
use tonic::{Code, Status};

/// Exit code: the work failed.
pub const FAILED: u8 = 1;
/// Exit code: the command line or an input is wrong.
pub const WRONG_INPUT: u8 = 2;
/// Exit code: interrupted by a signal.
pub const INTERRUPTED: u8 = 130;

/// Why a command did not do its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// A gRPC code by name.
    pub code: &'static str,
    /// What is wrong: the value and the limit.
    pub message: String,
    /// The input at fault, as the contract names it.
    pub field: Option<String>,
    /// The process's exit code.
    pub exit: u8,
    /// What to do about it.
    pub advice: Option<&'static str>,
}

impl Failure {
    /// An input that is wrong; `field` is its name in the contract.
    pub fn input(field: &str, message: impl Into<String>) -> Self {
        let (message, field) = (message.into(), Some(field.to_owned()));
        Self { code: "INVALID_ARGUMENT", message, field, exit: WRONG_INPUT, advice: None }
    }

    /// A failure of this machine: disk, memory, sockets.
    pub fn local(what: impl Display, reason: impl Display) -> Self {
        let message = format!("{what}: {reason}");
        Self { code: "INTERNAL", message, field: None, exit: FAILED, advice: None }
    }

    /// A signal ended the work.
    #[must_use]
    pub fn interrupted() -> Self {
        let message = "interrupted; nothing was written".to_owned();
        Self { code: "CANCELLED", message, field: None, exit: INTERRUPTED, advice: None }
    }

    /// Reads what the gateway answered.
    #[must_use]
    pub fn of_status(status: &Status) -> Self {
        let error = ServiceError::from_status(status);
        let field = error.violations().first().map(|v| v.field.clone()).filter(|field| field != "request");
        let (exit, advice) = match status.code() {
            Code::InvalidArgument => (WRONG_INPUT, None),
            Code::FailedPrecondition => {
                (FAILED, Some("check the folder given with --models; `avatar weights synth` makes a complete one"))
            }
            Code::ResourceExhausted => (FAILED, Some("try a smaller --size, or a shorter recording")),
            _ => (FAILED, None),
        };
        // The first violation without its name, for the flag stands before it; with several, all of them.
        let message = match error.violations() {
            [only] => only.description.clone(),
            _ => error.to_string(),
        };
        Self { code: error.code_name(), message, field, exit, advice }
    }

    /// The failure as people read it: the flag at fault, what is wrong, and what to do.
    #[must_use]
    pub fn sentence(&self) -> String {
        let flag = match self.field.as_deref() {
            Some("picture") => "--image: ".to_owned(),
            // Several violations name themselves, and so do mistakes in flags.
            Some(field) if !self.message.starts_with(field) && !self.message.starts_with("--") => {
                format!("--{}: ", field.replace('_', "-"))
            }
            _ => String::new(),
        };
        let advice = self.advice.map(|advice| format!("\n{advice}")).unwrap_or_default();
        format!("error: {flag}{}{advice}", self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_names_the_flag_and_exits_with_2() {
        let failure = Failure::of_status(&ServiceError::invalid("min_frames", "401; allowed are 1 to 400").into());
        assert_eq!((failure.exit, failure.field.as_deref()), (WRONG_INPUT, Some("min_frames")));
        assert_eq!(failure.sentence(), "error: --min-frames: 401; allowed are 1 to 400");
    }

    #[test]
    fn a_mistake_that_names_its_flag_names_it_once() {
        let failure = Failure::input("device", "--device \"cpu:1x\": the budget is wrong");
        assert_eq!(failure.sentence(), "error: --device \"cpu:1x\": the budget is wrong");
    }

    #[test]
    fn missing_weights_say_what_to_do() {
        let status = ServiceError::failed_precondition("weights: tensor \"img_in.proj.weight\": it is missing").into();
        let failure = Failure::of_status(&status);
        assert_eq!((failure.exit, failure.code), (FAILED, "FAILED_PRECONDITION"));
        assert!(failure.sentence().contains("--models"));
    }
}
