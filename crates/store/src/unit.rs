//! The address spaces of a memory file, each with a type of its own.
//!
//! ```text
//! PageNumber ──offset()──► ByteOffset        PageCount ──bytes()──► ByteSize
//!            ◄──page()────                              ◄──pages()──
//! ```

use serde::{Deserialize, Serialize};
use std::fmt;

/// The size of the pages that a `pages` file describes, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The size of the huge pages that a guest's memory can be made of, in bytes.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// The size of the blocks of memory that have a digest each, in bytes.
pub const BLOCK_SIZE: u64 = 64 * 1024;

/// How many pages a block of memory holds.
pub const PAGES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE_SIZE;

/// The index of a 4 KiB page in a memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(u64);

/// A number of 4 KiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(u64);

/// A distance in bytes from the start of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteOffset(u64);

/// A length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(u64);

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first of them.
    pub first: PageNumber,
    /// How many they are.
    pub count: PageCount,
}

impl PageNumber {
    /// The page with this index.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The index.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Where the page starts in its memory file; saturates beyond the largest file there can be.
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0.saturating_mul(PAGE_SIZE))
    }
}

impl PageCount {
    /// This many pages.
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// How many bytes they take; saturates beyond the largest file there can be.
    pub const fn bytes(self) -> ByteSize {
        ByteSize(self.0.saturating_mul(PAGE_SIZE))
    }
}

impl ByteOffset {
    /// This many bytes from the start.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page that holds the byte at this offset.
    pub const fn page(self) -> PageNumber {
        PageNumber(self.0 / PAGE_SIZE)
    }
}

impl ByteSize {
    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// How many pages it takes to hold this much.
    pub const fn pages(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE))
    }
}

impl PageRange {
    /// The page after the last one.
    pub const fn end(self) -> PageNumber {
        PageNumber(self.first.0.saturating_add(self.count.0))
    }
}

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An index into memory of our own.
///
/// KVM hosts that Firecracker knows have 64-bit addresses, so nothing is lost.
pub(crate) fn index(n: u64) -> usize {
    const { assert!(usize::BITS >= u64::BITS, "rekindle needs a 64-bit host") };
    usize::try_from(n).expect("usize holds a u64 here")
}

/// A length of our own memory, as a file would count it.
pub(crate) fn length(n: usize) -> u64 {
    const { assert!(usize::BITS <= u64::BITS) };
    u64::try_from(n).expect("u64 holds a usize here")
}
