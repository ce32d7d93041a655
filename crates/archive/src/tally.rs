//! What a copy has done so far.

use std::path::{Path, PathBuf};

use crate::record::Special;

/// So many of what was left out are named; the rest is counted.
const NAMED: usize = 16;

/// Counts of what was copied, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tally {
    /// Files that are complete.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Bytes of data in files; holes are not counted.
    pub bytes: u64,
    /// How many sockets, FIFOs and devices were left out.
    pub skipped: u64,
    /// The first of those, seen from where the copy began.
    pub examples: Vec<(PathBuf, Special)>,
}

impl Tally {
    pub(crate) fn skip(&mut self, path: &Path, what: Special) {
        self.skipped += 1;
        if self.examples.len() < NAMED {
            self.examples.push((path.to_owned(), what));
        }
    }
}
