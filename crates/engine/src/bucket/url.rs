//! What a URL of a repository says. Pure.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use object_store::path::Path;
use thiserror::Error;

/// Where a repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a directory: `file:///directory`.
    Directory(PathBuf),
    /// In an object store: `s3://bucket/prefix`.
    Bucket {
        /// What speaks there.
        scheme: Scheme,
        /// The bucket; Azure's container.
        bucket: String,
        /// What its objects' names begin with; may be empty.
        prefix: Path,
    },
}

/// Kinds of object stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Amazon's, and all that speak like it.
    S3,
    /// Google's.
    Google,
    /// Azure's.
    Azure,
}

/// Why something is no URL of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UrlError {
    /// It is like no URL.
    #[error("{url:?} is no URL; one is like file:///directory or s3://bucket/prefix")]
    NoUrl {
        /// What was given.
        url: String,
    },
    /// It begins with something unknown.
    #[error("{scheme}:// is not known; file, s3, gs and az are")]
    Scheme {
        /// What it begins with.
        scheme: String,
    },
    /// It names no snapshot.
    #[error("{url:?} is no URL of a snapshot: file:///directory/name, s3://bucket/name")]
    NoSnapshot {
        /// What was given.
        url: String,
    },
    /// It names no directory of the host.
    #[error("{url:?} has two slashes where there must be three: file:///directory")]
    Relative {
        /// What was given.
        url: String,
    },
    /// It has a name and a password in it, which belong into the environment. It is not repeated.
    #[error("the URL has an @: credentials belong into the environment (AWS_ACCESS_KEY_ID, …)")]
    Credentials,
    /// It names no bucket.
    #[error("{url:?} does not name a bucket: {scheme}://bucket/prefix")]
    Bucket {
        /// What was given.
        url: String,
        /// What it begins with.
        scheme: String,
    },
    /// The names of its objects cannot begin so.
    #[error(
        "{url:?} cannot be: {prefix:?} is no path of objects (no empty parts, no dots alone, no ? and #)"
    )]
    Prefix {
        /// What was given.
        url: String,
        /// What follows the bucket.
        prefix: String,
    },
}

impl Scheme {
    const ALL: [(&'static str, Self); 3] =
        [("s3", Self::S3), ("gs", Self::Google), ("az", Self::Azure)];
}

impl Location {
    /// What the URL of a snapshot says: the repository, and the snapshot's name there or its id.
    ///
    /// # Errors
    /// A [`UrlError`].
    pub fn of_snapshot(url: &str) -> Result<(Self, String), UrlError> {
        let trimmed = url.trim_end_matches('/');
        let parts = trimmed.rsplit_once('/');
        let (place, key) = parts
            .filter(|(place, _)| !place.ends_with('/'))
            .ok_or_else(|| match has_credentials(url) {
                true => UrlError::Credentials,
                false => UrlError::NoSnapshot { url: url.into() },
            })?;
        Ok((place.parse()?, key.into()))
    }
}

impl FromStr for Location {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        // What is wrong with it is told without it, if there may be a secret in it: anywhere, as secrets have slashes.
        Self::parse(text).map_err(|error| match has_credentials(text) {
            true => UrlError::Credentials,
            false => error,
        })
    }
}

fn has_credentials(text: &str) -> bool {
    text.contains('@') && !text.starts_with("file:")
}

impl Location {
    fn parse(text: &str) -> Result<Self, UrlError> {
        if text.starts_with("file:/") && !text.starts_with("file:///") {
            return Err(UrlError::Relative { url: text.into() });
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(UrlError::NoUrl { url: text.into() });
        };
        if scheme == "file" {
            return Ok(Self::Directory(rest.into()));
        }
        let Some((_, known)) = Scheme::ALL.iter().find(|(name, _)| *name == scheme) else {
            let scheme = scheme.into();
            return Err(UrlError::Scheme { scheme });
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if bucket.is_empty() || !bucket.chars().all(plain) {
            return Err(UrlError::Bucket {
                url: text.into(),
                scheme: scheme.into(),
            });
        }
        let prefix = prefix.trim_end_matches('/');
        let path = Path::parse(prefix)
            .ok()
            .filter(|_| !prefix.contains(['?', '#']));
        let Some(path) = path else {
            return Err(UrlError::Prefix {
                url: text.into(),
                prefix: prefix.into(),
            });
        };
        Ok(Self::Bucket {
            scheme: *known,
            bucket: bucket.into(),
            prefix: path,
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "file://{}", path.display()),
            Self::Bucket {
                scheme,
                bucket,
                prefix,
            } => {
                let (name, _) = Scheme::ALL
                    .iter()
                    .find(|(_, one)| one == scheme)
                    .expect("all have a name");
                write!(f, "{name}://{bucket}")?;
                match prefix.as_ref() {
                    "" => Ok(()),
                    prefix => write!(f, "/{prefix}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_say_where_a_repository_is() {
        for url in [
            "file:///a/b",
            "s3://bucket",
            "s3://bucket/deep/prefix",
            "gs://b.c/x",
            "az://container/x",
        ] {
            assert_eq!(url.parse::<Location>().unwrap().to_string(), url);
        }
        let trailing: Location = "s3://bucket/x/".parse().unwrap();
        assert_eq!(trailing.to_string(), "s3://bucket/x");
    }

    #[test]
    fn a_typo_is_told_what_would_be_right() {
        for (url, said) in [
            ("/a/b", "file:///directory"),
            ("s3:/bucket/x", "s3://bucket/prefix"),
            ("file://a/b", "three"),
            ("file:/a/b", "three"),
            ("fiel:///a", "file, s3, gs and az"),
            ("s4://bucket/x", "s4://"),
            ("s3:///x", "does not name a bucket"),
            ("s3://", "does not name a bucket"),
            ("s3://buck et/x", "does not name a bucket"),
            ("s3://bucket/a//b", "a//b"),
            ("s3://bucket/../b", "../b"),
            ("s3://bucket/b?region=x", "?region"),
        ] {
            let error = url.parse::<Location>().unwrap_err().to_string();
            assert!(error.contains(said), "{url}: {error}");
        }
    }

    #[test]
    fn the_url_of_a_snapshot_ends_with_its_name() {
        let (place, key) = Location::of_snapshot("s3://bucket/x/base/").unwrap();
        assert_eq!(
            (place.to_string().as_str(), &*key),
            ("s3://bucket/x", "base")
        );
        for url in ["s3://base", "base", "/", ""] {
            assert!(Location::of_snapshot(url).is_err(), "{url}");
        }
    }

    #[test]
    fn credentials_in_a_url_are_refused_and_not_repeated() {
        for url in [
            "s3://key:secret@bucket/x",
            "s3://key:sec/secret+secret@bucket/x",
            "s3:/key:secret@bucket/x",
            "s4://key:secret@bucket/x",
            "key:secret@bucket",
        ] {
            for error in [
                url.parse::<Location>().unwrap_err(),
                Location::of_snapshot(url).unwrap_err(),
            ] {
                assert_eq!(error, UrlError::Credentials, "{url}");
                assert!(!error.to_string().contains("secret"), "{error}");
            }
        }
        let plain = "s3://bucket/user@host/x";
        assert_eq!(plain.parse::<Location>().unwrap().to_string(), plain);
    }
}
