//! What is known of a VM, on disk: enough for anybody to say what it is, adopt it or end it.
//!
//! Written before each step that leaves something behind, replaced by rename. It is not flushed to the
//! disk: after a crash of the host none of its processes exist any more, and the boot id says so.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use rekindle_firecracker::ProcessId;
use rekindle_store::manifest::BootInfo;
use rekindle_store::{SnapshotId, VmName};
use serde::{Deserialize, Serialize};

use super::config::{Backend, Limits, Machine};
use super::dir::{RECORD, VmDir};
use super::state::State;
use super::wake::Waking;

/// The record version that this program writes, and the newest that it reads.
pub const RECORD_VERSION: u32 = 1;

/// The largest record that is read.
const MAX_BYTES: u64 = 1 << 20;

/// A VM's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`] of the program that wrote it.
    pub version: u32,
    /// The VM's name, which is also its directory's.
    pub name: VmName,
    /// What its processes carry as `--id`, unique on this host.
    pub id: String,
    /// Where it is in its life.
    #[serde(flatten)]
    pub state: State,
    /// When it was asked for.
    pub created: Timestamp,
    /// When its guest first ran, or was loaded.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub started: Option<Timestamp>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ended: Option<Timestamp>,
    /// When it is to be ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ends_at: Option<Timestamp>,
    /// What it came from.
    pub origin: Origin,
    /// What it was booted from, or the VM that it is a copy of; nothing where an older program started it.
    #[serde(default)]
    pub boot: BootInfo,
    /// What it is for.
    #[serde(skip_serializing_if = "Purpose::is_lasting", default)]
    pub purpose: Purpose,
    /// The user that its Firecracker runs as, if it is jailed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub jailed_as: Option<u32>,
    /// What its Firecracker may read from and write to the disk that it is on, each.
    #[serde(skip_serializing_if = "Limits::are_none", default)]
    pub host_io: Limits,
    /// What it is made of.
    pub machine: Machine,
    /// Firecracker's process. Absent before the spawn; one spawned but not yet recorded is found by `id`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub firecracker: Option<ProcessId>,
    /// Firecracker's own version.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub firecracker_version: Option<String>,
    /// The page server's process.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pager: Option<ProcessId>,
    /// The snapshot that the next Diff would be based on, where dirty pages are tracked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub diff_base: Option<SnapshotId>,
    /// The agent in its guest, as far as it is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub agent: Option<GuestAgent>,
    /// Where a copy whose guest has an agent is with waking up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub waking: Option<Waking>,
    /// A snapshot that is being taken: who adopts the VM must let the guest run again if it ran before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub capturing: Option<Capturing>,
    /// How long the steps of boot or restore took.
    #[serde(default)]
    pub timings: Timings,
}

/// What a VM came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Origin {
    /// Booted from a kernel.
    Boot {
        /// The kernel's path.
        kernel: PathBuf,
        /// The initial RAM disk's path.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        boot_args: Option<String>,
    },
    /// Restored from a snapshot.
    Restore {
        /// The snapshot.
        snapshot: SnapshotId,
        /// How its memory comes in.
        backend: Backend,
        /// The URL of the snapshot, if its memory is fetched from there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
    },
}

/// What is known of the agent in a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
#[non_exhaustive]
pub enum GuestAgent {
    /// The guest's init is going to start it; it has not called yet.
    Awaited,
    /// It listens.
    Ready {
        /// Which version of the protocol it speaks.
        protocol: u32,
        /// Its release.
        version: String,
    },
}

/// What a VM is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Whatever its guest does: it lives until it is ended.
    #[default]
    Lasting,
    /// To find out what a snapshot's guests touch first. Without its owner nobody has a use for it.
    Rehearsal,
}

impl Purpose {
    fn is_lasting(&self) -> bool {
        *self == Purpose::Lasting
    }
}

/// What an interrupted snapshot must be undone to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capturing {
    /// The guest ran before; it must run again.
    WasRunning,
    /// The guest was paused before; it stays so.
    WasPaused,
}

/// How long the steps took, in microseconds. A step that did not happen is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From Firecracker's spawn to its first answered call.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub api_us: Option<u64>,
    /// The configuration calls of a boot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub configure_us: Option<u64>,
    /// `PUT /snapshot/load`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub load_us: Option<u64>,
    /// Start or resume.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub start_us: Option<u64>,
    /// Telling the guest that it is another VM now, until it has told what it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub wake_us: Option<u64>,
    /// From Firecracker's spawn to the running (or loaded) guest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub spawn_to_guest_us: Option<u64>,
    /// From the request to the running (or loaded) guest, all checks and preparations included, and that it is woken up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub total_us: Option<u64>,
}

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("cannot use {path}")]
    Io {
        /// The record's path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no record.
    #[error("{path} is not a VM's record; remove the VM with: rekindle rm --force")]
    Malformed {
        /// The record's path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It was written by a newer program.
    #[error(
        "{path} has record version {found}, this program reads up to {RECORD_VERSION}; use the newer rekindle"
    )]
    FromTheFuture {
        /// The record's path.
        path: PathBuf,
        /// The version in it.
        found: u32,
    },
}

