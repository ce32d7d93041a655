//! What Firecracker's makers recommend for hosts in production (`docs/prod-host-setup.md` in their repository), in their
//! order, which is also that of the findings.
//!
//! ```text
//!   kernel    what /proc and /sys say: read below a root, so that tests have a host of their own
//!   programs  Firecracker, its jailer, and who may change them
//!   vms       those that run: as whom, and what they are limited to
//! ```
//!
//! Most of it matters where the guests are strangers to each other, and is advice. What Rekindle does by itself is said too,
//! so that nobody has to look it up.

mod kernel;
mod programs;
mod vms;

use std::path::PathBuf;

use rekindle_engine::programs::Programs;

use super::finding::Finding;
pub(super) use vms::Running;

/// The files in which a host's kernel speaks.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    arch: &'static str,
}

impl Host {
    pub(super) fn this() -> Host {
        Host {
            root: "/".into(),
            arch: std::env::consts::ARCH,
        }
    }

    /// A file's text without what surrounds it; nothing if the kernel has no such file.
    fn says(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// The names in a directory; none if there is no such directory.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(path))
            .into_iter()
            .flatten();
        let names = entries.flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).collect()
    }
}

/// Looks at everything on the list.
pub(super) fn findings(host: &Host, programs: Option<&Programs>, vms: &[Running]) -> Vec<Finding> {
    let mut found = vec![
        kernel::seccomp(host),
        kernel::page_servers(rekindle_pager::landlock_works()),
    ];
    found.extend(programs.map(programs::jailer));
    found.push(vms::users(vms));
    found.extend(programs.map(|found| programs::owners(&found.firecracker)));
    found.extend([
        Finding::good(
            "serial output",
            "of each VM the newest 4 to 8 MiB are kept, also if its guest turns a second port on",
        ),
        Finding::good(
            "logs and metrics",
            "of each VM the newest are kept, in files of a fixed size",
        ),
        kernel::console(host),
        Finding::advice(
            "watchdog",
            "nobody kills a Firecracker that does not answer unless told to",
            "rekindle stop VM --grace 0, by whatever watches the services in your guests",
        ),
        kernel::cgroups(host),
        kernel::timer(host),
        vms::networks(vms),
        Finding::good(
            "metadata address",
            "no guest with --net nat reaches 169.254.169.254; --tap is a device of yours, with rules of yours",
        ),
        vms::drives(vms),
        kernel::swap(host),
        Finding::good("tenants", "each VM has a Firecracker and a page server of its own"),
        kernel::microcode(host),
        kernel::smt(host),
        kernel::ksm(host),
        kernel::memory(host),
    ]);
    found.extend(kernel::counter(host));
    found.extend([
        kernel::vulnerabilities(host),
        kernel::huge_page_mitigation(host),
        kernel::cgroup_version(host),
    ]);
    found
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    /// A host whose kernel says this and nothing else.
    pub(super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let place = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = place.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let root = place.path().to_owned();
        (
            place,
            Host {
                root,
                arch: "x86_64",
            },
        )
    }

    #[test]
    fn a_kernel_that_says_nothing_is_no_failure_and_each_thing_is_told_once() {
        let (_place, host) = host(&[]);
        let found = findings(&host, None, &[]);
        let mut names: Vec<_> = found.iter().map(|finding| finding.what).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
        for finding in found {
            let good = finding.verdict == Verdict::Good;
            assert_eq!(good, finding.remedy.is_none(), "{finding:?}");
        }
    }
}
