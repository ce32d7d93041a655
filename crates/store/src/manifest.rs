//! `manifest.json`: all that is needed to restore a snapshot, and nothing that is not so.
//!
//! ```text
//! {
//!   "format_version": 2,
//!   …                               read with any JSON tool
//!   "checksum": "<64 hex digits>"   BLAKE3 of every byte before the comma that precedes this line
//! }
//! ```
//!
//! It may come from a stranger: it is bounded in size, every text and path in it is checked as it is read
//! (see [`field`]), and numbers are compared with each other before anybody uses them.

mod check;
pub mod field;

use crate::digest::Digest;
use crate::image::ImageName;
use crate::layout::{SnapshotId, SnapshotName};
use crate::unit::{ByteOffset, ByteSize, PageRange};
use field::{DeviceId, HostPath, InterfaceName, MacAddress, Note, RelativePath, Text};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version of the format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 2;

/// The largest manifest that is read.
pub const MAX_SIZE: ByteSize = ByteSize::new(1 << 20);

/// The largest memory that a snapshot can have: 4 TiB.
pub const MAX_MEMORY: ByteSize = ByteSize::new(4 << 40);

/// The largest `vmstate` that is read; Firecracker itself refuses to load more than 10 MB.
pub const MAX_VMSTATE: ByteSize = ByteSize::new(64 << 20);

/// What a snapshot says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// The version of the format, [`FORMAT_VERSION`] at the most.
    pub format_version: u32,
    /// The snapshot's id, which is also the name of its directory.
    pub id: SnapshotId,
    /// The name that it was given, if any.
    pub name: Option<SnapshotName>,
    /// Whether it stands alone.
    #[serde(flatten)]
    pub kind: Kind,
    /// When it was published.
    pub created: Timestamp,
    /// The Firecracker that made it.
    pub firecracker: FirecrackerInfo,
    /// The host that it was made on.
    pub host: HostInfo,
    /// The machine's configuration.
    pub machine: MachineConfig,
    /// What it was booted from: a restore needs none of it, booting anew all of it.
    pub boot: BootInfo,
    /// The devices that `vmstate` records.
    pub devices: Devices,
    /// The guest's memory.
    pub memory: MemoryLayout,
    /// The files beside the manifest, but for the disks, which the devices name.
    pub files: Files,
    /// What somebody wrote down about it.
    #[serde(default)]
    pub notes: Note,
}

/// Whether a snapshot stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Kind {
    /// All of the memory is there.
    ///
    /// What Firecracker calls a diff of a VM that was never restored belongs here as well: its holes are zeros.
    Full,
    /// Only what changed since the parent is there.
    Diff {
        /// The snapshot that has the rest.
        parent: SnapshotId,
    },
}

/// The Firecracker that made a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirecrackerInfo {
    /// The program's version, "1.12.1".
    pub version: Text,
    /// The version of its snapshot format, "6.0.0".
    pub snapshot_format: Text,
}

/// The host that a snapshot was made on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// `vendor_id` of `/proc/cpuinfo`.
    pub cpu_vendor: Text,
    /// `model name` of `/proc/cpuinfo`.
    pub cpu_model: Text,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: Text,
}

/// The machine's configuration, in Firecracker's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// How many vCPUs, 1 to 32.
    pub vcpus: u8,
    /// The configured memory in MiB; hot-plugged memory comes on top of it.
    pub mem_mib: u32,
    /// Whether vCPUs are siblings.
    pub smt: bool,
    /// Whether dirty pages were logged.
    pub track_dirty_pages: bool,
    /// The pages behind the memory.
    pub huge_pages: HugePages,
}

/// The pages behind a guest's memory, in Firecracker's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// Pages of 4 KiB.
    #[default]
    None,
    /// Pages of 2 MiB from hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
    /// Whatever transparent huge pages give.
    Transparent,
}

/// What a VM was booted from, or the VM that it is a copy of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BootInfo {
    /// The kernel.
    pub kernel: Option<HostPath>,
    /// The kernel's digest when it was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_blake3: Option<Digest>,
    /// The initial RAM disk.
    pub initrd: Option<HostPath>,
    /// The initial RAM disk's digest when it was booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_blake3: Option<Digest>,
    /// The kernel's command line.
    pub args: Option<Text>,
}

/// The devices that `vmstate` records; `D` says what is known about a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices<D = Drive> {
    /// Block devices.
    pub drives: Vec<D>,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// The vsock device, if there is one.
    pub vsock: Option<Vsock>,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// Whether the guest can ask Firecracker's metadata service, of version 2. What it is told there is in no snapshot.
    #[serde(default, skip_serializing_if = "is_false")]
    pub mmds: bool,
    /// What the guest could reach, if the interfaces were on a network of the VM's own. Absent if they were on TAP devices
    /// of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
}

/// What a guest could reach from a network of its own. A copy can reach the same, unless told otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Egress {
    /// Whether it could open connections.
    pub outbound: bool,
    /// If there are any, it could reach only these.
    pub allow: Vec<Text>,
    /// It could not reach these.
    pub deny: Vec<Text>,
}

