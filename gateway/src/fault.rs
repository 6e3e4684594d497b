//! What can go wrong with a request or a generation: one type, mapped once to gRPC and once to HTTP.

use std::{fmt, time::Duration};

use http::StatusCode;
use proto::v1::{Failure, Stage};
use service_kit::{FieldViolation, ServiceError};
use tonic::{Code, Status};

/// The fields that a violation can name: those of the public contract.
pub const FIELDS: [&str; 18] = [
    "picture",
    "audio",
    "prompt",
    "steps",
    "size",
    "guidance_scale",
    "flow_shift",
    "min_frames",
    "face",
    "seed",
    "parity",
    "truncate_prompt",
    "no_feature_cache",
    "idempotency_key",
    "caller",
    "priority",
    "webhook",
    "deadline",
];

/// The code of a generation whose output is no video; gRPC has none that says so.
const REJECTED: &str = "OUTPUT_REJECTED";

/// What sort of fault it is; decides both codes and whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A field of the request has a value that is not allowed.
    Invalid,
    /// A file of the request has more bytes than allowed.
    TooLarge,
    /// A file of the request is of no kind that is understood.
    UnsupportedMedia,
    /// A file is of a kind that is understood, but cannot be used.
    UnusableMedia,
    /// No such generation.
    NotFound,
    /// The generation or a stage is not in a state for it.
    Precondition,
    /// The idempotency key is that of another request.
    Conflict,
    /// A position past the end.
    OutOfRange,
    /// No room now; try again after the delay.
    Busy {
        /// How long to wait.
        retry_after: Duration,
    },
    /// A limit is reached that waiting does not lift.
    Exhausted,
    /// A stage's device does not hold what it needs. Needing less may help, waiting does not.
    OutOfMemory,
    /// Something needed does not answer, or this process is shutting down.
    Unavailable,
    /// The caller stopped it.
    Cancelled,
    /// The caller's deadline passed.
    Deadline,
    /// What came out is no video.
    Rejected,
    /// A fault of ours. The log has the details.
    Internal,
}

/// One field of a request and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// One of [`FIELDS`].
    pub field: String,
    /// A sentence with the value and the limit.
    pub message: String,
}

