//! What the host's kernel says in `/proc` and `/sys`.

use super::super::finding::{Finding, Verdict};
use super::Host;

const VULNERABILITIES: &str = "sys/devices/system/cpu/vulnerabilities";
/// What a VM is limited by; version 1 calls `io` by another name.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
/// Below it, guests can keep the host busy with timers alone.
const TIMER_MICROS: u64 = 500;

pub(super) fn seccomp(host: &Host) -> Finding {
    let actions = host.says("proc/sys/kernel/seccomp/actions_avail");
    match actions {
        Some(actions) if actions.split(' ').any(|action| action == "trap") => Finding::good(
            "seccomp",
            "each Firecracker has its own filters, which no flag of Rekindle turns off",
        ),
        _ => Finding::other(
            "seccomp",
            Verdict::Limited,
            "this kernel names no seccomp filters, without which Firecracker does not start",
            "a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

/// A page server reads what a guest's Firecracker says, and so is confined.
pub(super) fn page_servers(landlock: bool) -> Finding {
    if landlock {
        return Finding::good(
            "page servers",
            "each has its own filters, opens no file (Landlock), and is a user of its own under root",
        );
    }
    Finding::advice(
        "page servers",
        "each has its own filters and is a user of its own under root; this kernel has no Landlock beside that, which \
         keeps those that fetch memory from afar from other files",
        "a kernel with CONFIG_SECURITY_LANDLOCK, and landlock among lsm= on its command line",
    )
}

/// What KVM says of a guest goes to the host's console, and a slow one holds up the kernel.
pub(super) fn console(host: &Host) -> Finding {
    let levels = host.says("proc/sys/kernel/printk").unwrap_or_default();
    let level = levels.split_whitespace().next().unwrap_or("?");
    match level {
        "0" | "1" => Finding::good("console", "the kernel prints emergencies only"),
        _ => Finding::advice(
            "console",
            format!(
                "the kernel prints messages below level {level}, of which guests can cause many"
            ),
            "sysctl -w kernel.printk=1, and for good: quiet loglevel=1 on the kernel's command line",
        ),
    }
}

pub(super) fn cgroups(host: &Host) -> Finding {
    let known = controllers(host);
    let lacking: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|controller| !known.iter().any(|it| it == controller))
        .collect();
    if lacking.is_empty() {
        return Finding::good("cgroup limits", "cpu, memory, io and pids can be limited");
    }
    Finding::other(
        "cgroup limits",
        Verdict::Limited,
        format!("no cgroup limits {}", lacking.join(", ")),
        "mount -t cgroup2 none /sys/fs/cgroup; without cgroup_disable= on the kernel's command line",
    )
}

/// Which controllers there are, of either version, by their names in version 2.
fn controllers(host: &Host) -> Vec<String> {
    let mut known = Vec::new();
    for mount in cgroup_mounts(host) {
        if mount.version == 2 {
            let file = format!("{}/cgroup.controllers", mount.point.trim_start_matches('/'));
            let names = host.says(&file).unwrap_or_default();
            known.extend(names.split_whitespace().map(str::to_owned));
        }
        known.extend(mount.options.into_iter().map(|option| match &*option {
            "blkio" => "io".to_owned(),
            _ => option,
        }));
    }
    known
}

struct Mount {
    point: String,
    version: u8,
    options: Vec<String>,
}

fn cgroup_mounts(host: &Host) -> Vec<Mount> {
    let table = host.says("proc/mounts").unwrap_or_default();
    let parse = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?.to_owned();
        let version = match fields.next()? {
            "cgroup2" => 2,
            "cgroup" => 1,
            _ => return None,
        };
        let options = fields.next()?.split(',').map(str::to_owned).collect();
        Some(Mount {
            point,
            version,
            options,
        })
    };
    table.lines().filter_map(parse).collect()
}

/// A guest's interval timer is a thread of the kernel, which is in no cgroup of the VM's.
pub(super) fn timer(host: &Host) -> Finding {
    let period = host.says("sys/module/kvm/parameters/min_timer_period_us");
    match period.and_then(|period| period.parse::<u64>().ok()) {
        Some(micros) if micros < TIMER_MICROS => Finding::advice(
            "guests' timers",
            format!(
                "a guest can have the kernel's thread kvm-pit wake each {micros} us, on nobody's account"
            ),
            format!(
                "move the threads kvm-pit/PID to their VMs' cgroups, or: echo {TIMER_MICROS} > \
                 /sys/module/kvm/parameters/min_timer_period_us"
            ),
        ),
        Some(micros) => Finding::good("guests' timers", format!("at most one in {micros} us")),
        None => Finding::good(
            "guests' timers",
            "this kernel has no interval timer for guests",
        ),
    }
}

pub(super) fn swap(host: &Host) -> Finding {
    let table = host.says("proc/swaps").unwrap_or_default();
    let mut areas = table.lines().skip(1);
    match areas.next().and_then(|line| line.split_whitespace().next()) {
        None => Finding::good("swap", "none: no guest's memory is left on a disk"),
        Some(area) => Finding::advice(
            "swap",
            format!("guests' memory can get to {area}, and stay there"),
            "swapoff -a, and for good in /etc/fstab; or encrypted swap",
        ),
    }
}

/// How fresh they are nobody can say who does not ask their makers. What the kernel misses it tells.
pub(super) fn microcode(host: &Host) -> Finding {
    let info = host.says("proc/cpuinfo").unwrap_or_default();
    let value = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "microcode").then(|| value.trim().to_owned())
    });
    let revision = value.map_or_else(String::new, |revision| format!("microcode {revision}, "));
    let release = host.says("proc/sys/kernel/osrelease").unwrap_or_default();
    let has = format!("{revision}kernel {release}");
    let lacking = flaws(host, |text| text.contains("no microcode"));
    if lacking.is_empty() {
        return Finding::good(
            "microcode",
            format!("{has}: the kernel asks for no newer one"),
        );
    }
    Finding::advice(
        "microcode",
        format!("{has}: no microcode against {}", lacking.join(", ")),
        "apt-get install intel-microcode amd64-microcode; on a rented machine it is the provider's",
    )
}