impl<D> Default for Devices<D> {
    fn default() -> Self {
        Self {
            drives: Vec::new(),
            interfaces: Vec::new(),
            vsock: None,
            balloon: false,
            mmds: false,
            egress: None,
        }
    }
}

/// What older programs did not write is left out where it changes nothing.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A block device of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Firecracker's `drive_id`.
    pub id: DeviceId,
    /// The path that `vmstate` records, relative to Firecracker's working directory.
    pub path: RelativePath,
    /// Whether the guest can write to it.
    pub read_only: bool,
    /// Whether it is the root device.
    pub root: bool,
    /// How much it may move, where that was limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<DriveLimits>,
    /// Where its contents are.
    pub backing: Backing,
}

/// How much a drive may move, as it was set when the VM was booted; `vmstate` has what holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveLimits {
    /// Bytes a second, read and written together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Reads and writes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
}

/// Where the contents of a drive are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Backing {
    /// In the snapshot, taken at the same pause.
    Layer {
        /// The file in the snapshot's directory, `disks/<drive id>`.
        file: RelativePath,
        /// Its size and digest.
        #[serde(flatten)]
        record: DiskRecord,
    },
    /// In a base image of the state directory, which the guest cannot write to.
    Image {
        /// The image.
        name: ImageName,
        /// How large it was.
        size: ByteSize,
        /// When it was last written to; nobody may since.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        modified: Option<Timestamp>,
    },
    /// In a file of the host, which the guest cannot write to.
    ///
    /// Never believe it of a manifest that came from elsewhere: it may name any file.
    Host {
        /// The file.
        path: HostPath,
        /// How large it was.
        size: ByteSize,
        /// When it was last written to; nobody may since.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        modified: Option<Timestamp>,
    },
}

/// A network interface of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Firecracker's `iface_id`.
    pub id: DeviceId,
    /// The host's device that `vmstate` records.
    pub host_dev_name: InterfaceName,
    /// The guest's MAC address, if one was set.
    pub guest_mac: Option<MacAddress>,
}

/// The vsock device of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The socket that `vmstate` records, relative to Firecracker's working directory.
    pub uds_path: RelativePath,
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// The agent in the guest that listens on it, if one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
}

/// The agent in a snapshot's guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Agent {
    /// It was about to be started.
    Awaited,
    /// It listened.
    Ready {
        /// Which version of its protocol it speaks.
        protocol: u32,
        /// Its release.
        version: Text,
    },
}

/// The guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// The size of the memory file, in bytes.
    pub size: ByteSize,
    /// The size of the pages that stood behind it, in bytes: 4096 or 2097152.
    pub page_size: ByteSize,
    /// The parts of the file that are a region of guest memory each, in order; empty if nobody knows.
    #[serde(default)]
    pub regions: Vec<MemoryRegion>,
}

/// A part of the memory file that is one region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// Where it starts in the file.
    pub offset: ByteOffset,
    /// How long it is.
    pub size: ByteSize,
}

/// The files that every snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// Firecracker's state file.
    pub vmstate: FileRecord,
    /// The guest's memory, holes read as zeros.
    pub memory: FileRecord,
    /// What each page of it is.
    pub pages: FileRecord,
}

/// What is recorded of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its size.
    pub size: ByteSize,
    /// Its digest, as `b3sum` prints it.
    pub blake3: Digest,
}

/// What is recorded of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its size, most of which may be holes.
    pub size: ByteSize,
    /// Its digest.
    #[serde(flatten)]
    pub digest: DiskDigest,
}

/// A disk's digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskDigest {
    /// Of all its bytes, as `b3sum` prints it: format version 1, which hashes many GiB of zeros for a large empty disk.
    #[serde(rename = "blake3")]
    Whole(Digest),
    /// Of what is not zero, block by block; the page on the format says how.
    #[serde(rename = "data_blake3")]
    Data(Digest),
}

/// What whoever makes a snapshot has to say about it; the store adds ids, time, sizes and digests.
#[derive(Debug, Clone)]
pub struct ManifestParts {
    /// Whether it stands alone.
    pub kind: Kind,
    /// The Firecracker that made it.
    pub firecracker: FirecrackerInfo,
    /// The host that it was made on.
    pub host: HostInfo,
    /// The machine's configuration.
    pub machine: MachineConfig,
    /// What it was booted from.
    pub boot: BootInfo,
    /// The devices that `vmstate` records.
    pub devices: Devices<DriveParts>,
    /// The guest's memory; its size must be that of the memory file.
    pub memory: MemoryLayout,
    /// Pages that were taken away from the guest since the parent, and are zero unless the memory file has data
    /// for them: dirty logging does not see a balloon. Means nothing in a Full snapshot.
    pub removed: Vec<PageRange>,
    /// What somebody wants written down about it.
    pub notes: Note,
}

