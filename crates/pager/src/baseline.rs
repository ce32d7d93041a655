//! What the page server is measured against: handlers as simple as those that Firecracker shows as examples.
//!
//! ```text
//!   PageAtATime   wait ─► read one fault ─► pread 4 KiB ─► UFFDIO_COPY ─┐
//!                  ▲────────────────────────────────────────────────────┘
//!   CopyEverything    the first fault ─► one UFFDIO_COPY a region, straight from the mapped file ─► idle
//! ```
//!
//! For benches only. They take what the handshake says as the page server does, and serve a VM whose memory nobody
//! takes back: at a balloon's first page they give up, and the VM is killed.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::handshake::{self, Guest, HandshakeError};
use crate::socket::{ListenError, Listening, Socket};
use crate::stats::Ready;
use crate::sys::{MESSAGE_WORDS, Message};
use crate::unit::{HostAddr, PageIndex, PageRun, PageSize, index};

#[expect(
    unsafe_code,
    reason = "a mapped file; the module opens with its safety model"
)]
mod sys;

use sys::Mapping;

/// A way to answer faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// One page a fault, as it comes.
    PageAtATime {
        /// What it does between two faults.
        wait: Wait,
    },
    /// All of the memory at the first fault.
    CopyEverything,
}

/// How to wait for the next fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// In `poll`, and the wake-up costs what it costs.
    Block,
    /// By asking over and over, and a whole CPU is gone.
    Spin,
}

