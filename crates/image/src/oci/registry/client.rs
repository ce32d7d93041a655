//! Requests to a registry, and how it comes to know who asks.
//!
//! ```text
//! GET ─ 401 ─┬─ Basic ──────────────────────────────────────────> GET, with user and password
//!            └─ Bearer realm ─ GET realm, with them if we have ─> GET, with the token from there
//! ```
//!
//! Whatever comes back is a stranger's: bounded, and of its errors only the code is told.

use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::credentials::Credentials;
use super::reference::{Reference, is_loopback};
use super::{RegistryError, Unauthorised};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A registry that says nothing for that long is given up.
const SILENCE: Duration = Duration::from_secs(60);
/// What a registry says of an error, and a token, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

pub(super) struct Client<'a> {
    reference: &'a Reference,
    agent: Agent,
    credentials: Option<&'a Credentials>,
    /// What the registry knows us by; nothing until it asks.
    authorization: Option<String>,
}

impl<'a> Client<'a> {
    pub(super) fn new(reference: &'a Reference, credentials: Option<&'a Credentials>) -> Self {
        let is_loopback = reference.is_loopback();
        let mut config = Agent::config_builder()
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .http_status_as_error(false)
            .https_only(!is_loopback)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost);
        if is_loopback {
            config = config.proxy(None);
        }
        Self {
            reference,
            agent: config.build().into(),
            credentials,
            authorization: None,
        }
    }

    /// Asks for a manifest or a blob; `what` is the end of its address.
    pub(super) fn get(&mut self, what: &str, accept: &str) -> Result<Body, RegistryError> {
        let mut response = self.ask(what, accept)?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorization = Some(self.authorize(&response)?);
            response = self.ask(what, accept)?;
        }
        match response.status() {
            StatusCode::OK => Ok(response.into_body()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(self.unauthorised()),
            status => {
                let code = code(response.into_body());
                Err(self.refusal(what, status, code))
            }
        }
    }

    fn ask(&self, what: &str, accept: &str) -> Result<Response<Body>, RegistryError> {
        let scheme = match self.reference.is_loopback() {
            true => "http",
            false => "https",
        };
        let (host, name) = (self.reference.host(), self.reference.name());
        let mut request = self
            .agent
            .get(format!("{scheme}://{host}/v2/{name}/{what}"))
            .header(header::ACCEPT, accept);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.call().map_err(|source| self.unreachable(source))
    }

    /// What the registry wants to know us by.
    fn authorize(&self, response: &Response<Body>) -> Result<String, RegistryError> {
        let challenge = response.headers().get(header::WWW_AUTHENTICATE);
        let challenge = challenge
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let (kind, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if kind.eq_ignore_ascii_case("basic") {
            let basic = self.credentials.map(Credentials::basic);
            return basic.ok_or_else(|| self.unauthorised());
        }
        let realm = parameter(parameters, "realm");
        match realm {
            Some(realm) if kind.eq_ignore_ascii_case("bearer") && is_private(realm) => {
                self.token(realm, parameter(parameters, "service"))
            }
            _ => Err(RegistryError::Challenge {
                host: self.reference.host().to_owned(),
            }),
        }
    }

    /// A token to read this image with.
    fn token(&self, realm: &str, service: Option<&str>) -> Result<String, RegistryError> {
        let scope = format!("repository:{}:pull", self.reference.name());
        let mut request = self.agent.get(realm).query("scope", scope);
        if let Some(service) = service {
            request = request.query("service", service);
        }
        if let Some(credentials) = self.credentials {
            request = request.header(header::AUTHORIZATION, credentials.basic());
        }
        let response = request.call().map_err(|source| self.unreachable(source))?;
        if response.status() != StatusCode::OK {
            return Err(self.unauthorised());
        }
        #[derive(Deserialize)]
        struct Answer {
            #[serde(alias = "access_token")]
            token: String,
        }
        let answer = bytes(response.into_body(), MAX_ANSWER).unwrap_or_default();
        let answer: Answer =
            serde_json::from_slice(&answer).map_err(|_| RegistryError::Challenge {
                host: self.reference.host().to_owned(),
            })?;
        Ok(format!("Bearer {}", answer.token))
    }

    fn unreachable(&self, source: ureq::Error) -> RegistryError {
        RegistryError::Unreachable {
            host: self.reference.host().to_owned(),
            source: Box::new(source),
        }
    }

    fn unauthorised(&self) -> RegistryError {
        RegistryError::Unauthorised {
            host: self.reference.host().to_owned(),
            name: self.reference.name().to_owned(),
            how: match self.credentials {
                Some(_) => Unauthorised::Refused,
                None => Unauthorised::Anonymous,
            },
        }
    }

    fn refusal(&self, what: &str, status: StatusCode, code: String) -> RegistryError {
        let (host, name) = (
            self.reference.host().to_owned(),
            self.reference.name().to_owned(),
        );
        match (status, code.as_str()) {
            (StatusCode::NOT_FOUND, "NAME_UNKNOWN") => RegistryError::NoSuchName { host, name },
            (StatusCode::NOT_FOUND, _) => RegistryError::Missing {
                host,
                name,
                what: what
                    .split_once('/')
                    .map_or(what, |(_, what)| what)
                    .to_owned(),
            },
            _ => RegistryError::Status {
                host,
                what: what.to_owned(),
                status: status.as_u16(),
            },
        }
    }
}

/// Reads a small answer; what is longer is cut off behind the limit.
pub(super) fn bytes(body: Body, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    body.into_reader().take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The code of an error, in the words of the specification.
fn code(body: Body) -> String {
    #[derive(Default, Deserialize)]
    struct Errors {
        errors: Vec<Code>,
    }
    #[derive(Deserialize)]
    struct Code {
        code: String,
    }
    let answer = bytes(body, MAX_ANSWER).unwrap_or_default();
    let errors: Errors = serde_json::from_slice(&answer).unwrap_or_default();
    let first = errors.errors.into_iter().next();
    first.map(|first| first.code).unwrap_or_default()
}

/// `name="value"` of a challenge. Quotes in quotes do not occur in addresses and hosts.
fn parameter<'a>(parameters: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = parameters;
    loop {
        let (key, behind) = rest.split_once("=\"")?;
        let (value, behind) = behind.split_once('"')?;
        if key.trim_matches([' ', ',']).eq_ignore_ascii_case(name) {
            return Some(value);
        }
        rest = behind;
    }
}

/// Whether a password can be sent there and be read by nobody on the way.
fn is_private(address: &str) -> bool {
    address.parse::<Uri>().is_ok_and(|uri| {
        uri.scheme_str() == Some("https")
            || (uri.scheme_str() == Some("http") && uri.host().is_some_and(is_loopback))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_taken_apart() {
        let text =
            r#"realm="https://auth.example.org/token",service="registry",scope="a:b:pull,push""#;
        assert_eq!(
            parameter(text, "realm"),
            Some("https://auth.example.org/token")
        );
        assert_eq!(parameter(text, "Service"), Some("registry"));
        assert_eq!(parameter(text, "scope"), Some("a:b:pull,push"));
        assert_eq!(parameter(text, "error"), None);
        assert_eq!(parameter("realm=x", "realm"), None);
    }

    #[test]
    fn a_password_is_sent_to_nobody_who_could_be_overheard() {
        assert!(is_private("https://auth.example.org/token"));
        assert!(is_private("http://127.0.0.1:5001/token"));
        assert!(is_private("http://[::1]:5001/token"));
        assert!(!is_private("http://auth.example.org/token"));
        assert!(!is_private("file:///etc/passwd"));
        assert!(!is_private("nonsense"));
    }
}
