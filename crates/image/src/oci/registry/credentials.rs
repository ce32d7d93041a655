//! Who we are at a registry: what `docker login` and `podman login` write.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::HashMap;
use thiserror::Error;

/// No file of credentials is anywhere near that, in bytes.
const LARGEST_FILE: u64 = 1 << 20;

/// User and password, in the form in which they are sent: base64 of `user:password`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    encoded: String,
}

/// Why credentials cannot be read. What is in the file is not told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// There is a file, and it cannot be read.
    #[error("cannot read the credentials in {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is not what `docker login` writes.
    #[error("{} is not what docker login writes: line {line}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        line: usize,
    },
    /// What it has for this host is not base64 of `user:password`.
    #[error("{} has no user and password for {host}; docker login {host} writes them", path.display())]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The registry.
        host: String,
    },
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: HashMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
}

impl Credentials {
    /// Those for a registry, in `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`. One that is kept by a program
    /// beside docker (`credsStore`) is not asked for.
    ///
    /// # Errors
    /// A [`CredentialsError`]; a file that is not there is none.
    pub fn find(host: &str) -> Result<Option<Self>, CredentialsError> {
        let directory = std::env::var_os("DOCKER_CONFIG")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".docker")));
        match directory {
            Some(directory) => Self::in_file(&directory.join("config.json"), host),
            None => Ok(None),
        }
    }

    fn in_file(path: &Path, host: &str) -> Result<Option<Self>, CredentialsError> {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LARGEST_FILE).read_to_end(&mut text));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| CredentialsError::Read {
                path: path.to_owned(),
                source,
            })?,
        };
        let config: Config =
            serde_json::from_slice(&text).map_err(|error| CredentialsError::Json {
                path: path.to_owned(),
                line: error.line(),
            })?;
        let entry = config
            .auths
            .get(host)
            .filter(|entry| !entry.auth.is_empty());
        let Some(entry) = entry else {
            return Ok(None);
        };
        let plain = STANDARD.decode(&entry.auth).unwrap_or_default();
        if !plain.contains(&b':') {
            return Err(CredentialsError::Encoding {
                path: path.to_owned(),
                host: host.to_owned(),
            });
        }
        Ok(Some(Self {
            encoded: entry.auth.clone(),
        }))
    }

    #[cfg(test)]
    pub(super) fn of(encoded: &str) -> Self {
        Self {
            encoded: encoded.to_owned(),
        }
    }

    /// As a header has it.
    pub(super) fn basic(&self) -> String {
        format!("Basic {}", self.encoded)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_by_host_and_never_shown() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("config.json");
        let find = |host: &str| Credentials::in_file(&path, host);
        assert_eq!(find("localhost:5000").unwrap(), None);
        std::fs::write(
            &path,
            r#"{"auths": {"localhost:5000": {"auth": "bWU6c3dvcmRmaXNo"}, "helped": {}, "odd": {"auth": "!"}}}"#,
        )
        .unwrap();
        let mine = find("localhost:5000").unwrap().unwrap();
        assert_eq!(mine.basic(), "Basic bWU6c3dvcmRmaXNo");
        assert_eq!(format!("{mine:?}"), "Credentials(…)");
        assert_eq!(find("localhost").unwrap(), None);
        assert_eq!(find("helped").unwrap(), None);
        let error = find("odd").unwrap_err().to_string();
        assert!(error.contains("docker login odd"), "{error}");
        std::fs::write(&path, "swordfish").unwrap();
        let error = find("odd").unwrap_err().to_string();
        assert!(!error.contains("swordfish"), "{error}");
    }
}
