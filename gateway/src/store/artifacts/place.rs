//! Where the files are, as operators say it: the URL of a bucket, and who may use it.

use std::{fmt, net::IpAddr, path::Path, sync::Arc, time::Duration};

use http::Uri;
use object_store::{
    BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
};

use super::Bucket;

/// Most bytes of a file with credentials.
const CREDENTIALS_BYTES: u64 = 64 << 10;
/// How long the store may take for one piece of a file, and until it takes a connection.
const PIECE_TIME: &str = "60s";
const CONNECT_TIME: &str = "5s";
/// How a call is repeated by itself. Whoever needs its answer has more patience than this.
const REPEATS: usize = 3;
const REPEAT_TIME: Duration = Duration::from_secs(20);
/// Schemes of URLs.
const SCHEMES: [(&str, Service); 3] = [("s3://", Service::S3), ("gs://", Service::Google), ("az://", Service::Azure)];

/// Whose interface a store speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    S3,
    Google,
    Azure,
}

/// Who the store is told that we are.
#[derive(Clone, PartialEq, Eq)]
enum Credentials {
    /// What the process's surroundings say: its environment, or the machine that it runs on.
    Surroundings,
    /// Lines of a file: names as the environment has them, in small letters, and values.
    Named(Vec<(String, String)>),
    /// The key of a service account, JSON.
    Account(String),
}

/// A bucket of an object store. Shown without credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct Place {
    url: String,
    service: Service,
    bucket: String,
    prefix: String,
    endpoint: Option<String>,
    credentials: Credentials,
}

/// What else is said of a bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access<'a> {
    /// Where the store is, if not where its maker has it.
    pub endpoint: Option<&'a str>,
    /// It may be reached without TLS, also at other addresses than those of this machine.
    pub plain: bool,
    /// The file with the credentials; without it those of the surroundings are taken.
    pub credentials: Option<&'a Path>,
}

