//! Why a snapshot is not restored.

use rekindle_firecracker::CallError;
use rekindle_store::SnapshotId;
use rekindle_store::flatten::FlattenError;
use rekindle_store::snapshot::{LeaseError, OpenError};
use rekindle_store::store::ChainError;
use rekindle_store::verify::VerifyError;

use crate::TapError;
use crate::host::HostError;
use crate::jail::JailError;
use crate::net::NetError;
use crate::pager::PagerError;
use crate::remote::RemoteError;
use crate::vm::boot::{BootError, log_tail};
use crate::vm::compat::Incompatible;
use crate::vm::dir::DirError;
use crate::vm::launch::StartError;
use crate::vm::record::RecordError;

/// Why a snapshot was not restored. Everything that was made for the copy is gone again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The snapshot, or one that it builds on, cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It is not there any more, or not whole.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its contents are damaged.
    #[error("the snapshot is damaged")]
    Verify(#[from] VerifyError),
    /// It was removed meanwhile.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// It was made on another kind of host, or by a Firecracker that this one does not understand.
    #[error(
        "the snapshot {snapshot} does not fit this host; boot it anew with: rekindle snapshot rebuild {snapshot} \
         (--force tries to restore it all the same)"
    )]
    Incompatible {
        /// The snapshot.
        snapshot: SnapshotId,
        /// What does not fit.
        #[source]
        source: Incompatible,
    },
    /// Firecracker maps no file as huge pages.
    #[error(
        "its memory is made of huge pages, which come in through userfaultfd only; leave --backend file away"
    )]
    HugePagesFromFile,
    /// It is somewhere else, and cannot be had.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// It is somewhere else, and not all of it is fetched.
    #[error("{option} needs all of the snapshot here: rekindle snapshot pull {url}")]
    NotHere {
        /// What was asked for.
        option: &'static str,
        /// The snapshot.
        url: String,
    },
    /// This host cannot run it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A TAP device cannot be used.
    #[error("the interface {iface_id} needs a TAP device; choose one with --tap {iface_id}=NAME")]
    Tap {
        /// The interface.
        iface_id: String,
        /// What is wrong with its TAP device.
        #[source]
        source: TapError,
    },
    /// The snapshot has no such interface.
    #[error("the snapshot has no network interface {0:?}")]
    NoSuchInterface(String),
    /// Its guest cannot be told.
    #[error(
        "the snapshot's guest has no agent, which a hostname, an address or an environment of the copy's own needs"
    )]
    NoAgent,
    /// Its interfaces are not made for a network of the VM's own: its guest has other addresses.
    #[error(
        "the snapshot has no network of its own, which only a VM has that was booted with one; leave --net nat and what \
         belongs to it away"
    )]
    NoNetwork,
    /// Its guest cannot ask for any metadata.
    #[error(
        "--mmds: the guest of this snapshot has no metadata service; run the original with --mmds"
    )]
    NoMmds,
    /// Its interfaces are on TAP devices of the VM's own namespace.
    #[error("the snapshot has a network of its own, TAP devices and all; leave --tap away")]
    OwnTaps,
    /// It cannot have its network, or cannot be cut off from all.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It cannot be jailed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Its directory could not be made.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// Its record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The memory of a Diff chain could not be merged for the File backend.
    #[error("cannot merge the layers of {snapshot} for the file backend")]
    Merge {
        /// The snapshot.
        snapshot: String,
        /// Why not.
        #[source]
        source: FlattenError,
    },
    /// Firecracker or the drives could not be prepared.
    #[error(transparent)]
    Prepare(#[from] BootError),
    /// The page server did not start.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Firecracker refused the snapshot.
    #[error("firecracker refused the snapshot")]
    Call(#[from] CallError),
    /// Firecracker or the page server ended before the guest was loaded.
    #[error("{who} ended while it loaded the snapshot ({exit}){}", log_tail(.log))]
    Died {
        /// Which of the two.
        who: &'static str,
        /// How it ended.
        exit: String,
        /// The last lines of Firecracker's log, if that is who ended.
        log: Vec<String>,
    },
}

impl From<StartError> for RestoreError {
    fn from(e: StartError) -> Self {
        RestoreError::Prepare(e.into())
    }
}
