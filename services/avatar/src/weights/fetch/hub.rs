//! Requests to a model hub: the listing of a repository, and its files.

use std::time::Duration;

use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LINK, LOCATION, RANGE, RETRY_AFTER},
    redirect::Policy,
};

use super::{
    digest::Digest,
    failed,
    listing::{Listing, next_page},
    retry::{Retries, Trouble},
};
use crate::failure::Failure;

/// Bytes of a listing, all pages together.
const LISTING_BYTES: usize = 16 << 20;
/// Pages of a listing.
const PAGES: usize = 100;
/// Redirects from one request to its answer.
const REDIRECTS: usize = 10;
/// Time to connect.
const CONNECT: Duration = Duration::from_secs(20);
/// Time without a byte after which a connection counts as lost.
const SILENCE: Duration = Duration::from_secs(60);
/// The hash of a large file's content; stands on the endpoint's redirect.
const CONTENT_HASH: &str = "x-linked-etag";

/// Where to ask, and for what.
pub struct Hub {
    client: Client,
    endpoint: Url,
    repo: String,
    revision: String,
    /// Goes to the endpoint's own origin and nowhere else.
    authorization: Option<HeaderValue>,
}

/// The answer to a request, after all redirects.
pub struct Answer {
    /// 2xx, or 416.
    pub response: Response,
    /// What the endpoint says that the content hashes to.
    content_hash: Option<HeaderValue>,
}

impl Answer {
    /// Whether the answer is the content that `digest` names; `None` if it does not say.
    #[must_use]
    pub fn agrees(&self, digest: &Digest) -> Option<bool> {
        let etag = self.content_hash.as_ref().or_else(|| self.response.headers().get("etag"))?;
        digest.agrees(etag.to_str().ok()?)
    }
}

