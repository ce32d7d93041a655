//! The guest's side of a boot: Debian's cloud kernel, and an initrd that finds virtio devices.
//!
//! ```text
//! linux-image-cloud-amd64 ─┬─ vmlinuz ─ unpacked ──> vmlinux
//!                          └─ modules ─┐
//! busybox-static ──────────────────────┼─ cpio ────> initrd
//! guest-init.sh, the agent ────────────┘
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::agent::AGENT;
use crate::cache::Built;
use crate::debian::Unpacked;
use crate::event::Event;
use crate::hash::Sha256;
use crate::initrd::Initrd;
use crate::modules::{Module, ModuleTree};
use crate::{Assets, kernel};

const SET: &str = "guest";
const INIT: &str = include_str!("guest-init.sh");
/// To be raised when this file makes other contents from the same parts.
const BUILDER: &str = "1";
/// Debian's kernel for virtual machines.
pub(crate) const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
pub(crate) const BUSYBOX_PACKAGE: &str = "busybox-static";

/// What Firecracker's devices need, and overlay for images that are shared.
const MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_balloon",
    "overlay",
];

/// What a Linux guest should be booted with.
///
/// The console is the serial port, which Firecracker prints; `reboot=k` makes a reboot end
/// Firecracker with status 0, `panic=1` does so a second after a panic. Without `i8042.*` the
/// kernel would spend half a second looking for a mouse. `pci=off` is in Firecracker's own default
/// arguments, which are dropped when any are given; releases from 1.13 on add it again where it is
/// right. Even `quiet` lets errors through, and that there is no PCI is one to Linux, hence
/// `loglevel=3`. The root device Firecracker adds itself.
pub const BOOT_ARGS: &str =
    "console=ttyS0 reboot=k panic=1 pci=off quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd";

/// What is added to have the agent alone run, as the first program of whatever image there is.
pub const AGENT_ALONE: &str = "rekindle.init=agent";

/// A kernel and an initrd that boot in Firecracker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// The kernel, as an ELF image.
    pub vmlinux: PathBuf,
    /// Its initrd, not compressed.
    pub initrd: PathBuf,
    /// Debian's version of the kernel package.
    pub kernel_version: String,
}

impl Assets {
    /// The guest kernel and its initrd.
    ///
    /// # Errors
    /// When apt cannot download the packages, or what they hold is not as expected.
    pub fn guest(&self) -> Result<Guest> {
        let agent = Sha256::of(AGENT).to_string();
        let recipe = recipe(&[BUILDER, KERNEL_PACKAGE, INIT, &agent], &[&MODULES]);
        let set = self.ensure(SET, recipe, |scratch| self.build_guest(scratch))?;
        let (vmlinux, initrd) = (set.path("vmlinux"), set.path("initrd"));
        self.announce(&set, "guest kernel", "vmlinux")?;
        self.announce(&set, "guest initrd", "initrd")?;
        Ok(Guest {
            vmlinux,
            initrd,
            kernel_version: set.record.version,
        })
    }

    fn build_guest(&self, scratch: &Path) -> Result<Built> {
        let linux = self.unpack(KERNEL_PACKAGE)?;
        let busybox = self.unpack(BUSYBOX_PACKAGE)?;
        let source = format!("{} and {}", linux.source, busybox.source);
        self.report(&Event::Building {
            what: "guest kernel and initrd",
            from: &source,
        });
        let tree = ModuleTree::open(linux.path())?;
        let image = fs::read(vmlinuz(&linux, &tree)?)?;
        let vmlinux =
            kernel::vmlinux(&image).with_context(|| format!("kernel of {}", linux.source))?;
        fs::write(scratch.join("vmlinux"), vmlinux)?;
        let modules = tree.closure(&MODULES)?;
        let mut initrd = initrd(&busybox, &tree, &modules, &modules, INIT)?;
        initrd.file("bin/rekindle-agent", 0o755, AGENT)?;
        fs::write(scratch.join("initrd"), initrd.finish()?)?;
        Ok(Built {
            source,
            version: linux.version,
        })
    }
}

/// Names everything that decides about a set's contents but is not a package.
pub(crate) fn recipe(texts: &[&str], lists: &[&[&str]]) -> Sha256 {
    let lists = lists.iter().map(|l| l.join(" "));
    let parts = texts
        .iter()
        .map(ToString::to_string)
        .chain(lists)
        .collect::<Vec<_>>();
    Sha256::of(parts.join("\0").as_bytes())
}

/// The bzImage of an unpacked kernel package.
pub(crate) fn vmlinuz(package: &Unpacked, tree: &ModuleTree) -> Result<PathBuf> {
    let release = &tree.release;
    package.file(&[
        &format!("boot/vmlinuz-{release}"),
        &format!("usr/lib/modules/{release}/vmlinuz"),
        &format!("lib/modules/{release}/vmlinuz"),
    ])
}

/// An initrd with busybox, `modules` at hand, and `init`, which loads `loaded`.
pub(crate) fn initrd(
    busybox: &Unpacked,
    tree: &ModuleTree,
    modules: &[Module],
    loaded: &[Module],
    init: &str,
) -> Result<Initrd> {
    let mut initrd = Initrd::new();
    initrd.busybox(busybox)?;
    initrd.modules(&tree.release, modules)?;
    let list = loaded
        .iter()
        .map(|m| format!("{}\n", m.name))
        .collect::<String>();
    initrd.directory("etc")?;
    initrd.file("etc/modules", 0o644, list.as_bytes())?;
    initrd.file("init", 0o755, init.as_bytes())?;
    Ok(initrd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_decides_about_the_contents_changes_the_recipe() {
        let one = recipe(&["1", "script"], &[&["a", "b"]]);
        assert_eq!(one, recipe(&["1", "script"], &[&["a", "b"]]));
        assert_ne!(one, recipe(&["2", "script"], &[&["a", "b"]]));
        assert_ne!(one, recipe(&["1", "script"], &[&["b", "a"]]));
        assert_ne!(one, recipe(&["1", "script"], &[&["a"], &["b"]]));
    }
}
