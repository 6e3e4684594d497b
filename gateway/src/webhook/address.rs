//! Where callers are called back, and where never.
//!
//! A caller chooses the address, so it must not reach what only this machine or its network reaches. Names are looked up
//! here, all of their addresses are checked, and the connection is made to those that were checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;

/// Most bytes of an address.
const URL_BYTES: usize = 2048;

/// Hosts that may be called without TLS and at addresses that are not public.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Allowed(pub(super) Vec<String>);

impl Allowed {
    /// Whether `url` is of one of them: `HOST` stands for all its ports, `HOST:PORT` for one.
    fn has(&self, url: &Url) -> bool {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return false };
        let with_port = format!("{host}:{port}");
        self.0.iter().any(|known| known.eq_ignore_ascii_case(host) || known.eq_ignore_ascii_case(&with_port))
    }

    /// Reads an address that a caller gave.
    ///
    /// Errors: what is wrong with it. A name is not looked up yet.
    pub(super) fn read(&self, text: &str) -> Result<Url, String> {
        if text.len() > URL_BYTES {
            return Err(format!("{} bytes; the limit is {URL_BYTES}", text.len()));
        }
        let url = Url::parse(text).map_err(|error| format!("this is no URL: {error}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("a URL with a user or a password is not called".to_owned());
        }
        let Some(host) = url.host_str() else { return Err("the URL names no host".to_owned()) };
        match (url.scheme(), self.has(&url)) {
            ("https", _) | ("http", true) => {}
            ("http", false) => return Err(format!("{host} is called over https alone")),
            (other, _) => return Err(format!("the scheme {other:?} is not https")),
        }
        if let Some(address) = literal(host)
            && !self.has(&url)
            && !is_public(address)
        {
            return Err(format!("{address} is no public address"));
        }
        Ok(url)
    }

    /// The addresses that may be connected to for `url`.
    ///
    /// Errors: its name is not known, or leads to an address that is not public.
    pub(super) async fn resolve(&self, url: &Url) -> Result<Vec<SocketAddr>, String> {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err("the URL names no host".to_owned());
        };
        let found: Vec<SocketAddr> = match literal(host) {
            Some(address) => vec![SocketAddr::new(address, port)],
            None => tokio::net::lookup_host((host, port)).await.map_err(|error| format!("{host}: {error}"))?.collect(),
        };
        match found.iter().find(|address| !is_public(address.ip())) {
            _ if found.is_empty() => Err(format!("{host} has no address")),
            // One that is not public is one too many: the connection may take any of them.
            Some(address) if !self.has(url) => Err(format!("{host} is at {}, no public address", address.ip())),
            _ => Ok(found),
        }
    }
}

/// The address that a URL's host is itself.
fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether an address is of the open internet.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_documentation()
        // This network; shared by carriers; protocols; benchmarks; multicast and all above.
        || a == 0
        || (a, b & 0xc0) == (100, 64)
        || (a, b, c) == (192, 0, 0)
        || (a, b & 0xfe) == (198, 18)
        || a >= 224;
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    if let Some(inner) = address.to_ipv4_mapped() {
        return is_public_v4(inner);
    }
    let [a, b, c, ..] = address.segments();
    let inner = |high: u16, low: u16| {
        let ([p, q], [r, s]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(p, q, r, s))
    };
    match (a, b) {
        // Gateways to IPv4 carry an address of it.
        (0x64, 0xff9b) => address.segments()[2..6] == [0; 4] && inner(address.segments()[6], address.segments()[7]),
        (0x2002, high) => inner(high, c),
        // Protocols and tunnels; documentation, twice.
        (0x2001, 0..0x200) | (0x2001, 0xdb8) | (0x3fff, 0..0x1000) => false,
        // What is given out to the internet.
        _ => a & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(hosts: &[&str]) -> Allowed {
        Allowed(hosts.iter().map(|&host| host.to_owned()).collect())
    }

    #[test]
    fn addresses_that_are_not_of_the_open_internet_are_known() {
        for text in ["93.184.215.14", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]
        {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "192.0.2.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "::7f00:1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_not_called_is_refused_with_the_reason() {
        let none = allowed(&[]);
        for (url, part) in [
            ("http://example.com/hook", "over https alone"),
            ("ftp://example.com/", "not https"),
            ("file:///etc/passwd", "no host"),
            ("not a url", "no URL"),
            ("https://user:pw@example.com/", "a user or a password"),
            ("https://127.0.0.1/", "127.0.0.1 is no public address"),
            ("https://[::1]:8443/", "::1 is no public address"),
            // As numbers they are the same address.
            ("https://2130706433/", "127.0.0.1 is no public address"),
            ("https://0x7f.1/", "127.0.0.1 is no public address"),
        ] {
            let error = none.read(url).unwrap_err();
            assert!(error.contains(part), "{url}: {error}");
        }
        assert!(none.read(&format!("https://example.com/{}", "x".repeat(3000))).unwrap_err().contains("limit is 2048"));
        assert!(none.read("https://example.com:8443/hook?x=1").is_ok());
    }

    #[tokio::test]
    async fn a_name_of_this_machine_is_refused_when_it_is_looked_up_unless_it_is_allowed() {
        let url = Url::parse("https://localhost:9/hook").unwrap();
        let error = allowed(&[]).resolve(&url).await.unwrap_err();
        assert!(error.contains("no public address"), "{error}");
        assert!(allowed(&["localhost:8"]).resolve(&url).await.is_err());
        for hosts in [["localhost"], ["LOCALHOST:9"]] {
            let found = allowed(&hosts).resolve(&url).await.unwrap();
            assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 9));
        }
        assert!(allowed(&["127.0.0.1"]).read("http://127.0.0.1:80/hook").is_ok());
    }
}
