//! Which process is meant, also after its pid went to another.

use std::io;
use std::time::Duration;

use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Pidfd, arguments_of};

// Places in `/proc/<pid>/stat`, counted behind the name: fields 3, 9, 22 and 49, where the name is the second.
const STATE: usize = 0;
const FLAGS: usize = 9 - 3;
const START_TIME: usize = 22 - 3;
const END_OF_ARGUMENTS: usize = 49 - 3;

/// The flag of a thread of the kernel, `PF_KTHREAD`.
const KERNELS: u64 = 0x0020_0000;

/// The flag of a process that has not executed a program since it was forked, `PF_FORKNOEXEC`.
const FORKED: u64 = 0x0000_0040;

/// In how many parts a second of `start_time` comes, `USER_HZ`: 100 wherever Firecracker runs.
const TICKS: u64 = 100;

/// A process, told from every other that had or will have its pid.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid, as this process sees it.
    pub pid: u32,
    /// When it started, in clock ticks since the host booted.
    pub start_time: u64,
    /// Which boot of the host that was.
    pub boot_id: String,
}

/// What `/proc/<pid>/stat` says of a process.
pub(super) struct Stat {
    state: u8,
    flags: u64,
    start_time: u64,
    /// Where they end; 0 before they are there.
    end_of_arguments: Option<u64>,
}

impl ProcessId {
    /// The process that has this pid now, dead or alive.
    pub fn of(pid: u32) -> Result<ProcessId, IdentifyError> {
        let stat = Stat::of(pid)?;
        Ok(ProcessId {
            pid,
            start_time: stat.start_time,
            boot_id: boot_id()?,
        })
    }

    /// Whether it runs. A zombie does not: it is dead and waits for its parent to ask.
    pub fn is_alive(&self) -> bool {
        let same_boot = boot_id().is_ok_and(|boot| boot == self.boot_id);
        let runs = |stat: Stat| stat.start_time == self.start_time && !stat.is_dead();
        same_boot && Stat::of(self.pid).is_ok_and(runs)
    }

    /// Takes hold of it, also as a zombie.
    pub fn open_pidfd(&self) -> Result<Pidfd, IdentifyError> {
        let gone = || IdentifyError::Gone { pid: self.pid };
        if boot_id()? != self.boot_id {
            return Err(gone());
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let pidfd = Pidfd::open(pid.ok_or_else(gone)?).map_err(|source| match source.kind() {
            _ if source.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => gone(),
            _ => IdentifyError::Open {
                pid: self.pid,
                source,
            },
        })?;
        // Only now: if the process still has its pid after the descriptor was opened, it had it when it was.
        if Stat::of(self.pid)?.start_time != self.start_time {
            return Err(gone());
        }
        Ok(pidfd)
    }
}

impl Stat {
    pub(super) fn of(pid: u32) -> Result<Stat, IdentifyError> {
        let stat = match std::fs::read(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            Err(source) if is_absence(&source) => return Err(IdentifyError::Gone { pid }),
            Err(source) => return Err(IdentifyError::Read { pid, source }),
        };
        Stat::parse(&stat).ok_or_else(|| IdentifyError::Read {
            pid,
            source: io::ErrorKind::InvalidData.into(),
        })
    }

    /// A zombie is dead, too.
    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    /// Whether it lives and has not been given its arguments yet.
    pub(super) fn is_loading(&self) -> bool {
        !self.is_dead() && self.flags & KERNELS == 0 && self.end_of_arguments == Some(0)
    }

    /// Whether it was forked since then, and still is what it was forked from.
    pub(super) fn was_forked_since(&self, then: Uptime) -> bool {
        !self.is_dead() && self.flags & (KERNELS | FORKED) == FORKED && self.start_time >= then.0
    }

    pub(super) fn parse(stat: &[u8]) -> Option<Stat> {
        // The name is the program's own to choose and may hold spaces, parentheses and line ends; what
        // follows the last parenthesis does not.
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        let fields = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let number = |place: usize| fields.get(place)?.parse().ok();
        Some(Stat {
            state: *fields.get(STATE)?.as_bytes().first()?,
            flags: number(FLAGS)?,
            start_time: number(START_TIME)?,
            end_of_arguments: number(END_OF_ARGUMENTS),
        })
    }
}

/// A moment since the host booted, in clock ticks, as [`Stat`] has them.
#[derive(Clone, Copy)]
pub(super) struct Uptime(u64);

impl Uptime {
    /// So long ago; when the host booted, if that is less.
    pub(super) fn before_now(ago: Duration) -> Uptime {
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::try_from(now).unwrap_or_default();
        let then = now.saturating_sub(ago);
        Uptime(then.as_secs() * TICKS + u64::from(then.subsec_millis()) * TICKS / 1000)
    }
}

/// Whether `/proc` says that there is no such process, or no longer.
fn is_absence(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn boot_id() -> Result<String, IdentifyError> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim_end().to_owned())
        .map_err(|source| IdentifyError::Boot { source })
}

