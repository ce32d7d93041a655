//! `rekindle doctor`.

mod finding;
mod production;

use std::process::ExitCode;

use anyhow::Result;
use rekindle_engine::host::{self, Kvm};
use rekindle_engine::net::{self, NetError};
use rekindle_engine::programs::{ProgramError, Programs};
use rekindle_engine::vm::dir::VmDir;
use rekindle_engine::vm::record::Record;

use self::finding::{Finding, Verdict};
use self::production::{Host, Running};
use super::{Context, this_program};
use crate::guest::Guest;
use crate::output;

/// Says what this host has, what it lacks, and what to do about it
///
/// First what VMs need: `some` is something that does not work, `BAD` keeps every VM from running, and
/// the exit status is 1. Then what Firecracker's makers recommend for production, item by item: a `note` is
/// advice, for guests that are strangers to each other.
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let programs = Programs::discover_with(&context.root()?, this_program()?);
        let needs = [
            kvm(&Kvm::of_this_host()),
            userfaultfd(),
            networks(),
            firecracker(&programs),
            guest(context)?,
            state_directory(context),
            Finding::good("processor", host::cpu().model),
            Finding::good("kernel", host::kernel_release()),
        ];
        let recommended =
            production::findings(&Host::this(), programs.as_ref().ok(), &running(context)?);
        if self.json {
            output::json(&needs.iter().chain(&recommended).collect::<Vec<_>>())?;
        } else {
            needs.iter().try_for_each(Finding::print)?;
            output::line(
                "\nWhat Firecracker's makers recommend, above all for guests that are strangers to each other:",
            )?;
            recommended.iter().try_for_each(Finding::print)?;
        }
        let bad = needs
            .iter()
            .chain(&recommended)
            .any(|finding| finding.verdict == Verdict::Bad);
        Ok(if bad {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

/// The VMs that run. One whose record cannot be read is `ps`'s to tell.
fn running(context: &Context) -> Result<Vec<Running>> {
    let root = context.root()?;
    let records = VmDir::list(&root)?.into_iter().filter_map(|name| {
        let dir = VmDir::open(&root, &name).ok()?;
        Record::read(&dir).ok()
    });
    let alive = records.filter(|record| record.state.is_alive());
    Ok(alive
        .map(|record| Running {
            user: record.firecracker.and_then(|its| user_of(its.pid)),
            name: record.name.to_string(),
            machine: record.machine,
        })
        .collect())
}

/// As whom a process runs, by its effective user id.
fn user_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1)?.parse().ok()
}

fn kvm(kvm: &Kvm) -> Finding {
    let (verdict, found, remedy) = match kvm {
        Kvm::Full => (
            Verdict::Good,
            "hardware virtualisation, any guest runs".to_owned(),
            None,
        ),
        Kvm::Paravirtual => (
            Verdict::Limited,
            "paravirtual (/dev/kvm without vmx or svm): bare-metal guests run, Linux does not"
                .to_owned(),
            Some("a Linux guest needs another host, or the lab: cargo xtask lab"),
        ),
        Kvm::Absent => (
            Verdict::Bad,
            "no /dev/kvm".to_owned(),
            Some(
                "modprobe kvm_intel or kvm_amd; enable virtualisation in the firmware; on a virtual machine, nested virtualisation",
            ),
        ),
        Kvm::Forbidden => (
            Verdict::Bad,
            "/dev/kvm may not be opened by this user".to_owned(),
            Some("usermod -aG kvm $USER, log in again; or run as root"),
        ),
        Kvm::Broken(reason) => (
            Verdict::Bad,
            format!("/dev/kvm: {reason}"),
            Some("dmesg | grep -i kvm"),
        ),
    };
    Finding {
        what: "kvm",
        verdict,
        found,
        remedy: remedy.map(str::to_owned),
    }
}

fn userfaultfd() -> Finding {
    match host::check_userfaultfd() {
        Ok(()) => Finding::good("userfaultfd", "lazy restores work"),
        Err(e) => Finding::other(
            "userfaultfd",
            Verdict::Limited,
            format!("{e}"),
            "chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd, or run as root",
        ),
    }
}

fn networks() -> Finding {
    match net::probe() {
        Ok(()) => Finding::good("networks", "--net nat works"),
        Err(e) => without_networks(e),
    }
}

fn without_networks(e: NetError) -> Finding {
    let remedy = match e {
        NetError::Rights => "run as root, or do without --net nat",
        NetError::NotForwarding => "sysctl -w net.ipv4.ip_forward=1",
        NetError::Tun(_) => "modprobe tun",
        NetError::Rules(_) => {
            "modprobe -a nf_tables nft_chain_nat nft_masq nft_nat nft_ct nft_fib_inet"
        }
        _ => "dmesg | tail",
    };
    let found = format!("{:#}", anyhow::Error::from(e));
    Finding::other("networks", Verdict::Limited, found, remedy)
}

fn firecracker(programs: &Result<Programs, ProgramError>) -> Finding {
    match programs {
        Ok(programs) => Finding::good("firecracker", programs.firecracker.display().to_string()),
        Err(e) => Finding::other("firecracker", Verdict::Bad, e.to_string(), "rekindle setup"),
    }
}

fn guest(context: &Context) -> Result<Finding> {
    Ok(match Guest::choose(&context.root()?, None, None, None) {
        Ok(guest) => Finding::good("guest kernel", guest.kernel.display().to_string()),
        Err(e) => Finding::other(
            "guest kernel",
            Verdict::Limited,
            format!("{e:#}"),
            "rekindle setup",
        ),
    })
}

fn state_directory(context: &Context) -> Finding {
    match context.root() {
        Ok(root) => Finding::good("state directory", root.path().display().to_string()),
        Err(e) => Finding::other(
            "state directory",
            Verdict::Bad,
            format!("{e:#}"),
            "choose another with --root or REKINDLE_ROOT",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paravirtual_kvm_is_no_full_one() {
        let finding = kvm(&Kvm::Paravirtual);
        assert_eq!(finding.verdict, Verdict::Limited);
        assert!(
            finding.found.contains("Linux does not"),
            "{}",
            finding.found
        );
        assert!(finding.remedy.is_some());
    }

    #[test]
    fn what_stops_every_vm_is_bad_and_has_a_remedy() {
        for state in [Kvm::Absent, Kvm::Forbidden, Kvm::Broken("x".into())] {
            let finding = kvm(&state);
            assert_eq!(finding.verdict, Verdict::Bad, "{state:?}");
            assert!(finding.remedy.is_some(), "{state:?}");
        }
    }

    #[test]
    fn what_to_do_is_said_once() {
        let forwarding = without_networks(NetError::NotForwarding);
        let missing = firecracker(&Err(ProgramError::NoFirecracker {
            installed: "/f".into(),
        }));
        for finding in [forwarding, missing] {
            let remedy = finding.remedy.unwrap();
            assert!(!finding.found.contains(&remedy), "{}", finding.found);
            assert!(!finding.found.ends_with("run"), "{}", finding.found);
        }
    }

    #[test]
    fn the_user_of_a_process_is_known_while_it_is_there() {
        let me = rustix::process::geteuid().as_raw();
        assert_eq!(user_of(std::process::id()), Some(me));
        assert_eq!(user_of(u32::MAX), None);
    }
}