impl Place {
    /// Reads a URL as in `s3://BUCKET/PREFIX`.
    ///
    /// Errors: which of the flags is wrong, and what is wrong with it.
    pub fn new(url: &str, access: &Access<'_>) -> Result<Self, (&'static str, String)> {
        let of_url = |told: &str| ("--artifacts", told.to_owned());
        let known = SCHEMES.iter().find_map(|(scheme, service)| Some((url.strip_prefix(scheme)?, *service)));
        let (rest, service) = known.ok_or_else(|| of_url("it does not begin with s3://, gs:// or az://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_end_matches('/');
        let plain_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if bucket.is_empty() || !bucket.chars().all(plain_name) {
            return Err(of_url("the bucket's name has letters, digits, '-', '_' and '.' alone"));
        }
        let parts_fit = prefix.split('/').all(|part| !matches!(part, "" | "." | "..") && part.chars().all(plain_name));
        if !prefix.is_empty() && !parts_fit {
            return Err(of_url("the prefix's parts have letters, digits, '-', '_' and '.' alone"));
        }
        let endpoint = access.endpoint.map(|endpoint| check_endpoint(endpoint, access.plain)).transpose()?;
        if access.plain && endpoint.as_ref().is_none_or(|endpoint| endpoint.starts_with("https:")) {
            let told = "there is no --artifacts-endpoint of http:// that it is for";
            return Err(("--artifacts-plain-http", told.to_owned()));
        }
        let credentials = match access.credentials {
            None => Credentials::Surroundings,
            Some(file) => read_credentials(file, service)
                .map_err(|told| ("--artifacts-credentials-file", format!("{}: {told}", file.display())))?,
        };
        let place = Self {
            url: url.to_owned(),
            service,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint,
            credentials,
        };
        Ok(place)
    }

    /// Makes what speaks to the store. Nothing is said to it yet.
    ///
    /// Errors: something needed is not told, such as the account.
    pub(crate) fn open(&self) -> Result<Bucket, String> {
        // Refused if there is one already, which then is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = match self.service {
            Service::S3 => self.s3(),
            Service::Google => self.google(),
            Service::Azure => self.azure(),
        };
        let store = store.map_err(|error| error.to_string())?;
        let prefix = object_store::path::Path::parse(&self.prefix).map_err(|error| error.to_string())?;
        Ok(Bucket::new(&self.url, store, prefix))
    }

    /// Settings of the connections, the same for each service.
    fn connections(&self) -> impl Iterator<Item = (ClientConfigKey, &'static str)> {
        let plain = self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http:"));
        let always = [(ClientConfigKey::Timeout, PIECE_TIME), (ClientConfigKey::ConnectTimeout, CONNECT_TIME)];
        // Without TLS no certificates are needed, and a small machine has none.
        let plainly = [(ClientConfigKey::AllowHttp, "true"), (ClientConfigKey::NoSystemCertificates, "true")];
        always.into_iter().chain(plainly.into_iter().filter(move |_| plain))
    }

    /// The lines of the file with the credentials, each as a setting.
    fn named<Key: std::str::FromStr>(&self) -> impl Iterator<Item = (Key, &str)> {
        let lines = if let Credentials::Named(lines) = &self.credentials { lines.as_slice() } else { &[] };
        lines.iter().filter_map(|(name, value)| Some((name.parse().ok()?, value.as_str())))
    }

    fn s3(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut builder = match self.credentials {
            Credentials::Surroundings => AmazonS3Builder::from_env(),
            _ => AmazonS3Builder::new(),
        };
        for (key, value) in self.named::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
        for (key, value) in self.connections() {
            builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        // Files are removed one by one, which every store that speaks S3 can do.
        let builder = builder.with_bucket_name(&self.bucket).with_disable_bulk_delete(true);
        Ok(Arc::new(builder.with_retry(repeats()).build()?))
    }

    fn google(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut builder = match &self.credentials {
            Credentials::Account(key) => GoogleCloudStorageBuilder::new().with_service_account_key(key),
            _ => GoogleCloudStorageBuilder::from_env(),
        };
        for (key, value) in self.connections() {
            builder = builder.with_config(GoogleConfigKey::Client(key), value);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_base_url(endpoint);
        }
        Ok(Arc::new(builder.with_bucket_name(&self.bucket).with_retry(repeats()).build()?))
    }

    fn azure(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut builder = match self.credentials {
            Credentials::Surroundings => MicrosoftAzureBuilder::from_env(),
            _ => MicrosoftAzureBuilder::new(),
        };
        for (key, value) in self.named::<AzureConfigKey>() {
            builder = builder.with_config(key, value);
        }
        for (key, value) in self.connections() {
            builder = builder.with_config(AzureConfigKey::Client(key), value);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        Ok(Arc::new(builder.with_container_name(&self.bucket).with_retry(repeats()).build()?))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({self})")
    }
}

fn repeats() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: REPEATS, retry_timeout: REPEAT_TIME }
}

/// The URL of a store, without what is not needed at its end.
fn check_endpoint(endpoint: &str, plain: bool) -> Result<String, (&'static str, String)> {
    let wrong = |told: &str| ("--artifacts-endpoint", told.to_owned());
    let uri = endpoint.parse::<Uri>().ok().filter(|uri| uri.authority().is_some() && uri.query().is_none());
    let no_url = || wrong("not a URL such as https://s3.example.com");
    let uri = uri.ok_or_else(no_url)?;
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let here = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        // What is before an @ would be a password that other users of the machine can read.
        _ if endpoint.contains('@') => Err(wrong("credentials come in a file")),
        Some("https") => Ok(endpoint.trim_end_matches('/').to_owned()),
        Some("http") if plain || here => Ok(endpoint.trim_end_matches('/').to_owned()),
        Some("http") => Err(wrong("without TLS only this machine is spoken to; --artifacts-plain-http allows others")),
        _ => Err(no_url()),
    }
}

/// Reads the file with the credentials. What it holds is not repeated in the message.
fn read_credentials(file: &Path, service: Service) -> Result<Credentials, String> {
    let length = std::fs::metadata(file).map_err(|error| error.to_string())?.len();
    if length > CREDENTIALS_BYTES {
        return Err(format!("{length} bytes, the limit is {CREDENTIALS_BYTES}"));
    }
    let text = std::fs::read_to_string(file).map_err(|error| error.to_string())?;
    if service == Service::Google {
        let key = serde_json::from_str::<serde_json::Value>(&text).ok();
        let is_key = key.is_some_and(|key| key["private_key"].is_string() && key["client_email"].is_string());
        return if is_key { Ok(Credentials::Account(text)) } else { Err("not the key of a service account".into()) };
    }
    let mut named = Vec::new();
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if line.is_empty() || line.starts_with('#') || line == "[default]" {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            return Err(format!("line {number} is not as in NAME=VALUE, nor [default]"));
        };
        let (name, value) = (name.trim().to_lowercase(), value.trim().to_owned());
        let known = match service {
            Service::S3 => name.parse().is_ok_and(is_credential_of_s3),
            Service::Google | Service::Azure => name.parse().is_ok_and(is_credential_of_azure),
        };
        if !known || value.is_empty() {
            return Err(format!("line {number} names no credential, or has none"));
        }
        named.push((name, value));
    }
    if named.is_empty() { Err("it is empty".into()) } else { Ok(Credentials::Named(named)) }
}