/// Why a request was refused or a generation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What sort.
    pub kind: Kind,
    /// For people; names what is wrong and the limit.
    pub message: String,
    /// The inputs at fault; empty when none is.
    pub violations: Vec<Violation>,
    /// The stage it came from; unspecified for the gateway itself.
    pub stage: Stage,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl Fault {
    /// A fault of `kind` that no field is to blame for.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), violations: Vec::new(), stage: Stage::Unspecified }
    }

    /// A fault of `kind` in one field.
    #[must_use]
    pub fn in_field(kind: Kind, field: &str, message: impl Into<String>) -> Self {
        Self::of_violations(kind, vec![Violation { field: field.into(), message: message.into() }])
    }

    /// A field with a value that is not allowed.
    #[must_use]
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::in_field(Kind::Invalid, field, message)
    }

    /// Several fields at once; the message is that of all.
    #[must_use]
    pub fn of_violations(kind: Kind, violations: Vec<Violation>) -> Self {
        let message = violations.iter().map(|v| format!("{}: {}", v.field, v.message)).collect::<Vec<_>>().join("; ");
        Self { kind, message, violations, stage: Stage::Unspecified }
    }

    /// A fault of ours: `detail` goes to the log, not to the caller.
    #[must_use]
    pub fn internal(what: &str, detail: &dyn fmt::Display) -> Self {
        tracing::error!(%detail, "{what}");
        Self::new(Kind::Internal, format!("{what}; the gateway's log has the details"))
    }

    /// The same fault, blamed on a stage.
    #[must_use]
    pub fn at(mut self, stage: Stage) -> Self {
        self.stage = stage;
        self
    }

    /// Reads what a stage answered.
    ///
    /// A field that is not one of the caller's is our mistake, not theirs, so it becomes an internal fault.
    #[must_use]
    pub fn from_stage(error: &ServiceError, stage: Stage) -> Self {
        let violations: Vec<Violation> = error
            .violations()
            .iter()
            .filter(|v| FIELDS.contains(&v.field.as_str()))
            .map(|v| Violation { field: v.field.clone(), message: v.description.clone() })
            .collect();
        let kind = match error {
            ServiceError::InvalidArgument { .. } if violations.is_empty() => Kind::Internal,
            ServiceError::InvalidArgument { .. } => Kind::Invalid,
            ServiceError::ResourceExhausted { retry_after: Some(retry_after), .. } => {
                Kind::Busy { retry_after: *retry_after }
            }
            ServiceError::ResourceExhausted { retry_after: None, .. } => Kind::Exhausted,
            ServiceError::DeviceMemory { .. } => Kind::OutOfMemory,
            ServiceError::FailedPrecondition { .. } => Kind::Precondition,
            ServiceError::NotFound { .. } => Kind::NotFound,
            ServiceError::OutOfRange { .. } => Kind::OutOfRange,
            // A stage cancels only when the gateway went away, or when it stops.
            ServiceError::Unavailable { .. } | ServiceError::Cancelled { .. } => Kind::Unavailable,
            ServiceError::DeadlineExceeded { .. } => Kind::Deadline,
            ServiceError::Internal { .. } => Kind::Internal,
        };
        let message = match error {
            // It names the stage itself.
            ServiceError::DeviceMemory { .. } => error.to_string(),
            _ => format!("{}: {error}", stage_name(stage)),
        };
        Self { kind, message, violations, stage }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(self.kind, Kind::Busy { .. } | Kind::Unavailable)
    }

    /// The first field at fault.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        self.violations.first().map(|v| v.field.as_str())
    }

    /// The gRPC code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self.kind {
            Kind::Invalid | Kind::TooLarge | Kind::UnsupportedMedia | Kind::UnusableMedia => Code::InvalidArgument,
            Kind::NotFound => Code::NotFound,
            Kind::Precondition => Code::FailedPrecondition,
            Kind::Conflict => Code::AlreadyExists,
            Kind::OutOfRange => Code::OutOfRange,
            Kind::Busy { .. } | Kind::Exhausted | Kind::OutOfMemory => Code::ResourceExhausted,
            Kind::Unavailable => Code::Unavailable,
            Kind::Cancelled => Code::Cancelled,
            Kind::Deadline => Code::DeadlineExceeded,
            Kind::Rejected => Code::DataLoss,
            Kind::Internal => Code::Internal,
        }
    }

    /// The code by name: gRPC's, or that of output which is no video.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Rejected => REJECTED,
            _ => code_name(self.code()),
        }
    }

    /// The HTTP status.
    #[must_use]
    pub fn http_status(&self) -> StatusCode {
        match self.kind {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Kind::UnsupportedMedia => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Kind::UnusableMedia => StatusCode::UNPROCESSABLE_ENTITY,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Precondition | Kind::Conflict | Kind::Cancelled => StatusCode::CONFLICT,
            Kind::OutOfRange => StatusCode::RANGE_NOT_SATISFIABLE,
            Kind::Busy { .. } => StatusCode::TOO_MANY_REQUESTS,
            Kind::Exhausted | Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::OutOfMemory => StatusCode::INSUFFICIENT_STORAGE,
            Kind::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Kind::Rejected | Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The fault as a gRPC status, with field violations and the retry delay as details.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let message = self.message.clone();
        Status::from(match self.kind {
            Kind::Invalid | Kind::TooLarge | Kind::UnsupportedMedia | Kind::UnusableMedia => {
                let violation =
                    |v: &Violation| FieldViolation { field: v.field.clone(), description: v.message.clone() };
                let mut violations: Vec<_> = self.violations.iter().map(violation).collect();
                if violations.is_empty() {
                    violations.push(FieldViolation { field: "request".into(), description: message });
                }
                ServiceError::InvalidArgument { violations }
            }
            Kind::NotFound => ServiceError::NotFound { message },
            Kind::Precondition => ServiceError::FailedPrecondition { message },
            // No stage gives this code, so it has no kind of its own there.
            Kind::Conflict => return Status::already_exists(message),
            Kind::Rejected => return Status::data_loss(message),
            Kind::OutOfRange => ServiceError::OutOfRange { message },
            Kind::Busy { retry_after } => ServiceError::ResourceExhausted { message, retry_after: Some(retry_after) },
            Kind::Exhausted | Kind::OutOfMemory => ServiceError::ResourceExhausted { message, retry_after: None },
            Kind::Unavailable => ServiceError::Unavailable { message, retry_after: None },
            Kind::Cancelled => ServiceError::Cancelled { message },
            Kind::Deadline => ServiceError::DeadlineExceeded { message },
            // The details are in the log already; what is here is meant for the caller.
            Kind::Internal => ServiceError::Internal { message, reference: Some(String::new()) },
        })
    }

    /// Reads the fault of a generation from its record.
    #[must_use]
    pub fn from_failure(failure: &Failure) -> Self {
        let kind = match failure.code.as_str() {
            "INVALID_ARGUMENT" => Kind::Invalid,
            "NOT_FOUND" => Kind::NotFound,
            "FAILED_PRECONDITION" => Kind::Precondition,
            "OUT_OF_RANGE" => Kind::OutOfRange,
            "RESOURCE_EXHAUSTED" => Kind::Exhausted,
            "UNAVAILABLE" => Kind::Unavailable,
            "CANCELLED" => Kind::Cancelled,
            "DEADLINE_EXCEEDED" => Kind::Deadline,
            REJECTED => Kind::Rejected,
            _ => Kind::Internal,
        };
        let field = Some(failure.field.clone()).filter(|field| !field.is_empty());
        let violations = field.map(|field| Violation { field, message: failure.message.clone() });
        let (message, violations) = (failure.message.clone(), violations.into_iter().collect());
        Self { kind, message, violations, stage: failure.stage() }
    }

    /// The fault as the record of a generation keeps it.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        Failure {
            code: self.name().into(),
            message: self.message.clone(),
            field: self.field().unwrap_or_default().into(),
            stage: self.stage.into(),
            retryable: self.retryable(),
        }
    }
}

