//! How large the file system is, and where what belongs to all of it stands.

use std::ops::Range;

use crate::ext4::{Ext4Error, MAX_SIZE};
use crate::spool::{BLOCK, length};

/// How many blocks, and at most how many inodes, a group has: the bits of a block.
pub(super) const PER_GROUP: u64 = 8 * 4096;
/// A group's descriptor, in bytes.
pub(super) const DESCRIPTOR: usize = 32;
/// What is left free, for guests that write to the image itself: 64 MiB.
const FREE: u64 = 16 * 1024;
/// What the copies of the superblock can cost the trees of extents whose files they cut in two.
const CUTS: u64 = 256;
/// The size of an image is a multiple of this many blocks: 1 MiB.
const STEP: u64 = 256;
/// No group is smaller than this many blocks.
const SMALLEST_GROUP: u64 = 1024;
const INODES_A_BLOCK: u64 = 16;

/// What the contents take.
pub(super) struct Needs {
    /// Inodes, reserved ones included.
    inodes: u32,
    /// Blocks, without those of [`Layout`].
    pub(super) blocks: u64,
}

impl Needs {
    pub(super) fn new(inodes: u32) -> Self {
        Self { inodes, blocks: 0 }
    }
}

/// Where things are.
pub(super) struct Layout {
    blocks: u64,
    inodes_per_group: u64,
    block_bitmaps: Vec<u64>,
    inode_bitmaps: Vec<u64>,
    inode_tables: Vec<u64>,
}

impl Layout {
    /// The smallest that has room for the contents.
    pub(super) fn new(needs: &Needs, min_size: u64) -> Result<(Self, Allocator), Ext4Error> {
        let (blocks, inodes_per_group) = sizes(needs, min_size);
        let size = blocks * length(BLOCK);
        if size > MAX_SIZE {
            return Err(Ext4Error::TooLarge { size });
        }
        let groups = blocks.div_ceil(PER_GROUP);
        let mut allocator = Allocator::new(blocks);
        let mut all = |size| {
            (0..groups)
                .map(|_| allocator.take_whole(size))
                .collect::<Result<Vec<_>, _>>()
        };
        let layout = Self {
            blocks,
            inodes_per_group,
            block_bitmaps: all(1)?,
            inode_bitmaps: all(1)?,
            inode_tables: all(inodes_per_group / INODES_A_BLOCK)?,
        };
        Ok((layout, allocator))
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.blocks * length(BLOCK)
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn groups(&self) -> u32 {
        narrow(self.blocks.div_ceil(PER_GROUP))
    }

    pub(super) fn inodes_per_group(&self) -> u32 {
        narrow(self.inodes_per_group)
    }

    /// The groups that have a copy of superblock and descriptors, the first one too.
    pub(super) fn copies(&self) -> impl Iterator<Item = u32> {
        copies(u64::from(self.groups())).map(narrow)
    }

    pub(super) fn first_block(&self, group: u32) -> u64 {
        u64::from(group) * PER_GROUP
    }

    pub(super) fn block_bitmap_at(&self, group: u32) -> u64 {
        at(&self.block_bitmaps, group)
    }

    pub(super) fn inode_bitmap_at(&self, group: u32) -> u64 {
        at(&self.inode_bitmaps, group)
    }

    pub(super) fn inode_table(&self, group: u32) -> u64 {
        at(&self.inode_tables, group)
    }

    /// Which of a group's blocks are taken; those beyond the end are.
    pub(super) fn block_bitmap(&self, group: u32, allocator: &Allocator) -> Vec<u8> {
        let first = self.first_block(group);
        let mut bitmap = vec![0; BLOCK];
        let mut mark = |range: &Range<u64>, value| {
            let bit = |block: u64| block.clamp(first, first + PER_GROUP) - first;
            set(&mut bitmap, bit(range.start)..bit(range.end), value);
        };
        mark(&(0..allocator.next), true);
        for skipped in &allocator.skipped {
            mark(skipped, false);
        }
        for copy in &allocator.reserved {
            mark(copy, true);
        }
        mark(&(self.blocks..u64::MAX), true);
        bitmap
    }

    /// Which of a group's inodes are taken; those that it has not are.
    pub(super) fn inode_bitmap(&self, group: u32, used: u32) -> Vec<u8> {
        let mut bitmap = vec![0; BLOCK];
        let taken = u64::from(used).saturating_sub(u64::from(group) * self.inodes_per_group);
        set(&mut bitmap, 0..taken.min(self.inodes_per_group), true);
        set(&mut bitmap, self.inodes_per_group..PER_GROUP, true);
        bitmap
    }
}

/// How many blocks, and how many inodes a group.
fn sizes(needs: &Needs, min_size: u64) -> (u64, u64) {
    // A quarter of them, and a thousand, are left.
    let inodes = u64::from(needs.inodes) + u64::from(needs.inodes) / 4 + 1024;
    let mut groups = inodes.div_ceil(PER_GROUP);
    loop {
        let per_group = inodes.div_ceil(groups).next_multiple_of(INODES_A_BLOCK);
        let table = per_group / INODES_A_BLOCK;
        let with_copy = length(copies(groups).count());
        let own = groups * (2 + table) + with_copy * (1 + descriptor_blocks(groups) + table);
        let wanted = (needs.blocks + own + FREE + CUTS).max(min_size.div_ceil(length(BLOCK)));
        // As many groups as the inodes want, and the last one not too small.
        let mut blocks = wanted
            .next_multiple_of(STEP)
            .max((groups - 1) * PER_GROUP + SMALLEST_GROUP);
        let rest = blocks % PER_GROUP;
        if rest != 0 && rest < SMALLEST_GROUP {
            blocks += SMALLEST_GROUP - rest;
        }
        if blocks.div_ceil(PER_GROUP) == groups {
            return (blocks, per_group);
        }
        groups = blocks.div_ceil(PER_GROUP);
    }
}

fn descriptor_blocks(groups: u64) -> u64 {
    (groups * length(DESCRIPTOR)).div_ceil(length(BLOCK))
}

/// 0, 1, and the powers of 3, 5 and 7 (`sparse_super`), in order.
fn copies(groups: u64) -> impl Iterator<Item = u64> {
    let mut all = vec![0, 1];
    for base in [3_u64, 5, 7] {
        let powers = std::iter::successors(Some(base), |power| power.checked_mul(base));
        all.extend(powers.take_while(|power| *power < groups));
    }
    all.sort_unstable();
    all.into_iter().filter(move |group| *group < groups)
}

fn set(bitmap: &mut [u8], bits: Range<u64>, value: bool) {
    for bit in bits {
        let byte = &mut bitmap[usize::try_from(bit / 8).unwrap_or(usize::MAX)];
        let mask = 1 << (bit % 8);
        if value {
            *byte |= mask;
        } else {
            *byte &= !mask;
        }
    }
}

fn at(blocks: &[u64], group: u32) -> u64 {
    blocks[usize::try_from(group).unwrap_or(usize::MAX)]
}

/// Groups and inodes have 32 bits at the most, since [`MAX_SIZE`] is what it is.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Gives out blocks from front to back, around the copies of the superblock.
pub(super) struct Allocator {
    next: u64,
    end: u64,
    /// The superblock and its copies, with the descriptors.
    reserved: Vec<Range<u64>>,
    /// Free stretches before `next`, too short for what was to be in one piece.
    skipped: Vec<Range<u64>>,
}

impl Allocator {
    fn new(blocks: u64) -> Self {
        let groups = blocks.div_ceil(PER_GROUP);
        let size = 1 + descriptor_blocks(groups);
        let reserved = copies(groups).map(|group| group * PER_GROUP..group * PER_GROUP + size);
        Self {
            next: 0,
            end: blocks,
            reserved: reserved.collect(),
            skipped: Vec::new(),
        }
    }

