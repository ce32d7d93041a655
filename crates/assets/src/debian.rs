//! Debian's packages: downloaded and verified by apt, unpacked without being installed.
//!
//! ```text
//! linux-image-cloud-amd64 ─ apt-cache depends ─> linux-image-6.1.0-NN-cloud-amd64
//!                         ─ apt-get download ──> <set>/package.deb ─ dpkg -x ─> tree
//! ```
//!
//! apt checks the signature of its lists and the hash of what it downloads against them. The
//! cache records the hash of the package, and it is compared again before each unpacking. If apt
//! fails, its lists may be missing or old: they are refreshed, and it is asked once more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::cache::Built;
use crate::event::Event;
use crate::hash::Sha256;
use crate::{Assets, fetch};

/// A package, unpacked for as long as this lives.
pub(crate) struct Unpacked {
    tree: TempDir,
    /// Name and version, for people: `busybox-static 1:1.35.0-4`.
    pub(crate) source: String,
    /// Debian's version.
    pub(crate) version: String,
}

impl Unpacked {
    /// Where the package's `/` is.
    pub(crate) fn path(&self) -> &Path {
        self.tree.path()
    }

    /// The first of these paths that the package has; packages move from `/bin` to `/usr/bin`.
    pub(crate) fn file(&self, candidates: &[&str]) -> Result<PathBuf> {
        let found = candidates
            .iter()
            .map(|c| self.path().join(c))
            .find(|p| p.is_file());
        found.with_context(|| format!("{} has none of {}", self.source, candidates.join(", ")))
    }
}

impl Assets {
    /// Unpacks a package, newest version where the cache has none. The caller holds the lock.
    ///
    /// A metapackage (`linux-image-amd64`) stands for the package of its kind that it depends on.
    pub(crate) fn unpack(&self, package: &str) -> Result<Unpacked> {
        let recipe = Sha256::of(package.as_bytes());
        let set_name = format!("debian-{package}");
        let set = match self.cache.find(&set_name, recipe) {
            Ok(set) => set,
            Err(_) => {
                let scratch = self.cache.scratch()?;
                let built = self.download(package, scratch.path())?;
                self.cache.install(&set_name, recipe, built, scratch)?
            }
        };
        let tree = self.cache.scratch()?;
        let archive = set.path(PACKAGE);
        run(Command::new("dpkg")
            .arg("-x")
            .arg(&archive)
            .arg(tree.path()))?;
        Ok(Unpacked {
            tree,
            source: set.record.source,
            version: set.record.version,
        })
    }

    fn download(&self, package: &str, directory: &Path) -> Result<Built> {
        self.refreshing_lists(|| {
            let real = real_package(package)?;
            self.report(&Event::Fetching {
                what: &real,
                source: "apt",
            });
            run(Command::new("apt-get")
                .args(["download", "--quiet=2", &real])
                .current_dir(directory)
                .env("LC_ALL", "C"))?;
            let archive = only_file(directory)?;
            let version = field(&archive, "Version")?;
            fs::rename(&archive, directory.join(PACKAGE))?;
            Ok(Built {
                source: format!("Debian's {real} {version}"),
                version,
            })
        })
        .with_context(|| format!("apt cannot download {package}"))
    }

    /// Installs what is not installed, saying what and why before.
    ///
    /// # Errors
    /// When apt fails, which it does for anyone but root.
    pub(crate) fn ensure_installed(&self, packages: &[&str], why: &str) -> Result<()> {
        let missing = packages
            .iter()
            .copied()
            .filter(|p| !is_installed(p))
            .collect::<Vec<_>>();
        if missing.is_empty() {
            return Ok(());
        }
        self.report(&Event::Installing {
            packages: &missing,
            why,
        });
        ensure!(
            rustix::process::geteuid().is_root(),
            "only root can install {}: run apt-get install {}",
            missing.join(", "),
            missing.join(" ")
        );
        self.refreshing_lists(|| {
            run(Command::new("apt-get")
                .args(["install", "--yes", "--quiet=2", "--no-install-recommends"])
                // Somebody else may be installing right now.
                .arg("-oDPkg::Lock::Timeout=300")
                .args(&missing)
                .env("DEBIAN_FRONTEND", "noninteractive")
                .env("LC_ALL", "C"))?;
            Ok(())
        })
        .with_context(|| format!("apt cannot install {}", missing.join(", ")))
    }

    /// Does what needs apt's lists, and if that fails, once more with fresh ones.
    fn refreshing_lists<T>(&self, attempt: impl Fn() -> Result<T>) -> Result<T> {
        let first = match attempt() {
            Ok(done) => return Ok(done),
            Err(why) => why,
        };
        if !rustix::process::geteuid().is_root() {
            return Err(first.context("apt's lists may be old, and only root can refresh them"));
        }
        self.report(&Event::RefreshingLists);
        run(Command::new("apt-get")
            .args(["update", "--quiet=2"])
            .env("LC_ALL", "C"))?;
        attempt()
    }
}

const PACKAGE: &str = "package.deb";

/// The versioned package behind a metapackage, or the package itself.
fn real_package(package: &str) -> Result<String> {
    let output = run(Command::new("apt-cache")
        .args(["depends", package])
        .env("LC_ALL", "C"))?;
    Ok(behind_metapackage(
        package,
        &String::from_utf8_lossy(&output.stdout),
    ))
}

/// Debian's kernel metapackages depend on `linux-image-<release>-<flavour>`: the same first two
/// words. Any other package stands for itself.
fn behind_metapackage(package: &str, depends: &str) -> String {
    let real = package.strip_prefix("linux-image-").and_then(|flavour| {
        depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-") && name.ends_with(flavour))
    });
    real.unwrap_or(package).to_owned()
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f=${Status}", package])
        .output();
    query.is_ok_and(|o| o.status.success() && o.stdout == b"install ok installed")
}

fn field(archive: &Path, name: &str) -> Result<String> {
    let output = run(Command::new("dpkg-deb").arg("-f").arg(archive).arg(name))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn only_file(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory)?;
    let (Some(first), None) = (entries.next(), entries.next()) else {
        bail!("{} does not hold exactly one file", directory.display());
    };
    Ok(first?.path())
}

/// Runs a program to its end; its last words are in the error.
pub(crate) fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        fetch::last_line(&output.stderr)
    );
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_stands_for_the_newest_kernel_of_its_kind() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        let real = behind_metapackage("linux-image-cloud-amd64", depends);
        assert_eq!(real, "linux-image-6.1.0-56-cloud-amd64");
    }

    #[test]
    fn any_other_package_stands_for_itself() {
        let depends = "busybox-static\n  Conflicts: busybox\n  Depends: libc6\n";
        assert_eq!(
            behind_metapackage("busybox-static", depends),
            "busybox-static"
        );
    }

    #[test]
    fn an_installed_package_is_told_from_a_missing_one() {
        assert!(is_installed("dpkg"));
        assert!(!is_installed("no-such-package"));
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let refusal = run(Command::new("sh").args(["-c", "echo first >&2; echo why >&2; exit 1"]))
            .unwrap_err();
        assert_eq!(refusal.to_string(), "sh: why");
    }
}
