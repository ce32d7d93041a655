//! Copying a disk: shared with the original where the file system can, else its data alone.

use crate::file::{At, FileError, create_new, open_regular, size};
use crate::sparse::copy_sparse;
use rustix::fs::ioctl_ficlone;
use std::path::Path;

/// How a disk was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// Both files share their blocks until one of them is written to.
    Reflink,
    /// The data was copied, holes stayed holes.
    Sparse,
}

/// Copies the disk `from` to the new file `to`, which is its owner's alone; if that fails, `to` is gone again.
///
/// The copy is not yet durable.
///
/// # Errors
/// [`FileError::NotRegular`] if `from` is anything else than a regular file, [`FileError::NoSpace`] if the
/// disk is full, [`FileError::Io`] for the rest, such as a `to` that exists.
pub fn copy_disk(from: &Path, to: &Path) -> Result<Copied, FileError> {
    copy_disk_while(from, to, &|| true)
}

/// [`copy_disk`], as long as `goes_on` says so. It is asked every few milliseconds.
///
/// # Errors
/// As [`copy_disk`]; [`FileError::Io`] with [`std::io::ErrorKind::Interrupted`] when it was given up.
pub fn copy_disk_while(
    from: &Path,
    to: &Path,
    goes_on: &dyn Fn() -> bool,
) -> Result<Copied, FileError> {
    let source = open_regular(from)?;
    let copy = create_new(to)?;
    // Whatever stands in the way of sharing, the copy below meets it as well, if it matters.
    if ioctl_ficlone(&copy, &source).is_ok() {
        return Ok(Copied::Reflink);
    }
    let copied = size(&source, from)
        .and_then(|size| copy_sparse(&source, &copy, size, goes_on).at("copy to", to));
    if copied.is_err() {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(to);
    }
    copied.map(|()| Copied::Sparse)
}
