//! One value of every definition, with all its fields set.

use std::collections::BTreeMap;

use rekindle_firecracker::model::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

pub(crate) fn value(sample: impl Serialize) -> Value {
    serde_json::to_value(sample).expect("JSON")
}

fn bucket() -> TokenBucket {
    TokenBucket::new(1000, 100).one_time_burst(5)
}

fn limiter() -> RateLimiter {
    RateLimiter::default().bandwidth(bucket()).ops(bucket())
}

fn machine() -> Value {
    let machine = MachineConfiguration::new(2, 256)
        .smt(true)
        .track_dirty_pages(true)
        .huge_pages(HugePages::None)
        .cpu_template(CpuTemplate::T2);
    value(machine)
}

fn cpu() -> Value {
    let register = CpuidRegisterModifier::new(CpuidRegister::Eax, "0b1");
    value(
        CpuConfig::default()
            .kvm_capabilities(vec!["!121".to_owned()])
            .cpuid_modifiers(vec![CpuidLeafModifier::new(
                "0x1",
                "0x0",
                0,
                vec![register],
            )])
            .msr_modifiers(vec![MsrModifier::new("0x10a", "0b1")])
            .reg_modifiers(vec![ArmRegisterModifier::new("0x603", "0b1")])
            .vcpu_features(vec![VcpuFeatures::new(0, "0b1")]),
    )
}

fn load() -> Value {
    let load = SnapshotLoadParams::new("vmstate", MemoryBackend::uffd("uffd.sock"))
        .mem_file_path("memory")
        .track_dirty_pages(true)
        .enable_diff_snapshots(true)
        .network_overrides(vec![NetworkOverride::new("eth0", "tap1")])
        .vsock_override(VsockOverride::new("v.sock"))
        .clock_realtime(true)
        .huge_pages(LoadHugePages::Snapshot);
    value(load)
}

fn balloon_stats() -> Value {
    let names = "target_pages actual_pages target_mib actual_mib swap_in swap_out major_faults \
                 minor_faults free_memory total_memory available_memory disk_caches \
                 hugetlb_allocations hugetlb_failures oom_kill alloc_stall async_scan direct_scan \
                 async_reclaim direct_reclaim";
    let all: Map<String, Value> = names
        .split(' ')
        .map(|name| (name.to_owned(), json!(7)))
        .collect();
    // Through the model, which keeps only what it knows.
    value(serde_json::from_value::<BalloonStats>(Value::Object(all)).expect("statistics"))
}

fn through<T: serde::de::DeserializeOwned + Serialize>(sample: Value) -> Value {
    value(serde_json::from_value::<T>(sample).expect("the model reads it"))
}

type Samples = BTreeMap<&'static str, Value>;

/// One value of every definition.
pub(crate) fn samples() -> Samples {
    let mut all = Samples::new();
    all.extend(parts());
    all.extend(block_and_net());
    all.extend(memory());
    all.extend(firecracker());
    all.extend(guest());
    let one = |name: &str| all[name].clone();
    let everything = json!({
        "balloon": one("Balloon"),
        "drives": [one("Drive")],
        "boot-source": one("BootSource"),
        "cpu-config": one("CpuConfig"),
        "logger": one("Logger"),
        "machine-config": one("MachineConfiguration"),
        "metrics": one("Metrics"),
        "memory-hotplug": one("MemoryHotplugConfig"),
        "mmds-config": one("MmdsConfig"),
        "network-interfaces": [one("NetworkInterface")],
        "pmem": [one("Pmem")],
        "vsock": one("Vsock"),
        "entropy": one("EntropyDevice"),
    });
    all.insert(
        "FullVmConfiguration",
        through::<FullVmConfiguration>(everything),
    );
    all
}

