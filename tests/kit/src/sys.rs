//! Guest memory as Firecracker makes it: mapped, registered with a userfaultfd, touched by several threads.
//!
//! # Safety model
//!
//! 1. A [`Mapping`] is anonymous memory that nothing else points to, mapped for as long as the value lives;
//!    every offset is checked against its length before it becomes a pointer.
//! 2. Its bytes are read and written as relaxed atomics of eight bytes, at addresses that are multiples of
//!    eight. So threads, and a page server that fills a page under them, cannot race in Rust's sense, and
//!    any value is valid.
//! 3. `madvise` drops pages of a mapping. No reference into a mapping exists outside of one atomic access.
//! 4. The `ioctl`s get the structs of `linux/userfaultfd.h`; the codes are made from their sizes. They fill
//!    missing pages of a mapping that was registered, which rule 2 allows for.
//! 5. A slice over a mapping is made only for the length of one `write`, by a caller who promises that no
//!    thread writes to that memory meanwhile. A page that comes in under it does not change a byte that was read before.
//! 6. A userfaultfd is created by a process for itself and only used on its mappings.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Updater, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap};

const WORD: usize = size_of::<u64>();

/// What memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Of 4 KiB.
    Small,
    /// Of 2 MiB, from hugetlbfs.
    Huge,
}

/// Private anonymous memory without a reservation, as Firecracker maps a guest's.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: rule 2: all access goes through atomics.
unsafe impl Send for Mapping {}
// SAFETY: rule 2: all access goes through atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes.
    pub fn new(len: usize, pages: Pages) -> io::Result<Mapping> {
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if pages == Pages::Huge {
            flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        // SAFETY: rule 1: a new mapping, at an address that the kernel chooses.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        Ok(Mapping {
            base: base.cast(),
            len,
        })
    }

    /// Where it starts in this process.
    pub fn address(&self) -> u64 {
        self.base.addr().try_into().expect("an address has 64 bits")
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            offset.is_multiple_of(WORD) && offset + WORD <= self.len,
            "word at {offset:#x}"
        );
        // SAFETY: rule 1: the word lies in the mapping.
        let at = unsafe { self.base.add(offset) };
        // SAFETY: rules 1 and 2: mapped, aligned, and only ever accessed like this.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// Reads a word as a guest would: a missing page faults.
    pub fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Writes a word as a guest would: a missing page faults.
    pub fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// Drops pages as a balloon does; blocks until the page server has read the event.
    pub fn drop_pages(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(
            offset + len <= self.len,
            "dropping {len:#x} bytes at {offset:#x}"
        );
        // SAFETY: rule 1: the range lies in the mapping.
        let at = unsafe { self.base.add(offset) };
        // SAFETY: rules 1 and 3.
        Ok(unsafe { madvise(at.cast(), len, Advice::LinuxDontNeed) }?)
    }

    /// Writes all of it to a file, the kernel touching the pages: what a Full snapshot does.
    ///
    /// No thread may write to it meanwhile.
    pub fn write_to(&self, file: impl AsFd) -> io::Result<()> {
        let mut done = 0;
        while done < self.len {
            // SAFETY: rule 1: the rest lies in the mapping.
            let at = unsafe { self.base.add(done) };
            // SAFETY: rule 5, by this function's contract.
            let rest = unsafe { std::slice::from_raw_parts(at, self.len - done) };
            match rustix::io::write(&file, rest) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: rule 1: it is this mapping, and its last use.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const GROUP: u8 = 0xaa;
const UFFDIO_API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const UFFDIO_COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const API_VERSION: u64 = 0xaa;
const EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;
const COPY_DONT_WAKE: u64 = 1;

/// Whether reading from a userfaultfd waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocking {
    /// As Firecracker makes it.
    No,
    /// As it must not be.
    Yes,
}

/// A userfaultfd of this process with the one feature that Firecracker asks for, EVENT_REMOVE.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes one. Needs root, or `vm.unprivileged_userfaultfd`.
    pub fn new(blocking: Blocking) -> io::Result<Uffd> {
        let mut flags = UserfaultfdFlags::CLOEXEC;
        if blocking == Blocking::No {
            flags |= UserfaultfdFlags::NONBLOCK;
        }
        // SAFETY: rule 6.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = Api {
            api: API_VERSION,
            features: EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: rule 4.
        let call = unsafe { Updater::<UFFDIO_API, Api>::new(&mut api) };
        // SAFETY: rule 4.
        unsafe { ioctl::ioctl(&fd, call) }?;
        Ok(Uffd { fd })
    }

    /// Registers a mapping for missing pages.
    pub fn register(&self, mapping: &Mapping) -> io::Result<()> {
        let len = mapping.len().try_into().expect("a length has 64 bits");
        let mut arg = Register {
            start: mapping.address(),
            len,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: rule 4.
        let call = unsafe { Updater::<UFFDIO_REGISTER, Register>::new(&mut arg) };
        // SAFETY: rules 4 and 6.
        Ok(unsafe { ioctl::ioctl(&self.fd, call) }?)
    }

    /// Fills missing pages at an address without waking who waits for them.
    pub fn copy_without_wake(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let src = bytes
            .as_ptr()
            .addr()
            .try_into()
            .expect("an address has 64 bits");
        let len = bytes.len().try_into().expect("a length has 64 bits");
        let mut arg = Copy {
            dst: address,
            src,
            len,
            mode: COPY_DONT_WAKE,
            copy: 0,
        };
        // SAFETY: rule 4; the source is a slice.
        let call = unsafe { Updater::<UFFDIO_COPY, Copy>::new(&mut arg) };
        // SAFETY: rules 4 and 6.
        Ok(unsafe { ioctl::ioctl(&self.fd, call) }?)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
