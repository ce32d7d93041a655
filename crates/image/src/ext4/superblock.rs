//! The superblock and the descriptors of the groups.

use crate::ext4::bytes::{Bytes, low};
use crate::ext4::layout::{DESCRIPTOR, Layout, PER_GROUP};
use crate::ext4::number::{FIRST, Numbers};
use crate::tree::{Body, Tree};

const MAGIC: u16 = 0xef53;
const CLEAN: u16 = 1;
const GO_ON_AFTER_ERRORS: u16 = 1;
/// Never check because of how often it was mounted.
const NEVER: u16 = u16::MAX;
const REVISION: u32 = 1;
/// `ext_attr`
const COMPATIBLE: u32 = 0x8;
/// `filetype`, `extents`, `flex_bg`
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x200;
/// `sparse_super`, `large_file`, `huge_file`, `dir_nlink`, `extra_isize`
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40;
/// `user_xattr`, `acl`
const MOUNT_OPTIONS: u32 = 0x4 | 0x8;
/// Half MD4, for directories that a guest makes an index of.
const HASH: u8 = 1;
const SIGNED_HASH: u32 = 1;
/// 16 groups.
const LOG_GROUPS_PER_FLEX: u8 = 4;
const LABEL: &[u8] = b"rekindle";

/// What the file system says about itself, in the words of one group; `free` blocks are counted by group.
pub(super) fn superblock(
    layout: &Layout,
    free: &[u32],
    numbers: &Numbers,
    uuid: [u8; 16],
    group: u32,
) -> [u8; 1024] {
    let inodes = layout.inodes_per_group() * layout.groups();
    let mut block = Bytes::<1024>::new();
    block.u32(0, inodes);
    block.u32(4, low(layout.blocks()));
    block.u32(12, free.iter().sum());
    block.u32(16, inodes - numbers.used());
    // 1024 << 2, of blocks and of clusters.
    block.u32(24, 2);
    block.u32(28, 2);
    block.u32(32, low(PER_GROUP));
    block.u32(36, low(PER_GROUP));
    block.u32(40, layout.inodes_per_group());
    block.u16(54, NEVER);
    block.u16(56, MAGIC);
    block.u16(58, CLEAN);
    block.u16(60, GO_ON_AFTER_ERRORS);
    block.u32(76, REVISION);
    block.u32(84, FIRST);
    block.u16(88, 256);
    block.u16(90, u16::try_from(group).unwrap_or(u16::MAX));
    block.u32(92, COMPATIBLE);
    block.u32(96, INCOMPATIBLE);
    block.u32(100, READ_ONLY_COMPATIBLE);
    block.put(104, &uuid);
    block.put(120, LABEL);
    block.put(236, &uuid);
    block.put(252, &[HASH]);
    block.u32(256, MOUNT_OPTIONS);
    block.u16(348, 32);
    block.u16(350, 32);
    block.u32(352, SIGNED_HASH);
    block.put(372, &[LOG_GROUPS_PER_FLEX]);
    block.0
}

/// The descriptors of all groups.
pub(super) fn group_table(
    layout: &Layout,
    free: &[u32],
    numbers: &Numbers,
    tree: &Tree,
) -> Vec<u8> {
    let per_group = layout.inodes_per_group();
    let mut directories = vec![0_u16; usize::try_from(layout.groups()).unwrap_or_default()];
    for numbered in numbers.iter() {
        if matches!(tree.inode(numbered.id).body, Body::Directory(_)) {
            let group = usize::try_from((numbered.number - 1) / per_group).unwrap_or_default();
            directories[group] += 1;
        }
    }
    let mut table = Vec::new();
    for ((group, free), directories) in (0..).zip(free).zip(directories) {
        let used = numbers
            .used()
            .saturating_sub(group * per_group)
            .min(per_group);
        let narrow = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let mut descriptor = Bytes::<DESCRIPTOR>::new();
        descriptor.u32(0, low(layout.block_bitmap_at(group)));
        descriptor.u32(4, low(layout.inode_bitmap_at(group)));
        descriptor.u32(8, low(layout.inode_table(group)));
        descriptor.u16(12, narrow(*free));
        descriptor.u16(14, narrow(per_group - used));
        descriptor.u16(16, directories);
        table.extend_from_slice(&descriptor.0);
    }
    table
}