/// Parts of other bodies.
fn parts() -> [(&'static str, Value); 10] {
    let cpu = cpu();
    let leaf = &cpu["cpuid_modifiers"][0];
    [
        ("RateLimiter", value(limiter())),
        ("TokenBucket", value(bucket())),
        ("MemoryBackend", value(MemoryBackend::file("memory"))),
        (
            "NetworkOverride",
            value(NetworkOverride::new("eth0", "tap1")),
        ),
        ("VsockOverride", value(VsockOverride::new("v.sock"))),
        ("CpuidLeafModifier", leaf.clone()),
        ("CpuidRegisterModifier", leaf["modifiers"][0].clone()),
        ("MsrModifier", cpu["msr_modifiers"][0].clone()),
        ("ArmRegisterModifier", cpu["reg_modifiers"][0].clone()),
        ("VcpuFeatures", cpu["vcpu_features"][0].clone()),
    ]
}

fn block_and_net() -> [(&'static str, Value); 6] {
    let drive = Drive::root("rootfs", "disk")
        .partuuid("0eaa91a0-01")
        .cache_type(CacheType::Unsafe)
        .rate_limiter(limiter())
        .io_engine(IoEngine::Sync)
        .socket("vhost.sock");
    let partial_drive = PartialDrive::new("rootfs")
        .path_on_host("disk")
        .rate_limiter(limiter());
    let pmem = Pmem::new("p0", "file")
        .root_device(true)
        .read_only(true)
        .rate_limiter(limiter());
    let partial_pmem = PartialPmem::new("p0").rate_limiter(limiter());
    let interface = NetworkInterface::new("eth0", "tap0")
        .guest_mac("06:00:ac:10:00:02")
        .mtu(1500)
        .rx_rate_limiter(limiter())
        .tx_rate_limiter(limiter());
    let partial_interface = PartialNetworkInterface::new("eth0")
        .rx_rate_limiter(limiter())
        .tx_rate_limiter(limiter());
    [
        ("Drive", value(drive)),
        ("PartialDrive", value(partial_drive)),
        ("Pmem", value(pmem)),
        ("PartialPmem", value(partial_pmem)),
        ("NetworkInterface", value(interface)),
        ("PartialNetworkInterface", value(partial_interface)),
    ]
}

fn memory() -> [(&'static str, Value); 9] {
    let balloon = Balloon::new(16)
        .stats_polling_interval_s(1)
        .free_page_hinting(true)
        .free_page_reporting(true);
    let start = BalloonStartCmd::default().acknowledge_on_stop(true);
    let hinting = json!({"host_cmd": 1, "guest_cmd": 1});
    let hotplug = MemoryHotplugConfig::new(1024)
        .block_size_mib(2)
        .slot_size_mib(128);
    let status = json!({
        "total_size_mib": 1, "slot_size_mib": 1, "block_size_mib": 1, "plugged_size_mib": 1,
        "requested_size_mib": 1,
    });
    [
        ("Balloon", value(balloon)),
        ("BalloonUpdate", value(BalloonUpdate::new(1))),
        ("BalloonStats", balloon_stats()),
        ("BalloonStartCmd", value(start)),
        (
            "BalloonHintingStatus",
            through::<BalloonHintingStatus>(hinting),
        ),
        ("BalloonStatsUpdate", value(BalloonStatsUpdate::new(1))),
        ("MemoryHotplugConfig", value(hotplug)),
        (
            "MemoryHotplugSizeUpdate",
            value(MemoryHotplugSizeUpdate::new(128)),
        ),
        (
            "MemoryHotplugStatus",
            through::<MemoryHotplugStatus>(status),
        ),
    ]
}

fn firecracker() -> [(&'static str, Value); 6] {
    let info = json!({
        "app_name": "Firecracker", "id": "a", "state": "Not started", "vmm_version": "1.12.1",
    });
    let logger = Logger::default()
        .log_path("log")
        .level(Level::Info)
        .show_level(true)
        .show_log_origin(true)
        .module("api_server");
    let metrics = Metrics::new("metrics")
        .emit_id(true)
        .properties(BTreeMap::from([("a".to_owned(), "b".to_owned())]));
    let version = json!({"firecracker_version": "1.12.1"});
    let action = InstanceActionInfo::new(ActionType::InstanceStart);
    [
        ("InstanceInfo", through::<InstanceInfo>(info)),
        ("FirecrackerVersion", through::<FirecrackerVersion>(version)),
        ("InstanceActionInfo", value(action)),
        ("Vm", value(Vm::new(VmState::Paused))),
        ("Logger", value(logger)),
        ("Metrics", value(metrics)),
    ]
}

fn guest() -> [(&'static str, Value); 9] {
    let boot = BootSource::new("vmlinux")
        .boot_args("quiet")
        .initrd_path("initrd");
    let mmds = MmdsConfig::new(["eth0"])
        .version(MmdsVersion::V2)
        .ipv4_address("169.254.169.254")
        .imds_compat(true);
    let serial = SerialDevice::default()
        .serial_out_path("serial")
        .rate_limiter(bucket());
    let create = SnapshotCreateParams::full("vmstate", "memory");
    [
        ("BootSource", value(boot)),
        ("CpuConfig", cpu()),
        ("MachineConfiguration", machine()),
        ("MmdsConfig", value(mmds)),
        ("Vsock", value(Vsock::new(3, "v.sock").vsock_id("v"))),
        (
            "EntropyDevice",
            value(EntropyDevice::default().rate_limiter(limiter())),
        ),
        ("SerialDevice", value(serial)),
        ("SnapshotCreateParams", value(create)),
        ("SnapshotLoadParams", load()),
    ]
}