pub(super) fn smt(host: &Host) -> Finding {
    match host.says("sys/devices/system/cpu/smt/active").as_deref() {
        Some("1") => Finding::advice(
            "SMT",
            "two guests can share a core, and see each other through its caches",
            "echo off > /sys/devices/system/cpu/smt/control, and for good: nosmt on the kernel's command line",
        ),
        _ => Finding::good("SMT", "off: no two guests share a core at one time"),
    }
}

pub(super) fn ksm(host: &Host) -> Finding {
    match host.says("sys/kernel/mm/ksm/run").as_deref() {
        None | Some("0" | "2") => {
            Finding::good("page merging", "off: no guest can tell what another has")
        }
        Some(_) => Finding::advice(
            "page merging",
            "on: by how long a write takes a guest can tell what another has in its memory",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
    }
}

pub(super) fn memory(host: &Host) -> Finding {
    let controllers = host.names("sys/devices/system/edac/mc");
    if controllers.iter().any(|name| name.starts_with("mc")) {
        return Finding::good(
            "memory",
            "with ECC; whether rows are refreshed against hammering, only its maker says",
        );
    }
    Finding::advice(
        "memory",
        "the kernel sees no ECC, by which flipped bits would be noticed",
        "dmidecode -t memory tells; memory with ECC and target row refresh is for guests that are strangers",
    )
}

/// Before it, a guest on Arm has the counter of the host, and not its own.
pub(super) fn counter(host: &Host) -> Option<Finding> {
    if host.arch != "aarch64" {
        return None;
    }
    Some(match release(host) {
        Some(version) if version >= (6, 4) => {
            Finding::good("physical counter", "each guest has its own")
        }
        _ => Finding::advice(
            "physical counter",
            "guests read the host's, and learn how long it has been up",
            "a kernel from 6.4 on",
        ),
    })
}

fn release(host: &Host) -> Option<(u32, u32)> {
    let text = host.says("proc/sys/kernel/osrelease")?;
    let mut parts = text.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) fn vulnerabilities(host: &Host) -> Finding {
    let open = flaws(host, |text| text.contains("Vulnerable"));
    if open.is_empty() {
        return Finding::good("processor flaws", "the kernel knows of none that is open");
    }
    Finding::advice(
        "processor flaws",
        format!("open: {}", open.join(", ")),
        format!(
            "newer kernel and microcode, no mitigations=off; cat /{VULNERABILITIES}/* and spectre-meltdown-checker tell more"
        ),
    )
}

/// The names of the processor's flaws of which the kernel says this.
fn flaws(host: &Host, which: impl Fn(&str) -> bool) -> Vec<String> {
    let mut names = host.names(VULNERABILITIES);
    names.retain(|name| {
        let text = host.says(&format!("{VULNERABILITIES}/{name}"));
        text.is_some_and(|text| which(&text))
    });
    names.sort_unstable();
    names
}

/// Since 6.1 each new VM has a thread against a flaw of some processors, and waits for its cgroup.
pub(super) fn huge_page_mitigation(host: &Host) -> Finding {
    let what = "waits at a start";
    let never = host
        .says("sys/module/kvm/parameters/nx_huge_pages")
        .as_deref()
        == Some("never");
    let mounts = cgroup_mounts(host);
    let quick = mounts
        .iter()
        .any(|mount| mount.options.iter().any(|option| option == "favordynmods"));
    if never || quick || release(host).is_some_and(|version| version < (6, 1)) {
        return Finding::good(what, "no VM waits for a thread's cgroup");
    }
    let (point, affected) = (
        mounts
            .first()
            .map_or("/sys/fs/cgroup", |mount| &mount.point),
        host.says(&format!("{VULNERABILITIES}/itlb_multihit"))
            .unwrap_or_default(),
    );
    let mut remedy = format!("mount -o remount,favordynmods {point}");
    if affected == "Not affected" {
        remedy += "; or kvm.nx_huge_pages=never on the kernel's command line: this processor has not that flaw";
    }
    Finding::advice(
        what,
        "each new VM waits until a thread of KVM is in its cgroup: milliseconds",
        remedy,
    )
}

pub(super) fn cgroup_version(host: &Host) -> Finding {
    let mounts = cgroup_mounts(host);
    let old = mounts.iter().any(|mount| mount.version == 1);
    if !old && !mounts.is_empty() {
        return Finding::good("cgroups", "version 2");
    }
    Finding::advice(
        "cgroups",
        if old {
            "version 1, with which restores take longer"
        } else {
            "none are mounted"
        },
        "systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::host;
    use super::*;

    /// What a finding says on hosts that differ in one file.
    fn judged(look: fn(&Host) -> Finding, path: &str, texts: &[&str]) -> Vec<Verdict> {
        texts
            .iter()
            .map(|text| {
                let (_place, host) = host(&[(path, text)]);
                look(&host).verdict
            })
            .collect()
    }

    #[test]
    fn what_one_file_says_decides() {
        use Verdict::{Advice, Good, Limited};
        let swaps = "Filename Type Size Used Priority";
        let area = format!("{swaps}\n/dev/sda2 partition 8388604 0 -2");
        for (look, path, texts, verdicts) in [
            (
                seccomp as fn(&Host) -> Finding,
                "proc/sys/kernel/seccomp/actions_avail",
                ["kill_process kill_thread trap errno log allow\n", "allow"],
                [Good, Limited],
            ),
            (
                console,
                "proc/sys/kernel/printk",
                ["1\t4\t1\t7\n", "4\t4\t1\t7\n"],
                [Good, Advice],
            ),
            (
                timer,
                "sys/module/kvm/parameters/min_timer_period_us",
                ["500\n", "200\n"],
                [Good, Advice],
            ),
            (swap, "proc/swaps", [swaps, &area], [Good, Advice]),
            (
                smt,
                "sys/devices/system/cpu/smt/active",
                ["0\n", "1\n"],
                [Good, Advice],
            ),
            (ksm, "sys/kernel/mm/ksm/run", ["0\n", "1\n"], [Good, Advice]),
        ] {
            assert_eq!(judged(look, path, &texts), verdicts, "{path}");
        }
    }

    #[test]
    fn cgroups_of_either_version_are_understood() {
        let (_place, old) = host(&[(
            "proc/mounts",
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
             cgroup /sys/fs/cgroup/blkio cgroup rw,blkio 0 0\n\
             cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n",
        )]);
        assert_eq!(cgroups(&old).verdict, Verdict::Good);
        assert_eq!(cgroup_version(&old).verdict, Verdict::Advice);
        let (_place, new) = host(&[
            (
                "proc/mounts",
                "cgroup2 /sys/fs/cgroup cgroup2 rw,favordynmods 0 0\n",
            ),
            (
                "sys/fs/cgroup/cgroup.controllers",
                "cpuset cpu memory pids\n",
            ),
            ("proc/sys/kernel/osrelease", "6.1.0-23-amd64\n"),
        ]);
        let lacking = cgroups(&new);
        assert_eq!(lacking.verdict, Verdict::Limited);
        assert_eq!(lacking.found, "no cgroup limits io");
        assert_eq!(cgroup_version(&new).verdict, Verdict::Good);
        assert_eq!(huge_page_mitigation(&new).verdict, Verdict::Good);
    }

    #[test]
    fn the_flaws_that_are_open_are_named_and_those_that_wait_for_microcode_too() {
        let (_place, host) = host(&[
            (
                "sys/devices/system/cpu/vulnerabilities/meltdown",
                "Not affected\n",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/spec_rstack_overflow",
                "Vulnerable: Safe RET, no microcode\n",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "KVM: Vulnerable\n",
            ),
            (
                "proc/cpuinfo",
                "processor\t: 0\nmicrocode\t: 0x1000065\n\nprocessor\t: 1\n",
            ),
            ("proc/sys/kernel/osrelease", "6.18.44\n"),
        ]);
        assert_eq!(
            vulnerabilities(&host).found,
            "open: itlb_multihit, spec_rstack_overflow"
        );
        assert_eq!(
            microcode(&host).found,
            "microcode 0x1000065, kernel 6.18.44: no microcode against spec_rstack_overflow"
        );
        let waits = huge_page_mitigation(&host);
        assert_eq!(waits.verdict, Verdict::Advice);
        assert!(!waits.remedy.unwrap().contains("never"));
    }

    #[test]
    fn memory_whose_errors_are_counted_has_ecc() {
        let (_place, with) = host(&[("sys/devices/system/edac/mc/mc0/ce_count", "0\n")]);
        assert_eq!(memory(&with).verdict, Verdict::Good);
        let (_place, without) = host(&[("sys/devices/system/edac/mc/power/control", "auto\n")]);
        assert_eq!(memory(&without).verdict, Verdict::Advice);
    }

    #[test]
    fn only_on_arm_the_counter_is_looked_at() {
        for (arch, release, verdict) in [
            ("x86_64", "6.1.0", None),
            ("aarch64", "6.1.0-23-arm64", Some(Verdict::Advice)),
            ("aarch64", "6.12.9", Some(Verdict::Good)),
        ] {
            let (_place, mut host) = host(&[("proc/sys/kernel/osrelease", release)]);
            host.arch = arch;
            assert_eq!(
                counter(&host).map(|finding| finding.verdict),
                verdict,
                "{arch} {release}"
            );
        }
    }
}
