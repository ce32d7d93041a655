//! Firecracker's jailer: what it is told, and where it puts what.
//!
//! ```text
//!   BASE/NAME/ID/root/      NAME is the file name of Firecracker's program
//!     NAME, NAME.pid, dev/, run/     the jailer's; it fails where one of them, but `run`, is there already
//!     …                              whatever the VM needs, put there by its owner; relative paths begin here
//! ```
//!
//! As it is started here the jailer becomes Firecracker: one process, one pid, a child of whoever started it. Its own
//! `--new-pid-ns` would fork; [`Launch::jailed`](super::Launch::jailed) starts it in a new namespace instead.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A jail for one Firecracker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jailer {
    program: PathBuf,
    uid: u32,
    gid: u32,
    base: PathBuf,
    file_size: Option<u64>,
    open_files: Option<u64>,
}

impl Jailer {
    /// What the jailer makes itself in a jail's root, and what it must not find there.
    pub fn leaves(firecracker: &Path) -> Vec<PathBuf> {
        let name = name_of(firecracker);
        let mut pid = name.clone();
        pid.push(".pid");
        [name, pid, "dev".into(), "run".into()]
            .map(PathBuf::from)
            .into()
    }

    /// The jailer `program`, which makes the jail under `base` and runs Firecracker as this user and group.
    pub fn new(program: impl Into<PathBuf>, base: impl Into<PathBuf>, uid: u32, gid: u32) -> Self {
        Jailer {
            program: program.into(),
            uid,
            gid,
            base: base.into(),
            file_size: None,
            open_files: None,
        }
    }

    /// The largest file that Firecracker may write, in bytes: its drives, and the memory of a snapshot. One that goes
    /// beyond ends it with status 151.
    #[must_use]
    pub fn file_size(mut self, bytes: u64) -> Self {
        self.file_size = Some(bytes);
        self
    }

    /// How many files Firecracker may have open; 2048 unless set.
    #[must_use]
    pub fn open_files(mut self, count: u64) -> Self {
        self.open_files = Some(count);
        self
    }

    /// The directory that the Firecracker with this id takes for `/`.
    pub fn root(&self, firecracker: &Path, id: &str) -> PathBuf {
        self.base.join(name_of(firecracker)).join(id).join("root")
    }

    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// All that comes before Firecracker's own arguments.
    pub(super) fn arguments(&self, firecracker: &Path, id: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--id".into(), id.into()];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        add("--exec-file", firecracker.into());
        add("--uid", self.uid.to_string().into());
        add("--gid", self.gid.to_string().into());
        add("--chroot-base-dir", self.base.clone().into());
        if let Some(bytes) = self.file_size {
            add("--resource-limit", format!("fsize={bytes}").into());
        }
        if let Some(count) = self.open_files {
            add("--resource-limit", format!("no-file={count}").into());
        }
        arguments.push("--".into());
        arguments
    }
}

fn name_of(firecracker: &Path) -> OsString {
    firecracker.file_name().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jailer_is_told_who_where_and_how_much() {
        let jailer = Jailer::new("/opt/jailer", "/vms/web", 7, 8)
            .file_size(4096)
            .open_files(64);
        let firecracker = Path::new("/opt/firecracker-v1");
        let arguments = jailer.arguments(firecracker, "a1");
        let expected = "--id a1 --exec-file /opt/firecracker-v1 --uid 7 --gid 8 --chroot-base-dir /vms/web \
                        --resource-limit fsize=4096 --resource-limit no-file=64 --";
        let expected: Vec<OsString> = expected.split(' ').map(OsString::from).collect();
        assert_eq!(arguments, expected);
        assert_eq!(
            jailer.root(firecracker, "a1"),
            Path::new("/vms/web/firecracker-v1/a1/root")
        );
        let leaves = ["firecracker-v1", "firecracker-v1.pid", "dev", "run"];
        assert_eq!(Jailer::leaves(firecracker), leaves.map(PathBuf::from));
    }
}
