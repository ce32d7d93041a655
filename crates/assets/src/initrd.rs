//! Writes an initrd: a `newc` cpio archive, which the kernel unpacks into its first root.
//!
//! ```text
//! /init  /bin/busybox  /bin/<applet> → busybox  /lib/modules/<release>/{*.ko,modules.dep,modules.alias}
//! ```
//!
//! The archive is not compressed: it is a few megabytes, and unpacking would be the guest's work
//! at each boot. Owners and times are all zero, so the same parts make the same bytes. The
//! kernel's own built-in archive brings `/dev/console`.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType};

use crate::debian::{self, Unpacked};
use crate::modules::{Module, modules_alias, modules_dep};

/// Where Debian's `busybox-static` has its program, over the releases.
const BUSYBOX: [&str; 2] = ["bin/busybox", "usr/bin/busybox"];

/// A cpio archive in the making.
pub(crate) struct Initrd {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Initrd {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            inodes: 0,
        }
    }

    /// Adds a directory; its parent must have been added before.
    pub(crate) fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, 0o755, ModeFileType::Directory, &[])
    }

    /// Adds a file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.entry(path, mode, ModeFileType::Regular, contents)
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, 0o777, ModeFileType::Symlink, target.as_bytes())
    }

    fn entry(&mut self, path: &str, mode: u32, kind: ModeFileType, contents: &[u8]) -> Result<()> {
        self.inodes += 1;
        let builder = Builder::new(path).ino(self.inodes).mode(mode).nlink(1);
        let size = u32::try_from(contents.len()).with_context(|| format!("{path} is too large"))?;
        let mut writer = builder
            .set_mode_file_type(kind)
            .write(&mut self.bytes, size);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }

    /// Adds busybox, with a link for each of its applets.
    pub(crate) fn busybox(&mut self, package: &Unpacked) -> Result<()> {
        let program = package.file(&BUSYBOX)?;
        self.directory("bin")?;
        self.file("bin/busybox", 0o755, &std::fs::read(&program)?)?;
        for applet in applets(&program)? {
            self.link(&format!("bin/{applet}"), "busybox")?;
        }
        // The kernel asks for modules by this path.
        self.directory("sbin")?;
        self.link("sbin/modprobe", "../bin/busybox")
    }

    /// Adds modules, so that both `modprobe` and the kernel find them.
    pub(crate) fn modules(&mut self, release: &str, modules: &[Module]) -> Result<()> {
        let directory = format!("lib/modules/{release}");
        for path in ["lib", "lib/modules", &directory] {
            self.directory(path)?;
        }
        for module in modules {
            self.file(
                &format!("{directory}/{}", module.file()),
                0o644,
                &module.contents,
            )?;
        }
        let (dep, alias) = (modules_dep(modules), modules_alias(modules));
        self.file(&format!("{directory}/modules.dep"), 0o644, dep.as_bytes())?;
        self.file(
            &format!("{directory}/modules.alias"),
            0o644,
            alias.as_bytes(),
        )
    }

    /// The whole archive.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        Ok(cpio::newc::trailer(self.bytes)?)
    }
}

/// The program inside Debian's `busybox-static`.
pub(crate) fn busybox_program(package: &Unpacked) -> Result<std::path::PathBuf> {
    package.file(&BUSYBOX)
}

/// The names that a busybox answers to, but its own.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = debian::run(Command::new(busybox).arg("--list"))?;
    let text =
        String::from_utf8(output.stdout).context("busybox lists applets that are not UTF-8")?;
    Ok(text
        .lines()
        .filter(|a| *a != "busybox")
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Name, mode and contents of every entry.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(archive).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            found.push((name, mode, contents));
            archive = reader.finish().unwrap();
        }
    }

    #[test]
    fn an_archive_holds_what_was_added() {
        let mut initrd = Initrd::new();
        initrd.directory("bin").unwrap();
        initrd.file("bin/a", 0o755, b"seven b").unwrap();
        initrd.link("bin/b", "a").unwrap();
        initrd.file("empty", 0o600, b"").unwrap();
        let archive = initrd.finish().unwrap();
        let expected = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/a", 0o100_755, b"seven b"),
            ("bin/b", 0o120_777, b"a"),
            ("empty", 0o100_600, b""),
        ];
        let expected = expected.map(|(n, m, c)| (n.to_owned(), m, c.to_vec()));
        assert_eq!(entries(&archive), expected);
    }

    #[test]
    fn the_same_parts_make_the_same_bytes() {
        let make = || {
            let mut initrd = Initrd::new();
            initrd.file("init", 0o755, b"#!/bin/sh\n").unwrap();
            initrd.finish().unwrap()
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn the_scripts_are_valid_shell() {
        for script in [include_str!("guest-init.sh"), include_str!("lab-init.sh")] {
            let output = Command::new("sh")
                .args(["-n", "-c", script])
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}
