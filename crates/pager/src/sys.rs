//! The system calls that `rustix` does not offer in a safe form: the `ioctl`s of a userfaultfd, reading it
//! into memory that is shared with a file, that memory itself, and `SO_PEERCRED`.
//!
//! # Safety model
//!
//! 1. A [`Uffd`] wraps a descriptor that answered to `UFFDIO_WAKE`, so the kernel reads and writes the
//!    argument of each `ioctl` as `linux/userfaultfd.h` says, and nothing beyond it: the structs here have
//!    that layout, and the operation codes are made from their sizes.
//! 2. `UFFDIO_COPY` reads `len` bytes at `src`: both are taken from a slice, which outlives the call.
//! 3. `UFFDIO_COPY` and `UFFDIO_ZEROPAGE` only ever fill pages that are *missing* in ranges which the owner
//!    of the address space registered. They cannot change memory that holds something, not even when that
//!    address space is our own, so no Rust reference can see a value change.
//! 4. `getsockopt` writes at most the length that it is given, into a value that is valid for any bytes.
//! 5. A [`SharedMap`] is mapped at an address of the kernel's choice, for its whole length, until it is
//!    dropped; it hands out nothing but atomic words that borrow it. Another process may change them at any
//!    time, which atomics allow. Who shortens the file makes the next access a SIGBUS: an end, not a wrong value.
//! 6. `read` writes at most the length that it is given, into atomic words, which may change under a shared
//!    reference.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Setter, Updater, opcode};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::Pid;

use crate::unit::{HostAddr, length};

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// What was copied, or a negative error.
    copy: i64,
}

#[repr(C)]
struct Zeropage {
    range: Range,
    mode: u64,
    /// What was filled, or a negative error.
    zeropage: i64,
}

const GROUP: u8 = 0xaa;
/// `_IOR` in the header, although the kernel only reads it.
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<Zeropage>(GROUP, 0x04);

/// All that a [`Uffd`] is asked for.
pub(crate) const UFFD_OPERATIONS: [Opcode; 3] = [UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_ZEROPAGE];

/// The words of one `struct uffd_msg`.
pub(crate) const MESSAGE_WORDS: usize = 4;

/// What a userfaultfd says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// A thread waits for the page at this address.
    Missing { address: HostAddr },
    /// The pages of this range are being dropped.
    Remove { start: HostAddr, end: HostAddr },
    /// Something that Firecracker never asks for.
    Other { event: u8 },
}

impl Message {
    /// From the words of a `struct uffd_msg`.
    pub(crate) fn parse(words: [u64; MESSAGE_WORDS]) -> Message {
        const PAGEFAULT: u8 = 0x12;
        const REMOVE: u8 = 0x15;
        const FLAG_WRITE: u64 = 1;
        match words[0].to_ne_bytes()[0] {
            // Any other flag is a write-protect or minor fault.
            PAGEFAULT if words[1] & !FLAG_WRITE == 0 => Message::Missing {
                address: HostAddr::new(words[2]),
            },
            REMOVE => Message::Remove {
                start: HostAddr::new(words[1]),
                end: HostAddr::new(words[2]),
            },
            event => Message::Other { event },
        }
    }
}

