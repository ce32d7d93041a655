//! The base image: busybox on a small ext4, enough to run programs and have a shell.
//!
//! ```text
//! busybox-static ─> directory tree ─ mke2fs -d ─> base.ext4 (32 MiB, mostly holes) ─> dest
//! ```
//!
//! Nothing is mounted and no right is needed. File system UUID, hash seed and times are fixed, so
//! two builds differ only where `mke2fs` copies what cannot be set: the tree's change times and
//! the order of its directories.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, SeekFrom, Timespec, Timestamps, seek, utimensat};
use rustix::io::Errno;

use crate::cache::Built;
use crate::event::Event;
use crate::guest::{BUSYBOX_PACKAGE, recipe};
use crate::hash::Sha256;
use crate::{Assets, create_directory, debian, initrd};

const SET: &str = "base";
const FILE: &str = "base.ext4";
/// To be raised when this file makes other contents from the same parts.
const BUILDER: &str = "1";
const SIZE: &str = "32M";
const UUID: &str = "72656b69-6e64-4c65-8000-626173650001";
/// 2025-01-01, the time of every file.
const TIME: i64 = 1_735_689_600;

const DIRECTORIES: [&str; 16] = [
    "bin",
    "dev",
    "etc",
    "etc/init.d",
    "home",
    "lib",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "var",
    "var/log",
];

const FILES: [(&str, u32, &str); 7] = [
    ("etc/inittab", 0o644, INITTAB),
    ("etc/init.d/rcS", 0o755, RC_S),
    (
        "etc/passwd",
        0o644,
        "root::0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/:/bin/false\n",
    ),
    (
        "etc/group",
        0o644,
        "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    ),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n"),
    ("etc/hostname", 0o644, "rekindle\n"),
    (
        "etc/profile",
        0o644,
        "export PATH=/bin:/sbin:/usr/bin:/usr/sbin\n",
    ),
];

const INITTAB: &str = "\
::sysinit:/etc/init.d/rcS
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
";

const RC_S: &str = "\
#!/bin/sh
# The initrd has mounted these, if there was one.
[ -e /proc/self ] || mount -t proc proc /proc
[ -e /sys/kernel ] || mount -t sysfs sysfs /sys
[ -e /dev/null ] || mount -t devtmpfs devtmpfs /dev
hostname -F /etc/hostname
ip link set lo up
";

impl Assets {
    /// Puts the base image at `dest`, replacing what is there unless it is the same.
    ///
    /// # Errors
    /// When the image cannot be built (apt, `mke2fs`) or `dest` cannot be written.
    pub fn base_image(&self, dest: &Path) -> Result<()> {
        let files = FILES.map(|(path, _, contents)| format!("{path}\n{contents}"));
        let recipe = recipe(
            &[BUILDER, SIZE, UUID],
            &[&DIRECTORIES, &files.each_ref().map(String::as_str)],
        );
        let set = self.ensure(SET, recipe, |scratch| self.build_base(scratch))?;
        let sha256 = set.hash(FILE)?;
        if !dest.exists() || Sha256::of_file(dest)? != sha256 {
            copy_sparse(&set.path(FILE), dest)
                .with_context(|| format!("cannot write the base image to {}", dest.display()))?;
        }
        self.report(&Event::Ready {
            what: "base image",
            path: dest,
            sha256,
            source: &set.record.source,
        });
        Ok(())
    }

    fn build_base(&self, scratch: &Path) -> Result<Built> {
        self.ensure_installed(&["e2fsprogs"], "mke2fs makes the base image")?;
        let package = self.unpack(BUSYBOX_PACKAGE)?;
        self.report(&Event::Building {
            what: "base image",
            from: &package.source,
        });
        let tree = self.cache.scratch()?;
        fill(tree.path(), &initrd::busybox_program(&package)?)?;
        make_ext4(tree.path(), &scratch.join(FILE))?;
        Ok(Built {
            source: package.source.clone(),
            version: package.version.clone(),
        })
    }
}

fn fill(root: &Path, busybox: &Path) -> Result<()> {
    let make = |path: &str, mode: u32| {
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode))
    };
    for directory in DIRECTORIES {
        fs::create_dir(root.join(directory))?;
        make(directory, 0o755)?;
    }
    make(".", 0o755)?;
    make("root", 0o700)?;
    make("tmp", 0o1777)?;
    for (path, mode, contents) in FILES {
        fs::write(root.join(path), contents)?;
        make(path, mode)?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    make("bin/busybox", 0o755)?;
    for applet in initrd::applets(busybox)? {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    for name in ["init", "reboot", "poweroff", "halt"] {
        symlink("../bin/busybox", root.join("sbin").join(name))?;
    }
    set_times(root)
}

/// Gives everything below and with `path` the same time.
fn set_times(path: &Path) -> Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            set_times(&entry?.path())?;
        }
    }
    let time = Timespec {
        tv_sec: TIME,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn make_ext4(tree: &Path, image: &Path) -> Result<()> {
    debian::run(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-L", "rekindle", "-U", UUID])
            .args(["-E", &format!("hash_seed={UUID},root_owner=0:0"), "-d"])
            .arg(tree)
            .arg(image)
            .arg(SIZE)
            // e2fsprogs before 1.47.1 knows only the second name.
            .env("SOURCE_DATE_EPOCH", TIME.to_string())
            .env("E2FSPROGS_FAKE_TIME", TIME.to_string())
            .env("PATH", path_with_sbin()),
    )?;
    Ok(())
}

/// Users other than root have no `sbin` in their path.
pub(crate) fn path_with_sbin() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    )
}

/// Copies data and leaves holes as holes, into place in one step.
fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let parent = to
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let parent = create_directory(parent.to_owned())?;
    let new = tempfile::Builder::new()
        .prefix(".new-")
        .tempfile_in(parent)?;
    let source = File::open(from)?;
    let length = source.metadata()?.len();
    new.as_file().set_len(length)?;
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at, length)? {
        let (mut reading, mut writing) = (start, start);
        while reading < end {
            let rest = usize::try_from(end - reading)?;
            let n = rustix::fs::copy_file_range(
                &source,
                Some(&mut reading),
                new.as_file(),
                Some(&mut writing),
                rest,
            )?;
            anyhow::ensure!(
                n > 0,
                "{} became shorter while it was copied",
                from.display()
            );
        }
        at = end;
    }
    new.as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))?;
    new.persist(to)?;
    Ok(())
}

/// The next stretch of data at or after `at`.
fn next_data(file: &File, at: u64, length: u64) -> Result<Option<(u64, u64)>> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        other => other?,
    };
    if start >= length {
        return Ok(None);
    }
    Ok(Some((start, seek(file, SeekFrom::Hole(start))?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_sparse_copy_is_equal_and_sparse() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (
            directory.path().join("from"),
            directory.path().join("new/to"),
        );
        let file = File::create(&from).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(b"end", (8 << 20) - 3).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        assert_eq!(fs::read_dir(to.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn every_file_lies_in_a_listed_directory() {
        for (path, _, _) in FILES {
            let (directory, _) = path.rsplit_once('/').unwrap();
            assert!(DIRECTORIES.contains(&directory), "{path}");
        }
    }
}
