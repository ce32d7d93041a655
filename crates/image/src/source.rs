//! What an image is made from, as it is written on a command line.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use thiserror::Error;

use crate::oci::registry::{InvalidReference, Reference};

/// What an image is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// `debian:SUITE`
    Debian {
        /// `bookworm`, `trixie`, …
        suite: String,
    },
    /// `dir:PATH`
    Directory(PathBuf),
    /// `tar:FILE`
    Tar(PathBuf),
    /// `oci-layout:DIR[:TAG]`
    OciLayout {
        /// The directory with `oci-layout` in it.
        directory: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:TAG]`
    DockerArchive {
        /// The file.
        file: PathBuf,
        /// Which of its images.
        tag: Option<String>,
    },
    /// `docker://HOST[:PORT]/NAME[:TAG|@DIGEST]`
    Registry(Reference),
}

/// Why a text is no source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// There is nothing to read there.
    #[error("cannot read {}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It has a prefix that nobody knows, or none and is no path.
    #[error(
        "{0:?} is no source: write debian:SUITE, dir:PATH, tar:FILE, oci-layout:DIR[:TAG], \
         docker-archive:FILE[:TAG] or docker://HOST/NAME[:TAG]"
    )]
    Unknown(String),
    /// A suite's name goes into the command line of a program.
    #[error("{0:?} is no name of a Debian suite: those are made of a-z, 0-9 and '-'")]
    Suite(String),
    /// It is no image of a registry.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        if let Some(reference) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(reference.parse()?));
        }
        match text.split_once(':') {
            Some(("debian", suite)) => {
                let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                if suite.is_empty() || suite.starts_with('-') || !suite.chars().all(is_plain) {
                    return Err(SourceError::Suite(suite.to_owned()));
                }
                Ok(Self::Debian {
                    suite: suite.to_owned(),
                })
            }
            Some(("dir", path)) => Ok(Self::Directory(path.into())),
            Some(("tar", path)) => Ok(Self::Tar(path.into())),
            Some(("oci-layout", rest)) => {
                let (directory, tag) = tagged(rest);
                Ok(Self::OciLayout { directory, tag })
            }
            Some(("docker-archive", rest)) => {
                let (file, tag) = tagged(rest);
                Ok(Self::DockerArchive { file, tag })
            }
            _ => guess(text),
        }
    }
}

/// A path, and behind a colon a tag; a path that is there may have a colon in it.
fn tagged(text: &str) -> (PathBuf, Option<String>) {
    match text.split_once(':') {
        Some((path, tag)) if !Path::new(text).exists() => (path.into(), Some(tag.to_owned())),
        _ => (text.into(), None),
    }
}

/// A path without a prefix, by what stands there.
fn guess(text: &str) -> Result<Source, SourceError> {
    let path = Path::new(text);
    let metadata = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SourceError::Unknown(text.to_owned()));
        }
        other => other.map_err(|source| SourceError::Read {
            path: path.to_owned(),
            source,
        })?,
    };
    if metadata.is_dir() {
        if path.join("oci-layout").is_file() && path.join("index.json").is_file() {
            return Ok(Source::OciLayout {
                directory: path.to_owned(),
                tag: None,
            });
        }
        return Ok(Source::Directory(path.to_owned()));
    }
    let is_docker = File::open(path).and_then(crate::oci::is_docker_archive);
    match is_docker {
        Ok(true) => Ok(Source::DockerArchive {
            file: path.to_owned(),
            tag: None,
        }),
        Ok(false) => Ok(Source::Tar(path.to_owned())),
        Err(source) => Err(SourceError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tagged = |f: &mut fmt::Formatter<'_>, kind: &str, path: &Path, tag: &Option<String>| {
            write!(f, "{kind}:{}", path.display())?;
            tag.iter().try_for_each(|tag| write!(f, ":{tag}"))
        };
        match self {
            Self::Debian { suite } => write!(f, "debian:{suite}"),
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::Tar(path) => write!(f, "tar:{}", path.display()),
            Self::OciLayout { directory, tag } => tagged(f, "oci-layout", directory, tag),
            Self::DockerArchive { file, tag } => tagged(f, "docker-archive", file, tag),
            Self::Registry(reference) => write!(f, "docker://{reference}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_reads_back_as_it_was_written() {
        for text in [
            "debian:bookworm",
            "dir:/srv/tree",
            "tar:a.tar.gz",
            "oci-layout:x:latest",
            "docker-archive:x.tar",
            "docker://localhost:5000/a/b:1",
        ] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
        for bad in [
            "debian:",
            "debian:-x",
            "debian:a b",
            "debian:../x",
            "ftp:x",
            "docker://web",
            "/no/such/path",
        ] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_has_no_prefix_is_known_by_what_it_is() {
        let temp = tempfile::tempdir().unwrap();
        let guess = |path: &Path| path.to_str().unwrap().parse::<Source>().unwrap();
        assert_eq!(
            guess(temp.path()),
            Source::Directory(temp.path().to_owned())
        );
        std::fs::write(temp.path().join("oci-layout"), "{}").unwrap();
        std::fs::write(temp.path().join("index.json"), "{}").unwrap();
        assert!(matches!(
            guess(temp.path()),
            Source::OciLayout { tag: None, .. }
        ));
        let archive = |name: &str, member: &str| {
            let path = temp.path().join(name);
            let mut tar = tar::Builder::new(File::create(&path).unwrap());
            let mut header = tar::Header::new_gnu();
            header.set_size(2);
            header.set_mode(0o644);
            tar.append_data(&mut header, member, &b"[]"[..]).unwrap();
            tar.finish().unwrap();
            path
        };
        assert!(matches!(guess(&archive("a", "etc/passwd")), Source::Tar(_)));
        let docker = guess(&archive("b", "manifest.json"));
        assert!(matches!(docker, Source::DockerArchive { tag: None, .. }));
    }
}
