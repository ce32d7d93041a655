//! What the page server says: one line when it listens, and its counts when the VM is gone.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::unit::index;

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
    /// Pages filled from a file.
    pub copied: u64,
    /// Pages filled with zeros.
    pub zeroed: u64,
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
    /// Why it is over.
    pub ended: Ended,
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

/// Counts of durations, in eight buckets per power of two.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [u64; 8 * 64],
    count: u64,
    max: u64,
}

impl Histogram {
    pub(crate) const fn new() -> Self {
        Self {
            buckets: [0; 8 * 64],
            count: 0,
            max: 0,
        }
    }

    pub(crate) fn record(&mut self, ns: u64) {
        self.buckets[index(bucket_of(ns))] += 1;
        self.count += 1;
        self.max = self.max.max(ns);
    }

    pub(crate) fn latency(&self) -> Latency {
        Latency {
            p50_ns: self.quantile(50),
            p99_ns: self.quantile(99),
            max_ns: self.max,
        }
    }

    /// The upper end of the bucket in which the given percentage of all values is reached.
    fn quantile(&self, percent: u64) -> u64 {
        let wanted = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (bucket, n) in (0u64..).zip(self.buckets) {
            seen += n;
            if n > 0 && seen >= wanted {
                return end_of(bucket).min(self.max);
            }
        }
        0
    }
}

/// Values below 8 have a bucket each; above, the bucket is the exponent and the three bits below the top one.
fn bucket_of(n: u64) -> u64 {
    match n.checked_ilog2() {
        None | Some(0..3) => n,
        Some(log) => u64::from(log - 2) * 8 + (n >> (log - 3)) % 8,
    }
}

/// The largest value in a bucket.
fn end_of(bucket: u64) -> u64 {
    match bucket / 8 {
        0 => bucket,
        block => {
            let unit = 1 << (block - 1);
            (8 + bucket % 8) * unit + (unit - 1)
        }
    }
}

impl Stats {
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
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_ends_at_most_an_eighth_above_what_is_in_it(n in any::<u64>(), shift in 0u32..64) {
            let n = n >> shift;
            let end = end_of(bucket_of(n));
            prop_assert!(end >= n);
            prop_assert!(end - n <= n / 8);
            prop_assert!(bucket_of(n) < 8 * 64);
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.latency(), Latency::default());
        for ns in 1..=1000 {
            histogram.record(ns * 1000);
        }
        let Latency {
            p50_ns,
            p99_ns,
            max_ns,
        } = histogram.latency();
        assert!((500_000..=562_500).contains(&p50_ns), "{p50_ns}");
        assert!((990_000..=1_000_000).contains(&p99_ns), "{p99_ns}");
        assert_eq!(max_ns, 1_000_000);
    }

    #[test]
    fn the_largest_value_has_a_bucket() {
        let mut histogram = Histogram::new();
        histogram.record(u64::MAX);
        assert_eq!(histogram.latency().p50_ns, u64::MAX);
    }

    fn stats() -> Stats {
        Stats {
            vm_pid: 7,
            memory_bytes: 1 << 20,
            page_size: 4096,
            faults: 3,
            copied: 1,
            zeroed: 2,
            present: 0,
            removed: 0,
            bytes: 4096,
            retries: 0,
            latency: Latency::default(),
            ended: Ended::VmKilled {
                reason: KillReason::BadPage(BadPage {
                    file: "/snap/memory".into(),
                    page: 12,
                    offset: 49152,
                    errno: None,
                }),
            },
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
            stats().ended.to_string(),
            "the page server killed the VM: page 12 is missing: /snap/memory ends at byte 49152"
        );
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
