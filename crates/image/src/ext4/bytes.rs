//! Numbers at their place in a structure on disk; ext4 is little-endian.

/// A structure of `N` bytes in the making.
#[derive(Debug, Clone)]
pub(super) struct Bytes<const N: usize>(pub(super) [u8; N]);

impl<const N: usize> Bytes<N> {
    pub(super) fn new() -> Self {
        Self([0; N])
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn u16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }
}

/// The lower 32 bits of a number.
pub(super) fn low(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or_default()
}

/// Bits 32 to 47 of a number.
pub(super) fn high(value: u64) -> u16 {
    u16::try_from(value >> 32 & u64::from(u16::MAX)).unwrap_or_default()
}

/// The lower and the upper half of a number.
pub(super) fn halves(value: u32) -> (u16, u16) {
    let [a, b, c, d] = value.to_le_bytes();
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}
