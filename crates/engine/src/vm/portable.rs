//! From a VM's record to a snapshot's manifest, and back.

use std::path::Path;

use rekindle_store::image::ImageName;
use rekindle_store::manifest::field::{InvalidField, Text};
use rekindle_store::manifest::{
    Agent as AgentInfo, Backing, BackingParts, Devices, DriveLimits, DriveParts, Egress,
    FirecrackerInfo, HostInfo, HugePages, Interface, Kind, MachineConfig, ManifestParts,
    MemoryLayout, MemoryRegion, Vsock as VsockInfo,
};
use rekindle_store::unit::{ByteOffset, ByteSize, HUGE_PAGE_SIZE, PAGE_SIZE};
use rekindle_store::{Manifest, Root, Snapshot};

use super::compat;
use super::config::{
    Access, Balloon, DirtyPages, Drive, Limits, Machine, Mmds, Nic, Pages, Role, Vsock,
};
use super::dir::{VSOCK_SOCKET, disk_path};
use super::record::{GuestAgent, Record};
use super::restore::{Network, RestoreConfig};
use crate::drives::DriveSource;
use crate::host;
use crate::net::plan::Nat;
use crate::net::policy::{Outbound, Policy, PolicyError, Target};

/// Where Firecracker interrupts the guest's memory on x86-64 (its `arch/x86_64/layout.rs`).
const GAP_AT: u64 = 3 << 30;

/// Something of a VM cannot be written into a manifest.
#[derive(Debug, thiserror::Error)]
#[error("the {what} cannot be written into a snapshot's manifest")]
pub struct Unportable {
    /// What it is.
    pub what: &'static str,
    /// Why not.
    #[source]
    pub source: InvalidField,
}

/// What the manifest of a snapshot of this VM says, but for what only the files tell.
pub(crate) fn manifest_parts(
    root: &Root,
    record: &Record,
    kind: Kind,
) -> Result<ManifestParts, Unportable> {
    let cpu = host::cpu();
    let version = record.firecracker_version.as_deref().unwrap_or("unknown");
    let machine = &record.machine;
    Ok(ManifestParts {
        kind,
        firecracker: FirecrackerInfo {
            version: field("firecracker version", version)?,
            snapshot_format: field("snapshot format", &compat::format_name(version))?,
        },
        host: HostInfo {
            cpu_vendor: field("processor's vendor", &cpu.vendor)?,
            cpu_model: field("processor's model", &cpu.model)?,
            kernel: field("host's kernel release", &host::kernel_release())?,
        },
        machine: MachineConfig {
            vcpus: machine.vcpus,
            mem_mib: machine.memory_mib,
            smt: false,
            track_dirty_pages: machine.dirty_pages == DirtyPages::Tracked,
            huge_pages: match machine.pages {
                Pages::Normal => HugePages::None,
                Pages::Huge => HugePages::Hugetlbfs2M,
            },
        },
        boot: record.boot.clone(),
        devices: Devices {
            drives: machine
                .drives
                .iter()
                .map(|drive| drive_parts(root, drive))
                .collect::<Result<_, _>>()?,
            interfaces: machine
                .nics
                .iter()
                .map(interface)
                .collect::<Result<_, _>>()?,
            vsock: machine
                .vsock
                .map(|vsock| vsock_info(vsock, record.agent.as_ref()))
                .transpose()?,
            balloon: machine.balloon.is_some(),
            mmds: machine.mmds == Mmds::V2,
            egress: machine.nat.as_ref().map(egress).transpose()?,
        },
        memory: memory_layout(machine.memory_mib, machine.pages),
        removed: Vec::new(),
        notes: Default::default(),
    })
}

