//! `rekindle doctor`.

use std::process::ExitCode;

use anyhow::Result;
use rekindle_engine::host::{self, Kvm};
use rekindle_engine::net::{self, NetError};
use rekindle_engine::programs::Programs;
use serde::Serialize;

use super::{Context, this_program};
use crate::guest::Guest;
use crate::output;

/// Says what this host has, what it lacks, and what to do about it
///
/// Exits 1 if something is missing that every VM needs.
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Good,
    /// Something does not work, the rest does.
    Limited,
    /// No VM runs.
    Bad,
}

impl Doctor {
    pub(crate) fn run(self, context: &Context) -> Result<ExitCode> {
        let findings = [
            kvm(&Kvm::of_this_host()),
            userfaultfd(),
            networks(),
            firecracker(context)?,
            guest(context)?,
            state_directory(context),
            Finding {
                what: "processor",
                verdict: Verdict::Good,
                found: host::cpu().model,
                remedy: None,
            },
            Finding {
                what: "kernel",
                verdict: Verdict::Good,
                found: host::kernel_release(),
                remedy: None,
            },
        ];
        if self.json {
            output::json(&findings)?;
        } else {
            findings.iter().try_for_each(print)?;
        }
        let bad = findings
            .iter()
            .any(|finding| finding.verdict == Verdict::Bad);
        Ok(if bad {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

fn print(finding: &Finding) -> Result<()> {
    let mark = match finding.verdict {
        Verdict::Good => "ok  ",
        Verdict::Limited => "some",
        Verdict::Bad => "BAD ",
    };
    output::line(format!("{mark}  {:<16} {}", finding.what, finding.found))?;
    match &finding.remedy {
        Some(remedy) => output::line(format!("{:22} -> {remedy}", "")),
        None => Ok(()),
    }
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
        Ok(()) => Finding {
            what: "userfaultfd",
            verdict: Verdict::Good,
            found: "lazy restores work".to_owned(),
            remedy: None,
        },
        Err(e) => Finding {
            what: "userfaultfd",
            verdict: Verdict::Limited,
            found: format!("{e}"),
            remedy: Some(
                "chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd, or run as root"
                    .to_owned(),
            ),
        },
    }
}

fn networks() -> Finding {
    match net::probe() {
        Ok(()) => Finding {
            what: "networks",
            verdict: Verdict::Good,
            found: "--net nat works".to_owned(),
            remedy: None,
        },
        Err(e) => Finding {
            what: "networks",
            verdict: Verdict::Limited,
            remedy: match e {
                NetError::Rights => Some("run as root, or do without --net nat"),
                NetError::NotForwarding => Some("sysctl -w net.ipv4.ip_forward=1"),
                NetError::Tun(_) => Some("modprobe tun"),
                NetError::Rules(_) => {
                    Some("modprobe -a nf_tables nft_chain_nat nft_masq nft_nat nft_ct nft_fib_inet")
                }
                _ => None,
            }
            .map(str::to_owned),
            found: format!("{:#}", anyhow::Error::from(e)),
        },
    }
}

fn firecracker(context: &Context) -> Result<Finding> {
    Ok(
        match Programs::discover_with(&context.root()?, this_program()?) {
            Ok(programs) => Finding {
                what: "firecracker",
                verdict: Verdict::Good,
                found: programs.firecracker.display().to_string(),
                remedy: None,
            },
            Err(e) => Finding {
                what: "firecracker",
                verdict: Verdict::Bad,
                found: e.to_string(),
                remedy: Some("rekindle setup".to_owned()),
            },
        },
    )
}

fn guest(context: &Context) -> Result<Finding> {
    Ok(match Guest::choose(&context.root()?, None, None, None) {
        Ok(guest) => Finding {
            what: "guest kernel",
            verdict: Verdict::Good,
            found: guest.kernel.display().to_string(),
            remedy: None,
        },
        Err(e) => Finding {
            what: "guest kernel",
            verdict: Verdict::Limited,
            found: format!("{e:#}"),
            remedy: Some("rekindle setup, or run --kernel F".to_owned()),
        },
    })
}

fn state_directory(context: &Context) -> Finding {
    let finding = |verdict, found, remedy| Finding {
        what: "state directory",
        verdict,
        found,
        remedy,
    };
    match context.root() {
        Ok(root) => finding(Verdict::Good, root.path().display().to_string(), None),
        Err(e) => finding(
            Verdict::Bad,
            format!("{e:#}"),
            Some("choose another with --root or REKINDLE_ROOT".to_owned()),
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
}
