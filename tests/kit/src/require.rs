//! What a test needs of its host, and the outcome of a test that did not get it.
//!
//! A skip is no silent success: it is an error that travels by `?` to the harness ([`crate::story`]),
//! which counts it and prints why.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;

/// Why a test was not run.
#[derive(Debug, thiserror::Error)]
pub enum Skipped {
    /// There is no KVM, or not for this user.
    #[error("it needs /dev/kvm")]
    Kvm {
        /// What opening it said.
        #[source]
        source: io::Error,
    },
    /// There is a KVM that runs no unmodified Linux.
    #[error("it boots Linux, and this host's KVM is paravirtual: no vmx or svm in /proc/cpuinfo")]
    ParavirtualKvm,
    /// The user is not root.
    #[error("it needs root")]
    Root,
    /// The directory of temporary files is none of a disk's.
    #[error(
        "it limits a disk, and temporary files are on none of their own here: name a directory with TMPDIR"
    )]
    Disk,
    /// A file that the environment should name is not named.
    #[error("it needs a file that {variable} names, which is not set")]
    Unset {
        /// The variable.
        variable: &'static str,
    },
    /// A file that the environment names is not there.
    #[error("it needs {path}, which {variable} names", path = path.display())]
    Missing {
        /// The variable.
        variable: &'static str,
        /// What it names.
        path: PathBuf,
        /// What looking there said.
        #[source]
        source: io::Error,
    },
}

/// A `/dev/kvm` that this user can open, of whatever kind.
///
/// # Errors
/// When there is none.
pub fn requires_kvm() -> Result<(), Skipped> {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|source| Skipped::Kvm { source })
}

/// A `/dev/kvm` that can run an unmodified Linux: one with hardware below it.
///
/// # Errors
/// When there is none.
pub fn requires_linux_kvm() -> Result<(), Skipped> {
    requires_kvm()?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if virtualizes(&cpuinfo) {
        Ok(())
    } else {
        Err(Skipped::ParavirtualKvm)
    }
}

fn virtualizes(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_ascii_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// To be root.
///
/// # Errors
/// When this process is not.
pub fn requires_root() -> Result<(), Skipped> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(Skipped::Root)
    }
}

/// A real Firecracker, which `REKINDLE_FIRECRACKER` names.
///
/// # Errors
/// When it is not named or not there.
pub fn requires_firecracker() -> Result<PathBuf, Skipped> {
    requires_file("REKINDLE_FIRECRACKER")
}

/// A file that an environment variable names.
///
/// # Errors
/// When it is not named or not there.
pub fn requires_file(variable: &'static str) -> Result<PathBuf, Skipped> {
    let path = env::var_os(variable).ok_or(Skipped::Unset { variable })?;
    let path = PathBuf::from(path);
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(Skipped::Missing {
            variable,
            path,
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{Skipped, requires_file, virtualizes};

    #[test]
    fn only_the_flags_themselves_make_a_kvm_true() {
        assert!(virtualizes("processor: 0\nflags\t\t: fpu vmx sse"));
        assert!(virtualizes("flags\t\t: fpu svm"));
        assert!(!virtualizes("flags\t\t: fpu svm_lock\nbugs\t: vmx"));
        assert!(!virtualizes("vmx flags\t: vmx"));
    }

    #[test]
    fn a_variable_that_is_not_set_is_named() {
        let skipped = requires_file("REKINDLE_NOBODY_SETS_THIS").unwrap_err();
        assert!(matches!(skipped, Skipped::Unset { .. }));
        assert!(skipped.to_string().contains("REKINDLE_NOBODY_SETS_THIS"));
    }
}