/// The machine that a restored copy is.
pub(crate) fn machine(
    root: &Root,
    snapshot: &Snapshot,
    config: &RestoreConfig,
) -> Result<Machine, PolicyError> {
    let manifest = snapshot.manifest();
    let nics = manifest.devices.interfaces.iter().map(|interface| {
        let id = interface.id.as_str();
        let other = config.taps.iter().find(|wanted| wanted.iface_id == id);
        Nic {
            id: id.to_owned(),
            tap: other
                .map_or(interface.host_dev_name.as_str(), |wanted| &wanted.tap)
                .to_owned(),
            mac: interface.guest_mac.as_ref().map(ToString::to_string),
        }
    });
    let drives = manifest
        .devices
        .drives
        .iter()
        .zip(drives(root, snapshot))
        .map(|(drive, source)| Drive {
            id: source.id,
            source: source.file,
            access: source.access,
            role: if drive.root { Role::Root } else { Role::Data },
            limits: drive.limits.map_or_else(Limits::default, |limits| Limits {
                bytes_per_second: limits.bytes_per_second,
                operations_per_second: limits.operations_per_second,
            }),
        });
    Ok(Machine {
        vcpus: manifest.machine.vcpus,
        memory_mib: manifest.machine.mem_mib,
        dirty_pages: config.dirty_pages,
        pages: pages(manifest),
        nics: nics.collect(),
        nat: nat(manifest, config)?,
        net_rate: None,
        drives: drives.collect(),
        vsock: manifest.devices.vsock.as_ref().map(|vsock| Vsock {
            guest_cid: vsock.cid,
        }),
        mmds: match manifest.devices.mmds {
            true => Mmds::V2,
            false => Mmds::Off,
        },
        balloon: manifest
            .devices
            .balloon
            .then_some(Balloon { amount_mib: None }),
    })
}

/// The network of its own that a copy gets: that of the snapshot, unless it was asked for another or none.
pub(crate) fn nat(manifest: &Manifest, config: &RestoreConfig) -> Result<Option<Nat>, PolicyError> {
    let Some(before) = policy(manifest)? else {
        return Ok(None);
    };
    Ok(match &config.network {
        Network::CutOff => None,
        Network::Nat(nat) => Some(nat.clone()),
        Network::AsBefore => Some(Nat::new(before)),
    })
}

/// What the network of a snapshot's VM let through, if it had one of its own.
pub fn policy(manifest: &Manifest) -> Result<Option<Policy>, PolicyError> {
    let Some(egress) = &manifest.devices.egress else {
        return Ok(None);
    };
    let read = |targets: &[Text]| -> Result<Vec<Target>, PolicyError> {
        targets.iter().map(|one| one.as_str().parse()).collect()
    };
    Ok(Some(Policy {
        outbound: match egress.outbound {
            true => Outbound::On,
            false => Outbound::Off,
        },
        allow: read(&egress.allow)?,
        deny: read(&egress.deny)?,
        ..Policy::default()
    }))
}

fn egress(nat: &Nat) -> Result<Egress, Unportable> {
    let write = |targets: &[Target]| {
        let texts = targets
            .iter()
            .map(|one| field("network's policy", &one.to_string()));
        texts.collect::<Result<_, _>>()
    };
    Ok(Egress {
        outbound: nat.policy.outbound == Outbound::On,
        allow: write(&nat.policy.allow)?,
        deny: write(&nat.policy.deny)?,
    })
}

/// The pages that a snapshot's copies have under their memory.
pub(crate) fn pages(manifest: &Manifest) -> Pages {
    match manifest.machine.huge_pages {
        HugePages::Hugetlbfs2M => Pages::Huge,
        // Transparent ones are the host's to give, and the same to everybody.
        _ => Pages::Normal,
    }
}

/// Where a copy's drives come from: the snapshot's own layers, and the files that all may read.
pub(crate) fn drives(root: &Root, snapshot: &Snapshot) -> Vec<DriveSource> {
    let source = |drive: &rekindle_store::manifest::Drive| {
        let (file, access) = match &drive.backing {
            Backing::Layer { file, .. } => (snapshot.dir().join(file), Access::OwnCopy),
            Backing::Image { name, .. } => (name.path(root), Access::ReadOnly),
            Backing::Host { path, .. } => (path.as_ref().to_owned(), Access::ReadOnly),
        };
        DriveSource {
            id: drive.id.to_string(),
            file,
            access,
        }
    };
    snapshot
        .manifest()
        .devices
        .drives
        .iter()
        .map(source)
        .collect()
}

