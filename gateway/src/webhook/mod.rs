//! Callbacks: whoever asked for it is told that a generation has ended, at least once.
//!
//! What is to be sent is stored together with the end, and goes only when it was taken or 24 hours have passed.

mod address;
mod secret;

use std::time::Duration;

use proto::v1::Generation;
use reqwest::{Client, StatusCode, redirect::Policy};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use self::address::Allowed;
pub use self::secret::Secret;
use crate::{
    api::video::{Video, status_name},
    fault::Fault,
    store::{Due, Store, unix_ms},
};

/// How long a receiver may take to answer.
const ANSWER: Duration = Duration::from_secs(20);
/// How long whoever sends has it for itself; longer than an answer may take.
pub(crate) const SENDING: Duration = Duration::from_secs(60);
/// For how long after the end it is tried.
pub(crate) const TRIED_FOR: Duration = Duration::from_secs(24 * 3600);
/// Waits between attempts, in seconds; the last one is repeated.
const BACKOFF_SECONDS: [u64; 9] = [1, 5, 30, 120, 600, 1800, 3600, 7200, 14_400];
/// How long it waits where records cannot be read, or nothing is due.
const LOOK: Duration = Duration::from_secs(5);

/// Who is called back, and how it is signed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WebhookOptions {
    /// The key of the signatures; without one nobody is called back.
    pub secret: Option<Secret>,
    /// Hosts, or hosts with a port, that may be called without TLS and at addresses that are not public.
    pub allow: Vec<String>,
}

/// What is sent.
#[derive(Debug, Serialize)]
struct Message<'a> {
    /// The same for every attempt.
    id: &'a str,
    object: &'static str,
    /// Unix time in seconds.
    created_at: u64,
    /// `video.completed`, `video.failed` or `video.cancelled`.
    #[serde(rename = "type")]
    kind: String,
    data: Video,
}

/// Refuses an address that would never be called; an empty one is none.
pub(crate) fn check(options: &WebhookOptions, address: &str) -> Result<(), Fault> {
    if address.is_empty() {
        return Ok(());
    }
    if options.secret.is_none() {
        return Err(Fault::invalid("webhook", "this server calls nobody back: it has no secret to sign with"));
    }
    let allowed = Allowed(options.allow.clone());
    allowed.read(address).map(drop).map_err(|wrong| Fault::invalid("webhook", wrong))
}

/// The id of a generation's message.
pub(crate) fn message_id(generation_id: &str) -> String {
    format!("evt_{generation_id}")
}

/// The body of the message about a generation that has ended.
pub(crate) fn body(generation: &Generation) -> Vec<u8> {
    let id = message_id(&generation.generation_id);
    let message = Message {
        id: &id,
        object: "event",
        created_at: generation.ended_unix_ms / 1000,
        kind: format!("video.{}", status_name(generation.state())),
        data: Video::from(generation),
    };
    serde_json::to_vec(&message).unwrap_or_default()
}

/// When to try again after so many attempts.
fn backoff(attempts: u64) -> Duration {
    let at = usize::try_from(attempts.saturating_sub(1)).unwrap_or(usize::MAX);
    Duration::from_secs(BACKOFF_SECONDS[at.min(BACKOFF_SECONDS.len() - 1)])
}

/// Sends what is due until the gateway closes.
pub(crate) async fn deliver(store: Store, options: WebhookOptions, closing: CancellationToken) {
    let Some(secret) = options.secret else { return };
    let allowed = Allowed(options.allow);
    let sending = async {
        loop {
            let ended = store.webhook_stored();
            match store.due_webhook().await {
                Ok(Some(due)) => {
                    let outcome = send(&due, &secret, &allowed).await;
                    if let Err(fault) = settle(&store, &due, outcome).await {
                        tracing::error!(%fault, "what became of a webhook was not stored; it may be sent again");
                    }
                    continue;
                }
                Ok(None) => {}
                Err(fault) => tracing::error!(%fault, "the webhooks cannot be read"),
            }
            let _ = tokio::time::timeout(LOOK, ended).await;
        }
    };
    closing.run_until_cancelled(sending).await;
}

/// How an attempt ended.
enum Sent {
    Taken,
    /// The receiver wants none.
    Unwanted,
    Refused(String),
}

async fn settle(store: &Store, due: &Due, outcome: Sent) -> Result<(), Fault> {
    let (generation_id, attempts) = (due.generation_id.as_str(), due.attempts);
    match outcome {
        Sent::Taken => tracing::info!(generation_id, attempts, "the webhook was taken"),
        Sent::Unwanted => {
            tracing::warn!(generation_id, attempts, "the webhook is unwanted: its receiver is gone for good")
        }
        Sent::Refused(reason) => {
            let wait = backoff(attempts);
            let next_ms = unix_ms() + wait.as_millis() as u64;
            if next_ms < due.until_ms {
                tracing::warn!(generation_id, attempts, reason, wait_s = wait.as_secs(), "the webhook is tried again");
                return store.retry_webhook(due, next_ms).await;
            }
            tracing::error!(generation_id, attempts, reason, "the webhook was given up");
        }
    }
    store.forget_webhook(due).await
}

