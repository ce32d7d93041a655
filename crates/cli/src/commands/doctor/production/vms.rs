//! The VMs that run: as whom, and what they are limited to.

use rekindle_engine::vm::config::Machine;

use super::super::finding::Finding;

/// A VM that runs.
#[derive(Debug)]
pub(in super::super) struct Running {
    pub(in super::super) name: String,
    pub(in super::super) machine: Machine,
    /// As whom Firecracker runs; nothing if it has just ended.
    pub(in super::super) user: Option<u32>,
}

/// Who gets out of one VM has the rights of its Firecracker, and with them every other one of the same user.
pub(super) fn users(vms: &[Running]) -> Finding {
    let shared = vms.iter().enumerate().find_map(|(n, vm)| {
        if vm.user? == 0 {
            return Some(format!("the Firecracker of {} runs as root", vm.name));
        }
        let other = vms[..n].iter().find(|other| other.user == vm.user)?;
        Some(format!("{} and {} run as one user", other.name, vm.name))
    });
    match shared {
        None => Finding::good(
            "users",
            "no VM that runs is root's, or of the same user as another",
        ),
        Some(shared) => Finding::advice(
            "users",
            shared,
            "as root: no --no-jail, no REKINDLE_NO_JAIL; else a user and a state directory (--root) for each tenant",
        ),
    }
}

pub(super) fn networks(vms: &[Running]) -> Finding {
    let free = names(vms, |machine| {
        !machine.nics.is_empty() && machine.net_rate.is_none()
    });
    finding(
        "network rates",
        free,
        "the network of",
        "rekindle run --net-rate DOWN:UP, in megabits; a copy has the rates of its snapshot",
    )
}

pub(super) fn drives(vms: &[Running]) -> Finding {
    let free = names(vms, |machine| {
        let mut drives = machine.drives.iter();
        drives.any(|drive| drive.limits.are_none())
    });
    finding(
        "disk rates",
        free,
        "a disk of",
        "rekindle run --root-limit bw=N,iops=N, and likewise of a --disk; a copy has the limits of its snapshot",
    )
}

fn names(vms: &[Running], is_free: impl Fn(&Machine) -> bool) -> Vec<&str> {
    let free = vms.iter().filter(|vm| is_free(&vm.machine));
    free.map(|vm| vm.name.as_str()).collect()
}

fn finding(what: &'static str, free: Vec<&str>, of: &str, remedy: &str) -> Finding {
    match free.as_slice() {
        [] => Finding::good(what, "no VM that runs has one without a limit"),
        [one] => Finding::advice(what, format!("{of} {one} has no limit"), remedy),
        [one, others @ ..] => Finding::advice(
            what,
            format!("{of} {one} has no limit, nor have {} others", others.len()),
            remedy,
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use rekindle_engine::vm::config::{Access, Drive, Limits, NetRate, Nic};

    use super::super::super::finding::Verdict;
    use super::*;

    fn vm(name: &str, change: impl FnOnce(&mut Machine)) -> Running {
        let mut machine = Machine::default();
        change(&mut machine);
        Running {
            name: name.into(),
            machine,
            user: None,
        }
    }

    #[test]
    fn a_network_or_a_disk_without_a_limit_is_named_with_its_vm() {
        let nic = Nic {
            id: "net0".into(),
            tap: "rktap0".into(),
            mac: None,
        };
        let rate = NonZeroU64::new(1).unwrap();
        let limits = Limits {
            bytes_per_second: Some(1),
            ..Limits::default()
        };
        let drive = |limits| Drive::data("disk1", "/d", Access::ReadOnly).limits(limits);
        let vms = [
            vm("none", |_| ()),
            vm("slow", |machine| {
                machine.nics.push(nic.clone());
                machine.net_rate = Some(NetRate {
                    down: rate,
                    up: rate,
                });
                machine.drives.push(drive(limits));
            }),
            vm("fast", |machine| {
                machine.nics.push(nic.clone());
                machine.drives.push(drive(Limits::default()));
            }),
        ];
        assert_eq!(networks(&vms[..2]).verdict, Verdict::Good);
        assert_eq!(drives(&vms[..2]).verdict, Verdict::Good);
        for finding in [networks(&vms), drives(&vms)] {
            assert_eq!(finding.verdict, Verdict::Advice);
            assert!(finding.found.contains("fast"), "{finding:?}");
        }
    }

    #[test]
    fn a_user_that_two_vms_have_is_told_and_root_too() {
        let of = |theirs: &[Option<u32>]| {
            let vms = theirs.iter().enumerate().map(|(n, user)| Running {
                user: *user,
                ..vm(&format!("vm{n}"), |_| ())
            });
            users(&vms.collect::<Vec<_>>()).found
        };
        assert!(of(&[Some(1000), Some(0)]).contains("vm1 runs as root"));
        assert!(of(&[Some(1000), Some(1001), Some(1000)]).contains("vm0 and vm2"));
        for good in [&[][..], &[None, None], &[Some(1000), Some(1001)]] {
            assert!(of(good).starts_with("no VM"), "{good:?}");
        }
    }
}
