//! Holes in files: finding, keeping and making them.

use crate::file::{At, FileError, create_new};
use crate::unit::{ByteSize, PAGE_SIZE, index, length};
use rustix::fs::{self, FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The next stretch of data at or after `from`, before `end`, in bytes.
///
/// A file system that keeps no holes says that all of it is data, which is right, if slow.
pub(crate) fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if from >= end {
        return Ok(None);
    }
    let start = match fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..stop.min(end)))
}

/// Copies `range` of `from` to the same place in `to`, in the kernel where it can.
pub(crate) fn copy_range(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let (mut read_at, mut write_at) = (range.start, range.start);
    while read_at < range.end {
        let wanted = index(range.end - read_at);
        match fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Two file systems, or one that cannot.
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return copy_by_hand(from, to, read_at..range.end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let wanted = index((range.end - at).min(length(buffer.len())));
        let piece = &mut buffer[..wanted];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += length(wanted);
    }
    Ok(())
}

/// Copies the data of `from` into the new, empty file `to`, and leaves its holes holes. Given up with
/// [`io::ErrorKind::Interrupted`] when `goes_on`, which is asked now and then, says so.
pub(crate) fn copy_sparse(
    from: &File,
    to: &File,
    size: ByteSize,
    goes_on: &dyn Fn() -> bool,
) -> io::Result<()> {
    /// Some milliseconds of work.
    const PIECE: u64 = 16 << 20;
    to.set_len(size.get())?;
    let mut at = 0;
    while let Some(data) = next_data(from, at, size.get())? {
        if !goes_on() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        at = data.end.min(data.start + PIECE);
        copy_range(from, to, data.start..at)?;
    }
    Ok(())
}

/// Turns `range` into a hole, if the file system can; its bytes must be zero already.
pub(crate) fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fs::fallocate(file, mode, range.start, range.end - range.start) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether holes say which pages were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holes {
    /// A page that was not written is a hole.
    Exact,
    /// The file system rounds what was written up to more than a page, or keeps no holes at all.
    Coarse,
}

/// Tries in the file `scratch`, which is made and removed again, whether the file system keeps holes of a page.
///
/// In a Diff a page of zeros and a page that was not written mean different things, and on a file system
/// with large blocks, or on a tmpfs with huge pages, both look like data.
pub(crate) fn probe_holes(scratch: &Path) -> Result<Holes, FileError> {
    const SPAN: u64 = 4 << 20;
    const PAGE: Range<u64> = (SPAN / 2 + 3 * PAGE_SIZE)..(SPAN / 2 + 4 * PAGE_SIZE);
    let file = create_new(scratch)?;
    let probe = || -> io::Result<Holes> {
        file.set_len(SPAN)?;
        file.write_all_at(&[1; 4096], PAGE.start)?;
        let first = next_data(&file, 0, SPAN)?;
        let second = next_data(&file, PAGE.end, SPAN)?;
        Ok(if first == Some(PAGE) && second.is_none() {
            Holes::Exact
        } else {
            Holes::Coarse
        })
    };
    let found = probe().at("probe the holes of", scratch);
    std::fs::remove_file(scratch).at("remove", scratch)?;
    found
}
