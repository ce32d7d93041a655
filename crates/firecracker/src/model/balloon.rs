//! The balloon: memory the guest gives back while it runs.

use serde::{Deserialize, Serialize};

body! {
    /// A balloon device, set before the guest starts.
    pub struct Balloon {
        /// The memory the balloon shall hold, in MiB: what the guest cannot use.
        amount_mib: u32,
        /// Whether the balloon gives way when the guest runs out of memory.
        deflate_on_oom: bool,
    }
    optional {
        /// Seconds between two statistics of the guest; 0, the default, for none. Cannot be switched on or
        /// off later.
        stats_polling_interval_s: u16,
        /// Whether hinting runs may be started (developer preview). Firecracker ≥ 1.14.
        free_page_hinting: bool [since FreePageHinting],
        /// Whether the guest reports free pages by itself, all the time. Firecracker ≥ 1.14.
        free_page_reporting: bool [since FreePageReporting],
    }
}

impl Balloon {
    /// A balloon of `amount_mib` MiB that does not give way when the guest runs out of memory.
    pub fn new(amount_mib: u32) -> Balloon {
        Balloon {
            amount_mib,
            deflate_on_oom: false,
            stats_polling_interval_s: None,
            free_page_hinting: None,
            free_page_reporting: None,
        }
    }

    /// Whether the balloon gives way when the guest runs out of memory.
    #[must_use]
    pub fn deflate_on_oom(mut self, value: bool) -> Balloon {
        self.deflate_on_oom = value;
        self
    }
}

body! {
    /// A new size for the balloon; the guest follows in its own time.
    #[derive(Copy, Eq)]
    pub struct BalloonUpdate {
        /// The memory the balloon shall hold, in MiB.
        amount_mib: u32,
    }
    optional {}
}

impl BalloonUpdate {
    /// A balloon of `amount_mib` MiB.
    pub fn new(amount_mib: u32) -> BalloonUpdate {
        BalloonUpdate { amount_mib }
    }
}

body! {
    /// A new interval between statistics.
    #[derive(Copy, Eq)]
    pub struct BalloonStatsUpdate {
        /// Seconds between two statistics of the guest; not from or to 0.
        stats_polling_interval_s: u16,
    }
    optional {}
}

impl BalloonStatsUpdate {
    /// Statistics every `stats_polling_interval_s` seconds.
    pub fn new(stats_polling_interval_s: u16) -> BalloonStatsUpdate {
        BalloonStatsUpdate {
            stats_polling_interval_s,
        }
    }
}

body! {
    /// How a hinting run begins. Firecracker ≥ 1.14.
    #[derive(Copy, Default, Eq)]
    pub struct BalloonStartCmd {}
    optional {
        /// Whether the guest may take its pages back as soon as it is through; yes, unless set.
        acknowledge_on_stop: bool,
    }
}

/// What the guest said of its memory last; the optional numbers depend on the guest's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonStats {
    /// Pages of 4 KiB the balloon shall hold.
    pub target_pages: u64,
    /// Pages of 4 KiB it holds.
    pub actual_pages: u64,
    /// MiB the balloon shall hold.
    pub target_mib: u64,
    /// MiB it holds.
    pub actual_mib: u64,
    /// Bytes swapped in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Page faults that needed the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Unused bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// All bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes a new program could have without swapping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes of page cache that could be given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    /// Huge pages given out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    /// Times the guest killed a program for want of memory. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    /// Allocations that had to wait. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    /// Pages looked at in the background. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    /// Pages looked at by whoever needed memory. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    /// Pages won back in the background. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    /// Pages won back by whoever needed memory. Firecracker ≥ 1.14, guest ≥ 6.12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// Where a hinting run stands. Firecracker ≥ 1.14.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonHintingStatus {
    /// The host's last command: 0 stop, 1 done, above that the number of a run.
    pub host_cmd: u32,
    /// The command the guest works on, once it took one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cmd: Option<u32>,
}