fn drive_parts(root: &Root, drive: &Drive) -> Result<DriveParts, Unportable> {
    Ok(DriveParts {
        id: field("drive's id", &drive.id)?,
        path: field("drive's path", &disk_path(&drive.id).to_string_lossy())?,
        read_only: drive.access == Access::ReadOnly,
        root: drive.role == Role::Root,
        limits: (!drive.limits.are_none()).then_some(DriveLimits {
            bytes_per_second: drive.limits.bytes_per_second,
            operations_per_second: drive.limits.operations_per_second,
        }),
        backing: match drive.access {
            Access::OwnCopy => BackingParts::Layer,
            Access::ReadOnly => match image_name(root, &drive.source) {
                Some(name) => BackingParts::Image(name),
                None => BackingParts::Host(field("drive's file", &drive.source.to_string_lossy())?),
            },
        },
    })
}

/// The image of the state directory that this file is, if it is one.
fn image_name(root: &Root, file: &Path) -> Option<ImageName> {
    let name: ImageName = file.file_stem()?.to_str()?.parse().ok()?;
    (name.path(root) == file).then_some(name)
}

fn interface(nic: &Nic) -> Result<Interface, Unportable> {
    Ok(Interface {
        id: field("interface's id", &nic.id)?,
        host_dev_name: field("TAP's name", &nic.tap)?,
        guest_mac: nic
            .mac
            .as_deref()
            .map(|mac| field("MAC address", mac))
            .transpose()?,
    })
}

fn vsock_info(vsock: Vsock, agent: Option<&GuestAgent>) -> Result<VsockInfo, Unportable> {
    let agent = match agent {
        None => None,
        Some(GuestAgent::Awaited) => Some(AgentInfo::Awaited),
        Some(GuestAgent::Ready { protocol, version }) => Some(AgentInfo::Ready {
            protocol: *protocol,
            version: field("agent's version", version)?,
        }),
    };
    Ok(VsockInfo {
        uds_path: field("vsock's path", VSOCK_SOCKET)?,
        cid: vsock.guest_cid,
        agent,
    })
}

/// What is known of the agent in a snapshot's guest.
pub(crate) fn agent(manifest: &Manifest) -> Option<GuestAgent> {
    let vsock = manifest.devices.vsock.as_ref()?;
    Some(match vsock.agent.as_ref()? {
        AgentInfo::Awaited => GuestAgent::Awaited,
        AgentInfo::Ready { protocol, version } => GuestAgent::Ready {
            protocol: *protocol,
            version: version.to_string(),
        },
    })
}

pub(super) fn field<T: std::str::FromStr<Err = InvalidField>>(
    what: &'static str,
    text: &str,
) -> Result<T, Unportable> {
    text.parse().map_err(|source| Unportable { what, source })
}

fn memory_layout(mib: u32, pages: Pages) -> MemoryLayout {
    let size = u64::from(mib) << 20;
    let low = size.min(GAP_AT);
    let region = |offset, size| MemoryRegion {
        offset: ByteOffset::new(offset),
        size: ByteSize::new(size),
    };
    let mut regions = vec![region(0, low)];
    if size > low {
        regions.push(region(low, size - low));
    }
    MemoryLayout {
        size: ByteSize::new(size),
        page_size: ByteSize::new(match pages {
            Pages::Normal => PAGE_SIZE,
            Pages::Huge => HUGE_PAGE_SIZE,
        }),
        regions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_gap_is_a_second_region() {
        assert_eq!(memory_layout(256, Pages::Normal).regions.len(), 1);
        let layout = memory_layout(4096, Pages::Huge);
        assert_eq!(layout.page_size, ByteSize::new(2 << 20));
        assert_eq!(layout.regions[0].size, ByteSize::new(3 << 30));
        assert_eq!(layout.regions[1].offset, ByteOffset::new(3 << 30));
        assert_eq!(layout.regions[1].size, ByteSize::new(1 << 30));
    }
}
