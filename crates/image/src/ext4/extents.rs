//! Where a file's blocks are: a tree of extents, whose root is in the inode.

use crate::ext4::Ext4Error;
use crate::ext4::bytes::{Bytes, high, low};
use crate::spool::{BLOCK, length};

/// The longest extent, in blocks.
pub(super) const MAX_LENGTH: u64 = 32_768;
/// How many entries the inode has room for.
const IN_ROOT: usize = 4;
/// And a block.
const IN_BLOCK: usize = (BLOCK - HEADER) / ENTRY;
const HEADER: usize = 12;
const ENTRY: usize = 12;
const MAGIC: u16 = 0xf30a;

/// Blocks of a file that follow each other on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) file_block: u64,
    pub(super) start: u64,
    pub(super) blocks: u64,
}

/// A tree that is ready to be written.
pub(super) struct Root {
    /// What belongs into the inode.
    pub(super) root: [u8; 60],
    /// The rest.
    pub(super) blocks: Vec<(u64, Vec<u8>)>,
}

impl Root {
    /// `take` gives a free block.
    pub(super) fn build(
        extents: &[Extent],
        mut take: impl FnMut() -> Result<u64, Ext4Error>,
    ) -> Result<Self, Ext4Error> {
        let mut entries = extents
            .iter()
            .map(|extent| (extent.file_block, leaf(extent)))
            .collect::<Vec<_>>();
        let mut blocks = Vec::new();
        let mut depth = 0;
        while entries.len() > IN_ROOT {
            let mut above = Vec::new();
            for chunk in entries.chunks(IN_BLOCK) {
                let block = take()?;
                let mut bytes = node(chunk, IN_BLOCK, depth);
                bytes.resize(BLOCK, 0);
                blocks.push((block, bytes));
                above.push((chunk[0].0, index(chunk[0].0, block)));
            }
            entries = above;
            depth += 1;
        }
        let mut root = [0; 60];
        let bytes = node(&entries, IN_ROOT, depth);
        root[..bytes.len()].copy_from_slice(&bytes);
        Ok(Self { root, blocks })
    }
}

/// How many blocks the tree of a file may take, which has that many runs and blocks. Room for the copies of the
/// superblock, which cut a run in two, is elsewhere.
pub(super) fn tree_blocks_bound(runs: u64, blocks: u64) -> u64 {
    let extents = runs + blocks / MAX_LENGTH + 1;
    if extents < length(IN_ROOT) {
        return 0;
    }
    let leaves = extents / length(IN_BLOCK) + 1;
    leaves + leaves / length(IN_BLOCK) + 1
}

fn node(entries: &[(u64, [u8; ENTRY])], room: usize, depth: u16) -> Vec<u8> {
    let count = |count: usize| u16::try_from(count).unwrap_or(u16::MAX);
    let mut header = Bytes::<HEADER>::new();
    header.u16(0, MAGIC);
    header.u16(2, count(entries.len()));
    header.u16(4, count(room));
    header.u16(6, depth);
    let mut bytes = header.0.to_vec();
    for (_, entry) in entries {
        bytes.extend_from_slice(entry);
    }
    bytes
}

fn leaf(extent: &Extent) -> [u8; ENTRY] {
    let mut entry = Bytes::<ENTRY>::new();
    entry.u32(0, low(extent.file_block));
    entry.u16(4, u16::try_from(extent.blocks).unwrap_or(u16::MAX));
    entry.u16(6, high(extent.start));
    entry.u32(8, low(extent.start));
    entry.0
}

fn index(file_block: u64, block: u64) -> [u8; ENTRY] {
    let mut entry = Bytes::<ENTRY>::new();
    entry.u32(0, low(file_block));
    entry.u32(4, low(block));
    entry.u16(8, high(block));
    entry.0
}