    /// The first of as many blocks as there are in one piece, `most` at the most, and their number.
    pub(super) fn take(&mut self, most: u64) -> Result<(u64, u64), Ext4Error> {
        let free = self.free_stretch();
        let taken = most.min(free.end - free.start);
        if taken == 0 {
            return Err(Ext4Error::TooLarge {
                size: self.end * length(BLOCK),
            });
        }
        self.next = free.start + taken;
        Ok((free.start, taken))
    }

    /// The first of exactly that many blocks in one piece.
    fn take_whole(&mut self, blocks: u64) -> Result<u64, Ext4Error> {
        loop {
            let free = self.free_stretch();
            if free.end - free.start >= blocks || free.end == self.end {
                let (start, _) = self.take(blocks)?;
                return Ok(start);
            }
            self.next = free.end;
            self.skipped.push(free);
        }
    }

    /// The next free blocks up to what is reserved.
    fn free_stretch(&self) -> Range<u64> {
        let mut start = self.next;
        for copy in &self.reserved {
            if start < copy.start {
                return start..copy.start;
            }
            start = start.max(copy.end);
        }
        start.min(self.end)..self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_where_sparse_super_wants_them() {
        assert_eq!(copies(1).collect::<Vec<_>>(), [0]);
        assert_eq!(
            copies(50).collect::<Vec<_>>(),
            [0, 1, 3, 5, 7, 9, 25, 27, 49]
        );
    }

    #[test]
    fn no_block_is_given_twice_and_none_that_is_reserved() {
        let mut allocator = Allocator::new(4 * PER_GROUP);
        let mut end = 0;
        while let Ok((start, count)) = allocator.take(1000) {
            assert!(start >= end);
            end = start + count;
            assert!(
                allocator
                    .reserved
                    .iter()
                    .all(|r| end <= r.start || start >= r.end),
                "{start}"
            );
        }
        assert_eq!(end, 4 * PER_GROUP);
    }

    #[test]
    fn there_is_room_for_any_mixture_of_inodes_and_blocks() {
        for inodes in [11, 1000, 40_000, 2_000_000] {
            for blocks in [0, 1, 30_000, 32_768, 1_000_000] {
                let needs = Needs { inodes, blocks };
                let (layout, allocator) = Layout::new(&needs, 0).ok().unwrap();
                assert!(u64::from(layout.groups()) * layout.inodes_per_group >= u64::from(inodes));
                assert!(layout.inodes_per_group <= PER_GROUP);
                assert!(allocator.next + blocks < layout.blocks, "{inodes} {blocks}");
            }
        }
    }
}
