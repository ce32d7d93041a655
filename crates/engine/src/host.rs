//! What this host can do: judged from the kernel's own words, never by trying and hanging.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use serde::Serialize;

/// What `/dev/kvm` is good for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kvm {
    /// Hardware virtualisation: any guest runs.
    Full,
    /// The device is there, and no `vmx` or `svm` in `/proc/cpuinfo`: a paravirtual KVM. An unmodified Linux
    /// kernel crawls in it and dies; guests made for it, and small bare-metal ones, run.
    Paravirtual,
    /// There is no `/dev/kvm`.
    Absent,
    /// It is there and may not be opened.
    Forbidden,
    /// Opening it failed otherwise.
    Broken(String),
}

impl Kvm {
    /// Judges this host's.
    pub fn of_this_host() -> Kvm {
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) if has_virtualisation() => Kvm::Full,
            Ok(_) => Kvm::Paravirtual,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Kvm::Absent,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Kvm::Forbidden,
            Err(e) => Kvm::Broken(e.to_string()),
        }
    }
}

/// Why a guest cannot run on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// No `/dev/kvm`.
    #[error(
        "there is no /dev/kvm: load kvm_intel or kvm_amd, or enable virtualisation in the firmware"
    )]
    NoKvm,
    /// No rights to it.
    #[error("/dev/kvm may not be opened by this user: join the group kvm, or run as root")]
    KvmForbidden,
    /// It does not work.
    #[error("/dev/kvm does not work: {0}")]
    KvmBroken(String),
    /// A Linux guest on a paravirtual KVM.
    #[error(
        "this host's KVM is paravirtual (/dev/kvm without vmx or svm in /proc/cpuinfo) and cannot run an \
         unmodified Linux kernel; use a host with hardware virtualisation, or the lab: cargo xtask lab"
    )]
    Paravirtual,
    /// Too few huge pages.
    #[error(
        "{mib} MiB of huge pages: this host has {free} MiB of them left; \
         allow more: echo {pages} > {HUGE_PAGES}/nr_overcommit_hugepages"
    )]
    NoHugePages {
        /// What the guest needs.
        mib: u32,
        /// What there is.
        free: u64,
        /// How many must be allowed.
        pages: u64,
    },
    /// userfaultfd is not to be had.
    #[error(
        "userfaultfd is not available to this user ({reason}); use --backend file, or run as root"
    )]
    NoUserfaultfd {
        /// What the kernel said.
        reason: String,
    },
}

/// Refuses a guest that this host cannot run.
pub fn check(kind: super::vm::kernel::Kind) -> Result<(), HostError> {
    match Kvm::of_this_host() {
        Kvm::Full => Ok(()),
        Kvm::Paravirtual if kind == super::vm::kernel::Kind::Other => Ok(()),
        Kvm::Paravirtual => Err(HostError::Paravirtual),
        other => refuse(other),
    }
}

/// Refuses when no guest at all can run.
pub fn check_kvm() -> Result<(), HostError> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(_) => refuse(Kvm::of_this_host()),
    }
}

fn refuse(kvm: Kvm) -> Result<(), HostError> {
    match kvm {
        Kvm::Full | Kvm::Paravirtual => Ok(()),
        Kvm::Absent => Err(HostError::NoKvm),
        Kvm::Forbidden => Err(HostError::KvmForbidden),
        Kvm::Broken(reason) => Err(HostError::KvmBroken(reason)),
    }
}

/// Refuses when Firecracker, run by this user, could not make a userfaultfd. It opens the device, and
/// falls back to the system call only where there is no device.
pub fn check_userfaultfd() -> Result<(), HostError> {
    let device = Path::new("/dev/userfaultfd");
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
            match unprivileged {
                Ok(text) if text.trim() == "1" || rustix::process::geteuid().is_root() => Ok(()),
                Ok(_) => Err(HostError::NoUserfaultfd {
                    reason: "vm.unprivileged_userfaultfd is 0 and there is no /dev/userfaultfd"
                        .into(),
                }),
                Err(_) => Err(HostError::NoUserfaultfd {
                    reason: "this kernel has no userfaultfd".into(),
                }),
            }
        }
        Err(e) => Err(HostError::NoUserfaultfd {
            reason: format!("/dev/userfaultfd: {e}"),
        }),
    }
}

/// What the kernel says of its pages of 2 MiB.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Refuses a guest for which there are too few huge pages. Nothing is set aside: another may be faster.
pub fn check_huge_pages(mib: u32) -> Result<(), HostError> {
    let says = |name: &str| {
        let text = std::fs::read_to_string(Path::new(HUGE_PAGES).join(name)).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    let kept = says("free_hugepages").saturating_sub(says("resv_hugepages"));
    let surplus = says("surplus_hugepages");
    let on_demand = says("nr_overcommit_hugepages").saturating_sub(surplus);
    let free = kept.saturating_add(on_demand).saturating_mul(2);
    if free >= u64::from(mib) {
        return Ok(());
    }
    let pages = (u64::from(mib) / 2 + surplus).saturating_sub(kept);
    Err(HostError::NoHugePages { mib, free, pages })
}

/// Memory and swap together, in MiB: more than this no guest can get.
pub fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    #[expect(
        clippy::useless_conversion,
        reason = "the field's type differs between architectures"
    )]
    let total = u64::from(info.totalram).saturating_add(u64::from(info.totalswap));
    total.saturating_mul(u64::from(info.mem_unit)) >> 20
}

/// The processor's vendor and model as `/proc/cpuinfo` names them.
pub fn cpu() -> Cpu {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
            .map_or_else(
                || "unknown".to_owned(),
                |(_, value)| value.trim().to_owned(),
            )
    };
    Cpu {
        vendor: field("vendor_id"),
        model: field("model name"),
    }
}

/// A processor's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// `GenuineIntel`, `AuthenticAMD`, …
    pub vendor: String,
    /// The model's full name.
    pub model: String,
}

/// The running kernel's release.
pub fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Whether the first processor has `vmx` or `svm`.
fn has_virtualisation() -> bool {
    use std::io::BufRead;
    let Ok(file) = File::open("/proc/cpuinfo") else {
        return false;
    };
    io::BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        })
}
