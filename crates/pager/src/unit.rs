//! The address spaces of a guest's memory, each with a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An address in Firecracker's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostAddr(u64);

/// A distance in bytes from the start of the guest's memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemoryOffset(u64);

/// A page of the guest's memory, counted from the start of the memory file in pages of the VM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(u64);

/// Pages that follow each other in the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The first of them.
    pub first: PageIndex,
    /// How many they are.
    pub count: u64,
}

/// What a VM's memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB, of hugetlbfs.
    Huge,
}

impl HostAddr {
    /// This address.
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl MemoryOffset {
    /// This many bytes from the start.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl PageIndex {
    /// The page with this index.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The index.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page that many further on.
    #[must_use]
    pub const fn plus(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            PageSize::Small => 4096,
            PageSize::Huge => 2 << 20,
        }
    }

    /// The size of this many bytes, if it is one.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(PageSize::Small),
            0x20_0000 => Some(PageSize::Huge),
            _ => None,
        }
    }
}

impl fmt::Display for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for MemoryOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A size or position in our own memory. KVM hosts that Firecracker knows have 64-bit addresses.
pub(crate) fn index(n: u64) -> usize {
    const {
        assert!(
            usize::BITS >= u64::BITS,
            "the page server needs a 64-bit host"
        )
    };
    usize::try_from(n).expect("usize holds a u64 here")
}

/// A length of our own memory, as an offset counts it.
pub(crate) fn length(n: usize) -> u64 {
    const { assert!(usize::BITS <= u64::BITS) };
    u64::try_from(n).expect("u64 holds a usize here")
}