/// The processes whose arguments hold `--id` followed by `id`: Firecrackers, and jailers, of that id.
///
/// This finds a Firecracker that was started by somebody who died before he could write it down. The id is
/// all that is compared: choose one that nothing else has. Dead processes are not found.
pub fn find_by_id(id: &str) -> io::Result<Vec<ProcessId>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if !has_id(pid, id) {
            continue;
        }
        // Asked once more, so that pid and arguments are of one process.
        match ProcessId::of(pid) {
            Ok(process) if process.is_alive() && has_id(pid, id) => found.push(process),
            _ => {}
        }
    }
    Ok(found)
}

fn has_id(pid: u32, id: &str) -> bool {
    let arguments = arguments_of(pid).unwrap_or_default();
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.any(|argument| argument == b"--id") && arguments.next() == Some(id.as_bytes())
}

/// A process cannot be told or taken hold of.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdentifyError {
    /// It is gone: nobody has the pid, or another process, or it was before the host booted.
    #[error("process {pid} is gone")]
    Gone {
        /// The pid it had.
        pid: u32,
    },
    /// What the kernel says of it cannot be read.
    #[error("cannot read the state of process {pid}")]
    Read {
        /// The pid.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// It is there, but no descriptor of it can be had.
    #[error("cannot open a pidfd of process {pid}")]
    Open {
        /// The pid.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// Which boot of the host this is cannot be read.
    #[error("cannot read the host's boot id")]
    Boot {
        /// Why.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_knows_itself() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        assert!(me.is_alive());
        assert!(me.start_time > 0);
        let pidfd = me.open_pidfd().expect("a pidfd");
        assert!(!pidfd.has_exited().expect("alive"));
        let json = serde_json::to_string(&me).expect("json");
        assert_eq!(serde_json::from_str::<ProcessId>(&json).expect("read"), me);
    }

    #[test]
    fn another_start_time_or_boot_is_another_process() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        let later = ProcessId {
            start_time: me.start_time + 1,
            ..me.clone()
        };
        let other_boot = ProcessId {
            boot_id: "00000000-0000-0000-0000-000000000000".to_owned(),
            ..me
        };
        for other in [later, other_boot] {
            assert!(!other.is_alive());
            assert!(matches!(
                other.open_pidfd(),
                Err(IdentifyError::Gone { .. })
            ));
        }
    }

    #[test]
    fn a_pid_that_nobody_can_have_is_gone() {
        let me = ProcessId::of(std::process::id()).expect("this process");
        for pid in [0, u32::MAX, i32::MAX as u32] {
            let nobody = ProcessId { pid, ..me.clone() };
            assert!(!nobody.is_alive());
            assert!(matches!(
                nobody.open_pidfd(),
                Err(IdentifyError::Gone { .. })
            ));
        }
    }

    #[test]
    fn a_name_made_to_confuse_does_not() {
        let tail = "S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0 18446744073709551615 0";
        let stat = format!("17 (a) R 2 (b\n) {tail}");
        let stat = Stat::parse(stat.as_bytes()).expect("parsed");
        assert_eq!((stat.state, stat.start_time), (b'S', 4711));
    }

    #[test]
    fn half_a_line_is_no_process() {
        assert!(Stat::parse(b"17 (a) S 1 1").is_none());
        assert!(Stat::parse(b"").is_none());
    }

    #[test]
    fn a_fork_is_told_by_its_flag_and_its_age() {
        let stat = |flags: u64, start: u64| {
            let text = format!("7 (a) R 1 2 3 4 5 {flags} {}{start} 0", "0 ".repeat(12));
            Stat::parse(text.as_bytes()).expect("parsed")
        };
        let then = Uptime::before_now(Duration::from_millis(20));
        assert!(stat(FORKED, then.0).was_forked_since(then));
        assert!(!stat(FORKED, then.0 - 1).was_forked_since(then));
        assert!(!stat(0, then.0).was_forked_since(then));
        assert!(!stat(FORKED | KERNELS, then.0).was_forked_since(then));
        let me = Stat::of(std::process::id()).expect("this process");
        assert!(!me.was_forked_since(Uptime(0)), "it executed a program");
        assert!(me.start_time <= Uptime::before_now(Duration::ZERO).0);
    }

    fn is_loading(stat: &[u8]) -> bool {
        Stat::parse(stat).is_some_and(|stat| stat.is_loading())
    }

    #[test]
    fn a_process_whose_arguments_end_nowhere_is_being_loaded() {
        let stat = |state: &str, flags: u64, end: u64| {
            let zeros = |count: usize| "0 ".repeat(count);
            let text = format!("7 (a) b) {state} {}{flags} {}{end} 0", zeros(5), zeros(39));
            is_loading(text.as_bytes())
        };
        assert!(stat("R", 0, 0));
        assert!(!stat("R", 0, 4096));
        assert!(!stat("R", KERNELS, 0));
        assert!(!stat("Z", 0, 0));
        assert!(!is_loading(b"7 (a) b) R 1"));
        assert!(!is_loading(b""));
    }
}
