//! Taking snapshots, and starting from them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How much of the memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SnapshotType {
    /// All of it.
    Full,
    /// What changed since the last snapshot (developer preview).
    Diff,
}

body! {
    /// What to write of a paused VM, and where.
    #[derive(Eq)]
    pub struct SnapshotCreateParams {
        /// How much of the memory.
        snapshot_type: SnapshotType,
        /// The file for the state of CPUs and devices.
        snapshot_path: PathBuf,
        /// The file for the memory.
        mem_file_path: PathBuf,
    }
    optional {}
}

impl SnapshotCreateParams {
    /// The state and all of the memory.
    pub fn full(
        snapshot_path: impl Into<PathBuf>,
        mem_file_path: impl Into<PathBuf>,
    ) -> SnapshotCreateParams {
        SnapshotCreateParams {
            snapshot_type: SnapshotType::Full,
            snapshot_path: snapshot_path.into(),
            mem_file_path: mem_file_path.into(),
        }
    }

    /// The state, and of the memory what changed; the rest of the memory file stays a hole.
    pub fn diff(
        snapshot_path: impl Into<PathBuf>,
        mem_file_path: impl Into<PathBuf>,
    ) -> SnapshotCreateParams {
        SnapshotCreateParams {
            snapshot_type: SnapshotType::Diff,
            ..SnapshotCreateParams::full(snapshot_path, mem_file_path)
        }
    }
}

/// Who provides the memory of a restored VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MemoryBackendType {
    /// The kernel, from a file that Firecracker maps.
    File,
    /// A page server, through userfaultfd.
    Uffd,
}

body! {
    /// Where the memory of a restored VM comes from.
    #[derive(Eq)]
    pub struct MemoryBackend {
        /// Who provides it.
        backend_type: MemoryBackendType,
        /// The memory file, or the page server's socket.
        backend_path: PathBuf,
    }
    optional {}
}

impl MemoryBackend {
    /// Memory from this file, mapped privately; it must not change while the VM lives.
    pub fn file(path: impl Into<PathBuf>) -> MemoryBackend {
        MemoryBackend {
            backend_type: MemoryBackendType::File,
            backend_path: path.into(),
        }
    }

    /// Memory from the page server that listens on this socket. It must serve already when the load is
    /// asked for: Firecracker touches memory before it answers.
    pub fn uffd(socket: impl Into<PathBuf>) -> MemoryBackend {
        MemoryBackend {
            backend_type: MemoryBackendType::Uffd,
            backend_path: socket.into(),
        }
    }
}

body! {
    /// Another TAP device for an interface of the snapshot. Firecracker ≥ 1.12.
    #[derive(Eq)]
    pub struct NetworkOverride {
        /// The interface, as the snapshot names it. Firecracker exits when there is none of that name.
        iface_id: String,
        /// The TAP device.
        host_dev_name: String,
    }
    optional {}
}

impl NetworkOverride {
    /// The interface `iface_id` uses the TAP device `host_dev_name` from now on.
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> NetworkOverride {
        NetworkOverride {
            iface_id: iface_id.into(),
            host_dev_name: host_dev_name.into(),
        }
    }
}

body! {
    /// Another socket for the snapshot's vsock device. Firecracker ≥ 1.16.
    #[derive(Eq)]
    pub struct VsockOverride {
        /// The socket that Firecracker shall listen on.
        uds_path: PathBuf,
    }
    optional {}
}

impl VsockOverride {
    /// Firecracker listens on this socket from now on.
    pub fn new(uds_path: impl Into<PathBuf>) -> VsockOverride {
        VsockOverride {
            uds_path: uds_path.into(),
        }
    }
}

/// The pages under the memory of a restored VM. Firecracker ≥ 1.17.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LoadHugePages {
    /// As when the snapshot was taken.
    Snapshot,
    /// Of 4 KiB.
    None,
    /// Of 2 MiB where the host's kernel finds them.
    Transparent,
    /// Of 2 MiB from hugetlbfs; not with [`MemoryBackend::file`].
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

body! {
    /// What to start from, and what shall be different.
    #[derive(Eq)]
    pub struct SnapshotLoadParams {
        /// The file with the state of CPUs and devices.
        snapshot_path: PathBuf,
        /// Whether the guest goes on at once.
        resume_vm: bool,
        /// Where the memory comes from. Exactly one of this and `mem_file_path`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mem_backend: Option<MemoryBackend>,
    }
    optional {
        /// The memory file. Deprecated since Firecracker 1.1: use `mem_backend`.
        mem_file_path: PathBuf [into],
        /// Whether Firecracker tracks what the guest writes, for Diff snapshots. Firecracker ≥ 1.13; an older
        /// one is sent `enable_diff_snapshots` instead.
        track_dirty_pages: bool [since TrackDirtyPagesOnLoad],
        /// The older name of `track_dirty_pages`. Deprecated since Firecracker 1.13.
        enable_diff_snapshots: bool,
        /// Other TAP devices for interfaces of the snapshot. Firecracker ≥ 1.12.
        network_overrides: Vec<NetworkOverride> [since NetworkOverrides],
        /// Another socket for the vsock device. Firecracker ≥ 1.16.
        vsock_override: VsockOverride [since VsockOverride],
        /// Whether the guest's clock jumps to the present (x86-64). Firecracker ≥ 1.16, 1.15.1, 1.14.4.
        clock_realtime: bool [since ClockRealtime],
        /// The pages under the memory; [`LoadHugePages::Snapshot`] unless set. Firecracker ≥ 1.17.
        huge_pages: LoadHugePages [since HugePagesOnLoad],
    }
}

impl SnapshotLoadParams {
    /// Starts from this state, with memory from `mem_backend`; the guest stays paused unless set otherwise.
    pub fn new(
        snapshot_path: impl Into<PathBuf>,
        mem_backend: MemoryBackend,
    ) -> SnapshotLoadParams {
        SnapshotLoadParams {
            snapshot_path: snapshot_path.into(),
            resume_vm: false,
            mem_backend: Some(mem_backend),
            mem_file_path: None,
            track_dirty_pages: None,
            enable_diff_snapshots: None,
            network_overrides: None,
            vsock_override: None,
            clock_realtime: None,
            huge_pages: None,
        }
    }

    /// Whether the guest goes on at once.
    #[must_use]
    pub fn resume_vm(mut self, value: bool) -> SnapshotLoadParams {
        self.resume_vm = value;
        self
    }

    /// The same request in the words of a Firecracker below 1.13, if it uses newer ones that have older
    /// names.
    pub(crate) fn in_older_words(&self) -> SnapshotLoadParams {
        let mut older = self.clone();
        if let Some(track) = older.track_dirty_pages.take() {
            older.enable_diff_snapshots = Some(track || older.enable_diff_snapshots == Some(true));
        }
        older
    }
}
