//! What the page server says: one line when it listens, and its counts when the VM is gone.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::sandbox::Confinement;
use crate::state::{Count, State};

/// Printed as one line of JSON once Firecracker may connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The socket, as it was given.
    pub listening: PathBuf,
    /// The page server's process.
    pub pid: u32,
}

/// What was done for one VM, from the handshake to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// The VM's process, as it connected.
    pub vm_pid: i32,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Bytes per page; all other counts of pages are in this size.
    pub page_size: u64,
    /// Page faults read from the descriptor. The kernel may report one page more than once.
    pub faults: u64,
    /// Pages filled from a file: demand, replayed and around together.
    pub copied: u64,
    /// Those of them that the guest waited for.
    #[serde(default)]
    pub demand: u64,
    /// Those of them that came as part of the working set, before the guest asked.
    #[serde(default)]
    pub replayed: u64,
    /// Those of them that came because the guest asked for a page beside them.
    #[serde(default)]
    pub around: u64,
    /// Pages filled with zeros.
    pub zeroed: u64,
    /// Pages filled from a file that had to be fetched from the disk.
    #[serde(default)]
    pub cold: u64,
    /// Bytes fetched from a repository.
    #[serde(default)]
    pub fetched_bytes: u64,
    /// Requests that fetched them.
    #[serde(default)]
    pub fetched_requests: u64,
    /// Pages that were already there when they were to be filled.
    pub present: u64,
    /// Pages that the VM gave back (balloon), counted each time.
    pub removed: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// How often the kernel put an answer off because a removal was under way.
    pub retries: u64,
    /// From a fault being read to its page being in place.
    pub latency: Latency,
    /// When the last page of the working set was in place, after the handshake; absent if it never was.
    #[serde(default)]
    pub replayed_by_us: Option<u64>,
    /// When the last known run of zeros was in place, after the handshake; absent if it never was.
    #[serde(default)]
    pub zeroed_by_us: Option<u64>,
    /// Pages of the working set that were left out, to see whether they are still wanted.
    #[serde(default)]
    pub held_back: u64,
    /// Those of them that the guest asked for.
    #[serde(default)]
    pub held_back_touched: u64,
    /// How many page servers there were before this one for the same VM.
    #[serde(default)]
    pub takeovers: u64,
    /// What the page server gave up before it listened to the VM; absent where it kept its rights.
    #[serde(default)]
    pub confinement: Option<Confinement>,
    /// Why it is over; absent while it is not.
    pub ended: Option<Ended>,
}

/// Times in nanoseconds; 0 where nothing was measured. Quantiles are at most an eighth too high, never too low.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Half of all faults were answered at least as fast.
    pub p50_ns: u64,
    /// 99 of 100 faults were answered at least as fast.
    pub p99_ns: u64,
    /// The slowest.
    pub max_ns: u64,
}

/// How serving ended. There is no way to end with the VM alive and its faults unanswered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Ended {
    /// The VM's process ended, by itself or by somebody else's hand.
    VmExited,
    /// The page server killed it, because the next page could not be what the guest expects.
    VmKilled {
        /// What went wrong.
        reason: KillReason,
    },
}

/// Why a VM had to be killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum KillReason {
    /// A page could not be read whole: the file was cut short, or reading failed.
    BadPage(BadPage),
    /// A page could not be fetched, or was wrong each time.
    Unfetched {
        /// The 4 KiB page, counted from the start of the guest's memory.
        page: u64,
        /// What the repository said, or did not.
        said: String,
    },
    /// A fault outside the regions of the handshake.
    StrayFault {
        /// Where, in Firecracker.
        address: u64,
    },
    /// A removal that is not of whole pages of the guest's memory.
    StrayRemove {
        /// From here, in Firecracker.
        start: u64,
        /// To here.
        end: u64,
    },
    /// Memory was remapped, unmapped, forked or write-protected, which Firecracker never does.
    UnexpectedEvent {
        /// The kernel's number for it.
        event: u8,
    },
    /// The host has no huge page left for the guest's memory.
    NoHugePage {
        /// The huge page, counted from the start of the memory.
        page: u64,
    },
    /// The kernel refused what has to work.
    Refused {
        /// What was refused.
        operation: Operation,
        /// The page, counted from the start of the memory, where it was one.
        page: Option<u64>,
        /// The error's number.
        errno: i32,
    },
}

/// What can fail on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// `UFFDIO_COPY`.
    Copy,
    /// `UFFDIO_ZEROPAGE`.
    Zeropage,
    /// `UFFDIO_WAKE`.
    Wake,
    /// Reading messages.
    Read,
    /// Waiting for messages.
    Poll,
}

/// A page that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// The file that should hold it.
    pub file: PathBuf,
    /// The 4 KiB page, counted from the start of the guest's memory.
    pub page: u64,
    /// Where in the file reading stopped.
    pub offset: u64,
    /// The error's number; `None` where the file simply ended.
    pub errno: Option<i32>,
}

impl Ended {
    /// Without what may be long: the words of a repository, the directory of a file.
    pub(crate) fn in_short(&self) -> Ended {
        let mut short = self.clone();
        if let Ended::VmKilled { reason } = &mut short {
            match reason {
                KillReason::Unfetched { said, .. } => *said = said.chars().take(200).collect(),
                KillReason::BadPage(bad) => {
                    bad.file = bad.file.file_name().unwrap_or_default().into();
                }
                _ => {}
            }
        }
        short
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::VmExited => write!(f, "the VM has ended"),
            Ended::VmKilled { reason } => write!(f, "the page server killed the VM: {reason}"),
        }
    }
}

