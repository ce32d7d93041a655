//! Taking a VM over from a page server that has died, or that is to be replaced.
//!
//! ```text
//!   old page server   ✕ at any instruction
//!   Firecracker       keeps its own copy of the userfaultfd; its threads wait
//!   new page server   state file ─► descriptor ─► inbox applied again ─► all waiters woken ─► serves
//! ```
//!
//! What was read and not answered is raised again, because who is woken for a page that is still missing
//! faults anew.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal,
};

use crate::hints::Hints;
use crate::packed::OpenPlace;
use crate::sandbox::{Rights, Sandbox, SandboxError};
use crate::source::{Backing, SourceError};
use crate::state::{Count, State, StateError};
use crate::sys::Uffd;
use crate::vm::{Vm, VmIdentity};

/// What the kernel calls a userfaultfd in `/proc`.
const NAME: &str = "anon_inode:[userfaultfd]";

/// How long a page server that was ended, or died, may keep its state.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_micros(200);

/// Whom to take over.
#[derive(Debug)]
#[non_exhaustive]
pub struct Adoption {
    /// The VM's process.
    pub vm: i32,
    /// What the page server before this one wrote down.
    pub state: PathBuf,
    /// The VM's userfaultfd, where somebody with the right to has taken it; else it is taken here.
    pub descriptor: Option<OwnedFd>,
    /// The way to the repository of a packed memory.
    pub open_place: Option<OpenPlace>,
    /// What to do with a page server that lives.
    pub living: Living,
    /// The rights that are left when the VM is served.
    pub rights: Rights,
    /// As of [`Options`](crate::Options).
    pub sign: Option<OwnedFd>,
}

/// What to do with a page server that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Living {
    /// Leave the VM to it.
    Respect,
    /// End it, at whatever it does, and go on from there: an upgrade.
    Replace,
}

impl Adoption {
    /// Of a VM whose page server is dead, with a descriptor that is taken from its process.
    pub fn new(vm: i32, state: PathBuf) -> Adoption {
        Adoption {
            vm,
            state,
            descriptor: None,
            open_place: None,
            living: Living::Respect,
            rights: Rights::default(),
            sign: None,
        }
    }
}