/// Why a VM was not served to its end. It has been killed, if it had connected.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// The guest's memory cannot be used.
    #[error("cannot use the memory file {path}")]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no socket to listen on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No VM was taken on.
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    /// What these handlers cannot do: a balloon, large pages, memory of somebody else.
    #[error("a baseline serves plain faults in pages of 4 KiB, and not {event}")]
    Unsupported {
        /// What came.
        event: String,
    },
    /// The kernel refused what has to work.
    #[error("the userfaultfd refused to go on")]
    Refused {
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Serves one VM until it has ended.
///
/// # Errors
/// When it cannot be served; then it has been killed.
pub fn serve(
    handler: Handler,
    socket: Socket,
    memory: &Path,
    on_ready: impl FnOnce(&Ready),
) -> Result<(), BaselineError> {
    let at = |source| BaselineError::Memory {
        path: memory.into(),
        source,
    };
    let file = File::open(memory).map_err(at)?;
    let bytes = file.metadata().map_err(at)?.len();
    let mapping = match handler {
        Handler::CopyEverything => Some(map(&file).map_err(at)?),
        Handler::PageAtATime { .. } => None,
    };
    let listening = Listening::open(socket)?;
    on_ready(&Ready {
        listening: listening.path().into(),
        pid: std::process::id(),
    });
    let guest = handshake::wait_for(&listening, None)?.hear(bytes)?;
    drop(listening);
    if guest.regions.page_size() != PageSize::Small {
        let event = "large pages".to_owned();
        return Err(BaselineError::Unsupported { event });
    }
    let result = match (handler, mapping) {
        (Handler::PageAtATime { wait }, _) => page_at_a_time(&guest, wait, |page, at| {
            file.read_exact_at(page, at)
                .map_err(|source| BaselineError::Memory {
                    path: memory.into(),
                    source,
                })
        }),
        (Handler::CopyEverything, mapping) => copy_everything(&guest, mapping.as_ref()),
    };
    match result {
        // Whatever was refused, it was because the VM is gone.
        Err(BaselineError::Refused { .. }) if guest.vm.has_exited() => Ok(()),
        result => result,
    }
}

/// How many of a file's pages the page cache holds.
///
/// Reading, even in a way that does not wait, would bring some in; this does not.
///
/// # Errors
/// When the file is empty or cannot be mapped.
pub fn cached_pages(file: &File) -> io::Result<usize> {
    let pages = map(file)?.cached()?;
    Ok(pages.iter().filter(|page| **page & 1 == 1).count())
}

fn map(file: &File) -> io::Result<Mapping> {
    let len = NonZeroUsize::new(index(file.metadata()?.len()));
    Mapping::of(file, len.ok_or(io::ErrorKind::UnexpectedEof)?)
}

fn page_at_a_time(
    guest: &Guest,
    wait: Wait,
    read: impl Fn(&mut [u8], u64) -> Result<(), BaselineError>,
) -> Result<(), BaselineError> {
    let mut page = [0; 4096];
    while let Some(faults) = next_faults(guest, wait)? {
        for address in faults {
            let (index, start) = locate(guest, address)?;
            read(&mut page, guest.regions.offset(index).get())?;
            copy(guest, start, &page)?;
        }
    }
    Ok(())
}

fn copy_everything(guest: &Guest, mapping: Option<&Mapping>) -> Result<(), BaselineError> {
    let Some(faults) = next_faults(guest, Wait::Block)? else {
        return Ok(());
    };
    for address in faults {
        locate(guest, address)?;
    }
    let bytes = mapping.map_or(&[][..], Mapping::bytes);
    for region in guest.regions.regions() {
        let from = index(region.offset.get());
        copy(guest, region.base, &bytes[from..from + index(region.size)])?;
    }
    // Nothing is missing any more.
    match next_faults(guest, Wait::Block)? {
        None => Ok(()),
        Some(_) => Err(BaselineError::Unsupported {
            event: "a fault for a page that is there".to_owned(),
        }),
    }
}

/// What the guest waits for, one fault or more, or `None` when the VM has ended.
fn next_faults(guest: &Guest, wait: Wait) -> Result<Option<Vec<HostAddr>>, BaselineError> {
    /// To ask for the VM between two tries would double what a try costs.
    const TRIES: usize = 1024;
    let inbox = [const { AtomicU64::new(0) }; 16 * MESSAGE_WORDS];
    loop {
        if wait == Wait::Block {
            let mut fds = [
                PollFd::new(&guest.uffd, PollFlags::IN),
                PollFd::new(&guest.vm, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| poll(&mut fds, None)).map_err(refused)?;
        }
        for _ in 0..TRIES {
            match guest.uffd.read(&inbox) {
                Ok(count) => {
                    let (messages, _) = inbox.as_chunks();
                    let faults = messages.iter().take(count).map(address);
                    return faults.collect::<Result<_, _>>().map(Some);
                }
                Err(Errno::AGAIN) if wait == Wait::Spin => {}
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(refused(errno)),
            }
        }
        if guest.vm.has_exited() {
            return Ok(None);
        }
    }
}

fn address(message: &[AtomicU64; MESSAGE_WORDS]) -> Result<HostAddr, BaselineError> {
    let words = message.each_ref().map(|word| word.load(Ordering::Relaxed));
    match Message::parse(words) {
        Message::Missing { address } => Ok(address),
        other => Err(BaselineError::Unsupported {
            event: format!("{other:?}"),
        }),
    }
}

/// The page of an address, and where it starts in Firecracker.
fn locate(guest: &Guest, address: HostAddr) -> Result<(PageIndex, HostAddr), BaselineError> {
    let place = guest.regions.page_at(address).and_then(|first| {
        let (start, _) = guest.regions.place(PageRun { first, count: 1 })?;
        Some((first, start))
    });
    place.ok_or_else(|| BaselineError::Unsupported {
        event: format!("a fault at {address}"),
    })
}

/// Copies all of `bytes`, past what is there already.
fn copy(guest: &Guest, start: HostAddr, bytes: &[u8]) -> Result<(), BaselineError> {
    let mut done = 0;
    while done < bytes.len() {
        let at = HostAddr::new(start.get() + crate::unit::length(done));
        match guest.uffd.copy(at, &bytes[done..]) {
            Ok(copied) => done += index(copied),
            Err(Errno::AGAIN) => {}
            Err(Errno::EXIST) => {
                guest.uffd.wake(at, 4096).map_err(refused)?;
                done += 4096;
            }
            Err(errno) => return Err(refused(errno)),
        }
    }
    Ok(())
}

fn refused(errno: Errno) -> BaselineError {
    BaselineError::Refused {
        source: errno.into(),
    }
}
