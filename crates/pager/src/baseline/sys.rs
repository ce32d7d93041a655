//! A file in memory, which `rustix` does not offer in a safe form.
//!
//! # Safety model
//!
//! 1. `mmap` chooses the address of a new, private, read-only mapping, so it changes none that is there.
//! 2. A [`Mapping`] holds the address and length of a mapping that nobody else knows, from the `mmap` that made it to
//!    the `munmap` of its drop.
//! 3. A slice of it is given out only inside of this crate, whose benches own the file: nobody writes to it or cuts it
//!    short while it is served. (The page server proper reads its files instead, for that reason.)
//! 4. `mincore` writes one byte for each page of the mapping into a buffer of that length, and reads none of it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// All of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

impl Mapping {
    pub(super) fn of(file: &File, len: NonZeroUsize) -> io::Result<Mapping> {
        // SAFETY: rule 1.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                len.get(),
                ProtFlags::READ,
                MapFlags::PRIVATE,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Mapping { start, len })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: rules 2 and 3.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len.get()) }
    }

    /// One byte a page, whose lowest bit says that the page is in the page cache.
    pub(super) fn cached(&self) -> io::Result<Vec<u8>> {
        let mut pages = vec![0; self.len.get().div_ceil(4096)];
        // SAFETY: rules 2 and 4.
        let result = unsafe {
            libc::mincore(
                self.start.as_ptr().cast(),
                self.len.get(),
                pages.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pages)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: rule 2; no slice of it lives longer than this.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len.get()) };
    }
}
