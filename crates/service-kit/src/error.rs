//! One error of all services, and its one mapping to gRPC and back.

use std::{collections::HashMap, time::Duration};

use proto::tensor::TensorError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Most bytes of a message on the wire. gRPC carries it in a header, percent-encoded and again in the details;
/// with this much, and [`VIOLATION_BYTES`], all headers stay below the 8 KiB that common proxies allow.
const MESSAGE_BYTES: usize = 700;
/// Most bytes of all field violations together on the wire.
const VIOLATION_BYTES: usize = 1000;
const DOMAIN: &str = "avatar";
const DEVICE_MEMORY: &str = "DEVICE_MEMORY";
const INTERNAL: &str = "INTERNAL";

/// One input that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field, for example `spec.steps` or a tensor's name.
    pub field: String,
    /// What is wrong: the value and the limit.
    pub description: String,
}

/// What a service answers instead of a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// The request is wrong, and stays wrong however often it is sent.
    #[error("{}", describe(violations))]
    InvalidArgument {
        /// Every fault found, at least one.
        violations: Vec<FieldViolation>,
    },
    /// No room in a queue or table.
    #[error("{message}")]
    ResourceExhausted {
        /// What is full, and how much it holds.
        message: String,
        /// When to try again.
        retry_after: Option<Duration>,
    },
    /// A device's memory does not hold what the request needs.
    #[error(
        "{stage}: out of device memory on {device}: {needed_bytes} bytes needed, {free_bytes} of {budget_bytes} free"
    )]
    DeviceMemory {
        /// Which stage ran out.
        stage: String,
        /// Which device's budget it is.
        device: String,
        /// Bytes that were asked for.
        needed_bytes: u64,
        /// Bytes that were free.
        free_bytes: u64,
        /// Bytes that the device has for this stage.
        budget_bytes: u64,
    },
    /// The service is not in the state that the request needs; weights that cannot be loaded, for example.
    #[error("{message}")]
    FailedPrecondition {
        /// What is missing and how to mend it.
        message: String,
    },
    /// The thing named does not exist here.
    #[error("{message}")]
    NotFound {
        /// What was looked for.
        message: String,
    },
    /// A position lies past the end.
    #[error("{message}")]
    OutOfRange {
        /// The position and the end.
        message: String,
    },
    /// The service cannot be reached or is going away.
    #[error("{message}")]
    Unavailable {
        /// Who, and why.
        message: String,
        /// When to try again.
        retry_after: Option<Duration>,
    },
    /// The caller went away or asked to stop.
    #[error("{message}")]
    Cancelled {
        /// What was stopped.
        message: String,
    },
    /// The caller's deadline passed.
    #[error("{message}")]
    DeadlineExceeded {
        /// What was not done in time.
        message: String,
    },
    /// A fault of ours.
    #[error("{message}")]
    Internal {
        /// All that is known. It goes to the log; the wire gets only the reference.
        message: String,
        /// Under which the details are in a log already; then `message` is what came over the wire.
        reference: Option<String>,
    },
}

fn describe(violations: &[FieldViolation]) -> String {
    violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect::<Vec<_>>().join("; ")
}