fn is_credential_of_s3(key: AmazonS3ConfigKey) -> bool {
    use AmazonS3ConfigKey::{AccessKeyId, DefaultRegion, Region, SecretAccessKey, Token};
    matches!(key, AccessKeyId | SecretAccessKey | Token | Region | DefaultRegion)
}

fn is_credential_of_azure(key: AzureConfigKey) -> bool {
    use AzureConfigKey::{AccessKey, AccountName, AuthorityId, ClientId, ClientSecret, SasKey, Token};
    matches!(key, AccessKey | AccountName | AuthorityId | ClientId | ClientSecret | SasKey | Token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn each_services_bucket_is_found_with_credentials_of_a_file_that_are_never_shown() {
        let s3 =
            file("# of the cluster\n[default]\naws_access_key_id = me\naws_secret_access_key = hidden\nregion=eu-1\n");
        let azure = file("AZURE_STORAGE_ACCOUNT_NAME=me\nAZURE_STORAGE_ACCOUNT_KEY=aGlkZGVu\n");
        let key = r#"{"private_key": "hidden", "private_key_id": "1", "client_email": "me@example.com", "disable_oauth": true}"#;
        let google = file(key);
        for (url, credentials, endpoint) in [
            ("s3://films/avatar/one", s3.path(), Some("http://127.0.0.1:9000")),
            ("s3://films", s3.path(), None),
            ("az://films/avatar", azure.path(), None),
            ("az://films", azure.path(), Some("https://blobs.example.com/")),
            ("gs://films/avatar", google.path(), Some("http://localhost:4443")),
        ] {
            let access = Access { endpoint, plain: false, credentials: Some(credentials) };
            let place = Place::new(url, &access).unwrap();
            let shown = format!("{place} {place:?} {:?}", place.open().unwrap());
            assert!(shown.contains(url) && !shown.contains("hidden") && !shown.contains("aGlkZGVu"), "{shown}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_flag_and_no_secret() {
        let s3 = file("aws_access_key_id=hidden\nnonsense\n");
        let setting = file("aws_access_key_id=hidden\naws_allow_http=true\n");
        let (none, nowhere) = (file("\n"), Path::new("/no/such/file"));
        let allowed = Access::default();
        let at = |endpoint: &'static str| Access { endpoint: Some(endpoint), ..Access::default() };
        let with = |credentials| Access { credentials: Some(credentials), ..Access::default() };
        let plain = |endpoint| Access { endpoint, plain: true, credentials: None };
        for (url, access, flag, part) in [
            ("ftp://films", allowed.clone(), "--artifacts", "s3://"),
            ("s3://", allowed.clone(), "--artifacts", "bucket"),
            ("s3://me:hidden@films", allowed.clone(), "--artifacts", "bucket"),
            ("s3://films/../other", allowed.clone(), "--artifacts", "prefix"),
            ("s3://films//other", allowed.clone(), "--artifacts", "prefix"),
            ("s3://films/a?b", allowed, "--artifacts", "prefix"),
            ("s3://films", at("http://store.example.com"), "--artifacts-endpoint", "TLS"),
            ("s3://films", at("http://10.0.0.1:9000"), "--artifacts-endpoint", "TLS"),
            ("s3://films", at("https://me:hidden@store"), "--artifacts-endpoint", "file"),
            ("s3://films", at("store"), "--artifacts-endpoint", "URL"),
            ("s3://films", plain(None), "--artifacts-plain-http", "no --artifacts-endpoint"),
            ("s3://films", plain(Some("https://store")), "--artifacts-plain-http", "no --artifacts-endpoint"),
            ("s3://films", with(s3.path()), "--artifacts-credentials-file", "line 2"),
            ("s3://films", with(setting.path()), "--artifacts-credentials-file", "line 2"),
            ("az://films", with(s3.path()), "--artifacts-credentials-file", "line 1"),
            ("gs://films", with(s3.path()), "--artifacts-credentials-file", "service account"),
            ("s3://films", with(none.path()), "--artifacts-credentials-file", "empty"),
            ("s3://films", with(nowhere), "--artifacts-credentials-file", "/no/such/file"),
        ] {
            let (wrong, told) = Place::new(url, &access).unwrap_err();
            assert!(
                wrong == flag && told.contains(part) && !told.contains("hidden"),
                "{url} {access:?}: {wrong}: {told}"
            );
        }
        let open = ["http://10.0.0.1:9000", "http://store.example.com"];
        assert!(open.iter().all(|&endpoint| Place::new("s3://films", &plain(Some(endpoint))).is_ok()));
    }
}
