//! Firecracker's one message: where the guest's memory is, and the descriptor to fill it through.
//!
//! ```text
//! Firecracker                                             page server
//!   connect ────────────────────────────────────────────►  accept, SO_PEERCRED, pidfd
//!   sendmsg [{"base_host_virt_addr":…,"size":…,…}] + fd ─►  one recvmsg: all of it, or none
//!   keeps the connection open until it dies                  its hang-up is a sign of the VM's end
//! ```
//!
//! There is no length, no newline, no answer and no end of stream. All of it is checked: it comes from
//! another process. Whoever hands over a userfaultfd that cannot be served is killed, because it would wait
//! for its first page for ever; that is what [`Vm`]'s drop does on every error below.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketFlags, accept_with,
    recv, recvmsg,
};
use serde::Deserialize;

use crate::region::{Region, RegionError, RegionMap};
use crate::sys::{Uffd, peer_pid};
use crate::unit::{HostAddr, MemoryOffset};
use crate::vm::{OnDrop, Vm};

/// Firecracker sends about 121 bytes a region and has at most a handful.
const MESSAGE_LIMIT: usize = 64 * 1024;
/// The most descriptors that the kernel lets one message carry.
const DESCRIPTOR_LIMIT: usize = 253;

/// Why no VM could be taken on. If one had handed over its userfaultfd, it has been killed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nobody came in time.
    #[error("no handshake within {limit:?}")]
    Timeout {
        /// The time that was allowed.
        limit: Duration,
    },
    /// The connection could not be accepted or read.
    #[error("cannot receive the handshake")]
    Receive {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The peer cannot be watched or killed, so it cannot be served safely.
    #[error("the peer runs outside of this process's PID namespace")]
    PeerInvisible,
    /// The peer cannot be watched or killed, so it cannot be served safely.
    #[error("cannot open the peer, process {pid}")]
    Peer {
        /// The peer.
        pid: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The message carried none.
    #[error("the message carries no descriptor")]
    NoDescriptor,
    /// The kernel dropped some: too many open files, or more than fit.
    #[error("not all descriptors of the message could be received")]
    DescriptorsLost,
    /// The first descriptor is something else.
    #[error("the descriptor is no userfaultfd")]
    NotAUserfaultfd,
    /// The descriptor does not let itself be made non-blocking.
    #[error("cannot prepare the userfaultfd")]
    Prepare {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More than any Firecracker would say.
    #[error("the message is longer than {limit} bytes")]
    TooLong {
        /// The most that is taken.
        limit: usize,
    },
    /// Not the JSON of a list of regions.
    #[error("the message is not a list of regions")]
    Parse(#[source] serde_json::Error),
    /// A list of regions that cannot be this snapshot's memory.
    #[error("the regions cannot be served")]
    Regions(#[from] RegionError),
}

/// A VM that waits for its pages. Dropped in this order, as [`Caught`] is.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) uffd: Uffd,
    pub(crate) regions: RegionMap,
    /// Never read; it hangs up when the VM ends.
    pub(crate) connection: OwnedFd,
}

/// One object of the list. What it does not name is ignored, so that newer Firecrackers are understood.
#[derive(Deserialize)]
struct RegionMessage {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// In bytes, Firecracker ≥ 1.12.
    page_size: Option<u64>,
    /// Also in bytes, whatever the name says; Firecracker 1.7 until 2.0.
    page_size_kib: Option<u64>,
}

/// Reads the list of regions and checks it against the size of the memory file.
pub fn parse(message: &[u8], memory_file: u64) -> Result<RegionMap, HandshakeError> {
    let list: Vec<RegionMessage> =
        serde_json::from_slice(message).map_err(HandshakeError::Parse)?;
    let regions = list.into_iter().map(|region| Region {
        base: HostAddr::new(region.base_host_virt_addr),
        size: region.size,
        offset: MemoryOffset::new(region.offset),
        page_size: region.page_size.or(region.page_size_kib).unwrap_or(4096),
    });
    Ok(RegionMap::new(regions.collect(), memory_file)?)
}

/// Somebody who has connected and begun to speak, and of whom nothing was read yet.
#[derive(Debug)]
pub(crate) struct Caller {
    /// Not ours to kill before it has handed over a userfaultfd.
    vm: Vm,
    connection: OwnedFd,
    deadline: Deadline,
}

/// Waits for somebody who speaks, until `limit` has passed if there is one.
///
/// That is all that takes a right. Whatever a stranger wrote is read by [`Caller::hear`].
pub(crate) fn wait_for(
    listener: impl AsFd,
    limit: Option<Duration>,
) -> Result<Caller, HandshakeError> {
    let deadline = Deadline::after(limit);
    loop {
        deadline.wait_readable(&listener)?;
        let connection = match accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            Ok(connection) => connection,
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => continue,
            Err(errno) => return Err(received(errno)),
        };
        // Who hangs up without a word only wanted to know whether somebody listens.
        if speaks(&connection, &deadline)? {
            let mut vm = open_peer(&connection)?;
            vm.on_drop(OnDrop::Wait);
            return Ok(Caller {
                vm,
                connection,
                deadline,
            });
        }
    }
}

/// Whether there is something to read, once that is known.
fn speaks(connection: &OwnedFd, deadline: &Deadline) -> Result<bool, HandshakeError> {
    loop {
        deadline.wait_readable(connection)?;
        match recv(connection, &mut [0_u8; 1], RecvFlags::PEEK) {
            Ok((_, bytes)) => return Ok(bytes > 0),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(false),
            Err(errno) => return Err(received(errno)),
        }
    }
}

impl Caller {
    /// Its process, which may be anybody's so far.
    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Reads what it has to say, and takes it on.
    pub(crate) fn hear(self, memory_file: u64) -> Result<Guest, HandshakeError> {
        let Caller {
            vm,
            connection,
            deadline,
        } = self;
        let message = receive_message(&connection, &deadline)?;
        take_on(vm, connection, message, memory_file)
    }
}

struct RawMessage {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    flags: ReturnFlags,
}

fn receive_message(
    connection: &OwnedFd,
    deadline: &Deadline,
) -> Result<RawMessage, HandshakeError> {
    let mut bytes = vec![0; MESSAGE_LIMIT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT))];
    loop {
        deadline.wait_readable(connection)?;
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let got = match recvmsg(connection, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(errno) => return Err(received(errno)),
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        bytes.truncate(got.bytes);
        return Ok(RawMessage {
            bytes,
            descriptors,
            flags: got.flags,
        });
    }
}

fn take_on(
    mut vm: Vm,
    connection: OwnedFd,
    message: RawMessage,
    memory_file: u64,
) -> Result<Guest, HandshakeError> {
    let RawMessage {
        bytes,
        descriptors,
        flags,
    } = message;
    // Further descriptors are for a Firecracker to come; they are closed here.
    let uffd = match descriptors.into_iter().next().map(Uffd::adopt) {
        _ if flags.contains(ReturnFlags::CTRUNC) => {
            vm.on_drop(OnDrop::Kill);
            return Err(HandshakeError::DescriptorsLost);
        }
        // It waits for no page of ours, so it need not die.
        None => return Err(HandshakeError::NoDescriptor),
        Some(Err(_)) => return Err(HandshakeError::NotAUserfaultfd),
        Some(Ok(uffd)) => uffd,
    };
    vm.on_drop(OnDrop::Kill);
    let caught = Caught { vm, uffd };
    if bytes.len() == MESSAGE_LIMIT {
        return Err(HandshakeError::TooLong {
            limit: MESSAGE_LIMIT,
        });
    }
    let regions = parse(&bytes, memory_file)?;
    caught
        .uffd
        .set_nonblocking()
        .map_err(|source| HandshakeError::Prepare { source })?;
    let Caught { vm, uffd } = caught;
    Ok(Guest {
        vm,
        uffd,
        regions,
        connection,
    })
}

/// Dropped in this order: the VM must be dead before what may be the last copy of its userfaultfd closes,
/// or its missing pages would read as zeros.
struct Caught {
    vm: Vm,
    uffd: Uffd,
}

fn open_peer(connection: &OwnedFd) -> Result<Vm, HandshakeError> {
    let pid = peer_pid(connection.as_fd())
        .map_err(|source| HandshakeError::Receive { source })?
        .ok_or(HandshakeError::PeerInvisible)?;
    Vm::open(pid).map_err(|errno| HandshakeError::Peer {
        pid: pid.as_raw_pid(),
        source: errno.into(),
    })
}

fn received(errno: Errno) -> HandshakeError {
    HandshakeError::Receive {
        source: errno.into(),
    }
}

/// A point in time that may never come.
#[derive(Debug)]
struct Deadline {
    limit: Option<(Duration, Instant)>,
}

impl Deadline {
    fn after(limit: Option<Duration>) -> Deadline {
        Deadline {
            limit: limit.and_then(|limit| Some((limit, Instant::now().checked_add(limit)?))),
        }
    }

    fn wait_readable(&self, fd: impl AsFd) -> Result<(), HandshakeError> {
        loop {
            let left = self
                .limit
                .map(|(_, end)| end.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match (poll(&mut fds, timeout.as_ref()), self.limit) {
                (Ok(0), Some((limit, _))) => return Err(HandshakeError::Timeout { limit }),
                (Ok(0), None) | (Err(Errno::INTR), _) => {}
                (Ok(_), _) => return Ok(()),
                (Err(errno), _) => return Err(received(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    /// What the fuzz target starts from: a message, then a line with the size of the memory file.
    fn seeds() -> Vec<(Vec<u8>, u64)> {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/handshake");
        let files = std::fs::read_dir(dir).unwrap();
        let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        let read = |path| {
            let text = std::fs::read_to_string(path).unwrap();
            let (message, memory) = text.trim_end().rsplit_once('\n').unwrap();
            (message.as_bytes().to_vec(), memory.parse().unwrap())
        };
        paths.into_iter().map(read).collect()
    }

    #[test]
    fn what_fuzzing_starts_from_is_served() {
        for (message, memory) in seeds() {
            assert_eq!(parse(&message, memory).unwrap().bytes(), memory);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn a_changed_message_is_refused_or_is_all_of_the_memory(
            (mut message, memory) in select(seeds()),
            changes in proptest::collection::vec((any::<Index>(), b'!'..=b'~'), 1..4),
            cut in proptest::option::weighted(0.1, any::<Index>()),
        ) {
            for (at, byte) in changes {
                *at.get_mut(&mut message) = byte;
            }
            if let Some(cut) = cut {
                message.truncate(cut.index(message.len()));
            }
            if let Ok(map) = parse(&message, memory) {
                prop_assert_eq!(map.bytes(), memory);
            }
        }
    }
}
