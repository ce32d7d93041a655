//! The host's huge pages, as many as a test needs.

use std::fs;
use std::io;

const LIMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

/// The kernel's limit of huge pages made on demand, changed for a test and put back when this is dropped. All tests of
/// the host share it.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// No more than so many.
    ///
    /// # Errors
    /// When the limit cannot be read or written, which only root may.
    pub fn limited_to(pages: u64) -> io::Result<HugePages> {
        let before = limit()?;
        fs::write(LIMIT, pages.to_string())?;
        Ok(HugePages { before })
    }

    /// So many more than there may be anyway.
    ///
    /// # Errors
    /// As [`HugePages::limited_to`].
    pub fn more(pages: u64) -> io::Result<HugePages> {
        HugePages::limited_to(limit()? + pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The next test does not depend on it.
        let _ = fs::write(LIMIT, self.before.to_string());
    }
}

fn limit() -> io::Result<u64> {
    let text = fs::read_to_string(LIMIT)?;
    text.trim().parse().map_err(io::Error::other)
}
