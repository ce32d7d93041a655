//! A guest's drives.
//!
//! ```text
//!   one file, read by all      an own copy              what is booted with our initrd
//!   /dev/vda  image ──────────┐
//!   /dev/vdb  …               ├─ overlayfs ─▶ /         the last drive is the layer: all that the guest writes
//!   /dev/vdX  layer ──────────┘
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Firecracker's name for it, `[A-Za-z0-9_]+`.
    pub id: String,
    /// The file that it starts from.
    pub source: PathBuf,
    /// Whether the guest may write, and to what.
    pub access: Access,
    /// Whether it is the root device.
    pub role: Role,
    /// How much it may move.
    #[serde(default, skip_serializing_if = "Limits::are_none")]
    pub limits: Limits,
}

impl Drive {
    /// The root device: the VM gets a copy of `image` that it may write to.
    pub fn root(image: impl Into<PathBuf>) -> Self {
        Drive {
            role: Role::Root,
            ..Drive::data("rootfs", image, Access::OwnCopy)
        }
    }

    /// What a guest writes beside a root device that it may only read: the VM gets a copy of `empty`, a file system that
    /// the guest's init joins with the root. Which device it is, the kernel's command line must say.
    pub fn layer(empty: impl Into<PathBuf>) -> Self {
        Drive::data("layer", empty, Access::OwnCopy)
    }

    /// A further device.
    pub fn data(id: impl Into<String>, file: impl Into<PathBuf>, access: Access) -> Self {
        Drive {
            id: id.into(),
            source: file.into(),
            access,
            role: Role::Data,
            limits: Limits::default(),
        }
    }

    /// Makes it read-only, shared with whoever else reads the file.
    pub fn read_only(mut self) -> Self {
        self.access = Access::ReadOnly;
        self
    }

    /// Limits how much it may move.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}

/// What a guest may do with a drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Reads and writes a copy of its own.
    OwnCopy,
    /// Reads the file itself, which must not change.
    ReadOnly,
}

/// What a drive is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The root device.
    Root,
    /// Any other.
    Data,
}

/// How much a drive may move, read and written together. Firecracker lets a second's worth through at once, and keeps the
/// limits in a snapshot's state; `PATCH /drives/ID` changes those of a VM that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Reads and writes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
}

impl Limits {
    /// Whether there is none.
    pub fn are_none(&self) -> bool {
        *self == Limits::default()
    }

    pub(crate) fn let_nothing_through(&self) -> bool {
        self.bytes_per_second == Some(0) || self.operations_per_second == Some(0)
    }
}