impl ServiceError {
    /// One wrong field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = FieldViolation { field: field.into(), description: description.into() };
        Self::InvalidArgument { violations: vec![violation] }
    }

    /// See [`ServiceError::FailedPrecondition`].
    pub fn failed_precondition(message: impl Into<String>) -> Self {
        Self::FailedPrecondition { message: message.into() }
    }

    /// See [`ServiceError::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::NotFound { message: message.into() }
    }

    /// See [`ServiceError::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable { message: message.into(), retry_after: None }
    }

    /// See [`ServiceError::Cancelled`].
    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::Cancelled { message: message.into() }
    }

    /// A fault of ours that no log has yet.
    pub fn internal(message: impl ToString) -> Self {
        Self::Internal { message: message.to_string(), reference: None }
    }

    /// The gRPC code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidArgument { .. } => Code::InvalidArgument,
            Self::ResourceExhausted { .. } | Self::DeviceMemory { .. } => Code::ResourceExhausted,
            Self::FailedPrecondition { .. } => Code::FailedPrecondition,
            Self::NotFound { .. } => Code::NotFound,
            Self::OutOfRange { .. } => Code::OutOfRange,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Cancelled { .. } => Code::Cancelled,
            Self::DeadlineExceeded { .. } => Code::DeadlineExceeded,
            Self::Internal { .. } => Code::Internal,
        }
    }

    /// The gRPC code's name, for example `INVALID_ARGUMENT`.
    #[must_use]
    pub fn code_name(&self) -> &'static str {
        code_name(self.code())
    }

    /// Whether the same request may succeed later, unchanged.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::ResourceExhausted { .. } | Self::Unavailable { .. } => true,
            Self::InvalidArgument { .. }
            | Self::DeviceMemory { .. }
            | Self::FailedPrecondition { .. }
            | Self::NotFound { .. }
            | Self::OutOfRange { .. }
            | Self::Cancelled { .. }
            | Self::DeadlineExceeded { .. }
            | Self::Internal { .. } => false,
        }
    }

    /// When the service asks to be tried again.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::ResourceExhausted { retry_after, .. } | Self::Unavailable { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The wrong fields; empty unless the request is at fault.
    #[must_use]
    pub fn violations(&self) -> &[FieldViolation] {
        match self {
            Self::InvalidArgument { violations } => violations,
            _ => &[],
        }
    }

    /// Gives an internal fault its reference, and the log its details. Others stay as they are.
    ///
    /// Whoever shows an error to somebody outside calls this first; the mapping to [`Status`] does.
    #[must_use]
    pub fn masked(self) -> Self {
        match self {
            Self::Internal { message, reference: None } => {
                let reference = uuid::Uuid::new_v4().simple().to_string();
                tracing::error!(reference, "internal error: {message}");
                let message = format!("internal error; the service's log has the details under {reference}");
                Self::Internal { message, reference: Some(reference) }
            }
            other => other,
        }
    }

    fn details(&self) -> ErrorDetails {
        match self {
            Self::InvalidArgument { violations } => {
                let (mut details, mut left) = (ErrorDetails::new(), VIOLATION_BYTES);
                for violation in violations {
                    let field = cut(&violation.field, 128.min(left));
                    let description = cut(&violation.description, left - field.len());
                    left -= field.len() + description.len();
                    details.add_bad_request_violation(field, description);
                    if left == 0 {
                        break;
                    }
                }
                details
            }
            Self::ResourceExhausted { retry_after, .. } | Self::Unavailable { retry_after, .. } => match retry_after {
                Some(delay) => ErrorDetails::with_retry_info(Some(*delay)),
                None => ErrorDetails::new(),
            },
            Self::DeviceMemory { stage, device, needed_bytes, free_bytes, budget_bytes } => {
                ErrorDetails::with_error_info(
                    DEVICE_MEMORY,
                    DOMAIN,
                    [
                        ("stage", cut(stage, 64)),
                        ("device", cut(device, 64)),
                        ("needed_bytes", needed_bytes.to_string()),
                        ("free_bytes", free_bytes.to_string()),
                        ("budget_bytes", budget_bytes.to_string()),
                    ]
                    .map(|(k, v)| (k.to_owned(), v)),
                )
            }
            Self::Internal { reference: Some(reference), .. } => {
                let metadata = [("reference".to_owned(), cut(reference, 64))];
                ErrorDetails::with_error_info(INTERNAL, DOMAIN, metadata)
            }
            Self::Internal { reference: None, .. }
            | Self::FailedPrecondition { .. }
            | Self::NotFound { .. }
            | Self::OutOfRange { .. }
            | Self::Cancelled { .. }
            | Self::DeadlineExceeded { .. } => ErrorDetails::new(),
        }
    }

    /// Reads what another service answered.
    ///
    /// A connection that cannot be made or breaks is [`ServiceError::Unavailable`]. Codes that no service of ours
    /// gives are [`ServiceError::Internal`] with the code's name in the message.
    #[must_use]
    pub fn from_status(status: &Status) -> Self {
        let message = status.message().to_owned();
        let details = status.get_error_details();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let info = |reason: &str| {
            let found = details.error_info().filter(|i| i.domain == DOMAIN && i.reason == reason)?;
            Some(&found.metadata)
        };
        match status.code() {
            Code::InvalidArgument => {
                let mut violations: Vec<FieldViolation> = details
                    .bad_request()
                    .into_iter()
                    .flat_map(|b| &b.field_violations)
                    .map(|v| FieldViolation { field: v.field.clone(), description: v.description.clone() })
                    .collect();
                if violations.is_empty() {
                    violations.push(FieldViolation { field: "request".to_owned(), description: message });
                }
                Self::InvalidArgument { violations }
            }
            Code::ResourceExhausted => match info(DEVICE_MEMORY).and_then(device_memory) {
                Some(error) => error,
                None => Self::ResourceExhausted { message, retry_after },
            },
            Code::FailedPrecondition => Self::FailedPrecondition { message },
            Code::NotFound => Self::NotFound { message },
            Code::OutOfRange => Self::OutOfRange { message },
            Code::Unavailable => Self::Unavailable { message, retry_after },
            Code::Cancelled => Self::Cancelled { message },
            Code::DeadlineExceeded => Self::DeadlineExceeded { message },
            Code::Internal if info(INTERNAL).is_some() => {
                Self::Internal { message, reference: info(INTERNAL).and_then(|m| m.get("reference").cloned()) }
            }
            // Only a status made on this side of a broken connection has a source.
            Code::Unknown | Code::Internal if std::error::Error::source(status).is_some() => {
                Self::Unavailable { message: format!("the connection broke: {message}"), retry_after }
            }
            Code::Internal => Self::internal(message),
            Code::Ok
            | Code::Unknown
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Aborted
            | Code::Unimplemented
            | Code::DataLoss
            | Code::Unauthenticated => Self::internal(format!("{}: {message}", code_name(status.code()))),
        }
    }
}

