//! How much an image may be: what a stranger's archive can make this host do.

/// Bounds on what is read. Each has room for images of every day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of files, all layers together, unpacked, holes included.
    pub bytes: u64,
    /// Entries of archives, all layers together.
    pub entries: u64,
}

impl Limits {
    /// 32 GiB, which `--max-size` changes.
    pub const DEFAULT_BYTES: u64 = 32 << 30;
    /// Two million.
    pub const DEFAULT_ENTRIES: u64 = 2_000_000;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: Self::DEFAULT_BYTES,
            entries: Self::DEFAULT_ENTRIES,
        }
    }
}
