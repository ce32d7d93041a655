//! What a manifest says, compared with itself and with what can be.

use super::{
    Backing, Devices, Drive, DriveLimits, FORMAT_VERSION, MAX_MEMORY, MAX_VMSTATE, Manifest,
    ManifestError, MemoryLayout,
};
use crate::unit::{HUGE_PAGE_SIZE, PAGE_SIZE};

const MAX_DEVICES: usize = 64;

impl Manifest {
    /// Compares what the manifest says with itself and with what can be.
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        let rules = [
            (
                (1..=FORMAT_VERSION).contains(&self.format_version),
                "format_version",
                "is not one that there was",
            ),
            (
                self.parent() != Some(self.id),
                "parent",
                "is the snapshot itself",
            ),
            (
                (1..=32).contains(&self.machine.vcpus),
                "machine.vcpus",
                "is not 1 to 32",
            ),
            (self.machine.mem_mib > 0, "machine.mem_mib", "is 0"),
            (
                u64::from(self.machine.mem_mib) << 20 <= self.memory.size.get(),
                "machine.mem_mib",
                "is more than the memory",
            ),
            (
                self.files.memory.size == self.memory.size,
                "files.memory.size",
                "is not memory.size",
            ),
            (
                self.files.vmstate.size.get() > 0,
                "files.vmstate.size",
                "is 0",
            ),
            (
                self.files.vmstate.size <= MAX_VMSTATE,
                "files.vmstate.size",
                "is larger than any state file",
            ),
        ];
        first_broken(&rules)?;
        self.check_memory()?;
        self.check_devices()
    }

    fn check_memory(&self) -> Result<(), ManifestError> {
        let MemoryLayout {
            size,
            page_size,
            regions,
        } = &self.memory;
        let mut end = Some(0);
        for region in regions {
            let starts_there = end == Some(region.offset.get()) && region.size.get() > 0;
            end = region
                .offset
                .get()
                .checked_add(region.size.get())
                .filter(|_| starts_there);
        }
        first_broken(&[
            (size.get() > 0, "memory.size", "is 0"),
            (
                *size <= MAX_MEMORY,
                "memory.size",
                "is larger than any memory",
            ),
            (
                matches!(page_size.get(), PAGE_SIZE | HUGE_PAGE_SIZE),
                "memory.page_size",
                "is neither 4096 nor 2097152",
            ),
            (
                size.get().is_multiple_of(page_size.get()),
                "memory.size",
                "is not whole pages",
            ),
            (
                regions.len() <= MAX_DEVICES,
                "memory.regions",
                "are too many",
            ),
            (
                regions.is_empty() || end == Some(size.get()),
                "memory.regions",
                "do not follow each other to the end",
            ),
        ])
    }

    fn check_devices(&self) -> Result<(), ManifestError> {
        let Devices {
            drives,
            interfaces,
            vsock,
            ..
        } = &self.devices;
        let few = drives.len() <= MAX_DEVICES && interfaces.len() <= MAX_DEVICES;
        first_broken(&[
            (few, "devices", "are too many"),
            (
                drives.iter().filter(|drive| drive.root).count() <= 1,
                "devices.drives",
                "have more than one root",
            ),
            (
                distinct(drives.iter().map(|drive| &drive.id)),
                "devices.drives",
                "use an id twice",
            ),
            (
                distinct(drives.iter().map(|drive| &drive.path)),
                "devices.drives",
                "use a path twice",
            ),
            (
                distinct(interfaces.iter().map(|interface| &interface.id)),
                "devices.interfaces",
                "use an id twice",
            ),
            (
                vsock.as_ref().is_none_or(|vsock| vsock.cid >= 3),
                "devices.vsock.cid",
                "is less than 3",
            ),
            (
                drives.iter().all(is_backed),
                "devices.drives",
                "have a backing that does not fit them",
            ),
            (
                drives.iter().filter_map(|drive| drive.limits).all(is_limit),
                "devices.drives.limits",
                "are 0",
            ),
        ])
    }
}

fn is_limit(limits: DriveLimits) -> bool {
    limits.bytes_per_second != Some(0) && limits.operations_per_second != Some(0)
}

fn is_backed(drive: &Drive) -> bool {
    match &drive.backing {
        Backing::Layer { file, record } => {
            file.as_str().strip_prefix("disks/") == Some(drive.id.as_str()) && record.size.get() > 0
        }
        Backing::Image { size, .. } | Backing::Host { size, .. } => {
            drive.read_only && size.get() > 0
        }
    }
}

fn distinct<T: Ord>(items: impl Iterator<Item = T>) -> bool {
    let mut items: Vec<T> = items.collect();
    items.sort();
    items.windows(2).all(|pair| pair[0] != pair[1])
}

fn first_broken(rules: &[(bool, &'static str, &'static str)]) -> Result<(), ManifestError> {
    match rules.iter().find(|(holds, ..)| !holds) {
        None => Ok(()),
        Some(&(_, field, problem)) => Err(ManifestError::Invalid { field, problem }),
    }
}