impl fmt::Display for KillReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KillReason::BadPage(bad) => bad.fmt(f),
            KillReason::Unfetched { page, said } => {
                write!(f, "page {page} cannot be fetched: {said}")
            }
            KillReason::StrayFault { address } => {
                write!(f, "it waits for {address:#x}, which is none of its memory")
            }
            KillReason::StrayRemove { start, end } => {
                write!(
                    f,
                    "it gave back {start:#x} to {end:#x}, which are no whole pages of its memory"
                )
            }
            KillReason::UnexpectedEvent { event } => {
                write!(
                    f,
                    "its userfaultfd reported the unexpected event {event:#x}"
                )
            }
            KillReason::NoHugePage { page } => {
                write!(f, "the host has no huge page left for its huge page {page}")
            }
            KillReason::Refused {
                operation,
                page,
                errno,
            } => {
                let error = io::Error::from_raw_os_error(*errno);
                match page {
                    Some(page) => write!(f, "{operation:?} failed at page {page}: {error}"),
                    None => write!(f, "{operation:?} failed: {error}"),
                }
            }
        }
    }
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadPage {
            file,
            page,
            offset,
            errno,
        } = self;
        let file = file.display();
        match errno {
            None => write!(f, "page {page} is missing: {file} ends at byte {offset}"),
            Some(errno) => {
                let error = io::Error::from_raw_os_error(*errno);
                write!(
                    f,
                    "page {page} cannot be read from {file} at byte {offset}: {error}"
                )
            }
        }
    }
}

impl Stats {
    /// What has been done so far.
    pub(crate) fn of(state: &State, ended: Option<Ended>) -> Stats {
        let get = |count| state.get(count);
        let time = |count| Some(get(count) / 1000).filter(|us| *us > 0);
        let [demand, replayed, around] = [Count::Demand, Count::Replayed, Count::Around].map(get);
        Stats {
            vm_pid: state.saved().vm.pid,
            memory_bytes: state.regions().bytes(),
            page_size: state.regions().page_size().bytes(),
            faults: get(Count::Faults),
            copied: demand + replayed + around,
            demand,
            replayed,
            around,
            zeroed: get(Count::Zeroed),
            cold: get(Count::Cold),
            fetched_bytes: get(Count::FetchedBytes),
            fetched_requests: get(Count::FetchedRequests),
            present: get(Count::Present),
            removed: get(Count::Removed),
            bytes: get(Count::Bytes),
            retries: get(Count::Retries),
            latency: state.histogram().latency(),
            replayed_by_us: time(Count::ReplayedBy),
            zeroed_by_us: time(Count::ZeroedBy),
            held_back: get(Count::HeldBack),
            held_back_touched: get(Count::HeldBackTouched),
            takeovers: get(Count::Takeovers),
            confinement: state.confinement(),
            ended,
        }
    }

    /// About how many of the replayed pages the guest had no use for, as the sample that was held back tells;
    /// absent without one. Meaningful once the guest has done what it does.
    pub fn wasted(&self) -> Option<u64> {
        let untouched = self.held_back.checked_sub(self.held_back_touched)?;
        (self.replayed * untouched).checked_div(self.held_back)
    }

    /// Writes them beside `path` and moves them into place, so that whoever reads sees all or nothing.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let beside = PathBuf::from(name);
        let flags =
            OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&beside, flags, Mode::RUSR | Mode::WUSR)?;
        let written = io::Write::write_all(&mut fs::File::from(file), &text)
            .and_then(|()| fs::rename(&beside, path));
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        Stats {
            vm_pid: 7,
            memory_bytes: 1 << 20,
            page_size: 4096,
            faults: 3,
            copied: 1,
            demand: 1,
            replayed: 0,
            around: 0,
            zeroed: 2,
            cold: 0,
            fetched_bytes: 0,
            fetched_requests: 0,
            present: 0,
            removed: 0,
            bytes: 4096,
            retries: 0,
            latency: Latency::default(),
            replayed_by_us: None,
            zeroed_by_us: None,
            held_back: 0,
            held_back_touched: 0,
            takeovers: 0,
            confinement: None,
            ended: Some(Ended::VmKilled {
                reason: KillReason::BadPage(BadPage {
                    file: "/snap/memory".into(),
                    page: 12,
                    offset: 49152,
                    errno: None,
                }),
            }),
        }
    }

    #[test]
    fn stats_name_the_page_and_the_file_in_json() {
        let json = serde_json::to_value(stats()).unwrap();
        let ended = serde_json::json!({
            "how": "vm_killed",
            "reason": {"why": "bad_page", "file": "/snap/memory", "page": 12, "offset": 49152, "errno": null}
        });
        assert_eq!(json["ended"], ended);
        assert_eq!(serde_json::from_value::<Stats>(json).unwrap(), stats());
        assert_eq!(
            stats().ended.unwrap().to_string(),
            "the page server killed the VM: page 12 is missing: /snap/memory ends at byte 49152"
        );
    }

    #[test]
    fn what_the_sample_did_not_want_tells_how_much_was_wasted() {
        let sampled = |held_back, held_back_touched| Stats {
            replayed: 1000,
            held_back,
            held_back_touched,
            ..stats()
        };
        assert_eq!(sampled(10, 8).wasted(), Some(200));
        assert_eq!(sampled(0, 0).wasted(), None);
    }

    #[test]
    fn stats_replace_what_was_there_and_leave_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats.json");
        fs::write(&path, "old").unwrap();
        stats().write(&path).unwrap();
        assert_eq!(
            serde_json::from_slice::<Stats>(&fs::read(&path).unwrap()).unwrap(),
            stats()
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