/// Another process's userfaultfd, non-blocking.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Takes a descriptor that a stranger says is a userfaultfd; gives it back if it is none.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Uffd, OwnedFd> {
        let uffd = Uffd { fd };
        // Harms nobody: who is woken for a page that is still missing faults again. What is not an initialised
        // userfaultfd refuses it.
        if uffd.wake(HostAddr::new(1 << 20), 4096).is_err() {
            return Err(uffd.fd);
        }
        Ok(uffd)
    }

    /// Poll answers POLLERR on a blocking userfaultfd, and a read would hang.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.fd)?;
        Ok(rustix::fs::fcntl_setfl(&self.fd, flags | OFlags::NONBLOCK)?)
    }

    /// Fills missing memory at `dst` with `src` and wakes who waits for it.
    ///
    /// Whole pages only. The answer is how far it got, which can be less than asked for.
    pub(crate) fn copy(&self, dst: HostAddr, src: &[u8]) -> Result<u64, Errno> {
        let len = length(src.len());
        let mut arg = Copy {
            dst: dst.get(),
            src: length(src.as_ptr().addr()),
            len,
            mode: 0,
            copy: 0,
        };
        // SAFETY: rules 1 and 2: the struct is the one that the operation reads and writes.
        let call = unsafe { Updater::<UFFDIO_COPY, Copy>::new(&mut arg) };
        // SAFETY: rules 1, 2 and 3.
        let result = unsafe { ioctl::ioctl(&self.fd, call) };
        progress(result, len, arg.copy)
    }

    /// Fills missing memory with zeros and wakes who waits for it. Not for hugetlbfs.
    pub(crate) fn zeropage(&self, start: HostAddr, len: u64) -> Result<u64, Errno> {
        let mut arg = Zeropage {
            range: Range {
                start: start.get(),
                len,
            },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: rule 1: the struct is the one that the operation reads and writes.
        let call = unsafe { Updater::<UFFDIO_ZEROPAGE, Zeropage>::new(&mut arg) };
        // SAFETY: rules 1 and 3.
        let result = unsafe { ioctl::ioctl(&self.fd, call) };
        progress(result, len, arg.zeropage)
    }

    /// Wakes who waits in this range; a page that is still missing faults again.
    pub(crate) fn wake(&self, start: HostAddr, len: u64) -> Result<(), Errno> {
        let range = Range {
            start: start.get(),
            len,
        };
        // SAFETY: rule 1: the struct is the one that the operation reads.
        let call = unsafe { Setter::<UFFDIO_WAKE, Range>::new(range) };
        // SAFETY: rule 1.
        unsafe { ioctl::ioctl(&self.fd, call) }
    }

    /// Reads what the descriptor has to say now, at most as much as fits, straight into shared memory: there
    /// it outlasts this process. Tells how many messages; `WOULDBLOCK` when there are none.
    pub(crate) fn read(&self, inbox: &[AtomicU64]) -> Result<usize, Errno> {
        // SAFETY: rule 6: the length is that of the slice.
        let n = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                inbox.as_ptr().cast_mut().cast(),
                size_of_val(inbox),
            )
        };
        match usize::try_from(n) {
            Ok(n) => Ok(n / (MESSAGE_WORDS * 8)),
            Err(_) => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A file in memory, as words that any process may change.
#[derive(Debug)]
pub(crate) struct SharedMap {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: rule 5: all that is reached through it are atomics, and nothing is bound to a thread.
unsafe impl Send for SharedMap {}
// SAFETY: as above.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps the first `words` words of a file, to be read and written.
    pub(crate) fn of(file: impl AsFd, words: usize) -> io::Result<SharedMap> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: rule 5: a null hint, so no memory of ours is replaced.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), words * 8, protection, flags, file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(SharedMap { start, words })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: rule 5: the mapping is that long, aligned to pages, and outlives the borrow.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: rule 5: mapped in `of`, and no borrow is left.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

/// How far an operation of `len` bytes got: the kernel fails with `AGAIN` when it did a part, and tells in
/// `done` how much; below zero that is the error once more.
fn progress(result: Result<(), Errno>, len: u64, done: i64) -> Result<u64, Errno> {
    match (result, u64::try_from(done)) {
        (Ok(()), _) => Ok(len),
        (Err(_), Ok(done @ 1..)) => Ok(done),
        (Err(errno), _) => Err(errno),
    }
}

/// The process that connected a Unix socket; `None` if this process's PID namespace does not show it.
///
/// `rustix` has this call, but for a pid that cannot be 0, which is what the kernel says in that case.
pub(crate) fn peer_pid(socket: BorrowedFd<'_>) -> io::Result<Option<Pid>> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let size = size_of::<libc::ucred>();
    let mut len = libc::socklen_t::try_from(size).expect("twelve bytes");
    let fd = socket.as_raw_fd();
    let value = (&raw mut peer).cast();
    // SAFETY: rule 4: `value` points to `len` bytes of plain integers.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(if peer.pid > 0 {
        Pid::from_raw(peer.pid)
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    fn message(event: u8, words: [u64; 3]) -> [u64; MESSAGE_WORDS] {
        [u64::from(event), words[0], words[1], words[2]]
    }

    #[test]
    fn messages_are_read_as_the_kernel_lays_them_out() {
        let at = HostAddr::new;
        let missing = Message::Missing {
            address: at(0x5000),
        };
        assert_eq!(Message::parse(message(0x12, [0, 0x5000, 7])), missing);
        assert_eq!(Message::parse(message(0x12, [1, 0x5000, 7])), missing);
        assert_eq!(
            Message::parse(message(0x15, [0x1000, 0x3000, 0])),
            Message::Remove {
                start: at(0x1000),
                end: at(0x3000)
            }
        );
        // A write-protect fault, a minor fault, a fork, an unmap.
        for (event, flags) in [(0x12, 2), (0x12, 4), (0x13, 0), (0x16, 0)] {
            assert_eq!(
                Message::parse(message(event, [flags, 0, 0])),
                Message::Other { event }
            );
        }
    }

    #[test]
    fn two_maps_of_a_file_see_each_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let (one, other) = (
            SharedMap::of(&file, 1024).unwrap(),
            SharedMap::of(&file, 1024).unwrap(),
        );
        one.words()[1023].store(7, Ordering::Relaxed);
        assert_eq!(other.words()[1023].load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_negative_count_is_an_error_and_a_positive_one_is_progress() {
        assert_eq!(progress(Ok(()), 8192, 8192), Ok(8192));
        assert_eq!(progress(Err(Errno::AGAIN), 8192, 4096), Ok(4096));
        assert_eq!(progress(Err(Errno::AGAIN), 8192, -11), Err(Errno::AGAIN));
        assert_eq!(progress(Err(Errno::AGAIN), 8192, 0), Err(Errno::AGAIN));
        assert_eq!(progress(Err(Errno::EXIST), 8192, -17), Err(Errno::EXIST));
    }

    #[test]
    fn the_operation_codes_are_those_of_the_kernels_header() {
        assert_eq!(
            (UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_ZEROPAGE),
            (0x8010_aa02, 0xc028_aa03, 0xc020_aa04)
        );
    }

    #[test]
    fn a_file_is_no_userfaultfd() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(Uffd::adopt(null.into()).is_err());
    }
}