impl Record {
    /// Reads a VM's record.
    pub fn read(dir: &VmDir) -> Result<Record, RecordError> {
        let path = dir.record();
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let size = std::fs::symlink_metadata(&path).map_err(io)?.len();
        if size > MAX_BYTES {
            return Err(io(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "too large for a record",
            )));
        }
        let text = std::fs::read(&path).map_err(io)?;
        let malformed = |source| RecordError::Malformed {
            path: path.clone(),
            source,
        };
        let versioned: Versioned = serde_json::from_slice(&text).map_err(malformed)?;
        if versioned.version > RECORD_VERSION {
            return Err(RecordError::FromTheFuture {
                path,
                found: versioned.version,
            });
        }
        serde_json::from_slice(&text).map_err(malformed)
    }

    /// Replaces a VM's record.
    pub fn write(&self, dir: &VmDir) -> Result<(), RecordError> {
        let path = dir.record();
        let io = |source| RecordError::Io {
            path: path.clone(),
            source,
        };
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        dir.replace(RECORD, &text).map_err(io)
    }
}

/// The record of a VM that is owned. Others than the owner write it, while the owner waits for something else: who
/// replaces its page server, and who hears from its agent.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    dir: VmDir,
    /// What is on disk, but for a page server or an agent that could not be written down.
    written: Arc<Mutex<Record>>,
}

impl Ledger {
    pub(crate) fn new(dir: &VmDir, record: &Record) -> Ledger {
        Ledger {
            dir: dir.clone(),
            written: Arc::new(Mutex::new(record.clone())),
        }
    }

    /// Writes what the owner knows, but for page server and agent, of which the ledger knows best; the owner learns it.
    pub(crate) fn write(&self, record: &mut Record) -> Result<(), RecordError> {
        let mut written = self.lock();
        record.pager.clone_from(&written.pager);
        record.agent.clone_from(&written.agent);
        record.write(&self.dir)?;
        written.clone_from(record);
        Ok(())
    }

    /// Notes who serves from now on. It is on disk with the next [`Ledger::write`].
    pub(crate) fn note_pager(&self, pager: Option<ProcessId>) {
        self.lock().pager = pager;
    }

    /// Notes who serves from now on, on disk too. One that cannot be written down is found by its `--id`.
    pub(crate) fn write_pager(&self, pager: ProcessId) {
        let mut written = self.lock();
        written.pager = Some(pager);
        let _ = written.write(&self.dir);
    }

    /// Notes what is known of the agent, on disk too.
    pub(crate) fn write_agent(&self, agent: GuestAgent) {
        let mut written = self.lock();
        if written.agent.as_ref() != Some(&agent) {
            written.agent = Some(agent);
            let _ = written.write(&self.dir);
        }
    }

    /// What is known of the agent.
    pub(crate) fn agent(&self) -> Option<GuestAgent> {
        self.lock().agent.clone()
    }

    /// The process that serves now.
    pub(crate) fn pager(&self) -> Option<ProcessId> {
        self.lock().pager.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id for the processes of a new VM: 8 hexadecimal digits, from the kernel's random pool.
pub(crate) fn fresh_id() -> String {
    let mut bytes = [0; 4];
    // Four bytes come whole or not at all once the pool is ready, which it is long before anybody starts a VM.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("{:08x}", u32::from_ne_bytes(bytes))
}

/// The one field that every version of a record has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::boot::new_record;
    use rekindle_store::Root;

    fn process(pid: u32) -> ProcessId {
        ProcessId {
            pid,
            start_time: 1,
            boot_id: String::new(),
        }
    }

    #[test]
    fn neither_of_two_writers_undoes_what_the_other_wrote() {
        let place = tempfile::tempdir().unwrap();
        let root = Root::open(place.path()).unwrap();
        let dir = VmDir::create(&root, &"v".parse().unwrap()).unwrap();
        let origin = Origin::Boot {
            kernel: "k".into(),
            initrd: None,
            boot_args: None,
        };
        let mut owned = new_record(&"v".parse().unwrap(), origin, Machine::default());
        owned.pager = Some(process(1));
        let ledger = Ledger::new(&dir, &owned);

        ledger.write_pager(process(2));
        assert_eq!(Record::read(&dir).unwrap().pager, Some(process(2)));
        owned.state = State::Running;
        ledger.write(&mut owned).unwrap();
        assert_eq!(owned.pager, Some(process(2)));
        ledger.write_pager(process(3));
        let read = Record::read(&dir).unwrap();
        assert_eq!((read.state, read.pager), (State::Running, Some(process(3))));

        ledger.note_pager(None);
        ledger.write(&mut owned).unwrap();
        assert_eq!(Record::read(&dir).unwrap().pager, None);
    }
}