/// Reads an endpoint's address.
pub fn parse_endpoint(text: &str) -> Result<Url, Failure> {
    let wrong = |reason: &str| Failure::input("endpoint", format!("{text:?}: {reason}"));
    let mut url = Url::parse(text).map_err(|e| wrong(&format!("{e}; an example is https://huggingface.co")))?;
    if !matches!(url.scheme(), "https" | "http") || url.host().is_none() {
        return Err(wrong("it must begin with https:// or http:// and name a host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Failure::input("endpoint", "it holds a password; give a token with --token-file instead"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it must end with its path, without ? and #"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

/// Checks the name of a repository: an owner and a name.
pub fn check_repo(repo: &str) -> Result<(), Failure> {
    let part = |part: &str| {
        (1..=96).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !part.bytes().all(|b| b == b'.')
    };
    match repo.split_once('/') {
        Some((owner, name)) if part(owner) && part(name) => Ok(()),
        _ => Err(Failure::input("repo", format!("{repo:?}: it must be OWNER/NAME"))),
    }
}

/// Checks a branch, tag or commit.
pub fn check_revision(revision: &str) -> Result<(), Failure> {
    let plain = |c: char| !c.is_control() && !c.is_whitespace() && c != '\\';
    let whole = (1..=250).contains(&revision.len()) && revision.chars().all(plain);
    if whole && revision.split('/').all(|part| !matches!(part, "" | "." | "..")) {
        return Ok(());
    }
    Err(Failure::input("revision", format!("{revision:?}: it must name a branch, a tag or a commit")))
}

impl Hub {
    /// Prepares requests; sends none.
    ///
    /// `endpoint`, `repo` and `revision` have been checked.
    pub fn new(endpoint: Url, repo: &str, revision: &str, authorization: Option<HeaderValue>) -> Result<Self, Failure> {
        // Refused if there is one already, which then is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .user_agent(concat!("avatar/", env!("CARGO_PKG_VERSION")))
                .redirect(Policy::none())
                .connect_timeout(CONNECT)
                .read_timeout(SILENCE)
        };
        let client = match builder().build() {
            // A machine without root certificates can still reach an endpoint without TLS.
            Err(_) if endpoint.scheme() == "http" => builder().tls_certs_only([]).build(),
            other => other,
        };
        let client = client.map_err(|e| Failure {
            advice: Some("on Debian, the root certificates are in the package ca-certificates"),
            ..failed("FAILED_PRECONDITION", format!("cannot prepare TLS: {}", sentence(e)))
        })?;
        Ok(Self { client, endpoint, repo: repo.to_owned(), revision: revision.to_owned(), authorization })
    }

    /// The repository's page, for people.
    #[must_use]
    pub fn page(&self) -> String {
        self.address(&[], &[]).to_string()
    }

    /// Lists the repository; `note` hears of new attempts.
    pub async fn list(&self, mut retries: Retries, mut note: impl FnMut(String)) -> Result<Listing, Failure> {
        let mut url = self.address(&["api", "models"], &["tree", &self.revision]);
        url.set_query(Some("recursive=true"));
        let (mut listing, mut left) = (Listing::default(), LISTING_BYTES);
        for _ in 0..PAGES {
            let (headers, body) = loop {
                match self.page_of_listing(&url, left).await {
                    Ok(page) => break page,
                    Err(trouble) => {
                        let (wait, reason) = retries.after(trouble, "the listing")?;
                        note(format!("the listing: {reason}; trying again in {:.1} s", wait.as_secs_f64()));
                        tokio::time::sleep(wait).await;
                    }
                }
            };
            left -= body.len().min(left);
            listing.add(&body).map_err(|reason| failed("DATA_LOSS", format!("{}: {reason}", self.place())))?;
            let Some(next) = headers.get(LINK).and_then(|link| next_page(link.to_str().ok()?)) else {
                return Ok(listing);
            };
            url = self.follow(&url, next)?;
        }
        Err(failed("OUT_OF_RANGE", format!("{}: the listing has more than {PAGES} pages", self.place())))
    }

    async fn page_of_listing(&self, url: &Url, limit: usize) -> Result<(HeaderMap, Vec<u8>), Trouble> {
        let Answer { mut response, .. } = self.get(url.clone(), None, "the listing").await?;
        if response.status() != StatusCode::OK {
            return Err(
                failed("UNKNOWN", format!("{}: the listing answered {}", self.place(), response.status())).into()
            );
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| Trouble::passing(sentence(e)))? {
            if body.len() + chunk.len() > limit {
                let message = format!("{}: the listing is longer than {LISTING_BYTES} bytes", self.place());
                return Err(failed("OUT_OF_RANGE", message).into());
            }
            body.extend_from_slice(&chunk);
        }
        Ok((std::mem::take(response.headers_mut()), body))
    }

    /// Asks for a file, from byte `from` on.
    pub async fn open(&self, path: &str, from: u64) -> Result<Answer, Trouble> {
        let mut parts = vec!["resolve", &self.revision];
        parts.extend(path.split('/'));
        let range = (from > 0).then(|| format!("bytes={from}-"));
        self.get(self.address(&[], &parts), range.as_deref(), path).await
    }

    /// Follows redirects by itself, so that the token never leaves the endpoint.
    async fn get(&self, mut url: Url, range: Option<&str>, what: &str) -> Result<Answer, Trouble> {
        let mut content_hash = None;
        for _ in 0..=REDIRECTS {
            let ours = url.origin() == self.endpoint.origin();
            let mut request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(authorization) = self.authorization.as_ref().filter(|_| ours) {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let response = request.send().await.map_err(|e| Trouble::passing(sentence(e)))?;
            if ours && let Some(hash) = response.headers().get(CONTENT_HASH) {
                content_hash = Some(hash.clone());
            }
            let status = response.status();
            if status.is_success() || (status == StatusCode::RANGE_NOT_SATISFIABLE && range.is_some()) {
                return Ok(Answer { response, content_hash });
            }
            if !status.is_redirection() {
                return Err(self.refusal(&response, ours, what));
            }
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
            let target = target.ok_or_else(|| failed("UNKNOWN", format!("{what}: {status} without an address")))?;
            url = self.follow(&url, target)?;
        }
        Err(failed("OUT_OF_RANGE", format!("{what}: more than {REDIRECTS} redirects")).into())
    }

    /// Resolves an address that a server gave.
    fn follow(&self, from: &Url, target: &str) -> Result<Url, Failure> {
        let url = from.join(target).map_err(|e| failed("UNKNOWN", format!("a redirect leads nowhere: {e}")))?;
        let host = url.host_str().unwrap_or_default();
        match (from.scheme(), url.scheme()) {
            (_, "https") | ("http", "http") => Ok(url),
            ("https", "http") => Err(failed("UNKNOWN", format!("a redirect leads from https to http, at {host}"))),
            (_, scheme) => Err(failed("UNKNOWN", format!("a redirect leads to {scheme:?}, which is no web address"))),
        }
    }

    fn refusal(&self, response: &Response, ours: bool, what: &str) -> Trouble {
        let status = response.status();
        let host = response.url().host_str().unwrap_or_default();
        let wait =
            response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        if status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) {
            return Trouble::Passing { reason: format!("{host} answered {status}"), wait };
        }
        // A store that the endpoint redirects to: its signed addresses run out, and the next attempt gets a new one.
        if !ours {
            return Trouble::passing(format!("{host} answered {status}"));
        }
        let place = self.place();
        let (code, message, advice) = match status {
            StatusCode::UNAUTHORIZED => (
                "UNAUTHENTICATED",
                format!("{place}: {what}: {status}; it does not exist, or is shown only with a valid token"),
                Some("check --repo; give a token with --token-file FILE or HF_TOKEN"),
            ),
            StatusCode::FORBIDDEN => (
                "PERMISSION_DENIED",
                format!("{place}: {what}: {status}; this account may not read it"),
                Some("accept the terms on the repository's page with the account that the token belongs to"),
            ),
            StatusCode::NOT_FOUND => (
                "NOT_FOUND",
                format!("{place}: {what}: {status}; there is no such repository, revision or file"),
                Some("check --endpoint, --repo and --revision"),
            ),
            _ => ("UNKNOWN", format!("{place}: {what}: {status}"), None),
        };
        Failure { advice, ..failed(code, message) }.into()
    }

    fn place(&self) -> String {
        format!("{} at {} of {}", self.repo, self.revision, self.endpoint.host_str().unwrap_or_default())
    }

    /// The address `{endpoint}/{before}/{repo}/{after}`, each part escaped.
    fn address(&self, before: &[&str], after: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(before).extend(self.repo.split('/')).extend(after);
        }
        url
    }
}

/// An error with its causes and without the address, which may hold a signature.
fn sentence(error: reqwest::Error) -> String {
    let error = error.without_url();
    let (mut text, mut cause) = (error.to_string(), std::error::Error::source(&error));
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_an_address_without_secrets() {
        for (given, kept) in [("https://h/", "https://h/"), ("http://h:1/a/b/", "http://h:1/a/b")] {
            assert_eq!(parse_endpoint(given).unwrap().as_str(), kept);
        }
        for wrong in ["h", "ftp://h", "https://", "https://h?x", "https://h#x", "file:///etc"] {
            assert_eq!(parse_endpoint(wrong).unwrap_err().field.as_deref(), Some("endpoint"), "{wrong}");
        }
        let refused = parse_endpoint("https://me:secret@h").unwrap_err();
        assert!(!refused.sentence().contains("secret"));
    }

    #[test]
    fn names_that_would_change_the_address_are_refused() {
        assert!(check_repo("a-b/c_d.e").is_ok() && check_revision("refs/pr/1").is_ok());
        for wrong in ["", "a", "a/b/c", "a/..", "../a", "a/b?c", "a/"] {
            assert!(check_repo(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "a b", "../a", "a//b", "a\n"] {
            assert!(check_revision(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_revision_with_a_slash_is_one_part_of_the_address() {
        let endpoint = parse_endpoint("http://h/mirror/").unwrap();
        let hub = Hub::new(endpoint, "o/n", "refs/pr/1", None).unwrap();
        let url = hub.address(&["api", "models"], &["tree", &hub.revision]);
        assert_eq!(url.as_str(), "http://h/mirror/api/models/o/n/tree/refs%2Fpr%2F1");
    }
}