/// A block device, as whoever makes a snapshot knows it.
#[derive(Debug, Clone)]
pub struct DriveParts {
    /// Firecracker's `drive_id`.
    pub id: DeviceId,
    /// The path that `vmstate` records, relative to Firecracker's working directory.
    pub path: RelativePath,
    /// Whether the guest can write to it.
    pub read_only: bool,
    /// Whether it is the root device.
    pub root: bool,
    /// How much it may move, where that was limited.
    pub limits: Option<DriveLimits>,
    /// Where its contents are.
    pub backing: BackingParts,
}

/// Where the contents of a drive are, as whoever makes a snapshot knows it.
#[derive(Debug, Clone)]
pub enum BackingParts {
    /// In the draft, at [`Draft::disk_path`](crate::Draft::disk_path).
    Layer,
    /// In a base image of the state directory.
    Image(ImageName),
    /// In a file of the host.
    Host(HostPath),
}

/// Why a manifest cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is nothing in it.
    #[error("the manifest is empty")]
    Empty,
    /// It is larger than any manifest is.
    #[error("the manifest is larger than {MAX_SIZE} bytes")]
    TooLarge,
    /// A newer program wrote it.
    #[error(
        "the manifest has format version {found}, and this program reads up to {FORMAT_VERSION}"
    )]
    Future {
        /// The version that it has.
        found: u32,
    },
    /// It does not end in a checksum: it was cut off or edited.
    #[error("the manifest does not end in a checksum, so it was cut off or edited")]
    NoChecksum,
    /// Its checksum is not that of its contents.
    #[error("the manifest's checksum is not that of its contents, so it was damaged or edited")]
    Checksum,
    /// It is not JSON, or a field is missing, or has a value that it cannot have.
    #[error("the manifest cannot be understood")]
    Json(#[source] serde_json::Error),
    /// What it says cannot be so.
    #[error("the manifest's {field} {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
}

// `,\n  "checksum": "` + 64 digits + `"\n}\n`
const SEAL_HEAD: &[u8] = b",\n  \"checksum\": \"";
const SEAL_TAIL: &[u8] = b"\"\n}\n";
const SEAL_LEN: usize = SEAL_HEAD.len() + 2 * Digest::LEN + SEAL_TAIL.len();

impl Manifest {
    /// Reads a manifest from the bytes of its file.
    ///
    /// # Errors
    /// A [`ManifestError`] for whatever is not a whole, sound manifest of a version that this program knows.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        if bytes.is_empty() {
            return Err(ManifestError::Empty);
        }
        if crate::unit::length(bytes.len()) > MAX_SIZE.get() {
            return Err(ManifestError::TooLarge);
        }
        // Before all else: how a later version is sealed is not ours to know.
        if let Ok(Version { format_version }) = serde_json::from_slice(bytes)
            && format_version > FORMAT_VERSION
        {
            return Err(ManifestError::Future {
                found: format_version,
            });
        }
        check_seal(bytes)?;
        let manifest: Self = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The bytes of the manifest's file.
    ///
    /// # Errors
    /// [`ManifestError::Invalid`] and [`ManifestError::TooLarge`], so that nothing is written that cannot be read.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let mut bytes = serde_json::to_vec_pretty(self).map_err(ManifestError::Json)?;
        let body = bytes
            .strip_suffix(b"\n}")
            .expect("a pretty object ends on a line of its own")
            .len();
        bytes.truncate(body);
        let checksum = Digest::of(&bytes);
        bytes.extend_from_slice(SEAL_HEAD);
        bytes.extend_from_slice(checksum.to_string().as_bytes());
        bytes.extend_from_slice(SEAL_TAIL);
        if crate::unit::length(bytes.len()) > MAX_SIZE.get() {
            return Err(ManifestError::TooLarge);
        }
        Ok(bytes)
    }

    /// The parent of a Diff.
    pub fn parent(&self) -> Option<SnapshotId> {
        match self.kind {
            Kind::Full => None,
            Kind::Diff { parent } => Some(parent),
        }
    }

    /// The disks that are in the snapshot's directory, with what is recorded of them.
    pub fn layers(&self) -> impl Iterator<Item = (&RelativePath, DiskRecord)> {
        self.devices
            .drives
            .iter()
            .filter_map(|drive| match &drive.backing {
                Backing::Layer { file, record } => Some((file, *record)),
                Backing::Image { .. } | Backing::Host { .. } => None,
            })
    }
}

fn check_seal(bytes: &[u8]) -> Result<(), ManifestError> {
    let body = bytes
        .len()
        .checked_sub(SEAL_LEN)
        .ok_or(ManifestError::NoChecksum)?;
    let (body, seal) = bytes.split_at(body);
    let digits = seal
        .strip_prefix(SEAL_HEAD)
        .and_then(|seal| seal.strip_suffix(SEAL_TAIL))
        .ok_or(ManifestError::NoChecksum)?;
    if digits != Digest::of(body).to_string().as_bytes() {
        return Err(ManifestError::Checksum);
    }
    Ok(())
}
