//! A Debian suite as an archive: the smallest system that its packages make.
//!
//! ```text
//! mmdebstrap --variant=essential SUITE ─> SUITE.tar, with the owners and modes that the files have in a Debian
//! ```

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::event::Event;
use crate::{Assets, debian};

const PACKAGES: [&str; 2] = ["mmdebstrap", "debian-archive-keyring"];
/// No file is newer than 2025-01-01, so that the same packages are the same bytes.
const TIME: &str = "1735689600";
/// What nobody reads in a microVM.
const LEFT_OUT: [&str; 4] = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
];

impl Assets {
    /// Makes the essential packages of `suite` into the tar archive at `archive`, which it replaces.
    ///
    /// # Errors
    /// For anyone but root; when apt or `mmdebstrap` fails, as for a suite that does not exist.
    pub fn debian_suite(&self, suite: &str, archive: &Path) -> Result<()> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "only root can make an image of Debian's packages: run it as root, or have it made elsewhere and use tar:FILE"
        );
        self.ensure_installed(&PACKAGES, "mmdebstrap puts Debian's packages together")?;
        self.report(&Event::Building {
            what: "Debian system",
            from: &format!(
                "the essential packages of {suite}, downloaded by apt (30 MB, about a minute)"
            ),
        });
        let mut command = Command::new("mmdebstrap");
        command.args([
            "--quiet",
            "--mode=root",
            "--variant=essential",
            "--format=tar",
        ]);
        for pattern in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude={pattern}"));
        }
        // Licences stay.
        command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
        command.arg(suite).arg(archive);
        command.env("SOURCE_DATE_EPOCH", TIME).env("LC_ALL", "C");
        debian::run(&mut command).with_context(|| format!("cannot make a Debian {suite}"))?;
        Ok(())
    }
}