/// The stage as people and folders call it.
#[must_use]
pub fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Unspecified => "gateway",
        Stage::AudioEncoder => "audio-encoder",
        Stage::TextEncoder => "text-encoder",
        Stage::ImageEncoder => "image-encoder",
        Stage::Diffusion => "diffusion",
        Stage::VaeDecode => "vae-decode",
    }
}

/// The code as gRPC spells it, for example `INVALID_ARGUMENT`.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    fn read(status: &Status, stage: Stage) -> Fault {
        Fault::from_stage(&ServiceError::from_status(status), stage)
    }

    #[test]
    fn a_violation_reaches_the_caller_with_field_and_code() {
        let fault = Fault::invalid("steps", "0; allowed are 1 to 200");
        let status = fault.to_status();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "steps");
        assert_eq!(fault.http_status(), StatusCode::BAD_REQUEST);
        assert_eq!(fault.to_failure().code, "INVALID_ARGUMENT");
    }

    #[test]
    fn a_full_queue_of_a_stage_keeps_its_delay_and_can_be_retried() {
        let busy = Fault::new(Kind::Busy { retry_after: Duration::from_millis(1500) }, "the queue is full");
        let read = read(&busy.to_status(), Stage::Diffusion);
        assert_eq!(read.kind, busy.kind);
        assert!(read.retryable());
        assert_eq!(read.stage, Stage::Diffusion);
    }

    #[test]
    fn a_stages_complaint_about_a_field_that_is_not_the_callers_is_internal() {
        let ours = Fault::invalid("latents.0", "has shape [1]").to_status();
        assert_eq!(read(&ours, Stage::Diffusion).kind, Kind::Internal);
        let theirs = Fault::invalid("prompt", "has 300 tokens; the limit is 249").to_status();
        let read = read(&theirs, Stage::TextEncoder);
        assert_eq!((read.kind, read.field()), (Kind::Invalid, Some("prompt")));
    }

    #[test]
    fn a_record_gives_the_fault_back() {
        for kind in
            [Kind::Invalid, Kind::Precondition, Kind::Exhausted, Kind::Unavailable, Kind::Rejected, Kind::Internal]
        {
            let fault = Fault::new(kind, "what happened").at(Stage::VaeDecode);
            assert_eq!(Fault::from_failure(&fault.to_failure()), fault);
        }
        let read = Fault::from_failure(&Fault::invalid("prompt", "300 tokens").to_failure());
        assert_eq!((read.kind, read.field()), (Kind::Invalid, Some("prompt")));
    }

    #[test]
    fn out_of_memory_is_no_full_queue() {
        let fault = read(&Status::resource_exhausted("needs 9 GB, 4 GB are free"), Stage::VaeDecode);
        assert_eq!(fault.kind, Kind::Exhausted);
        assert!(!fault.retryable());
        let (stage, device) = ("vae-decode".into(), "cpu.1".into());
        let typed = ServiceError::DeviceMemory { stage, device, needed_bytes: 9, free_bytes: 4, budget_bytes: 5 };
        let fault = read(&typed.into(), Stage::VaeDecode);
        assert_eq!((fault.kind, fault.code(), fault.retryable()), (Kind::OutOfMemory, Code::ResourceExhausted, false));
        assert_eq!(fault.message, "vae-decode: out of device memory on cpu.1: 9 bytes needed, 4 of 5 free");
    }
}
