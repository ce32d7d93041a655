//! How Firecracker ended, in words.

use std::fmt;

use rustix::process::WaitIdStatus;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// With this status; what Firecracker means by it is in the words of [`fmt::Display`].
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It is dead, and how is known only to whoever was its parent.
    Unknown,
}

impl Exit {
    pub(super) fn of(status: &WaitIdStatus) -> Exit {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Unknown,
        }
    }

    /// Whether it ended as a process that did its work does.
    pub fn is_success(self) -> bool {
        self == Exit::Code(0)
    }
}

/// What Firecracker means by its exit statuses.
const MEANINGS: &[(i32, &str)] = &[
    (0, "done"),
    (1, "a failure"),
    (2, "an unexpected failure"),
    (148, "a system call that its filter forbids (SIGSYS)"),
    (149, "memory that could not be read (SIGBUS)"),
    (150, "an access to memory that is not there (SIGSEGV)"),
    (151, "a file beyond its size limit (SIGXFSZ)"),
    (152, "a configuration it cannot use"),
    (153, "arguments it cannot use"),
    (154, "processor time beyond its limit (SIGXCPU)"),
    (155, "a pipe that nobody reads (SIGPIPE)"),
    (156, "a terminal that went away (SIGHUP)"),
    (157, "an instruction the processor does not know (SIGILL)"),
];

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => {
                write!(f, "exit status {code}")?;
                match MEANINGS.iter().find(|(known, _)| known == code) {
                    Some((_, meaning)) => write!(f, ": {meaning}"),
                    None => Ok(()),
                }
            }
            Exit::Signal(signal) => write!(f, "killed by signal {signal}"),
            Exit::Unknown => f.write_str("exit status unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_says_what_firecracker_means_by_it() {
        assert_eq!(Exit::Code(0).to_string(), "exit status 0: done");
        assert_eq!(
            Exit::Code(153).to_string(),
            "exit status 153: arguments it cannot use"
        );
        assert_eq!(Exit::Code(77).to_string(), "exit status 77");
        assert_eq!(Exit::Signal(9).to_string(), "killed by signal 9");
        assert!(Exit::Code(0).is_success() && !Exit::Unknown.is_success());
    }
}
