//! Memory that is plugged into a running guest and taken away again (virtio-mem).

use serde::{Deserialize, Serialize};

body! {
    /// Room for memory to plug in later. Firecracker ≥ 1.14.
    #[derive(Copy, Eq)]
    pub struct MemoryHotplugConfig {
        /// All of it, in MiB; a multiple of a slot.
        total_size_mib: u32,
    }
    optional {
        /// What the guest takes at a time, in MiB: at least 2 (the default), a power of two.
        block_size_mib: u32,
        /// What the host maps at a time, in MiB: at least 128 (the default), a multiple of a block.
        slot_size_mib: u32,
    }
}

impl MemoryHotplugConfig {
    /// Room for `total_size_mib` MiB.
    pub fn new(total_size_mib: u32) -> MemoryHotplugConfig {
        MemoryHotplugConfig {
            total_size_mib,
            block_size_mib: None,
            slot_size_mib: None,
        }
    }
}

body! {
    /// How much of that room shall be memory. Firecracker ≥ 1.14.
    #[derive(Copy, Eq)]
    pub struct MemoryHotplugSizeUpdate {
        /// In MiB; a multiple of a block.
        requested_size_mib: u32,
    }
    optional {}
}

impl MemoryHotplugSizeUpdate {
    /// `requested_size_mib` MiB shall be plugged in; the guest follows in its own time.
    pub fn new(requested_size_mib: u32) -> MemoryHotplugSizeUpdate {
        MemoryHotplugSizeUpdate { requested_size_mib }
    }
}

/// How far the guest followed. Firecracker ≥ 1.14.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MemoryHotplugStatus {
    /// All the room, in MiB.
    pub total_size_mib: u64,
    /// What the host maps at a time, in MiB.
    pub slot_size_mib: u64,
    /// What the guest takes at a time, in MiB.
    pub block_size_mib: u64,
    /// What the guest has, in MiB.
    pub plugged_size_mib: u64,
    /// What it shall have, in MiB.
    pub requested_size_mib: u64,
}
