//! Which image of which registry: `HOST[:PORT]/NAME[:TAG][@DIGEST]`, as docker writes it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use thiserror::Error;

use crate::sha256::Sha256;

/// What is pulled if nobody says otherwise, as docker does.
const LATEST: &str = "latest";
/// By the specification of registries.
const LONGEST_NAME: usize = 255;
const LONGEST_TAG: usize = 128;

/// An image at a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// With a port, if there is one.
    host: String,
    name: String,
    tag: Option<String>,
    digest: Option<Sha256>,
}

/// A text names no image of a registry.
#[derive(Debug, Error)]
#[error("{text:?} is not like HOST[:PORT]/NAME[:TAG|@DIGEST]: {reason}")]
pub struct InvalidReference {
    text: String,
    reason: &'static str,
}

impl Reference {
    /// The registry, with a port if there is one.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// What the image is called there.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The digest, which is what counts if there is one, else the tag.
    pub(super) fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => LATEST.to_owned(),
        }
    }

    pub(super) fn digest(&self) -> Option<&Sha256> {
        self.digest.as_ref()
    }

    /// Whether nobody else can listen or answer between here and there, so that no encryption is needed.
    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(split_port(&self.host).0)
    }
}

/// Whether that is this machine; without a port.
pub(super) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = |address: IpAddr| address.is_loopback();
    host == "localhost" || address.parse().is_ok_and(is_loopback)
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        parse(text).map_err(|reason| InvalidReference {
            text: text.to_owned(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (host, path) = text
        .split_once('/')
        .ok_or("no / parts the registry from the name")?;
    if !is_host(host) {
        return Err("it begins with no host; write localhost:5000 or registry.example.org");
    }
    let (path, digest) = match path.split_once('@') {
        Some((path, digest)) => {
            let digest = digest.parse();
            let digest = digest.map_err(|_| "the digest is not like sha256:<64 hex digits>")?;
            (path, Some(digest))
        }
        None => (path, None),
    };
    let (name, tag) = match path.split_once(':') {
        Some((name, tag)) => (name, Some(tag)),
        None => (path, None),
    };
    if name.len() > LONGEST_NAME || !name.split('/').all(is_component) {
        return Err("a name is of a-z, 0-9 and single separators . _ - / between them");
    }
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("a tag is of a-z, A-Z, 0-9, . _ and -, up to 128");
    }
    Ok(Reference {
        host: host.to_owned(),
        name: name.to_owned(),
        tag: tag.map(str::to_owned),
        digest,
    })
}

/// A name, an IPv4 address, or an IPv6 address in brackets; a port behind it. A word alone is no host: without one, a
/// name with a `/` in it would be one.
fn is_host(text: &str) -> bool {
    let (host, port) = split_port(text);
    let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
    let inner = host
        .strip_prefix('[')
        .and_then(|inner| inner.strip_suffix(']'));
    let is_name = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
            !label.is_empty() && !label.starts_with('-') && label.chars().all(is_plain)
        }),
    };
    is_port && is_name && (host.contains(['.', ':']) || port.is_some() || host == "localhost")
}

fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (host, None),
    }
}

fn is_component(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.starts_with(is_letter)
        && text.ends_with(is_letter)
        && text
            .chars()
            .all(|c| is_letter(c) || matches!(c, '.' | '_' | '-'))
        && !text.contains("..")
}

fn is_tag(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=LONGEST_TAG).contains(&text.len())
        && !text.starts_with(['.', '-'])
        && text.chars().all(is_plain)
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.name)?;
        self.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))?;
        let mut digest = self.digest.iter();
        digest.try_for_each(|digest| write!(f, "@{digest}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_reads_back_as_it_was_written() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, version, is_loopback) in [
            ("localhost/web", "latest", true),
            ("localhost:5000/a/b.c_d--e:v1.0", "v1.0", true),
            ("127.0.0.2:5000/web:X", "X", true),
            ("[::1]:5000/web", "latest", true),
            ("[2001:db8::1]/web", "latest", false),
            ("registry.example.org/web:1", "1", false),
            ("127.0.0.1.example.org/web", "latest", false),
            ("box:5000/web", "latest", false),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), text);
            assert_eq!(reference.version(), version);
            assert_eq!(reference.is_loopback(), is_loopback, "{text}");
        }
        let reference: Reference = format!("localhost/web:1@{digest}").parse().unwrap();
        assert_eq!(reference.version(), digest, "the digest counts");
    }

    #[test]
    fn what_could_mean_something_else_in_an_address_is_refused() {
        for bad in [
            "web",
            "library/web",
            "/web",
            "localhost/",
            "localhost:x/web",
            "localhost/Web",
            "localhost/../web",
            "localhost/a//b",
            "localhost/a..b",
            "localhost/web:",
            "localhost/web:a/b",
            "localhost/web?x=1",
            "localhost/web:a b",
            "user@localhost/web",
            "localhost/web@sha256:12",
            "localhost/web@md5:12",
            "http://localhost/web",
            "-x.org/web",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