fn device_memory(metadata: &HashMap<String, String>) -> Option<ServiceError> {
    let bytes = |key: &str| metadata.get(key)?.parse().ok();
    Some(ServiceError::DeviceMemory {
        stage: metadata.get("stage")?.clone(),
        device: metadata.get("device")?.clone(),
        needed_bytes: bytes("needed_bytes")?,
        free_bytes: bytes("free_bytes")?,
        budget_bytes: bytes("budget_bytes")?,
    })
}

fn code_name(code: Code) -> &'static str {
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

/// The first `limit` bytes at most, ending in `…` where something is missing and there is room to say so.
fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let mark = if limit >= 3 { "…" } else { "" };
    let end = (0..=limit - mark.len()).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    format!("{}{mark}", &text[..end])
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let error = error.masked();
        Status::with_error_details(error.code(), cut(&error.to_string(), MESSAGE_BYTES), error.details())
    }
}

impl From<Status> for ServiceError {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

/// A tensor that a caller sent wrongly.
impl From<TensorError> for ServiceError {
    fn from(error: TensorError) -> Self {
        let field = if error.name().is_empty() { "tensor" } else { error.name() };
        Self::invalid(field, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_kind() -> Vec<ServiceError> {
        let message = || "what happened".to_owned();
        let second = Some(Duration::from_millis(1500));
        vec![
            ServiceError::InvalidArgument {
                violations: vec![
                    FieldViolation { field: "steps".into(), description: "0, allowed are 1 to 200".into() },
                    FieldViolation { field: "size".into(), description: "7, allowed are 64 to 1280".into() },
                ],
            },
            ServiceError::ResourceExhausted { message: message(), retry_after: second },
            ServiceError::ResourceExhausted { message: message(), retry_after: None },
            ServiceError::DeviceMemory {
                stage: "diffusion".into(),
                device: "cpu".into(),
                needed_bytes: 9,
                free_bytes: 8,
                budget_bytes: 10,
            },
            ServiceError::FailedPrecondition { message: message() },
            ServiceError::NotFound { message: message() },
            ServiceError::OutOfRange { message: message() },
            ServiceError::Unavailable { message: message(), retry_after: second },
            ServiceError::Cancelled { message: message() },
            ServiceError::DeadlineExceeded { message: message() },
            ServiceError::Internal { message: message(), reference: Some("r1".into()) },
        ]
    }

    #[test]
    fn every_kind_survives_the_way_over_the_wire() {
        for error in every_kind() {
            let status = Status::from(error.clone());
            assert_eq!(status.code(), error.code());
            assert_eq!(ServiceError::from_status(&status), error);
        }
    }

    #[test]
    fn an_internal_fault_shows_a_reference_and_not_its_details() {
        let status = Status::from(ServiceError::internal("secret of the house"));
        assert_eq!(status.code(), Code::Internal);
        assert!(!status.message().contains("secret"));
        let ServiceError::Internal { message, reference: Some(reference) } = ServiceError::from_status(&status) else {
            panic!("{status:?}")
        };
        assert!(message.contains(&reference));
        let again = Status::from(ServiceError::from_status(&status));
        assert_eq!(again.message(), status.message(), "a reference is passed on, not replaced");
    }

    #[test]
    fn long_errors_stay_within_what_headers_hold() {
        let violations =
            (0..400).map(|i| FieldViolation { field: format!("field.{i}"), description: "é".repeat(300) }).collect();
        let status = Status::from(ServiceError::InvalidArgument { violations });
        assert!(status.message().len() <= MESSAGE_BYTES);
        assert!(status.details().len() <= MESSAGE_BYTES + 2 * VIOLATION_BYTES, "{}", status.details().len());
        let back = ServiceError::from_status(&status);
        assert_eq!(back.violations()[0].field, "field.0");
    }

    #[test]
    fn codes_of_others_keep_their_name() {
        let error = ServiceError::from_status(&Status::unimplemented("no such rpc"));
        assert_eq!(error.code_name(), "INTERNAL");
        assert!(error.to_string().contains("UNIMPLEMENTED"), "{error}");
    }

    #[test]
    fn a_wrong_tensor_names_the_field() {
        let error = ServiceError::from(TensorError::Missing { name: "latents".into() });
        assert_eq!(error.violations()[0].field, "latents");
    }

    #[test]
    fn cut_ends_between_characters() {
        assert_eq!(cut("ééé", 5), "é…");
        assert_eq!(cut("ééé", 6), "ééé");
        assert_eq!(cut("ééé", 2), "é");
        assert_eq!(cut("ééé", 0), "");
    }
}