/// Why a VM cannot be taken over. It is as it was, except that a page server that was to be replaced may be gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// There is nothing to go on from.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VM is gone, or cannot be looked at.
    #[error("cannot open the VM, process {pid}")]
    Vm {
        /// Its process.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The state is that of another VM, or of an earlier process with the same number.
    #[error("{state} is not the state of process {pid}")]
    OtherVm {
        /// The state.
        state: PathBuf,
        /// The process that was meant.
        pid: i32,
    },
    /// The guest's memory cannot be opened any more.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The guest's memory has another size than it had.
    #[error("the memory that {state} names has changed its size")]
    OtherMemory {
        /// The state.
        state: PathBuf,
    },
    /// The page server keeps more rights than it was to.
    #[error("cannot confine the page server")]
    Sandbox(#[from] SandboxError),
    /// It has none, or more than one.
    #[error("process {pid} has {count} userfaultfds, not one")]
    Descriptors {
        /// The process.
        pid: i32,
        /// How many it has.
        count: usize,
    },
    /// It may not be taken: not root, not the VM's parent, or another user.
    #[error("cannot take the userfaultfd of process {pid}; root can, and the VM's parent")]
    Take {
        /// The process.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What was given is something else.
    #[error("the descriptor is no userfaultfd")]
    NotAUserfaultfd,
    /// The page server that was to be replaced cannot be ended.
    #[error("cannot end the page server, process {pid}")]
    Replace {
        /// The process.
        pid: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Takes a copy of the one userfaultfd that a process has.
///
/// Needs the right to trace it: root has it, and a parent of the same user.
pub fn take_descriptor(vm: i32) -> Result<OwnedFd, AdoptError> {
    let failed = |source: io::Error| AdoptError::Vm { pid: vm, source };
    let pid = Pid::from_raw(vm).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
    let entries = std::fs::read_dir(format!("/proc/{vm}/fd"))
        .map_err(|source| AdoptError::Take { pid: vm, source })?;
    let numbers: Vec<i32> = entries
        .flatten()
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to == Path::new(NAME)))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let [number] = numbers[..] else {
        return Err(AdoptError::Descriptors {
            pid: vm,
            count: numbers.len(),
        });
    };
    pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).map_err(|errno| AdoptError::Take {
        pid: vm,
        source: errno.into(),
    })
}

/// A VM with its page server's state, this process being the one that serves.
pub(crate) struct Taken {
    pub(crate) vm: Vm,
    pub(crate) uffd: Uffd,
    pub(crate) state: State,
    pub(crate) backing: Backing,
    pub(crate) hints: Hints,
}

/// Becomes the VM's page server.
pub(crate) fn take(adoption: Adoption) -> Result<Taken, AdoptError> {
    let Adoption {
        vm: pid,
        state: path,
        descriptor,
        open_place,
        living,
        rights,
        sign,
    } = adoption;
    let path = std::path::absolute(&path).unwrap_or(path);
    let state = State::open(&path)?;
    let failed = |source| AdoptError::Vm { pid, source };
    let raw = Pid::from_raw(pid).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let mut vm = Vm::open(raw).map_err(|errno| failed(errno.into()))?;
    // Until it is ours, it is not ours to kill.
    vm.on_drop(crate::vm::OnDrop::Wait);
    if VmIdentity::of(raw).map_err(failed)? != state.saved().vm {
        return Err(AdoptError::OtherVm { state: path, pid });
    }
    let descriptor = match descriptor {
        Some(descriptor) => descriptor,
        None => take_descriptor(pid)?,
    };
    let uffd = Uffd::adopt(descriptor).map_err(|_| AdoptError::NotAUserfaultfd)?;
    let plan = &state.saved().plan;
    let mut sandbox = Sandbox::new(rights, plan);
    let open = || {
        let backing = Backing::open(&plan.source, open_place)?;
        match backing.bytes() == state.regions().bytes() {
            true => Ok(backing),
            false => Err(AdoptError::OtherMemory {
                state: path.clone(),
            }),
        }
    };
    // Before anything is ended: without it there is nothing to serve.
    let opened = match sandbox.is_far() {
        true => None,
        false => Some(open()?),
    };
    own(&state, &path, living)?;
    let hints = Hints::open(plan, Some(&path), rights, sign);
    sandbox.confine(state.bytes())?;
    let backing = match opened {
        Some(backing) => backing,
        None => open()?,
    };
    state.set_confinement(sandbox.hold_only(&vm)?);
    Ok(Taken {
        vm,
        uffd,
        state,
        backing,
        hints,
    })
}

/// Becomes the one that serves.
///
/// Whoever holds the state may be dead already, and named in it or not: the kernel keeps a lock of a dead process for
/// as long as somebody looks into it through `/proc`, and who has just taken the lock has still to write its name.
fn own(state: &State, path: &Path, living: Living) -> Result<(), AdoptError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let server = match state.own() {
            Err(StateError::Served { server }) => server,
            owned => return Ok(owned?),
        };
        match (holder(server, path), living) {
            (Some(_), Living::Respect) => return Err(StateError::Served { server }.into()),
            (Some(pidfd), Living::Replace) => end(&pidfd, server)?,
            (None, _) => {}
        }
        if Instant::now() > deadline {
            return Err(StateError::Served { server }.into());
        }
        thread::sleep(PAUSE);
    }
}

/// A hold on a page server that is alive and keeps this state.
///
/// Whoever has that number now must have the state mapped, or it is not the one that wrote it there.
fn holder(server: u64, state: &Path) -> Option<OwnedFd> {
    let pid = i32::try_from(server).ok().and_then(Pid::from_raw)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{server}/maps")).ok()?;
    let full = std::fs::canonicalize(state).ok()?;
    let full = full.to_string_lossy();
    maps.lines()
        .any(|line| line.ends_with(full.as_ref()))
        .then_some(pidfd)
}

/// Ends a page server, at whatever it does.
fn end(pidfd: &OwnedFd, server: u64) -> Result<(), AdoptError> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(AdoptError::Replace {
            pid: server,
            source: errno.into(),
        }),
    }
}

/// The process that serves a VM, or served it last, as its state says.
pub fn server_of(state: &Path) -> Result<u32, StateError> {
    let pid = State::open(state)?.get(Count::Server);
    Ok(u32::try_from(pid).unwrap_or(0))
}

/// The process that serves a VM now, as its state says; none if that one is dead.
pub fn living_server_of(state: &Path) -> Result<Option<u32>, StateError> {
    let pid = server_of(state)?;
    Ok(holder(pid.into(), state).map(|_| pid))
}
