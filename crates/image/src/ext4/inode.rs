//! An inode of 256 bytes.

use crate::ext4::bytes::{Bytes, halves, high, low};
use crate::spool::{BLOCK, length};
use crate::tree::{Body, Device, Inode, Time};

/// The size of an inode.
pub(super) const SIZE: usize = 256;
/// Targets shorter than this are in the inode itself.
pub(super) const FAST_SYMLINK: usize = 60;

const USES_EXTENTS: u32 = 0x8_0000;
/// How much of the inode behind the first 128 bytes has fields.
const EXTRA: u16 = 32;

/// Where the map of blocks, a short target or a device's numbers stand.
const BLOCK_MAP: usize = 40;

pub(super) struct Raw {
    bytes: Bytes<SIZE>,
    /// In blocks, data and what leads to it.
    blocks: u64,
}

impl Raw {
    pub(super) fn new(inode: &Inode, links: u32) -> Self {
        let mut bytes = Bytes::new();
        let meta = &inode.meta;
        bytes.u16(0, kind(&inode.body) | meta.mode & 0o7777);
        let ((uid_low, uid_high), (gid_low, gid_high)) = (halves(meta.uid), halves(meta.gid));
        bytes.u16(2, uid_low);
        bytes.u16(24, gid_low);
        bytes.u16(120, uid_high);
        bytes.u16(122, gid_high);
        bytes.u16(26, u16::try_from(links).unwrap_or(u16::MAX));
        bytes.u16(128, EXTRA);
        let (seconds, extra) = time(meta.mtime);
        // Access, change, modification, creation: nobody has seen it at another time.
        for (at, at_extra) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
            bytes.u32(at, seconds);
            bytes.u32(at_extra, extra);
        }
        Self { bytes, blocks: 0 }
    }

    pub(super) fn size(&mut self, size: u64) {
        self.bytes.u32(4, low(size));
        self.bytes.u32(108, low(size >> 32));
    }

    pub(super) fn extents(&mut self, root: &[u8; 60], blocks: u64) {
        self.bytes.u32(32, USES_EXTENTS);
        self.bytes.put(BLOCK_MAP, root);
        self.blocks += blocks;
    }

    pub(super) fn symlink(&mut self, target: &[u8]) {
        self.bytes.put(BLOCK_MAP, target);
        self.size(length(target.len()));
    }

    /// As `old_encode_dev` and `new_encode_dev` of the kernel.
    pub(super) fn device(&mut self, Device { major, minor }: Device) {
        if major < 256 && minor < 256 {
            self.bytes.u32(BLOCK_MAP, major << 8 | minor);
        } else {
            let number = minor & 0xff | major << 8 | (minor & !0xff) << 12;
            self.bytes.u32(BLOCK_MAP + 4, number);
        }
    }

    pub(super) fn attributes(&mut self, bytes: &[u8]) {
        self.bytes.put(128 + usize::from(EXTRA), bytes);
    }

    pub(super) fn attribute_block(&mut self, block: u64) {
        self.bytes.u32(104, low(block));
        self.bytes.u16(118, high(block));
        self.blocks += 1;
    }

    pub(super) fn finish(mut self) -> [u8; SIZE] {
        let sectors = self.blocks * length(BLOCK / 512);
        self.bytes.u32(28, low(sectors));
        self.bytes.u16(116, high(sectors));
        self.bytes.0
    }
}

fn kind(body: &Body) -> u16 {
    match body {
        Body::Fifo => 0o010_000,
        Body::Character(_) => 0o020_000,
        Body::Directory(_) => 0o040_000,
        Body::Block(_) => 0o060_000,
        Body::File(_) => 0o100_000,
        Body::Symlink(_) => 0o120_000,
    }
}

/// 32 bits of seconds; and two more, which reach to 2446, with the nanoseconds.
fn time(time: Time) -> (u32, u32) {
    const FIRST: i64 = -(1 << 31);
    const LAST: i64 = (1 << 34) + FIRST - 1;
    let seconds = time.seconds.clamp(FIRST, LAST);
    let epoch = low((seconds - FIRST).unsigned_abs() >> 32);
    let low_seconds = low(seconds.cast_unsigned());
    (low_seconds, time.nanoseconds << 2 | epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_wrap_as_the_kernel_unwraps_them() {
        for seconds in [
            0,
            1,
            -1,
            i64::from(i32::MAX),
            1 << 31,
            1 << 32,
            -(1 << 31),
            15_032_385_535,
        ] {
            let (low, extra) = time(Time {
                seconds,
                nanoseconds: 5,
            });
            // `ext4_decode_extra_time`.
            let decoded = i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32);
            assert_eq!((decoded, extra >> 2), (seconds, 5), "{seconds}");
        }
    }
}
