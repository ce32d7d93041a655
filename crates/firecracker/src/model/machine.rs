//! CPUs and memory.

use serde::{Deserialize, Serialize};

use super::{CpuTemplate, Uses};
use crate::version::Feature;

/// The pages under the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum HugePages {
    /// Of 4 KiB.
    None,
    /// Of 2 MiB from hugetlbfs; the host must have them set aside.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
    /// Of 2 MiB where the host's kernel finds them. Firecracker ≥ 1.17.
    Transparent,
}

impl Uses for HugePages {
    fn uses(&self, each: &mut dyn FnMut(Feature)) {
        if *self == HugePages::Transparent {
            each(Feature::TransparentHugePages);
        }
    }
}

body! {
    /// CPUs and memory, with no simultaneous multithreading unless asked for.
    #[derive(Eq)]
    pub struct MachineConfiguration {
        /// Virtual CPUs, 1 to 32.
        vcpu_count: u8,
        /// Memory, in MiB.
        mem_size_mib: u32,
    }
    optional {
        /// Whether two virtual CPUs are threads of one core (x86-64).
        smt: bool,
        /// Whether Firecracker tracks what the guest writes, for Diff snapshots.
        track_dirty_pages: bool,
        /// The pages under the memory; [`HugePages::None`] unless set.
        huge_pages: HugePages [asks],
        /// A ready-made CPU template. Deprecated since Firecracker 1.5.
        cpu_template: CpuTemplate,
    }
}

impl MachineConfiguration {
    /// `vcpu_count` virtual CPUs and `mem_size_mib` MiB of memory; `smt` is sent as `false`.
    pub fn new(vcpu_count: u8, mem_size_mib: u32) -> MachineConfiguration {
        MachineConfiguration {
            vcpu_count,
            mem_size_mib,
            smt: Some(false),
            track_dirty_pages: None,
            huge_pages: None,
            cpu_template: None,
        }
    }
}

body! {
    /// A change to some of the machine's configuration, before the guest starts; at least one field.
    #[derive(Default, Eq)]
    pub struct MachineConfigurationUpdate {}
    optional {
        /// Virtual CPUs, 1 to 32.
        vcpu_count: u8,
        /// Memory, in MiB.
        mem_size_mib: u32,
        /// Whether two virtual CPUs are threads of one core (x86-64).
        smt: bool,
        /// Whether Firecracker tracks what the guest writes, for Diff snapshots.
        track_dirty_pages: bool,
        /// The pages under the memory.
        huge_pages: HugePages [asks],
        /// A ready-made CPU template. Deprecated since Firecracker 1.5.
        cpu_template: CpuTemplate,
    }
}
