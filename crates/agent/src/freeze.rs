//! File systems that stand still for a snapshot: all that was written is on the disks, and nothing is half written.
//!
//! ```text
//!   quiesce ─▶ sync ─▶ freeze each ─▶ quiesced ─▶ (the host snapshots) ─▶ the connection ends, or time is up ─▶ thaw
//! ```
//!
//! Firecracker resets all connections at a snapshot, in the guest that goes on and in each copy. So whoever wakes up
//! thaws by itself, and a host that dies leaves no guest frozen.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rekindle_agent::{Quiesce, Quiesced, Refusal, Why};
use rustix::fs::makedev;

use crate::log::say;
use crate::sys;
use crate::wake::micros;

/// Who holds file systems frozen.
#[derive(Debug, Default)]
pub(crate) struct Freezer {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    /// One at a time; who comes later takes the place of who came before.
    turn: u64,
    frozen: Vec<File>,
    over: bool,
}

/// Whoever holds this has had file systems frozen.
#[derive(Debug)]
pub(crate) struct Frozen {
    freezer: Arc<Freezer>,
    turn: u64,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.freezer.held().turn == self.turn {
            self.freezer.thaw();
        }
    }
}

impl Freezer {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes everything out and freezes what can be written, until the second value is dropped, somebody thaws, or the
    /// time is up.
    pub(crate) fn freeze(self: &Arc<Self>, asked: &Quiesce) -> Result<(Quiesced, Frozen), Refusal> {
        let begun = Instant::now();
        let within = Duration::from_millis(asked.within_ms.into());
        rustix::fs::sync();
        let sync_us = micros(begun.elapsed());
        let too_late = || {
            let words = format!("writing everything out took longer than {within:?}");
            Refusal {
                why: Why::TooLate,
                words,
            }
        };
        if begun.elapsed() >= within {
            return Err(too_late());
        }
        self.thaw();
        let frozen = self.clone().begin();
        let turn = frozen.turn;
        let watch = self.clone();
        let deadline = Instant::now() + Duration::from_millis(asked.thaw_after_ms.into());
        // Before the first is frozen, as the second may take its time.
        thread::Builder::new()
            .name("thaw".into())
            .spawn(move || watch.thaw_at(deadline, turn))
            .map_err(|error| Refusal {
                why: Why::Full,
                words: format!("the guest has no threads left: {error}"),
            })?;
        let begun_freezing = Instant::now();
        let mut answer = Quiesced {
            sync_us,
            ..Quiesced::default()
        };
        let mut done = HashSet::new();
        for mount in mountinfo().lines().filter_map(writable) {
            if done.contains(&mount.device) {
                continue;
            }
            match self.freeze_one(&mount, turn) {
                Ok(true) => {
                    done.insert(mount.device);
                    answer.frozen.push(mount.point);
                }
                Ok(false) => {}
                Err(error) => answer.problems.push(format!("{}: {error}", mount.point)),
            }
        }
        answer.freeze_us = micros(begun_freezing.elapsed());
        if begun.elapsed() >= within || self.held().over {
            return Err(too_late());
        }
        Ok((answer, frozen))
    }

    fn begin(self: Arc<Self>) -> Frozen {
        let mut held = self.held();
        held.turn += 1;
        held.over = false;
        let turn = held.turn;
        drop(held);
        let freezer = self;
        Frozen { freezer, turn }
    }

    /// Whether it stands still now: not if something else is mounted over it.
    fn freeze_one(&self, mount: &Mount, turn: u64) -> std::io::Result<bool> {
        let file = File::open(&mount.point)?;
        if file.metadata()?.dev() != mount.device {
            return Ok(false);
        }
        sys::freeze(&file)?;
        let mut held = self.held();
        if held.over || held.turn != turn {
            drop(held);
            sys::thaw(&file)?;
            return Ok(false);
        }
        held.frozen.push(file);
        Ok(true)
    }

    /// Lets everything go on that stands still.
    pub(crate) fn thaw(&self) {
        let mut held = self.held();
        held.over = true;
        // The last first: it may be on the one before.
        while let Some(file) = held.frozen.pop() {
            if let Err(error) = sys::thaw(&file) {
                say(format_args!(
                    "rekindle-agent: cannot thaw a file system: {error}"
                ));
            }
        }
        self.changed.notify_all();
    }

    fn thaw_at(&self, deadline: Instant, turn: u64) {
        let mut held = self.held();
        while !held.over && held.turn == turn {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                drop(held);
                self.thaw();
                // After it: the console may stand still, too.
                say("rekindle-agent: nobody thawed the file systems in time");
                return;
            };
            let waited = self.changed.wait_timeout(held, left);
            held = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A file system on a block device that is mounted to be written.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: String,
    device: u64,
}

fn mountinfo() -> String {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
}

/// What there is to freeze in one line of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).
fn writable(line: &str) -> Option<Mount> {
    let (mount, file_system) = line.split_once(" - ")?;
    let fields: Vec<&str> = mount.split(' ').collect();
    let (device, point, options) = (fields.get(2)?, fields.get(4)?, fields.get(5)?);
    let (major, minor) = device.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let rw = |options: &str| options.split(',').any(|option| option == "rw");
    let both = rw(options) && rw(file_system.rsplit(' ').next()?);
    // Those of major 0 have no device of their own: what is below them is on a line of its own.
    (both && major != 0).then(|| Mount {
        point: unescaped(point),
        device: makedev(major, minor),
    })
}

/// Blanks and the like are octal numbers there.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            None => plain.push_str(part),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_written_and_has_a_device_is_frozen() {
        let point = |line| writable(line).map(|mount| mount.point);
        let root = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro";
        let device = makedev(254, 0);
        let mount = Mount {
            point: "/".into(),
            device,
        };
        assert_eq!(writable(root), Some(mount));
        let blank = r"23 22 254:16 / /my\040data rw - ext4 /dev/vdb rw";
        assert_eq!(point(blank).as_deref(), Some("/my data"));
        for not in [
            "24 22 0:21 / /proc rw - proc proc rw",
            "25 22 254:16 / /data ro,relatime - ext4 /dev/vdb rw",
            "26 22 254:16 / /data rw - ext4 /dev/vdb ro",
            "27 22 0:40 / / rw - overlay overlay rw,lowerdir=/a,upperdir=/b",
            "",
            "no mount at all",
        ] {
            assert_eq!(point(not), None, "{not}");
        }
    }
}
