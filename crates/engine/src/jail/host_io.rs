//! What a jailed Firecracker may read from and write to the disk that its VM is on, by the control group's `io` controller.
//!
//! A drive's own limits are Firecracker's to keep; this one holds whoever has got hold of it, too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::cgroup::{self, Limit};
use super::{JailError, at};
use crate::vm::config::Limits;

/// Where the kernel tells of block devices, by number.
const DEVICES: &str = "/sys/dev/block";

/// Refuses what cannot be limited here.
pub(super) fn check(vms: &Path, limits: &Limits) -> Result<(), JailError> {
    if limits.are_none() {
        return Ok(());
    }
    if limits.let_nothing_through() {
        return Err(JailError::NoIo);
    }
    if !cgroup::limits_io()? {
        return Err(JailError::NoIoController);
    }
    disk_of(vms).map(drop)
}

/// The limit for the disk that a VM's directory is on; none if nothing is to be limited.
pub(super) fn limit(dir: &Path, limits: &Limits) -> Result<Option<Limit>, JailError> {
    match limits.are_none() {
        true => Ok(None),
        false => Ok(Some(of_disk(&disk_of(dir)?, limits))),
    }
}

fn of_disk(disk: &str, limits: &Limits) -> Limit {
    let each = |number: Option<u64>, v1: [&'static str; 2], v2: [&str; 2]| {
        let number = number?;
        let old = v1.map(|file| (file, format!("{disk} {number}")));
        let new = v2.map(|key| format!(" {key}={number}")).concat();
        Some((old, new))
    };
    let bytes = each(
        limits.bytes_per_second,
        [
            "blkio.throttle.read_bps_device",
            "blkio.throttle.write_bps_device",
        ],
        ["rbps", "wbps"],
    );
    let operations = each(
        limits.operations_per_second,
        [
            "blkio.throttle.read_iops_device",
            "blkio.throttle.write_iops_device",
        ],
        ["riops", "wiops"],
    );
    let (old, new): (Vec<_>, Vec<String>) = bytes.into_iter().chain(operations).unzip();
    Limit {
        controller: "io",
        v1: old.into_iter().flatten().collect(),
        v2: ("io.max", format!("{disk}{}", new.concat())),
    }
}

/// The disk that a directory is on, as the kernel writes its number.
fn disk_of(dir: &Path) -> Result<String, JailError> {
    let device = fs::metadata(dir).map_err(at(dir))?.dev();
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let known = PathBuf::from(DEVICES).join(&number);
    if !known.exists() {
        // Btrfs, overlayfs and what is in memory have numbers that are no device's.
        return Err(JailError::NoDisk(dir.to_owned()));
    }
    if !known.join("partition").exists() {
        return Ok(number);
    }
    // Whole disks alone are limited.
    let whole = fs::canonicalize(&known)
        .map_err(at(&known))?
        .with_file_name("dev");
    let number = fs::read_to_string(&whole).map_err(at(&whole))?;
    Ok(number.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_written_as_either_version_wants_it() {
        let limits = Limits {
            bytes_per_second: Some(1 << 20),
            operations_per_second: Some(50),
        };
        let limit = of_disk("8:0", &limits);
        assert_eq!(
            limit.v2,
            (
                "io.max",
                "8:0 rbps=1048576 wbps=1048576 riops=50 wiops=50".to_owned()
            )
        );
        let value = |file| {
            let found = limit.v1.iter().find(|(name, _)| *name == file);
            found.map(|(_, value)| value.as_str())
        };
        assert_eq!(limit.v1.len(), 4);
        assert_eq!(
            value("blkio.throttle.write_bps_device"),
            Some("8:0 1048576")
        );
        assert_eq!(value("blkio.throttle.read_iops_device"), Some("8:0 50"));
        let bytes = Limits {
            operations_per_second: None,
            ..limits
        };
        assert_eq!(of_disk("8:0", &bytes).v2.1, "8:0 rbps=1048576 wbps=1048576");
    }

    #[test]
    fn what_is_in_memory_is_on_no_disk() {
        assert!(matches!(
            disk_of(Path::new("/proc")),
            Err(JailError::NoDisk(_))
        ));
    }
}