/// Sends one message, once.
async fn send(due: &Due, secret: &Secret, allowed: &Allowed) -> Sent {
    match attempt(due, secret, allowed).await {
        Ok(status) if status.is_success() => Sent::Taken,
        Ok(StatusCode::GONE) => Sent::Unwanted,
        Ok(status) => Sent::Refused(format!("the receiver answered {status}")),
        Err(reason) => Sent::Refused(reason),
    }
}

async fn attempt(due: &Due, secret: &Secret, allowed: &Allowed) -> Result<StatusCode, String> {
    // Both are looked at again: the options may be others now, and names lead elsewhere.
    let url = allowed.read(&due.url)?;
    let addresses = allowed.resolve(&url).await?;
    // Refused if there is one already, which then is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        Client::builder()
            .user_agent(concat!("avatar/", env!("CARGO_PKG_VERSION")))
            // Whoever answers could send us anywhere.
            .redirect(Policy::none())
            .no_proxy()
            .timeout(ANSWER)
            .resolve_to_addrs(url.host_str().unwrap_or_default(), &addresses)
    };
    let client = match builder().build() {
        // A machine without root certificates can still reach an allowed host without TLS.
        Err(_) if url.scheme() == "http" => builder().tls_certs_only([]).build(),
        other => other,
    };
    let client = client.map_err(|error| error.to_string())?;
    let (id, unix_seconds) = (message_id(&due.generation_id), unix_ms() / 1000);
    let request = client
        .post(url)
        .header("content-type", "application/json")
        .header("webhook-id", &id)
        .header("webhook-timestamp", unix_seconds)
        .header("webhook-signature", secret.sign(&id, unix_seconds, &due.body))
        .body(due.body.clone());
    // The address may hold what only the receiver should know.
    let answer = request.send().await.map_err(|error| error.without_url().to_string())?;
    Ok(answer.status())
}

/// Reads the names of hosts that are allowed, with commas between.
pub(crate) fn parse_hosts(text: &str) -> Result<Vec<String>, String> {
    let hosts = text.split(',').map(str::trim).map(|host| {
        let good =
            !host.is_empty() && !host.contains(['/', '@', '*']) && host.bytes().all(|byte| byte.is_ascii_graphic());
        if good { Ok(host.to_owned()) } else { Err(format!("{host:?} is not HOST or HOST:PORT")) }
    });
    hosts.collect()
}

#[cfg(test)]
mod tests {
    use proto::v1::GenerationState;

    use super::*;

    #[test]
    fn waits_grow_and_stay_at_the_longest() {
        let waits: Vec<u64> = (1..=11).map(|attempts| backoff(attempts).as_secs()).collect();
        assert_eq!(waits, [1, 5, 30, 120, 600, 1800, 3600, 7200, 14_400, 14_400, 14_400]);
        assert_eq!(backoff(u64::MAX).as_secs(), 14_400);
    }

    #[test]
    fn a_message_says_what_happened_to_which_video() {
        let generation = Generation {
            generation_id: "g".into(),
            state: GenerationState::Cancelled.into(),
            ended_unix_ms: 5999,
            ..Generation::default()
        };
        let message: serde_json::Value = serde_json::from_slice(&body(&generation)).unwrap();
        assert_eq!((&message["id"], &message["type"]), (&"evt_g".into(), &"video.cancelled".into()));
        assert_eq!((&message["created_at"], &message["data"]["id"]), (&5.into(), &"g".into()));
    }

    #[test]
    fn allowed_hosts_are_names_with_a_port_or_without() {
        assert_eq!(parse_hosts("hooks.local, 10.0.0.5:8080,[::1]:80").unwrap().len(), 3);
        for wrong in ["", "a,,b", "http://a", "*", "a b"] {
            assert!(parse_hosts(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_needs_a_server_that_signs() {
        assert!(check(&WebhookOptions::default(), "").is_ok());
        let fault = check(&WebhookOptions::default(), "https://example.com/").unwrap_err();
        assert!(fault.message.contains("no secret"), "{fault}");
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let options = WebhookOptions { secret: Some(secret), ..WebhookOptions::default() };
        assert!(check(&options, "https://example.com/").is_ok());
        assert_eq!(check(&options, "https://10.0.0.1/").unwrap_err().field(), Some("webhook"));
    }
}
